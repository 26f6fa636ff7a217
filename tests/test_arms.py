"""The comparisons: every arm can be run, what is done is not run again, and the tables say what the CSV says."""
import doctest
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import baselines
import data
import flags
import urpo
from conftest import ROOT
from data import InputError
from report import comparison, evidence
from report.comparison import BASE, START
from tiny_run import wait_for


@pytest.mark.parametrize("module", [evidence, comparison])
def test_worked_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0 and attempted >= 1


# ---- the arms ----


def test_what_defines_an_arm_cannot_be_overridden_and_a_wrong_flag_is_refused_before_all_runs():
    command = evidence.command_of("urpo_slow", 0, ["--lr", "1"])
    assert command[-2:] == ["--lr", "3e-6"] and command[0] == "urpo.py"
    with pytest.raises(InputError, match="--onyl main: no such setting"):
        evidence.check([(START, 0), ("urpo", 0)], ["--onyl", "main"])
    for flag in (["--seed", "7"], ["--name=x"], ["--model", "half"], ["--resume", "True"], ["--save_every", "2"]):
        with pytest.raises(InputError, match=f"{flag[0]}: each arm has its own"):
            evidence.check([("urpo", 0)], flag)


def test_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    lock = evidence.only_one()
    with pytest.raises(InputError, match="already runs in this folder"):
        evidence.only_one()
    lock.close()
    evidence.only_one().close()


@pytest.mark.parametrize("arm", evidence.ARMS)
def test_every_arm_is_a_command_that_its_program_takes(arm):
    program, *arguments = evidence.command_of(arm, 1, ["--precision", "bfloat16"])
    if program == "urpo.py":
        settings = urpo.Config
    else:
        settings, command = baselines.Baseline, arguments.pop(0)
        assert program == "baselines.py" and command in baselines.COMMANDS
    config = flags.parse(settings, urpo.PRESETS, arguments)
    flags.check(config, world=1)
    assert config.name == f"evidence-{arm}-1" and config.seed == 1 and config.precision == "bfloat16"
    counts = data.mix_counts(config.mix, config.batch, warmup=False)
    assert arm == "mix_1_1_1" or counts["instruction"] in (0, 12)


def test_claims_name_arms_and_every_arm_belongs_to_a_claim():
    named = {arm for _, arms in evidence.CLAIMS.values() for arm in arms.split()}
    assert named == {*evidence.ARMS, *evidence.STARTS} - {START}


def test_the_start_comes_first_and_what_an_arm_needs_before_it():
    jobs = evidence.wanted([], None, False)
    assert jobs[0] == (START, 0) and len(set(jobs)) == len(jobs)
    for place, (arm, seed) in enumerate(jobs):
        assert all((need, seed) in jobs[:place] for need in evidence.needs(arm))
    seeds = {arm: sum(other == arm for other, _ in jobs) for arm in evidence.ARMS}
    main = evidence.CLAIMS["main"][1].split()
    for arm, count in seeds.items():
        assert count == (5 if arm in main else 1 if arm.endswith(("_slow", "_fast")) else 3), arm


def test_a_part_can_be_asked_for():
    assert evidence.wanted(["rm_gen"], 1, False) == [(START, 0), (BASE, 0), ("mix_1_1_0", 0), ("rm_gen", 0)]
    quick = [arm for arm, seed in evidence.wanted([], None, True)]
    assert set(quick) == {START, "reward_model", *evidence.QUICK}
    with pytest.raises(InputError, match="--only rm_gn: no such claim or arm"):
        evidence.wanted(["rm_gn"], None, False)


# ---- from runs to lines ----


