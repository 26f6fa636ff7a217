"""The paper's baselines: each is the loop of urpo.py with one part changed.

    python urpo.py --mix 1:1:0 --warmup_steps 0 ...       first a judge, by tau on P (and R): no file of its own
    python -m lab.baselines rm_gen --judge FOLDER ...     part 3 by that judge, frozen, in a sampler of its own
    python -m lab.baselines sft ...                       no rewards: imitate the toy world's demonstrator instead

Each takes the flags of urpo.py, draws the same prompts from one seed and mix, and starts under torchrun, too:
`torchrun --nproc_per_node=2 -m lab.baselines rm_gen ...`. On a GPU, where nothing of this was run, a judge stays awake
beside the policy's sampler and the trainer: give half of --gpu_memory or less.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

import data
import urpo
from data import Group
from infra import chat, policy, ranks, runs
from infra.ranks import InputError, on_rank_0
from infra.rows import rebalance
from infra.sampler import Sample, start_sampler
from infra.settings import parse, setting
from lab import toy
from rewards import Tally, update_figures


@dataclass
class Baseline(urpo.Config):
    """The settings of urpo.py, and those of the baselines."""

    judge: str = setting("", "rm_gen: folder of the frozen judge")
    errors: float = setting(1.0, "sft: times how often the demonstrator errs; 0: never", least=0)


# ------------------------------------------------------------------------------- GRPO with a frozen judge


def check_judge(config: Baseline) -> None:
    """Refuse a --judge that is no language model: the sampler would start with another head, and then fail."""
    found = "no folder"
    if os.path.isdir(config.judge):
        found = policy.model_config(policy.check_folder(config.judge)).architectures
    if "ForCausalLM" not in str(found):
        raise InputError(f"--judge {config.judge!r} is {found}: give a ...ForCausalLM that `urpo.py --mix 1:1:0` made")


def rm_gen(config: Baseline) -> None:
    """GRPO with a separate generative reward model [paper]: another model judges, and its weights never change."""
    on_rank_0(f"reading --judge {config.judge}", lambda: check_judge(config))
    tokenizer = chat.load_tokenizer(config.judge, config.chat_template)
    longest = config.max_judge_tokens + config.max_referee_tokens
    on_rank_0("reading the judge", lambda: policy.check_model(
        config.judge, vocabulary=len(tokenizer), tokens=longest, tensor_parallel=config.tensor_parallel))
    judge = start_sampler(config.judge, max_tokens=longest, chat_template=tokenizer.chat_template, sleeps=False,
                          sequences=urpo.sequences_at_once(config), gpu_memory=config.gpu_memory,
                          tensor_parallel=config.tensor_parallel)

    def score(config, sampler, policy_tokenizer, groups, step) -> None:
        urpo.self_score(config, judge, tokenizer, groups, step)

    urpo.train(config, score, "rm_gen")


# ------------------------------------------------------------------------------- SFT


def demonstrations(sources: dict) -> dict[str, dict]:
    """{question or instruction: its record in the toy world, with a worked and a flawed answer}. Refuses other rows."""
    worked = {}
    for kind, name in (("reasoning", "question"), ("instruction", "instruction")):
        for record in toy.records(kind, "train", toy.TRAINING):
            worked[record[name]] = record
        for row in sources.get(kind, []):
            if row.instruction not in worked:
                raise InputError(f"--{data.FLAGS[kind]}: nobody demonstrates {row.instruction[:60]!r}: give sft the "
                                 "training rows that `python -m lab.toy` writes")
    return worked


def demonstrate(config: Baseline, tokenizer, group: Group, worked: dict, rng) -> None:
    """G worked answers to a group's prompt, by a demonstrator who errs."""
    prompt = group.prompt
    for _ in range(config.group):
        errs = rng.random() < config.errors * toy.ERRORS[prompt.kind]
        if prompt.kind == "preference":
            text = toy.worked_ranking(prompt.truth[::-1] if errs else prompt.truth)
        else:
            text = worked[prompt.instruction]["flawed" if errs else "worked"]
        ids = tokenizer.encode(text, add_special_tokens=False) + chat.stop_ids(tokenizer)[:1]
        group.add(Sample(ids, text, True, [0.0] * len(ids)))


def imitate(config: Baseline, model: policy.Policy, optimizer, groups: list[Group]) -> dict:
    """Part 6 with another loss: minus the mean of log pi(token) over the answer tokens of a minibatch."""
    tallies, lr = [], urpo.learning_rate(config, policy.updates_done(optimizer))
    for rows in urpo.build_minibatches(config, groups):
        tally = Tally()
        for row in policy.accumulate(model, rows):
            logprob_N = model(row)
            loss = -(row.weight_N * logprob_N).sum()
            loss.backward()
            tally.add(loss, torch.ones_like(logprob_N), row, config.clip_low, config.clip_high)
        tally.norm = urpo.step_optimizer(config, model, optimizer)
        tallies.append(tally)
    return {**update_figures(tallies, dist.get_world_size()), "lr": lr}


def sft(config: Baseline) -> None:
    """Supervised fine-tuning [paper]: G demonstrations of each prompt, so about as many tokens. Without a sampler."""
    world = dist.get_world_size()
    folder = on_rank_0(f"reading --model {config.model}", lambda: policy.check_folder(config.model))
    tokenizer = chat.load_tokenizer(folder, config.chat_template)
    on_rank_0("reading the model", lambda: policy.check_model(
        folder, vocabulary=len(tokenizer), tokens=data.longest_sequence(config)))
    sources, told = data.load_sources(config, tokenizer)
    worked = demonstrations(sources)
    log = runs.Log(asdict(config), program="sft", rows=data.checksums(sources), may_change=urpo.MAY_CHANGE,
                   about={"sources": told})
    model = policy.load_policy(folder, vocabulary=len(tokenizer), precision=config.precision, offload=config.offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    policy.check_packing(model)
    if log.saved:
        runs.load_checkpoint(log.saved, model, optimizer)
    for step in log.steps():
        clock, groups = ranks.Clock(), []
        for index, prompt in data.shard(data.draw(config, sources, step), dist.get_rank(), world):
            rng = random.Random(f"{config.seed}/{step}/{index}/demonstration")
            groups.append(Group(index, prompt, data.encode_prompt(tokenizer, prompt)))
            demonstrate(config, tokenizer, groups[-1], worked, rng)
        batch = urpo.reward(config, groups)  # for the log alone: how often the demonstrator was right
        for group in batch:
            group.advantages = [1.0] * config.group  # all his answers shall become likelier
        clock("draw")
        figures = imitate(config, model, optimizer, rebalance(batch, config.minibatches))
        clock("update")
        urpo.record(config, log, batch, figures | clock.figures(), step)
        log.save_if_due(step, model, optimizer, tokenizer)


COMMANDS = {"rm_gen": rm_gen, "sft": sft}


def main() -> None:
    with ranks.one_line_errors():
        command, *arguments = sys.argv[1:] or [""]
        if command not in COMMANDS:
            raise InputError(f"{command or 'no command'}: give one of {', '.join(COMMANDS)}, then the flags of urpo.py")
        config = parse(Baseline, urpo.PRESETS, arguments, COMMANDS[command].__doc__)
        urpo.check(config, world=int(os.environ.get("WORLD_SIZE", 1)))
        runs.check_name(config.name, config.resume)
        ranks.start_ranks()
        COMMANDS[command](config)


if __name__ == "__main__":
    main()
    os._exit(0)  # as urpo.py ends
