"""What equals what in a final answer: cases from public reports on answer checkers, and their neighbours."""
import pytest

from infra.answers import check_answer, final_answer, same_answer

RIGHT = [  # (given, truth)
    ("0.0011_{2}", "0.0011_2"),
    ("1.75", "1 3/4"), ("12.", "12"), (r"\frac{3}{4}.", r"\frac{3}{4}"), ("Yes.", "Yes"), ("sqrt(2)", r"\sqrt{2}"),
    ("√2", r"\sqrt{2}"), ("x²", "x^2"), ("2*pi", r"2\pi"), ("45°", "45"), ("€18", "18"), (r"45\degree", "45"),
    (r"\boldsymbol{12}", "12"), (r"\textit{Yes}", "Yes"), (r"{\bf 5}", "5"), ("864", r"864 \mbox{ inches}^2"),
    (r"864 \mbox{ inches}^2", "864"), (r"0.\overline{3}", "1/3"), (r"\cos 60^\circ", "1/2"),
    (r"\text{1,000}", "1000"), (r"\text{13}", "13.0"), (r"\text{Answer: }5", "5"), (r"8\;000", "8000"), ("~5", "5"),
    (r"5\ ", "5"), (r"\frac13", "1/3"), ("-1 3/4", "-7/4"), (r"1\frac{3}{4}", "1.75"), (r"10-2\sqrt{5}", "10 - 2√5"),
    ("sin x", r"\sin x"), ("50 cents", r"\$0.50"), ("5 million", "5000000"), ("2 dozen", "24"),
    ("4:30 PM", r"4:30 \text{ p.m.}"), ("50%", "0.5"), ("50%", "50"), ("1e3", "1000"),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}"), (r"(-\infty,3]", r"(-\infty, 3]"), (r"90^\circ", "90 degrees"),
    ("18 dollars", r"\$18"), ("x^2-1", "(x-1)(x+1)"), ("No", "no"), ("(B)", "B"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), (r"\textrm{Friday}", "friday"),
    (r"\pounds 5", "5"), ("−2", "-2"), ("0.333333", "0.333333"),
    (r"10,\!080", "10080"), (r"\$32,\!348", "32348"), (r"\log_2 8", "3"), (r"12.5\%", r"\frac{1}{8}"),
    (r"50\text{ percent}", "0.5"), (r"12\pi\text{ cm}^2", r"12\pi"), ("12 ft", "12"), (r"5\text{ and }7", "5, 7"),
    ("A,C", "A, C"), (r"-\$5", "-5"), ("y^2=4x", "y^{2} = 4x"),
    ("m+n=34", "34"), (r"3+4\mathrm{i}", "3+4i"), (r"\textsf{Yes}", "Yes"), ("x=5 or x=7", "x=7, x=5"),
]
# A wrong 1 is worse than a wrong 0: what no rule can tell is here, too.
WRONG = [  # (given, truth)
    ("1 1/2", "11/2"), (r"\Delta", r"\delta"), ("0.0", r"\frac{1}{\binom{49}{6}}"), ("0.0", "2^{-25}"),
    ("0.3", r"\frac{3}{10}+10^{-8}"), ("2516_9", "2516_8"), (r"5\text{ million}", r"5\text{ billion}"),
    (r"4:30 \text{ AM}", r"4:30 \text{ PM}"), (r"2\text{ dozen}", "2"), ("on", "no"), ("5 3", "53"), ("r^2", "R^2"),
    (r"5 \text{ km}", r"5 \text{ m}"), (r"\frac{1}{3}", "0.333333"), ("1/3", "0.333333"),
    ("0.333333", r"\frac{1}{3}"), ("4:30", "4:30 PM"), ("2x", "2"), ("2^{-60}", "2^{-61}"), ("b", "B"), ("AB", "ab"),
    (r"\frac{\pi}{4}", "0.785398"), ("€18", r"\$18"), ("5 cents", r"\$5"), ("cat", "act"), ("5 apples", "5 pears"),
    ("2516", "2516_8"), ("2", "2m"), ("2", "2d"), ("3", "3h"), ("5 km", "5 m"), ("5 m", "5 s"), ("5 cm", "5 m"),
    (r"3 \text{ m}", r"3 \text{ s}"),
    # a capital letter; brackets; a letter in a font; a word that changes the value; two numbers; a ratio, a time
    (r"\{3,4\}", "(3,4)"), (r"\frac{R}{2}", "r/2"), (r"\pi(R^2-r^2)", r"\pi(r^2-R^2)"), ("R-r", "r-R"),
    ("ABC", "abc"), ("A, B, C", "a, b, c"),
    ("(a, b)", "[a, b]"), ("[a,b)", "(a,b]"), (r"3\mathrm{i}", "3"), (r"3\mathbf{a}", "3"), (r"3\text{x}^2", "3"),
    (r"5\text{ or more}", "5"), ("5 tenths", "5"), ("3 out of five", "3"), (r"\$5\text{M}", "5"), ("5 lakh", "5"),
    (r"2\text{ R }3", r"3\text{ R }2"), ("6 ft 2 in", "4 ft 3 in"), ("2 to 6", "3 to 4"), (r"5 \text{} 3", "53"),
    ("1:2:3", "1:3:2"), ("12:30", "6:15"), ("(2,1)", "x=1,y=2"), ("2x=6", "6"), ("x^2=25", "25"), ("-x=5", "5"),
    # what math_verify takes for 0, or leaves out; a date, a score; a base with letters; a font in a fraction
    ("2^{-300}", "2^{-301}"), (r"\frac{2019}{2^{2020}}", r"\frac{2020}{2^{2020}}"), ("f'(2)", "f(2)"), ("5'", "5"),
    (r"1,2,\ldots,10", "1,2,10"), ("2020-01-05", "2020-05-01"), ("3-1", "2-0"), ("3/4/2000", "6/8/2000"),
    ("2A3B_{16}", "3A2B_{16}"), (r"\frac{\rm 12}{5}", "5/2"),
]
COPIES = [  # (what a question asks for, the number that it should be)
    ("24 + 25", "49"), (r"\max(13, 29, 38, 68)", "68"), ("max(1, 2)", "2"), ("9 * 8", "72"), (r"9\cdot 8", "72"),
    ("37 × 48", "1776"), ("1776 ÷ 48", "37"), ("37⋅48", "1776"), (r"{10 \choose 3}", "120"),
    (r"\lfloor 5.5 \rfloor", "5"),
    (r"\binom{5}{2}", "10"), ("5!", "120"), (r"\frac{24+25}{1}", "49"), (r"\sum_{k=1}^{3} k", "6"), ("x=24+25", "49"),
]
LAST = [  # (text without a box, its last number)
    ("The answer is –7.", "-7"), ("He owes -$7.", "-7"), ("It is negative 7.", "-7"), ("10 minus 7", "7"),
    ("He has $5 million.", "5 million"), ("It costs 5 cents.", "5 cents"), ("A range: 3–5", "5"),
]


