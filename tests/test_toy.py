"""lab/toy.py: the examples of the laptop's world, their files, and the hidden gold of an answer."""
import json
import random
import zlib

import pytest

import data
from data import KINDS, Group, Prompt
from infra.ranks import InputError
from lab import toy
from rewards import kendall_tau, verify_answer

SPLITS = ("train", "heldout")
CHECKSUMS = {"preference": 2395418943, "reasoning": 4083666486, "instruction": 2204038679}  # of 64 held-out examples


# ---- the examples ----

def test_examples_are_those_of_all_figures_reported_so_far():
    """The base was taught these, and the laptop's results were measured on them, but for 11 of 4,096 pairs that had one
    text twice. No random state reaches them."""
    random.seed(1)
    found = []
    for split in SPLITS:
        for n in (0, 2, 8):
            found += toy.records("preference", split, 300, n)
        found += toy.records("reasoning", split, 300) + toy.records("instruction", split, 300)
    assert zlib.crc32(json.dumps(found, sort_keys=True).encode()) == 273729782


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_heldout_share_no_item(kind):
    texts = {}
    for split in SPLITS:
        questions, answers = set(), set()
        for record in toy.records(kind, split, 3000, n=5):
            questions.add(data.READERS[kind](record).instruction)
            answers.update(record.get("responses", []))
            if kind == "instruction":  # a worked sum is no item: another question may need the same
                answers.add(record["worked"])
        texts[split] = questions, answers
    for train, heldout in zip(texts["train"], texts["heldout"]):
        assert not train & heldout
    assert len(texts["train"][0]) > 150


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [0, 2])
def test_length_alone_does_not_tell_the_better_response(n, split):
    agreement = 0.0
    for record in toy.records("preference", split, 2000, n):
        agreement += kendall_tau(list(map(len, record["responses"])), record["scores"], "strict") / 2000
    assert abs(agreement) < 0.1


@pytest.mark.parametrize("split", SPLITS)
def test_the_truth_is_right_and_hidden_gold_sees_every_flaw(split):
    found = {}
    for record in toy.records("preference", split, 1000, 5):
        _, check = toy.read_instruction(record["prompt"])
        for text, level in zip(record["responses"], record["scores"]):
            found.setdefault(int(level), []).append(toy.measure(record["prompt"], text))
            assert level not in (toy.GOOD, toy.BREAKS) or toy.complies(check, text) == (level == toy.GOOD)

    def share(level, name):
        return sum(gold[name] for gold in found[level]) / len(found[level])

    assert share(toy.GOOD, "all four") == 1
    assert share(toy.OTHER_TOPIC, "on topic") < 0.05 and share(toy.BREAKS, "keeps the constraint") == 0
    assert share(toy.CUT, "whole") < 0.2  # a cut at a full stop leaves a whole text
    assert share(toy.SALAD, "in order") < 0.2 and share(toy.SALAD, "whole") < 0.2


@pytest.mark.parametrize("check, good, bad", [
    ("", "Owls hunt at night.", "Owls."),
    ("sentences:1", "Owls hunt!", "Owls hunt. They fly."),
    ("sentences:2", "Owls hunt. They fly.", "Owls hunt. They fly"),
    ("lower", "owls hunt.", "Owls hunt."),
    ("upper", "OWLS HUNT.", "OWLS hunt."),
    ("items:3", "- a\n- b\n- c\n", "Here:\n- a\n- b\n- c"),
    ("contains:trees", "Old Trees fall.", "Old treetops fall."),
    ("avoids:trees", "Old treetops fall.", "Old TREES fall."),
    ("at_most:3", "Owls hunt mice.", "Owls hunt mice often."),
    ("at_least:3", "Owls hunt mice.", "Owls hunt."),
    ("ends:!", "Owls hunt!", "Owls! Hunt."),
    ("starts:well", "Well, owls hunt.", "Owls hunt well."),
])
def test_complies(check, good, bad):
    assert toy.complies(check, good) and not toy.complies(check, bad)
    assert not toy.complies(check, " \n") and not toy.complies(check, "...")


