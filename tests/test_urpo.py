"""urpo.py: the seven parts one by one, the loss against plain formulas, and every guard of the loop.

Packed rows and the policy are in test_machine.py, the log and the trajectories in test_runs.py.
"""
import doctest
import inspect
import math
import re
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import data
import flags
import machine
import runs
import urpo
from conftest import VOCABULARY, assert_same_gradients, gradients, keep_old_logprobs, plain_logprobs, random_groups
from data import Group, Prompt
from report import explain
from rewards import clipped_objective, group_advantages
from urpo import Config

pytestmark = pytest.mark.usefixtures("process_group")


def tiny_config(**changes) -> Config:
    return Config(**{"row_tokens": 64, "logit_chunk": 1024, "recompute": False, "precision": "float32",
                     "grad_clip": 1e9, "group": 3, "minibatches": 1, "batch": 4, "temperature": 0.7,
                     "max_drift": 1e-3} | changes)


def test_worked_examples_in_docstrings():
    assert doctest.testmod(urpo).failed == 0


# ---- 2. rollout, 3. self_score, 4. reward ----

class FakeEngine:
    """In place of vLLM under `machine.generate`: keeps what it was asked, answers with given texts."""

    def __init__(self, monkeypatch, tokenizer, texts):
        self.calls, self.tokenizer, self.texts = [], tokenizer, texts
        monkeypatch.setattr(machine, "generate", self.generate)

    def generate(self, engine, prompts, n, max_tokens, seeds, temperature):
        assert engine is self and len(prompts) == len(max_tokens) == len(seeds)
        self.calls.append(SimpleNamespace(prompts=prompts, n=n, max_tokens=max_tokens, seeds=seeds))
        return [[self.sample(text) for text in self.texts[:n]] for _ in prompts]

    def sample(self, text):
        ids = self.tokenizer.encode(text)
        return machine.Sample(ids, text, finished=text != "cut", logprobs=[-1.0 - i / 1e6 for i in ids])


SHARE = [(4, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0))), (5, Prompt("reasoning", "1 + 1?", answer="2")),
         (6, Prompt("instruction", "Say hi."))]


def test_rollout_keeps_ids_texts_and_logprobs_of_every_sample(monkeypatch, smol_tokenizer):
    engine = FakeEngine(monkeypatch, smol_tokenizer, ["one", "two 2", "cut"])
    config = tiny_config(max_answer_tokens=11, max_referee_tokens=7)
    groups = urpo.rollout(config, engine, smol_tokenizer, SHARE, step=9)
    (call,) = engine.calls
    assert call.n == 3 and call.max_tokens == [7, 11, 11]
    assert call.seeds == [data.request_seed(0, 9, index, "answer") for index in (4, 5, 6)]
    for group, (index, prompt), ids in zip(groups, SHARE, call.prompts, strict=True):
        assert (group.index, group.prompt, group.prompt_ids) == (index, prompt, ids)
        assert group.texts == ["one", "two 2", "cut"] and group.finished == [True, True, False]
        assert [list(map(len, part)) for part in (group.answers, group.sampler_logprobs)] == [
            list(map(len, group.answers))] * 2
        assert group.sampler_logprobs[0][0] == -1.0 - group.answers[0][0] / 1e6
        logprobs = [logprob for answer in group.sampler_logprobs for logprob in answer]
        assert group.entropy == pytest.approx(-sum(logprobs) / len(logprobs))


def judged_groups(monkeypatch, tokenizer, verdicts, **changes):
    config = tiny_config(**{"judgements": len(verdicts)} | changes)
    group = Group(6, SHARE[2][1], [1], [[1], [2], [3]], texts=["one", "two", "three"], finished=[True] * 3)
    engine = FakeEngine(monkeypatch, tokenizer, verdicts[:1])
    urpo.self_score(config, engine, tokenizer, [group], step=0)
    for judgement, verdict in zip(group.judgements, verdicts, strict=True):
        judgement["text"] = verdict
    urpo.reward(config, [group])
    return group, engine


