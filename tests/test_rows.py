"""infra/rows.py: what stands in a packed row, attention against a dense mask, equal work for all ranks.

That a row equals separate sequences is in test_policy.py; what needs several ranks is in test_invariance.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Group
from infra import rows
from infra.rows import build_row


def group_of(prompt_ids, *answers) -> Group:
    return Group(0, None, prompt_ids, list(answers), advantages=[1.0] * len(answers),
                 sampler_logprobs=[[-1.0] * len(answer) for answer in answers])


def row_of(*groups):
    return build_row(groups, 1.0)


# ---- what an answer sees ----

def dense(row):
    index_T = torch.arange(len(row.ids_T))
    return rows.visible(row)(0, 0, index_T[:, None], index_T[None, :])


def test_an_answer_sees_its_prompt_and_itself_alone():
    owner = ["0p", "0p", "01", "01", "02", "1p", "11", "12", "12"]
    mask_TT = dense(row_of(group_of([1, 2], [3, 4], [5]), group_of([6], [7], [8, 9])))
    for q in range(9):
        for k in range(9):
            assert mask_TT[q, k] == (k <= q and (owner[k] == owner[q] or owner[k] == owner[q][0] + "p")), (q, k)


ragged = st.lists(st.tuples(st.integers(1, 150), st.lists(st.integers(1, 40), min_size=1, max_size=5)),
                  min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=10, deadline=None)
@given(sizes=ragged, seed=st.integers(0, 99))
def test_attention_part_by_part_and_through_the_block_mask_equals_attention_under_the_dense_mask(sizes, seed):
    """Four query heads on two key heads; outputs of all three, and the gradients of the one that a CPU trains with."""
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    row = row_of(*[group_of([0] * prompt, *[[0] * n for n in answers]) for prompt, answers in sizes])
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, len(row.ids_T), 8, generator=generator, requires_grad=True)
                         for heads in (4, 2, 2))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=dense(row), enable_gqa=True, scale=0.3)
    found = rows.row_attention(None, query, key, value, None, scaling=0.3, row=row)[0].transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    found_gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for own, plain in zip(found_gradients, expected_gradients):
        assert (own - plain).norm() <= 1e-5 * plain.norm() + 1e-6
    inputs = (x.detach() for x in (query, key, value))  # no gradient on a CPU, but the mask is the GPU's
    flex = flex_attention(*inputs, block_mask=rows.block_mask(row), enable_gqa=True, scale=0.3)
    torch.testing.assert_close(flex, expected, rtol=1e-5, atol=1e-5)


def test_the_block_mask_names_no_block_in_which_nothing_is_seen():
    """What makes shared rows cheap on a GPU: of 17 x 17 blocks only those are computed that hold a visible pair."""
    row = row_of(group_of([0] * 640, *[[0] * 128] * 8), group_of([0] * 512))
    blocks = dense(row).unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=(1, 3))
    assert torch.equal(rows.block_mask(row).to_dense()[0, 0].bool(), blocks) and blocks.sum() == 15 + 8 * 6 + 10


@pytest.mark.parametrize("tokens, length", [(2, 256), (127, 256), (256, 256), (257, 384), (1000, 1024)])
def test_on_a_gpu_a_row_is_a_multiple_of_128_tokens_and_nobody_sees_the_padding(monkeypatch, tokens, length):
    monkeypatch.setattr(rows, "ROW_BLOCK", 128)
    monkeypatch.setattr(rows, "SHORTEST_ROW", 256)
    row = row_of(group_of([5] * (tokens - 1), [6]))
    assert len(row.ids_T) == len(row.position_T) == len(row.group_T) == len(row.answer_T) == length
    seen_TT = dense(row)
    assert not seen_TT[:tokens, tokens:].any() and not seen_TT[tokens:, :tokens].any()
    assert seen_TT.diagonal().all()  # a query that sees nothing would make NaN


# ---- which groups share a row, and which rank gets them ----

def size_of(groups) -> int:
    return sum(len(part) for group in groups for part in (group.prompt_ids, *group.answers))


@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=20), budget=st.integers(1, 60))
def test_pack_loses_nothing_and_keeps_the_budget(sizes, budget):
    groups = [group_of([0] * prompt, [0] * answer) for prompt, answer in sizes]
    packed = rows.pack(groups, budget)
    assert sorted(id(group) for row in packed for group in row) == sorted(map(id, groups))
    assert all(size_of(row) <= budget or len(row) == 1 for row in packed)


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=4, max_size=40), st.sampled_from([1, 2, 4]))
def test_sharing_loses_no_group_gives_all_ranks_as_many_and_about_the_same_work(sizes, world):
    groups = [group_of([0] * prompt, [0]) for prompt, _ in sizes[: len(sizes) // world * world]]
    for group, (_, signal) in zip(groups, sizes):
        group.advantages = [1.0 * signal]
    hands = rows.share_evenly(groups, world)
    assert sorted(id(group) for hand in hands for group in hand) == sorted(map(id, groups))
    assert {len(hand) for hand in hands} == {len(groups) // world}
    work = [size_of(group for group in hand if group.has_signal) for hand in hands]
    if sum(group.has_signal for group in groups) <= len(groups) // world:  # else a full hand may force another's
        assert max(work) <= sum(work) / world + max(size_of([group]) for group in groups)
