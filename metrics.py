"""Scoring: from scores that have been read to figures with an interval. Pure functions; no model, no file.

Unknown is not zero: a judgement that cannot be read is None, and so is a figure that nothing was measured for.

A pair is judged in both orders: better_first holds its judgements with the better response shown first, worse_first
those with the worse one shown first. A judgement is [score of the first shown, score of the second] or None.
"""
import math
from collections import Counter

import numpy as np
from scipy import stats

from rewards import final_answer, first_position_preference, kendall_tau, mean, verify_answer


def figure(value: float | None, count: int, low: float | None = None, high: float | None = None) -> dict:
    """A figure as it stands in the JSON: value, 95 % interval, number of rows (or of what is stated) behind it."""
    found = {"value": value, "low": low, "high": high}
    for name, number in found.items():
        found[name] = None if number is None else round(float(number), 4)
    return {**found, "count": count}


def interval(values) -> dict:
    """Mean of one value a row, and its 95 % interval (ours): Wilson's if all are 0 or 1, else a bootstrap over rows.

    Rows are the unit and not samples, since the samples of one row are no independent trials. None is left out.

    >>> interval([1, 0, 1, 1, None])
    {'value': 0.75, 'low': 0.3006, 'high': 0.9544, 'count': 4}
    >>> interval([None])
    {'value': None, 'low': None, 'high': None, 'count': 0}
    """
    values = [float(value) for value in values if value is not None]
    if not values or set(values) - {0.0, 1.0}:
        return weighted_mean([(values, 1)])
    test = stats.binomtest(int(sum(values)), len(values))
    low, high = test.proportion_ci(method="wilson")
    return figure(mean(values), len(values), low, high)


