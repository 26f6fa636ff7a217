"""Before a start: the model's folder and tokenizer, and whether model, settings and machine go together."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

import machine
from data import InputError

# ------------------------------------------------------------------------------- the model


def model_folder(model: str) -> str:
    """The folder or hub id that --model stands for: `raw` and `seed` are made by toy/seed.py, others stay as given."""
    if model in ("raw", "seed"):
        from toy import seed

        return seed.folder(model)
    if model.startswith((".", "/")) or os.path.exists(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise InputError(f"{model}: no model here (no config.json); give a folder that save_pretrained wrote")
        if not any(Path(model).glob("*.safetensors")):
            raise InputError(f"{model}: no *.safetensors here, and no other format is read, since a pickle "
                             "(pytorch_model.bin) can run code; save it as safetensors where you trust it")
    return model


def load_tokenizer(folder: str):
    """The tokenizer of a folder or hub id. Raises InputError where neither we nor the hub have such a model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a damaged file raises anything; the reason is printed
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--model {folder}: no tokenizer that loads, here or on the hub as far as we can see "
                         f"({type(error).__name__}: {reason}); check the name, or save model and tokenizer "
                         "there") from None
    if not tokenizer.is_fast:
        raise InputError(f"--model {folder}: its tokenizer has no tokenizer.json, and only such tokenizers tell which "
                         "letters a token stands for; convert it, or use another model")
    return tokenizer


def check_model(folder: str, vocabulary: int, tokens: int) -> int:
    """The number of parameters. Refuses a model that trainer or sampler could not use, before weights are loaded.

    vocabulary: the tokenizer's size. tokens: the longest sequence.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:  # damaged; unknown; wants its own code to be run; no language model
        raise InputError(f"--model {folder}: its config.json names no language model that transformers knows "
                         f"({' '.join(str(error).split())[:200]}); use another") from None
    if not hasattr(lm, "lm_head") or not hasattr(getattr(lm, "model", None), "layers"):
        raise InputError(f"--model {folder}: {type(lm).__name__} has no model.layers and lm_head; use a model built "
                         "as Llama and Qwen are")
    if vocabulary > config.vocab_size:
        raise InputError(f"--model {folder}: its tokenizer has {vocabulary} tokens and the model {config.vocab_size}: "
                         "give the tokenizer that belongs to it")
    longest = getattr(config, "max_position_embeddings", tokens)
    if tokens > longest:
        raise InputError(f"--model {folder} reads {longest} tokens, and the longest prompt with its answer may have "
                         f"{tokens}: lower --max_judge_tokens, --max_prompt_tokens, --max_answer_tokens or "
                         "--max_referee_tokens")
    for path in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):  # reads the header, and compares it with the size
                pass
        except SafetensorError as error:
            raise InputError(f"{path}: damaged or cut off ({error}); copy it again") from None
    return sum(weight.numel() for weight in lm.parameters())


def check_start(folder: str, vocabulary: int, tokens: int, cpu_cache: float) -> None:
    """Refuse what would fail later: a model that cannot be used, more ranks than the memory holds."""
    parameters = machine.on_rank_0("reading the model", lambda: check_model(folder, vocabulary, tokens))
    machine.on_rank_0("measuring memory", lambda: check_memory(parameters, dist.get_world_size(), cpu_cache))


def check_memory(parameters: int, world: int, cpu_cache: float) -> None:
    """Refuse more ranks than a CPU machine's memory can hold (a GPU says so itself). cpu_cache: GiB a rank."""
    import psutil

    free = psutil.virtual_memory().available / 2**30
    trainer = 16 * parameters / 2**30  # fp32 weights, gradients and two moments, shared by all ranks
    rank = 4 * parameters / 2**30 + cpu_cache + 3.5  # the sampler's weights and cache, activations, the process itself
    if not machine.GPU and trainer + world * rank > free:
        fitting = max(0, int((free - trainer) / rank))
        raise InputError(f"{world} ranks of a {parameters / 1e6:.0f}M model need about {trainer + world * rank:.1f} "
                         f"GiB and {free:.1f} GiB are free: use --nproc_per_node={fitting}, or a smaller model where "
                         "that is 0")
