"""URPO: one LLM that learns to answer and to judge its own answers in a single GRPO loop (arXiv 2507.17515).

Read this file from top to bottom and you have read the algorithm; its equations stand in rewards.py. One step has
seven parts; the same names stand in README.md, in the log's timings and in the tests:

    1. draw          a mixed batch of preference (P), reasoning (R) and instruction (I) prompts at P:R:I
    2. rollout       G answers a prompt, sampled by vLLM from the current weights
    3. self_score    the same weights judge each group of open-ended answers
    4. reward        P: Kendall's tau, R: verify the answer, I: self-score; then group-relative advantages
    5. old_logprobs  the trainer's log-probs at rollout weights
    6. update        minibatches: clipped loss, drift against the sampler's own log-probs, gradient clip, AdamW
    7. sync          the new weights into the sampler; log; checkpoint

One policy; no critic, no reward model, no KL and no reference model (beta = 0); one optimiser, one run.

    torchrun --nproc_per_node=2 urpo.py      SmolLM2-135M on a CPU, in the laptop's world that `make toy` writes
    torchrun --nproc_per_node=8 urpo.py      Qwen2.5-7B on eight GPUs (not yet run)

The end of a tensor's name is its shape: logprob_N holds one value for each of N answer tokens. G is always the number
of answers in a group.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

try:
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: this is not the Python of the installation; use .venv/bin/python (README.md)")
import torch.distributed as dist

import data
from data import Group
from infra import chat, ranks, runs
from infra.policy import (
    Policy,
    accumulate,
    check_folder,
    check_memory,
    check_model,
    check_packing,
    clip_gradient,
    load_policy,
    updates_done,
)
from infra.ranks import InputError, all_reduce, exchange, on_rank_0
from infra.rows import Row, build_rows, rebalance
from infra.sampler import generate, largest_drift, sleep, start_sampler, sync
from infra.settings import parse, setting
from rewards import (
    Tally,
    clipped_objective,
    group_advantages,
    group_rewards,
    mean,
    step_figures,
    token_weight,
    update_figures,
)

# ------------------------------------------------------------------------------- Config


@dataclass
class Config:
    """Every setting: its default, which is the paper's where we know it, what it does, and its bound."""

    preset: Literal["auto", "smol", "paper"] = setting("auto", "by hardware | SmolLM2-135M, CPU | Qwen2.5-7B, 8 GPUs")
    name: str = setting("urpo", "the run's folder under runs/")
    seed: int = setting(0, "of data order, candidate order and sampling")
    resume: bool = setting(False, "continue runs/<name> from its last checkpoint")
    # model and data
    model: str = setting("Qwen/Qwen2.5-7B", "a folder or hub id (paper: Qwen2.5-7B)")
    chat_template: str = setting("", "file with a template for a base that has none: infra/plain_turns.jinja")
    preferences: list[str] = setting(["openbmb/UltraFeedback", "Skywork/Skywork-Reward-Preference-80K-v0.2"],
                                     "P sources: .jsonl files or hub ids (ours)")
    reasoning: list[str] = setting(["BytedTsinghua-SIA/DAPO-Math-17k"], "R sources (ours)")
    instructions: list[str] = setting(["HuggingFaceH4/no_robots"], "I sources (ours)")
    # the loop
    steps: int = setting(1000, "steps in all, warm-up included (ours)", least=0)
    warmup_steps: int = setting(100, "steps on P + R alone before I joins (paper: 100)", least=0)
    mix: str = setting("1:1:1", "P:R:I by prompt count (paper: 1:1:1)")
    batch: int = setting(192, "prompts a step over all ranks (ours)", above=0)
    group: int = setting(8, "G, answers a prompt (ours)", least=2)
    minibatches: int = setting(2, "updates per rollout batch; with 1 the ratio is 1 and nothing is clipped", above=0)
    # sampling and judging
    temperature: float = setting(1.0, "of all sampling; the trainer's log-probs use it too", least=0.01, most=2)
    max_prompt_tokens: int = setting(4096, "longer rows are dropped at load", above=0)
    max_answer_tokens: int = setting(2048, "of answers to R and I", above=0)
    max_referee_tokens: int = setting(1024, "of answers to P and of self-judgements", above=0)
    max_judge_tokens: int = setting(24576, "of a judge's prompt; a longer one counts as unread", above=0)
    judgements: int = setting(1, "K, how often each open-ended answer is judged; the mean counts (ours)", above=0)
    judge_list: int = setting(0, "answers that one judgement compares; 0: all G (ours)", least=0)
    both_orders: bool = setting(False, "draw each P row in both orders, so that no position pays (ours)")
    tau: Literal["b", "strict"] = setting("b", "scipy's tau-b | strict: a tied pair of scores earns 0")
    # objective
    clip_low: float = setting(0.8, "lower end of the ratio (paper: 0.8)", least=0, most=1)
    clip_high: float = setting(1.28, "upper end of the ratio (paper: 1.28)", least=1)
    importance_cap: float = setting(0.0, "0: off; else weight tokens by min(trainer/sampler probability, cap)", least=0)
    # optimiser
    lr: float = setting(1e-6, "AdamW, constant after lr_warmup (ours)", above=0)
    lr_warmup: int = setting(10, "updates over which lr rises linearly", least=0)
    # machine, record
    precision: Literal["bfloat16", "float32"] = setting("bfloat16", "of the trainer's compute; master weights are fp32")
    row_tokens: int = setting(16384, "tokens in one packed row, the micro-batch of log-probs and update", above=0)
    tensor_parallel: int = setting(1, "ranks that share one sampler, where a GPU cannot hold a whole one", above=0)
    offload: bool = setting(False, "keep the trainer's weights, gradients and moments in the host's memory")
    gpu_memory: float = setting(0.6, "share of the GPU that vLLM may take while it is awake", above=0, most=1)
    save_every: int = setting(100, "steps between checkpoints; the last step is always saved; 0: only that", least=0)
    keep: int = setting(0, "newest checkpoints to keep; 0: all", least=0)


