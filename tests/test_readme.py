"""README and docs say what is true: links lead somewhere, names exist, commands parse, recipes apply and run."""
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from types import SimpleNamespace

import pytest

import data
import rewards
import urpo
from conftest import ROOT
from infra import ranks
from infra.settings import parse

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
PAGES |= {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
NOW = {name: text for name, text in PAGES.items() if name != "CHANGELOG.md"}  # which speaks of older code too
RECIPES = re.findall(r"```diff\n(.*?)```", PAGES["README.md"] + PAGES["docs/fork.md"], re.DOTALL)
SPEARMAN, REWARD, FORMAT, KL, TRACKER, KIND = RECIPES


# ---- links, names, flags ----


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        if not link.startswith("http"):
            found = (ROOT / page).parent / path if path else ROOT / page
            assert found.exists(), link
            assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), link


def lookup(name: str):
    """What a dotted name stands for: a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:end])
        if folder.is_dir() or folder.with_suffix(".py").is_file():
            found = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AttributeError(name)


@pytest.mark.parametrize("page", NOW)
def test_every_function_and_file_that_a_page_names_exists(page):
    for name in set(re.findall(r"`((?:urpo|data|rewards|eval|infra|lab)(?:\.\w+)+)`", NOW[page])):
        if not name.endswith((".py", ".jsonl")):
            assert lookup(name) is not None, name
    for path in set(re.findall(r"`((?:lab|infra|tests|docs)/[\w./]*\w)`", NOW[page])):
        assert (ROOT / path).exists(), path


def test_every_file_of_the_tree_exists():
    tree = re.search(r"## The house\n\n```\n(.*?)```", PAGES["README.md"], re.DOTALL)[1]
    folder, named = ROOT, 0
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split()[0] if "/" in line.split()[0] else ROOT
        for name in re.findall(r"\w+\.py", line):
            assert (folder / name).is_file(), (folder, name)
            named += 1
    assert named > 15


@pytest.mark.parametrize("page", ["README.md", "docs/decisions.md", "docs/log.md", "docs/questions.md"])
def test_every_setting_that_a_page_names_exists(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    others = {"nproc_per_node", "shutdown", "help"}  # torchrun's, argparse's
    assert set(re.findall(r"--([a-z]\w*)", prose)) <= others | {one.name for one in fields(urpo.Config)}


def test_each_of_the_ten_questions_names_something_that_exists():
    asked = re.split(r"^\*\*(\d+)\. ", PAGES["docs/questions.md"], flags=re.MULTILINE)
    assert asked[1::2] == [str(number) for number in range(1, 11)]
    for text in asked[2::2]:  # that these exist, the tests above say
        assert re.search(r"`(urpo|data|rewards|infra)\.\w+", text) or re.search(r"`(\w+/|make )|\]\(\w+\.md", text), text


def test_the_seven_parts_bear_the_same_names_everywhere():
    parts = re.findall(r'clock\("(\w+)"\)  # part (\d)', inspect.getsource(urpo.train))
    assert re.findall(r"^\| (\d)\. (\w+) \|", PAGES["README.md"], re.MULTILINE) == [part[::-1] for part in parts]
    assert re.findall(r"^ +(\d)\. (\w+) ", urpo.__doc__, re.MULTILINE) == [part[::-1] for part in parts]
    picture = (ROOT / "docs" / "loop.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in picture for name, _ in parts)


# ---- the table of the log ----


def a_group(kind: str, **fields) -> data.Group:
    return data.Group(0, data.Prompt(kind, "q", **fields), [1], answers=[[1], [2]], texts=["a", "b"],
                      finished=[True, True], rewards=[0.0, 1.0], advantages=[-0.7, 0.7])


def test_the_log_has_exactly_the_keys_of_its_page(process_group):
    groups = [a_group("preference", truth=(1.0, 0.0)), a_group("reasoning"), a_group("instruction")]
    config, clock, kept = urpo.Config(minibatches=1), ranks.Clock(), {}
    figures = urpo.update(config, None, SimpleNamespace(state={}), [[]])
    clock("draw")
    keys = {"step", *re.findall(r'figures\["(\w+)"\]', inspect.getsource(urpo.train)), *figures, *clock.figures()}

    def write(step, figures, make):
        kept.update(make()[1])
        keys.update(figures)

    urpo.record(config, SimpleNamespace(write=write), groups, figures | clock.figures(), 0)
    keys.update(*kept.values())
    assert set(kept) == set(data.KINDS)
    table = PAGES["docs/log.md"].split("\n## A referee")[0]
    named = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(named))) == keys


# ---- commands ----


def commands() -> list[str]:
    """Every command of a shell block, and every one in backticks."""
    found = set()
    for text in NOW.values():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found |= {line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines()}
        found |= set(re.findall(r"`((?:python|torchrun|make) [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    return sorted(line for line in found if line.startswith(("python", "torchrun", "make")) and "..." not in line)


@cache
def help_of(*program: str) -> str:
    """What a program of ours says to --help, in this process: an import of torch takes seconds."""
    said, before = [], (sys.argv, sys.stdout, sys.stderr, os._exit)
    sys.stdout = sys.stderr = SimpleNamespace(write=said.append, flush=lambda: None)
    os._exit = sys.exit
    try:
        sys.argv = [*program, "--help"]
        if program[0].endswith(".py"):
            runpy.run_path(str(ROOT / program[0]), run_name="__main__")
        else:
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    except SystemExit:
        pass
    finally:
        sys.argv, sys.stdout, sys.stderr, os._exit = before
    return "".join(said)


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets)
        return
    while words[1].startswith("--"):  # of torchrun
        words.pop(1)
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if program == "urpo.py" and "--help" not in arguments:
        parse(urpo.Config, urpo.PRESETS, arguments, "")
    elif program.startswith("tests/"):
        assert (ROOT / program).is_file()
    elif program != "pytest":
        part = [word for word in arguments[:1] if re.fullmatch("[a-z]+", word)]  # of eval.py and lab.toy
        said = help_of(program, *part)
        assert all(word in said for word in arguments if word.startswith("--")), said


# ---- recipes ----


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A copy of the code in a folder, and a function that applies diffs to it."""
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)

    def apply(*diffs):
        for diff in diffs:
            done = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
            assert done.returncode == 0, done.stderr
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("urpo", "data", "rewards"):  # those of the fork, until the test ends
            monkeypatch.delitem(sys.modules, name)
        return tmp_path

    return apply


