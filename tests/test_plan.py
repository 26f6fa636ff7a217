"""plan.py: the formula of memory against fake tensors and the laptop's run, of time against published steps; messages.

The figures of others and what they stand for are cited in docs/gpu.md.
"""
import doctest
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

import flags
import plan
import urpo
from conftest import ROOT
from data import InputError

SEVEN_B = plan.planned_shape("Qwen/Qwen2.5-7B")


def settings(preset="paper", **changes) -> dict:
    return asdict(urpo.Config(**urpo.PRESETS[preset])) | changes


FAKE = {  # model, ranks, tokens of a prompt, of an answer, of a chunk of logits
    "layer": ("Qwen/Qwen2.5-7B", 8, 512, 1984, 1024),  # 16,384 tokens: a layer at work is the peak
    "root": ("Qwen/Qwen2.5-7B", 8, 512, 192, 1024),  # 2,048 tokens: the whole gradient of embedding and head is
    "head": ("Qwen/Qwen2.5-1.5B", 1, 512, 960, 1024),  # one GPU: the logits are
}


@pytest.fixture(scope="module")
def fake_updates() -> dict[str, dict]:
    """GiB that torch's own memory tracker counts, without a GPU and without computing anything. Side by side."""
    started = {}
    for name, (model, world, prompt, answer, chunk) in FAKE.items():
        case = {"config": dict(zip(plan.FIELDS, plan.SHAPES[model])), "world": world, "prompt": prompt,
                "answer": answer, "group": 8, "chunk": chunk, "vocabulary": 151665}
        started[name] = subprocess.Popen([sys.executable, ROOT / "tests" / "fake_update.py", json.dumps(case)],
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = {}
    for name, process in started.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found[name] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", list(FAKE))
def test_states_within_5_and_the_peak_of_the_update_within_20_percent_of_fake_tensors(fake_updates, name):
    model, world, prompt, answer, chunk = FAKE[name]
    found = fake_updates[name]
    shape = plan.planned_shape(model)
    tokens = prompt + 8 * answer
    assert found["tokens"] == tokens
    asked = settings(row_tokens=tokens, max_prompt_tokens=prompt, max_answer_tokens=answer, max_referee_tokens=answer,
                     logit_chunk=chunk)
    rows = plan.gpu_memory(shape, asked, world, 80)
    state = rows["parameters"]["update"]
    assert state == pytest.approx(found["current"]["SHARDED_PARAM"], rel=0.05)
    assert rows["gradients"]["update"] == pytest.approx(found["current"]["SHARDED_GRAD"], rel=0.05)
    assert rows["moments"]["update"] == pytest.approx(2 * found["current"]["SHARDED_PARAM"], rel=0.05)
    planned = 2 * state + plan.update_peak(plan.update_pieces(shape, asked, world))
    assert planned == pytest.approx(found["peak"]["Total"], rel=0.2)


@pytest.mark.parametrize("world, measured", [(2, 10.6), (1, 6.4)], ids=["make demo", "a step of case (a)"])
def test_the_plan_of_a_cpu_is_within_15_percent_of_what_runs_on_this_model_took(world, measured):
    """make demo took 10.6 GiB (docs/results.md), the bench's case (a) 6.4 (docs/speed.md): rows of 1,024 tokens, .5 GiB
    of cache, nothing recomputed."""
    sizes = settings("smol", row_tokens=1024, recompute=False, cpu_cache=0.5, max_prompt_tokens=800, group=4,
                     max_answer_tokens=48, max_referee_tokens=40)
    rows = plan.cpu_memory(plan.planned_shape("raw"), sizes, world)
    assert world * rows["together"]["update"] == pytest.approx(measured, rel=0.15)


# ---- time ----

EIGHT_B = plan.planned_shape("OctoThinker/OctoThinker-8B-Hybrid-Base")  # the shape of Llama-3.1-8B
# GPUs, mean tokens of 2,048 answers to prompts of about 150 tokens, published seconds by part and in all.
PUBLISHED = {
    "Llama-3.1-8B, FSDP2: NVIDIA-NeMo/RL#959": (
        8, 777, {"update": 38, "rollout": 57, "old_logprobs": 19, "sync": 4}, 122),
    "Llama-3.1-8B, Megatron: NeMo RL's performance summary, v0.4": (16, 910, {}, 97.7),
}


@pytest.mark.parametrize("what", list(PUBLISHED))
def test_the_time_of_a_step_is_within_half_of_published_ones(what):
    """Their rows repeat a prompt for each answer, so each answer is its own prompt here; all log-probs are made."""
    world, mean, parts, total = PUBLISHED[what]
    found = plan.step_seconds(EIGHT_B, world, [(2048, 1, 150, mean, 4096)], (0, 0), minibatches=10**9)
    for part, seconds in parts.items():
        assert found[part] == pytest.approx(seconds, rel=0.5), part
    assert sum(found.values()) == pytest.approx(total, rel=0.35)


def test_a_judges_prompt_costs_the_answers_that_it_lists_and_never_more_than_its_limit():
    assert plan.planned_judging(settings(), 64) == (64, pytest.approx(8 * 0.4 * 2048 + 0.05 * 4096))
    assert plan.planned_judging(settings(judge_list=2), 64) == (256, pytest.approx(2 * 0.4 * 2048 + 0.05 * 4096))
    assert plan.planned_judging(settings(max_judge_tokens=4096), 64) == (64, 4096)
    seconds = [plan.planned_seconds(SEVEN_B, settings(max_judge_tokens=limit), 8)["self_score"]
               for limit in (8192, 24576, 2048)]
    assert seconds[0] == seconds[1] > seconds[2]  # it was charged .9 of the limit, however long the answers were


# ---- what does not fit, and what to change ----

def test_a_7b_model_on_two_cards_is_refused_before_its_first_step_and_the_advice_fits():
    with pytest.raises(InputError) as caught:
        plan.check_memory(SEVEN_B, settings(), 2, 2, 79.0, 500.0)
    message = str(caught.value)
    assert "2 GPUs, 7.6B parameters: part sync needs 9" in message and "GiB of a GPU with 79.0 GiB" in message
    assert "use --gpu_memory 0.3 (python urpo.py --plan shows all)" in message
    plan.check_memory(SEVEN_B, settings(gpu_memory=0.3), 2, 2, 79.0, 500.0)
    plan.check_memory(SEVEN_B, settings(), 8, 8, 79.0, 500.0)
    with pytest.raises(InputError, match="8 ranks of this node load 153 GiB into its own memory, and 100 GiB are free"):
        plan.check_memory(SEVEN_B, settings(), 8, 8, 79.0, 100.0)


def test_a_flag_is_named_where_a_flag_is_enough():
    small = plan.planned_shape("Qwen/Qwen2.5-0.5B")
    assert plan.what_to_change(small, settings(batch=48), 1, 23.5) == "--gpu_memory 0.5"
    assert not plan.does_not_fit(small, settings(batch=48, gpu_memory=0.5), 1, 23.5)


@pytest.mark.parametrize("gpu_gib", [8, 16, 24, 40, 48, 80, 140])
@pytest.mark.parametrize("model", list(plan.SHAPES))
def test_every_advice_fits_or_says_that_nothing_does(model, gpu_gib):
    shape = plan.planned_shape(model)
    advice = plan.what_to_change(shape, settings(), 1, gpu_gib)
    if "nothing fits" in advice:
        assert plan.does_not_fit(shape, settings(gpu_memory=0.2, row_tokens=2048, logit_chunk=256), 32, gpu_gib)
        return
    changed, world = {}, 1
    for part in filter(None, advice.split(" and ")):
        name, value = part.lstrip("-").split()
        if value == "GPUs":
            world = int(name)
        else:
            changed[name] = float(value) if name == "gpu_memory" else int(value)
    assert not plan.does_not_fit(shape, settings(**changed), world, gpu_gib), advice
    flags.check(urpo.Config(**settings(**changed)), world)


def test_no_number_of_gpus_is_advised_that_does_not_split_the_batch():
    """Six cards would hold it, but 6 x 2 minibatches do not divide 6."""
    assert plan.what_to_change(SEVEN_B, settings(batch=12), 3, 48.0) == "--gpu_memory 0.5 and 6 GPUs"
    found = plan.what_to_change(SEVEN_B, settings(batch=6), 3, 48.0)
    assert found.startswith("nothing fits on up to 3 GPUs, over which --batch splits: ")


def test_a_cache_too_small_for_four_answers_does_not_fit():
    short = settings(gpu_memory=0.21, max_judge_tokens=1000, max_prompt_tokens=1000)
    assert "cache holds 3.2 answers of full length" in plan.does_not_fit(SEVEN_B, short, 8, 79.0)


def test_a_gpus_cache_must_hold_the_longest_judges_prompt_with_its_answer():
    """vLLM refuses to start otherwise. `paper`: 24,576 + 1,024 tokens."""
    reason = plan.does_not_fit(SEVEN_B, settings(gpu_memory=0.43), 8, 40.0)
    assert re.search(r"cache holds \d+ tokens, and the longest prompt with its answer may take 25632 \(", reason)
    assert plan.what_to_change(SEVEN_B, settings(gpu_memory=0.43), 8, 40.0) == "--gpu_memory 0.5"
    assert not plan.does_not_fit(SEVEN_B, settings(gpu_memory=0.43, max_judge_tokens=8192), 8, 40.0)


def test_a_cpus_cache_must_hold_it_too():
    shape, long = plan.planned_shape("raw"), settings("smol", max_judge_tokens=24576)
    with pytest.raises(InputError, match=r"--cpu_cache 0.5: the sampler's cache holds 11651 tokens, and the longest "
                                         r"prompt with its answer may take 24672 .*: use --cpu_cache 1.1, or shorter"):
        plan.check_memory(shape, long, 1, 1, None, 99.0)
    plan.check_memory(shape, long | {"cpu_cache": 1.1}, 1, 1, None, 99.0)
    plan.check_memory(shape, settings("smol"), 1, 1, None, 99.0)


def test_more_cpu_ranks_than_the_memory_holds_are_refused_with_a_number_that_fits():
    shape = plan.planned_shape("raw")
    with pytest.raises(InputError, match=r"8 ranks of a 135M model need about .* and 16.0 GiB are free: use "
                                         r"--nproc_per_node=2, or a smaller model"):
        plan.check_memory(shape, settings("smol"), 8, 8, None, 16.0)
    plan.check_memory(shape, settings("smol"), 2, 2, None, 16.0)


def start(monkeypatch, host_gib: float, local: int, other: str = "") -> None:
    """check_start on one of two ranks; the other one found `other`."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(plan.machine, "on_rank_0", lambda what, work: plan.planned_shape("raw"))
    monkeypatch.setattr(plan.machine, "free_gib", lambda: (None, host_gib))
    monkeypatch.setattr(plan.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(plan.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(2), [own, other]))
    plan.check_start("folder", 1, 1, settings("smol"))


def test_two_nodes_each_hold_their_own_ranks_only(monkeypatch):
    """Two ranks take 11.4 GiB. The figure that is free is one machine's."""
    start(monkeypatch, 8.0, local=1)
    with pytest.raises(InputError, match="2 ranks of a 135M model need about 11.4 GiB and 8.0 GiB are free"):
        start(monkeypatch, 8.0, local=2)
    with pytest.raises(InputError, match="1 ranks of a 135M model need about 5.7 GiB and 4.0 GiB are free"):
        start(monkeypatch, 4.0, local=1)


def test_a_rank_stops_where_another_nodes_memory_is_too_small(monkeypatch):
    with pytest.raises(InputError, match="no room over there"):
        start(monkeypatch, 99.0, local=1, other="no room over there")


# ---- the command ----

def test_the_seven_parts_are_written_down_once():
    assert plan.PARTS is urpo.PARTS
    for path in ROOT.glob("*.py"):
        assert ('"self_score", "reward"' in path.read_text()) == (path.name == "data.py"), path


def planned(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["urpo.py", "--plan", *arguments])
    urpo.main()
    return capsys.readouterr().out


def test_the_plan_needs_no_gpu_no_model_and_no_network_and_takes_any_flag(monkeypatch, capsys):
    text = planned(monkeypatch, capsys, "--gpu_gib", "79.6", "--nproc", "8", "--row_tokens", "8192")
    assert "Qwen/Qwen2.5-7B: 7.62B parameters on 1 x 8 ranks, 80 GiB each" in text
    for word in ("parameters ", "gradients", "moments", "gathered weights", "activations", "logits", "block mask",
                 "sampler weights", "KV cache", "answers of full length", "host memory", "107", "a step: about",
                 "the run: ", "it fits"):
        assert word.replace("107", "106.6 GB a checkpoint") in text, word
    assert "longest packed row: 20480 tokens" in text  # a group may be longer than --row_tokens
    two = planned(monkeypatch, capsys, "--preset", "paper", "--nproc", "1", "--nodes", "2", "--gpu_gib", "79.6")
    assert "on 2 x 1 ranks" in two and "does NOT fit: part " in two and "Use " in two


def test_ranks_that_do_not_divide_the_batch_are_refused_by_the_plan_with_one_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(urpo.machine, "STORE", None)
    with pytest.raises(SystemExit):
        planned(monkeypatch, capsys, "--gpu_gib", "80", "--nproc", "7")
    assert "over 7 ranks, 2 minibatches: use a multiple of 14, for example 196" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--gpu_gib 24", "--nproc 2", "--nodes=2"])
def test_the_plans_flags_are_refused_without_it(given):
    """--gpu_gib 24 turned a training run into preset paper."""
    flag = given.replace("=", " ").split()[0]
    with pytest.raises(InputError, match=f"^{flag}: no setting of a run, it belongs to --plan; give --plan too"):
        plan.split_arguments(given.split())
    assert plan.split_arguments(["--plan", *given.split()])[0].plan


def test_a_preset_that_is_given_stays():
    for given in (["--preset", "smol"], ["--preset=smol"]):
        assert plan.split_arguments(["--plan", "--gpu_gib", "24", *given])[1] == given
    assert plan.split_arguments(["--plan", "--gpu_gib", "24"])[1] == ["--preset", "paper"]


def test_the_help_names_the_plans_flags(capsys):
    with pytest.raises(SystemExit):
        flags.parse(urpo.Config, urpo.PRESETS, ["--help"])
    shown = capsys.readouterr().out
    for flag in ("--plan", "--nproc", "--nodes", "--gpu_gib"):
        assert f"{flag} " in shown


def test_the_plan_of_the_laptop(monkeypatch, capsys):
    text = planned(monkeypatch, capsys, "--preset", "smol", "--nproc", "2", "--model", "raw")
    assert "raw: 0.13B parameters on 1 x 2 ranks" in text and "all ranks of a node: " in text


def test_a_model_shape_that_nobody_knows_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "stranger"}')
    with pytest.raises(InputError, match="its config.json names no language model that transformers knows"):
        plan.planned_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 1, '
                                          '"n_head": 2}')
    with pytest.raises(InputError, match="GPT2LMHeadModel has no model.layers and lm_head"):
        plan.planned_shape(str(tmp_path))


def test_more_padded_ids_than_the_sampler_can_forbid_are_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                num_key_value_heads=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="4096 token ids and its tokenizer only 3000.*takes 1024 at most: cut the"):
        plan.check_model(str(tmp_path), 3000, 64)
    assert plan.check_model(str(tmp_path), 4096 - 1024, 64).vocabulary == 4096


def test_worked_examples_in_docstrings():
    assert doctest.testmod(plan).failed == 0
