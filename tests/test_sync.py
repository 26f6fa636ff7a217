"""The comparison of weights in infra/sampler.py: a sampler that lacks any of the trainer's is noticed by sync, also in
a real one; and the order of calls and the options that only a GPU or only a CPU needs."""
import json
import math
from unittest.mock import Mock, call

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from infra import sampler as samplers
from tiny_run import run_program

# ---- plain tensors, as a GPU holds them ----

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Sampler(nn.Module):
    """The tensors of a model as vLLM names and packs them, in one module; padding below the vocabulary."""
    packed_modules_mapping = PACKED

    def __init__(self, weights, dtype):
        super().__init__()
        self.held, self.sizes = {}, {}
        for name, weight in weights.items():
            parts = next((parts for parts in PACKED.values() for part in parts if f".{part}." in name), None)
            if parts is None:
                self.held[name] = weight.to(dtype)
            elif f".{parts[0]}." in name:
                packed = next(packed for packed in PACKED if PACKED[packed] is parts)
                rows = [weights[name.replace(parts[0], part)] for part in parts]
                self.held[name.replace(parts[0], packed)] = torch.cat(rows).to(dtype)
                self.sizes[name.replace(parts[0], packed)] = list(map(len, rows))
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            self.held[name] = torch.cat([self.held[name], torch.zeros(64, self.held[name].shape[1], dtype=dtype)])

    def named_modules(self):
        for name, weight in self.held.items():
            path, _, kind = name.rpartition(".")
            module = nn.Module()
            module.register_parameter(kind, nn.Parameter(weight, requires_grad=False))
            if name in self.sizes:
                module.output_partition_sizes = self.sizes[name]
            yield path, module


@pytest.fixture
def weights(tiny_model):
    return dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict())


def compared(weights, sampler, dtype=torch.bfloat16) -> dict[str, float]:
    sketches = {}
    assert dict(samplers.sketched(weights.items(), dtype, sketches)).keys() == weights.keys()
    return samplers.differences(sketches, samplers.sampler_sketches(sampler))


def wrong(found) -> list[str]:
    return sorted(name for name, distance in found.items() if not distance <= samplers.LARGEST_DISTANCE)


def test_equal_weights_differ_by_rounding_alone(weights):
    found = compared(weights, Sampler(weights, torch.bfloat16))
    assert len(found) == 2 * 6 + 3 and max(found.values()) < 1e-12  # in fp64
    in_fp32 = compared(weights, Sampler(weights, torch.float32), torch.float32)
    assert max(in_fp32.values()) <= samplers.LARGEST_DISTANCE / 4


@pytest.mark.parametrize("name, held", [
    ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"),
    ("model.norm.weight", "model.norm.weight"), ("model.embed_tokens.weight", "model.embed_tokens.weight")])
def test_a_tensor_that_is_one_step_of_adam_behind_is_noticed_in_bf16(weights, name, held):
    """At a rate of 1e-5, of which bf16 keeps a change in one number of a hundred; a norm moves in larger steps."""
    stale = Sampler(weights, torch.bfloat16)
    step = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0)).sign()
    weights[name] = weights[name] + (1e-2 if "norm" in name else 1e-5) * step
    assert wrong(compared(weights, stale)) == [held]


@pytest.mark.parametrize("name, change", [
    ("layers.0.mlp.down_proj.weight", lambda w: w.flip(0)), ("layers.0.mlp.down_proj.weight", lambda w: w.roll(1, 1)),
    ("layers.0.self_attn.qkv_proj.weight", lambda w: w.roll(1, 0)), ("norm.weight", lambda w: w * math.nan),
    ("layers.1.self_attn.o_proj.weight", lambda w: None), ("layers.0.self_attn.o_proj.bias", lambda _: torch.zeros(9))])
def test_what_changed_places_is_not_a_number_or_stands_on_one_side_alone_is_noticed(weights, name, change):
    sampler, name = Sampler(weights, torch.float32), f"model.{name}"
    sampler.held[name] = change(sampler.held.get(name))
    if sampler.held[name] is None:
        del sampler.held[name]
    assert wrong(compared(weights, sampler, torch.float32)) == [name]