def answered(*texts, answer: str):
    return SimpleNamespace(prompt=data.Prompt("reasoning", "q", answer=answer), texts=list(texts))


def test_another_verifiable_reward(fork):
    fork(REWARD)
    data, rewards = importlib.import_module("data"), importlib.import_module("rewards")
    prompt = data.read_row("reasoning", "file:1", {"question": "Count.", "answer": "/^[ab]+$"})
    assert "box" not in data.prompt_text(prompt)
    assert rewards.group_rewards(None, answered("abb", "abc", answer=prompt.answer)) == [1.0, 0.0]
    assert rewards.group_rewards(None, answered("so 7", answer="7")) == [1.0]
    with pytest.raises(ranks.InputError, match="answer"):
        data.read_row("reasoning", "file:1", {"question": "Count.", "answer": "/("})


def test_a_new_format(fork):
    fork(FORMAT)
    record = {"query": "1 + 1?", "answer": "2"}
    assert importlib.import_module("data").read_row("reasoning", "file:1", record).instruction == "1 + 1?"


def test_another_rank_correlation(fork):
    fork(SPEARMAN)
    forked = importlib.import_module("rewards")
    assert forked is not rewards and forked.kendall_tau([9, 8, 6, 7], [3, 2, 1, 0]) == pytest.approx(0.8)
    assert forked.kendall_tau([5, 5], [1, 0]) == 0


@pytest.mark.slow
def test_kl_a_tracker_and_a_fourth_kind_in_one_run(fork, taught_model, tmp_path_factory):
    """No answer is brief enough, so no group has a signal: all that moves the model is weight decay, and KL back."""
    from tiny_run import lines, run

    folder, code = tmp_path_factory.mktemp("forked"), fork(KL, TRACKER, KIND)
    (code / "wandb.py").write_text("import json\nrun = None\n\ndef init(**settings):\n    return __import__('wandb')\n\n"
                                   "def log(figures, step):\n    print(json.dumps(figures), file=open('said', 'a'))\n")
    (folder / "briefs.jsonl").write_text("".join(
        json.dumps({"instruction": f"Name {number} birds.", "words": -1}) + "\n" for number in range(8)))
    run(folder, taught_model, "--briefs", "briefs.jsonl", "--mix", "0:0:0:1", "--batch", "8", "--steps", "2", "--kl",
        "1", "--weight_decay", "50", ranks=1, program=code / "urpo.py")
    log = lines(folder / "runs" / "e2e" / "log.jsonl")
    assert [line["brief"]["zero_spread"] for line in log] == [1, 1] and [line["updates"] for line in log] == [2, 2]
    assert 0 <= log[0]["loss"] < log[1]["loss"]
    assert lines(folder / "said") == [{key: line[key] for key in line if key != "step"} for line in log]
