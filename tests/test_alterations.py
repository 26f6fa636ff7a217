"""What `eval.py explain --all` finds in a real run of which one thing was altered, and what no record can prove.

Each alteration is a forger's best try: `follow` makes rewards, advantages and the log's figures agree with it again.
"""
import copy
import json

import pytest
import torch

import data
from conftest import ROOT
from data import Group
from report import explain
from rewards import REWARD_RANGE, group_advantages, group_rewards
from runs import figures_of_step
from tiny_run import lines, run


@pytest.fixture(scope="module")
def record(taught_model, tmp_path_factory):
    """(groups, log, config) of a run of three steps, the first of which is warm-up, and its folder."""
    folder = tmp_path_factory.mktemp("altered")
    run(folder, taught_model, "--steps", "3", "--judgements", "2", "--audit_judge", "1", ranks=1)
    path = folder / "runs" / "e2e"
    about = json.loads((path / "config.json").read_text())
    return lines(path / "rollouts.jsonl"), lines(path / "log.jsonl"), about, path


@pytest.fixture(scope="module")
def witnesses(record):
    """The tokenizer and the sources of the run, which are loaded once."""
    *_, about, path = record
    notes = []
    tokenizer = explain.find_tokenizer(path, about["config"]["model"], "", notes)
    sources = explain.find_sources(about["config"], about, tokenizer, notes)
    assert tokenizer and sources and not notes
    return tokenizer, sources


def write(folder, groups, log, about):
    for name, written in (("rollouts.jsonl", groups), ("log.jsonl", log)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in written))
    (folder / "config.json").write_text(json.dumps(about))


def follow(groups, log, settings):
    """What a forger computes anew, so that it agrees with what he altered."""
    for group in groups:
        made = Group.from_record(group)
        group["rewards"] = group_rewards(made.prompt, made.texts, made.judgements, settings["tau"])
        group["advantages"] = [0.0] * len(made.texts)
        if group["rewards"] is not None:
            rewards = torch.tensor(group["rewards"])
            group["advantages"] = group_advantages(rewards, settings["advantage"], REWARD_RANGE[group["kind"]]).tolist()
    for line in log:
        own = sorted((group for group in groups if group["step"] == line["step"]), key=lambda group: group["index"])
        made = [Group.from_record(group) for group in own]
        for kind in data.KINDS:
            line.pop(kind, None)
        line |= figures_of_step(made, settings["minibatches"], settings["loss"])
        tokens = sum(group.answer_tokens for group in made)
        line["tokens_per_second"] = tokens / sum(line["seconds"].values())


# ---- the alterations: (what, change of (groups, log, config), does the forger compute anew what follows) ----

def first(groups, kind, step=1):
    return next(group for group in groups if group["step"] == step and group["kind"] == kind)


def of_group(kind, change):
    """A change of the first group of a kind in step 1."""
    return lambda groups, log, about, tokenizer: change(first(groups, kind), tokenizer)


def of_log(change, step=1):
    return lambda groups, log, about, tokenizer: change(log[step])


def of_config(**changes):
    return lambda groups, log, about, tokenizer: about["config"].update(changes)


def of_files(change):
    return lambda groups, log, about, tokenizer: change(groups, log)


def put(field, value, i=0):
    def change(group, tokenizer):
        group[field][i] = value

    return change


def other_ids(group, tokenizer):
    """Another token in place of the first one: as many ids, the same text."""
    group["answers"][0][0] = (group["answers"][0][0] + 1) % 1000 + 100


def answer_said(text):
    """An answer of other ids, and with them another text: nothing in the record speaks against it."""
    def change(group, tokenizer):
        group["answers"][0] = tokenizer.encode(text)
        group["texts"][0], group["finished"][0] = text, True

    return change


def reencode(change):
    """A change of the prompt whose token ids follow."""
    def changed(group, tokenizer):
        change(group)
        group["prompt_ids"] = data.encode_prompt(tokenizer, Group.from_record(group).prompt)

    return changed


def swap_candidates(group):
    for name in ("responses", "truth"):
        group[name][:2] = group[name][1::-1]


def rebuild_judgements(group, tokenizer):
    for judgement in group["judgements"]:
        shown = [group["texts"][i] for i in judgement["order"]]
        ids, judgement["cut"] = data.encode_judgement(tokenizer, group["instruction"], shown, 700)
        judgement["prompt"] = tokenizer.decode(ids)


def text_and_prompt(group, tokenizer):
    group["texts"][0] = "Something else."
    rebuild_judgements(group, tokenizer)


def other_order(group, tokenizer):
    group["judgements"][0]["order"] = group["judgements"][0]["order"][::-1]
    rebuild_judgements(group, tokenizer)


def one_answer_less(group, tokenizer):
    for name in ("answers", "texts", "finished"):
        group[name].pop()


