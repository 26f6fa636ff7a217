"""Curves and held-out answers of made-up runs, which urpo's own functions write. No model, no sampler."""
import json
import math
import re
from dataclasses import asdict

import pytest
from matplotlib.figure import Figure

import data
import urpo
from data import Prompt
from infra.ranks import InputError
from lab import report
from rewards import step_figures
from tiny_run import write_lines

PROMPTS = {
    "preference": Prompt("preference", "Rank these.", ("one", "two", "three"), (2.0, 1.0, 0.0)),
    "reasoning": Prompt("reasoning", "What is 2 + 2?", answer="4"),
    "instruction": Prompt("instruction", "Write a single sentence about dogs."),
}


def made_up_group(index, kind, judge, answer):
    """Four answers that urpo has not yet rewarded."""
    prompt, texts = PROMPTS[kind], [answer, answer * 3] * 2
    if kind != "instruction":
        texts = [judge(3)] * 4 if kind == "preference" else ["so 4", "so 5"] * 2
    group = data.Group(index, prompt, [1, 2, 3], [[7] * len(text) for text in texts], texts, [True] * 4)
    if kind == "instruction":
        group.judgements = [{"order": [0, 1, 2, 3], "prompt": "Score < these.", "text": judge(4),
                                 "finished": True}]
    return group


def made_up_run(folder, judge=lambda n: data.score_line(range(1, n + 1)), answer="An answer.", prompts=1):
    """The folder of a run of six steps, two of them warm-up: `judge(n)` writes a score line over n texts."""
    folder.mkdir(parents=True)
    config = urpo.Config(warmup_steps=2, group=4, minibatches=1, model="made-up")
    (folder / "config.json").write_text(json.dumps({"config": asdict(config)}))
    log, records = [], []
    for step in range(6):
        kinds = data.KINDS[: 3 if step >= 2 else 2] * prompts
        groups = [made_up_group(index, kind, judge, answer) for index, kind in enumerate(kinds)]
        groups = urpo.reward(config, groups)
        log.append({"step": step, **step_figures(config, groups), "seconds": {"update": 1.0}, "drift_mean": 1e-5})
        records += [group.to_record(step) for group in groups]
    write_lines(folder / "log.jsonl", *log)
    write_lines(folder / "rollouts.jsonl", *records)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds; it is done in the test that looks at pictures."""
    monkeypatch.setattr(report, "draw_curves", lambda *_: b"")


def test_a_gap_is_never_a_zero_in_curves(tmp_path, monkeypatch):
    taus = enumerate([None, 2.0, math.nan])
    write_lines(tmp_path / "log.jsonl", *({"step": step, "preference": {"tau": tau}} for step, tau in taus))
    drawn = {}

    def look(figure, *_, **__):
        for axis in figure.axes:
            curves = [list(line.get_ydata()) for line in axis.lines]
            drawn[axis.get_title()] = curves, [text.get_text() for text in axis.texts]

    monkeypatch.setattr(Figure, "savefig", look)
    report.main([str(tmp_path)])
    ((taus,), said) = drawn["tau of readable rankings should rise"]
    assert math.isnan(taus[0]) and taus[1] == 2 and math.isnan(taus[2]) and not said
    assert sum("not measured" in said for _, said in drawn.values()) == len(report.PANELS) - 1


def test_hidden_gold_is_drawn_where_it_knows_the_instructions(tmp_path):
    folder = made_up_run(tmp_path / "run")
    assert list(report.read_figures(folder, [])["other_three"].isna()) == [True] * 2 + [False] * 4  # warm-up has none
    lines = (folder / "rollouts.jsonl").read_text()
    (folder / "rollouts.jsonl").write_text(lines.replace("about dogs", "about nothing known"))
    assert report.read_figures(folder, [])["other_three"].isna().all()


def test_what_was_measured_held_out_is_a_table_and_answers_side_by_side(no_pictures, tmp_path, capsys):
    folder = made_up_run(tmp_path / "run")
    for name, text, value in (("after", "it is 4", 1.0), ("before", "it is \x1b[31m5", 0.0)):
        answer = {"kind": "reasoning", "asked": "2 + 2?", "responses": [], "truth": "4", "sampled": [text]}
        figures = {"reasoning": {"solved": {"value": value, "low": None, "high": None, "count": 1}}}
        result = {"figures": figures, "settings": {}, "answers": [answer]}
        (folder / f"heldout-{name}.json").write_text(json.dumps(result))
    report.main([str(folder)])
    said = capsys.readouterr().out
    assert re.search("reasoning: solved +0.00 +1.00 +- +-\n", said) and "\x1b" not in said
    assert said.count("the first that became right") == 1
    assert re.search(r"it is \\x1b\[31m5 +it is 4", said)
    (folder / "heldout-after.json").write_text(json.dumps(result | {"settings": {"rows": 48}}))
    with pytest.raises(InputError, match="differ in --rows"):
        report.report(folder)


@pytest.mark.parametrize("name, content, message", [
    ("log.jsonl", "", "no step is complete yet"),
    ("config.json", '{"config": ', "config.json:1: not JSON"),
    ("heldout-after.json", "noise", "heldout-after.json"),
])
def test_what_is_no_run_is_refused_and_nothing_is_overwritten(no_pictures, tmp_path, name, content, message):
    folder = made_up_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        report.report(folder)
    assert not (folder / "curves.png").exists()
