"""What a user can get wrong, and the message: it names the file, line, field and value, and what to do."""
import json
import os
import subprocess
import sys

import pytest

import data
import urpo
from conftest import ROOT, free_port
from data import InputError
from urpo import Config, check_config

GOOD = {"preference": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "reasoning": {"question": "q", "answer": "2"}, "instruction": {"instruction": "q"}}


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- data ----

@pytest.mark.parametrize("kind, line, parts", [
    ("reasoning", '{"question": "q", ', ["not JSON", "column", "one JSON object a line"]),
    ("reasoning", '["q", "2"]', ["expected an object", "list"]),
    ("reasoning", '{"question": "q"}', ["no field 'answer or solution'", "--reasoning", "it has question"]),
    ("reasoning", '{"answer": "2"}', ["no field 'question or problem or prompt'", "it has answer"]),
    ("reasoning", '{"question": " ", "answer": "2"}', ["field 'question' is empty"]),
    ("reasoning", '{"question": "q", "answer": "1/0"}', ["field 'answer'", "unreadable answer '1/0'"]),
    ("reasoning", '{"question": "q", "answer": ""}', ["field 'answer'", "empty"]),
    ("reasoning", '{"prompt": "q", "reward_model": {}}', ["no field 'ground_truth'"]),
    ("preference", '{"prompt": "q", "chosen": "a"}', ["no field 'rejected'", "--preferences", "it has prompt, chosen"]),
    ("preference", '{"prompt": "q", "responses": ["a"], "scores": [1]}', ["'responses'", "1 response", "at least 2"]),
    ("preference", '{"prompt": "q", "responses": ["a"%s], "scores": [1]}' % (', "b"' * 8), ["9 responses", "most 8"]),
    ("preference", '{"prompt": "q", "responses": ["a", "b"], "scores": [1]}', ["'scores'", "1 scores for 2 responses"]),
    ("preference", '{"prompt": "q", "responses": ["a", "b"]}', ["'scores'", "two lists of equal length"]),
    ("preference", '{"prompt": "q", "responses": ["a", "b"], "scores": ["x", 1]}', ["'scores'", "finite numbers"]),
    ("preference", '{"prompt": "q", "responses": ["a", "b"], "scores": [NaN, 1]}', ["'scores'", "finite numbers"]),
    ("preference", '{"prompt": "", "chosen": "a", "rejected": "b"}', ["field 'prompt' is empty"]),
    ("preference", '{"instruction": "q", "completions": [{"response": "a"}]}', ["no field 'overall_score'"]),
    ("instruction", '{"text": "q"}', ["no field 'instruction or prompt or messages'", "--instructions", "it has text"]),
    ("instruction", '{"instruction": "\\n "}', ["field 'instruction' is empty"]),
    ("instruction", '{"instruction": 7}', ["field 'instruction' is int, expected text"]),
    ("instruction", '{"messages": [{"role": "system", "content": "s"}]}', ["field 'messages'"]),
])
def test_a_bad_line_is_named_with_its_file_number_and_field(tmp_path, kind, line, parts):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(GOOD[kind]) + "\n\n" + line + "\n")
    message = refusal(data.load_source, kind, str(source))
    assert message.startswith(f"{source}:3: ")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("kind, line, part", [
    ("preference", '{"prompt": "q", "chosen": "a", "rejected": null}', "rejected"),
    ("preference", '{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": 7}', "rejected"),
    ("preference", '{"prompt": "q", "responses": ["a", 7], "scores": [1, 0]}', "responses"),
    ("preference", '{"prompt": "q", "completions": "none"}', "completions"),
    ("preference", '{"prompt": "q", "completions": ["a", "b"]}', "completions"),
    ("instruction", '{"messages": ["q"]}', "messages"),
])
def test_a_field_of_the_wrong_type_is_named(tmp_path, kind, line, part):
    source = tmp_path / "rows.jsonl"
    source.write_text(line + "\n")
    message = refusal(data.load_source, kind, str(source))
    assert message.startswith(f"{source}:1: ") and part in message, message