def weighted_mean(parts) -> dict:
    """Mean of the means of several parts [(values, weight), ...], and its 95 % interval by bootstrap.

    The bootstrap draws rows anew within each part, so that the parts keep their weights. None is left out.

    >>> weighted_mean([([1, 1, 0, 0], 1), ([1, 1, None], 3)])
    {'value': 0.875, 'low': 0.75, 'high': 1.0, 'count': 6}
    """
    samples, weights = [], []
    for values, weight in parts:
        values = [value for value in values if value is not None]
        if values:
            samples.append(np.array(values, float))
            weights.append(weight)

    def statistic(*samples, axis=-1):
        means = [np.mean(values, axis) for values in samples]
        return np.average(means, axis=0, weights=weights)

    sizes = [len(values) for values in samples]
    if not samples:
        return figure(None, 0)
    if min(sizes) < 2:  # one row does not tell how much rows differ
        return figure(statistic(*samples), sum(sizes))
    drawn = stats.bootstrap(samples, statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    return figure(statistic(*samples), sum(sizes), *drawn.confidence_interval)


def columns(rows: list[dict]) -> dict[str, list]:
    """The measures of many rows, a list for each measure.

    >>> columns([{"right": 1, "tokens": 20}, {"right": 0, "tokens": None}])
    {'right': [1, 0], 'tokens': [20, None]}
    """
    found: dict[str, list] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def summary(rows: list[dict]) -> dict[str, dict]:
    """The measures of many rows, an `interval` for each measure."""
    return {name: interval(values) for name, values in columns(rows).items()}


# ------------------------------------------------------------------------------- the referee, on pairs


def expected_scores(better_first, worse_first) -> tuple[float, float] | None:
    """Mean score of (the better, the worse) response: over the samples of each order, then over both orders (ours).

    So a preference for a position cancels. None if an order has no readable judgement.

    >>> expected_scores([[9, 3], None], [[2, 8], [4, 6]])
    (8.0, 3.0)
    """
    means = []
    for order in (better_first, worse_first):
        read = [scores for scores in order if scores]
        if not read:
            return None
        means.append(np.mean(read, axis=0))
    better = (means[0][0] + means[1][1]) / 2
    worse = (means[0][1] + means[1][0]) / 2
    return round(float(better), 9), round(float(worse), 9)  # equal means stay equal


def credit(margin: float | None) -> float:
    """1 if the better response is ahead, 0 if it is behind; a tie, or an unread judgement, is worth a coin."""
    return float(margin > 0) if margin else 0.5


def pair_figures(better_first, worse_first) -> dict:
    """The figures of one pair that was judged S times in each order (ours, after D18).

    format                      share of judgements that can be read; unparsed is the rest
    both orders                 sample s is right in BOTH orders; a tie or an unread judgement is not right
    single order                right in the order shown; a tie or an unread judgement counts 0.5
    ties as 0                   right in the order shown; a tie or an unread judgement counts 0
    expected score              the expected scores have the right order; a tie, or an order never read, counts 0.5
    order consistency           the same winner in both orders, among samples read in both; a tie has no winner
    first-position preference   rewards.first_position_preference: -0.5 to 0.5; a judge blind to order has 0

    >>> list(pair_figures([[9, 3], [5, 5]], [[2, 8], None]).values())
    [0.75, 0.25, 0.5, 0.75, 0.5, 1.0, 1.0, 0.0]
    """
    read = [scores for scores in [*better_first, *worse_first] if scores]
    # By how much the better response is ahead; None: unread.
    forward = [scores and scores[0] - scores[1] for scores in better_first]
    backward = [scores and scores[1] - scores[0] for scores in worse_first]
    margins = forward + backward
    right_twice, same_winner = 0, []
    for a, b in zip(forward, backward):
        if a is not None and b is not None:
            right_twice += a > 0 and b > 0
            same_winner.append(a * b > 0)
    expected = expected_scores(better_first, worse_first)
    return {
        "format": len(read) / len(margins),
        "unparsed": 1 - len(read) / len(margins),
        "both orders": right_twice / len(forward),
        "single order": mean(map(credit, margins)),
        "ties as 0": mean((margin or 0) > 0 for margin in margins),
        "expected score": credit(expected and expected[0] - expected[1]),
        "order consistency": mean(same_winner),
        "first-position preference": first_position_preference(read) if read else None}


def referee_figures(greedy, sampled, parts=()) -> dict:
    """All pairs -> the referee's table. greedy, sampled: (better_first, worse_first) of each pair.

    `parts` names the part of the data that each pair belongs to; both-orders accuracy is then given for each part.
    "spread" is the deviation of the expected scores of all responses, in points of the scale 1 to 10; few samples
    inflate it. "commonest line" is the share of the most frequent pair of scores: a referee that does not read has 1.
    """
    greedy_rows = columns([pair_figures(*orders) for orders in greedy])
    rows = columns([pair_figures(*orders) for orders in sampled])
    figures = {name: interval(rows[name]) for name in ("format", "unparsed", "both orders")}
    for part in sorted(set(parts)):
        values = [value for value, other in zip(rows["both orders"], parts) if other == part]
        figures[f"both orders, {part}"] = interval(values)
    figures["both orders, greedy"] = interval(greedy_rows["both orders"])
    for name in ("single order", "expected score", "order consistency", "first-position preference"):
        figures[name] = interval(rows[name])
    spread, lines = [], Counter()
    for better_first, worse_first in sampled:
        spread += expected_scores(better_first, worse_first) or ()
        lines.update(tuple(scores) for scores in [*better_first, *worse_first] if scores)
    figures["spread of expected scores"] = figure(np.std(spread) if spread else None, len(spread))
    share = max(lines.values()) / lines.total() if lines else None
    figures["commonest line"] = figure(share, lines.total())
    return figures


def longer_wins(responses, truth) -> float:
    """What always preferring the longer response would earn on a row: 1 right, 0 wrong, 0.5 at equal lengths.

    >>> longer_wins(("short", "rather long"), (0, 1)), longer_wins(("same", "size"), (0, 1))
    (1.0, 0.5)
    """
    lengths = [len(text) for text in responses]
    return (kendall_tau(lengths, truth, "strict") + 1) / 2


# ------------------------------------------------------------------------------- the paper's three scores

# RewardBench's sections, their subsets, and each subset's weight in its section: SUBSET_MAPPING and EXAMPLE_COUNTS
# in rewardbench/constants.py of github.com/allenai/reward-bench, version 0.1.4. Weights are the numbers of pairs, but
# for math-prm: its 447 pairs weigh as much as all code. https://arxiv.org/abs/2403.13787
REWARDBENCH = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
                  "hep-rust": 164},
}


