"""The laptop's world: small examples of all three kinds, made by code, so that their truth is known.

    python -m lab.toy                         writes toy/*.jsonl for training and toy/heldout/*.jsonl for measuring
    python -m lab.toy heldout --model M       eval.py heldout on the latter; other flags go to eval.py

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
from infra.ranks import InputError, one_line_errors
from infra.runs import write_whole
from rewards import mean

FOLDER = Path(os.path.relpath(Path(__file__).resolve().parent.parent / "toy"))  # as a message shows it
TRAINING, HELDOUT = 4096, 256  # examples of each kind in a file, at most
# The forms of an instruction: its constraint, as `complies` checks it, and its two wordings.
FORMS = {
    "sentences:1": ("Describe {topic} in one sentence.", "Write a single sentence about {topic}."),
    "items:3": ("List three facts about {topic}, each on a line that starts with a dash.",
                "Give three facts about {topic} as a list with dashes."),
    "ends:!": ("Write about {topic} and end with an exclamation mark.",
               "Tell me about {topic}, with an exclamation mark at the end."),
    "starts:well": ("Tell me about {topic} and start with the word Well.",
                    "Write about {topic}. Begin with the word Well."),
}
# The true score of a response: another topic, cut short, breaks the constraint alone, good.
OTHER_TOPIC, CUT, BREAKS, GOOD = range(4)
# How often the demonstrator errs whom the base imitates last, so that its samples are worse than its greedy answer.
ERRORS = {"preference": 0.2, "reasoning": 0.3, "instruction": 0.6}


@lru_cache(maxsize=None)
def topics(split: str) -> dict[str, tuple[str, ...]]:
    """{topic: its four sentences} of one split. Every fourth line of topics.txt is held out: training never sees it."""
    found = {}
    lines = Path(__file__).with_name("topics.txt").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        name, _, text = line.partition(": ")
        if (i % 4 == 3) == (split == "heldout"):
            found[name] = tuple(re.split(r"(?<=\.) ", text))
    return found


def complies(check: str, text: str) -> bool:
    """Whether a text keeps the constraint of an instruction. For evaluation alone: it never becomes a reward."""
    name, _, wanted = check.partition(":")
    number = int(wanted) if wanted.isdecimal() else 0
    text = text.strip()
    kept = {
        "sentences": len(re.split(r"(?<=[.!?])\s+", text)) == number and text[-1:] in ".!?" and text[:1] != "-",
        "items": [line[:2] for line in text.splitlines()] == ["- "] * number,
        "ends": text.endswith(wanted),
        "starts": text.lower().startswith(wanted),
    }
    return bool(re.search(r"\w", text)) and kept[name]  # an empty text complies with nothing


# ------------------------------------------------------------------------------- hidden gold

GOLD = ("on topic", "whole", "in order", "keeps the constraint")  # what makes an answer to an instruction good


@lru_cache(maxsize=4096)
def read_instruction(text: str) -> tuple[str, str] | None:
    """(topic, constraint) of an instruction of this world, read from its words; None for any other text.

    >>> read_instruction("Describe the moon in one sentence."), read_instruction("Say hi.")
    (('the moon', 'sentences:1'), None)
    """
    names = topics("train") | topics("heldout")
    for check, wordings in FORMS.items():
        for wording in wordings:
            before, after = wording.split("{topic}")
            topic = text.removeprefix(before).removesuffix(after)
            if topic in names and text == before + topic + after:
                return topic, check
    return None


def stem(word: str) -> str:
    """A word without its ending, roughly: "dogs" and "dog", "volcano" and "volcanoes" are one."""
    return word.lower().removesuffix("s")[:5]


def measure(instruction: str, text: str) -> dict[str, bool] | None:
    """The parts of GOLD that an answer has, the first three together, and all four; None for an instruction that is
    not of this world.

    Hidden: it measures what self-rewards do, and never becomes a reward. An answer is on topic when it names its
    topic, whole when it ends as a sentence does, and in order when all its sentences begin with a capital letter and
    no word follows a full stop without a blank.

    >>> list(measure("Write a single sentence about dogs.", "Cats need every").values())
    [False, False, True, False, False, False]
    """
    read, text = read_instruction(instruction), text.strip()
    if read is None:
        return None
    topic, check = read
    stems = {stem(word) for word in re.findall(r"[A-Za-z]+", text)}
    names = {stem(word) for word in topic.split() if word != "the"}
    sentences = re.split(r"(?<=[.!?])\s+|\n", re.sub(r"^- ", "", text, flags=re.MULTILINE))
    capital = all(sentence[:1].isupper() for sentence in sentences)
    on_topic = names <= stems
    whole = text[-1:] in tuple(".!?")
    in_order = capital and not re.search(r"[.!?]\w", text)
    kept = complies(check, text)
    good = on_topic and whole and in_order
    return {**dict(zip(GOLD, (on_topic, whole, in_order, kept))), "on topic, whole, in order": good,
            "all four": good and kept}


def is_good(instruction: str, text: str) -> bool:
    return (measure(instruction, text) or {}).get("all four", False)


# ------------------------------------------------------------------------------- examples


def write_answer(sentences, check: str, number: int) -> str:
    """The first of a topic's sentences, `number` of them where the constraint leaves it open, in the form it asks."""
    name, _, wanted = check.partition(":")
    picked = sentences[: int(wanted) if wanted.isdecimal() else number]
    text = " ".join(picked)
    styles = {
        "items": "\n".join("- " + line for line in picked),
        "ends": text[:-1] + "!",
        "starts": "Well, " + text[0].lower() + text[1:],
    }
    return styles.get(name, text)


