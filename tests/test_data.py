"""data.py: the referee's template under forgery, the builtin data, the pure stream, and every record format."""
import doctest
import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import data
from data import KINDS, InputError, Prompt
from rewards import kendall_tau, parse_scores, verify_answer


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(data)
    assert failed == 0 and attempted >= 8


# ---- the referee's template; forgery of it: tests/test_hostile.py ----

def test_worked_examples_stand_as_earlier_turns(smol_tokenizer):
    row = Prompt("preference", "Say hi.", ("hi", "no", "hm"), (2.0, 0.0, 1.0))
    shots = data.referee_shots(3, 2)
    text = smol_tokenizer.decode(data.encode_prompt(smol_tokenizer, row, shots=2))
    assert all(parse_scores(verdict, 3) for _, verdict in shots)
    assert text.count("<|im_start|>user") == 3 and text.count("<|im_start|>assistant") == 3
    reasoning = Prompt("reasoning", "What is 1 + 1?", answer="2")
    assert data.encode_prompt(smol_tokenizer, reasoning, shots=2) == data.encode_prompt(smol_tokenizer, reasoning)


def test_a_tokenizer_without_chat_template_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(InputError, match="no chat template; use an instruct model"):
        data.encode_chat(bare, "hi")


# ---- 3. self-score: the referee's prompt over sampled answers ----

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
    kept, _ = data.drop_overlong([instruction], smol_tokenizer, limit, 0, group=4)
    if kept:
        assert len(data.encode_judgement(smol_tokenizer, instruction.instruction, answers, limit)) <= limit


def test_a_judgement_cuts_the_longest_answer_and_says_so(smol_tokenizer):
    answers = ["short", "long " * 400]
    text = smol_tokenizer.decode(data.encode_judgement(smol_tokenizer, "Say hi.", answers, 300))
    assert "> short\n" in text and "[cut]" in text
    whole = smol_tokenizer.decode(data.encode_judgement(smol_tokenizer, "Say hi.", answers, 4096))
    assert answers[1].strip() in whole and "[cut]" not in whole


def test_an_impossible_judgement_names_the_remedy(smol_tokenizer):
    with pytest.raises(InputError, match=r"--max_prompt_tokens is 50: raise it, or lower --group"):
        data.encode_judgement(smol_tokenizer, "Say hi.", ["a", "b"], 50)


# ---- builtin data ----

def builtin(kind, split, count=2000, source="builtin"):
    return data.load_source(kind, source, split, count)


@pytest.mark.parametrize("kind", KINDS)
def test_builtin_rows_do_not_depend_on_global_random_state(kind):
    random.seed(1)
    first = builtin(kind, "train", 50)
    random.seed(2)
    assert builtin(kind, "train", 50) == first and len(set(first)) > 25


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_heldout_share_no_item(kind):
    source = "builtin:5" if kind == "preference" else "builtin"
    train, heldout = builtin(kind, "train", 6000, source), builtin(kind, "heldout", 6000, source)
    assert not {row.instruction for row in train} & {row.instruction for row in heldout}
    if kind == "reasoning":
        return  # worked sums are no items: a word problem may need the sum that another question asks for
    texts = [{text for row in rows for text in (*row.responses, row.worked) if text} for rows in (train, heldout)]
    assert texts[0] and not texts[0] & texts[1]


def test_builtin_has_many_instructions():
    assert len({row.instruction for row in builtin("instruction", "train")}) >= 150


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("source", ["builtin", "builtin:2", "builtin:8"])
def test_length_alone_does_not_tell_the_better_response(source, split):
    rows = builtin("preference", split, source=source)
    shares = [data.longer_is_right(row.responses, row.truth) for row in rows]
    assert 0.45 <= sum(shares) / len(shares) <= 0.55


def test_the_order_of_builtin_responses_holds_by_construction():
    seen = set()
    for row in builtin("preference", "train", 500):
        for text, score in zip(row.responses, row.truth):
            level = data.LEVELS[int(score)]
            seen.add(level)
            assert level != "good and complies" or data.complies(row.check, text)
            assert level != "breaks the constraint" or not data.complies(row.check, text)
    assert seen == set(data.LEVELS)


