"""URPO: one LLM that learns to answer and to judge its own answers in a single GRPO loop (arXiv 2507.17515).

Read this file from top to bottom and you have read the algorithm; its equations stand in rewards.py. One step has
seven parts; the same numbers and names stand in README.md, in the log's timings and in the tests:

    1. draw          a mixed batch of preference (P), reasoning (R) and instruction (I) prompts at P:R:I
    2. rollout       G answers a prompt, sampled by vLLM from the current weights
    3. self_score    the same weights judge each group of open-ended answers
    4. reward        P: Kendall's tau, R: verify the answer, I: self-score; then group-relative advantages
    5. old_logprobs  the trainer's log-probs at rollout weights
    6. update        minibatches: clipped loss, drift against the sampler's own log-probs, gradient clip, AdamW
    7. sync          the new weights into the sampler; log; checkpoint

One policy; no critic, no reward model, no KL and no reference model (beta = 0); one optimiser, one run.

    torchrun --nproc_per_node=2 urpo.py      SmolLM2-135M on a CPU, from the seed base; --help prints every default
    torchrun --nproc_per_node=8 urpo.py      Qwen2.5-7B on eight GPUs (not yet run)

The end of a tensor's name is its shape: logprob_N holds one value for each of N answer tokens. G is always the number
of answers in a group.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import flags
import machine
import plan
import readers
import runs
from data import Group, InputError
from machine import all_reduce, on_rank_0
from rewards import (
    REWARD_RANGE,
    clipped_objective,
    clipped_tokens,
    group_advantages,
    group_rewards,
    loss_denominator,
    mean,
    token_weight,
)

PARTS = data.PARTS  # the seven names above

# ------------------------------------------------------------------------------- Config


def flag(default, help):
    if isinstance(default, list):  # a setting that takes several values: --preferences A B
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting and its one default: the paper's value where it states one, else ours ("paper silent")."""

    preset: Literal["auto", "smol", "paper"] = flag("auto", "SmolLM2-135M, CPU | Qwen2.5-7B, 8 GPUs | by the hardware")
    name: str = flag("urpo", "the run's folder under runs/")
    seed: int = flag(0, "of data order, candidate order and sampling")
    resume: bool = flag(False, "continue runs/<name> from its last checkpoint")
    # model and data
    model: str = flag("Qwen/Qwen2.5-7B", "paper: Qwen2.5-7B. A folder, hub id, raw, half or seed (docs/seed.md)")
    chat_template: str = flag("", "file with a template for a base that has none: plain_turns.jinja (D20)")
    preferences: list[str] = flag(["openbmb/UltraFeedback", "Skywork/Skywork-Reward-Preference-80K-v0.2"],
                                  "P sources: .jsonl, hub id or toy (D11; paper silent)")
    reasoning: list[str] = flag(["BytedTsinghua-SIA/DAPO-Math-17k"], "R sources (D11; paper silent)")
    instructions: list[str] = flag(["HuggingFaceH4/no_robots"], "I sources (D11; paper silent)")
    toy_rows: int = flag(4096, "rows a kind when the source is toy")
    # the loop
    steps: int = flag(1000, "steps in all, warm-up included (paper silent)")
    warmup_steps: int = flag(100, "steps on P + R alone before I joins (paper: 100)")
    mix: str = flag("1:1:1", "P:R:I by prompt count (paper: 1:1:1)")
    batch: int = flag(192, "prompts a step over all ranks (paper silent)")
    group: int = flag(8, "G, answers a prompt (D14; paper silent)")
    minibatches: int = flag(2, "updates per rollout batch; with 1 the ratio is 1 and the clip never bites (D14)")
    # sampling and judging
    temperature: float = flag(1.0, "of all sampling (D14); the trainer's log-probs use it too")
    max_prompt_tokens: int = flag(4096, "longer rows are dropped at load")
    max_answer_tokens: int = flag(2048, "of answers to R and I (D17)")
    max_referee_tokens: int = flag(1024, "of answers to P and of self-judgements")
    max_judge_tokens: int = flag(24576, "of a judge's prompt; its answers are cut to one length to fit (D17)")
    judgements: int = flag(1, "K, how many times each open-ended answer is judged; the mean counts (D6)")
    judge_list: int = flag(0, "answers that one judgement compares; 0: all G (D6)")
    audit_judge: int = flag(0, "every k steps also judge answers to R, as a measurement; 0: never")
    both_orders: bool = flag(False, "draw each P row in both orders, so that no position pays (paper silent)")
    tau: Literal["b", "strict"] = flag("b", "scipy's tau-b | strict: a tied pair of scores earns 0 (D3)")
    # objective
    clip_low: float = flag(0.8, "lower end of the ratio (paper: 0.8)")
    clip_high: float = flag(1.28, "upper end of the ratio (paper: 1.28)")
    advantage: Literal["std", "center", "batch"] = flag("std", "/ std of group | r in [0, 1] | / std of batch (D9)")
    loss: Literal["token-mean", "sequence-mean"] = flag("token-mean", "over the global minibatch: DAPO | GRPO (D15)")
    importance_cap: float = flag(0.0, "0: off; else weight tokens by min(trainer/sampler probability, cap) (D16)")
    # optimiser
    lr: float = flag(1e-6, "AdamW, constant after lr_warmup (D13)")
    lr_warmup: int = flag(10, "updates over which lr rises linearly")
    weight_decay: float = flag(0.01, "(D13)")
    grad_clip: float = flag(1.0, "largest gradient norm (D13)")
    # machine
    precision: Literal["bfloat16", "float32"] = flag("bfloat16", "of the trainer's compute; master weights are fp32")
    row_tokens: int = flag(16384, "tokens in one packed row, the micro-batch of log-probs and update")
    logit_chunk: int = flag(1024, "answer tokens whose logits are made at once; freed only with --recompute")
    recompute: bool = flag(True, "recompute layers and logits in the backward pass, to save memory")
    gpu_memory: float = flag(0.6, "share of the GPU that vLLM may take while it is awake")
    cpu_cache: float = flag(1.0, "GiB that vLLM takes for keys and values on each rank of a CPU")
    # stop, record
    max_drift: float = flag(0.1, "stop when trainer and sampler differ by more, mean nats a token (D16)")
    timeout: float = flag(30.0, "minutes after which ranks give up waiting for one that stalls")
    save_every: int = flag(100, "steps between checkpoints; the last step is always saved; 0: only the last")
    keep: int = flag(0, "newest checkpoints to keep; 0: all")
    rollouts_every: int = flag(1, "record every k-th step's trajectories in rollouts.jsonl")


