"""The paper's comparisons in miniature: every arm is trained and measured, and becomes a line of a CSV.

    python report/evidence.py                          all arms: many hours. Arms that stand in --csv are skipped
    python report/evidence.py --only main mixes        some claims or arms
    python report/evidence.py --quick              three arms, one seed

Arms run side by side, one process on a core each, from the same base over the same prompts, then answer the same
held-out rows. report/comparison.py makes tables and pictures of the CSV; docs/evidence.md says what they show.
A line is skipped whatever flags made it: one CSV is for one set of flags. A run that died has a line too: delete it,
and the run is tried again.
"""
import argparse
import fcntl
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import baselines
import flags
import metrics
import plan
import urpo
from data import InputError
from report import comparison
from report.comparison import BASE, SAMPLES, START
from rewards import parse_scores, verify_answer
from runs import write_whole
from toy import world

ROOT = Path(__file__).resolve().parent.parent
# Arm -> its command. {arm} is the folder of another arm's run with the same seed, which is done first.
ARMS = {
    "urpo": "urpo.py",
    "mix_1_1_0": "urpo.py --mix 1:1:0",  # also the judge of rm_gen: trained by tau on P, and on R
    "rm_gen": "baselines.py rm_gen --mix 0:1:1 --judge {mix_1_1_0}/checkpoints/last/model",
    "reward_model": "baselines.py reward_model --mix 1:1:0 --lr 3e-5",
    "rm_score": "baselines.py rm_score --mix 0:1:1 --judge {reward_model}/model",
    "sft": "baselines.py sft",
    "sft_true": "baselines.py sft --errors 0:0:0",
    "mix_0_1_1": "urpo.py --mix 0:1:1",
    "mix_1_1_1": "urpo.py --mix 1:1:1",
    "mix_1_0_1": "urpo.py --mix 1:0:1",
    "no_warmup": "urpo.py --warmup_steps 0",
    # Of 24 prompts 12 are I in all of these, as in urpo. Two of P are the least, since each stands in both orders.
    "p_2_of_24": "urpo.py --mix 1:5:6",
    "p_4_of_24": "urpo.py --mix 1:2:3",
    "p_8_of_24": "urpo.py --mix 2:1:3",
    "three_times": "urpo.py --steps 72",
    "raw": "urpo.py --model raw",
    "half": "urpo.py --model half",
    "clip_symmetric": "urpo.py --clip_high 1.2",
    "clip_off": "urpo.py --clip_low 0 --clip_high 1000",
    "judged_twice": "urpo.py --judgements 2",
    "lists_of_4": "urpo.py --judge_list 4 --judgements 1",
    "lists_of_4_times_4": "urpo.py --judge_list 4 --judgements 4",
    "advantage_center": "urpo.py --advantage center",
    "advantage_batch": "urpo.py --advantage batch",
    "own_preferences": "baselines.py own_preferences",
}
for arm in ("urpo", "rm_gen", "rm_score", "sft", "mix_0_1_1"):
    ARMS |= {f"{arm}_slow": f"{ARMS[arm]} --lr 3e-6", f"{arm}_fast": f"{ARMS[arm]} --lr 3e-5"}
