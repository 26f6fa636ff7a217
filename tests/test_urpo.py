"""urpo.py: packed rows against separate sequences, the loss against plain formulas, and every guard of the loop."""
import doctest
import inspect
import json
import math
import random
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import data
import urpo
from data import Prompt
from rewards import clipped_objective, group_advantages
from urpo import Config, Group

VOCABULARY = 500  # of the 512 rows of the tiny model's head: the last 12 are padding

pytestmark = pytest.mark.usefixtures("process_group")


def tiny_config(**changes) -> Config:
    return Config(**{"row_tokens": 64, "logit_chunk": 1024, "recompute": False, "precision": "float32",
                     "grad_clip": 1e9, "group": 3, "minibatches": 1, "batch": 4, "temperature": 0.7,
                     "max_drift": 1e-3} | changes)


@pytest.fixture
def make_policy(tiny_model):
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (1,))
    return lambda config: urpo.load_policy(config, tiny_model, VOCABULARY, mesh)


@pytest.fixture
def plain_model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def random_group(rng, index=0, answers=3, kind="reasoning", longest=9) -> Group:
    """Random token ids, ragged lengths."""
    def ids(low, high):
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    return Group(index, Prompt(kind, "q", answer="1"), ids(4, 12), [ids(1, longest) for _ in range(answers)])


def random_groups(count, seed=0, **options):
    rng = random.Random(seed)
    return [random_group(rng, index, **options) for index in range(count)]


def plain_logprobs(model, prompt, answer, temperature):
    """Log-probs of one answer, from one sequence on its own: the definition, without any packing."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :VOCABULARY] / temperature
    logprobs = torch.log_softmax(logits, -1)
    return logprobs[range(len(answer)), answer]


def gradients(module, prefix=""):
    return {name.removeprefix(prefix): (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-5):
    """Relative to the largest entry of each tensor: fp32 sums in another order."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * gradient.abs().max() + 1e-12, name


def test_worked_examples_in_docstrings():
    assert doctest.testmod(urpo).failed == 0


# ---- the packed row ----

@pytest.mark.parametrize("count", [1, 3])
def test_a_packed_row_equals_separate_sequences(make_policy, plain_model, count):
    config, groups = tiny_config(), random_groups(count)
    policy = make_policy(config)
    logprob_N = policy(data.build_row(groups, "cpu"))
    weight_N = torch.randn(len(logprob_N), generator=torch.Generator().manual_seed(1))
    (logprob_N * weight_N).sum().backward()

    expected_N = torch.cat([plain_logprobs(plain_model, group.prompt_ids, answer, config.temperature)
                            for group in groups for answer in group.answers])
    (expected_N * weight_N).sum().backward()
    torch.testing.assert_close(logprob_N, expected_N, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(policy, "lm."), gradients(plain_model))


def test_the_temperature_divides_the_bias_of_a_head_too_and_padded_words_are_no_part_of_the_softmax():
    lm = torch.nn.Module()
    lm.lm_head = torch.nn.Linear(4, 7)
    policy, hidden_NH = urpo.Policy(lm, tiny_config(temperature=0.5), vocabulary=5), torch.randn(3, 4)
    expected_N5 = torch.log_softmax(lm.lm_head(hidden_NH)[:, :5] / 0.5, -1)
    found_N = policy.token_logprobs(hidden_NH, torch.tensor([0, 4, 2]))
    torch.testing.assert_close(found_N, expected_N5[range(3), [0, 4, 2]])


@pytest.mark.parametrize("changes", [{"logit_chunk": 1}, {"logit_chunk": 7}, {"recompute": True},
                                     {"recompute": True, "logit_chunk": 7}], ids=str)
def test_chunks_and_recomputation_change_nothing(make_policy, changes):
    results = []
    for config in (tiny_config(), tiny_config(**changes)):
        policy = make_policy(config)
        logprob_N = policy(data.build_row(random_groups(2), "cpu"))
        logprob_N.square().sum().backward()
        results.append((logprob_N.detach(), gradients(policy)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


# ---- 2. rollout, 3. self_score, 4. reward ----

class FakeEngine:
    """In place of vLLM under `data.generate`: keeps what it was asked, answers with given texts."""

    def __init__(self, monkeypatch, tokenizer, texts):
        self.calls, self.tokenizer, self.texts = [], tokenizer, texts
        monkeypatch.setattr(data, "generate", self.generate)

    def generate(self, engine, prompts, n, max_tokens, seeds, temperature):
        assert engine is self and len(prompts) == len(max_tokens) == len(seeds)
        self.calls.append(SimpleNamespace(prompts=prompts, n=n, max_tokens=max_tokens, seeds=seeds))
        return [SimpleNamespace(outputs=[self.sample(text) for text in self.texts[:n]]) for _ in prompts]

    def sample(self, text):
        ids = self.tokenizer.encode(text)
        return SimpleNamespace(token_ids=ids, finish_reason="stop",
                               logprobs=[{i: SimpleNamespace(logprob=-1.0 - i / 1e6)} for i in ids])


SHARE = [(4, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0))), (5, Prompt("reasoning", "1 + 1?", answer="2")),
         (6, Prompt("instruction", "Say hi."))]


