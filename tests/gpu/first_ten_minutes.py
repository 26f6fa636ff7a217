"""The first ten minutes on a GPU: what the tests on a CPU leave open. Qwen2.5-0.5B; all it needs is requirements.txt.

    python tests/gpu/first_ten_minutes.py                        one card
    torchrun --nproc_per_node=2 tests/gpu/first_ten_minutes.py   two cards, all but the first check
    python tests/gpu/first_ten_minutes.py --trainer              the trainer alone: no vLLM, no hub, no download
    python tests/gpu/first_ten_minutes.py --rehearse             on a CPU with toy/model: that it works itself

It prints one line a check, and goes on after a check that fails. --out FILE keeps the lines as JSON. Without a GPU it
says so and ends: nothing is called good that was not run.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
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
from infra import chat, policy, ranks, rows, runs, sampler
from infra.ranks import GPU
from lab import plan, toy

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
    return rows.build_row(groups, 1e-3)


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


# ---- the trainer alone, with random weights in the shapes of a base


def random_weights(policy, folder: str) -> None:
    """In the place of policy.read_weights. The same ones each time: how far rounding goes depends on them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            own = weight.to_local()
            own.fill_(1.0) if own.ndim == 1 else own.normal_(std=0.02)


def group_of(tokens: int, answers: int = 8) -> Group:
    """Random token ids: a prompt of a sixteenth of all, and so many answers."""
    rng, prompt = random.Random(tokens), max(2, tokens // 16)
    length = (tokens - prompt) // answers
    ids, *texts = [[rng.randrange(3, 500) for _ in range(size)] for size in [prompt] + [length] * answers]
    return Group(0, None, ids, texts, advantages=[1.0, -1.0] * (answers // 2),
                 sampler_logprobs=[[-6.0] * length] * answers)


def clock(work) -> tuple[float, float, float]:
    """(seconds until the work is done, seconds until Python was, GiB that it took at most). After one turn before."""
    work()
    held = 0
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    work()
    host = time.perf_counter() - started
    if GPU:
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    return wall, host, (torch.cuda.max_memory_allocated() - held) / 2**30 if GPU else 0.0


class Trainer:
    """A policy of random weights. `shape` holds what plan.SHAPES does."""

    def start(self, shape: tuple, precision: str = "bfloat16", recompute: bool = True) -> str:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**dict(zip(plan.FIELDS, shape)), max_position_embeddings=65536)
        self.folder, policy.read_weights = tempfile.mkdtemp(), random_weights
        config.save_pretrained(self.folder)
        self.policy = policy.load_policy(
            self.folder, vocabulary=config.vocab_size, precision=precision, recompute=recompute)
        self.shape = plan.planned_shape(self.folder)
        return f"{self.shape.parameters / 1e9:.2f}B parameters, {self.shape.layers} layers, {precision}"

    @torch.no_grad()
    def look(self, row) -> None:
        self.policy(row)

    def learn(self, row) -> None:
        for one in policy.accumulate(self.policy, [row]):
            (-one.weight_N * one.advantage_N * self.policy(one)).sum().backward()

    def forward(self, tokens: int) -> str:
        row = row_of([group_of(tokens)])
        wall, host, _ = clock(lambda: self.look(row))
        share = 2 * self.shape.parameters * len(row.ids_T) / wall / plan.MATMUL
        return f"{wall:.2f} s, Python {host:.2f} s; {share:.2f} of 989 TFLOP/s, planned {plan.UPDATE_SHARE}"

    def both(self, tokens: int) -> str:
        row = row_of([group_of(tokens)])
        wall, host, gib = clock(lambda: self.learn(row))
        self.policy.zero_grad()
        share = 6 * self.shape.parameters * len(row.ids_T) / wall / plan.MATMUL
        config = plan.Plan(row_tokens=tokens, max_prompt_tokens=1, max_answer_tokens=1, max_referee_tokens=1)
        planned = plan.update_peak(self.shape, config, 1)
        return (f"{wall:.2f} s, Python {host:.2f} s; {share:.2f} of 989 TFLOP/s, planned {plan.UPDATE_SHARE}; "
                f"{gib:.1f} GiB, planned {planned:.1f}")

    def packed(self, limit: float, gradient_limit: float) -> str:
        """Log-probs and gradients of a packed row of two groups against those of separate sequences."""
        groups = [group_of(700, 4), group_of(400, 4)]
        self.learn(row_of(groups))
        found = [weight.grad.full_tensor().clone() for weight in self.policy.parameters()]
        packed_N = self.policy(row_of(groups)).detach()
        self.policy.zero_grad()
        plain = []
        for group in groups:
            for answer, advantage in zip(group.answers, group.advantages):
                logprob_N = self.policy.plain_logprobs(group.prompt_ids + answer, len(answer))
                (-1e-3 * advantage * logprob_N).sum().backward()
                plain.append(logprob_N.detach())
        far = [(own - weight.grad.full_tensor()).norm() / weight.grad.full_tensor().norm().clamp(min=1e-12)
               for own, weight in zip(found, self.policy.parameters())]
        self.policy.zero_grad()
        distance = (packed_N - torch.cat(plain)).abs().mean().item()
        found = near(distance, limit, "nats a token")
        return f"{found}; {near(max(far).item(), gradient_limit, 'gradients, relative')}"

    def graphs(self) -> str:
        """How many graphs rows of 30 lengths compile."""
        rng, before, started = random.Random(0), counters["stats"].get("unique_graphs", 0), time.perf_counter()
        for _ in range(30):
            self.learn(row_of([group_of(rng.randint(100, 2000))]))
        found = near(counters["stats"].get("unique_graphs", 0) - before, 8, "graphs of 30 lengths")
        return f"{found}, {time.perf_counter() - started:.0f} s"

    def mask(self, tokens: int) -> str:
        row = row_of([group_of(tokens)])
        return "{:.3f} s, Python {:.3f} s, {:.1f} GiB".format(*clock(lambda: rows.block_mask(row)))

    def update(self, tokens: int) -> str:
        """An optimiser step, saved and loaded again."""
        row, optimizer = row_of([group_of(tokens)]), torch.optim.AdamW(self.policy.parameters(), fused=True)
        self.learn(row)
        started = time.perf_counter()
        urpo.step_optimizer(CONFIG, self.policy, optimizer)
        seconds = [time.perf_counter() - started]
        weight = next(self.policy.parameters()).full_tensor().clone()
        saved, tokenizer = Path(self.folder, "checkpoints", "step_1"), SimpleNamespace(save_pretrained=lambda folder: 0)
        runs.save_checkpoint(saved, self.policy, optimizer, tokenizer, settings={"keep": 0})
        seconds.append(time.perf_counter() - started)
        random_weights(self.policy, "")
        runs.load_checkpoint(saved, self.policy, optimizer)
        seconds.append(time.perf_counter() - started)
        assert torch.equal(weight, next(self.policy.parameters()).full_tensor()), "another weight was loaded"
        shutil.rmtree(self.folder)  # 22 GB of a 1.5B model
        return "AdamW {:.2f} s, with saving {:.0f} s, with loading {:.0f} s".format(*seconds)


def train_alone(rehearsed: bool) -> None:
    """All checks of the trainer. What a CPU has of it, and in tiny sizes, when it is rehearsed."""
    seven, small = plan.SHAPES["Qwen/Qwen2.5-7B"], plan.SHAPES["Qwen/Qwen2.5-1.5B"]
    sizes, more = (16384, 20480), (8192, 32768)
    if rehearsed:
        seven, small = ("qwen2", 512, 64, 128, 2, 4, 2, False), ("qwen2", 512, 64, 128, 2, 4, 2, True)
        sizes, more = (256, 320), (128, 512)
    ranks.start_ranks()
    bench = Trainer()
    if check("T1. random weights in the shape of 7B", lambda: bench.start(seven)):
        for tokens in sizes:
            check(f"T2. forward, {tokens} tokens", lambda: bench.forward(tokens))
            check(f"T3. forward and backward, {tokens} tokens", lambda: bench.both(tokens))
    two_layers = (*seven[:4], 2, *seven[5:])
    # With random weights the gradients of the last layer's q and k nearly cancel. In fp32 those of plain transformers,
    # too, are 1e-4 away from float64 there, on a CPU with AVX-512.
    for precision, *limits in (("bfloat16", 0.05, 0.15), ("float32", 1e-3 if GPU else 1e-5, 3e-3 if GPU else 3e-4)):
        if check(f"T4. two layers of it in {precision}", lambda: bench.start(two_layers, precision, recompute=False)):
            check("T4. a packed row equals separate sequences", lambda: bench.packed(*limits))
    if GPU:
        check(f"T5. the mask of {sizes[0]} tokens", lambda: bench.mask(sizes[0]))
        check("T6. graphs over 30 lengths of a row", bench.graphs)
    if check("T7. random weights in the shape of 1.5B", lambda: bench.start(small)):
        check("T7. an optimiser step, save, load", lambda: bench.update(sizes[0]))
        for tokens in more:
            check(f"T8. forward and backward, {tokens} tokens", lambda: bench.both(tokens))


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
    parser.add_argument("--trainer", action="store_true", help="without a sampler")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    parser.add_argument("--out", type=Path, help="keep the lines there, as JSON")
    args = parser.parse_args()
    if not GPU and not args.rehearse:
        print(f"skipped: this torch sees no GPU. {ranks.missing_gpu()}".strip())
        return
    if args.trainer:
        train_alone(args.rehearse)
    else:
        with_sampler(args.model or (str(ROOT / "toy" / "model") if args.rehearse else "Qwen/Qwen2.5-0.5B"))
    if RESULTS:  # on rank 0
        print(f"{sum(result['good'] for result in RESULTS)} of {len(RESULTS)} checks are good", flush=True)
        if args.out:
            device = torch.cuda.get_device_name() if GPU else "a CPU: this says nothing of a GPU"
            about = {"device": device, "torch": torch.__version__, "checks": RESULTS}
            args.out.write_text(json.dumps(about, indent=1) + "\n")
    os._exit(0)


def with_sampler(model: str) -> None:
    bench = Bench()
    if "RANK" not in os.environ:  # under torchrun this script itself takes the cards
        check("1. urpo.py: two steps, save, resume, one step", lambda: train(model))
    if check("2. driver, ranks, sampler with sleep", lambda: bench.start(model)):
        check("3. trainer and sampler agree", lambda: near(bench.distance(bench.groups(0)), LIMIT, "mean nats a token"))
        check("4. padded ids, equal seeds", bench.padded_ids)
        for number in (1, 2, 3):
            check(f"5. an optimiser step, sleep, wake, memory, cycle {number}", lambda: bench.cycle(number))


if __name__ == "__main__":
    main()
