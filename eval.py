"""Measure a model on held-out rows and by the paper's three scores; a figure of several rows has its 95 % interval.

    python eval.py heldout --model M --preferences F --reasoning F --instructions F --json before.json
    python eval.py rewardbench --model M                           as a judge of labelled pairs
    python eval.py reasoning --model M --data openai/gsm8k:main    pass@1, mean@k
    python eval.py alpacaeval --model M --data alpaca_eval.json    answers, for the alpaca_eval package to judge

Prompts, referee's template, parsers and sampler are those of training. One rule holds everywhere: unknown is not
zero. What was not measured, or cannot be read, is None, and "-" in a table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import urpo  # first: it says what to do where torch is missing

# isort: split
import data
from data import Prompt, better_first, swapped
from infra.chat import load_tokenizer
from infra.policy import check_folder, check_model
from infra.ranks import InputError, one_line_errors
from infra.results import (
    check_writable,
    columns,
    figure,
    interval,
    is_share,
    known,
    summary,
    table,
    weighted_mean,
)
from infra.runs import write_whole
from infra.sampler import PROMPTS_AT_ONCE, Sample, generate, start_sampler
from infra.settings import PRESET, check_bounds
from infra.sources import LeftOut, progress, source_records
from rewards import first_position_preference, mean, parse_scores, verify_answer

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
        lengths = []
        for shown in (row, swapped(row)):
            lengths.append(len(data.encode_prompt(tokenizer, shown)))
        fits.append(max(lengths) <= limit)
    dropped = f"{len(rows) - sum(fits)} of {len(rows)} longer than {limit} tokens"
    if not any(fits):
        raise InputError(f"{source}: no row is left to measure: {dropped} (--max_prompt_tokens); preferences must be "
                         "pairs, two responses of different scores")
    if not all(fits):
        print(f"{source}: {dropped}, left out; --max_prompt_tokens", file=sys.stderr)
    return fits


def load_rows(config, tokenizer, kind: str, source: str) -> list[Prompt]:
    """The first --rows rows of a source, none twice: a repeated row is no independent trial. Pairs: better first."""
    rows, left_out = data.load_source(kind, source, config.split)
    for reason, number in left_out.items():
        print(f"{source}: {number} rows left out, since {reason}", file=sys.stderr)
    if kind == "preference":
        pairs = known(map(better_first, rows))
        if len(pairs) < len(rows):
            print(f"{source}: {len(rows) - len(pairs)} rows left out, since they are no pairs", file=sys.stderr)
        rows = pairs
    rows = list(dict.fromkeys(rows))[: config.rows]
    fits = fitting(config, tokenizer, rows, f"--{data.FLAGS[kind]} {source}")
    return list(compress(rows, fits))


@dataclass
class Asked:
    """A row with its answers: one greedy, some sampled; and those to a pair with its responses swapped."""

    row: Prompt
    greedy: list[Sample]
    sampled: list[Sample]
    mirrored_greedy: list[Sample] = ()
    mirrored: list[Sample] = ()


def ask(config, folder: str, tokenizer, rows: list[Prompt], samples: int = 0) -> list[Asked]:
    """One greedy answer to every row, `samples` answers to each at --temperature; pairs are asked in both orders."""
    longest = data.longest_sequence(config)
    sampler = start_sampler(folder, max_tokens=longest, chat_template=tokenizer.chat_template)
    ids, limits, seeds = [], [], []
    pairs = [row for row in rows if row.kind == "preference"]
    for i, prompt in enumerate([*rows, *map(swapped, pairs)]):
        ids.append(data.encode_prompt(tokenizer, prompt))
        limits.append(config.max_referee_tokens if prompt.kind == "preference" else config.max_answer_tokens)
        seeds.append(data.request_seed(config.seed, 0, i, "heldout"))
    greedy, sampled = [], []
    for first in progress(range(0, len(ids), PROMPTS_AT_ONCE), "asking"):
        part = slice(first, first + PROMPTS_AT_ONCE)
        prompts = ids[part]
        options = {
            "max_tokens": limits[part],
            "seeds": seeds[part],
        }
        greedy += generate(sampler, prompts, n=1, temperature=0.0, **options)
        if samples:
            sampled += generate(sampler, prompts, n=samples, temperature=config.temperature, **options)
    sampled = sampled or [[]] * len(ids)
    found = list(map(Asked, rows, greedy, sampled))
    judged = [asked for asked in found if asked.row.kind == "preference"]
    for asked, one, many in zip(judged, greedy[len(rows) :], sampled[len(rows) :]):
        asked.mirrored_greedy, asked.mirrored = one, many
    return found


def finish(config, figures: dict, printed: str, **more) -> None:
    """The end of every command that measures: its table, and with --json a file."""
    print(printed)
    if not config.json:
        return
    unsaid = ("command", "measure", "model", "json", "max_judge_tokens")
    settings = {name: value for name, value in vars(config).items() if name not in unsaid}
    result = {
        "model": config.model,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "settings": settings,
        "figures": figures,
    }
    write_whole(config.json, json.dumps(result | more, indent=1))


# ------------------------------------------------------------------------------- the judge, on pairs

# A pair is judged in both orders: better_first holds its judgements with the better response shown first, worse_first
# those with the worse one shown first. A judgement is [score of the first shown, score of the second], or None.


def credit(margin: float | None) -> float:
    """1 if the better response is ahead, 0 if it is behind; a tie, or an unread judgement, is worth a coin."""
    return float(margin > 0) if margin else 0.5


def pair_figures(better_first, worse_first) -> dict:
    """The figures of one pair that was judged S times in each order (ours).

    format                      share of judgements that can be read
    both orders                 sample s is right in BOTH orders; a tie or an unread judgement is not right
    single order                right in the order shown; a tie or an unread judgement counts 0.5, as in RewardBench
    ties as 0                   the same, but a tie or an unread judgement counts 0
    order consistency           the same winner in both orders, among samples read in both; a tie has no winner
    first-position preference   rewards.first_position_preference: -0.5 to 0.5; a judge blind to order has 0

    >>> list(pair_figures([[9, 3], [5, 5]], [[2, 8], None]).values())
    [0.75, 0.5, 0.75, 0.5, 1.0, 0.0]
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
    return {
        "format": len(read) / len(margins),
        "both orders": right_twice / len(forward),
        "single order": mean(map(credit, margins)),
        "ties as 0": mean((margin or 0) > 0 for margin in margins),
        "order consistency": mean(same_winner),
        "first-position preference": first_position_preference(read),
    }


