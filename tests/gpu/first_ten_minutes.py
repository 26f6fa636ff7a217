"""The first ten minutes on a GPU: what the tests on a CPU leave open. Qwen2.5-0.5B; all it needs is requirements.txt.

    python tests/gpu/first_ten_minutes.py                        one card
    torchrun --nproc_per_node=2 tests/gpu/first_ten_minutes.py   two cards
    python tests/gpu/first_ten_minutes.py --rehearse             on a CPU, as far as it has the checks, with toy/model:
                                                                 that this script itself works

It prints one line a check and goes on after a check that fails. On a GPU it writes docs/gpu.json, from which the
README's table of what runs is filled. Without a GPU it says so and ends: nothing is called good that was not run.
"""
import argparse
import gc
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

import data
import urpo
from data import Group
from infra import chat, policy, ranks, rows, sampler
from infra.ranks import DEVICE, GPU
from lab import toy

RESULTS = []
PROMPTS = ["What is 17 + 25?", "Name three rivers of Europe.", "Write a sentence about owls.", "Is 91 a prime number?"]
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
        seconds = time.perf_counter() - started
        print(f"{'ok  ' if good else 'FAIL'} {name}: {found} ({seconds:.0f} s)", flush=True)
        RESULTS.append({"check": name, "good": good, "found": found, "seconds": round(seconds, 1)})
    return good


def near(found: float, limit: float, what: str) -> str:
    assert found <= limit, f"{what} {found:.4g}, above {limit}"  # also when it is not a number
    return f"{what} {found:.4g} (limit {limit})"


def row_of(groups: list[Group]) -> rows.Row:
    return rows.build_row(groups, [[1e-3] * len(group.answers) for group in groups])


class Bench:
    """One model, trainer and sampler, as train() makes them."""

    def start(self, model: str) -> str:
        ranks.start_ranks()
        folder, precision = policy.check_folder(model), "bfloat16" if GPU else "float32"
        self.tokenizer, self.awake = chat.load_tokenizer(folder), True
        self.policy = policy.load_policy(folder, vocabulary=len(self.tokenizer), precision=precision, recompute=True)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        self.sampler = sampler.start_sampler(
            folder, max_tokens=640, chat_template=self.tokenizer.chat_template, sequences=64, gpu_memory=0.4)
        return str(ranks.about_machine())

    def sleep(self) -> None:
        sampler.sleep(self.sampler)
        self.awake = False

    def sync(self) -> None:
        sampler.sync(self.sampler, self.policy)  # compares every tensor, and raises where one differs
        self.awake = True

    def groups(self, seed: int = 0) -> list[Group]:
        assert self.awake, "the sampler is asked while it sleeps, which a CPU would not notice"
        prompts = [chat.encode_chat(self.tokenizer, text) for text in PROMPTS]
        answers = sampler.generate(self.sampler, prompts, n=4, max_tokens=[48] * len(prompts), temperature=1.0,
                                   seeds=[seed + i for i in range(len(prompts))])
        groups = []
        for index, (ids, samples) in enumerate(zip(prompts, answers)):
            groups.append(Group(index, None, ids, advantages=[1.0, -1.0, 0.5, -0.5]))
            for sample in samples:
                groups[-1].add(sample)
        return groups

    @torch.no_grad()
    def distance(self, seed: int) -> tuple[float, float]:
        """(mean, largest) |trainer - sampler| of a log-prob, nats."""
        row = row_of(self.groups(seed))
        distance_N = (self.policy(row) - row.sampler_N).abs()
        return distance_N.mean().item(), distance_N.max().item()

    def in_step(self, seed: int) -> str:
        mean, largest = self.distance(seed)
        return near(mean, LIMIT, f"mean nats a token (worst {largest:.3f}),")

    @torch.no_grad()
    def cycle(self, number: int) -> str:
        """New weights make the sampler stale, sleep and sync bring it back in step."""
        for weight in self.policy.parameters():
            own = weight.to_local()
            own.add_(torch.randn_like(own) * own.abs().mean() * 0.1)
        stale, _ = self.distance(number)
        self.sleep()
        self.sync()
        found = self.in_step(number)
        assert stale > 3 * LIMIT, f"changed weights moved log-probs by {stale:.3f} only: the check shows nothing"
        return f"stale {stale:.2f}, then {found}"

    def memory(self) -> str:
        """Free memory after each phase; a second round must end as the first one did."""
        found = {}
        for number in (1, 2):
            groups = self.groups(9)
            self.sleep()
            found[f"asleep {number}"] = ranks.free_gib()
            for row in policy.accumulate(self.policy, [row_of(groups)]):
                (-row.weight_N * row.advantage_N * self.policy(row)).sum().backward()
            norm = policy.clip_gradient(self.policy, 1.0)
            assert norm < float("inf"), f"the gradient's norm is {norm}"
            self.optimizer.step()
            self.optimizer.zero_grad()
            found[f"after an optimiser step {number}"] = ranks.free_gib()
            self.sync()
            found[f"awake {number}"] = ranks.free_gib()
        assert not GPU or found["awake 2"][0] > found["awake 1"][0] - 0.5, f"memory is lost every round: {found}"
        return "GiB free, GPU and host: " + ", ".join(f"{name} {gib}" for name, gib in found.items())

    def padded_ids(self) -> str:
        answers = [group.answers for group in self.groups(1)]
        worst, size = max(max(ids) for group in answers for ids in group), len(self.tokenizer)
        assert worst < size, f"token {worst} was sampled, and the tokenizer has {size}"
        assert answers == [group.answers for group in self.groups(1)], "equal seeds gave other answers"
        assert len({tuple(ids) for group in answers for ids in group}) > len(answers), "groups collapsed"
        return f"ids below {size}; equal seeds repeat"


