"""The first ten minutes on a GPU: what the tests on a CPU leave open. Qwen2.5-0.5B; all it needs is requirements.txt.

    python tests/gpu/first_ten_minutes.py                        one card
    torchrun --nproc_per_node=2 tests/gpu/first_ten_minutes.py   two cards
    python tests/gpu/first_ten_minutes.py --rehearse             the same checks on a CPU with SmolLM2, as far as it has
                                                                 them: that this script itself works

It prints one line a check and goes on after a check that fails. On a GPU it writes docs/gpu.json, from which the
README's table of what runs is filled. Without a GPU it says so and ends: nothing is called good that was not run.
"""
import argparse
import gc
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
import torch.distributed as dist

import data
import machine
import plan
import urpo
from data import Group

RESULTS = []
PROMPTS = ["What is 17 + 25?", "Name three rivers of Europe.", "Write a sentence about owls.", "Is 91 a prime number?"]


def check(name: str, work) -> bool:
    """One line: the name, and what `work` found, or why it failed."""
    started = time.perf_counter()
    try:
        found, good = work(), True
    except Exception as error:  # noqa: BLE001  every check must be reached; the line says what happened
        found, good = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    if dist.is_initialized() and dist.get_world_size() > 1:  # a check is good when it is so on every rank
        good = machine.all_reduce(float(not good)) == 0
    if int(os.environ.get("RANK", 0)) == 0:
        seconds = time.perf_counter() - started
        print(f"{'ok  ' if good else 'FAIL'} {name}: {found} ({seconds:.0f} s)", flush=True)
        RESULTS.append({"check": name, "good": good, "found": found, "seconds": round(seconds, 1)})
    return good


def near(found: float, limit: float, what: str) -> str:
    if not found <= limit:
        raise AssertionError(f"{what} {found:.4g}, above {limit}")
    return f"{what} {found:.4g} (limit {limit})"


