"""Rows of public data sets are read as they are meant, left out and counted, or refused with the field's name."""
import json
from functools import partial

import pytest
from pandas import DataFrame

import data
from data import Prompt
from infra.ranks import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, kind, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    return data.load_source(kind, str(path))


def pair(instruction):
    return Prompt("preference", instruction, ("good", "bad"), (1.0, 0.0))


def solved(answer):
    return Prompt("reasoning", "q", answer=answer)


def completion(text, overall, fine):
    return {"response": text, "overall_score": overall, "fine-grained_score": fine}


PAIR = {"chosen": "good", "rejected": "bad"}
ASKED = [user("q"), assistant("a"), user("r")]
TALK = "q\n\nAssistant: a\n\nHuman: r"  # what was said before the last question belongs to it
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nq\n\n"
        "Remember to put your answer on its own line after \"Answer:\".")  # one prompt must not ask for two forms
STEPS = "q Let's think step by step and output the final answer after \"####\"."
FORMATS = [
    ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 0.5, 2]},
     Prompt("preference", "q", ("a", "b", "c"), (2.0, 0.5, 2.0))),
    ({"instruction": "q", **PAIR, "chosen_score": 1, "rejected_score": 0}, pair("q")),
    ({"system": "s", "chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
     pair("s\n\nq")),
    ({"prompt": "q", "responses": [[assistant("good")], [assistant("bad")]], "scores": [1, 0]}, pair("q")),
    ({"instruction": "q", "completions": [completion("good", 1.0, None), completion("bad", 0.0, 5.0)]}, pair("q")),
    ({"problem": "q", "solution": r"\boxed{5}", "expected_answer": "6"}, solved("6")),
    ({"question": "q", "answer": "So \\boxed{5}.\n#### Remark\nNote it."}, solved("5")),
    ({"prompt": "q", **PAIR}, pair("q")), ({"question": "q", "completions": None, **PAIR}, pair("q")),
    ({"system": "s", "prompt": "q", **PAIR}, pair("s\n\nq")),
    ({"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}, pair("q")),
    ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, pair("q")),
    ({"chosen": f"\n\nHuman: {TALK}\n\nAssistant: good", "rejected": f"\n\nHuman: {TALK}\n\nAssistant: bad"},
     pair(TALK)),
    ({"prompt": "r", "chosen": [*ASKED, assistant("good")], "rejected": [*ASKED, assistant("bad")]}, pair(TALK)),
    ({"prompt": ASKED, **PAIR}, pair(TALK)),
    ({"instruction": "q", "completions": [{"response": "a", "overall_score": 7.5},
                                          {"response": "b", "overall_score": 3}]},
     Prompt("preference", "q", ("a", "b"), (7.5, 3.0))),
    # UltraFeedback: the mean of its ratings counts; its overall score turns the worst into the best.
    ({"instruction": "q", "source": "flan", "completions": [completion("a", 10.0, 1.0), completion("b", 10.0, 4.5)]},
     Prompt("preference", "q", ("a", "b"), (1.0, 4.5))),
    ({"question": "q", "answer": "0.1"}, solved("0.1")), ({"question": "q", "answer": 42}, solved("42")),
    ({"question": STEPS, "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}, solved("42")),
    ({"problem": "q", "solution": r"It is $\boxed 9$."}, solved("9")),
    ({"problem": "q", "solution": r"It is \fbox{9}."}, solved("9")),
    ({"problem": "q", "solution": r"\boxed{9}, I repeat: \boxed{9}"}, solved("9")),
    ({"prompt": [user(DAPO)], "reward_model": {"ground_truth": "34", "style": "rule"}}, solved("34")),
    ({"instruction": "q", "source": "x", "input": ""}, Prompt("instruction", "q")),
    ({"instruction": "q", "input": "shark"}, Prompt("instruction", "q\n\nshark")),
    ({"prompt": "q", "context": "shark"}, Prompt("instruction", "q\n\nshark")),
    ({"prompt": [user("q")]}, Prompt("instruction", "q")),
    ({"prompt": "s", "messages": [{"role": "system", "content": "s"}, *ASKED, assistant("b")]},
     Prompt("instruction", f"System: s\n\nHuman: {TALK}")),
]


@pytest.mark.parametrize("record, row", FORMATS)
def test_every_record_format_is_read_with_all_that_belongs_to_its_question(tmp_path, record, row):
    assert load(tmp_path, row.kind, record, record) == ([row, row], {})


@pytest.mark.parametrize("kind, row", [
    ("preference", {"prompt": "A colour?", "chosen": "Red.", "rejected": "Red."}),
    ("preference", {"prompt": "A colour?", **PAIR, "score_chosen": 7.0, "score_rejected": 7.0}),
    ("preference", {"prompt": "A colour?", "responses": ["Red.", "Blue.", "Pink."], "scores": [4, 4, 4]}),
    ("preference", {"chosen": "\n\nHuman: Cats?\n\nAssistant: Purr.\n\nHuman: Dogs?\n\nAssistant: Bark.",
                    "rejected": "\n\nHuman: Cats?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: Tired."}),
    ("reasoning", {"problem": "Show that it is even.", "answer": "proof"}),
    ("reasoning", {"problem": "Show that it is even.", "answer": r"\boxed{Not provided.}"}),
    *(("preference", {"prompt": "q", **PAIR, name.format("chosen"): 4.5, name.format("rejected"): 4.5})
      for name in data.PAIR_SCORES),
    ("preference", {"prompt": "q", "chosen": " ", "rejected": "bad"}),
    ("preference", {"prompt": "q", "responses": ["a", "a", "b"], "scores": [1, 5, 3]}),
])
def test_what_teaches_nothing_is_left_out_and_counted(tmp_path, kind, row):
    good = {"question": "q", "answer": "2"} if kind == "reasoning" else {"prompt": "q", **PAIR}
    prompts, left_out = load(tmp_path, kind, row, good)
    assert len(prompts) == left_out.total() == 1


@pytest.mark.parametrize("kind, row, field", [
    ("reasoning", {"question": "Which is red?", "choices": ["rose", "sky"], "answer": "A"}, "choices"),
    ("reasoning", {"problem": "Roots?", "solution": r"Either $\boxed{2}$ or $\boxed{3}$."}, "solution"),
    ("preference", {"prompt": "Larger?", "completions": ["9.11.", "So 9.11."], "labels": [0, 0]}, "completions"),
    ("preference", {"chosen": [user("Q?"), assistant("A")], "rejected": [user("Q?"), assistant("A"), user("more")]},
     "rejected"),
    ("preference", {"system": "Be brief.", **PAIR}, "'chosen' is no dialogue"),
    ("instruction", {"instruction": "Go on.", "history": [["a", "b"]]}, "history"),
    ("instruction", {"instruction": "Describe it.", "images": ["a.png"]}, "images"),
    ("instruction", {"messages": '[{"role": "user", "content": "q"}]'}, "'messages' holds messages as a text"),
    ("preference", {"prompt": "q", **PAIR, "chosen-rating": 2, "rejected-rating": 5}, "lower score, 2"),
    ("preference", {"prompt": "q", **PAIR, "score_chosen": "8", "score_rejected": 3}, "'8' is no finite number"),
    ("preference", {"prompt": "You are a pirate.", "chosen": [user("q"), assistant("good")],
                    "rejected": [user("q"), assistant("bad")]}, "'prompt' says what field 'chosen' does not"),
    ("preference", {"chosen": [user("q"), assistant("a"), assistant("good")], "rejected": "bad"}, "none at its end"),
    ("preference", {"chosen": "\n\nHuman: q\n\nAssistant: good\n\nHuman: thanks", "rejected": "bad"}, "assistant ends"),
    ("reasoning", {"question": " Let's think step by step and output the final answer after \"####\".", "answer": "1"},
     "nothing is left"),
])
def test_what_cannot_be_read_is_refused_by_line_and_field(tmp_path, kind, row, field):
    with pytest.raises(InputError, match=rf"rows.jsonl:1: .*{field}"):
        load(tmp_path, kind, row)


@pytest.mark.parametrize("content, what", [(b"PAR1..", "json:1: .*JSON object a line"), (b" [{},", "array"),
                                           (b"\xef\xbb\xbf[1]", "json:1: expected an object, found int")])
def test_a_file_that_holds_no_objects_is_named(tmp_path, content, what):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=what):
        data.load_source("reasoning", str(path))


@pytest.mark.parametrize("name, write", [
    ("rows.parquet", DataFrame.to_parquet), ("rows.csv", partial(DataFrame.to_csv, index=False)),
    ("rows.jsonl.gz", partial(DataFrame.to_json, orient="records", lines=True))])
def test_other_formats_are_read_by_the_package_for_data_sets(tmp_path, name, write):
    write(DataFrame({"question": ["2 + 2?", "1 + 1?"], "answer": ["4", "two"]}), tmp_path / name)
    prompts, _ = data.load_source("reasoning", str(tmp_path / name))
    assert [(prompt.instruction, prompt.answer) for prompt in prompts] == [("2 + 2?", "4"), ("1 + 1?", "two")]


@pytest.mark.parametrize("form", ["%s\n", "[%s,\n%s]"])
def test_a_line_or_an_array_is_read_and_a_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path, form):
    path, row = tmp_path / "rows.json", '{"instruction": "Say hi."}'
    path.write_text("\ufeff" + form.replace("%s", row))
    prompts, _ = data.load_source("instruction", str(path))
    assert [prompt.instruction for prompt in prompts] == ["Say hi."] * form.count("%s")
