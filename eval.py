"""Measure a model, compare measurements, draw the curves of a run, and say why its rewards are what they are.

    python eval.py report runs/urpo                          -> runs/urpo/curves.png, runs/urpo/report.html
    python eval.py report runs/s0 runs/s1 runs/s2 --out docs/seeds.png --csv docs/seeds.csv
    python eval.py explain runs/urpo --step 3 --prompt 5     why the rewards of one prompt are what they are
    python eval.py explain runs/urpo --all                   every reward derived again; exit status 1 if one is wrong
    python eval.py heldout --model raw --json before.json    answers, judgements and constraints on held-out rows
    python eval.py heldout --model runs/urpo/checkpoints/last/model --json after.json
    python eval.py compare before.json after.json            the table that `make demo` ends with
    python eval.py probe --model raw --group 8               what could this model learn? Takes every flag of urpo.py
    python eval.py rewardbench --model M                     the paper's three scores: as a judge,
    python eval.py reasoning --model M --data openai/gsm8k:main HuggingFaceH4/MATH-500
    python eval.py alpacaeval --model M --data alpaca_eval.json --outputs model_outputs.json
    python eval.py alpacaeval --judge J --outputs model_outputs.json --against other.json

Prompts, referee's template, parsers and engine are those of training: data.py and rewards.py. The file falls into
1. scoring (pure functions, from parsed scores to figures), 2. the commands that run a model, 3. tables, 4. curves and
report.html, 5. explain, 6. the command line.
One rule of rewards.py holds here too: unknown is not zero. What was not measured is None, "-" or a gap.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
import shlex
import sys
from collections import Counter
from functools import lru_cache
from itertools import combinations, compress, groupby, islice
from pathlib import Path
from statistics import pstdev, stdev
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

import data
from data import InputError, Prompt, better_first, swapped
from rewards import (figures_of_kind, final_answer, first_position_preference, group_advantages, kendall_tau, mean,
                     parse_scores, preference_reward, self_rewards, verify_answer)

# ------------------------------------------------------------------------------------------ 1. scoring


def interval(values) -> dict:
    """Mean of one value a row with its 95 % interval (ours): Wilson's if all are 0 or 1, else a bootstrap over rows.

    Rows are the unit, not samples: samples of one row are no independent trials. None stands for "not measured"
    and is left out; of nothing, the mean is None too.

    >>> interval([1, 0, 1, 1])
    {'value': 0.75, 'low': 0.3006, 'high': 0.9544, 'count': 4}
    >>> interval([None])
    {'value': None, 'low': None, 'high': None, 'count': 0}
    """
    values = [float(value) for value in values if value is not None]
    if not values or set(values) - {0.0, 1.0}:
        return weighted_mean([(values, 1)])
    low, high = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return figure(mean(values), len(values), low, high)


def weighted_mean(parts) -> dict:
    """sum_i w_i mean(values_i) / sum_i w_i over parts (values, weight), and its 95 % interval by bootstrap: rows are
    drawn anew within each part, so that the parts keep their weights. None in values is left out, as in `interval`.

    >>> weighted_mean([([1, 1, 0, 0], 1), ([1, 1, None], 3)])
    {'value': 0.875, 'low': 0.75, 'high': 1.0, 'count': 6}
    """
    parts = [(np.array([value for value in values if value is not None], float), weight) for values, weight in parts]
    parts = [(values, weight) for values, weight in parts if len(values)]
    samples, weights = [values for values, _ in parts], np.array([weight for _, weight in parts])

    def statistic(*samples, axis=-1):
        return sum(weight * np.mean(values, axis) for weight, values in zip(weights, samples)) / weights.sum()

    low = high = None
    if samples and min(map(len, samples)) > 1:
        low, high = stats.bootstrap(samples, statistic, n_resamples=2000, method="percentile",
                                    rng=np.random.default_rng(0)).confidence_interval
    return figure(statistic(*samples) if samples else None, sum(map(len, samples)), low, high)


def figure(value: float | None, count: int, low: float | None = None, high: float | None = None) -> dict:
    """A figure as it stands in the JSON; `count` is the number of rows (or of what is stated) behind it."""
    rounded = [None if x is None else round(float(x), 4) for x in (value, low, high)]
    return dict(zip(("value", "low", "high"), rounded), count=count)


def expected_scores(better_first, worse_first) -> tuple[float, float] | None:
    """Mean score of (the better, the worse) over the samples of each order, then over both orders; None if an order
    has no readable judgement. An unbiased estimate of E[score] in which a preference for a position cancels (ours).

    Both arguments: S judgements of one pair, each [score of the first shown, score of the second] or None.

    >>> expected_scores([[9, 3], None], [[2, 8], [4, 6]])
    (8.0, 3.0)
    """
    orders = [[scores for scores in order if scores is not None] for order in (better_first, worse_first)]
    if not all(orders):
        return None
    forward, backward = (np.mean(order, axis=0) for order in orders)
    return tuple(round(float(x), 9) for x in (forward + backward[::-1]) / 2)


def pair_figures(better_first, worse_first) -> dict:
    """The figures of one pair judged S times in each order, arguments as above (ours, after D18).

    format          share of judgements that can be read
    both_orders     sample s is right in BOTH orders; a tie or an unread judgement is not right
    single_order    right in the order shown; a tie or an unread judgement is worth a coin, 0.5
    strict          right in the order shown; a tie or an unread judgement is worth 0
    expected        the expected scores have the right sign; a tie, or an order never read, 0.5
    consistent      the same winner in both orders, among samples read in both; a tie has no winner
    first_position  rewards.first_position_preference: -0.5 ... 0.5; blind to order is 0

    >>> list(pair_figures([[9, 3], [5, 5]], [[2, 8], None]).values())
    [0.75, 0.5, 0.75, 0.5, 1.0, 1.0, 0.0]
    """
    forward = [None if scores is None else scores[0] - scores[1] for scores in better_first]
    backward = [None if scores is None else scores[1] - scores[0] for scores in worse_first]
    read = [scores for scores in (*better_first, *worse_first) if scores is not None]
    both = [(a, b) for a, b in zip(forward, backward) if a is not None and b is not None]
    expected = expected_scores(better_first, worse_first)

    def credit(margin) -> float:
        return 0.5 if not margin else float(margin > 0)

    return {"format": len(read) / len(forward + backward),
            "both_orders": sum(a > 0 and b > 0 for a, b in both) / len(forward),
            "single_order": mean(map(credit, forward + backward)),
            "strict": mean((margin or 0) > 0 for margin in forward + backward),
            "expected": credit(expected and expected[0] - expected[1]),
            "consistent": mean(a * b > 0 for a, b in both),
            "first_position": first_position_preference(read) if read else None}


def referee_figures(greedy, sampled, parts=()) -> dict:
    """All pairs -> the referee's table. greedy, sampled: one (better_first, worse_first) a pair, as in `pair_figures`.

    `parts` names the part of the data that each pair belongs to; both-orders accuracy is then given for each part.
    "spread" is the deviation of the expected scores of all candidates, in points of the scale 1 ... 10; few samples
    inflate it. "commonest line" is the share of the most frequent pair of scores: 1 is a referee that does not read.
    """
    rows, greedy_rows = ([pair_figures(*orders) for orders in verdicts] for verdicts in (sampled, greedy))
    lines = Counter(tuple(scores) for orders in sampled for order in orders for scores in order if scores is not None)
    spread = [score for orders in sampled for score in expected_scores(*orders) or ()]
    figures = {"format": interval(row["format"] for row in rows),
               "unparsed": interval(1 - row["format"] for row in rows),
               "both orders": interval(row["both_orders"] for row in rows)}
    for part in sorted(set(parts)):
        figures[f"both orders, {part}"] = interval(row["both_orders"] for row, p in zip(rows, parts) if p == part)
    return figures | {
        "both orders, greedy": interval(row["both_orders"] for row in greedy_rows),
        "single order": interval(row["single_order"] for row in rows),
        "expected score": interval(row["expected"] for row in rows),
        "order consistency": interval(row["consistent"] for row in rows),
        "first-position preference": interval(row["first_position"] for row in rows),
        "spread of expected scores": figure(float(np.std(spread)) if spread else None, len(spread)),
        "commonest line": figure(max(lines.values()) / lines.total() if lines else None, lines.total())}


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
        known = [(part, REWARDBENCH.get(section, {}).get(subset, len(part))) for subset, part in subsets.items()
                 if any(value is not None for value in part)]
        figures[section] = {subset: interval(part) for subset, part in subsets.items()} | {
            "section": weighted_mean(known)}
        everything += [(part, weight / sum(weight for _, weight in known)) for part, weight in known]
    figures = {section: figures[section] for section, subsets in parts.items() if subsets}
    return figures | {"RewardBench": {"mean of the sections": weighted_mean(everything)}}


def pass_at_k(n: int, right: int, k: int) -> float:
    """The unbiased estimate of P(at least one of k answers is right) from n >= k answers, `right` of them right:
    1 - C(n - right, k) / C(n, k). Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 2, 2), pass_at_k(4, 3, 2)
    (0.25, 0.8333333333333334, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts, answer: str) -> float:
    """maj@k: is the commonest final answer right? Answers are the same where `verify_answer` finds them equal; texts
    without one have no vote; of several commonest ones each counts its share.

    >>> majority(["it is 4", "so 5", "4.0", "no idea"], "4"), majority(["4", "5"], "4"), majority(["no idea"], "4")
    (1.0, 0.5, 0.0)
    """
    votes: list[list] = []  # [final answer, how often, is it right]
    for text in texts:
        if given := final_answer(text):
            vote = next((vote for vote in votes if verify_answer(text, vote[0])), None)
            if vote is None:
                votes.append([given, 1, verify_answer(text, answer)])
            else:
                vote[1] += 1
    most = max((count for _, count, _ in votes), default=0)
    return mean(right for _, count, right in votes if count == most) or 0.0


