"""Measure a model on held-out rows and by the paper's three scores; every figure has its 95 % interval.

    python eval.py heldout --model M --preferences F --reasoning F --instructions F --json before.json
    python eval.py rewardbench --model M                           as a judge of labelled pairs
    python eval.py reasoning --model M --data openai/gsm8k:main    pass@1, mean@k, pass@k, maj@k
    python eval.py alpacaeval --model M --data alpaca_eval.json    answers, for the alpaca_eval package to judge
    python eval.py alpacaeval --annotations annotations.json       its win rates, of what it has judged
    python eval.py compare before.json after.json                  two results of one command, and the change

Prompts, referee's template, parsers and sampler are those of training. One rule holds everywhere: unknown is not
zero. What was not measured, or cannot be read, is None, and "-" in a table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from itertools import compress

import numpy as np

import data
import urpo
from data import Prompt, better_first, swapped
from infra.answers import final_answer, same_answer
from infra.chat import load_tokenizer
from infra.policy import check_folder, check_model
from infra.ranks import InputError
from infra.results import (
    check_writable,
    columns,
    figure,
    interval,
    known,
    pass_at_k,
    read_records,
    read_result,
    summary,
    table,
    weighted_mean,
)
from infra.runs import write_whole
from infra.sampler import Sample, generate, start_sampler
from infra.settings import PRESET
from infra.sources import LeftOut, source_records
from rewards import first_position_preference, kendall_tau, mean, parse_scores, verify_answer

Answers = list[list[Sample]]  # those to each prompt

# ------------------------------------------------------------------------------- asking a model


def open_model(config):
    """(folder, tokenizer) of --model. Refuses a model that cannot chat, or has no weights, before rows are read."""
    folder = check_folder(config.model)
    tokenizer = load_tokenizer(folder, config.chat_template)
    check_model(folder, vocabulary=len(tokenizer), tokens=data.longest_sequence(config))
    return folder, tokenizer


def fitting(config, tokenizer, rows: list[Prompt], source: str) -> list[bool]:
    """Which rows fit --max_prompt_tokens, in either order of their responses. The others are left out, never cut."""
    fits, limit = [], config.max_prompt_tokens
    for row in rows:
        lengths = [len(data.encode_prompt(tokenizer, shown)) for shown in (row, swapped(row))]
        fits.append(max(lengths) <= limit)
    dropped = f"{len(rows) - sum(fits)} of {len(rows)} longer than {limit} tokens"
    if not any(fits):
        raise InputError(f"{source}: no row is left to measure: {dropped} (--max_prompt_tokens). Preferences must be "
                         "pairs, two responses of different scores")
    if not all(fits):
        print(f"{source}: {dropped}, left out; --max_prompt_tokens", file=sys.stderr)
    return fits


def load_rows(config, tokenizer, kind: str, source: str, split: str = "train") -> list[Prompt]:
    """The first --rows rows of a source, none twice: a repeated row is no independent trial. Pairs: better first."""
    rows, left_out = data.load_source(kind, source, split)
    for reason, number in left_out.items():
        print(f"{source}: {number} rows left out, since {reason}", file=sys.stderr)
    if kind == "preference":
        rows = known(map(better_first, rows))
    rows = list(dict.fromkeys(rows))[: config.rows]
    fits = fitting(config, tokenizer, rows, f"--{data.FLAGS[kind]} {source}")
    return list(compress(rows, fits))


def ask(config, folder: str, tokenizer, prompts: list[Prompt], samples: int = 0):
    """(one greedy answer to every prompt, `samples` answers to each at --temperature): two Answers."""
    longest = data.longest_sequence(config)
    sampler = start_sampler(folder, max_tokens=longest, chat_template=tokenizer.chat_template)
    ids, limits, seeds = [], [], []
    for i, prompt in enumerate(prompts):
        judged = prompt.kind == "preference"
        ids.append(data.encode_prompt(tokenizer, prompt))
        limits.append(config.max_referee_tokens if judged else config.max_answer_tokens)
        seeds.append(data.request_seed(config.seed, 0, i, "heldout"))
    options = dict(max_tokens=limits, seeds=seeds, progress=True)
    greedy, sampled = generate(sampler, ids, n=1, temperature=0.0, **options), []
    if samples:
        sampled = generate(sampler, ids, n=samples, temperature=config.temperature, **options)
    return greedy, sampled


def finish(config, figures: dict, printed: str, **more) -> None:
    """The end of every command that measures: its table, and with --json a file that `compare` reads."""
    print(printed)
    if not config.json:
        return
    settings = dict(vars(config))
    for name in ("command", "arguments", "model", "json", "max_judge_tokens"):
        settings.pop(name, None)
    result = {
        "model": config.model,
        "command": shlex.join(["python", "eval.py", *config.arguments]),
        "settings": settings,
        "figures": figures,
    }
    write_whole(config.json, json.dumps(result | more, indent=1))


# ------------------------------------------------------------------------------- the judge, on pairs

# A pair is judged in both orders: better_first holds its judgements with the better response shown first, worse_first
# those with the worse one shown first. A judgement is [score of the first shown, score of the second], or None.


def both_orders(pairs: list[Prompt]) -> list[Prompt]:
    return [*pairs, *map(swapped, pairs)]


def verdicts(answers: Answers) -> list[tuple]:
    """The answers to `both_orders(pairs)` as (better_first, worse_first) of each pair."""
    judged = []
    for samples in answers:
        judged.append([parse_scores(sample.text, 2, sample.finished) for sample in samples])
    half = len(judged) // 2
    return list(zip(judged[:half], judged[half:]))


def expected_scores(better_first, worse_first) -> tuple | None:
    """Mean score of (the better, the worse) response: over the samples of each order, then over both orders (ours).

    So a preference for a position cancels. None if an order has no readable judgement.

    >>> expected_scores([[9, 3], None], [[2, 8], [4, 6]])
    (8.0, 3.0)
    """
    if not known(better_first) or not known(worse_first):
        return None
    better, worse = np.mean(known(better_first), axis=0)
    worse_again, better_again = np.mean(known(worse_first), axis=0)
    better = float(better + better_again) / 2
    worse = float(worse + worse_again) / 2
    return round(better, 9), round(worse, 9)  # equal means stay equal


def credit(margin: float | None) -> float:
    """1 if the better response is ahead, 0 if it is behind; a tie, or an unread judgement, is worth a coin."""
    return float(margin > 0) if margin else 0.5


def pair_figures(better_first, worse_first) -> dict:
    """The figures of one pair that was judged S times in each order (ours).

    format                      share of judgements that can be read; unparsed is the rest
    both orders                 sample s is right in BOTH orders; a tie or an unread judgement is not right
    single order                right in the order shown; a tie or an unread judgement counts 0.5, as in RewardBench
    ties as 0                   the same, but a tie or an unread judgement counts 0
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
        "first-position preference": first_position_preference(read),
    }


