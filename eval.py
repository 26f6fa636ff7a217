"""Measure a model on held-out data, compare two measurements, draw the curves of a run.

    python eval.py report runs/urpo                          -> runs/urpo/curves.png
    python eval.py report runs/s0 runs/s1 runs/s2 --out docs/seeds.png --csv docs/seeds.csv
    python eval.py heldout --model raw --json before.json    answers, judgements and constraints on held-out rows
    python eval.py heldout --model runs/urpo/checkpoints/last/model --json after.json
    python eval.py compare before.json after.json            the table that `make demo` ends with

Prompts, referee's template, parsers and engine are those of training: data.py and rewards.py. The file falls into
1. scoring (pure functions, from parsed scores to figures), 2. generation, 3. tables, 4. curves, 5. the commands.
One rule of rewards.py holds here too: unknown is not zero. What was not measured is None, "-" or a gap.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from scipy import stats

import data
from data import InputError, Prompt
from rewards import first_position_preference, mean, parse_scores, verify_answer

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
    low = high = None
    if values and set(values) <= {0.0, 1.0}:
        low, high = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    elif len(values) > 1:
        low, high = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile",
                                    rng=np.random.default_rng(0)).confidence_interval
    return figure(mean(values), len(values), low, high)


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
    expected        the expected scores have the right sign; a tie, or an order never read, 0.5
    consistent      the same winner in both orders, among samples read in both; a tie has no winner
    first_position  rewards.first_position_preference: -0.5 ... 0.5; blind to order is 0

    >>> list(pair_figures([[9, 3], [5, 5]], [[2, 8], None]).values())
    [0.75, 0.5, 0.75, 1.0, 1.0, 0.0]
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


# --------------------------------------------------------------------------------------- 2. generation


def swapped(prompt: Prompt) -> Prompt:
    return replace(prompt, responses=prompt.responses[::-1], truth=prompt.truth[::-1])


def difficulty(pair: Prompt) -> str:
    """A builtin pair, better first: the hardest kind, where only the constraint tells, and the others."""
    return "good vs breaks" if data.LEVELS[int(pair.truth[1])] == "breaks the constraint" else "others"


def heldout_rows(args, tokenizer) -> dict[str, list[Prompt]]:
    """The rows to measure, by kind, none twice: a repeated row is no independent trial. Pairs stand better first.
    Rows that are too long are left out, never cut."""
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
            found = [row if row.truth[0] > row.truth[1] else swapped(row) for row in found
                     if len(row.truth) == 2 and row.truth[0] != row.truth[1]]
        elif kind == "instruction" and source == "builtin":
            found = [row for row in found if row.check]
        found = found[: args.rows]
        rows[kind] = [row for row in found if args.max_prompt_tokens >= max(
            len(data.encode_prompt(tokenizer, shown, args.referee_shots)) for shown in (row, swapped(row)))]
        dropped = f"{len(found) - len(rows[kind])} of {len(found)} longer than {args.max_prompt_tokens} tokens"
        if not rows[kind]:
            raise InputError(f"--{flag} {source}: no valid {what} is left ({dropped})")
        if len(rows[kind]) < len(found):
            print(f"--{flag} {source}: {dropped}, left out", file=sys.stderr)
    if not rows:
        raise InputError("all three sources are none: there is nothing to measure")
    return rows


def ask(engine, tokenizer, prompts: list[Prompt], n: int, temperature: float, args) -> list[list[tuple[str, int]]]:
    """n answers to every prompt in one call of the engine, each (text, tokens)."""
    start = time.perf_counter()
    print(f"{n} x {len(prompts)} answers at T = {temperature:g} ... ", end="", flush=True, file=sys.stderr)
    limits = [args.max_referee_tokens if prompt.kind == "preference" else args.max_answer_tokens for prompt in prompts]
    seeds = [data.request_seed(args.seed, 0, i, "heldout") for i in range(len(prompts))]
    ids = [data.encode_prompt(tokenizer, prompt, args.referee_shots) for prompt in prompts]
    outputs = data.generate(engine, ids, n, limits, seeds, temperature)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    return [[(tokenizer.decode(sample.token_ids, skip_special_tokens=True), len(sample.token_ids))
             for sample in output.outputs] for output in outputs]


def heldout(args) -> None:
    """Answers, judgements and constraints on held-out rows: a table, and JSON for `compare` and `report`."""
    folder = data.model_folder(args.model)
    tokenizer = data.load_tokenizer(folder)
    rows = heldout_rows(args, tokenizer)
    pairs, questions, tasks = (rows.get(kind, []) for kind in data.KINDS)
    prompts = [*questions, *tasks, *pairs, *map(swapped, pairs)]
    engine = data.start_engine(folder, args.max_prompt_tokens + max(args.max_answer_tokens, args.max_referee_tokens))
    greedy = ask(engine, tokenizer, prompts, 1, 0.0, args)
    sampled = ask(engine, tokenizer, prompts, args.samples, 1.0, args)

    figures, first = {}, 0
    for name, part, passes in (("reasoning", questions, lambda row, text: verify_answer(text, row.answer)),
                               ("instructions", tasks, lambda row, text: data.complies(row.check, text))):
        if part:
            figures[name] = {
                label: interval(mean(passes(row, text) for text, _ in texts) if row.answer or row.check else None
                                for row, texts in zip(part, given[first:]))  # no check in a file: only a length
                for label, given in (("greedy", greedy), ("sampled", sampled))}
            figures[name]["tokens an answer"] = interval(mean(tokens for _, tokens in texts)
                                                         for _, texts in zip(part, sampled[first:]))
        first += len(part)
    if pairs:
        orders = []
        for given in (greedy, sampled):
            verdicts = [[parse_scores(text, 2) for text, _ in texts] for texts in given[first:]]
            orders.append(list(zip(verdicts[: len(pairs)], verdicts[len(pairs):])))
        parts = map(difficulty, pairs) if args.preferences == "builtin" else ()
        figures["referee"] = referee_figures(*orders, list(parts)) | {
            "longer wins": interval(data.longer_is_right(row.responses, row.truth) for row in pairs),
            "first wins, single order": figure(0.5, len(pairs)), "first wins, both orders": figure(0.0, len(pairs))}
    result = {"model": args.model, "command": shlex.join(["python", "eval.py", *args.arguments]),
              "settings": {name: getattr(args, name) for name in SETTINGS}, "figures": figures}
    print(table({args.model: result}, "n"))
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1))
    if args.answers:
        lines = [{**asdict(row), "greedy": one[0][0], "sampled": [text for text, _ in many]}
                 for row, one, many in zip(prompts, greedy, sampled)]
        write_whole(args.answers, "".join(json.dumps(line) + "\n" for line in lines))


SETTINGS = (*data.FLAGS.values(), "rows", "samples", "referee_shots", "max_prompt_tokens", "max_answer_tokens",
            "max_referee_tokens", "seed")


def write_whole(path: str, text: str) -> None:
    """A file that is either complete or absent."""
    unfinished = Path(f"{path}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(text, encoding="utf-8")
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
    for name in SETTINGS:
        a, b = before["settings"].get(name), after["settings"].get(name)
        if a != b:
            print(f"not measured alike: --{name} {a} before, {b} after")


# ------------------------------------------------------------------------------------------- 4. curves

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


def read_log(run: Path) -> list[dict]:
    """The steps of a run. A last line that a crash cut short is dropped, and said so."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{run}: no run here (no log.jsonl); give a folder such as runs/urpo")
    steps, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            steps.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise InputError(f"{path}:{number}: not JSON ({error.msg}); remove the line") from None
            print(f"{path}:{number}: the last line is incomplete and was left out", file=sys.stderr)
    if not steps:
        raise InputError(f"{path}: no step is complete yet")
    return steps