def length_controlled(preferences, lengths, reference_lengths) -> float | None:
    """The win rate had both answers been of one length: sigmoid(a) of the logistic model of AlpacaEval 2
    (https://arxiv.org/abs/2404.04475), fitted as its package fits it (L1 penalty, chosen by 5-fold cross-validation):

        P(win) = sigmoid(a + b tanh(d / std(d))),    d = characters of the reference - characters of the answer

    There a third term is the instruction's difficulty, known for its 805 instructions alone; without it this is
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
    longer = np.subtract(reference_lengths, lengths).astype(float)
    if not longer.std() or not won.std():  # no difference in length, or none in preference: nothing to control
        return float(won.mean())
    feature = np.tanh(longer / longer.std(ddof=1))[read]
    rows = np.tile(np.stack([feature, np.ones(len(won))], axis=1), (2, 1))  # each stands as a win and as a loss,
    labels, weights = np.repeat([1, 0], len(won)), np.concatenate([won, 1 - won])  # weighted by its preference
    folds = GroupKFold(5).split(rows, labels, np.tile(np.arange(len(won)), 2))
    model = LogisticRegressionCV(cv=list(folds), scoring="neg_log_loss", l1_ratios=(1,), solver="liblinear",
                                 random_state=123, fit_intercept=False, use_legacy_attributes=False)
    return float(1 / (1 + np.exp(-model.fit(rows, labels, sample_weight=weights).coef_[0, 1])))


# ------------------------------------------------------------------- 2. the commands that run a model


def difficulty(pair: Prompt) -> str:
    """A builtin pair, better first: the hardest kind, where only the constraint tells, and the others."""
    return "good vs breaks" if data.LEVELS[int(pair.truth[1])] == "breaks the constraint" else "others"


def open_model(name: str):
    """(folder, tokenizer) of a model that can chat and has weights."""
    folder = data.model_folder(name)
    tokenizer = data.load_tokenizer(folder)
    data.encode_chat(tokenizer, "")  # refuses a tokenizer without chat template, before rows are read
    return folder, tokenizer


def open_engine(folder: str, args):
    """The engine with room for the longest prompt and answer."""
    needed = args.max_prompt_tokens + max(args.max_answer_tokens, args.max_referee_tokens)
    config = Path(folder) / "config.json"
    known = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    if known and needed > known:
        raise InputError(f"--max_prompt_tokens {args.max_prompt_tokens}: with the answer that makes {needed} tokens, "
                         f"and {folder} reads {known}; lower it, or --max_answer_tokens and --max_referee_tokens")
    return data.start_engine(folder, needed)


encoded = lru_cache(maxsize=2**16)(data.encode_prompt)  # `fitting` measures what `ask` then sends


def fitting(rows, tokenizer, args, source: str, what: str = "row") -> list[bool]:
    """Which rows fit, in either order of their responses. The others are left out, never cut, and this is said."""
    fits = [args.max_prompt_tokens >= max(len(encoded(tokenizer, shown, args.referee_shots))
                                          for shown in {row, swapped(row)}) for row in rows]
    dropped = f"{len(rows) - sum(fits)} of {len(rows)} longer than {args.max_prompt_tokens} tokens"
    if not any(fits):
        raise InputError(f"{source}: no valid {what} is left ({dropped}; --max_prompt_tokens)")
    if not all(fits):
        print(f"{source}: {dropped}, left out; --max_prompt_tokens", file=sys.stderr)
    return fits


class Answer(NamedTuple):
    text: str
    tokens: int
    finished: bool  # False: cut off


def ask(engine, tokenizer, prompts: list[Prompt], n: int, temperature: float, args) -> list[list[Answer]]:
    """n answers to every prompt in one call of the engine, which shows a progress bar."""
    print(f"{n} x {len(prompts)} answers at T = {temperature:g}", file=sys.stderr)
    limits = [args.max_referee_tokens if prompt.kind == "preference" else args.max_answer_tokens for prompt in prompts]
    seeds = [data.request_seed(args.seed, 0, i, "heldout") for i in range(len(prompts))]
    ids = [encoded(tokenizer, prompt, args.referee_shots) for prompt in prompts]
    outputs = data.generate(engine, ids, n, limits, seeds, temperature, progress=True)
    return [[Answer(tokenizer.decode(sample.token_ids, skip_special_tokens=True), len(sample.token_ids),
                    sample.finish_reason == "stop") for sample in output.outputs] for output in outputs]


def split_of(source: str, args) -> str:
    return "heldout" if source == "builtin" else args.split  # builtin takes any other name for its training split


def both_orders(pairs) -> list[Prompt]:
    return [*pairs, *map(swapped, pairs)]


def verdicts(answers: list[list[Answer]]) -> list[tuple]:
    """The answers to `both_orders(pairs)` -> (better_first, worse_first) of each pair, as in `pair_figures`."""
    scores = [[parse_scores(answer.text, 2) for answer in samples] for samples in answers]
    return list(zip(scores[: len(scores) // 2], scores[len(scores) // 2 :]))


def finish(args, figures: dict, printed: str) -> None:
    """The end of every command that measures: its table, and with --json a file that `compare` reads."""
    settings = {name: value for name, value in vars(args).items()
                if name not in ("command", "arguments", "model", "judge", "json", "flags")}
    result = {"model": args.model or args.judge, "command": shlex.join(["python", "eval.py", *args.arguments]),
              "settings": settings, "figures": figures}
    print(printed)
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1))


# ---- heldout ----


def heldout_rows(args, tokenizer) -> dict[str, list[Prompt]]:
    """The rows to measure, by kind, none twice: a repeated row is no independent trial. Pairs stand better first."""
    rows: dict[str, list[Prompt]] = {}
    for kind, flag in data.FLAGS.items():
        source, what = getattr(args, flag), "row"
        if source == "none":
            continue
        name = "builtin:2" if kind == "preference" and source == "builtin" else source
        found = data.load_source(kind, name, split="heldout", count=8 * args.rows)
        found = list({(row.instruction, row.responses): row for row in reversed(found)}.values())[::-1]
        if kind == "preference":
            what = "pair (two responses of different scores)"
            found = [row for row in map(better_first, found) if row]
        elif kind == "instruction" and source == "builtin":
            found = [row for row in found if row.check]
        found = found[: args.rows]
        rows[kind] = list(compress(found, fitting(found, tokenizer, args, f"--{flag} {source}", what)))
    if not rows:
        raise InputError("all three sources are none: there is nothing to measure")
    return rows


def heldout(args) -> None:
    """Answers, judgements and constraints on held-out rows: a table, and JSON for `compare` and `report`."""
    folder, tokenizer = open_model(args.model)
    rows = heldout_rows(args, tokenizer)
    pairs, questions, tasks = (rows.get(kind, []) for kind in data.KINDS)
    prompts = [*questions, *tasks, *both_orders(pairs)]
    engine = open_engine(folder, args)
    greedy = ask(engine, tokenizer, prompts, 1, 0.0, args)
    sampled = ask(engine, tokenizer, prompts, args.samples, 1.0, args)

    figures, first = {}, 0
    for name, part, passes in (("reasoning", questions, lambda row, text: verify_answer(text, row.answer)),
                               ("instructions", tasks, lambda row, text: data.complies(row.check, text))):
        if part:
            figures[name] = {
                label: interval(mean(passes(row, answer.text) for answer in answers) if row.answer or row.check
                                else None for row, answers in zip(part, given[first:]))  # no check in a file
                for label, given in (("greedy", greedy), ("sampled", sampled))}
            figures[name]["tokens an answer"] = interval(mean(answer.tokens for answer in answers)
                                                         for _, answers in zip(part, sampled[first:]))
        first += len(part)
    if pairs:
        parts = map(difficulty, pairs) if args.preferences == "builtin" else ()
        figures["referee"] = referee_figures(verdicts(greedy[first:]), verdicts(sampled[first:]), list(parts)) | {
            "longer wins": interval(data.longer_is_right(row.responses, row.truth) for row in pairs),
            "first wins, single order": figure(0.5, len(pairs)), "first wins, both orders": figure(0.0, len(pairs))}
    finish(args, figures, table({args.model: {"figures": figures}}, "n"))


# ---- rewardbench ----


def benchmark_pairs(args) -> tuple[list[tuple[str, str]], list[Prompt]]:
    """((section, subset) of each pair, the pairs, chosen response first). A row's own `section` wins over the map."""
    source, home = args.preferences, {subset: section for section, part in REWARDBENCH.items() for subset in part}
    rows = data.load_source("preference", source, split=args.split)
    if os.path.exists(source):
        with open(source, "rb") as lines:
            records = [json.loads(line) for line in lines if line.strip()]
    else:
        records = data.hub_records("preference", source, args.split)
    subsets = [str(record.get("subset") or "all") for record in records]
    labels = [(str(record.get("section") or home.get(subset, "other")), subset)
              for record, subset in zip(records, subsets)]
    found = [(label, pair) for label, pair in zip(labels, map(better_first, rows), strict=True) if pair]
    return [label for label, _ in found], [pair for _, pair in found]


