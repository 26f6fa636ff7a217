"""report.html of made-up runs, written by urpo's own functions and read by an HTML parser; no model, no engine.
The same page in a real browser: tests/bench/test_report_in_browser.py."""
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
import torch

import data
import eval as evaluation
import urpo
from eval import HEALTH, Judgement, constant_judges, health_curves, main, referee_health
from rewards import figures_of_kind

@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds; it is done in the tests that look at pictures."""
    monkeypatch.setattr(evaluation, "draw_curves", lambda *_: b"")
    monkeypatch.setattr(evaluation, "draw_health", lambda *_: b"")


HOSTILE = ("</pre></details><script>document.title = 'owned'; console.error('owned')</script>"
           "<img src=x onerror=\"console.error('owned')\">{{ 7 * 7 }} &lt; \" ' <scores>10, 10</scores>")


def made_up_run(folder, steps=6, warmup=2, judge=None, answer="An answer.", probe_every=0, prompts=1, group=4):
    """A run's folder as Record leaves it: `judge(rng, n)` writes a score line over n texts, others say `answer`."""
    folder.mkdir(parents=True)
    judge = judge or (lambda rng, n: data.score_line(rng.sample(range(1, 11), n)))
    settings = {"steps": steps, "warmup_steps": warmup, "group": group, "tau": "b", "advantage": "std"}
    (folder / "config.json").write_text(json.dumps({"config": settings, "weights": "made-up", "commit": "0" * 40}))
    rows = []
    for step in range(steps):
        rng, groups = random.Random(step), []
        for kind in data.KINDS[:3 if step >= warmup else 2] * prompts:
            prompt = data.BUILTIN[kind](rng, "train", *[3] * (kind == "preference"))
            texts = [judge(rng, len(prompt.truth)) if kind == "preference" else
                     rf"\boxed{{{prompt.answer if rng.random() < 0.3 * step else 0}}}" if kind == "reasoning" else
                     answer * rng.randint(1, 3) for _ in range(group)]
            made = urpo.Group(len(groups), prompt, [1, 2, 3], [[7] * len(text) for text in texts], texts=texts,
                              finished=[True] * group, old_N=torch.tensor([-1.0]), sampler_logprobs=[[-1.0]] * group)
            if kind == "instruction":
                order = rng.sample(range(group), group)
                shown = data.referee_text(prompt.instruction, [texts[i] for i in order])
                made.judgements = [{"order": order, "prompt": shown, "text": judge(rng, group)}]
            groups.append(made)
        urpo.reward(urpo.Config(**{name: settings[name] for name in ("group", "tau", "advantage")}), groups)
        lines = [urpo.describe(made, step) for made in groups]
        log = {"step": step, **{kind: figures_of_kind([line for line in lines if line["kind"] == kind])
                                for kind in data.KINDS}, "seconds": dict.fromkeys(urpo.PARTS, 1.0), "drift_mean": 1e-5}
        if probe_every and step % probe_every == 0:
            log["probe"] = {"first_position": 0.25, "self_preference": 1.5 + step, "empty": -3.0, "ten_of_ten": None}
        rows.append((log, lines))
    for name, lines in (("log", [log for log, _ in rows]), ("rollouts", [line for _, part in rows for line in part])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Page(HTMLParser):
    """Every tag with its attributes, the text, and the rows of the tables of health."""

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

    def row(self, title, at=0):
        return [[cell.strip() for cell in row] for row in self.cells if row and row[0].strip() == title][at]


def report(folder, *arguments):
    main(["report", str(folder), *map(str, arguments)])
    return Page(folder / "report.html")


# ---- the page ----

def test_one_file_holds_pictures_and_every_trajectory_and_asks_no_network(tmp_path, capsys):
    folder = made_up_run(tmp_path / "run")
    page = report(folder)
    assert capsys.readouterr().out.split() == [str(folder / "curves.png"), str(folder / "report.html")]
    assert page.count("details", **{"class": "group"}) == 2 * 2 + 4 * 3
    assert [page.count("details", **{"class": "group", "data-kind": kind}) for kind in data.KINDS] == [6, 6, 4]
    pictures = [own["src"] for tag, own in page.tags if tag == "img"]
    assert len(pictures) == 2 and all(src.startswith("data:image/png;base64,iVBOR") for src in pictures)
    assert not [own for _, own in page.tags if own.get("href") or (own.get("src") or "data:")[:5] != "data:"]
    assert "default-src 'none'" in page.source and "64 of 64 recorded answers (16 of 16 prompts)" in page.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "curves.png", "log.jsonl", "report.html", "rollouts.jsonl"]  # no unfinished file is left


