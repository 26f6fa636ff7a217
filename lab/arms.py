"""The paper's comparisons in miniature: every arm is trained and measured, and becomes a line of a CSV.

    python -m lab.arms                                     all arms: many hours; one that has a line is not run again
    python -m lab.arms --only rm_gen sft --seeds 1         some of them, with URPO and the judges that they need
    python -m lab.arms --show                              no run: the tables of the CSV

All arms answer the same held-out examples; those of one mix and warm-up draw the same prompts. First `python -m
lab.seed all`. Any other flag goes to every run, so one CSV is for one set of flags. A run that died has a line too:
delete it, and the run is tried again. A difference from URPO has a t interval: Welch's, since two arms share the order
of prompts and nothing that was sampled; or of the seeds' own differences, for arms that are URPO's run until the
warm-up ends and for models as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas
from scipy import stats

import urpo
from infra.ranks import InputError, commit, stop
from infra.results import check_writable
from infra.runs import hold
from infra.settings import parse

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "urpo"  # the arm that others are compared with
MEASURED = "--rows 128 --samples 2".split()  # of held-out rows of a kind
# Arm -> (seeds, command). It may need another arm's run with the same {seed}, its judge, which stands before it.
ARMS = {
    "start": (1, "-m lab.toy heldout --model toy/model"),  # before any training
    "urpo": (8, "urpo.py"),
    "warm_up": (8, "urpo.py --steps 4"),
    "frozen_judge": (8, "-m lab.baselines rm_gen --judge runs/arms-warm_up-{seed}/checkpoints/last/model"),
    "no_instructions": (5, "urpo.py --mix 2:1:0"),  # also the judge of rm_gen: trained by tau on P, and on R
    "rm_gen": (5, "-m lab.baselines rm_gen --mix 0:1:1 "
                  "--judge runs/arms-no_instructions-{seed}/checkpoints/last/model"),
    "sft": (5, "-m lab.baselines sft"),
    "no_preferences": (5, "urpo.py --mix 0:1:1"),
    "no_reasoning": (3, "urpo.py --mix 2:0:1"),
    "no_warmup": (3, "urpo.py --warmup_steps 0"),
    "start_raw": (1, "-m lab.toy heldout --model toy/raw"),  # a base without competence, and a half-taught one
    "raw": (3, "urpo.py --model toy/raw"),
    "start_half": (1, "-m lab.toy heldout --model toy/half"),
    "half": (3, "urpo.py --model toy/half"),
}
PAIRED = ("warm_up", "frozen_judge", "no_instructions")  # URPO's own run until the warm-up ends
FIGURES = {  # column of the CSV -> (part, figure) of heldout-after.json; each has a greedy twin
    "constraints": ("referee, constraints", "single order"),
    "constraints_both": ("referee, constraints", "both orders"),
    "flaws": ("referee, flaws", "single order"),
    "flaws_both": ("referee, flaws", "both orders"),
    "bank": ("referee, bank", "single order"),
    "reasoning": ("reasoning", "solved"),
    "other_three": ("instructions", "on topic, whole, in order"),
    "kept": ("instructions", "keeps the constraint"),
    "all_four": ("instructions", "all four"),
}
for column, (part, name) in list(FIGURES.items()):
    FIGURES[f"{column}_greedy"] = (part, f"{name}, greedy")
COLUMNS = ["arm", "seed", "status", "cpu_minutes", "gib", *FIGURES, "command", "commit"]


def command_of(arm: str, seed: int, passed: list[str]) -> list[str]:
    """What is typed after `python` to train an arm, or to measure a model as it is."""
    command, name = ARMS[arm][1].format(seed=seed), f"arms-{arm}-{seed}"
    if "lab.toy" in command:
        return [*command.split(), *MEASURED, "--json", f"runs/{name}/heldout-after.json"]
    program, dashes, own = command.partition(" --")
    ours = f"--preset smol --name {name} --seed {seed} --save_every 0 {dashes}{own}"
    return [*program.split(), *passed, *ours.split()]  # what defines an arm stands last


def wanted(only: list[str], seeds: int | None) -> list[tuple[str, int]]:
    """(arm, seed) in the order to run them: seed by seed, so that all arms are compared early."""
    asked, jobs = {*(only or ARMS), REFERENCE}, []
    for arm in list(asked):
        asked.update(re.findall(r"runs/arms-(\w+)-{seed}", ARMS[arm][1]))
    for seed in range(8 if seeds is None else seeds):
        jobs += [(arm, seed) for arm, (count, _) in ARMS.items() if arm in asked and seed < count]
    return jobs


def call(command: list[str], ranks: int, log: Path) -> int:
    """The exit status of a Python command on so many ranks; what it prints is added to `log`. It ends when we do."""
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    with open(log, "a") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output,
                                   env=environment, start_new_session=True)
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()


def cpu_minutes() -> float:
    """Of all ended runs. Other work on the machine changes them less than it changes the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def run_arm(arm: str, seed: int, passed: list[str], ranks: int) -> dict:
    """Train, measure, and give the line of the CSV. A run that dies becomes a line too, with its last words."""
    home, log = ROOT / "runs" / f"arms-{arm}-{seed}", ROOT / "runs" / f"arms-{arm}-{seed}.log"
    result, command = home / "heldout-after.json", command_of(arm, seed, passed)
    shutil.rmtree(home, ignore_errors=True)
    log.unlink(missing_ok=True)
    before = cpu_minutes()
    status = call(command, 1 if "lab.toy" in command else ranks, log)
    line = {"arm": arm, "seed": seed, "status": "done", "cpu_minutes": round(cpu_minutes() - before, 1),
            "command": shlex.join(["python", *command]), "commit": commit()}
    if not status and not result.exists():  # a model as it is has been measured
        model = str(home / "checkpoints" / "last" / "model")
        status = call(["-m", "lab.toy", "heldout", "--model", model, *MEASURED, "--json", str(result)], 1, log)
    for trainer in home.glob("checkpoints/*/trainer"):  # the model stays: it may judge another arm
        shutil.rmtree(trainer)
    if status:
        return line | {"status": f"died ({status}): {' '.join(log.read_text().split()[-40:])}"}
    if (home / "log.jsonl").exists():
        line["gib"] = round(pandas.read_json(home / "log.jsonl", lines=True)["peak_memory_gib"].max(), 2)
    figures = json.loads(result.read_text())["figures"]
    for column, (part, name) in FIGURES.items():
        line[column] = figures.get(part, {}).get(name, {}).get("value")
    return line


