"""eval.py: the scoring on hand-made judgements, the tables, the pictures, and every error. No model, no engine."""
import doctest
import json
import math
import re
from types import SimpleNamespace

import pytest

import data
import eval as evaluation
import urpo
from conftest import Tokenizer
from eval import averaged, expected_scores, interval, main, pair_figures, read_log, referee_figures, table

PARTS = ("draw", "rollout", "self_score", "reward", "old_logprobs", "update", "sync")


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(evaluation)
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
    figures.pop("strict")
    wanted = dict(format=format, both_orders=both, single_order=single, expected=expected, consistent=consistent,
                  first_position=first)
    assert figures == {name: value if value is None else pytest.approx(value) for name, value in wanted.items()}


def test_a_preference_for_a_position_cancels_in_expected_scores():
    assert expected_scores([[6, 3]], [[5, 4]]) == (5.0, 4.0)  # true scores 5 and 4, one point for standing first
    assert pair_figures([[6, 3]], [[5, 4]])["expected"] == 1
    # One order read ten times and the other once weigh the same: else the bias would come back.
    assert expected_scores([[6, 3]] * 10, [[5, 4]]) == (5.0, 4.0)


def test_equal_expected_scores_are_a_tie_in_spite_of_rounding():
    assert pair_figures([[8.1, 8.1], [7.9, 8.1], [8.3, 8.1]], [[8.1, 8.1]] * 3)["expected"] == 0.5


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


def test_compare(tmp_path, capsys):
    for name, content in (("a", result([0, 0], rows=2, samples=4)), ("b", result([1, 1], rows=2, samples=8))):
        (tmp_path / name).write_text(json.dumps(content))
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert "+1.00" in out and "--samples 4 before, 8 after" in out and "--rows" not in out


# ---- report ----

def write_run(folder, steps=5, warmup=2):
    """A log in the form of urpo.py; step 3 has values that nobody measured, the last line is cut."""
    folder.mkdir()
    lines = []
    for step in range(steps):
        common = dict(reward=0.1 * step, zero_spread=0.5, distinct=3.0, entropy=1.2, length=20.0)
        line = {"step": step, "drift_mean": 1e-5, "drift_max": 1e-3, "grad_norm": 0.7, "clipped_low": 0.0,
                "clipped_high": 0.01, "seconds": dict.fromkeys(PARTS, 1.0),
                "preference": common | dict(format=0.9, tau=None if step == 3 else 0.2, first_position=math.nan),
                "reasoning": common,
                "instruction": {} if step < warmup else common | dict(format=0.5, score_std=1.0, first_position=0.1)}
        lines.append(json.dumps(line))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "rew')
    (folder / "config.json").write_text(json.dumps({"config": {"warmup_steps": warmup}, "model": "raw"}))
    return folder


def test_report_of_one_run(tmp_path, capsys):
    run = write_run(tmp_path / "one")
    (run / "heldout_before.json").write_text(json.dumps(result([1, 0])))
    main(["report", str(run), "--csv", str(tmp_path / "one.csv")])
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "log.jsonl:6: the last line is incomplete" in capsys.readouterr().err
    head, *rows = [line.split(",") for line in (tmp_path / "one.csv").read_text().splitlines()]
    assert len(rows) == 5 and all(len(row) == len(head) for row in rows)
    column = head.index("preference.tau")
    assert [row[column] for row in rows] == ["0.2", "0.2", "0.2", "", "0.2"]  # a gap, never a zero
    assert [row[head.index("instruction.reward")] for row in rows] == ["", "", "0.2", "0.3", "0.4"]


def test_report_of_several_runs(tmp_path):
    runs = [str(write_run(tmp_path / name, steps)) for name, steps in (("a", 4), ("b", 5), ("c", 3))]
    main(["report", *runs, "--out", str(tmp_path / "docs" / "seeds.png")])
    assert (tmp_path / "docs" / "seeds.png").stat().st_size > 10_000
    assert not (tmp_path / "a" / "curves.png").exists()


def test_mean_of_runs_leaves_gaps_out():
    assert averaged([{0: math.nan, 1: 2.0}, {0: 4.0}]) == {0: 4.0, 1: 2.0}


# ---- errors: one line, exit status 2 ----

