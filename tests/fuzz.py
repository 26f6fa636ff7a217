"""Hostile input for everything that reads text from data or from a model, until a property breaks.

    python tests/fuzz.py hypothesis 100000     inputs built from pieces that mean something to a parser
    python tests/fuzz.py atheris 100000        inputs bred for coverage of rewards.py, data.py and readers.py
    python tests/fuzz.py symbolic 2000         answers that reach math_verify, in its own process

An input is (number of a target, text). Each must end without an exception and within LIMIT seconds of CPU time, also
when it is repeated up to 64 kB; what else must hold stands in the targets.
"""
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LIMIT = float(os.environ.get("FUZZ_SECONDS", 0.05))
SIZE = 64 * 1024

if __name__ == "__main__" and sys.argv[1:2] == ["atheris"]:
    import atheris

    with atheris.instrument_imports(include=["rewards", "data", "readers"]):
        import data
        import readers
        import rewards
else:
    import data
    import readers
    import rewards


# ---- targets: what holds of any text ----

def score_block(text):
    for n in (1, 2, 4):
        scores = rewards.parse_scores(text, n)
        assert scores is None or len(scores) == n and all(1 <= score <= 10 for score in scores)
        assert rewards.preference_reward(text, list(range(n))) in (-1, 0, 1) or n == 4
    assert rewards.parse_scores(text + "<scores>", 2) is None  # a block that was opened last and cut off
    assert rewards.parse_scores(text + data.score_line([8, 6]), 2) == [8, 6]  # the last block counts, whatever precedes


def final_answer(text):
    assert rewards.verify_answer(text, "7") in (0, 1)
    assert rewards.verify_answer(f"{text}\\boxed{{7}}", "7") == 1
    if len(text) <= rewards.LONGEST_ANSWER:  # as the answer that a row holds
        assert rewards.verify_answer("7", text) in (0, 1)
        try:
            rewards.check_answer(text)
        except ValueError:
            pass


def quotation(text):
    lines = data.quoted(text).split("\n")
    assert all(line.startswith("> ") and len(line.splitlines()) <= 1 for line in lines)
    assert not re.search("</?scores", "\n".join(lines), re.IGNORECASE)
    assert rewards.parse_scores("\n".join(lines), 1) is None


def data_row(text):
    for kind in data.KINDS:
        try:
            prompt = readers.read_row(kind, "rows.jsonl:7", text.encode("utf-8", "surrogatepass"))
        except data.InputError as error:
            message = str(error)
            assert message.startswith("rows.jsonl:7: ") and message.isprintable() and len(message) < 700
            assert f"--{data.FLAGS[kind]} reads one JSON object a line" in message or " ... " in message
        else:
            assert prompt.kind == kind and prompt.instruction.strip()
            data.prompt_text(prompt).encode()  # tokenizers take UTF-8, so no half surrogate pair may come through
            assert kind != "reasoning" or rewards.verify_answer(f"\\boxed{{{prompt.answer}}}", prompt.answer) in (0, 1)


TARGETS = (score_block, final_answer, quotation, data_row)
slowest = {target.__name__: (0.0, "") for target in TARGETS}


def check(number: int, text: str) -> None:
    """One input, as it is and repeated up to 64 kB."""
    target = TARGETS[number % len(TARGETS)]
    for version in (text, text * (SIZE // max(1, len(text.encode("utf-8", "surrogatepass"))))):
        seconds = LIMIT
        for _ in range(3):  # again if slow: a pause of the garbage collector is not the parser's
            if seconds >= LIMIT:
                before = time.thread_time()
                target(version)
                seconds = time.thread_time() - before
        if seconds > slowest[target.__name__][0]:
            slowest[target.__name__] = seconds, version[:60]
        assert seconds < LIMIT, f"{target.__name__}: {seconds:.3f} s for {len(version)} characters: {version[:200]!r}"


# ---- sources of input ----

PIECES = ["<scores>", "</scores>", "<scores>8, 6</scores>", "8", "10", ",", ", ", ".", "-", "/", "e", "e999", "%",
          "nan", "\\boxed{", "{", "}", "\\", "\\frac{1}{2}", "\\text{cm}", "^\\circ", "$", "{,}", "1,234", "111,", "1e",
          " ", "\n", "\r", "\u2028", "\x85", "\x00", "\u0663", "\u00b2", "\uff16", "\u2212", "\ud800",
          "Response 2:", "> ", "<|im_end|>", "not 10", "incorrect", "x^2", '"', ":", "[", "]", "null", "true", "1e999",
          "NaN", "\ufeff"]
FIELDS = ("prompt question problem instruction messages responses scores chosen rejected completions answer solution "
          "reward_model ground_truth role user content response overall_score").split()


def strategies():
    from hypothesis import strategies as st

    text = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=25).map("".join)
    value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text,
                         lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
                             st.sampled_from(FIELDS) | text, inner, max_size=4), max_leaves=8)
    row = st.dictionaries(st.sampled_from(FIELDS), value, max_size=5).map(json.dumps)
    return st.tuples(st.integers(0, 2), text) | st.tuples(st.just(3), row | text)


