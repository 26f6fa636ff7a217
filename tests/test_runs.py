"""infra/runs.py: the log and the trajectories as they grow, and how they are read back.

Checkpoints and resume are in test_resume.py, the figures of a step in test_rewards.py.
"""
from dataclasses import asdict

import pytest

import data
import urpo
from data import Group, Prompt
from infra import runs
from infra.ranks import InputError
from rewards import step_figures
from tiny_run import lines


def ranked(index, texts, rewards) -> Group:
    return Group(index, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0)), [5], [[7], [8]], texts=texts,
                 finished=[True, True], rewards=rewards, advantages=[0.7, -0.7], entropy=1.0)


def judged(index, verdict, rewards) -> Group:
    judgement = {"order": [1, 0], "prompt": "p", "text": verdict, "finished": True}
    return Group(index, Prompt("instruction", "Say hi."), [5], [[7, 8, 9], [8]], texts=["hi", "hi"], entropy=3.0,
                 finished=[True, False], judgements=[judgement], rewards=rewards, advantages=[0.7, -0.7])


def open_log(monkeypatch, folder, steps=9, **changes) -> runs.Log:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runs, "catch_signals", lambda: [])  # pytest keeps its own
    settings = asdict(urpo.Config(name="mine", steps=steps)) | changes
    return runs.Log(settings, program="urpo", rows={"reasoning": 5}, may_change=urpo.MAY_CHANGE, about={"dropped": 3})


def figures(**changes) -> dict:
    return {"updates": 1, "nonfinite_updates": 0, "seconds": {"draw": 1.0, "update": 3.0}} | changes


def test_a_new_run_writes_what_it_was_started_with(process_group, tmp_path, monkeypatch):
    log = open_log(monkeypatch, tmp_path, seed=7)
    assert (log.first_step, log.saved) == (0, None)
    about = runs.read_about(tmp_path / "runs" / "mine")
    assert about["config"]["seed"] == 7 and about["rows"] == {"reasoning": 5} and about["dropped"] == 3
    assert about["ranks"] == 1 and about["versions"]["torch"] and about["device"] and "commit" in about


def test_a_step_is_one_line_of_the_log_and_one_line_a_group(process_group, tmp_path, monkeypatch):
    log, config = open_log(monkeypatch, tmp_path, steps=2), urpo.Config(batch=2, minibatches=1)
    groups = [ranked(0, ["a", "b"], [-1.0, 1.0]), judged(1, "<scores>3, 8</scores>", [8.0, 3.0])]
    for step in log.steps():
        urpo.record(config, log, groups, figures(), step)
    own = lines(tmp_path / "runs" / "mine" / "log.jsonl")
    assert [line["step"] for line in own] == [0, 1] and "reasoning" not in own[1]
    assert {kind: own[1][kind] for kind in ("preference", "instruction")} == step_figures(config, groups)
    assert own[1]["tokens_per_second"] == 6 / 4 and own[1]["updates"] == 1
    recorded = list(data.read_groups(tmp_path / "runs" / "mine" / "rollouts.jsonl", []))
    assert recorded == [(0, groups[0]), (0, groups[1]), (1, groups[0]), (1, groups[1])]


def test_three_steps_in_a_row_without_a_finite_update_stop_the_run(process_group, tmp_path, monkeypatch):
    """A step whose updates were all skipped for want of a signal neither counts nor begins anew."""
    log, broken = open_log(monkeypatch, tmp_path), figures(updates=0, nonfinite_updates=2)
    told = [broken, broken, figures(), broken, figures(updates=0), broken, broken]
    steps = log.steps()
    for step in range(6):
        log.write({"step": next(steps), **told[step]}, [], {})
    with pytest.raises(FloatingPointError, match="step 6: .*--lr"):
        log.write({"step": next(steps), **told[6]}, [], {})
    assert len(lines(tmp_path / "runs" / "mine" / "log.jsonl")) == 7


def test_a_resumed_log_repeats_no_step_drops_a_torn_line_and_says_so(tmp_path, capsys):
    path, kept = tmp_path / "log.jsonl", '{"step": 0}\n{"step": 1}\n'
    for rest, said in (('{"step": 2}\n{"step": 3, "lo', f"{path}: cut 2 lines from step 2 on"), ("", "")):
        path.write_text(kept + rest)
        runs.cut_lines(path, 2)
        out = capsys.readouterr().out
        assert path.read_text() == kept and said in out and bool(out) == bool(said)
    path.write_text(f"{kept}noise\n{kept}")
    with pytest.raises(InputError, match="log.jsonl:3: damaged"):
        runs.cut_lines(path, 5)
    assert len(path.read_text().splitlines()) == 5


# ---- reading a run back ----

def test_a_last_line_that_a_crash_cut_short_is_left_out_and_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    repairs = []
    assert runs.read_log(tmp_path, repairs) == [{"step": 0}, {"step": 1}]
    assert len(repairs) == 1 and f"{tmp_path}/log.jsonl:3: " in repairs[0]


@pytest.mark.parametrize("content, where", [
    ('{"step": 0}\n{"st\n{"step": 2}\n', "log.jsonl:2: not JSON"),
    ('{"step": 0}\n{"stop": 1}\n', "log.jsonl:2: .*step"), ('[1]\n', "log.jsonl:1: .*step"),
    ('{"st', "log.jsonl: no step"), (None, "no run here .*log.jsonl"),
], ids=["torn in the middle", "no step", "a list", "one torn line", "no log"])
def test_a_log_that_urpo_did_not_write_is_refused_by_line(tmp_path, content, where):
    if content:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=where):
        runs.read_log(tmp_path, [])
