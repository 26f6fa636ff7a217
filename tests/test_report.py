"""Curves, CSV, page and held-out answers of made-up runs, which urpo's own functions write. The page is read by an
HTML parser; no model and no sampler."""
import json
import math
import random
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure

import data
import urpo
from data import Prompt
from infra.ranks import InputError
from lab import report as module
from lab.report import PANELS, main, read_figures
from rewards import step_figures

HOSTILE = ("</pre></details><script>document.title = 'owned'; console.error('owned')</script>"
           "<img src=x onerror=\"console.error('owned')\">{{ 7 * 7 }} &lt; \" ' <scores>10, 10</scores>")
PROMPTS = {
    "preference": Prompt("preference", "Rank these.", ("one", "two", "three"), (2.0, 1.0, 0.0)),
    "reasoning": Prompt("reasoning", "What is 2 + 2?", answer="4"),
    "instruction": Prompt("instruction", "Tell me about dogs."),
}


def some_scores(rng, n):
    return data.score_line(rng.sample(range(1, 11), n))


def made_up_group(rng, index, prompt, judge, answer):
    """Four answers that urpo has not yet rewarded."""
    texts = []
    for _ in range(4):
        written = {"preference": judge(rng, 3), "reasoning": f"\\boxed{{{rng.choice((4, 5))}}}"}
        texts.append(written.get(prompt.kind, answer * rng.randint(1, 3)))
    group = data.Group(index, prompt, [1, 2, 3], [[7] * len(text) for text in texts], texts, [True] * 4)
    if prompt.kind == "instruction":
        order = rng.sample(range(4), 4)
        shown = data.referee_text(prompt.instruction, [texts[i] for i in order])
        group.judgements = [{"order": order, "cut": 0, "prompt": shown, "text": judge(rng, 4)}]
    return group


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def made_up_run(folder, steps=6, judge=some_scores, answer="An answer.", prompts=1):
    """A run's folder as urpo leaves it, with two steps of warm-up: `judge(rng, n)` writes a score line over n texts."""
    folder.mkdir(parents=True)
    config = urpo.Config(steps=steps, warmup_steps=2, group=4, minibatches=1, model="made-up")
    (folder / "config.json").write_text(json.dumps({"config": asdict(config), "commit": "0" * 40}))
    log, records = [], []
    for step in range(steps):
        rng, groups = random.Random(step), []
        for kind in data.KINDS[: 3 if step >= 2 else 2] * prompts:
            groups.append(made_up_group(rng, len(groups), PROMPTS[kind], judge, answer))
        urpo.reward(config, groups)
        log.append({"step": step, **step_figures(config, groups), "seconds": {"update": 1.0}, "drift_mean": 1e-5})
        records += [group.to_record(step) for group in groups]
    write_lines(folder / "log.jsonl", log)
    write_lines(folder / "rollouts.jsonl", records)
    return folder