PRESETS = {
    # A bf16 sampler is .01 to .02 nats a token away from the trainer, which the cap corrects. A checkpoint of 7B takes
    # 107 GB, so two stay.
    "paper": dict(importance_cap=2.0, keep=2),
    # A judge of 135M parameters was taught pairs, so it judges its own answers in pairs too. There are eight for four
    # answers: each stands in four of them, and every two meet. P is shown in both orders, so that no position pays.
    # There is more I, since self-scores are noisy.
    "smol": dict(
        model="seed", preferences=["toy:2"], reasoning=["toy"], instructions=["toy"],
        steps=24, warmup_steps=8, mix="1:1:2", batch=24, group=4,
        max_prompt_tokens=800, max_answer_tokens=48, max_referee_tokens=40, max_judge_tokens=800,
        both_orders=True, judgements=4, judge_list=2, audit_judge=2, lr=1e-5,
        row_tokens=1024, recompute=False, cpu_cache=0.5, save_every=8, keep=2,
        precision=machine.SMOL_PRECISION, max_drift=machine.SMOL_DRIFT),
}


# ------------------------------------------------------------------------------- 2. rollout, 3. self_score


def rollout(config: Config, engine, tokenizer, share: list[tuple[int, data.Prompt]], step: int) -> list[Group]:
    """Part 2: G answers to each prompt of this rank's share, by the current weights."""
    prompts, limits, seeds = [], [], []
    for index, prompt in share:
        prompts.append(data.encode_prompt(tokenizer, prompt))
        limits.append(config.max_referee_tokens if prompt.kind == "preference" else config.max_answer_tokens)
        seeds.append(data.request_seed(config.seed, step, index, "answer"))
    answers = machine.generate(engine, prompts, config.group, limits, seeds, config.temperature)
    groups = []
    for (index, prompt), ids, samples in zip(share, prompts, answers):
        group = Group(index, prompt, ids, answers=[])
        for sample in samples:
            group.add(sample)
        group.entropy = mean(-logprob for sample in samples for logprob in sample.logprobs)
        groups.append(group)
    return groups


