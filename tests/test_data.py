"""data.py: the referee's prompts, the pure stream, every record format, and a group's way to disk and back.

Forgery of the template is in test_hostile.py, the toy data in test_toy.py.
"""
import doctest
import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import data
import flags
import readers
import urpo
from data import KINDS, Group, InputError, Prompt
from rewards import verify_answer


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(data)
    assert failed == 0 and attempted >= 8


# ---- the referee's prompts ----

def test_a_tokenizer_without_chat_template_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InputError, match="no chat template; give --chat_template plain_turns.jinja, or"):
        data.encode_chat(bare, "hi")


PIECES = st.lists(st.sampled_from(["<", "|", ">", "im_end", "eot_id", "<|im_end|>", "<|eot_id|>", "<|im_", "end|>", "/",
                                   "think>", "scores>", "<scores", "\n", "\r", "\u2028", " ", "Response 2:", "9"]),
                  max_size=30).map("".join)

ANSWERS = st.lists(st.one_of(st.text(max_size=300), st.integers(0, 300).map(lambda n: "\n" * n),
                             st.integers(0, 200).map(lambda n: "\U0001f9ff" * n), PIECES), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=ANSWERS, spare=st.integers(0, 400))
def test_a_judgement_fits_for_every_instruction_that_the_load_check_kept(smol_tokenizer, answers, spare):
    """Whatever four answers were sampled: had drop_overlong kept the instruction, its judgement must not stop a run."""
    instruction, limit = Prompt("instruction", "Tell me about owls."), 120 + spare
    kept, _ = readers.drop_overlong([instruction], smol_tokenizer, 4096, limit, listed=4)
    if kept:
        ids, cut = data.encode_judgement(smol_tokenizer, instruction.instruction, answers, limit)
        text = smol_tokenizer.decode(ids)
        assert len(ids) <= limit and text.count("[cut]") == cut


def test_a_judgement_cuts_the_longest_answer_and_says_so(smol_tokenizer):
    answers = ["short", "long " * 400]
    ids, cut = data.encode_judgement(smol_tokenizer, "Say hi.", answers, 300)
    text = smol_tokenizer.decode(ids)
    assert "> short\n" in text and text.count("[cut]") == cut == 1
    ids, cut = data.encode_judgement(smol_tokenizer, "Say hi.", answers, 4096)
    whole = smol_tokenizer.decode(ids)
    assert answers[1].strip() in whole and "[cut]" not in whole and cut == 0


def test_long_answers_are_cut_to_one_length_in_one_go_and_use_the_room_that_there_is(smol_tokenizer, monkeypatch):
    """Eight long answers of different lengths and a short one: none of the long ones is judged by less of its text."""
    encoded, encode = [], data.encode_chat
    monkeypatch.setattr(data, "encode_chat", lambda *arguments: encoded.append(1) or encode(*arguments))
    rng = random.Random(0)
    words = "owl tree river stone because running, 17 a bright - light\n".split(" ")
    answers = [" ".join(rng.choices(words, k=k)) for k in (300, 350, 400, 450, 500, 600, 900, 2000)] + ["short"]
    ids, cut = data.encode_judgement(smol_tokenizer, "Say hi.", answers, 1200)
    assert cut == 8 and 1170 <= len(ids) <= 1200 and len(encoded) <= 4
    lengths = []
    for block in smol_tokenizer.decode(ids).split("\nResponse ")[1:]:
        shown = [line for line in block.splitlines() if line.startswith("> ")]
        lengths.append(len(smol_tokenizer.encode("\n".join(shown))))
    assert max(lengths[:8]) - min(lengths[:8]) <= 4 and lengths[8] < 5


