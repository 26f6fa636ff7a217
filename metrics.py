"""Scoring: from scores that have been read to figures with an interval. Pure functions; no model, no file.

Unknown is not zero: a judgement that cannot be read is None, and so is a figure that nothing was measured for.

A pair is judged in both orders: better_first holds its judgements with the better response shown first, worse_first
those with the worse one shown first. A judgement is [score of the first shown, score of the second] or None.
"""
import math
from collections import Counter
from itertools import combinations
from statistics import pstdev

import numpy as np
from scipy import stats

from data import Group
from rewards import final_answer, first_position_preference, kendall_tau, mean, parse_scores, verify_answer


def figure(value: float | None, count: int, low: float | None = None, high: float | None = None) -> dict:
    """A figure as it stands in the JSON: value, 95 % interval, number of rows (or of what is stated) behind it."""
    found = {"value": value, "low": low, "high": high}
    for name, number in found.items():
        found[name] = None if number is None else round(float(number), 4)
    found["count"] = count
    return found


def known(values) -> list:
    """What was measured: the values that are not None."""
    return [value for value in values if value is not None]


def interval(values) -> dict:
    """Mean of one value a row, and its 95 % interval (ours): Wilson's if all are 0 or 1, else a bootstrap over rows.

    Rows are the unit and not samples, since the samples of one row are no independent trials. None is left out.

    >>> interval([1, 0, 1, 1, None])
    {'value': 0.75, 'low': 0.3006, 'high': 0.9544, 'count': 4}
    >>> interval([None])
    {'value': None, 'low': None, 'high': None, 'count': 0}
    """
    values = list(map(float, known(values)))
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
        values = known(values)
        if values:
            samples.append(np.array(values, float))
            weights.append(weight)

    def statistic(*samples, axis=-1):
        means = [np.mean(values, axis) for values in samples]
        return np.average(means, axis=0, weights=weights)

    sizes = list(map(len, samples))
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
        read = known(order)
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
    read = known([*better_first, *worse_first])
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
    figures = {}
    for name in ("format", "unparsed", "both orders"):
        figures[name] = interval(rows[name])
    for part in sorted(set(parts)):
        values = [value for value, other in zip(rows["both orders"], parts) if other == part]
        figures[f"both orders, {part}"] = interval(values)
    figures["both orders, greedy"] = interval(greedy_rows["both orders"])
    for name in ("single order", "expected score", "order consistency", "first-position preference"):
        figures[name] = interval(rows[name])
    spread, lines = [], Counter()
    for better_first, worse_first in sampled:
        spread += expected_scores(better_first, worse_first) or ()
        lines.update(map(tuple, known([*better_first, *worse_first])))
    figures["spread of expected scores"] = figure(np.std(spread) if spread else None, len(spread))
    share = max(lines.values()) / lines.total() if lines else None
    figures["commonest line"] = figure(share, lines.total())
    return figures


def longer_wins(responses, truth) -> float:
    """What always preferring the longer response would earn on a row: 1 right, 0 wrong, 0.5 at equal lengths.

    >>> longer_wins(("short", "rather long"), (0, 1)), longer_wins(("same", "size"), (0, 1))
    (1.0, 0.5)
    """
    lengths = list(map(len, responses))
    return (kendall_tau(lengths, truth, "strict") + 1) / 2


# ------------------------------------------------------------------------------- answers, by hidden gold


def gold_figures(golds) -> dict[str, dict]:
    """Share of the answers with each part of the toy world's hidden gold, with all but the constraint, and with all.

    golds: for each row the `world.gold` of each of its answers. Rows are the unit.

    >>> part = {"on topic": True, "whole": True, "in order": True, "keeps the constraint": False}
    >>> [found["value"] for found in gold_figures([[part, part]]).values()]
    [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    """
    *text_parts, constraint = golds[0][0] if golds else ("", "")
    wanted = {name: [name] for name in [*text_parts, constraint]}
    wanted[", ".join(text_parts)] = text_parts
    wanted["all four"] = [*text_parts, constraint]
    figures = {}
    for name, parts in wanted.items():
        shares = [mean(all(gold[part] for part in parts) for gold in answers) for answers in golds]
        figures[name] = interval(shares)
    return figures