def self_score(config: Config, engine, tokenizer, groups: list[Group], step: int) -> None:
    """Part 3: each open-ended answer is judged K times among its group, by the current weights, shuffled (D6, D7).

    The tokens of a judgement get no gradient (D8), since nothing grounds them. The referee's skill comes from P alone.
    Every `audit_judge` steps it also judges right beside wrong answers to R: their rewards stay the verified ones.
    """
    judged, prompts, seeds = [], [], []
    for group in groups:
        orders = data.judgement_orders(
            group, step, config.seed, config.judge_list or config.group, config.judgements, config.audit_judge)
        for k, order in enumerate(orders):
            shown = [group.texts[i] for i in order]
            ids, cut = data.encode_judgement(tokenizer, group.prompt.instruction, shown, config.max_judge_tokens)
            prompts.append(ids)
            judged.append((group, order, cut))
            seeds.append(data.request_seed(config.seed, step, group.index, f"judge/{k}"))
    limits = [config.max_referee_tokens] * len(prompts)
    answers = machine.generate(engine, prompts, 1, limits, seeds, config.temperature)
    for (group, order, cut), ids, samples in zip(judged, prompts, answers):
        prompt = tokenizer.decode(ids)
        group.judgements.append({"order": order, "cut": cut, "prompt": prompt, "text": samples[0].text})


# ------------------------------------------------------------------------------- 4. reward, 5. old_logprobs


def reward(config: Config, groups: list[Group]) -> None:
    """Part 4: the reward of every answer by its kind, then advantages within the group."""
    for group in groups:
        group.rewards = group_rewards(group.prompt, group.texts, group.judgements, config.tau, group.finished)
    spreads = batch_spreads(groups) if config.advantage == "batch" else {}
    for group in groups:
        if group.rewards is None:  # of some answer no judgement can be read: the group teaches nothing, counted (D8)
            group.advantages = [0.0] * len(group.texts)
        else:
            rewards, kind = torch.tensor(group.rewards), group.prompt.kind
            group.advantages = group_advantages(
                rewards, config.advantage, REWARD_RANGE[kind], spreads.get(kind)).tolist()


def batch_spreads(groups: list[Group]) -> dict[str, float]:
    """The standard deviation of all rewards of each kind in the batch, over all ranks, for `--advantage batch`."""
    spreads = {}
    for kind in data.KINDS:
        rewards = [reward for group in groups if group.prompt.kind == kind for reward in group.rewards or []]
        count = max(all_reduce(len(rewards)), 1)
        middle = all_reduce(sum(rewards)) / count
        squares = all_reduce(sum((reward - middle) ** 2 for reward in rewards))
        spreads[kind] = math.sqrt(squares / max(count - 1, 1))
    return spreads