TOY = os.path.relpath(Path(__file__).parent / "toy")  # the laptop's world: `make toy` writes it
PRESETS = {
    # bf16 alone makes .01 to .02 nats a token between trainer and sampler (measured on a CPU), which the cap corrects.
    # A checkpoint of 7B takes 107 GB, so two stay.
    "paper": dict(importance_cap=2.0, keep=2),
    # A judge of 135M parameters was taught pairs, so it judges its own answers in pairs, each answer in two. Half of a
    # step is P, since the judge has most to learn; in both orders, so that no position pays.
    "smol": dict(
        model=f"{TOY}/model",
        preferences=[f"{TOY}/preferences.jsonl"],
        reasoning=[f"{TOY}/reasoning.jsonl"],
        instructions=[f"{TOY}/instructions.jsonl"],
        steps=16, warmup_steps=4, mix="2:1:1", batch=24, group=8,
        max_prompt_tokens=800, max_answer_tokens=64, max_referee_tokens=40, max_judge_tokens=800,
        both_orders=True, judgements=2, judge_list=2,
        lr=2e-5, precision="float32", row_tokens=1024,
        save_every=8, keep=2),
}
# What a resumed run may change: how it goes on. Everything else decides which prompts come or what the record means,
# and one config.json speaks for all steps of a run.
MAY_CHANGE = """name preset steps lr lr_warmup clip_low clip_high importance_cap
    precision row_tokens tensor_parallel offload gpu_memory save_every keep""".split()
GRAD_CLIP = 1.0  # the largest norm of a gradient


