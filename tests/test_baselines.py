"""The baselines: each changes the one part of the loop that it says, on a tiny model; and their own equations."""
import random
import subprocess
from types import SimpleNamespace

import pytest
import torch

import data
from conftest import plain_logprobs
from data import Group, Prompt
from infra import chat
from infra.ranks import InputError
from lab import baselines
from lab.baselines import Baseline
from rewards import group_rewards
from tiny_run import launcher, lines, own_environment, urpo_with

PAIR = Prompt("preference", "Say hi.", ("Hi.", "No."), (1, 0))


def baseline(folder, model, command, *arguments, ranks=1, status=0) -> str:
    """What `python -m lab.baselines` prints; under torchrun an error's status is 1."""
    started = [*launcher(ranks), "-m", "lab.baselines", *command.split(), *urpo_with(model)[1:]]
    named = ("--name", command or "none", "--steps", "3")
    done = subprocess.run([*started, *named, *arguments], cwd=folder, env=own_environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert bool(done.returncode) == bool(status), done.stdout[-6000:]
    return done.stdout


# ---- SFT ----


def test_sft_imitates_a_demonstrator_who_errs_at_the_stated_rates(smol_tokenizer):
    question = Prompt("reasoning", "What is 4 + 4?", answer="8")
    worked = {question.instruction: {"worked": "4 + 4 = \\boxed{8}", "flawed": "4 + 4 = \\boxed{5}"}}
    for prompt, errors, right in ((question, 0.5, 0.8), (question, 0, 1), (PAIR, 9, -1), (PAIR, 0, 1)):
        config, group = Baseline(group=200, errors=errors), Group(0, prompt, [1])
        baselines.demonstrate(config, smol_tokenizer, group, worked, random.Random(0))
        assert sum(group_rewards(config, group)) / 200 == pytest.approx(right, abs=0.08)
        assert {ids[-1] for ids in group.answers} == {chat.stop_ids(smol_tokenizer)[0]}


def test_an_imitating_update_is_the_mean_log_prob_of_all_answer_tokens(make_policy, plain_model):
    """By plain transformers; the rate is so small that nothing moves."""
    groups = [Group(i, Prompt("reasoning", "q", answer="1"), [5, 6, 7], [[8, 9], [3, 4, 2 + i]], advantages=[1.0, 1.0],
                    sampler_logprobs=[[0.0] * 2, [0.0] * 3]) for i in range(2)]
    total, tokens = 0.0, 0
    for group in groups:
        for answer in group.answers:
            total += plain_logprobs(plain_model, group.prompt_ids, answer, temperature=1.0).sum().item()
            tokens += len(answer)
    model = make_policy(temperature=1.0)
    figures = baselines.imitate(Baseline(minibatches=2, lr=1e-9), model, torch.optim.AdamW(model.parameters()), groups)
    assert figures["loss"] == pytest.approx(-total / tokens, rel=1e-4) and figures["updates"] == 2


def test_sft_refuses_data_without_a_demonstrator():
    with pytest.raises(InputError, match="--reasoning: .*lab.toy"):
        baselines.demonstrations({"reasoning": [Prompt("reasoning", "Who is it?", answer="1")]})


# ---- all of them, from start to end ----


@pytest.fixture(scope="module")
def trained(taught_model, tmp_path_factory):
    """The runs of both baselines: SFT on two ranks, the loop with a frozen judge on one."""
    folder = tmp_path_factory.mktemp("baselines")
    baseline(folder, taught_model, "rm_gen", "--mix", "0:1:1", "--judge", taught_model)
    baseline(folder, taught_model, "sft", "--warmup_steps", "0", "--steps", "8", "--lr", "1e-3", ranks=2)
    return folder / "runs"


@pytest.mark.slow
def test_the_frozen_judge_is_asked_as_the_policy_would_be(trained):
    log = lines(trained / "rm_gen" / "log.jsonl")
    assert max(line["instruction"]["format"] for line in log[1:]) > 0
    assert all("preference" not in line for line in log)
    for _, group in data.read_groups(trained / "rm_gen" / "rollouts.jsonl", []):
        for judgement in group.judgements:
            assert all(f"Response {i}:" in judgement["prompt"] for i in (1, 2, 3, 4))


@pytest.mark.slow
def test_sft_lowers_its_loss_and_its_checkpoint_loads(trained):
    log = lines(trained / "sft" / "log.jsonl")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and log[-1]["updates"] == 2
    assert (trained / "sft" / "checkpoints" / "last" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("head, found", [("LlamaForSequenceClassification", "Classification"), (None, "no folder")])
def test_a_judge_with_another_head_or_none_at_all_is_refused(head, found, tiny_model, process_group, monkeypatch):
    monkeypatch.setattr(baselines.policy, "model_config", lambda folder: SimpleNamespace(architectures=[head]))
    with pytest.raises(InputError, match=f"--judge .*{found}.*ForCausalLM"):
        baselines.rm_gen(Baseline(judge=tiny_model if head else "runs/mistyped"))