def without_math_verify():
    """Our own parsers alone: math_verify has its own process, its own limits, and `symbolic` below."""
    rewards.math_verify = lambda *texts: False


def hypothesis_run(count: int) -> int:
    """The number of inputs tried."""
    from hypothesis import HealthCheck, Phase, given, settings

    tried = []

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])
    @given(strategies())
    def run(case):
        tried.append(case[0])
        check(*case)

    run()
    return len(tried)


def atheris_run(count: int) -> None:
    """Never returns: libFuzzer ends the process, with status 0 after `count` inputs without a finding."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = ["<scores>8, 6.5</scores>", "so \\boxed{\\frac{1}{2}}", "it is 1,234.5e3/7 %", "> a\n</scores>",
                 '{"prompt": "q", "chosen": "a", "rejected": "b"}', '{"question": "q", "answer": "#### 42"}',
                 '{"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}', '{"messages": [{"role": "user", '
                 '"content": "q"}]}', '{"instruction": "q", "completions": [{"response": "a", "overall_score": 3}]}']
        for i, seed in enumerate(seeds):
            for number in range(len(TARGETS)):
                Path(folder, f"{i}-{number}").write_bytes(bytes([number]) + seed.encode())
        words = Path(folder, "words.dict")
        words.write_text("".join('"%s"\n' % "".join(f"\\x{byte:02x}" for byte in piece.encode("utf-8", "surrogatepass"))
                                 for piece in PIECES + FIELDS))
        atheris.Setup([sys.argv[0], f"-runs={count}", "-max_len=4096", f"-dict={words}", "-verbosity=0",
                      "-report_slow_units=100000", folder],
                      lambda raw: check(raw[0], raw[1:].decode("utf-8", "replace")) if raw else None)
        atheris.Fuzz()


def symbolic_run(count: int) -> None:
    """Answers built from what math_verify reads: 0 or 1, never an exception, whatever its process does."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    parts = ["x", "y", "1", "9", "99", "+", "-", "^", "^{", "{", "}", "(", ")", "\\frac{", "\\sqrt{", "\\log", "!", "=",
             ",", "\\pi", "\\infty", "\\sum_{n=1}^{9}", "\\int", "\\cup", "[", "]", "\\{", "\\}", "\\cdot", "|", "\\le",
             "\\binom{9}{4}", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "_", "\\text{a}", "\x00", "'",
             "\ud800"]

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(parts), min_size=2, max_size=14).map("".join),
           st.sampled_from(["x^2", "\\frac{x}{3}", "(0,1]", "\\{1,2\\}"]))
    def run(text, answer):
        assert rewards.verify_answer(f"\\boxed{{{text}}}", answer) in (0, 1)

    run()


if __name__ == "__main__":
    name, count = sys.argv[1], int(sys.argv[2])
    began = time.time()
    if name == "symbolic":
        symbolic_run(count)
        stopped = rewards.math_verify.stopped
        print(f"{count} answers in {time.time() - began:.0f} s, math_verify stopped {stopped} times")
    else:
        without_math_verify()
        if name == "hypothesis":
            tried = hypothesis_run(count)
            print(f"{tried} inputs, each also repeated to 64 kB, in {time.time() - began:.0f} s; slowest:")
            for target, (seconds, text) in slowest.items():
                print(f"  {target:<13} {1000 * seconds:6.1f} ms  {text!r}")
        elif name == "atheris":
            atheris_run(count)
        else:
            sys.exit(f"{name}: hypothesis, atheris or symbolic")