def check(config: Config, world: int) -> None:
    """What no single bound can say. Raises InputError that says what to change."""
    if world % config.tensor_parallel:
        raise InputError(f"--tensor_parallel {config.tensor_parallel}: {world} ranks do not split into samplers of so "
                         f"many: use {math.gcd(world, config.tensor_parallel)}")
    part = world * config.minibatches
    for warmup in {False, config.warmup_steps > 0}:
        data.mix_counts(config, warmup, part)
    if config.batch % part:
        fitting = math.gcd(config.batch // config.minibatches, world)
        splits = config.batch % config.minibatches == 0 and fitting % config.tensor_parallel == 0
        fewer = f", or {fitting} ranks" if splits else ""
        raise InputError(f"--batch {config.batch} does not split over {world} ranks, {config.minibatches} minibatches: "
                         f"use --batch {data.fitting_batch(config, part)}{fewer}")
    data.check_judging(config)


# ------------------------------------------------------------------------------- 2. rollout, 3. self_score


def sequences_at_once(config: Config) -> int:
    """How many answers one sampler may have to sample at a time: those of all ranks that share it."""
    return config.batch // dist.get_world_size() * config.group * config.tensor_parallel


def rollout(config: Config, sampler, tokenizer, share: list[tuple[int, data.Prompt]], step: int) -> list[Group]:
    """Part 2: G answers to each prompt of this rank's share, by the current weights."""
    groups = []
    prompts, limits, seeds = [], [], []
    for index, prompt in share:
        prompts.append(data.encode_prompt(tokenizer, prompt))
        groups.append(Group(index, prompt, prompts[-1]))
        limits.append(config.max_referee_tokens if prompt.kind == "preference" else config.max_answer_tokens)
        seeds.append(data.request_seed(config.seed, step, index, "answer"))
    answers = generate(
        sampler, prompts, n=config.group, max_tokens=limits, seeds=seeds, temperature=config.temperature)
    for group, samples in zip(groups, answers):
        for sample in samples:
            group.add(sample)
        group.entropy = mean(-logprob for logprobs in group.sampler_logprobs for logprob in logprobs)
    return groups


def self_score(config: Config, sampler, tokenizer, groups: list[Group], step: int) -> None:
    """Part 3: each open-ended answer is judged K times among its group, by the current weights, shuffled.

    The tokens of a judgement get no gradient, since nothing grounds them. The referee's skill comes from P alone.
    """
    asked, prompts, seeds = [], [], []
    for group in groups:
        orders = data.judgement_orders(config, group.index, step) if group.prompt.kind == "instruction" else []
        for k, order in enumerate(orders):
            shown = [group.texts[i] for i in order]
            ids = data.encode_judgement(tokenizer, group.prompt.instruction, shown)
            judgement = {"order": order, "prompt": tokenizer.decode(ids), "text": "", "finished": False}
            group.judgements.append(judgement)
            if len(ids) <= config.max_judge_tokens:  # else nobody asks, and it stays unread
                asked.append(judgement)
                prompts.append(ids)
                seeds.append(data.request_seed(config.seed, step, group.index, f"judge/{k}"))
    limits = [config.max_referee_tokens] * len(prompts)
    answers = generate(sampler, prompts, n=1, max_tokens=limits, seeds=seeds, temperature=config.temperature)
    for judgement, (sample,) in zip(asked, answers):
        judgement.update(text=sample.text, finished=sample.finished)


# ------------------------------------------------------------------------------- 4. reward, 5. old_logprobs


def reward(config: Config, groups: list[Group]) -> list[Group]:
    """Part 4: the reward of every answer by its kind, then advantages within the group.

    Returns the groups of all ranks, in the order of the batch. Here the ranks wait for the one that sampled longest.
    """
    for group in groups:
        group.rewards = group_rewards(config, group)
        if group.rewards is None:  # of some answer too few judgements can be read: counted
            group.advantages = [0.0] * len(group.texts)
        else:
            group.advantages = group_advantages(torch.tensor(group.rewards)).tolist()
    return sorted(sum(exchange(groups), []), key=lambda group: group.index)


def build_minibatches(config: Config, groups: list[Group]) -> list[list[Row]]:
    """The packed rows of each minibatch, with the weight of every answer token in the loss.

    The mean is over the whole global minibatch, on all ranks. Groups without a signal count in it, but get no
    row: their gradient is exactly 0. FSDP averages gradients over the ranks, so a weight is multiplied by their number.
    Thus the loss does not depend on how many ranks share the minibatch.
    """
    minibatches, size = [], len(groups) // config.minibatches
    for m in range(config.minibatches):
        minibatch = groups[m * size : (m + 1) * size]
        tokens = 0
        for group in minibatch:
            tokens += sum(map(len, group.answers))
        weight = dist.get_world_size() * token_weight(all_reduce(tokens))
        active = [group for group in minibatch if group.has_signal]
        minibatches.append(build_rows(active, row_tokens=config.row_tokens, weight=weight))
    return minibatches


@torch.no_grad()
def old_logprobs(config: Config, policy: Policy, minibatches: list[list[Row]]) -> None:
    """Part 5: log pi_old by the trainer at rollout weights, for every minibatch but the first.

    Part 6 meets the first one at these same weights, so its own forward pass gives them.
    """
    for rows in minibatches[1:]:
        for row in rows:
            row.keep_old(policy(row), config.importance_cap)


# ------------------------------------------------------------------------------- 6. update


def check_drift(config: Config, minibatches: list[list[Row]]) -> dict[str, float | None]:
    """Distance between the trainer's log-probs at rollout weights and the sampler's own, nats a token.

    Measured before the first optimiser step, of every token in a row. Raises FloatingPointError where it is more than
    precision explains.
    """
    total = tokens = largest = 0.0
    for rows in minibatches:
        for row in rows:
            distance_N = (row.old_N - row.sampler_N).double().abs()
            distance_N = distance_N[row.old_N.isfinite() & (row.weight_N > 0)]  # not finite: the update is skipped
            total += distance_N.sum().item()
            tokens += len(distance_N)
            largest = max([largest, *distance_N.tolist()])
    tokens = all_reduce(tokens)
    if not tokens:  # no group of any rank has a signal: nothing was measured
        return {"drift_mean": None, "drift_max": None}
    drift, limit = all_reduce(total) / tokens, largest_drift(config.precision)
    if not drift <= limit:
        raise FloatingPointError(f"drift: trainer and sampler differ by {drift:.4f} nats a token, and --precision "
                                 f"{config.precision} explains {limit} at most: the sampler does not hold the "
                                 "trainer's weights, or this model needs more precision")
    return {"drift_mean": drift, "drift_max": all_reduce(largest, dist.ReduceOp.MAX)}


def learning_rate(config: Config, updates: int) -> float:
    """The rate after `updates` updates: it rises linearly over the first lr_warmup, then stays."""
    return config.lr * min(1.0, (updates + 1) / max(1, config.lr_warmup))


def step_optimizer(config: Config, policy: Policy, optimizer) -> float:
    """One AdamW step at the rate of its number; returns the gradient's norm before its clip, over all ranks.

    A norm that is not finite is so on all ranks: none makes the step.
    """
    norm = clip_gradient(policy, GRAD_CLIP)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, updates_done(optimizer))
        optimizer.step()
    optimizer.zero_grad()
    return norm


