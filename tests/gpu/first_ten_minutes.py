"""The first ten minutes on a GPU: what the tests on a CPU leave open. Qwen2.5-0.5B; all it needs is requirements.txt.

    python tests/gpu/first_ten_minutes.py                        one card
    torchrun --nproc_per_node=2 tests/gpu/first_ten_minutes.py   two cards, all but the first check
    python tests/gpu/first_ten_minutes.py --rehearse             on a CPU with toy/model: that it works itself

It prints one line a check, goes on after a check that fails, and on a GPU writes docs/gpu.json. Without one it says so
and ends: nothing is called good that was not run.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import urpo
from data import Group, Prompt
from infra import chat, policy, ranks, rows, sampler
from infra.ranks import DEVICE, GPU
from lab import toy

RESULTS = []
PROMPTS = ["What is 17 + 25?", "Name three rivers of Europe.", "Write a sentence about owls.", "Is 91 a prime number?"]
CONFIG = urpo.Config(group=4, max_answer_tokens=48, lr=1e-4, lr_warmup=0)  # moves log-probs, breaks nothing
LIMIT = 0.05 if GPU else 1e-3  # nats a token, mean, between trainer and sampler


def check(name: str, work) -> bool:
    """One line: the name, and what `work` found, or why it failed."""
    started = time.perf_counter()
    try:
        found, good = work(), True
    except Exception as error:  # noqa: BLE001  every check must be reached; the line says what happened
        found, good = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
    if dist.is_initialized() and dist.get_world_size() > 1:  # a check is good when it is so on every rank
        good = ranks.all_reduce(float(not good)) == 0
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{'ok  ' if good else 'FAIL'} {name}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)
        RESULTS.append({"check": name, "good": good, "found": found})
    return good


def near(found: float, limit: float, what: str) -> str:
    assert found <= limit, f"{what} {found:.4g}, above {limit}"  # also when it is not a number
    return f"{what} {found:.4g} (limit {limit})"


def row_of(groups: list[Group]) -> rows.Row:
    return rows.build_row(groups, [[1e-3] * len(group.answers) for group in groups])


class Bench:
    """One model, trainer and sampler, as train() makes them. What is asked of the sampler must find it awake."""

    def start(self, model: str) -> str:
        ranks.start_ranks()
        folder, precision = policy.check_folder(model), "bfloat16" if GPU else "float32"
        self.tokenizer, self.awake = chat.load_tokenizer(folder), {}
        self.policy = policy.load_policy(folder, vocabulary=len(self.tokenizer), precision=precision, recompute=True)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), fused=True)
        self.sampler = sampler.start_sampler(
            folder, max_tokens=640, chat_template=self.tokenizer.chat_template, sequences=64, gpu_memory=0.4)
        return str(ranks.about_machine())

    def groups(self, seed: int) -> list[Group]:
        share = list(enumerate(Prompt("instruction", text) for text in PROMPTS))
        groups = urpo.rollout(CONFIG, self.sampler, self.tokenizer, share, step=seed)
        for group in groups:
            group.advantages = [1.0, -1.0, 0.5, -0.5]
        return groups

    @torch.no_grad()
    def distance(self, groups: list[Group]) -> float:
        """Mean |trainer - sampler| of a log-prob, nats."""
        row = row_of(groups)
        return (self.policy(row) - row.sampler_N).abs().mean().item()

    def cycle(self, number: int) -> str:
        """An optimiser step while the sampler sleeps, and what memory is free; sync wakes it and brings it in step."""
        groups, free = self.groups(number), {}
        sampler.sleep(self.sampler)
        free["asleep"] = ranks.free_gib()
        for row in policy.accumulate(self.policy, [row_of(groups)]):
            (-row.weight_N * row.advantage_N * self.policy(row)).sum().backward()
        norm = urpo.step_optimizer(CONFIG, self.policy, self.optimizer)
        free["after the step"], stale = ranks.free_gib(), self.distance(groups)
        sampler.sync(self.sampler, self.policy)
        self.awake[number] = free["awake"] = ranks.free_gib()
        if GPU and number == 3:  # the first cycle makes the moments
            assert self.awake[3][0] > self.awake[2][0] - 0.5, f"memory is lost from cycle to cycle: {self.awake}"
        assert stale > 3 * LIMIT, f"a gradient of {norm:.3g} moved log-probs by {stale:.3f} only"
        what = f"GiB free on GPU and host {free}; stale {stale:.2f} nats a token, then"
        return near(self.distance(self.groups(number)), LIMIT, what)

    def padded_ids(self) -> str:
        answers = [group.answers for group in self.groups(1)]
        worst, size = max(max(ids) for group in answers for ids in group), len(self.tokenizer)
        assert worst < size, f"token {worst} was sampled, and the tokenizer has {size}"
        assert answers == [group.answers for group in self.groups(1)], "equal seeds gave other answers"
        assert len({tuple(ids) for group in answers for ids in group}) > len(answers), "groups collapsed"
        return f"ids below {size}; equal seeds repeat"


def attend(prompt: int, lengths: list[int]):
    """(row, query, key, value, output) of transformers' own compiled FlexAttention over a row of one group."""
    from transformers.integrations.flex_attention import flex_attention_forward

    answers, logprobs = [[0] * length for length in lengths], [[0.0] * length for length in lengths]
    row = row_of([Group(0, None, [0] * prompt, answers, advantages=[1.0] * len(lengths), sampler_logprobs=logprobs)])
    shape = dict(device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    query, key, value = (torch.randn(1, heads, len(row.ids_T), 64, **shape) for heads in (14, 2, 2))
    output, _ = flex_attention_forward(SimpleNamespace(training=True), query, key, value, rows.block_mask(row),
                                       scaling=0.125, row=row, dropout=0.0)
    return row, query, key, value, output.transpose(1, 2)


def attention(tokens: int) -> str:
    """Compiled FlexAttention, forward and backward, against dense attention of some of the queries."""
    row, query, key, value, found = attend(tokens // 4, [(tokens - tokens // 4) // 6] * 6)
    index_T = torch.arange(len(row.ids_T), device=DEVICE)
    some = torch.randperm(len(index_T), device=DEVICE)[:2048]  # all of 16,384 would fill a card
    seen = rows.visible(row)(0, 0, some[:, None], index_T[None, :])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, some], key, value, attn_mask=seen, enable_gqa=True)
    gain = torch.randn_like(expected)
    own = torch.autograd.grad((found[:, :, some] * gain).sum(), (query, key, value))
    for one, other in zip(own, torch.autograd.grad((expected * gain).sum(), (query, key, value))):
        assert (one - other).norm() <= 0.03 * other.norm(), "a gradient differs by more than 3 %, or is not finite"
    return near((found[:, :, some] - expected).abs().max().item(), 0.05, f"{len(index_T)} tokens, largest difference")


