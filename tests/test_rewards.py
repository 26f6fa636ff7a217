"""rewards.py: the test vectors, hostile inputs with their stated outcomes, and properties."""
import doctest
import math
import random
import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from data import Prompt
from rewards import (
    check_answer,
    clipped_objective,
    first_position_preference,
    group_advantages,
    group_rewards,
    judge_orders,
    judge_strides,
    kendall_tau,
    mean,
    parse_scores,
    preference_reward,
    self_rewards,
    verify_answer,
)


def test_worked_examples_in_docstrings():
    failed, attempted = doctest.testmod(rewards)
    assert failed == 0 and attempted >= 12


# ---- 4. reward: score blocks ----

@pytest.mark.parametrize("text, n, outcome", [
    ("<scores>8, 6</scores>", 2, [8, 6]),
    ("why\n<scores>\n 8.5 ,10\t,1.0 \n</scores> done", 3, [8.5, 10, 1]),
    ("<scores>1, 2</scores> <scores>8, 6</scores>", 2, [8, 6]),        # two blocks: the last
    ("<scores>8, 6</scores> <scores>bad</scores>", 2, None),           # the last is bad: no falling back
    ("<scores>8, 6</scores> <scores>9,", 2, None),                     # the last is cut off
    ("<scores>1, <scores>8, 6</scores>", 2, [8, 6]),                   # reopened
    ("<scores>8, 6</scores> </scores>", 2, [8, 6]),
    ("</scores>8, 6<scores>", 2, None),
    ("<scores>08, 6</scores>", 2, [8, 6]),
    ("<scores>8, 6</scores>", 3, None),                                # one too few
    ("<scores>8, 6, 5</scores>", 2, None),                             # one too many
    ("<scores>8, 6,</scores>", 2, None),
    ("<scores>8 6</scores>", 2, None),
    ("<scores>8; 6</scores>", 2, None),
    ("<scores>8, 0.99</scores>", 2, None),                             # outside [1, 10]
    ("<scores>8, 10.01</scores>", 2, None),
    ("<scores>8, -6</scores>", 2, None),
    ("<scores>8, +6</scores>", 2, None),
    ("<scores>8, nan</scores>", 2, None),
    ("<scores>8, inf</scores>", 2, None),
    ("<scores>8, 1e0</scores>", 2, None),
    ("<scores>8, 1e999</scores>", 2, None),
    ("<scores>8, 60%</scores>", 2, None),
    ("<scores>8, 6/10</scores>", 2, None),
    ("<scores>8, 6-7</scores>", 2, None),
    ("<scores>8, 6.</scores>", 2, None),
    ("<scores>8, .6e1</scores>", 2, None),
    ("<scores>8, 1_0</scores>", 2, None),
    ("<scores>8, \u0666</scores>", 2, None),                           # an Arabic six
    ("<scores>8, \uff16</scores>", 2, None),                           # a full-width six
    ("<scores>8,\u00a06</scores>", 2, None),                           # a no-break space
    ("<scores>s1, s2</scores>", 2, None),                              # the template copied
    ("<scores>not 10</scores>", 1, None),
    ("<scores></scores>", 1, None),
    ("<scores></scores>", 0, None),
    ("<SCORES>8, 6</SCORES>", 2, None),
    ("8, 6", 2, None),
    ("", 2, None),
])
def test_parse_scores_outcomes(text, n, outcome):
    assert parse_scores(text, n) == outcome


@pytest.mark.parametrize("text", [
    "<scores>" * 8000, "<scores>1," * 6500, "</scores>" * 7000, "<scores>" + "1" * 64000 + "</scores>",
    "<scores>" + "1," * 32000 + "</scores>", "<scores>" + " " * 64000 + "</scores>",
    "<scores>1." + "0" * 64000 + "</scores>", "<scores></scores>" * 3800])
def test_parse_scores_is_linear_in_64_kilobytes(text):
    start = time.perf_counter()
    assert parse_scores(text, 2) is None
    assert time.perf_counter() - start < 0.5


