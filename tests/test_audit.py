"""What `lab.audit` finds in a real run of which one thing was altered, and what no record can prove. FORGED are a
forger's best tries: rewards, advantages and the log's figures are made to agree with the change."""
import copy
import json
import math
from functools import lru_cache
from types import SimpleNamespace

import pytest

import data
import urpo
from data import Group
from infra import chat
from infra.ranks import InputError
from lab import audit
from rewards import step_figures
from tiny_run import lines, write_lines

STEPS = 2  # a record that ends early is whole too
P, R, I = data.KINDS  # noqa: E741
encode_prompt = lru_cache(data.encode_prompt)


@pytest.fixture(scope="module")
def record(finished):
    """(lines of rollouts.jsonl, of log.jsonl, config.json) of a real run's first steps; tokenizer, rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.parent.parent)  # where it ran
        _, (tokenizer, _), sources = audit.witnesses(finished)
    files = []
    for name in ("rollouts.jsonl", "log.jsonl"):
        files.append([line for line in lines(finished / name) if line["step"] < STEPS])
    return *files, json.loads((finished / "config.json").read_text()), tokenizer, sources


@pytest.fixture
def audited(record, tmp_path, monkeypatch, capsys):
    """A function: (is the record right?, what was said) of a copy with one change."""
    *files, tokenizer, sources = record
    monkeypatch.setattr(chat, "load_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(data, "load_sources", lambda *_: (sources, {}))
    monkeypatch.setattr(data, "encode_prompt", encode_prompt)

    def altered(change=lambda *_: None, follows=False):
        groups, log, about = copy.deepcopy(files)
        change(groups, log, about, tokenizer)
        if follows:
            follow(groups, log, SimpleNamespace(**about["config"]))
        (tmp_path / "config.json").write_text(json.dumps(about))
        write_lines(tmp_path / "rollouts.jsonl", *groups)
        write_lines(tmp_path / "log.jsonl", *log)
        return audit.audit(tmp_path), "".join(capsys.readouterr())

    return altered


def follow(groups, log, config):
    """What a forger computes anew."""
    for record in groups:
        (group,) = urpo.reward(config, [Group.from_record(record)])
        record |= {"rewards": group.rewards, "advantages": group.advantages}
    for line in log:
        own = [group for group in groups if group["step"] == line["step"]]
        made = [Group.from_record(group) for group in sorted(own, key=lambda group: group["index"])]
        for kind in data.KINDS:
            line.pop(kind, None)
        line |= step_figures(config, made)
        tokens = sum(len(ids) for group in made for ids in group.answers)
        line["tokens_per_second"] = tokens / sum(line["seconds"].values())


# ---- the alterations: functions of (lines of rollouts.jsonl, lines of log.jsonl, config.json, tokenizer) ----


def of(kind, change):
    """A change of the first group of a kind after the warm-up, as a function of (group, tokenizer)."""
    def changed(groups, log, about, tokenizer):
        for group in groups:
            if group["kind"] == kind and group["step"] and group["rewards"]:
                return change(group, tokenizer)
        raise AssertionError("the run has no such group")

    return changed


def put(field, value, i=0):  # these two are functions of (group, tokenizer)
    return lambda group, tokenizer: group[field].__setitem__(i, value)


def fields(**changes):
    return lambda group, tokenizer: group.update(changes)


def judgement(**fields):
    return of(I, lambda group, tokenizer: group["judgements"][0].update(fields))


def logged(change):
    return lambda groups, log, *_: change(log[1])


def config(**changes):
    return lambda groups, log, about, tokenizer: about["config"].update(changes)


def removed(name, value):
    """Lines of rollouts.jsonl and of log.jsonl that go."""
    def change(*files):
        for part in files[:2]:
            part[:] = [line for line in part if line.get(name) != value]

    return change


def said(text):  # ids and text of an answer
    def change(group, tokenizer):
        group["answers"][0], group["texts"][0], group["finished"][0] = tokenizer.encode(text), text, True

    return change


def rebuilt(change):
    """A change, after which prompt ids and judges' prompts are made to agree with it."""
    def changed(group, tokenizer):
        change(group, tokenizer)
        group["prompt_ids"] = data.encode_prompt(tokenizer, Group.from_record(group).prompt)
        for judged in group["judgements"]:
            shown = [group["texts"][i] for i in judged["order"]]
            judged["prompt"] = tokenizer.decode(data.encode_judgement(tokenizer, group["instruction"], shown))

    return changed