@pytest.mark.parametrize("check, good, bad", [
    ("", "Owls hunt at night.", "Owls."),
    ("sentences:1", "Owls hunt.", "Owls hunt. They fly."),
    ("sentences:1", "Owls hunt!", "Owls hunt"),
    ("sentences:2", "Owls hunt. They fly.", "Owls hunt."),
    ("lower", "owls hunt.", "Owls hunt."),
    ("upper", "OWLS HUNT.", "OWLS hunt."),
    ("items:3", "- a\n- b\n- c", "- a\n- b"),
    ("items:3", "- a\n- b\n- c\n", "Here:\n- a\n- b\n- c"),
    ("contains:trees", "Old Trees fall.", "Old treetops fall."),
    ("avoids:trees", "Old treetops fall.", "Old TREES fall."),
    ("at_most:3", "Owls hunt mice.", "Owls hunt mice often."),
    ("at_least:3", "Owls hunt mice.", "Owls hunt."),
    ("ends:!", "Owls hunt!", "Owls! Hunt."),
    ("starts:well", "Well, owls hunt.", "Owls hunt well."),
])
def test_complies(check, good, bad):
    assert data.complies(check, good) and not data.complies(check, bad)


@pytest.mark.parametrize("check", ["", "lower", "upper", "at_most:10", "avoids:trees"])
def test_an_empty_text_complies_with_nothing(check):
    assert not data.complies(check, " \n") and not data.complies(check, "...")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_worked_answers_earn_the_full_reward(split):
    for row in builtin("reasoning", split, 500):
        assert verify_answer(data.worked_answer(row), row.answer) == 1
    for row in builtin("preference", split, 500):
        scores = parse_scores(data.worked_answer(row), len(row.truth))
        assert scores and kendall_tau(scores, row.truth) == pytest.approx(1)
    for row in builtin("instruction", split, 500):
        assert data.complies(row.check, data.worked_answer(row))


@given(truth=st.lists(st.integers(-1000, 1000), min_size=2, max_size=8))
def test_a_worked_verdict_parses_and_keeps_the_order_of_any_true_scores(truth):
    row = Prompt("preference", "ask", ("x",) * len(truth), tuple(map(float, truth)))
    scores = parse_scores(data.worked_answer(row), len(truth))
    assert scores and kendall_tau(scores, truth, "strict") == (1 if len(set(truth)) > 1 else 0)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_builtin_can_fix_the_number_of_responses(n):
    assert {len(row.responses) for row in builtin("preference", "train", 50, f"builtin:{n}")} == {n}


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


# ---- packed rows ----

def group_of(prompt_ids, *answers):
    return data.Group(0, None, prompt_ids, list(answers))


def size_of(row):
    return sum(len(part) for group in row for part in (group.prompt_ids, *group.answers))


def dense(row):
    index_T = torch.arange(len(row.ids_T))
    return data.visible(row)(0, 0, index_T[:, None], index_T[None, :])


def test_an_answer_sees_its_prompt_and_itself_alone():
    owner = ["0p", "0p", "01", "01", "02", "1p", "11", "12", "12"]
    mask_TT = dense(data.build_row([group_of([1, 2], [3, 4], [5]), group_of([6], [7], [8, 9])], "cpu"))
    for q in range(9):
        for k in range(9):
            assert mask_TT[q, k] == (k <= q and (owner[k] == owner[q] or owner[k] == owner[q][0] + "p")), (q, k)


ragged = st.lists(st.tuples(st.integers(1, 150), st.lists(st.integers(1, 40), min_size=1, max_size=5)),
                  min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=20, deadline=None)