def test_a_self_score_follows_its_answer_through_the_shuffle(monkeypatch, smol_tokenizer):
    group, engine = judged_groups(monkeypatch, smol_tokenizer, ["<scores>9, 5, 1</scores>"])
    (judgement,) = group.judgements
    assert sorted(judgement["order"]) == [0, 1, 2]
    assert [group.rewards[answer] for answer in judgement["order"]] == [9, 5, 1]
    shown = judgement["prompt"]
    assert [re.search(rf"Response {j}:\n> (\w+)", shown)[1] for j in (1, 2, 3)] == [
        group.texts[answer] for answer in judgement["order"]]
    assert group.advantages == group_advantages(torch.tensor(group.rewards)).tolist()


def test_a_judgement_over_cut_answers_is_counted(monkeypatch, smol_tokenizer):
    whole, _ = judged_groups(monkeypatch, smol_tokenizer, ["<scores>9, 5, 1</scores>"])
    long = Group(7, SHARE[2][1], [1], [[1], [2], [3]], texts=["one", "two " * 300, "three " * 300],
                 finished=[True] * 3, advantages=[0.0] * 3)
    engine = FakeEngine(monkeypatch, smol_tokenizer, ["<scores>9, 5, 1</scores>"])
    urpo.self_score(tiny_config(max_judge_tokens=400), engine, smol_tokenizer, [long], step=0)
    assert len(engine.calls[0].prompts[0]) <= 400 and long.judgements[0]["prompt"].count("[cut]") == 2
    assert [group.judgements[0]["cut"] for group in (whole, long)] == [0, 2]
    assert runs.figures_of_kind([whole, long])["cut"] == 0.5


def test_judgements_are_seeded_and_shuffled_apart_and_the_readable_ones_averaged(monkeypatch, smol_tokenizer):
    verdicts = ["<scores>9, 5, 1</scores>", "cannot say", "<scores>8, 8, 2</scores>"] * 2
    group, engine = judged_groups(monkeypatch, smol_tokenizer, verdicts)
    assert len(set(engine.calls[0].seeds)) == 6 and len({tuple(j["order"]) for j in group.judgements}) > 1
    expected = [0.0] * 3
    for judgement, scores in zip(group.judgements, [(9, 5, 1), None, (8, 8, 2)] * 2):
        for answer, score in zip(judgement["order"], scores or ()):
            expected[answer] += score / 4
    assert group.rewards == pytest.approx(expected)


def test_an_unreadable_judgement_gives_no_reward_and_no_advantage_and_is_counted(monkeypatch, smol_tokenizer):
    group, _ = judged_groups(monkeypatch, smol_tokenizer, ["all are fine"])
    assert group.rewards is None and group.advantages == [0.0] * 3
    figures = runs.figures_of_kind([group])
    assert figures["unjudged"] == 1 and figures["reward"] is None and figures["format"] == 0


def test_judging_in_pairs_shows_each_judgement_its_answers_alone(monkeypatch, smol_tokenizer):
    verdicts = ["<scores>9, 1</scores>", "<scores>7, 3</scores>", "cannot say"]
    group, engine = judged_groups(monkeypatch, smol_tokenizer, verdicts, judgements=2, judge_list=2)
    assert len(engine.calls[0].prompts) == 3 == len(set(engine.calls[0].seeds))
    scores = {}
    for judgement, told in zip(group.judgements, [(9, 1), (7, 3), ()]):
        shown = re.findall(r"Response \d:\n> (\w+)", judgement["prompt"])
        assert shown == [group.texts[answer] for answer in judgement["order"]] and len(shown) == 2
        for answer, score in zip(judgement["order"], told):
            scores.setdefault(answer, []).append(score)
    assert group.rewards == [sum(scores[answer]) / len(scores[answer]) for answer in range(3)]


