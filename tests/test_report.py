"""Curves, CSV and report.html of made-up runs, which urpo's own functions write. The page is read by an HTML parser;
no model, no engine. The same page in a real browser: tests/bench/test_report_in_browser.py."""
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
import torch

import data
import readers
import urpo
from eval import main
from metrics import interval
from report import page as page_module
from report.curves import PANELS, read_figures
from runs import figures_of_step


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds; it is done in the tests that look at pictures."""
    monkeypatch.setattr(page_module, "draw_curves", lambda *_: b"")


HOSTILE = ("</pre></details><script>document.title = 'owned'; console.error('owned')</script>"
           "<img src=x onerror=\"console.error('owned')\">{{ 7 * 7 }} &lt; \" ' <scores>10, 10</scores>")


def some_scores(rng, n):
    return data.score_line(rng.sample(range(1, 11), n))


def made_up_group(rng, index, prompt, step, judge, answer, group):
    """G answers that urpo has not yet rewarded."""
    texts = []
    for _ in range(group):
        if prompt.kind == "preference":
            texts.append(judge(rng, len(prompt.truth)))
        elif prompt.kind == "reasoning":
            texts.append(rf"\boxed{{{prompt.answer if rng.random() < 0.3 * step else 0}}}")
        else:
            texts.append(answer * rng.randint(1, 3))
    made = data.Group(index, prompt, [1, 2, 3], [[7] * len(text) for text in texts], texts, [True] * group)
    if prompt.kind == "instruction":
        order = rng.sample(range(group), group)
        shown = data.referee_text(prompt.instruction, [texts[i] for i in order])
        made.judgements = [{"order": order, "prompt": shown, "text": judge(rng, group)}]
    return made


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def made_up_run(folder, steps=6, warmup=2, judge=some_scores, answer="An answer.", prompts=1, group=4):
    """A run's folder as urpo leaves it: `judge(rng, n)` writes a score line over n texts, others say `answer`."""
    folder.mkdir(parents=True)
    config = urpo.Config(steps=steps, warmup_steps=warmup, group=group, model="made-up")
    (folder / "config.json").write_text(json.dumps({"config": vars(config), "commit": "0" * 40}))
    toy = {kind: readers.load_source(kind, "toy:3" if kind == "preference" else "toy", count=64) for kind in data.KINDS}
    log, records = [], []
    for step in range(steps):
        rng, groups = random.Random(step), []
        for kind in data.KINDS[: 3 if step >= warmup else 2] * prompts:
            groups.append(made_up_group(rng, len(groups), rng.choice(toy[kind]), step, judge, answer, group))
        urpo.reward(config, groups)
        line = {"step": step, **figures_of_step(groups, 1, "token-mean")}
        log.append(line | {"seconds": dict.fromkeys(urpo.PARTS, 1.0), "drift_mean": 1e-5})
        records += [made.to_record(step) for made in groups]
    write_lines(folder / "log.jsonl", log)
    write_lines(folder / "rollouts.jsonl", records)
    return folder