# Is it the judge's learning that wears its score out? First with the prompts of rm_gen, then with those of urpo.
ARMS["rm_gen_three_times"] = f"{ARMS['rm_gen']} --steps 72"
ARMS["rm_gen_1_1_2_three_times"] = ARMS["rm_gen_three_times"].replace("0:1:1", "1:1:2")
STARTS = {START: "seed", "start_raw": "raw", "start_half": "half"}  # models before any training, measured once
# Claim -> what its picture says, and its arms. In this order they are run.
CLAIMS = {
    "main": ("One model that judges itself, and the paper's baselines; mix_1_1_0 judges for rm_gen, reward_model for "
             "rm_score", "urpo rm_gen mix_1_1_0 rm_score reward_model sft mix_0_1_1"),
    "rates": ("A third of the rate of learning (slow), and three times as much (fast)",
              "urpo_slow urpo_fast rm_gen rm_gen_slow rm_gen_fast rm_score rm_score_slow rm_score_fast sft sft_slow "
              "sft_fast mix_0_1_1 mix_0_1_1_slow mix_0_1_1_fast"),
    "demonstrator": ("SFT by one who does not err", "sft sft_true"),
    "mixes": ("P:R:I by prompts; urpo has 1:1:2", "mix_1_1_1 mix_1_1_0 mix_1_0_1 mix_0_1_1"),
    "warm-up": ("Without warm-up, instructions join at the first step", "no_warmup"),
    "share": ("More and more of P; x is how many of 24 prompts, urpo has 6",
              "mix_0_1_1 p_2_of_24 p_4_of_24 p_8_of_24 mix_1_0_1"),
    "judging": ("How answers are judged; urpo: in pairs, four times", "judged_twice lists_of_4 lists_of_4_times_4"),
    "clip": ("The range of the ratio; urpo: .8 to 1.28", "clip_symmetric clip_off"),
    "advantage": ("How advantages are scaled", "advantage_center advantage_batch"),
    "own": ("Beyond the paper: the referee also learns from the policy's own right and wrong sums", "own_preferences"),
    "base": ("From a base without competence, and from a half-taught one", "start_raw raw start_half half"),
    "drift": ("Three times the steps; rm_gen_... is under a frozen judge, and with 1_1_2 has the prompts of urpo",
              "three_times rm_gen_three_times rm_gen_1_1_2_three_times"),
}
# Claim -> arm -> its place on the x axis: a claim about an amount is drawn as a curve.
CURVES = {"share": {"mix_0_1_1": 0, "p_2_of_24": 2, "p_4_of_24": 4, "urpo": 6, "p_8_of_24": 8, "mix_1_0_1": 12}}
SEEDS = {"main": 5, "rates": 1}  # of a claim's arms; others have three
QUICK = ("urpo", "rm_score", "sft")
OURS = ("--name", "--seed", "--save_every", "--resume", "--model")  # one value for all arms would spoil the comparison
RUNNING: list[subprocess.Popen] = []  # all that was started: Ctrl-C ends it, so that no half run becomes a line
STOPPING = threading.Event()  # set before what runs is killed
FIELDS = ("arm seed status minutes eval_minutes gib referee reasoning gold all_four length rows_referee "
          "rows_reasoning rows_gold rows_all_four rows_parts command commit referee_expected referee_greedy "
          "reasoning_greedy gold_greedy all_four_greedy rows_referee_greedy rows_reasoning_greedy rows_gold_greedy "
          "rows_all_four_greedy").split()


def needs(arm: str) -> list[str]:
    """The arms whose runs an arm needs.

    >>> needs("rm_gen"), needs("urpo")
    (['mix_1_1_0'], [])
    """
    return re.findall(r"{(\w+)}", ARMS.get(arm, ""))


def folder(arm: str, seed: int) -> Path:
    return Path("runs") / f"evidence-{arm}-{seed}"


def command_of(arm: str, seed: int, passed: list[str]) -> list[str]:
    """What is typed after `python` to train an arm; for a start, to measure it."""
    if arm in STARTS:
        return ["eval.py", "heldout", "--model", STARTS[arm], "--json", str(folder(arm, seed) / "heldout-after.json")]
    command = ARMS[arm].format(**{need: folder(need, seed) for need in needs(arm)})
    program, *own = shlex.split(command)
    if program == "baselines.py":
        program, own = f"{program} {own[0]}", own[1:]
    common = ["--preset", "smol", "--name", folder(arm, seed).name, "--seed", str(seed), "--save_every", "0"]
    return [*program.split(), *common, *passed, *own]  # an arm's own flags last: what defines it stands


# ------------------------------------------------------------------------------- running an arm


