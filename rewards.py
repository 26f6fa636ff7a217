r"""The equations of URPO (arXiv 2507.17515): pure functions, one for each. No model and no sampler.

In the order in which a step uses them:

    P  preference    r = tau(scores in the answer, true scores)              preference_reward   [paper]
    R  reasoning     r = 1 if the final answer equals the true one, else 0   verify_answer       [paper]
    I  instruction   r_i = mean score that the model itself gave answer i    self_rewards        [paper]
    all kinds        one dispatch, for training and its audit                group_rewards
                     A = (r - mean) / std within the group                   group_advantages    [paper]
                     w = 1 / tokens, the weight of each in the loss          token_weight        [DAPO]
                     min(rho A, clip(rho, 0.8, 1.28) A)                      clipped_objective   [paper, DAPO]

Below the equations: the figures of a step, which are made of them. One rule holds everywhere: unknown is not zero. A
judgement that cannot be read is None, or on P the worst tau, -1; it is never a score.
"""

from __future__ import annotations

import math
import re
from itertools import compress
from statistics import pstdev

import torch
from scipy.stats import kendalltau
from torch import Tensor

from infra.answers import final_answer, same_answer
from infra.ranks import all_reduce

LOWEST_SCORE, HIGHEST_SCORE = 1.0, 10.0  # our choice; the referee's prompt states the same range
SMALLEST_SPREAD = 1e-6  # a group whose rewards deviate less than this has no signal (our choice)

# ------------------------------------------------------------------------------- P: ranking responses


def parse_scores(text: str, n: int, finished: bool = True) -> list[float] | None:
    """The scores in a referee's answer: n decimals in [1, 10] in its LAST score block, else None (our choice).

    An earlier block may be a draft, or a quoted answer that scores itself. A text that was cut off cannot be read.

    >>> parse_scores("<scores>1, 1</scores> On reflection: <scores>8, 6.5</scores>", 2)
    [8.0, 6.5]
    >>> parse_scores("<scores>8, 6</scores> On reflection: <scores>8, 60%</scores>", 2)
    """
    start = text.rfind("<scores>")
    end = text.find("</scores>", start)
    if start < 0 or end < 0 or not finished:  # no block, or a last block that was opened and cut off
        return None
    items = text[start + len("<scores>") : end].split(",")
    if len(items) != n:
        return None
    scores = []
    for item in items:
        item = item.strip(" \t\r\n")
        if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,20})?", item):
            return None
        score = float(item)
        if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
            return None
        scores.append(score)
    return scores


def kendall_tau(scores: list[float], truth: list[float], variant: str = "b") -> float:
    """Kendall's tau of two lists in which higher is better, in [-1, 1]. tau is the paper's, the variant ours.

    C and D are the numbers of pairs on which the lists agree and disagree.

        "b"        (C - D) / sqrt(pairs untied in scores * pairs untied in truth); 0 where a list is all ties
        "strict"   (C - D) / pairs untied in truth; a tie in the scores earns what a coin would earn on average

    >>> [round(kendall_tau([9, 9, 1], [2, 1, 0], variant), 3) for variant in ("b", "strict")]
    [0.816, 0.667]
    >>> [round(kendall_tau([9, 7, 6, 5], [1, 0, 0, 0], variant), 3) for variant in ("b", "strict")]
    [0.707, 1.0]
    """
    if len(scores) != len(truth):
        raise ValueError(f"{len(scores)} scores against {len(truth)} true ranks")
    if variant == "b":
        tau = float(kendalltau(scores, truth).statistic) if len(scores) > 1 else math.nan
        return 0.0 if math.isnan(tau) else tau
    agreement = pairs = 0
    for i in range(len(truth)):
        for j in range(len(truth)):
            if truth[i] > truth[j]:
                pairs += 1
                agreement += (scores[i] > scores[j]) - (scores[i] < scores[j])
    return agreement / pairs if pairs else 0.0


