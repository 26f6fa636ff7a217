"""rewards.py and infra/answers.py: every equation against stored numbers, hostile inputs with their stated outcomes,
and properties. The process of math_verify is in test_hostile.py."""
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import Group, Prompt
from infra.answers import check_answer
from rewards import (
    Tally,
    clipped_objective,
    first_position_preference,
    group_advantages,
    group_rewards,
    kendall_tau,
    kind_figures,
    mean,
    parse_scores,
    self_rewards,
    verify_answer,
)

# ---- P: score blocks ----

READ = [
    ("<scores>8, 6</scores>", [8, 6]),
    ("why\n<scores>\n 8.5 ,10\t,1.0 \n</scores> done", [8.5, 10, 1]),
    ("<scores>1, 2</scores> <scores>8, 6</scores>", [8, 6]),  # two blocks: the last
    ("<scores>1, <scores>8, 6</scores>", [8, 6]),  # opened again
    ("<scores>8, 6</scores> </scores>", [8, 6]),
    ("<scores>08, 6</scores>", [8, 6]),
]
UNREAD = [
    "8, 6", "", "</scores>8, 6<scores>", "<SCORES>8, 6</SCORES>",
    "<scores>8, 6</scores> <scores>bad</scores>",  # the last is bad: no falling back
    "<scores>8, 6</scores> <scores>9,",  # the last is cut off
    "<scores>" * 8000, "</scores>" * 7000, "<scores>1," * 6500, "<scores></scores>" * 3800,
]
UNREAD_BLOCKS = [
    "8", "8, 6, 5", "8, 6,", "8 6", "8; 6", "", "s1, s2", "not 10, 6",  # too few, too many, the template copied
    "8, 0.99", "8, 10.01", "8, -6", "8, +6", "8, 007",  # outside [1, 10], or more than two digits
    "8, nan", "8, inf", "8, 1e0", "8, 1e999", "8, 60%", "8, 6/10", "8, 6-7", "8, 6.", "8, .6e1", "8, 1_0",
    "8, \u0666", "8, \uff16", "8,\u00a06",  # an Arabic six, a full-width six, a no-break space
    "1" * 64000, "1," * 32000, " " * 64000, "1." + "0" * 64000,
]


BLOCKS = [*READ, *((text, None) for text in [*UNREAD, *(f"<scores>{block}</scores>" for block in UNREAD_BLOCKS)])]


@pytest.mark.parametrize("text, scores", BLOCKS, ids=lambda it: str(it)[:40])
def test_the_last_score_block_is_read_and_what_is_no_list_of_scores_is_none(text, scores):
    assert parse_scores(text, len(scores or "ab")) == scores


# ---- P: Kendall's tau ----

@pytest.mark.parametrize("scores, truth, b, strict", [
    ([9, 8, 6, 7], [3, 2, 1, 0], 2 / 3, 2 / 3), ([8, 6], [1, 0], 1, 1), ([6, 8], [1, 0], -1, -1),
    ([7, 7], [1, 0], 0, 0), ([9, 9, 1], [2, 1, 0], 0.8165, 2 / 3), ([9, 7, 6, 5], [1, 0, 0, 0], 0.7071, 1),
    ([8, 6], [1, 1], 0, 0), ([8], [1], 0, 0), ([], [], 0, 0)])
def test_kendall_tau_vectors(scores, truth, b, strict):
    assert kendall_tau(scores, truth, "b") == pytest.approx(b, abs=1e-4)
    assert kendall_tau(scores, truth, "strict") == pytest.approx(strict, abs=1e-4)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8),
       st.sampled_from(["b", "strict"]))
def test_tau_is_antisymmetric_and_bounded(pairs, variant):
    scores, truth = zip(*pairs)
    tau = kendall_tau(scores, truth, variant)
    assert -1 - 1e-9 <= tau <= 1 + 1e-9
    assert kendall_tau([-score for score in scores], truth, variant) == pytest.approx(-tau, abs=1e-9)
    assert kendall_tau(scores, [-rank for rank in truth], variant) == pytest.approx(-tau, abs=1e-9)


# ---- R: verified answers ----

