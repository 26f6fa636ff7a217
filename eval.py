"""Measure a model, compare measurements, draw the curves of a run, and say why its rewards are what they are.

    python eval.py heldout --model seed --json before.json    answers, judgements and constraints on held-out rows
    python eval.py compare before.json after.json             two such results side by side
    python eval.py probe --model M                            what could this model learn? Takes every flag of urpo.py
    python eval.py rewardbench --model M                      the paper's three scores: as a judge,
    python eval.py reasoning --model M --data openai/gsm8k:main HuggingFaceH4/MATH-500
    python eval.py alpacaeval --model M --data alpaca_eval.json --outputs model_outputs.json
    python eval.py alpacaeval --judge J --outputs model_outputs.json --against other.json
    python eval.py report runs/urpo                           curves.png and report.html of a run
    python eval.py explain runs/urpo --all                    derive every reward of a run again

Prompts, referee's template, parsers and engine are those of training. This file asks the model; metrics.py makes
figures of its answers. What was not measured is None, "-" or a gap: unknown is not zero.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import lru_cache
from itertools import compress, islice
from pathlib import Path

import data
import flags
import machine
import metrics
import plan
import readers
import urpo
from data import InputError, Prompt, swapped
from metrics import interval, table
from readers import better_first
from rewards import mean, parse_scores, verify_answer
from runs import write_whole
from toy import world

# ------------------------------------------------------------------------------- asking a model


def open_model(name: str, chat_template: str = ""):
    """(folder, tokenizer) of a model that can chat and has weights."""
    folder = plan.model_folder(name)
    tokenizer = plan.load_tokenizer(folder, chat_template)
    data.encode_chat(tokenizer, "")  # refuses a tokenizer without chat template, before rows are read
    return folder, tokenizer


def open_engine(folder: str, tokenizer, args):
    """The engine with room for the longest prompt and answer."""
    longest = flags.longest_sequence(args)
    plan.check_model(folder, len(tokenizer), longest)
    return machine.start_engine(folder, longest, chat_template=tokenizer.chat_template)


encoded = lru_cache(maxsize=2**16)(data.encode_prompt)  # `fitting` measures what `ask` then sends


def fitting(rows: list[Prompt], tokenizer, limit: int, source: str, what: str = "row") -> list[bool]:
    """Which rows fit `limit` tokens, in either order of their responses. The others are left out, never cut."""
    fits = []
    for row in rows:
        longest = max(len(encoded(tokenizer, shown)) for shown in (row, swapped(row)))
        fits.append(longest <= limit)
    dropped = f"{len(rows) - sum(fits)} of {len(rows)} longer than {limit} tokens"
    if not any(fits):
        raise InputError(f"{source}: no valid {what} is left ({dropped}; --max_prompt_tokens)")
    if not all(fits):
        print(f"{source}: {dropped}, left out; --max_prompt_tokens", file=sys.stderr)
    return fits


def ask(engine, tokenizer, prompts: list[Prompt], n: int, temperature: float, args) -> list[list[machine.Sample]]:
    """n answers to every prompt in one call of the engine, which shows a progress bar."""
    print(f"{n} x {len(prompts)} answers at T = {temperature:g}", file=sys.stderr)
    ids, limits, seeds = [], [], []
    for i, prompt in enumerate(prompts):
        ids.append(encoded(tokenizer, prompt))
        limits.append(args.max_referee_tokens if prompt.kind == "preference" else args.max_answer_tokens)
        seeds.append(data.request_seed(args.seed, 0, i, "heldout"))
    return machine.generate(engine, ids, n, limits, seeds, temperature, progress=True)


def both_orders(pairs: list[Prompt]) -> list[Prompt]:
    return [*pairs, *map(swapped, pairs)]


def verdicts(answers: list[list[machine.Sample]]) -> list[tuple]:
    """The answers to `both_orders(pairs)` as (better_first, worse_first) of each pair, see metrics.py."""
    judged = []
    for samples in answers:
        judged.append([parse_scores(sample.text, 2) for sample in samples])
    half = len(judged) // 2
    return list(zip(judged[:half], judged[half:]))


def split_of(source: str, split: str) -> str:
    return "heldout" if source.startswith("toy") else split  # toy takes any other name for its training split


def finish(args, figures: dict, printed: str, **more) -> None:
    """The end of every command that measures: its table, and with --json a file that `compare` reads."""
    print(printed)
    if args.json:
        settings = dict(vars(args))
        for name in ("command", "arguments", "model", "judge", "json", "flags"):
            settings.pop(name, None)
        command = shlex.join(["python", "eval.py", *args.arguments])
        result = {"model": args.model or args.judge, "command": command, "settings": settings, "figures": figures}
        result |= more
        write_whole(args.json, json.dumps(result, indent=1))


# ------------------------------------------------------------------------------- heldout


def heldout_rows(args, tokenizer) -> dict[str, list[Prompt]]:
    """The rows to measure, by kind, none twice: a repeated row is no independent trial. Pairs stand better first."""
    rows: dict[str, list[Prompt]] = {}
    for kind, flag in data.FLAGS.items():
        source, what = getattr(args, flag), "row"
        if source == "none":
            continue
        name = "toy:2" if kind == "preference" and source == "toy" else source
        unique = {}
        for row in readers.load_source(kind, name, split="heldout", count=8 * args.rows):
            unique.setdefault((row.instruction, row.responses), row)
        found = list(unique.values())
        if kind == "preference":
            what = "pair (two responses of different scores)"
            found = [row for row in map(better_first, found) if row]
        elif kind == "instruction" and source == "toy":
            found = [row for row in found if row.check]
        found = found[: args.rows]
        fits = fitting(found, tokenizer, args.max_prompt_tokens, f"--{flag} {source}", what)
        rows[kind] = list(compress(found, fits))
    if not rows:
        raise InputError("all three sources are none: there is nothing to measure")
    return rows


def difficulty(pair: Prompt) -> str:
    """A pair of the toy world, better first: the hardest kind, where the constraint alone tells, and the others."""
    return "good vs breaks" if pair.truth[1] == world.BREAKS else "others"


def passes(row: Prompt, text: str) -> float | None:
    """Whether an answer is right, or keeps the constraint; None where the row has neither a truth nor a check."""
    if row.kind == "reasoning":
        return verify_answer(text, row.answer)
    return float(world.complies(row.check, text)) if row.check else None


def answer_figures(rows: list[Prompt], greedy, sampled) -> dict[str, dict]:
    """Share of passed answers of one kind, from its greedy and from its sampled answers."""
    figures = {}
    for name, answers in (("greedy", greedy), ("sampled", sampled)):
        shares = []
        for row, samples in zip(rows, answers):
            marks = [passes(row, sample.text) for sample in samples]
            shares.append(None if None in marks else mean(marks))
        figures[name] = interval(shares)
    figures["tokens an answer"] = interval(mean(len(sample.ids) for sample in samples) for samples in sampled)
    golds = [gold_of(row, samples) for row, samples in zip(rows, sampled)]
    if all(golds):
        figures |= metrics.gold_figures(golds)
        of_greedy = metrics.gold_figures([gold_of(row, samples) for row, samples in zip(rows, greedy)])
        for name in ("on topic, whole, in order", "all four"):
            figures[f"{name}, greedy"] = of_greedy[name]
    return figures


def gold_of(row: Prompt, samples: list[machine.Sample]) -> list[dict] | None:
    """The parts of the toy world's hidden gold that each answer has; None for a row from elsewhere."""
    if row.kind != "instruction" or not world.read_instruction(row.instruction):
        return None
    return [world.gold(row.instruction, sample.text) for sample in samples]