def report(args) -> None:
    """Curves of one run, with its heldout*.json; or of several overlaid: a thin line each, a thick one their mean."""
    runs = [Path(run) for run in args.runs]
    if len(runs) > 1 and not args.out:
        raise InputError("several runs: give --out FILE for their picture")
    logs = [read_log(run) for run in runs]
    config = runs[0] / "config.json"
    about = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    warmup = about.get("config", {}).get("warmup_steps", 0)
    measured = sorted(runs[0].glob("heldout*.json"), key=lambda path: path.stat().st_mtime)  # as time went
    results = {path.stem: read_result(path) for path in measured} if len(runs) == 1 else {}

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing = pyplot.figure(figsize=(17, 14), layout="constrained")
    drawing.suptitle(f"{', '.join(run.name for run in runs)}, from model {about.get('weights', 'unknown')}")
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
        if not axis.lines:
            axis.set_yticks([], [])
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="gray")
    parts = list(logs[0][0]["seconds"])
    curves = [averaged([{line["step"]: figure_of(line, f"seconds.{part}") for line in log} for log in logs])
              for part in parts]
    seconds.stackplot(list(curves[0]), *(curve.values() for curve in curves), labels=parts)
    seconds.locator_params(axis="x", integer=True)  # of all panels: they share the axis
    seconds.legend(fontsize=7, frameon=False, loc="upper left", ncols=4)
    for axis in drawing.axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        if 0 < warmup <= max(curves[0]):  # from here on instructions join, and the judge rewards itself
            axis.axvline(warmup - 0.5, color="black", linewidth=0.6)
    if results:
        text = drawing.add_subplot(grid[3, 2:], title="held out: value [95 % interval]")
        text.axis("off")
        text.text(0, 1, table(results), family="monospace", fontsize=7, va="top")
    out = Path(args.out or runs[0] / "curves.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(out, dpi=110)
    pyplot.close(drawing)
    print(out)
    if args.csv:
        names = [name for curves in PANELS.values() for name in curves]
        lines = [",".join(["run", "step", *names])]
        for run, log in zip(runs, logs):  # an empty field: not measured
            lines += [",".join([run.name, str(line["step"]), *("" if math.isnan(x) else f"{x:.6g}" for x in (
                figure_of(line, name) for name in names))]) for line in log]
        write_whole(args.csv, "\n".join(lines) + "\n")
        print(args.csv)


# ----------------------------------------------------------------------------------------- 5. commands


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="report | heldout | compare")
    part = commands.add_parser("report", help="draw the curves of one run or of several", allow_abbrev=False)
    part.set_defaults(command=report)
    part.add_argument("runs", nargs="+", help="folders that hold a log.jsonl; several are overlaid")
    part.add_argument("--out", help="the picture; default <run>/curves.png")
    part.add_argument("--csv", help="also write the figures of the panels, a line a step")
    part = commands.add_parser("heldout", help="measure a model on held-out rows", allow_abbrev=False)
    part.set_defaults(command=heldout)
    part.add_argument("--model", required=True, help="a folder, a hub id, raw, or seed (see data.py)")
    for flag in data.FLAGS.values():
        part.add_argument(f"--{flag}", default="builtin", help="builtin (its held-out split) | a .jsonl file | none")
    for name, kind, default, text in (
            ("rows", positive, 64, "rows a kind"), ("samples", positive, 4, "answers at T = 1, beside one greedy"),
            ("referee_shots", int, 0, "worked examples in every referee prompt, as in training"),
            ("max_prompt_tokens", positive, 1600, "longer rows are dropped"),
            ("max_answer_tokens", positive, 48, "of answers, as in training (48: the smol preset)"),
            ("max_referee_tokens", positive, 40, "of judgements, as in training (40: the smol preset)"),
            ("seed", int, 0, "of sampling")):
        part.add_argument(f"--{name}", type=kind, default=default, help=f"{text}; default {default}")
    part.add_argument("--json", help="write the figures here, for compare; runs/<name>/heldout*.json joins the report")
    part.add_argument("--answers", help="write every prompt with its answers here, a JSON line each")
    part = commands.add_parser("compare", help="two results of heldout, side by side", allow_abbrev=False)
    part.set_defaults(command=compare)
    part.add_argument("before")
    part.add_argument("after")
    return argparse.Namespace(**vars(parser.parse_args(arguments)), arguments=arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        args.command(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
