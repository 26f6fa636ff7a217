"""urpo.py: the seven parts one by one, the whole update against a rebuild in float64, and every guard of the loop.

Packed rows and the policy are in test_rows.py, the log and checkpoints in test_runs.py and test_resume.py.
"""
import copy
import json
import math
import re
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import data
import urpo
from conftest import VOCABULARY, plain_logprobs, random_groups, sampled_by
from data import Group, Prompt
from infra.policy import full_weights
from infra.ranks import InputError
from infra.sampler import Sample
from infra.settings import parse
from rewards import group_advantages, kind_figures
from tiny_run import run_program
from urpo import Config

pytestmark = pytest.mark.usefixtures("process_group")


def tiny_config(**changes) -> Config:
    return Config(**{"row_tokens": 64, "precision": "float32", "group": 3, "minibatches": 1, "batch": 6,
                     "temperature": 0.7, "lr": 1e-3, "lr_warmup": 0} | changes)


# ---- 2. rollout, 3. self_score, 4. reward ----

class FakeSampler:
    """In place of vLLM under `generate`: keeps what it was asked, answers with given texts."""

    def __init__(self, monkeypatch, tokenizer, texts):
        self.calls, self.tokenizer, self.texts = [], tokenizer, texts
        monkeypatch.setattr(urpo, "generate", self.generate)

    def generate(self, sampler, prompts, *, n, max_tokens, seeds, temperature):
        assert sampler is self and len(prompts) == len(max_tokens) == len(seeds)
        self.calls.append(SimpleNamespace(prompts=prompts, n=n, max_tokens=max_tokens, seeds=seeds, at=temperature))
        return [[self.sample(text) for text in self.texts[:n]] for _ in prompts]

    def sample(self, text):
        ids = self.tokenizer.encode(text)
        return Sample(ids, text, finished=text != "cut", logprobs=[-1.0 - i / 1e6 for i in ids])


SHARE = [(4, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0))), (5, Prompt("reasoning", "1 + 1?", answer="2")),
         (6, Prompt("instruction", "Say hi."))]


def test_rollout_keeps_ids_texts_and_logprobs_of_every_sample(monkeypatch, smol_tokenizer):
    sampler = FakeSampler(monkeypatch, smol_tokenizer, ["one", "two 2", "cut"])
    config = tiny_config(max_answer_tokens=11, max_referee_tokens=7)
    groups = urpo.rollout(config, sampler, smol_tokenizer, SHARE, step=9)
    (call,) = sampler.calls
    assert call.n == 3 and call.max_tokens == [7, 11, 11] and call.at == 0.7
    assert call.seeds == [data.request_seed(0, 9, index, "answer") for index in (4, 5, 6)]
    for group, (index, prompt), ids in zip(groups, SHARE, call.prompts, strict=True):
        assert (group.index, group.prompt, group.prompt_ids) == (index, prompt, ids)
        assert group.texts == ["one", "two 2", "cut"] and group.finished == [True, True, False]
        expected = [[-1.0 - i / 1e6 for i in answer] for answer in group.answers]
        assert group.sampler_logprobs == expected
        logprobs = sum(expected, [])
        assert group.entropy == pytest.approx(-sum(logprobs) / len(logprobs))


def judged_group(monkeypatch, tokenizer, verdicts, texts=("one", "two", "three"), **changes):
    """(a group that was judged in these words, the judges' prompts as token ids, their seeds)."""
    config = tiny_config(**{"judgements": len(verdicts)} | changes)
    group = Group(6, SHARE[2][1], [1], [[1], [2], [3]], texts=list(texts), finished=[True] * 3)
    sampler = FakeSampler(monkeypatch, tokenizer, verdicts[:1])
    urpo.self_score(config, sampler, tokenizer, [group], step=0)
    for judgement, verdict in zip(group.judgements, verdicts, strict=True):
        judgement["text"] = judgement["text"] and verdict
    (group,) = urpo.reward(config, [group])
    return group, sampler.calls[0].prompts, sampler.calls[0].seeds


@pytest.mark.parametrize("told, changes", [
    ([(9, 5, 1)], {}), ([(9, 5, 1), (), (8, 8, 2), (9, 5, 1), (), (8, 8, 2)], {}),
    ([(9, 1), (7, 3), ()], {"judgements": 2, "judge_list": 2}),
], ids=["one", "six, two of which cannot be read", "pairs"])
def test_self_scores_follow_their_answers_through_the_shuffle_and_the_readable_ones_count(
        monkeypatch, smol_tokenizer, told, changes):
    verdicts = [f"<scores>{', '.join(map(str, scores))}</scores>" for scores in told]
    group, prompts, seeds = judged_group(monkeypatch, smol_tokenizer, verdicts, **changes)
    assert len(prompts) == len(told) == len(set(seeds))
    found = {}
    for judgement, scores, ids in zip(group.judgements, told, prompts):
        shown = re.findall(r"Response \d:\n> (\w+)", judgement["prompt"])
        assert shown == [group.texts[answer] for answer in judgement["order"]]
        assert smol_tokenizer.decode(ids) == judgement["prompt"]
        for answer, score in zip(judgement["order"], scores):
            found.setdefault(answer, []).append(score)
    assert group.rewards == pytest.approx([sum(found[i]) / len(found[i]) for i in range(3)])
    assert group.advantages == group_advantages(torch.tensor(group.rewards)).tolist()
    assert len({tuple(judgement["order"]) for judgement in group.judgements}) == len(told)


