r"""The equations of URPO (arXiv 2507.17515): pure functions, one for each. No model and no sampler.

In the order in which a step uses them:

    P  preference    r = tau(scores in the answer, true scores)              preference_reward   [paper]
    R  reasoning     r = 1 if the final answer equals the true one, else 0   verify_answer       [paper]
    I  instruction   r_i = mean score that the model itself gave answer i    self_rewards        [paper]
                     which answers each of its judgements sees               judge_orders
    all kinds        one dispatch, for training and for `eval.py explain`    group_rewards
                     A = (r - mean) / std within the group                   group_advantages    [paper]
                     min(rho A, clip(rho, 0.8, 1.28) A)                      clipped_objective   [paper, DAPO]

Below the equations: how the final answer of a text is found and read, and the process in which symbolic maths is
checked. The paper is silent on details such as the scale of scores, ties and unreadable judgements; our choices
D2 to D10 are listed in the README.

One rule holds everywhere: unknown is not zero. A judgement that cannot be read is None, or the -1 of D4; it is
never a score.
"""
import json
import math
import random
import re
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Sequence

import torch
from scipy.stats import kendalltau

LOWEST_SCORE, HIGHEST_SCORE = 1.0, 10.0  # D2; the referee's prompt states the same range
SMALLEST_SPREAD = 1e-6  # a group whose rewards deviate less than this has no signal (D9)

# ------------------------------------------------------------------------------- P: ranking responses


def parse_scores(text: str, n: int) -> list[float] | None:
    """The scores in a referee's answer: n decimals in [1, 10] in its LAST score block, else None (D2, D4).

    An earlier block never counts. It may be a draft, or a quoted answer that tries to score itself.

    >>> parse_scores("<scores>1, 1</scores> On reflection: <scores>8, 6.5</scores>", 2)
    [8.0, 6.5]
    >>> parse_scores("<scores>8, 6</scores> On reflection: <scores>8, 60%</scores>", 2)
    """
    start = text.rfind("<scores>")
    end = text.find("</scores>", start)
    if start < 0 or end < 0:  # no block, or a last block that was opened and cut off
        return None
    items = text[start + len("<scores>") : end].split(",")
    if len(items) != n:
        return None
    scores = []
    for item in items:
        item = item.strip(" \t\r\n")
        if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,20})?", item):
            return None
        score = float(item)
        if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
            return None
        scores.append(score)
    return scores


def kendall_tau(scores: Sequence[float], truth: Sequence[float], variant: str = "b") -> float:
    """Kendall's tau of two lists in which higher is better, in [-1, 1]. tau is the paper's, the variant ours (D3).

    C and D are the numbers of pairs on which the lists agree and disagree.

        "b"        (C - D) / sqrt(pairs untied in scores * pairs untied in truth); 0 where a list is all ties
        "strict"   (C - D) / pairs untied in truth; a tie in the scores earns what a coin would earn on average

    >>> [round(kendall_tau([9, 9, 1], [2, 1, 0], variant), 3) for variant in ("b", "strict")]
    [0.816, 0.667]
    >>> [round(kendall_tau([9, 7, 6, 5], [1, 0, 0, 0], variant), 3) for variant in ("b", "strict")]
    [0.707, 1.0]
    """
    if len(scores) != len(truth):
        raise ValueError(f"{len(scores)} scores against {len(truth)} true ranks")
    if variant == "b":
        tau = float(kendalltau(scores, truth).statistic) if len(scores) > 1 else math.nan
        return 0.0 if math.isnan(tau) else tau
    if variant != "strict":
        raise ValueError(f"unknown tau variant {variant!r}: use 'b' or 'strict'")
    agreement = pairs = 0
    for i in range(len(truth)):
        for j in range(len(truth)):
            if truth[i] > truth[j]:
                pairs += 1
                agreement += (scores[i] > scores[j]) - (scores[i] < scores[j])
    return agreement / pairs if pairs else 0.0


def preference_reward(text: str, truth: Sequence[float], variant: str = "b") -> float:
    """Reward of one ranking: tau of its scores with the truth [paper]; -1 if it cannot be read (D4).

    >>> preference_reward("<scores>8, 6</scores>", [1, 0]), preference_reward("the first one", [1, 0])
    (1.0, -1.0)
    """
    scores = parse_scores(text, len(truth))
    return -1.0 if scores is None else kendall_tau(scores, truth, variant)