def records_of(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """Every tag with its attributes, the text, and the rows of the tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.cells, self.inside = [], "", [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, text):
        if self.inside and self.inside[-1] in ("script", "style"):
            return
        self.text += text
        if self.cells and self.cells[-1]:
            self.cells[-1][-1] += text

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= own.items() for name, own in self.tags)

    def row(self, title):
        found, = [row for row in self.cells if row and row[0].strip() == title]
        return [cell.strip() for cell in found]


def report(folder, *arguments):
    main(["report", str(folder), *map(str, arguments)])
    return Page(folder / "report.html")


# ---- curves and CSV ----

def write_log(folder, steps=5, warmup=2):
    """A log whose step 3 has values that nobody measured, and whose last line is cut."""
    folder.mkdir()
    lines = []
    for step in range(steps):
        common = dict(reward=0.1 * step, zero_spread=0.5, distinct=3.0, entropy=1.2, length=20.0)
        line = {"step": step, "drift_mean": 1e-5, "drift_max": 1e-3, "grad_norm": 0.7, "clipped_low": 0.0,
                "clipped_high": 0.01, "seconds": dict.fromkeys(urpo.PARTS, 1.0), "reasoning": common,
                "preference": common | dict(format=0.9, tau=None if step == 3 else 0.2, first_position=math.nan)}
        if step >= warmup:
            line["instruction"] = common | dict(format=0.5, score_std=1.0, first_position=0.1)
        lines.append(json.dumps(line))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "rew')
    (folder / "config.json").write_text(json.dumps({"config": {"warmup_steps": warmup, "model": "raw"}}))
    return folder


def test_the_csv_holds_each_figure_of_the_panels_and_a_gap_is_never_a_zero(tmp_path, capsys):
    run = write_log(tmp_path / "one")
    main(["report", str(run), "--csv", str(tmp_path / "one.csv")])
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "log.jsonl:6: the last line is incomplete" in capsys.readouterr().err
    head, *rows = [line.split(",") for line in (tmp_path / "one.csv").read_text().splitlines()]
    assert head[:2] == ["run", "step"] and head[2:] == " ".join(PANELS.values()).split()
    assert len(rows) == 5 and all(len(row) == len(head) for row in rows)
    assert [row[:2] for row in rows] == [["one", str(step)] for step in range(5)]
    column = head.index("preference.tau")
    assert [row[column] for row in rows] == ["0.2", "0.2", "0.2", "", "0.2"]
    assert [row[head.index("instruction.reward")] for row in rows] == ["", "", "0.2", "0.3", "0.4"]
    assert {row[head.index("preference.first_position")] for row in rows} == {""}


def test_figures_that_were_not_measured_are_nan():
    log = [{"step": 3, "preference": {"tau": 0.5}}, {"step": 4, "preference": {"tau": None}, "drift_mean": 1e-5}]
    table = read_figures(log)
    assert list(table.index) == [3, 4] and table["preference.tau"][3] == 0.5
    assert table["drift_mean"][4] == 1e-5 and math.isnan(table["drift_mean"][3])
    assert math.isnan(table["preference.tau"][4]) and math.isnan(table["instruction.reward"][3])


def drawn(monkeypatch):
    """All lines that were drawn: {panel: [(label, steps, values)]}."""
    from matplotlib.figure import Figure

    found = {}

    def look(figure, *_, **__):
        for axis in figure.axes:
            lines = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
            found[axis.get_title()] = (lines, [text.get_text() for text in axis.texts])

    monkeypatch.setattr(Figure, "savefig", look)
    return found


def test_several_runs_give_a_picture_with_their_mean_and_no_page(tmp_path, monkeypatch):
    runs = [str(write_log(tmp_path / name, steps)) for name, steps in (("a", 4), ("b", 5), ("c", 3))]
    main(["report", *runs, "--out", str(tmp_path / "docs" / "seeds.png"), "--csv", str(tmp_path / "seeds.csv")])
    assert (tmp_path / "docs" / "seeds.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*/curves.png")) and not list(tmp_path.glob("*/report.html"))
    assert len((tmp_path / "seeds.csv").read_text().splitlines()) == 1 + 4 + 5 + 3
    found = drawn(monkeypatch)
    main(["report", *runs, "--out", str(tmp_path / "seeds.png")])
    lines, _ = found["tau of readable rankings should rise"]
    thick, = [values for label, _, values in lines if label == "preference"]
    assert thick[:3] == pytest.approx([0.2, 0.2, 0.2]) and math.isnan(thick[3]) and thick[4] == pytest.approx(0.2)
    assert sum(len(values) in (3, 4, 5) for _, _, values in lines) == 4  # three thin ones and their mean


def test_the_mean_of_runs_is_over_those_that_measured_a_step(tmp_path, monkeypatch):
    for name, taus in (("a", [None, 2.0]), ("b", [4.0])):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "log.jsonl",
                    [{"step": step, "preference": {"tau": tau}} for step, tau in enumerate(taus)])
    found = drawn(monkeypatch)
    main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both.png")])
    lines, _ = found["tau of readable rankings should rise"]
    assert [line[1:] for line in lines if line[0] == "preference"] == [([0, 1], [4.0, 2.0])]


def test_a_panel_without_figures_says_so(tmp_path, monkeypatch):
    write_lines(tmp_path / "log.jsonl", [{"step": 0, "preference": {"tau": 0.5}}])
    found = drawn(monkeypatch)
    main(["report", str(tmp_path)])
    assert found["tau of readable rankings should rise"][1] == []
    silent = [title for title, (_, texts) in found.items() if "not measured" in texts]
    assert len(silent) == len(PANELS) and "seconds of the seven parts of a step" in silent


def test_what_was_measured_held_out_stands_beside_the_curves(tmp_path, monkeypatch):
    run = write_log(tmp_path / "run")
    for name, values in (("before", [1, 0]), ("after", [1, 1])):
        figures = {"reasoning": {"accuracy": interval(values)}}
        (run / f"heldout-{name}.json").write_text(json.dumps({"figures": figures, "settings": {}}))
    found = drawn(monkeypatch)
    main(["report", str(run)])
    text, = found[""][1]  # the panel without a title of its own
    for part in ("held out: value [95 % interval]", "heldout-before", "heldout-after", "0.50 [", "1.00 ["):
        assert part in text


# ---- the page ----

def test_one_file_holds_picture_and_every_trajectory_and_asks_no_network(tmp_path, capsys):
    folder = made_up_run(tmp_path / "run")
    page = report(folder)
    assert capsys.readouterr().out.split() == [str(folder / "curves.png"), str(folder / "report.html")]
    assert page.count("details", **{"class": "group"}) == 2 * 2 + 4 * 3
    assert [page.count("details", **{"class": "group", "data-kind": kind}) for kind in data.KINDS] == [6, 6, 4]
    pictures = [own["src"] for tag, own in page.tags if tag == "img"]
    assert len(pictures) == 1 and pictures[0].startswith("data:image/png;base64,iVBOR")
    assert not [own for _, own in page.tags if own.get("href") or (own.get("src") or "data:")[:5] != "data:"]
    assert "64 of 64 recorded answers (16 of 16 prompts)" in page.text
    assert "6 steps from model made-up, commit 0000" in page.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "curves.png", "log.jsonl", "report.html", "rollouts.jsonl"]  # no unfinished file is left


def test_the_page_runs_its_own_script_alone(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run")
    nonces = set()
    for _ in range(2):
        page = report(folder)
        policy, = [own["content"] for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy"]
        nonce, = [own["nonce"] for tag, own in page.tags if tag == "script"]
        assert "default-src 'none'" in policy and f"script-src 'nonce-{nonce}'" in policy and len(nonce) >= 32
        nonces.add(nonce)
    assert len(nonces) == 2  # a text cannot know it beforehand


def test_an_explanation_holds_each_number_of_the_record(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run")
    page = report(folder)
    for record in records_of(folder):
        assert record["instruction"] in page.text
        for text, advantage in zip(record["texts"], record["advantages"]):
            assert text in page.text and f"{round(advantage, 3) + 0:g}" in page.text
        for judgement in record["judgements"]:
            assert judgement["prompt"] in page.text and judgement["text"] in page.text
        if record["kind"] == "preference":
            assert data.referee_text(record["instruction"], record["responses"]) in page.text
        rewards = torch.tensor(record["rewards"], dtype=torch.float64)
        mean, std = (f"{round(value.item(), 3) + 0:g}" for value in (rewards.mean(), rewards.std()))
        assert f"mean {mean}, std {std} (unbiased)" in page.text


def test_an_unjudged_group_has_no_rewards_and_no_zeros(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run", judge=lambda rng, n: "cannot say")
    page = report(folder)
    assert page.text.count("No judgement could be read: unjudged, advantage 0, no gradient") == 4
    assert page.count("details", **{"data-kind": "instruction", "data-rewards": "[]"}) == 4
    assert page.count("tr", **{"data-reward": ""}) == 4 * 4 and "unreadable" in page.text


def test_judged_text_is_data_and_never_structure(no_pictures, tmp_path):
    plain = report(made_up_run(tmp_path / "plain"))
    hostile = report(made_up_run(tmp_path / "hostile", judge=lambda rng, n: HOSTILE, answer=HOSTILE))
    for tag in ("script", "img", "details", "form"):
        assert hostile.count(tag) == plain.count(tag)  # 10, 10 is unreadable over three texts and over four
    assert HOSTILE in hostile.text and not any("onerror" in own for _, own in hostile.tags)


def test_odd_characters_in_texts_do_not_stop_the_report(tmp_path):
    folder = made_up_run(tmp_path / "run $x_1$", answer="half \ud800, nul \x00, bell \x07, $x_1$ ")
    assert "half ?" in report(folder).text


def test_long_texts_and_many_groups_are_cut_and_the_page_says_so(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run", prompts=4, answer="A long answer. " * 1000)
    page = report(folder, "--groups", 12)
    shown = page.count("details", **{"class": "group"})
    assert 6 <= shown <= 12
    assert all(page.count("details", **{"class": "group", "data-kind": kind}) for kind in data.KINDS)
    assert f"{4 * shown} of 256 recorded answers ({shown} of 64 prompts)" in page.text
    assert f"{256 - 4 * shown} are left out" in page.text
    assert re.search(r"\b9000 characters are left out here", page.text)  # 15,000, less 6,000 shown
    assert max(map(len, re.findall(r"<pre>([^<]*)</pre>", page.source))) <= 6 * 6000


def test_twenty_thousand_trajectories_fit_in_a_page_that_a_browser_opens(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run", steps=3, warmup=0)
    records = records_of(folder)
    write_lines(folder / "rollouts.jsonl",
                (record | {"step": step} for step in range(20_000 // 36) for record in records))
    page = report(folder)
    shown = page.count("details", **{"class": "group"})
    assert 500 <= shown <= 1000 and (folder / "report.html").stat().st_size < 20e6
    assert f"{4 * shown} of {4 * 9 * 555} recorded answers" in page.text
    steps = [int(row) for row in re.findall(r'<summary class="row"><span>(\d+)', page.source)]
    assert steps == sorted(steps) and steps[-1] > 500  # from the whole run, in its order


def test_a_log_without_trajectories_still_reports(tmp_path):
    folder = made_up_run(tmp_path / "run")
    (folder / "rollouts.jsonl").unlink()
    page = report(folder)
    assert "No trajectories are recorded" in page.text and "0 of 0 recorded answers" in page.text


def test_three_figures_stand_beside_what_constant_judges_have(no_pictures, tmp_path):
    """The values that the page states are those of two judges that read nothing, as urpo logs them."""
    judges = [([5, 5, 5, 5], "0", "0"), ([9, 2, 4, 4], "0.667", "0.75"), ([2, 4, 4, 9], "-0.333", "-0.25")]
    for scores, first_P, first_I in judges:
        line = {3: data.score_line([*scores[:2], scores[3]]), 4: data.score_line(scores)}
        page = report(made_up_run(tmp_path / str(scores), judge=lambda rng, n: line[n]))
        assert page.row("zero_spread of P")[1:4] == page.row("distinct of P")[1:4] == ["1", "1", "1"]
        assert page.row("first_position of P")[1] == first_P and page.row("first_position of I")[1] == first_I
        assert page.row("first_position of P")[2] == page.row("first_position of I")[2] == "0"
    lively = report(made_up_run(tmp_path / "lively", prompts=4))
    assert float(lively.row("zero_spread of P")[1]) < 0.5 and float(lively.row("distinct of P")[1]) > 3


# ---- crashes and mistakes ----

def test_lines_that_a_crash_cut_are_left_out_and_the_repair_is_stated(no_pictures, tmp_path, capsys):
    folder = made_up_run(tmp_path / "run")
    for name in ("log", "rollouts"):
        with (folder / f"{name}.jsonl").open("a") as out:
            out.write('{"step": 6, "instr')
    page = report(folder)
    errors = capsys.readouterr().err
    for name, number in (("log", 7), ("rollouts", 17)):
        repair = f"{name}.jsonl:{number}: the last line is incomplete and was left out"
        assert repair in errors and repair in page.text
    assert page.count("p", **{"class": "repair"}) == 2


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and len(errors.splitlines()) == 1, errors
    return errors


@pytest.mark.parametrize("name, content, message", [
    ("log.jsonl", None, "no run here (no log.jsonl)"),
    ("log.jsonl", "", "no step is complete yet"),
    ("log.jsonl", "7\n", "log.jsonl:1: no field 'step'"),
    ("log.jsonl", "noise\n{}\n", "log.jsonl:1: not JSON"),
    ("log.jsonl", '{"step": 0}\nnoise\n{"step": 2}\n', "log.jsonl:2: not JSON"),
    ("config.json", '{"config": ', "config.json:1: not JSON"),
    ("rollouts.jsonl", "noise\n{}\n", "rollouts.jsonl:1: not JSON"),
    ("rollouts.jsonl", '{"step": 0}\n', "rollouts.jsonl:1: no field"),
    ("rollouts.jsonl", "poem", "no kind 'poem'"),
    ("rollouts.jsonl", "no answers", "rollouts.jsonl:1: no field 'answers'"),
])
def test_what_is_no_run_gets_one_line_and_status_2_and_nothing_is_overwritten(no_pictures, tmp_path, capsys, name,
                                                                              content, message):
    folder = made_up_run(tmp_path / "run")
    record = records_of(folder)[0]
    if content == "poem":
        content = json.dumps(record | {"kind": "poem"}) + "\n"
    if content == "no answers":
        record.pop("answers")
        content = json.dumps(record) + "\n"
    for old in ("curves.png", "report.html"):
        (folder / old).write_text("as it was")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert message in fails(["report", folder], capsys)
    assert (folder / "report.html").read_text() == (folder / "curves.png").read_text() == "as it was"


def test_several_runs_need_a_place_for_their_picture(tmp_path, capsys):
    assert "give --out" in fails(["report", tmp_path, tmp_path], capsys)