@pytest.mark.parametrize("room", [4000, 400])
def test_an_unreadable_judgement_and_one_too_long_to_be_asked_give_no_reward_and_count(
        monkeypatch, smol_tokenizer, room):
    long = ("one", "two " * 300, "three " * 300)
    group, prompts, _ = judged_group(monkeypatch, smol_tokenizer, ["all are fine"], long, max_judge_tokens=room)
    assert group.rewards is None and group.advantages == [0.0] * 3
    assert len(prompts) == (room == 4000) == bool(group.judgements[0]["text"])
    figures = kind_figures([group])
    assert figures["unjudged"] == 1 and figures["reward"] is None and figures["format"] == 0


def test_rewards_of_all_kinds_and_that_their_advantages_have_one_scale():
    """The best answer of two against the worst one: the same advantage on P, R and I. A cut ranking earns -1."""
    judgement = {"order": [0, 1], "text": "<scores>10, 1</scores>", "finished": True}
    ranking = "<scores>8, 6</scores>"
    groups = [Group(0, SHARE[0][1], [1], [[1]] * 2, texts=[ranking] * 2, finished=[True, False]),
              Group(1, SHARE[1][1], [1], [[1]] * 2, texts=["\\boxed{2}", "3"], finished=[True] * 2),
              Group(2, SHARE[2][1], [1], [[1]] * 2, texts=["hi", ""], finished=[True] * 2, judgements=[judgement])]
    groups = urpo.reward(tiny_config(group=2), groups)
    assert [group.rewards for group in groups] == [[1, -1], [1, 0], [10, 1]]
    for group in groups:
        assert group.advantages == pytest.approx([0.5**0.5, -0.5**0.5], abs=1e-5)


# ---- 4. minibatches, 5. old_logprobs, 6. update: all of it once more, in float64 ----

def sampled_groups(plain_model, config, count=6, off=0.0) -> list[Group]:
    """Random groups, every third without a signal; the sampler's log-probs are `off` nats off, up and down."""
    groups, generator = random_groups(count), torch.Generator().manual_seed(0)
    sampled_by(plain_model, groups, config.temperature)
    for group in groups:
        for part in group.sampler_logprobs:
            part[:] = [value + off * math.sin(3 * i) for i, value in enumerate(part)]
        group.advantages = torch.randn(3, generator=generator).tolist() if group.index % 3 != 1 else [0.0] * 3
    return groups


def trainer(make_policy, optimizer=torch.optim.SGD):
    policy = make_policy()
    return policy, optimizer(policy.parameters(), lr=1.0)


def update(config, policy, optimizer, groups, clip=1e9) -> dict:
    """Parts 4 to 6, as train() calls them, with another largest norm of the gradient."""
    minibatches = urpo.build_minibatches(config, groups)
    urpo.old_logprobs(config, policy, minibatches)
    with patch.object(urpo, "GRAD_CLIP", clip):
        return urpo.update(config, policy, optimizer, minibatches)