# ------------------------------------------------------------------------------- R: verified reasoning


def verify_answer(response: str, answer: str) -> float:
    r"""Reward of one solution: 1 if its final answer equals `answer`, else 0 [paper]. The check is ours (D10).

    Two plain numbers must be equal exactly. "50%" equals 50 and also 1/2, since data sets write either. Words are
    compared letter by letter. Everything symbolic goes to math_verify; what that cannot decide in CHECK_SECONDS is
    not verified, so 0. No text makes this function raise.

    >>> verify_answer(r"First \boxed{3}. No: \boxed{1{,}024}.", "1024"), verify_answer("so 3/4 it is", "0.75")
    (1.0, 1.0)
    >>> verify_answer(r"\boxed{(x-1)(x+1)}", "x^2-1"), verify_answer(r"It is 12, so \boxed{13}", "12")
    (1.0, 0.0)
    >>> verify_answer(r"\boxed{\text{Friday}}", "friday")
    1.0
    """
    given, truth = final_answer(response), _tidy(answer)
    if not given or not truth or max(len(given), len(truth)) > LONGEST_ANSWER:
        return 0.0
    given_number, true_number = _read_number(given), _read_number(truth)
    if given_number and true_number:
        return float(_same_number(given_number, true_number))
    if _letters(given) == _letters(truth):
        return 1.0
    if WORD.search(given) or WORD.search(truth):  # math_verify would read "cat" as c*a*t
        return 0.0
    return float(math_verify(truth, given) is True)


# ------------------------------------------------------------------------------- I: self-scores


