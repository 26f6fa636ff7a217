"""One training run by two checkouts of this project: are the figures the same?

    python tests/bench/two_versions.py OLD_CHECKOUT NEW_CHECKOUT --steps 4

Each run is `torchrun --nproc_per_node=2 urpo.py --preset smol` in a temporary folder, with the checkout's own .venv.
A checkout whose preset reads toy/ needs its own: `make toy`. Times and memory aside, every figure of log.jsonl that
both versions write must be equal to the last digit. speed.py measures the time.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURED = ("seconds", "tokens_per_second", "peak_memory_gib")  # different in every run


def train(checkout: Path, steps: int) -> list[dict]:
    """The lines of log.jsonl."""
    flags = ["--preset", "smol", "--name", "bench", "--steps", str(steps), "--warmup_steps", "1"]
    command = [checkout / ".venv/bin/python", "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               checkout / "urpo.py", *flags]
    # One thread a rank, and a tokenizer that starts none: as `make demo` runs.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {checkout}/urpo.py ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        return [json.loads(line) for line in Path(folder, "runs/bench/log.jsonl").read_text().splitlines()]


def differences(old, new, where: str) -> list[str]:
    """The figures that both have and that are not equal."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{where}: {old} {new}"]
    found = []
    for key in (old.keys() & new.keys()) - {*MEASURED}:
        found += differences(old[key], new[key], f"{where} {key}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, metavar="CHECKOUT", type=lambda folder: Path(folder).resolve())
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    old, new = [train(checkout, options.steps) for checkout in options.checkouts]
    wrong = []
    for step, (old_line, new_line) in enumerate(zip(old, new, strict=True)):
        wrong += differences(old_line, new_line, f"step {step}")
    print("\n".join(wrong) or "all figures that both log are equal to every digit")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
