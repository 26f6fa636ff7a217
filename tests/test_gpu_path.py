"""What only a GPU runs, as far as a CPU can show it: the order of calls, options, lengths of rows, messages.

`machine.GPU` is set by hand here, and what only CUDA has is replaced. Nothing in this file says that a GPU works:
tests/gpu/first_ten_minutes.py is for that.
"""
import json
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import flags
import machine
import plan
import readers
import urpo
from conftest import ROOT, VOCABULARY, gradients, random_groups
from data import Group, InputError, Prompt


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """machine.py as it reads on a GPU; a list of what was asked of CUDA."""
    called = []
    monkeypatch.setattr(machine, "GPU", True)
    monkeypatch.setattr(machine, "ROW_BLOCK", 128)
    monkeypatch.setattr(machine, "SHORTEST_ROW", 256)
    for name, value in dict(synchronize=None, empty_cache=None, mem_get_info=(60 * 2**30, 80 * 2**30), set_device=None,
                            device_count=8, get_device_name="H100").items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, value=value: called.append(name) or value)
    return called


def test_gpu_branches_stand_in_machine_py_alone():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("report/*.py")]:
        if path.name != "machine.py":
            assert not re.search(r"\b(if|else|not) (machine\.)?GPU\b|cuda\.is_available", path.read_text()), path


# ---- padded rows ----

def test_padding_changes_no_log_prob_and_no_gradient(make_policy, monkeypatch):
    """The rows of a GPU, 128 and 256 tokens at least, through the model of a CPU."""
    plain, padded, groups = make_policy(), make_policy(), random_groups(2)
    expected_N = plain(machine.build_row(groups))
    monkeypatch.setattr(machine, "ROW_BLOCK", 128)
    monkeypatch.setattr(machine, "SHORTEST_ROW", 256)
    row = machine.build_row(groups)
    assert len(row.ids_T) == 256 and sum(map(sum, row.lengths)) == 256
    found_N = padded(row)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)
    found_N.square().sum().backward()
    expected_N.square().sum().backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(padded)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens, length", [(2, 256), (33, 256), (127, 256), (256, 256), (257, 384), (1000, 1024)])
def test_a_row_is_a_multiple_of_128_tokens_and_at_least_256_and_nobody_sees_the_padding(as_on_a_gpu, tokens, length):
    row = machine.build_row([Group(0, None, [5] * (tokens - 1), [[6]])])
    assert len(row.ids_T) == len(row.position_T) == len(row.group_T) == len(row.answer_T) == length
    index_T = torch.arange(length)
    seen_TT = machine.visible(row)(0, 0, index_T[:, None], index_T[None, :])
    assert not seen_TT[:tokens, tokens:].any() and not seen_TT[tokens:, :tokens].any()
    assert seen_TT[index_T, index_T].all()  # a query that sees nothing would make NaN


@pytest.mark.filterwarnings("ignore")
def test_thirty_random_rows_compile_at_most_six_graphs(as_on_a_gpu, monkeypatch):
    """transformers' own way into FlexAttention, compiled by a backend that only counts. Dynamo gives up after 8."""
    import torch.nn.attention.flex_attention as flex
    from transformers.integrations import flex_attention as wrapped

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return lambda *arguments: graph(*arguments)

    monkeypatch.setattr(flex, "_validate_device", lambda *a: None)  # it refuses gradients on a CPU
    torch._dynamo.reset()
    compiled = torch.compile(flex.flex_attention, backend=count)
    monkeypatch.setattr(wrapped.WrappedFlexAttention, "__new__", lambda cls, *a: object.__new__(cls))
    monkeypatch.setattr(wrapped.WrappedFlexAttention, "__init__", lambda self, *a: None)
    monkeypatch.setattr(wrapped.WrappedFlexAttention, "__call__", lambda self: compiled)
    rng = random.Random(0)
    for number in range(30):
        answers = [[0] * rng.randint(5, 60) for _ in range(8)]
        groups = [Group(0, None, [0] * rng.randint(20, 80), answers) for _ in range(rng.randint(1, 3))]
        row = machine.build_row(groups)
        grad = number % 3 > 0
        query, key, value = (torch.randn(1, heads, len(row.ids_T), 16, requires_grad=grad) for heads in (6, 2, 2))
        with torch.set_grad_enabled(grad):
            wrapped.flex_attention_forward(SimpleNamespace(training=True), query, key, value, machine.block_mask(row),
                                           scaling=0.25, row=row, dropout=0.0)
    assert 1 <= len(graphs) <= 6


# ---- the sampler ----