@pytest.mark.parametrize("given, truth", RIGHT)
def test_right_answers_are_paid_however_they_are_written(given, truth):
    assert same_answer(given, truth)
    assert same_answer(truth, given)


@pytest.mark.parametrize("given, truth", WRONG)
def test_wrong_answers_are_not_paid(given, truth):
    assert not same_answer(given, truth)
    assert not same_answer(truth, given)


@pytest.mark.parametrize("given, truth", COPIES)
def test_a_number_that_is_still_to_compute_is_no_answer(given, truth):
    assert not same_answer(given, truth)
    assert same_answer(r"1.5\times 10^3", "1500") and same_answer("1.5 × 10^3", "1500")


def test_a_bare_number_may_count_cents_where_the_truth_does_and_never_dozens():
    assert same_answer("5.4", r"5.4 \text{ cents}") and not same_answer("3", "3 dozen")


@pytest.mark.parametrize("text, number", LAST)
def test_the_last_number_has_its_sign_and_its_scale(text, number):
    assert final_answer(text) == number


@pytest.mark.parametrize("truth", sorted({truth for _, truth in RIGHT + WRONG}))
def test_every_truth_is_read_and_equals_itself(truth):
    check_answer(truth)
    assert same_answer(final_answer(rf"So it is \\boxed{{{truth}}}."), truth)
