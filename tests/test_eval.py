"""metrics.py and `eval.py heldout`, `compare`: scoring of hand-made judgements, tables, errors. No model, no engine."""
import doctest
import json
import re

import pytest

import eval as evaluation
import machine
import metrics
from conftest import Tokenizer
from data import Prompt
from eval import main
from metrics import expected_scores, interval, pair_figures, referee_figures, table
from toy import world


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(metrics)
    assert failed == 0 and attempted >= 7


# ---- scoring: (better shown first, worse shown first), scores in the order shown ----

RIGHT = ([[9, 2], [8, 3]], [[2, 9], [3, 8]])
WRONG = ([[2, 9], [3, 8]], [[9, 2], [8, 3]])
CONSTANT = ([[7, 7], [7, 7]], [[7, 7], [7, 7]])
FIRST = ([[9, 2], [9, 2]], [[9, 2], [9, 2]])  # whatever stands first
UNREAD = ([None, None], [None, None])


@pytest.mark.parametrize("judge, format, both, single, expected, consistent, first", [
    (RIGHT, 1, 1, 1, 1, 1, 0),
    (WRONG, 1, 0, 0, 0, 1, 0),
    (CONSTANT, 1, 0, 0.5, 0.5, 0, 0),
    (FIRST, 1, 0, 0.5, 0.5, 0, 0.5),
    (UNREAD, 0, 0, 0.5, 0.5, None, None),
    (([[9, 2], None], [[2, 9], [2, 9]]), 0.75, 0.5, 0.875, 1, 1, -1 / 6),  # sample 2 is unread in one order: not right
    (([[9, 2], [9, 2]], [None, None]), 0.5, 0, 0.75, 0.5, None, 0.5),      # an order never read leaves a position bias
    (([[8, 8], [9, 2]], [[2, 9], [5, 5]]), 1, 0, 0.75, 1, 0, 0),           # each tie spoils its sample's other order
])
def test_one_pair(judge, format, both, single, expected, consistent, first):
    figures = pair_figures(*judge)
    figures.pop("ties as 0")
    wanted = {"format": format, "unparsed": 1 - format, "both orders": both, "single order": single,
              "expected score": expected, "order consistency": consistent, "first-position preference": first}
    assert figures == {name: value if value is None else pytest.approx(value) for name, value in wanted.items()}


def test_a_preference_for_a_position_cancels_in_expected_scores():
    assert expected_scores([[6, 3]], [[5, 4]]) == (5.0, 4.0)  # true scores 5 and 4, one point for standing first
    assert pair_figures([[6, 3]], [[5, 4]])["expected score"] == 1
    # One order read ten times and the other once weigh the same: else the bias would come back.
    assert expected_scores([[6, 3]] * 10, [[5, 4]]) == (5.0, 4.0)


def test_equal_expected_scores_are_a_tie_in_spite_of_rounding():
    assert pair_figures([[8.1, 8.1], [7.9, 8.1], [8.3, 8.1]], [[8.1, 8.1]] * 3)["expected score"] == 0.5


def test_a_referee_that_does_not_read_is_exposed():
    figures = referee_figures([([[7, 7]], [[7, 7]])] * 5, [CONSTANT] * 5)
    assert figures["format"]["value"] == 1 and figures["both orders"]["value"] == 0
    assert figures["commonest line"]["value"] == 1 and figures["spread of expected scores"]["value"] == 0
    assert figures["first-position preference"]["value"] == 0 and figures["expected score"]["value"] == 0.5