def preference_reward(text: str, truth: list[float], variant: str = "b", finished: bool = True) -> float:
    """Reward of one ranking: tau of its scores with the truth [paper]; -1 if it cannot be read (our choice).

    >>> preference_reward("<scores>8, 6</scores>", [1, 0]), preference_reward("the first one", [1, 0])
    (1.0, -1.0)
    """
    scores = parse_scores(text, len(truth), finished)
    return -1.0 if scores is None else kendall_tau(scores, truth, variant)


# ------------------------------------------------------------------------------- R: verified reasoning


def verify_answer(response: str, answer: str) -> float:
    r"""Reward of one solution: 1 if its final answer equals `answer`, else 0 [paper]. The check is our choice.

    The final answer is the last box, or without one the last number; infra/answers.py says what equals what. No text
    makes this function raise.

    >>> verify_answer(r"First \boxed{3}. No: \boxed{1{,}024}.", "1024")
    1.0
    >>> verify_answer("so 3/4 it is", "0.75")
    1.0
    >>> verify_answer(r"\boxed{(x-1)(x+1)}", "x^2-1"), verify_answer(r"It is 12, so \boxed{13}", "12")
    (1.0, 0.0)
    >>> verify_answer(r"\boxed{\text{Friday}}", "friday")
    1.0
    >>> verify_answer(r"\boxed{5 \text{ km}}", r"5 \text{ m}")
    0.0
    """
    return float(same_answer(final_answer(response), answer))


# ------------------------------------------------------------------------------- I: self-scores


def self_rewards(verdicts: list, orders: list[list[int]]) -> list[float] | None:
    """Rewards of a group of open answers: r_i = mean score of answer i over the judgements that can be read.

    That the policy scores its own group is the paper's. The shuffled orders and the mean are ours.
    verdicts[k]: the scores of judgement k, None where it cannot be read; orders[k][j]: the answer that it was shown at
    position j. Returns one reward in [1, 10] an answer; or None if less than half of any answer's judgements
    can be read: the rest could reverse a preference, so the group gets no advantage (our choice).

    >>> self_rewards([[9, 2], [4, 3], [7, 1]], [[2, 0], [1, 2], [0, 1]])
    [4.5, 2.5, 6.0]
    >>> self_rewards([[9, 2], None, None], [[0, 1], [1, 0], [0, 1]])
    """
    found: dict[int, list[float | None]] = {}  # the scores of each answer
    for scores, order in zip(verdicts, orders, strict=True):
        for place, answer in enumerate(order):
            found.setdefault(answer, []).append(scores and scores[place])
    if set(found) != set(range(len(found))):
        raise ValueError("orders must name the answers of a group, counted from 0")
    rewards = []
    for answer in range(len(found)):
        read = [score for score in found[answer] if score is not None]
        if 2 * len(read) < len(found[answer]):
            return None
        rewards.append(sum(read) / len(read))
    return rewards or None


# ------------------------------------------------------------------------------- all kinds


def group_rewards(config, group) -> list[float] | None:
    """The rewards of the G answers to one prompt (a data.Group): the one place where the kind of a prompt decides.

    A new verifiable reward is one more branch here. None for an unjudged group, which teaches nothing.
    """
    prompt, rewards = group.prompt, []
    if prompt.kind == "instruction":
        return self_rewards(read_judgements(group), [judgement["order"] for judgement in group.judgements])
    for text, finished in zip(group.texts, group.finished):
        if prompt.kind == "preference":
            rewards.append(preference_reward(text, prompt.truth, config.tau, finished))
        else:
            rewards.append(verify_answer(text, prompt.answer))
    return rewards


def read_judgements(group) -> list[list[float] | None]:
    """The scores in each ranking of a P group, in each self-judgement of an I group; None where it cannot be read."""
    verdicts = []
    if group.prompt.kind == "preference":
        for text, finished in zip(group.texts, group.finished):
            verdicts.append(parse_scores(text, len(group.prompt.truth), finished))
    for judgement in group.judgements:
        verdicts.append(parse_scores(judgement["text"], len(judgement["order"]), judgement["finished"]))
    return verdicts


