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
]


@pytest.mark.parametrize("given, truth", RIGHT)
def test_right_answers_are_paid_however_they_are_written(given, truth):
    assert same_answer(given, truth)
    assert same_answer(truth, given)


@pytest.mark.parametrize("given, truth", WRONG)
def test_wrong_answers_are_not_paid(given, truth):
    assert not same_answer(given, truth)
    assert not same_answer(truth, given)


@pytest.mark.parametrize("truth", sorted({truth for _, truth in RIGHT + WRONG}))
def test_every_truth_is_read_and_equals_itself(truth):
    check_answer(truth)
    assert same_answer(final_answer(rf"So it is \\boxed{{{truth}}}."), truth)
