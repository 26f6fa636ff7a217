"""What became of a run: its curves, and what was measured held out.

    python -m lab.report runs/urpo

The curves are written into the run's folder, as curves.png. The results heldout*.json in it are printed as a table.
Where there are two, one prompt of each kind follows with the answers before and after. Unknown is not zero: what was
not measured is a gap in a curve.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import pandas
from matplotlib.figure import Figure

from data import score_line
from infra.ranks import InputError, one_line_errors
from infra.results import cell_text, figure, read_result, table
from infra.runs import read_about, read_log, write_whole
from lab import toy
from rewards import parse_scores, verify_answer

# What to look for in a panel -> its figures of log.jsonl ("other_three" and "all_four": of the laptop's world)
PANELS = {
    "reward should rise (P: tau or -1, R: share solved)": "preference.reward reasoning.reward",
    "format: readable judgements, should be near 1": "preference.format instruction.format",
    "tau of readable rankings should rise": "preference.tau",
    "zero_spread: at 1 no gradient": "preference.zero_spread reasoning.zero_spread instruction.zero_spread",
    "entropy, nats a token: at 0 no exploration": "preference.entropy reasoning.entropy instruction.entropy",
    "first_position: away from 0 is bias": "preference.first_position instruction.first_position",
    "drift from the sampler should stay low, nats a token": "drift_mean drift_max",
    "share of clipped tokens, below .05": "clipped_low clipped_high",
    "open answers by hidden gold should rise": "other_three all_four",
    "seconds of a step": "seconds.rollout seconds.self_score seconds.old_logprobs seconds.update seconds.sync",
}
HEADLINE = ("both orders", "solved", "keeps the constraint", "all four")  # what the table shows of a result
COLORS = {"preference": "tab:blue", "reasoning": "tab:orange", "instruction": "tab:green"}


def report(run: Path) -> None:
    """All is read and drawn before anything is written."""
    repairs, measured = [], measured_held_out(run)
    picture = draw_curves(run, read_figures(run, repairs), read_about(run).get("config", {}))
    for repair in repairs:
        print(repair, file=sys.stderr)
    write_whole(run / "curves.png", picture)
    print(run / "curves.png", measured, sep="\n\n")


def read_figures(run: Path, repairs: list[str]) -> pandas.DataFrame:
    """The log of a run as a table: a row a step, a column a figure of the panels."""
    log = pandas.json_normalize(read_log(run, repairs)).set_index("step")
    if (run / "rollouts.jsonl").is_file():
        gold = pandas.DataFrame(toy.gold_of_run(run, repairs), columns=["step", "other_three", "all_four"])
        log = log.join(gold.set_index("step"))
    return log.reindex(columns=" ".join(PANELS.values()).split()).astype(float)


def draw_curves(run: Path, log: pandas.DataFrame, settings: dict) -> bytes:
    """A PNG of all panels, each with a line where the warm-up ends."""
    drawing, picture = Figure(figsize=(22, 9), layout="constrained"), io.BytesIO()
    title = f"{run.resolve().name}, from model {settings.get('model', 'unknown')}; vertical line: end of the warm-up"
    drawing.suptitle(title, parse_math=False, wrap=True)
    drawing.supxlabel("step")
    warmup = settings.get("warmup_steps", 0)
    for axis, (title, figures) in zip(drawing.subplots(2, 5, sharex=True).flat, PANELS.items()):
        axis.set_title(title, fontsize=10)
        axis.locator_params(axis="x", integer=True)
        measured = log[figures.split()].dropna(axis="columns", how="all")
        for name, values in measured.items():
            kind, _, part = name.partition(".")
            label = part if kind == "seconds" else kind
            axis.plot(values, color=COLORS.get(kind), label=label, marker=".", markersize=3)
        if measured.empty:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="gray")
            continue
        axis.legend(fontsize=7, framealpha=0.5)
        if "drift_mean" in measured:
            axis.set_yscale("log")
        elif measured.min().min() >= 0:
            axis.set_ylim(bottom=0)
        if 0 < warmup <= log.index[-1]:
            axis.axvline(warmup - 0.5, color="black", linewidth=0.6)
    drawing.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def measured_held_out(run: Path) -> str:
    """The results heldout*.json of a run side by side; of heldout-before and heldout-after a headline, and answers."""
    results = {path.stem: read_result(path) for path in sorted(run.glob("heldout*.json"))}
    if results.keys() != {"heldout-before", "heldout-after"}:
        return table(results) if results else ""
    after, before = results.values()
    for name in ("rows", "samples", "temperature", "seed"):
        if before["settings"].get(name) != after["settings"].get(name):
            raise InputError(f"{run}: heldout-before.json and heldout-after.json differ in --{name}: measure one anew")
    shown = headline(before["figures"], after["figures"]) or table(results)
    return shown + "\n" + side_by_side(before.get("answers", []), after.get("answers", []))


def headline(before: dict, after: dict) -> str:
    """One line a figure of HEADLINE: before and after, sampled and greedy. Empty where nothing of it was measured."""
    rows = {}
    for part, cells in before.items():
        for name in HEADLINE:
            if name in cells:
                found = [figures.get(part, {}).get(name + greedy, figure(None, 0))
                         for greedy in ("", ", greedy") for figures in (before, after)]
                rows[f"{part}: {name}"] = map(cell_text, found)
    titles = ["sampled: before", "after", "greedy: before", "after"]
    return pandas.DataFrame.from_dict(rows, orient="index", columns=titles).to_string() if rows else ""


def is_right(row: dict) -> bool:
    """Whether the first sampled answer to a held-out row is right, by the truth or by hidden gold."""
    text = row["sampled"][0]
    if row["kind"] == "reasoning":
        return verify_answer(text, row["truth"]) == 1
    if row["kind"] == "preference":
        scores = parse_scores(text, 2, row["finished"][0])
        return scores is not None and scores[0] > scores[1]
    return toy.is_good(row["asked"], text)


def side_by_side(before: list[dict], after: list[dict], width: int = 52) -> str:
    """Of each kind one prompt with its first sampled answer before and after: the first that became right, if any."""
    found = {}
    for old, new in zip(before, after):
        texts = [*old["sampled"][:1], *new["sampled"][:1]]
        if old["asked"] == new["asked"] and len(set(texts)) == 2:
            learnt = is_right(new) and not is_right(old)
            if old["kind"] not in found or learnt > found[old["kind"]][0]:
                found[old["kind"]] = learnt, old, texts
    lines = []
    for kind, (learnt, old, texts) in found.items():
        truth = score_line(old["truth"]) if kind == "preference" else old["truth"]
        title = f"{kind}, held out{', the first that became right' * learnt}: {old['asked']}"
        lines += ["", printable(title + (f" (truth: {truth})" if truth else ""))]
        for number, response in enumerate(old["responses"], 1):
            lines.append(f"  response {number}: {printable(response)}")
        columns = []
        for title, text in zip(("before", "after"), texts):
            columns.append([title])
            for line in printable(text).split("\n"):
                columns[-1] += textwrap.wrap(line, width) or [""]
        for left, right in zip_longest(*columns, fillvalue=""):
            lines.append(f"  {left.ljust(width + 2)}{right}".rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    """A text of a run as a terminal may show it: its control characters are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its folder, for example runs/urpo")
    with one_line_errors():
        report(parser.parse_args(arguments).run)


if __name__ == "__main__":
    main()
