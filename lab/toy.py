"""The laptop's world: small examples of all three kinds, made by code, so that their truth is known.

    python -m lab.toy                         writes toy/*.jsonl for training and toy/heldout/*.jsonl for measuring
    python -m lab.toy heldout --model M       eval.py heldout on the latter; other flags go to eval.py
    python -m lab.toy gold runs/NAME          how good the open answers of each step are, and how true the self-scores

An example depends on its split, kind and number alone. The two splits share no topic and no question.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import zlib
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import data
from infra.ranks import InputError, stop
from infra.runs import write_whole
from rewards import kendall_tau, mean

FOLDER = Path(os.path.relpath(Path(__file__).resolve().parent.parent / "toy"))  # as a message shows it
TRAINING, HELDOUT = 4096, 256  # examples of each kind in a file; of held-out ones at most
# The forms of an instruction: its wording, and its constraint as `complies` checks it. Examples fill in {word}.
FORMS = (
    ("Tell me about {topic}.", ""),
    ("What should a child know about {topic}?", ""),
    ("Describe {topic} in one sentence.", "sentences:1"),
    ("Write exactly two sentences about {topic}.", "sentences:2"),
    ("Tell me about {topic} in lower case letters only.", "lower"),
    ("Tell me about {topic} in capital letters only.", "upper"),
    ("List exactly three facts about {topic}, each on a line that starts with a dash.", "items:3"),
    ("Write about {topic} and use the word {word}.", "contains:{word}"),
    ("Write about {topic} without the word {word}.", "avoids:{word}"),
    ("Write about {topic} in at most 10 words.", "at_most:10"),
    ("Write at least 14 words about {topic}.", "at_least:14"),
    ("Write about {topic} and end with an exclamation mark.", "ends:!"),
    ("Tell me about {topic} and start with the word Well.", "starts:well"),
)
# The true score of a response: shuffled words, another topic, cut short, breaks the constraint alone, good.
SALAD, OTHER_TOPIC, CUT, BREAKS, GOOD = range(5)


@lru_cache(maxsize=None)
def topics(split: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(topic, its four sentences) of one split. Every fourth line of topics.txt is held out: training never sees it."""
    found = []
    lines = Path(__file__).with_name("topics.txt").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        name, _, text = line.partition(": ")
        if (i % 4 == 3) == (split == "heldout"):
            found.append((name, tuple(re.split(r"(?<=\.) ", text))))
    return tuple(found)


def complies(check: str, text: str) -> bool:
    """Whether a text keeps the constraint of an instruction. For evaluation alone: it never becomes a reward."""
    name, _, wanted = check.partition(":")
    number = int(wanted) if wanted.isdecimal() else 0
    text = text.strip()
    words = [word.lower() for word in re.findall(r"[\w']+", text)]
    kept = {
        "": len(words) > 2,
        "sentences": len(re.split(r"(?<=[.!?])\s+", text)) == number and text[-1:] in ".!?",
        "lower": text == text.lower(),
        "upper": text == text.upper(),
        "items": [line[:2] for line in text.splitlines()] == ["- "] * number,
        "contains": wanted.lower() in words,
        "avoids": wanted.lower() not in words,
        "at_most": len(words) <= number,
        "at_least": len(words) >= number,
        "ends": text.endswith(wanted),
        "starts": text.lower().startswith(wanted),
    }
    return bool(words) and kept[name]  # an empty text complies with nothing


# ------------------------------------------------------------------------------- hidden gold

GOLD = ("on topic", "whole", "in order", "keeps the constraint")  # what makes an answer to an instruction good