def test_rollout_keeps_ids_texts_and_logprobs_of_every_sample(monkeypatch, smol_tokenizer):
    engine = FakeEngine(monkeypatch, smol_tokenizer, ["one", "two 2", "three"])
    config = tiny_config(max_answer_tokens=11, max_referee_tokens=7)
    groups = urpo.rollout(config, engine, smol_tokenizer, SHARE, step=9)
    (call,) = engine.calls
    assert call.n == 3 and call.max_tokens == [7, 11, 11]
    assert call.seeds == [data.request_seed(0, 9, index, "answer") for index in (4, 5, 6)]
    for group, (index, prompt), ids in zip(groups, SHARE, call.prompts, strict=True):
        assert (group.index, group.prompt, group.prompt_ids) == (index, prompt, ids)
        assert group.texts == ["one", "two 2", "three"] and group.finished == [True] * 3
        assert [list(map(len, part)) for part in (group.answers, group.sampler_logprobs)] == [
            list(map(len, group.answers))] * 2
        assert group.sampler_logprobs[0][0] == -1.0 - group.answers[0][0] / 1e6


def judged_groups(monkeypatch, tokenizer, verdicts, **changes):
    config = tiny_config(judgements=len(verdicts), **changes)
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
    figures = urpo.figures_of_kind([data.describe(group, 0)])
    assert figures["unjudged"] == 1 and figures["reward"] is None and figures["format"] == 0


def test_rewards_of_preference_and_reasoning():
    ranked = Group(0, SHARE[0][1], [1], [[1]] * 3, texts=["<scores>8, 6</scores>", "<scores>6, 8</scores>", "first"])
    solved = Group(1, SHARE[1][1], [1], [[1]] * 3, texts=["\\boxed{2}", "so 3", "it is 2"])
    urpo.reward(tiny_config(advantage="center"), [ranked, solved])
    assert ranked.rewards == [1, -1, -1] and ranked.scores == [[8, 6], [6, 8], None]
    assert solved.rewards == [1, 0, 1]
    assert ranked.advantages == pytest.approx([4 / 3, -2 / 3, -2 / 3])


# ---- 5. old_logprobs, and the drift that part 6 checks ----

def measured_drift(config, policy, groups):
    urpo.old_logprobs(config, policy, groups, "cpu")
    return urpo.check_drift(config, groups)


def with_old_logprobs(make_policy, groups, shift=0.0, **changes):
    config = tiny_config(**changes)
    policy = make_policy(config)
    with torch.no_grad():
        for group in groups:
            logprob_N = policy(data.build_row([group], "cpu"))
            parts = (logprob_N + shift).split([len(answer) for answer in group.answers])
            group.sampler_logprobs = [part.tolist() for part in parts]
            group.advantages = group.advantages or [1.0] * len(group.answers)
    return config, policy


def test_old_logprobs_are_those_of_each_group_and_drift_is_their_distance_to_the_sampler(make_policy, plain_model):
    groups = random_groups(5)
    config, policy = with_old_logprobs(make_policy, groups, shift=5e-4)
    drift = measured_drift(config, policy, groups)
    assert drift["drift_mean"] == pytest.approx(5e-4, rel=0.05) and drift["drift_max"] == pytest.approx(5e-4, rel=0.2)
    for group in groups:
        parts = [plain_logprobs(plain_model, group.prompt_ids, answer, config.temperature) for answer in group.answers]
        torch.testing.assert_close(group.old_N, torch.cat(parts), rtol=1e-5, atol=1e-5)
        assert not group.old_N.requires_grad


def test_groups_without_signal_get_no_old_logprobs_and_a_step_of_them_alone_measures_no_drift(make_policy):
    groups = random_groups(3)
    config, policy = with_old_logprobs(make_policy, groups)
    groups[1].advantages = [0.0] * 3
    assert measured_drift(config, policy, groups)["drift_mean"] < 1e-5
    assert [group.old_N is None for group in groups] == [False, True, False]
    assert measured_drift(config, policy, groups[1:2]) == {"drift_mean": None, "drift_max": None}