@torch.no_grad()
def old_logprobs(config: Config, policy: machine.Policy, groups: list[Group]) -> None:
    """Part 5: log pi_old by the trainer at rollout weights (D16), for every minibatch but the first.

    Part 6 meets the first one at these same weights, so its own forward pass gives them. Groups without a signal, whose
    rewards are all equal, need none: their gradient is 0.
    """
    later = groups[len(groups) // config.minibatches :]
    active = [group for group in later if group.has_signal]
    for row in machine.build_rows(active, config.row_tokens):
        row.keep_old(policy(row))


# ------------------------------------------------------------------------------- 6. update


def check_drift(groups: list[Group], max_drift: float) -> dict[str, float | None]:
    """Distance between the trainer's log-probs at rollout weights and the sampler's own, nats a token (D16).

    Measured before the first optimiser step, of every group with a signal. Raises FloatingPointError above
    `max_drift`.
    """
    distances = []
    for group in groups:
        if group.old_N is not None:
            sampler = [logprob for answer in group.sampler_logprobs for logprob in answer]
            for trainer_logprob, sampler_logprob in zip(group.old_N.tolist(), sampler):
                if math.isfinite(trainer_logprob):  # otherwise part 6 skips the update
                    distances.append(abs(trainer_logprob - sampler_logprob))
    tokens = all_reduce(len(distances))
    if not tokens:  # no group of any rank has a signal: nothing was measured
        return {"drift_mean": None, "drift_max": None}
    drift_mean = all_reduce(sum(distances)) / tokens
    drift_max = all_reduce(max(distances, default=0.0), dist.ReduceOp.MAX)
    if not drift_mean <= max_drift:
        raise FloatingPointError(f"drift: trainer and sampler differ by {drift_mean:.4f} nats a token, above "
                                 f"--max_drift {max_drift}: the sampler does not hold the trainer's weights, "
                                 "or its precision is too low")
    return {"drift_mean": drift_mean, "drift_max": drift_max}


def set_token_weights(groups: list[Group], loss: str) -> None:
    """The weight of every answer token in the loss, whose mean is over the global minibatch (D15).

    Times the number of ranks, since FSDP averages gradients over them. Groups without a signal count in the
    denominator too. So the loss does not depend on how many ranks share the minibatch.
    """
    lengths = []
    for group in groups:
        lengths += map(len, group.answers)
    denominator = all_reduce(loss_denominator(lengths, loss))
    for group in groups:
        group.weights = []
        for answer in group.answers:
            weight = dist.get_world_size() * token_weight(len(answer), denominator, loss)
            group.weights += [weight] * len(answer)


def update(config: Config, policy: machine.Policy, optimizer, schedule, groups: list[Group]) -> dict:
    """Part 6: one optimiser step a minibatch, maximising

        J = sum over tokens of  w * min(rho A, clip(rho, 0.8, 1.28) A),   rho = pi(token) / pi_old(token)   [paper]

    with no KL term (beta = 0). The weights w are ours (D15). Groups without a signal are left out: their gradient is
    exactly 0.
    """
    total = {"loss": 0.0, "grad_norm": 0.0, "clipped_low": 0.0, "clipped_high": 0.0, "tokens": 0.0,
             "updates": 0, "skipped_updates": 0, "nonfinite_updates": 0}
    lr = optimizer.param_groups[0]["lr"]  # not the schedule's: after a resume that is still the saved run's
    size = len(groups) // config.minibatches
    for m in range(config.minibatches):
        minibatch = groups[m * size : (m + 1) * size]
        set_token_weights(minibatch, config.loss)
        active = [group for group in minibatch if group.has_signal]
        rows = machine.build_rows(active, config.row_tokens)
        part = dict.fromkeys(("loss", "clipped_low", "clipped_high"), 0.0)
        part["tokens"] = sum(group.answer_tokens for group in active)

        for row in machine.accumulate(policy, rows):
            logprob_N = policy(row)
            if row.old_N is None:  # in the first minibatch the present weights are still the old ones
                row.keep_old(logprob_N.detach())
            weight_N = row.weight_N
            if config.importance_cap:  # truncated importance sampling: the sampler's tokens, the trainer's weights
                weight_N = weight_N * (row.old_N - row.sampler_N).exp().clamp(max=config.importance_cap)
            ratio_N = (logprob_N - row.old_N).exp()
            objective_N = clipped_objective(ratio_N, row.advantage_N, config.clip_low, config.clip_high)
            loss = (-weight_N * objective_N).sum()
            loss.backward()
            part["loss"] += loss.item()
            low, high = clipped_tokens(ratio_N, row.advantage_N, config.clip_low, config.clip_high)
            part["clipped_low"] += low
            part["clipped_high"] += high

        if m == 0:
            drift = check_drift(groups, config.max_drift)
        if not rows:  # their number is the same on all ranks, so all skip together
            total["skipped_updates"] += 1
            continue
        norm = machine.clip_gradient(policy, config.grad_clip)
        part = {name: all_reduce(value) for name, value in part.items()}
        if math.isfinite(norm + part["loss"]):  # the same numbers on all ranks: all update, or none
            optimizer.step()
            schedule.step()
            part |= dict(grad_norm=norm, updates=1)
        else:
            part = dict(skipped_updates=1, nonfinite_updates=1)
        optimizer.zero_grad()
        for name, value in part.items():
            total[name] += value

    updates, tokens = max(total["updates"], 1), max(total.pop("tokens"), 1)
    total["loss"] = total["loss"] / dist.get_world_size() / updates
    total["grad_norm"] /= updates
    total["clipped_low"] /= tokens
    total["clipped_high"] /= tokens
    return {**total, "lr": lr, **drift}


# ------------------------------------------------------------------------------- the loop


def set_up(config: Config, run: Path):
    """Everything that the loop needs, ready for its first step: of a new run, or of one that goes on."""
    folder = on_rank_0(f"preparing --model {config.model}", lambda: plan.model_folder(config.model))
    tokenizer = plan.load_tokenizer(folder, config.chat_template)
    longest = flags.longest_sequence(config)
    plan.check_start(folder, len(tokenizer), longest, asdict(config))
    data.encode_chat(tokenizer, "")  # refuses a tokenizer without chat template, on every rank
    names = {kind: getattr(config, name) for kind, name in data.FLAGS.items()}
    counts = data.mix_counts(config.mix, config.batch, warmup=False)
    sources, dropped = readers.load_sources(
        names, counts, tokenizer, config.max_prompt_tokens, config.max_judge_tokens,
        config.judge_list or config.group, config.toy_rows, machine.each_row_once)

    log = runs.Log(run, asdict(config))
    about = {"rows_dropped_as_too_long": dropped}
    first_step, saved = on_rank_0(
        f"writing {run}", lambda: log.open({**about, "sources": readers.checksums(sources)}))

    policy = machine.load_policy(
        folder, len(tokenizer), config.precision, config.temperature,
        config.logit_chunk, config.recompute)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = machine.warmup_schedule(optimizer, config.lr_warmup)
    sequences = config.batch // dist.get_world_size() * config.group
    engine = machine.start_engine(
        folder, longest, config.cpu_cache, config.gpu_memory, sequences, tokenizer.chat_template)
    if saved:
        runs.load_checkpoint(saved, policy, optimizer, schedule)
        machine.sync(engine, policy)
    return tokenizer, sources, policy, optimizer, schedule, engine, log, first_step


def train(config: Config, score=self_score) -> None:
    """The seven parts, step after step. score: part 3; the baselines let another model judge (baselines.py)."""
    rank = dist.get_rank()
    run = Path("runs") / config.name
    tokenizer, sources, policy, optimizer, schedule, engine, log, first_step = set_up(config, run)
    signals = machine.catch_signals()
    steps = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, disable=rank != 0)
    not_finite = 0
    for step in steps:
        clock = machine.Clock(PARTS)

        # 1. draw: a mixed batch at P:R:I, a pure function of (seed, step), the same on every rank
        batch = data.draw(
            sources, config.mix, config.batch, config.warmup_steps,
            config.seed, step, config.both_orders)
        share = data.shard(batch, config.minibatches, rank, dist.get_world_size())
        clock("draw")

        # 2. rollout: G answers a prompt through vLLM
        groups = rollout(config, engine, tokenizer, share, step)
        clock("rollout")

        # 3. self_score: the same engine judges each open-ended group
        score(config, engine, tokenizer, groups, step)
        machine.sleep(engine)
        clock("self_score")

        # 4. reward: tau, verification or self-score, then group advantages; then equal work for every rank
        reward(config, groups)
        groups = machine.rebalance(groups, config.minibatches)
        clock("reward")

        # 5. old_logprobs: the trainer's, where part 6 will not meet the old weights
        old_logprobs(config, policy, groups)
        clock("old_logprobs")

        # 6. update: minibatches, clipped loss, drift against the sampler, gradient clip, AdamW
        figures = update(config, policy, optimizer, schedule, groups)
        clock("update")

        # 7. sync: new weights into the engine; log, checkpoint
        figures["sync_difference"] = machine.sync(engine, policy)
        records = machine.gather([group.to_record(step) for group in groups])
        clock("sync")
        figures["seconds"] = clock.seconds
        figures["peak_memory_gib"] = machine.peak_memory_gib(clock)
        steps.set_postfix_str(on_rank_0(f"writing {run}", lambda: log.write(step, records, figures)))
        not_finite = runs.count_not_finite(not_finite, step, figures)
        done = step + 1  # after the log: a run killed in between repeats the step, and its lines are cut from the log
        stop = all_reduce(len(signals)) > 0  # a signal to any rank stops all ranks at the same step
        if stop or done == config.steps or (config.save_every and done % config.save_every == 0):
            folder = run / "checkpoints" / f"step_{done}"
            runs.save_checkpoint(folder, policy, optimizer, schedule, tokenizer, asdict(config), config.keep)
        if stop:
            if rank == 0:
                print(f"stopped by a signal; {done} steps are saved and --resume continues", flush=True)
            break


def main() -> None:
    try:
        asked, arguments = plan.split_arguments(sys.argv[1:])
        config = flags.parse(Config, PRESETS, arguments)
        flags.check(config, world=plan.ranks(asked, config.preset))
        if asked.plan:
            print(plan.show(asdict(config), asked))
            return
        runs.check_folder(config.name, config.resume)
        machine.start_ranks(config.timeout)
        train(config)
    except (InputError, FloatingPointError, RuntimeError) as error:
        machine.stop(error)


if __name__ == "__main__":
    main()
    # A thread of gloo that still lets go of a Python object can abort a Python that is being torn down (rarely;
    # pytorch issue 190489). All is written, so end without tearing down.
    os._exit(0)
