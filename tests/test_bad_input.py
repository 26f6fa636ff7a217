"""What a user can get wrong, and the message: it names the file, line, field or flag, the value, and what to do.

The tables hold the whole message, of a bad row its reason; "..." in one stands for words of a library.
"""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import machine
import readers
import runs
from conftest import ROOT, free_port
from data import InputError

SMALL = "--preset smol --model model --toy_rows 8".split()
GOOD = {"preferences": '{"prompt": "q", "chosen": "good", "rejected": "bad"}',
        "reasoning": '{"question": "q", "answer": "2"}', "instructions": '{"instruction": "q"}'}
FORMATS = {"preferences": "{prompt, responses, scores} | ...", "reasoning": "{question, answer} | ...",
           "instructions": "{instruction} | ..."}


@pytest.fixture(scope="session")
def folders(tmp_path_factory, smol_tokenizer):
    """A working folder: a model that is good, models that are not, and files of each kind that is not."""
    import torch
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    home = tmp_path_factory.mktemp("home")
    size = len(smol_tokenizer)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True)).save_pretrained(home / "model")
    smol_tokenizer.save_pretrained(home / "model")

    def variant(name, drop=(), **settings):
        shutil.copytree(home / "model", home / name)
        for file in drop:
            (home / name / file).unlink()
        config = json.loads((home / name / "config.json").read_text())
        (home / name / "config.json").write_text(json.dumps(config | settings))
        return home / name

    variant("no-weights", ["model.safetensors"])
    torch.save({}, variant("pickled", ["model.safetensors"]) / "pytorch_model.bin")
    (variant("damaged-config") / "config.json").write_text('{"model_type": ')
    variant("unknown-model", model_type="stranger")
    variant("own-code", model_type="stranger", auto_map={"AutoConfig": "stranger.Stranger"})
    variant("few-tokens", vocab_size=512)
    variant("no-tokenizer", ["tokenizer.json", "tokenizer_config.json"])
    (variant("damaged-tokenizer") / "tokenizer.json").write_text("{}")
    variant("no-template", [name for name in ("chat_template.jinja",) if (home / "model" / name).exists()])
    cut = variant("cut-off") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (variant("no-header") / "model.safetensors").write_bytes(b"\xff" * 100)
    encoder = BertModel(BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=32))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2))
    for name, model in (("encoder", encoder), ("gpt2", gpt2)):
        model.save_pretrained(home / name)
        smol_tokenizer.save_pretrained(home / name)
    (home / "folder").mkdir()
    (home / "empty.jsonl").write_text("\n \n")
    (home / "good.jsonl").write_text(GOOD["reasoning"] + "\n")
    (home / "bad.json").write_text('{"figures": ')
    (home / "list.json").write_text("[]")
    (home / "broken").mkdir()
    (home / "broken" / "log.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    (home / "runs").mkdir()
    (home / "runs" / "file").write_text("")
    (home / "runs" / "dangling").symlink_to("nowhere")
    (home / "runs" / "taken").mkdir()
    (home / "runs" / "taken" / "log.jsonl").write_text("{}\n")
    return home


def contents(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(folders, process_group, monkeypatch, capsys):
    """Runs a command in this process. It must end with status 2 and one line, write nothing and load no model."""
    import datasets
    import torch.distributed
    import transformers

    def call(command, *arguments, **environment):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(folders)
        monkeypatch.setattr(machine, "STORE", None)  # in which an earlier command left its messages
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)  # the fixture's is there
        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        for module, name in ((transformers.AutoModelForCausalLM, "from_pretrained"), (machine, "start_engine"),
                             (machine, "load_policy")):
            monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a model is loaded"))
        shutil.rmtree(folders / "runs" / "urpo", ignore_errors=True)  # of a command that was not refused
        before, seconds = contents(folders), time.process_time()
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            importlib.import_module(command).main()
        assert caught.value.code == 2
        assert time.process_time() - seconds < 10 and contents(folders) == before
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return call


def unreachable(*arguments, **options):
    raise ConnectionError("no route\nand more lines")


def agrees(message, expected):
    return re.fullmatch(re.escape(expected).replace(re.escape("..."), ".+"), message) is not None


COMMANDS = [
    ('urpo --batch 0', '--batch 0: must be above 0, and finite'),
    ('urpo --batch -12', '--batch -12: must be above 0, and finite'),
    ('urpo --batch many', "argument --batch: invalid int value: 'many'; --help lists the settings"),
    ('urpo --batch 2.5', "argument --batch: invalid int value: '2.5'; --help lists the settings"),
    ('urpo --group 0', '--group 0: must be above 0, and finite'),
    ('urpo --group 1', '--group 1: an answer is compared with its group, so give 2 or more'),
    ('urpo --minibatches 0', '--minibatches 0: must be above 0, and finite'),
    ('urpo --mix 1:1', '--mix 1:1: give three whole numbers P:R:I, for example 1:1:1'),
    ('urpo --mix a:b:c', '--mix a:b:c: give three whole numbers P:R:I, for example 1:1:1'),
    ('urpo --mix 1:1:-1', '--mix 1:1:-1: give three whole numbers P:R:I, for example 1:1:1'),
    ('urpo --mix 0:0:0', '--mix 0:0:0: give three whole numbers P:R:I, for example 1:1:1'),
    ('urpo --mix 0:0:1',
     '--mix 0:0:1: warm-up leaves out instructions, so nothing is left to train on; set --warmup_steps 0'),
    ('urpo --mix 1:1:3', '--batch 24 cannot be shared 1:1:3: use a multiple of 5, for example 25'),
    ('urpo --mix 2:3:1 --batch 12',
     '--batch 12 cannot be shared 2:3:0 (warm-up): use a multiple of 5, for example 15'),
    ('urpo --temperature 0', '--temperature 0.0: must be above 0, and finite'),
    ('urpo --temperature nan', '--temperature nan: must be above 0, and finite'),
    ('urpo --lr inf', '--lr inf: must be above 0, and finite'),
    ('urpo --weight_decay -0.1', '--weight_decay -0.1: must be 0 or more, and finite'),
    ('urpo --lr=-1e-5', '--lr -1e-05: must be above 0, and finite'),
    ('urpo --weight_decay nan', '--weight_decay nan: must be 0 or more, and finite'),
    ('urpo --grad_clip 0', '--grad_clip 0.0: must be above 0, and finite'),
    ('urpo --max_drift 0', '--max_drift 0.0: must be above 0, and finite'),
    ('urpo --gpu_memory 1.5', "--gpu_memory 1.5: a share of the GPU's memory, at most 1"),
    ('urpo --gpu_memory 0', '--gpu_memory 0.0: must be above 0, and finite'),
    ('urpo --max_answer_tokens -1', '--max_answer_tokens -1: must be above 0, and finite'),
    ('urpo --steps -1', '--steps -1: must be 0 or more, and finite'),
    ('urpo --warmup_steps -1', '--warmup_steps -1: must be 0 or more, and finite'),
    ('urpo --save_every -1', '--save_every -1: must be 0 or more, and finite'),
    ('urpo --clip_low 1.1', '--clip_low 1.1 --clip_high 1.28: the range must hold 1'),
    ('urpo --clip_high 0.9', '--clip_low 0.8 --clip_high 0.9: the range must hold 1'),
    ('urpo --clip_low nan', '--clip_low nan --clip_high 1.28: the range must hold 1'),
    ('urpo --judge_list 1', '--judge_list 1: a judgement compares 2 to 4 answers, --group; 0 is all of them'),
    ('urpo --judge_list 2 --judgements 3', '--judgements 3 --judge_list 2: judging every answer as often, and as '
     'often in each place, takes a multiple of 2; for example 4'),
    ('urpo --judge_list 2 --judgements 8', '--judgements 8: lists of 2 of 4 answers that differ are enough for 6'),
    ('urpo --judgements 0', '--judgements 0: must be above 0, and finite'),
    ('urpo --tau a', "argument --tau: invalid choice: 'a' (choose from 'b', 'strict'); --help lists the settings"),
    ('urpo --advantage none',
     "argument --advantage: invalid choice: 'none' (choose from 'std', 'center', 'batch'); --help lists the settings"),
    ('urpo --loss sum',
     "argument --loss: invalid choice: 'sum' (choose from 'token-mean', 'sequence-mean'); --help lists the settings"),
    ('urpo --preset huge',
     "argument --preset: invalid choice: 'huge' (choose from 'auto', 'smol', 'paper'); --help lists the settings"),
    ('urpo --precision float16',
     "argument --precision: invalid choice: 'float16' (choose from 'bfloat16', 'float32'); --help lists the settings"),
    ('urpo --resume perhaps', 'argument --resume: Truthy value expected: got perhaps ...; --help lists the settings'),
    ('urpo --seed x', "argument --seed: invalid int value: 'x'; --help lists the settings"),
    ('urpo --no_such_flag 1', '--no_such_flag 1: no such setting; --help lists them'),
    ('urpo --lr', 'argument --lr: expected one argument; --help lists the settings'),
    ('urpo stray', 'stray: no such setting; --help lists them'),
    ('urpo --name ../elsewhere',
     "--name '../elsewhere': at most 100 letters, digits, '.', '_' and '-'; a folder in runs/"),
    ('urpo --name /x', "--name '/x': at most 100 letters, digits, '.', '_' and '-'; a folder in runs/"),
    ('urpo --name ..', "--name '..': at most 100 letters, digits, '.', '_' and '-'; a folder in runs/"),
    ('urpo --name a.b/c', "--name 'a.b/c': at most 100 letters, digits, '.', '_' and '-'; a folder in runs/"),
    ('urpo --max_prompt_tokens 20',
     '--preferences: all 8 rows are longer than --max_prompt_tokens 20, or leave no room for a judgement in '
     '--max_judge_tokens 800: raise it'),
    ('urpo --max_prompt_tokens 4000',
     '--model model reads 1024 tokens, and the longest prompt with its answer may have 4048: lower '
     '--max_judge_tokens, --max_prompt_tokens, --max_answer_tokens or --max_referee_tokens'),
    ('urpo --max_judge_tokens 5000',
     '--model model reads 1024 tokens, and the longest prompt with its answer may have 5040: lower '
     '--max_judge_tokens, --max_prompt_tokens, --max_answer_tokens or --max_referee_tokens'),
    ('urpo --max_judge_tokens 0', '--max_judge_tokens 0: must be above 0, and finite'),
    ('urpo --preferences no/such.jsonl',
     '--preferences no/such.jsonl: no such file; give a .jsonl file, a hub id, or toy'),
    ('urpo --reasoning no/such.jsonl',
     '--reasoning no/such.jsonl: no such file; give a .jsonl file, a hub id, or toy'),
    ('urpo --instructions folder', '--instructions folder: no such file; give a .jsonl file, a hub id, or toy'),
    ('urpo --preferences toy:9',
     '--preferences toy:9: toy takes a number of responses, 2 to 8, for --preferences alone; for example '
     'toy:2'),
    ('urpo --preferences toy:x',
     '--preferences toy:x: toy takes a number of responses, 2 to 8, for --preferences alone; for example '
     'toy:2'),
    ('urpo --reasoning empty.jsonl', 'empty.jsonl: no rows for --reasoning'),
    ('urpo --instructions nobody/nothing',
     '--instructions nobody/nothing: neither a local file nor a data set the hub gave us (...); check the id and '
     'the network, or use a .jsonl file or toy'),
    ('urpo --model no/such/model',
     '--model no/such/model: no tokenizer that loads, here or on the hub as far as we can see (...); check the '
     'name, or save model and tokenizer there'),
    ('urpo --model ./nowhere', './nowhere: no model here (no config.json); give a folder that save_pretrained wrote'),
    ('urpo --model folder', 'folder: no model here (no config.json); give a folder that save_pretrained wrote'),
    ('urpo --model pickled',
     'pickled: no *.safetensors here, and no other format is read, since a pickle (pytorch_model.bin) can run code; '
     'save it as safetensors where you trust it'),
    ('urpo --model encoder',
     '--model encoder: BertLMHeadModel has no model.layers and lm_head; use a model built as Llama and Qwen are'),
    ('urpo --model gpt2',
     '--model gpt2: GPT2LMHeadModel has no model.layers and lm_head; use a model built as Llama and Qwen are'),
    ('urpo --model nobody/nothing',
     '--model nobody/nothing: no tokenizer that loads, here or on the hub as far as we can see (...); check the '
     'name, or save model and tokenizer there'),
    ('urpo --name taken', 'runs/taken holds a run: give --resume to continue it, or another --name'),
    ('urpo --model no-weights',
     'no-weights: no *.safetensors here, and no other format is read, since a pickle (pytorch_model.bin) can run '
     'code; save it as safetensors where you trust it'),
    ('urpo --model damaged-config',
     '--model damaged-config: no tokenizer that loads, here or on the hub as far as we can see (...); check the '
     'name, or save model and tokenizer there'),
    ('urpo --model unknown-model',
     '--model unknown-model: its config.json names no language model that transformers knows (...); use another'),
    ('urpo --model own-code',
     '--model own-code: its config.json names no language model that transformers knows (...); use another'),
    ('urpo --model few-tokens',
     '--model few-tokens: its tokenizer has 49152 tokens and the model 512: give the tokenizer that belongs to it'),
    ('urpo --model no-tokenizer',
     '--model no-tokenizer: no tokenizer that loads, here or on the hub as far as we can see (...); check the name, '
     'or save model and tokenizer there'),
    ('urpo --model damaged-tokenizer',
     '--model damaged-tokenizer: no tokenizer that loads, here or on the hub as far as we can see (...); check the '
     'name, or save model and tokenizer there'),
    ('urpo --model no-template',
     'no-template: the tokenizer has no chat template; give --chat_template plain_turns.jinja, or use an instruct '
     'model'),
    ('urpo --chat_template no.jinja',
     '--chat_template no.jinja: cannot be read (...); give a file in Jinja, for example plain_turns.jinja'),
    ('urpo --chat_template good.jsonl',
     "--chat_template good.jsonl: it names no 'messages', so it would drop every prompt; give a template in Jinja, for "
     'example plain_turns.jinja'),
    ('urpo --preferences good.jsonl no/such.jsonl',
     'good.jsonl:1: no field ...; correct or remove this row. --preferences reads one JSON object a line, in UTF-8: '
     '...'),
    ('urpo --reasoning good.jsonl no/such.jsonl',
     '--reasoning no/such.jsonl: no such file; give a .jsonl file, a hub id, or toy'),
    ('urpo --model cut-off', 'cut-off/model.safetensors: damaged or cut off (...); copy it again'),
    ('urpo --model no-header', 'no-header/model.safetensors: damaged or cut off (...); copy it again'),
    ('urpo --name file', 'runs/file is no folder: move it away, or run elsewhere'),
    ('urpo --name dangling', 'runs/dangling is no folder: move it away, or run elsewhere'),
    ('eval compare no.json no.json', 'no.json: no such file; write it with `python eval.py heldout --json no.json`'),
    ('eval compare bad.json bad.json', 'bad.json: not JSON (Expecting value, line 1)'),
    ('eval compare list.json list.json',
     "list.json: no result of `python eval.py heldout` (no 'figures' and 'settings')"),
    ('eval report folder', 'folder: no run here (no log.jsonl); give a folder such as runs/urpo'),
    ('eval report broken', 'broken/log.jsonl:2: not JSON (Expecting value); remove the line'),
    ('eval report folder broken', 'several runs: give --out FILE for their picture'),
    ('eval heldout --model ./nowhere',
     './nowhere: no model here (no config.json); give a folder that save_pretrained wrote'),
    ('eval heldout --model model --reasoning no.jsonl',
     '--reasoning no.jsonl: no such file; give a .jsonl file, a hub id, or toy'),
    ('eval heldout --model model --reasoning none --preferences none --instructions none',
     'all three sources are none: there is nothing to measure'),
    ('eval heldout --model pickled',
     'pickled: no *.safetensors here, and no other format is read, since a pickle (pytorch_model.bin) can run code; '
     'save it as safetensors where you trust it'),
    ('urpo --batch 12 --mix 1:1:2 --warmup_steps 0',
     '--batch 12 --mix 1:1:2 draws 3 preference prompts, and --both_orders needs an even number: use --batch 24'),
]

ENVIRONMENTS = [  # as torchrun sets it, of a run with --batch 24 and two minibatches
    ('RANK=0 LOCAL_RANK=0 WORLD_SIZE=5',
     '--batch 24 does not split over 5 ranks, 2 minibatches: use a multiple of 10, for example 30'),
    ('RANK=0 LOCAL_RANK=0 WORLD_SIZE=1024',
     '--batch 24 does not split over 1024 ranks, 2 minibatches: use a multiple of 2048, for example 2048'),
]

ROWS = [  # the third line of rows.jsonl, after a good one and an empty one, and the reason in the message
    ('reasoning', '{"question": "q", ', 'Expecting property name enclosed in double quotes: ...'),
    ('reasoning', '["q", "2"]', 'expected an object, found list'),
    ('reasoning', '{"question": "q"}', "no field 'answer or solution'; it has question"),
    ('reasoning', '{"answer": "2"}', "no field 'question or problem or prompt'; it has answer"),
    ('reasoning', '{"question": " ", "answer": "2"}', "field 'question' is empty"),
    ('reasoning', '{"question": "q", "answer": "1/0"}',
     "field 'answer': unreadable answer '1/0': not a number, not words, nothing that math_verify can parse"),
    ('reasoning', '{"question": "q", "answer": ""}', "field 'answer': the answer is empty"),
    ('reasoning', '{"question": "q", "answer": NaN}', "field 'answer': nan is not finite"),
    ('reasoning', '{"question": "q", "answer": 1e999}', "field 'answer': inf is not finite"),
    ('reasoning', '{"question": "q", "answer": ["2"]}', "field 'answer' is list, expected text"),
    ('reasoning', '{"question": "q", "answer": true}', "field 'answer' is bool, expected text"),
    ('reasoning', '{"question": "q", "answer": "2\\ud800"}',
     "field 'answer' holds half a surrogate pair (\\ud800 to \\udfff), which is no text"),
    ('reasoning', '{"question": "\\udc00q", "answer": "2"}',
     "field 'question' holds half a surrogate pair (\\ud800 to \\udfff), which is no text"),
    ('reasoning', '{"question": "q", "answer": "' + "9" * 201 + '"}',
     "field 'answer': the answer is longer than 200 characters: '9999999999999999999999999999999999999999'..."),
    ('reasoning', '{"question": "q", "answer": "9^{9^{9^9}}"}',
     "field 'answer': unreadable answer '9^{9^{9^9}}': math_verify needs more than 2 s or 2 GiB for it"),
    ('reasoning', '{"prompt": "q", "reward_model": {}}', "no field 'ground_truth'; it has none"),
    ('reasoning', '{"question": {"text": "q"}, "answer": "2"}', "field 'question' is dict, expected text"),
    ("reasoning", "[" * 100000, 'maximum recursion depth exceeded ...'),
    ('reasoning', '{"a\\nb\\u001b[31m": 1}', "no field 'question or problem or prompt'; it has a\\nb\\x1b[31m"),
    ('reasoning', '{}', "no field 'question or problem or prompt'; it has none"),
    ('reasoning', '{"question": "q", "answer": ' + "9" * 5000 + '}', 'Exceeds the limit (4300 digits) ...'),
    ('reasoning', b'{"question": "\xff\xfe", "answer": "2"}', "'utf-8' codec can't decode byte 0xff ..."),
    ('preferences', '{"prompt": "q", "chosen": "a"}', "no field 'rejected'; it has prompt, chosen"),
    ('preferences', '{"prompt": "q", "responses": ["a"], "scores": [1]}',
     "field 'responses': 1 of them, and 2 to 8 are ranked together (D5)"),
    ('preferences', '{"prompt": "q", "responses": ["a", "b", "b", "b", "b", "b", "b", "b", "b"], '
                    '"scores": [1, 2, 3, 4, 5, 6, 7, 8, 9]}',
     "field 'responses': 9 of them, and 2 to 8 are ranked together (D5)"),
    ('preferences', '{"prompt": "q", "responses": ["a", "b"], "scores": [1]}',
     "field 'responses' or 'scores': expected two lists of equal length"),
    ('preferences', '{"prompt": "q", "responses": ["a", "b"]}',
     "field 'responses' or 'scores': expected two lists of equal length"),
    ('preferences', '{"prompt": "q", "responses": ["a", "b"], "scores": ["x", 1]}',
     "field 'scores': 'x' is no finite number"),
    ('preferences', '{"prompt": "q", "responses": ["a", "b"], "scores": [NaN, 1]}',
     "field 'scores': nan is no finite number"),
    ('preferences', '{"prompt": "q", "responses": ["a", "b"], "scores": [1e999, 1]}',
     "field 'scores': inf is no finite number"),
    ('preferences', '{"prompt": "q", "responses": ["a", 7], "scores": [1, 0]}',
     "field 'response 2' is int, expected text"),
    ('preferences', '{"prompt": "", "chosen": "a", "rejected": "b"}', "field 'prompt' is empty"),
    ('preferences', '{"prompt": "q", "chosen": 7, "rejected": "b"}', "field 'chosen' is int, expected text"),
    ('preferences', '{"prompt": "q", "chosen": "a", "rejected": []}', "field 'rejected' is list, expected text"),
    ('preferences', '{"instruction": "q", "completions": [{"response": "a"}]}', "no field 'overall_score'"),
    ('preferences', '{"prompt": "q", "completions": "none"}', 'string indices must be integers, ...'),
    ('preferences', '{"prompt": "q", "chosen": "a", "rejected": "\\ud83d"}',
     "field 'rejected' holds half a surrogate pair (\\ud800 to \\udfff), which is no text"),
    ('instructions', '{"text": "q"}', "no field 'instruction or prompt or messages'; it has text"),
    ('instructions', '{"instruction": "\\n "}', "field 'instruction' is empty"),
    ('instructions', '{"instruction": 7}', "field 'instruction' is int, expected text"),
    ('instructions', '{"messages": [{"role": "system", "content": "s"}]}', "field 'messages' has no turn of the user"),
    ('instructions', '{"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "t"}]}',
     "field 'messages': a turn's role is 'tool'; use system, user, assistant"),
    ('instructions', '{"messages": [{"role": "user"}]}', "field 'messages' is NoneType, expected text"),
    ('instructions', '{"messages": ["q"]}', "field 'messages' is list, expected text"),
    ('instructions', 'null', 'expected an object, found NoneType'),
]


def test_the_tables_hold_at_least_sixty_rows_and_none_twice():
    rows = [row[:-1] for row in COMMANDS + ENVIRONMENTS + ROWS]
    assert len(set(rows)) == len(rows) >= 60


@pytest.mark.parametrize("line, expected", COMMANDS, ids=[line for line, _ in COMMANDS])
def test_a_bad_command_is_refused_in_one_line(refused, line, expected):
    command, *arguments = line.split()
    message = refused(command, *(SMALL if command == "urpo" else ()), *arguments)
    assert agrees(message, expected), message


@pytest.mark.parametrize("line, expected", ENVIRONMENTS, ids=[line for line, _ in ENVIRONMENTS])
def test_a_bad_environment_is_refused_in_one_line(refused, line, expected):
    message = refused("urpo", *SMALL, **dict(pair.split("=") for pair in line.split()))
    assert agrees(message, expected), message


@pytest.mark.parametrize("flag, line, expected", ROWS, ids=[f"{flag} {line[:60]}" for flag, line, _ in ROWS])
def test_a_bad_row_is_refused_with_its_file_and_line(refused, folders, flag, line, expected):
    line = line if isinstance(line, bytes) else line.encode()
    (folders / "rows.jsonl").write_bytes(GOOD[flag].encode() + b"\n\n" + line + b"\n")
    message = refused("urpo", *SMALL, f"--{flag}", "rows.jsonl")
    assert agrees(message, f"rows.jsonl:3: {expected}; correct or remove this row. --{flag} reads one JSON object a "
                           f"line, in UTF-8: {FORMATS[flag]}"), message


def test_a_prompt_longer_than_the_context_is_dropped_and_counted(tmp_path, smol_tokenizer):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"question": "one " * n, "answer": "2"}) + "\n" for n in (3, 500, 3)))
    kept, dropped = readers.drop_overlong(readers.load_source("reasoning", str(source)), smol_tokenizer, 200, 800, 4)
    assert (len(kept), dropped) == (2, 1) and all(len(row.instruction) < 100 for row in kept)