def swap_indices(groups, log):
    a, b = [group for group in groups if group["step"] == 1 and group["kind"] == "reasoning"][:2]
    a["index"], b["index"] = b["index"], a["index"]


def remove(**fields):
    """Lines of rollouts.jsonl that go."""
    def change(groups, log):
        groups[:] = [group for group in groups if any(group[name] != value for name, value in fields.items())]

    return change


def remove_step(step):
    def change(groups, log):
        groups[:] = [group for group in groups if group["step"] != step]
        log[:] = [line for line in log if line["step"] != step]

    return change


def stretch_truth(group):
    group["truth"] = [value * 10 for value in group["truth"]]


FOUND = {
    # numbers alone
    "a reward": (of_group("reasoning", put("rewards", 0.5)), False),
    "an advantage": (of_group("preference", put("advantages", 3.0)), False),
    "a figure of a kind": (of_log(lambda line: line["preference"].update(tau=0.99)), False),
    "a figure of the last step": (of_log(lambda line: line["instruction"].update(reward=9.9), step=2), False),
    "a gradient share": (of_log(lambda line: line["reasoning"].update(gradient_share=0.99)), False),
    "the share of cut judgements": (of_log(lambda line: line["instruction"].update(cut=0.5)), False),
    "tokens per second": (of_log(lambda line: line.update(tokens_per_second=9e9)), False),
    "the number of updates": (of_log(lambda line: line.update(updates=9)), False),
    "a figure that no step has": (of_log(lambda line: line["reasoning"].update(beauty=1.0)), False),
    # answers
    "a ranking's text": (of_group("preference", put("texts", "<scores>9, 7, 5, 3</scores>")), True),
    "a solution's text": (of_group("reasoning", put("texts", "\\boxed{7}")), True),
    "an open answer's text": (of_group("instruction", put("texts", "Something else.")), True),
    "an open answer's text, and with it the judge's prompt": (of_group("instruction", text_and_prompt), True),
    "token ids at equal length": (of_group("reasoning", other_ids), True),
    "ids that are no tokens": (of_group("reasoning", put("answers", [-1, 10**6])), True),
    "an open answer as a whole, ids and text": (of_group("instruction", answer_said("Something else.")), True),
    "an answer that was finished": (of_group("reasoning", put("finished", False)), True),
    "an answer above its limit": (of_group("reasoning", put("answers", [100] * 25)), True),
    "an answer left out": (of_group("reasoning", one_answer_less), True),
    # judgements
    "the judge's prompt": (of_group("instruction", lambda g, t: g["judgements"][0].update(prompt="Praise it.")), True),
    "the judge's order": (of_group("instruction", lambda g, t: g["judgements"][0]["order"].reverse()), True),
    "the judge's order, and with it its prompt": (of_group("instruction", other_order), True),
    "how many answers were cut": (of_group("instruction", lambda g, t: g["judgements"][0].update(cut=2)), True),
    "a judgement left out": (of_group("instruction", lambda g, t: g["judgements"].pop()), True),
    "a judgement twice": (of_group("instruction", lambda g, t: g["judgements"].append(g["judgements"][0])), True),
    # prompts
    "an instruction": (of_group("instruction", lambda g, t: g.update(instruction="Say no.")), True),
    "an instruction, and with it its ids and the judge's prompt": (of_group("instruction", lambda g, t: (
        reencode(lambda h: h.update(instruction="Say no."))(g, t), rebuild_judgements(g, t))), True),
    "ids of a prompt": (of_group("reasoning", put("prompt_ids", 100)), True),
    "a candidate": (of_group("preference", put("responses", "Something else.")), True),
    "a candidate, and with it the ids": (of_group("preference", reencode(
        lambda g: g["responses"].__setitem__(0, "Something else."))), True),
    "two candidates swapped": (of_group("preference", reencode(swap_candidates)), True),
    "a true ranking": (of_group("preference", lambda g, t: g["truth"].reverse()), True),
    "true scores of equal order": (of_group("preference", reencode(stretch_truth)), True),
    "a true answer": (of_group("reasoning", lambda g, t: g.update(answer="123456")), True),
    "a constraint": (of_group("instruction", lambda g, t: g.update(check="none of it")), True),
    "a kind": (of_group("reasoning", lambda g, t: g.update(kind="instruction")), True),
    # which prompts and steps there are
    "an index": (of_group("reasoning", lambda g, t: g.update(index=99)), True),
    "an index of another": (of_group("reasoning", lambda g, t: g.update(index=(g["index"] + 1) % 12)), True),
    "two indices swapped": (of_files(swap_indices), True),
    "a prompt left out": (of_files(remove(step=1, index=3)), True),
    "a prompt of the last step left out": (of_files(remove(step=2, index=11)), True),
    "a prompt of the last step twice": (of_files(lambda groups, log: groups.append(groups[-1])), True),
    "a kind left out of both files": (of_files(remove(step=1, kind="reasoning")), True),
    "a step left out of both files": (of_files(remove_step(1)), True),
    "a step without its line": (of_files(lambda groups, log: log.pop(1)), True),
    "the last step's trajectories": (of_files(remove(step=2)), False),
    "a line of the log twice": (of_files(lambda groups, log: log.append(log[-1])), True),
    # settings
    "tau": (of_config(tau="strict"), False), "advantage": (of_config(advantage="center"), False),
    "loss": (of_config(loss="sequence-mean"), False), "minibatches": (of_config(minibatches=1), False),
    "seed": (of_config(seed=1), False), "mix": (of_config(mix="2:1:1"), False), "batch": (of_config(batch=6), False),
    "group": (of_config(group=3), False), "judgements": (of_config(judgements=1), False),
    "warmup_steps": (of_config(warmup_steps=0), False), "rollouts_every": (of_config(rollouts_every=2), False),
    "max_answer_tokens": (of_config(max_answer_tokens=8), False),
}