def update(config: Config, policy: Policy, optimizer, minibatches: list[list[Row]]) -> dict:
    """Part 6: one optimiser step a minibatch, maximising

        J = sum over tokens of  w * min(rho A, clip(rho, 0.8, 1.28) A),   rho = pi(token) / pi_old(token)   [paper]

    with no KL term (beta = 0). The weights w [DAPO] stand in the rows, and in them the importance cap (ours).
    """
    tallies = []
    lr = learning_rate(config, updates_done(optimizer))
    for m, rows in enumerate(minibatches):  # as many rows on every rank
        tally = Tally()
        for row in accumulate(policy, rows):
            logprob_N = policy(row)
            if row.old_N is None:  # in the first minibatch the present weights are still those of the rollout
                row.keep_old(logprob_N.detach(), config.importance_cap)
            ratio_N = (logprob_N - row.old_N).exp()
            objective_N = clipped_objective(ratio_N, row.advantage_N, config.clip_low, config.clip_high)
            loss = -(row.weight_N * objective_N).sum()
            loss.backward()
            tally.add(loss, ratio_N, row, config.clip_low, config.clip_high)
        if m == 0:
            drift = check_drift(config, minibatches)
        if rows:
            tally.norm = step_optimizer(config, policy, optimizer)
        tallies.append(tally)
    return {**update_figures(tallies, dist.get_world_size()), "lr": lr, **drift}


