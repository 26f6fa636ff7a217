"""The final answer of a text: how it is found, read and compared; and the process that checks symbolic maths."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from fractions import Fraction

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


def same_answer(given: str, truth: str) -> bool:
    """Whether a final answer, as `final_answer` found it, equals the true one. No text makes this function raise."""
    truth = _tidy(truth)
    if not given or not truth or max(len(given), len(truth)) > LONGEST_ANSWER:
        return False
    given_number, true_number = _read_number(given), _read_number(truth)
    if given_number and true_number:
        return _same_number(given_number, true_number)
    if _letters(given) == _letters(truth):
        return True
    if WORD.search(given) or WORD.search(truth):  # math_verify would read "cat" as c*a*t
        return False
    return math_verify(truth, given) is True


def check_answer(answer: str) -> None:
    r"""Refuse a true answer that no response could match. data.py calls it for each row at load.

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

# The program of the sandbox, which imports nothing of ours. It reads a JSON line [text] or [truth, text] and answers
# `true` or `false`. It ends when the trainer closes its input.
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