class Engine:
    """Writes down what is asked of it."""

    def __init__(self, called):
        self.called = called

    def __getattr__(self, name):
        def call(*arguments, **options):
            tags = options.get("tags") or ([options["level"]] if "level" in options else [])
            self.called.append(" ".join([name, *[str(a) for a in arguments if not callable(a)], *map(str, tags)]))
            return [{}]  # of apply_model: one worker, which holds no tensor
        return call


def test_the_engine_sleeps_and_wakes_in_one_order(as_on_a_gpu, make_policy, monkeypatch):
    monkeypatch.setattr(machine.fingerprint, "differences", lambda trainer, sampler: {"all": 0.0})
    engine = Engine(as_on_a_gpu)
    machine.sleep(engine)
    assert machine.sync(engine, make_policy()) == 0
    assert as_on_a_gpu == ["sleep 2", "empty_cache", "wake_up weights", "collective_rpc reload_weights",
                           "wake_up kv_cache", "reset_prefix_cache", "apply_model"]


def test_the_options_of_an_engine_on_a_gpu(as_on_a_gpu, monkeypatch):
    import vllm

    made = []
    monkeypatch.setattr(vllm, "LLM", lambda folder, **options: made.append(options) or SimpleNamespace(
        get_tokenizer=lambda: SimpleNamespace()))
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    machine.start_engine("folder", 25600, 1.0, 0.6, sequences=192, chat_template="turns")
    machine.start_engine("folder", 25600, 1.0, 0.3, sleeps=False)  # a frozen judge's, beside the policy's
    options, judge = made
    assert judge["enable_sleep_mode"] is False and judge["gpu_memory_utilization"] == 0.3
    assert options["dtype"] == "bfloat16" and options["enable_sleep_mode"] and options["max_num_seqs"] == 192
    assert options["gpu_memory_utilization"] == 0.6 and options["distributed_executor_backend"] == "external_launcher"
    assert options["max_num_batched_tokens"] == machine.SAMPLED_AT_ONCE == 8192  # what the plan counts with
    assert options["max_model_len"] == 25600 and options["logprobs_mode"] == "processed_logprobs"
    assert not {"enable_chunked_prefill", "kv_cache_memory_bytes", "enforce_eager", "block_size"} & set(options)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in machine.os.environ


def test_a_cpu_reads_the_longest_prompt_in_one_part(monkeypatch):
    """A prompt read in two parts crashes a seeded request there."""
    import vllm

    made = []
    monkeypatch.setattr(machine, "GPU", False)
    monkeypatch.setattr(vllm, "LLM", lambda folder, **options: made.append(options))
    machine.start_engine("folder", 25600)
    assert made[0]["max_num_batched_tokens"] == 25600 and made[0]["enable_chunked_prefill"] is False


def test_a_base_models_answer_also_ends_where_the_template_ends_a_turn(smol_tokenizer, monkeypatch):
    """Qwen2.5-7B's eos is <|endoftext|>, and its template ends a turn by <|im_end|>."""
    end_of_turn = smol_tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = smol_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert data.stop_ids(smol_tokenizer) == [end_of_turn]
    monkeypatch.setattr(smol_tokenizer, "_special_tokens_map",
                        dict(smol_tokenizer._special_tokens_map, eos_token="<|endoftext|>"))
    assert data.stop_ids(smol_tokenizer) == sorted([other, end_of_turn])


def test_the_shipped_template_gives_plain_turns_ended_by_the_bases_own_end(smol_tokenizer, monkeypatch):
    monkeypatch.setattr(smol_tokenizer, "chat_template", (ROOT / "plain_turns.jinja").read_text())
    ids = data.encode_chat(smol_tokenizer, "Hi")
    assert smol_tokenizer.decode(ids) == smol_tokenizer.bos_token + "User: Hi\n\nAssistant:"
    assert data.stop_ids(smol_tokenizer) == [smol_tokenizer.eos_token_id]


def test_a_missing_or_empty_template_file_is_refused(tmp_path):
    import plan

    with pytest.raises(InputError, match="--chat_template no.jinja: cannot be read"):
        plan.read_template("no.jinja")
    (tmp_path / "empty.jinja").write_text("")
    with pytest.raises(InputError, match="names no 'messages', so it would drop every prompt"):
        plan.read_template(str(tmp_path / "empty.jinja"))


# ---- the trainer ----

def test_weights_of_a_bf16_folder_become_fp32_masters_without_loss(tmp_path, tiny_model, process_group):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    policy = machine.load_policy(str(tmp_path), VOCABULARY, "float32", 1.0, 64, False)
    for name, weight in machine.full_weights(policy):
        assert weight.dtype == torch.float32 and torch.equal(weight, model.state_dict()[name].float()), name
    (row,) = machine.build_rows(random_groups(1), 4096)
    assert policy(row).dtype == torch.float32


