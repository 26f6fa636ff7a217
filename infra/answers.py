r"""The final answer of a text: how it is found, and what equals what. A wrong 1 is worse than a wrong 0.

    1. tidy      only what cannot change a value goes: fonts, blanks of LaTeX, signs around maths
    2. units     where both sides have one, it must be the same; million, dozen and cents belong to the value
    3. numbers   two plain numbers must be exactly equal, never nearly; a sum or product to compute is none
    4. words     two words or choices are compared letter by letter, and so is what math_verify would misread
    5. maths     everything else goes to math_verify, in a process of its own, its decimals as exact fractions
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from string import ascii_lowercase

LONGEST_ANSWER = 200  # characters; no final answer worth paying for is longer

# A number in running text: ASCII digits only. No branch gives back what it has read, so a search is linear.
# A minus after a digit, a letter or a bracket subtracts or spans a range: the last number of "3-5" is 5.
NUMBER = re.compile(r"(?P<sign>(?<![0-9A-Za-z)\]}])[-+])?"
                    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
                    r"(?P<exponent>[eE][-+]?[0-9]+)?(?:/(?P<denominator>[0-9]+))?(?P<percent> ?%)?")


def rules(*pairs: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), plain) for pattern, plain in pairs]


# A box and its brace, or with one bare word; a line break or an escaped brace, which opens nothing; a brace.
BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)(?:\s*\{| +(?P<bare>[^\s{}$]+)))|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
FONT = r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox|operatorname|underline)"
OF_TEXT = r"\\(?:text(?:bf|rm)?|mathrm|mbox)"  # the fonts of a unit: others are a variable's
TIDY = rules(
    ("[\u2212\u2013]", "-"), ("°", r"^\\circ"), (r"\^ ?\{\\circ\}|\\degree(?![A-Za-z])", r"^\\circ"),
    ("×", r"\\times "), ("÷", r"\\div "), ("[·⋅∗•]", r"\\cdot "),
    ("π", r"\\pi "), ("∞", r"\\infty "), ("²", "^2"), ("³", "^3"), ("√", r"\\sqrt "),
    (r"\\(?:[dt]|nice)frac", r"\\frac"),
    (r"(?<=[0-9A-F)])_\{([0-9]+)\}", r"_\1"), (r"\\bar(?=\{)", r"\\overline"),
    (r"(?<![a-z}^_])\{\\(?:bf|it|rm) ?([^{}]*)\}", r"\1"), (r"(?<=\{)\\(?:bf|it|rm) ", ""),
    (r"\\(?:left|right|displaystyle|[lL]arge)(?![A-Za-z])", ""),
    (r"(?<=[0-9])(?:\{,\}|,(?:\\!)+|\\[,;:! ]|~)(?=[0-9]{3}(?![0-9]))", ","), (r"(?<!\\)\\[,;:! ]|~|(?<!\\)\\$", " "),
    (rf"\\%|\s*{OF_TEXT}\{{ ?percent\}}|(?<=[0-9}}]) percent$", "%"),
    (rf",?\s*{OF_TEXT}\{{ ?(?:and|or) ?\}}\s*|(?<=[0-9]) (?:and|or) (?=[-0-9A-Za-z]+$)", ", "),
    (r"^-\s*(\\?[$€]|£|\\pounds|\\euro)\s*", r"\1-"),
    (r"\\?€|\\euro(?![A-Za-z])", "euro "), (r"£|\\pounds(?![A-Za-z])", "pound "), (r"\\\$", "dollar "), (r"\$", ""),
    (rf"^(?:{FONT}\{{)?\s*(?:Therefore, |So )?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)?:? ?\}}? ?(?=.)", ""),
    (rf"^{FONT}\{{([^{{}}]*)\}}$", r"\1"), (r"[.,;:]\s*$", ""), (r"\s+", " "))
# A unit stands behind a number, a brace or a percent sign: in a font of text, as a whole word, or as a degree sign.
UNIT = re.compile(rf"(?:(?<=[0-9}}%])|(?<=\\pi))\s*(?:{OF_TEXT}\{{\s*([A-Za-z][A-Za-z./ ]+?|(?-i:[msghLJNVWCF]))\s*\}}"
                  r"|(?<=[0-9}]) ((?:[A-Za-z]{3,}|[cmk]m|kg|ft|in|mi|lb|oz|[ap]\.?m\.?)(?: [A-Za-z]{2,})*)|(\^\\circ))"
                  r"\s*(\^\{?[0-9]\}?)?$", re.IGNORECASE)
# No unit, but a part of the value: where such a word stands, texts are compared as they are.
NO_UNIT = re.compile(r"(?i)\b(?:or|and|more|less|least|most|half|halves|thirds?|quarters?|\w+ths?|base|out|of|below|"
                     r"zero|remainder|lakh|crore|quadrillion|alpha|beta|gamma|theta|phi|sin|cos|tan|log|sqrt)\b")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
          "cent": Fraction(1, 100)}
SCALED = r"(?: ?[KMB]\b| (?:hundred|thousand|million|billion|trillion|dozen|cents?)\b)?"  # behind a number in a text
FUNCTION = r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])"
MATHS = rules(
    (FONT + r"\{([^{}]*)\}", r" \1 "), (FUNCTION, r"\\\1 "), (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt ([0-9]+)", r"\\sqrt{\1}"), (r"\*", r"\\cdot "), (r"([0-9]+) ?\^\\circ", r"{\\frac{\1\\pi}{180}}"),
    (r"^(-?)([0-9]+) ([0-9]+)/([0-9]+)$", r"\1(\2+\\frac{\3}{\4})"),
    (r"^(-?)([0-9]+) ?(\\frac\{[0-9]+\}\{[0-9]+\})$", r"\1(\2+\3)"))
NO_MATHS = re.compile("|".join((  # what math_verify would misread: only equal texts are right
    r"[0-9][0-9A-F]*\)? ?_",  # a number in a base
    r"(?<![\\A-Za-z{])[A-Za-z]{3,}",  # words
    r"(?<!_)[0-9] [0-9]", r"[0-9] *[A-Za-z]+ *[0-9]",  # two numbers, which it would multiply
    r":[^;]*:", r"(?:^|;)[0-9]{1,2}:[0-9]{2}(?:;|$)",  # a ratio of three, a time
    r"(?:^|;)[0-9]+(?:(?:-[0-9]+)+|/[0-9]+/[0-9]+)(?:;|$)",  # a score, a range, a date
    r"'", r"\\[lc]?dots", r"\.\.\.")))  # what it leaves out
# Of a number as the truth: what is still to compute is no answer, or a copy of the question would be paid.
TO_COMPUTE = re.compile(r"[^\s({=,^]\s*(?:[-+*!]|\\(?:cdot|times|div)(?![A-Za-z])(?! *10 *\^))"
                        r"|\\?(?:max|min|gcd|lcm|binom|choose|sum|prod|int|lim|lfloor|lceil)(?![A-Za-z])")
DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]*)(?:\\overline\{([0-9]+)\})?(?![0-9._])")


def tidy(text: str) -> str:
    r"""A final answer without what cannot change its value.

    >>> tidy(r"$\dfrac{3}{4}$."), tidy(r"8\;000"), tidy(r"\text{Answer: }5")
    ('\\frac{3}{4}', '8,000', '5')
    """
    text = text.strip()
    for pattern, plain in TIDY:
        text = pattern.sub(plain, text).strip()
    return text


def boxed(text: str) -> list[str]:
    r"""What stands in the boxes of a text, in order. A box left open holds nothing.

    >>> boxed(r"\boxed{\frac{1}{2}}, \fbox{9}, $\boxed 7$, \boxed{8")
    ['\\frac{1}{2}', '9', '7', '']
    """
    found, open_braces = [], []  # of each open brace: None, or where a box begins and its place in `found`
    for token in BRACES.finditer(text):
        if token["box"]:
            found.append(token["bare"] or "")
        if token["box"] and not token["bare"]:
            open_braces.append((token.end(), len(found) - 1))
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces:
            box = open_braces.pop()
            if box:
                first, place = box
                found[place] = text[first : token.start()].strip()
    return found


def final_answer(response: str) -> str:
    """The content of the last box, else the last number, else ""."""
    found = boxed(response)
    if not found:
        text = re.sub(r"\\?\$", "", re.sub("[\u2212\u2013]", "-", response)).replace("{,}", ",")
        text = re.sub(r"(?<![0-9] )\b(?:negative|minus) (?=[0-9])", "-", text)
        found = [number.group() for number in re.finditer(NUMBER.pattern + SCALED, text)]
    return found[-1] if found else ""


def split_unit(text: str) -> tuple[str, str, Fraction]:
    r"""(answer without its unit, unit, what the unit multiplies the answer by).

    >>> split_unit(r"12 \text{ inches}^2")[:2], split_unit("5 million dollars")
    (('12', 'inch^2'), ('5', 'dollar', Fraction(1000000, 1)))
    """
    unit, scale = re.match("(?:(dollar|euro|pound) (?=[-0-9.]))?", text)[1] or "", Fraction(1)
    text, found = text[len(unit) :].strip(), UNIT.search(text)
    if not found or NO_UNIT.search(found[0]) or found[3] and "\\" in text[: -len(found[0])]:
        return text, unit, scale  # of a cosine the degrees are no unit
    for word in (found[1] or found[2] or "degree").lower().replace(".", "").split():
        word = word[:2] + word[2:].rstrip("s").rstrip("e")  # the unit s stays
        scale *= SCALES.get(word, 1)
        if word == "cent":
            unit = "dollar"
        elif word not in SCALES:
            unit = f"{unit} {word}".strip()
    return text[: len(text) - len(found[0])].strip(), unit + (found[4] or "").strip("{}"), scale


def read_number(text: str) -> tuple[Fraction, bool] | None:
    """The exact value of a plain number, and whether a percent sign follows it; None for anything else."""
    match = NUMBER.fullmatch(re.sub(r"^(-?)\\frac ?\{([0-9]+)\}\{([0-9]+)\}", r"\1\2/\3", text))
    if match is None or len(match["exponent"] or "") > 5 or not int(match["denominator"] or 1):
        return None  # a longer exponent, as in 1e99999, would only fill the memory
    value = Fraction((match["sign"] or "") + match["digits"].replace(",", "") + (match["exponent"] or ""))
    return value / int(match["denominator"] or 1), match["percent"] is not None


def bare(text: str) -> str:
    """A text without fonts, and without the blanks that keep no two letters or digits apart."""
    text = re.sub(r"\s+", " ", re.sub(FONT + r"\{([^{}]*)\}", r"\1", text))
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text)


def as_word(text: str) -> str | None:
    """A word or a choice as it is compared; None for anything else. Case counts where it may be maths, as x is not X:
    in letters alone, in pairs of them, and in three capitals.

    >>> as_word("(B)"), as_word("Friday"), as_word("No"), as_word("AB"), as_word("x + 1")
    ('B', 'friday', 'no', 'AB', None)
    """
    plain = re.sub(r"^[(\[]([^,]*)[)\]]$", r"\1", bare(text).strip(". "))
    if not re.fullmatch("[A-Za-z][A-Za-z ,'-]*", plain) or re.search(FUNCTION + r"|\b[A-Za-z]-[A-Za-z]\b", plain):
        return None
    longest = max(map(len, re.findall("[A-Za-z]+", plain)))
    folds = longest > 3 or longest == 3 and not re.search("[A-Z]{2}", plain) or plain.casefold() in ("yes", "no")
    return plain.casefold() if folds else plain


def as_maths(text: str) -> str:
    r"""An answer for math_verify: functions as LaTeX, degrees as radians, decimals as exact fractions.

    >>> as_maths("2*sqrt(0.5)"), as_maths(r"0.1\overline{6}"), as_maths("1 3/4")
    ('2\\cdot \\sqrt{\\frac{5}{10}}', '\\frac{15}{90}', '(1+\\frac{3}{4})')
    """

    def exact(decimal: re.Match) -> str:
        whole, part, again = decimal.groups()
        if not again:
            return rf"\frac{{{int(whole + part)}}}{{{10 ** len(part)}}}" if part else decimal[0]
        value = int(whole + part + again) - int(whole + part or 0)
        return rf"\frac{{{value}}}{{{10 ** len(part) * (10 ** len(again) - 1)}}}"

    for pattern, plain in MATHS:
        text = pattern.sub(plain, text)
    return DECIMAL.sub(exact, text)


def same_answer(given: str, truth: str) -> bool:
    """Whether a final answer, as `final_answer` found it, equals the true one. No text makes this function raise."""
    if max(len(given), len(truth)) > LONGEST_ANSWER:
        return False
    given, truth = tidy(given), tidy(truth)
    if not given or not truth:
        return False
    (a, a_unit, a_scale), (b, b_unit, b_scale) = split_unit(given), split_unit(truth)
    if a_unit != b_unit and (a_unit and b_unit or {"am", "pm"} & {a_unit, b_unit}):
        return False
    a_number, b_number = read_number(a), read_number(b)
    if a_number and b_number:
        (x, x_percent), (y, y_percent) = a_number, b_number
        a_scale = b_scale if not a_unit and b_scale < 1 else a_scale  # "5.4" for 5.4 cents
        x, y = x * a_scale, y * b_scale
        return x == y or x_percent > y_percent and x == 100 * y or y_percent > x_percent and y == 100 * x
    if b_number and TO_COMPUTE.search(re.sub(r"^[^={]*=", "", a)):
        return False
    a_word, b_word = as_word(a), as_word(b)
    alike = bare(a) == bare(b)
    if alike or a_word or b_word or a_scale != b_scale:
        return a_scale == b_scale and (alike or a_word == b_word)
    a, b = as_maths(a), as_maths(b)
    if NO_MATHS.search(f"{a};{b}") or ("=" in a) != ("=" in b) and (is_system(a) or is_system(b)):
        return False
    begun = re.match(r"[(\[]|\\\{", a), re.match(r"[(\[]|\\\{", b)
    if all(begun) and "," in a and "," in b and (begun[0][0], a[-1]) != (begun[1][0], b[-1]):
        return False  # an open interval and a closed one, a point and a set
    return math_verify(*without_capitals(b, a)) is True


def is_system(text: str) -> bool:
    """Whether an equation says more than a value: math_verify would compare its right side alone with one.

    >>> is_system("x=5"), is_system("m+n=34"), is_system("x=1,y=2"), is_system("2x=6")
    (False, False, True, True)
    """
    names = set(re.findall(r"([A-Za-z]+) ?=", text))
    return len(names) > 1 or re.match(r"(?:-|[0-9]|\\frac\{[^{}]*\}\{[0-9]|[^=]*\^)[^=]*=", text) is not None


def without_capitals(*texts: str) -> list[str]:
    r"""The texts with other small letters for their capital ones, since math_verify reads R as r.

    >>> without_capitals(r"\pi(R^2-r^2)", "R")
    ['\\pi(a^2-r^2)', 'a']
    """
    names = re.compile(r"\\mathbb\{.\}|\\[A-Za-z]+|[A-Z]")  # the reals, a command, a capital letter
    used, others = set("".join(texts)) | set("deij"), {}  # these four are no plain unknowns
    for name in names.findall(" ".join(texts)):
        if re.match(r"\\?[A-Z]", name) and name not in others:
            free = [letter for letter in ascii_lowercase if letter not in used]
            others[name] = free[0] if free else name
            used.add(others[name])
    return [names.sub(lambda found: others.get(found[0], found[0]), text) for text in texts]


def check_answer(answer: str) -> None:
    r"""Refuse a true answer that no response could match. data.py calls it for each row at load.

    >>> check_answer(r"\frac{1}{2}")
    >>> check_answer("1/0")
    Traceback (most recent call last):
    ValueError: unreadable answer '1/0': not a number, not words, and math_verify cannot compare it in 2 s and 2 GiB
    """
    text = tidy(answer)
    if not 0 < len(text) <= LONGEST_ANSWER:
        raise ValueError(f"the answer has {len(text)} characters, expected 1 to {LONGEST_ANSWER}: {text[:40]!r}")
    plain = split_unit(text)[0]
    maths = as_maths(plain)
    only_as_text = NO_MATHS.search(maths) and not NUMBER.fullmatch(plain)
    if read_number(plain) or as_word(plain) or only_as_text:
        return
    # The comparison shows how long one takes: every response would cost as much.
    if NUMBER.fullmatch(plain) or not math_verify(maths) or math_verify(maths, "1") is None:
        raise ValueError(f"unreadable answer {answer!r}: not a number, not words, and math_verify cannot "
                         f"compare it in {CHECK_SECONDS} s and {CHECK_BYTES >> 30} GiB")


# ------------------------------------------------------------------------------- the sandbox of symbolic maths

CHECK_SECONDS, CHECK_BYTES = 2, 2 << 30  # of CPU time and memory, for one answer in math_verify

# The program of the sandbox, which imports nothing of ours. It reads a JSON line [text] or [truth, text] and answers
# `true` or `false`. It ends when the trainer closes its input.
SANDBOX = """
import dataclasses, json, logging, resource, sympy, sys
seconds, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from math_verify import LatexExtractionConfig, parse, verify
logging.disable()  # it warns that its own timer is off
latex = LatexExtractionConfig()  # it would drop what it takes for a unit: the d of 2d
plain = dataclasses.replace(latex.normalization_config, units=False)
latex = dataclasses.replace(latex, normalization_config=plain)
print("ready", flush=True)
for line in sys.stdin:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    read = [parse(f"${text}$", [latex], "no_fallback", "first_match", None) for text in json.loads(line)]
    equal = all(read) and (len(read) == 1 or verify(*read, 30, 60, timeout_seconds=None))
    if equal and len(read) == 2:  # it takes tiny numbers for 0
        exact = [found[0].doit() for found in read if isinstance(found[0], sympy.Expr)]
        equal = exact[0] == exact[1] if len(exact) == 2 and all(one.is_Rational for one in exact) else equal
    print(json.dumps(equal), flush=True)
"""


class MathVerify:
    """math_verify in a process of its own: sympy can spend hours on nine characters, and nothing stops a thread.

    The kernel ends that process at CHECK_SECONDS of CPU time (it counts whole seconds, so at most one more) or at
    CHECK_BYTES of memory. A new one starts with the next answer. CPU time, not the clock's, so that what is verified
    does not depend on how busy the machine is.
    """

    def __init__(self):
        self.process, self.stopped = None, 0

    def __call__(self, *texts: str) -> bool | None:
        """Is [text] readable, or [truth, text] readable and equal? None: it was stopped, which `stopped` counts."""
        if self.process is None or self.process.poll() is not None:
            # -P: no module of the working folder is imported. A new session: Ctrl-C reaches the trainer alone.
            command = [sys.executable, "-P", "-c", SANDBOX, str(CHECK_SECONDS), str(CHECK_BYTES)]
            self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            start_new_session=True)
            if self.process.stdout.readline() != "ready\n":
                raise RuntimeError("math_verify did not start; its own message stands above")
        self.process.stdin.write(json.dumps(texts) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        self.process.wait()
        self.stopped += 1
        return None


math_verify = MathVerify()