def test_parts_share_out_the_pairs():
    figures = referee_figures([([[9, 2]], [[2, 9]])] * 3, [RIGHT, WRONG, RIGHT], ["others", "good vs breaks", "others"])
    assert figures["both orders, others"] == {"value": 1, "low": pytest.approx(0.342, abs=1e-3), "high": 1, "count": 2}
    assert figures["both orders, good vs breaks"]["value"] == 0
    assert figures["both orders"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["both orders, greedy"]["value"] == 1


def test_unread_judgements_are_unknown_and_not_zero():
    figures = referee_figures([([None], [None])], [UNREAD])
    assert figures["unparsed"]["value"] == 1
    for name in ("order consistency", "first-position preference", "spread of expected scores", "commonest line"):
        assert figures[name]["value"] is None and figures[name]["count"] == 0


def test_interval():
    assert interval([0] * 10)["high"] == pytest.approx(0.2775, abs=1e-4)  # Wilson, unlike Wald, is not (0, 0)
    shares = interval([0, 0.5, 1, 0.25] * 8)
    assert 0.25 < shares["low"] < shares["value"] == 0.4375 < shares["high"] < 0.65
    assert interval([0, 0.5, 1, 0.25] * 8) == shares  # the bootstrap is seeded
    assert interval([0.5]) == {"value": 0.5, "low": None, "high": None, "count": 1}


# ---- tables ----

def result(values, **settings):
    return {"figures": {"reasoning": {"greedy": interval(values), "nothing": interval([])}}, "settings": settings}


def test_table_shows_what_only_one_result_has():
    text = table({"a": result([1, 0]), "b": {"figures": {"referee": {"format": interval([1, 1])}}}}, "change")
    greedy, nothing, format = (line.split() for line in text.splitlines()[1:])
    assert greedy[-2:] == ["-", "-"] and nothing[-3:] == ["-"] * 3 and format[2] == "-"


def test_compare_counts_wins_by_gold_and_shows_answers_of_both(tmp_path, capsys):
    def answers(gold, *texts):
        asked = dict(asked="Tell me about dogs.", responses=[], truth="")
        return [dict(asked, kind="instruction", greedy=[""], sampled=[text], gold=[gold]) for text in texts]

    before = {"figures": {"instructions": {"all four": interval([0, 0]), "greedy": interval([0, 0])}}, "settings": {}}
    for name, rows in (("a", answers(3, "same", "dogs a\x1b")), ("b", answers(4, "same", "Dogs bark."))):
        (tmp_path / name).write_text(json.dumps(before | {"answers": rows}))
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert re.search(r"better, by gold +0.50 +1.00 .*\+0.50", out) and "greedy" not in out and "\x1b" not in out
    assert re.search(r"held out: Tell me about dogs.\n +before +after\n +dogs a\\x1b +Dogs bark.", out)
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--all"])
    assert "greedy" in capsys.readouterr().out


def test_compare(tmp_path, capsys):
    for name, content in (("a", result([0, 0], rows=2, samples=4)), ("b", result([1, 1], rows=2, samples=8))):
        (tmp_path / name).write_text(json.dumps(content))
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert "+1.00" in out and "--samples 4 before, 8 after" in out and "--rows" not in out


# ---- errors: one line, exit status 2 ----

def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_compare_errors(tmp_path, capsys):
    (tmp_path / "good").write_text(json.dumps(result([1])))
    assert "no such file" in fails(["compare", tmp_path / "good", tmp_path / "absent"], capsys)
    (tmp_path / "bad").write_text("{")
    assert "not JSON" in fails(["compare", tmp_path / "bad", tmp_path / "good"], capsys)
    (tmp_path / "bad").write_text("[1]")
    assert "no result" in fails(["compare", tmp_path / "bad", tmp_path / "good"], capsys)


def test_heldout_errors(tmp_path, capsys, no_model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 1]}) + "\n"
                    + json.dumps({"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}))
    assert "no valid pair" in fails(["heldout", "--model", "m", "--preferences", rows], capsys)
    assert "8 of 8 longer than 3" in fails(["heldout", "--model", "m", "--max_prompt_tokens", 3, "--rows", 8], capsys)
    assert "no such file" in fails(["heldout", "--model", "m", "--reasoning", tmp_path / "absent.jsonl"], capsys)
    assert "nothing to measure" in fails(["heldout", "--model", "m", "--preferences", "none", "--reasoning", "none",
                                          "--instructions", "none"], capsys)
    assert "must be above 0" in fails(["heldout", "--model", "m", "--rows", 0], capsys)


def test_toy_rows_are_distinct_and_pairs_stand_better_first(no_model):
    args = evaluation.parse_arguments(["heldout", "--model", "m"])
    rows = evaluation.heldout_rows(args, Tokenizer())
    pairs, questions, tasks = rows.values()
    assert len({row.instruction for row in questions}) == len({row.instruction for row in tasks}) == len(pairs) == 64
    assert all(row.truth[0] > row.truth[1] for row in pairs) and all(row.check for row in tasks)
    hard = [row for row in pairs if evaluation.difficulty(row) == "good vs breaks"]
    assert 0 < len(hard) < 64  # follows world.LEVELS: what is called so does break its constraint
    checks = {(record["prompt"], *sorted(record["responses"])): record["check"]
              for record in world.records("preference", "heldout", 512, 2)}
    for row in hard:
        check = checks[row.instruction, *sorted(row.responses)]
        assert check and not world.complies(check, row.responses[1])


def test_no_checkpoint(tmp_path, capsys):
    assert "no config.json" in fails(["heldout", "--model", tmp_path], capsys)
    assert "no tokenizer that loads" in fails(["heldout", "--model", "runs/absent/checkpoints/step_1/model"], capsys)


def answer(words):
    """Right sums, and 9 for a response that is quoted as 'good'."""
    text = " ".join(words)
    if "Score each response" not in text:
        return r"\boxed{5}"
    return "<scores>9, 2</scores>" if text.index("> good") < text.index("> bad") else "<scores>2, 9</scores>"


def generate(engine, prompts, n, *_, **__):
    return [[machine.Sample(answer(words).split(), answer(words), True, [])] * n for words in prompts]


def test_the_hidden_gold_is_counted_of_greedy_and_of_sampled_answers():
    row = Prompt("instruction", "Tell me about dogs.")
    good = machine.Sample([1], "Dogs need a walk every day.", True, [])
    bad = machine.Sample([1], "walk a. Cats need every", True, [])
    figures = evaluation.answer_figures([row], [[good]], [[good, bad, bad, bad]])
    assert figures["on topic, whole, in order"]["value"] == 0.25
    assert figures["on topic, whole, in order, greedy"]["value"] == figures["all four, greedy"]["value"] == 1.0


def test_heldout_from_files_to_json(tmp_path, monkeypatch, no_model, capsys):
    monkeypatch.setattr(machine, "start_engine", lambda *_, **__: None)
    monkeypatch.setattr(machine, "generate", generate)
    (tmp_path / "P.jsonl").write_text('{"prompt": "Hi", "chosen": "good", "rejected": "bad"}\n'
                                      '{"prompt": "Hi", "responses": ["bad", "good"], "scores": [1, 7]}\n'
                                      '{"prompt": "Hi", "chosen": "good", "rejected": "bad"}\n'  # twice: counted once
                                      '{"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}\n')
    (tmp_path / "R.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}\n{"question": "2 + 2?", "answer": "4"}\n')
    (tmp_path / "I.jsonl").write_text('{"instruction": "Say something."}\n')
    files = [str(tmp_path / f"{kind}.jsonl") for kind in "PRI"]
    main(["heldout", "--model", "m", "--preferences", files[0], "--reasoning", files[1], "--instructions", files[2],
          "--samples", "3", "--json", str(tmp_path / "out" / "a.json")])
    figures = json.loads((tmp_path / "out" / "a.json").read_text())["figures"]
    assert figures["reasoning"]["greedy"]["value"] == figures["reasoning"]["sampled"]["value"] == 0.5
    assert figures["referee"]["both orders"] == figures["referee"]["both orders, greedy"]
    assert figures["referee"]["both orders"]["value"] == 1 and figures["referee"]["both orders"]["count"] == 2
    assert figures["referee"]["longer wins"]["value"] == 1  # "good" is longer than "bad"
    assert figures["instructions"]["greedy"]["value"] is None  # a file has no check: unknown is not zero
    assert figures["instructions"]["tokens an answer"]["value"] == 1
    assert "all four" not in figures["instructions"]  # nor is the hidden gold known
    kept = json.loads((tmp_path / "out" / "a.json").read_text())["answers"]
    assert [(row["kind"], row["asked"], row["gold"]) for row in kept] == [
        ("reasoning", "2 + 3?", None), ("reasoning", "2 + 2?", None), ("instruction", "Say something.", None),
        ("preference", "Hi", None), ("preference", "Hi", None)]
    assert kept[3]["responses"] == ["good", "bad"] and kept[3]["sampled"] == ["<scores>9, 2</scores>"] * 3
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "a.json"]  # no unfinished file is left