def rewardbench(args) -> None:
    """The referee on labelled pairs, greedy, each in both orders (D18): a figure a subset, a section, and their mean.

    accuracy     right in the order shown; a tie or an unreadable judgement counts 0.5, as in the official script
    ties as 0    the same, but a tie or an unreadable judgement counts 0
    unparsed     share of unreadable judgements: how much of the two columns before is a coin or a zero for that
    consistent   the same winner in both orders, among pairs read in both
    longer wins  the accuracy of preferring the longer response; preferring the first one has 0.5 in every line
    """
    folder, tokenizer = open_model(args.model)
    labels, pairs = benchmark_pairs(args)
    fits = fitting(pairs, tokenizer, args, f"--data {args.preferences}", "pair (two responses of different scores)")
    labels, pairs = list(compress(labels, fits)), list(compress(pairs, fits))
    engine = open_engine(folder, args)
    rows = [pair_figures(*orders) for orders in verdicts(ask(engine, tokenizer, both_orders(pairs), 1, 0.0, args))]
    measures = {"accuracy": [row["single_order"] for row in rows], "ties as 0": [row["strict"] for row in rows],
                "unparsed": [1 - row["format"] for row in rows], "consistent": [row["consistent"] for row in rows],
                "first position": [row["first_position"] for row in rows],
                "longer wins": [data.longer_is_right(pair.responses, pair.truth) for pair in pairs]}
    columns = {name: benchmark_figures(labels, values) for name, values in measures.items()}
    figures: dict[str, dict] = {}
    for name, sections in columns.items():
        for section, subsets in sections.items():
            figures.setdefault(section, {}).update({f"{subset}: {name}": cell for subset, cell in subsets.items()})
    figures["RewardBench"]["pairs left out as too long"] = figure(len(fits) - sum(fits), len(fits))
    finish(args, figures, table({name: {"figures": sections} for name, sections in columns.items()}, "n")
           + "\nfirst wins: accuracy 0.50 in every line, since each pair stands in both orders")


# ---- reasoning ----


def reasoning(args) -> None:
    """pass@1 (greedy), and from k samples mean@k, pass@j and maj@k, for each set; of several sets the plain average."""
    folder, tokenizer = open_model(args.model)
    sets = {}
    for source in args.reasoning:
        rows = data.load_source("reasoning", source, split=split_of(source, args), count=512)
        rows = list(dict.fromkeys(rows))[: args.rows or None]  # a repeated row is no independent trial
        sets[source] = list(compress(rows, fitting(rows, tokenizer, args, f"--data {source}")))
    engine, k = open_engine(folder, args), args.samples
    prompts = [row for rows in sets.values() for row in rows]
    greedy = iter(ask(engine, tokenizer, prompts, 1, 0.0, args))
    sampled = iter(ask(engine, tokenizer, prompts, k, args.temperature, args))
    values: dict[str, dict[str, list]] = {}
    for source, rows in sets.items():
        part = values[source] = {}
        for row, one, many in zip(rows, islice(greedy, len(rows)), islice(sampled, len(rows))):
            right = int(sum(verify_answer(answer.text, row.answer) for answer in many))
            measured = {"pass@1, greedy": verify_answer(one[0].text, row.answer), f"mean@{k}": right / k,
                        f"maj@{k}": majority([answer.text for answer in many], row.answer)}
            measured |= {f"pass@{j}": pass_at_k(k, right, j) for j in (2**i for i in range(1, 20)) if j <= k}
            measured |= {"tokens an answer": mean(answer.tokens for answer in many),
                         "cut off": mean(not answer.finished for answer in many)}
            for name, value in measured.items():
                part.setdefault(name, []).append(value)
    figures = {source: {name: interval(column) for name, column in part.items()} for source, part in values.items()}
    if len(figures) > 1:
        figures["average"] = {name: weighted_mean([(part[name], 1) for part in values.values()])
                              for name in next(iter(values.values()))}
    finish(args, figures, table({args.model: {"figures": figures}}, "n"))


# ---- alpacaeval ----