def gold_wins(after, before) -> dict:
    """How often an answer has more parts of the hidden gold than an answer of other weights to the same instruction.

    after, before: for each row the number of parts that each of its answers has. Every answer meets every answer of
    its row; a tie counts 0.5.

    >>> gold_wins([[4, 3]], [[3, 3]])["value"]
    0.75
    """
    wins = []
    for ours, others in zip(after, before, strict=True):
        wins.append(mean(credit(a - b) for a in ours for b in others))
    return interval(wins)


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
    won = np.array(known(preferences), float)
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


# ------------------------------------------------------------------------------- what a model could learn


def preference_probe(groups: list[Group]) -> dict[str, dict]:
    """P: each row stands in both orders, one group after the other. The row is the unit: its orders are averaged.

    A row of N responses counts as all its pairs, each seen with the better response first and with it last.
    """
    rows, pairs = [], []
    for group, mirrored in zip(groups[::2], groups[1::2]):
        truth = group.prompt.truth
        forward = [parse_scores(text, len(truth)) for text in group.texts]
        backward = [parse_scores(text, len(truth)) for text in mirrored.texts]
        taus = []
        for scores, reward in zip(forward + backward, group.rewards + mirrored.rewards):
            if scores:
                taus.append(reward)
        rows.append({"gradient": mean([group.has_signal, mirrored.has_signal]),
                     "format": len(taus) / len(forward + backward), "tau": mean(taus)})
        found, last = [], len(truth) - 1
        for i, j in combinations(range(len(truth)), 2):
            # Response i stands before j in `group`. In `mirrored` it stands at last - i, so behind j.
            better_first, worse_first = two(forward, i, j), two(backward, last - j, last - i)
            if truth[i] < truth[j]:
                better_first, worse_first = worse_first, better_first
            if truth[i] != truth[j]:
                found.append(pair_figures(better_first, worse_first))
        pair = {}
        for name, values in columns(found).items():
            pair[name] = mean(known(values))
        pairs.append(pair)
    figures, judged = summary(rows), summary(pairs)
    for name in ("single order", "order consistency", "first-position preference"):
        figures[name] = judged.get(name, figure(None, 0))
    return figures


def two(judged: list, first: int, second: int) -> list:
    """Of each judgement the scores at two positions; None stays None."""
    return [scores and [scores[first], scores[second]] for scores in judged]


def answer_probe(groups: list[Group]) -> dict[str, dict]:
    """R and I: which groups have a gradient, and what else can be seen of their answers."""
    rows = []
    for group in groups:
        row = {"gradient": group.has_signal, "cut off": 1 - mean(group.finished)}
        if group.prompt.kind == "reasoning":
            row["solved"] = mean(group.rewards)
        else:
            lengths = list(map(len, group.texts))
            read = []
            for judgement in group.judgements:
                read.append(parse_scores(judgement["text"], len(judgement["order"])))
            row["unparsed"] = read.count(None) / len(read)
            row["spread of self-scores"] = mean(map(pstdev, known(read)))
            row["correlation with length"] = group.rewards and kendall_tau(group.rewards, lengths)
        rows.append(row)
    return summary(rows)


