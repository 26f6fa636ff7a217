"""infra/sampler.py with the real vLLM: a sync that loses anything is noticed, and where the answers of a base end.

The sketches of plain tensors, as a GPU holds them, are in test_sketches.py.
"""
import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from infra.sampler import LARGEST_DISTANCE
from tiny_run import make_taught_model, run_program

FAULTS = """
import json, re
import torch
from data import Group, Prompt
from infra import policy as policies, ranks, sampler as samplers
from infra.chat import load_tokenizer
from infra.rows import build_row

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
        return self.sampler.apply_model(function)

def distance(sampler, policy):
    '''The largest one between log-probs of the sampler's answers and the trainer's.'''
    worst, prompts = 0.0, [[5, 6, 7, 8, 9, 10, 11, 12] * 4, [20, 21, 22]]
    answers = samplers.generate(sampler, prompts, n=2, max_tokens=[24] * 2, seeds=[1, 2], temperature=1.0)
    for prompt, samples in zip(prompts, answers):
        group = Group(0, Prompt("instruction", ""), prompt, advantages=[0.0] * 2)
        for sample in samples:
            group.add(sample)
        with torch.no_grad():
            own = policy(build_row([group], [[1.0] * 2])).tolist()
        theirs = [logprob for sample in samples for logprob in sample.logprobs]
        worst = max([worst, *(abs(a - b) for a, b in zip(own, theirs, strict=True))])
    return worst

def move(policy, by):
    with torch.no_grad():
        for weight in policy.parameters():
            weight += by * torch.randn_like(weight).sign()

if __name__ == "__main__":
    ranks.start_ranks()
    for folder in {folders!r}:
        tokenizer = load_tokenizer(folder)
        sampler = samplers.start_sampler(folder, max_tokens=256, chat_template=tokenizer.chat_template)
        policy = policies.load_policy(folder, vocabulary=len(tokenizer), precision="float32")
        said = dict(fresh=distance(sampler, policy), first=samplers.sync(sampler, policy))
        for fault in (None, "stale tensor", "stale embedding", "stale head", "swapped layers", None):
            old = {{name: weight.clone() for name, weight in policies.full_weights(policy)}}
            move(policy, 1e-6)  # as one step of Adam at this rate
            try:
                said[str(fault)] = samplers.sync(Faulty(sampler, fault), policy)
            except FloatingPointError as error:
                said[str(fault)] = str(error)
        move(policy, 0.03)
        said["stale"] = distance(sampler, policy)
        samplers.sync(sampler, policy)
        said["synced"] = distance(sampler, policy)
        print("\\nsaid", json.dumps(said), flush=True)
        del sampler, policy
    samplers.os._exit(0)
"""


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory, smol_tokenizer) -> str:
    """Qwen2, whose q, k and v have biases, with a head of its own and a padded vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untied")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(smol_tokenizer) + 64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_sync_notices_each_fault_and_brings_the_log_probs_into_step(taught_model, untied_model, tmp_path):
    """A head that is the embedding, and one of its own. Drift would see none of the faults."""
    output = run_program(tmp_path, FAULTS.format(folders=[taught_model, untied_model]))
    results = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("said ")]
    assert len(results) == 2
    for result in results:
        print(result)
        assert result["first"] <= LARGEST_DISTANCE / 4 and result["None"] <= LARGEST_DISTANCE / 4
        assert result["fresh"] < 1e-3 and result["synced"] < 1e-3 and result["stale"] > 0.1
        for fault, part in (("stale tensor", "layers.1.self_attn.qkv_proj.weight"), ("stale embedding", ""),
                            ("swapped layers", "layers.")):
            assert "sync: " in str(result[fault]) and part in result[fault], fault
    assert "lm_head.weight" in results[0]["stale head"]  # that of the tied model, which has to be packed by hand


ENDS = """
import json, math
from infra import sampler as samplers
from infra.chat import encode_chat, stop_ids

if __name__ == "__main__":
    sampler = samplers.start_sampler({folder!r}, max_tokens=512, chat_template={template!r})
    tokenizer = sampler.get_tokenizer()
    prompts = [encode_chat(tokenizer, text) for text in ("What is 1 + 1?", "Say hi.")]
    answers = samplers.generate(sampler, prompts, n=2, max_tokens=[40] * 2, seeds=[1, 2], temperature=1.0)
    # The same requests with vLLM's own dictionaries of log-probs and its own text.
    from vllm import SamplingParams
    padded = dict.fromkeys(range(len(tokenizer), len(tokenizer) + 64), -math.inf)
    params = [SamplingParams(n=2, max_tokens=40, seed=seed, temperature=1.0, logprobs=0, logit_bias=padded,
                             stop_token_ids=stop_ids(tokenizer)) for seed in (1, 2)]
    plain = sampler.generate([{{"prompt_token_ids": ids}} for ids in prompts], params, use_tqdm=False)
    found = {{"eos": tokenizer.eos_token, "ours": [], "plain": []}}
    for samples, output in zip(answers, plain):
        for sample, other in zip(samples, output.outputs):
            found["ours"].append([sample.ids, sample.logprobs, sample.text, sample.finished])
            found["plain"].append([list(other.token_ids),
                                   [one[i].logprob for one, i in zip(other.logprobs, other.token_ids)]])
    print("\\nfound", json.dumps(found), flush=True)
    samplers.os._exit(0)
"""


@pytest.mark.slow
def test_answers_of_a_base_end_with_the_turn_and_flat_log_probs_are_the_same(tmp_path, smol_tokenizer):
    """A model taught to end its turns by <|im_end|>, with a base tokenizer, whose eos is <|endoftext|>."""
    base, ids = "<|endoftext|>", smol_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    make_taught_model(tmp_path, smol_tokenizer)
    for name, changes in (("tokenizer_config.json", {"eos_token": base}), ("special_tokens_map.json", {"eos_token": base}),
                          ("config.json", {"eos_token_id": ids}), ("generation_config.json", {"eos_token_id": ids})):
        if (tmp_path / name).exists():
            settings = json.loads((tmp_path / name).read_text()) | changes
            (tmp_path / name).write_text(json.dumps(settings))
    output = run_program(tmp_path, ENDS.format(folder=str(tmp_path), template=smol_tokenizer.chat_template))
    found = json.loads(output.rpartition("\nfound ")[2].splitlines()[0])
    assert found["eos"] == base and any(finished for *_, finished in found["ours"])
    end = smol_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for (ids, logprobs, text, finished), (plain_ids, plain_logprobs) in zip(found["ours"], found["plain"]):
        assert ids == plain_ids and logprobs == plain_logprobs and len(ids) == len(logprobs)
        assert (ids[-1] == end) == finished and end not in ids[:-1]
        assert text == smol_tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