def judge_strides(size: int, listed: int) -> list[int]:
    """The steps around a ring of `size` answers that meet `listed` different ones before one comes again.

    >>> judge_strides(4, 2), judge_strides(4, 4)
    ([1, 2, 3], [1, 3])
    """
    return [stride for stride in range(1, size) if listed <= size // math.gcd(size, stride)]


def judge_orders(size: int, listed: int, judgements: int, rng: random.Random) -> list[list[int]]:
    """Which answers each judgement of a group sees, and in which order (our choice D6). No list comes twice.

    The answers stand in a ring p, shuffled. List (d, j) is p[j], p[j + d], p[j + 2d], ... around the ring, `listed`
    of them. One stride d and all j together show every answer `listed` times, once in each position. The first
    judgements * size / listed of these lists are taken, so every answer is judged `judgements` times. With all answers
    in one list, the orders are that of the ring, begun at another answer each time.

    Here every pair of four answers meets, and each answer stands first as often as last:

    >>> judge_orders(4, 2, 4, random.Random(1))
    [[1, 2], [2, 0], [0, 3], [3, 1], [1, 0], [2, 3], [0, 1], [3, 2]]
    """
    ring = rng.sample(range(size), size)
    orders = []
    for stride in judge_strides(size, listed):
        for first in range(size):
            orders.append([ring[(first + place * stride) % size] for place in range(listed)])
    wanted = judgements * size // listed
    if wanted > len(orders):
        raise ValueError(f"{wanted} judgements wanted, and only {len(orders)} lists differ")
    return orders[:wanted]


def self_rewards(texts: Sequence[str], orders: Sequence[Sequence[int]]) -> list[float] | None:
    """Rewards of a group of open answers: r_i = mean score of answer i over the judgements that can be read.

    That the policy scores its own group is the paper's. The shuffled orders and the mean are ours (D6).
    texts[k] is judgement k; orders[k][j] is the answer that it was shown at position j. A judgement may see a part of
    the group. Returns one reward in [1, 10] an answer; or None if no judgement of some answer can be read: that group
    then has no advantage (D8).

    >>> texts = ["<scores>9, 2</scores>", "<scores>4, 3</scores>", "<scores>7, 1</scores>"]
    >>> self_rewards(texts, [[2, 0], [1, 2], [0, 1]])
    [4.5, 2.5, 6.0]
    >>> self_rewards(["<scores>9, 2</scores>", "cannot say"], [[0, 1], [2, 0]])
    """
    if len(texts) != len(orders):
        raise ValueError(f"{len(texts)} judgements against {len(orders)} orders")
    found = {answer: [] for order in orders for answer in order}  # the scores of each answer
    if set(found) != set(range(len(found))) or any(len(set(order)) < len(order) for order in orders):
        raise ValueError("orders must name the answers of a group, counted from 0, and none twice in one order")
    for text, order in zip(texts, orders):
        for answer, score in zip(order, parse_scores(text, len(order)) or ()):
            found[answer].append(score)
    if not found or not all(found.values()):
        return None
    return [sum(found[answer]) / len(found[answer]) for answer in range(len(found))]


# ------------------------------------------------------------------------------- all kinds


def group_rewards(prompt, texts: Sequence[str], judgements: Sequence[dict], tau: str = "b",
                  finished: Sequence[bool] | None = None) -> list[float] | None:
    """The rewards of the G answers to one prompt: the one place where the kind of a prompt decides.

    prompt: a data.Prompt. judgements: of an instruction's group, each {"order", "text", ...}. A new verifiable
    reward is one more branch here. Returns None where nothing could be judged.
    finished: False where an answer was cut off at its limit. Such a ranking cannot be read, whatever it has said (D17).
    """
    if prompt.kind == "preference":
        whole = finished or [True] * len(texts)
        return [preference_reward(text, prompt.truth, tau) if ended else -1.0 for text, ended in zip(texts, whole)]
    if prompt.kind == "reasoning":
        return [verify_answer(text, prompt.answer) for text in texts]
    verdicts = [judgement["text"] for judgement in judgements]
    orders = [judgement["order"] for judgement in judgements]
    return self_rewards(verdicts, orders)


REWARD_RANGE = {"preference": (-1.0, 1.0), "reasoning": (0.0, 1.0), "instruction": (LOWEST_SCORE, HIGHEST_SCORE)}


def group_advantages(rewards: torch.Tensor, scale: str = "std", reward_range: tuple[float, float] = (0.0, 1.0),
                     batch_std: float | None = None, eps: float = 1e-6) -> torch.Tensor:
    """A = (r - mean) / (std + eps) over the last dimension, the G answers to one prompt; float32.

    Group-relative advantages are the paper's. The unbiased std and its floor are ours (D9): a group whose std is
    below 1e-6, or of one answer, gets exactly 0. scale="center" is A = r - mean (Dr. GRPO), with `reward_range`
    mapped to [0, 1] first: otherwise a score of 1 to 10 would weigh nine times as much as a solved question (ours).
    scale="batch" divides by `batch_std` instead, that of all rewards of this kind in the batch: a group whose rewards
    hardly differ then weighs less (ours by kind; TRL has it over all rewards as scale_rewards="batch").

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [7., 7., 7., 7.]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([10., 1.]), "center", REWARD_RANGE["instruction"])
    tensor([ 0.5000, -0.5000])
    """
    if scale not in ("std", "center", "batch"):
        raise ValueError(f"unknown advantage scale {scale!r}: use 'std', 'center' or 'batch'")
    if scale == "batch" and batch_std is None:
        raise ValueError("scale 'batch' needs batch_std, of all rewards of this kind in the batch")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite: leave an unjudged group out, instead of passing nan")
    if rewards.shape[-1] < 2:
        return torch.zeros_like(rewards, dtype=torch.float32)
    rewards = rewards.double()
    centered = rewards - rewards.mean(dim=-1, keepdim=True)
    std = rewards.std(dim=-1, keepdim=True)
    if scale == "center":
        lowest, highest = reward_range
        advantages = centered / (highest - lowest)
    else:
        advantages = centered / ((std if scale == "std" else batch_std) + eps)
    return torch.where(std < SMALLEST_SPREAD, 0.0, advantages).float()


def loss_denominator(lengths: Sequence[int], loss: str) -> int:
    """What the loss of a global minibatch is divided by (D15): its answer tokens, or with sequence-mean its answers.

    lengths: tokens of each answer.
    """
    if loss not in ("token-mean", "sequence-mean"):
        raise ValueError(f"unknown loss {loss!r}: use 'token-mean' or 'sequence-mean'")
    return sum(lengths) if loss == "token-mean" else len(lengths)


def token_weight(length: int, denominator: float, loss: str) -> float:
    """The weight w of each token of an answer of `length` tokens: the one place where the mean is defined (D15).

        token-mean      w = 1 / (answer tokens of the global minibatch)                               DAPO
        sequence-mean   w = 1 / (answers of the global minibatch) / (tokens of this answer)           GRPO

    >>> lengths = [6, 2]
    >>> [token_weight(n, loss_denominator(lengths, "token-mean"), "token-mean") for n in lengths]
    [0.125, 0.125]
    >>> [token_weight(n, loss_denominator(lengths, "sequence-mean"), "sequence-mean") for n in lengths]
    [0.08333333333333333, 0.25]
    """
    weight = 1 / denominator
    return weight / length if loss == "sequence-mean" else weight


def clipped_objective(ratio: torch.Tensor, advantage: torch.Tensor, low: float = 0.8,
                      high: float = 1.28) -> torch.Tensor:
    """min(rho A, clip(rho, low, high) A) for each token, to be maximised. The range is the paper's, from DAPO.

    rho is a token's probability now over its probability when it was sampled. There is no dual clip: a token that
    got likelier in a bad answer (rho > high, A < 0) is pulled back in full.

    >>> clipped_objective(torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1., -1., 1., -1.]))
    tensor([ 0.5000, -0.8000,  1.2800, -1.5000])
    """
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def clipped_tokens(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> tuple[int, int]:
    """How many tokens lose their gradient by the clip, at its low end and at its high end.

    >>> clipped_tokens(torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1., -1., 1., -1.]), 0.8, 1.28)
    (1, 1)
    """
    too_low = (ratio < low) & (advantage < 0)
    too_high = (ratio > high) & (advantage > 0)
    return too_low.sum().item(), too_high.sum().item()


# ------------------------------------------------------------------------------- figures about judges


def mean(values) -> float | None:
    """The mean, or None of nothing: unknown is not zero."""
    values = list(values)
    return sum(values) / len(values) if values else None


def first_position_preference(score_rows: Sequence[Sequence[float]]) -> float:
    """How much a judge prefers what stands first: mean of [first is on top] / (number on top) - 1/N (ours).

    Rows are scores in the order shown, N to a row. A judge blind to order has 0 in expectation, and one that gives
    the same score to all has exactly 0. Always first is 1 - 1/N, never first -1/N. Of no rows: nan.

    >>> first_position_preference([[9, 3], [8, 2], [5, 5], [1, 7]])
    0.125
    """
    shares = []
    for row in filter(None, score_rows):
        best = max(row)
        shares.append((row[0] == best) / list(row).count(best) - 1 / len(row))
    return sum(shares) / len(shares) if shares else math.nan


# ------------------------------------------------------------------------------- finding and reading a final answer

LONGEST_ANSWER = 200  # characters; no final answer worth paying for is longer

# A number in running text: ASCII digits only. No branch gives back what it has read, so a search is linear.
# A minus after a digit, a letter or a bracket subtracts or spans a range: the last number of "3-5" is 5.
NUMBER = re.compile(r"(?P<sign>(?<![0-9A-Za-z)\]}])[-+])?"
                    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
                    r"(?P<exponent>[eE][-+]?[0-9]+)?(?:/(?P<denominator>[0-9]+))?(?P<percent> ?%)?")
UNIT = re.compile(r"\s*(?:\\(?:text|mathrm|mbox)\{[^{}]*\}|\^\{?\\circ\}?)$")
WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
# What only decorates a number in LaTeX: dollar signs, thin spaces, `{,}` for a thousands comma.
DECORATION = (("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\$", ""), ("$", ""), ("\\%", "%"), ("\u2212", "-"))


WORDING = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")


def _letters(text: str) -> str:
    """What is compared letter by letter: without case, spaces, and LaTeX around words."""
    return "".join(WORDING.sub(r"\1", text).split()).casefold()


def _tidy(text: str) -> str:
    for mark, plain in DECORATION:
        text = text.replace(mark, plain)
    return text.strip()


def final_answer(response: str) -> str:
    """The last `\\boxed{...}`, else the last number, else "". A box left open answers nothing."""
    start = response.rfind("\\boxed{")
    if start < 0:
        answer = ""
        for number in NUMBER.finditer(_tidy(response)):
            answer = number.group()
        return answer
    start += len("\\boxed{")
    depth = 1
    for token in re.finditer(r"\\.|[{}]", response[start:], re.DOTALL):  # steps over \\{ and \\}
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return _tidy(response[start : start + token.start()])
    return ""


def _read_number(text: str) -> tuple[Fraction, bool] | None:
    """The exact value of a plain number, and whether a percent sign follows it; None for anything else."""
    match = NUMBER.fullmatch(UNIT.sub("", text.removesuffix(".")))
    if match is None or len(match["exponent"] or "") > 5 or not int(match["denominator"] or 1):
        return None  # a longer exponent, as in 1e99999, would only fill the memory
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    value /= int(match["denominator"] or 1)
    return (-value if match["sign"] == "-" else value), match["percent"] is not None


def _same_number(given: tuple[Fraction, bool], truth: tuple[Fraction, bool]) -> bool:
    (a, a_percent), (b, b_percent) = given, truth
    if a == b:
        return True
    if a_percent and not b_percent:
        return a == 100 * b
    return b_percent and not a_percent and b == 100 * a


def check_answer(answer: str) -> None:
    r"""Refuse a true answer that no response could match. readers.py calls it for each row at load (D10).

    >>> check_answer(r"\frac{1}{2}")
    >>> check_answer("1/0")
    Traceback (most recent call last):
    ValueError: unreadable answer '1/0': not a number, not words, nothing that math_verify can parse
    """
    text = _tidy(answer)
    if not text:
        raise ValueError("the answer is empty")
    if len(text) > LONGEST_ANSWER:
        raise ValueError(f"the answer is longer than {LONGEST_ANSWER} characters: {text[:40]!r}...")
    if _read_number(text) or WORD.search(text):
        return
    readable = not NUMBER.fullmatch(text) and math_verify(text)
    # The second check asks how long one comparison takes: every response would cost as much.
    if readable is None or readable and math_verify(text, "1") is None:
        raise ValueError(f"unreadable answer {answer!r}: math_verify needs more than {CHECK_SECONDS} s or "
                         f"{CHECK_BYTES >> 30} GiB for it")
    if not readable:
        raise ValueError(f"unreadable answer {answer!r}: not a number, not words, "
                         "nothing that math_verify can parse")


# ------------------------------------------------------------------------------- the sandbox of symbolic maths

CHECK_SECONDS, CHECK_BYTES = 2, 2 << 30  # of CPU time and memory, for one answer in math_verify

# The program of the sandbox. It reads a JSON line [text] or [truth, text] and answers `true` or `false`. It is a
# text of its own because importing rewards.py would load torch there. It ends when the trainer closes its input.
SANDBOX = """
import json, logging, resource, sys
seconds, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from math_verify import LatexExtractionConfig, parse, verify
logging.disable()  # it warns that its own timer is off
print("ready", flush=True)
for line in sys.stdin:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    read = [parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", "first_match", None)
            for text in json.loads(line)]
    print(json.dumps(all(read) and (len(read) == 1 or verify(*read, timeout_seconds=None))), flush=True)
"""


class MathVerify:
    """math_verify in a process of its own: sympy can spend hours on nine characters, and nothing stops a thread.

    The kernel ends that process at CHECK_SECONDS of CPU time (it counts whole seconds, so at most one more) or at
    CHECK_BYTES of memory. A new one starts with the next answer. CPU time, not the clock's, so that what is verified
    does not depend on how busy the machine is.
    """

    def __init__(self):
        self.process, self.stopped, self.lock = None, 0, threading.Lock()

    def start(self) -> None:
        # -P: no module of the working folder is imported. A new session: Ctrl-C reaches the trainer alone.
        command = [sys.executable, "-P", "-c", SANDBOX, str(CHECK_SECONDS), str(CHECK_BYTES)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("math_verify did not start; its own message stands above")

    def __call__(self, *texts: str) -> bool | None:
        """Is [text] readable, or [truth, text] readable and equal? None: it was stopped, which `stopped` counts."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            self.process.stdin.write(json.dumps(texts) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if answer:
                return json.loads(answer)
            self.process.wait()
            self.stopped += 1
            return None


math_verify = MathVerify()
