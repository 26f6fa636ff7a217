"""The whole way from the raw SmolLM2-135M-Instruct to a model that URPO has trained, in one command:

    python toy/pipeline.py runs/whole

Five supervised stages make a base that knows the formats and some of each skill. A sixth, by a demonstrator who errs
at a known rate, makes it unsure, so that reinforcement learning has something to choose from. Then URPO, and the
held-out figures before and after. A stage whose result stands in the folder is not repeated: after a break, the same
command goes on. docs/seed.md tells what each stage is for.
"""
import argparse
import os
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
    "--steps 130 --mix 10:1:1 --batch 24 --preferences toy:2 --constraints .7 --errors 0:.4:.6 --lr 3e-4 --seed 3",
    "--steps 22 --mix 1:1:1 --batch 24 --preferences toy:2 --constraints .4 --errors .3:.4:.6 --lr 2e-4 --seed 4",
)


def run(*command) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def pipeline(out: Path, ranks: int) -> None:
    started, start = time.perf_counter(), "raw"
    for number, stage in enumerate(STAGES, 1):
        folder = out / f"stage-{number}"
        if not (folder / "adapter_config.json").exists():  # written last
            run(sys.executable, "toy/seed.py", "--start", start, *stage.split(), "--out", folder)
        start = folder
    model, trained = out / "model", out / "run" / "checkpoints" / "last" / "model"
    if not model.exists():
        unfinished = model.with_name(f"model.{os.getpid()}")
        for part in seed.merged(start):
            part.save_pretrained(unfinished)
        unfinished.rename(model)
    for name, measured in (("before", model), ("after", trained)):
        result = out / f"heldout-{name}.json"
        if name == "after" and not trained.exists():
            link = ROOT / "runs" / f"pipeline-{out.name}"
            run(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "urpo.py", "--preset", "smol",
                "--model", model, "--name", link.name, "--resume", "True")
            (out / "run").symlink_to(link)
        if not result.exists():
            run(sys.executable, "eval.py", "heldout", "--model", measured, "--json", result)
    run(sys.executable, "eval.py", "compare", out / "heldout-before.json", out / "heldout-after.json")
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes in this call")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for every stage, the model and the results")
    parser.add_argument("--ranks", type=int, default=2, help="processes of URPO")
    args = parser.parse_args()
    try:
        pipeline(args.out.resolve(), args.ranks)
    except InputError as error:
        machine.stop(error)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # its own message stands above
