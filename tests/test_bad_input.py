"""What a user can get wrong, and the message: it names the file, line, field or flag, the value, and what to do.

The tables hold what a message must say, one line for each kind; not its wording.
"""
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from unittest.mock import Mock

import pytest

import data
import urpo
from conftest import ROOT
from infra import policy, ranks
from infra.ranks import InputError
from infra.settings import parse
from tiny_run import OF_RANKS, launcher, own_environment

GOOD = {"preferences": '{"prompt": "q", "chosen": "good", "rejected": "bad"}',
        "reasoning": '{"question": "q", "answer": "2"}', "instructions": '{"instruction": "q"}'}
SMALL = ("--preset smol --group 4 --model model --preferences preferences.jsonl --reasoning reasoning.jsonl "
         "--instructions instructions.jsonl").split()


@pytest.fixture(scope="session")
def folders(tmp_path_factory, smol_tokenizer):
    """A working folder: a model that is good, models that are not, and files of each kind that is not."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    home = tmp_path_factory.mktemp("home")
    size = len(smol_tokenizer)

    def save(name, model):
        model.save_pretrained(home / name)
        smol_tokenizer.save_pretrained(home / name)

    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
                 num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True)
    save("model", LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes)))
    save("padded", LlamaForCausalLM(LlamaConfig(vocab_size=size + 1025, **sizes)))
    save("encoder", BertModel(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=32)))

    def variant(name, drop=(), **settings):
        shutil.copytree(home / "model", home / name)
        for file in drop:
            (home / name / file).unlink()
        config = json.loads((home / name / "config.json").read_text())
        (home / name / "config.json").write_text(json.dumps(config | settings))
        return home / name

    torch.save({}, variant("pickled", ["model.safetensors"]) / "pytorch_model.bin")
    code = variant("own-code", model_type="stranger", auto_map={"AutoConfig": "stranger.Stranger",
                                                                "AutoModelForCausalLM": "stranger.Stranger"})
    (code / "stranger.py").write_text("open('ran', 'w')\nclass Stranger: pass\n")  # it must not be run
    variant("few-tokens", vocab_size=512)
    variant("no-template", ["chat_template.jinja"])
    cut = variant("cut-off") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (home / "empty.jsonl").write_text("\n \n")
    for flag, line in GOOD.items():
        (home / f"{flag}.jsonl").write_text(line + "\n")
    (home / "runs" / "taken").mkdir(parents=True)
    (home / "runs" / "taken" / "log.jsonl").write_text("{}\n")
    (home / "runs" / "file").write_text("")
    return home


def contents(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(folders, process_group, monkeypatch, capsys):
    """Runs urpo.py in this process. It must end with status 2 and one line, write nothing and load no model."""
    import datasets
    import torch.distributed

    unreachable = Mock(side_effect=ConnectionError("no route\nand more lines"))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("the user is asked"))

    def call(*arguments, **environment):
        for name in OF_RANKS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(folders)
        monkeypatch.setattr(ranks, "STORE", None)  # in which an earlier command left its messages
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)  # the fixture's is there
        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        for name in ("load_policy", "start_sampler"):
            monkeypatch.setattr(urpo, name, lambda *a, **k: pytest.fail("a model is loaded"))
        monkeypatch.setattr(sys, "argv", ["urpo.py", *SMALL, *arguments])
        before = contents(folders)
        with pytest.raises(SystemExit) as caught:
            urpo.main()
        assert caught.value.code == 2 and contents(folders) == before
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return call


COMMANDS = [  # arguments, and what the message must say
    ("--batch many", ["--batch", "'many'", "--help"]),
    ("--tau a", ["--tau", "'a'", "'b', 'strict'"]),
    ("--resume perhaps", ["perhaps"]),
    ("--no_such_flag 1", ["--no_such_flag", "--help"]),
    ("--mix 1:1", ["--mix 1:1", "P:R:I"]),
    ("--mix 0:0:1", ["--mix 0:0:1", "--warmup_steps 0"]),
    ("--mix 1:1:3", ["--batch 24", "1:1:3", "use --batch 40"]),
    ("--mix 2:3:1 --batch 12", ["--batch 12", "(warm-up)", "use --batch 60"]),
    ("--batch 12 --mix 1:1:2 --warmup_steps 0", ["--both_orders", "use --batch 16"]),
    ("--gpu_memory 1.5", ["--gpu_memory 1.5", "at most 1"]),
    ("--clip_low 1.1", ["--clip_low 1.1", "at most 1"]),
    ("--tensor_parallel 2", ["--tensor_parallel 2", "1 ranks", "use 1"]),
    ("--judge_list 1", ["--judge_list 1", "2 to 4"]),
    ("--judge_list 2 --judgements 3", ["--judgements 3", "use 4"]),
    ("--judge_list 2 --judgements 8", ["--judgements 8", "6"]),
    ("--name file", ["runs/file", "move it away"]),
    ("--name taken", ["runs/taken", "--resume", "--name"]),
    ("--max_prompt_tokens 20", ["--preferences", "raise --max_prompt_tokens 20"]),
    ("--max_prompt_tokens 4000", ["--model model", "1024", "4064", "lower --max_prompt_tokens"]),
    ("--reasoning reasoning.jsonl no/such.jsonl", ["--reasoning no/such.jsonl", "no such file"]),
    ("--reasoning runs", ["--reasoning runs", "a folder"]),
    ("--reasoning empty.jsonl", ["empty.jsonl", "no rows", "--reasoning"]),
    ("--instructions nobody/nothing", ["--instructions nobody/nothing", "no route", ".jsonl"]),
    ("--model nobody/nothing", ["--model nobody/nothing", "no tokenizer", "check the name"]),
    ("--model ./nowhere", ["./nowhere", "no config.json", "save_pretrained"]),
    ("--model pickled", ["pickled", "safetensors", "can run code"]),
    ("--model encoder", ["--model encoder", "Llama and Qwen"]),
    ("--model own-code", ["--model own-code", "no language model", "use another"]),
    ("--model few-tokens", ["--model few-tokens", "49152", "512", "tokenizer that belongs to it"]),
    ("--model padded", ["--model padded", "50177", "1024", "resize_token_embeddings"]),
    ("--model no-template", ["no-template", "--chat_template infra/plain_turns.jinja"]),
    ("--model cut-off", ["cut-off/model.safetensors", "copy it again"]),
    ("--chat_template no.jinja", ["--chat_template no.jinja", "cannot be read", "infra/plain_turns.jinja"]),
]
ROWS = [  # flag, the third line of rows.jsonl after a good one and an empty one, what the message must say
    ("reasoning", '{"question": "q", ', "Expecting property name"),
    ("reasoning", '["q", "2"]', "expected an object, found list"),
    ("reasoning", '{"question": "q"}', "no field 'answer or expected_answer"),
    ("reasoning", '{"question": " ", "answer": "2"}', "field 'question' is empty"),
    ("reasoning", '{"question": "q", "answer": "1/0"}', "field 'answer': unreadable answer '1/0'"),
    ("reasoning", '{"question": "q", "answer": NaN}', "field 'answer': nan"),
    ("reasoning", '{"problem": "q", "solution": "It is four, or 4."}', "field 'solution'"),
    ("reasoning", '{"question": "\\udc00q", "answer": "2"}', "field 'question' holds half a surrogate pair"),
    ("reasoning", '{"prompt": "q", "reward_model": {}}', "no field 'ground_truth'"),
    ("reasoning", "[" * 100000, "recursion"),
    ("reasoning", '{"a\\nb\\u001b[31m": 1}', "it has a\\nb\\x1b[31m"),
    ("reasoning", b'{"question": "\xff\xfe", "answer": "2"}', "'utf-8'"),
    ("preferences", '{"prompt": "q", "chosen": "a"}', "no field 'rejected'"),
    ("preferences", '{"prompt": "q", "responses": ["a"], "scores": [1]}', "2 to 8"),
    ("preferences", '{"prompt": "q", "responses": ["a", "b"], "scores": [1]}', "two lists of equal length"),
    ("preferences", '{"prompt": "q", "responses": ["a", "b"], "scores": [NaN, 1]}', "field 'scores': nan"),
    ("preferences", '{"prompt": "q", "responses": ["a", 7], "scores": [1, 0]}', "field 'response 2' is int"),
    ("preferences", '{"instruction": "q", "completions": [{"response": "a"}]}', "no field 'overall_score'"),
    ("instructions", '{"text": "q"}', "no field 'messages or instruction or prompt'"),
    ("instructions", '{"messages": [{"role": "system", "content": "s"}]}', "field 'messages' has no turn of the user"),
    ("instructions", '{"messages": [{"role": "tool", "content": "t"}]}', "field 'messages': a turn's role is 'tool'"),
]


@pytest.mark.parametrize("line, parts", COMMANDS, ids=[line for line, _ in COMMANDS])
def test_a_bad_command_is_refused_in_one_line(refused, line, parts):
    message = refused(*line.split())
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("flag, line, part", ROWS, ids=[f"{flag} {line[:60]}" for flag, line, _ in ROWS])
def test_a_bad_row_is_refused_with_its_file_and_line(tmp_path, flag, line, part):
    source, line = tmp_path / "rows.jsonl", line if isinstance(line, bytes) else line.encode()
    source.write_bytes(GOOD[flag].encode() + b"\n\n" + line + b"\n")
    with pytest.raises(InputError) as caught:
        data.load_source({flag: kind for kind, flag in data.FLAGS.items()}[flag], str(source))
    message = str(caught.value)
    assert message.startswith(f"{source}:3: ") and part in message and f"--{flag} reads one JSON object" in message


def test_every_bound_is_kept_and_named():
    for one in fields(urpo.Config):
        above, least = one.metadata["above"], one.metadata["least"]
        if above is not None or least is not None:
            bad = above if above is not None else least - 1
            for value in (bad, "nan", "inf") if isinstance(one.default, float) else (bad,):
                with pytest.raises(InputError, match=f"^--{one.name} .* (finite|at most [12])$"):
                    parse(urpo.Config, urpo.PRESETS, ["--preset", "smol", f"--{one.name}={value}"], "")


def test_a_batch_that_does_not_split_over_the_ranks_names_one_that_does(refused):
    message = refused(RANK="0", LOCAL_RANK="0", WORLD_SIZE="5")
    assert "--batch 24" in message and "5 ranks" in message and "--batch 120" in message


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(refused, monkeypatch):
    monkeypatch.setattr(policy, "free_gib", lambda: (None, 0.01))
    message = refused()
    assert "--model model" in message and "0.0 GiB are free" in message and "lab.plan" in message


def test_a_message_quotes_anything_on_one_line_without_escapes_and_not_at_any_length():
    message = str(InputError("row \n\x1b[31m\u2028\u202e" + "x" * 9000 + ": what to do"))
    assert message.isprintable() and len(message) < 700
    assert message.startswith("row \\n\\x1b[31m") and message.endswith(": what to do")


@pytest.mark.parametrize("program", ["urpo.py", "eval.py"])
def test_another_python_without_torch_is_told_which_one_to_use(program):
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({str(ROOT / program)!r})"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and ".venv/bin/python" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks, arguments, part", [
    (1, ["--mix", "1:1:5"], "--batch 24 cannot be shared 1:1:5"), (2, ["--lr", "0"], "--lr 0.0"),
    (2, ["--model", "./nowhere"], "./nowhere")])
def test_the_command_ends_with_one_line_and_writes_nothing(tmp_path, ranks, arguments, part):
    done = subprocess.run([*launcher(ranks), ROOT / "urpo.py", "--preset", "smol", *arguments], cwd=tmp_path,
                          text=True, env=own_environment(), capture_output=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == (2 if ranks == 1 else 1)  # torchrun has a status of its own
    assert len(errors) == 1 and part in errors[0] and (ranks > 1 or "Traceback" not in done.stderr)
    assert list(tmp_path.iterdir()) == []