def test_the_entropy_of_a_group_is_minus_the_samplers_mean_logprob():
    assert Group(0, None, [1], [[1, 2], [3]], sampler_logprobs=[[-1.0, -2.0], [-6.0]]).entropy == 3.0
    assert Group(0, None, [1], [[1]]).entropy is None


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_stale_sampler_stops_the_run_before_any_weight_moves(make_policy, minibatches):
    groups = random_groups(6)
    config, policy = with_old_logprobs(make_policy, groups, minibatches=minibatches)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.05)
    optimizer = RecordingOptimizer(policy)
    urpo.old_logprobs(config, policy, groups[len(groups) // minibatches :], "cpu")
    with pytest.raises(FloatingPointError, match="above --max_drift 0.001: the sampler does not hold the trainer's"):
        urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
    assert optimizer.steps == []


def test_drift_that_is_not_a_number_stops_the_run(make_policy):
    groups = random_groups(2)
    config, policy = with_old_logprobs(make_policy, groups, shift=math.nan)
    with pytest.raises(FloatingPointError, match="drift"):
        measured_drift(config, policy, groups)


@pytest.mark.parametrize("changes", [{"minibatches": 1}, {"minibatches": 2}, {"minibatches": 2, "importance_cap": 1.1}],
                         ids=str)
def test_the_first_minibatch_needs_no_old_logprobs_of_its_own(make_policy, changes):
    """Gradients and figures are those of a step whose part 5 computed all of them, and the drift is of all groups."""
    results = []
    for all_of_them in (True, False):
        groups = random_groups(6)
        config, policy = with_old_logprobs(make_policy, groups, shift=5e-4, **changes)
        for group in groups:
            group.advantages = [1.0, -0.5, 0.0] if group.index % 3 else [0.0] * 3
        optimizer = RecordingOptimizer(policy)
        urpo.old_logprobs(config, policy, groups if all_of_them else groups[6 // config.minibatches :], "cpu")
        results.append((urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1), optimizer.steps,
                        [group.old_N for group in groups]))
    (expected, plain, old), (found, steps, own) = results
    assert found.pop("nonfinite_prompts") == expected.pop("nonfinite_prompts") == []
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6) and found["drift_mean"] == pytest.approx(5e-4, rel=0.05)
    for gradient, other in zip(steps, plain, strict=True):
        assert_same_gradients(gradient, other)
    for one, other in zip(own, old):
        assert one is other is None or torch.allclose(one, other, rtol=1e-5, atol=1e-5)


# ---- 6. update ----

class RecordingOptimizer:
    """Keeps each minibatch's gradient and leaves the weights as they are."""

    def __init__(self, policy):
        self.policy, self.steps = policy, []

    def step(self):
        self.steps.append(gradients(self.policy, "lm."))

    def zero_grad(self):
        self.policy.zero_grad()


SCHEDULE = SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0])


def scored_groups(make_policy, count=6, seed=0, **changes):
    """Groups with random advantages, and old log-probs so far off that ratios lie on both sides of the clip range."""
    groups, generator = random_groups(count, seed), torch.Generator().manual_seed(seed)
    config, policy = with_old_logprobs(make_policy, groups, shift=0.3, **{"max_drift": 9.0} | changes)
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
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
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


def test_groups_without_signal_are_left_out_but_count_in_the_denominator(make_policy, monkeypatch):
    config, policy, groups = scored_groups(make_policy)
    packed = []
    monkeypatch.setattr(data, "pack", lambda part, budget: packed.extend(part) or [part])
    urpo.update(config, policy, RecordingOptimizer(policy), SCHEDULE, groups, "cpu", world=1)
    assert sorted(group.index for group in packed) == [0, 2, 3, 5]
    tokens = sum(group.answer_tokens for group in groups)
    assert groups[0].weights == pytest.approx([1 / tokens] * groups[0].answer_tokens)


def test_a_batch_without_any_signal_skips_every_update_and_says_so(make_policy):
    config, policy, groups = scored_groups(make_policy, minibatches=2)
    for group in groups:
        group.advantages = [0.0] * 3
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
    assert optimizer.steps == [] and figures["updates"] == 0 and figures["skipped_updates"] == 2
    assert figures["loss"] == 0 and figures["grad_norm"] == 0