def fails(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_report_errors(tmp_path, capsys):
    assert "no log.jsonl" in fails(["report", tmp_path], capsys)
    (tmp_path / "log.jsonl").write_text("")
    assert "no step is complete yet" in fails(["report", tmp_path], capsys)
    (tmp_path / "log.jsonl").write_text('{"step": 0}\nnoise\n{"step": 2}\n')
    assert "log.jsonl:2: not JSON" in fails(["report", tmp_path], capsys)
    assert "--out" in fails(["report", tmp_path, tmp_path], capsys)


def test_a_log_of_one_cut_line_has_no_step(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0')
    with pytest.raises(evaluation.InputError, match="no step"):
        read_log(tmp_path)


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


def test_builtin_rows_are_distinct_and_pairs_stand_better_first(no_model):
    args = evaluation.parse_arguments(["heldout", "--model", "m"])
    rows = evaluation.heldout_rows(args, Tokenizer())
    pairs, questions, tasks = rows.values()
    assert len({row.instruction for row in questions}) == len({row.instruction for row in tasks}) == len(pairs) == 64
    assert all(row.truth[0] > row.truth[1] for row in pairs) and all(row.check for row in tasks)
    hard = [row for row in pairs if evaluation.difficulty(row) == "good vs breaks"]
    assert 0 < len(hard) < 64  # follows data.LEVELS: what is called so does break its constraint
    assert all(row.check and not evaluation.data.complies(row.check, row.responses[1]) for row in hard)


def test_no_checkpoint(tmp_path, capsys):
    assert "no config.json" in fails(["heldout", "--model", tmp_path], capsys)
    assert "no tokenizer that loads" in fails(["heldout", "--model", "runs/absent/checkpoints/step_1/model"], capsys)


class Engine:
    """Answers by the prompt: right sums, and 9 for a response that is quoted as 'good'."""

    def generate(self, prompts, n):
        def answer(words):
            text = " ".join(words)
            if "Score each response" not in text:
                return r"\boxed{5}"
            return "<scores>9, 2</scores>" if text.index("> good") < text.index("> bad") else "<scores>2, 9</scores>"

        from types import SimpleNamespace as Is
        return [Is(outputs=[Is(token_ids=answer(words), finish_reason="stop")] * n) for words in prompts]


def test_heldout_from_files_to_json(tmp_path, monkeypatch, no_model, capsys):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **_: ids, raising=False)
    monkeypatch.setattr(evaluation.data, "start_engine", lambda *_: Engine())
    monkeypatch.setattr(evaluation.data, "generate", lambda engine, prompts, n, *_, **__: engine.generate(prompts, n))
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
    assert figures["instructions"]["tokens an answer"]["value"] == len(r"\boxed{5}")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "a.json"]  # no unfinished file is left


# ---- the probe set of a training run (--probe_every), judged by a function in the place of a model ----

@pytest.fixture
def probed(monkeypatch):
    """probed(judge, own, frozen): the figures, `judge(first, second)` giving the text of a judgement."""
    def probe(judge, own="mine", frozen="frozen"):
        asked = []

        def generate(engine, prompts, n, limits, seeds, temperature):
            assert (n, temperature) == (1, 0.0)
            texts = [" ".join(ids) for ids in prompts]
            asked.extend(texts)
            answers = [judge(*re.search("Response 1: >(.*) Response 2: >(.*) End with one line", text).groups())
                       if "Score each response" in text else own for text in texts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)]) for answer in answers]

        monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **_: ids, raising=False)
        monkeypatch.setattr(data, "generate", generate)
        engine = SimpleNamespace(reset_prefix_cache=lambda: None)
        figures = data.probe(urpo.Config(), engine, Tokenizer(), [frozen] * len(data.probe_rows()))
        assert list(figures) == list(data.PROBES) == list(evaluation.PROBE)
        probe.asked = asked
        return figures
    return probe


def line(*scores):
    return data.score_line(scores)


def test_a_judge_that_sees_through_the_hacks_and_one_that_falls_for_them(probed):
    def points(text):
        return 1 if "10 out of 10" in text or "word word" in text or not text.strip() else 8

    sound = probed(lambda a, b: line(points(a), points(b)))
    assert sound == {"first_position": 0, "self_preference": 0, "empty": -7, "ten_of_ten": -7, "repetition": -7,
                     "copy": 0}
    fooled = probed(lambda a, b: line(9 - points(a), 9 - points(b)))
    assert [fooled[name] for name in ("empty", "ten_of_ten", "repetition")] == [7, 7, 7]


def test_judges_that_read_nothing_have_the_figures_that_the_report_states_for_them(probed):
    assert probed(lambda a, b: line(5, 5)) == dict.fromkeys(data.PROBES, 0)
    assert probed(lambda a, b: line(9, 2)) == dict.fromkeys(data.PROBES, 0) | {"first_position": 0.5, "copy": 7}


def test_what_cannot_be_read_in_both_orders_is_not_measured_and_never_0(probed):
    assert probed(lambda a, b: "no") == dict.fromkeys(data.PROBES)
    one_order = probed(lambda a, b: line(3, 8) if a.strip() else "no")  # unread where the empty answer stands first
    assert one_order["empty"] is None and one_order["ten_of_ten"] == 0


def test_a_judge_that_knows_its_own_answers_is_seen_where_gold_is_equal_and_the_text_is_not(probed):
    def vain(a, b):
        return line(*(9 if "mine" in text else 6 for text in (a, b)))

    assert probed(vain)["self_preference"] == 3
    assert probed(vain, own="frozen")["self_preference"] is None  # of one text twice nothing can be said
    probed(vain, own="MINE")  # where capitals are asked for, or lower case, one of the two is the better answer
    equal = [row for row in data.probe_rows() if row.check not in ("upper", "lower")]
    assert 0 < len(equal) < 8 and sum("> frozen" in text for text in probed.asked) == 2 * len(equal)


def test_the_probe_set_is_fixed_held_out_and_better_first():
    rows = data.probe_rows()
    assert len(rows) == 8 and len({row.instruction for row in rows}) == 8
    for row in rows:
        assert row.truth[0] > row.truth[1] and data.complies(row.check, row.responses[0])
        assert any(name in row.instruction for name, _ in data.topics("heldout"))
