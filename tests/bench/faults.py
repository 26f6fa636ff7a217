"""The fault campaign: one run on two ranks, disturbed again and again, always started with the same command.

    python tests/bench/faults.py                                                     # every kind, 50 faults
    python tests/bench/faults.py --kinds "kill -9 one rank" "stalled rank" --each 1

Each trial starts the run with --resume, waits for new steps (so that the trial before it has been survived), does its
harm at a random moment, and waits for the end of all processes. Lost are the steps that were logged and have to be
repeated. At the end the whole log is compared, to every digit, with that of a run nobody disturbed. Full disks are in
test_resume.py.
"""
import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import psutil

from infra.chat import load_tokenizer
from infra.runs import checkpoints
from tiny_run import kill_all, lines, make_taught_model, rank_processes, same_in_every_run, start

SAVE_EVERY, TIMEOUT = 3, 30  # steps; seconds that ranks wait for a stalled one
LOST = "another rank died, or stalled"
KINDS = {  # kind: how often in the whole campaign, and what the harmed run must say
    "kill -9 all": (12, ""), "kill -9 all at start": (4, ""), "kill -9 all in a checkpoint write": (5, ""),
    "kill -9 one rank": (12, LOST), "kill -9 one rank at start": (4, ""),
    "kill -9 one rank in a checkpoint write": (5, ""), "stalled rank": (3, LOST),
    "SIGTERM to torchrun": (3, "stopped by a signal"), "Ctrl-C to torchrun": (2, "stopped by a signal")}
PROGRAM = f"""import datetime, urpo
urpo.ranks.TIMEOUT = datetime.timedelta(seconds={TIMEOUT})
if __name__ == "__main__":
    urpo.main()
"""


class Campaign:
    def __init__(self, folder: Path, model: str):
        self.folder, self.model, self.rng, self.rows = folder, model, random.Random(0), []
        self.run, self.log = folder / "runs" / "e2e", folder / "runs" / "e2e" / "log.jsonl"
        folder.mkdir()
        (folder / "short_urpo.py").write_text(PROGRAM)

    def begin(self, folder: Path, steps=100_000):
        flags = ["--save_every", str(SAVE_EVERY), "--keep", "3", "--resume", "--steps", str(steps)]
        return start(folder, self.model, *flags, program=self.folder / "short_urpo.py")

    def logged(self) -> int:
        """The whole lines of the log, which may be growing."""
        return self.log.read_bytes().count(b"}\n") if self.log.exists() else 0

    def saved(self) -> int:
        return max([steps for steps, _ in checkpoints(self.run)], default=0)

    def trial(self, kind: str) -> None:
        output, process = self.folder / "output", self.begin(self.folder)
        if "at start" in kind:
            time.sleep(self.rng.uniform(0, 12))
        else:
            target, limit = self.saved() + self.rng.randint(1, 2 * SAVE_EVERY), time.monotonic() + 600
            while not ("%|" in output.read_text() and self.logged() >= target):  # the live line: the log was cut
                if process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError(f"the run did not go on\n{output.read_text()[-4000:]}")
                time.sleep(0.01)
            while "write" in kind and process.poll() is None and not (self.run / "checkpoints/unfinished").exists():
                pass
            time.sleep(self.rng.uniform(0, 0.05 if "write" in kind else 1))
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        self.harm(kind, process)
        _, alive = psutil.wait_procs(everyone, timeout=TIMEOUT + 90)  # torchrun itself waits 30 before it kills
        for one in alive:
            one.kill()
        process.wait()
        said, lost = KINDS[kind][1] in output.read_text(), max(0, self.logged() - self.saved())
        self.rows.append((kind, lost, bool(alive), said))
        print(*self.rows[-1], flush=True)

    def harm(self, kind: str, process) -> None:
        ranks = rank_processes(process)
        if kind.startswith("kill -9 all") or not ranks:  # none has even started
            kill_all(process)
        elif kind.startswith("kill -9 one rank"):
            self.rng.choice(ranks).kill()
        elif kind == "stalled rank":
            self.rng.choice(ranks).send_signal(signal.SIGSTOP)
        else:
            process.send_signal(signal.SIGINT if "Ctrl-C" in kind else signal.SIGTERM)

    def same_as_undisturbed(self) -> bool:
        """A last start that nobody disturbs; then as many steps by a run that nobody ever disturbed."""
        steps, alone = self.logged() + 2, self.folder / "undisturbed"
        alone.mkdir()
        for folder in (self.folder, alone):
            assert self.begin(folder, steps).wait() == 0, folder
        log, other = lines(self.log), alone / "runs" / "e2e"
        return len(log) == steps and same_in_every_run(log) == same_in_every_run(lines(other / "log.jsonl"))


def campaign(folder: Path, model: str, plan: list[str]) -> tuple[str, bool]:
    """(a table in markdown, whether everything held) of the trials in `plan`. One that is not survived raises."""
    work = Campaign(folder, model)
    out = ["| fault | survived | most steps lost | hangs | said plainly |", "|---|---|---|---|---|"]
    for kind in plan:
        work.trial(kind)
    same = work.same_as_undisturbed()
    for kind in [*dict.fromkeys(plan), "all"]:
        _, lost, hangs, said = zip(*[row for row in work.rows if kind in (row[0], "all")])
        out.append(f"| {kind} | {len(lost)} | {max(lost)} | {sum(hangs)} | {sum(said)} |")
    good = all(lost <= SAVE_EVERY and said and not hang for _, lost, hang, said in work.rows)
    return "\n".join([*out, f"\nThe log equals that of an undisturbed run to every digit: {same}"]), good and same


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--each", type=int, help="trials of each kind, in place of the campaign's numbers")
    given = parser.parse_args()
    plan = [kind for kind in given.kinds for _ in range(given.each or KINDS[kind][0])]
    random.Random(0).shuffle(plan)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(str(TESTS.parent / "toy/model"))  # `make toy` writes it
        model = make_taught_model(Path(tempfile.mkdtemp(dir=folder)), tokenizer)
        table, good = campaign(Path(folder) / "campaign", model, plan)
    print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