def longer_wins(pair: Prompt) -> float:
    """What always preferring the longer response would earn: 1 right, 0 wrong, 0.5 at equal lengths."""
    lengths = list(map(len, pair.responses))
    return (kendall_tau(lengths, pair.truth, "strict") + 1) / 2


# ------------------------------------------------------------------------------- heldout


def solves(row: Prompt, text: str) -> dict[str, bool]:
    return {"solved": verify_answer(text, row.answer) == 1}


def answer_figures(rows: list[Prompt], greedy: Answers, sampled: Answers, mark) -> dict:
    """Share of answers with each property that mark(row, text) names, of sampled and of greedy ones.

    A row that it does not know, so that it returns None, is left out.
    """
    figures = {}
    for ending, answers in (("", sampled), (", greedy", greedy)):
        shares = []
        for row, samples in zip(rows, answers):
            marks = [mark(row, sample.text) for sample in samples]
            if None not in marks:
                shares.append({name + ending: mean(values) for name, values in columns(marks).items()})
        figures |= summary(shares)
    figures["tokens an answer"] = interval(mean(len(sample.ids) for sample in samples) for samples in sampled)
    return figures


def referee_figures(pairs: list[Prompt], greedy: Answers, sampled: Answers) -> dict:
    """The figures of a judge on all pairs, from its answers to `both_orders(pairs)`.

    "commonest line" is the share of the most frequent pair of scores: a judge that does not read has 1.
    """
    rows, lines = [], Counter()
    for orders in verdicts(sampled):
        rows.append(pair_figures(*orders))
        for order in orders:
            lines.update(map(tuple, known(order)))
    figures = summary(rows)
    greedy_rows = [pair_figures(*orders) for orders in verdicts(greedy)]
    figures["both orders, greedy"] = summary(greedy_rows)["both orders"]
    commonest = max(lines.values()) / lines.total() if lines else None
    figures["commonest line"] = figure(commonest, lines.total())
    figures["longer wins"] = interval(map(longer_wins, pairs))
    return figures