@pytest.mark.parametrize("text, missing", [
    ("Dogs need a walk.", []), ("A dog needs a walk.", []), ("Cats need a walk.", ["on topic"]),
    ("Dogs need a", ["whole"]), ("need Dogs walk.", ["in order"]), ("Dogs need a.walk.", ["in order"]),
    ("", list(toy.GOLD)),
])
def test_hidden_gold_and_what_is_measured_of_it(text, missing):
    found = toy.measure("Tell me about dogs.", text)
    assert [name for name in toy.GOLD if not found[name]] == missing
    assert found["on topic, whole, in order"] == found["all four"] == (not missing)
    for unknown in ("Tell me about quarks.", "Please tell me about dogs.", "", "Tell me about dogs"):
        assert toy.measure(unknown, text) is None


def test_a_demonstrators_worked_answers_are_right_and_flawed_ones_wrong():
    for record in toy.records("reasoning", "train", 800):
        assert [verify_answer(record[name], record["answer"]) for name in ("worked", "flawed")] == [1, 0]
    good = 0
    for record in toy.records("instruction", "train", 800):
        assert toy.measure(record["instruction"], record["worked"])["all four"]
        good += toy.measure(record["instruction"], record["flawed"])["all four"]
    assert good < 40  # a text that is cut at a full stop is whole


# ---- files and commands ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the command writes, and what it prints."""
    made = tmp_path_factory.mktemp("world") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "FOLDER", made)
        toy.main([])
    return made


def test_training_files_hold_the_examples_without_a_demonstrators_answers(folder):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert files == {f"{part}{flag}.jsonl" for part in ("", "heldout/") for flag in data.FLAGS.values()}
    for kind, flag in data.FLAGS.items():
        path, examples = folder / f"{flag}.jsonl", toy.records(kind, "train", 4096, 2)
        assert data.load_source(kind, str(path)) == ([data.READERS[kind](example) for example in examples], {})
        assert '"worked"' not in path.read_text() and '"flawed"' not in path.read_text()


def test_heldout_files_begin_with_the_rows_of_all_figures_reported_so_far(folder):
    """None twice; pairs better first; instructions with a constraint. As far as 64 rows, the old measurements."""
    for kind, flag in data.FLAGS.items():
        prompts, _ = data.load_source(kind, str(folder / "heldout" / f"{flag}.jsonl"))
        assert data.checksum(prompts[:64]) == CHECKSUMS[kind] and 200 < len(prompts) == len(set(prompts)) <= 256
        if kind == "preference":
            assert prompts == list(map(data.better_first, prompts))
        if kind == "instruction":
            assert all(toy.read_instruction(prompt.instruction)[1] for prompt in prompts)


def test_the_gold_of_a_run(tmp_path):
    rows = [(0, "reasoning", "1 + 1?", ["2", "3"], [1.0, 0.0]), (1, "instruction", "Say hi.", ["hi", "ho"], [1.0, 2.0])]
    for ask, rewards in ((".", [9.0, 2.0]), (".", None), (" in capital letters only.", [2.0, 2.0])):
        rows.append((1, "instruction", "Tell me about dogs" + ask, ["Dogs bark at cats.", "Cats bark at"], rewards))
    with open(tmp_path / "rollouts.jsonl", "w") as out:
        for step, kind, asked, texts, rewards in rows:
            group = Group(0, Prompt(kind, asked, answer="2"), [], texts=texts, rewards=rewards)
            out.write(json.dumps(group.to_record(step)) + "\n")
    assert toy.gold_of_run(tmp_path) == [
        {"step": 0, "gold": None, "all_four": None, "judge_tau": None},
        {"step": 1, "gold": 0.5, "all_four": 2 / 6, "judge_tau": 0.5}]
    with pytest.raises(InputError, match="runs/"):
        toy.gold_of_run("nowhere")
    with pytest.raises(InputError, match="heldout --model"):
        toy.main(["rows"])
