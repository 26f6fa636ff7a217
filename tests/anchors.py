"""Write the right line numbers into docs/questions.md: `python tests/anchors.py`. tests/test_readme.py checks them."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def renewed(match: re.Match) -> str:
    """The anchor of one name, at the line that defines it."""
    name, path = match[1], match[2]
    own = name.rpartition(".")[2]
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        if re.match(rf"(def|class) {own}\b|{own} = ", line):
            return f"[`{name}`](../{path}#L{number})"
    raise SystemExit(f"docs/questions.md names {name}, and {path} does not define it")


page = ROOT / "docs" / "questions.md"
page.write_text(re.sub(r"\[`([^`]+)`\]\(\.\./([\w/.]+)#L\d+\)", renewed, page.read_text(encoding="utf-8")))