def longer_wins(pair: Prompt) -> float:
    """What always preferring the longer response would earn on a pair, better first: 1, 0, or 0.5 at equal lengths."""
    better, worse = map(len, pair.responses)
    return credit(better - worse)


# ------------------------------------------------------------------------------- heldout


def measures(config, row: Prompt, shown: list[Sample], mirrored: list[Sample]) -> dict:
    """Of some answers to a row: how a pair was judged, else the share of answers with each property that is known."""
    if row.kind == "preference":
        scores = [[parse_scores(one.text, 2, one.finished) for one in samples] for samples in (shown, mirrored)]
        return pair_figures(*scores)
    if row.kind == "reasoning":
        return {"solved": mean(verify_answer(sample.text, row.answer) for sample in shown)}
    marks = known(config.measure and config.measure(row.instruction, sample.text) for sample in shown)
    return {name: mean(values) for name, values in columns(marks).items()}


def row_figures(config, asked: Asked) -> dict:
    """The measures of the sampled answers to a row and of the greedy one."""
    figures = measures(config, asked.row, asked.sampled, asked.mirrored)
    for name, value in measures(config, asked.row, asked.greedy, asked.mirrored_greedy).items():
        figures[f"{name}, greedy"] = value
    if asked.row.kind == "preference":
        figures["longer wins"] = longer_wins(asked.row)
    else:
        figures["tokens an answer"] = mean(len(sample.ids) for sample in asked.sampled)
        figures["cut off"] = mean(not sample.finished for sample in asked.sampled)
    return figures


