"""One training run by two checkouts of this project, in turn: is the new code as fast, and are its figures the same?

    python tests/bench/two_versions.py OLD_CHECKOUT NEW_CHECKOUT --steps 4 --repeats 3

Each run is `torchrun --nproc_per_node=2 urpo.py --preset smol` in a temporary folder, with the checkout's own .venv.
A checkout whose preset reads toy/ needs its own: `make toy`. One from before that (41cf764) makes its rows itself.
The runs alternate: old, new, old, new. The first step of a run is left out of the times, since it pays for what is
made once. Times and memory aside, every figure of log.jsonl that both versions write must be equal to the last digit.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURED = ("seconds", "tokens_per_second", "peak_memory_gib")  # different in every run


def train(checkout: Path, steps: int) -> list[dict]:
    """The lines of log.jsonl."""
    command = [checkout / ".venv/bin/python", "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               checkout / "urpo.py", "--preset", "smol", "--name", "bench", "--steps", str(steps), "--warmup_steps",
               "1"]
    # One thread a rank, and a tokenizer that starts none: as `make demo` runs.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {checkout}/urpo.py ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        text = Path(folder, "runs/bench/log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def step_seconds(log: list[dict]) -> list[float]:
    """Seconds of each step but the first."""
    return [sum(line["seconds"].values()) for line in log[1:]]


def differences(old, new, where: str = "") -> list[str]:
    """The figures that both have and that are not equal."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{where}: {old} {new}"]
    found = []
    for key in old:
        if key in new and key not in MEASURED:
            found += differences(old[key], new[key], f"{where} {key}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=lambda folder: Path(folder).resolve())
    parser.add_argument("new", type=lambda folder: Path(folder).resolve())
    parser.add_argument("--steps", type=int, default=4, help="2 or more")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds = {"old": [], "new": []}
    wrong = []
    for _ in range(options.repeats):
        old = train(options.old, options.steps)
        new = train(options.new, options.steps)
        for name, log in (("old", old), ("new", new)):
            seconds[name] += step_seconds(log)
            print(f"{name}: {', '.join(f'{s:.2f}' for s in step_seconds(log))} s a step", flush=True)
        for step, (old_line, new_line) in enumerate(zip(old, new, strict=True)):
            wrong += differences(old_line, new_line, f"step {step}")
    old_median, new_median = statistics.median(seconds["old"]), statistics.median(seconds["new"])
    print(f"median: old {old_median:.2f} s, new {new_median:.2f} s, new / old {new_median / old_median:.3f}")
    print("\n".join(wrong) if wrong else "all figures that both log are equal to every digit")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