@given(st.lists(st.decimals(1, 10, places=2), min_size=1, max_size=8), st.text(max_size=50))
def test_formatted_scores_come_back(scores, chatter):
    text = chatter + "<scores>" + ", ".join(map(str, scores)) + "</scores>"
    assert parse_scores(text, len(scores)) == [float(score) for score in scores]


score_like = st.lists(st.sampled_from(["<scores>", "</scores>", "8", ",", ".", "1e9", "%", "nan", " ",
                                       "\u0663", "-"]) | st.text(max_size=3), max_size=20).map("".join)


@given(score_like, st.integers(0, 4))
def test_parse_scores_never_raises_and_never_invents(text, n):
    scores = parse_scores(text, n)
    assert scores is None or (len(scores) == n and all(1 <= score <= 10 for score in scores))


# ---- 4. reward: verified answers ----

@pytest.mark.parametrize("response, answer, outcome", [
    (r"\boxed{5}", "5", 1), (r"\boxed{5} so \boxed{6}", "5", 0), (r"\boxed{6} so \boxed{5}", "5", 1),
    (r"\boxed{5} and then 7", "5", 1),                                 # a box beats a later number
    (r"\boxed{1 + \boxed{5}}", "5", 1),                                # nested boxes: the innermost last one
    (r"\boxed{\frac{1}{2}}", "0.5", 1), (r"\boxed{\frac{1}{\frac{2}{3}}}", "3/2", 1),
    (r"5, so \boxed{5", "5", 0), (r"\boxed{5} so \boxed{5", "5", 0),   # an unclosed box answers nothing
    (r"5, so \boxed{}", "5", 0), (r"\boxed{ }", "5", 0), (r"\boxed{\}}", "5", 0), (r"\boxed{{5}", "5", 0),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1), (r"\boxed{(1, 2)}", "(2, 1)", 0),
    (r"\boxed{3, 4}", "3", 0), (r"\boxed{3 \text{ or } 4}", "3", 0),   # hedging does not pay
    (r"\boxed{3\) \(4}", "3", 0), (r"\boxed{3$ $4}", "3", 0),
    (r"\boxed{x = 5}", "5", 1), (r"\boxed{5 \text{ cm}}", "5", 1), (r"\boxed{18\text{ dollars}}", "18", 1),
    (r"\boxed{\$18}", "18", 1), (r"\boxed{90^\circ}", "90", 1), (r"\boxed{18 dollars}", "18", 0),
    ("the answer is 42.", "42", 1), ("first 42, then 43", "42", 0), ("no number", "42", 0), ("", "42", 0),
    ("incorrect", "42", 0), ("not 10", "10", 1),                       # a number is read, not understood
    (r"\boxed{not 10}", "10", 0), (r"\boxed{incorrect}", "correct", 0),
    (r"\boxed{correct}", "incorrect", 0),
    ("1,234", "1234", 1), (r"\boxed{1{,}234{,}567}", "1,234,567", 1), (r"\boxed{12,34}", "1234", 0),
    ("1, 2, 3", "3", 1), ("1,2,3", "3", 1), ("100,200,300", "100200300", 1),
    ("-3", "-3", 1), ("x=-3", "-3", 1), ("\u22123", "-3", 1),
    ("x-3", "-3", 0), ("3-5", "5", 1), ("3-5", "-5", 0),
    ("+3", "3", 1), ("-0", "0", 1), ("--3", "-3", 1),
    ("0.50", "1/2", 1), (".5", "0.5", 1), ("3.0", "3", 1), ("3/4", "0.75", 1),
    ("-3/4", "-0.75", 1), ("6/8", "3/4", 1),
    ("0.3333", "1/3", 0), ("0.1", "0.10000000000000000001", 0),        # exact, never nearly
    ("1/0", "0", 0), ("0/0", "0", 0), ("1/2/3", "3", 1),
    (r"\frac{3}{4}", "3/4", 0),  # unboxed LaTeX: its last number
    ("50%", "50", 1), ("50%", "0.5", 1), ("50", "50%", 1), ("50%", "50%", 1),
    ("50%", "5000%", 0), ("0.5", "50%", 1),
    (r"\boxed{50\%}", "1/2", 1), ("0.5%", "50", 0),
    ("1e3", "1000", 1), ("1e-2", "0.01", 1), ("1e999", "1", 0),
    ("1e999", "999", 0), ("1e999999999", "1", 0),
    (r"\boxed{1e999999999}", "1", 0), ("1e999999999/3", "1", 0), (r"\boxed{9^{9^{9^9}}}", "1", 0),
    (r"\boxed{2^2^2^2^2^2^2}", "1", 0), (r"\boxed{99999999!}", "1", 0), (r"\boxed{((9!)!)!}", "1", 0),
    (r"\boxed{(x+1)^{9999}}", "x", 0), (r"\boxed{\sum_{n=1}^{1000000} n}", "1", 0),
    (r"\boxed{20252025 \cdot 23\log 2025}", r"\frac{x}{2}", 0),
    (r"\boxed{\binom{1000000}{500000}}", "1", 0), (r"\boxed{9^{(9^9)}}", "1", 0),
    (r"\boxed{" + "9" * 64000 + "}", "9", 0), ("9" * 64000, "9", 0), ("1" * 300, "1" * 300, 0),
    ("nan", "0", 0), ("inf", "0", 0), (r"\boxed{NaN}", "0", 0),
    (r"\boxed{\infty}", r"\infty", 1),
    ("\u0663", "3", 0), ("\\boxed{\u0663}", "3", 0), ("\uff13", "3", 0), ("\u00bd", "1/2", 0),
    ("3\u00b2", "9", 0),
    (r"\boxed{2^{10}}", "1024", 1), (r"\boxed{x(x+1)}", "x^2+x", 1),
    (r"\boxed{[0,1)}", "[0,1)", 1),

    (r"\boxed{(0,1)}", "[0,1)", 0), (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1),
    (r"\boxed{1.414}", r"\sqrt{2}", 0),

    (r"\boxed{B}", "B", 1), (r"\boxed{(B)}", "B", 1), (r"\boxed{\text{B}}", "B", 1), (r"\boxed{A}", "B", 0),
    (r"\boxed{monday}", "Monday", 1), (r"\boxed{cat}", "act", 0),      # words, not products of letters
    ("1" + ",111" * 16000, "1", 0), ("-" * 64000, "1", 0), ("1e" * 32000, "10", 1),
    (r"\boxed{" * 9000, "1", 0),
])
def test_verify_answer_outcomes(response, answer, outcome):
    assert verify_answer(response, answer) == outcome


