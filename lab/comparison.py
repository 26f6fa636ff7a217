"""Tables and pictures of the arms in a CSV that report/evidence.py writes.

A difference is the mean over an arm's seeds and rows minus URPO's over its own. Its interval is a bootstrap that draws
the seeds of each anew, and the held-out rows, each with replacement. All runs answer the same rows, so these are drawn
once for both. A seed is not paired: two arms share its order of prompts and at most the steps before they part, and
URPO's luck with one seed would then stand in every difference from it. Unknown is not zero: what was not measured is
"-".
"""
import csv
import io
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from runs import write_whole

SAMPLES = 4  # answers to each held-out prompt, the default of `eval.py heldout`
MEASURES = {"referee": "referee, right in both orders", "reasoning": "reasoning, solved",
            "gold": "instructions: on topic, whole, in order", "all_four": "the same and the constraint",
            "wins": "wins against the start, by gold"}
STEADY = {"referee_expected": "pairs in order, by the mean of eight sampled scores",
          "referee_greedy": "referee, right in both orders, greedy", "reasoning_greedy": "reasoning, greedy",
          "gold_greedy": "instructions: on topic, whole, in order, greedy"}  # with little or no chance of sampling
BASE, START = "urpo", "start"  # the arm that others are compared with; the model that all arms start from
Lines = dict[str, dict[int, dict]]  # arm -> seed -> line of the CSV


def read(path: Path) -> list[dict]:
    """The lines of a CSV; none where there is no file yet."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: list[str], line: dict) -> None:
    """The CSV with one more line, whole or unchanged."""
    out = io.StringIO()
    table = csv.DictWriter(out, fields, lineterminator="\n")
    table.writeheader()
    for row in [*read(path), line]:
        for name, value in row.items():
            row[name] = round(value, 2) if isinstance(value, float) and "minutes" in name else value
        table.writerow(row)
    write_whole(path, out.getvalue())


def by_arm(lines: list[dict]) -> Lines:
    """Lines that were measured, by arm and seed."""
    found: Lines = {}
    for line in lines:
        if line["status"] == "done":
            found.setdefault(line["arm"], {})[int(line["seed"])] = line
    return found


# ------------------------------------------------------------------------------- figures


def row_values(arms: Lines, line: dict, measure: str) -> np.ndarray | None:
    """A measure of one run for each held-out row: the share of its answers that are right; None: not measured.

    "wins" is how often an answer has more parts of the hidden gold than one of the start; a tie is .5.
    """
    digits = line.get("rows_parts" if measure == "wins" else f"rows_{measure}")
    if not digits:
        return None
    values = np.array(list(digits), float)
    if measure != "wins":
        return values / SAMPLES
    if START not in arms:
        return None
    ours = values.reshape(-1, SAMPLES, 1)
    theirs = np.array(list(arms[START][0]["rows_parts"]), float).reshape(-1, 1, SAMPLES)
    return ((ours > theirs) + 0.5 * (ours == theirs)).mean(axis=(1, 2))


def of_seeds(arms: Lines, arm: str, measure: str) -> dict[int, np.ndarray]:
    """Seed -> row values, of the runs of an arm that have them."""
    found = {}
    for seed, line in arms.get(arm, {}).items():
        values = row_values(arms, line, measure)
        if values is not None:
            found[seed] = values
    return found


def seed_means(arms: Lines, arm: str, measure: str) -> list[float]:
    """The mean over rows, of each seed that has it."""
    return [rows.mean() for rows in of_seeds(arms, arm, measure).values()]


def difference(values: np.ndarray, others: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """(mean of values - mean of others, 95 % interval). Both are [seeds, rows]; rows are paired, seeds are not.

    >>> difference(np.ones((3, 8)), np.zeros((5, 8)))
    (1.0, 1.0, 1.0)
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(values.shape[1], size=(draws, values.shape[1]))
    seeds = rng.integers(len(values), size=(draws, len(values)))
    other_seeds = rng.integers(len(others), size=(draws, len(others)))
    gaps = values[seeds].mean(axis=1) - others[other_seeds].mean(axis=1)  # [draws, rows]
    means = np.take_along_axis(gaps, rows, axis=1).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean() - others.mean()), float(low), float(high)


