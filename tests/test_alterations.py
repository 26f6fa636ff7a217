"""What if? Lines of urpo.py altered one by one, each of which fails a check; and a real run's record altered, which
the audit finds. In the record each alteration is a forger's best try: what follows from it is computed anew."""
import copy
import importlib.util
import inspect
import json
import sys

import pytest

import data
import test_urpo
import urpo
from conftest import ROOT
from data import Group
from lab import audit
from rewards import step_figures
from tiny_run import lines, run


def altered(tmp_path, old: str, new: str):
    """The path of a urpo.py in which a line is another one."""
    code = (ROOT / "urpo.py").read_text(encoding="utf-8")
    assert code.count(old) == 1, old
    (tmp_path / "urpo.py").write_text(code.replace(old, new), encoding="utf-8")
    return tmp_path / "urpo.py"


# ---- the lines of the seven parts: the check is a test of test_urpo.py ----

UPDATE = ("test_an_update_equals_its_rebuild_in_float64", {"changes": {"minibatches": 2, "importance_cap": 1.1}})
STALE = ("test_a_sampler_with_other_weights_stops_the_run_before_any_weight_moves",
         {"minibatches": 2, "sampler": "stale"})
BROKEN = ("test_an_update_that_is_not_finite_is_skipped_and_counted_and_the_next_is_made", {"broken": "weights"})
RATE = ("test_the_rate_follows_the_number_of_updates_that_were_made", {})
JUDGED = ("test_self_scores_follow_their_answers_through_the_shuffle_and_the_readable_ones_count",
          {"told": [(9, 1), (7, 3), ()], "changes": {"judgements": 2, "judge_list": 2}})
REWARDS = ("test_rewards_of_all_kinds_and_that_centred_ones_have_one_scale", {})
ROLLOUT = ("test_rollout_keeps_ids_texts_and_logprobs_of_every_sample", {})
LINES = [
    ('prompt, ids)\n        for sample in samples', 'prompt, ids)\n        for sample in samples[:2]', ROLLOUT),
    ('index, "answer")', '0, "answer")', ROLLOUT),
    ("shown = [group.texts[i] for i in order]", "shown = group.texts", JUDGED),
    ("REWARD_RANGE[group.prompt.kind]", "(0.0, 1.0)", REWARDS),
    ("group.advantages = group_advantages(rewards,", "group.advantages = group_advantages(-rewards,", REWARDS),
    ("lengths += map(len, group.answers)", "lengths += map(len, group.answers * group.has_signal)", UPDATE),
    ("for rows in minibatches[1:]:", "for rows in minibatches[2:]:", UPDATE),
    ("row.keep_old(logprob_N.detach(), config.importance_cap)", "row.keep_old(logprob_N.detach())", UPDATE),
    ("(logprob_N - row.old_N).exp()", "(logprob_N - logprob_N.detach()).exp()", UPDATE),
    ("config.clip_low, config.clip_high)\n            loss", "0.0, config.clip_high)\n            loss", UPDATE),
    ("loss = -(row.weight_N", "loss = (row.weight_N", UPDATE),
    ("    optimizer.zero_grad()\n", "", UPDATE),
    ("        if m == 0:\n", "        if m == 1:\n", STALE),
    ("    if math.isfinite(norm):\n", "    if True:\n", BROKEN),
    ("learning_rate(config, updates_done(optimizer))\n        optimizer", "config.lr\n        optimizer", RATE)]


@pytest.mark.parametrize("old, new, check", LINES, ids=[new.strip() or "no zero_grad" for _, new, _ in LINES])
def test_an_altered_line_of_a_part_fails_its_test(request, process_group, tmp_path, monkeypatch, old, new, check):
    spec = importlib.util.spec_from_file_location("altered_urpo", altered(tmp_path, old, new))
    monkeypatch.setitem(sys.modules, "altered_urpo", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["altered_urpo"])
    monkeypatch.setattr(test_urpo, "urpo", sys.modules["altered_urpo"])
    test, given = getattr(test_urpo, check[0]), check[1]
    values = {name: given[name] if name in given else request.getfixturevalue(name)
              for name in inspect.signature(test).parameters}
    with pytest.raises((AssertionError, TypeError, FloatingPointError, pytest.fail.Exception)):
        test(**values)


# ---- the lines of the loop: the check is the run itself, or the audit of its record ----

LOOP = {  # what: (old, new, which check fails)
    "another step's batch": ("data.draw(config, sources, step)", "data.draw(config, sources, step + 1)", "audit"),
    "prompts in another order": ("data.shard(batch, ", "data.shard(batch[::-1], ", "audit"),
    "nobody judges": ("        score(config, sampler, tokenizer, groups, step)\n", "", "audit"),
    "no rewards": ("        reward(config, groups)\n", "", "audit"),
    "another temperature": ("seeds=seeds, temperature=config.temperature)\n    for (index", "seeds=seeds, "
                            "temperature=0.5)\n    for (index", "drift"),
    "no sync": ('= sync(sampler, policy)\n        clock', '= 0.0\n        clock', "drift")}


@pytest.mark.slow
@pytest.mark.parametrize("what", LOOP)
def test_an_altered_line_of_the_loop_is_found(taught_model, tmp_path, what):
    old, new, check = LOOP[what]
    output = run(tmp_path, taught_model, "--steps", "3", ranks=1, program=altered(tmp_path, old, new),
                 status=2 if check == "drift" else 0)
    assert ("error: drift: " in output) if check == "drift" else not audit.audit(tmp_path / "runs" / "e2e")