def test_an_audit_judges_right_beside_wrong_answers_and_changes_no_reward(monkeypatch, smol_tokenizer):
    question = SHARE[1][1]
    mixed = Group(0, question, [1], [[1]] * 3, texts=["so 2", "so 3", "it is 4"], finished=[True] * 3)
    solved = Group(1, question, [1], [[1]] * 3, texts=["so 2"] * 3, finished=[True] * 3)
    engine = FakeEngine(monkeypatch, smol_tokenizer, ["<scores>9, 5, 1</scores>"])
    config = tiny_config(judgements=1, audit_judge=2)
    urpo.self_score(config, engine, smol_tokenizer, [mixed, solved], step=1)
    assert not mixed.judgements  # not this step's turn
    urpo.self_score(config, engine, smol_tokenizer, [mixed, solved], step=2)
    urpo.reward(config, [mixed, solved])
    assert len(mixed.judgements) == 1 and not solved.judgements
    assert mixed.rewards == [1, 0, 0] and solved.rewards == [1, 1, 1]
    place = mixed.judgements[0]["order"].index(0)  # of the right answer: scores fall from 9 to 1
    assert runs.figures_of_kind([mixed, solved])["judge_tau"] == {0: 1, 1: 0, 2: -1}[place]
    assert runs.figures_of_kind([solved])["judge_tau"] is None


def test_rewards_of_preference_and_reasoning():
    ranked = Group(0, SHARE[0][1], [1], [[1]] * 3, texts=["<scores>8, 6</scores>", "<scores>6, 8</scores>", "first"])
    solved = Group(1, SHARE[1][1], [1], [[1]] * 3, texts=["\\boxed{2}", "so 3", "it is 2"])
    urpo.reward(tiny_config(advantage="center"), [ranked, solved])
    assert ranked.rewards == [1, -1, -1]
    assert solved.rewards == [1, 0, 1]
    assert ranked.advantages == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_centred_advantages_of_all_kinds_have_one_scale_so_that_no_judge_raises_its_own_gradient():
    """The best answer of two against the worst one: the same advantage on P, R and I."""
    judgement = {"order": [0, 1], "prompt": "p", "text": "<scores>10, 1</scores>"}
    groups = [Group(0, SHARE[0][1], [1], [[1]] * 2, texts=["<scores>8, 6</scores>", "first"]),
              Group(1, SHARE[1][1], [1], [[1]] * 2, texts=["\\boxed{2}", "3"]),
              Group(2, Prompt("instruction", "Say hi."), [1], [[1]] * 2, texts=["hi", ""], judgements=[judgement])]
    urpo.reward(tiny_config(advantage="center"), groups)
    assert [group.advantages for group in groups] == [[0.5, -0.5]] * 3


def test_advantages_by_the_std_of_all_rewards_of_a_kind_in_the_batch(process_group):
    """Of the four rewards 1, 0, 1, 1 of R the unbiased std is .5. A group of P does not count for it."""
    groups = [Group(0, SHARE[1][1], [1], [[1]] * 2, texts=["\\boxed{2}", "3"]),
              Group(1, SHARE[1][1], [1], [[1]] * 2, texts=["2", "2"]),
              Group(2, SHARE[0][1], [1], [[1]] * 2, texts=["<scores>8, 6</scores>", "first"])]
    urpo.reward(tiny_config(advantage="batch"), groups)
    assert groups[0].advantages == pytest.approx([1, -1], abs=1e-4) and groups[1].advantages == [0, 0]
    assert groups[2].advantages == pytest.approx([0.7071, -0.7071], abs=1e-4)
    spreads = explain.batch_spreads(groups, "b")
    for group in groups:
        derived, wrong = explain.derive(0, group, {"tau": "b", "advantage": "batch"}, spreads)
        assert derived.advantages == group.advantages and not wrong


# ---- 5. old_logprobs, and the drift that part 6 checks ----

def policy_of(make_policy, config):
    return make_policy(config.temperature, config.logit_chunk, config.recompute)


def measured_drift(config, policy, groups):
    keep_old_logprobs(policy, groups, config.row_tokens)
    return urpo.check_drift(groups, config.max_drift)