def answers(right: int) -> list[dict]:
    """Four held-out rows of every kind. Of four samples `right` are right, and so is what is greedy."""
    sums = ["so 4"] * right + ["so 5"] * (4 - right)
    facts = ["Dogs need a walk every day."] * right + ["walk a. Cats need every"] * (4 - right)
    forward, backward = ["<scores>9, 2</scores>"] * 4, ["<scores>2, 9</scores>"] * right + [""] * (4 - right)
    kinds = [
        {"kind": "reasoning", "asked": "2 + 2?", "truth": "4", "sampled": sums, "gold": None},
        {"kind": "instruction", "asked": "Tell me about dogs.", "truth": "", "sampled": facts,
         "gold": [4] * right + [1] * (4 - right)},
        {"kind": "preference", "asked": "Say hi.", "truth": [1, 0], "sampled": forward, "gold": None},
    ]
    for answer in kinds:
        mirrored = backward if answer["kind"] == "preference" else []
        answer |= {"greedy": answer["sampled"][:1], "mirrored": mirrored, "mirrored_greedy": mirrored[:1]}
    return kinds * 4


FIGURES = {"referee": {"expected score": {"value": 0.9}}, "reasoning": {}}


def fake_call(right: dict[str, int], calls: list):
    """In place of a process: writes what training and measuring would leave behind."""

    def call(command, cores, log):
        calls.append((shlex.join(command), cores))
        name = command[command.index("--name") + 1] if "--name" in command else Path(command[-1]).parent.name
        home = evidence.ROOT / "runs" / name
        home.mkdir(parents=True, exist_ok=True)
        arm = home.name.split("-")[1]
        if arm not in right:
            log.write_text("line 1\nerror: drift")
            return 2, 0.5
        log.write_text("")
        (home / "log.jsonl").write_text(json.dumps({"peak_memory_gib": 6.1, "instruction": {"length": 9.0}}) + "\n")
        if command[0] == "eval.py":
            (home / "heldout-after.json").write_text(json.dumps({"answers": answers(right[arm]), "figures": FIGURES}))
        return 0, 2.0

    return call


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A CSV of the start, URPO, the judge and a run that died; and the calls that it took."""
    calls = []
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "call", fake_call({START: 1, "urpo": 3, "mix_1_1_0": 2}, calls))
    path = tmp_path / "evidence.csv"
    jobs = [(START, 0), ("urpo", 0), ("mix_1_1_0", 0), ("rm_gen", 0)]
    evidence.run_all(jobs, path, ["--lr", "2e-5"], 1)
    return path, calls, jobs


def test_a_line_has_the_figures_of_the_answers_and_the_command(measured):
    path, calls, _ = measured
    line = {line["arm"]: line for line in comparison.read(path)}["urpo"]
    assert line["status"] == "done" and line["minutes"] == line["eval_minutes"] == "2.0" and line["gib"] == "6.1"
    assert line["rows_reasoning"] == line["rows_referee"] == line["rows_gold"] == line["rows_all_four"] == "3333"
    for measure in ("referee", "reasoning", "gold", "all_four"):
        assert line[f"{measure}_greedy"] == "1.0" and line[f"rows_{measure}_greedy"] == "4444"
    assert line["referee_expected"] == "0.9"
    assert line["reasoning"] == "0.75" and line["rows_parts"] == "4441" * 4
    assert line["command"] == ("python urpo.py --preset smol --name evidence-urpo-0 --seed 0 --save_every 0 --lr 2e-5")
    assert len({tuple(cores) for _, cores in calls}) == 1


def test_a_run_that_died_is_a_line_and_is_shown(measured):
    path, calls, _ = measured
    line = comparison.read(path)[-1]
    assert line["arm"] == "rm_gen" and line["status"] == "died (2): line 1 error: drift" and line["referee"] == ""
    assert not any("eval.py" in command and "rm_gen" in command for command, _ in calls)
    shown = comparison.summary(comparison.read(path), evidence.CLAIMS, {})
    assert "- rm_gen, seed 0: died (2): line 1 error: drift" in shown


def test_a_run_that_a_signal_stopped_is_no_whole_run(tmp_path, monkeypatch):
    def call(command, cores, log):
        log.write_text("stopped by a signal; 5 steps are saved and --resume continues")
        return 0, 1.0

    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "call", call)
    assert evidence.run_arm("urpo", 0, [], [0])["status"].startswith("died (15): stopped by a signal")


def test_what_has_a_line_is_not_run_again(measured):
    path, calls, jobs = measured
    before, content = len(calls), path.read_text()
    evidence.run_all(jobs, path, [], 1)
    assert len(calls) == before and path.read_text() == content


def test_a_judge_whose_folder_is_gone_is_trained_again_for_the_arm_that_needs_it(measured):
    path, calls, jobs = measured
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # without rm_gen
    shutil.rmtree(evidence.ROOT / "runs" / "evidence-mix_1_1_0-0")
    before = len(calls)
    evidence.run_all(jobs, path, [], 1)
    assert ["mix_1_1_0" in command and "rm_gen" not in command for command, _ in calls[before:]] == [True, True, False]
    found = [line["arm"] for line in comparison.read(path)]
    assert found == [START, "urpo", "mix_1_1_0", "mix_1_1_0_again", "rm_gen"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_kills_what_runs_and_leaves_no_line_of_it(tmp_path, stop):
    """As a process: a signal while the first arm trains."""
    program = (
        "import sys; sys.path.insert(0, {root!r})\n"
        "from pathlib import Path; from report import evidence\n"
        "evidence.ROOT, evidence.check = Path({folder!r}), lambda *arguments: None\n"
        "evidence.sys.argv = ['evidence.py', '--csv', {csv!r}, '--jobs', '1']\n"
        "evidence.command_of = lambda *arguments: ['-c', 'import time; print(1); time.sleep(600)']\n"
        "evidence.main()").format(root=str(ROOT), folder=str(tmp_path), csv=str(tmp_path / "evidence.csv"))
    process = subprocess.Popen(  # as from a terminal: under nohup it would ignore that this is closed
        [sys.executable, "-c", program], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    (trained,) = wait_for_child(process)
    process.send_signal(stop)
    assert process.wait(timeout=60) == 130
    assert not trained.is_running() and not (tmp_path / "evidence.csv").exists()


def wait_for_child(process):
    """The arm that trains, and not git, which is asked for the commit before it."""
    found = []

    def started():
        for child in psutil.Process(process.pid).children():
            try:
                if "time.sleep" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                pass
        return found

    wait_for(started, process)
    return found


def test_more_runs_than_cores_are_refused(tmp_path):
    with pytest.raises(InputError, match="--jobs 999: this machine has"):
        evidence.run_all([], tmp_path / "evidence.csv", [], 999)


def test_a_mistake_of_ours_ends_all_and_is_shown(tmp_path, monkeypatch):
    """And leaves no worker waiting for cores that nobody gives back."""
    monkeypatch.setattr(evidence, "run_arm", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evidence.run_all([(START, 0), ("urpo", 0), ("urpo", 1)], tmp_path / "evidence.csv", [], 1)


def test_a_scalar_sees_no_order_so_its_figure_is_not_that_of_both_orders(tmp_path):
    figures = {"referee": {"accuracy": {"value": 0.9}}}
    heldout = {"answers": [{"kind": "preference", "scores": [2, 1]}], "figures": figures}
    (tmp_path / "heldout-after.json").write_text(json.dumps(heldout))
    line = evidence.measured(tmp_path)
    assert line["referee_expected"] == 0.9 and not {"referee", "referee_greedy", "reasoning"} & set(line)
    assert line["rows_referee"] == line["rows_referee_greedy"] == line["rows_parts"] == ""


# ---- tables and pictures ----


def test_the_interval_of_a_difference_covers_rows_and_seeds():
    rng = np.random.default_rng(1)
    values, others = rng.random((5, 64)), rng.random((5, 64))
    value, low, high = comparison.difference(values, others)
    assert value == pytest.approx(values.mean() - others.mean()) and low < value < high
    error = np.sqrt((values - others).mean(0).var() / 64)  # of the rows alone
    assert high - low > 2 * 1.5 * error


def test_a_difference_is_that_of_the_means_however_many_seeds_each_arm_has(measured):
    arms = comparison.by_arm(comparison.read(measured[0]))
    arms["mix_1_1_0"] = {1: arms["mix_1_1_0"][0]}
    arms[BASE] = {0: arms[BASE][0], 1: arms[BASE][0], 2: arms["mix_1_1_0"][1]}  # .75, .75, .5
    value, low, high = comparison.difference_from(arms, "mix_1_1_0", "reasoning")
    assert value == pytest.approx(0.5 - 2 / 3) and (low, high) == (-0.25, 0)
    assert comparison.difference_from(arms, BASE, "reasoning") is None
    assert comparison.difference_from(arms, "rm_gen", "reasoning") is None


def test_a_start_is_one_model_whatever_the_seed(measured):
    arms = comparison.by_arm(comparison.read(measured[0]))
    arms[BASE][1] = arms[BASE][0]
    assert comparison.difference_from(arms, BASE, "reasoning", START) == (0.5, 0.5, 0.5)
    jobs = evidence.wanted(["base"], 2, False)
    assert ("raw", 1) in jobs and ("start_raw", 0) in jobs and ("start_raw", 1) not in jobs
    assert evidence.command_of("start_raw", 0, [])[:4] == ["eval.py", "heldout", "--model", "raw"]


def test_greedy_figures_are_those_of_the_runs_that_have_them(measured):
    arms = comparison.by_arm(comparison.read(measured[0]))
    arms["mix_1_1_0"][0]["referee_expected"] = ""
    arms["rm_gen"] = {0: arms[BASE][0] | {"gold_greedy": "", "rows_gold_greedy": ""}}
    shown = comparison.steady_table(arms)
    assert "| urpo | 1 | .90 | 1.00 | 1.00 | 1.00 |" in shown and "mix_1_1_0" not in shown
    assert "| rm_gen | 1 | .90 | 1.00 | 1.00 | - |" in shown


def test_wins_against_the_start(measured):
    arms = comparison.by_arm(comparison.read(measured[0]))
    # 3 of 4 good answers meet 1 of 4 good ones: 9 of 16 pairs won, 1 lost, 6 tied.
    assert comparison.row_values(arms, arms[BASE][0], "wins") == pytest.approx([0.75] * 4)
    assert comparison.row_values(arms, arms[START][0], "wins") == pytest.approx([0.5] * 4)


def test_a_table_names_cost_and_judge(measured):
    arms = comparison.by_arm(comparison.read(measured[0]))
    arms["rm_gen"] = arms["mix_1_1_0"]
    shown = comparison.table(arms, ["urpo", "rm_gen"], {"rm_gen": ["mix_1_1_0"]})
    assert "| 2 + 2 for mix_1_1_0 | 6.1 |" in shown and ".50<br>-.25 [-.25, -.25]" in shown
    assert comparison.headline(arms).startswith("URPO minus RM-gen: instructions by hidden gold +.25 [+.25, +.25]")


def test_pictures_are_drawn_of_what_was_measured(measured):
    lines = comparison.read(measured[0])
    found = comparison.pictures(lines, evidence.CLAIMS, evidence.CURVES)
    assert set(found) == {"main"} and all(png.startswith(b"\x89PNG") for png in found.values())
    lines += [line | {"arm": arm} for line in lines if line["arm"] == BASE for arm in evidence.CURVES["share"]]
    assert "share" in comparison.pictures(lines, evidence.CLAIMS, evidence.CURVES)
    assert comparison.headline({}) == "URPO against RM-gen: not measured yet."


def test_the_documents_show_the_tables_of_the_csv():
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    tables = (ROOT / "docs" / "evidence-method.md").read_text(encoding="utf-8")
    lines = comparison.read(ROOT / "docs" / "evidence.csv")
    judges = {arm: evidence.needs(arm) for arm in evidence.ARMS}
    first, *others = comparison.summary(lines, evidence.CLAIMS, judges).splitlines()
    assert text.splitlines()[0] == first, "run `python tests/anchors.py`"
    for line in others:
        assert line in tables, "run `python tests/anchors.py`"
    for claim in comparison.pictures(lines, evidence.CLAIMS, evidence.CURVES):
        assert f"(evidence-{claim}.png)" in text and (ROOT / "docs" / f"evidence-{claim}.png").exists()
