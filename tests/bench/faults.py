"""The fault campaign: one run on two ranks, disturbed again and again, always started with the same command.

    python tests/bench/faults.py                                                     # every kind, 62 faults
    python tests/bench/faults.py --kinds "kill -9 one rank" "stalled rank" --each 1

Each trial starts the run with --resume, waits for new steps (so that the trial before it has been survived), does its
harm at a random moment, and waits for the end of all processes. A trial is survived when the next start goes on. Lost
are the steps that were logged and have to be repeated. At the end the whole log is compared, to every digit, with
that of a run nobody disturbed. The run's folder is a small tmpfs, to be filled up and made read-only: that needs root
and mount; without them these kinds are left out, and the table says so.
"""
import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import psutil

import runs
from plan import load_tokenizer, model_folder
from tiny_run import kill_all, lines, make_taught_model, rank_processes, same_in_every_run, start

SAVE_EVERY, TIMEOUT = 3, 0.5  # steps; minutes that ranks wait for a stalled one
GRACE = 90  # seconds beside TIMEOUT: torchrun's 30 before it kills, and a busy machine
KINDS = {  # kind: how often in the whole campaign
    "kill -9 all": 12, "kill -9 one rank": 12, "kill -9 all at start": 4, "kill -9 one rank at start": 4,
    "kill -9 all in a checkpoint write": 5, "kill -9 one rank in a checkpoint write": 5, "SIGTERM to torchrun": 3,
    "Ctrl-C to torchrun": 2, "full disk": 3, "full disk in a checkpoint write": 2, "read-only folder": 2,
    "checkpoint file missing": 2, "checkpoint file cut off": 2, "checkpoint bit flipped": 3, "stalled rank": 3}
PLAIN = {  # what the output of the harmed run must say; of the next one where a checkpoint is damaged
    "kill -9 one rank": "another rank died, or stalled", "stalled rank": "another rank died, or stalled",
    "SIGTERM to torchrun": "stopped by a signal", "Ctrl-C to torchrun": "stopped by a signal",
    "full disk": "make room or mend the permissions", "read-only folder": "Read-only file system",
    "full disk in a checkpoint write": "make room or mend the permissions"}
NEEDS_MOUNT = ("full disk", "full disk in a checkpoint write", "read-only folder")


