"""fingerprint.py: a sampler that lacks any of the trainer's weights is noticed by sync, also on a real engine."""
import doctest
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fingerprint
from conftest import ROOT


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(fingerprint)
    assert failed == 0 and attempted >= 3


# ---- plain tensors, as a GPU holds them ----

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Sampler(nn.Module):
    """The tensors of a model as vLLM names and packs them, in one module; padding below the vocabulary."""
    packed_modules_mapping = PACKED

    def __init__(self, weights, dtype):
        super().__init__()
        self.held = {}
        for name, weight in weights.items():
            parts = next((parts for packed, parts in PACKED.items() for part in parts if f".{part}." in name), None)
            if parts is None:
                self.held[name] = weight.to(dtype)
            elif f".{parts[0]}." in name:
                packed = next(packed for packed in PACKED if PACKED[packed] is parts)
                rows = [weights[name.replace(parts[0], part)] for part in parts]
                self.held[name.replace(parts[0], packed)] = torch.cat(rows).to(dtype)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            self.held[name] = torch.cat([self.held[name], torch.zeros(64, self.held[name].shape[1], dtype=dtype)])

    def named_parameters(self, remove_duplicate=True):
        return iter(self.held.items())


@pytest.fixture
def weights(tiny_model):
    return dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict())


def compared(weights, sampler, dtype=torch.bfloat16) -> dict[str, float]:
    sketches = {}
    assert dict(fingerprint.sketched(weights.items(), dtype, sketches)).keys() == weights.keys()
    return fingerprint.differences(sketches, fingerprint.sampler_sketches(sampler))


def wrong(found) -> list[str]:
    return sorted(name for name, distance in found.items() if not distance <= fingerprint.LARGEST)


def test_equal_weights_differ_by_rounding_alone(weights):
    found = compared(weights, Sampler(weights, torch.bfloat16))
    assert len(found) == 2 * 6 + 3 and max(found.values()) < 1e-12  # in fp64
    assert max(compared(weights, Sampler(weights, torch.float32), torch.float32).values()) <= fingerprint.LARGEST / 4


@pytest.mark.parametrize("name, held", [
    ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"),
    ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
    ("model.norm.weight", "model.norm.weight"), ("lm_head.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "model.embed_tokens.weight")])
def test_a_tensor_that_is_one_step_of_adam_behind_is_noticed_in_bf16(weights, name, held):
    """At a rate of 1e-5, of which bf16 keeps a change in one number of a hundred; a norm moves in larger steps."""
    stale = Sampler(weights, torch.bfloat16)
    step = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0)).sign()
    weights[name] = weights[name] + (1e-2 if "norm" in name else 1e-5) * step
    assert wrong(compared(weights, stale)) == [held]


def test_what_changed_places_is_noticed(weights):
    for name, change in (("model.layers.0.mlp.down_proj.weight", lambda w: w.flip(0)),
                         ("model.layers.0.mlp.down_proj.weight", lambda w: w.roll(1, dims=1)),
                         ("model.layers.0.self_attn.qkv_proj.weight", lambda w: w.roll(1, dims=0))):
        sampler = Sampler(weights, torch.float32)
        sampler.held[name] = change(sampler.held[name])
        assert wrong(compared(weights, sampler, torch.float32)) == [name]


def test_a_tensor_that_only_one_side_has_is_noticed(weights):
    sampler = Sampler(weights, torch.float32)
    sampler.held["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    del sampler.held["model.layers.1.self_attn.o_proj.weight"]
    assert wrong(compared(weights, sampler, torch.float32)) == [
        "model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.o_proj.weight"]


# ---- the real engine, whose CPU form keeps packed weights ----

FAULTS = """
import json, re, sys
sys.path.insert(0, {root!r})
import torch
import machine

class Faulty:
    '''An engine that loses something on the way.'''
    def __init__(self, engine, fault):
        self.engine, self.fault, self.applied = engine, fault, 0
    def __getattr__(self, name):
        return getattr(self.engine, name)
    def collective_rpc(self, name, kwargs):
        return self.engine.collective_rpc(name, kwargs=dict(weights_iterator=self.passed(kwargs["weights_iterator"])))
    def passed(self, weights):
        for name, weight in weights:
            if self.fault == "stale tensor" and name == "model.layers.1.self_attn.v_proj.weight":
                weight = old[name]
            if self.fault == "stale embedding" and name == "model.embed_tokens.weight":
                weight = old[name]
            if self.fault == "swapped layers":
                other = dict(zip("01", "10"))
                name = re.sub(r"layers\\.(\\d)", lambda layer: "layers." + other[layer[1]], name)
            yield name, weight
    def apply_model(self, function):
        self.applied += 1
        if self.fault == "stale head" and self.applied == 1:  # the call that packs the head anew
            return [None]
        return self.engine.apply_model(function)

if __name__ == "__main__":
    machine.start_ranks(5)
    for folder in {folders!r}:
        engine = machine.start_engine(folder, 256)
        policy = machine.load_policy(folder, 512, "float32", 1.0, 1024, False)
        said = dict(first=machine.sync(engine, policy))
        for fault in (None, "stale tensor", "stale embedding", "stale head", "swapped layers", None):
            old = {{name: weight.clone() for name, weight in machine.full_weights(policy)}}
            with torch.no_grad():
                for weight in policy.parameters():  # as one step of Adam at a rate of 1e-6
                    weight += 1e-6 * torch.randn_like(weight).sign()
            try:
                said[str(fault)] = machine.sync(Faulty(engine, fault), policy)
            except FloatingPointError as error:
                said[str(fault)] = str(error)
        print("\\nsaid", json.dumps(said), flush=True)
        del engine, policy
"""


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory) -> str:
    """Qwen2, whose q, k and v have biases, with a head of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untied")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, max_position_embeddings=512))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return str(folder)


def test_sync_on_a_real_engine_notices_each_fault(taught_model, untied_model, smol_tokenizer, tmp_path):
    """A head that is the embedding, and one of its own; drift would see none of these."""
    smol_tokenizer.save_pretrained(untied_model)
    script = tmp_path / "faults.py"
    script.write_text(FAULTS.format(root=str(ROOT), folders=[taught_model, untied_model]))
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    results = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("said ")]
    assert len(results) == 2, done.stderr[-4000:]
    for result in results:
        print(result)
        assert result["first"] <= fingerprint.LARGEST / 4 and result["None"] <= fingerprint.LARGEST / 4
        for fault, part in (("stale tensor", "layers.1.self_attn.qkv_proj.weight"), ("stale embedding", ""),
                            ("swapped layers", "layers.")):
            assert "sync: the sampler does not hold the trainer's weights: " in result[fault], (fault, result[fault])
            assert part in result[fault]
    assert "lm_head.weight" in results[0]["stale head"]  # that of the tied model, which has to be packed by hand


def test_a_tensor_that_is_not_a_number_is_no_equal_tensor():
    ones = torch.ones(3)
    embedding = "model.embed_tokens.weight"
    held = {"a": (["a"], torch.full((3,), math.nan)), embedding: ([embedding], ones)}
    found = fingerprint.differences({"a": ones, embedding: ones}, held)
    assert max(found.values()) == math.inf