def test_verify_answer_works_in_a_thread():
    rewarded = []
    thread = threading.Thread(target=lambda: rewarded.append(verify_answer(r"\boxed{2^{10}}", "1024")))
    thread.start()
    thread.join()
    assert rewarded == [1.0]


@pytest.mark.parametrize("answer", ["5", "-5", "1,234", "3/4", "50%", "50\\%", "1e3", "\\frac{1}{2}", "x^2+1",
                                    "(1,2)", "\\{1,2\\}", "[0,1)", "$12$", "B", "Monday", "2^{2024}", "10!"])
def test_a_readable_answer_passes_and_matches_itself(answer):
    check_answer(answer)
    assert verify_answer(f"\\boxed{{{answer}}}", answer) == 1.0


@pytest.mark.parametrize("answer", ["", "  ", "$$", "?", "\\frac{", "{", "1/0", "1e99999", "9" * 201,
                                    "9^{9^{9^9}}", "\u0663"])
def test_an_unreadable_answer_is_refused(answer):
    with pytest.raises(ValueError):
        check_answer(answer)


pieces = ["\\boxed{", "}", "{", "\\", "\\frac", "\\sqrt", "^", "1", "9", ",", ".", "-", "/", "e", "%", "x",
          "(", ")", "=", "$", " ", "\u0663", "\u00b2", "\x00"]
math_like = st.lists(st.sampled_from(pieces) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=200, deadline=None)
@given(math_like, st.sampled_from(["5", "3/4", "x^2", "Monday", "50%"]))
def test_verify_answer_never_raises(response, answer):
    assert verify_answer(response, answer) in (0.0, 1.0)
    assert verify_answer(f"\\boxed{{{response}}}", answer) in (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(-10**12, 10**12))
