"""The comparisons: every arm can be run, what is done is not run again, and the tables say what the CSV says."""
import fcntl
import math
import re
import sys

import pandas
import pytest
from scipy import stats

import data
import urpo
from infra.settings import parse
from lab import arms, baselines

PYTHON = sys.executable


@pytest.mark.parametrize("arm", [arm for arm in arms.ARMS if not arm.startswith("start")])
def test_every_arm_is_a_command_of_its_program_and_what_defines_it_cannot_be_overridden(arm):
    command = arms.command_of(arm, 1, ["--lr", "1", "--seed", "7"])
    settings, start = urpo.Config if command[0] == "urpo.py" else baselines.Baseline, command.index("--lr")
    urpo.check(config := parse(settings, urpo.PRESETS, command[start:], ""), world=2)
    assert (config.name, config.seed, config.lr == 1) == (f"arms-{arm}-1", 1, "--lr" not in arms.ARMS[arm][1])
    assert command[:start] == ["urpo.py"] or command[:2] == ["-m", "lab.baselines"] and start == 3
    absent = [kind for kind, count in data.mix_counts(config, warmup=False).items() if not count]
    assert absent == {"no_instructions": ["instruction"], "no_preferences": ["preference"], "rm_gen": ["preference"],
                      "no_reasoning": ["reasoning"]}.get(arm, [])


def test_what_an_arm_needs_comes_before_it_and_every_arm_is_compared_early():
    jobs = arms.wanted([], None)
    assert len(set(jobs)) == sum(count for count, _ in arms.ARMS.values())
    assert [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)
    for place, (arm, seed) in enumerate(jobs):
        for needed in re.findall(r"runs/arms-(\w+)-\d", " ".join(arms.command_of(arm, seed, [])[3:])):
            assert (needed, seed) in jobs[: place + 1], arm
    assert arms.wanted(["rm_gen"], 1) == [("urpo", 0), ("no_instructions", 0), ("rm_gen", 0)]


PRETENDER = f"""#!{PYTHON}
import pathlib, sys, time
words, known = sys.argv[1:], '{{"both orders": {{"value": 0.25}}, "single order": {{"value": 0.5}}}}'
print(*words, file=open("calls", "a"))
if "--json" in words:
    path = pathlib.Path(words[words.index("--json") + 1])
    text = '{{"figures": {{"referee, flaws": %s, "reasoning": {{"solved, greedy": {{"value": 0.5}}}}}}}}' % known
else:
    path, text = pathlib.Path("runs", words[words.index("--name") + 1], "log.jsonl"), '{{"peak_memory_gib": 6.125}}'
(path.parent / "checkpoints" / "last" / "trainer").mkdir(parents=True, exist_ok=True)
path.write_text(text)
print("started", flush=True)
time.sleep(600 * ("sft" in words))
sys.exit("error: drift" if "rm_gen" in words else 0)
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A folder whose python writes what training and measuring would leave behind. rm_gen dies, sft never ends."""
    (tmp_path / "python").write_text(PRETENDER)
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path


@pytest.mark.slow
def test_arms_are_run_measured_compared_and_not_run_again(pretended, capsys):
    path = pretended / "arms.csv"
    asked = ["--csv", str(path), "--ranks", "1", "--only", "start", "rm_gen", "--seeds", "1"]
    arms.main([*asked, "--lr", "2e-5"])
    table = pandas.read_csv(path).set_index("arm")
    assert list(table.index) == ["start", "urpo", "no_instructions", "rm_gen"]
    assert table.status["urpo"] == "done" and "drift" in table.status["rm_gen"]
    assert table.gib["urpo"] == 6.12 and math.isnan(table.gib["start"]) and math.isnan(table.other_three["urpo"])
    assert (table.flaws_both["urpo"], table.flaws["urpo"], table.reasoning_greedy["urpo"]) == (0.25, 0.5, 0.5)
    assert "--lr 2e-5 --preset smol --name arms-urpo-0 --seed 0" in table.command["urpo"]
    assert not list(pretended.rglob("trainer"))
    assert "--judge runs/arms-no_instructions-0/checkpoints/last/model" in table.command["rm_gen"]
    assert "rm_gen, seed 0: died (1)" in capsys.readouterr().out
    path.write_text("".join(line for line in path.open() if not line.startswith("urpo,")))
    (pretended / "calls").unlink()
    arms.main(asked)  # what has a line is not run again
    assert ["arms-urpo-0" in call for call in (pretended / "calls").open()] == [True, True]
    assert set(pandas.read_csv(path).arm) == set(table.index)


def test_a_wrong_flag_is_refused_before_all_runs_and_so_is_a_second_one_of_us(pretended, capsys):
    (pretended / "runs").mkdir()
    with open(pretended / "runs" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flags in ("--onyl urpo", "--batch 25", "--only x", "another"):
            with pytest.raises(SystemExit) as ended:
                arms.main(flags.split() if "--" in flags else [])
            assert ended.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_another_versions_csv_is_refused_before_all_runs(pretended, capsys):
    (pretended / "old.csv").write_text("arm,seed,gold\nurpo,0,.5\n")
    for path, said in (("old.csv", "columns"), ("old.csv/arms.csv", "written")):
        with pytest.raises(SystemExit):
            arms.main(["--csv", str(pretended / path)])
        assert said in capsys.readouterr().err and not (pretended / "calls").exists()


def lines(**values):
    return pandas.DataFrame([{"arm": arm, "seed": seed, "flaws": value} for arm, own in values.items()
                             for seed, value in enumerate(own)])


def test_the_interval_of_a_difference_is_welchs():
    ours, base = [0.5, 0.62, 0.71], [0.40, 0.44, 0.52, 0.41, 0.47]
    row = arms.compared(lines(urpo=base, sft=ours), "flaws").loc["sft"]
    a, b = stats.tvar(ours) / 3, stats.tvar(base) / 5  # variances of the means
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 2 + b**2 / 4)) * math.sqrt(a + b)
    assert [row.difference, row.low, row.high] == pytest.approx([0.162, 0.162 - half, 0.162 + half])


def test_a_paired_arm_and_a_model_as_it_is_are_compared_seed_by_seed():
    found = arms.compared(lines(urpo=[0.5, 0.6, 0.4], frozen_judge=[0.4, math.nan, 0.2], start=[0.3]), "flaws")
    for arm, gaps in (("frozen_judge", [-0.1, -0.2]), ("start", [-0.2, -0.3, -0.1])):
        half = stats.t.ppf(0.975, len(gaps) - 1) * math.sqrt(stats.tvar(gaps) / len(gaps))
        middle = sum(gaps) / len(gaps)
        assert found.loc[arm, ["difference", "low", "high"]].tolist() == pytest.approx(
            [middle, middle - half, middle + half])


def test_what_is_not_known_is_no_zero():
    found = arms.compared(lines(urpo=[0.4, math.nan], sft=[0.5, 0.6], raw=[math.nan]), "flaws")
    assert list(found.index) == ["urpo", "sft"] and found.difference["sft"] == pytest.approx(0.15)
    assert found.loc[["sft", "urpo"], ["low", "high"]].isna().all(axis=None) and found.seeds["urpo"] == 1