# ---- a real sampler, whose CPU form keeps packed weights ----

FAULTS = """
import json, re
import torch
from infra import policy as policies, ranks, sampler as samplers

class Faulty:
    '''A sampler that loses something on the way.'''
    def __init__(self, sampler, fault):
        self.sampler, self.fault, self.applied = sampler, fault, 0
    def __getattr__(self, name):
        return getattr(self.sampler, name)
    def collective_rpc(self, name, kwargs):
        return self.sampler.collective_rpc(name, kwargs=dict(weights_iterator=self.passed(kwargs["weights_iterator"])))
    def passed(self, weights):
        for name, weight in weights:
            if name == {"stale tensor": "model.layers.1.self_attn.v_proj.weight",
                        "stale embedding": "model.embed_tokens.weight"}.get(self.fault):
                weight = old[name]
            if self.fault == "swapped layers":
                other = dict(zip("01", "10"))
                name = re.sub(r"layers\\.(\\d)", lambda layer: "layers." + other[layer[1]], name)
            yield name, weight
    def apply_model(self, function):
        self.applied += 1
        if self.fault == "stale head" and self.applied == 1:  # the call that packs the head anew
            return [None]
        return self.sampler.apply_model(function)

if __name__ == "__main__":
    ranks.start_ranks()
    for folder in FOLDERS:
        sampler = samplers.start_sampler(folder, max_tokens=256, chat_template="")
        policy = policies.load_policy(folder, vocabulary=512, precision="float32")
        said = dict(first=samplers.sync(sampler, policy))
        for fault in (None, "stale tensor", "stale embedding", "stale head", "swapped layers", None):
            old = {name: weight.clone() for name, weight in policies.full_weights(policy)}
            with torch.no_grad():
                for weight in policy.parameters():  # as one step of Adam at a rate of 1e-6
                    weight += 1e-6 * torch.randn_like(weight).sign()
            try:
                said[str(fault)] = samplers.sync(Faulty(sampler, fault), policy)
            except FloatingPointError as error:
                said[str(fault)] = str(error)
        print("\\nsaid", json.dumps(said), flush=True)
        del sampler, policy
    samplers.os._exit(0)  # vLLM and gloo would argue about who ends first
"""


def test_sync_with_a_real_sampler_notices_each_fault(taught_model, smol_tokenizer, tmp_path):
    """A head that is the embedding; and a Qwen2 with a head of its own, whose q, k and v have biases."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, max_position_embeddings=512))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    for one in (model, smol_tokenizer):
        one.save_pretrained(tmp_path / "untied")
    output = run_program(tmp_path, f"FOLDERS = {[taught_model, 'untied']}\n{FAULTS}")
    tied, untied = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("said ")]
    for result in (tied, untied):
        assert max(result["first"], result["None"]) <= samplers.LARGEST_DISTANCE / 4
        for fault, part in (("stale tensor", "layers.1.self_attn.qkv_proj.weight"), ("stale embedding", "sync: "),
                            ("swapped layers", "layers.")):
            assert str(result[fault]).startswith("sync: ") and part in result[fault], (fault, result)
    assert "lm_head.weight" in tied["stale head"]  # which has to be packed by hand


# ---- a sampler that several ranks share ----

SHARED = """
import json, random
import torch
import torch.distributed as dist
from infra import policy as policies, ranks, sampler as samplers

def texts():
    '''Answers to six prompts; the last of several ranks has none of its own.'''
    rng, found = random.Random(0), {}
    prompts = [[rng.randrange(20, 500) for _ in range(rng.randint(3, 60))] for _ in range(6)]
    own = [i for i in range(6) if i % max(1, dist.get_world_size() - 1) == dist.get_rank()]
    answers = samplers.generate(sampler, [prompts[i] for i in own], n=2, max_tokens=[12] * len(own), seeds=own,
                                temperature=1.0)
    for part in ranks.exchange({i: [sample.ids for sample in samples] for i, samples in zip(own, answers)}):
        found |= part
    return sorted(found.items())