def rebuild(model, config, groups, clip) -> dict:
    """The update by the paper's formula, sequence by sequence, by plain descent; its figures. `model` moves."""
    start, size, found, tokens = copy.deepcopy(model), len(groups) // config.minibatches, Counter(), 0
    for first in range(0, len(groups), size):
        part, loss = groups[first : first + size], 0.0
        lengths = [len(answer) for group in part for answer in group.answers]
        for group in part:
            tokens += sum(map(len, group.answers)) * any(group.advantages)
            for answer, advantage, sampled in zip(group.answers, group.advantages, group.sampler_logprobs):
                old_N = plain_logprobs(start, group.prompt_ids, answer, config.temperature).detach()
                now_N = plain_logprobs(model, group.prompt_ids, answer, config.temperature)
                ratio_N = torch.exp(now_N - old_N)
                gain_N = torch.minimum(ratio_N * advantage, ratio_N.clamp(0.8, 1.28) * advantage)
                if config.importance_cap:
                    gain_N = gain_N * torch.exp(old_N - torch.tensor(sampled)).clamp(max=config.importance_cap)
                loss -= gain_N.sum() / sum(lengths)
                found["clipped_low"] += int(((ratio_N < 0.8) * (advantage < 0)).sum())
                found["clipped_high"] += int(((ratio_N > 1.28) * (advantage > 0)).sum())
        model.zero_grad()
        loss.backward()
        found["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        found["loss"] += loss.item()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= config.lr * weight.grad
    means = {name: value / (tokens if "clipped" in name else config.minibatches) for name, value in found.items()}
    return means | {"updates": config.minibatches, "skipped_updates": 0, "nonfinite_updates": 0}


@pytest.mark.parametrize("changes, clip", [
    ({}, 1e9), ({"minibatches": 2}, 1e9), ({"minibatches": 3}, 1e9),
    ({"minibatches": 2, "row_tokens": 4096}, 1e9), ({"minibatches": 2, "importance_cap": 1.1}, 1e9),
    ({"minibatches": 2, "row_tokens": 1}, 0.05)], ids=str)
def test_an_update_equals_its_rebuild_in_float64(make_policy, plain_model, monkeypatch, changes, clip):
    """At a rate so high that the second minibatch meets the clip; every weight and every figure."""
    monkeypatch.setattr(urpo, "largest_drift", lambda precision: 9.0)
    config = tiny_config(lr=3.0 if clip > 1 else 60.0, **changes)
    groups = sampled_groups(plain_model, config, off=0.3)
    policy, optimizer = trainer(make_policy)
    before = {name: weight.double() for name, weight in full_weights(policy)}
    found = update(config, policy, optimizer, groups, clip)
    model = plain_model.double()
    expected = rebuild(model, config, groups, clip)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=1e-7)
    if config.minibatches > 1:
        assert expected["clipped_low"] > 0 and expected["clipped_high"] > 0, "the clip must bite in this test"
    own, moved = dict(model.named_parameters()), 0
    for name, weight in full_weights(policy):
        step = own[name].detach() - before[name]
        assert (weight.double() - own[name]).norm() <= 1e-3 * step.norm() + 1e-9, name
        moved += bool(step.norm() > 1e-3)
    assert moved > 10


# ---- 6. the guards of an update ----

def test_drift_is_the_mean_distance_a_token_and_unknown_without_a_signal(make_policy, plain_model):
    config, groups = tiny_config(), sampled_groups(plain_model, tiny_config())
    for group in groups:
        group.sampler_logprobs = [[value + 5e-4 for value in part] for part in group.sampler_logprobs]
    policy, optimizer = trainer(make_policy)
    found = update(config, policy, optimizer, groups)
    assert found["drift_mean"] == pytest.approx(5e-4, rel=0.05) and found["drift_max"] == pytest.approx(5e-4, rel=0.2)
    for group in groups:
        group.advantages = [0.0] * 3
    found = update(config, policy, optimizer, groups)
    assert found["drift_mean"] is found["drift_max"] is None
    assert (found["updates"], found["skipped_updates"], found["loss"], found["grad_norm"]) == (0, 1, None, None)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("sampler", ["stale", "not a number"])
def test_a_sampler_with_other_weights_stops_the_run_before_any_weight_moves(
        make_policy, plain_model, minibatches, sampler):
    config = tiny_config(minibatches=minibatches)
    groups, (policy, optimizer) = sampled_groups(plain_model, config), trainer(make_policy)
    if sampler == "stale":
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.05)
    else:
        groups[0].sampler_logprobs[0][0] = math.nan
    before = {name: weight.clone() for name, weight in full_weights(policy)}
    with pytest.raises(FloatingPointError, match="drift: .* float32"):
        update(config, policy, optimizer, groups)
    assert all(torch.equal(weight, before[name]) for name, weight in full_weights(policy))


@pytest.mark.parametrize("broken", ["weights", "overflow"])
def test_an_update_that_is_not_finite_is_skipped_and_counted_and_the_next_is_made(
        make_policy, plain_model, monkeypatch, broken):
    config = tiny_config(minibatches=2, row_tokens=1)
    groups, (policy, optimizer) = sampled_groups(plain_model, config), trainer(make_policy)
    if broken == "weights":  # of one token id, which one group of the first minibatch alone holds
        groups[0].prompt_ids[0] = VOCABULARY
        with torch.no_grad():
            policy.lm.model.embed_tokens.weight.to_local()[VOCABULARY] = math.nan
    else:
        clip, calls = urpo.clip_gradient, []
        monkeypatch.setattr(urpo, "clip_gradient", lambda *given: calls.append(1) or (
            math.inf if len(calls) == 1 else clip(*given)))
    before = {name: weight.clone() for name, weight in full_weights(policy)}
    found = update(config, policy, optimizer, groups)
    assert (found["updates"], found["skipped_updates"], found["nonfinite_updates"]) == (1, 1, 1)
    assert all(math.isfinite(value) for value in found.values()) and found["drift_max"] < 1e-4
    assert all(weight.grad is None for weight in policy.parameters()), "nothing is carried into the next update"
    moved = dict(full_weights(policy))
    assert all(moved[name].isfinite().all() for name in moved if "embed" not in name)
    assert not torch.equal(moved["model.norm.weight"], before["model.norm.weight"])


