"""lab/toy.py: the examples of the laptop's world, their files, and the hidden gold of an answer."""
import json
import random

import pytest

import data
from conftest import ROOT
from data import KINDS, Group, Prompt
from eval import longer_wins
from infra.ranks import InputError
from lab import toy
from rewards import verify_answer

SPLITS = ("train", "heldout")


# ---- the examples ----

def test_an_example_depends_on_its_split_kind_and_number_alone():
    random.seed(1)
    found = [toy.records(kind, split, 300) for split in SPLITS for kind in KINDS]
    random.seed(2)
    for kind, split in ((kind, split) for split in SPLITS for kind in KINDS):
        assert toy.records(kind, split, 10, first=290) == found.pop(0)[290:]


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_heldout_share_no_item(kind):
    texts = {}
    for split in SPLITS:
        questions, answers = set(), set()
        for record in toy.records(kind, split, 3000):
            questions.add(data.READERS[kind](record).instruction)
            answers.update(record.get("responses", []))
            if kind == "instruction":  # a worked sum is no item: another question may need the same
                answers.add(record["worked"])
        texts[split] = questions, answers
    for train, heldout in zip(texts["train"], texts["heldout"]):
        assert not train & heldout
    assert len(texts["train"][0]) > 150


@pytest.mark.parametrize("split", SPLITS)
def test_who_is_blind_to_the_instruction_is_right_as_often_as_a_coin(split):
    """The longer response wins in half of the pairs; and of each set of two responses with a broken constraint, or of
    two topics, each wins once, so that no feature of the responses alone tells the better one."""
    longer, winners = 0.0, {}
    for record in toy.records("preference", split, 2000):
        longer += longer_wins(data.READERS["preference"](record)) / 2000
        if record["scores"][1] != toy.CUT:
            winners.setdefault(frozenset(record["responses"]), []).append(record["responses"][0])
    assert longer == pytest.approx(0.5, abs=1e-9)
    for pair, won in winners.items():
        assert len(pair) == 2 and all(won.count(text) == len(won) / 2 for text in pair)


@pytest.mark.parametrize("split", SPLITS)
def test_the_truth_is_right_and_hidden_gold_sees_every_flaw(split):
    missing = {toy.OTHER_TOPIC: "on topic", toy.CUT: "whole"}
    for record in toy.records("preference", split, 1000):
        good, bad = (toy.measure(record["prompt"], text) for text in record["responses"])
        level = record["scores"][1]
        assert record["scores"][0] == toy.GOOD and good["all four"] and not bad["all four"]
        if level == toy.BREAKS:
            assert bad["on topic, whole, in order"] and not bad["keeps the constraint"]
        else:
            assert not bad[missing[level]]


@pytest.mark.parametrize("check, good, bad", [
    ("sentences:1", "Owls hunt!", "Owls hunt. They fly."),
    ("sentences:1", "Owls hunt.", "- Owls hunt."),
    ("sentences:2", "Owls hunt. They fly.", "Owls hunt. They fly"),
    ("items:3", "- a\n- b\n- c\n", "Here:\n- a\n- b\n- c"),
    ("ends:!", "Owls hunt!", "Owls! Hunt."),
    ("starts:well", "Well, owls hunt.", "Owls hunt well."),
])
def test_complies(check, good, bad):
    assert toy.complies(check, good) and not toy.complies(check, bad)
    assert not toy.complies(check, " \n") and not toy.complies(check, "...")


@pytest.mark.parametrize("text, missing", [
    ("Dogs need a walk!", []), ("A dog needs a walk!", []), ("Cats need a walk!", ["on topic"]),
    ("Dogs need a", ["whole", "keeps the constraint"]), ("need Dogs walk!", ["in order"]),
    ("Dogs need a.walk!", ["in order"]), ("", list(toy.GOLD)),
])
def test_hidden_gold_and_what_is_measured_of_it(text, missing):
    found = toy.measure("Write about dogs and end with an exclamation mark.", text)
    assert [name for name in toy.GOLD if not found[name]] == missing
    assert found["all four"] == (not missing)
    assert found["on topic, whole, in order"] == (not set(missing) & set(toy.GOLD[:3]))
    for unknown in ("Describe quarks in one sentence.", "Tell me about dogs.", "", "Write about dogs"):
        assert toy.measure(unknown, text) is None


def test_a_demonstrators_worked_answers_are_right_and_flawed_ones_wrong():
    for record in toy.records("reasoning", "train", 800):
        assert [verify_answer(record[name], record["answer"]) for name in ("worked", "flawed")] == [1, 0]
    for record in toy.records("instruction", "train", 800):
        worked, flawed = (toy.measure(record["instruction"], record[name]) for name in ("worked", "flawed"))
        assert worked["all four"] and not flawed["all four"]


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
    assert files == {f"{flag}.jsonl" for flag in data.FLAGS.values()} | {
        f"heldout/{name}.jsonl" for names in toy.HELDOUT_SETS.values() for name in names}
    for kind, flag in data.FLAGS.items():
        path, examples = folder / f"{flag}.jsonl", toy.training_records(kind)
        assert data.load_source(kind, str(path)) == ([data.READERS[kind](example) for example in examples], {})
        assert '"worked"' not in path.read_text() and '"flawed"' not in path.read_text()


def test_heldout_files_hold_no_row_twice_and_enough_of_each(folder):
    for flag, names in toy.HELDOUT_SETS.items():
        kind = next(kind for kind in KINDS if data.FLAGS[kind] == flag)
        for name in names:
            prompts, _ = data.load_source(kind, str(folder / "heldout" / f"{name}.jsonl"))
            assert (64 if name == "bank" else 128) <= len(prompts) == len(set(prompts)) <= toy.HELDOUT
            assert kind != "preference" or prompts == list(map(data.better_first, prompts))


def test_the_bank_is_labelled_by_hidden_gold_and_held_out():
    pairs = [json.loads(line) for line in (ROOT / "lab" / "bank.jsonl").read_text().splitlines()]
    for pair in pairs:
        golds = [sum(toy.measure(pair["prompt"], text)[name] for name in toy.GOLD) for text in pair["responses"]]
        assert golds == pair["scores"] and golds[0] > golds[1]
        assert toy.read_instruction(pair["prompt"])[0] in toy.topics("heldout")


def test_the_gold_of_a_run(tmp_path):
    rows = [(0, "reasoning", "1 + 1?", ["2", "3"], [1.0, 0.0]), (1, "instruction", "Say hi.", ["hi", "ho"], [1.0, 2.0])]
    for check, rewards in (("ends:!", [9.0, 2.0]), ("ends:!", None), ("starts:well", [2.0, 2.0])):
        asked = toy.FORMS[check][0].format(topic="dogs")
        rows.append((1, "instruction", asked, ["Dogs bark at cats!", "Cats bark at"], rewards))
    with open(tmp_path / "rollouts.jsonl", "w") as out:
        for step, kind, asked, texts, rewards in rows:
            group = Group(0, Prompt(kind, asked, answer="2"), [], texts=texts, rewards=rewards)
            out.write(json.dumps(group.to_record(step)) + "\n")
    assert toy.gold_of_run(tmp_path, []) == [
        {"step": 0, "other_three": None, "all_four": None},
        {"step": 1, "other_three": 0.5, "all_four": 2 / 6}]
    with pytest.raises(InputError, match="heldout --model"):
        toy.main(["rows"])