def call(command: list[str], cores: list[int], log: Path) -> tuple[int, float]:
    """(exit status, minutes) of a Python command on some cores; what it prints is added to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))}
    started = time.perf_counter()
    with open(log, "a") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output,
                                   start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        RUNNING.append(process)
        if STOPPING.is_set():  # it began after the others were killed
            process.kill()
        return process.wait(), (time.perf_counter() - started) / 60


def run_arm(arm: str, seed: int, passed: list[str], cores: list[int]) -> dict:
    """Train, measure, and give the line of the CSV. A run that dies becomes a line too, with its last words.

    Of its checkpoints the model alone stays: it may judge another arm.
    """
    home, log = ROOT / folder(arm, seed), ROOT / "runs" / f"{folder(arm, seed).name}.log"
    shutil.rmtree(home, ignore_errors=True)
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    command = command_of(arm, seed, passed)
    result = home / "heldout-after.json"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    line = {"arm": arm, "seed": seed, "command": shlex.join(["python", *command]), "commit": git.stdout.strip(),
            "eval_minutes": 0.0}
    status, line["minutes"] = call(command, cores, log)
    if "stopped by a signal" in log.read_text():  # a run that saved what it had ends with 0, and is no whole run
        status = status or signal.SIGTERM.value
    if not status and not result.exists():
        model = folder(arm, seed) / "checkpoints" / "last" / "model"
        status, line["eval_minutes"] = call(
            ["eval.py", "heldout", "--model", str(model), "--json", str(result)], cores, log)
    for trainer in home.glob("checkpoints/*/trainer"):
        shutil.rmtree(trainer)
    words = log.read_text().split("\n")
    line["status"] = "done" if status == 0 else f"died ({status}): {' '.join(words[-3:]).strip()[-300:]}"
    if status == 0:
        line |= measured(home)
    return line


# ------------------------------------------------------------------------------- from a run to its line


def measured(home: Path) -> dict:
    """The figures of a run. rows_...: for each held-out row a digit, how many of its four answers are right.

    rows_..._greedy: the one greedy answer, counted as four. rows_parts: for each answer to an instruction how many of
    the four parts of the hidden gold it has. A reward model has referee_expected alone: its scalar sees no order, so
    it is not asked in both.
    """
    rows = {field.removeprefix("rows_"): "" for field in FIELDS if field.startswith("rows_")}
    heldout = json.loads((home / "heldout-after.json").read_text())
    for answer in heldout["answers"]:
        if "scores" in answer:  # of a reward model, which writes nothing
            continue
        counts = count_right(answer, answer["sampled"], answer["mirrored"])
        for name, count in count_right(answer, answer["greedy"], answer["mirrored_greedy"]).items():
            counts[f"{name}_greedy"] = SAMPLES * count
        for name, count in counts.items():
            rows[name] += str(count)
        rows["parts"] += "".join(map(str, answer.get("gold") or []))
    referee = heldout["figures"]["referee"]
    expected = referee["accuracy"] if "accuracy" in referee else referee["expected score"]  # the first: a scalar's
    line = {"referee_expected": expected["value"]}
    for name, digits in rows.items():
        line[f"rows_{name}"] = digits
        if digits and name != "parts":
            line[name] = round(sum(map(int, digits)) / len(digits) / SAMPLES, 4)
    log = home / "log.jsonl"
    steps = [json.loads(step) for step in log.read_text().splitlines()] if log.exists() else []
    peaks = metrics.known(step.get("peak_memory_gib") for step in steps)
    line["gib"] = round(max(peaks), 2) if peaks else None
    line["length"] = steps[-1]["instruction"]["length"] if steps and "instruction" in steps[-1] else None
    return line


def count_right(answer: dict, texts: list[str], mirrored: list[str]) -> dict[str, int]:
    """Of some texts that answer a held-out row, how many are right, by measure. mirrored: a pair in the other order.

    >>> pair = {"kind": "preference"}  # the first response is the better one
    >>> count_right(pair, ["<scores>9, 2</scores>", "<scores>9, 2</scores>"], ["<scores>1, 3</scores>", ""])
    {'referee': 1}
    """
    if answer["kind"] == "preference":
        right = 0
        for forward, backward in zip(texts, mirrored, strict=True):
            first, second = parse_scores(forward, 2), parse_scores(backward, 2)
            right += bool(first and second and first[0] > first[1] and second[1] > second[0])
        return {"referee": right}
    if answer["kind"] == "reasoning":
        return {"reasoning": int(sum(verify_answer(text, answer["truth"]) for text in texts))}
    golds = [list(world.gold(answer["asked"], text).values()) for text in texts]
    return {"gold": sum(all(gold[:3]) for gold in golds), "all_four": sum(map(all, golds))}


# ------------------------------------------------------------------------------- all arms


def wanted(only: list[str], seeds: int | None, quick: bool) -> list[tuple[str, int]]:
    """(arm, seed) in the order to run them: claim by claim, seed by seed; what an arm needs stands before it."""
    for name in only:
        if name not in CLAIMS and name not in ARMS:
            raise InputError(f"--only {name}: no such claim or arm; there are {', '.join([*CLAIMS, *ARMS])}")
    found = {(START, 0): None}  # a set that keeps its order; URPO too always stands in it, to compare with
    for claim, (_, arms) in CLAIMS.items():
        for seed in range(1 if quick else seeds or SEEDS.get(claim, 3)):
            for arm in arms.split():
                asked = not only or claim in only or arm in only
                if arm in STARTS and seed > 0:
                    continue
                if arm in QUICK if quick else asked:
                    found |= dict.fromkeys([(BASE, seed), *((need, seed) for need in needs(arm)), (arm, seed)])
    return list(found)


def run_all(jobs: list[tuple[str, int]], path: Path, passed: list[str], side_by_side: int) -> None:
    """All jobs that have no line yet, so many at a time, each on its own cores.

    A judge that has its line and whose folder is gone is trained again for an arm that needs it. That is another
    model, since sampling differs, and has a line of its own, as `..._again`.
    """
    every = sorted(os.sched_getaffinity(0))
    share = len(every) // side_by_side
    if not share:
        raise InputError(f"--jobs {side_by_side}: this machine has {len(every)} cores, and a run takes one")
    free: queue.Queue = queue.Queue()
    for i in range(side_by_side):
        free.put(every[i * share : (i + 1) * share])
    done = {(line["arm"], int(line["seed"])) for line in comparison.read(path)}
    needed = {(need, seed) for arm, seed in jobs if (arm, seed) not in done for need in needs(arm)}
    ended = {job: threading.Event() for job in jobs}
    writing = threading.Lock()
    STOPPING.clear()

    def work(job):
        arm, seed = job
        try:
            for need in needs(arm):
                ended[need, seed].wait()
            if job in done and (job not in needed or list((ROOT / folder(arm, seed)).rglob("*.safetensors"))):
                return
            cores = free.get()
            try:
                line = run_arm(arm, seed, passed, cores)
            finally:
                free.put(cores)
            if job in done:
                line["arm"] = f"{arm}_again"
            with writing:
                if not STOPPING.is_set():  # what was killed from here has no line
                    comparison.append(path, FIELDS, line)
                    print(f"{line['arm']} {seed}: {line['status']}, {line['minutes']:.1f} minutes", flush=True)
        finally:
            ended[job].set()

    pool = ThreadPoolExecutor(side_by_side)
    try:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            future.result()
    except BaseException:  # Ctrl-C too: end what runs, then raise it again
        STOPPING.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in RUNNING:
            process.kill()
        raise
    pool.shutdown()


def only_one():
    """A lock on runs/: two of us would remove each other's folders."""
    path = ROOT / "runs" / "evidence.lock"
    path.parent.mkdir(exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError("report/evidence.py already runs in this folder: wait for it, or stop it") from None
    return lock


def check(jobs: list[tuple[str, int]], passed: list[str]) -> None:
    """Refuse flags that some arm would not take, before any runs; and make the models that arms start from."""
    for argument in passed:
        if argument.split("=")[0] in OURS:
            raise InputError(f"{argument}: each arm has its own, so it cannot be given to all; refused are "
                             f"{', '.join(OURS)}")
    for arm, seed in jobs:
        if arm in STARTS:
            continue
        program, *arguments = command_of(arm, seed, passed)
        settings = urpo.Config
        if program == "baselines.py":
            settings = baselines.Baseline
            arguments.pop(0)
        config = flags.parse(settings, urpo.PRESETS, arguments)
        flags.check(config, world=1)
        plan.model_folder(config.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, epilog="Any other flag goes to every arm.")
    parser.add_argument("--only", nargs="*", default=[], help="claims or arms; all by default")
    parser.add_argument("--seeds", type=int, help="by default five for the claim main and three for others")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} with seed 0")
    parser.add_argument("--csv", type=Path, default=ROOT / "runs" / "evidence.csv", help="a line an arm and seed")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and pictures of --csv")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, 7 GiB each (rm_gen 8)")
    args, passed = parser.parse_known_args()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: its terminal was closed
        if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:  # under nohup it shall go on
            signal.signal(name, signal.default_int_handler)  # also in the background, where a shell ignores SIGINT
    try:
        if not args.show:
            jobs = wanted(args.only, args.seeds, args.quick)
            check(jobs, passed)
            lock = only_one()  # held until this process ends
            run_all(jobs, args.csv, passed, args.jobs)
            lock.close()
        lines, judges = comparison.read(args.csv), {arm: needs(arm) for arm in ARMS}
        print(comparison.summary(lines, CLAIMS, judges))
        for claim, picture in comparison.pictures(lines, CLAIMS, CURVES).items():
            write_whole(args.csv.with_name(f"{args.csv.stem}-{claim}.png"), picture)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