def in_step_with_sampler(make_policy, groups, shift=0.0, **changes):
    """A policy, and groups with a signal whose sampler differs from it by `shift` nats a token."""
    config = tiny_config(**changes)
    policy = policy_of(make_policy, config)
    with torch.no_grad():
        for group in groups:
            logprob_N = policy(machine.build_row([group]))
            parts = (logprob_N + shift).split([len(answer) for answer in group.answers])
            group.sampler_logprobs = [part.tolist() for part in parts]
            group.advantages = group.advantages or [1.0] * len(group.answers)
    return config, policy


def test_old_logprobs_are_those_of_each_group_of_the_later_minibatches(make_policy, plain_model):
    groups = random_groups(6)
    config, policy = in_step_with_sampler(make_policy, groups, minibatches=3)
    groups[3].advantages = [0.0] * 3
    urpo.old_logprobs(config, policy, groups)
    assert [group.old_N is None for group in groups] == [True, True, False, True, False, False]
    for group in groups:
        if group.old_N is not None:
            parts = []
            for answer in group.answers:
                parts.append(plain_logprobs(plain_model, group.prompt_ids, answer, config.temperature))
            torch.testing.assert_close(group.old_N, torch.cat(parts), rtol=1e-5, atol=1e-5)
            assert not group.old_N.requires_grad


def test_drift_is_the_distance_between_the_old_logprobs_and_the_samplers(make_policy):
    groups = random_groups(5)
    config, policy = in_step_with_sampler(make_policy, groups, shift=5e-4)
    drift = measured_drift(config, policy, groups)
    assert drift["drift_mean"] == pytest.approx(5e-4, rel=0.05) and drift["drift_max"] == pytest.approx(5e-4, rel=0.2)


def test_groups_without_signal_get_no_old_logprobs_and_a_step_of_them_alone_measures_no_drift(make_policy):
    groups = random_groups(3)
    config, policy = in_step_with_sampler(make_policy, groups)
    groups[1].advantages = [0.0] * 3
    assert measured_drift(config, policy, groups)["drift_mean"] < 1e-5
    assert [group.old_N is None for group in groups] == [False, True, False]
    assert measured_drift(config, policy, groups[1:2]) == {"drift_mean": None, "drift_max": None}


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_stale_sampler_stops_the_run_before_any_weight_moves(make_policy, minibatches):
    groups = random_groups(6)
    config, policy = in_step_with_sampler(make_policy, groups, minibatches=minibatches)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.05)
    optimizer = RecordingOptimizer(policy)
    urpo.old_logprobs(config, policy, groups)
    with pytest.raises(FloatingPointError, match="above --max_drift 0.001: the sampler does not hold the trainer's"):
        urpo.update(config, policy, optimizer, SCHEDULE, groups)
    assert optimizer.steps == []


@pytest.mark.parametrize("times, weight", [(2, 0.5), (1 / 1.5, 1.5), (1 / 3, 2.0), (1, 1.0)])
def test_importance_correction_weighs_by_trainer_over_sampler_and_at_most_by_its_cap(make_policy, times, weight):
    """The sampler took tokens `times` as often as the trainer would have: each counts 1 / times, at most 2."""
    gradients_of = []
    for cap in (0.0, 2.0):
        groups = random_groups(3)
        config, policy = in_step_with_sampler(make_policy, groups, shift=math.log(times), importance_cap=cap,
                                              max_drift=9.0)
        optimizer = RecordingOptimizer(policy)
        urpo.update(config, policy, optimizer, SCHEDULE, groups)
        gradients_of.append(optimizer.steps[0])
    plain, corrected = gradients_of
    assert_same_gradients(corrected, {name: weight * gradient for name, gradient in plain.items()}, 1e-4)


def test_drift_that_is_not_a_number_stops_the_run(make_policy):
    groups = random_groups(2)
    config, policy = in_step_with_sampler(make_policy, groups, shift=math.nan)
    with pytest.raises(FloatingPointError, match="drift"):
        measured_drift(config, policy, groups)


@pytest.mark.parametrize("changes", [{"minibatches": 1}, {"minibatches": 2}, {"minibatches": 2, "importance_cap": 1.1}],
                         ids=str)
