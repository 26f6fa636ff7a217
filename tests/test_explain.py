"""`eval.py explain`: one prompt in words, and a whole run whose numbers are made again from its texts."""
import json
import math
import random
import shutil

import pytest
import torch

from data import KINDS, Group, Prompt
from eval import main
from report.explain import agree
from rewards import group_advantages, group_rewards
from runs import figures_of_kind


def fails(arguments, capsys, status=2):
    """The one line of an error, or with status 1 the differences that `explain` found."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == status, err
    assert "are as the texts make them" not in out
    return err


def make_group(index, prompt, texts, judgements=()):
    """A group as urpo.reward leaves it."""
    made = Group(index, prompt, [1], [[5, 6]] * len(texts), texts, [True] * len(texts), list(judgements), entropy=1.0)
    made.rewards = group_rewards(prompt, texts, made.judgements)
    made.advantages = [0.0] * len(texts)
    if made.rewards is not None:
        made.advantages = group_advantages(torch.tensor(made.rewards)).tolist()
    return made


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, steps=3, every=1):
    """A run as urpo.py records it: each step a preference, a question, a judged and an unjudged group."""
    records, log = [], []
    ranking = Prompt("preference", "Why?", tuple("abcd"), (3.0, 2.0, 1.0, 0.0))
    for step in range(steps):
        verdicts, solved = ["<scores>9, 7, 7, 4</scores>", "none"], [f"it is {step + 4}", "it is 4"]
        unread = {"order": [1, 0], "prompt": "?", "text": "none"}
        judged = [unread, {"order": [1, 0], "prompt": "?", "text": "<scores>3, 8</scores>"}]
        groups = [make_group(0, ranking, verdicts),
                  make_group(1, Prompt("reasoning", "Why?", answer="4"), solved),
                  make_group(2, Prompt("instruction", "Why?"), ["x", "y"], judged),
                  make_group(3, Prompt("instruction", "Why?"), ["x", "y"], [unread])]
        if step % every == 0:
            records += [made.to_record(step) for made in groups]
        line = {"step": step}
        for kind in KINDS:
            line[kind] = figures_of_kind([made for made in groups if made.prompt.kind == kind])
        log.append(line)
    folder.mkdir()
    settings = {"tau": "b", "advantage": "std", "rollouts_every": every}
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    write_lines(folder / "log.jsonl", log)
    write_lines(folder / "rollouts.jsonl", records)
    return folder


def alter(run, change, name="rollouts.jsonl", line=0):
    lines = [json.loads(text) for text in (run / name).read_text().splitlines()]
    change(lines[line])
    write_lines(run / name, lines)


def put(field, i, value):
    """A change of entry i of a list of the record."""
    def change(record):
        record[field][i] = value

    return change


# ---- the whole run ----

@pytest.mark.parametrize("every, answers", [(1, 24), (2, 16), (3, 8)])
def test_explain_all_passes_on_a_sound_run_and_says_so_in_one_line(tmp_path, capsys, every, answers):
    main(["explain", str(write_run(tmp_path / "run", every=every)), "--all"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    assert out.endswith(f"run: all {answers} rewards and advantages are as the texts make them\n")


@pytest.mark.parametrize("line, change, part", [
    (0, put("rewards", 0, 0.5), "step 0, prompt 0, answer 1: reward 0.5 recorded, 0.91"),
    (1, put("rewards", 1, 0.0), "step 0, prompt 1, answer 2: reward 0.0 recorded, 1.0 derived"),
    (4, put("advantages", 1, 0.0), "step 1, prompt 0, answer 2: advantage 0.0 recorded, -0.70"),
    (8, put("texts", 0, "<scores>9, 7, 7, 5.5</scores> 1"), None),  # the same order, so the same tau
    (8, put("texts", 0, "<scores>9, 7, 8, 4</scores>"), "step 2, prompt 0, answer 1: reward 0.91"),
    (8, put("texts", 1, "<scores>1, 1, 1, 1</scores>"), "answer 2: reward -1.0 recorded, 0.0 derived"),
    (2, lambda g: g["judgements"][1].update(text="<scores>8, 3</scores>"), "prompt 2, answer 1: reward 8.0 recorded"),
    (2, lambda g: g["judgements"][1].update(order=[1, 1]), "step 0, prompt 2: every order must be a permutation"),
    (2, lambda g: g["judgements"][1].update(text="none"), "prompt 2, answer 1: reward 8.0 recorded, None derived"),
    (2, lambda g: g.update(judgements=[]), "prompt 2, answer 1: reward 8.0 recorded, None derived"),
    (3, lambda g: g.update(rewards=[0.0, 0.0]), "prompt 3, answer 1: reward 0.0 recorded, None derived"),
    (3, put("advantages", 0, 1.0), "prompt 3, answer 1: advantage 1.0 recorded, 0.0 derived"),
    (1, put("texts", 0, "it is 9"), "prompt 1, answer 1: reward 1.0 recorded, 0.0 derived"),
    (1, lambda g: g.update(answer="9"), "prompt 1, answer 1: reward 1.0 recorded, 0.0 derived"),
    (0, lambda g: g.update(truth=g["truth"][::-1]), "prompt 0, answer 1: reward 0.91"),
    (0, lambda g: g.update(rewards=None), "prompt 0, answer 1: reward None recorded, 0.91"),
    (1, lambda g: g["rewards"].pop(), "prompt 1, answer 2: reward None recorded, 1.0 derived"),
    (1, lambda g: g["advantages"].append(0.0), "prompt 1, answer 3: advantage 0.0 recorded, None derived"),
    (1, lambda g: g["texts"].append("it is 4"), "prompt 1, answer 3: reward None recorded, 1.0 derived"),
    (1, put("rewards", 0, "1.0"), "prompt 1, answer 1: reward '1.0' recorded, 1.0 derived"),
    (1, put("rewards", 0, math.nan), "prompt 1, answer 1: reward nan recorded, 1.0 derived"),
    # What earns nothing is seen in the figures of the log.
    (2, put("texts", 0, "y"), "step 0: instruction.distinct is 2.0 in log.jsonl, 1.5 derived"),
    (1, put("finished", 0, False), "step 0: reasoning.finished is 1.0 in log.jsonl, 0.5 derived"),
    (1, put("answers", 0, [5, 6, 7]), "step 0: reasoning.tokens is 4 in log.jsonl, 5 derived"),
    (1, lambda g: g.update(entropy=2.0), "step 0: reasoning.entropy is 1.0 in log.jsonl, 2.0 derived"),
    (1, lambda g: g.update(kind="instruction"), "step 0: reasoning.prompts is 1 in log.jsonl, None derived"),
])
def test_explain_all_shows_what_a_record_says_and_its_text_does_not(tmp_path, capsys, line, change, part):
    run = write_run(tmp_path / "run")
    alter(run, change, line=line)
    if part is None:
        main(["explain", str(run), "--all"])
        assert not capsys.readouterr().err
    else:
        err = fails(["explain", run, "--all"], capsys, status=1)
        assert part in err, err


@pytest.mark.parametrize("change, part", [
    (lambda line: line["preference"].update(tau=0.25), "step 1: preference.tau is 0.25 in log.jsonl, 0.91"),
    (lambda line: line["instruction"].update(unjudged=0), "step 1: instruction.unjudged is 0 in log.jsonl, 1 derived"),
    (lambda line: line["instruction"].update(reward=None), "instruction.reward is None in log.jsonl, 5.5 derived"),
    (lambda line: line["reasoning"].pop("reward"), "reasoning.reward is None in log.jsonl, 0.5 derived"),
    (lambda line: line["reasoning"].update(beauty=1.0), "reasoning.beauty is 1.0 in log.jsonl, None derived"),
    (lambda line: line.pop("reasoning"), "step 1: 4 prompts in rollouts.jsonl, 3 in log.jsonl"),
])
def test_explain_all_compares_the_figures_of_the_log(tmp_path, capsys, change, part):
    run = write_run(tmp_path / "run")
    alter(run, change, "log.jsonl", 1)
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert part in err, err


def test_each_difference_is_printed(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    alter(run, put("rewards", 0, 0.5), line=0)
    alter(run, put("advantages", 1, 0.5), line=4)
    alter(run, lambda line: line["preference"].update(tau=0.25), "log.jsonl", 0)
    assert len(fails(["explain", run, "--all"], capsys, status=1).splitlines()) == 3


def test_a_step_without_its_trajectories_is_a_difference(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    lines = (run / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (run / "rollouts.jsonl").write_text("".join(lines[:5] + lines[6:]))
    assert "step 1: 3 prompts in rollouts.jsonl, 4 in log.jsonl" in fails(["explain", run, "--all"], capsys, status=1)
    (run / "rollouts.jsonl").write_text("".join(lines[:4] + lines[8:]))
    assert "step 1: 0 prompts in rollouts.jsonl, 4 in log.jsonl" in fails(["explain", run, "--all"], capsys, status=1)


def test_only_every_kth_step_has_trajectories(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=5, every=2)
    whole = (run / "rollouts.jsonl").read_text()
    stray = json.loads(whole.splitlines()[0]) | {"step": 1}
    (run / "rollouts.jsonl").write_text(whole + json.dumps(stray) + "\n")
    assert "step 1: 1 prompts in rollouts.jsonl, 0 in log.jsonl" in fails(["explain", run, "--all"], capsys, status=1)


def test_a_truncated_last_line_is_repaired_and_said_while_the_rest_is_still_checked(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    text = (run / "rollouts.jsonl").read_text()
    (run / "rollouts.jsonl").write_text(text[:-40])
    main(["explain", str(run), "--all"])
    out, err = capsys.readouterr()
    assert "all 22 rewards" in out
    assert "rollouts.jsonl:12: the last line is incomplete" in err and "step 2 is the last and incomplete" in err
    alter(shutil.copytree(write_run(tmp_path / "other"), tmp_path / "cut"), put("rewards", 0, 0.5), line=4)
    (tmp_path / "cut" / "rollouts.jsonl").write_text((tmp_path / "cut" / "rollouts.jsonl").read_text()[:-9])
    assert "step 1, prompt 0, answer 1: reward 0.5" in fails(["explain", tmp_path / "cut", "--all"], capsys, status=1)


def test_a_cut_last_line_of_the_log_is_repaired_too(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text[:-40])
    main(["explain", str(run), "--all"])
    out, err = capsys.readouterr()
    assert "log.jsonl:3: the last line is incomplete" in err and "all 24 rewards" in out
    assert "step 2 is the last and incomplete (4 prompts in rollouts.jsonl, 0 in log.jsonl)" in err


def test_advantages_are_derived_by_the_runs_own_setting(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["config"]["advantage"] = "center"
    (run / "config.json").write_text(json.dumps(config))
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert "step 1, prompt 1, answer 1: advantage -0.7071" in err and "recorded, -0.5 derived" in err


def test_numbers_agree_but_for_rounding_and_none_is_not_zero():
    assert agree(2, 2.0) and agree(0.7071058, 0.70710576) and agree(None, None) and agree(math.nan, math.nan)
    for a, b in [(None, 0.0), (0.0, None), (1.0, 1.001), (math.nan, 1.0), ("1.0", 1.0), (None, math.nan)]:
        assert not agree(a, b), (a, b)
    rng = random.Random(0)
    for _ in range(100):
        value = rng.uniform(-10, 10)
        assert agree(value, torch.tensor(value).item())


# ---- one prompt ----

def test_explain_shows_one_prompt_in_full(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    alter(run, put("texts", 1, "none \x1b[31m"), line=8)
    main(["explain", str(run), "--step", "2", "--prompt", "0"])
    out = capsys.readouterr().out
    for part in ("step 2, prompt 0: preference", "> Why?", "> a", "truth: [3.0, 2.0, 1.0, 0.0]",
                 "answer 1, 2 tokens: reward 0.9129, advantage 0.7071", "scores: [9.0, 7.0, 7.0, 4.0]",
                 "which earns -1", "none \\x1b[31m", "mean -0.04356, unbiased std 1.353"):
        assert part in out, (part, out)
    assert "\x1b" not in out and "are as the texts make them" not in out
    main(["explain", str(run), "--step", "2", "--prompt", "1"])
    out = capsys.readouterr().out
    for part in ("Why?", "truth: '4'", "it is 6", "answer 2, 2 tokens: reward 1, advantage 0.7071"):
        assert part in out, (part, out)
    main(["explain", str(run), "--step", "2", "--prompt", "2"])
    out = capsys.readouterr().out
    for part in ("judge prompt over answers 2, 1", "scores: unreadable", "scores: [3.0, 8.0]",
                 "answer 1, 2 tokens: reward 8, advantage 0.7071"):
        assert part in out, (part, out)
    main(["explain", str(run), "--step", "2", "--prompt", "3"])
    out = capsys.readouterr().out
    assert "reward none, no judgement can be read (D8), advantage 0\n" in out and "mean" not in out


def test_one_prompt_is_checked_too(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    alter(run, put("rewards", 0, 0.5), line=8)
    main(["explain", str(run), "--step", "2", "--prompt", "1"])
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["explain", str(run), "--step", "2", "--prompt", "0"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.startswith("step 2, prompt 0, answer 1: reward 0.5 recorded, 0.91287")
    assert len(err.splitlines()) == 1
    assert "reward 0.9129" in out  # what the text earns


def test_explain_refuses_what_it_cannot_check(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert "no prompt 9 of step 2; it holds steps [0, 1, 2]" in fails(
        ["explain", run, "--step", 2, "--prompt", 9], capsys)
    assert "--step and --prompt, or --all" in fails(["explain", run, "--step", 2], capsys)
    assert "no log.jsonl" in fails(["explain", tmp_path, "--all"], capsys)
    alter(run, lambda g: g.pop("truth"), line=4)
    assert "rollouts.jsonl:5: no field 'truth'" in fails(["explain", run, "--all"], capsys)
    (run / "config.json").unlink()
    assert "nothing to derive from" in fails(["explain", run, "--all"], capsys)
    shutil.copy(write_run(tmp_path / "other") / "config.json", run)
    (run / "rollouts.jsonl").unlink()
    assert "nothing to derive from" in fails(["explain", run, "--all"], capsys)
