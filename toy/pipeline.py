"""The whole way from the raw SmolLM2-135M-Instruct to a model that URPO has trained, in one command:

    python toy/pipeline.py --name whole        any other flag goes to urpo.py

Five supervised stages make a base that knows the formats and some of each skill. A sixth, by a demonstrator who errs
at a known rate, makes it unsure, so that reinforcement learning has something to choose from. Then URPO, and the
held-out figures before and after. A stage whose result stands in the folder is not repeated: after a break, the same
command goes on. docs/seed.md tells what each stage is for.
"""
import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import machine
from data import InputError
from toy import seed

ROOT = Path(__file__).resolve().parent.parent
# Flags of toy/seed.py. Each stage starts from the one before it, the first from the raw model.
STAGES = (
    "--steps 80 --mix 10:1:0 --batch 11 --preferences toy:2 --lr 1e-3",
    "--steps 40 --mix 8:2:1 --batch 11 --lr 3e-4",
    "--steps 100 --mix 4:4:1 --batch 18 --lr 3e-4 --seed 1",
    "--steps 40 --mix 2:9:1 --batch 24 --lr 2e-4 --seed 2",
    # The constraint in 7 of 10 pairs. Then the demonstrator who errs on all three kinds.
    "--steps 130 --mix 10:1:1 --batch 24 --preferences toy:2 --constraints .7 --errors 0:.4:.6 --lr 3e-4 --seed 3",
    "--steps 22 --mix 1:1:1 --batch 24 --preferences toy:2 --constraints .4 --errors .4:.4:.6 --lr 2e-4 --seed 4",
)


def run(*arguments) -> None:
    """A Python command, shown as it could be typed. Raises CalledProcessError when it fails."""
    command = [sys.executable, *map(str, arguments)]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def pipeline(name: str, flags: list[str]) -> None:
    """All that is not yet in runs/<name>: base/stage-1 ..., base/model, the run itself, heldout-*.json."""
    started, home, start = time.perf_counter(), ROOT / "runs" / name, "raw"
    for number, stage in enumerate(STAGES, 1):
        folder = home / "base" / f"stage-{number}"
        if not (folder / "adapter_config.json").exists():  # written last
            run("toy/seed.py", "--start", start, *stage.split(), "--out", folder)
        start = folder
    model, trained = home / "base" / "model", home / "checkpoints" / "last" / "model"
    if not model.exists():
        unfinished = model.with_name(f"model.{os.getpid()}")
        for part in seed.merged(start):
            part.save_pretrained(unfinished)
        unfinished.rename(model)
    results = [home / "heldout-before.json", home / "heldout-after.json"]
    for measured, result in zip((model, trained), results):
        if measured == trained:  # goes on where a break left it; a run that is done ends at once
            run("-m", "torch.distributed.run", "--nproc_per_node=2", "urpo.py", "--preset", "smol", "--model", model,
                "--name", name, "--resume", "True", *flags)
        if not result.exists():
            run("eval.py", "heldout", "--model", measured, "--json", result)
    run("eval.py", "compare", *results)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="whole", help="the folder under runs/")
    args, flags = parser.parse_known_args()
    try:
        pipeline(args.name, flags)
    except InputError as error:
        machine.stop(error)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # its own message stands above