def test_the_first_minibatch_needs_no_old_logprobs_of_its_own(make_policy, changes):
    """Gradients and figures are those of a step whose part 5 computed all of them, and the drift is of all groups."""
    results = []
    for all_of_them in (True, False):
        groups = random_groups(6)
        config, policy = in_step_with_sampler(make_policy, groups, shift=5e-4, **changes)
        for group in groups:
            group.advantages = [1.0, -0.5, 0.0] if group.index % 3 else [0.0] * 3
        optimizer = RecordingOptimizer(policy)
        if all_of_them:
            keep_old_logprobs(policy, groups, config.row_tokens)
        else:
            urpo.old_logprobs(config, policy, groups)
        figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
        results.append((figures, optimizer.steps, [group.old_N for group in groups]))
    (expected, plain, old), (found, steps, own) = results
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6) and found["drift_mean"] == pytest.approx(5e-4, rel=0.05)
    for gradient, other in zip(steps, plain, strict=True):
        assert_same_gradients(gradient, other)
    for one, other in zip(own, old):
        assert one is other is None or torch.allclose(one, other, rtol=1e-5, atol=1e-5)


# ---- 6. update ----

class RecordingOptimizer:
    """Keeps each minibatch's gradient and leaves the weights as they are."""

    def __init__(self, policy):
        self.policy, self.steps, self.param_groups = policy, [], [{"lr": 0.0}]

    def step(self):
        self.steps.append(gradients(self.policy, "lm."))

    def zero_grad(self):
        self.policy.zero_grad()


SCHEDULE = SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0])


def scored_groups(make_policy, count=6, seed=0, **changes):
    """Groups with random advantages, and old log-probs so far off that ratios lie on both sides of the clip range."""
    groups, generator = random_groups(count, seed), torch.Generator().manual_seed(seed)
    config, policy = in_step_with_sampler(make_policy, groups, shift=0.3, **{"max_drift": 9.0} | changes)
    for group in groups:
        logprob_N = torch.cat([torch.tensor(part) for part in group.sampler_logprobs]) - 0.3
        group.old_N = logprob_N + 0.5 * torch.randn(len(logprob_N), generator=generator)
        group.advantages = torch.randn(len(group.answers), generator=generator).tolist()
        if group.index % 3 == 1:
            group.advantages = [0.0] * len(group.answers)
    return config, policy, groups


def plain_loss(model, config, groups):
    """The loss of one minibatch, written out sequence by sequence; also the number of clipped tokens on each side."""
    tokens = sum(len(answer) for group in groups for answer in group.answers)
    answers = sum(len(group.answers) for group in groups)
    loss, low, high = torch.zeros(()), 0, 0
    for group in groups:
        old = group.old_N.split([len(answer) for answer in group.answers])
        for answer, advantage, old_N, sampler_N in zip(group.answers, group.advantages, old, group.sampler_logprobs):
            logprob_N = plain_logprobs(model, group.prompt_ids, answer, config.temperature)
            ratio_N = torch.exp(logprob_N - old_N)
            gain_N = torch.minimum(ratio_N * advantage, ratio_N.clamp(0.8, 1.28) * advantage)
            if config.importance_cap:
                gain_N = gain_N * torch.exp(old_N - torch.tensor(sampler_N)).clamp(max=config.importance_cap)
            loss = loss - (gain_N.sum() / tokens if config.loss == "token-mean" else gain_N.mean() / answers)
            low += int(((ratio_N < 0.8) * (advantage < 0)).sum())
            high += int(((ratio_N > 1.28) * (advantage > 0)).sum())
    return loss, low, high


