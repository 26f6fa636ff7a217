"""eval.py: the figures of hand-made judgements, heldout, what is refused; and lab/probe.py.

A made-up `generate` stands for the sampler, but for one slow test with the real one.
"""
import json

import pytest

from eval import main, pair_figures
from infra.results import interval, table, weighted_mean
from lab import probe
from tiny_run import write_lines


def fails(arguments, capsys, run=main) -> str:
    """The last line on standard error of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        run([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err, err
    return err.strip().splitlines()[-1]


# ---- one pair: (better shown first, worse shown first), scores in the order shown ----

@pytest.mark.parametrize("judge, format, both, single, as_0, consistent, first", [
    (([[9, 2], [8, 3]], [[2, 9], [3, 8]]), 1, 1, 1, 1, 1, 0),  # right
    (([[2, 9], [3, 8]], [[9, 2], [8, 3]]), 1, 0, 0, 0, 1, 0),  # wrong
    (([[7, 7], [7, 7]], [[7, 7], [7, 7]]), 1, 0, 0.5, 0, 0, 0),  # constant
    (([[9, 2], [9, 2]], [[9, 2], [9, 2]]), 1, 0, 0.5, 0.5, 0, 0.5),  # whatever stands first
    (([None, None], [None, None]), 0, 0, 0.5, 0, None, None),  # unread
    (([[9, 2], None], [[2, 9], [2, 9]]), 0.75, 0.5, 0.875, 0.75, 1, -1 / 6),  # unread in one order: not right
    (([[9, 2], [9, 2]], [None, None]), 0.5, 0, 0.75, 0.5, None, 0.5),       # an order never read leaves a bias
    (([[8, 8], [9, 2]], [[2, 9], [5, 5]]), 1, 0, 0.75, 0.5, 0, 0),            # a tie spoils its sample's other order
])
def test_one_pair(judge, format, both, single, as_0, consistent, first):
    wanted = [format, both, single, as_0, consistent, first]
    assert list(pair_figures(*judge).values()) == [value and pytest.approx(value) for value in wanted]


def test_intervals():
    assert interval([0] * 10)["high"] == pytest.approx(0.2775, abs=1e-4)  # Wilson, unlike Wald, is not (0, 0)
    shares = interval([0, 0.5, 1, 0.25] * 8)  # by a bootstrap
    assert 0.25 < shares["low"] < shares["value"] == 0.4375 < shares["high"] < 0.65
    assert interval([0] * 10, share=False)["high"] is None  # of a preference for a place, or of tau
    assert interval([0.5]) == {"value": 0.5, "low": None, "high": None, "count": 1}
    parts = weighted_mean([([0, 1] * 20, 1), ([1] * 10, 3)])  # rows are drawn within parts
    assert 0.8 < parts["low"] < 0.875 == parts["value"] < parts["high"] < 0.95
    assert weighted_mean([([None], 5), ([0.5], 1)]) == {"value": 0.5, "low": None, "high": None, "count": 1}


def test_the_table_of_two_results():
    a = {"figures": {"reasoning": {"solved": interval([1, 0]), "nothing": interval([])}}}
    text = table({"a": a, "b": {"figures": {"referee": {"format": interval([1, 1])}}}})
    assert [line.split().count("-") for line in text.splitlines()[1:]] == [1, 2, 1]  # "-" is what only one has


def model(prompt, _):
    """Right sums for 2 + 3, and 9 for a response that is quoted as 'good'."""
    if "Score each response" not in prompt:
        return r"\boxed{5}"
    return "<scores>9, 2</scores>" if prompt.index("> good") < prompt.index("> bad") else "<scores>2, 9</scores>"


@pytest.fixture
def files(tmp_path):
    P = write_lines(tmp_path / "P.jsonl", {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
                    {"prompt": "Hi", "responses": ["bad", "good"], "scores": [1, 7]},
                    {"prompt": "Hi", "chosen": "good", "rejected": "bad"},  # twice: counted once
                    {"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1, 2, 3]})
    R = write_lines(tmp_path / "R.jsonl", {"question": "2 + 3?", "answer": "5"}, {"question": "2 + 2?", "answer": "4"})
    I = write_lines(tmp_path / "I.jsonl", {"instruction": "Say five."}, {"instruction": "Another world."})  # noqa: E741
    return ["--preferences", P, "--reasoning", R, "--instructions", I]


def test_heldout_from_files_to_json(tmp_path, answering, files):
    def measure(instruction, text):
        return {"a five": "5" in text, "short": len(text) < 3} if "five" in instruction else None

    answering(model)
    out = tmp_path / "out" / "a.json"
    main(["heldout", "--model", "m", *files, "--samples", "3", "--json", str(out)], measure)
    found = json.loads(out.read_text())
    figures = {part: {name: cell["value"] for name, cell in cells.items()} for part, cells in found["figures"].items()}
    assert figures["reasoning"]["solved"] == figures["reasoning"]["solved, greedy"] == 0.5
    assert figures["instructions"] == {"a five": 1, "short": 0, "a five, greedy": 1, "short, greedy": 0,
                                       "tokens an answer": 1, "cut off": 0}
    assert found["figures"]["instructions"]["a five"]["count"] == 1  # unknown instructions are no failures
    assert figures["referee"]["both orders"] == figures["referee"]["both orders, greedy"] == 1
    assert figures["referee"]["longer wins"] == 1
    assert found["figures"]["referee"]["both orders"]["count"] == 2
    assert [(row["kind"], row["asked"]) for row in found["answers"]] == [
        ("reasoning", "2 + 3?"), ("reasoning", "2 + 2?"), ("instruction", "Say five."),
        ("instruction", "Another world."), ("preference", "Hi"), ("preference", "Hi")]
    last = found["answers"][-1]
    assert (last["responses"], last["truth"]) == (["good", "bad"], [7, 1])
    assert last["sampled"] == ["<scores>9, 2</scores>"] * 3 and last["mirrored"] == ["<scores>2, 9</scores>"] * 3
    assert found["answers"][0]["mirrored"] == [] and list(out.parent.iterdir()) == [out]  # no unfinished file is left


def test_without_a_measure_only_the_length_of_open_answers_is_known_and_an_unread_judge_is_no_zero(
        tmp_path, answering, files):
    answering(lambda prompt, _: "cannot say")
    more = write_lines(tmp_path / "more.jsonl", {"prompt": "Ho", "chosen": "good", "rejected": "bad"})
    main(["heldout", "--model", "m", *files, more, "--rows", "1", "--json", str(tmp_path / "a.json"),
          "--preferences", files[1], more])
    found = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert found.keys() == {"reasoning", "instructions, I", "instructions, more", "referee, P", "referee, more"}
    assert list(found["instructions, I"]) == ["tokens an answer", "cut off"]
    assert found["referee, P"]["format"]["value"] == 0
    for name in ("order consistency", "first-position preference"):
        assert found["referee, P"][name]["value"] is None and found["referee, P"][name]["count"] == 0


def test_heldout_refuses_before_a_sampler_is_started(tmp_path, capsys, measuring, files):
    ask = ["heldout", "--model", "m"]
    ties = write_lines(tmp_path / "ties.jsonl", {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 1]})
    (tmp_path / "file").write_text("")
    for words, arguments in [
            (["--preferences", "equally good"], [*ask, "--preferences", ties]),
            (["2 of 2 longer than 3", "--max_prompt_tokens"], [*ask, *files[2:4], "--max_prompt_tokens", 3]),
            (["--reasoning", "no such file"], [*ask, "--reasoning", tmp_path / "absent.jsonl"]),
            (["nothing to measure", "--preferences", "lab.toy"], ask),
            (["--preferences", "two have one name"], [*ask, "--preferences", files[1], files[1]]),
            (["--rows", "above 0"], [*ask, *files, "--rows", 0]),
            (["--temperature", "--samples 1"], [*ask, *files, "--temperature", 0]),
            (["--temperature"], [*ask, *files, "--temperature", -1, "--samples", 1]),
            (["--json", "name a file"], [*ask, *files, "--json", tmp_path / "file" / "a.json"])]:
        err = fails(arguments, capsys)
        assert all(word in err for word in words), (words, err)


@pytest.mark.slow
def test_heldout_by_the_real_sampler(tmp_path, taught_model, files, capsys):
    assert "config.json" in fails(["heldout", "--model", tmp_path, *files], capsys)
    limits = ["--max_prompt_tokens", "300", "--max_answer_tokens", "24", "--max_referee_tokens", "24"]
    for name in ("a", "b"):
        main(["heldout", "--model", taught_model, *files, *limits, "--samples", "2", "--json", str(tmp_path / name)])
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    assert a["answers"] == b["answers"] and a["figures"] == b["figures"]  # sampling is seeded
    assert a["figures"]["referee"]["format"]["value"] == 0  # the model writes four scores, whatever it is asked
    assert "<scores>" in a["answers"][-1]["greedy"][0] and len(a["answers"][-1]["mirrored"]) == 2


def test_probe_runs_parts_1_to_4_of_a_step(tmp_path, answering, capsys):
    def likes_the_first(prompt, i):
        if "Score each response" not in prompt:
            return "an answer " * (i + 1)
        return "<scores>9, 2</scores>" if "s3" not in prompt else "<scores>2, 4, 6, 8</scores>"

    answering(likes_the_first)
    P = write_lines(tmp_path / "P", *({"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(4)))
    R = write_lines(tmp_path / "R", {"question": "2 + 3?", "answer": "5"})
    I = write_lines(tmp_path / "I", {"instruction": "Say five."})  # noqa: E741
    arguments = ["--model", "m", "--preset", "smol", "--preferences", P, "--reasoning", R, "--instructions", I,
                 "--group", "4", "--judge_list", "0", "--judgements", "1", "--rows", "8"]
    probe.main(arguments)
    out = capsys.readouterr().out
    assert "no gradient from P" in out and "no gradient from R" in out and "a gradient from I: in 100% of 8" in out
    shown = {}
    for line in out.splitlines():
        shown[tuple(line.split()[:2])] = line.split()[2:]
    expected = {"gradient": "0.00", "format": "1.00", "tau": "0.00", "first_position": "0.50"}
    for name, value in expected.items():
        figure = shown["preference", name]
        assert (figure[0], figure[-1]) == (value, "4")  # the row is the unit: its two orders are no two trials
    assert shown["instruction", "score_std"][0] == "2.24"
    for words, more in [("--mix x", ["--mix", "x"]), ("--rows 3", ["--rows", 3])]:
        assert words in fails([*arguments, *more], capsys, probe.main)
