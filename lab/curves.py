"""The curves of a run, or of several runs: one picture, and a CSV of the same figures.

Unknown is not zero: what was not measured is NaN, a gap in a curve and an empty field in the CSV.
"""
import io

import pandas
from matplotlib.figure import Figure

# Title of a panel, which says what to look for -> its figures of log.jsonl. docs/log.md explains each.
PANELS = {
    "reward should rise (P: tau or -1, R: share solved)": "preference.reward reasoning.reward",
    "format: readable judgements, should be near 1": "preference.format instruction.format",
    "tau of readable rankings should rise": "preference.tau",
    "self-scores against the truth (tau): above 0": "reasoning.judge_tau instruction.judge_tau",
    "I by hidden gold should rise": "instruction.gold instruction.gold_constraint",
    "drift from the sampler should stay low, nats a token": "drift_mean drift_max",
    "zero_spread: at 1 no gradient": "preference.zero_spread reasoning.zero_spread instruction.zero_spread",
    "distinct answers in a group: at 1 all are equal": "preference.distinct reasoning.distinct instruction.distinct",
    "entropy, nats a token: at 0 no exploration": "preference.entropy reasoning.entropy instruction.entropy",
    "first_position: away from 0 is bias": "preference.first_position instruction.first_position",
    "self-scores, points of 1 to 10": "instruction.reward instruction.score_std",
    "tokens an answer": "preference.length reasoning.length instruction.length",
    "share of clipped tokens, below .05": "clipped_low clipped_high",
    "gradient norm before its clip: no spikes": "grad_norm",
    "gradient_share: who pulls at the weights":
        "preference.gradient_share reasoning.gradient_share instruction.gradient_share",
}
# The same in four panels, for a reader who has not met a log yet.
BRIEF = {
    "The referee: agreement with the true ranking, -1 to 1": "preference.reward",
    "Reasoning: share of questions solved": "reasoning.reward",
    "Open answers by hidden gold: share on topic, whole and in order;\nshare that keeps the constraint":
        "instruction.gold instruction.gold_constraint",
    "What a self-score is worth: its agreement with the truth,\n-1 to 1, 0 is a blind judge":
        "reasoning.judge_tau instruction.judge_tau",
}
# A figure of a kind has the kind's name and colour; one that stands here itself has its own; the others are gray.
COLORS = {"preference": "tab:blue", "reasoning": "tab:orange", "instruction": "tab:green",
          "instruction.score_std": "tab:olive", "instruction.gold_constraint": "tab:olive",
           "drift_max": "tab:red", "clipped_high": "tab:red"}


def read_figures(log: list[dict]) -> pandas.DataFrame:
    """The lines of a log.jsonl as a table: a row a step, a column a figure of the panels or the seconds of a part."""
    table = pandas.json_normalize(log).set_index("step")
    columns = " ".join(PANELS.values()).split()
    columns += [column for column in table if column.startswith("seconds.")]
    return table.reindex(columns=columns).astype(float)


def to_csv(names: list[str], tables: list[pandas.DataFrame]) -> str:
    """A line a run and step, a column a figure of the panels."""
    figures = " ".join(PANELS.values()).split()
    rows = pandas.concat([table[figures] for table in tables], keys=names, names=["run", "step"])
    return rows.to_csv(float_format="%.6g", lineterminator="\n")


def draw_curves(names: list[str], tables: list[pandas.DataFrame], settings: dict, heldout: str = "") -> bytes:
    """A PNG: all panels, the seconds of the seven parts, and the table of what was measured held out.

    settings: of the first run. Of several runs each is a thin line, and their mean is a thick one.
    """
    mean = pandas.concat(tables).groupby("step").mean()  # over the runs that measured a figure at a step
    warmup = settings.get("warmup_steps", 0)
    drawing = Figure(figsize=(18, 19), layout="constrained")
    title = f"{', '.join(names)}, from model {settings.get('model', 'unknown')}; vertical line: end of the warm-up"
    drawing.suptitle(title, parse_math=False, wrap=True)
    grid = drawing.add_gridspec(5, 4)
    seconds = drawing.add_subplot(grid[4, :2] if heldout else grid[4, :])
    parts = mean.filter(like="seconds.")
    if not parts.empty:
        seconds.stackplot(parts.index, parts.T, labels=parts.columns.str.removeprefix("seconds."))
    finish_panel(seconds, "seconds of the seven parts of a step", warmup)
    seconds.locator_params(axis="x", integer=True)  # of all panels, since they share the axis
    for number, (title, figures) in enumerate(PANELS.items()):
        axis = drawing.add_subplot(grid[number // 4, number % 4], sharex=seconds)
        for figure in figures.split():
            draw_figure(axis, figure, tables, mean)
        finish_panel(axis, title, warmup)
    if heldout:
        text = drawing.add_subplot(grid[4, 2:], frame_on=False, xticks=[], yticks=[])
        heldout = f"held out: value [95 % interval]\n{heldout}"
        text.text(0, 1, heldout, family="monospace", fontsize=7, va="top", parse_math=False)
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def draw_brief(names: list[str], tables: list[pandas.DataFrame], settings: dict) -> bytes:
    """A PNG of the four panels in BRIEF. A running mean over five steps, since a step has few prompts.

    What is measured every second step is drawn as one line. A longer gap stays a gap.
    """
    smooth = []
    for table in tables:
        known = table.notna() | table.shift().notna()
        smooth.append(table.rolling(5, min_periods=1, center=True).mean().where(known))
    tables = smooth
    mean = pandas.concat(tables).groupby("step").mean()
    drawing = Figure(figsize=(11, 7), layout="constrained")
    shown = f"{len(names)} runs on the laptop's world (thin) and their mean (thick)"
    drawing.suptitle(f"{shown if len(names) > 1 else 'A run'}: running mean of 5 steps")
    for axis, (title, figures) in zip(drawing.subplots(2, 2, sharex=True).flat, BRIEF.items()):
        for figure in figures.split():
            draw_figure(axis, figure, tables, mean)
        finish_panel(axis, title, settings.get("warmup_steps", 0))
    picture = io.BytesIO()
    drawing.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def draw_figure(axis, figure: str, tables: list[pandas.DataFrame], mean: pandas.DataFrame) -> None:
    if mean[figure].isna().all():
        return
    label = figure if figure in COLORS else figure.partition(".")[0]
    color = COLORS.get(label, "tab:gray")
    for table in tables:
        axis.plot(table[figure], color=color, linewidth=0.6, alpha=0.5)
    axis.plot(mean[figure], color=color, label=label, marker=".", markersize=3)
    axis.set_yscale("log" if figure.startswith("drift") else "linear")


def finish_panel(axis, title: str, warmup: int) -> None:
    """Title, warm-up line, and between title and axis one row that names the curves: there it covers nothing."""
    axis.set_title(title, fontsize=10, pad=18)
    axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)
    if not axis.has_data():
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="gray")
        return
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=7, fontsize=8, frameon=False, borderaxespad=0.2)
    if 0 < warmup <= axis.dataLim.x1:
        axis.axvline(warmup - 0.5, color="black", linewidth=0.6)