def test_a_run_that_exists_is_not_overwritten_but_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "log.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="^runs/mine holds a run: give --resume to continue it, or another --name$"):
        runs.check_folder("mine", resume=False)
    runs.check_folder("mine", resume=True)
    runs.check_folder("other", resume=False)


def test_a_message_quotes_anything_on_one_line_without_escapes_and_not_at_any_length():
    message = str(InputError("row \n\x1b[31m\u2028\u202e" + "x" * 9000 + ": what to do"))
    assert message.isprintable() and len(message) < 700
    assert message.startswith("row \\n\\x1b[31m") and message.endswith(": what to do")


# ---- the command itself, in a process of its own ----

def command(folder, *arguments, ranks=0, **environment):
    """`python urpo.py ...`, or under torchrun, in an empty folder: (status, lines of its errors)."""
    shared = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of the group of one that other tests use
    inherited = {name: value for name, value in os.environ.items() if name not in shared}
    environment = inherited | {"MASTER_PORT": free_port()} | environment
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    done = subprocess.run([sys.executable, *(launcher if ranks else []), ROOT / "urpo.py", "--preset", "smol",
                           *arguments], cwd=folder, text=True, env=environment, capture_output=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("ranks, arguments, environment, part", [
    (0, ["--mix", "1:1:5"], {}, "--batch 24 cannot be shared 1:1:5"),
    (0, ["--no_such_flag", "1"], {}, "--no_such_flag"),
    (0, ["--model", "raw", "--reasoning", "missing.jsonl"], {}, "--reasoning missing.jsonl: no such file"),
    (2, ["--lr", "0"], {}, "--lr 0.0: must be above 0"),
])
def test_the_command_ends_with_one_line_and_writes_nothing(tmp_path, ranks, arguments, environment, part):
    status, lines = command(tmp_path, *arguments, ranks=ranks, **environment)
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == (1 if ranks else 2)  # torchrun has a status of its own
    assert len(errors) == 1 and part in errors[0] and (ranks or not any("Traceback" in line for line in lines))
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_one_rank_finds_before_the_ranks_have_met_is_told_though_the_other_is_killed_for_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import machine
if os.environ["RANK"] == "0":
    time.sleep(600)  # torchrun kills it when rank 1 ends
machine.stop(machine.InputError("--lr 0.0: must be above 0"))
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           script], text=True, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error: " in line] == ["error: --lr 0.0: must be above 0"]
