"""Write the right line numbers into docs/questions.md and into the README's diffs: `python tests/anchors.py`.

Line numbers move with every change of the code. tests/test_readme.py checks them. The tables of
docs/evidence-method.md are made of docs/evidence.csv again too.
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def renewed_anchor(match: re.Match) -> str:
    """The anchor of one name, at the line that defines it."""
    name, path = match[1], match[2]
    own = name.rpartition(".")[2]
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        if re.match(rf"(def|class) {own}\b|{own} = ", line):
            return f"[`{name}`](../{path}#L{number})"
    raise SystemExit(f"docs/questions.md names {name}, and {path} does not define it")


def renewed_diff(match: re.Match) -> str:
    """A diff whose hunks begin at the line where their old text stands today."""
    path, added = match[1], 0  # added: lines that the hunks before put into the file
    code = (ROOT / path).read_text()
    hunks = []
    for hunk in re.split(r"^@@.*@@\n", match[2], flags=re.MULTILINE)[1:]:
        old = [line[1:] for line in hunk.splitlines() if line[0] in " -"]
        new = [line[1:] for line in hunk.splitlines() if line[0] in " +"]
        if code.count("\n".join(old)) != 1:
            raise SystemExit(f"README.md: a diff of {path} finds its lines not once: {old}")
        first = code[: code.index("\n".join(old))].count("\n") + 1
        hunks.append(f"@@ -{first},{len(old)} +{first + added},{len(new)} @@\n{hunk}")
        added += len(new) - len(old)
    return f"--- a/{path}\n+++ b/{path}\n" + "".join(hunks)


page = ROOT / "docs" / "questions.md"
page.write_text(re.sub(r"\[`([^`]+)`\]\(\.\./([\w/.]+)#L\d+\)", renewed_anchor, page.read_text(encoding="utf-8")))
readme = ROOT / "README.md"
text = readme.read_text(encoding="utf-8")
readme.write_text(re.sub(r"--- a/(\S+)\n\+\+\+ .*\n((?:@@.*\n(?:[ +-].*\n)+)+)", renewed_diff, text))

# What `report/evidence.py --show` prints: the first line of docs/evidence.md, then the tables of evidence-method.md.
show = [sys.executable, ROOT / "report" / "evidence.py", "--show", "--csv", ROOT / "docs" / "evidence.csv"]
shown = subprocess.run(show, capture_output=True, text=True, check=True).stdout
headline, _, tables = shown.partition("\n")
page = ROOT / "docs" / "evidence.md"
findings = page.read_text(encoding="utf-8").partition("\n")[2]
page.write_text(f"{headline}\n{findings}", encoding="utf-8")
page = ROOT / "docs" / "evidence-method.md"
method = page.read_text(encoding="utf-8").partition("\n## Tables\n")[0]
page.write_text(f"{method}\n## Tables\n{tables}", encoding="utf-8")