@pytest.mark.parametrize("changes", [
    {}, {"loss": "sequence-mean"}, {"minibatches": 2}, {"minibatches": 3, "loss": "sequence-mean"},
    {"importance_cap": 1.1}, {"row_tokens": 4096}, {"recompute": True, "logit_chunk": 5, "minibatches": 2},
], ids=str)
def test_the_loss_and_its_gradient_equal_the_plain_formula(make_policy, plain_model, changes):
    config, policy, groups = scored_groups(make_policy, **changes)
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
    losses, low, high, size = [], 0, 0, len(groups) // config.minibatches
    for m in range(config.minibatches):
        plain_model.zero_grad()
        loss, clipped_low, clipped_high = plain_loss(plain_model, config, groups[m * size : (m + 1) * size])
        loss.backward()
        assert_same_gradients(optimizer.steps[m], gradients(plain_model), tolerance=2e-5)
        losses, low, high = [*losses, loss.item()], low + clipped_low, high + clipped_high
    assert len(optimizer.steps) == config.minibatches == figures["updates"] and figures["skipped_updates"] == 0
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-6)
    active = sum(group.answer_tokens for group in groups if any(group.advantages))
    assert low and high, "the clip must bite in this test"
    assert (figures["clipped_low"], figures["clipped_high"]) == pytest.approx((low / active, high / active))


def test_at_rollout_weights_the_gradient_is_that_of_log_probs_weighted_by_their_advantage(make_policy, plain_model):
    """The policy gradient itself: where the ratio is 1 nothing is clipped."""
    groups = random_groups(3)
    config, policy = in_step_with_sampler(make_policy, groups)
    groups[0].advantages, groups[1].advantages = [1.0, 1.0, 1.0], [2.0, -0.5, 0.0]
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
    gain, tokens = 0.0, 0
    for group in groups:
        for answer, advantage in zip(group.answers, group.advantages):
            gain = gain + advantage * plain_logprobs(plain_model, group.prompt_ids, answer, config.temperature).sum()
            tokens += len(answer)
    (-gain / tokens).backward()
    assert_same_gradients(optimizer.steps[0], gradients(plain_model), tolerance=2e-5)
    assert figures["clipped_low"] == figures["clipped_high"] == 0


def test_groups_without_signal_are_left_out_but_count_in_the_denominator(make_policy, monkeypatch):
    config, policy, groups = scored_groups(make_policy)
    packed = []
    monkeypatch.setattr(machine, "pack", lambda part, row_tokens: packed.extend(part) or [part])
    urpo.update(config, policy, RecordingOptimizer(policy), SCHEDULE, groups)
    assert sorted(group.index for group in packed) == [0, 2, 3, 5]
    tokens = sum(group.answer_tokens for group in groups)
    assert groups[0].weights == pytest.approx([1 / tokens] * groups[0].answer_tokens)


def test_a_batch_without_any_signal_skips_every_update_and_says_so(make_policy):
    config, policy, groups = scored_groups(make_policy, minibatches=2)
    for group in groups:
        group.advantages = [0.0] * 3
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
    assert optimizer.steps == [] and figures["updates"] == 0 and figures["skipped_updates"] == 2
    assert figures["loss"] == 0 and figures["grad_norm"] == 0


@pytest.mark.parametrize("broken", ["old log-prob", "weights"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(make_policy, broken):
    config, policy, groups = scored_groups(make_policy, minibatches=2, row_tokens=1)  # else it spreads in a row
    if broken == "old log-prob":
        groups[2].old_N[1] = math.nan
    else:  # of one token id, which this group alone holds
        groups[2].prompt_ids[0] = VOCABULARY
        with torch.no_grad():
            policy.lm.model.embed_tokens.weight.to_local()[VOCABULARY] = math.nan
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
    assert (figures["updates"], figures["skipped_updates"], figures["nonfinite_updates"]) == (1, 1, 1)
    (step,) = optimizer.steps  # nothing of the first minibatch is carried on
    assert all(gradient.isfinite().all() for gradient in step.values())
    assert all(math.isfinite(value) for value in figures.values())


def test_an_update_whose_gradient_alone_overflows_is_skipped_too(make_policy, monkeypatch):
    config, policy, groups = scored_groups(make_policy)
    monkeypatch.setattr(machine, "clip_gradient", lambda policy, largest: math.inf)
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
    assert optimizer.steps == []
    assert (figures["updates"], figures["skipped_updates"], figures["nonfinite_updates"]) == (0, 1, 1)
    assert math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
    assert all(weight.grad is None for weight in policy.parameters()), "nothing is carried into the next update"


def test_a_log_prob_of_the_trainer_that_is_not_finite_is_left_to_the_update(make_policy):
    groups = random_groups(4)
    config, policy = in_step_with_sampler(make_policy, groups, row_tokens=1)
    groups[2].prompt_ids[0] = VOCABULARY
    with torch.no_grad():
        policy.lm.model.embed_tokens.weight.to_local()[VOCABULARY] = math.nan
    drift = measured_drift(config, policy, groups)
    assert drift["drift_max"] < 1e-4


def test_the_gradient_is_clipped_to_the_given_norm(make_policy):
    config, policy, groups = scored_groups(make_policy, grad_clip=1e-3)
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in optimizer.steps[0].values()))
    assert norm == pytest.approx(1e-3, rel=1e-2) and figures["grad_norm"] > 1e-3