def read_csv(path: Path) -> pandas.DataFrame:
    """The CSV; no line where there is none yet. Raises InputError where it has other columns than today's."""
    lines = pandas.read_csv(path) if path.exists() and path.stat().st_size else pandas.DataFrame(columns=COLUMNS)
    if list(lines.columns) != COLUMNS:
        raise InputError(f"{path}: not the columns {', '.join(COLUMNS)}: give another --csv")
    return lines


def run_all(jobs: list[tuple[str, int]], path: Path, passed: list[str], ranks: int) -> None:
    """All jobs that have no line in the CSV yet, one after the other."""
    done = set(zip(*[read_csv(path)[name] for name in ("arm", "seed")]))
    for arm, seed in jobs:
        if (arm, seed) not in done:
            line = run_arm(arm, seed, passed, ranks)
            table = pandas.DataFrame([line], columns=COLUMNS)
            table.to_csv(path, mode="a", header=not path.exists(), index=False)
            print(f"{arm} {seed}: {line['status']}, {line['cpu_minutes']} minutes of CPU time", flush=True)


def interval(arm: str, values: pandas.Series, reference: pandas.Series) -> list[float]:
    """[difference of an arm's mean from URPO's, low, high] of figures by seed. NaN: fewer than two seeds, or no spread.
    """
    low = high = math.nan
    if arm.startswith("start"):  # measured once, since nothing is trained
        gaps = values.iloc[0] - reference
    elif arm in PAIRED:
        gaps = (values - reference).dropna()
    else:
        if values.std() + reference.std() > 0:
            low, high = stats.ttest_ind(values, reference, equal_var=False).confidence_interval(0.95)
        return [values.mean() - reference.mean(), low, high]
    if gaps.std() > 0:
        low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    return [gaps.mean(), low, high]


def compared(done: pandas.DataFrame, column: str) -> pandas.DataFrame:
    """An arm a row: seeds, mean, spread, and the difference from URPO with its 95 % interval.

    done: measured lines of the CSV. NaN is not known.
    """
    known = done.dropna(subset=[column]).set_index("seed")
    rows, reference = {}, known.loc[known.arm == REFERENCE, column]
    for arm, values in known.groupby("arm", sort=False)[column]:
        own = [math.nan] * 3 if arm == REFERENCE else interval(arm, values, reference)
        rows[arm] = [len(values), values.mean(), values.std(), *own]
    return pandas.DataFrame.from_dict(rows, orient="index", columns="seeds mean spread difference low high".split())


def show(path: Path) -> None:
    """Print the tables of a CSV, and what died."""
    lines = read_csv(path)
    if lines.empty:
        raise InputError(f"{path}: no arm has run yet; leave --show out")
    done = lines[lines.status == "done"]
    for column in FIGURES:
        print(f"{column}\n{compared(done, column).to_string(float_format='%.3f', na_rep='-')}\n")
    print(done.groupby("arm", sort=False)[["cpu_minutes", "gib"]].max().round(1).to_string(na_rep="-"))
    for line in lines[lines.status != "done"].itertuples():
        print(f"{line.arm}, seed {line.seed}: {line.status}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=[], choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, help="at most so many of each arm")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run")
    parser.add_argument("--csv", type=Path, default=ROOT / "runs" / "arms.csv", help="a line an arm and seed")
    parser.add_argument("--show", action="store_true", help="run nothing")
    args, passed = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs ends, and gets no line
    try:
        if not args.show:
            urpo.check(parse(urpo.Config, urpo.PRESETS, ["--preset", "smol", *passed], ""), world=args.ranks)
            (ROOT / "runs").mkdir(exist_ok=True)
            check_writable("csv", args.csv)
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            with hold(ROOT / "runs"):  # two of us would remove each other's folders
                run_all(wanted(args.only, args.seeds), args.csv, passed, args.ranks)
        show(args.csv)
    except InputError as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