EQUAL = [  # response, true answer
    (r"\boxed{5}", "5"), (r"\boxed{6} so \boxed{5}", "5"), (r"\boxed{5} and then 7", "5"),  # a box beats a number
    (r"\boxed{1 + \boxed{5}}", "5"),  # nested boxes: the innermost last one
    (r"\boxed{\frac{1}{\frac{2}{3}}}", "3/2"), (r"\boxed{\{1, 2\}}", r"\{2, 1\}"), (r"\boxed{x = 5}", "5"),
    ("the answer is 42.", "42"), ("not 10", "10"),  # a number is read, not understood
    ("1,234", "1234"), (r"\boxed{1{,}234{,}567}", "1,234,567"), ("1, 2, 3", "3"), ("1,2,3", "3"),
    ("100,200,300", "100200300"), ("x=-3", "-3"), ("\u22123", "-3"), ("3-5", "5"), ("+3", "3"), ("-0", "0"),
    ("--3", "-3"), ("6 to 7", "7"), ("007", "7"), ("7.", "7"), ("8</scores> then <scores>", "8"), (".5", "0.5"),
    ("-3/4", "-0.75"), ("6/8", "3/4"), ("1/2/3", "3"), ("50", "50%"), ("1e-2", "0.01"), ("1e999", "1e999"),
    ("1e" * 32000, "10"), (r"\boxed{\infty}", r"\infty"), (r"\boxed{2^{10}}", "1024"), (r"\boxed{NaN}", "NaN"),
]
UNEQUAL = [
    (r"\boxed{5} so \boxed{6}", "5"), (r"5, so \boxed{5", "5"), (r"\boxed{5} so \boxed{5", "5"),  # left open
    (r"5, so \boxed{}", "5"), (r"\boxed{ }", "5"), (r"\boxed{\}}", "5"), (r"\boxed{{5}", "5"),
    (r"\boxed{(1, 2)}", "(2, 1)"), (r"\boxed{3, 4}", "3"), (r"\boxed{3 \text{ or } 4}", "3"),  # hedging does not pay
    (r"\boxed{3\) \(4}", "3"), (r"\boxed{3$ $4}", "3"), (r"\boxed{not 10}", "10"), ("", "42"), ("incorrect", "correct"),
    ("first 42, then 43", "42"), (r"\boxed{incorrect}", "correct"), (r"\boxed{12,34}", "1234"), ("x-3", "-3"),
    ("3-5", "-5"), (r"\boxed{6-7}", "7"),  # a range in running text, a difference in a box
    ("0.1", "0.10000000000000000001"), ("1/0", "0"), ("0/0", "0"), (r"\frac{3}{4}", "3/4"), ("50%", "5000%"),
    ("1e999", "1"), ("1e999", "999"), (r"\boxed{1e999999999}", "1"), ("1e999999999/3", "1"),
    (r"\boxed{9^{9^{9^9}}}", "1"), (r"\boxed{(x+1)^{9999}}", "x"), (r"\boxed{" + "9" * 64000 + "}", "9"),
    ("9" * 64000, "9"), ("1" * 300, "1" * 300), ("1" + ",111" * 16000, "1"), ("-" * 64000, "1"),
    (r"\boxed{" * 9000, "1"), ("nan", "0"), (r"\boxed{NaN}", "0"), (r"\boxed{(0,1)}", "[0,1)"),
    ("\u0663", "3"), ("\\boxed{\u0663}", "3"), ("\uff13", "3"), ("\u00bd", "1/2"), ("3\u00b2", "9"),  # not ASCII
]


@pytest.mark.parametrize("response, answer", EQUAL, ids=lambda text: text[:40])
def test_what_equals_the_answer_earns_1(response, answer):
    assert verify_answer(response, answer) == 1


@pytest.mark.parametrize("response, answer", UNEQUAL, ids=lambda text: text[:40])
def test_what_does_not_equal_the_answer_earns_0(response, answer):
    assert verify_answer(response, answer) == 0


@pytest.mark.parametrize("answer", ["", "  ", "$$", "?", "\\frac{", "{", "1/0", "1e99999", "9" * 201, "9^{9^{9^9}}",
                                    "\u0663"])
def test_an_unreadable_answer_is_refused(answer):
    with pytest.raises(ValueError):
        check_answer(answer)


# ---- I: self-scores ----

@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_self_rewards_are_those_of_the_answers_whatever_the_order_shown(data, n, judgements):
    true_scores = data.draw(st.lists(st.integers(2, 20).map(lambda k: k / 2), min_size=n, max_size=n))
    orders = [data.draw(st.permutations(range(n))) for _ in range(judgements)]
    verdicts = [[true_scores[i] for i in order] for order in orders]
    assert self_rewards(verdicts, orders) == pytest.approx(true_scores)
    assert self_rewards([*verdicts, None], [*orders, list(range(n))]) == pytest.approx(true_scores)


def test_of_self_rewards_unknown_is_not_zero():
    assert self_rewards([[9, 2], None, [5, 7]], [[0, 1], [1, 2], [2, 0]]) == [8, 2, 5]
    assert self_rewards([[9, 2], None], [[0, 1], [1, 2]]) is None  # nobody judged answer 2
    assert self_rewards([[6, 5], None, None, None], [[1, 0], [0, 1], [0, 1], [0, 1]]) is None  # a minority would decide
    assert self_rewards([None, None], [[0, 1], [1, 0]]) is None
    assert self_rewards([], []) is None


# ---- all kinds ----