def test_the_paper_preset_shows_its_judge_eight_whole_answers_in_the_context_of_its_model(smol_tokenizer):
    config = urpo.Config(**urpo.PRESETS["paper"])
    rng = random.Random(0)
    answers = []
    for _ in range(config.group):
        ids = [rng.randrange(100, 49000) for _ in range(config.max_answer_tokens)]
        answers.append(smol_tokenizer.decode(ids))
    assert data.encode_judgement(smol_tokenizer, "word " * 1000, answers, config.max_judge_tokens)[1] == 0
    assert flags.longest_sequence(config) <= 32768  # max_position_embeddings of Qwen2.5-7B-Instruct


def test_an_impossible_judgement_names_the_remedy(smol_tokenizer):
    with pytest.raises(InputError, match=r"--max_judge_tokens is 50: raise it, or lower --group"):
        data.encode_judgement(smol_tokenizer, "Say hi.", ["a", "b"], 50)


# ---- 1. draw ----

def numbered(kind, length):
    """Rows that can be told apart; the true score of a response is the number in its text."""
    return [Prompt(kind, f"{kind} {i}", ("r0", "r1", "r2", "r3") if kind == "preference" else (),
                   (0.0, 1.0, 2.0, 3.0) if kind == "preference" else ()) for i in range(length)]


SOURCES = {"preference": numbered("preference", 7), "reasoning": numbered("reasoning", 11),
           "instruction": numbered("instruction", 5)}


def kinds_of(batch):
    return tuple(sum(row.kind == kind for row in batch) for kind in KINDS)


def test_draw_is_a_pure_function_of_seed_and_step():
    batches = []
    for state in (1, 2):
        random.seed(state)
        torch.manual_seed(state)
        batches.append([data.draw(SOURCES, "1:1:1", 12, 2, seed=3, step=step) for step in (5, 0, 2)])
    assert batches[0] == batches[1]
    assert batches[0][0] != data.draw(SOURCES, "1:1:1", 12, 2, seed=4, step=5)