def test_a_real_update_makes_good_answers_likelier(make_policy):
    config, policy, groups = scored_groups(make_policy, count=1)
    for group in groups:
        group.advantages = [1.0, -1.0, 0.0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
    keep_old_logprobs(policy, groups, config.row_tokens)
    before = [part.sum() for part in groups[0].old_N.split([len(answer) for answer in groups[0].answers])]
    urpo.update(config, policy, optimizer, SCHEDULE, groups)
    keep_old_logprobs(policy, groups, config.row_tokens)
    after = [part.sum() for part in groups[0].old_N.split([len(answer) for answer in groups[0].answers])]
    assert after[0] > before[0] and after[1] < before[1]


def test_the_clip_range_is_the_papers():
    assert (Config().clip_low, Config().clip_high) == (0.8, 1.28)
    ratio, advantage = torch.tensor([1.27, 4.0, 4.0]), torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(clipped_objective(ratio, advantage), torch.tensor([1.27, 1.28, -4.0]))


# ---- Config ----

def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    config = flags.parse(urpo.Config, urpo.PRESETS, ["--preset", "smol", "--batch", "24"])
    assert (config.batch, config.model, config.clip_high) == (24, "seed", 1.28)
    assert flags.parse(urpo.Config, urpo.PRESETS, ["--preset", "paper"]).model == Config().model
    assert flags.parse(urpo.Config, urpo.PRESETS, []).preset in urpo.PRESETS


def test_no_file_beside_the_script_adds_flags(tmp_path, monkeypatch):
    """The library would read them from urpo.args, silently."""
    (tmp_path / "urpo.args").write_text("--seed 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "urpo.py")])
    assert flags.parse(urpo.Config, urpo.PRESETS, []).seed == 0


def test_every_preset_names_real_settings():
    assert all(set(preset) <= {f.name for f in fields(Config)} for preset in urpo.PRESETS.values())


def test_every_setting_has_help():
    assert all(f.metadata.get("help", "").strip() for f in fields(Config))


def test_the_papers_settings_are_the_defaults():
    config = Config()
    assert (config.warmup_steps, config.mix, config.clip_low, config.clip_high) == (100, "1:1:1", 0.8, 1.28)


@pytest.mark.parametrize("preset", sorted(urpo.PRESETS))
def test_every_preset_passes_its_own_check(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for world in (1, 2):
        flags.check(flags.parse(urpo.Config, urpo.PRESETS, ["--preset", preset]), world)


# ---- the seven parts ----

def test_the_seven_parts_have_one_order_and_one_name_in_the_docstring_the_loop_and_the_timings():
    numbered = [(str(number), part) for number, part in enumerate(urpo.PARTS, 1)]
    assert re.findall(r"^    (\d)\. (\w+)  ", urpo.__doc__, re.M) == numbered
    loop = inspect.getsource(urpo.train)
    assert re.findall(r"^ +# (\d)\. (\w+): ", loop, re.M) == numbered
    assert re.findall(r'clock\("(\w+)"\)', loop) == list(urpo.PARTS)
