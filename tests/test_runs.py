"""runs.py: the figures of a step, the log and the trajectories, and how they are read back.

Checkpoints are in test_resume.py.
"""
import doctest
import json

import pytest

import runs
from data import Group, InputError, Prompt


def test_worked_examples_in_docstrings():
    assert doctest.testmod(runs).failed == 0


def ranked(index, texts, rewards, **changes) -> Group:
    return Group(index, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0)), [5], [[7], [8]], texts=texts,
                 finished=[True, True], rewards=rewards, **{"advantages": [0.7, -0.7], "entropy": 1.0} | changes)


def judged(index, verdict, rewards, **changes) -> Group:
    judgement = {"order": [1, 0], "cut": 0, "prompt": "p", "text": verdict}
    return Group(index, Prompt("instruction", "Say hi."), [5], [[7, 8, 9], [8]], texts=["hi", "hi"],
                 finished=[True, False], judgements=[judgement], rewards=rewards,
                 **{"advantages": [0.7, -0.7], "entropy": 3.0} | changes)


# ---- the figures of a step ----

def test_the_figures_of_preference_groups():
    figures = runs.figures_of_kind([ranked(0, ["<scores>9, 2</scores>", "first"], [1.0, -1.0]),
                                    ranked(1, ["<scores>9, 2</scores>"] * 2, [1.0, 1.0], advantages=[0.0, 0.0])])
    assert figures == {
        "prompts": 2, "unjudged": 0, "reward": 0.5, "reward_std": 0.5, "zero_spread": 0.5,
        "advantage_scale": pytest.approx(0.35), "length": 1, "tokens": 4, "finished": 1, "distinct": 1.5,
        "entropy": 1.0, "tau": 1.0, "format": 0.75, "first_position": 0.5}


def test_the_figures_of_judged_groups_and_of_one_that_no_judgement_could_read():
    unread = judged(1, "all are fine", None, advantages=[0.0, 0.0], entropy=None)
    figures = runs.figures_of_kind([judged(0, "<scores>3, 8</scores>", [8.0, 3.0]), unread])
    assert figures == {
        "prompts": 2, "unjudged": 1, "reward": 5.5, "reward_std": 2.5, "zero_spread": 0,
        "advantage_scale": pytest.approx(0.35), "length": 2, "tokens": 8, "finished": 0.5, "distinct": 1,
        "entropy": 3.0, "score_std": 2.5, "cut": 0, "format": 0.5, "first_position": -0.5,
        "judge_tau": None, "gold": None, "gold_constraint": None}


def test_what_could_not_be_measured_is_none_and_not_0():
    figures = runs.figures_of_kind([judged(0, "all are fine", None, advantages=[0.0, 0.0], entropy=None)])
    for name in ("reward", "reward_std", "zero_spread", "entropy", "score_std", "first_position"):
        assert figures[name] is None, name
    assert figures["format"] == 0 and figures["unjudged"] == 1
    assert runs.figures_of_kind([]) == {}


@pytest.mark.parametrize("scores, tau", [("2, 9", 1), ("9, 2", -1), ("5, 5", 0), ("?", None)])
def test_self_scores_are_compared_with_the_hidden_gold_which_is_no_reward(scores, tau):
    group = judged(0, f"<scores>{scores}</scores>", [9.0, 2.0])  # the judge was shown answer 1, then answer 0
    group.prompt = Prompt("instruction", "Describe dogs in one sentence.")
    group.texts = ["Dogs bark.", "Cats sleep. Cats eat"]
    figures = runs.figures_of_kind([group])
    assert (figures["judge_tau"], figures["gold"], figures["gold_constraint"]) == (tau, 0.5, 0.5)
    group.texts = ["Dogs bark.", "Dogs eat."]  # as good as each other: nothing to agree with
    assert runs.figures_of_kind([group])["judge_tau"] is None


def test_questions_have_no_figures_of_a_referee():
    solved = Group(5, Prompt("reasoning", "1 + 1?", answer="2"), [5], [[7], [8]], texts=["2", "3"],
                   finished=[True, True], rewards=[1.0, 0.0], advantages=[0.7, -0.7], entropy=0.5)
    figures = runs.figures_of_kind([solved])
    assert figures["reward"] == 0.5 and not {"tau", "format", "first_position", "score_std"} & set(figures)