def cut_short(rng: random.Random, text: str) -> str:
    """The text up to a word in its midst: four words or more."""
    ends = [found.start() for found in re.finditer(r"(?<=\w) ", text)]
    return text[: rng.choice(ends[3:])]


def contrast(rng: random.Random, split: str, level: int, turned: bool) -> tuple[str, ...]:
    """(instruction, its good response, one of the level BREAKS, OTHER_TOPIC or CUT).

    The second response to one instruction is the good one to another, `turned`, whose constraint or topic differs. So
    who reads the responses alone is right as often as a coin. A pair with a cut response is turned by its lengths.
    """
    while True:
        name, other = rng.sample(list(topics(split)), 2)
        check, form = rng.sample(list(FORMS), 2)
        second = {BREAKS: (name, form), OTHER_TOPIC: (other, check), CUT: (name, check)}[level]
        same = rng.random() < 0.5
        asked, texts, drawn = [], [], []
        for (topic, constraint), number in zip([(name, check), second], (rng.randint(1, 3), rng.randint(1, 3))):
            drawn.append(rng.sample(topics(split)[topic], 4))
            sentences = drawn[0 if level == BREAKS and same else -1]  # the same ones: only their form differs
            asked.append(rng.choice(FORMS[constraint]).format(topic=topic))
            texts.append(write_answer(sentences, constraint, number))
        if level == CUT and len(texts[1].split()) > 6:
            texts[1] = cut_short(rng, texts[1])
            first, other = map(len, texts)
            if first != other and turned == (first > other):
                return asked[0], *texts
        elif level != CUT and not is_good(asked[0], texts[1]) and not is_good(asked[1], texts[0]):
            if turned:
                return asked[1], *reversed(texts)
            return asked[0], *texts


def preference(number: int, split: str, levels=(BREAKS,) * 3 + (OTHER_TOPIC, CUT)) -> dict:
    """Example `number` of two responses, the better one first. Examples 2k and 2k + 1 are a contrast set."""
    rng = random.Random(f"{split}/preference/{number // 2}")
    level = rng.choice(levels)
    asked, good, bad = contrast(rng, split, level, turned=number % 2 == 1)
    return {"prompt": asked, "responses": [good, bad], "scores": [float(GOOD), float(level)]}


@lru_cache(maxsize=None)
def instructions(split: str) -> list[tuple[str, str, str]]:
    """All (topic, constraint, wording) of a split, shuffled."""
    asked = []
    for topic in topics(split):
        for check, wordings in FORMS.items():
            asked += [(topic, check, wording.format(topic=topic)) for wording in wordings]
    return random.Random(split).sample(asked, len(asked))