def record(row: Prompt, greedy, sampled, mirrored_greedy, mirrored) -> dict:
    """One row in the JSON: the question, the answers, and how many parts of the hidden gold each sampled one has.

    Answers are lists of machine.Sample. mirrored: of a pair, the judgements of the other order.
    """
    golds = gold_of(row, sampled)
    answers = {"greedy": greedy, "sampled": sampled, "mirrored_greedy": mirrored_greedy, "mirrored": mirrored}
    found = {"kind": row.kind, "asked": row.instruction, "responses": row.responses, "truth": row.truth or row.answer}
    for name, samples in answers.items():
        found[name] = [sample.text for sample in samples]
    return found | {"gold": golds and [sum(gold.values()) for gold in golds]}


def heldout(args) -> None:
    """Answers, judgements and constraints on held-out rows: a table, and JSON for `compare` and `report`."""
    folder, tokenizer = open_model(args.model, args.chat_template)
    rows = heldout_rows(args, tokenizer)
    pairs, questions, tasks = [rows.get(kind, []) for kind in data.KINDS]
    prompts = [*questions, *tasks, *both_orders(pairs)]
    engine = open_engine(folder, tokenizer, args)
    greedy = ask(engine, tokenizer, prompts, 1, 0.0, args)
    sampled = ask(engine, tokenizer, prompts, args.samples, 1.0, args)

    figures, first = {}, 0
    for name, part in (("reasoning", questions), ("instructions", tasks)):
        last = first + len(part)
        if part:
            figures[name] = answer_figures(part, greedy[first:last], sampled[first:last])
        first = last
    if pairs:
        parts = [difficulty(pair) for pair in pairs] if args.preferences == "toy" else []
        judged = metrics.referee_figures(verdicts(greedy[first:]), verdicts(sampled[first:]), parts)
        judged["longer wins"] = interval(metrics.longer_wins(pair.responses, pair.truth) for pair in pairs)
        judged["first wins, single order"] = metrics.figure(0.5, len(pairs))
        judged["first wins, both orders"] = metrics.figure(0.0, len(pairs))
        figures["referee"] = judged
    shown = [*questions, *tasks, *pairs]  # of the pairs, the better response first
    mirrored_greedy, mirrored = ([[]] * first + answers[len(shown):] for answers in (greedy, sampled))
    finish(args, figures, table({args.model: {"figures": figures}}, "n"),
           answers=list(map(record, shown, greedy, sampled, mirrored_greedy, mirrored)))