def read_outputs(path: str, *fields: str) -> list[dict]:
    """A file as the `alpaca_eval` command reads and writes it: a JSON list of objects."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected a list of objects") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: expected a list of objects with {', '.join(fields)}")
    for i, record in enumerate(records):
        for field in fields:
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise InputError(f"{path}: entry {i} (from 0) has no text in field {field!r}")
    return records


def alpacaeval(args) -> None:
    """With --model: answers to --data, greedy, as the public `alpaca_eval` command expects them. With --judge: the win
    rate of --outputs over --against by any checkpoint as the judge, offline. One engine a process, so two commands."""
    folder, tokenizer = open_model(args.model or args.judge)
    if args.model:
        if args.instructions.endswith(".json"):
            records = read_outputs(args.instructions, "instruction")
            rows = [Prompt("instruction", record["instruction"]) for record in records]
        else:
            rows = data.load_source("instruction", args.instructions, split=split_of(args.instructions, args), count=64)
            records = [{}] * len(rows)
        fits = fitting(rows, tokenizer, args, f"--data {args.instructions}")
        rows = list(compress(rows, fits))
        answers = ask(open_engine(folder, args), tokenizer, rows, 1, 0.0, args)
        write_whole(args.outputs, json.dumps([
            {"instruction": row.instruction, "output": answer.text, "generator": args.name or args.model,
             "dataset": record.get("dataset") or Path(args.instructions).stem}
            for row, record, (answer,) in zip(rows, compress(records, fits), answers)], indent=1))
        print(f"{args.outputs}: {len(rows)} answers, {sum(not answer.finished for answer, in answers)} cut off at "
              f"--max_answer_tokens {args.max_answer_tokens}")
        return
    own, others = (read_outputs(path, "instruction", "output") for path in (args.outputs, args.against))
    reference = {record["instruction"]: record["output"] for record in others}
    pairs = [Prompt("preference", record["instruction"], (record["output"], reference[record["instruction"]]), (1, 0))
             for record in own if record["instruction"] in reference]
    if len(pairs) < len(own):
        print(f"{args.against}: has {len(pairs)} of the {len(own)} instructions of {args.outputs}", file=sys.stderr)
    pairs = list(compress(pairs, fitting(pairs, tokenizer, args, f"--against {args.against}", "pair")))
    orders = verdicts(ask(open_engine(folder, args), tokenizer, both_orders(pairs), 1, 0.0, args))
    rows = [pair_figures(*order) for order in orders]
    # One order alone would carry the judge's preference for a position: a win needs both to be read.
    preferences = [row["single_order"] if row["format"] == 1 else None for row in rows]
    lengths = [[len(pair.responses[i]) for pair in pairs] for i in (0, 1)]
    figures = {
        "win rate": interval(preferences),
        "length-controlled win rate": figure(length_controlled(preferences, *lengths),
                                             sum(value is not None for value in preferences)),
        "ties, a judgement": interval(scores[0] == scores[1] for order in orders for (scores,) in order if scores),
        "unparsed": interval(1 - row["format"] for row in rows),
        "order consistency": interval(row["consistent"] for row in rows),
        "first-position preference": interval(row["first_position"] for row in rows),
        "characters, own": interval(lengths[0]), "characters, the other's": interval(lengths[1])}
    finish(args, {"alpacaeval": figures}, table({f"{args.outputs} over {args.against}": {
        "figures": {"alpacaeval": figures}}}, "n") + f"\njudge: {args.judge}. Compare this rate only with rates of the "
        "same judge and the same reference: AlpacaEval's own are those of GPT-4.")


# ---- probe ----

# What stands in the way of each kind, and the flag to change: (kind, when, words). v: the figures by name, nan where
# nothing was measured, so that no rule applies. Thresholds are ours: below 0.1 a gradient is as good as absent.
RULES = (
    ("preference", lambda v: v["format"] < 0.5, "{format:.0%} of judgements are readable: teach the format first, by "
     "--referee_shots 2 or a warm start (--method sft)"),
    ("preference", lambda v: v["gradient"] < 0.1 and v["format"] >= 0.5,
     "judgements are readable but all samples agree: raise --temperature"),
    ("preference", lambda v: v["tau, low"] <= 0, "tau {tau:.2f} cannot be told from no skill, so self-scores would be "
     "noise: raise --warmup_steps or the share of P in --mix, or a warm start (--method sft)"),
    ("preference", lambda v: abs(v["first-position preference"]) > 0.25, "it judges by position: --both_orders True"),
    ("reasoning", lambda v: v["gradient"] < 0.1 and v["cut off"] > 0.5,
     "{cut off:.0%} of answers are cut off: raise --max_answer_tokens"),
    ("reasoning", lambda v: v["gradient"] < 0.1 and v["solved"] < 0.5 >= v["cut off"],
     "{solved:.0%} solved, too hard: easier data (--reasoning) or another --model"),
    ("reasoning", lambda v: v["gradient"] < 0.1 and v["solved"] >= 0.5,
     "{solved:.0%} solved, too easy: harder data (--reasoning)"),
    ("instruction", lambda v: v["unparsed"] > 0.5,
     "{unparsed:.0%} of self-judgements are unreadable: lower --group, or --referee_shots 2"),
    ("instruction", lambda v: v["gradient"] < 0.1 and v["unparsed"] <= 0.5,
     "one score for all answers: raise --temperature, or ground the judge by more P"),
    ("instruction", lambda v: abs(v["correlation with length"]) > 0.5,
     "self-scores go by length (tau {correlation with length:.2f}): more P whose longer response is the worse one"),
)


def probe_figures(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """The seed competence of a model, from groups as rollouts.jsonl records them; P rows stand in both orders, one
    after the other. "gradient" is the share of groups whose rewards differ: the others teach nothing (D9)."""
    P_lines, R_lines, I_lines = ([line for line in lines if line["kind"] == kind] for kind in data.KINDS)
    teaches = {kind: [any(sample["advantage"] for sample in line["samples"]) for line in part]
               for kind, part in zip(data.KINDS, (P_lines, R_lines, I_lines))}

    def two(line: dict, first: int, second: int) -> list:
        """The scores of two of the texts shown, one pair a sample."""
        return [sample["scores"] and [sample["scores"][first], sample["scores"][second]] for sample in line["samples"]]

    pairs = []  # N-way rows as all their pairs, each once with the better text first, once with the worse one first
    for line, mirrored in zip(P_lines[::2], P_lines[1::2]):
        last = len(line["truth"]) - 1
        for i, j in combinations(range(last + 1), 2):  # text i of `line` is text last - i of `mirrored`
            orders = [two(line, i, j), two(mirrored, last - j, last - i)]
            if line["truth"][i] != line["truth"][j]:
                pairs.append(pair_figures(*(orders if line["truth"][i] > line["truth"][j] else orders[::-1])))
    own = [referee_health([judgements_of(line)]) for line in I_lines]
    figures = {
        "preference": {
            "gradient": interval(teaches["preference"]),
            "format": interval(mean(bool(sample["scores"]) for sample in line["samples"]) for line in P_lines),
            "tau": interval(mean(sample["reward"] for sample in line["samples"] if sample["scores"])
                            for line in P_lines),
            "single order": interval(pair["single_order"] for pair in pairs),
            "order consistency": interval(pair["consistent"] for pair in pairs),
            "first-position preference": interval(pair["first_position"] for pair in pairs)},
        "reasoning": {
            "gradient": interval(teaches["reasoning"]),
            "solved": interval(mean(sample["reward"] for sample in line["samples"]) for line in R_lines),
            "cut off": interval(mean(not sample["finished"] for sample in line["samples"]) for line in R_lines)},
        "instruction": {
            "gradient": interval(teaches["instruction"]),
            "unparsed": interval(health["unparsed"] for health in own),
            "spread of self-scores": interval(health["deviation"] for health in own),
            "correlation with length": interval(health["length"] for health in own),
            "cut off": interval(mean(not sample["finished"] for sample in line["samples"]) for line in I_lines)}}
    return {kind: part for kind, part in figures.items() if part["gradient"]["count"]}


def probe_verdicts(figures: dict[str, dict[str, dict]]) -> list[str]:
    """What each kind can teach this model in its first steps, what stands in the way, and which flag to change.

    >>> def told(**values): return {name.replace("_", " "): figure(value, 8) for name, value in values.items()}
    >>> probe_verdicts({"reasoning": told(gradient=0.0, solved=0.0, cut_off=0.1)})
    ['no gradient from R: 0% of groups have spread; 0% solved, too hard: easier data (--reasoning) or another --model']
    """
    told = []
    for kind, part in figures.items():
        v = {f"{name}{end}": math.nan if cell[key] is None else cell[key] for name, cell in part.items()
             for end, key in (("", "value"), (", low", "low"))}
        size = "no" if v["gradient"] == 0 else "hardly any" if v["gradient"] < 0.1 else "a"
        told.append("; ".join([f"{size} gradient from {kind[0].upper()}: {v['gradient']:.0%} of groups have spread",
                               *(words.format(**v) for name, applies, words in RULES if name == kind and applies(v))]))
    return told


def probe(args) -> None:
    """Parts 1 to 4 of one training step, without its update, by the functions of urpo.py: what could a model learn?

    It takes every flag of urpo.py; each P row is drawn in both orders, and kinds have equal shares (0 stays 0).
    """
    import urpo

    config = urpo.parse_config([*args.flags, "--model", args.model])
    config.both_orders, config.warmup_steps, config.minibatches, config.resume = True, 0, 1, True
    data.mix_counts(config.mix, 0, warmup=False)  # refuses what is no mix
    config.mix = ":".join(str(min(1, int(share))) for share in config.mix.split(":"))
    config.batch = args.rows * config.mix.count("1")
    urpo.check_config(config, 1)
    folder, tokenizer = open_model(args.model)
    sources, _ = data.load_sources(config, tokenizer)
    batch = data.draw(sources, config.mix, config.batch, 0, config.seed, 0, both_orders=True)
    engine = open_engine(folder, config)
    groups = urpo.rollout(config, engine, tokenizer, list(enumerate(batch)), 0)
    urpo.self_score(config, engine, tokenizer, groups, 0)
    urpo.reward(config, groups)
    figures = probe_figures([data.describe(group, 0) for group in groups])
    finish(args, figures, "\n".join([table({args.model: {"figures": figures}}, "n"), *probe_verdicts(figures)]))


def write_whole(path: str | Path, content: str | bytes) -> None:
    """A file that is either complete or absent."""
    unfinished = Path(f"{path}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    unfinished.rename(path)


# ------------------------------------------------------------------------------------------- 3. tables


def table(results: dict[str, dict], last: str = "") -> str:
    """Results side by side, a column each: value [95 % interval]. Last column: "change" from first to last, or "n".

    >>> a, b = ({"figures": {"reasoning": {"accuracy": interval(v)}}} for v in ([1, 0, 0, 0], [1, 1, 1, 0]))
    >>> print(table({"before": a, "after": b}, "change"))
                            before             after              change
    reasoning     accuracy  0.25 [0.05, 0.70]  0.75 [0.30, 0.95]   +0.50
    """
    columns, names = list(results.values()), {}
    for result in columns:
        names |= {(part, name): None for part, figures in result["figures"].items() for name in figures}
    lines = [["", "", *results, last]]
    for part, name in names:
        found = [result["figures"].get(part, {}).get(name, figure(None, 0)) for result in columns]
        values = [cell["value"] for cell in found]
        cells = ["-" if cell["value"] is None else f"{cell['value']:.2f}" if cell["low"] is None else
                 f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]" for cell in found]
        if last == "change":
            cells.append("-" if None in values else f"{values[-1] - values[0]:+.2f}".rjust(6))
        else:
            cells.append(str(found[0]["count"]) if last else "")
        lines.append([part.ljust(12), name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def read_result(path: str) -> dict:
    """A JSON that `heldout` wrote."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write it with `python eval.py heldout --json {path}`") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error.msg}, line {error.lineno})") from None
    if not isinstance(content, dict) or not {"figures", "settings"} <= content.keys():
        raise InputError(f"{path}: no result of `python eval.py heldout` (no 'figures' and 'settings')")
    return content


def compare(args) -> None:
    """Two results of `heldout` side by side, and what differs in how they were measured."""
    before, after = read_result(args.before), read_result(args.after)
    print(table({"before": before, "after": after}, "change"))
    for name in before["settings"] | after["settings"]:
        a, b = before["settings"].get(name), after["settings"].get(name)
        if a != b:
            print(f"not measured alike: --{name} {a} before, {b} after")


# --------------------------------------------------------------------------- 4. curves and report.html

COLORS = {"preference": "tab:blue", "reasoning": "tab:orange", "instruction": "tab:green"}
P, R, I = data.KINDS


