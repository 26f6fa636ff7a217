"""The packed row: several groups in one sequence of tokens, each prompt stored once.

A row is [prompt, answer 1, ..., answer G] of a group, then the next group. Positions restart after the prompt for each
answer, and an answer sees its prompt and itself alone. So G answers cost one prompt, while log-probs and gradients
equal those of G separate sequences (tests/test_rows.py).

Tensor names carry their shape: T tokens of a row, N answer tokens, K attention heads, D width of a head.
A group is anything with prompt_ids, answers, advantages, sampler_logprobs, tokens and has_signal, as data.Group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.ranks import DEVICE, GPU, all_reduce

ROW_BLOCK = 128 if GPU else 1  # rows of such a multiple, and of such a length at least, suit FlexAttention
SHORTEST_ROW = 256 if GPU else 1


class Row:
    """The tensors of one row. No dataclass: FSDP2 walks through a dataclass token by token, at every layer."""

    ids_T: Tensor
    position_T: Tensor
    group_T: Tensor  # which group a token belongs to
    answer_T: Tensor  # 0 in a prompt, 1 ... G in an answer
    source_N: Tensor  # where in the row stands the token that predicts answer token n
    target_N: Tensor  # answer token n
    lengths: list[list[int]]  # tokens of [prompt, answer 1, ..., answer G], for each group; last those of the padding
    # For the loss, a value for each answer token:
    advantage_N: Tensor
    weight_N: Tensor
    sampler_N: Tensor  # log-prob by the sampler, nats
    old_N: Tensor | None = None  # log-prob by the trainer at rollout weights, nats; None: not computed yet

    def keep_old(self, old_N: Tensor, importance_cap: float = 0.0) -> None:
        """The trainer's log-probs at rollout weights. With a cap they also correct for the sampler's own precision:
        the weight of a token is multiplied by min(pi_old / pi_sampler, cap). 0: no correction."""
        self.old_N = old_N
        if importance_cap:
            self.weight_N = self.weight_N * (old_N - self.sampler_N).exp().clamp(max=importance_cap)


def build_row(groups: list, weight: float) -> Row:
    """Groups as one row of tensors. weight: of each answer token in the loss.

    >>> from types import SimpleNamespace
    >>> group = SimpleNamespace(prompt_ids=[5, 6], answers=[[7, 8], [9]], advantages=[1.0, -1.0],
    ...                         sampler_logprobs=[[-.1, -.2], [-.3]])
    >>> row = build_row([group], 0.25)
    >>> row.ids_T.tolist(), row.position_T.tolist(), row.answer_T.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2], [0, 0, 1, 1, 2])
    >>> row.source_N.tolist(), row.target_N.tolist(), row.advantage_N.tolist(), row.weight_N.tolist()
    ([1, 2, 1], [7, 8, 9], [1.0, 1.0, -1.0], [0.25, 0.25, 0.25])
    >>> row.lengths
    [[2, 2, 1]]
    """
    parts = [[group.prompt_ids, *group.answers] for group in groups]
    tokens = sum(map(len, sum(parts, [])))
    blocks = -(-tokens // ROW_BLOCK)
    padding = max(SHORTEST_ROW, blocks * ROW_BLOCK) - tokens
    if padding:  # a group of its own, which no other token sees
        parts.append([[0] * padding])
    ids, position = [], []
    group_of, answer_of = [], []
    source, target = [], []
    for g, group in enumerate(parts):
        prompt_length = len(group[0])
        prompt_end = len(ids) + prompt_length - 1
        for a, part in enumerate(group):
            first = 0
            if a > 0:  # the last token of the prompt predicts the first token of every answer
                first = prompt_length
                source += [prompt_end, *range(len(ids), len(ids) + len(part) - 1)]
                target += part
            ids += part
            position += range(first, first + len(part))
            group_of += [g] * len(part)
            answer_of += [a] * len(part)
    row = Row()
    row.lengths = [[len(part) for part in group] for group in parts]
    row.ids_T = on_device(ids)
    row.position_T = on_device(position)
    row.group_T = on_device(group_of)
    row.answer_T = on_device(answer_of)
    row.source_N = on_device(source)
    row.target_N = on_device(target)
    add_loss_values(row, groups, weight)
    return row


def add_loss_values(row: Row, groups: list, weight: float) -> None:
    """Advantage, weight and sampler's log-prob of each answer token."""
    advantage, sampler = [], []
    for group in groups:
        for answer, a in zip(group.answers, group.advantages):
            advantage += [a] * len(answer)
        for logprobs in group.sampler_logprobs:
            sampler += logprobs
    row.advantage_N = on_device(advantage)
    row.weight_N = on_device([weight] * len(advantage))
    row.sampler_N = on_device(sampler)