@pytest.mark.parametrize("kind", data.KINDS)
def test_a_missing_file_is_named_with_its_flag_and_the_alternatives(kind):
    message = refusal(data.load_source, kind, "no/such.jsonl")
    assert message == (f"--{data.FLAGS[kind]} no/such.jsonl: no such file; give a .jsonl file, a hub id, or builtin")


def test_a_folder_is_no_source(tmp_path):
    assert "no such file" in refusal(data.load_source, "reasoning", str(tmp_path))


def test_a_file_without_rows_is_refused(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("\n \n")
    assert refusal(data.load_source, "reasoning", str(source)) == f"{source}: no rows for --reasoning"


def test_a_file_that_is_no_text_is_refused(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b'{"question": "\xff\xfe", "answer": "2"}\n')
    message = refusal(data.load_source, "reasoning", str(source))
    assert str(source) in message and "UTF-8" in message.upper()


def test_a_hub_id_that_cannot_be_had_names_the_remedies(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(data.load_source, "instruction", "nobody/nothing")
    assert message.startswith("--instructions nobody/nothing: ") and "Couldn't reach the Hub" in message
    assert "check the id and the network, or use a .jsonl file or builtin" in message


def test_builtin_takes_a_number_for_preferences_alone(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ValueError("no such set")))
    for kind, source in [("reasoning", "builtin:2"), ("preference", "builtin:9"), ("preference", "builtin:x")]:
        assert f"--{data.FLAGS[kind]} {source}: " in refusal(data.load_source, kind, source)


def test_a_prompt_longer_than_the_context_is_dropped_and_counted(tmp_path, smol_tokenizer):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"question": "one " * n, "answer": "2"}) + "\n" for n in (3, 500, 3)))
    kept, dropped = data.drop_overlong(data.load_source("reasoning", str(source)), smol_tokenizer, 200, 0, 4)
    assert (len(kept), dropped) == (2, 1) and all(len(row.instruction) < 100 for row in kept)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    assert "no config.json" in refusal(data.model_folder, str(tmp_path))
    assert "no config.json" in refusal(data.model_folder, "./no/such/folder")


# ---- config ----

@pytest.mark.parametrize("changes, world, parts", [
    ({"batch": 12, "minibatches": 2}, 5, ["--batch 12", "5 ranks", "multiple of 10", "for example 20"]),
    ({"mix": "1:1"}, 1, ["--mix 1:1", "three whole numbers P:R:I", "1:1:1"]),
    ({"mix": "a:b:c"}, 1, ["--mix a:b:c", "three whole numbers"]),
    ({"mix": "1:1:-1"}, 1, ["--mix 1:1:-1", "three whole numbers"]),
    ({"mix": "0:0:0"}, 1, ["--mix 0:0:0", "three whole numbers"]),
    ({"mix": "0:0:1"}, 1, ["--mix 0:0:1", "--warmup_steps 0"]),
    ({"mix": "1:1:3"}, 1, ["--batch 12", "1:1:3", "multiple of 5", "for example 15"]),
    ({"mix": "2:3:1"}, 1, ["--batch 12", "(warm-up)", "multiple of 5"]),
    ({"mix": "1:3:0", "both_orders": True}, 1, ["--batch 12 --mix 1:3:0 draws 3", "even number", "--batch 24"]),
    ({"batch": 0}, 1, ["--batch 0", "above 0"]),
    ({"batch": -12}, 1, ["--batch -12", "above 0"]),
    ({"group": 0}, 1, ["--group 0", "above 0"]),
    ({"temperature": 0.0}, 1, ["--temperature 0.0", "above 0"]),
    ({"temperature": float("nan")}, 1, ["--temperature nan", "above 0"]),
    ({"lr": -1e-5}, 1, ["--lr -1e-05", "above 0"]),
    ({"lr": float("inf")}, 1, ["--lr inf"]),
    ({"max_answer_tokens": -1}, 1, ["--max_answer_tokens -1", "above 0"]),
    ({"steps": -1}, 1, ["--steps -1", "0 or more"]),
    ({"warmup_steps": -1}, 1, ["--warmup_steps -1", "0 or more"]),
    ({"clip_low": 1.1}, 1, ["--clip_low 1.1", "must hold 1"]),
    ({"clip_high": 0.9}, 1, ["--clip_high 0.9", "must hold 1"]),
    ({"lora_rank": 4}, 1, ["--lora_rank", "--method sft"]),
    ({"name": "../elsewhere"}, 1, ["--name '../elsewhere'", "letters, digits"]),
    ({"name": "/x"}, 1, ["--name '/x'", "names a folder in runs/"]),
    ({"name": ".."}, 1, ["--name '..'"]),
    ({"name": ""}, 1, ["--name ''"]),
])
def test_a_bad_setting_is_named_with_its_value_and_the_remedy(tmp_path, monkeypatch, changes, world, parts):
    monkeypatch.chdir(tmp_path)
    message = refusal(check_config, Config(**{"batch": 12, "minibatches": 1} | changes), world)
    assert all(part in message for part in parts), message


