"""The house: four scripts and two folders, imports one way, lines and density within bounds; lab/ can be deleted."""
import ast
import dataclasses
import doctest
import graphlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tokenize

import pytest

import urpo
from conftest import ROOT
from data import Group
from infra.rows import Row, build_row

SCRIPTS = ["data.py", "eval.py", "rewards.py", "urpo.py"]
CODE = {str(path.relative_to(ROOT)): path.read_text() for pattern in ("*.py", "infra/*.py", "lab/*.py")
        for path in sorted(ROOT.glob(pattern)) if path.name != "__init__.py"}
MAY_IMPORT = {"infra": set(), "rewards": {"infra"}, "data": {"infra"}, "urpo": {"data", "rewards", "infra"},
              "eval": {"urpo", "data", "rewards", "infra"}, "lab": {"eval", "urpo", "data", "rewards", "infra"}}


def words(*patterns) -> int:
    return sum(len(path.read_text().split()) for pattern in patterns for path in ROOT.glob(pattern))


def test_the_root_holds_four_scripts_and_all_is_as_short_as_it_claims():
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
    lines = {name: text.count("\n") for name, text in CODE.items()}
    assert lines["urpo.py"] <= 430 and sum(lines[name] for name in SCRIPTS) <= 2100
    assert max(lines.values()) <= 620 and sum(lines.values()) <= 5000
    assert sum(path.read_text().count("\n") for path in ROOT.glob("tests/**/*.py")) <= 6000
    assert words("README.md") <= 1500 and words("README.md", "docs/**/*.md") <= 9000


def docstring_lines(tree) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


@pytest.mark.parametrize("name", CODE)
def test_no_code_is_squeezed(name):
    """Tokens and comprehensions by the lines that hold code; nanoGPT has 7.4 and 2, nanochat 8.9 and 4 per 100."""
    tree, lines, tokens = ast.parse(CODE[name]), set(), 0
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    documented = docstring_lines(tree)
    for token in tokenize.generate_tokens(io.StringIO(CODE[name]).readline):
        if token.type not in silent and token.start[0] not in documented:
            tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    comprehensions = sum(isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
                         for node in ast.walk(tree))
    tight = name in SCRIPTS or name == "infra/rows.py"
    assert tokens / len(lines) <= (10.5 if tight else 12)
    assert 100 * comprehensions / len(lines) <= (8 if tight else 12)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name


@pytest.mark.parametrize("name", CODE)
def test_worked_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name.removesuffix(".py").replace("/", ".")))
    assert failed == 0 and (attempted >= 18 or name != "rewards.py")


def test_imports_go_one_way():
    modules = {name.removesuffix(".py").replace("/", ".") for name in CODE}
    graph = {}
    for name, text in CODE.items():
        module, imported = name.removesuffix(".py").replace("/", "."), set()
        for node in ast.walk(ast.parse(text)):  # also within functions
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.update([node.module, *[f"{node.module}.{alias.name}" for alias in node.names]])
        graph[module] = imported & modules
        room = module.partition(".")[0]
        assert {other.partition(".")[0] for other in graph[module]} <= MAY_IMPORT[room] | ({room} & {"infra", "lab"})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_number_of_the_config_has_a_bound():
    fields = dataclasses.fields(urpo.Config)
    assert len(fields) <= 38
    for one in fields:
        if isinstance(one.default, (int, float)) and not isinstance(one.default, bool) and one.name != "seed":
            assert one.metadata["above"] is not None or one.metadata["least"] is not None, one.name


def test_fsdp_walks_past_a_row_whatever_its_length(make_policy):
    """FSDP2 walks through every dataclass, list and dict among a layer's arguments, element by element."""
    policy, visits, given = make_policy(), [], []
    for layer in policy.lm.model.layers:
        layer.register_forward_pre_hook(lambda layer, args, options: given.extend([*args, *options.values()]),
                                        with_kwargs=True)

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.endswith(("torch/distributed/utils.py",
                                                                  "torch/distributed/fsdp/_common_utils.py")):
            visits[-1] += 1

    for tokens in (30, 4500):
        group = Group(0, None, [1] * (tokens // 3), [[2] * (tokens // 3)] * 2, advantages=[1.0, -1.0],
                      sampler_logprobs=[[-1.0] * (tokens // 3)] * 2)
        row = build_row([group], [[1.0, 1.0]])
        visits.append(0)
        sys.setprofile(watch)
        policy(row)
        sys.setprofile(None)
    assert 0 < visits[0] == visits[1] <= 60 * (1 + len(policy.lm.model.layers))
    assert any(isinstance(one, Row) for one in given)
    assert not any(dataclasses.is_dataclass(one) for one in given)


@pytest.mark.slow
def test_without_lab_training_and_evaluation_still_work(tmp_path, taught_model):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns("lab", "tests", "runs", "toy", ".*", "__pycache__"))
    rows = {"preferences": {"prompt": "Say hi.", "responses": ["hi", "no", "ho", "hm"], "scores": [3, 0, 2, 1]},
            "reasoning": {"question": "What is 2 + 2?", "answer": "4"}, "instructions": {"instruction": "Say hi."}}
    sources = []
    for flag, row in rows.items():
        lines = [json.dumps({**row, "number": number}) + "\n" for number in range(4)]
        (tmp_path / f"{flag}.jsonl").write_text("".join(lines))
        sources += [f"--{flag}", f"{flag}.jsonl"]
    settings = ("--preset smol --name alone --steps 2 --warmup_steps 1 --batch 12 --mix 1:1:1 --max_prompt_tokens 700 "
                "--max_answer_tokens 24 --max_referee_tokens 24 --max_judge_tokens 700 --row_tokens 512").split()
    model = "runs/alone/checkpoints/last/model"
    environment = {name: value for name, value in os.environ.items() if name not in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")}
    for command in (["urpo.py", *settings, "--model", taught_model, *sources],
                    ["eval.py", "heldout", "--model", model, *sources, "--json", "heldout.json"]):
        done = subprocess.run([sys.executable, checkout / command[0], *command[1:]], cwd=tmp_path, env=environment,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-4000:]
    assert len((tmp_path / "runs" / "alone" / "log.jsonl").read_text().splitlines()) == 2
    figures = json.loads((tmp_path / "heldout.json").read_text())["figures"]
    assert figures and all({"value", "low", "high", "count"} <= set(one) for part in figures.values()
                           for one in part.values())
