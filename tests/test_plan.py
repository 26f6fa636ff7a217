"""lab/plan.py: memory against fake tensors, time against published steps (docs/gpu.md), the verdict, the command."""
import json
import re
import subprocess
import sys

import pytest

import urpo
from conftest import ROOT
from infra.settings import parse
from lab import plan

SEVEN_B = plan.planned_shape("Qwen/Qwen2.5-7B")
EIGHT_B = plan.planned_shape("OctoThinker/OctoThinker-8B-Hybrid-Base")  # the shape of Llama-3.1-8B


def settings(**changes) -> plan.Plan:
    return plan.Plan(**{**urpo.PRESETS["paper"], **changes})


# ---- memory ----

FAKE = {  # model, ranks, tokens of a prompt, of an answer
    "layer": ("Qwen/Qwen2.5-32B", 8, 512, 1984),  # 16,384 tokens: a layer at work is the peak
    "root": ("Qwen/Qwen2.5-7B", 8, 512, 192),  # 2,048 tokens: the whole gradient of embedding and head is
    "head": ("Qwen/Qwen2.5-1.5B", 1, 512, 960),  # one GPU: the logits are
}


@pytest.fixture(scope="module")
def fake_updates() -> dict[str, dict]:
    """GiB that torch's own memory tracker counts, without a GPU and without computing anything. Side by side."""
    started = {}
    for name, (model, world, prompt, answer) in FAKE.items():
        case = {"config": dict(zip(plan.FIELDS, plan.SHAPES[model])), "world": world, "prompt": prompt,
                "answer": answer, "group": 8, "vocabulary": 151665}
        started[name] = subprocess.Popen([sys.executable, ROOT / "tests" / "fake_update.py", json.dumps(case)],
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = {}
    for name, process in started.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found[name] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAKE))
def test_states_within_5_and_the_peak_of_the_update_within_20_percent_of_fake_tensors(fake_updates, name):
    model, world, prompt, answer = FAKE[name]
    found, shape, tokens = fake_updates[name], plan.planned_shape(model), prompt + 8 * answer
    assert found["tokens"] == tokens
    config = settings(row_tokens=tokens, max_prompt_tokens=prompt, max_answer_tokens=answer, max_referee_tokens=answer)
    rows = plan.gpu_memory(shape, config, world)
    state = rows["parameters"]["update"]
    assert state == pytest.approx(found["current"]["SHARDED_PARAM"], rel=0.05)
    assert rows["gradients"]["update"] == pytest.approx(found["current"]["SHARDED_GRAD"], rel=0.05)
    assert rows["moments"]["update"] == pytest.approx(2 * found["current"]["SHARDED_PARAM"], rel=0.05)
    planned = 2 * state + rows["peak of the update"]["update"]
    assert planned == pytest.approx(found["peak"]["Total"], rel=0.2)


# ---- time ----

# GPUs, mean tokens of 2,048 answers, published seconds by part and in all.
PUBLISHED = {
    "Llama-3.1-8B, FSDP2: NeMo RL, issue 959": (8, 777, dict(update=38, rollout=57, old_logprobs=19), 122),
    "Llama-3.1-8B, Megatron: NeMo RL's performance summary, v0.4": (16, 910, {}, 97.7),
}


@pytest.mark.parametrize("what", list(PUBLISHED))
def test_the_time_of_a_step_is_within_half_of_published_ones(monkeypatch, what):
    """All log-probs are made."""
    world, mean, parts, total = PUBLISHED[what]
    monkeypatch.setattr(plan, "ANSWER_SHARE", mean / 4096)
    config = plan.Plan(mix="0:1:0", batch=256, group=8, max_answer_tokens=4096, minibatches=10**9)
    found = plan.step_seconds(EIGHT_B, config, world)
    for part, seconds in parts.items():
        assert found[part] == pytest.approx(seconds, rel=0.5), part
    assert sum(found.values()) == pytest.approx(total, rel=0.35)


# ---- does it fit ----