NUMBERS = {
    "a reward": of(R, put("rewards", 0.5)), "not finite": of(R, put("rewards", math.nan)),
    "no reward": of(P, fields(rewards=None)), "an advantage": of(P, put("advantages", 3.0)),
    "a figure of a kind": logged(lambda line: line[P].update(tau=0.99)),
    "a missing figure": logged(lambda line: line[R].pop("reward")), "a missing kind": logged(lambda line: line.pop(R)),
    "a figure that no step has": logged(lambda line: line[R].update(beauty=1.0)),
    "speed": logged(lambda line: line.update(tokens_per_second=9e9)),
    "updates": logged(lambda line: line.update(updates=9, skipped_updates=9)),
    "an order that no judgement can have": judgement(order=[1, 1, 2, 3]),
    "tau": config(tau="strict"),
    "minibatches": config(minibatches=1), "seed": config(seed=1), "mix": config(mix="2:1:1"), "batch": config(batch=6),
    "group": config(group=3), "judgements": config(judgements=3), "warmup_steps": config(warmup_steps=0),
}
FORGED = {
    "a ranking's text": of(P, put("texts", "<scores>9, 7, 5, 3</scores>")),
    "a solution's text": of(R, put("texts", "\\boxed{7}")),
    "an open answer": of(I, rebuilt(put("texts", "Else."))), "an open answer, with its ids": of(I, said("Else.")),
    "ids that are no tokens": of(R, put("answers", [-1, 10**6])), "cut off early": of(R, put("finished", False)),
    "above the limit": of(R, put("answers", [100] * 99)), "two answers": of(R, put("texts", [], slice(2, None))),
    "the judge's prompt": judgement(prompt="Praise it."),
    "the judge's order": of(I, rebuilt(lambda group, _: group["judgements"][0]["order"].reverse())),
    "a judgement left out": of(I, lambda group, _: group["judgements"].pop()),
    "a judgement twice": of(I, lambda group, _: group["judgements"].append(group["judgements"][0])),
    "an instruction": of(I, rebuilt(fields(instruction="Say no."))), "prompt ids": of(R, put("prompt_ids", 99)),
    "a candidate": of(P, rebuilt(put("responses", "Else."))),
    "candidates": of(P, rebuilt(lambda group, _: [group[name].reverse() for name in ("responses", "truth")])),
    "a true ranking": of(P, put("truth", 99.0)), "a true answer": of(R, fields(answer="123456")),
    "a kind": of(R, fields(kind=I)), "an index": of(R, fields(index=99)),
    "an index twice": of(R, fields(index=0)), "a prompt left out": removed("index", 3),
    "the last prompt twice": lambda groups, *_: groups.append(groups[-1]), "a step left out": removed("step", 0),
    "a line left out": lambda groups, log, *_: log.pop(0), "a line twice": lambda groups, log, *_: log.append(log[1]),
    "a line without its prompts": lambda groups, log, *_: groups.__delitem__(slice(12, None)),
}
UNPROVABLE = {
    "an answer whose ids and text are both replaced": of(R, said("\\boxed{7}")),
    "the words of a judge": judgement(text="<scores>9, 7, 5, 3</scores>"),
    "the entropy of a group": of(R, fields(entropy=9.0)),
    "loss, clipped shares, drift": logged(lambda line: line.update(loss=0.0, clipped_low=0, drift_mean=0)),
    "the last steps cut off from both files": removed("step", 1),
    "the last line of the log, which a crash may cost": lambda groups, log, *_: log.pop(),
}


def test_what_a_forger_computes_anew_is_right_and_a_difference_is_the_exit_status(audited, tmp_path):
    assert audited(follows=True)[0]  # test_end_to_end.py audits a whole run
    audited(NUMBERS["a reward"])
    with pytest.raises(SystemExit, match="1"):
        audit.main([str(tmp_path)])


@pytest.mark.parametrize("what", [*NUMBERS, *FORGED, *UNPROVABLE])
def test_an_alteration_is_found_unless_no_record_can_show_it(audited, what):
    change = (NUMBERS | FORGED | UNPROVABLE)[what]
    right, said = audited(change, follows=what not in NUMBERS)
    assert right == (what in UNPROVABLE) == ("as the texts make them" in said), said


def test_other_sources_are_no_difference_and_are_said(audited, monkeypatch):
    right, said = audited(lambda groups, log, about, _: about["rows"].update(reasoning=1))
    assert right and "not compared: prompts with their sources" in said
    monkeypatch.setattr(data, "load_sources", lambda *_: data.load_source("reasoning", "gone.jsonl"))
    right, said = audited()
    assert right and "gone.jsonl" in said


@pytest.mark.parametrize("judge, right", [("same", True), ("other", False), ("gone", True)])
def test_a_frozen_judges_prompts_are_built_by_its_own_tokenizer(audited, record, monkeypatch, judge, right):
    """These were built by the policy's, so a judge with another template shows a difference."""
    tokenizers = {"same": record[3], "other": copy.deepcopy(record[3])}
    tokenizers["other"].chat_template += "{{ 'Begin.' if add_generation_prompt }}"

    def load(folder, *_):
        if folder == "gone":
            raise InputError("no tokenizer")
        return tokenizers.get(folder, record[3])

    monkeypatch.setattr(chat, "load_tokenizer", load)
    found, said = audited(config(judge=judge))
    assert found == right and ("not compared: the judge's prompts" in said) == (judge == "gone")


@pytest.mark.parametrize("change, part", [
    (lambda groups, *_: groups[4].pop("truth"), "rollouts.jsonl:5"),
    (lambda groups, log, *_: log.clear(), "log.jsonl"), (lambda groups, log, about, _: about.clear(), "config.json"),
    (lambda groups, log, about, _: about["config"].pop("tau"), "by tau"),
    (lambda groups, log, about, _: about["config"].update(beauty=1), "by beauty"),
])
def test_what_cannot_be_checked_is_refused(audited, change, part):
    with pytest.raises(InputError, match=part):
        audited(change)