# ------------------------------------------------------------------------------- rewardbench


def benchmark_pairs(args) -> tuple[list[tuple[str, str]], list[Prompt]]:
    """((section, subset) of each pair, the pairs, chosen response first). A row's own `section` wins over the map."""
    source, home = args.preferences, {}
    for section, subsets in metrics.REWARDBENCH.items():
        home |= dict.fromkeys(subsets, section)
    records, _ = readers.source_records("preference", source, args.split, count=4096)
    labels, pairs = [], []
    for number, record in records:  # also what repeats: the benchmark's weights count it
        pair = better_first(readers.read_row("preference", f"{source}:{number}", record))
        if pair:
            record = json.loads(record) if isinstance(record, bytes) else record
            subset = str(record.get("subset") or "all")
            labels.append((str(record.get("section") or home.get(subset, "other")), subset))
            pairs.append(pair)
    return labels, pairs


def rewardbench(args) -> None:
    """The referee on labelled pairs, greedy, each in both orders (D18): a figure a subset, a section, and their mean.

    accuracy     right in the order shown; a tie or an unreadable judgement counts 0.5, as in the official script
    ties as 0    the same, but a tie or an unreadable judgement counts 0
    unparsed     share of unreadable judgements: how much of the two columns before is a coin or a zero for that
    consistent   the same winner in both orders, among pairs read in both
    longer wins  the accuracy of preferring the longer response; preferring the first one has 0.5 in every line
    """
    folder, tokenizer = open_model(args.model, args.chat_template)
    labels, pairs = benchmark_pairs(args)
    fits = fitting(pairs, tokenizer, args.max_prompt_tokens, f"--data {args.preferences}",
                   "pair (two responses of different scores)")
    labels, pairs = list(compress(labels, fits)), list(compress(pairs, fits))
    engine = open_engine(folder, tokenizer, args)
    rows = []
    for pair, orders in zip(pairs, verdicts(ask(engine, tokenizer, both_orders(pairs), 1, 0.0, args))):
        found = metrics.pair_figures(*orders)
        rows.append({"accuracy": found["single order"], "ties as 0": found["ties as 0"],
                     "unparsed": found["unparsed"], "consistent": found["order consistency"],
                     "first position": found["first-position preference"],
                     "longer wins": metrics.longer_wins(pair.responses, pair.truth)})
    columns, figures = {}, {}
    for name, values in metrics.columns(rows).items():
        columns[name] = {"figures": metrics.benchmark_figures(labels, values)}
        for section, subsets in columns[name]["figures"].items():
            for subset, cell in subsets.items():
                figures.setdefault(section, {})[f"{subset}: {name}"] = cell
    figures["RewardBench"]["pairs left out as too long"] = metrics.figure(len(fits) - sum(fits), len(fits))
    note = "first wins: accuracy 0.50 in every line, since each pair stands in both orders"
    finish(args, figures, f"{table(columns, 'n')}\n{note}")