@pytest.mark.parametrize("mix, warm, cold", [
    ("1:1:1", (6, 6, 0), (4, 4, 4)), ("2:1:1", (8, 4, 0), (6, 3, 3)), ("1:1:0", (6, 6, 0), (6, 6, 0)),
    ("1:0:1", (12, 0, 0), (6, 0, 6)), ("0:1:1", (0, 12, 0), (0, 6, 6)), ("0:1:0", (0, 12, 0), (0, 12, 0)),
])
def test_the_mix_holds_in_every_batch_and_warm_up_leaves_out_instructions(mix, warm, cold):
    assert [kinds_of(data.draw(SOURCES, mix, 12, 2, 0, step)) for step in range(4)] == [warm, warm, cold, cold]


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_visits_each_row_once_also_across_the_end_of_warm_up(kind, warmup_steps):
    names = [row.instruction for step in range(15) for row in data.draw(SOURCES, "1:1:1", 12, warmup_steps, 0, step)
             if row.kind == kind]
    length = len(SOURCES[kind])
    epochs = [names[i : i + length] for i in range(0, len(names) - length + 1, length)]
    assert len(epochs) >= 2 and all(len(set(epoch)) == length for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1, "epochs must differ in order"


def test_candidates_and_their_truth_are_shuffled_together():
    rows = [row for step in range(10) for row in data.draw(SOURCES, "1:0:0", 4, 0, 0, step)]
    assert all(row.truth == tuple(float(text[1:]) for text in row.responses) for row in rows)
    assert len({row.responses for row in rows}) > 5


def test_both_orders_draw_every_preference_row_twice_mirrored_and_the_other_kinds_once():
    rows = [row for step in range(3) for row in data.draw(SOURCES, "1:1:1", 12, 0, 0, step, both_orders=True)]
    pairs = [row for row in rows if row.kind == "preference"]
    for shown, mirrored in zip(pairs[::2], pairs[1::2], strict=True):
        assert (shown.instruction, shown.responses, shown.truth) == (
            mirrored.instruction, mirrored.responses[::-1], mirrored.truth[::-1])
    assert len({row.instruction for row in pairs[::2]}) == len(pairs) // 2
    alone = [row for step in range(3) for row in data.draw(SOURCES, "1:1:1", 12, 0, 0, step)]
    assert [row for row in rows if row.kind != "preference"] == [row for row in alone if row.kind != "preference"]


@pytest.mark.parametrize("mix, batch, parts", [("1:1:1", 12, 4), ("1:1:1", 24, 8), ("2:1:1", 16, 4), ("1:1:1", 12, 2)])
def test_every_contiguous_share_of_a_batch_holds_each_kind(mix, batch, parts):
    rows, size = data.draw(SOURCES, mix, batch, 0, 0, 0), batch // parts
    for part in range(parts):
        assert all(kinds_of(rows[part * size : (part + 1) * size]))


@pytest.mark.parametrize("minibatches", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_all_ranks_make_up_the_batch_whatever_their_number(world, minibatches):
    batch, size = [f"row {i}" for i in range(24)], 24 // minibatches
    shares = [data.shard(batch, minibatches, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == sorted(enumerate(batch))
    for m in range(minibatches):
        part = len(shares[0]) // minibatches
        members = {index for share in shares for index, _ in share[m * part : (m + 1) * part]}
        assert members == set(range(m * size, (m + 1) * size))


def test_request_seeds_differ_by_role_prompt_step_and_seed():
    seeds = [data.request_seed(seed, step, index, role) for seed in (0, 1) for step in range(10) for index in range(20)
             for role in ("answer", "judge/0", "judge/1")]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)


# ---- sources ----

def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(instruction):
    return Prompt("preference", instruction, ("good", "bad"), (1.0, 0.0))


@pytest.mark.parametrize("kind, record, row", [
    ("preference", {"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 0.5, 2]},
     Prompt("preference", "q", ("a", "b", "c"), (2.0, 0.5, 2.0))),
    ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}, pair("q")),
    ("preference", {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
     pair("q")),
    ("preference", {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}, pair("q")),
    ("preference", {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
     pair("q")),
    ("preference", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: good",
                    "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: bad"},
     pair("q\n\nAssistant: a\n\nHuman: r")),
    ("preference", {"instruction": "q", "completions": [{"response": "a", "overall_score": 7.5},
                                                        {"response": "b", "overall_score": 3}]},
     Prompt("preference", "q", ("a", "b"), (7.5, 3.0))),
    ("reasoning", {"question": "q", "answer": "0.1"}, Prompt("reasoning", "q", answer="0.1")),
    ("reasoning", {"question": "q", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}, Prompt("reasoning", "q", answer="42")),
    ("reasoning", {"question": "q", "answer": 42}, Prompt("reasoning", "q", answer="42")),
    ("reasoning", {"prompt": [user("q")], "reward_model": {"ground_truth": "34", "style": "rule"}},
     Prompt("reasoning", "q", answer="34")),
    ("instruction", {"instruction": "q", "source": "x"}, Prompt("instruction", "q")),
    ("instruction", {"prompt": "q"}, Prompt("instruction", "q")),
    ("instruction", {"prompt": [user("q")]}, Prompt("instruction", "q")),
    # What was said before the last question belongs to it.
    ("preference", {"chosen": [user("q"), assistant("a"), user("r"), assistant("good")],
                    "rejected": [user("q"), assistant("a"), user("r"), assistant("bad")]},
     pair("q\n\nAssistant: a\n\nHuman: r")),
    ("preference", {"prompt": [user("q"), assistant("a"), user("r")], "chosen": "good", "rejected": "bad"},
     pair("q\n\nAssistant: a\n\nHuman: r")),
    ("reasoning", {"prompt": [user("I own 3 cats."), assistant("Nice."), user("How many?")], "answer": "3"},
     Prompt("reasoning", "I own 3 cats.\n\nAssistant: Nice.\n\nHuman: How many?", answer="3")),
    ("instruction", {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"),
                                  assistant("b")]},
     Prompt("instruction", "System: s\n\nHuman: q\n\nAssistant: a\n\nHuman: r")),
    ("instruction", {"messages": [user("q"), assistant("a")]}, Prompt("instruction", "q")),
])
def test_every_record_format_is_read(tmp_path, kind, record, row):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
    assert readers.load_source(kind, str(source)) == [row, row]


def test_hub_rows_read_like_the_same_rows_in_a_file(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or [
        {"question": "q", "answer": "#### 42"}])
    assert readers.load_source("reasoning", "openai/gsm8k:main") == [Prompt("reasoning", "q", answer="42")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


def ultrafeedback(*scores) -> dict:
    completions = [{"response": f"r{i}", "overall_score": 10.0, "fine-grained_score": score}
                   for i, score in enumerate(scores)]
    return {"source": "flan", "instruction": "q", "completions": completions}


def test_ultrafeedback_is_ranked_by_the_mean_of_its_ratings_since_its_overall_score_turns_the_worst_into_the_best():
    row = readers.read_preference(ultrafeedback(1.0, 4.5, 3.25, 5.0))
    assert row.truth == (1.0, 4.5, 3.25, 5.0) and row.responses == ("r0", "r1", "r2", "r3")


def test_a_few_unreadable_rows_of_the_hub_are_left_out_and_said_but_not_many(monkeypatch, capsys):
    import datasets

    monkeypatch.delenv("RANK", raising=False)
    rows = [ultrafeedback(1.0, 2.0 + i / 1000) for i in range(98)] + [ultrafeedback(1.0)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    assert len(readers.load_source("preference", "some/set")) == 98
    assert "some/set: 1 of 99 rows cannot be read and are left out, the first: some/set:99: field 'responses': 1 of " \
        in capsys.readouterr().out
    rows[:] = rows[-10:]
    with pytest.raises(InputError, match="^some/set:10: field 'responses': 1 of them, and 2 to 8 are ranked together"):
        readers.load_source("preference", "some/set")


def test_rows_that_do_not_fit_are_dropped_and_counted(smol_tokenizer):
    short, long = Prompt("reasoning", "What is 1 + 1?", answer="2"), Prompt("reasoning", "one " * 300, answer="2")
    assert readers.drop_overlong([short, long, short], smol_tokenizer, 200, 800, 4) == ([short, short], 1)
    pair = Prompt("preference", "Say hi.", ("hi", "word " * 300), (1.0, 0.0))
    assert readers.drop_overlong([pair], smol_tokenizer, 200, 800, 4) == ([], 1)


def test_an_instruction_without_room_for_its_judgement_is_dropped(smol_tokenizer):
    row = Prompt("instruction", "word " * 100)
    assert readers.drop_overlong([row], smol_tokenizer, 800, 200, listed=2)[1] == 1
    assert readers.drop_overlong([row], smol_tokenizer, 800, 400, listed=2)[1] == 0


def test_sources_are_read_for_the_kinds_of_the_mix_alone_and_what_was_dropped_is_counted(tmp_path, smol_tokenizer):
    for name, rows in (("r", ["What is 1 + 1?", "one " * 300]), ("long", ["one " * 300])):
        lines = [json.dumps({"question": row, "answer": "2"}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    counts = {"preference": 0, "reasoning": 4, "instruction": 0}
    names = {"preference": ["absent.jsonl"], "reasoning": [str(tmp_path / "r.jsonl")], "instruction": ["absent.jsonl"]}
    sources, dropped = readers.load_sources(names, counts, smol_tokenizer, 200, 800, 4, 8)
    assert sources == {"reasoning": [Prompt("reasoning", "What is 1 + 1?", answer="2")]} and dropped == {"reasoning": 1}
    names["reasoning"] = [str(tmp_path / "long.jsonl")]
    with pytest.raises(InputError, match="--reasoning: all 1 rows are longer than --max_prompt_tokens 200, or leave "):
        readers.load_sources(names, counts, smol_tokenizer, 200, 800, 4, 8)


# ---- a group's way to disk and back ----

RANKED = Group(4, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0)), [5, 6], [[7, 8], [9]],
               texts=["<scores>9, 2</scores>", "first"], finished=[True, False], rewards=[1.0, -1.0],
               advantages=[0.7, -0.7], entropy=1.25)
SOLVED = Group(5, Prompt("reasoning", "1 + 1?", answer="2"), [5], [[7], [8]], texts=["2", "\u2028\n\"3\""],
               finished=[True, True], rewards=[1.0, 0.0], advantages=[0.7, -0.7], entropy=0.5)
JUDGED = Group(6, Prompt("instruction", "Say hi.", check="lower"), [5], [[7], [8]], texts=["hi", "Hi"],
               finished=[True, True],
               judgements=[{"order": [1, 0], "cut": 0, "prompt": "p", "text": "<scores>3, 4</scores>"}],
               rewards=[4.0, 3.0], advantages=[0.7, -0.7], entropy=0.0)
UNJUDGED = Group(7, Prompt("instruction", "Say hi."), [5], [[7], [8]], texts=["hi", "Hi"], finished=[True, True],
                 judgements=[{"order": [1, 0], "cut": 0, "prompt": "p", "text": "fine"}], advantages=[0.0, 0.0])


@pytest.mark.parametrize("group", [RANKED, SOLVED, JUDGED, UNJUDGED], ids=["ranked", "solved", "judged", "unjudged"])
def test_a_group_comes_back_from_its_record_as_it_was(group):
    record = json.loads(json.dumps(group.to_record(step=3)))
    assert Group.from_record(record) == group
    assert list(record)[:2] == ["step", "index"], "runs.cut_lines reads the step at the start of the line"
    assert (record["step"], record["index"], record["kind"]) == (3, group.index, group.prompt.kind)
    assert record["rewards"] == group.rewards, "unjudged is null, not 0"


def test_what_only_the_update_needs_is_not_recorded():
    group = Group(5, SOLVED.prompt, [5], [[7], [8]], sampler_logprobs=[[-1.0], [-2.0]], weights=[0.5, 0.5],
                  old_N=torch.tensor([-1.0, -2.0]))
    assert not {"sampler_logprobs", "weights", "old_N"} & set(group.to_record(0))


def test_a_record_without_a_field_is_refused_by_its_name():
    whole = JUDGED.to_record(0)
    for name in whole:
        record = {field: value for field, value in whole.items() if field != name}
        if name != "step":  # which read_lines looks for
            with pytest.raises(InputError, match=f"no field '{name}'; not a line that urpo.py wrote"):
                Group.from_record(record)


def test_the_size_of_a_group_and_whether_it_has_a_signal():
    assert (RANKED.answer_tokens, RANKED.tokens) == (3, 5)
    assert RANKED.has_signal and not UNJUDGED.has_signal


def test_the_answer_of_a_whole_solution_is_what_stands_in_its_box():
    row = readers.read_row("reasoning", "file:1", {"problem": "2 + 2?", "solution": r"The sum is $\\boxed{4}$."})
    assert row.answer == "4" and verify_answer(r"so \\boxed{4}", row.answer) == 1
    with pytest.raises(InputError, match="file:1: field 'solution': no .*boxed.* nobody knows which"):
        readers.read_row("reasoning", "file:1", {"problem": "2 + 2?", "solution": "The sum is four, or 4."})


def test_the_checksum_of_the_rows_changes_with_any_row_and_with_their_order():
    rows = readers.load_source("reasoning", "toy", count=3)
    found = {str(part): readers.checksums({"reasoning": part}) for part in (rows, rows[::-1], rows[:2])}
    assert len({value["reasoning"] for value in found.values()}) == 3