# ------------------------------------------------------------------------------- the loop


def record(config: Config, log: runs.Log, groups: list[Group], figures: dict, step: int) -> None:
    """The step's line in log.jsonl and its trajectories, from the groups of all ranks in the batch's order."""
    kinds = step_figures(config, groups)
    tokens = sum(kind["tokens"] for kind in kinds.values())
    figures["tokens_per_second"] = tokens / sum(figures["seconds"].values())
    shown = {kind: part["reward"] for kind, part in kinds.items()}
    log.write({"step": step, **kinds, **figures}, [group.to_record(step) for group in groups], shown)


def train(config: Config, score=self_score, program: str = "urpo") -> None:
    """The seven parts, step after step. score: part 3; the baselines let another model judge (lab/baselines.py)."""
    rank, world, longest = dist.get_rank(), dist.get_world_size(), data.longest_sequence(config)
    folder = on_rank_0(f"reading --model {config.model}", lambda: check_folder(config.model))
    tokenizer = chat.load_tokenizer(folder, config.chat_template)
    on_rank_0("reading the model", lambda: check_model(
        folder, vocabulary=len(tokenizer), tokens=longest, tensor_parallel=config.tensor_parallel))
    check_memory(folder, tensor_parallel=config.tensor_parallel, offload=config.offload)
    sources, told = data.load_sources(config, tokenizer)
    log = runs.Log(asdict(config), program=program, rows=data.checksums(sources), may_change=MAY_CHANGE,
                   about={"sources": told})
    policy = load_policy(folder, vocabulary=len(tokenizer), precision=config.precision,
                         temperature=config.temperature, offload=config.offload)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, fused=True)
    check_packing(policy)
    sampler = start_sampler(folder, max_tokens=longest, chat_template=tokenizer.chat_template,
                            sequences=sequences_at_once(config), gpu_memory=config.gpu_memory,
                            tensor_parallel=config.tensor_parallel)
    if log.saved:
        runs.load_checkpoint(log.saved, policy, optimizer)
        sync(sampler, policy)
    for step in log.steps():
        clock = ranks.Clock()
        prompts = data.draw(config, sources, step)
        share = data.shard(prompts, rank, world)
        clock("draw")  # part 1
        groups = rollout(config, sampler, tokenizer, share, step)
        clock("rollout")  # part 2
        score(config, sampler, tokenizer, groups, step)
        sleep(sampler)
        clock("self_score")  # part 3
        batch = reward(config, groups)
        minibatches = build_minibatches(config, rebalance(batch, config.minibatches))
        clock("reward")  # part 4
        old_logprobs(config, policy, minibatches)
        clock("old_logprobs")  # part 5
        figures = update(config, policy, optimizer, minibatches)
        clock("update")  # part 6
        figures["sync_difference"] = sync(sampler, policy)
        clock("sync")  # part 7
        record(config, log, batch, figures | clock.figures(), step)
        log.save_if_due(step, policy, optimizer, tokenizer)


def main() -> None:
    with ranks.one_line_errors():
        config = parse(Config, PRESETS, sys.argv[1:], "URPO; see README.md")
        check(config, world=int(os.environ.get("WORLD_SIZE", 1)))
        runs.check_name(config.name, config.resume)
        ranks.start_ranks()
        train(config)


if __name__ == "__main__":
    main()
    # A thread of gloo can abort a Python that is being torn down (rarely; pytorch issue 190489). All is written.
    os._exit(0)