@pytest.mark.parametrize("broken", ["old log-prob", "weights"])
def test_an_update_that_is_not_finite_is_skipped_and_counted_and_its_prompts_named(make_policy, broken):
    config, policy, groups = scored_groups(make_policy, minibatches=2, row_tokens=1)  # else it spreads in a row
    if broken == "old log-prob":
        groups[2].old_N[1] = math.nan
    else:  # of one token id, which this group alone holds
        groups[2].prompt_ids[0] = VOCABULARY
        with torch.no_grad():
            policy.lm.model.embed_tokens.weight.to_local()[VOCABULARY] = math.nan
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
    assert (figures["updates"], figures["skipped_updates"], figures["nonfinite_updates"]) == (1, 1, 1)
    assert figures["nonfinite_prompts"] == [2]
    (step,) = optimizer.steps  # nothing of the first minibatch is carried on
    assert all(gradient.isfinite().all() for gradient in step.values())
    assert all(math.isfinite(value) for name, value in figures.items() if name != "nonfinite_prompts")


def test_where_the_gradient_alone_overflows_all_prompts_of_the_update_are_named(make_policy, monkeypatch):
    config, policy, groups = scored_groups(make_policy)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: clip(*arguments) * math.inf)
    figures = urpo.update(config, policy, RecordingOptimizer(policy), SCHEDULE, groups, "cpu", world=1)
    assert figures["updates"] == 0 and figures["nonfinite_prompts"] == [0, 2, 3, 5]


def test_a_log_prob_of_the_trainer_that_is_not_finite_is_left_to_the_update_and_logged_as_unknown(make_policy):
    groups = random_groups(4)
    config, policy = with_old_logprobs(make_policy, groups, row_tokens=1)
    groups[2].prompt_ids[0] = VOCABULARY
    with torch.no_grad():
        policy.lm.model.embed_tokens.weight.to_local()[VOCABULARY] = math.nan
    drift = measured_drift(config, policy, groups)
    assert drift["drift_max"] < 1e-4
    assert [data.describe(group, 0)["logprob"] is None for group in groups] == [False, False, True, False]


def test_the_gradient_is_clipped_to_the_given_norm(make_policy):
    config, policy, groups = scored_groups(make_policy, grad_clip=1e-3)
    optimizer = RecordingOptimizer(policy)
    figures = urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in optimizer.steps[0].values()))
    assert norm == pytest.approx(1e-3, rel=1e-2) and figures["grad_norm"] > 1e-3


def test_a_real_update_makes_good_answers_likelier(make_policy):
    config, policy, groups = scored_groups(make_policy, count=1)
    for group in groups:
        group.advantages = [1.0, -1.0, 0.0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
    urpo.old_logprobs(config, policy, groups, "cpu")
    before = [part.sum() for part in groups[0].old_N.split([len(answer) for answer in groups[0].answers])]
    urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
    urpo.old_logprobs(config, policy, groups, "cpu")
    after = [part.sum() for part in groups[0].old_N.split([len(answer) for answer in groups[0].answers])]
    assert after[0] > before[0] and after[1] < before[1]


def test_worked_answers_imitate_by_the_same_update(make_policy, plain_model, smol_tokenizer):
    """At ratio 1 and A = 1 the gradient is that of the mean log-likelihood."""
    row = Prompt("preference", "Say hi.", ("hi", "no"), (9.0, 2.0))
    groups = data.worked_groups(smol_tokenizer, [(0, row), (1, Prompt("reasoning", "1 + 1?", answer="2", worked="2"))])
    assert [group.texts for group in groups] == [["<scores>9, 2</scores>"], ["2"]]
    assert all(group.answers[0][-1] == smol_tokenizer.eos_token_id for group in groups)
    for group in groups:  # into the tiny model's vocabulary
        group.prompt_ids, group.answers = [i % VOCABULARY for i in group.prompt_ids], [
            [i % VOCABULARY for i in group.answers[0]]]
    config = tiny_config()
    policy = make_policy(config)
    optimizer = RecordingOptimizer(policy)
    urpo.update(config, policy, optimizer, SCHEDULE, groups, "cpu", world=1)
    parts = [plain_logprobs(plain_model, g.prompt_ids, g.answers[0], config.temperature) for g in groups]
    (-torch.cat(parts).mean()).backward()
    assert_same_gradients(optimizer.steps[0], gradients(plain_model), tolerance=2e-5)


def test_the_clip_range_is_the_papers():
    assert (Config().clip_low, Config().clip_high) == (0.8, 1.28)
    ratio, advantage = torch.tensor([1.27, 4.0, 4.0]), torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(clipped_objective(ratio, advantage), torch.tensor([1.27, 1.28, -4.0]))


# ---- 7. sync ----

def test_full_weights_are_the_models_own_by_the_checkpoints_names(make_policy, plain_model):
    expected = plain_model.state_dict()
    found = dict(urpo.full_weights(make_policy(tiny_config())))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_checkpoint_restores_weights_optimizer_and_schedule(make_policy, smol_tokenizer, tmp_path):
    def trainer():
        policy = make_policy(tiny_config())
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        return policy, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))

    def advance(policy, optimizer, schedule):
        policy(data.build_row(random_groups(1), "cpu")).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    first, second = trainer(), trainer()
    advance(*first)
    urpo.save_checkpoint(tmp_path / "checkpoints" / "step_1", *first, smol_tokenizer)
    assert data.last_checkpoint(tmp_path) == (1, tmp_path / "checkpoints" / "step_1")
    urpo.load_checkpoint(tmp_path / "checkpoints" / "step_1", *second)
    advance(*first)
    advance(*second)
    for (name, a), (_, b) in zip(urpo.full_weights(first[0]), urpo.full_weights(second[0]), strict=True):
        assert torch.equal(a, b), name
    assert first[2].get_last_lr() == second[2].get_last_lr()