def difference_from(arms: Lines, arm: str, measure: str, base: str = BASE) -> tuple[float, float, float] | None:
    """`difference` of an arm from another, each with all its seeds; None where one was not measured."""
    own, others = of_seeds(arms, arm, measure), of_seeds(arms, base, measure)
    if arm in (START, base) or not own or not others:
        return None
    return difference(np.array(list(own.values())), np.array(list(others.values())))


def minutes(arms: Lines, arm: str) -> str:
    """Of training, the least of any seed: machines were shared, and some half as fast. "-" where no run ended."""
    found = [float(line["minutes"]) for line in arms.get(arm, {}).values()]
    return f"{min(found):.0f}" if found else "-"


def figure(values: list[float]) -> str:
    """Mean and spread over seeds.

    >>> figure([0.5, 0.75]), figure([0.5]), figure([])
    ('.62 ± .18', '.50', '-')
    """
    if not values:
        return "-"
    shown = f"{mean(values):.2f}"
    if len(values) > 1:
        shown += f" ± {stdev(values):.2f}"
    return shown.replace("0.", ".")


def interval(found: tuple[float, float, float]) -> str:
    """A difference as it stands in a table.

    >>> interval((-0.05, -0.1, 0.02))
    '-.05 [-.10, +.02]'
    """
    value, low, high = (f"{round(number, 9) + 0.0:+.2f}".replace("0.", ".") for number in found)  # 0 has a plus
    return f"{value} [{low}, {high}]"


# ------------------------------------------------------------------------------- tables


def table(arms: Lines, names: list[str], judges: dict[str, list[str]]) -> str:
    """A Markdown table: an arm a line, mean ± spread over seeds, and below it the difference from URPO.

    judges: arm -> the arms that it needs; their minutes are its judge's.
    """
    lines = []
    for arm in names:
        cells = [arm, str(len(arms[arm]))]
        for measure in MEASURES:
            cells.append(figure(seed_means(arms, arm, measure)))
            found = difference_from(arms, arm, measure)
            if found:
                cells[-1] += f"<br>{interval(found)}"
        trained = minutes(arms, arm)
        for judge in judges.get(arm, []):
            trained += f" + {minutes(arms, judge)} for {judge}"
        memory = [float(line["gib"]) for line in arms[arm].values() if line["gib"]]
        cells.append(trained)
        cells.append(f"{max(memory):.1f}" if memory else "-")
        lines.append(cells)
    return markdown(["arm", "seeds", *MEASURES.values(), "minutes", "GiB"], lines)