@lru_cache(maxsize=4096)
def read_instruction(text: str) -> tuple[str, str] | None:
    """(topic, constraint) of an instruction of this world, read from its words; None for any other text.

    >>> read_instruction("Write about the moon and use the word tides."), read_instruction("Say hi.")
    (('the moon', 'contains:tides'), None)
    """
    names = dict(topics("train") + topics("heldout"))
    for wording, check in FORMS:
        pattern = re.escape(wording).replace(r"\{topic\}", "(?P<topic>.+)").replace(r"\{word\}", "(?P<word>[a-z]+)")
        found = re.fullmatch(pattern, text)
        if found and found["topic"] in names:
            return found["topic"], check.format(**found.groupdict())
    return None


def stem(word: str) -> str:
    """A word without its ending, roughly: "dogs" and "dog", "volcano" and "volcanoes" are one."""
    return word.lower().removesuffix("s")[:5]


def measure(instruction: str, text: str) -> dict[str, bool] | None:
    """The parts of GOLD that an answer has, the first three together, and all four; None for an instruction that is
    not of this world.

    Hidden: it measures what self-rewards do, and never becomes a reward. An answer is on topic when it names its
    topic, whole when it ends as a sentence does, and in order when all its sentences begin with a capital letter
    (not asked of an answer in lower case) and no word follows a full stop without a blank.

    >>> list(measure("Tell me about dogs.", "Cats need every").values())
    [False, False, True, True, False, False]
    """
    read, text = read_instruction(instruction), text.strip()
    if read is None:
        return None
    topic, check = read
    stems = {stem(word) for word in re.findall(r"[A-Za-z]+", text)}
    names = {stem(word) for word in topic.split() if word != "the"}
    sentences = re.split(r"(?<=[.!?])\s+|\n", re.sub(r"^- ", "", text, flags=re.MULTILINE))
    capital = check == "lower" or all(sentence[:1].isupper() for sentence in sentences)
    on_topic, whole = names <= stems, text[-1:] in tuple(".!?")
    in_order, kept = capital and not re.search(r"[.!?]\w", text), complies(check, text)
    good = on_topic and whole and in_order
    return {**dict(zip(GOLD, (on_topic, whole, in_order, kept))), "on topic, whole, in order": good,
            "all four": good and kept}


# ------------------------------------------------------------------------------- examples


def write_answer(rng: random.Random, sentences, style: str) -> str:
    """One to three of a topic's sentences, in the style of one form."""
    name = style.partition(":")[0]
    picked = rng.sample(sentences, 3 if name == "items" else rng.randint(1, 3))
    text = " ".join(picked)
    styles = {
        "items": "\n".join("- " + line for line in picked),
        "lower": text.lower(),
        "upper": text.upper(),
        "ends": text[:-1] + "!",
        "starts": "Well, " + text[0].lower() + text[1:],
    }
    return styles.get(name, text)


def write_response(rng: random.Random, level: int, name: str, sentences, check: str, split: str) -> str:
    """One response of a known level, such as CUT. Tries until `complies` agrees with the level."""
    for _ in range(200):
        source, style = sentences, check
        if level == OTHER_TOPIC:
            source = rng.choice([other for topic, other in topics(split) if topic != name])
        if level == BREAKS:  # the right topic, in the form of another instruction
            style = rng.choice(FORMS)[1]
        text = write_answer(rng, source, style)
        words = text.split()
        if level == SALAD:
            return " ".join(rng.sample(words, len(words)))
        if level == CUT and len(words) >= 7:  # keeps four words or more: fewer could stand in both splits
            return " ".join(words[: rng.randint(4, len(words) - 3)])
        if level == OTHER_TOPIC:
            return text
        if level in (BREAKS, GOOD) and complies(check, text) == (level == GOOD):
            return text
    raise ValueError(f"no text of level {level} for the constraint {check!r} about {name}")


def choose_form(rng: random.Random, split: str):
    """A random topic and form: (topic, its sentences, instruction, check)."""
    name, sentences = rng.choice(topics(split))
    wording, check = rng.choice(FORMS)
    words = re.findall(r"\b[a-z]{5,}\b", " ".join(sentences))
    word = rng.choice([word for word in words if word not in name])
    return name, sentences, wording.format(topic=name, word=word), check.format(word=word)


