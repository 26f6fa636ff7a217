"""Figures with 95 % intervals, their table and their JSON. Unknown is not zero: it is None, and "-" in a table."""

from __future__ import annotations

import json
import os
import re
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas
from scipy import stats

from infra.ranks import InputError


def figure(value: float | None, count: int, low: float | None = None, high: float | None = None) -> dict:
    """A figure as it stands in a JSON: value, 95 % interval, number of rows (or of what is stated) behind it."""
    found = {"value": value, "low": low, "high": high}
    for name, number in found.items():
        found[name] = None if number is None else round(float(number), 4)
    return found | {"count": count}


def known(values) -> list:
    """What was measured: the values that are not None."""
    return [value for value in values if value is not None]


def interval(values, share: bool = True) -> dict:
    """Mean of one value a row, and its 95 % interval (ours): of a share Wilson's if all are 0 or 1, else a bootstrap.

    Rows are the unit, since the samples of one row are no independent trials. None is left out. Equal values have no
    interval unless they are shares.

    >>> interval([1, 0, 1, 1, None])
    {'value': 0.75, 'low': 0.3006, 'high': 0.9544, 'count': 4}
    >>> interval([None])
    {'value': None, 'low': None, 'high': None, 'count': 0}
    """
    values = list(map(float, known(values)))
    if not values or not share or set(values) - {0.0, 1.0}:
        return weighted_mean([(values, 1)])
    test = stats.binomtest(int(sum(values)), len(values))
    low, high = test.proportion_ci(method="wilson")
    return figure(sum(values) / len(values), len(values), low, high)


def weighted_mean(parts) -> dict:
    """Mean of the means of several parts [(values, weight), ...], and its 95 % interval by bootstrap.

    The bootstrap draws rows anew within each part, so that the parts keep their weights. None is left out.

    >>> weighted_mean([([1, 1, 0, 0], 1), ([1, 1, None], 3)])
    {'value': 0.875, 'low': 0.75, 'high': 1.0, 'count': 6}
    """
    samples, weights = [], []
    for values, weight in parts:
        if known(values):
            samples.append(known(values))
            weights.append(weight)
    if not samples:
        return figure(None, 0)

    def statistic(*samples, axis=-1):
        means = [np.mean(values, axis) for values in samples]
        return np.average(means, axis=0, weights=weights)

    sizes = list(map(len, samples))
    if min(sizes) < 2 or max(len(set(values)) for values in samples) == 1:  # nothing tells how much rows differ
        return figure(statistic(*samples), sum(sizes))
    rng = np.random.default_rng(0)
    drawn = stats.bootstrap(samples, statistic, n_resamples=2000, method="percentile", rng=rng)
    return figure(statistic(*samples), sum(sizes), *drawn.confidence_interval)


def columns(rows: list[dict]) -> dict[str, list]:
    """The measures of many rows, a list for each measure."""
    found: dict[str, list] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def is_share(name: str) -> bool:
    """Whether a measure of this name is between 0 and 1, of one row 0 or 1."""
    return not re.search("first|tau|reward|std|scale|distinct|length|tokens|entropy|prompts|unjudged", name)


def summary(rows: list[dict]) -> dict[str, dict]:
    """The measures of many rows, an `interval` for each measure."""
    return {name: interval(values, is_share(name)) for name, values in columns(rows).items()}


def table(results: dict[str, dict], last: str = "") -> str:
    """{heading: {"figures": {part: {name: figure}}}} side by side, a column each; the last column may be "n"."""
    measured = [pandas.DataFrame(result["figures"]).unstack().dropna() for result in results.values()]
    shown = pandas.concat([cells.map(cell_text) for cells in measured], axis=1, keys=results)
    if last == "n":
        shown["n"] = measured[0].map(itemgetter("count"))
    return shown.to_string(na_rep="-", sparsify=False)


def cell_text(cell: dict) -> str:
    if cell["value"] is None:
        return "-"
    text = f"{cell['value']:.2f}"
    return text if cell["low"] is None else f"{text} [{cell['low']:.2f}, {cell['high']:.2f}]"


def check_writable(flag: str, path: str) -> None:
    """Refuse a path that nothing can be written to, before the minutes that measuring takes."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--{flag} {path}: no file can be written there; name a file in a folder of yours")


def read_result(path: Path) -> dict:
    """A JSON that a command of eval.py wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read, or is not JSON ({error}); write it anew") from None
    if not isinstance(content, dict) or not {"figures", "settings"} <= content.keys():
        raise InputError(f"{path}: no result of eval.py (no 'figures' and 'settings'); write it with --json {path}")
    return content
