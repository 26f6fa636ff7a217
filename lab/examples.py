"""What a model answered before a run and after it, side by side: the end of `make demo`."""
import textwrap
from itertools import zip_longest

from data import KINDS, score_line

WIDTH = 52  # characters of a column


def side_by_side(rows: list[tuple[dict, dict]]) -> str:
    """One held-out prompt of each kind, with its first sampled answer before and after.

    rows: (before, after) of each row, as `eval.py heldout` writes them. Not the best ones: of each kind the first row
    whose first sampled answer changed.

    >>> row = {"kind": "reasoning", "asked": "2 + 2?", "responses": [], "truth": "4"}
    >>> print(side_by_side([({**row, "sampled": ["5"]}, {**row, "sampled": ["4"]})]))
    <BLANKLINE>
    reasoning, held out: 2 + 2?
      truth: 4
      before                                                after
      5                                                     4
    """
    lines = []
    for kind in KINDS:
        pair = first_change(kind, rows)
        if pair is None:
            continue
        before, after = pair
        lines += ["", f"{kind}, held out: {before['asked']}"]
        for number, response in enumerate(before["responses"], 1):
            lines.append(f"  response {number}: {printable(response)}")
        if kind == "preference":
            lines.append(f"  truth: response 1 is better, {score_line(before['truth'])}")
        elif before["truth"]:
            lines.append(f"  truth: {before['truth']}")
        left, right = column("before", before["sampled"][0]), column("after", after["sampled"][0])
        for a, b in zip_longest(left, right, fillvalue=""):
            lines.append(f"  {a.ljust(WIDTH + 2)}{b}".rstrip())
    return "\n".join(lines)


def first_change(kind: str, rows: list[tuple[dict, dict]]) -> tuple[dict, dict] | None:
    for before, after in rows:
        if before["kind"] == kind and before["sampled"][0] != after["sampled"][0]:
            return before, after
    return None


def printable(text: str) -> str:
    """A text as a terminal may show it: its control characters are spelled out, but for line ends."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def column(title: str, text: str) -> list[str]:
    lines = [title]
    for line in printable(text).split("\n"):
        lines += textwrap.wrap(line, WIDTH) or [""]
    return lines
