"""Rows of public data sets are read as they are meant, left out and counted, or refused with the field's name."""
import json

import pytest

import data
from infra.ranks import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, kind, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return data.load_source(kind, str(path))


PAIR = {"chosen": "Red.", "rejected": "Dog."}
DIALOGUE = [user("What do bears eat?"), assistant("Berries."), user("And in winter?")]
ASKED = "What do bears eat?\n\nAssistant: Berries.\n\nHuman: And in winter?"


@pytest.mark.parametrize("kind, row, question", [
    ("instruction", {"instruction": "Classify.", "input": "A shark"}, "Classify.\n\nA shark"),
    ("instruction", {"instruction": "Classify.", "input": ""}, "Classify."),
    ("instruction", {"prompt": "Ask.", "context": "A shark"}, "Ask.\n\nA shark"),
    ("instruction", {"prompt": "Kai rhymes.", "messages": [
        {"role": "system", "content": "Kai rhymes."}, *DIALOGUE, assistant("They sleep.")]},
     f"System: Kai rhymes.\n\nHuman: {ASKED}"),
    ("preference", {"system": "In French.", "prompt": "A colour?", **PAIR}, "In French.\n\nA colour?"),
    ("preference", {"question": "A colour?", **PAIR}, "A colour?"),
    ("preference", {"prompt": "A colour?", "completions": None, **PAIR}, "A colour?"),
    ("preference", {"prompt": "And in winter?", "chosen": [*DIALOGUE, assistant("They sleep.")],
                    "rejected": [*DIALOGUE, assistant("Snow.")]}, ASKED),
    ("reasoning", {"question": "Two and two? Let's think step by step and output the final answer after \"####\".",
                   "answer": "4"}, "Two and two?"),
])
def test_a_question_keeps_what_belongs_to_it(tmp_path, kind, row, question):
    (prompt,), left_out = load(tmp_path, kind, row)
    assert prompt.instruction == question
    assert not left_out


@pytest.mark.parametrize("row, answer", [
    ({"problem": "Nine?", "solution": r"It is $\boxed 9$."}, "9"),
    ({"problem": "Nine?", "solution": r"It is \fbox{9}."}, "9"),
    ({"problem": "Nine?", "solution": r"\boxed{9}, I repeat: \boxed{9}"}, "9"),
    ({"question": "Nine?", "answer": "3 * 3 = 9 #### 9"}, "9"),
])
def test_a_gold_answer_is_found(tmp_path, row, answer):
    (prompt,), _ = load(tmp_path, "reasoning", row)
    assert prompt.answer == answer


@pytest.mark.parametrize("kind, row", [
    ("preference", {"prompt": "A colour?", "chosen": "Red.", "rejected": "Red."}),
    ("preference", {"prompt": "A colour?", **PAIR, "score_chosen": 7.0, "score_rejected": 7.0}),
    ("preference", {"prompt": "A colour?", "responses": ["Red.", "Blue.", "Pink."], "scores": [4, 4, 4]}),
    ("preference", {"chosen": "\n\nHuman: Cats?\n\nAssistant: Purr.\n\nHuman: Dogs?\n\nAssistant: Bark.",
                    "rejected": "\n\nHuman: Cats?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: Tired."}),
    ("reasoning", {"problem": "Show that it is even.", "answer": "proof"}),
])
def test_what_teaches_nothing_is_left_out_and_counted(tmp_path, kind, row):
    good = {"preference": {"prompt": "A colour?", **PAIR}, "reasoning": {"question": "1 + 1?", "answer": "2"}}[kind]
    prompts, left_out = load(tmp_path, kind, row, good)
    assert len(prompts) == 1
    assert left_out.total() == 1


@pytest.mark.parametrize("kind, row, field", [
    ("reasoning", {"question": "Which is red?", "choices": ["rose", "sky"], "answer": "A"}, "choices"),
    ("reasoning", {"problem": "Roots?", "solution": r"Either $\boxed{2}$ or $\boxed{3}$."}, "solution"),
    ("preference", {"prompt": "Larger?", "completions": ["9.11.", "So 9.11."], "labels": [0, 0]}, "completions"),
    ("preference", {"chosen": [user("Q?"), assistant("A")], "rejected": [user("Q?"), assistant("A"), user("more")]},
     "rejected"),
    ("preference", {"system": "Be brief.", **PAIR}, "'chosen' is no dialogue"),
    ("instruction", {"instruction": "Go on.", "history": [["a", "b"]]}, "history"),
])
def test_what_cannot_be_read_is_refused_by_line_and_field(tmp_path, kind, row, field):
    with pytest.raises(InputError, match=rf"rows.jsonl:1: .*{field}"):
        load(tmp_path, kind, row)


@pytest.mark.parametrize("start, what", [(b"PAR1..", "parquet"), (b"\x1f\x8b..", "compressed"), (b" [{}]", "array")])
def test_a_file_of_another_format_is_named(tmp_path, start, what):
    path = tmp_path / "rows.json"
    path.write_bytes(start)
    with pytest.raises(InputError, match=what):
        data.load_source("reasoning", str(path))


def test_a_mark_at_the_start_of_a_file_is_no_part_of_its_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"instruction": "Say hi."}\n')
    (prompt,), _ = data.load_source("instruction", str(path))
    assert prompt.instruction == "Say hi."