def benchmark_figures(labels, values) -> dict[str, dict[str, dict]]:
    """One measure of many pairs -> a figure a subset, a section, and the plain mean of the sections.

    labels: (section, subset) of each pair. A subset that RewardBench does not know weighs as many pairs as it has.
    """
    parts: dict[str, dict[str, list]] = {section: {} for section in REWARDBENCH}
    for (section, subset), value in zip(labels, values):
        parts.setdefault(section, {}).setdefault(subset, []).append(value)
    figures, everything = {}, []
    for section, subsets in parts.items():
        if not subsets:
            continue
        figures[section], weighted, total = {}, [], 0
        for subset, part in subsets.items():
            figures[section][subset] = interval(part)
            if figures[section][subset]["count"]:
                weight = REWARDBENCH.get(section, {}).get(subset, len(part))
                weighted.append((part, weight))
                total += weight
        figures[section]["section"] = weighted_mean(weighted)
        everything += [(part, weight / total) for part, weight in weighted]
    figures["RewardBench"] = {"mean of the sections": weighted_mean(everything)}
    return figures


def pass_at_k(n: int, right: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k answers is right) from n >= k answers, `right` of them right:
    1 - C(n - right, k) / C(n, k). Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 2, 2), pass_at_k(4, 3, 2)
    (0.25, 0.8333333333333334, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts, answer: str) -> float:
    """maj@k: is the commonest final answer right? Of several commonest ones each counts its share.

    Two answers are the same where `verify_answer` finds them equal. A text without a final answer has no vote.

    >>> majority(["it is 4", "so 5", "4.0", "no idea"], "4"), majority(["4", "5"], "4"), majority(["no idea"], "4")
    (1.0, 0.5, 0.0)
    """
    votes: dict[str, int] = {}  # final answer -> how often
    for text in texts:
        given = final_answer(text)
        if given:
            same = [other for other in votes if verify_answer(text, other)]
            name = same[0] if same else given
            votes[name] = votes.get(name, 0) + 1
    commonest = [name for name, count in votes.items() if count == max(votes.values())]
    return mean(verify_answer(name, answer) for name in commonest) or 0.0


def length_controlled(preferences, lengths, reference_lengths) -> float | None:
    """The win rate had both answers been of one length: sigmoid(a) of the logistic model of AlpacaEval 2
    (https://arxiv.org/abs/2404.04475), fitted as its package fits it (L1 penalty, chosen by 5-fold cross-validation):

        P(win) = sigmoid(a + b tanh(d / std(d))),    d = characters of the reference - characters of the answer

    There a third term is the instruction's difficulty, known for its 805 instructions alone. Without it this is
    `length_controlled_minimal` of that package. preferences: 1 win, 0.5 tie, 0 loss, None unread. None below 5.

    >>> preferences = [1, 1, 0, 1, 0, 0.5] * 5
    >>> round(length_controlled(preferences, [90, 80, 20, 70, 30, 50] * 5, [50] * 30), 2)  # the longer one wins
    0.5
    """
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import GroupKFold

    read = np.array([value is not None for value in preferences])
    won = np.array([value for value in preferences if value is not None], float)
    if len(won) < 5:
        return None
    difference = np.subtract(reference_lengths, lengths).astype(float)
    if not difference.std() or not won.std():  # no difference in length, or none in preference: nothing to control
        return float(won.mean())
    feature = np.tanh(difference / difference.std(ddof=1))[read]
    # Each row stands in the fit twice, as a win and as a loss, weighted by its preference.
    inputs = np.tile(np.stack([feature, np.ones(len(won))], axis=1), (2, 1))
    labels = np.repeat([1, 0], len(won))
    folds = GroupKFold(5).split(inputs, labels, groups=np.tile(np.arange(len(won)), 2))
    model = LogisticRegressionCV(cv=list(folds), scoring="neg_log_loss", l1_ratios=(1,), solver="liblinear",
                                 random_state=123, fit_intercept=False, use_legacy_attributes=False)
    model.fit(inputs, labels, sample_weight=np.concatenate([won, 1 - won]))
    return float(1 / (1 + np.exp(-model.coef_[0, 1])))
