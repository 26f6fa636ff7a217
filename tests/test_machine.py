"""machine.py: packed rows against separate sequences, attention against a dense mask, the policy, equal work for all
ranks, and errors of rank 0. What needs several ranks is in test_invariance.py, the sampler in test_end_to_end.py."""
import doctest
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import machine
from conftest import assert_same_gradients, gradients, plain_logprobs, random_groups
from data import Group, InputError
from machine import build_row, build_rows


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(machine)
    assert failed == 0 and attempted >= 4


# ---- what an answer sees ----

def group_of(prompt_ids, *answers) -> Group:
    return Group(0, None, prompt_ids, list(answers))


def dense(row):
    index_T = torch.arange(len(row.ids_T))
    return machine.visible(row)(0, 0, index_T[:, None], index_T[None, :])


def test_an_answer_sees_its_prompt_and_itself_alone():
    owner = ["0p", "0p", "01", "01", "02", "1p", "11", "12", "12"]
    mask_TT = dense(build_row([group_of([1, 2], [3, 4], [5]), group_of([6], [7], [8, 9])]))
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

    row = build_row([group_of([0] * p, *[[0] * n for n in answers]) for p, answers in sizes])
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, len(row.ids_T), 8, generator=generator, requires_grad=True)
                         for heads in (4, 2, 2))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=dense(row), enable_gqa=True, scale=0.3)
    found = machine.row_attention(None, query, key, value, None, scaling=0.3, row=row)[0].transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    found_gradients = torch.autograd.grad((found * weight).sum(), (query, key, value))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for own, plain in zip(found_gradients, expected_gradients):
        assert (own - plain).norm() <= 1e-5 * plain.norm() + 1e-6
    inputs = (x.detach() for x in (query, key, value))  # no gradient on a CPU, but the mask is the GPU's
    flex = flex_attention(*inputs, block_mask=machine.block_mask(row), enable_gqa=True, scale=0.3)
    torch.testing.assert_close(flex, expected, rtol=1e-5, atol=1e-5)


def test_the_block_mask_names_no_block_in_which_nothing_is_seen():
    """What makes shared rows cheap on a GPU: of 17 x 17 blocks only those are computed that hold a visible pair."""
    row = build_row([group_of([0] * 640, *[[0] * 128] * 8), group_of([0] * 512)])
    mask = machine.block_mask(row)
    blocks = dense(row).unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=(1, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks) and blocks.sum() == 15 + 8 * 6 + 10


# ---- the values of the loss in a row ----

def test_every_answer_token_carries_its_own_values_and_old_log_probs_go_back_to_their_groups():
    first, second = group_of([1, 2], [3, 4], [5]), group_of([6], [7])
    first.advantages, second.advantages = [1.0, -0.5], [2.0]
    first.sampler_logprobs, second.sampler_logprobs = [[-1.0, -2.0], [-3.0]], [[-4.0]]
    first.weights, second.weights = [0.1, 0.2, 0.3], [0.4]
    row = build_row([first, second])
    assert row.target_N.tolist() == [3, 4, 5, 7]
    assert row.advantage_N.tolist() == [1.0, 1.0, -0.5, 2.0]
    assert row.sampler_N.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert row.weight_N.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert row.old_N is None
    row.keep_old(torch.tensor([-1.5, -2.5, -3.5, -4.5]))
    assert first.old_N.tolist() == [-1.5, -2.5, -3.5] and second.old_N.tolist() == [-4.5]
    again = build_row([second, first])
    assert again.old_N.tolist() == [-4.5, -1.5, -2.5, -3.5]


# ---- which groups share a row, and which rank gets them ----

def size_of(groups) -> int:
    return sum(len(part) for group in groups for part in (group.prompt_ids, *group.answers))


@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=20), budget=st.integers(1, 60))
def test_pack_loses_nothing_and_keeps_the_budget(sizes, budget):
    groups = [group_of([0] * prompt, [0] * answer) for prompt, answer in sizes]
    rows = machine.pack(groups, budget)
    assert sorted(id(group) for row in rows for group in row) == sorted(map(id, groups))
    assert all(size_of(row) <= budget or len(row) == 1 for row in rows)


