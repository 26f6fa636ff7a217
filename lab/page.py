"""report.html: the curves of a run and its trajectories in one file that asks no network; page.html.jinja is its form.

Every text of the run is data: it is escaped, and no script runs but the page's own, whose nonce no text can know.
"""
import base64
import secrets
import sys
from collections import Counter
from pathlib import Path

import pandas
from jinja2 import StrictUndefined, Template

from data import KINDS, InputError, prompt_text
from report.curves import draw_brief, draw_curves, read_figures, to_csv
from rewards import parse_scores
from runs import read_about, read_groups, read_log, write_whole


def report(runs: list[str], out: str | None = None, csv: str | None = None, groups: int = 1000,
           brief: bool = False) -> None:
    """The curves of several runs; or of one run, with its heldout*.json and report.html of at most `groups` prompts.

    out: the picture, by default curves.png of the one run; brief: of four panels.
    csv: where to write the figures of the panels.
    All is read and drawn before anything is written, so a mistake overwrites nothing.
    """
    if len(runs) > 1 and not out:
        raise InputError("several runs: give --out FILE for their picture")
    folders, repairs = [Path(run) for run in runs], []
    names = [folder.resolve().name for folder in folders]
    tables = [read_figures(read_log(folder, repairs)) for folder in folders]
    run, about = folders[0], read_about(folders[0])
    heldout = heldout_table(run) if len(runs) == 1 else ""
    settings = about.get("config", {})
    curves = draw_curves(names, tables, settings, heldout)
    files = {out or run / "curves.png": draw_brief(names, tables, settings) if brief else curves}
    if len(runs) == 1:
        shown, counts = read_rollouts(run / "rollouts.jsonl", groups, repairs)
        files[run / "report.html"] = write_page(
            curves, run=names[0], about=about, table=tables[0], groups=shown, counts=counts, repairs=repairs)
    if csv:
        files[csv] = to_csv(names, tables)
    for repair in repairs:
        print(repair, file=sys.stderr)
    for path, content in files.items():
        write_whole(path, content)
        print(path)


def heldout_table(run: Path) -> str:
    """The results heldout*.json of a run side by side, in the order in which they were measured."""
    from eval import read_result, table

    measured = sorted(run.glob("heldout*.json"), key=lambda path: path.stat().st_mtime)
    return table({path.stem: read_result(path) for path in measured}) if measured else ""


def read_rollouts(path: Path, most: int, repairs: list[str]) -> tuple[list, Counter]:
    """At most `most` pairs (step, Group) of a rollouts.jsonl, and how many groups and answers the file holds.

    Evenly spaced within each kind, in one pass: whenever there are too many of a kind, every second one goes.
    """
    counts, stride = Counter(), dict.fromkeys(KINDS, 1)
    kept = {kind: [] for kind in KINDS}
    if not path.is_file():
        return [], counts
    for step, group in read_groups(path, repairs):
        kind = group.prompt.kind
        if kind not in KINDS:
            raise InputError(f"{path}: step {step}, prompt {group.index}: no kind {kind!r}: {', '.join(KINDS)}")
        if counts[kind] % stride[kind] == 0:
            group.answers = [range(len(ids)) for ids in group.answers]  # only their lengths: ids fill the memory
            kept[kind].append((step, group))
        if len(kept[kind]) > max(1, most // len(KINDS)):
            kept[kind] = kept[kind][::2]
            stride[kind] *= 2
        counts[kind] += 1
        counts["groups"] += 1
        counts["answers"] += len(group.texts)
    return sum(kept.values(), []), counts


def write_page(curves: bytes, **parts) -> str:
    """The text of report.html, from page.html.jinja and its parts."""
    form = Path(__file__).with_name("page.html.jinja").read_text()
    page = Template(form, autoescape=True, undefined=StrictUndefined).render(
        parts, curves=base64.b64encode(curves).decode(), nonce=secrets.token_hex(), zip=zip, series=pandas.Series,
        parse_scores=parse_scores, prompt_text=prompt_text)
    return page.encode("utf-8", "replace").decode()  # half of a surrogate pair, which JSON may hold, becomes "?"