def of(figure: str, *kinds: str) -> dict[str, tuple[str, str]]:
    return {f"{kind}.{figure}": (kind, COLORS[kind]) for kind in kinds}


# Panel title -> {figure in log.jsonl: (label, colour)}. The CSV holds the same figures.
PANELS = {
    "reward: tau or -1 (P), share solved (R)": of("reward", P, R),
    "format rate": of("format", P, I),
    "Kendall's tau of readable verdicts": of("tau", P),
    "drift, nats a token (log)": {"drift_mean": ("mean", "tab:gray"), "drift_max": ("max", "tab:red")},
    "share of groups with zero spread": of("zero_spread", P, R, I),
    "distinct answers a group": of("distinct", P, R, I),
    "token entropy, nats": of("entropy", P, R, I),
    "first-position preference": of("first_position", P, I),
    "self-scores (I), points of 1 ... 10": {"instruction.reward": ("mean", COLORS[I]),
                                            "instruction.score_std": ("deviation in a judgement", "tab:olive")},
    "tokens an answer": of("length", P, R, I),
    "share of clipped tokens": {"clipped_low": ("low", "tab:purple"), "clipped_high": ("high", "tab:brown")},
    "gradient norm": {"grad_norm": ("before the clip", "tab:gray")},
}


def figure_of(line: dict, name: str) -> float:
    """One figure of a log line; nan where it was not measured, which draws a gap.

    >>> figure_of({"instruction": {"reward": 6.5, "format": None}}, "instruction.reward")
    6.5
    >>> figure_of({"instruction": {"reward": 6.5, "format": None}}, "instruction.format")
    nan
    """
    value = line
    for key in name.split("."):
        value = (value or {}).get(key)
    return math.nan if value is None else float(value)


def averaged(curves: list[dict[int, float]]) -> dict[int, float]:
    """{step: mean over the runs that measured it}; nan where none did.

    >>> averaged([{0: 1.0, 1: math.nan}, {0: 3.0, 1: 5.0}, {2: math.nan}])
    {0: 2.0, 1: 5.0, 2: nan}
    """
    steps = sorted({step for curve in curves for step in curve})
    means = [mean(curve[step] for curve in curves if not math.isnan(curve.get(step, math.nan))) for step in steps]
    return {step: math.nan if value is None else value for step, value in zip(steps, means)}


def read_lines(path: Path, fields: str, repairs: list[str]):
    """The lines of a run's .jsonl, one at a time. A last line that a crash cut short is left out; `repairs` says so."""
    cut = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, text in enumerate(lines, 1):
            if cut:
                raise InputError(f"{path}:{number - 1}: not JSON ({cut}); remove the line")
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                cut = error.msg
                continue
            for field in fields.split():
                if not isinstance(line, dict) or field not in line:
                    raise InputError(f"{path}:{number}: no {field!r}; not a line that urpo.py wrote")
            yield line
    if cut:
        repairs.append(f"{path}:{number}: the last line is incomplete and was left out")


def read_log(run: Path, repairs: list[str] | None = None) -> list[dict]:
    """The steps of a run."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{run}: no run here (no log.jsonl); give a folder such as runs/urpo")
    steps = list(read_lines(path, "step", [] if repairs is None else repairs))
    if not steps:
        raise InputError(f"{path}: no step is complete yet")
    return steps


def read_about(run: Path) -> dict:
    """The run's config.json; {} where there is none."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); remove it or restore it") from None


def report(args) -> None:
    """Curves of one run, with its heldout*.json; or of several overlaid: a thin line each, a thick one their mean.
    Of one run also report.html: the curves, the referee's health and the trajectories in one file without network."""
    runs, repairs = [Path(run) for run in args.runs], []
    if len(runs) > 1 and not args.out:
        raise InputError("several runs: give --out FILE for their picture")
    logs = [read_log(run, repairs) for run in runs]
    about = read_about(runs[0])
    measured = sorted(runs[0].glob("heldout*.json"), key=lambda path: path.stat().st_mtime)  # as time went
    results = {path.stem: read_result(path) for path in measured} if len(runs) == 1 else {}
    rollouts = read_rollouts(runs[0], args.groups, about.get("config", {}), repairs) if len(runs) == 1 else None
    for repair in repairs:
        print(repair, file=sys.stderr)
    curves = draw_curves([run.name for run in runs], logs, about, results)
    page = rollouts and write_page(runs[0].resolve().name, logs[0], about, curves, rollouts, repairs)
    out = args.out or runs[0] / "curves.png"
    write_whole(out, curves)
    print(out)
    if page:
        write_whole(runs[0] / "report.html", page)
        print(runs[0] / "report.html")
    if args.csv:
        names = [name for curves in PANELS.values() for name in curves]
        lines = [",".join(["run", "step", *names])]
        for run, log in zip(runs, logs):  # an empty field: not measured
            lines += [",".join([run.name, str(line["step"]), *("" if math.isnan(x) else f"{x:.6g}" for x in (
                figure_of(line, name) for name in names))]) for line in log]
        write_whole(args.csv, "\n".join(lines) + "\n")
        print(args.csv)


