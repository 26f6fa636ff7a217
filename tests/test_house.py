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
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def words(*patterns) -> int:
    return sum(len(path.read_text().split()) for pattern in patterns for path in ROOT.glob(pattern))


def test_the_root_holds_four_scripts_and_all_is_as_short_as_it_claims():
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS
    lines = {name: text.count("\n") for name, text in CODE.items()}
    assert lines["urpo.py"] <= 430 and sum(lines[name] for name in SCRIPTS) <= 2100
    assert max(lines.values()) <= 620
    assert sum(lines.values()) <= 5540  # the aim, 5,200, is not reached
    assert sum(path.read_text().count("\n") for path in ROOT.glob("tests/**/*.py")) <= 6000
    assert words("README.md") <= 1500 and words("README.md", "docs/**/*.md") <= 9000


@pytest.mark.parametrize("name", CODE)
def test_no_code_is_squeezed(name):
    """Tokens a code line, comprehensions per 100 code lines: nanoGPT has 7.4 and 2, nanochat 8.9 and 4."""
    nodes, lines, documented, tokens = list(ast.walk(ast.parse(CODE[name]))), set(), set(), 0
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
    for token in tokenize.generate_tokens(io.StringIO(CODE[name]).readline):
        if token.type not in SILENT and token.start[0] not in documented:
            tokens += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    comprehensions = sum(isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
                         for node in nodes)
    tight = name in SCRIPTS or name == "infra/rows.py"
    assert tokens / len(lines) <= (10.5 if tight else 12)
    assert 100 * comprehensions / len(lines) <= (8 if tight else 12)


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
        row = build_row([group], 1.0)
        visits.append(0)
        sys.setprofile(watch)
        policy(row)
        sys.setprofile(None)
    assert 0 < visits[0] == visits[1] <= 60 * (1 + len(policy.lm.model.layers))
    assert any(isinstance(one, Row) for one in given)
    assert not any(dataclasses.is_dataclass(one) for one in given)


@pytest.mark.slow
def test_without_lab_training_and_evaluation_still_work(tmp_path, taught_model):
    from tiny_run import OF_RANKS, urpo_with

    few = {"preferences": {"prompt": "Say hi.", "chosen": "hi", "rejected": "no"},
           "reasoning": {"question": "What is 2 + 2?", "answer": "4"}, "instructions": {"instruction": "Say hi."}}
    for flag, row in few.items():
        (tmp_path / f"{flag}.jsonl").write_text(json.dumps(row) + "\n")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns("lab", "tests", "runs", "toy", ".*", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name not in (*OF_RANKS, "PYTHONPATH")}
    rows = [part for flag in few for part in (f"--{flag}", f"{flag}.jsonl")]
    for command in ([*urpo_with(taught_model, checkout / "urpo.py"), "--steps", "2"],
                    [checkout / "eval.py", "heldout", "--model", "runs/e2e/checkpoints/last/model", *rows,
                     "--json", "it.json"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-4000:]
    assert len((tmp_path / "runs" / "e2e" / "log.jsonl").read_text().splitlines()) == 2
    for part in json.loads((tmp_path / "it.json").read_text())["figures"].values():
        assert part and all({"value", "low", "high", "count"} <= set(figure) for figure in part.values())