def test_the_share_of_a_kind_in_the_gradient_is_that_of_its_weighted_advantages():
    """One update over P and I, a second one over R alone: tokens count there by 1/6 and 1/3."""
    groups = [ranked(0, ["a", "b"], [-1.0, 1.0], advantages=[1.0, -1.0]),
              judged(1, "<scores>3, 8</scores>", [8.0, 3.0], advantages=[0.5, -0.5]),
              Group(2, Prompt("reasoning", "q"), [5], [[7], [7]], advantages=[2.0, 0.0]),
              Group(3, Prompt("reasoning", "q"), [5], [[7]], advantages=[0.0])]
    pull = {"preference": 2 / 6, "instruction": 4 * 0.5 / 6, "reasoning": 2 / 3}
    assert runs.gradient_shares(groups, 2, "token-mean") == pytest.approx(
        {kind: part / sum(pull.values()) for kind, part in pull.items()})
    pull = {"preference": 2 / 4, "instruction": 1 / 4, "reasoning": 2 / 3}  # each of 4 answers, then each of 3
    assert runs.gradient_shares(groups, 2, "sequence-mean") == pytest.approx(
        {kind: part / sum(pull.values()) for kind, part in pull.items()})
    assert runs.gradient_shares(groups[3:], 1, "token-mean") == runs.gradient_shares([], 2, "token-mean") == {}


# ---- the log and the trajectories ----

def open_log(run, first_step=0, rollouts_every=1) -> runs.Log:
    """A log as a run opens it that goes on at `first_step`."""
    log = runs.Log(run, {"rollouts_every": rollouts_every, "minibatches": 1, "loss": "token-mean"})
    run.mkdir(exist_ok=True)
    for name in ("log.jsonl", "rollouts.jsonl"):
        runs.cut_lines(run / name, first_step)
    return log


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_run_writes_what_it_was_started_with(process_group, tmp_path):
    log = runs.Log(tmp_path / "runs" / "mine", {"resume": False, "seed": 7})
    assert log.open({"weights": "model"}) == (0, None)
    about = runs.read_about(tmp_path / "runs" / "mine")
    assert about["config"] == {"resume": False, "seed": 7} and about["weights"] == "model"
    assert about["ranks"] == 1 and about["versions"]["torch"] and about["device"] and "commit" in about


def test_a_step_is_one_line_of_the_log_and_one_line_a_group(tmp_path):
    log = open_log(tmp_path, rollouts_every=2)
    groups = [judged(2, "<scores>3, 8</scores>", [8.0, 3.0]), ranked(0, ["a", "b"], [-1.0, 1.0])]
    for step in range(3):
        records = [group.to_record(step) for group in groups]
        shown = log.write(step, records, {"loss": 0.5, "seconds": {"draw": 1.0, "update": 3.0}})
    assert shown == "preference 0.00, instruction 5.50"
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [0, 1, 2]
    line = lines(tmp_path / "log.jsonl")[-1]
    assert line["preference"] == {**runs.figures_of_kind(groups[1:]), "gradient_share": 1 / 3}
    assert line["instruction"] == {**runs.figures_of_kind(groups[:1]), "gradient_share": pytest.approx(2 / 3)}
    assert "reasoning" not in line
    assert line["loss"] == 0.5 and line["tokens_per_second"] == 6 / 4
    recorded = list(runs.read_groups(tmp_path / "rollouts.jsonl", []))
    assert recorded == [(0, groups[1]), (0, groups[0]), (2, groups[1]), (2, groups[0])]


def test_a_step_that_was_not_finite_is_recorded_off_the_stride(tmp_path):
    log = open_log(tmp_path, rollouts_every=3)
    for step, nonfinite in enumerate([0, 0, 1, 0]):
        groups = [ranked(0, ["a", "b"], [-1.0, 1.0]).to_record(step)]
        log.write(step, groups, {"nonfinite_updates": nonfinite, "seconds": {"draw": 1.0}})
    assert [step for step, _ in runs.read_groups(tmp_path / "rollouts.jsonl", [])] == [0, 2, 3]