def test_group_rewards_takes_the_reward_of_the_prompts_kind():
    def rewards(prompt, texts, judgements=(), tau="b", finished=(True, True, True)):
        group = Group(0, prompt, [], texts=texts, finished=list(finished), judgements=list(judgements))
        return group_rewards(SimpleNamespace(tau=tau), group)

    pair = Prompt("preference", "Say hi.", ("hi", "no", "hm"), (2.0, 0.0, 1.0))
    texts = ["<scores>9, 1, 1</scores>", "so <scores>1, 9, 5</scores>", "the first one"]
    assert rewards(pair, texts) == pytest.approx([0.8165, -1, -1], abs=1e-4)
    assert rewards(pair, texts, tau="strict") == pytest.approx([2 / 3, -1, -1])
    cut_off = rewards(pair, texts[:1] * 2, finished=[True, False])
    assert cut_off == pytest.approx([0.8165, -1], abs=1e-4)
    assert rewards(Prompt("reasoning", "What is 6 * 7?", answer="42"), ["\\boxed{42}", "43"]) == [1, 0]
    ask = Prompt("instruction", "Say hi.")
    verdicts = [{"order": [1, 0], "text": "<scores>9, 3</scores>", "finished": True},
                {"order": [0, 1], "text": "?", "finished": True}]
    assert rewards(ask, ["hi", "hello"], verdicts) == [3, 9]
    cut_off = verdicts[0] | {"finished": False}
    for unjudged in (verdicts[1:], [cut_off], []):
        assert rewards(ask, ["hi", "hello"], unjudged) is None  # which is not 0


def test_group_advantages_vectors():
    rewards_BG = torch.tensor([[1., 0., 0., 1.], [9., 7., 7., 4.], [5., 5., 5., 5.]])
    expected_BG = torch.tensor([[.8660, -.8660, -.8660, .8660], [1.0914, .1213, .1213, -1.3339], [0.] * 4])
    advantages_BG = group_advantages(rewards_BG)
    assert advantages_BG.dtype == torch.float32
    assert torch.allclose(advantages_BG, expected_BG, atol=5e-5)
    assert torch.equal(advantages_BG[2], torch.zeros(4))
    assert torch.equal(group_advantages(torch.full((2, 8), 0.1)), torch.zeros(2, 8))
    assert torch.equal(group_advantages(torch.tensor([1., 1. + 1e-7]).double()), torch.zeros(2))


groups = st.lists(st.integers(0, 100).map(lambda k: k / 10), min_size=2, max_size=8)


@given(groups, st.floats(0.1, 10), st.floats(-10, 10))
def test_affine_rewards_give_the_same_advantages_and_their_sum_is_0(group, slope, offset):
    group = torch.tensor(group, dtype=torch.float64)
    advantages = group_advantages(group)
    assert torch.allclose(group_advantages(slope * group + offset), advantages, atol=1e-3)
    assert abs(advantages.sum().item()) < 1e-4


# ---- the objective ----

def test_the_tokens_counted_as_clipped_are_those_whose_gradient_the_objective_stops():
    ratio = torch.tensor([.5, .5, 1.5, 1.5], requires_grad=True)
    advantage = torch.tensor([1., -1., 1., -1.])
    clipped_objective(ratio, advantage, 0.8, 1.28).sum().backward()
    assert ratio.grad.tolist() == [1., 0., 0., -1.]
    tally = Tally()
    tally.add(torch.zeros(1), ratio, SimpleNamespace(advantage_N=advantage, weight_N=torch.ones(4)), 0.8, 1.28)
    assert (tally.clipped_low, tally.clipped_high, tally.tokens) == (1, 1, 4)


@pytest.mark.parametrize("call", [
    lambda: kendall_tau([1, 2], [1]), lambda: self_rewards([None], []), lambda: self_rewards([None], [[1, 2]]),
    lambda: self_rewards([None] * 2, [[0, 1], [1, 3]]),
    lambda: group_advantages(torch.tensor([1., math.nan])), lambda: group_advantages(torch.tensor([1., math.inf]))])
def test_misuse_is_refused(call):
    with pytest.raises(ValueError):
        call()


# ---- what exposes a collapsed judge ----

@pytest.mark.parametrize("rows, preference", [
    ([[5, 5, 5]], 0), ([[5, 5], [5, 5, 5, 5]], 0), ([[9, 1]], .5), ([[1, 9]], -.5), ([[9, 1], [1, 9]], 0),
    ([[9, 1, 1, 1]], .75), ([[9, 9, 1, 1]], .25), ([[7]], 0)])
def test_first_position_preference(rows, preference):
    assert first_position_preference(rows) == pytest.approx(preference)


def test_figures_of_a_ranking_are_those_of_what_can_be_read_and_of_nothing_unknown():
    ranked = "<scores>9, 2</scores> The first one"
    group = Group(0, Prompt("preference", "q", ("a", "b"), (1.0, 0.0)), [5], [[1], [2]], [ranked] * 2, [True, False],
                  rewards=[1.0, -1.0], advantages=[1.0, -1.0])
    assert [kind_figures([group])[name] for name in ("format", "tau", "first_position")] == [0.5, 1.0, 0.5]
    assert first_position_preference([]) is None and mean([]) is None and mean(x for x in [0, 1]) == 0.5