def record(row: Prompt, greedy, sampled, mirrored_greedy=(), mirrored=()) -> dict:
    """One row in the JSON: what was asked, and the texts of all answers; of a pair, also those of the other order."""
    found = {
        "kind": row.kind,
        "asked": row.instruction,
        "responses": row.responses,
        "truth": row.truth or row.answer,
    }
    answers = {"greedy": greedy, "sampled": sampled, "mirrored_greedy": mirrored_greedy, "mirrored": mirrored}
    for name, samples in answers.items():
        found[name] = [sample.text for sample in samples]
    return found


def heldout(config, measure=None) -> None:
    """Answers and judgements on held-out rows: a table, and JSON for `compare` and the reports.

    Each prompt is answered once greedily, and --samples times at --temperature.
    measure: (instruction, text of an answer) -> {property: whether the answer has it}, or None for an instruction that
    it does not know. Without it, of open-ended answers only the length is known.
    """

    def properties(row: Prompt, text: str):
        return measure and measure(row.instruction, text)

    folder, tokenizer = open_model(config)
    rows = {}
    for kind, flag in data.FLAGS.items():
        source = getattr(config, flag)
        rows[kind] = [] if source == "none" else load_rows(config, tokenizer, kind, source)
    pairs, questions, tasks = rows.values()
    prompts = [*questions, *tasks, *both_orders(pairs)]
    greedy, sampled = ask(config, folder, tokenizer, prompts, config.samples)
    figures, a = {}, len(questions)
    b = a + len(tasks)
    if questions:
        figures["reasoning"] = answer_figures(questions, greedy[:a], sampled[:a], solves)
    if tasks:
        figures["instructions"] = answer_figures(tasks, greedy[a:b], sampled[a:b], properties)
    if pairs:
        figures["referee"] = referee_figures(pairs, greedy[b:], sampled[b:])

    c = b + len(pairs)  # from there on each pair stands with its better response last
    answers = list(map(record, [*questions, *tasks], greedy, sampled))
    answers += map(record, pairs, greedy[b:c], sampled[b:c], greedy[c:], sampled[c:])
    finish(config, figures, table({config.model: {"figures": figures}}, "n"), answers=answers)


# ------------------------------------------------------------------------------- rewardbench

# The sections, their subsets, and each subset's weight in its section: SUBSET_MAPPING and EXAMPLE_COUNTS in
# rewardbench/constants.py of github.com/allenai/reward-bench, version 0.1.4. Weights are the numbers of pairs, but for
# math-prm: its 447 pairs weigh as much as all code. https://arxiv.org/abs/2403.13787
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


def benchmark_figures(labels, values) -> dict[str, dict]:
    """One measure of many pairs -> a figure a subset, a section, and the plain mean of the sections.

    labels: (section, subset) of each pair. A subset that RewardBench does not know weighs as many pairs as it has.
    """
    parts = {section: {} for section in REWARDBENCH}
    for (section, subset), value in zip(labels, values):
        subsets = parts.setdefault(section, {})
        subsets.setdefault(subset, []).append(value)
    figures, everything = {}, []
    for section, subsets in parts.items():
        if not subsets:
            continue
        figures[section], weighted, total = {}, [], 0
        for subset, part in subsets.items():
            figures[section][subset] = interval(part)
            if known(part):
                weight = REWARDBENCH.get(section, {}).get(subset, len(part))
                weighted.append((part, weight))
                total += weight
        figures[section]["section"] = weighted_mean(weighted)
        everything += [(part, weight / total) for part, weight in weighted]
    figures["RewardBench"] = {"mean of the sections": weighted_mean(everything)}
    return figures