def test_a_resumed_log_repeats_no_step_and_drops_a_torn_line_and_says_so(tmp_path, capsys):
    torn = '{"step": 2, "lo'
    for name in ("log.jsonl", "rollouts.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n' + torn)
    log = open_log(tmp_path, first_step=2)
    cuts = [line for line in capsys.readouterr().out.splitlines() if "cut" in line]
    assert cuts == [f"{tmp_path / name}: cut 2 lines from step 2 on, which the run repeats"
                    for name in ("log.jsonl", "rollouts.jsonl")]
    log.write(2, [], {"seconds": {"draw": 1.0}, "new": True})
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [0, 1, 2]
    assert lines(tmp_path / "log.jsonl")[-1]["new"]
    assert (tmp_path / "rollouts.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_log_that_needs_no_cut_stays_as_it_is_and_nothing_is_said(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    runs.cut_lines(tmp_path / "log.jsonl", 2)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    runs.write_whole(path, "\u00e4")
    assert path.read_bytes() == "\u00e4".encode()
    runs.write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00" and [file.name for file in path.parent.iterdir()] == ["page.html"]

    def fail(self, content):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "write_bytes", fail)
    with pytest.raises(OSError):
        runs.write_whole(path, "other")
    assert path.read_bytes() == b"\x00"


# ---- reading a run back ----

def test_a_last_line_that_a_crash_cut_short_is_left_out_and_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "lo')
    repairs = []
    assert runs.read_log(tmp_path, repairs) == [{"step": 0}, {"step": 1}]
    assert repairs == [f"{tmp_path}/log.jsonl:3: the last line is incomplete and was left out"]


@pytest.mark.parametrize("content, message", [
    ('{"step": 0}\n{"st\n{"step": 2}\n', "log.jsonl:2: not JSON (.*); remove the line"),
    ('{"step": 0}\n{"stop": 1}\n', "log.jsonl:2: no field 'step'; not a line that urpo.py wrote"),
    ('[1]\n', "log.jsonl:1: no field 'step'; not a line that urpo.py wrote"),
    ("", "log.jsonl: no step is complete yet"), ('{"st', "log.jsonl: no step is complete yet"),
], ids=["torn in the middle", "no step", "a list", "empty", "one torn line"])
def test_a_log_that_urpo_did_not_write_is_refused_by_line(tmp_path, content, message):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        runs.read_log(tmp_path, [])


def test_a_folder_without_a_run_is_refused_and_one_without_settings_is_read(tmp_path):
    with pytest.raises(InputError, match=r"no run here \(no log.jsonl\); give a folder such as runs/urpo"):
        runs.read_log(tmp_path, [])
    assert runs.read_about(tmp_path) == {}
    (tmp_path / "config.json").write_text('{\n"config": ')
    with pytest.raises(InputError, match="config.json:2: not JSON .*; remove it or restore it"):
        runs.read_about(tmp_path)


def test_a_trajectory_without_a_field_is_refused_by_line_and_field(tmp_path):
    record = ranked(0, ["a", "b"], [0.0, 1.0]).to_record(0)
    broken = {name: value for name, value in record.items() if name != "answers"}
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(broken) + "\n")
    groups = runs.read_groups(path, [])
    assert next(groups)[0] == 0
    with pytest.raises(InputError, match=r"rollouts.jsonl:2: no field 'answers'; not a line that urpo.py wrote"):
        next(groups)


def test_a_run_does_not_go_on_with_other_rows():
    before = {"preference": 1, "reasoning": 2}
    runs.check_sources(before, dict(before))
    runs.check_sources(None, before)  # a run from before rows were noted
    with pytest.raises(InputError, match="the rows of reasoning are not those that the run began with"):
        runs.check_sources(before, before | {"reasoning": 3})


def test_checkpoints_without_a_log_are_a_run_too(tmp_path, monkeypatch):
    """Otherwise a new run of the same name would one day resume from the old one's checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "old" / "checkpoints" / "step_9").mkdir(parents=True)
    with pytest.raises(InputError, match="holds a run"):
        runs.check_folder("old", resume=False)
    runs.check_folder("old", resume=True)