def test_no_model_is_ever_whole_in_fp32(tmp_path, tiny_model, process_group, monkeypatch):
    """Of a bf16 folder, at the moment a layer is sharded, only that layer is in fp32."""
    import torch.distributed.fsdp as fsdp
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    real, whole = fsdp.fully_shard, []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: whole.append(
        sorted({str(p.dtype) for p in module.parameters() if not isinstance(p, machine.DTensor)})) or real(
            module, **options))
    seen = []
    to_fp32 = machine.to_fp32
    monkeypatch.setattr(machine, "to_fp32", lambda module: seen.append(module) or to_fp32(module))
    machine.load_policy(str(tmp_path), VOCABULARY, "bfloat16", 1.0, 64, False)
    assert len(seen) == 3 and whole == [["torch.float32"]] * 3  # two layers, each just before its turn, then the rest


def test_flex_attention_is_asked_for_and_gets_the_block_mask(as_on_a_gpu, make_policy, monkeypatch):
    policy, given = make_policy(), []
    monkeypatch.setattr(policy.lm.model, "forward", lambda **options: given.append(options) or SimpleNamespace(
        last_hidden_state=torch.zeros(1, len(options["input_ids"][0]), 64)))
    policy(machine.build_row(random_groups(1)))
    assert given[0]["attention_mask"].shape[-2:] == (256, 256)

    from transformers import AutoModelForCausalLM

    class Loaded(Exception):
        pass

    def load(folder, **options):
        given.append(options)
        raise Loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(Loaded):
        machine.load_policy("folder", VOCABULARY, "bfloat16", 1.0, 64, True)
    assert given[1]["attn_implementation"] == "flex_attention" and given[1]["dtype"] == "auto"


def test_layers_are_freed_after_their_forward_pass_on_a_gpu(as_on_a_gpu, monkeypatch):
    import torch.distributed.fsdp as fsdp

    asked = []
    monkeypatch.setattr(machine.dist, "init_device_mesh", lambda device, sizes: SimpleNamespace(size=lambda: 8))
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: asked.append(options["reshard_after_forward"]))
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    lm = torch.nn.Module()
    lm.model = torch.nn.Module()
    lm.model.layers = layers
    policy = machine.Policy(lm, 2, 1.0, 64, True)
    policy.compute = torch.bfloat16
    machine.shard_policy(policy)
    assert asked == [True] * 3


def test_gradients_are_reduced_after_every_row_on_a_gpu(as_on_a_gpu):
    called = []
    policy = SimpleNamespace(set_requires_gradient_sync=called.append, set_reshard_after_backward=called.append)
    assert list(machine.accumulate(policy, ["row", "row"])) == ["row", "row"] and called == [True] * 4


# ---- memory, drivers, ranks ----

def test_a_steps_peak_is_what_is_taken_and_begins_anew_each_step(as_on_a_gpu, process_group, monkeypatch):
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    taken = iter([30, 50, 20])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((80 - next(taken)) * 2**30, 80 * 2**30))
    clock = machine.Clock(("rollout", "update"))
    clock("rollout")
    clock("update")
    assert machine.peak_memory_gib(clock) == 50
    clock = machine.Clock(("rollout",))
    clock("rollout")
    assert machine.peak_memory_gib(clock) == 20


def test_a_rank_without_a_gpu_is_told_how_many_there_are(as_on_a_gpu, monkeypatch):
    for name, value in dict(RANK="8", LOCAL_RANK="8", WORLD_SIZE="9", MASTER_ADDR="x", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="local rank 8 has no GPU: use --nproc_per_node=8"):
        machine.start_ranks(1)


def test_ranks_meet_over_gloo_and_nccl_on_the_card_of_their_own_number(as_on_a_gpu, monkeypatch):
    asked = []
    for name, value in dict(RANK="3", LOCAL_RANK="3", WORLD_SIZE="8", MASTER_ADDR="x", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "STORE", None)
    monkeypatch.setattr(machine.dist, "rendezvous", lambda *a, **k: iter([("store", 3, 8)]))
    monkeypatch.setattr(machine.dist, "init_process_group", lambda backend, **options: asked.append(backend))
    assert machine.start_ranks(1) == (3, 8)
    assert asked == ["cpu:gloo,cuda:nccl"] and "set_device" in as_on_a_gpu


def test_free_memory_and_the_name_are_the_cards_own(as_on_a_gpu, process_group):
    assert machine.free_gib()[0] == 60.0
    assert machine.about_machine()["device"] == "H100"