def test_an_integer_is_recognised_in_every_dress(number):
    for text in (f"{number}", f"it is {number:,}.", f"\\boxed{{{number:,}}}", f"${number}.00$",
                 f"\\boxed{{{2 * number}/2}}"):
        assert verify_answer(text, str(number)) == 1.0
    assert verify_answer(f"\\boxed{{{number + 1}}}", str(number)) == 0.0


# ---- 4. reward: Kendall's tau ----

@pytest.mark.parametrize("scores, truth, variant, tau", [
    ([9, 8, 6, 7], [3, 2, 1, 0], "b", 2 / 3), ([8, 6], [1, 0], "b", 1), ([6, 8], [1, 0], "b", -1),
    ([7, 7], [1, 0], "b", 0), ([9, 9, 1], [2, 1, 0], "b", 0.8165), ([9, 7, 6, 5], [1, 0, 0, 0], "b", 0.7071),
    ([9, 9, 1], [2, 1, 0], "strict", 2 / 3), ([9, 7, 6, 5], [1, 0, 0, 0], "strict", 1),
    ([6, 8], [1, 0], "strict", -1), ([7, 7], [1, 0], "strict", 0), ([8, 6], [1, 1], "strict", 0),
    ([8, 6], [1, 1], "b", 0), ([8], [1], "b", 0), ([8], [1], "strict", 0), ([], [], "b", 0),
    ([], [], "strict", 0)])
def test_kendall_tau_vectors(scores, truth, variant, tau):
    assert kendall_tau(scores, truth, variant) == pytest.approx(tau, abs=1e-4)


def test_kendall_tau_refuses_misuse():
    for arguments in (([1, 2], [1]), ([1, 2], [1, 2], "c"), ([], [], "")):
        with pytest.raises(ValueError):
            kendall_tau(*arguments)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8),
       st.sampled_from(["b", "strict"]))
def test_tau_is_antisymmetric_and_bounded(pairs, variant):
    scores, truth = zip(*pairs)
    tau = kendall_tau(scores, truth, variant)
    assert -1 - 1e-9 <= tau <= 1 + 1e-9
    assert kendall_tau([-score for score in scores], truth, variant) == pytest.approx(-tau, abs=1e-9)
    assert kendall_tau(scores, [-rank for rank in truth], variant) == pytest.approx(-tau, abs=1e-9)


def test_preference_reward_pays_tau_and_punishes_the_unreadable():
    assert preference_reward("<scores>9, 8, 6, 7</scores>", [3, 2, 1, 0]) == pytest.approx(2 / 3)
    assert preference_reward("<scores>9, 9, 1</scores>", [2, 1, 0], "strict") == pytest.approx(2 / 3)
    assert preference_reward("<scores>7, 7</scores>", [1, 0]) == 0.0
    assert preference_reward("<scores>7, 70</scores>", [1, 0]) == -1.0
    assert preference_reward("<scores>8, 6</scores> or <scores>8</scores>", [1, 0]) == -1.0


# ---- 3. self-score ----

@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_self_rewards_unshuffle(data, n, judgements):
    true_scores = data.draw(st.lists(st.integers(2, 20).map(lambda k: k / 2), min_size=n, max_size=n))
    orders = [data.draw(st.permutations(range(n))) for _ in range(judgements)]
    texts = ["<scores>" + ", ".join(str(true_scores[i]) for i in order) + "</scores>" for order in orders]
    assert self_rewards(texts, orders) == pytest.approx(true_scores)
    assert self_rewards(texts + ["?"], orders + [list(range(n))]) == pytest.approx(true_scores)


