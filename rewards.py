"""The rewards of URPO (arXiv 2507.17515): pure functions, one per equation. No model, no sampler.

From the paper: reasoning is rewarded by checking the final answer; ranking by Kendall's tau between the
referee's scores and the true ranking; open-ended answers by the scores the policy gives its own group;
advantages are relative to the group; the ratio is clipped to [0.8, 1.28] (clip-higher, from DAPO).
Ours, where what we know of the paper is silent (D2..D10 in the README): the scale 1..10 and the syntax of a
score line, the tau variant and what ties earn, -1 for an unreadable verdict, un-shuffling and averaging of
judgements, the unbiased deviation and its floor, and how a final answer is found and compared.
One rule runs through the file: unknown is not zero. An unreadable verdict is None or the -1 of D4, no score.
"""
import json
import math
import re
import subprocess
import sys
import threading
from fractions import Fraction
from statistics import pstdev
from typing import Sequence

import torch
from scipy.stats import kendalltau

LOWEST_SCORE, HIGHEST_SCORE = 1.0, 10.0  # D2; the referee's prompt states the same range
LONGEST_ANSWER = 200                     # characters; no final answer worth paying for is longer
CHECK_SECONDS, CHECK_BYTES = 2, 2 << 30  # of CPU time and memory, for one answer in math_verify
SMALLEST_SPREAD = 1e-6                   # a group whose rewards deviate less than this carries no signal (D9)

# A number in running text. ASCII digits only, and no branch gives up what it has read, so a search is linear.
# A minus after a digit, a letter or a bracket subtracts or spans a range: the last number of "3-5" is 5.
NUMBER = re.compile(r"(?P<sign>(?<![0-9A-Za-z)\]}])[-+])?"
                    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
                    r"(?P<exponent>[eE][-+]?[0-9]+)?(?:/(?P<denominator>[0-9]+))?(?P<percent> ?%)?")
UNIT = re.compile(r"\s*(?:\\(?:text|mathrm|mbox)\{[^{}]*\}|\^\{?\\circ\}?)$")
WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")


def _tidy(text: str) -> str:
    """Drop what only decorates a number in LaTeX: dollar signs, thin spaces, `{,}` for a thousands comma."""
    for mark, plain in (("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\$", ""), ("$", ""),
                        ("\\%", "%"), ("\u2212", "-")):
        text = text.replace(mark, plain)
    return text.strip()


def final_answer(response: str) -> str:
    """The last `\\boxed{...}`, else the last number, else "". A box left open answers nothing."""
    start = response.rfind("\\boxed{")
    if start < 0:
        last = None
        for last in NUMBER.finditer(_tidy(response)):
            pass
        return last.group() if last else ""
    depth, start = 1, start + len("\\boxed{")
    for token in re.finditer(r"\\.|[{}]", response[start:], re.DOTALL):  # steps over \\{ and \\}
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return _tidy(response[start:start + token.start()])
    return ""


def _read_number(text: str) -> tuple[Fraction, bool] | None:
    """The exact value of a plain number, and whether a percent sign follows it; None for anything else."""
    match = NUMBER.fullmatch(UNIT.sub("", text.removesuffix(".")))
    if match is None or len(match["exponent"] or "") > 5 or not int(match["denominator"] or 1):
        return None  # a longer exponent, as in 1e99999, would only fill the memory
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    value /= int(match["denominator"] or 1)
    return (-value if match["sign"] == "-" else value), match["percent"] is not None