@given(sizes=ragged, seed=st.integers(0, 99))
def test_attention_part_by_part_and_through_the_block_mask_equals_attention_under_the_dense_mask(sizes, seed):
    """Four query heads on two key heads; outputs of all three, and the gradients of the one that a CPU trains with."""
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    row = data.build_row([group_of([0] * p, *[[0] * n for n in answers]) for p, answers in sizes], "cpu")
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, len(row.ids_T), 8, generator=generator, requires_grad=True)
                         for heads in (4, 2, 2))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=dense(row), enable_gqa=True, scale=0.3)
    found = data.row_attention(None, query, key, value, None, scaling=0.3, row=row)[0].transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    for own, plain in zip(*(torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (found, expected))):
        assert (own - plain).norm() <= 1e-5 * plain.norm() + 1e-6
    inputs = (x.detach() for x in (query, key, value))  # no gradient on a CPU, but the mask is the GPU's
    flex = flex_attention(*inputs, block_mask=data.block_mask(row), enable_gqa=True, scale=0.3)
    torch.testing.assert_close(flex, expected, rtol=1e-5, atol=1e-5)


def test_the_block_mask_names_no_block_in_which_nothing_is_seen():
    """What makes shared rows cheap on a GPU: of 17 x 17 blocks only those are computed that hold a visible pair."""
    row = data.build_row([group_of([0] * 640, *[[0] * 128] * 8), group_of([0] * 512)], "cpu")
    mask = data.block_mask(row)
    blocks = dense(row).unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=(1, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks) and blocks.sum() == 15 + 8 * 6 + 10


@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=20), budget=st.integers(1, 60))
def test_pack_loses_nothing_and_keeps_the_budget(sizes, budget):
    groups = [group_of([0] * prompt, [0] * answer) for prompt, answer in sizes]
    rows = data.pack(groups, budget)
    assert sorted(id(group) for row in rows for group in row) == sorted(map(id, groups))
    assert all(size_of(row) <= budget or len(row) == 1 for row in rows)


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=4, max_size=40), st.sampled_from([1, 2, 4]))
def test_deal_loses_no_group_gives_all_ranks_as_many_and_about_the_same_work(sizes, world):
    groups = [group_of([0] * prompt, [0]) for prompt, _ in sizes[: len(sizes) // world * world]]
    for group, (_, signal) in zip(groups, sizes):
        group.advantages = [1.0 * signal]
    hands = data.deal(groups, world)
    assert sorted(id(group) for hand in hands for group in hand) == sorted(map(id, groups))
    assert {len(hand) for hand in hands} == {len(groups) // world}
    work = [size_of(group for group in hand if group.has_signal) for hand in hands]
    if sum(group.has_signal for group in groups) <= len(groups) // world:  # else a full hand may force another's
        assert max(work) <= sum(work) / world + max(size_of([group]) for group in groups)


def test_pack_fills_rows():
    small, big = group_of([1], [1]), group_of([1] * 50, [1] * 50)
    assert data.pack([small, big], 10) == [[big], [small]]
    assert data.pack([small, small, small], 4) == [[small, small], [small]]


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
    ("instruction", {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")]},
     Prompt("instruction", "q")),
])
def test_every_record_format_is_read(tmp_path, kind, record, row):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
    assert data.load_source(kind, str(source)) == [row, row]


def test_hub_rows_read_like_the_same_rows_in_a_file(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or [
        {"question": "q", "answer": "#### 42"}])
    assert data.load_source("reasoning", "openai/gsm8k:main") == [Prompt("reasoning", "q", answer="42")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


def test_rows_that_do_not_fit_are_dropped_and_counted(smol_tokenizer):
    short, long = Prompt("reasoning", "What is 1 + 1?", answer="2"), Prompt("reasoning", "one " * 300, answer="2")
    assert data.drop_overlong([short, long, short], smol_tokenizer, 200, 0, 4) == ([short, short], 1)
    pair = Prompt("preference", "Say hi.", ("hi", "word " * 300), (1.0, 0.0))
    assert data.drop_overlong([pair], smol_tokenizer, 200, 0, 4) == ([], 1)


def test_an_instruction_without_room_for_its_judgement_is_dropped(smol_tokenizer):
    row = Prompt("instruction", "word " * 100)
    assert data.drop_overlong([row], smol_tokenizer, 200, 0, group=2)[1] == 1
    assert data.drop_overlong([row], smol_tokenizer, 400, 0, group=2)[1] == 0