def test_a_run_that_exists_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "log.jsonl").write_text("{}\n")
    message = refusal(check_config, Config(name="mine"), 1)
    assert message == "runs/mine holds a run: give --resume to continue it, or another --name"
    check_config(Config(name="mine", resume=True), 1)
    check_config(Config(name="other"), 1)


def test_more_ranks_than_the_memory_holds_are_refused_with_a_number_that_fits(tiny_model):
    message = refusal(data.check_memory, tiny_model, 10_000)
    assert "10000 ranks" in message and "GiB are free" in message
    fitting = int(message.split("--nproc_per_node=")[1].split(",")[0])
    assert 0 < fitting < 10_000
    data.check_memory(tiny_model, 1)


@pytest.mark.parametrize("arguments", [["--method", "dpo"], ["--tau", "a"], ["--advantage", "none"], ["--loss", "sum"],
                                       ["--preset", "huge"], ["--batch", "many"]], ids=" ".join)
def test_a_choice_that_does_not_exist_ends_with_status_2_and_names_the_flag(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        urpo.parse_config(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in message and repr(arguments[1]) in message


# ---- the command ----

def command(folder, *arguments):
    """`python urpo.py ...` in an empty folder: (status, lines of its errors)."""
    environment = os.environ | {"MASTER_PORT": free_port()}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of the group of one that other tests share
        environment.pop(name, None)
    done = subprocess.run([sys.executable, ROOT / "urpo.py", "--preset", "smol", *arguments], cwd=folder, text=True,
                          env=environment, capture_output=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("arguments, part", [
    (["--mix", "1:1:5"], "--batch 24 cannot be shared 1:1:5"),
    (["--model", "raw", "--reasoning", "missing.jsonl"], "--reasoning missing.jsonl: no such file"),
    (["--model", "raw", "--builtin_rows", "30", "--max_prompt_tokens", "20"], "--max_prompt_tokens"),
    (["--no_such_flag", "1"], "--no_such_flag"),
    # Rows from a file have no worked answer to imitate; the test's own file holds one such row.
    (["--model", "raw", "--method", "sft", "--mix", "0:1:0", "--reasoning", __file__.replace(".py", ".jsonl")],
     "--reasoning: --method sft needs worked answers: use builtin"),
])
def test_the_command_ends_with_status_2_and_one_line_and_writes_nothing(tmp_path, arguments, part):
    status, lines = command(tmp_path, *arguments)
    errors = [line for line in lines if "error: " in line]
    assert status == 2 and not any("Traceback" in line for line in lines)
    assert len(errors) == 1 and part in errors[0]
    assert list(tmp_path.iterdir()) == []