def benchmark_pairs(config) -> tuple[list, list]:
    """((section, subset) of each pair, the pairs, chosen response first). One that stands twice counts twice, as in the
    benchmark's own weights."""
    home = {}
    for section, subsets in REWARDBENCH.items():
        home |= dict.fromkeys(subsets, section)
    source, labels, pairs = config.preferences, [], []
    records, _ = source_records(source, split=config.split, flag="data")
    for number, fields in records:
        try:
            pair = better_first(data.read_row("preference", f"{source}:{number}", fields))
        except LeftOut as reason:
            print(f"{source}:{number}: left out, since {reason}", file=sys.stderr)
            continue
        if pair:
            if isinstance(fields, bytes):
                fields = json.loads(fields)
            subset = str(fields.get("subset") or "all")
            labels.append((home.get(subset, "other"), subset))
            pairs.append(pair)
    return labels, pairs


def rewardbench(config) -> None:
    """The judge on labelled pairs, greedy, each in both orders: a figure a subset, a section, and their mean.

    "accuracy" is the single order of `pair_figures`, as in the official script; "unparsed" says how much of it is a
    coin. A judge that prefers the longer response has "longer wins" as its accuracy, and one that prefers the first
    has 0.5 in every line.
    """
    folder, tokenizer = open_model(config)
    labels, pairs = benchmark_pairs(config)
    fits = fitting(config, tokenizer, pairs, f"--data {config.preferences}")
    labels, pairs = list(compress(labels, fits)), list(compress(pairs, fits))
    answers, _ = ask(config, folder, tokenizer, both_orders(pairs))
    rows = []
    for pair, orders in zip(pairs, verdicts(answers)):
        found = pair_figures(*orders)
        rows.append({
            "accuracy": found["single order"],
            "ties as 0": found["ties as 0"],
            "unparsed": found["unparsed"],
            "consistent": found["order consistency"],
            "first position": found["first-position preference"],
            "longer wins": longer_wins(pair),
        })
    results, figures = {}, {}
    for name, values in columns(rows).items():
        results[name] = {"figures": benchmark_figures(labels, values)}
        for section, subsets in results[name]["figures"].items():
            for subset, cell in subsets.items():
                figures.setdefault(section, {})[f"{subset}: {name}"] = cell
    figures["RewardBench"]["pairs left out as too long"] = figure(len(fits) - sum(fits), len(fits))
    finish(config, figures, table(results, "n"))


# ------------------------------------------------------------------------------- reasoning


def majority(texts, answer: str) -> float:
    """maj@k: is the commonest final answer right? Of several commonest ones each counts its share.

    Equal answers vote together, however they are written. A text without a final answer has no vote.

    >>> majority(["it is 4", "so 5", "4.0", "no idea"], "4"), majority(["4", "5"], "4"), majority(["no idea"], "4")
    (1.0, 0.5, 0.0)
    """
    votes = {}  # final answer -> how often
    for given in map(final_answer, texts):
        if given:
            same = [other for other in votes if same_answer(given, other)]
            name = same[0] if same else given
            votes[name] = votes.get(name, 0) + 1
    commonest = [name for name, count in votes.items() if count == max(votes.values())]
    return mean(same_answer(name, answer) for name in commonest) or 0.0


def question_figures(row: Prompt, greedy: list[Sample], sampled: list[Sample]) -> dict:
    """The measures of one question, from one greedy answer and k samples."""
    k, texts = len(sampled), [sample.text for sample in sampled]
    right = int(sum(verify_answer(text, row.answer) for text in texts))
    figures = {
        "pass@1, greedy": verify_answer(greedy[0].text, row.answer),
        f"mean@{k}": right / k,
        f"maj@{k}": majority(texts, row.answer),
    }
    j = 2
    while j <= k:
        figures[f"pass@{j}"] = pass_at_k(k, right, j)
        j *= 2
    figures["tokens an answer"] = mean(len(sample.ids) for sample in sampled)
    figures["cut off"] = mean(not sample.finished for sample in sampled)
    return figures