def record(asked: Asked) -> dict:
    """One row in the JSON: what was asked, and the texts of all answers."""
    row = asked.row
    found = {
        "kind": row.kind,
        "asked": row.instruction,
        "responses": row.responses,
        "truth": row.truth or row.answer,
    }
    for name in ("greedy", "sampled", "mirrored_greedy", "mirrored"):
        found[name] = [sample.text for sample in getattr(asked, name)]
    return found | {"finished": [sample.finished for sample in asked.sampled]}


PARTS = {"reasoning": "reasoning", "instruction": "instructions", "preference": "referee"}  # of the result


def heldout(config) -> None:
    """Answers and judgements on held-out rows: a table, and JSON for the reports.

    Each prompt is answered once greedily, and --samples times at --temperature. Each of several files has its figures;
    several files of questions have their plain average, too.
    """
    folder, tokenizer = open_model(config)
    rows, part_of = [], []
    for kind, part in PARTS.items():
        sources = getattr(config, data.FLAGS[kind])
        if len({Path(source).stem for source in sources}) < len(sources):
            raise InputError(f"--{data.FLAGS[kind]} {' '.join(sources)}: two have one name: leave one out or rename it")
        for source in sources:
            found = load_rows(config, tokenizer, kind, source)
            rows += found
            part_of += [part if len(sources) == 1 else f"{part}, {Path(source).stem}"] * len(found)
    if not rows:
        raise InputError("nothing to measure: give a file to --preferences, --reasoning or --instructions; "
                         "`python -m lab.toy heldout --model M` measures on the laptop's")
    found = ask(config, folder, tokenizer, rows, config.samples)
    parts = {}
    for part, asked in zip(part_of, found):
        parts.setdefault(part, []).append(row_figures(config, asked))
    figures, sets = {}, {}
    for part, rows in parts.items():
        figures[part] = summary(rows)
        if part.startswith("reasoning, "):
            for name, values in columns(rows).items():
                sets.setdefault(name, []).append((values, 1))
    for name, values in sets.items():
        figures.setdefault("reasoning, average", {})[name] = weighted_mean(values)
    answers = [{"part": part} | record(asked) for part, asked in zip(part_of, found)]
    finish(config, figures, table({config.model: {"figures": figures}}, "n"), answers=answers)


# ------------------------------------------------------------------------------- rewardbench

# The sections, their subsets, and each subset's weight in its section: SUBSET_MAPPING and EXAMPLE_COUNTS in
# rewardbench/constants.py of github.com/allenai/reward-bench, version 0.1.4. Weights are the numbers of pairs, but for
# math-prm: its 447 pairs weigh as much as all code. https://arxiv.org/abs/2403.13787
REWARDBENCH = {}
for line in """
Chat: alpacaeval-easy 100, alpacaeval-length 95, alpacaeval-hard 95, mt-bench-easy 28, mt-bench-med 40
Chat Hard: mt-bench-hard 37, llmbar-natural 100, llmbar-adver-neighbor 134, llmbar-adver-GPTInst 92,\
 llmbar-adver-GPTOut 47, llmbar-adver-manual 46
Safety: refusals-dangerous 100, refusals-offensive 100, xstest-should-refuse 154, xstest-should-respond 250,\
 donotanswer 136
Reasoning: math-prm 984, hep-cpp 164, hep-go 164, hep-java 164, hep-js 164, hep-python 164, hep-rust 164
""".strip().splitlines():
    section, _, subsets = line.partition(": ")
    REWARDBENCH[section] = {name: int(weight) for name, weight in map(str.split, subsets.split(", "))}


