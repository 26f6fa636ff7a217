"""data.py: the referee's prompts, the judgements, the pure stream, every record format, a group's way to disk.

Forgery of the template is in test_hostile.py, bad rows in test_bad_input.py."""
import json
import random
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import urpo
from data import KINDS, Group, Prompt
from infra.ranks import InputError


def config(**changes) -> urpo.Config:
    settings = dict(batch=12, warmup_steps=0, max_prompt_tokens=200, max_answer_tokens=20, group=4)
    settings["max_judge_tokens"] = 800
    return urpo.Config(**settings | changes)


# ---- which answers a judgement sees ----

@given(st.data(), st.integers())
def test_judge_orders_are_balanced_and_never_repeat(drawn, seed):
    size = drawn.draw(st.integers(2, 8))
    listed = drawn.draw(st.integers(2, size))
    step = 1 if listed == size else listed
    judgements = step * drawn.draw(st.integers(1, listed * len(data.judge_strides(size, listed)) // step))
    data.check_judging(SimpleNamespace(group=size, judge_list=listed, judgements=judgements))
    orders = data.judge_orders(size, listed, judgements, random.Random(seed))
    assert len(orders) == judgements * size // listed == len(set(map(tuple, orders)))
    assert all(len(set(order)) == listed for order in orders)
    assert Counter(answer for order in orders for answer in order) == dict.fromkeys(range(size), judgements)
    for place in range(listed):  # each full ring shows every answer once in each place
        found = Counter(order[place] for order in orders)
        assert max(found.values()) - min(found[answer] for answer in range(size)) <= (listed == size)


# ---- 1. draw ----

def numbered(kind, length):
    """Rows that can be told apart; the true score of a response is the number in its text."""
    return [Prompt(kind, f"{kind} {i}", ("r0", "r1", "r2", "r3") if kind == "preference" else (),
                   (0.0, 1.0, 2.0, 3.0) if kind == "preference" else ()) for i in range(length)]


SOURCES = {"preference": numbered("preference", 7), "reasoning": numbered("reasoning", 11),
           "instruction": numbered("instruction", 5)}


def drawn(steps, **changes) -> list[Prompt]:
    return [row for step in range(steps) for row in data.draw(config(**changes), SOURCES, step)]


def kinds_of(batch):
    return tuple(sum(row.kind == kind for row in batch) for kind in KINDS)


def test_draw_is_a_pure_function_of_seed_and_step():
    batches = []
    for state in (1, 2):
        random.seed(state)
        torch.manual_seed(state)
        batches.append([data.draw(config(seed=3, warmup_steps=2), SOURCES, step) for step in (5, 0, 2)])
    assert batches[0] == batches[1]
    assert batches[0][0] != data.draw(config(seed=4, warmup_steps=2), SOURCES, 5)


@pytest.mark.parametrize("mix, warm, cold", [
    ("1:1:1", (6, 6, 0), (4, 4, 4)), ("2:1:1", (8, 4, 0), (6, 3, 3)), ("1:1:0", (6, 6, 0), (6, 6, 0)),
    ("1:0:1", (12, 0, 0), (6, 0, 6)), ("0:1:1", (0, 12, 0), (0, 6, 6)), ("0:1:0", (0, 12, 0), (0, 12, 0))])
def test_the_mix_holds_in_every_batch_and_warm_up_leaves_out_instructions(mix, warm, cold):
    asked = config(mix=mix, warmup_steps=2)
    assert [kinds_of(data.draw(asked, SOURCES, step)) for step in range(4)] == [warm, warm, cold, cold]


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_visits_each_row_once_also_across_the_end_of_warm_up(kind, warmup_steps):
    names = [row.instruction for row in drawn(15, warmup_steps=warmup_steps) if row.kind == kind]
    length = len(SOURCES[kind])
    epochs = [names[i : i + length] for i in range(0, len(names) - length + 1, length)]
    assert len(epochs) >= 2 and all(len(set(epoch)) == length for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1, "epochs must differ in order"


def test_candidates_and_their_truth_are_shuffled_together():
    rows = drawn(10, mix="1:0:0")
    assert all(row.truth == tuple(float(text[1:]) for text in row.responses) for row in rows)
    assert len({row.responses for row in rows}) > 5


def test_both_orders_draw_every_preference_row_twice_mirrored_and_the_other_kinds_once():
    rows = drawn(3, both_orders=True)
    pairs = [row for row in rows if row.kind == "preference"]
    for shown, mirrored in zip(pairs[::2], pairs[1::2], strict=True):
        assert data.swapped(shown) == mirrored != shown
    assert len({row.instruction for row in pairs[::2]}) == len(pairs) // 2
    assert [row for row in rows if row.kind != "preference"] == [row for row in drawn(3) if row.kind != "preference"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_all_ranks_make_up_the_batch_and_each_has_as_many_of_each_kind(world):
    batch = drawn(3)
    shares = [data.shard(batch, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index, _ in share) == list(range(len(batch)))
    assert all(batch[index] is prompt for share in shares for index, prompt in share)
    assert len({len(share) for share in shares}) == 1
    for kind in data.KINDS:
        counts = [sum(prompt.kind == kind for _, prompt in share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_request_seeds_differ_by_role_prompt_step_and_seed():
    seeds = [data.request_seed(seed, step, index, role) for seed in (0, 1) for step in range(10) for index in range(20)
             for role in ("answer", "judge/0", "judge/1")]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)


def ultrafeedback(*scores) -> dict:
    completions = [{"response": f"r{i}", "fine-grained_score": score} for i, score in enumerate(scores)]
    return {"source": "flan", "instruction": "q", "completions": completions}


# ---- the hub, and what is left out ----

def test_rows_of_the_hub_are_read_once_and_a_few_unreadable_ones_are_left_out_and_said_but_not_many(monkeypatch):
    rows, asked = [ultrafeedback(1.0, 2.0 + i / 1000) for i in range(98)], []
    rows += [rows[0], ultrafeedback(1.0)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or rows)
    found, left_out = data.load_source("preference", "some/set:main")
    assert asked == [(("some/set",), {"name": "main", "split": "train"})]
    assert len(found) == 98 and list(left_out.values()) == [1, 1]
    assert any("some/set:main:100: field 'responses'" in reason for reason in left_out)
    rows[:] = rows[-10:]
    with pytest.raises(InputError, match="^some/set: 1 of 10 .*some/set:10: field 'responses'"):
        data.load_source("preference", "some/set")


@pytest.mark.parametrize("row, room, kept", [
    (Prompt("reasoning", "What is 1 + 1?", answer="2"), 800, True),
    (Prompt("reasoning", "one " * 300, answer="2"), 800, False),
    (Prompt("preference", "Say hi.", ("hi", "word " * 300), (1.0, 0.0)), 800, False),
    (Prompt("instruction", "word " * 100), 400, True), (Prompt("instruction", "word " * 100), 200, False)])
def test_a_row_fits_with_its_prompt_and_an_instruction_with_its_judgement_too(smol_tokenizer, row, room, kept):
    assert data.fits(config(max_judge_tokens=room, judge_list=2), smol_tokenizer, row) == kept


def test_several_sources_of_the_kinds_of_the_mix_are_read_and_what_was_dropped_is_counted(tmp_path, smol_tokenizer):
    for name, rows in (("a", ["What is 1 + 1?", "one " * 300]), ("b", ["What is 2 + 2?"]), ("long", ["one " * 300])):
        lines = [json.dumps({"question": row, "answer": "2"}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    asked = config(mix="0:1:0", preferences=["absent.jsonl"], reasoning=[f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"])
    sources, told = data.load_sources(asked, smol_tokenizer)
    assert [row.instruction for row in sources["reasoning"]] == ["What is 1 + 1?", "What is 2 + 2?"]
    assert list(sources) == ["reasoning"] and [found["read"] for found in told.values()] == [1, 1]
    assert [sum(found["left out"].values()) for found in told.values()] == [1, 0]
    with pytest.raises(InputError, match="^--reasoning: .*raise --max_prompt_tokens 200"):
        data.load_sources(config(mix="0:1:0", reasoning=[f"{tmp_path}/long.jsonl"]), smol_tokenizer)


def test_a_run_that_never_leaves_its_warm_up_says_so(tmp_path, smol_tokenizer, capsys):
    (tmp_path / "I.jsonl").write_text('{"instruction": "Say hi."}')
    for steps in (3, 4):
        asked = config(mix="0:0:1", instructions=[f"{tmp_path}/I.jsonl"], steps=steps, warmup_steps=3)
        data.load_sources(asked, smol_tokenizer)
        assert ("none is ever drawn: --steps 3 end within" in capsys.readouterr().out) == (steps == 3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_every_row_is_measured_by_one_rank_and_known_to_all(monkeypatch, count):
    rows, measured, parts, own_rank = list(range(count)), [], [], [0]
    monkeypatch.setattr(data, "fits", lambda config, tokenizer, row: measured.append(row) or row % 2 == 0)
    monkeypatch.setattr(data, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: own_rank[0], get_world_size=lambda: 3))
    monkeypatch.setattr(data, "exchange", lambda own: parts.append(own) or [])
    for own_rank[0] in range(3):
        data.each_row_fits(None, None, rows)
    assert sorted(measured) == rows
    monkeypatch.setattr(data, "exchange", lambda own: parts)
    assert data.each_row_fits(None, None, rows) == [row % 2 == 0 for row in rows]
    parts[2] = (data.checksum([*rows, 10]), parts[2][1])  # of another file
    with pytest.raises(InputError, match="the ranks have read different rows"):
        data.each_row_fits(None, None, rows)


def test_the_checksum_of_the_rows_changes_with_any_row_and_with_their_order():
    rows = SOURCES["reasoning"][:3]
    found = {str(part): data.checksums({"reasoning": part})["reasoning"] for part in (rows, rows[::-1], rows[:2])}
    assert len(set(found.values())) == 3


# ---- a group's way to disk and back ----

RANKED = Group(4, Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0)), [5, 6], [[7, 8], [9]],
               texts=["<scores>9, 2</scores>", "\u2028\n\"3\""], finished=[True, False], rewards=[1.0, -1.0],
               advantages=[0.7, -0.7], entropy=1.25)
UNJUDGED = Group(7, Prompt("instruction", "Say hi."), [5], [[7], [8]], texts=["hi", "Hi"], finished=[True, True],
                 judgements=[{"order": [1, 0], "text": "fine", "finished": True}], advantages=[0.0, 0.0])


@pytest.mark.parametrize("group", [RANKED, UNJUDGED], ids=["ranked", "unjudged"])
def test_a_group_comes_back_from_its_record_as_it_was(tmp_path, group):
    record = json.loads(json.dumps(group.to_record(step=3)))
    assert Group.from_record(record) == group
    assert list(record)[:2] == ["step", "index"], "runs.cut_lines reads the step at the start of the line"
    assert (record["step"], record["rewards"]) == (3, group.rewards), "unjudged is null, not 0"
    for name in record.keys() - {"step"}:  # which read_lines looks for
        (tmp_path / "it").write_text(json.dumps({field: value for field, value in record.items() if field != name}))
        with pytest.raises(InputError, match=f"it:1: no field '{name}'"):
            list(data.read_groups(tmp_path / "it", []))