def advice(kind: str, v: dict[str, float]) -> list[str]:
    """What stands in the way of one kind, and the flag to change. Empty where nothing does.

    v: its figures by name, nan where nothing was measured, so that no comparison holds. The thresholds are ours: a
    gradient below 0.1 is as good as none.
    """
    told, little = [], v["gradient"] < 0.1
    if kind == "preference":
        if v["format"] < 0.5:
            told.append(f"{v['format']:.0%} of judgements are readable: teach the format first, by a warm start "
                        "(docs/seed.md)")
        elif little:
            told.append("judgements are readable but all samples agree: raise --temperature")
        if v["tau, low"] <= 0:
            told.append(f"tau {v['tau']:.2f} cannot be told from no skill, so self-scores would be noise: raise "
                        "--warmup_steps or the share of P in --mix, or begin with a warm start (docs/seed.md)")
        if abs(v["first-position preference"]) > 0.25:
            told.append("it judges by position: --both_orders True")
    elif kind == "reasoning" and little:
        if v["solved"] >= 0.5:
            told.append(f"{v['solved']:.0%} solved, too easy: harder data (--reasoning)")
        elif v["cut off"] > 0.5:
            told.append(f"{v['cut off']:.0%} of answers are cut off: raise --max_answer_tokens")
        else:
            told.append(f"{v['solved']:.0%} solved, too hard: easier data (--reasoning) or another --model")
    elif kind == "instruction":
        if v["unparsed"] > 0.5:
            told.append(f"{v['unparsed']:.0%} of self-judgements are unreadable: lower --group, or begin with a warm "
                        "start (docs/seed.md)")
        elif little:
            told.append("one score for all answers: raise --temperature, or ground the judge by more P")
        if abs(v["correlation with length"]) > 0.5:
            told.append(f"self-scores go by length (tau {v['correlation with length']:.2f}): more P whose longer "
                        "response is the worse one")
    return told


def probe_verdicts(figures: dict[str, dict[str, dict]]) -> list[str]:
    """What each kind can teach this model in its first steps, what stands in the way, and which flag to change.

    >>> measured = {name: figure(value, 8) for name, value in (("gradient", 0), ("solved", 0), ("cut off", 0.1))}
    >>> probe_verdicts({"reasoning": measured})
    ['no gradient from R: 0% of groups have spread; 0% solved, too hard: easier data (--reasoning) or another --model']
    """
    told, values = [], {}
    for kind, part in figures.items():
        values[kind] = v = {}
        for name, cell in part.items():
            v[name] = math.nan if cell["value"] is None else cell["value"]
            v[f"{name}, low"] = math.nan if cell["low"] is None else cell["low"]
    gradients = [values[kind]["gradient"] for kind in ("preference", "reasoning") if kind in values]
    ignorant = gradients == [0, 0] and values["preference"]["format"] < 0.5 > values["reasoning"]["solved"]
    for kind, v in values.items():
        size = "no" if v["gradient"] == 0 else "hardly any" if v["gradient"] < 0.1 else "a"
        line = f"{size} gradient from {kind[0].upper()}: {v['gradient']:.0%} of groups have spread"
        told.append("; ".join([line, *([] if ignorant else advice(kind, v))]))
    if ignorant:  # a longer answer or a higher temperature would not help a model that knows neither
        told.append("neither its rankings can be read nor its answers are right, so nothing that has a truth teaches "
                    "it: begin with a warm start (docs/seed.md), or take another --model")
    return told


# ------------------------------------------------------------------------------- tables


def table(results: dict[str, dict], last: str = "", only=()) -> str:
    """Results side by side, a column each: value [95 % interval]. Last column: "change" from first to last, or "n".

    only: the (part, figure) pairs to show, in this order, where a result has them; by default all.

    >>> a, b = ({"figures": {"reasoning": {"accuracy": interval(v)}}} for v in ([1, 0, 0, 0], [1, 1, 1, 0]))
    >>> print(table({"before": a, "after": b}, "change"))
                            before             after              change
    reasoning     accuracy  0.25 [0.05, 0.70]  0.75 [0.30, 0.95]   +0.50
    """
    names = {}  # a set that keeps its order
    for result in results.values():
        for part, figures in result["figures"].items():
            for name in figures:
                names[part, name] = None
    names = [name for name in only if name in names] or list(names)
    lines = [["", "", *results, last]]
    for part, name in names:
        line, found = [part.ljust(12), name], []
        for result in results.values():
            cell = result["figures"].get(part, {}).get(name, figure(None, 0))
            found.append(cell)
            text = "-" if cell["value"] is None else f"{cell['value']:.2f}"
            line.append(text if cell["low"] is None else f"{text} [{cell['low']:.2f}, {cell['high']:.2f}]")
        before, after = found[0]["value"], found[-1]["value"]
        if last == "change":
            line.append("-" if None in (before, after) else f"{after - before:+.2f}".rjust(6))
        else:
            line.append(str(found[0]["count"]) if last else "")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)