def recompiles() -> str:
    """How many graphs rows of 30 lengths compile, as part 6 meets them."""
    rng, before = random.Random(0), counters["stats"].get("unique_graphs", 0)
    for _ in range(30):
        *_, output = attend(rng.randint(20, 400), [rng.randint(5, 200) for _ in range(8)])
        output.sum().backward()
    return near(counters["stats"].get("unique_graphs", 0) - before, 8, "graphs of 30 lengths")


def train(model: str) -> str:
    """Two steps of urpo.py, saved, resumed for a third, in processes of their own."""
    run, count = ROOT / "runs" / "first-ten-minutes", min(2, torch.cuda.device_count()) if GPU else 1
    shutil.rmtree(run, ignore_errors=True)
    toy.main([])  # the training rows
    flags = f"--preset smol --name {run.name} --batch 12 --mix 1:1:1 --steps 2 --warmup_steps 1 --model {model}".split()
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}"] if count > 1 else []
    for more in ([], ["--steps", "3", "--resume"]):
        command = [sys.executable, *launcher, "urpo.py", *flags, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2] and any(line["updates"] for line in log), "steps, updates"
    return (f"{count} ranks, drift {[line['drift_mean'] for line in log]}, seconds of the last step "
            f"{sum(log[-1]['seconds'].values()):.0f}, peak {log[-1]['peak_memory_gib']:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Qwen/Qwen2.5-0.5B; rehearsed with toy/model")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    args = parser.parse_args()
    if not GPU and not args.rehearse:
        print(f"skipped: this torch sees no GPU. {ranks.missing_gpu()}".strip())
        return
    model = args.model or (str(ROOT / "toy" / "model") if args.rehearse else "Qwen/Qwen2.5-0.5B")
    bench = Bench()
    if "RANK" not in os.environ:  # under torchrun this script itself takes the cards
        check("1. urpo.py: two steps, save, resume, one step", lambda: train(model))
    if check("2. driver, ranks, sampler with sleep", lambda: bench.start(model)):
        check("3. trainer and sampler agree", lambda: near(bench.distance(bench.groups(0)), LIMIT, "mean nats a token"))
        check("4. padded ids, equal seeds", bench.padded_ids)
        for number in (1, 2, 3):
            check(f"5. an optimiser step, sleep, wake, memory, cycle {number}", lambda: bench.cycle(number))
    if GPU:
        for tokens in (300, 1000, 16384):
            check(f"6. compiled attention against dense attention, {tokens} tokens", lambda: attention(tokens))
        check("6. graphs over 30 lengths of a row", recompiles)
    if RESULTS:  # on rank 0
        print(f"{sum(result['good'] for result in RESULTS)} of {len(RESULTS)} checks are good", flush=True)
        if GPU:
            about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": RESULTS}
            (ROOT / "docs" / "gpu.json").write_text(json.dumps(about, indent=1) + "\n")
    os._exit(0)


if __name__ == "__main__":
    main()