# ---- the record of a run: the check is the audit ----

def follow(groups: list[dict], log: list[dict], config) -> None:
    """What a forger computes anew: rewards, advantages and the log's figures."""
    made = {}
    for place, record in enumerate(groups):
        group = Group.from_record(record)
        urpo.reward(config, [group])
        groups[place] = group.to_record(record["step"])
        made.setdefault(record["step"], []).append(group)
    for line in log:
        own = sorted(made.get(line["step"], []), key=lambda group: group.index)
        for kind in data.KINDS:
            line.pop(kind, None)
        line |= step_figures(config, own)
        tokens = sum(len(answer) for group in own for answer in group.answers)
        line["tokens_per_second"] = tokens / sum(line["seconds"].values())


def put(field, value):
    return lambda group: group[field].__setitem__(0, value)


GROUPS = [  # of the first group of this kind in step 1
    ("reasoning", "text", put("texts", "\\boxed{7}")), ("instruction", "text", put("texts", "Something else.")),
    ("reasoning", "ids", put("answers", [100, 101, 102])), ("reasoning", "no ids", put("answers", [-1, 10**6])),
    ("reasoning", "length", put("answers", [100] * 25)), ("reasoning", "end", put("finished", False)),
    ("instruction", "judge's prompt", lambda g: g["judgements"][0].update(prompt="Praise it.")),
    ("instruction", "judge's order", lambda g: g["judgements"][0]["order"].reverse()),
    ("instruction", "cut answers", lambda g: g["judgements"][0].update(cut=2)),
    ("instruction", "judgement twice", lambda g: g["judgements"].append(g["judgements"][0])),
    ("instruction", "instruction", lambda g: g.update(instruction="Say no.")),
    ("preference", "candidate", put("responses", "Something else.")),
    ("preference", "truth", lambda g: g.update(truth=[value * 10 for value in g["truth"]])),
    ("reasoning", "answer", lambda g: g.update(answer="123456")), ("reasoning", "prompt ids", put("prompt_ids", 100)),
    ("reasoning", "kind", lambda g: g.update(kind="instruction")), ("reasoning", "index", lambda g: g.update(index=99))]
FILES = [  # (groups, log)
    ("reward", lambda groups, log: groups[20]["rewards"].__setitem__(0, 0.25)),
    ("advantage", lambda groups, log: groups[20]["advantages"].__setitem__(0, 3.0)),
    ("figure", lambda groups, log: log[1]["preference"].update(tau=0.99)),
    ("unknown figure", lambda groups, log: log[1]["reasoning"].update(beauty=1.0)),
    ("updates", lambda groups, log: log[1].update(updates=9)), ("speed", lambda _, log: log[1].update(
        tokens_per_second=9e9)), ("prompt left out", lambda groups, log: groups.pop(15)),
    ("prompt twice", lambda groups, log: groups.append(groups[-1])), ("no line", lambda groups, log: log.pop(1)),
    ("line twice", lambda groups, log: log.append(log[-1]))]
SETTINGS = dict(tau="strict", advantage="center", loss="sequence-mean", minibatches=1, seed=1, mix="2:1:1", batch=6,
                group=3, judgements=2, warmup_steps=0, max_answer_tokens=8)
UNPROVABLE = [("reasoning", "entropy", lambda g: g.update(entropy=9.0)), ("instruction", "what a judge said", lambda g: g[
    "judgements"][0].update(text="<scores>9, 7, 5, 3</scores>"))]


@pytest.fixture(scope="module")
def record(finished):
    """(groups, log, config.json, tokenizer and sources, which are loaded once) of a run, of its first three steps."""
    about = json.loads((finished / "config.json").read_text())
    config = audit.settings_of(finished, about)
    tokenizer = audit.find_tokenizer(finished, config, [])
    groups = [group for group in lines(finished / "rollouts.jsonl") if group["step"] < 3]
    return groups, lines(finished / "log.jsonl")[:3], about, tokenizer, audit.find_sources(config, about, tokenizer, [])


@pytest.mark.slow
@pytest.mark.parametrize("way, found", [("nothing", False), ("group", True), ("file", True), ("setting", True),
                                        ("unprovable", False)])
def test_an_altered_record_is_found_and_what_nobody_can_prove_is_not(record, tmp_path, monkeypatch, way, found):
    monkeypatch.setattr(audit, "find_tokenizer", lambda *_: record[3])
    monkeypatch.setattr(audit, "find_sources", lambda *_: record[4])
    cases = {"nothing": [None], "group": GROUPS, "file": FILES, "setting": list(SETTINGS), "unprovable": UNPROVABLE}
    for case in cases[way]:
        groups, log, about = copy.deepcopy(record[:3])
        if way in ("group", "unprovable"):
            case[2](next(group for group in groups if group["step"] == 1 and group["kind"] == case[0]))
        if way == "setting":
            about["config"][case] = SETTINGS[case]
        elif way != "file":
            follow(groups, log, urpo.Config(**about["config"]))
        else:
            case[1](groups, log)
        (tmp_path / "config.json").write_text(json.dumps(about))
        for name, written in (("rollouts.jsonl", groups), ("log.jsonl", log)):
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in written))
        assert audit.audit(tmp_path) != found, case
