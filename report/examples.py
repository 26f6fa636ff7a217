"""What a model answered before a run and after it, side by side: the end of `make demo`."""
import textwrap

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
        changed = [(a, b) for a, b in rows if a["kind"] == kind and a["sampled"][0] != b["sampled"][0]]
        if not changed:
            continue
        before, after = changed[0]
        lines += ["", f"{kind}, held out: {before['asked']}"]
        for number, response in enumerate(before["responses"], 1):
            lines.append(f"  response {number}: {response}")
        if before["truth"]:
            truth = before["truth"] if kind == "reasoning" else f"response 1 is better, {score_line(before['truth'])}"
            lines.append(f"  truth: {truth}")
        lines += ["  " + row for row in columns(before["sampled"][0], after["sampled"][0])]
    return "\n".join(lines)


def columns(left: str, right: str) -> list[str]:
    """Two texts beside each other, as a terminal may show them: their control characters are spelled out."""
    texts = []
    for head, text in (("before", left), ("after", right)):
        safe = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
        texts.append([head])
        for line in safe.split("\n"):
            texts[-1] += textwrap.wrap(line, WIDTH) or [""]
    height = max(map(len, texts))
    left, right = [part + [""] * (height - len(part)) for part in texts]
    return [f"{a.ljust(WIDTH + 2)}{b}".rstrip() for a, b in zip(left, right)]