def preference(rng: random.Random, split: str, n: int = 0) -> dict:
    """One good response and n - 1 flawed ones, so the order is known: the true score is the level.

    n = 0 draws 2 to 5, half of the time 2. Length must not tell the better one. So a coin says whether longer
    responses shall be better, and they are drawn again, up to 40 times, until they agree with the coin and are not all
    one text.
    """
    n = n or rng.choice((2, 2, 2, 3, 4, 5))
    name, sentences, wording, check = choose_form(rng, split)
    flaws = [SALAD, OTHER_TOPIC, CUT, BREAKS] if check else [SALAD, OTHER_TOPIC, CUT]
    repeated = rng.choices(flaws, k=max(0, n - 1 - len(flaws)))  # for n above 5
    levels = [GOOD] + rng.sample(flaws, n - 1 - len(repeated)) + repeated
    rng.shuffle(levels)
    longer_shall_win = rng.random() < 0.5
    for _ in range(40):
        responses = [write_response(rng, level, name, sentences, check, split) for level in levels]
        agreement = kendall_tau(list(map(len, responses)), levels, "strict")
        if len(set(responses)) > 1 and (agreement == 0 or (agreement > 0) == longer_shall_win):
            break
    return {"prompt": wording, "responses": responses, "scores": list(map(float, levels))}


def instruction(rng: random.Random, split: str) -> dict:
    """A short open-ended instruction, most with a constraint that `complies` can check."""
    name, sentences, wording, check = choose_form(rng, split)
    worked = write_response(rng, GOOD, name, sentences, check, split)
    level = rng.choice((OTHER_TOPIC, CUT, BREAKS) if check else (OTHER_TOPIC, CUT))  # each of them is fluent
    flawed = write_response(rng, level, name, sentences, check, split)
    return {"instruction": wording, "worked": worked, "flawed": flawed}


def reasoning(rng: random.Random, split: str) -> dict:
    """A question on one rung of a ladder. A hash of what it asks decides the split.

    0, 1, 2: one-digit sums, differences, products; 3: the largest of four; 4: two-digit sums; 5, 6: word problems.
    """
    level = rng.randrange(7)
    while True:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        rng.randint(1, 9)  # moves the generator on, so that all examples stay as they are
        who = rng.choice(("Tom", "Mia", "Ben", "Ana", "Leo", "Eva", "Sam", "Zoe"))
        what = rng.choice(("apples", "books", "coins", "pens", "eggs", "cards", "shells", "stamps"))
        if level == 4:
            a, b = rng.randint(10, 49), rng.randint(10, 49)
        worked, answer, question = f"{a} + {b}", a + b, ""
        asked = f"{level}/{what if level > 4 else ''}/{sorted((a, b))}"  # must not stand in both splits
        if level == 1:
            a, b = max(a, b), min(a, b)
            worked, answer = f"{a} - {b}", a - b
        elif level == 2:
            worked, answer = f"{a} * {b}", a * b
        elif level == 3:
            numbers = rng.sample(range(1, 100), 4)
            listed = ", ".join(map(str, numbers))
            worked, answer, asked = f"max({listed})", max(numbers), f"3//{listed}"
            question = f"Which number is the largest: {listed}?"
        elif level == 5 and rng.random() < 0.5:
            question = f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?"
        elif level == 5:
            worked, answer = f"{a} * {b}", a * b
            question = f"{who} buys {a} boxes with {b} {what} in each. How many {what} does {who} have?"
        elif level == 6:
            c = rng.randint(1, a + b)
            worked, answer = f"{a} + {b} - {c}", a + b - c
            question = f"{who} has {a} {what}, finds {b} more and gives {c} away. How many {what} are left?"
        if (zlib.crc32(asked.encode()) % 5 == 0) == (split == "heldout"):
            wrong = answer + rng.choice((-3, -2, -1, 1, 2, 3, 10))
            return {"question": question or f"What is {worked}?", "answer": str(answer),
                    "worked": f"{worked} = \\boxed{{{answer}}}", "flawed": f"{worked} = \\boxed{{{wrong}}}"}


