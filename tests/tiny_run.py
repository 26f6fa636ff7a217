"""Runs of urpo.py as users start them, on a tiny model that earns rewards: shared by the tests and the fault campaign.

Its vocabulary is padded and its head is tied to the embedding: both are easy to get wrong when weights move into the
sampler. It is taught to answer everything with four scores. So each kind earns rewards that differ within a group.
The rows of the runs lie in its folder.
"""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import data
from conftest import ROOT, free_port
from lab import toy

# Every size is given, so that no change of the preset changes what these runs show.
SIZES = ("--preset smol --name e2e --batch 12 --mix 1:1:1 --group 4 --minibatches 2 --judgements 1 --judge_list 0 "
         "--both_orders --max_prompt_tokens 700 --max_answer_tokens 24 --max_referee_tokens 24 "
         "--max_judge_tokens 700 --row_tokens 512 --save_every 0 --keep 0 --warmup_steps 1 --lr 3e-4 --lr_warmup 0 "
         "--precision float32").split()
SIX_STEPS = ("--steps", "6", "--save_every", "3")  # of the run that conftest.py makes once for all tests, `finished`
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the group that tests share


def write_rows(folder) -> None:
    """40 rows of each kind, with four candidates."""
    for kind, flag in data.FLAGS.items():
        rows = toy.records(kind, "train", 40)
        if kind == "preference":
            rows = [{"prompt": row["prompt"], "responses": [*row["responses"], "Not now.", f"No. {i}"],
                     "scores": [*row["scores"], -1, -2]} for i, row in enumerate(rows)]
        write_lines(Path(folder, f"{flag}.jsonl"), *rows)


def urpo_with(model, program=ROOT / "urpo.py") -> list:
    """The program and its flags for a taught model."""
    rows = [part for flag in data.FLAGS.values() for part in (f"--{flag}", f"{model}/{flag}.jsonl")]
    return [program, *SIZES, "--model", model, *rows]


def teach_score_lines(model, tokenizer, folder, n=4):
    """Imitation: after any chat prompt, write n random scores."""
    rng, prompts = random.Random(0), []
    for kind, flag in data.FLAGS.items():
        for row in data.load_source(kind, f"{folder}/{flag}.jsonl")[0][:8]:
            prompts.append(data.encode_prompt(tokenizer, row))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        hidden, target = [], []
        for prompt in rng.sample(prompts, 3):
            answer = tokenizer.encode(data.score_line([rng.randint(1, 9) for _ in range(n)])) + [tokenizer.eos_token_id]
            hidden.append(model.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1])
            target += answer
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.lm_head(torch.cat(hidden)), torch.tensor(target)).backward()
        optimizer.step()


def make_taught_model(folder, tokenizer) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer) + 64,  # padded
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2))
    write_rows(folder)
    teach_score_lines(model, tokenizer, folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def launcher(ranks: int) -> list[str]:
    """A single rank starts without torchrun."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [sys.executable, *torchrun] if ranks > 1 else [sys.executable]


def own_environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def start(folder, model, *arguments, ranks=2, program=ROOT / "urpo.py", **options) -> subprocess.Popen:
    """`torchrun ... urpo.py` in `folder`, with its output in `folder`/output."""
    command = [*launcher(ranks), *urpo_with(model, program), *arguments]
    with open(folder / "output", "w") as output:
        return subprocess.Popen(command, cwd=folder, env=own_environment(), stdout=output, stderr=output, **options)


def run(folder, model, *arguments, ranks=2, status=0, **options) -> str:
    """The output of a run from start to end, which must exit with `status` (under torchrun: 0 or not)."""
    found = start(folder, model, *arguments, ranks=ranks, **options).wait()
    output = (folder / "output").read_text()
    assert (found if ranks == 1 else bool(found)) == (status if ranks == 1 else bool(status)), output[-6000:]
    return output


def run_program(folder, text: str, ranks=1) -> str:
    """What a Python program prints that a test has written."""
    (folder / "program.py").write_text(text)
    done = subprocess.run([*launcher(ranks), folder / "program.py"], capture_output=True, text=True, cwd=folder,
                          env=own_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def wait_for(condition, process, seconds=300):
    """Until `condition()` holds; the process must live that long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before its time"
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)


def rank_processes(process) -> list[psutil.Process]:
    """The ranks of a run under torchrun, without helpers."""
    return [child for child in psutil.Process(process.pid).children() if "urpo.py" in " ".join(child.cmdline())]


def kill_all(process) -> None:
    """`kill -9` of every process of a run at once."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone, timeout=60)
    process.wait()


def write_lines(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same_in_every_run(log: list[dict]) -> list[dict]:
    """log.jsonl without times and memory: what an exact resume must repeat to every digit."""
    return [{name: value for name, value in line.items()
             if name not in ("seconds", "tokens_per_second", "peak_memory_gib")} for line in log]