def records_of(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """Every tag with its attributes, the text, and the cells of each row of the tables."""

    def __init__(self, folder, *arguments):
        super().__init__()
        main([str(folder), *map(str, arguments)])
        self.tags, self.text, self.rows, self.inside = [], "", [[""]], ""
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, text):
        if self.inside not in ("script", "style"):
            self.text += text
            if self.rows[-1]:
                self.rows[-1][-1] += text

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= own.items() for name, own in self.tags)

    def row(self, title):
        found, = [row for row in self.rows if row and row[0].strip() == title]
        return [cell.strip() for cell in found]


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds; it is done in the tests that look at pictures."""
    monkeypatch.setattr(module, "draw_curves", lambda *_: b"")


# ---- curves and CSV ----


def test_a_gap_is_never_a_zero_in_curves_and_csv(tmp_path, monkeypatch):
    for name, taus in (("a", [None, 2.0, math.nan]), ("b", [4.0])):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "log.jsonl",
                    [{"step": step, "preference": {"tau": tau}} for step, tau in enumerate(taus)])
    drawn = {}

    def look(figure, *_, **__):
        for axis in figure.axes:
            lines = [list(line.get_ydata()) for line in axis.lines if line.get_label() == "preference"]
            drawn[axis.get_title()] = lines, [text.get_text() for text in axis.texts]

    monkeypatch.setattr(Figure, "savefig", look)
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c.png"), "--csv", str(tmp_path / "c.csv")])
    ((mean,), said) = drawn["tau of readable rankings should rise"]
    assert mean[:2] == [4.0, 2.0] and math.isnan(mean[2]) and not said  # the mean of those that measured a step
    assert sum("not measured" in said for _, said in drawn.values()) == len(PANELS)  # all others, and the seconds
    head, *rows = [line.split(",") for line in (tmp_path / "c.csv").read_text().splitlines()]
    assert head == ["run", "step", *" ".join(PANELS.values()).split()]
    assert [row[:2] + [row[head.index("preference.tau")]] for row in rows] == [
        ["a", "0", ""], ["a", "1", "2"], ["a", "2", ""], ["b", "0", "4"]]
    assert not list(tmp_path.glob("*/curves.png")) and not list(tmp_path.glob("*/report.html"))


def test_hidden_gold_is_drawn_where_it_knows_the_instructions(tmp_path):
    folder = made_up_run(tmp_path / "run", answer="Dogs need a walk every day. ")
    table = read_figures(folder, [])
    assert table["gold"][:2].isna().all() and table["gold"][2:].notna().all()
    other = made_up_run(tmp_path / "other")
    (other / "rollouts.jsonl").write_text((other / "rollouts.jsonl").read_text().replace("dogs", "nothing known"))
    assert read_figures(other, [])["gold"].isna().all()


# ---- the page ----


def test_one_file_holds_picture_and_every_trajectory_and_asks_no_network(tmp_path, capsys):
    folder = made_up_run(tmp_path / "run $x_1$", answer="half \ud800, nul \x00, bell \x07, $x_1$ ")
    page = Page(folder)
    assert capsys.readouterr().out.splitlines() == [str(folder / "curves.png"), str(folder / "report.html")]
    assert [page.count("details", **{"class": "group", "data-kind": kind}) for kind in data.KINDS] == [6, 6, 4]
    pictures = [own["src"] for tag, own in page.tags if tag == "img"]
    assert len(pictures) == 1 and pictures[0].startswith("data:image/png;base64,iVBOR")
    assert not [own for _, own in page.tags if own.get("href") or (own.get("src") or "data:")[:5] != "data:"]
    assert "64 of 64 recorded answers (16 of 16 prompts)" in page.text and "half ?" in page.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "curves.png", "log.jsonl", "report.html", "rollouts.jsonl"]  # no unfinished file is left


def test_the_page_holds_each_number_of_the_record(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run")
    page = Page(folder)
    for record in records_of(folder):
        for text, advantage in zip(record["texts"], record["advantages"]):
            assert text in page.text and f"{round(advantage, 3) + 0:g}" in page.text
        for judgement in record["judgements"]:
            assert judgement["prompt"] in page.text and judgement["text"] in page.text
        rewards = torch.tensor(record["rewards"], dtype=torch.float64)
        mean, std = (f"{round(value.item(), 3) + 0:g}" for value in (rewards.mean(), rewards.std()))
        assert f"mean {mean}, std {std} (unbiased)" in page.text


def test_judged_text_is_data_and_the_page_runs_its_own_script_alone(no_pictures, tmp_path):
    plain = Page(made_up_run(tmp_path / "plain"))
    hostile = Page(made_up_run(tmp_path / "hostile", judge=lambda rng, n: HOSTILE, answer=HOSTILE))
    for tag in ("script", "img", "details", "form"):
        assert hostile.count(tag) == plain.count(tag)
    assert HOSTILE in hostile.text and not any("onerror" in own for _, own in hostile.tags)
    nonces = set()
    for page in (plain, hostile):
        policy, = [own["content"] for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy"]
        nonce, = [own["nonce"] for tag, own in page.tags if tag == "script"]
        assert "default-src 'none'" in policy and f"script-src 'nonce-{nonce}'" in policy and len(nonce) >= 32
        nonces.add(nonce)
    assert len(nonces) == 2  # a text cannot know it beforehand


def test_an_unjudged_group_has_no_rewards_and_no_zeros(no_pictures, tmp_path):
    page = Page(made_up_run(tmp_path / "run", judge=lambda rng, n: "cannot say"))
    assert page.count("details", **{"data-kind": "instruction", "data-rewards": "[]"}) == 4
    assert page.count("tr", **{"data-reward": ""}) == 4 * 4 and "unreadable" in page.text


def test_long_texts_and_many_groups_are_cut_and_the_page_says_so(no_pictures, tmp_path):
    page = Page(made_up_run(tmp_path / "run", prompts=4, answer="A long answer. " * 1000), "--groups", 12)
    shown = page.count("details", **{"class": "group"})
    assert 6 <= shown <= 12
    assert all(page.count("details", **{"class": "group", "data-kind": kind}) for kind in data.KINDS)
    assert f"{4 * shown} of 256 recorded answers ({shown} of 64 prompts)" in page.text
    assert re.search(r"\b9000 characters are left out here", page.text)  # 15,000, less 6,000 shown


def test_three_figures_stand_beside_what_constant_judges_have(no_pictures, tmp_path):
    """The values that the page states are those of two judges that read nothing, as urpo logs them."""
    for scores, first_P, first_I in [((5, 5, 5, 5), "0", "0"), ((9, 2, 4, 4), "0.667", "0.75")]:
        page = Page(made_up_run(tmp_path / str(scores), judge=lambda rng, n: data.score_line(scores[:n])))
        assert page.row("zero_spread of P")[1:4] == page.row("distinct of P")[1:4] == ["1", "1", "1"]
        assert page.row("first_position of P")[1:3] == [first_P, "0"]
        assert page.row("first_position of I")[1:3] == [first_I, "0"]


# ---- held out; crashes and mistakes ----


def heldout(text, value):
    answer = {"kind": "reasoning", "asked": "2 + 2?", "responses": [], "truth": "4", "sampled": [text]}
    figures = {"reasoning": {"solved": {"value": value, "low": None, "high": None, "count": 1}}}
    return json.dumps({"figures": figures, "settings": {}, "answers": [answer]})


def test_what_was_measured_held_out_is_a_table_and_answers_side_by_side(no_pictures, tmp_path, capsys):
    folder = made_up_run(tmp_path / "run")
    (folder / "heldout-before.json").write_text(heldout("it is \x1b[31m5", 0.0))
    (folder / "heldout-after.json").write_text(heldout("it is 4", 1.0))
    page = Page(folder)
    for said in (capsys.readouterr().out, page.text):
        assert "heldout-before" in said and "+1.00" in said and "\x1b" not in said
        assert re.search(r"it is \\x1b\[31m5 +it is 4", said)


def test_lines_that_a_crash_cut_are_left_out_and_the_repair_is_stated(no_pictures, tmp_path, capsys):
    folder = made_up_run(tmp_path / "run")
    for name in ("log", "rollouts"):
        with (folder / f"{name}.jsonl").open("a") as out:
            out.write('{"step": 6, "instr')
    page = Page(folder)
    errors = capsys.readouterr().err
    for line in ("log.jsonl:7", "rollouts.jsonl:17"):
        assert line in errors and line in page.text


@pytest.mark.parametrize("name, content, message", [
    ("log.jsonl", "", "no step is complete yet"),
    ("log.jsonl", "noise\n{}\n", "log.jsonl:1: not JSON"),
    ("config.json", '{"config": ', "config.json:1: not JSON"),
    ("rollouts.jsonl", '{"step": 0}\n', "rollouts.jsonl:1: no field"),
    ("heldout-after.json", "noise", "heldout-after.json"),
])
def test_what_is_no_run_is_refused_and_nothing_is_overwritten(no_pictures, tmp_path, name, content, message):
    folder = made_up_run(tmp_path / "run")
    (folder / "report.html").write_text("as it was")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        module.report([folder], None, None, 9)
    assert (folder / "report.html").read_text() == "as it was" and not (folder / "curves.png").exists()


def test_several_runs_need_a_place_for_their_picture(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), str(tmp_path)])
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
