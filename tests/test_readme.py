"""README and docs say what is true: named functions exist, diffs apply and run, links lead somewhere."""
import ast
import importlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

import runs
import urpo
from conftest import ROOT
from tiny_run import lines

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.split()) <= 2500


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:urpo|data|rewards|machine|runs)\.\w+)`", README))))
def test_every_function_that_the_readme_names_exists(name):
    module, attribute = name.split(".")
    if attribute != "py":
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--([a-z_]+)", README))))
def test_every_flag_that_the_readme_names_exists(flag):
    settings = {field.name for field in fields(urpo.Config)}
    others = {"nproc_per_node", "help", "all", "step", "prompt", "unidiff", "plan", "shutdown"}  # of others
    assert flag in settings | others


def test_the_seven_parts_bear_the_same_names_in_readme_code_and_log():
    rows = re.findall(r"^\| (\d)\. (\w+) \|", README, re.MULTILINE)
    assert rows == [(str(number), name) for number, name in enumerate(urpo.PARTS, 1)]
    code = (ROOT / "urpo.py").read_text()
    banners = re.findall(r"^ +# (\d)\. (\w+): ", code, re.MULTILINE)
    assert banners == rows


def test_entropy_is_called_an_estimate_that_is_not_unbiased():
    """Of answers of random length: a simulated policy that stops with a chance of .2 reads 13 % too high at G = 4."""
    (short,) = re.findall(r"^\| `entropy` \|.*$", README, re.MULTILINE)
    (long,) = re.findall(r"^\| `entropy` \| all \|.*$", (ROOT / "docs" / "log.md").read_text(), re.MULTILINE)
    assert "an estimate" in short and "too high" in short and "not an unbiased one" in long
    rng, chance, estimates = random.Random(0), 0.2, []
    for _ in range(2000):
        surprises = []
        for _ in range(4):  # answers of one group; each token stops, or goes on
            while rng.random() >= chance:
                surprises.append(-math.log(1 - chance))
            surprises.append(-math.log(chance))
        estimates.append(sum(surprises) / len(surprises))
    truth = -chance * math.log(chance) - (1 - chance) * math.log(1 - chance)
    assert 1.05 < sum(estimates) / len(estimates) / truth < 1.2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert ((ROOT / document).parent / link).exists(), link


def test_every_anchor_of_the_questions_stands_at_the_line_that_it_names():
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    anchors = re.findall(r"\[`([^`]+)`\]\(\.\./([\w/.]+)#L(\d+)\)", text)
    assert len(anchors) >= 10
    for name, path, line in anchors:
        shown = (ROOT / path).read_text().splitlines()[int(line) - 1]
        assert name.rpartition(".")[2].strip("()") in shown, (name, path, line, shown)


def test_every_setting_stands_in_the_table_of_settings_with_its_defaults():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*)$", text, re.MULTILINE))
    config = urpo.Config()
    assert set(rows) == {field.name for field in fields(config)}
    for name, row in rows.items():
        paper = urpo.PRESETS["paper"].get(name, getattr(config, name))
        smol = urpo.PRESETS["smol"].get(name, getattr(config, name))
        cells = [cell.strip().strip("`") for cell in row.split("|")]
        shown = [" ".join(value) if isinstance(value, list) else f"{value}" for value in (paper, smol)]
        assert cells[:2] == shown, name


def test_training_needs_no_package_of_report_evaluation_or_toy_world():
    blocked = ("matplotlib", "jinja2", "pandas", "sklearn", "peft", "gguf", "datasets")
    parse = "urpo.flags.parse(urpo.Config, urpo.PRESETS, [])"
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import urpo; {parse}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


READING = {  # what a reader of the algorithm must read, beside urpo.py
    "rewards.py": "parse_scores kendall_tau preference_reward verify_answer judge_strides judge_orders self_rewards "
                  "group_rewards REWARD_RANGE group_advantages clipped_objective clipped_tokens loss_denominator "
                  "token_weight",
    "data.py": "Prompt prompt_text shuffle_candidates REFEREE referee_text score_line quoted mix_counts draw shard "
               "interleave epoch_order request_seed judgement_orders encode_judgement",
    "machine.py": "Row build_row add_loss_values visible"}


def test_what_a_reader_of_the_algorithm_must_read_is_short():
    count = len((ROOT / "urpo.py").read_text().splitlines())
    for path, names in READING.items():
        for node in ast.parse((ROOT / path).read_text()).body:
            name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else getattr(node, "name", "")
            if name in names.split():
                count += node.end_lineno - node.lineno + 1
    assert count <= 1000


# ---- the diffs of "How to fork" ----

PATTERN, FORMAT, SPEARMAN = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def forked(tmp_path):
    """A copy of the scripts, and a function that applies a diff to it."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "toy", tmp_path / "toy")

    def apply(diff):
        git = ["git", "apply", "--unidiff-zero", "-"]
        done = subprocess.run(git, input=diff, text=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        return tmp_path

    return apply


def evaluated(folder, expression):
    """The value of an expression over the modules of a forked copy."""
    program = f"import json, data, readers, rewards; print(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_new_verifiable_reward(forked):
    prompt = 'data.Prompt("reasoning", "q", answer="pattern ^ab+$")'
    assert evaluated(forked(PATTERN), f'rewards.group_rewards({prompt}, ["abb", "ba"], [])') == [1.0, 0.0]


def test_a_new_data_format(forked):
    record = '{"query": "1 + 1?", "answer": "2"}'
    assert evaluated(forked(FORMAT), f'readers.read_row("reasoning", "file:1", {record}).instruction') == "1 + 1?"


def test_another_rank_correlation(forked):
    folder = forked(SPEARMAN)
    assert evaluated(folder, "rewards.kendall_tau([9, 8, 6, 7], [3, 2, 1, 0])") == pytest.approx(0.8)
    assert evaluated(folder, "rewards.kendall_tau([5, 5], [1, 0])") == 0


def test_every_key_of_the_log_stands_in_the_readme(finished):
    log = lines(finished / "log.jsonl")
    assert max(line["instruction"]["format"] for line in log[1:]) > 0 and sum(line["updates"] for line in log) > 0
    keys = set()
    for line in log:
        for key, value in line.items():
            keys |= set(value) if key in urpo.data.KINDS else {key}
    table = README[README.index("## How to read the log") : README.index("## How to fork")]
    named = set(re.findall(r"`(\w+)`", table))
    assert keys - {"step"} <= named, keys - named
    assert runs.figures_of_kind([]) == {}
