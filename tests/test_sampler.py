"""The sampler with the real vLLM: a biased, untied Qwen2 reloaded, and where the answers of a base model end."""
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT
from tiny_run import make_taught_model

RELOAD = """
import json, sys
sys.path.insert(0, {root!r})
import torch
import machine

def distance(engine, policy):
    worst = 0.0
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12] * 4, [20, 21, 22]]
    for prompt, samples in zip(prompts, machine.generate(engine, prompts, 2, [24] * 2, [1, 2], 1.0)):
        group = machine.Group(0, None, prompt, [])
        for sample in samples:
            group.add(sample)
        with torch.no_grad():
            own = policy(machine.build_row([group])).tolist()
        theirs = [logprob for sample in samples for logprob in sample.logprobs]
        worst = max([worst, *(abs(a - b) for a, b in zip(own, theirs, strict=True))])
    return worst

if __name__ == "__main__":
    machine.start_ranks(5)
    engine = machine.start_engine({folder!r}, 256, 0.25, 0.5, sequences=8)
    policy = machine.load_policy({folder!r}, len(engine.get_tokenizer()), "float32", 1.0, 64, False)
    found = {{"fresh": distance(engine, policy)}}
    with torch.no_grad():
        for weight in policy.parameters():
            weight.to_local().add_(torch.randn_like(weight.to_local()) * 0.1)
    found["stale"] = distance(engine, policy)
    machine.sync(engine, policy)
    found["synced"] = distance(engine, policy)
    print("\\nfound", json.dumps(found), flush=True)
    machine.os._exit(0)
"""

ENDS = """
import json, sys
sys.path.insert(0, {root!r})
import data, machine, plan
from vllm import SamplingParams

if __name__ == "__main__":
    engine = machine.start_engine({folder!r}, 512, 0.25)
    tokenizer = engine.get_tokenizer()
    prompts = [data.encode_chat(tokenizer, text) for text in ("What is 1 + 1?", "Say hi.")]
    answers = machine.generate(engine, prompts, 2, [40] * 2, [1, 2], 1.0)
    # The same requests with vLLM's own dictionaries of log-probs and its own text.
    params = [SamplingParams(n=2, max_tokens=40, seed=seed, temperature=1.0, logprobs=0,
                             stop_token_ids=data.stop_ids(tokenizer),
                             logit_bias=dict.fromkeys(range(len(tokenizer), len(tokenizer) + 64), -1e9))
              for seed in (1, 2)]
    plain = engine.generate([{{"prompt_token_ids": ids}} for ids in prompts], params, use_tqdm=False)
    found = {{"eos": tokenizer.eos_token, "ours": [], "plain": []}}
    for samples, output in zip(answers, plain):
        for sample, other in zip(samples, output.outputs):
            found["ours"].append([sample.ids, sample.logprobs, sample.text, sample.finished])
            found["plain"].append([list(other.token_ids),
                                   [one[i].logprob for one, i in zip(other.logprobs, other.token_ids)]])
    print("\\nfound", json.dumps(found), flush=True)
    machine.os._exit(0)
"""


def found_by(program: str, folder, home) -> dict:
    script = home / "program.py"
    script.write_text(program.format(root=str(ROOT), folder=str(folder)))
    environment = dict(os.environ)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of other tests' group
        environment.pop(variable, None)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=home, env=environment)
    assert "\nfound " in done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("\nfound ")[2])


def test_a_biased_untied_qwen2_with_a_padded_vocabulary_is_in_step_after_a_sync(tmp_path, smol_tokenizer):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(smol_tokenizer) + 64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "model")
    smol_tokenizer.save_pretrained(tmp_path / "model")
    found = found_by(RELOAD, tmp_path / "model", tmp_path)
    assert found["fresh"] < 1e-3 and found["synced"] < 1e-3
    assert found["stale"] > 0.1, "the check would not notice a sampler that was not synced"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory, smol_tokenizer):
    """A model taught to end its turns by <|im_end|>, with a base tokenizer, whose eos is <|endoftext|>."""
    folder = tmp_path_factory.mktemp("base")
    make_taught_model(folder, smol_tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings["eos_token"] = "<|endoftext|>"
            (folder / name).write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["eos_token_id"] = smol_tokenizer.convert_tokens_to_ids("<|endoftext|>")
        (folder / name).write_text(json.dumps(settings))
    return folder


def test_the_answers_of_a_base_end_at_the_end_of_the_turn_and_flat_log_probs_are_the_same(
        base_model, tmp_path, smol_tokenizer):
    found = found_by(ENDS, base_model, tmp_path)
    assert found["eos"] == "<|endoftext|>"
    end = smol_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert any(finished for *_, finished in found["ours"])
    for (ids, logprobs, text, finished), (plain_ids, plain_logprobs) in zip(found["ours"], found["plain"]):
        assert ids == plain_ids and logprobs == plain_logprobs and len(ids) == len(logprobs)
        assert (ids[-1] == end) == finished and end not in ids[:-1]
        assert "<|im_end|>" not in text
        assert text == smol_tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