def reasoning(config) -> None:
    """pass@1 (greedy), and from k samples mean@k, pass@j and maj@k, for each set; of several sets the plain average."""
    folder, tokenizer = open_model(config)
    prompts, source_of = [], []
    for source in config.reasoning:
        rows = load_rows(config, tokenizer, "reasoning", source, config.split)
        prompts += rows
        source_of += [source] * len(rows)
    greedy, sampled = ask(config, folder, tokenizer, prompts, config.samples)
    sets = {}
    for source, *question in zip(source_of, prompts, greedy, sampled):
        sets.setdefault(source, []).append(question_figures(*question))
    figures, parts = {}, {}
    for source, rows in sets.items():
        figures[source] = summary(rows)
        for name, values in columns(rows).items():
            parts.setdefault(name, []).append((values, 1))
    if len(sets) > 1:
        figures["average"] = {name: weighted_mean(values) for name, values in parts.items()}
    finish(config, figures, table({config.model: {"figures": figures}}, "n"))


# ------------------------------------------------------------------------------- alpacaeval


def alpacaeval(config) -> None:
    """With --model: its greedy answers to --data, in the form that the public `alpaca_eval` package judges.

    With --annotations: the win rates of what the package has judged, plain and length-controlled, by its own functions.
    """
    if config.annotations:
        return win_rates(config)
    folder, tokenizer = open_model(config)
    records = read_records(config.data, "instruction")
    rows = [Prompt("instruction", found["instruction"]) for found in records]
    fits = fitting(config, tokenizer, rows, f"--data {config.data}")
    answers, _ = ask(config, folder, tokenizer, list(compress(rows, fits)))
    outputs, cut = [], []
    for found, (answer,) in zip(compress(records, fits), answers):
        outputs.append({
            "instruction": found["instruction"],
            "output": answer.text,
            "generator": config.model,
        })
        cut.append(not answer.finished)
    write_whole(config.outputs, json.dumps(outputs, indent=1))
    told = f"{config.outputs}: {len(outputs)} answers, {sum(cut)} cut off at --max_answer_tokens"
    finish(config, {"alpacaeval": {"cut off": interval(cut)}}, told)


def win_rates(config) -> None:
    """The rates of annotations.json; their intervals are 1.96 of the package's standard errors to each side (ours)."""
    path = f"--annotations {config.annotations}"
    records = read_records(config.annotations, "output_1", "output_2", "generator_1", "generator_2")
    try:
        import pandas
        from alpaca_eval.metrics import get_length_controlled_winrate
    except ImportError as error:
        raise InputError(f"{path}: needs the alpaca_eval package ({error}): pip install alpaca-eval") from None
    try:
        rates = get_length_controlled_winrate(pandas.DataFrame(records), save_weights_dir=None)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise InputError(f"{path}: the alpaca_eval package cannot rate it ({error!r}); give one model's answers to its "
                         "805 instructions in their order, and a network: it asks the hub how hard they are") from None
    figures = {}
    for name, rate, error in (("win rate", "win_rate", "standard_error"),
                              ("length-controlled", "length_controlled_winrate", "lc_standard_error")):
        value, side = rates[rate] / 100, 1.96 * rates[error] / 100
        figures[name] = figure(value, int(rates["n_total"]), value - side, value + side)
    config.model = records[0]["generator_2"]
    heading = f"{config.model} over {records[0]['generator_1']}"
    figures = {"alpacaeval": figures}
    finish(config, figures, table({heading: {"figures": figures}}, "n"))


# ------------------------------------------------------------------------------- compare


