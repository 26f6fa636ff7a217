"""How long does a set take that repeats its questions a hundred times? 1.79 million rows in the shape of DAPO-Math-17k.

    python tests/bench/startup.py [FOLDER]      # it writes 2 GB there; without a folder, into a temporary one

Prints rows, CPU seconds, seconds and peak memory until they are ready for the first step: read, each question once,
measured with the laptop's tokenizer. No network: the rows are made here.
"""
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import datasets
import pyarrow
import pyarrow.parquet
import torch

import data
import plan
import readers

QUESTIONS, REPEATS = 17_398, 103
WORDS = "Let $ABC$ be a triangle with $\\angle A = 60^\\circ$ and find the number of integers $n$ such that".split()


def record(index: int, rng: random.Random) -> dict:
    text = " ".join(rng.choice(WORDS) for _ in range(60))
    question = ("Solve the following math problem step by step. The last line of your response should be of the form "
                "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
                f"{text} {index}?\n\nRemember to put your answer on its own line after \"Answer:\".")
    return {"data_source": "math_dapo", "prompt": [{"content": question, "role": "user"}], "ability": "MATH",
            "reward_model": {"ground_truth": str(index), "style": "rule"}, "extra_info": {"index": f"{index:032x}"}}


def main(folder: Path) -> None:
    file = folder / "rows.parquet"
    if not file.exists():
        rng = random.Random(0)
        table = pyarrow.Table.from_pylist([record(index, rng) for index in range(QUESTIONS)])
        with pyarrow.parquet.ParquetWriter(file, table.schema) as writer:
            for _ in range(REPEATS):
                writer.write_table(table)
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(folder))
    readers.hub_records = lambda *arguments: loaded
    torch.set_num_threads(1)
    tokenizer = plan.load_tokenizer(plan.model_folder("raw"))
    names, counts = dict.fromkeys(data.KINDS, ["made/here"]), {"preference": 0, "reasoning": 8, "instruction": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, clock = time.process_time(), time.perf_counter()
    sources, dropped = readers.load_sources(names, counts, tokenizer, 4096, 4096, 8, 0)
    print(f"{len(loaded)} rows, {len(sources['reasoning'])} questions, {dropped['reasoning']} too long: "
          f"{time.process_time() - cpu:.0f} s of CPU time, {time.perf_counter() - clock:.0f} s, "
          f"{before / 2**20:.2f} GiB before, peak "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