class Bench:
    """One model, trainer and sampler, as train() makes them."""

    def __init__(self, model: str):
        self.model = model
        precision = "bfloat16" if machine.GPU else "float32"
        self.limit = 0.05 if machine.GPU else 1e-3  # nats a token, mean
        self.awake = True
        self.config = urpo.Config(model=model, precision=precision, max_prompt_tokens=512, max_answer_tokens=64,
                                  max_referee_tokens=64, row_tokens=2048, group=4, cpu_cache=0.5, gpu_memory=0.4)

    def start(self) -> str:
        config = self.config
        machine.start_ranks(10)
        self.folder = plan.model_folder(self.model)
        self.tokenizer = plan.load_tokenizer(self.folder)
        self.policy = machine.load_policy(self.folder, len(self.tokenizer), config.precision, 1.0, 1024, True)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        self.engine = machine.start_engine(self.folder, 640, config.cpu_cache, config.gpu_memory, 64,
                                           self.tokenizer.chat_template)
        return f"{machine.about_machine()}"

    def sleep(self) -> None:
        machine.sleep(self.engine)
        self.awake = False

    def sync(self) -> None:
        machine.sync(self.engine, self.policy)
        self.awake = True

    def groups(self, seed: int = 0) -> list[Group]:
        assert self.awake, "the engine is asked while it sleeps, which a CPU would not notice"
        prompts = [data.encode_chat(self.tokenizer, text) for text in PROMPTS]
        seeds = [seed + i for i in range(len(prompts))]
        answers = machine.generate(self.engine, prompts, 4, [48] * len(prompts), seeds, 1.0)
        groups = []
        for index, (ids, samples) in enumerate(zip(prompts, answers)):
            group = Group(index, None, ids, [], advantages=[1.0, -1.0, 0.5, -0.5])
            for sample in samples:
                group.add(sample)
            group.weights = [1e-3] * group.answer_tokens
            groups.append(group)
        return groups

    def distance(self, seed: int) -> tuple[float, float]:
        """(mean, largest) |trainer - sampler| of a log-prob, nats."""
        distances = []
        with torch.no_grad():
            for row in machine.build_rows(self.groups(seed), self.config.row_tokens):
                distances += (self.policy(row) - row.sampler_N).abs().tolist()
        return sum(distances) / len(distances), max(distances)

    def in_step(self, seed: int) -> str:
        mean, largest = self.distance(seed)
        return near(mean, self.limit, f"mean nats a token (worst {largest:.3f}),")

    def perturb(self, scale: float) -> None:
        with torch.no_grad():
            for weight in self.policy.parameters():
                own = weight.to_local()
                own.add_(torch.randn_like(own) * own.abs().mean() * scale)

    def cycle(self, number: int) -> str:
        """New weights make the sampler stale, sleep and sync bring it back in step."""
        self.perturb(0.1)
        stale, _ = self.distance(number)
        self.sleep()
        self.sync()
        found = self.in_step(number)
        if not stale > 3 * self.limit:
            raise AssertionError(f"changed weights moved log-probs by {stale:.3f} only: the check shows nothing")
        return f"stale {stale:.2f}, then {found}"

    def update(self, groups: list[Group]) -> str:
        for row in machine.accumulate(self.policy, machine.build_rows(groups, self.config.row_tokens)):
            (-row.weight_N * row.advantage_N * self.policy(row)).sum().backward()
        norm = machine.clip_gradient(self.policy, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not math.isfinite(norm):
            raise AssertionError(f"the gradient's norm is {norm}")
        return f"gradient norm {norm:.4f}"

    def memory(self) -> str:
        """Free memory after each phase; a second round must end as the first one did."""
        found = {}
        for round in (1, 2):
            groups = self.groups(9)
            self.sleep()
            found[f"asleep {round}"] = self.free()
            self.update(groups)
            found[f"after an optimiser step {round}"] = self.free()
            self.sync()
            found[f"awake {round}"] = self.free()
        if machine.GPU and found["awake 2"] < found["awake 1"] - 0.5:
            raise AssertionError(f"memory is lost from round to round: {found}")
        return "GiB free: " + ", ".join(f"{name} {gib:.1f}" for name, gib in found.items())

    def free(self) -> float:
        gpu, host = machine.free_gib()
        return host if gpu is None else gpu

    def padded_ids(self) -> str:
        groups, size = self.groups(1), len(self.tokenizer)
        worst = max(max(answer) for group in groups for answer in group.answers)
        assert worst < size, f"token {worst} was sampled, and the tokenizer has {size}"
        again = [group.answers for group in self.groups(1)]
        assert again == [group.answers for group in groups], "equal seeds gave other answers"
        assert len({tuple(answer) for group in groups for answer in group.answers}) > len(groups), "groups collapsed"
        return f"ids below {size}; equal seeds repeat"


def attention(tokens: int) -> str:
    """Compiled FlexAttention, forward and backward, against dense attention; the count shows recompilations."""
    from torch.nn.attention.flex_attention import flex_attention

    prompt, answers = tokens // 4, 6
    group = Group(0, None, [0] * prompt, [[0] * ((tokens - prompt) // answers)] * answers)
    row = machine.build_row([group])
    T = len(row.ids_T)
    torch.manual_seed(0)
    kind = dict(device=machine.DEVICE, dtype=torch.bfloat16 if machine.GPU else torch.float32)
    query, key, value = (torch.randn(1, heads, T, 64, **kind, requires_grad=True) for heads in (14, 2, 2))
    gain = torch.randn(1, 14, T, 64, **kind)
    compiled = torch.compile(flex_attention, dynamic=True)
    found = compiled(query, key, value, block_mask=machine.block_mask(row), enable_gqa=True)
    index_T = torch.arange(T, device=machine.DEVICE)
    worst = 0.0
    for first in range(0, T, 2048):  # the dense mask in parts: 16,384 squared in fp32 would be 15 GiB a head group
        part = slice(first, first + 2048)
        seen = machine.visible(row)(0, 0, index_T[part, None], index_T[None, :])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, part], key, value, attn_mask=seen, enable_gqa=True)
        worst = max(worst, (found[:, :, part] - expected).abs().max().item())
    gradients = torch.autograd.grad((found * gain).sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients), "a gradient is not finite"
    if T <= 2048:
        seen = machine.visible(row)(0, 0, index_T[:, None], index_T[None, :])
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        for own, dense in zip(gradients, torch.autograd.grad((expected * gain).sum(), (query, key, value))):
            assert (own - dense).norm() <= 0.03 * dense.norm(), "a gradient differs by more than 3 %"
    compiles = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return near(worst, 0.05, f"{T} tokens, {compiles} graphs so far, largest difference")


def recompiles() -> str:
    """transformers' own compiled FlexAttention over rows of many lengths, as part 6 meets them."""
    from types import SimpleNamespace

    from transformers.integrations.flex_attention import flex_attention_forward

    rng, before = random.Random(0), torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    for _ in range(30):
        group = Group(0, None, [0] * rng.randint(20, 400), [[0] * rng.randint(5, 200) for _ in range(8)])
        row = machine.build_row([group])
        shape = dict(device=machine.DEVICE, dtype=torch.bfloat16, requires_grad=True)
        query, key, value = (torch.randn(1, heads, len(row.ids_T), 64, **shape) for heads in (14, 2, 2))
        output, _ = flex_attention_forward(SimpleNamespace(training=True), query, key, value, machine.block_mask(row),
                                           scaling=0.125, row=row, dropout=0.0)
        output.sum().backward()
    return near(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) - before, 8, "graphs of 30 lengths")


def train(model: str, home: Path) -> str:
    """Two steps of train(), saved, resumed for a third, in processes of their own."""
    import subprocess

    ranks = torch.cuda.device_count() if machine.GPU else 1
    ranks = 2 if ranks > 1 else 1
    flags = (f"--preset smol --model {model} --name first --batch 12 --mix 1:1:1 --steps 2 --warmup_steps 1 --group 4 "
             "--gpu_memory 0.4 --lr 1e-6 --toy_rows 64").split()
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    clean = {name: value for name, value in os.environ.items()
             if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    for more in ([], ["--steps", "3", "--resume"]):
        done = subprocess.run([sys.executable, *launcher, ROOT / "urpo.py", *flags, *more], cwd=home, env=clean,
                              capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
    log = [json.loads(line) for line in (home / "runs" / "first" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2], "the log has other steps"
    drifts = [line["drift_mean"] for line in log if line["drift_mean"] is not None]
    assert any(line["updates"] for line in log), "no step made an update"
    return (f"{ranks} ranks, drift {', '.join(f'{drift:.4f}' for drift in drifts)}, seconds of the last step "
            f"{sum(log[-1]['seconds'].values()):.0f}, peak {log[-1]['peak_memory_gib']:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with SmolLM2")
    args = parser.parse_args()
    if not machine.GPU and not args.rehearse:
        print(f"skipped: this torch sees no GPU. {machine.missing_gpu()}".strip())
        return
    model = "raw" if args.rehearse else args.model
    bench = Bench(model)
    if check("1. driver, ranks, engine with sleep", bench.start):
        check("2. trainer and sampler agree, fresh", lambda: bench.in_step(0))
        check("2. after sleep and wake", lambda: (bench.sleep(), bench.sync(), bench.in_step(0))[-1])
        for number in (1, 2, 3):
            check(f"2. after changed weights, cycle {number}", lambda: bench.cycle(number))
        check("3. memory before and after an optimiser step", bench.memory)
        check("5. padded ids, equal seeds", bench.padded_ids)
        bench.sleep()
    if machine.GPU:
        for tokens in (300, 1000, 16384):
            check(f"4. compiled attention against dense attention, {tokens} tokens", lambda: attention(tokens))
        check("4. graphs over 30 lengths of a row", recompiles)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:  # with torchrun the cards are taken by this script itself
        bench.engine = bench.policy = bench.optimizer = None
        gc.collect()
        home = ROOT / "runs" / "first-ten-minutes"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        check("6. two steps, save, resume, one step", lambda: train(plan.model_folder(model), home))
    if int(os.environ.get("RANK", 0)) == 0:
        if ranks > 1:
            print("6. skipped under torchrun: it starts a run of its own, so start this script with python too")
        bad = sum(not result["good"] for result in RESULTS)
        print(f"{len(RESULTS) - bad} of {len(RESULTS)} checks are good")
        if machine.GPU:
            about = {"device": torch.cuda.get_device_name(), "ranks": ranks, "torch": torch.__version__,
                     "checks": RESULTS}
            (ROOT / "docs" / "gpu.json").write_text(json.dumps(about, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