def seen(name):
    '''What differs when the trainer's rows of one tensor change places.'''
    changed = sketches | {name: sketches[name].roll(1)}
    found = samplers.differences(changed, sampler.apply_model(samplers.sampler_sketches)[0])
    return [held for held, distance in found.items() if distance > samplers.LARGEST_DISTANCE]

if __name__ == "__main__":
    ranks.start_ranks()
    sampler = samplers.start_sampler("model", max_tokens=128, chat_template="", gpu_memory=0.5, sequences=64,
                                     tensor_parallel=dist.get_world_size())
    policy, sketches = policies.load_policy("model", vocabulary=512, precision="float32"), {}
    before = texts()
    for weight in policy.parameters():
        weight.data.mul_(1.1)
    said = dict(sync=samplers.sync(sampler, policy), texts=[before, texts()], seen={})
    dict(samplers.sketched(policies.full_weights(policy), torch.float32, sketches))
    for part in ("mlp.down_proj.weight", "mlp.up_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.bias"):
        said["seen"][part] = seen(f"model.layers.1.{part}")
    if dist.get_rank() == 0:
        print("\\nsaid", json.dumps(said), flush=True)
    dist.barrier()
    samplers.os._exit(0)
"""


@pytest.mark.slow
def test_four_ranks_that_share_a_sampler_get_the_tokens_of_one_and_notice_each_fault(smol_tokenizer, tmp_path):
    """Of four query heads each rank has one, of two key heads every two ranks one; biases, and a head of its own."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=512))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    for one in (model, smol_tokenizer):
        one.save_pretrained(tmp_path / "model")
    alone, four = [json.loads(run_program(tmp_path, SHARED, ranks=ranks).rpartition("\nsaid ")[2].splitlines()[0])
                   for ranks in (1, 4)]
    assert alone["texts"] == four["texts"] and alone["texts"][0] != alone["texts"][1]
    for said in (alone, four):
        assert said["sync"] <= samplers.LARGEST_DISTANCE / 2
        for part, names in said["seen"].items():
            held = {"up_proj": "gate_up_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
            name = ".".join(held.get(word, word) for word in part.split("."))
            assert names and all(found.removesuffix(", packed") == f"model.layers.1.{name}" for found in names)


# ---- options and calls ----
def test_a_cpu_reads_the_longest_prompt_in_one_part_and_its_cache_holds_four_such(monkeypatch, tiny_model):
    """A prompt read in two parts crashes a seeded request there."""
    import vllm

    made = Mock()
    monkeypatch.setattr(vllm, "LLM", made)
    monkeypatch.setattr(samplers, "GPU", False)
    for max_tokens in (2_000_000, 256):
        samplers.start_sampler(tiny_model, max_tokens=max_tokens, chat_template="turns")
    long, short = [one.kwargs for one in made.call_args_list]
    assert long["max_num_batched_tokens"] == 2_000_000 and long["enable_chunked_prefill"] is False
    token = 2 * 2 * 1 * 32 * 4  # bytes: keys and values of 2 layers, 1 head of 32, fp32
    assert long["kv_cache_memory_bytes"] >= 4 * 2_000_000 * token and short["kv_cache_memory_bytes"] == 2**30


def test_on_a_gpu_the_sampler_sleeps_and_wakes_in_one_order(make_policy, monkeypatch):
    asked = Mock()
    asked.apply_model.return_value = [{}]  # one worker, which holds no tensor
    monkeypatch.setattr(samplers, "GPU", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", asked.empty_cache)
    monkeypatch.setattr(samplers, "differences", lambda trainer, sampler: {"all": 0.0})
    samplers.sleep(asked)
    assert samplers.sync(asked, make_policy()) == 0
    *first, reload, wake, reset, last = asked.mock_calls
    assert first == [call.sleep(level=2), call.empty_cache(), call.wake_up(tags=["weights"])]
    assert (reload[0], reload.args) == ("collective_rpc", ("reload_weights",)) and last[0] == "apply_model"
    assert [wake, reset] == [call.wake_up(tags=["kv_cache"]), call.reset_prefix_cache()]
