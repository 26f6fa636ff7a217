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

import pandas

MEASURED = ("seconds", "tokens_per_second", "peak_memory_gib")  # different in every run


def train(checkout: Path, steps: int) -> pandas.DataFrame:
    """log.jsonl: a row a step, a column a figure."""
    flags = ["--preset", "smol", "--name", "bench", "--steps", str(steps), "--warmup_steps", "1"]
    command = [checkout / ".venv/bin/python", "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               checkout / "urpo.py", *flags]
    # One thread a rank, and a tokenizer that starts none: as `make demo` runs.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {checkout}/urpo.py ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        return pandas.json_normalize(list(map(json.loads, Path(folder, "runs/bench/log.jsonl").open())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, metavar="CHECKOUT", type=lambda folder: Path(folder).resolve())
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    old, new = [train(checkout, options.steps) for checkout in options.checkouts]
    both = [name for name in old.columns.intersection(new.columns) if name.partition(".")[0] not in MEASURED]
    wrong = old[both].compare(new[both], result_names=("old", "new"))
    print("all figures that both log are equal to every digit" if wrong.empty else wrong.to_string())
    sys.exit(not wrong.empty)


if __name__ == "__main__":
    main()