def legal_judging(draw):
    """(G, answers a judgement lists, K) as check_config allows them."""
    size = draw(st.integers(2, 8))
    listed = draw(st.integers(2, size))
    most = listed * len(judge_strides(size, listed))
    step = 1 if listed == size else listed
    return size, listed, draw(st.integers(1, most // step)) * step


@given(st.data(), st.integers())
def test_judge_orders_are_balanced_and_never_repeat(data, seed):
    size, listed, judgements = data.draw(st.composite(legal_judging)())
    orders = judge_orders(size, listed, judgements, random.Random(seed))
    assert len(orders) == judgements * size // listed == len(set(map(tuple, orders)))
    assert all(len(set(order)) == listed for order in orders)
    shown = Counter(answer for order in orders for answer in order)
    assert shown == dict.fromkeys(range(size), judgements)
    for place in range(listed):  # each full ring shows every answer once in each place
        found = Counter(order[place] for order in orders)
        assert max(found.values()) - min(found[answer] for answer in range(size)) <= (listed == size)
        if listed < size:
            assert set(found.values()) == {judgements // listed}


def test_four_judgements_of_four_answers_in_pairs_let_every_pair_meet_and_six_in_both_orders():
    pairs = {frozenset(order) for order in judge_orders(4, 2, 4, random.Random(0))}
    assert len(pairs) == 6
    assert len(set(map(tuple, judge_orders(4, 2, 6, random.Random(0))))) == 12


def test_a_group_that_is_judged_in_parts():
    texts = ["<scores>9, 2</scores>", "?", "<scores>5, 7</scores>"]
    assert self_rewards(texts, [[0, 1], [1, 2], [2, 0]]) == [8, 2, 5]
    assert self_rewards(["<scores>9, 2</scores>", "?"], [[0, 1], [1, 2]]) is None  # nobody judged answer 2
    for orders in ([[0, 1], [1, 3]], [[0, 0], [1, 2]], [[1, 2], [2, 1]]):
        with pytest.raises(ValueError, match="counted from 0"):
            self_rewards(["?", "?"], orders)


def test_self_rewards_unknown_is_not_zero():
    assert self_rewards(["?", "<scores>11, 1</scores>"], [[0, 1], [1, 0]]) is None
    assert self_rewards([], []) is None
    assert self_rewards(["<scores>9, 1</scores>", "<scores>9, 1</scores>"], [[0, 1], [1, 0]]) == [5, 5]
    for texts, orders in ((["?"], []), (["?"], [[0, 0]]), (["?"], [[1, 2]])):
        with pytest.raises(ValueError):
            self_rewards(texts, orders)


# ---- 4. reward: one dispatch by kind ----

def test_group_rewards_takes_the_reward_of_the_prompts_kind():
    pair = Prompt("preference", "Say hi.", ("hi", "no", "hm"), (2.0, 0.0, 1.0))
    texts = ["<scores>9, 1, 1</scores>", "so <scores>1, 9, 5</scores>", "the first one"]
    assert group_rewards(pair, texts, []) == pytest.approx([0.8165, -1, -1], abs=1e-4)
    assert group_rewards(pair, texts, [], "strict") == pytest.approx([2 / 3, -1, -1])
    assert group_rewards(pair, texts[:1] * 2, [], "b", [True, False]) == pytest.approx([0.8165, -1], abs=1e-4)
    assert group_rewards(Prompt("reasoning", "What is 6 * 7?", answer="42"), ["\\boxed{42}", "43"], []) == [1, 0]
    ask = Prompt("instruction", "Say hi.", check="one word")
    verdicts = [{"order": [1, 0], "text": "<scores>9, 3</scores>"}, {"order": [0, 1], "text": "?"}]
    assert group_rewards(ask, ["hi", "hello"], verdicts) == [3, 9]
    assert group_rewards(ask, ["hi", "hello"], verdicts[1:]) is None  # unjudged is not 0
    assert group_rewards(ask, ["hi", "hello"], []) is None


# ---- 4. reward: group advantages ----

def test_group_advantages_vectors():
    rewards_BG = torch.tensor([[1., 0., 0., 1.], [9., 7., 7., 4.], [5., 5., 5., 5.]])
    expected_BG = torch.tensor([[.8660, -.8660, -.8660, .8660], [1.0914, .1213, .1213, -1.3339], [0.] * 4])
    advantages_BG = group_advantages(rewards_BG)
    assert advantages_BG.dtype == torch.float32
    assert torch.allclose(advantages_BG, expected_BG, atol=5e-5)
    assert torch.equal(advantages_BG[2], torch.zeros(4))
    assert torch.equal(group_advantages(rewards_BG[1], "center"), torch.tensor([2.25, .25, .25, -2.75]))
    assert torch.equal(group_advantages(torch.tensor([[3.], [4.]])), torch.zeros(2, 1))
    assert torch.equal(group_advantages(torch.full((2, 8), 0.1)), torch.zeros(2, 8))
    assert torch.equal(group_advantages(torch.tensor([1., 1. + 1e-7]).double(), "center"), torch.zeros(2))
    assert torch.allclose(group_advantages(torch.tensor([1, 0, 0, 1])), expected_BG[0], atol=5e-5)


def test_by_the_batchs_std_a_group_of_little_spread_weighs_less():
    wide, narrow = torch.tensor([0., 1.]), torch.tensor([0.4, 0.6])
    assert torch.allclose(group_advantages(wide, "batch", batch_std=0.5), torch.tensor([-1., 1.]), atol=1e-5)
    assert torch.allclose(group_advantages(narrow, "batch", batch_std=0.5), torch.tensor([-.2, .2]), atol=1e-5)
    assert torch.equal(group_advantages(torch.tensor([3., 3.]), "batch", batch_std=0.0), torch.zeros(2))


def test_group_advantages_refuse_misuse():
    for group, scale in ((torch.tensor([1., math.nan]), "std"), (torch.tensor([1., math.inf]), "std"),
                         (torch.tensor([1., 0.]), "mean")):
        with pytest.raises(ValueError):
            group_advantages(group, scale)


groups = st.lists(st.integers(0, 100).map(lambda k: k / 10), min_size=2, max_size=8)


@given(groups, st.randoms(use_true_random=False), st.sampled_from(["std", "center"]))
def test_permuting_a_group_permutes_its_advantages(group, random, scale):
    order = random.sample(range(len(group)), len(group))
    group = torch.tensor(group)
    advantages = group_advantages(group, scale)
    assert torch.allclose(group_advantages(group[order], scale), advantages[order], atol=1e-5)


@given(groups, st.floats(0.1, 10), st.floats(-10, 10))
def test_affine_rewards_give_the_same_advantages(group, slope, offset):
    group = torch.tensor(group, dtype=torch.float64)
    advantages = group_advantages(group)
    assert torch.allclose(group_advantages(slope * group + offset), advantages, atol=1e-3)
    assert abs(advantages.sum().item()) < 1e-4


# ---- 6. update: clipped objective ----

def test_clipped_objective_vectors():
    ratio = torch.tensor([.5, .5, 1.27, 1.27, 1.5, 1.5, 4., 4.])
    expected = torch.tensor([.5, -.8, 1.27, -1.27, 1.28, -1.5, 1.28, -4.])
    assert torch.allclose(clipped_objective(ratio, torch.tensor([1., -1.] * 4)), expected)
    assert clipped_objective(torch.tensor(1.5), torch.tensor(1.), high=1.2).item() == pytest.approx(1.2)


def test_clipped_objective_stops_the_gradient_only_where_it_clips():
    ratio = torch.tensor([.5, .5, 1.5, 1.5], requires_grad=True)
    clipped_objective(ratio, torch.tensor([1., -1., 1., -1.])).sum().backward()
    assert ratio.grad.tolist() == [1., 0., 0., -1.]


# ---- what exposes a collapsed judge ----

@pytest.mark.parametrize("rows, preference", [
    ([[5, 5, 5]], 0), ([[5, 5], [5, 5, 5, 5]], 0), ([[9, 1]], .5), ([[1, 9]], -.5), ([[9, 1], [1, 9]], 0),
    ([[9, 1, 1, 1]], .75), ([[9, 9, 1, 1]], .25), ([[7]], 0), ([[9, 1], []], .5)])
def test_first_position_preference(rows, preference):
    assert first_position_preference(rows) == pytest.approx(preference)


def test_figures_of_nothing_are_unknown():
    assert math.isnan(first_position_preference([])) and mean([]) is None and mean(x for x in [0, 1]) == 0.5


def test_more_judgements_than_lists_that_differ_are_refused():
    with pytest.raises(ValueError, match="only 2 lists differ"):
        judge_orders(2, 2, 3, random.Random(0))