def instruction(number: int, split: str) -> dict:
    """An open-ended instruction, none twice before all have come; with a good answer and a bad one."""
    asked = instructions(split)
    topic, check, text = asked[number % len(asked)]
    rng = random.Random(f"{split}/instruction/{number}")
    worked = flawed = write_answer(rng.sample(topics(split)[topic], 4), check, rng.randint(1, 3))
    while is_good(text, flawed):  # it breaks the constraint, or one in five is cut short
        form = rng.choice(list(FORMS))
        flawed = write_answer(rng.sample(topics(split)[topic], 4), form, rng.randint(1, 3))
        if form == check and rng.random() < 0.8 and len(flawed.split()) > 6:
            flawed = cut_short(rng, flawed)
    return {"instruction": text, "worked": worked, "flawed": flawed}


def worked_ranking(truth) -> str:
    """The score line that a ranking should get: its true ranks, spread evenly over the scores 9 to 2.

    >>> worked_ranking((20.0, 0.0, 10.0, 0.0))
    '<scores>9, 2, 6, 2</scores>'
    """
    ranks = sorted(set(truth), reverse=True)
    step = 7 / max(1, len(ranks) - 1)
    return data.score_line([round(9 - step * ranks.index(score)) for score in truth])


def text_question(rng: random.Random, split: str) -> tuple[str, ...]:
    """(question, worked answer up to its box, answer, a wrong one) about a text of the split."""
    topic = rng.choice(list(topics(split)))
    number, check = rng.randint(1, 3), rng.choice(["ends:!", "starts:well", "items:3", ""])
    text = write_answer(rng.sample(topics(split)[topic], 4), check, number)
    words = re.findall(r"\w+", text)
    if check == "items:3":
        kept = rng.randint(1, 3)
        text = "\n".join(line[2 * (i >= kept) :] for i, line in enumerate(text.splitlines()))
        return f"How many lines start with a dash?\n{text}", "Lines with a dash: ", str(kept), str(kept % 3 + 1)
    if rng.random() < 0.5:
        return f"Which word is the first?\n{text}", "The first word is ", words[0], words[1]
    return f"How many sentences are here?\n{text}", "Sentences: ", str(number), str(number % 3 + 1)


def reasoning(number: int, split: str) -> dict:
    """A sum, a difference, a product, the largest of four, a short story, or in one of three a question about a text.

    A hash of the numbers that a question asks about decides its split; a text is of the split's topics.
    """
    rng = random.Random(f"{split}/reasoning/{number}")
    level = rng.randrange(9)
    if level > 5:
        question, worked, answer, wrong = text_question(rng, split)
        return {"question": question, "answer": answer, "worked": f"{worked}\\boxed{{{answer}}}",
                "flawed": f"{worked}\\boxed{{{wrong}}}"}
    while True:
        a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(10, 49)
        who, what = rng.choice(("Tom", "Mia", "Ben", "Ana")), rng.choice(("apples", "books", "coins", "pens"))
        numbers = rng.sample(range(10, 100), 4)
        listed = ", ".join(map(str, numbers))
        question, worked, answer = (
            ("", f"{c} + {a * b}", c + a * b),
            ("", f"{c + a} - {b}", c + a - b),
            ("", f"{a} * {b}", a * b),
            (f"Which number is the largest: {listed}?", f"max({listed})", max(numbers)),
            (f"{who} buys {a} boxes with {b} {what} in each. How many {what} does {who} have?", f"{a} * {b}", a * b),
            (f"{who} has {c} {what}, finds {a} more and gives {b} away. How many {what} are left?",
             f"{c} + {a} - {b}", c + a - b),
        )[level]
        if (zlib.crc32(re.sub(r"\D+", " ", worked).encode()) % 5 == 0) == (split == "heldout"):
            wrong = answer + rng.choice((-3, -2, -1, 1, 2, 3, 10))
            return {"question": question or f"What is {worked}?", "answer": str(answer),
                    "worked": f"{worked} = \\boxed{{{answer}}}", "flawed": f"{worked} = \\boxed{{{wrong}}}"}