def benchmark_figures(subsets: list[str], values, share: bool = True) -> dict[str, dict]:
    """One measure of many pairs -> a figure a subset, a section, and the plain mean of the sections.

    subsets: that of each pair. One that RewardBench does not know weighs as many pairs as it has.
    """
    found: dict[str, list] = {}
    for subset, value in zip(subsets, values):
        found.setdefault(subset, []).append(value)
    official = set().union(*REWARDBENCH.values())
    others = {subset: len(part) for subset, part in found.items() if subset not in official}
    figures, everything = {}, []
    for section, weights in (REWARDBENCH | {"other": others}).items():
        own = [subset for subset in found if subset in weights]
        if own:
            parts = [(found[subset], weights[subset]) for subset in own]
            figures[section] = {subset: interval(found[subset], share) for subset in own}
            figures[section]["section"] = weighted_mean(parts)
            total = sum(weight for part, weight in parts if known(part))
            everything += [(part, weight / max(total, 1)) for part, weight in parts]
    figures["RewardBench"] = {"mean of the sections": weighted_mean(everything)}
    return figures


def benchmark_pairs(config) -> tuple[list[str], list[Prompt]]:
    """(the subset of each pair, the pairs, better first). One that stands twice counts twice, as officially."""
    source, subsets, pairs = config.preferences, [], []
    records, _ = source_records(source, split=config.split, flag="data")
    for number, fields in records:
        try:
            pair = better_first(data.read_row("preference", f"{source}:{number}", fields))
            if pair is None:
                raise LeftOut("it is no pair with a better response")
            fields = json.loads(fields) if isinstance(fields, bytes) else fields
            subsets.append(str(fields.get("subset") or "all"))
            pairs.append(pair)
        except LeftOut as reason:
            print(f"{source}:{number}: left out, since {reason}", file=sys.stderr)
    return subsets, pairs


def rewardbench(config) -> None:
    """The judge on labelled pairs, greedy, each in both orders: a figure a subset, a section, and their mean.

    "single order" is the official script's accuracy; an unreadable judgement counts 0.5. There a judge by length has
    what "longer wins" has, and a judge by position 0.5.
    """
    folder, tokenizer = open_model(config)
    subsets, pairs = benchmark_pairs(config)
    fits = fitting(config, tokenizer, pairs, f"--data {config.preferences}")
    rows = []
    for asked in ask(config, folder, tokenizer, list(compress(pairs, fits))):
        judged = measures(config, asked.row, asked.greedy, asked.mirrored_greedy)
        rows.append(judged | {"longer wins": longer_wins(asked.row)})
    results, figures = {}, {}
    for name, values in columns(rows).items():
        results[name] = {"figures": benchmark_figures(compress(subsets, fits), values, is_share(name))}
        for section, cells in results[name]["figures"].items():
            for subset, cell in cells.items():
                figures.setdefault(section, {})[f"{subset}: {name}"] = cell
    figures["RewardBench"]["pairs left out as too long"] = figure(len(fits) - sum(fits), len(fits))
    finish(config, figures, table(results, "n"))


# ------------------------------------------------------------------------------- reasoning


def reasoning(config) -> None:
    """"solved, greedy" is pass@1, "solved" of k --samples is mean@k, for each set; of several the plain average."""
    heldout(config)


# ------------------------------------------------------------------------------- alpacaeval


