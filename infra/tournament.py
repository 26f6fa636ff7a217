"""Which answers of a group each judgement compares, and in which order: a balanced tournament."""

from __future__ import annotations

import math
import random


def judge_strides(size: int, listed: int) -> list[int]:
    """The steps around a ring of `size` answers that meet `listed` different ones before one comes again.

    >>> judge_strides(4, 2), judge_strides(4, 4)
    ([1, 2, 3], [1, 3])
    """
    strides = []
    for stride in range(1, size):
        if listed <= size // math.gcd(size, stride):
            strides.append(stride)
    return strides


def judge_orders(size: int, listed: int, judgements: int, rng: random.Random) -> list[list[int]]:
    """Which answers each judgement of a group sees, and in which order (our choice). No list comes twice.

    The answers stand in a ring p, shuffled. List (d, j) is p[j], p[j + d], p[j + 2d], ... around the ring, `listed`
    of them. One stride d and all j together show every answer `listed` times, once in each position. The first
    judgements * size / listed of these lists are taken, so every answer is judged `judgements` times. With all answers
    in one list, the orders are that of the ring, begun at another answer each time. Fewer judgements let fewer pairs
    meet; of six answers in lists of three, opposite ones of the ring never do.

    Here every pair of four answers meets, and each answer stands first as often as last:

    >>> judge_orders(4, 2, 4, random.Random(1))
    [[1, 2], [2, 0], [0, 3], [3, 1], [1, 0], [2, 3], [0, 1], [3, 2]]
    """
    ring = rng.sample(range(size), size)
    orders = []
    for stride in judge_strides(size, listed):
        for first in range(size):
            orders.append([ring[(first + place * stride) % size] for place in range(listed)])
    return orders[: judgements * size // listed]