def group_advantages(rewards: Tensor) -> Tensor:
    """A = (r - mean) / (std + 1e-6) over the last dimension, the G answers to one prompt; float32.

    Group-relative advantages are the paper's. The unbiased std and its floor are ours: a group whose std is below
    1e-6 gets exactly 0.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [7., 7., 7., 7.]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([7., 7. + 1e-7]))
    tensor([0., 0.])
    """
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite: leave an unjudged group out, instead of passing nan")
    rewards = rewards.double()
    std = rewards.std(dim=-1, keepdim=True)
    advantages = (rewards - rewards.mean(dim=-1, keepdim=True)) / (std + SMALLEST_SPREAD)
    return torch.where(std < SMALLEST_SPREAD, 0.0, advantages).float()


def token_weight(tokens: int) -> float:
    """w = 1 / (answer tokens of the global minibatch): the weight of each of them in the loss [DAPO].

    So a long answer counts as much more as it is longer. The one place where the mean is defined.

    >>> token_weight(8)
    0.125
    """
    return 1 / tokens


def clipped_objective(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(rho A, clip(rho, low, high) A) for each token, to be maximised. The range is the paper's, from DAPO.

    rho is a token's probability now over the trainer's own at rollout weights. There is no dual clip: a token that
    got likelier in a bad answer (rho > high, A < 0) is pulled back in full.

    >>> clipped_objective(torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1., -1., 1., -1.]), 0.8, 1.28)
    tensor([ 0.5000, -0.8000,  1.2800, -1.5000])
    """
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


# ------------------------------------------------------------------------------- figures of a step


def mean(values) -> float | None:
    """The mean, or None of nothing: unknown is not zero.

    >>> mean([1, 2]), mean([])
    (1.5, None)
    """
    values = list(values)
    return sum(values) / len(values) if values else None


class Tally:
    """Sums over the rows of one minibatch, from which the log's figures of an update are made."""

    def __init__(self):
        self.loss, self.tokens = 0.0, 0
        self.clipped_low = self.clipped_high = 0
        self.norm: float | None = None  # of the gradient; None: no rank has a row, so there is no update

    def add(self, loss: Tensor, ratio_N: Tensor, row, low: float, high: float) -> None:
        """One row, and its tokens that lose their gradient by the clip. The weight of an idle row's token is 0."""
        too_low_N = (ratio_N < low) & (row.advantage_N < 0)
        too_high_N = (ratio_N > high) & (row.advantage_N > 0)
        self.loss += loss.item()
        self.clipped_low += too_low_N.sum().item()
        self.clipped_high += too_high_N.sum().item()
        self.tokens += (row.weight_N > 0).sum().item()


def update_figures(tallies: list[Tally], world: int) -> dict:
    """Means over the updates of a step, of all ranks; None without any. Nothing of a skipped update counts."""
    ready = [tally for tally in tallies if tally.norm is not None]
    done = [tally for tally in ready if math.isfinite(tally.norm)]  # the same on all ranks, since the norm is
    counts = {
        "updates": len(done),
        "skipped_updates": len(tallies) - len(done),
        "nonfinite_updates": len(ready) - len(done),
    }
    if not done:
        return dict.fromkeys(("loss", "grad_norm", "clipped_low", "clipped_high")) | counts
    tokens = all_reduce(sum(tally.tokens for tally in done))
    return {
        "loss": all_reduce(sum(tally.loss for tally in done)) / world / len(done),
        "grad_norm": mean(tally.norm for tally in done),
        "clipped_low": all_reduce(sum(tally.clipped_low for tally in done)) / tokens,
        "clipped_high": all_reduce(sum(tally.clipped_high for tally in done)) / tokens,
        **counts,
    }


