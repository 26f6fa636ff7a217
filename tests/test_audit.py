"""`eval.py explain`: one prompt in words, and a whole run whose numbers are made again from its texts."""
import json
import math
import random
import shutil
from dataclasses import asdict

import pytest
import torch

import data
import urpo
from data import Group, InputError, Prompt
from eval import main
from report.explain import agree
from rewards import group_advantages, group_rewards
from runs import figures_of_step


def fails(arguments, capsys, status=2):
    """The one line of an error, or with status 1 the differences that `explain` found."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == status, err
    assert "are as the texts make them" not in out
    return err


@pytest.fixture(autouse=True)
def without_tokenizer(monkeypatch):
    """The runs here are made up, and their ids mean nothing. A real run is altered in test_alterations.py."""
    def refuse(folder, chat_template=""):
        raise InputError(f"{folder}: no model here")

    monkeypatch.setattr("plan.load_tokenizer", refuse)


def make_group(index, prompt, texts, judgements=()):
    """A group as urpo.reward leaves it."""
    made = Group(index, prompt, [1], [[5, 6]] * len(texts), texts, [True] * len(texts), list(judgements), entropy=1.0)
    made.rewards = group_rewards(prompt, texts, made.judgements)
    made.advantages = [0.0] * len(texts)
    if made.rewards is not None:
        made.advantages = group_advantages(torch.tensor(made.rewards)).tolist()
    return made


def orders(index, step, seed):
    """The orders of two judgements over two answers: one, and its reverse."""
    return data.judgement_orders(make_group(index, Prompt("instruction", "Why?"), ["x", "y"]), step, seed, 2, 2, 0)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, steps=3, every=1, broken=()):
    """A run as urpo.py records it: each step a preference, a question, a judged and an unjudged group.

    broken: steps whose update was not finite. A seed at which the second judgement of the first prompt always sees the
    answers the other way round.
    """
    records, log = [], []
    seed = next(n for n in range(9999) if all(orders(0, step, n)[1] == [1, 0] for step in range(steps)))
    ranking = Prompt("preference", "Why?", tuple("abcd"), (3.0, 2.0, 1.0, 0.0))
    for step in range(steps):
        verdicts, solved = ["<scores>9, 7, 7, 4</scores>", "none"], [f"it is {step + 4}", "it is 4"]
        judgements = {}
        for index, texts in ((0, ["none", "<scores>3, 8</scores>"]), (3, ["none", "none"])):
            judgements[index] = [{"order": order, "cut": 0, "prompt": "?", "text": text}
                                 for order, text in zip(orders(index, step, seed), texts)]
        groups = [make_group(1, ranking, verdicts),
                  make_group(2, Prompt("reasoning", "Why?", answer="4"), solved),
                  make_group(0, Prompt("instruction", "Why?"), ["x", "y"], judgements[0]),
                  make_group(3, Prompt("instruction", "Why?"), ["x", "y"], judgements[3])]
        if step % every == 0 or step in broken:
            records += [made.to_record(step) for made in groups]
        updates = {"updates": step not in broken, "skipped_updates": step in broken,
                   "nonfinite_updates": step in broken}
        figures = figures_of_step(sorted(groups, key=lambda group: group.index), 1, "token-mean")
        log.append({"step": step, **figures, **{name: int(value) for name, value in updates.items()},
                    "seconds": {"update": 2.0}, "tokens_per_second": 8.0})
    folder.mkdir()
    settings = asdict(urpo.Config(seed=seed, mix="1:1:2", batch=4, group=2, judgements=2, minibatches=1,
                                  warmup_steps=0, rollouts_every=every))
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
def test_explain_all_passes_on_a_sound_run_and_says_what_it_could_not_compare(tmp_path, capsys, every, answers):
    main(["explain", str(write_run(tmp_path / "run", every=every)), "--all"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and not err
    assert out.startswith("not compared: token ids with texts, judges' prompts and sources with the record (")
    assert out.endswith(f"run: all {answers} rewards and advantages are as the texts make them\n")


def test_a_step_whose_update_was_not_finite_is_recorded_off_the_stride_and_accepted(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=4, every=2, broken=[1])
    main(["explain", str(run), "--all"])
    out, err = capsys.readouterr()
    assert "all 24 rewards" in out and not err  # of steps 0, 1 and 2
    alter(run, lambda line: line.update(nonfinite_updates=0, skipped_updates=0, updates=1), "log.jsonl", 1)
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert "step 1: in rollouts.jsonl, in spite of --rollouts_every 2" in err


@pytest.mark.parametrize("line, change, part", [
    (0, put("rewards", 0, 0.5), "step 0, prompt 1, answer 1: reward 0.5 recorded, 0.91"),
    (1, put("rewards", 1, 0.0), "step 0, prompt 2, answer 2: reward 0.0 recorded, 1.0 derived"),
    (4, put("advantages", 1, 0.0), "step 1, prompt 1, answer 2: advantage 0.0 recorded, -0.70"),
    (8, put("texts", 0, "<scores>9, 7, 7, 5.5</scores> 1"), None),  # the same order, so the same tau
    (8, put("texts", 0, "<scores>9, 7, 8, 4</scores>"), "step 2, prompt 1, answer 1: reward 0.91"),
    (8, put("texts", 1, "<scores>1, 1, 1, 1</scores>"), "answer 2: reward -1.0 recorded, 0.0 derived"),
    (2, lambda g: g["judgements"][1].update(text="<scores>8, 3</scores>"), "prompt 0, answer 1: reward 8.0 recorded"),
    (2, lambda g: g["judgements"][1].update(order=[1, 1]), "step 0, prompt 0: orders must name the answers of a group"),
    (2, lambda g: g["judgements"][1].update(text="none"), "prompt 0, answer 1: reward 8.0 recorded, None derived"),
    (2, lambda g: g.update(judgements=[]), "prompt 0, answer 1: reward 8.0 recorded, None derived"),
    (3, lambda g: g.update(rewards=[0.0, 0.0]), "prompt 3, answer 1: reward 0.0 recorded, None derived"),
    (3, put("advantages", 0, 1.0), "prompt 3, answer 1: advantage 1.0 recorded, 0.0 derived"),
    (1, put("texts", 0, "it is 9"), "prompt 2, answer 1: reward 1.0 recorded, 0.0 derived"),
    (1, lambda g: g.update(answer="9"), "prompt 2, answer 1: reward 1.0 recorded, 0.0 derived"),
    (0, lambda g: g.update(truth=g["truth"][::-1]), "prompt 1, answer 1: reward 0.91"),
    (0, lambda g: g.update(rewards=None), "prompt 1, answer 1: reward None recorded, 0.91"),
    (1, lambda g: g["rewards"].pop(), "prompt 2, answer 2: reward None recorded, 1.0 derived"),
    (1, lambda g: g["advantages"].append(0.0), "prompt 2, answer 3: advantage 0.0 recorded, None derived"),
    (1, lambda g: g["texts"].append("it is 4"), "prompt 2, answer 3: reward None recorded, 1.0 derived"),
    (1, put("rewards", 0, "1.0"), "prompt 2, answer 1: reward '1.0' recorded, 1.0 derived"),
    (1, put("rewards", 0, math.nan), "prompt 2, answer 1: reward nan recorded, 1.0 derived"),
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
    (lambda line: line.pop("reasoning"), "step 1: reasoning.prompts is None in log.jsonl, 1 derived"),
    (lambda line: line["reasoning"].update(gradient_share=0.5), "reasoning.gradient_share is 0.5 in log.jsonl, 0.3"),
    (lambda line: line.update(tokens_per_second=9.0), "step 1: tokens_per_second is 9.0 in log.jsonl, 8.0 derived"),
    (lambda line: line.update(updates=2), "step 1: updates is 2 in log.jsonl, 1 derived"),
    (lambda line: line.update(skipped_updates=1), "step 1: skipped_updates is 1 in log.jsonl, 0 derived"),
    (lambda line: line.pop("seconds"), "step 1: tokens_per_second is 8.0 in log.jsonl, None derived"),
    (lambda line: line.update(step=3), "log.jsonl: its steps are [0, 3, 2], and not 0 to 2, each once and in order"),
    (lambda line: line.update(step=0), "log.jsonl: its steps are [0, 0, 2]"),
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
    for kept, said in [
            (lines[:5] + lines[6:], "step 1: prompts [2] are missing, doubled or too many in rollouts.jsonl"),
            (lines[:4] + lines[8:], "step 1: 0 prompts in rollouts.jsonl, and its line in log.jsonl"),
            (lines[:6] + lines[5:], "step 1: prompts [2] are missing, doubled or too many in rollouts.jsonl"),
            # The last step is no better: its trajectories are on the disk before its line of the log.
            (lines[:11], "step 2: prompts [3] are missing"), (lines + lines[11:], "step 2: prompts [3] are missing"),
            (lines[:8], "step 2: 0 prompts in rollouts.jsonl, and its line in log.jsonl")]:
        (run / "rollouts.jsonl").write_text("".join(kept))
        assert said in fails(["explain", run, "--all"], capsys, status=1)


def test_nothing_in_the_last_step_is_forgiven(tmp_path, capsys):
    """Delete a line there, and forge the reward that the log gives it: this passed once, as what a crash leaves."""
    run = write_run(tmp_path / "run")
    lines = (run / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (run / "rollouts.jsonl").write_text("".join(lines[:11]))
    alter(run, lambda line: line["instruction"].update(reward=9.5), "log.jsonl", 2)
    assert "step 2: prompts [3] are missing" in fails(["explain", run, "--all"], capsys, status=1)


def test_only_every_kth_step_has_trajectories(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=5, every=2)
    whole = (run / "rollouts.jsonl").read_text()
    stray = json.loads(whole.splitlines()[0]) | {"step": 1}
    (run / "rollouts.jsonl").write_text(whole + json.dumps(stray) + "\n")
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert "step 1: in rollouts.jsonl, in spite of --rollouts_every 2" in err


def test_a_cut_last_line_of_a_step_in_the_log_is_a_difference_and_the_rest_is_still_checked(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    text = (run / "rollouts.jsonl").read_text()
    (run / "rollouts.jsonl").write_text(text[:-40])
    alter(run, lambda line: line["preference"].update(tau=0.25), "log.jsonl", 1)
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert "rollouts.jsonl:12: the last line is incomplete" in err and "step 2: prompts [3] are missing" in err
    assert "step 1: preference.tau is 0.25" in err


def test_what_a_crash_leaves_is_forgiven_and_said_trajectories_of_one_step_that_the_log_has_not(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text[:-40])
    main(["explain", str(run), "--all"])
    out, err = capsys.readouterr()
    assert "log.jsonl:3: the last line is incomplete" in err and "all 24 rewards" in out
    assert "step 2: 4 prompts in rollouts.jsonl, and no line in log.jsonl: the run ended before it was written" in err
    (run / "rollouts.jsonl").write_text((run / "rollouts.jsonl").read_text()[:-40])
    main(["explain", str(run), "--all"])
    assert "all 22 rewards" in capsys.readouterr().out
    (run / "log.jsonl").write_text(text.splitlines(keepends=True)[0])
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert "step 1: 4 prompts in rollouts.jsonl, and no line in log.jsonl\n" in err


def test_advantages_are_derived_by_the_runs_own_setting(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["config"]["advantage"] = "center"
    (run / "config.json").write_text(json.dumps(config))
    err = fails(["explain", run, "--all"], capsys, status=1)
    assert "step 1, prompt 2, answer 1: advantage -0.7071" in err and "recorded, -0.5 derived" in err


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
    main(["explain", str(run), "--step", "2", "--prompt", "1"])
    out = capsys.readouterr().out
    for part in ("step 2, prompt 1: preference", "> Why?", "> a", "truth: [3.0, 2.0, 1.0, 0.0]",
                 "answer 1, 2 tokens: reward 0.9129, advantage 0.7071", "scores: [9.0, 7.0, 7.0, 4.0]",
                 "which earns -1", "none \\x1b[31m", "mean -0.04356, unbiased std 1.353"):
        assert part in out, (part, out)
    assert "\x1b" not in out and "are as the texts make them" not in out
    main(["explain", str(run), "--step", "2", "--prompt", "2"])
    out = capsys.readouterr().out
    for part in ("Why?", "truth: '4'", "it is 6", "answer 2, 2 tokens: reward 1, advantage 0.7071"):
        assert part in out, (part, out)
    main(["explain", str(run), "--step", "2", "--prompt", "0"])
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
    main(["explain", str(run), "--step", "2", "--prompt", "2"])
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["explain", str(run), "--step", "2", "--prompt", "1"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.startswith("step 2, prompt 1, answer 1: reward 0.5 recorded, 0.91287")
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
    (run / "config.json").write_text('{"config": {"tau": "b"}}')
    assert "has no advantage, loss, " in fails(["explain", run, "--all"], capsys)
    shutil.copy(write_run(tmp_path / "other") / "config.json", run)
    (run / "rollouts.jsonl").unlink()
    assert "nothing to derive from" in fails(["explain", run, "--all"], capsys)