# ------------------------------------------------------------------------------- reasoning


def question_measures(row: Prompt, greedy: list[machine.Sample], sampled: list[machine.Sample]) -> dict[str, float]:
    """The measures of one question, from one greedy answer and k samples."""
    k, texts = len(sampled), [sample.text for sample in sampled]
    right = int(sum(verify_answer(text, row.answer) for text in texts))
    measured = {"pass@1, greedy": verify_answer(greedy[0].text, row.answer), f"mean@{k}": right / k,
                f"maj@{k}": metrics.majority(texts, row.answer)}
    j = 2
    while j <= k:
        measured[f"pass@{j}"] = metrics.pass_at_k(k, right, j)
        j *= 2
    measured["tokens an answer"] = mean(len(sample.ids) for sample in sampled)
    measured["cut off"] = mean(not sample.finished for sample in sampled)
    return measured


def reasoning(args) -> None:
    """pass@1 (greedy), and from k samples mean@k, pass@j and maj@k, for each set; of several sets the plain average."""
    folder, tokenizer = open_model(args.model, args.chat_template)
    sets, prompts = {}, []
    for source in args.reasoning:
        rows = readers.load_source("reasoning", source, split=split_of(source, args.split), count=512)
        rows = list(dict.fromkeys(rows))[: args.rows or None]  # a repeated row is no independent trial
        fits = fitting(rows, tokenizer, args.max_prompt_tokens, f"--data {source}")
        sets[source] = list(compress(rows, fits))
        prompts += sets[source]
    engine = open_engine(folder, tokenizer, args)
    greedy = ask(engine, tokenizer, prompts, 1, 0.0, args)
    sampled = ask(engine, tokenizer, prompts, args.samples, args.temperature, args)
    measured = map(question_measures, prompts, greedy, sampled)
    columns, figures = {}, {}
    for source, rows in sets.items():
        columns[source] = metrics.columns(list(islice(measured, len(rows))))
        figures[source] = {name: interval(values) for name, values in columns[source].items()}
    if len(sets) > 1:
        figures["average"] = {}
        for name in figures[source]:
            parts = [(part[name], 1) for part in columns.values()]
            figures["average"][name] = metrics.weighted_mean(parts)
    finish(args, figures, table({args.model: {"figures": figures}}, "n"))


# ------------------------------------------------------------------------------- alpacaeval


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
    if args.model:
        write_answers(args)
    else:
        win_rate(args)


def write_answers(args) -> None:
    """One greedy answer to each instruction, in the form of the `alpaca_eval` package."""
    folder, tokenizer = open_model(args.model, args.chat_template)
    source = args.instructions
    if source.endswith(".json"):
        records = read_outputs(source, "instruction")
        rows = [Prompt("instruction", record["instruction"]) for record in records]
    else:
        rows = readers.load_source("instruction", source, split=split_of(source, args.split), count=64)
        records = [{}] * len(rows)
    fits = fitting(rows, tokenizer, args.max_prompt_tokens, f"--data {source}")
    rows, records = list(compress(rows, fits)), list(compress(records, fits))
    answers = ask(open_engine(folder, tokenizer, args), tokenizer, rows, 1, 0.0, args)
    outputs, cut = [], 0
    for row, record, (answer,) in zip(rows, records, answers):
        outputs.append({"instruction": row.instruction, "output": answer.text, "generator": args.name or args.model,
                        "dataset": record.get("dataset") or Path(source).stem})
        cut += not answer.finished
    write_whole(args.outputs, json.dumps(outputs, indent=1))
    print(f"{args.outputs}: {len(rows)} answers, {cut} cut off at --max_answer_tokens {args.max_answer_tokens}")