def test_an_explanation_holds_each_number_of_the_record(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run")
    page = report(folder)
    for line in map(json.loads, (folder / "rollouts.jsonl").read_text().splitlines()):
        assert line["instruction"] in page.text
        for sample in line["samples"]:
            assert sample["text"] in page.text and f"{round(sample['advantage'], 3):g}" in page.text
        for judgement in line.get("judgements", []):
            assert judgement["prompt"] in page.text and judgement["text"] in page.text
        if line["kind"] == "preference":
            assert data.referee_text(line["instruction"], line["responses"]) in page.text
    first = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])
    group = evaluation.explanation(first, {})
    rewards = torch.tensor([sample["reward"] for sample in first["samples"]], dtype=torch.float64)
    assert group["mean"] == pytest.approx(rewards.mean().item()) and group["std"] == pytest.approx(rewards.std().item())


def test_judged_text_is_data_and_never_structure(no_pictures, tmp_path):
    plain = report(made_up_run(tmp_path / "plain"))
    hostile = report(made_up_run(tmp_path / "hostile", judge=lambda rng, n: HOSTILE, answer=HOSTILE))
    for tag in ("script", "img", "details", "form"):
        assert hostile.count(tag) == plain.count(tag)  # 10, 10 is unreadable over three texts and over four
    assert HOSTILE in hostile.text and not any("onerror" in own for _, own in hostile.tags)


def test_odd_characters_in_texts_do_not_stop_the_report(tmp_path):
    folder = made_up_run(tmp_path / "run", answer="half \ud800, nul \x00, bell \x07, $x_1$ ")
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
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    with (folder / "rollouts.jsonl").open("w") as out:
        for step in range(20_000 // 36):
            out.writelines(json.dumps(line | {"step": step}) + "\n" for line in lines)
    page = report(folder)
    shown = page.count("details", **{"class": "group"})
    assert 500 <= shown <= 1000 and (folder / "report.html").stat().st_size < 20e6
    assert f"{4 * shown} of {4 * 9 * 555} recorded answers" in page.text


# ---- the referee's health ----

def test_health_stands_beside_two_judges_that_read_nothing(no_pictures, tmp_path):
    page = report(made_up_run(tmp_path / "run", steps=20))
    title = {name: HEALTH[name][0] for name in HEALTH}
    assert page.row(title["unparsed"])[1:5] == ["0", "0", "0", "0"]
    assert page.row(title["tied"])[3:5] == ["1", "0"]
    assert page.row(title["distinct"])[3:5] == page.row(title["commonest"])[3:5] == ["1", "1"]
    assert page.row(title["entropy"])[3:5] == ["0", f"{math.log(3):.3f}"]  # three unequal scores, the line of N = 3
    assert page.row(title["tau"])[3] == "0"
    assert page.row(title["distinct"], at=1)[1:] == ["not measured"] * 4 + [HEALTH["distinct"][1]]  # I, one judgement


def test_a_constant_judge_has_exactly_the_health_of_its_own_line(no_pictures, tmp_path):
    folder = made_up_run(tmp_path / "run", judge=lambda rng, n: data.score_line([9, 2, 4, 4][:n]))
    steps, _, _ = evaluation.read_rollouts(folder, 10, {}, [])
    for kind in ("preference", "instruction"):
        constant = constant_judges(steps[kind])
        assert list(constant["one line"].values()) == [(9, 2, 4, 4)[:3 if kind == "preference" else 4]]
        curves = health_curves(steps[kind], constant)
        assert curves["run"] == curves["one line"]
        # two figures look healthy over this judge, and that is why the column stands beside them
        assert set(curves["run"]["unparsed"].values()) == {0} and min(curves["run"]["deviation"].values()) > 2


def test_unread_judgements_are_unknown_and_not_zero():
    unread = Judgement(None, (5, 7), (1.0, 0.0))
    assert referee_health([[unread, unread]]) == dict.fromkeys(HEALTH) | {"unparsed": 1}
    assert referee_health([]) == dict.fromkeys(HEALTH)


def test_a_judge_that_pays_for_length_is_seen():
    longest = [[Judgement(tuple(map(float, lengths)), lengths, None)] for lengths in ((3, 1, 2), (1, 9, 4))]
    assert referee_health(longest)["length"] == pytest.approx(1)
    assert referee_health([[Judgement((5.0, 5.0), (3, 1), None)]])["length"] == 0


def test_scores_meet_the_length_of_the_answer_that_was_shown_there():
    group = {"kind": "instruction", "samples": [{"text": "a"}, {"text": "bbb"}],
             "judgements": [{"order": [1, 0], "text": "<scores>9, 2</scores>"}]}
    assert evaluation.judgements_of(group) == [Judgement((9.0, 2.0), (3, 1), None)]


def test_probes_are_shown_where_the_log_holds_them_and_else_are_not_measured(tmp_path):
    with_probes = report(made_up_run(tmp_path / "a", probe_every=2))
    assert with_probes.row("own answer above a frozen copy's, points")[1:5] == ["1.5", "5.5", "0", "0"]
    assert with_probes.row("an empty answer above an honest one, points")[1:3] == ["-3", "-3"]
    assert with_probes.row(evaluation.PROBE["ten_of_ten"][0])[1:3] == ["not measured"] * 2
    without = report(made_up_run(tmp_path / "b"))
    for title, one, line, _ in evaluation.PROBE.values():
        assert without.row(title, at=-1)[1:5] == ["not measured", "not measured", one, line]


def test_a_supervised_run_has_no_judge(tmp_path):
    folder = made_up_run(tmp_path / "run")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"config": about["config"] | {"method": "sft"}}))
    page = report(folder)
    assert "there is no judge to examine" in page.text
    assert page.row(HEALTH["unparsed"][0])[1:5] == ["not measured"] * 4