MAKERS = {"preference": preference, "reasoning": reasoning, "instruction": instruction}


def records(kind: str, split: str, count: int, first: int = 0) -> list[dict]:
    """`count` examples of one kind and split, from number `first` on."""
    return [MAKERS[kind](number, split) for number in range(first, first + count)]


# ------------------------------------------------------------------------------- commands


def training_records(kind: str) -> list[dict]:
    """Examples for a run. Of the instructions, which are few, the second half."""
    if kind == "instruction":
        half = len(instructions("train")) // 2
        return records(kind, "train", half, first=half)
    return records(kind, "train", TRAINING)


def heldout_records(kind: str, levels=()) -> list[dict]:
    """Examples to measure on, none twice. The first half has one row of each contrast set, as both are one trial."""
    found = {}
    for number in range(2 * HELDOUT):
        record = preference(number, "heldout", levels) if levels else MAKERS[kind](number, "heldout")
        prompt = data.READERS[kind](record)
        found.setdefault((prompt.instruction, prompt.responses), record)
    halves = [], []
    for i, row in enumerate(list(found.values())[:HELDOUT]):
        turned = i // 2 % 2  # in every second set the turned row comes first
        halves[(i + turned) % 2].append(row)
    return halves[0] + halves[1]


def write_file(path: Path, examples: list[dict]) -> None:
    """Without the answers of a demonstrator, `worked` and `flawed`, which the teacher of the base alone may see."""
    text = ""
    for example in examples:
        shown = dict(example)
        for name in ("worked", "flawed"):
            shown.pop(name, None)
        text += json.dumps(shown) + "\n"
    write_whole(path, text)
    print(f"{path}: {len(examples)} examples", flush=True)


HELDOUT_SETS = {  # the flag of eval.py heldout -> its files in toy/heldout
    "preferences": ("constraints", "flaws", "bank"),
    "reasoning": ("reasoning",),
    "instructions": ("instructions",),
}


def write_all() -> None:
    for kind in MAKERS:
        write_file(FOLDER / f"{data.FLAGS[kind]}.jsonl", training_records(kind))
    home = FOLDER / "heldout"
    write_file(home / "constraints.jsonl", heldout_records("preference", (BREAKS,)))
    write_file(home / "flaws.jsonl", heldout_records("preference", (OTHER_TOPIC, CUT)))
    write_whole(home / "bank.jsonl", Path(__file__).with_name("bank.jsonl").read_text())  # the base's own answers
    write_file(home / "reasoning.jsonl", heldout_records("reasoning"))
    write_file(home / "instructions.jsonl", heldout_records("instruction"))


def gold_of_run(run: Path, repairs: list[str]) -> list[dict]:
    """{step, other_three, all_four} of each step of a run; None where a step has nothing to measure.

    other_three: share of open answers on topic, whole and in order; all_four: of those that keep the constraint, too.
    """
    path, figures = Path(run) / "rollouts.jsonl", []
    for step, pairs in groupby(data.read_groups(path, repairs), key=lambda pair: pair[0]):
        marks = []
        for _, group in pairs:
            if group.prompt.kind == "instruction" and read_instruction(group.prompt.instruction):
                marks += [measure(group.prompt.instruction, text) for text in group.texts]
        figures.append({
            "step": step,
            "other_three": mean(parts["on topic, whole, in order"] for parts in marks),
            "all_four": mean(parts["all four"] for parts in marks),
        })
    return figures


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            write_all()
        case ["heldout", *flags]:
            import eval  # of the root, with its sampler

            files = []
            for flag, names in HELDOUT_SETS.items():
                files += [f"--{flag}", *(str(FOLDER / "heldout" / f"{name}.jsonl") for name in names)]
            eval.main(["heldout", *files, *flags], measure=measure)
        case _:
            raise InputError("python -m lab.toy takes nothing, or `heldout --model M`")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