def win_rate(args) -> None:
    """The share of instructions on which a judge prefers --outputs to --against, plain and length-controlled."""
    folder, tokenizer = open_model(args.judge, args.chat_template)
    own = read_outputs(args.outputs, "instruction", "output")
    reference = {}
    for record in read_outputs(args.against, "instruction", "output"):
        reference[record["instruction"]] = record["output"]
    pairs = []
    for record in own:
        other = reference.get(record["instruction"])
        if other is not None:
            pairs.append(Prompt("preference", record["instruction"], (record["output"], other), (1, 0)))
    if len(pairs) < len(own):
        print(f"{args.against}: has {len(pairs)} of the {len(own)} instructions of {args.outputs}", file=sys.stderr)
    pairs = list(compress(pairs, fitting(pairs, tokenizer, args.max_prompt_tokens, f"--against {args.against}",
                                         "pair")))
    engine = open_engine(folder, tokenizer, args)
    orders = verdicts(ask(engine, tokenizer, both_orders(pairs), 1, 0.0, args))
    rows, preferences, ties = [], [], []
    for own_first, own_second in orders:
        row = metrics.pair_figures(own_first, own_second)
        rows.append(row)
        # One order alone would carry the judge's preference for a position: a win needs both to be read.
        preferences.append(row["single order"] if row["format"] == 1 else None)
        ties += [scores[0] == scores[1] for scores in own_first + own_second if scores]
    lengths = [[len(pair.responses[i]) for pair in pairs] for i in (0, 1)]
    read = len(preferences) - preferences.count(None)
    found = metrics.summary(rows)
    figures = {
        "win rate": interval(preferences),
        "length-controlled win rate": metrics.figure(metrics.length_controlled(preferences, *lengths), read),
        "ties, a judgement": interval(ties),
        "unparsed": found["unparsed"],
        "order consistency": found["order consistency"],
        "first-position preference": found["first-position preference"],
        "characters, own": interval(lengths[0]), "characters, the other's": interval(lengths[1])}
    shown = table({f"{args.outputs} over {args.against}": {"figures": {"alpacaeval": figures}}}, "n")
    finish(args, {"alpacaeval": figures}, f"{shown}\njudge: {args.judge}. Compare this rate only with rates of the "
           "same judge and the same reference: AlpacaEval's own are those of GPT-4.")


# ------------------------------------------------------------------------------- probe


def probe(args) -> None:
    """Parts 1 to 4 of one training step, without its update, by the functions of urpo.py: what could a model learn?

    It takes every flag of urpo.py; each P row is drawn in both orders, and kinds have equal shares (0 stays 0).
    """
    config = flags.parse(urpo.Config, urpo.PRESETS, [*args.flags, "--model", args.model])
    config.both_orders, config.warmup_steps, config.minibatches, config.audit_judge = True, 0, 1, 0
    config.advantage = "std"  # which groups have a gradient is the same for all scales
    data.mix_counts(config.mix, 0, warmup=False)  # refuses what is no mix
    config.mix = ":".join(str(min(1, int(share))) for share in config.mix.split(":"))
    config.batch = args.rows * config.mix.count("1")
    flags.check(config, 1)
    folder, tokenizer = open_model(args.model, config.chat_template)
    names = {kind: getattr(config, flag) for kind, flag in data.FLAGS.items()}
    counts = data.mix_counts(config.mix, config.batch, warmup=False)
    sources, _ = readers.load_sources(
        names, counts, tokenizer, config.max_prompt_tokens, config.max_judge_tokens,
        config.judge_list or config.group, config.toy_rows)
    batch = data.draw(sources, config.mix, config.batch, 0, config.seed, 0, both_orders=True)
    engine = open_engine(folder, tokenizer, config)
    groups = urpo.rollout(config, engine, tokenizer, list(enumerate(batch)), 0)
    urpo.self_score(config, engine, tokenizer, groups, 0)
    urpo.reward(config, groups)
    figures = {}
    for kind in data.KINDS:
        part = [group for group in groups if group.prompt.kind == kind]
        if part:
            figures[kind] = metrics.preference_probe(part) if kind == "preference" else metrics.answer_probe(part)
    finish(args, figures, "\n".join([table({args.model: {"figures": figures}}, "n"), *metrics.probe_verdicts(figures)]))


