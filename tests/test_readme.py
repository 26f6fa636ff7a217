"""README and docs say what is true: links lead somewhere, names exist, commands parse, recipes apply and run."""
import importlib
import inspect
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import data
import urpo
from conftest import ROOT

PAGES = {}  # without the changelog, which names older code too
for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
    PAGES[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
README, FORK = PAGES["README.md"], PAGES["docs/fork.md"]
SPEARMAN, REWARD, FORMAT, KL, TRACKER, KIND = re.findall(r"```diff\n(.*?)```", README + FORK, re.DOTALL)


def prose(text: str) -> str:
    """A page without its blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_file_and_name_of_a_page_exists(page):
    for link in re.findall(r"\]\(([^)#]+)", PAGES[page]):
        assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link
    for name in set(re.findall(r"`((?:lab|infra|tests|docs)/[\w./]*\w)`", PAGES[page])):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"`((?:urpo|data|rewards|eval|infra|lab)(?:\.\w+)+)`", PAGES[page])):
        if not name.endswith((".py", ".jsonl")):
            pkgutil.resolve_name(name)
    if page in ("README.md", "docs/decisions.md", "docs/log.md", "docs/questions.md"):
        others = {"nproc_per_node", "shutdown", "help"}  # torchrun's and argparse's
        assert set(re.findall(r"--([a-z]\w*)", prose(PAGES[page]))) <= others | vars(urpo.Config()).keys()


def test_the_tree_shows_every_file_of_the_root_and_of_infra():
    named = set(re.findall(r"\w+\.py", README.split("## The house")[1].split("```")[1]))
    loop = {path.name for folder in (ROOT, ROOT / "infra") for path in folder.glob("*.py")} - {"__init__.py"}
    assert loop <= named <= loop | {path.name for path in (ROOT / "lab").glob("*.py")}


def test_the_seven_parts_bear_the_same_names_everywhere():
    parts = [part[::-1] for part in re.findall(r'clock\("(\w+)"\)  # part (\d)', inspect.getsource(urpo.train))]
    assert len(parts) == 7 and re.findall(r"^\| (\d)\. (\w+) \|", README, re.MULTILINE) == parts
    assert re.findall(r"^ +(\d)\. (\w+) ", urpo.__doc__, re.MULTILINE) == parts
    picture = (ROOT / "docs" / "loop.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in picture for _, name in parts)


def test_the_log_has_exactly_the_keys_of_its_page(process_group):
    groups, clock, keys = [], urpo.ranks.Clock(), {"step"}
    for kind in data.KINDS:
        groups.append(data.Group(0, data.Prompt(kind, "q", truth=(1.0, 0.0)), [1], [[1], [2]], ["a", "b"], [True, True],
                                 rewards=[0.0, 1.0], advantages=[-0.7, 0.7]))

    def write(line, records, shown):
        assert shown.keys() == set(data.KINDS)
        keys.update(line.keys() - set(data.KINDS), *(line[kind] for kind in data.KINDS))

    figures = urpo.update(urpo.Config(), None, SimpleNamespace(state={}), [[]])
    clock("draw")
    urpo.record(urpo.Config(minibatches=1), SimpleNamespace(write=write), groups, figures | clock.figures(), 0)
    keys |= set(re.findall(r'figures\["(\w+)"\] =', inspect.getsource(urpo.train)))
    named = re.findall(r"^\| (`.*?) \|", PAGES["docs/log.md"].split("\n## A referee")[0], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(named))) == keys


def commands() -> list[str]:
    """Every command of a shell block, and every one in backticks."""
    found = set()
    for text in PAGES.values():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found |= {line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines()}
        found |= set(re.findall(r"`([^`\n]*)`", prose(text)))
    return sorted(line for line in found if re.match(r"(python|torchrun|make) [^.]", line))


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command, monkeypatch, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    while words[1].startswith("--"):  # of torchrun
        words.pop(1)
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if program.startswith("tests/"):
        assert (ROOT / program).is_file()
    elif program == "urpo.py" and "--help" not in arguments:
        urpo.parse(urpo.Config, urpo.PRESETS, arguments, "")
    else:
        part = [word for word in arguments[:1] if re.fullmatch("[a-z]+", word)]  # of eval.py and lab.toy
        monkeypatch.setattr(sys, "argv", [program, *part, "--help"])
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit):
            runpy.run_module(program.removesuffix(".py"), run_name="__main__", alter_sys=True)
        said = "".join(capsys.readouterr())
        assert all(word in said for word in arguments if word.startswith("--")), said


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A function that applies diffs to a copy of the code, and gives the copy's modules data and rewards."""
    def apply(*diffs):
        shutil.copytree(ROOT / "infra", tmp_path / "infra")
        for file in ROOT.glob("*.py"):
            shutil.copy(file, tmp_path)
        for diff in diffs:
            subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("data", "rewards"):  # those of the fork, until the test ends
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module("data"), importlib.import_module("rewards")

    return apply


def test_the_recipe_of_another_verifiable_reward(fork):
    own, forked = fork(REWARD)
    prompt = own.read_row("reasoning", "file:1", {"question": "Count.", "answer": "/^[ab]+$"})
    assert "box" not in own.prompt_text(prompt)
    group = SimpleNamespace(prompt=prompt, texts=["abb", "abc"], finished=[True, True])
    assert forked.group_rewards(None, group) == [1.0, 0.0]
    with pytest.raises(urpo.InputError, match="answer"):
        own.read_row("reasoning", "file:1", {"question": "Count.", "answer": "/("})


def test_the_recipes_of_a_format_and_of_another_correlation(fork):
    own, forked = fork(FORMAT, SPEARMAN)
    assert own.read_row("reasoning", "file:1", {"query": "1 + 1?", "answer": "2"}).instruction == "1 + 1?"
    assert forked.kendall_tau([9, 8, 6, 7], [3, 2, 1, 0]) == pytest.approx(0.8)
    assert forked.kendall_tau([5, 5], [1, 0]) == 0


@pytest.mark.slow
def test_the_recipes_of_kl_a_tracker_and_a_fourth_kind(fork, taught_model, tmp_path):
    """No answer is brief enough, so no group has a signal: weight decay moves the model, and KL sees it."""
    from tiny_run import lines, run

    fork(KL, TRACKER, KIND)
    (tmp_path / "wandb.py").write_text("import json, sys\nrun, init = None, lambda **settings: sys.modules['wandb']\n"
                                       "log = lambda said, step: print(json.dumps(said), file=open('said', 'a'))\n")
    row = json.dumps({"instruction": "Name a bird.", "words": -1})
    (tmp_path / "briefs.jsonl").write_text(f"{row}\n{row}\n")
    run(tmp_path, taught_model, *"--briefs briefs.jsonl --mix 0:0:0:1 --batch 8 --steps 2 --kl 1".split(),
        "--lr", "1.5", "--minibatches", "1", ranks=1, program=tmp_path / "urpo.py")
    log = lines(tmp_path / "runs" / "e2e" / "log.jsonl")
    assert [line["brief"]["zero_spread"] for line in log] == [1, 1] and [line["updates"] for line in log] == [1, 1]
    assert 0 <= log[0]["loss"] < log[1]["loss"]
    assert lines(tmp_path / "said") == log


@pytest.mark.slow
def test_all_sides_of_the_benchmark_run_at_real_lengths(taught_model, tmp_path):
    command = [sys.executable, ROOT / "tests/bench/speed.py", "--model", taught_model, "--out", tmp_path / "out",
               "--repeats", "1", "--cases", "a", "4 answers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out").read_text())
    assert all(side["rest"] > 0 for side in (*found["step"]["a"].values(), found["growth"]["4 answers"]["ours"]))
    assert all(found["rollout"]["a"][side]["rollout"] > 0 for side in ("rollout", "bare"))


def test_the_table_of_the_speed_page_is_what_the_benchmark_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    speed = runpy.run_path(str(ROOT / "tests" / "bench" / "speed.py"), run_name="speed")
    found = json.loads((ROOT / "docs" / "speed.json").read_text())
    speed["show"]("step", found["step"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert printed and all(line in PAGES["docs/speed.md"] for line in printed)