class Campaign:
    def __init__(self, folder: Path, model: str, seed: int, show=print):
        self.folder, self.model, self.show = folder, model, show
        self.run, self.rng, self.rows, self.pending = folder / "runs" / "e2e", random.Random(seed), [], []
        self.log = self.run / "log.jsonl"
        (folder / "runs").mkdir(parents=True)
        self.mounted = os.geteuid() == 0 and shutil.which("mount") is not None and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", folder / "runs"], capture_output=True).returncode == 0

    def close(self):
        if self.mounted:
            subprocess.run(["umount", self.folder / "runs"], check=True)

    def whole_steps(self) -> tuple[int, Path | None]:
        with contextlib.redirect_stdout(io.StringIO()):
            return runs.last_checkpoint(self.run)

    def begin(self, steps=100_000, folder=None):
        return start(folder or self.folder, self.model, "--save_every", str(SAVE_EVERY), "--keep", "3", "--resume",
                     "--steps", str(steps), "--timeout", str(TIMEOUT))

    def wait(self, condition, process, seconds=600) -> bool:
        """Until `condition()` holds or the run ends; False if it ended."""
        limit = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None:
                return False
            if time.monotonic() > limit:
                raise TimeoutError("the run makes no progress")
            time.sleep(0.01)
        return True

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def trial(self, kind: str) -> None:
        first, _ = self.whole_steps()
        process = self.begin()
        row = {"kind": kind, "survived": False, "lost": 0, "hang": False, "said": None}
        if "at start" in kind:
            time.sleep(self.rng.uniform(0, 12))
        else:
            target = first + self.rng.randint(1, 2 * SAVE_EVERY)
            if not self.wait(lambda: self.steps_logged(first) >= target, process):
                raise RuntimeError(f"{kind}: the run did not go on\n{self.output()[-4000:]}")
            self.survive(self.output())
            if "checkpoint write" in kind:
                self.wait((self.run / "checkpoints" / "unfinished").exists, process)
                time.sleep(self.rng.uniform(0, 0.05))
            else:
                time.sleep(self.rng.uniform(0, 1))
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        filler = self.harm(kind, process)
        gone, alive = psutil.wait_procs(everyone, timeout=TIMEOUT * 60 + GRACE)
        row["hang"] = bool(alive)
        if alive:
            for one in alive:
                one.kill()
        process.wait()
        if filler:
            filler.unlink()
        if kind == "read-only folder":
            self.remount("rw")
        row["said"] = PLAIN[kind] in self.output() if kind in PLAIN else None
        logged = len(lines_whole(self.log))
        if kind.startswith("checkpoint"):
            self.damage(kind)
        row["lost"] = max(0, logged - self.whole_steps()[0]) if logged else 0
        self.pending.append(row)
        self.rows.append(row)

    def steps_logged(self, first: int) -> int:
        """Steps in the log once the resumed run has cut it; -1 before that."""
        count = len(lines_whole(self.log))
        return count if "%|" in self.output() or first == 0 else -1

    def survive(self, output: str) -> None:
        for row in self.pending:
            row["survived"] = True
            if row["kind"].startswith("checkpoint"):
                row["said"] = "is damaged (" in output and "falling back to" in output
        self.pending = []

    def harm(self, kind: str, process) -> Path | None:
        """Returns a file that fills the disk, to be removed after the trial."""
        if kind.startswith("kill -9 all"):
            kill_all(process)
        elif kind.startswith("kill -9 one rank"):
            if ranks := rank_processes(process):
                self.rng.choice(ranks).kill()
            else:  # not even started
                kill_all(process)
        elif kind == "stalled rank":
            self.rng.choice(rank_processes(process)).send_signal(signal.SIGSTOP)
        elif kind in ("SIGTERM to torchrun", "Ctrl-C to torchrun") or kind.startswith("checkpoint"):
            process.send_signal(signal.SIGINT if "Ctrl-C" in kind else signal.SIGTERM)
        elif kind.startswith("full disk"):
            filler = self.folder / "runs" / "filler"
            with open(filler, "wb", buffering=0) as out, contextlib.suppress(OSError):
                while True:
                    out.write(bytes(1 << 20))
            with open(filler, "ab", buffering=0) as out, contextlib.suppress(OSError):
                while True:
                    out.write(bytes(4096))
            return filler
        elif kind == "read-only folder":
            while process.poll() is None and not self.remount("ro"):  # busy while a file is open for writing
                time.sleep(0.01)
        return None

    def remount(self, mode: str) -> bool:
        return subprocess.run(["mount", "-o", f"remount,{mode}", self.folder / "runs"],
                              capture_output=True).returncode == 0

    def damage(self, kind: str) -> None:
        _, newest = self.whole_steps()
        path = self.rng.choice([path for path in sorted(newest.rglob("*")) if path.is_file()])
        if kind == "checkpoint file missing":
            path.unlink()
        elif kind == "checkpoint file cut off":
            os.truncate(path, self.rng.randrange(path.stat().st_size))
        else:
            with open(path, "r+b") as file:
                position = self.rng.randrange(path.stat().st_size)
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ (1 << self.rng.randrange(8))]))
        self.show(f"  damaged: {path.relative_to(self.run)}")

    def finish(self) -> bool:
        """A last undisturbed start; then the same number of steps by a run that nobody disturbed. The same log?"""
        steps = len(lines_whole(self.log)) + 2
        assert self.begin(steps).wait() == 0, self.output()[-4000:]
        self.survive(self.output())
        alone = self.folder / "undisturbed"
        alone.mkdir()
        assert self.begin(steps, folder=alone).wait() == 0
        log, expected = lines(self.log), lines(alone / "runs" / "e2e" / "log.jsonl")
        return [line["step"] for line in log] == list(range(steps)) and (
            same_in_every_run(log) == same_in_every_run(expected)) and (
            lines(self.run / "rollouts.jsonl") == lines(alone / "runs" / "e2e" / "rollouts.jsonl"))

    def table(self) -> str:
        """A markdown table, one line a kind."""
        out = ["| fault | tried | survived | most steps lost | hangs | said plainly |",
               "| --- | --- | --- | --- | --- | --- |"]
        for kind in [*dict.fromkeys(row["kind"] for row in self.rows), "all"]:
            rows = [row for row in self.rows if kind in (row["kind"], "all")]
            said = [row["said"] for row in rows if row["said"] is not None]
            out.append(f"| {kind} | {len(rows)} | {sum(row['survived'] for row in rows)} | "
                       f"{max(row['lost'] for row in rows)} | {sum(row['hang'] for row in rows)} | "
                       f"{f'{sum(said)} of {len(said)}' if said else '-'} |")
        return "\n".join(out)


def lines_whole(path: Path) -> list[bytes]:
    """The lines of a log that is being written; a last one without its end does not count."""
    return [line for line in path.read_bytes().splitlines(True) if line.endswith(b"}\n")] if path.exists() else []


def campaign(folder: Path, model: str, plan: list[str], seed: int, show=print) -> tuple[str, bool]:
    """(the table, whether everything held) of the trials in `plan`."""
    work = Campaign(folder, model, seed, show)
    try:
        for kind in plan:
            if kind in NEEDS_MOUNT and not work.mounted:
                show(f"{kind}: NOT TRIED, mounting a tmpfs needs root")
                continue
            begun = time.monotonic()
            work.trial(kind)
            row = work.rows[-1]
            show(f"{kind}: lost {row['lost']} steps, hang {row['hang']}, said {row['said']}, "
                 f"{time.monotonic() - begun:.0f} s")
        same = work.finish()
    finally:
        work.close()
    good = all(row["survived"] and not row["hang"] and row["said"] in (True, None) and row["lost"] <= SAVE_EVERY
               for row in work.rows)
    return work.table() + f"\n\nThe log equals that of an undisturbed run to every digit: {same}", good and same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--each", type=int, help="trials of each kind, in place of the campaign's numbers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plan = [kind for kind in options.kinds for _ in range(options.each or KINDS[kind])]
    random.Random(options.seed).shuffle(plan)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        model = make_taught_model(Path(folder) / "model", load_tokenizer(model_folder("raw")))
        table, good = campaign(Path(folder) / "campaign", model, plan, options.seed)
    print(f"\n2 ranks, --save_every {SAVE_EVERY}, --timeout {TIMEOUT}, seed {options.seed}\n")
    print(table)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