def test_a_resumed_log_repeats_no_step_and_drops_a_torn_line_and_says_so(tmp_path, capsys):
    torn = '{"step": 2, "lo'
    for name in ("log.jsonl", "rollouts.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n' + torn)
    record = urpo.Record()
    record.open(tiny_config(), tmp_path, 2, {"world": 1})
    cuts = [line for line in capsys.readouterr().out.splitlines() if "cut" in line]
    assert cuts == [f"{tmp_path / name}: cut 2 lines from step 2 on, which the run repeats"
                    for name in ("log.jsonl", "rollouts.jsonl")]
    record.write(2, [[], []], {"seconds": {"draw": 1.0}, "nonfinite_prompts": [], "new": True})
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["new"]
    assert (tmp_path / "rollouts.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_log_that_needs_no_cut_stays_as_it_is_and_nothing_is_said(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    data.cut_lines(tmp_path / "log.jsonl", 2)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_the_prompts_of_a_skipped_update_are_recorded_even_where_others_are_not(tmp_path):
    group = Group(3, SHARE[1][1], [1], [[1]], [[-1.0]], ["2"], [True], rewards=[1.0], advantages=[0.0])
    other = Group(4, SHARE[1][1], [1], [[1]], [[-1.0]], ["2"], [True], rewards=[1.0], advantages=[0.0])
    record = urpo.Record()
    record.open(tiny_config(rollouts_every=2), tmp_path, 0, {})
    record.write(1, [[data.describe(group, 1)], [data.describe(other, 1)]],
                 {"seconds": {"draw": 1.0}, "nonfinite_prompts": [3]})
    (line,) = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 3


# ---- Config ----

def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    config = urpo.parse_config(["--preset", "smol", "--batch", "24"])
    assert (config.batch, config.model, config.clip_high) == (24, "seed", 1.28)
    assert urpo.parse_config(["--preset", "paper"]).model == Config().model
    assert urpo.parse_config([]).preset in urpo.PRESETS


def test_every_preset_names_real_settings():
    assert all(set(preset) <= {f.name for f in fields(Config)} for preset in urpo.PRESETS.values())


def test_every_setting_has_help():
    assert all(f.metadata.get("help", "").strip() for f in fields(Config))


def test_the_papers_settings_are_the_defaults():
    config = Config()
    assert (config.warmup_steps, config.mix, config.clip_low, config.clip_high) == (100, "1:1:1", 0.8, 1.28)


def test_the_warm_start_has_no_warm_up_one_minibatch_and_both_orders():
    config = urpo.parse_config(["--preset", "smol", "--method", "sft"])
    assert (config.warmup_steps, config.minibatches, config.both_orders) == (0, 1, True)


@pytest.mark.parametrize("preset", sorted(urpo.PRESETS))
def test_every_preset_passes_its_own_check(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for world in (1, 2):
        urpo.check_config(urpo.parse_config(["--preset", preset]), world)


# ---- the seven parts ----

def test_the_seven_parts_stand_in_order_in_the_docstring_and_in_the_loop():
    numbered = list(enumerate(urpo.PARTS, 1))
    assert re.findall(r"^    (\d)\. (\w+)  ", urpo.__doc__, re.M) == [(str(i), part) for i, part in numbered]
    loop = inspect.getsource(urpo.train)
    banners = re.findall(r"^ +# (\d)\. (.+)", loop, re.M)
    assert [int(number) for number, _ in banners] == [number for number, _ in numbered]
    for (_, text), part in zip(banners, urpo.PARTS):
        assert re.sub("[^a-z]", "", text).startswith(part.replace("_", "")), text
    assert re.findall(r'clock\("(\w+)"\)', loop) == list(urpo.PARTS)
