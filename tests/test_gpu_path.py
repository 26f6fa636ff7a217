"""What only a GPU runs, as far as a CPU can show it: the order of calls, options, lengths of rows, messages.

GPU is set by hand here, and what only CUDA has is replaced. Nothing in this file says that a GPU works:
tests/gpu/first_ten_minutes.py is for that. The sampler's part is in test_sync.py, padded rows in test_rows.py.
"""
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import urpo
from conftest import ROOT, packed, random_groups
from infra import policy as policies
from infra import ranks, rows, settings
from infra.ranks import InputError
from infra.settings import parse


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The modules as they read on a GPU; a list of what was asked of CUDA."""
    called = []
    for module in (ranks, rows, policies):
        monkeypatch.setattr(module, "GPU", True)
    monkeypatch.setattr(rows, "ROW_BLOCK", 128)
    monkeypatch.setattr(rows, "SHORTEST_ROW", 256)
    for name, value in dict(synchronize=None, mem_get_info=(60 * 2**30, 80 * 2**30), set_device=None,
                            device_count=8, get_device_name="H100").items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, value=value: called.append(name) or value)
    return called


# ---- rows and layers ----

@pytest.mark.slow
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
        groups = random_groups(rng.randint(1, 3), seed=number)
        for group in groups:
            group.prompt_ids, group.answers = [0] * rng.randint(20, 80), [[0] * rng.randint(5, 60) for _ in range(8)]
        row = packed(groups)
        grad = number % 3 > 0
        query, key, value = (torch.randn(1, heads, len(row.ids_T), 16, requires_grad=grad) for heads in (6, 2, 2))
        with torch.set_grad_enabled(grad):
            wrapped.flex_attention_forward(SimpleNamespace(training=True), query, key, value, rows.block_mask(row),
                                           scaling=0.25, row=row, dropout=0.0)
    assert 1 <= len(graphs) <= 6


def test_flex_attention_gets_the_block_mask(make_policy, as_on_a_gpu, monkeypatch):
    given, policy = [], make_policy()
    monkeypatch.setattr(policy.lm.model, "forward", lambda **options: given.append(options) or SimpleNamespace(
        last_hidden_state=torch.zeros(1, len(options["input_ids"][0]), 64)))
    policy(packed(random_groups(1)))
    assert given[0]["attention_mask"].shape[-2:] == (256, 256)


# ---- memory, drivers, ranks ----

def test_a_steps_peak_is_what_is_taken_and_begins_anew_each_step(as_on_a_gpu, process_group, monkeypatch):
    taken = iter([30, 50, 20])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((80 - next(taken)) * 2**30, 80 * 2**30))
    for parts, peak in ((["rollout", "update"], 50), (["rollout"], 20)):
        clock = ranks.Clock()
        for part in parts:
            clock(part)
        assert clock.figures()["peak_memory_gib"] == peak and list(clock.figures()["seconds"]) == parts


def test_ranks_meet_over_gloo_and_nccl_on_the_card_of_their_own_number(as_on_a_gpu, process_group, monkeypatch):
    asked = []
    for name, value in dict(RANK="3", LOCAL_RANK="3", WORLD_SIZE="9", MASTER_ADDR="x", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "STORE", None)
    monkeypatch.setattr(ranks.dist, "rendezvous", lambda *a, **k: iter([("store", 3, 9)]))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda name, rank, **_: asked.append((name, rank)))
    ranks.start_ranks()
    assert asked == [("cpu:gloo,cuda:nccl", 3)] and "set_device" in as_on_a_gpu
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(InputError, match="local rank 8 .*--nproc_per_node=8"):
        ranks.start_ranks()


def test_a_cuda_build_that_sees_no_gpu_names_the_driver_and_does_not_train_on_the_cpu_unasked(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module in (ranks, settings):
        monkeypatch.setattr(module, "GPU", False)
    with pytest.raises(InputError, match="CUDA 13.0 .*driver of 580 or newer.*--preset smol"):
        parse(urpo.Config, urpo.PRESETS, [], "")
    assert parse(urpo.Config, urpo.PRESETS, ["--preset", "smol"], "").preset == "smol"
    with pytest.raises(SystemExit) as caught:  # as on the login node of a cluster
        parse(urpo.Config, urpo.PRESETS, ["--help"], "")
    assert caught.value.code == 0 and "--clip_high" in capsys.readouterr().out
    monkeypatch.setattr(torch.version, "cuda", None)
    assert parse(urpo.Config, urpo.PRESETS, [], "").preset == settings.PRESET


# ---- the first card that somebody has ----

@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run tests/gpu/first_ten_minutes.py itself")
@pytest.mark.parametrize("flags, checks", [([], 0), (["--rehearse", "--trainer"], 13)])
def test_the_script_for_the_first_gpu_is_rehearsed_on_a_cpu_or_says_why_it_does_nothing(tmp_path, flags, checks):
    script = [sys.executable, ROOT / "tests" / "gpu" / "first_ten_minutes.py", "--out", tmp_path / "out.json"]
    done = subprocess.run([*script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ok  ") == checks and "FAIL" not in done.stdout, done.stdout
    assert checks or done.stdout.startswith("skipped: this torch sees no GPU")


def test_the_readme_says_not_yet_run_until_there_are_figures_of_a_gpu():
    readme, figures = (ROOT / "README.md").read_text(), ROOT / "docs" / "gpu.json"
    assert ("not yet run" in readme) == (not figures.exists())
    if figures.exists():
        checks = json.loads(figures.read_text())["checks"]
        assert f"{sum(check['good'] for check in checks)} of {len(checks)} checks" in readme