class MathVerify:
    """math_verify in a process of its own, since sympy can spend hours on nine characters and a signal stops no thread.

    The kernel ends that process at CHECK_SECONDS of CPU time (it counts whole seconds, so at most one more) or at
    CHECK_BYTES of memory; a new one starts with the next answer. CPU time, not the clock's: what is verified must
    not depend on how busy the machine is.
    """

    # The process reads a JSON line [text] or [truth, text] and answers `true` or `false`. It is a program of its own
    # because rewards.py would load torch there. It ends by itself with the trainer, whose end closes its input.
    PROGRAM = """
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

    def __init__(self):
        self.process, self.stopped, self.lock = None, 0, threading.Lock()

    def __call__(self, *texts: str) -> bool | None:
        """Is [text] readable, or [truth, text] readable and equal? None: it was stopped, which `stopped` counts."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                # -P: no module of the working folder. A session of its own: Ctrl-C is the trainer's alone to handle.
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", self.PROGRAM, str(CHECK_SECONDS), str(CHECK_BYTES)], text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
                if self.process.stdout.readline() != "ready\n":
                    raise RuntimeError("math_verify did not start; its own message stands above")
            self.process.stdin.write(json.dumps(texts) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                self.process.wait()
                self.stopped += 1
            return json.loads(answer) if answer else None


math_verify = MathVerify()


def verify_answer(response: str, answer: str) -> float:
    r"""Reasoning reward: 1 if the final answer equals `answer`, else 0. The check is the paper's, D10 ours.

    Two plain numbers must be equal exactly. "50%" equals 50 and also 1/2, since data sets write either.
    Words are compared letter by letter, everything symbolic by math_verify, and what that cannot decide within
    CHECK_SECONDS is not verified: 0. No text makes this raise.
    >>> verify_answer(r"First \boxed{3}. No: \boxed{1{,}024}.", "1024"), verify_answer("so 3/4 it is", "0.75")
    (1.0, 1.0)
    >>> verify_answer(r"\boxed{(x-1)(x+1)}", "x^2-1"), verify_answer(r"It is 12, so \boxed{13}", "12")
    (1.0, 0.0)
    """
    given, truth = final_answer(response), _tidy(answer)
    if not given or not truth or max(len(given), len(truth)) > LONGEST_ANSWER:
        return 0.0
    given_number, true_number = _read_number(given), _read_number(truth)
    if given_number and true_number:
        (a, a_percent), (b, b_percent) = given_number, true_number
        return float(a == b or (a_percent and not b_percent and a == 100 * b)
                     or (b_percent and not a_percent and b == 100 * a))
    if "".join(given.split()).casefold() == "".join(truth.split()).casefold():
        return 1.0
    if WORD.search(given) or WORD.search(truth):  # math_verify would read "cat" as c*a*t
        return 0.0
    return float(math_verify(truth, given) is True)


def check_answer(answer: str) -> None:
    r"""Refuse a gold answer that no response could match; data.py calls it per row at load (D10, ours).

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
    if readable is None or readable and math_verify(text, "1") is None:  # any response would then cost as much
        raise ValueError(f"unreadable answer {answer!r}: math_verify needs more than {CHECK_SECONDS} s or "
                         f"{CHECK_BYTES >> 30} GiB for it")
    if not readable:
        raise ValueError(f"unreadable answer {answer!r}: not a number, not words, "
                         "nothing that math_verify can parse")


def parse_scores(text: str, n: int) -> list[float] | None:
    """The verdict: exactly `n` plain decimals in [1, 10] in the LAST score block, else None (ours: D2, D4).

    An earlier good block never counts: it may be a draft, or a quoted answer that tries to score itself.
    >>> parse_scores("<scores>1, 1</scores> On reflection: <scores>8, 6.5</scores>", 2)
    [8.0, 6.5]
    >>> parse_scores("<scores>8, 6</scores> On reflection: <scores>8, 60%</scores>", 2)
    """
    start = text.rfind("<scores>")
    end = text.find("</scores>", start)
    if start < 0 or end < 0:  # a last block that was opened and cut off is no verdict either
        return None
    items = [item.strip(" \t\r\n") for item in text[start + len("<scores>"):end].split(",")]
    if len(items) != n or not all(re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,20})?", item) for item in items):
        return None
    scores = [float(item) for item in items]
    return scores if all(LOWEST_SCORE <= score <= HIGHEST_SCORE for score in scores) else None


def kendall_tau(scores: Sequence[float], truth: Sequence[float], variant: str = "b") -> float:
    """Rank agreement in [-1, 1]; higher is better in both lists. Kendall's tau is the paper's, D3 ours.

    C and D count the pairs on which the lists agree and disagree. "b": (C - D) / sqrt(pairs untied in
    scores * pairs untied in truth), 0 if a list is all ties. "strict": (C - D) / pairs untied in truth: a tie
    earns what breaking it at random would on average, and 1 is reachable where the truth itself has ties.
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
    pairs = [(i, j) for i in range(len(truth)) for j in range(len(truth)) if truth[i] > truth[j]]
    agreement = sum((scores[i] > scores[j]) - (scores[i] < scores[j]) for i, j in pairs)
    return agreement / len(pairs) if pairs else 0.0


def preference_reward(text: str, truth: Sequence[float], variant: str = "b") -> float:
    """Ranking reward: tau(scores in the text, truth) in [-1, 1] (paper); unparseable earns -1 (our D4).

    >>> preference_reward("<scores>8, 6</scores>", [1, 0]), preference_reward("the first one", [1, 0])
    (1.0, -1.0)
    """
    scores = parse_scores(text, len(truth))
    return -1.0 if scores is None else kendall_tau(scores, truth, variant)


def self_rewards(texts: Sequence[str], orders: Sequence[Sequence[int]]) -> list[float] | None:
    """Open-ended rewards of a group: r_i = mean, over the judgements that parse, of their score of answer i.

    That the policy scores its own group is the paper's; the shuffled orders and the mean are ours (D6).
    `orders[k][j]` is the answer that judgement k showed at position j. One reward in [1, 10] per answer, or
    None if no judgement parses: that group then gets no advantage, instead of a made-up score (D8).
    >>> self_rewards(["<scores>9, 2, 5</scores>", "<scores>4, 3, 7</scores>"], [[2, 0, 1], [1, 0, 2]])
    [2.5, 4.5, 8.0]
    >>> self_rewards(["cannot say"], [[2, 0, 1]])
    """
    if len(texts) != len(orders):
        raise ValueError(f"{len(texts)} judgements against {len(orders)} orders")
    if any(sorted(order) != list(range(len(orders[0]))) for order in orders):
        raise ValueError("every order must be a permutation of the same answers, counted from 0")
    verdicts = []
    for text, order in zip(texts, orders):
        scores = parse_scores(text, len(order))
        if scores is not None:
            verdicts.append([scores[order.index(answer)] for answer in range(len(order))])
    return [sum(column) / len(verdicts) for column in zip(*verdicts)] if verdicts else None


def group_advantages(rewards: torch.Tensor, scale: str = "std", eps: float = 1e-6) -> torch.Tensor:
    """A = (r - mean) / (std + eps) over the last dimension, the group of G samples of one prompt; float32.

    Group-relative advantages are the paper's; the unbiased std and its floor are ours (D9): a group whose std
    is below 1e-6, or of one sample, gets exactly 0. `scale="center"` is A = r - mean (Dr. GRPO).
    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [7., 7., 7., 7.]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if scale not in ("std", "center"):
        raise ValueError(f"unknown advantage scale {scale!r}: use 'std' or 'center'")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite: leave an unjudged group out, instead of passing nan")
    if rewards.shape[-1] < 2:
        return torch.zeros_like(rewards, dtype=torch.float32)
    centered = rewards.double() - rewards.double().mean(dim=-1, keepdim=True)
    std = rewards.double().std(dim=-1, keepdim=True)
    advantages = centered / (std + eps) if scale == "std" else centered
    return torch.where(std < SMALLEST_SPREAD, 0.0, advantages).float()


def clipped_objective(ratio: torch.Tensor, advantage: torch.Tensor, low: float = 0.8,
                      high: float = 1.28) -> torch.Tensor:
    """min(rho A, clip(rho, low, high) A), elementwise, to be maximised. The range is the paper's, from DAPO.

    rho is a token's new probability over its old one. There is no dual clip: a token that got likelier in a
    bad answer (rho > high, A < 0) is pulled back in full.
    >>> clipped_objective(torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([1., -1., 1., -1.]))
    tensor([ 0.5000, -0.8000,  1.2800, -1.5000])
    """
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def first_position_preference(score_rows: Sequence[Sequence[float]]) -> float:
    """How much a judge prefers what stands first: mean of [first is on top] / (number on top) - 1/N (ours).

    Rows are scores in the order shown, N to a row. A judge blind to order has 0 in expectation, a constant
    one exactly 0; always first is 1 - 1/N, never first -1/N. No rows: nan, since nothing was measured.
    >>> first_position_preference([[9, 3], [8, 2], [5, 5], [1, 7]])
    0.125
    """
    shares = [(row[0] == max(row)) / sum(score == max(row) for score in row) - 1 / len(row)
              for row in score_rows if len(row)]
    return sum(shares) / len(shares) if shares else math.nan


def mean(values) -> float | None:
    """The mean, or None of nothing: unknown is not zero."""
    values = list(values)
    return sum(values) / len(values) if values else None


def figures_of_kind(groups: Sequence[dict]) -> dict:
    """The figures of one kind of prompt in one step, from the groups of all ranks (lines of rollouts.jsonl).

    Format rate, mean tau and the spread of self-scores all look healthy over a referee that writes one constant
    line. What exposes it: `zero_spread`, the share of groups without any gradient; `distinct`, the number of
    different answers in a group; `first_position`; and `entropy`, nats a token. Empty for a kind not drawn.
    """
    if not groups:
        return {}
    samples = [sample for group in groups for sample in group["samples"]]
    rewards = [[sample["reward"] for sample in group["samples"]] for group in groups]
    spreads = [pstdev(row) for row in rewards if None not in row]  # a group that no judgement reached has no reward
    figures = {
        "prompts": len(groups), "unjudged": len(groups) - len(spreads),
        "reward": mean(reward for row in rewards if None not in row for reward in row),
        "reward_std": mean(spreads), "zero_spread": mean(spread < SMALLEST_SPREAD for spread in spreads),
        "advantage_scale": mean(abs(sample["advantage"]) for sample in samples),
        "length": mean(len(sample["ids"]) for sample in samples), "tokens": sum(len(s["ids"]) for s in samples),
        "finished": mean(sample["finished"] for sample in samples),
        "distinct": mean(len({sample["text"] for sample in group["samples"]}) for group in groups),
        "entropy": mean(group["entropy"] for group in groups if group["entropy"] is not None),
        "logprob": mean(group["logprob"] for group in groups if group["logprob"] is not None),
    }
    if groups[0]["kind"] == "reasoning":
        return figures
    if groups[0]["kind"] == "preference":
        verdicts = [sample["scores"] for sample in samples]
        figures["tau"] = mean(sample["reward"] for sample in samples if sample["scores"])
    else:
        verdicts = [parse_scores(judgement["text"], len(judgement["order"]))
                    for group in groups for judgement in group["judgements"]]
        figures["score_std"] = mean(pstdev(verdict) for verdict in verdicts if verdict)
    read = [verdict for verdict in verdicts if verdict]
    figures["format"] = len(read) / len(verdicts) if verdicts else None
    figures["first_position"] = first_position_preference(read) if read else None
    return figures