def new_picture(width: float, height: float, title: str = ""):
    """A drawing that belongs to no window; `.savefig` writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    if title:
        drawing.suptitle(title, parse_math=False)
    return drawing


def png(drawing, dpi: int) -> bytes:
    for axis in drawing.axes:
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.has_data() and axis.axison:
            axis.set_yticks([], [])
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="gray")
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def draw_curves(names: list[str], logs: list[list[dict]], about: dict, results: dict[str, dict]) -> bytes:
    """The picture of PANELS, of the seconds of the seven parts and of what was measured held out."""
    warmup = about.get("config", {}).get("warmup_steps", 0)
    drawing = new_picture(17, 14, f"{', '.join(names)}, from model {about.get('weights', 'unknown')}")
    grid = drawing.add_gridspec(4, 4)
    seconds = drawing.add_subplot(grid[3, :2] if results else grid[3, :], title="seconds of the seven parts")
    for i, (title, curves) in enumerate(PANELS.items()):
        axis = drawing.add_subplot(grid[i // 4, i % 4], title=title, sharex=seconds)
        for name, (label, color) in curves.items():
            each = [{line["step"]: figure_of(line, name) for line in log} for log in logs]
            curve = averaged(each)
            if all(map(math.isnan, curve.values())):
                continue
            for thin in each if len(each) > 1 else []:
                axis.plot(thin.keys(), thin.values(), color=color, linewidth=0.6, alpha=0.5)
            axis.plot(curve.keys(), curve.values(), color=color, label=label, marker=".", markersize=3)
            axis.legend(fontsize=7, frameon=False)
            axis.set_yscale("log" if "(log)" in title else "linear")
    parts = list(logs[0][0].get("seconds", {}))
    curves = [averaged([{line["step"]: figure_of(line, f"seconds.{part}") for line in log} for log in logs])
              for part in parts]
    if parts:
        seconds.stackplot(list(curves[0]), *(curve.values() for curve in curves), labels=parts)
        seconds.legend(fontsize=7, frameon=False, loc="upper left", ncols=4)
    seconds.locator_params(axis="x", integer=True)  # of all panels: they share the axis
    for axis in drawing.axes:
        axis.set_xlabel("step")
        if axis.has_data() and 0 < warmup <= max(line["step"] for log in logs for line in log):
            axis.axvline(warmup - 0.5, color="black", linewidth=0.6)  # instructions join: the judge rewards itself
    if results:
        text = drawing.add_subplot(grid[3, 2:], title="held out: value [95 % interval]")
        text.axis("off")
        text.text(0, 1, table(results), family="monospace", fontsize=7, va="top")
    return png(drawing, 100)


# ---- the referee's health: from rollouts.jsonl, beside what two judges that read nothing would show ----


class Judgement(NamedTuple):
    scores: tuple[float, ...] | None  # in the order shown; None: unreadable
    lengths: tuple[int, ...]  # characters of each judged text, in the same order
    truth: tuple[float, ...] | None  # P: the true scores, in the same order; I: nobody knows them


HEALTH = {  # figure -> (title, how to read it)
    "unparsed": ("unreadable judgements, share", "P: reward -1; I: the group teaches nothing"),
    "tied": ("one score for all, share of readable", "no order, so no gradient"),
    "distinct": ("distinct score lines a group", "of the readable judgements of one prompt; at 1 the samples agree, "
                 "and P has no gradient. I: only with --judgements above 1"),
    "commonest": ("share of the commonest score line", "among readable lines of equal length; 1 where a step has one"),
    "entropy": ("entropy of the scores, nats", "of the histogram above; a constant line of unequal scores has some"),
    "deviation": ("deviation within a line, points", "a constant line of unequal scores has it too"),
    "first_position": ("first-position preference", "0: blind to order, in expectation"),
    "length": ("rank correlation of score with length", "Kendall's tau-b with the characters of the judged text, "
               "a judgement at a time; on P the better text may well be the longer one"),
    "tau": ("Kendall's tau with the truth", "of readable judgements; what the constant line has here is noise"),
}
PROBE = {  # figure under "probe" in log.jsonl -> (title, always one score for all, always one line, how to read it)
    "first_position": ("first-position preference", "0", "0 or ±0.5",
                       "fixed pairs judged in both orders: real differences of quality cancel"),
    "self_preference": ("own answer above a frozen copy's, points", "0", "0", "answers of equal hidden-gold quality"),
    "empty": ("an empty answer above an honest one, points", "0", "0", "hack; below 0: seen through"),
    "ten_of_ten": ("“give this answer 10 out of 10” above an honest one, points", "0", "0",
                   "hack; below 0: seen through"),
    "repetition": ("a very long repetition above an honest one, points", "0", "0", "hack; below 0: seen through"),
    "copy": ("a text and its own copy apart, points", "0", "s1 and s2 apart",
             "hack; 0 is right, and also what one score for all gives"),
}
JUDGES = ("run", "one score", "one line")


def judgements_of(group: dict) -> list[Judgement]:
    """The judgements in a line of rollouts.jsonl: on P the G samples, on I the K self-judgements, on R none."""
    if group["kind"] == "preference":
        lengths = tuple(len(text) for text in group["responses"])
        return [Judgement(sample["scores"] and tuple(sample["scores"]), lengths, tuple(group["truth"]))
                for sample in group["samples"]]
    verdicts = [(parse_scores(judgement["text"], len(judgement["order"])), judgement["order"])
                for judgement in group["judgements"]]
    return [Judgement(scores and tuple(scores), tuple(len(group["samples"][i]["text"]) for i in order), None)
            for scores, order in verdicts]


rank_correlation = lru_cache(maxsize=2**16)(kendall_tau)  # scipy takes 0.3 ms a call, and score lines repeat


def referee_health(groups: list[list[Judgement]]) -> dict[str, float | None]:
    """HEALTH of some judgements, listed by prompt (ours). None: not measured.

    >>> right, wrong = (Judgement(scores, (40, 10), (1.0, 0.0)) for scores in ((9.0, 2.0), (2.0, 9.0)))
    >>> figures = referee_health([[right, wrong], [right, right._replace(scores=None)]])
    >>> [figures[name] for name in ("unparsed", "tied", "distinct", "first_position", "length")]
    [0.25, 0.0, 2.0, 0.16666666666666666, 0.3333333333333333]
    """
    everything = [judgement for group in groups for judgement in group]
    read = [judgement for judgement in everything if judgement.scores]
    by_group = [[judgement.scores for judgement in group if judgement.scores] for group in groups]
    lines = {}
    for judgement in read:
        lines.setdefault(len(judgement.scores), Counter())[judgement.scores] += 1
    histogram = Counter(score for judgement in read for score in judgement.scores)
    return {
        "unparsed": mean(not judgement.scores for judgement in everything),
        "tied": mean(len(set(judgement.scores)) == 1 for judgement in read),
        "distinct": mean(len(set(scores)) for scores in by_group if len(scores) > 1),  # of one, 1 says nothing
        "commonest": sum(max(count.values()) for count in lines.values()) / len(read) if read else None,
        "entropy": float(stats.entropy(list(histogram.values()))) if read else None,
        "deviation": mean(pstdev(judgement.scores) for judgement in read),
        "first_position": first_position_preference([judgement.scores for judgement in read]) if read else None,
        "length": mean(rank_correlation(judgement.scores, judgement.lengths) for judgement in read),
        "tau": mean(rank_correlation(judgement.scores, judgement.truth) for judgement in read if judgement.truth),
    }


def constant_judges(steps: dict[int, list[list[Judgement]]]) -> dict[str, dict[int, tuple[float, ...]]]:
    """Two judges that read nothing, {texts shown: scores}: one score for all, and the run's own commonest line.

    >>> usual, other = (Judgement(scores, (40, 10), None) for scores in ((9.0, 2.0), (5.0, 6.0)))
    >>> constant_judges({0: [[usual, other]], 1: [[usual, usual]]})
    {'one score': {2: (5.0, 5.0)}, 'one line': {2: (9.0, 2.0)}}
    """
    lines = {}
    for judgement in (judgement for groups in steps.values() for group in groups for judgement in group
                      if judgement.scores):
        lines.setdefault(len(judgement.scores), Counter())[judgement.scores] += 1
    return {"one score": {n: (5.0,) * n for n in sorted(lines)},
            "one line": {n: lines[n].most_common(1)[0][0] for n in sorted(lines)}}


def health_curves(steps: dict[int, list[list[Judgement]]], constant: dict) -> dict[str, dict[str, dict]]:
    """{judge: {figure: {step: value}}}: the run's judge, then the constant ones in its place on the same texts."""
    curves = {judge: {figure: {} for figure in HEALTH} for judge in JUDGES}
    for step, groups in steps.items():
        for judge in JUDGES:
            shown = groups if judge == "run" else [
                [judgement._replace(scores=constant[judge][len(judgement.lengths)]) for judgement in group
                 if len(judgement.lengths) in constant[judge]] for group in groups]
            for figure, value in referee_health(shown).items():
                curves[judge][figure][step] = value
    return curves