# ------------------------------------------------------------------------------- compare


def read_result(path: str | Path) -> dict:
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


# The lines of `compare` that tell the most; all the others stand in the JSON, and behind --all.
HEADLINES = (("referee", "both orders"), ("reasoning", "sampled"), ("instructions", "on topic, whole, in order"),
             ("instructions", "all four"), ("instructions", "better, by gold"))
BLIND = ("blind judges on the same pairs: {:.2f} for the longer response in the order shown; in both orders .25 for "
         "a coin and 0 for the first response")


def compare(args) -> None:
    """Two results of `heldout` side by side, what differs in how they were measured, and some answers of both."""
    from report.examples import side_by_side

    results = {"before": read_result(args.before), "after": read_result(args.after)}
    before, after = results.values()
    rows = list(zip(before.get("answers", []), after.get("answers", [])))
    alike = all(a["asked"] == b["asked"] for a, b in rows)
    golds = [(a["gold"], b["gold"]) for a, b in rows if alike and a["gold"] and b["gold"]]
    if golds:
        before["figures"]["instructions"]["better, by gold"] = metrics.figure(0.5, len(golds))
        after["figures"]["instructions"]["better, by gold"] = metrics.gold_wins(
            [ours for _, ours in golds], [others for others, _ in golds])
    print(table(results, "change", () if args.all else HEADLINES))
    longer = before["figures"].get("referee", {}).get("longer wins")
    if longer:
        print(BLIND.format(longer["value"]))
    for name in before["settings"] | after["settings"]:
        a, b = before["settings"].get(name), after["settings"].get(name)
        if a != b:
            print(f"not measured alike: --{name} {a} before, {b} after")
    if alike:
        print(side_by_side(rows))


# ------------------------------------------------------------------------------- what became of a run


def report(args) -> None:
    """Curves of one run, with its heldout*.json; or of several overlaid: a thin line each, a thick one their mean.

    Of one run also report.html: the curves and the trajectories in one file without network.
    """
    from report import page

    page.report(args.runs, args.out, args.csv, args.groups, args.brief)


def explain(args) -> None:
    """Why the rewards of a run are what they are: one prompt in full, or every number of the run derived again.

    Exit status 1, and each difference on standard error, where the record is wrong.
    """
    from report import explain

    if not explain.explain(args.run, args.step, args.prompt, args.all):
        sys.exit(1)


# ------------------------------------------------------------------------------- command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


# What every command that measures may be told. None stands for the training's own setting on this machine.
OPTIONS = {
    "model": (str, None, "a folder, a hub id, raw, half or seed (docs/seed.md)"),
    "judge": (str, None, "the same of the judge; --model is the one that answers"),
    "rows": (positive, 64, "rows a kind"),
    "samples": (positive, 4, "answers to each prompt, beside one greedy"),
    "split": (str, None, "of a hub data set"),
    "temperature": (float, None, "of the sampled answers"),
    "max_prompt_tokens": (positive, None, "longer rows are left out"),
    "max_answer_tokens": (positive, None, "of answers"),
    "max_referee_tokens": (positive, None, "of judgements"),
    "seed": (int, 0, "of sampling"),
    "chat_template": (str, "", "file with a template for a base that has none"),
    "json": (str, "", "write the figures here, for compare; runs/<name>/heldout*.json joins the report"),
}
COMMON = ("max_prompt_tokens", "max_answer_tokens", "max_referee_tokens", "seed", "chat_template", "json")


