"""The whole of it on a tiny model: two ranks under torchrun, vLLM sampling, three kinds of prompt, checkpoint, resume.

The vocabulary is padded and the head is tied to the embedding, as in most small models: both are easy to get wrong
when weights move into the sampler. The model is taught beforehand to answer everything with four scores. So each
kind earns rewards that differ within a group: preferences by tau, a question by its last number, and instructions
by the model's own verdicts.
"""
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import data
import urpo
from conftest import ROOT, free_port
from rewards import group_advantages, parse_scores, preference_reward, self_rewards, verify_answer

SIZES = ("--preset smol --name e2e --batch 12 --group 4 --max_prompt_tokens 700 --max_answer_tokens 24 "
         "--max_referee_tokens 24 --preferences builtin:4 --builtin_rows 40").split()


def run(folder, model, *arguments, ranks=2):
    """`torchrun ... urpo.py` in `folder`; a single rank starts without torchrun."""
    environment = os.environ | {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of the group of one that other tests share
        environment.pop(name, None)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    done = subprocess.run([sys.executable, *(launcher if ranks > 1 else []), ROOT / "urpo.py", *SIZES, "--model", model,
                           *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def teach_score_lines(model, tokenizer):
    """Imitation: after any chat prompt, write four random scores."""
    rng = random.Random(0)
    prompts = [data.encode_prompt(tokenizer, data.BUILTIN[kind](rng, "train")) for kind in data.KINDS for _ in range(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        hidden, target = [], []
        for prompt in rng.sample(prompts, 3):
            answer = tokenizer.encode(data.score_line([rng.randint(1, 9) for _ in range(4)])) + [tokenizer.eos_token_id]
            hidden.append(model.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1])
            target += answer
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.lm_head(torch.cat(hidden)), torch.tensor(target)).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def taught_model(tmp_path_factory, smol_tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(smol_tokenizer) + 64,  # padded, as the vocabularies of larger models are
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2))
    teach_score_lines(model, smol_tokenizer)
    folder = tmp_path_factory.mktemp("taught")
    model.save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(taught_model, tmp_path_factory):
    """A run of three steps, one of them warm-up, on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, taught_model, "--steps", "3", "--warmup_steps", "1", "--lr", "1e-3", "--lr_warmup", "0",
        "--max_drift", "0.001")
    return folder / "runs" / "e2e"


def test_every_step_is_logged_with_its_seven_parts_and_in_step_with_the_sampler(finished):
    log = lines(finished / "log.jsonl")
    assert [line["step"] for line in log] == [0, 1, 2]
    for line in log:
        assert list(line["seconds"]) == list(urpo.PARTS) and all(seconds >= 0 for seconds in line["seconds"].values())
        assert line["drift_mean"] < 1e-3
        assert line["updates"] + line["skipped_updates"] == 2 and line["peak_memory_gib"] > 0
    assert sum(line["updates"] for line in log) > 0, "nothing was learned, so drift was not put to the test"
    assert json.loads((finished / "config.json").read_text())["config"]["batch"] == 12


def test_warm_up_draws_no_instructions_and_the_mix_holds_after_it(finished):
    drawn = [{kind: line[kind]["prompts"] for kind in data.KINDS if kind in line}
             for line in lines(finished / "log.jsonl")]
    assert drawn == [{"preference": 6, "reasoning": 6}] + 2 * [{"preference": 4, "reasoning": 4, "instruction": 4}]


def test_every_recorded_reward_and_advantage_follows_from_its_text(finished, smol_tokenizer):
    groups = lines(finished / "rollouts.jsonl")
    assert len(groups) == 3 * 12 and len({(group["step"], group["index"]) for group in groups}) == len(groups)
    signal = set()
    for group in groups:
        samples = group["samples"]
        assert len(samples) == 4
        decoded = [smol_tokenizer.decode(sample["ids"], skip_special_tokens=True) for sample in samples]
        assert decoded == [sample["text"] for sample in samples]
        if group["kind"] == "preference":
            rewards = [preference_reward(sample["text"], group["truth"]) for sample in samples]
            assert [s["scores"] for s in samples] == [parse_scores(text, len(group["truth"])) for text in decoded]
        elif group["kind"] == "reasoning":
            rewards = [verify_answer(sample["text"], group["answer"]) for sample in samples]
        else:
            rewards = self_rewards([j["text"] for j in group["judgements"]], [j["order"] for j in group["judgements"]])
        advantages = [0.0] * 4 if rewards is None else group_advantages(torch.tensor(rewards)).tolist()
        assert [sample["reward"] for sample in samples] == (rewards or [None] * 4)
        assert [sample["advantage"] for sample in samples] == advantages
        if any(advantages):
            signal.add(group["kind"])
    assert {"preference", "instruction"} <= signal, "the taught model should earn rewards that differ"


def test_the_batch_of_a_step_is_the_one_that_draw_states(finished):
    config = urpo.Config(**json.loads((finished / "config.json").read_text())["config"])
    sources = {kind: data.load_source(kind, getattr(config, data.FLAGS[kind]), count=config.builtin_rows)
               for kind in data.KINDS}
    for step in range(3):
        batch = data.draw(sources, config.mix, config.batch, config.warmup_steps, config.seed, step)
        recorded = [group for group in lines(finished / "rollouts.jsonl") if group["step"] == step]
        assert [(group["index"], group["instruction"]) for group in recorded] == [
            (index, prompt.instruction) for index, prompt in enumerate(batch)]


SAMPLE = """
import json, sys
sys.path.insert(0, {root!r})
import data
if __name__ == "__main__":
    engine = data.start_engine({folder!r}, 256)
    outputs = data.generate(engine, {prompts!r}, 1, [16] * 3, [0] * 3, 1.0)
    samples = [output.outputs[0] for output in outputs]
    print("\\nsamples", json.dumps([[list(sample.token_ids), [token[i].logprob for token, i in zip(sample.logprobs,
          sample.token_ids)]] for sample in samples]))
"""


def test_the_checkpoint_loads_in_transformers_and_in_vllm_and_they_agree(finished, taught_model, tmp_path):
    folder = str(finished / "checkpoints" / "step_3" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))

    prompts = [data.encode_chat(tokenizer, text) for text in ("What is 1 + 1?", "Say hi.", "Tell me about owls.")]
    script = tmp_path / "sample.py"
    script.write_text(SAMPLE.format(root=str(ROOT), folder=folder, prompts=prompts))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    samples = json.loads(done.stdout.rpartition("\nsamples ")[2])
    for prompt, (ids, logprobs) in zip(prompts, samples, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = torch.log_softmax(logits, -1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)


def test_resume_adds_one_step_and_keeps_the_lines_before_it(finished, taught_model):
    before = (finished / "log.jsonl").read_text()
    run(finished.parent.parent, taught_model, "--steps", "4", "--warmup_steps", "1", "--lr", "1e-3", "--lr_warmup", "0",
        "--max_drift", "0.001", "--resume")
    after = (finished / "log.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4
    assert json.loads(after.splitlines()[-1])["step"] == 3
    assert len(lines(finished / "rollouts.jsonl")) == 4 * 12
    assert (finished / "checkpoints" / "step_4").is_dir()


def test_the_warm_start_writes_an_adapter_that_peft_loads_and_does_not_depend_on_the_ranks(taught_model, tmp_path):
    from peft import PeftModel

    logs = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run(folder, taught_model, "--method", "sft", "--lora_rank", "4", "--steps", "2", ranks=ranks)
        logs[ranks] = lines(folder / "runs" / "e2e" / "log.jsonl")
        adapter = folder / "runs" / "e2e" / "checkpoints" / "step_2" / "adapter"
        base = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, adapter)
        trained = {name: p for name, p in loaded.named_parameters() if "lora_B" in name}
        assert len(trained) == 2 * 7 and all(p.abs().sum() > 0 for p in trained.values())
    for alone, shared in zip(logs[1], logs[2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