def at_start_and_end(curve: dict[int, float | None]) -> tuple[float | None, float | None]:
    """Means of the first and of the last fifth of the measured steps.

    >>> at_start_and_end({0: 1.0, 1: None, 2: 3.0}), at_start_and_end({0: None})
    ((1.0, 3.0), (None, None))
    """
    values = [value for value in curve.values() if value is not None and not math.isnan(value)]
    fifth = max(1, len(values) // 5)
    return mean(values[:fifth]), mean(values[-fifth:])


def health_table(health: dict, log: list[dict]) -> list[tuple[str, list[dict]]]:
    """(heading, rows) of report.html: P and I from the trajectories, the probes from the log."""
    parts = []
    for kind, heading in ((P, "judging given responses (P): trained"), (I, "judging its own answers (I): not trained")):
        curves = health[kind]
        names = [name for name in HEALTH if name != "tau" or kind == P]  # nobody knows the true order of I
        parts.append((heading, [{
            "title": HEALTH[name][0], "reading": HEALTH[name][1],
            "values": [*at_start_and_end(curves["run"][name]),
                       *(mean(value for value in curves[judge][name].values() if value is not None)
                         for judge in JUDGES[1:])]} for name in names]))
    rows = [{"title": title, "reading": reading, "values": [*at_start_and_end(probe_curve(log, name)), one, line]}
            for name, (title, one, line, reading) in PROBE.items()]
    return [*parts, ("a fixed probe set (--probe_every)", rows)]


def probe_curve(log: list[dict], name: str) -> dict[int, float]:
    return {line["step"]: value for line in log if not math.isnan(value := figure_of(line, f"probe.{name}"))}


def draw_health(health: dict, steps: dict, log: list[dict]) -> bytes:
    """HEALTH over the steps, solid; a constant judge on the same texts, dashed and dotted; histograms of the scores."""
    drawing = new_picture(17, 13)
    grid = drawing.add_gridspec(4, 4)
    for i, (name, (title, _)) in enumerate(HEALTH.items()):
        axis = drawing.add_subplot(grid[i // 4, i % 4], title=title)
        for kind in (P, I):
            for judge, style in zip(JUDGES, ("-", "--", ":")):
                curve = {step: value for step, value in health[kind][judge][name].items() if value is not None}
                if judge != "run" and curve:
                    curve = dict.fromkeys((min(curve), max(curve)), mean(curve.values()))
                if curve:
                    axis.plot(curve.keys(), curve.values(), style, color=COLORS[kind], linewidth=1,
                              marker="." if judge == "run" else None, markersize=3,
                              label=f"{kind}, {judge}" if judge != "run" else kind)
    axis = drawing.axes[0]
    if axis.lines:
        axis.legend(fontsize=7, frameon=False)
    names = list(PROBE)
    for cell, title, names in ((1, "probe set: first-position preference", names[:1]),
                               (2, "probe set: points above the other text", names[1:])):
        axis = drawing.add_subplot(grid[2, cell], title=title)
        for name in names:
            if curve := probe_curve(log, name):
                axis.plot(curve.keys(), curve.values(), marker=".", markersize=3, label=name)
                axis.legend(fontsize=7, frameon=False)
        if axis.lines:
            axis.axhline(0, linestyle="--", linewidth=1, color="gray")
    key = drawing.add_subplot(grid[2, 3])
    key.axis("off")
    key.text(0, 1, "solid: the judge of this run\ndashed: a judge that gives one score to all\n"
             "dotted: a judge that always writes\n   this run's commonest line", va="top", fontsize=9)
    for kind, cell in ((P, grid[3, :2]), (I, grid[3, 2:])):
        axis = drawing.add_subplot(cell, title=f"histogram of the scores, {kind}: share of a step's scores")
        values = {step: [round(score) for group in groups for judgement in group for score in judgement.scores or ()]
                  for step, groups in steps[kind].items()}
        if any(values.values()):
            shares_SV = [[row.count(v) / max(1, len(row)) for v in range(1, 11)] for row in values.values()]
            axis.imshow(np.transpose(shares_SV), origin="lower", aspect="auto", cmap="Greys", vmin=0, vmax=1,
                        interpolation="nearest", extent=(-0.5, len(values) - 0.5, 0.5, 10.5))
            labels = list(values)
            ticks = range(0, len(labels), max(1, len(labels) // 10))
            axis.set_xticks(ticks, [labels[i] for i in ticks])
            axis.set_yticks(range(1, 11))
    for axis in drawing.axes:
        axis.set_xlabel("step")
    return png(drawing, 80)


# ---- trajectories, and the page ----

RECORDED = {P: ("responses", "truth"), R: ("answer",), I: ("judgements",)}
SAMPLED = ("text", "ids", "finished", "scores", "reward", "advantage")
EMBEDDED = 1000  # groups of answers that report.html holds unless --groups says otherwise; a browser opens it at once


def explanation(group: dict, config: dict) -> dict:
    """A line of rollouts.jsonl as report.html and `explain` show it: with what the judge was shown, who scored which
    answer, mean and unbiased deviation of the rewards, and the rule that makes advantages of them. [] are the rewards
    of a group without any. Of the token ids only their number is kept."""
    kind, check = group["kind"], group.get("check")
    rewards = [sample["reward"] for sample in group["samples"]]
    rewards = [] if None in rewards else rewards
    prompt = Prompt(kind, group["instruction"], tuple(group.get("responses", ())))
    return {
        **{name: group.get(name) for name in ("step", "index", "kind", "instruction", "responses", "truth", "answer")},
        "prompt": data.prompt_text(prompt) if kind != "instruction" else None, "check": check,
        "rewards": rewards, "mean": mean(rewards),
        "std": stdev(rewards) if len(rewards) > 1 else 0.0 if rewards else None,
        "rule": "1, since worked answers are imitated" if config.get("method") == "sft" else
        f"{'reward - mean' if config.get('advantage') == 'center' else '(reward - mean) / (std + 1e-6)'}, and 0 for "
        "all where the std is below 1e-6",
        "samples": [{**{name: sample[name] for name in ("text", "scores", "reward", "advantage", "finished")},
                     "tokens": len(sample["ids"]), "complies": check and data.complies(check, sample["text"])}
                    for sample in group["samples"]],
        "judgements": [judgement | {"scores": parse_scores(judgement["text"], len(judgement["order"]))}
                       for judgement in group.get("judgements", ())]}


def read_groups(path: Path, repairs: list[str]):
    """The lines of rollouts.jsonl, each with every field from which its rewards can be derived again."""
    for group in read_lines(path, "step index kind instruction samples", repairs):
        missing = [f"kind of {', '.join(data.KINDS)}"] if group["kind"] not in data.KINDS else [
            *(field for field in RECORDED[group["kind"]] if field not in group),
            *(field for sample in group["samples"] for field in SAMPLED if field not in sample)]
        if missing:
            raise InputError(f"{path}: step {group['step']}, prompt {group['index']}: no {missing[0]}; "
                             "not a line that urpo.py wrote")
        yield group


def read_rollouts(run: Path, most: int, config: dict, repairs: list[str]) -> tuple[dict, list[dict], Counter]:
    """rollouts.jsonl in one pass -> (judgements {kind: {step: groups}}, at most `most` groups explained, counts).

    The groups kept are evenly spaced within each kind: whenever there are too many, every second one goes. A supervised
    run has worked answers on P, which are nobody's judgements.
    """
    path, steps, kept, counts = run / "rollouts.jsonl", {P: {}, I: {}}, {kind: [] for kind in data.KINDS}, Counter()
    stride = dict.fromkeys(data.KINDS, 1)
    if not path.is_file():
        return steps, [], counts
    for group in read_groups(path, repairs):
        kind = group["kind"]
        if kind in steps and config.get("method") != "sft":
            steps[kind].setdefault(group["step"], []).append(judgements_of(group))
        if counts[kind] % stride[kind] == 0:
            kept[kind].append(explanation(group, config))
            if len(kept[kind]) > max(1, most // len(data.KINDS)):
                kept[kind], stride[kind] = kept[kind][::2], 2 * stride[kind]
        counts[kind] += 1
        counts["trajectories"] += len(group["samples"])
    groups = sorted((group for part in kept.values() for group in part), key=lambda g: (g["step"], g["index"]))
    counts["groups"] = sum(counts[kind] for kind in data.KINDS)
    return steps, groups, counts


def write_page(name: str, log: list[dict], about: dict, curves: bytes, rollouts: tuple, repairs: list[str]) -> str:
    """report.html from report.html.jinja. Every text of the run is escaped by the template engine (autoescape)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    steps, groups, counts = rollouts
    constant = {kind: constant_judges(part) for kind, part in steps.items()}
    health = {kind: health_curves(part, constant[kind]) for kind, part in steps.items()}
    engine = Environment(loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=True,
                         undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {
        "number": lambda x: "not measured" if x is None else x if isinstance(x, str) else f"{round(x, 3) + 0:g}",
        "png": lambda image: "data:image/png;base64," + base64.b64encode(image).decode(),
        "scores": lambda scores: "unreadable" if scores is None else ", ".join(f"{score:g}" for score in scores),
        "sha256": lambda text: "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}
    page = engine.get_template("report.html.jinja").render(
        run=name, about=about, repairs=repairs, log=log, curves=curves, groups=groups, counts=counts,
        shown=sum(len(group["samples"]) for group in groups), kinds=data.KINDS, constant=constant,
        health=health_table(health, log), picture=draw_health(health, steps, log),
        supervised=about.get("config", {}).get("method") == "sft")
    return page.encode("utf-8", "replace").decode()  # half of a surrogate pair, which JSON may hold


# ------------------------------------------------------------------------------------------ 5. explain


def derive(group: dict, config: dict) -> list[dict]:
    """Scores, reward and advantage of each sample of a line of rollouts.jsonl, from its texts alone by rewards.py.

    >>> config = {"method": "urpo", "tau": "b", "advantage": "std"}
    >>> samples = [{"text": "so 5"}, {"text": "it is 4"}]
    >>> derive({"kind": "reasoning", "answer": "4", "samples": samples}, config)[1]
    {'scores': None, 'reward': 1.0, 'advantage': 0.7071057558059692}
    """
    texts = [sample["text"] for sample in group["samples"]]
    scores, rewards = [None] * len(texts), None
    if group["kind"] == "preference":
        scores = [parse_scores(text, len(group["truth"])) for text in texts]
        rewards = [preference_reward(text, group["truth"], config["tau"]) for text in texts]
    elif group["kind"] == "reasoning":
        rewards = [verify_answer(text, group["answer"]) for text in texts]
    elif config["method"] == "urpo":
        rewards = self_rewards(*([judgement[name] for judgement in group["judgements"]] for name in ("text", "order")))
    if config["method"] == "sft":  # worked answers: given, not earned
        rewards = advantages = [1.0] * len(texts)
    elif rewards is None:  # no judgement could be read (D8)
        rewards, advantages = [None] * len(texts), [0.0] * len(texts)
    else:
        advantages = group_advantages(torch.tensor(rewards), config["advantage"]).tolist()
    return [dict(zip(("scores", "reward", "advantage"), values)) for values in zip(scores, rewards, advantages)]


def agree(a, b) -> bool:
    """Equal but for float32 rounding; None, which is unknown, equals None alone.

    >>> agree([9, 2.0], [9.0, 2]), agree(0.7071058, 0.70710576), agree(None, 0.0), agree(math.nan, math.nan)
    (True, True, False, True)
    """
    return a == b or None not in (a, b) and np.shape(a) == np.shape(b) and np.allclose(a, b, atol=1e-6, equal_nan=True)


def differences(group: dict, config: dict) -> list[str]:
    """What a line of rollouts.jsonl records and its texts do not bear out."""
    where = f"step {group['step']}, prompt {group['index']}"
    try:
        derived = derive(group, config)
    except ValueError as error:
        return [f"{where}: {error}"]
    return [f"{where}, answer {i}: {name} {sample[name]} recorded, {value} derived"
            for i, (sample, own) in enumerate(zip(group["samples"], derived), 1) for name, value in own.items()
            if not agree(sample[name], value)]


def shown(text: str) -> str:
    """A text of the run as a terminal may show it: indented, its control characters spelled out."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "\n".join("    | " + line for line in safe.split("\n"))


def in_words(group: dict, config: dict) -> str:
    """One group as recorded: what was asked, what was answered, who judged it how, and what that makes."""
    told = explanation(group, config)
    lines = [f"step {told['step']}, prompt {told['index']}: {told['kind']}", "question", shown(told["instruction"])]
    if told["truth"]:
        lines += ["judge prompt", shown(told["prompt"]), f"true scores, as shown: {told['truth']}"]
    if told["answer"]:
        lines += ["true answer", shown(told["answer"])]
    for i, sample in enumerate(told["samples"], 1):
        lines += [f"answer {i}, {sample['tokens']} tokens{'' if sample['finished'] else ', cut off'}",
                  shown(sample["text"])]
        if told["truth"]:
            lines.append("scores: unreadable, which earns -1 (D4)" if not sample["scores"] else
                         f"scores: {sample['scores']}, "
                         f"tau {kendall_tau(sample['scores'], told['truth'], config['tau']):.4g}")
    for judgement in told["judgements"]:
        lines += [f"judge prompt over answers {', '.join(str(i + 1) for i in judgement['order'])}, in this order",
                  shown(judgement["prompt"]), "judge text", shown(judgement["text"]),
                  f"scores: {judgement['scores'] or 'unreadable'}"]
    for i, sample in enumerate(told["samples"], 1):
        reward = "none, no judgement can be read (D8)" if sample["reward"] is None else f"{sample['reward']:.4g}"
        lines.append(f"answer {i}: reward {reward}, advantage {sample['advantage']:.4g}")
    if told["rewards"]:
        lines.append(f"mean {told['mean']:.4g}, unbiased std {told['std']:.4g}; advantage = {told['rule']}")
    return "\n".join(lines)


def explain(args) -> None:
    """Why the rewards of a run are what they are: one prompt in full, or every number of the run derived again.

    With --all the figures of log.jsonl are derived too. Exit status 1 and each difference where the record is wrong.
    """
    run, repairs, wrong, found, told = Path(args.run), [], [], Counter(), 0
    log = {line["step"]: line for line in read_log(run, repairs)}
    expected = {step: sum(line[kind]["prompts"] for kind in data.KINDS if kind in line) for step, line in log.items()}
    path, config = run / "rollouts.jsonl", read_about(run).get("config", {})
    if not path.is_file() or not {"method", "tau", "advantage", "rollouts_every"} <= config.keys():
        raise InputError(f"{run}: no rollouts.jsonl, or no config.json with the run's settings: nothing to derive from")
    for step, groups in groupby(read_groups(path, repairs), key=lambda group: group["step"]):
        groups = list(groups)
        found[step] += len(groups)
        for group in groups if args.all else [g for g in groups if (step, g["index"]) == (args.step, args.prompt)]:
            told += len(group["samples"])
            wrong += differences(group, config)
            if not args.all:
                print(in_words(group, config))
        if args.all and found[step] == expected.get(step):
            for kind in data.KINDS:
                logged = log[step].get(kind, {})
                derived = figures_of_kind([group for group in groups if group["kind"] == kind])
                wrong += [f"step {step}: {kind}.{name} is {logged[name]} in log.jsonl, {value} derived"
                          for name, value in derived.items() if name in logged and not agree(logged[name], value)]
    for step in sorted(log.keys() | found.keys()) if args.all else ():
        number = expected.get(step, 0) if step % config["rollouts_every"] == 0 else 0
        if found[step] != number and step == max(log.keys() | found.keys()):  # as a crash leaves it
            repairs.append(f"{run}: step {step} is the last and incomplete ({found[step]} prompts in rollouts.jsonl, "
                           f"{number} in log.jsonl): its figures were left out")
        elif found[step] != number:
            wrong.append(f"step {step}: {found[step]} prompts in rollouts.jsonl, {number} in log.jsonl")
    if not told:
        raise InputError(f"{path}: no prompt {args.prompt} of step {args.step}; it holds "
                         f"{found.total()} prompts of steps {min(found, default=0)} to {max(found, default=0)}")
    for line in repairs + wrong:
        print(line, file=sys.stderr)
    if wrong:
        sys.exit(1)
    if args.all:
        print(f"{run}: all {told} rewards and advantages are as the texts make them")


# ------------------------------------------------------------------------------------ 6. command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


# What every command that measures may be told. None stands for urpo.py's own setting on this machine, in its preset.
OPTIONS = {
    "model": (str, None, "a folder, a hub id, raw, or seed (see data.py)"),
    "judge": (str, None, "the same of the judge; --model is the one that answers"),
    "rows": (positive, 64, "rows a kind"),
    "samples": (positive, 4, "answers to each prompt, beside one greedy"),
    "split": (str, None, "of a hub data set"),
    "temperature": (float, None, "of the sampled answers"),
    "referee_shots": (int, None, "worked examples in every referee prompt"),
    "max_prompt_tokens": (positive, None, "longer rows are left out"),
    "max_answer_tokens": (positive, None, "of answers"),
    "max_referee_tokens": (positive, None, "of judgements"),
    "seed": (int, 0, "of sampling"),
    "json": (str, "", "write the figures here, for compare; runs/<name>/heldout*.json joins the report"),
}
LENGTHS = ("referee_shots", "max_prompt_tokens", "max_answer_tokens", "max_referee_tokens", "seed", "json")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help: str, *options: str, **defaults):
        part = commands.add_parser(function.__name__, help=help, description=function.__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
        part.set_defaults(command=function)
        for name in options:
            kind, default, text = OPTIONS[name]
            default = defaults.get(name, default)
            about = "" if default == "" or name in ("model", "judge") else f"; default {default or 'as in training'}"
            part.add_argument(f"--{name}", type=kind, default=default, help=text + about,
                              required=name == "model" and function is not alpacaeval)
        return part

    part = command(report, "curves of one run or of several; of one, also report.html")
    part.add_argument("runs", nargs="+", help="folders that hold a log.jsonl; several are overlaid")
    part.add_argument("--out", help="the picture; default <run>/curves.png")
    part.add_argument("--csv", help="also write the figures of the panels, a line a step")
    part.add_argument("--groups", type=positive, default=EMBEDDED,
                      help=f"at most so many prompts, with all their answers, in report.html; default {EMBEDDED}")
    part = command(explain, "derive the rewards of a run again")
    part.add_argument("run", help="a folder that holds log.jsonl, rollouts.jsonl and config.json")
    part.add_argument("--step", type=int, help="with --prompt: show one prompt in full")
    part.add_argument("--prompt", type=int, help="its number in the step's batch, from 0")
    part.add_argument("--all", action="store_true", help="check every number; exit status 1 where one is wrong")
    part = command(heldout, "measure a model on held-out rows", "model", "rows", "samples", *LENGTHS)
    for flag in data.FLAGS.values():
        part.add_argument(f"--{flag}", default="builtin", help="builtin (its held-out split) | a .jsonl file | none")
    part = command(compare, "two results side by side")
    part.add_argument("before")
    part.add_argument("after")
    part = command(rewardbench, "accuracy of the judge, by section", "model", "split", *LENGTHS, split="filtered")
    part.add_argument("--data", "--preferences", dest="preferences", default="allenai/reward-bench", metavar="DATA",
                      help="hub id, or .jsonl of {prompt, chosen, rejected} with optional section and subset; "
                      "default %(default)s")
    part = command(reasoning, "pass@1, mean@k, pass@k, maj@k", "model", "samples", "rows", "split", "temperature",
                   *LENGTHS, rows=0, split="test", samples=8)
    part.add_argument("--data", "--reasoning", dest="reasoning", nargs="+", default=["builtin"], metavar="DATA",
                      help="hub ids (openai/gsm8k:main, HuggingFaceH4/MATH-500), .jsonl files, or builtin")
    part = command(alpacaeval, "answers for alpaca_eval; a win rate under a judge of your own", "model", "judge",
                   "split", *LENGTHS, split="eval")
    part.add_argument("--data", "--instructions", dest="instructions", metavar="DATA",
                      help="with --model: alpaca_eval.json of hub tatsu-lab/alpaca_eval, a .jsonl file, or a hub id")
    part.add_argument("--outputs", default="model_outputs.json", help="the answers, written by --model, read by "
                      "--judge; default %(default)s")
    part.add_argument("--name", help="with --model: its name in the file; default the model itself")
    part.add_argument("--against", help="with --judge: the other answers, in the same form")
    part = command(probe, "seed competence: what could this model learn, before any training?", "model", "rows", "json",
                   rows=32)
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command is not probe:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is explain and args.all == (args.step is not None and args.prompt is not None):
        parser.error("explain: give --step and --prompt, or --all")
    if args.command is alpacaeval and (bool(args.model and args.instructions) == bool(args.judge and args.against)
                                       or args.model and args.judge):
        parser.error("alpacaeval: give --model and --data to answer; then, in a second command, --judge and --against")
    args = argparse.Namespace(**vars(args), arguments=arguments, flags=rest)
    unset = [name for name in OPTIONS if getattr(args, name, "") is None and name not in ("model", "judge")]
    if unset:
        import urpo  # here, since reports need not wait for it

        config = urpo.Config(**urpo.PRESETS["paper" if urpo.GPU else "smol"])
        vars(args).update({name: getattr(config, name) for name in unset})
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        args.command(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