def test_pack_fills_rows():
    small, big = group_of([1], [1]), group_of([1] * 50, [1] * 50)
    assert machine.pack([small, big], 10) == [[big], [small]]
    assert machine.pack([small, small, small], 4) == [[small, small], [small]]


def test_a_rank_with_fewer_rows_than_another_gets_idle_ones_that_weigh_nothing(make_policy, monkeypatch):
    monkeypatch.setattr(machine, "all_reduce", lambda value, op: value + 2)  # another rank has two rows more
    groups = random_groups(1)
    rows = build_rows(groups, 64)
    assert [len(row.groups) for row in rows] == [1, 1, 1] and rows[0].groups == groups
    policy = make_policy()
    for row in rows[1:]:
        assert row.groups[0] not in groups and row.weight_N.tolist() == row.advantage_N.tolist() == [0.0]
        logprob_N = policy(row)
        assert logprob_N.shape == (1,) and logprob_N.isfinite().all()


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=4, max_size=40), st.sampled_from([1, 2, 4]))
def test_sharing_loses_no_group_gives_all_ranks_as_many_and_about_the_same_work(sizes, world):
    groups = [group_of([0] * prompt, [0]) for prompt, _ in sizes[: len(sizes) // world * world]]
    for group, (_, signal) in zip(groups, sizes):
        group.advantages = [1.0 * signal]
    hands = data.share_evenly(groups, world)
    assert sorted(id(group) for hand in hands for group in hand) == sorted(map(id, groups))
    assert {len(hand) for hand in hands} == {len(groups) // world}
    work = [size_of(group for group in hand if group.has_signal) for hand in hands]
    if sum(group.has_signal for group in groups) <= len(groups) // world:  # else a full hand may force another's
        assert max(work) <= sum(work) / world + max(size_of([group]) for group in groups)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_every_row_is_measured_by_one_rank_and_known_to_all(monkeypatch, count):
    rows = list(range(count))
    measured, parts = [], {}
    for rank in (1, 2, 0):  # what each rank gives to the others
        monkeypatch.setattr(machine.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(machine.dist, "get_world_size", lambda: 3)

        def gather(into, own, rank=rank):
            parts[rank] = own
            into[:] = [parts.get(other, (0, [])) for other in range(3)]

        monkeypatch.setattr(machine.dist, "all_gather_object", gather)
        if rank != 0:
            machine_rows = rows[rank::3]
            parts[rank] = (data.checksum(rows), [measured.append(row) or row % 2 == 0 for row in machine_rows])
    found = machine.each_row_once(lambda row: measured.append(row) or row % 2 == 0, rows)
    assert found == [row % 2 == 0 for row in rows] and sorted(measured) == rows
    parts[2] = (data.checksum([*rows, 10]), parts[2][1])  # of another file
    with pytest.raises(InputError, match="the ranks have read different rows"):
        machine.each_row_once(lambda row: True, rows)


def test_rebalancing_keeps_the_groups_of_each_minibatch(process_group):
    groups = random_groups(6)
    for group in groups:
        group.advantages = [1.0, 0.0, -1.0]
    shared = machine.rebalance(groups, minibatches=2)
    assert sorted(group.index for group in shared[:3]) == [0, 1, 2]
    assert sorted(group.index for group in shared[3:]) == [3, 4, 5]


# ---- the policy ----

@pytest.mark.parametrize("count", [1, 3])
def test_a_packed_row_equals_separate_sequences(make_policy, plain_model, count):
    policy, groups = make_policy(temperature=0.7), random_groups(count)
    logprob_N = policy(build_row(groups))
    weight_N = torch.randn(len(logprob_N), generator=torch.Generator().manual_seed(1))
    (logprob_N * weight_N).sum().backward()

    parts = []
    for group in groups:
        for answer in group.answers:
            parts.append(plain_logprobs(plain_model, group.prompt_ids, answer, temperature=0.7))
    expected_N = torch.cat(parts)
    (expected_N * weight_N).sum().backward()
    torch.testing.assert_close(logprob_N, expected_N, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(policy, "lm."), gradients(plain_model))


def test_the_temperature_divides_the_bias_of_a_head_too_and_padded_words_are_no_part_of_the_softmax():
    lm = torch.nn.Module()
    lm.lm_head = torch.nn.Linear(4, 7)
    policy = machine.Policy(lm, vocabulary=5, temperature=0.5, logit_chunk=1024, recompute=False)
    hidden_NH = torch.randn(3, 4)
    expected_N5 = torch.log_softmax(lm.lm_head(hidden_NH)[:, :5] / 0.5, -1)
    found_N = policy.token_logprobs(hidden_NH, torch.tensor([0, 4, 2]))
    torch.testing.assert_close(found_N, expected_N5[range(3), [0, 4, 2]])


@pytest.mark.parametrize("changes", [{"logit_chunk": 1}, {"logit_chunk": 7}, {"recompute": True},
                                     {"recompute": True, "logit_chunk": 7}], ids=str)
def test_chunks_and_recomputation_change_nothing(make_policy, changes):
    results = []
    for policy in (make_policy(), make_policy(**changes)):
        logprob_N = policy(build_row(random_groups(2)))
        logprob_N.square().sum().backward()
        results.append((logprob_N.detach(), gradients(policy)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


def test_the_gradient_is_clipped_to_the_given_norm_and_its_own_norm_is_returned(make_policy):
    policy = make_policy()
    (row,) = build_rows(random_groups(2), 4096)
    policy(row).sum().backward()
    before = torch.cat([gradient.flatten() for gradient in gradients(policy).values()]).norm().item()
    assert machine.clip_gradient(policy, 1e-3) == pytest.approx(before, rel=1e-5) and before > 1e-3
    after = torch.cat([gradient.flatten() for gradient in gradients(policy).values()]).norm().item()
    assert after == pytest.approx(1e-3, rel=1e-3)


def test_full_weights_are_the_models_own_by_the_checkpoints_names(make_policy, plain_model):
    expected = plain_model.state_dict()
    found = dict(machine.full_weights(make_policy()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


# ---- ranks ----

def test_a_folder_that_cannot_be_written_is_one_plain_error(process_group, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="writing .*mine failed: .*Not a directory.*; make room or mend the permiss"):
        machine.on_rank_0(f"writing {tmp_path}/runs/mine", lambda: (tmp_path / "runs" / "mine").mkdir())


def test_other_errors_on_rank_0_are_not_called_a_full_disk(process_group):
    with pytest.raises(InputError, match="^--model x: no$"):
        machine.on_rank_0("reading", lambda: (_ for _ in ()).throw(InputError("--model x: no")))
    with pytest.raises(ZeroDivisionError):
        machine.on_rank_0("reading", lambda: 1 / 0)
    assert machine.on_rank_0("reading", lambda: 7) == 7


@pytest.mark.parametrize("error, printed", [
    (InputError("--model x: no"), "error: --model x: no\n"),
    (FloatingPointError("drift: 1 nat"), "error: drift: 1 nat\n"),
    (RuntimeError("[gloo] Connection closed by peer\nand more"),
     "error: another rank died, or stalled for longer than --timeout; its own message says why; --resume continues "
     "from the newest checkpoint ([gloo] Connection closed by peer)\n"),
], ids=["of a user", "of the numbers", "of a lost rank"])
def test_an_error_that_all_ranks_find_is_one_line_printed_once_and_status_2(monkeypatch, capsys, error, printed):
    monkeypatch.setattr(machine, "STORE", torch.distributed.HashStore())
    for _ in range(4):  # ranks
        with pytest.raises(SystemExit) as caught:
            machine.stop(error)
        assert caught.value.code == 2
    assert capsys.readouterr().err == printed


def test_an_error_is_told_though_the_node_that_held_the_ranks_notes_is_gone(monkeypatch, capsys):
    def add(message, count):
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(machine, "STORE", SimpleNamespace(add=add))
    with pytest.raises(SystemExit):
        machine.stop(RuntimeError("Connection closed by peer"))
    assert capsys.readouterr().err.startswith("error: another rank died")


def test_a_runtime_error_that_is_no_lost_rank_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        machine.stop(RuntimeError("shapes do not match"))


def test_the_lists_of_all_ranks_meet_on_rank_0(process_group):
    assert machine.gather([1, 2]) == [1, 2] and machine.gather([]) == []