def test_a_log_without_trajectories_still_reports(tmp_path):
    folder = made_up_run(tmp_path / "run")
    (folder / "rollouts.jsonl").unlink()
    page = report(folder)
    assert "No trajectories are recorded" in page.text and "0 of 0 recorded answers" in page.text


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


@pytest.mark.parametrize("name, content, message", [
    ("log.jsonl", None, "no run here"),
    ("log.jsonl", "", "no step is complete yet"),
    ("log.jsonl", "7\n", "log.jsonl:1: no 'step'"),
    ("log.jsonl", "noise\n{}\n", "log.jsonl:1: not JSON"),
    ("config.json", '{"config": ', "config.json:1: not JSON"),
    ("rollouts.jsonl", "noise\n{}\n", "rollouts.jsonl:1: not JSON"),
    ("rollouts.jsonl", '{"step": 0}\n', "rollouts.jsonl:1: no 'index'"),
    ("rollouts.jsonl", '{"step": 0, "index": 2, "kind": "poem", "instruction": "", "samples": []}\n', "2: no kind"),
    ("rollouts.jsonl", '{"step": 0, "index": 2, "kind": "reasoning", "instruction": "", "answer": "1", '
                       '"samples": [{"text": ""}]}\n', "step 0, prompt 2: no ids"),
])
def test_what_is_no_run_gets_one_line_and_status_2_and_nothing_is_overwritten(no_pictures, tmp_path, capsys, name,
                                                                              content, message):
    folder = made_up_run(tmp_path / "run")
    for old in ("curves.png", "report.html"):
        (folder / old).write_text("as it was")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and len(errors.splitlines()) == 1
    assert (folder / "report.html").read_text() == (folder / "curves.png").read_text() == "as it was"


def test_several_runs_give_a_picture_and_no_page(tmp_path):
    runs = [str(made_up_run(tmp_path / name)) for name in "ab"]
    main(["report", *runs, "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG" and not (tmp_path / "a" / "report.html").exists()