def step_figures(config, groups: list) -> dict[str, dict]:
    """{kind: its figures} of a step, from the groups of its whole batch, in the order of the batch."""
    kinds: dict[str, list] = {}
    for group in groups:
        kinds.setdefault(group.prompt.kind, []).append(group)
    shares = gradient_shares(config, groups)
    figures = {}
    for kind, part in kinds.items():
        figures[kind] = {**kind_figures(part), "gradient_share": shares.get(kind)}
    return figures


def gradient_shares(config, groups: list) -> dict[str, float]:
    """The part of each kind in what pulls at the weights: its sum of w |A| over all answer tokens, over that of all.

    w is a token's weight in the loss, A its advantage. A mix by prompt count is no mix by gradient. Empty: no signal.
    """
    pull: dict[str, float] = {}
    size = len(groups) // config.minibatches
    for first in range(0, size * config.minibatches, size or 1):
        minibatch, lengths = groups[first : first + size], []
        for group in minibatch:
            lengths += map(len, group.answers)
        weight = token_weight(sum(lengths))
        for group in minibatch:
            kind = group.prompt.kind
            for answer, advantage in zip(group.answers, group.advantages):
                pull[kind] = pull.get(kind, 0.0) + len(answer) * weight * abs(advantage)
    total = sum(pull.values())
    return {kind: part / total for kind, part in pull.items()} if total else {}


def kind_figures(groups: list) -> dict:
    """The figures of one kind of prompt in one step, from the groups of all ranks.

    A referee that writes one constant line can have a good format, tau and spread. What exposes it: `zero_spread`, the
    share of judged groups without any gradient; `distinct` answers in a group; and `first_position`.
    """
    rewards, spreads, advantages = [], [], []
    lengths, finished, distinct, entropy = [], [], [], []
    for group in groups:
        if group.rewards is not None:  # else the group is unjudged
            rewards += group.rewards
            spreads.append(pstdev(group.rewards))
        advantages += map(abs, group.advantages)
        lengths += map(len, group.answers)
        finished += group.finished
        distinct.append(len(set(group.texts)))
        if group.entropy is not None:
            entropy.append(group.entropy)
    figures = {
        "prompts": len(groups),
        "unjudged": len(groups) - len(spreads),
        "reward": mean(rewards),
        "reward_std": mean(spreads),
        "zero_spread": mean(spread < SMALLEST_SPREAD for spread in spreads),
        "advantage_scale": mean(advantages),
        "length": mean(lengths),
        "tokens": sum(lengths),
        "finished": mean(finished),
        "distinct": mean(distinct),
        "entropy": mean(entropy),
    }
    if groups[0].prompt.kind != "reasoning":
        figures |= referee_figures(groups)
    return figures


def referee_figures(groups: list) -> dict:
    """What the referee wrote on P or on I: the share that can be read, and its preference for the first position.

    P: also the mean tau of the rankings that can be read. I: the spread within a judgement, in points.
    """
    verdicts, taus = [], []
    for group in groups:
        scores = read_judgements(group)
        verdicts += scores
        if group.prompt.kind == "preference":
            taus += compress(group.rewards, scores)
    read = [scores for scores in verdicts if scores]
    figures = {"score_std": mean(map(pstdev, read))}
    if groups[0].prompt.kind == "preference":
        figures = {"tau": mean(taus)}
    figures["format"] = mean(map(bool, verdicts))
    figures["first_position"] = first_position_preference(read)
    return figures


def first_position_preference(score_rows: list[list[float]]) -> float | None:
    """How much a judge prefers what stands first: mean of [first is on top] / (number on top) - 1/N (ours).

    Rows are scores in the order shown, N to a row. A judge blind to order has 0, always first is 1 - 1/N.

    >>> first_position_preference([[9, 3], [8, 2], [5, 5], [1, 7]])
    0.125
    """
    shares = []
    for row in score_rows:
        best = max(row)
        shares.append((row[0] == best) / list(row).count(best) - 1 / len(row))
    return mean(shares)