def test_the_rate_follows_the_number_of_updates_that_were_made(make_policy, plain_model, monkeypatch):
    monkeypatch.setattr(urpo, "largest_drift", lambda precision: 9.0)
    config = tiny_config(minibatches=2, lr_warmup=3)
    groups, (policy, optimizer) = sampled_groups(plain_model, config), trainer(make_policy, torch.optim.AdamW)
    used, logged, step = [], [], optimizer.step
    optimizer.step = lambda: (used.append(optimizer.param_groups[0]["lr"]), step())
    for skipped in (False, True, False):
        if skipped:  # its first update, which then has no number
            groups[0].advantages = groups[2].advantages = [0.0] * 3
        logged.append(update(config, policy, optimizer, groups)["lr"])
    assert used == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert logged == pytest.approx([1e-3 / 3, 1e-3, 1e-3]) and urpo.updates_done(optimizer) == 4


TWO_RANKS = """
import json, math, torch, urpo
from conftest import VOCABULARY, random_groups
from infra import policy as policies, ranks
from test_urpo import tiny_config, update
ranks.start_ranks()
rank = torch.distributed.get_rank()
policy = policies.load_policy({model!r}, vocabulary=VOCABULARY, precision="float32")
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
urpo.largest_drift = lambda precision: 99.0
groups = random_groups(8, seed=rank)  # two of each of four minibatches
for group in groups:
    group.advantages = [1.0, 0.0, -1.0]
for group in groups[4:6] + groups[6:] * rank:  # the third has no signal on any rank, the fourth on rank 0 alone
    group.advantages = [0.0] * 3
groups[2].advantages[1] = math.nan if rank else 0.0  # of the second minibatch
found = update(tiny_config(minibatches=4, batch=16), policy, optimizer, groups)
found["finite"] = all(bool(weight.isfinite().all()) for _, weight in policies.full_weights(policy))
found["done"] = urpo.updates_done(optimizer)
for line in ranks.exchange(json.dumps(found)) * (rank == 0):
    print("found", line, flush=True)
"""


@pytest.mark.slow
def test_an_update_that_one_rank_cannot_make_is_skipped_by_all(tiny_model, tmp_path):
    output = run_program(tmp_path, TWO_RANKS.format(model=tiny_model), ranks=2)
    one, other = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("found ")]
    assert one == other and one["finite"] and one["done"] == 2
    assert (one["updates"], one["skipped_updates"], one["nonfinite_updates"]) == (2, 2, 1)


# ---- Config ----

def test_flags_win_over_a_preset_that_wins_over_the_papers_defaults_and_each_preset_passes_its_check():
    config = parse(Config, urpo.PRESETS, "--preset smol --batch 48 --preferences a.jsonl b/c --resume".split(), "")
    assert (config.batch, config.clip_high) == (48, 1.28) and config.model.endswith("toy/model")
    assert config.warmup_steps == urpo.PRESETS["smol"]["warmup_steps"]
    assert config.preferences == ["a.jsonl", "b/c"] and config.resume is True
    paper = parse(Config, urpo.PRESETS, ["--preset", "paper"], "")
    assert (paper.model, paper.warmup_steps, paper.mix, paper.clip_low) == ("Qwen/Qwen2.5-7B", 100, "1:1:1", 0.8)
    assert data.longest_sequence(paper) <= 32768  # max_position_embeddings of Qwen2.5-7B
    for preset in (config, paper):
        urpo.check(preset, world=2)
    with pytest.raises(InputError, match="--batch 48 does not split over 32 ranks.* use --batch 192, or 8 ranks"):
        urpo.check(config, world=32)


@pytest.mark.parametrize("batch, mix, world", [(48, "2:1:1", 32), (24, "2:1:1", 5), (20, "2:1:1", 2), (30, "2:1:1", 2),
                                               (9, "1:1:1", 1), (24, "3:1:1", 1), (100, "1:1:1", 8)])
def test_the_batch_that_an_error_proposes_is_one(batch, mix, world):
    config = Config(**urpo.PRESETS["smol"] | {"batch": batch, "mix": mix})
    with pytest.raises(InputError, match=f"--batch {batch} ") as error:
        urpo.check(config, world)
    config.batch = int(re.search(r"use --batch (\d+)", str(error.value))[1])
    urpo.check(config, world)