def steady_table(arms: Lines) -> str:
    """What an arm does when chance is small, of the runs that kept it; for the last column the difference from URPO."""
    lines = []
    for arm, runs in arms.items():
        having = [line for line in runs.values() if line.get("referee_expected")]
        if not having:
            continue
        cells = [arm, str(len(having))]
        for measure in STEADY:
            values = [float(line[measure]) for line in having if line.get(measure)]
            fewer = f" ({len(values)})" if 0 < len(values) < len(having) else ""
            cells.append(figure(values) + fewer)
        found = difference_from(arms, arm, "gold_greedy")
        if found:
            cells[-1] += f"<br>{interval(found)}"
        lines.append(cells)
    return markdown(["arm", "seeds", *STEADY.values()], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    rows = [" | ".join(cells) for cells in [head, rule, *lines]]
    return "\n".join(f"| {row} |" for row in rows)


def died(lines: list[dict]) -> str:
    """The runs that did not end, with their last words."""
    found = []
    for line in lines:
        if line["status"] != "done":
            found.append(f"- {line['arm']}, seed {line['seed']}: {line['status']}")
    return "\n".join(found)


def headline(arms: Lines) -> str:
    """URPO against the frozen generative judge, in one sentence: on instructions, as a referee, and in cost."""
    shown = []
    for arm, measure in (("rm_gen", "gold"), ("mix_1_1_0", "referee")):
        found = difference_from(arms, arm, measure)
        if not found:
            return "URPO against RM-gen: not measured yet."
        value, low, high = found
        runs = f"{len(arms[BASE])} and {len(arms[arm])} runs"
        shown.append(f"{interval((-value, -high, -low))} ({runs})")
    return (f"URPO minus RM-gen: instructions by hidden gold {shown[0]}; URPO's referee minus RM-gen's judge "
            f"{shown[1]}; {minutes(arms, BASE)} minutes of training against {minutes(arms, 'rm_gen')} and "
            f"{minutes(arms, 'mix_1_1_0')} for the judge, on a noisy machine.")


def measured_claims(arms: Lines, claims: dict[str, tuple[str, str]]) -> dict[str, tuple[str, list[str]]]:
    """Claim -> (title, its arms behind the start and URPO), of claims with an arm that no claim before has."""
    found, before = {}, {START}
    for claim, (title, names) in claims.items():
        own = [arm for arm in names.split() if arm in arms]
        if set(own) - before:
            found[claim] = (title, [arm for arm in dict.fromkeys([START, BASE, *own]) if arm in arms])
        before.update(names.split())
    return found


def summary(lines: list[dict], claims: dict[str, tuple[str, str]], judges: dict[str, list[str]]) -> str:
    """Headline, a table a claim, and what died."""
    arms = by_arm(lines)
    parts = [headline(arms)]
    for claim, (title, names) in measured_claims(arms, claims).items():
        parts.append(f"**{claim}.** {title}\n\n{table(arms, names, judges)}")
    parts.append(f"**greedy.** With little chance, of runs that kept it; (1): of one seed\n\n{steady_table(arms)}")
    return "\n\n".join([*parts, *filter(None, [died(lines)])])


# ------------------------------------------------------------------------------- pictures


def pictures(lines: list[dict], claims: dict[str, tuple[str, str]], curves: dict[str, dict[str, float]]) -> dict:
    """Claim -> PNG, of the claims that were measured. curves: claim -> arm -> its place on the x axis."""
    arms, found = by_arm(lines), {}
    for claim, (title, names) in measured_claims(arms, claims).items():
        if claim in curves:
            found[claim] = draw_curve(arms, curves[claim], title)
        else:
            found[claim] = draw(arms, names, title)
    return found


def placed(arms: Lines, arm: str, measure: str) -> tuple[float, float, float] | None:
    """(mean, and around it the interval of the difference from URPO) of an arm in a picture."""
    base, found = seed_means(arms, BASE, measure), difference_from(arms, arm, measure)
    if arm == BASE and base:
        found = (0.0, 0.0, 0.0)
    if not found:
        return None
    return tuple(mean(base) + np.array(found))


def draw(arms: Lines, names: list[str], title: str) -> bytes:
    """An arm a line. Small dots are seeds. The large dot is the arm, `placed`, with its interval: where it misses the
    vertical line, which is URPO's mean, the arm differs."""
    drawing = Figure(figsize=(14, 1.3 + 0.3 * len(names)), layout="constrained")
    drawing.suptitle(title)
    axes = drawing.subplots(1, len(MEASURES), sharey=True)
    for axis, (measure, label) in zip(axes, MEASURES.items()):
        for place, arm in enumerate(names):
            values = seed_means(arms, arm, measure)
            found = placed(arms, arm, measure)
            axis.plot(values, [place] * len(values), ".", color="tab:gray", markersize=3)
            if arm == BASE and found:
                axis.axvline(found[0], color="black", linewidth=0.6)
            elif found:
                axis.plot(found[1:], [place, place], color="tab:blue", linewidth=1.5)
                axis.plot(found[0], place, "o", color="tab:blue", markersize=5)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        finish_panel(axis, label)
    axes[0].invert_yaxis()
    return png(drawing)


def draw_curve(arms: Lines, places: dict[str, float], title: str) -> bytes:
    """The same arms along an x axis. places: arm -> x. The dashed line is URPO's mean."""
    drawing = Figure(figsize=(14, 3), layout="constrained")
    drawing.suptitle(title)
    for axis, (measure, label) in zip(drawing.subplots(1, len(MEASURES)), MEASURES.items()):
        xs, ys = [], []
        for arm, x in places.items():
            values = seed_means(arms, arm, measure)
            found = placed(arms, arm, measure)
            axis.plot([x] * len(values), values, ".", color="tab:gray", markersize=3)
            if found:
                xs.append(x)
                ys.append(found[0])
                axis.plot([x, x], found[1:], color="tab:blue", linewidth=1.5)
                if arm == BASE:
                    axis.axhline(found[0], color="black", linewidth=0.6, linestyle="--")
        axis.plot(xs, ys, "o-", color="tab:blue", markersize=5, linewidth=0.8)
        finish_panel(axis, label)
    return png(drawing)


def finish_panel(axis, title: str) -> None:
    axis.set_title(title, fontsize=9, wrap=True)
    axis.spines[["top", "right"]].set_visible(False)


def png(drawing: Figure) -> bytes:
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