def random_row(prompt: int, lengths: list[int]) -> rows.Row:
    count = len(lengths)
    return row_of([Group(0, None, [0] * prompt, [[0] * length for length in lengths], advantages=[1.0] * count,
                         sampler_logprobs=[[0.0] * length for length in lengths])])


def attention(tokens: int) -> str:
    """Compiled FlexAttention, forward and backward, against dense attention; the count shows recompilations."""
    from torch.nn.attention.flex_attention import flex_attention

    row = random_row(tokens // 4, [(tokens - tokens // 4) // 6] * 6)
    T = len(row.ids_T)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, T, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for heads in (14, 2, 2))
    gain, index_T = torch.randn_like(query), torch.arange(T, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=True)
    found = compiled(query, key, value, block_mask=rows.block_mask(row), enable_gqa=True)
    gradients = torch.autograd.grad((found * gain).sum(), (query, key, value))
    worst, dense = 0.0, [0.0, 0.0, 0.0]
    for first in range(0, T, 2048):  # in parts: a dense mask of 16,384 squared, for each head, would fill a card
        part = slice(first, first + 2048)
        seen = rows.visible(row)(0, 0, index_T[part, None], index_T[None, :])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, part], key, value, attn_mask=seen, enable_gqa=True)
        worst = max(worst, (found[:, :, part] - expected).abs().max().item())
        more = torch.autograd.grad((expected * gain[:, :, part]).sum(), (query, key, value))
        dense = [total + one.float() for total, one in zip(dense, more)]
    for own, other in zip(gradients, dense):
        assert (own - other).norm() <= 0.03 * other.norm(), "a gradient differs by more than 3 %, or is not finite"
    return near(worst, 0.05, f"{T} tokens, {graphs()} graphs so far, largest difference")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def recompiles() -> str:
    """transformers' own compiled FlexAttention over rows of many lengths, as part 6 meets them."""
    from transformers.integrations.flex_attention import flex_attention_forward

    rng, before = random.Random(0), graphs()
    for _ in range(30):
        row = random_row(rng.randint(20, 400), [rng.randint(5, 200) for _ in range(8)])
        shape = dict(device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        query, key, value = (torch.randn(1, heads, len(row.ids_T), 64, **shape) for heads in (14, 2, 2))
        output, _ = flex_attention_forward(SimpleNamespace(training=True), query, key, value, rows.block_mask(row),
                                           scaling=0.125, row=row, dropout=0.0)
        output.sum().backward()
    return near(graphs() - before, 8, "graphs of 30 lengths")


def train(model: str) -> str:
    """Two steps of train(), saved, resumed for a third, in processes of their own."""
    home, count = ROOT / "runs" / "first-ten-minutes", min(2, torch.cuda.device_count()) if GPU else 1
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    flags = ("--preset smol --name first --batch 12 --mix 1:1:1 --steps 2 --warmup_steps 1 --gpu_memory 0.4 --lr 1e-6 "
             f"--model {model}").split()
    for kind, flag in data.FLAGS.items():
        text = "".join(json.dumps(record) + "\n" for record in toy.records(kind, "train", 64, 2))
        (home / f"{flag}.jsonl").write_text(text)
        flags += [f"--{flag}", f"{flag}.jsonl"]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}"] if count > 1 else []
    of_ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in of_ranks}
    for more in ([], ["--steps", "3", "--resume"]):
        done = subprocess.run([sys.executable, *launcher, ROOT / "urpo.py", *flags, *more], cwd=home, env=clean,
                              capture_output=True, text=True)
        assert not done.returncode, f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
    log = [json.loads(line) for line in (home / "runs" / "first" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2], "the log has other steps"
    assert any(line["updates"] for line in log), "no step made an update"
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
    if check("1. driver, ranks, sampler with sleep", lambda: bench.start(model)):
        check("2. trainer and sampler agree, fresh", lambda: bench.in_step(0))
        check("2. after sleep and wake", lambda: (bench.sleep(), bench.sync(), bench.in_step(0))[-1])
        for number in (1, 2, 3):
            check(f"2. after changed weights, cycle {number}", lambda: bench.cycle(number))
        check("3. memory before and after an optimiser step", bench.memory)
        check("5. padded ids, equal seeds", bench.padded_ids)
        bench.sleep()
    if GPU:
        for tokens in (300, 1000, 16384):
            check(f"4. compiled attention against dense attention, {tokens} tokens", lambda: attention(tokens))
        check("4. graphs over 30 lengths of a row", recompiles)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # with torchrun the cards are taken by this script itself
        vars(bench).clear()
        gc.collect()
        check("6. two steps, save, resume, one step", lambda: train(model))
    if int(os.environ.get("RANK", 0)) == 0:
        bad = sum(not result["good"] for result in RESULTS)
        print(f"{len(RESULTS) - bad} of {len(RESULTS)} checks are good; under torchrun without 6, so use python too")
        if GPU:
            about = {"device": torch.cuda.get_device_name(), "ranks": os.environ.get("WORLD_SIZE", 1),
                     "torch": torch.__version__, "checks": RESULTS}
            (ROOT / "docs" / "gpu.json").write_text(json.dumps(about, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