@pytest.mark.parametrize("changes, world, fault", [
    (dict(gpu_gib=79.6), 8, ""),
    (dict(gpu_gib=79.0), 2, "part sync"),
    (dict(gpu_gib=79.6, judge=True), 8, "47.8 are frozen judge"),
    (dict(gpu_gib=79.6, judge=True, gpu_memory=0.35), 8, ""),
    (dict(gpu_gib=79.0, gpu_memory=0.3), 2, ""),
    (dict(gpu_gib=24.0), 8, "part update"),
    (dict(gpu_gib=40.0, gpu_memory=0.43), 8, "cache"),  # vLLM does not start unless it holds 24,576 + 1,024 tokens
    (dict(gpu_gib=40.0, gpu_memory=0.43, max_judge_tokens=8192), 8, ""),
])
def test_what_does_not_fit_is_the_largest_part_or_else_the_cache(changes, world, fault):
    found = plan.does_not_fit(SEVEN_B, settings(**changes), world)
    assert fault in found and bool(found) == bool(fault)


TABLE = re.findall(r"^\| ([\d.]+)B, (\d+)( \(24\))? \| (.*?) \| ([\d.]+), ([\d.]+) \| (\d+ s|-) \|",
                   (ROOT / "docs" / "gpu.md").read_text(), re.M)


@pytest.mark.parametrize("size, cards, small, flags, update, sync, seconds", TABLE)
def test_a_row_of_the_table_of_models_and_cards_is_what_the_plan_says(size, cards, small, flags, update, sync, seconds):
    asked = [flag for flag in flags.strip("`").split() if flags != "none"]
    config = parse(plan.Plan, urpo.PRESETS, [*asked, "--model", f"Qwen/Qwen2.5-{size}B"], "")
    config.gpu_gib, config.nproc, shape = 24.0 if small else 79.6, min(8, int(cards)), plan.planned_shape(config.model)
    assert plan.does_not_fit(shape, config, int(cards)) == ""
    together = plan.gpu_memory(shape, config, int(cards))["together"]
    found = [f"{together['update']:.1f}", f"{together['sync']:.1f}"]
    time = "-" if small else f"{sum(plan.step_seconds(shape, config, int(cards)).values()):.0f} s"  # of H100s
    assert [*found, time] == [update, sync, seconds]


def test_72b_by_hand(monkeypatch, capsys):
    """72.71e9 parameters at 2 bytes are 135.4 GiB; at 4 bytes over 32 cards 8.46."""
    assert len(TABLE) == 8
    text = planned(monkeypatch, capsys, "--model Qwen/Qwen2.5-72B --nodes 4 --gpu_gib 79.6")
    assert "sampler's weights take 135.4 GiB" in text and re.search(r"parameters +8.46", text)
    assert "what fits: --tensor_parallel 4 --offload, about 137 s" in text and "a step: " not in text


# ---- the command ----


def planned(monkeypatch, capsys, arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lab.plan", *arguments.split()])
    plan.main()
    return capsys.readouterr().out


def test_the_plan_needs_no_gpu_no_model_and_no_network_and_takes_any_flag(monkeypatch, capsys):
    text = planned(monkeypatch, capsys, "--gpu_gib 79.6 --nproc 8 --row_tokens 8192")
    for name in plan.gpu_memory(SEVEN_B, settings(), 8):
        assert f"\n{name} " in text
    assert "\nlongest packed row: 20480 tokens" in text  # a group may be longer than --row_tokens
    for figure in ("7.62B", "8 GPUs", "answers of full length", "106.6 GB a checkpoint", "a step: about 58 s"):
        assert figure in text
    assert text.endswith("it fits\n")
    assert "does NOT fit" in planned(monkeypatch, capsys, "--preset=paper --nproc 1 --nodes 2 --gpu_gib 79.6")


def test_a_model_that_is_not_known_is_read_from_its_config(monkeypatch, capsys, tiny_model):
    assert tiny_model in planned(monkeypatch, capsys, f"--preset smol --model {tiny_model} --nproc 2")


@pytest.mark.parametrize("arguments, message", [
    ("--nproc 7", "--batch 210"), ("--gpu_gib 0", "--gpu_gib 0"), ("--nproc_per_node 8", "--nproc_per_node")])
def test_a_mistake_is_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        planned(monkeypatch, capsys, arguments)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