@pytest.mark.parametrize("cuda, driver", [("13.0", "580"), ("12.8", "525")])
def test_a_cuda_build_that_sees_no_gpu_names_the_driver_and_does_not_train_on_the_cpu_unasked(
        monkeypatch, capsys, cuda, driver):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "GPU", False)
    monkeypatch.setattr(machine, "STORE", None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["urpo.py"])
    with pytest.raises(SystemExit) as caught:
        urpo.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: this torch is built for CUDA {cuda} and sees no GPU. That CUDA needs an NVIDIA driver of {driver} or "
        "newer (nvidia-smi shows yours). --preset smol trains on the CPU\n")
    assert flags.parse(urpo.Config, urpo.PRESETS, ["--preset", "smol"]).preset == "smol"
    monkeypatch.setattr(sys, "argv", ["urpo.py", "--help"])  # as on the login node of a cluster
    with pytest.raises(SystemExit) as caught:
        urpo.main()
    assert caught.value.code == 0 and "--clip_high" in capsys.readouterr().out
    asked, arguments = plan.split_arguments(["--plan"])
    assert asked.plan and arguments == ["--preset", "paper"]


def test_a_build_without_cuda_takes_the_laptops_preset_by_itself(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert flags.parse(urpo.Config, urpo.PRESETS, []).preset == machine.PRESET


# ---- the paper's preset ----

def test_the_papers_preset_follows_the_paper_in_its_base_and_corrects_for_a_bf16_sampler():
    config = flags.parse(urpo.Config, urpo.PRESETS, ["--preset", "paper"])
    assert (config.model, config.importance_cap, config.keep) == ("Qwen/Qwen2.5-7B", 2.0, 2)
    assert config.preferences[0] == "openbmb/UltraFeedback" and len(config.preferences) == 2
    arguments = "--preset smol --preferences a.jsonl b/c --steps 3".split()
    many = flags.parse(urpo.Config, urpo.PRESETS, arguments)
    assert many.preferences == ["a.jsonl", "b/c"] and many.steps == 3


def test_rows_of_several_sources_of_one_kind_stand_together(tmp_path, smol_tokenizer):
    for name, scores in (("two", [1, 0]), ("four", [3, 2, 1, 0])):
        row = {"prompt": name, "responses": ["r"] * len(scores), "scores": scores}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    names = {"preference": [str(tmp_path / "four.jsonl"), str(tmp_path / "two.jsonl")]}
    sources, _ = readers.load_sources(names, {"preference": 2}, smol_tokenizer, 900, 900, 4, 8)
    assert [len(row.truth) for row in sources["preference"]] == [4, 2]


# ---- the first card that somebody has ----

def test_the_script_for_the_first_gpu_says_why_it_does_nothing_here():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run tests/gpu/first_ten_minutes.py itself")
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu" / "first_ten_minutes.py"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.startswith("skipped: this torch sees no GPU"), done.stderr[-2000:]


def test_the_readme_says_not_yet_run_until_there_are_figures_of_a_gpu():
    readme, figures = (ROOT / "README.md").read_text(), ROOT / "docs" / "gpu.json"
    assert ("**Not yet run.**" in readme) == (not figures.exists())
    if figures.exists():
        checks = json.loads(figures.read_text())["checks"]
        assert f"{sum(check['good'] for check in checks)} of {len(checks)} checks" in readme


def test_dapos_own_request_for_an_answer_goes_and_ours_stays():
    question = ("Solve the following math problem step by step. The last line of your response should be of the form "
                "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $x$.\n\n"
                "Remember to put your answer on its own line after \"Answer:\".")
    record = {"prompt": [{"role": "user", "content": question}], "reward_model": {"ground_truth": "34"}}
    row = readers.read_reasoning(record)
    assert row == Prompt("reasoning", "Find $x$.", answer="34")
    text = data.prompt_text(row)
    assert text.count("boxed") == 1 and "Answer:" not in text


def test_hub_rows_that_repeat_are_read_once_and_measured_once(monkeypatch, smol_tokenizer):
    """17 questions, a hundred times each. What takes long is the tokenizer, so its calls are counted."""
    import datasets

    rows = [{"question": f"What is {i % 17} + 1?", "answer": str(i % 17 + 1)} for i in range(1700)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    measured = []
    encode = readers.encode_prompt
    monkeypatch.setattr(readers, "encode_prompt", lambda *a: measured.append(1) or encode(*a))
    counts = {"preference": 0, "reasoning": 4, "instruction": 0}
    names = {"reasoning": ["some/set"]}
    sources, dropped = readers.load_sources(names, counts, smol_tokenizer, 400, 900, 4, 8)
    assert len(sources["reasoning"]) == 17 and len(measured) == 17 and dropped == {"reasoning": 0}