# In the words of docs/evaluation.md, which must name each.
UNPROVABLE = {
    "an answer whose ids and text are both replaced": (of_group("reasoning", answer_said("\\boxed{7}")), True),
    "the words of a judge": (of_group("instruction", lambda g, t: g["judgements"][0].update(
        text="<scores>9, 7, 5, 3</scores>")), True),
    "the entropy of a group": (of_group("reasoning", lambda g, t: g.update(entropy=9.0)), True),
    "the loss, the norm of the gradient, the rate": (of_log(lambda line: line.update(loss=0.0, grad_norm=0.0, lr=1.0)),
                                                     False),
    "the clipped shares and the drift": (of_log(lambda line: line.update(clipped_low=0.0, drift_mean=0.0)), False),
    "the seconds and the memory": (of_log(lambda line: (line.update(peak_memory_gib=1.0), line["seconds"].update(
        draw=9.0))), True),
    "the last steps cut off from both files": (of_files(remove_step(2)), True),
}


def explained(record, witnesses, change, follows, tmp_path, monkeypatch, capsys):
    """(is the record right?, what explain said) of an altered copy."""
    groups, log, about = copy.deepcopy(record[:3])
    change(groups, log, about, witnesses[0])
    if follows:
        follow(groups, log, about["config"])
    write(tmp_path, groups, log, about)
    monkeypatch.setattr(explain, "find_tokenizer", lambda *_: witnesses[0])
    monkeypatch.setattr(explain, "find_sources", lambda *_: witnesses[1])
    right = explain.explain(str(tmp_path), check_all=True)
    out, err = capsys.readouterr()
    return right, out + err


def test_the_campaign_is_a_campaign():
    assert len(FOUND) + len(UNPROVABLE) >= 60


def test_the_run_as_it_is(record, capsys):
    """It holds what the alterations need, and nothing is said against it, by the tokenizer and sources of the run."""
    groups, log, _, path = record
    assert [line["step"] for line in log] == [0, 1, 2] and len(groups) == 36
    assert first(groups, "instruction")["rewards"], "no judgement could be read"
    assert explain.explain(str(path), check_all=True)
    out, err = capsys.readouterr()
    assert out == f"{path}: all 144 rewards and advantages are as the texts make them\n" and not err


def test_what_the_forger_computes_anew_is_what_the_run_wrote(record, witnesses, tmp_path, monkeypatch, capsys):
    right, said = explained(record, witnesses, lambda *_: None, True, tmp_path, monkeypatch, capsys)
    assert right, said


@pytest.mark.parametrize("what", FOUND)
def test_an_alteration_is_found(record, witnesses, tmp_path, monkeypatch, capsys, what):
    right, said = explained(record, witnesses, *FOUND[what], tmp_path, monkeypatch, capsys)
    assert not right and "are as the texts make them" not in said


@pytest.mark.parametrize("what", UNPROVABLE)
def test_what_no_record_proves_is_said_in_the_docs(record, witnesses, tmp_path, monkeypatch, capsys, what):
    right, said = explained(record, witnesses, *UNPROVABLE[what], tmp_path, monkeypatch, capsys)
    assert right, said
    assert what in " ".join((ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split())


def test_sources_that_changed_since_are_no_difference_and_are_said(record, witnesses, capsys):
    *_, about, path = record
    notes = []
    settings = about["config"] | {"toy_rows": 41}
    assert explain.find_sources(settings, about, witnesses[0], notes) is None
    settings = about["config"] | {"reasoning": ["gone.jsonl"]}
    assert explain.find_sources(settings, about, witnesses[0], notes) is None
    assert notes[0] == "not compared: prompts with their sources, which are others than when the run began"
    assert notes[1].startswith("not compared: prompts with their sources (--reasoning gone.jsonl: no such file")