def compare(config) -> None:
    """Two results of one command side by side, the change, and what differs in how they were measured."""
    before, after = read_result(config.before), read_result(config.after)
    print(table({"before": before, "after": after}, "change"))
    for name in before["settings"] | after["settings"]:
        a, b = before["settings"].get(name), after["settings"].get(name)
        if a != b:
            print(f"not measured alike: --{name} {a} before, {b} after")


# ------------------------------------------------------------------------------- command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Docstrings as they stand, and the default of every flag."""


def command_line() -> argparse.ArgumentParser:
    """What is not given is as in training, on this machine."""
    training = urpo.Config(**urpo.PRESETS[PRESET])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parts = {}
    for command in (heldout, rewardbench, reasoning, alpacaeval, compare):
        name, about = command.__name__, command.__doc__
        part = commands.add_parser(
            name, help=about.splitlines()[0], description=about, formatter_class=Help, allow_abbrev=False)
        part.set_defaults(command=command)
        parts[name] = part.add_argument

    for name in ("heldout", "rewardbench", "reasoning", "alpacaeval"):
        add = parts[name]
        add("--model", required=name != "alpacaeval", help="a folder or hub id")
        for limit in ("max_prompt_tokens", "max_answer_tokens", "max_referee_tokens"):
            add(f"--{limit}", type=positive, default=getattr(training, limit), help="as in training")
        add("--seed", type=int, default=0, help="of sampling")
        add("--chat_template", default="", help="a file with a template, for a base that has none")
        add("--json", default="", help="write the figures here, for compare")
    for name, samples, rows in (("heldout", 4, 64), ("reasoning", 8, None)):
        add = parts[name]
        add("--samples", type=positive, default=samples, help="answers to each prompt, beside a greedy one")
        add("--temperature", type=float, default=training.temperature, help="of these samples")
        add("--rows", type=positive, default=rows, help="the first so many of each source")
    for flag in data.FLAGS.values():
        parts["heldout"](f"--{flag}", default="none", help="a .jsonl file or hub id")
    add = parts["rewardbench"]
    add("--data", dest="preferences", default="allenai/reward-bench", help="hub id, or .jsonl of {prompt, chosen, "
        "rejected} with an optional subset")
    add("--split", default="filtered", help="of a hub's set")
    add = parts["reasoning"]
    add("--data", dest="reasoning", nargs="+", required=True, help="hub ids (openai/gsm8k:main "
        "HuggingFaceH4/MATH-500) or .jsonl files")
    add("--split", default="test", help="of a hub's set")
    add = parts["alpacaeval"]
    add("--data", help="with --model: alpaca_eval.json of hub tatsu-lab/alpaca_eval")
    add("--outputs", default="model_outputs.json", help="with --model: its answers")
    add("--annotations", help="what alpaca_eval wrote beside its leaderboard")
    parts["compare"]("before")
    parts["compare"]("after")
    return parser


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked: the config of a command."""
    parser = command_line()
    config = parser.parse_args(arguments, argparse.Namespace(json="", arguments=arguments, max_judge_tokens=0))
    if config.command is heldout and all(getattr(config, flag) == "none" for flag in data.FLAGS.values()):
        parser.error("nothing to measure: give a file to --preferences, --reasoning or --instructions; "
                     "`python -m lab.toy heldout --model M` measures on the laptop's")
    if config.command is alpacaeval and bool(config.annotations) == bool(config.model and config.data):
        parser.error("give --model and --data to answer; when alpaca_eval has judged, --annotations alone")
    temperature, samples = getattr(config, "temperature", 1.0), getattr(config, "samples", 1)
    if temperature < 0 or temperature == 0 and samples > 1:
        parser.error(f"--temperature {temperature:g}: {samples} samples need one above 0, else all are the greedy "
                     "answer, which is measured anyway; or give --samples 1")
    for flag in ("json", "outputs"):
        if getattr(config, flag, ""):
            check_writable(flag, getattr(config, flag))
    return config


def main(arguments: list[str] | None = None, measure=None) -> None:
    """measure: what `heldout` asks of open-ended answers."""
    try:
        config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if config.command is heldout:
            heldout(config, measure)
        else:
            config.command(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