def records(kind: str, split: str, count: int, n: int = 0) -> list[dict]:
    """The first `count` examples of one kind and split. n: how many responses a preference has; 0 draws 2 to 5."""
    make = {"preference": preference, "reasoning": reasoning, "instruction": instruction}[kind]
    options = [n] if kind == "preference" else []
    return [make(random.Random(f"{split}/{kind}/{i}"), split, *options) for i in range(count)]


# ------------------------------------------------------------------------------- commands


def heldout_records(kind: str) -> list[dict]:
    """Examples to measure on, none twice: a repeated one is no independent trial. Instructions have a constraint, and
    pairs stand better first."""
    found = {}
    for record in records(kind, "heldout", 8 * HELDOUT, 2):
        prompt = data.READERS[kind](record)
        if kind == "instruction" and not read_instruction(prompt.instruction)[1]:
            continue
        if kind == "preference" and record["scores"][0] < record["scores"][1]:
            record["responses"].reverse()
            record["scores"].reverse()
        found.setdefault((prompt.instruction, prompt.responses), record)
    return list(found.values())[:HELDOUT]


def write_file(path: Path, examples: list[dict]) -> None:
    """Without the answers of a demonstrator, `worked` and `flawed`, which the warm start alone may see."""
    text = ""
    for example in examples:
        text += json.dumps({name: value for name, value in example.items() if name not in ("worked", "flawed")}) + "\n"
    write_whole(path, text)
    print(f"{path}: {len(examples)} examples", flush=True)


def gold_of_run(run: Path) -> list[dict]:
    """{step, gold, all_four, judge_tau} of each step of a run; None where a step has nothing to measure.

    gold is the share of open answers that are on topic, whole and in order; all_four of those that keep the
    constraint too. judge_tau is the tau of self-scores with the number of parts of GOLD that an answer has, a mean
    over the judged groups whose answers differ in it. A blind judge has 0.
    """
    path, repairs, figures = Path(run) / "rollouts.jsonl", [], []
    if not path.is_file():
        raise InputError(f"{run}: no run here (no rollouts.jsonl); give a folder such as runs/demo")
    for step, pairs in groupby(data.read_groups(path, repairs), key=lambda pair: pair[0]):
        marks, taus = [], []
        for _, group in pairs:
            found = [measure(group.prompt.instruction, text) for text in group.texts]
            if group.prompt.kind != "instruction" or None in found:
                continue
            marks += found
            truth = [sum(parts[name] for name in GOLD) for parts in found]
            if group.rewards is not None and len(set(truth)) > 1:
                taus.append(kendall_tau(group.rewards, truth, "strict"))
        figures.append({"step": step, "gold": mean(parts["on topic, whole, in order"] for parts in marks),
                        "all_four": mean(parts["all four"] for parts in marks), "judge_tau": mean(taus)})
    for repair in repairs:
        print(repair, file=sys.stderr)
    return figures


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            for kind, flag in data.FLAGS.items():
                write_file(FOLDER / f"{flag}.jsonl", records(kind, "train", TRAINING, 2))
                write_file(FOLDER / "heldout" / f"{flag}.jsonl", heldout_records(kind))
        case ["heldout", *flags]:
            import eval  # of the root, with its sampler

            files = []
            for flag in data.FLAGS.values():
                files += [f"--{flag}", str(FOLDER / "heldout" / f"{flag}.jsonl")]
            eval.main(["heldout", *files, *flags], measure=measure)
        case _:
            raise InputError("python -m lab.toy takes nothing, or `heldout --model M`")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        stop(error)
