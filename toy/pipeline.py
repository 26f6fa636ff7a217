"""The whole way from the raw SmolLM2-135M-Instruct to a model that URPO has trained, in one command:

    python toy/pipeline.py runs/whole

Four supervised stages make a base that knows the formats and has half of each skill. A fifth, by a demonstrator who
errs at a known rate, makes it unsure, so that reinforcement learning has something to choose from. Then URPO, and the
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
)


def run(*command) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def merged(adapter: Path, folder: Path) -> None:
    """The raw model with an adapter merged in, as an ordinary model in `folder`."""
    model, tokenizer = seed.load_adapter(adapter)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def pipeline(out: Path, ranks: int) -> None:
    started, start = time.perf_counter(), "raw"
    for number, stage in enumerate(STAGES, 1):
        folder = out / f"stage-{number}"
        if not (folder / "adapter_config.json").exists():  # written last
            run(sys.executable, "toy/seed.py", "--start", start, *stage.split(), "--out", folder)
        start = folder
    model, trained = out / "model", out / "run" / "checkpoints" / "last" / "model"
    if not model.exists():
        merged(start, model)
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