def on_device(values: list) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def pack(groups: list, row_tokens: int) -> list[list]:
    """Groups into rows of at most `row_tokens` tokens, the longest first, each into the first row with room.

    A group that is longer gets a row of its own.
    """
    rows: list[list] = []
    for group in sorted(groups, key=lambda group: -group.tokens):
        for row in rows:
            if sum(other.tokens for other in row) + group.tokens <= row_tokens:
                row.append(group)
                break
        else:
            rows.append([group])
    return rows


def build_rows(groups: list, *, row_tokens: int, weight: float) -> list[Row]:
    """Packed rows, as many on every rank: under FSDP every forward pass is a collective.

    weight: of each answer token in the loss. A rank that has fewer rows than another gets idle ones, of one token whose
    weight is 0.
    """
    rows = []
    for packed in pack(groups, row_tokens):
        rows.append(build_row(packed, weight))
    most = int(all_reduce(len(rows), dist.ReduceOp.MAX))
    while len(rows) < most:
        rows.append(build_row([Example([0], [[0]])], 0.0))
    return rows


class Example:
    """A group that no one has sampled."""

    def __init__(self, prompt_ids: list[int], answers: list[list[int]]):
        self.prompt_ids, self.answers = prompt_ids, answers
        self.advantages = [0.0] * len(answers)
        self.sampler_logprobs = [[0.0] * len(answer) for answer in answers]


def rebalance(batch: list, minibatches: int) -> list:
    """This rank's groups of each minibatch, minibatch by minibatch: equally many to each rank, the work about even.

    Only after part 4 it is known which groups have a signal, and only they cost anything in parts 5 and 6. A minibatch
    is the same part of the batch for any number of ranks, so the update does not depend on their number.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    size = len(batch) // minibatches
    own = []
    for first in range(0, len(batch), size):
        minibatch = batch[first : first + size]
        own += share_evenly(minibatch, world)[rank]
    return own


def share_evenly(groups: list, world: int) -> list[list]:
    """Groups to `world` ranks, equally many to each: the longest first, each to the idlest rank."""

    def cost(group):
        return group.tokens * group.has_signal  # without signal it stands in no row

    share = len(groups) // world
    hands, work = [[] for _ in range(world)], [0] * world
    for group in sorted(groups, key=cost, reverse=True):
        free = [rank for rank in range(world) if len(hands[rank]) < share]
        idlest = min(free, key=lambda rank: work[rank])
        hands[idlest].append(group)
        work[idlest] += cost(group)
    return hands


def visible(row: Row):
    """Token q sees token k when k stands before it in the same group, in the prompt or in the same answer.

    In the form that FlexAttention wants: a function of (batch, head, q, k), whose indices may be tensors.
    """

    def sees(b, h, q, k):
        same_group = row.group_T[q] == row.group_T[k]
        same_answer = (row.answer_T[k] == 0) | (row.answer_T[q] == row.answer_T[k])
        return same_group & same_answer & (k <= q)

    return sees


def block_mask(row: Row):
    """`visible` for FlexAttention on a GPU, which skips the empty blocks. Not yet run there; tests build it here."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = len(row.ids_T)
    return create_block_mask(visible(row), None, None, length, length, device=row.ids_T.device)


def row_attention(module, query_1KTD, key_1KTD, value_1KTD, attention_mask, scaling=None, row=None, **_):
    """`visible` on a CPU, where FlexAttention has no gradient. The signature is that of transformers' attention.

    Every prompt sees itself, and every answer its prompt and itself, each in a call of its own. One mask over the
    whole row would compute mostly what it then hides: 5.6 times as much for 8 answers of 96 tokens and a prompt of 60.
    """
    lengths = sum(row.lengths, [])
    queries = query_1KTD.split(lengths, dim=2)
    keys = key_1KTD.split(lengths, dim=2)
    values = value_1KTD.split(lengths, dim=2)
    attended = []
    for group in row.lengths:
        first = len(attended)  # the group's prompt
        for part in range(first, first + len(group)):
            key, value, mask = keys[part], values[part], None
            if part > first:
                key = torch.cat([keys[first], key], dim=2)
                value = torch.cat([values[first], value], dim=2)
                tokens, seen = queries[part].shape[2], key.shape[2]
                mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
            attended.append(nn.functional.scaled_dot_product_attention(
                queries[part], key, value, attn_mask=mask, is_causal=part == first, scale=scaling, enable_gqa=True))
    return torch.cat(attended, dim=2).transpose(1, 2), None