def alpacaeval(config) -> None:
    """Greedy answers to --data, in the form that the public `alpaca_eval` package reads.

    `alpaca_eval --model_outputs FILE` then asks its judge, and prints the win rates, plain and length-controlled.
    """
    folder, tokenizer = open_model(config)
    rows, _ = data.load_source("instruction", config.instructions)
    fits = fitting(config, tokenizer, rows, f"--data {config.instructions}")
    outputs, cut = [], []
    for asked in ask(config, folder, tokenizer, list(compress(rows, fits))):
        answer = asked.greedy[0]
        outputs.append({
            "instruction": asked.row.instruction,
            "output": answer.text,
            "generator": config.model,
        })
        cut.append(not answer.finished)
    write_whole(config.outputs, json.dumps(outputs, indent=1))
    told = (f"{config.outputs}: {len(outputs)} answers, {sum(cut)} cut off at --max_answer_tokens, "
            f"{len(rows) - len(set(rows))} to an instruction that stood in --data before")
    finish(config, {"alpacaeval": {"cut off": interval(cut)}}, told)


# ------------------------------------------------------------------------------- command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    """What is not given is as in training, on this machine."""
    training = urpo.Config(**urpo.PRESETS[PRESET])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parts = {}
    for command in (heldout, rewardbench, reasoning, alpacaeval):
        name, about = command.__name__, command.__doc__
        part = commands.add_parser(name, help=about.splitlines()[0], description=about, allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        part.set_defaults(command=command)
        add = parts[name] = part.add_argument
        add("--model", required=True, help="a folder or hub id")
        for limit in ("max_prompt_tokens", "max_answer_tokens", "max_referee_tokens"):
            add(f"--{limit}", type=positive, default=getattr(training, limit), help="as in training")
        add("--seed", type=int, default=0, help="of sampling")
        add("--chat_template", default="", help="a file with a template, for a base that has none")
        add("--json", default="", help="write the figures here")
    for name, samples, rows in (("heldout", 4, 64), ("reasoning", 8, None)):
        add = parts[name]
        add("--samples", type=positive, default=samples, help="answers to each prompt, beside a greedy one")
        add("--temperature", type=float, default=training.temperature, help="of these samples")
        add("--rows", type=positive, default=rows, help="the first so many of each source")
        add("--split", default="test", help="of a hub's set")
    for flag in data.FLAGS.values():
        parts["heldout"](f"--{flag}", nargs="+", default=[], help=".jsonl files or hub ids")
    add = parts["rewardbench"]
    add("--data", dest="preferences", default="allenai/reward-bench", help="hub id, or .jsonl of {prompt, chosen, "
        "rejected} with an optional subset")
    add("--split", default="filtered", help="of a hub's set")
    add = parts["reasoning"]
    add("--data", dest="reasoning", nargs="+", required=True, help="hub ids (openai/gsm8k:main "
        "HuggingFaceH4/MATH-500) or .jsonl files")
    add = parts["alpacaeval"]
    add("--data", dest="instructions", required=True, help="alpaca_eval.json of hub tatsu-lab/alpaca_eval")
    add("--outputs", default="model_outputs.json", help="the file for the answers")
    return parser


def parse_arguments(arguments: list[str], measure) -> argparse.Namespace:
    """The command line, checked: the config of a command."""
    parser = command_line()
    config = argparse.Namespace(json="", measure=measure, max_judge_tokens=0, preferences=[], instructions=[])
    parser.parse_args(arguments, config)
    temperature, samples = getattr(config, "temperature", 1.0), getattr(config, "samples", 1)
    if temperature:
        check_bounds(urpo.Config(temperature=temperature))
    elif samples > 1:
        parser.error(f"--temperature 0: all {samples} samples are the greedy answer, measured anyway; give --samples 1")
    for flag in ("json", "outputs"):
        if getattr(config, flag, ""):
            check_writable(flag, getattr(config, flag))
    return config


def main(arguments: list[str] | None = None, measure=None) -> None:
    """measure: what `heldout` asks of open-ended answers: (instruction, text) -> {property: whether the text has it},
    or None for an instruction that it does not know. Without it only the length of such answers is known.
    """
    with one_line_errors():
        config = parse_arguments(sys.argv[1:] if arguments is None else arguments, measure)
        config.command(config)


if __name__ == "__main__":
    main()