def add_command(commands, function, help: str, *options: str, **defaults):
    """The parser of one command, with its share of OPTIONS."""
    part = commands.add_parser(function.__name__, help=help, description=function.__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    part.set_defaults(command=function)
    for name in options:
        kind, default, text = OPTIONS[name]
        default = defaults.get(name, default)
        if default != "" and name not in ("model", "judge"):
            text += f"; default {default or 'as in training'}"
        required = name == "model" and function is not alpacaeval
        part.add_argument(f"--{name}", type=kind, default=default, help=text, required=required)
    return part


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    part = add_command(commands, heldout, "measure a model on held-out rows", "model", "rows", "samples", *COMMON)
    for flag in data.FLAGS.values():
        part.add_argument(f"--{flag}", default="toy", help="toy (its held-out split) | a .jsonl file | none")
    part = add_command(commands, compare, "two results side by side")
    part.add_argument("before")
    part.add_argument("after")
    part.add_argument("--all", action="store_true", help="every figure, and not the headlines alone")
    add_command(commands, probe, "seed competence: what could this model learn, before any training?", "model", "rows",
                "json", rows=32)
    part = add_command(commands, rewardbench, "accuracy of the judge, by section", "model", "split", *COMMON,
                       split="filtered")
    part.add_argument("--data", "--preferences", dest="preferences", default="allenai/reward-bench", metavar="DATA",
                      help="hub id, or .jsonl of {prompt, chosen, rejected} with optional section and subset; "
                      "default %(default)s")
    part = add_command(commands, reasoning, "pass@1, mean@k, pass@k, maj@k", "model", "samples", "rows", "split",
                       "temperature", *COMMON, rows=0, split="test", samples=8)
    part.add_argument("--data", "--reasoning", dest="reasoning", nargs="+", default=["toy"], metavar="DATA",
                      help="hub ids (openai/gsm8k:main, HuggingFaceH4/MATH-500), .jsonl files, or toy")
    part = add_command(commands, alpacaeval, "answers for alpaca_eval; a win rate under a judge of your own", "model",
                       "judge", "split", *COMMON, split="eval")
    part.add_argument("--data", "--instructions", dest="instructions", metavar="DATA",
                      help="with --model: alpaca_eval.json of hub tatsu-lab/alpaca_eval, a .jsonl file, or a hub id")
    part.add_argument("--outputs", default="model_outputs.json", help="the answers, written by --model, read by "
                      "--judge; default %(default)s")
    part.add_argument("--name", help="with --model: its name in the file; default the model itself")
    part.add_argument("--against", help="with --judge: the other answers, in the same form")
    part = add_command(commands, report, "curves of one run or of several; of one, also report.html")
    part.add_argument("--brief", action="store_true", help="with --out: the four panels that tell the most")
    part.add_argument("runs", nargs="+", help="folders that hold a log.jsonl; several are overlaid")
    part.add_argument("--out", help="the picture; default <run>/curves.png")
    part.add_argument("--csv", help="also write the figures of the panels, a line a step")
    part.add_argument("--groups", type=positive, default=1000,
                      help="at most so many prompts, with all their answers, in report.html; default %(default)s")
    part = add_command(commands, explain, "derive the rewards of a run again")
    part.add_argument("run", help="a folder that holds log.jsonl, rollouts.jsonl and config.json")
    part.add_argument("--step", type=int, help="with --prompt: show one prompt in full")
    part.add_argument("--prompt", type=int, help="its number in the step's batch, from 0")
    part.add_argument("--all", action="store_true", help="check every number; exit status 1 where one is wrong")
    return parser


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line, checked, and with what it leaves open set as training sets it."""
    parser = command_line()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command is not probe:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is explain and args.all == (args.step is not None and args.prompt is not None):
        parser.error("explain: give --step and --prompt, or --all")
    if args.command is alpacaeval:
        answers, judges = bool(args.model and args.instructions), bool(args.judge and args.against)
        if answers == judges or args.model and args.judge:
            parser.error("alpacaeval: give --model and --data to answer; then, in a second command, --judge and "
                         "--against")
    training = urpo.Config(**urpo.PRESETS[machine.PRESET])
    for name in OPTIONS:
        if getattr(args, name, "") is None and name not in ("model", "judge"):
            setattr(args, name, getattr(training, name))
    args.max_judge_tokens = 0  # only `probe` judges what it has sampled, and it has all settings of training
    args.arguments, args.flags = arguments, rest
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
