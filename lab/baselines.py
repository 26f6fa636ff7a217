"""The paper's baselines: each is the loop of urpo.py with one part changed.

    python urpo.py --mix 1:1:0 --warmup_steps 0 ...       first a judge, by tau on P (and R): no file of its own
    python -m lab.baselines rm_gen --judge FOLDER ...     part 3 by that judge, frozen, in a sampler of its own
    python -m lab.baselines reward_model ...              first a scalar reward model, on the pairs of P
    python -m lab.baselines rm_score --judge FOLDER ...   part 3 by that reward model
    python -m lab.baselines sft ...                       no rewards: imitate the toy world's demonstrator instead

Each takes the flags of urpo.py, draws the same prompts from a seed, and starts under torchrun as urpo.py does:
`torchrun --nproc_per_node=2 -m lab.baselines rm_gen ...`. On a GPU, where nothing of this was run, a judge stays awake
beside the policy's sampler and the trainer: give half of --gpu_memory or less.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
import urpo
from data import Group, Prompt
from infra import chat, policy, ranks, runs
from infra.ranks import InputError, all_reduce, on_rank_0
from infra.results import interval
from infra.rows import rebalance
from infra.sampler import Sample, start_sampler
from infra.settings import parse, setting
from lab import toy
from rewards import HIGHEST_SCORE, LOWEST_SCORE, Tally, update_figures


@dataclass
class Baseline(urpo.Config):
    """The settings of urpo.py, and those of the baselines."""

    judge: str = setting("", "rm_gen and rm_score: folder of the frozen judge")
    heldout: str = setting(f"{urpo.TOY}/heldout/constraints.jsonl", "reward_model: pairs that measure it in the end")
    rows: int = setting(128, "reward_model: so many of them", above=0)
    errors: float = setting(1.0, "sft: times how often the demonstrator errs; 0: never", least=0)


# ------------------------------------------------------------------------------- a scalar reward model


class RewardModel(nn.Module):
    """A language model's body with a head of one number: the score of an answer, by its last token."""

    def __init__(self, folder: str, precision: str):
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.lm = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        self.compute = getattr(torch, precision)

    def forward(self, sequences: list[list[int]]) -> Tensor:
        """Token ids of B texts -> their scores [B], fp32. Padding stands at the end, where no token sees it."""
        texts = [torch.tensor(ids, device=ranks.DEVICE) for ids in sequences]
        ids_BT = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        hidden_BTH = self.lm.model(ids_BT, use_cache=False).last_hidden_state
        last_BH = torch.stack([hidden_TH[len(ids) - 1] for hidden_TH, ids in zip(hidden_BTH, sequences)])
        return self.lm.score(last_BH).float()[:, 0]


def score_rows(model: RewardModel, tokenizer, rows: list[Prompt]) -> Tensor:
    """The scores of all responses of all rows, one after another, each as a policy would have written it."""
    sequences, end = [], chat.stop_ids(tokenizer)[:1]
    for row in rows:
        prompt = data.encode_prompt(tokenizer, Prompt("instruction", row.instruction))
        for response in row.responses:
            text = chat.break_control_strings(response, tokenizer)  # judged text is data, never structure
            sequences.append(prompt + tokenizer.encode(text, add_special_tokens=False) + end)
    return model(sequences)


def margins(score_B: Tensor, rows: list[Prompt]) -> Tensor:
    """The better response's score minus the worse one's, for all pairs of different truth within the rows.

    >>> margins(torch.tensor([1., 3., 0., 2., 2.]), [Prompt("preference", "", ("a", "b"), (0, 1)),
    ...                                              Prompt("preference", "", ("c", "d", "e"), (2, 1, 1))])
    tensor([ 2., -2., -2.])
    """
    found, first = [], 0
    for row in rows:
        for better, worse in permutations(range(len(row.truth)), 2):
            if row.truth[better] > row.truth[worse]:
                found.append(score_B[first + better] - score_B[first + worse])
        first += len(row.truth)
    return torch.stack(found)


def pair_measures(margin_N: Tensor) -> dict[str, Tensor]:
    """Of each pair: its loss, -log sigmoid(margin), nats [Bradley and Terry 1952]; and whether it is right, a tie half.

    >>> measures = pair_measures(torch.tensor([2., -1., 0.]))
    >>> measures["loss"], measures["accuracy"].tolist()
    (tensor([0.1269, 1.3133, 0.6931]), [1.0, 0.0, 0.5])
    """
    right_N = (margin_N > 0) + 0.5 * (margin_N == 0)
    return {"loss": -nn.functional.logsigmoid(margin_N), "accuracy": right_N}


def pairs_of_step(config: Baseline, sources, step: int) -> list[Prompt]:
    """The rows of P that urpo.py draws at a step, each once: a scalar sees no order."""
    rows = [row for row in data.draw(config, sources, step) if row.kind == "preference"]
    return rows[::2] if config.both_orders else rows  # then a row stands twice, one after the other


def reward_model(config: Baseline) -> None:
    """Train a scalar on the pairs that a run of urpo.py with the same flags draws for P."""
    if config.resume:
        raise InputError("reward_model: it is trained in one go: leave --resume out, and give another --name")
    run = Path("runs") / config.name
    world = dist.get_world_size()
    folder = on_rank_0(f"reading --model {config.model}", lambda: policy.check_folder(config.model))
    tokenizer = chat.load_tokenizer(folder, config.chat_template)
    sources, _ = data.load_sources(config, tokenizer)
    heldout = data.load_source("preference", config.heldout)[0][: config.rows]
    torch.manual_seed(config.seed)  # of the new head
    model = policy.shard_policy(RewardModel(folder, config.precision))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    on_rank_0(f"making {run}", lambda: run.mkdir(parents=True, exist_ok=True))
    for step in tqdm(range(config.steps), disable=dist.get_rank() != 0):
        clock, rows = ranks.Clock(), pairs_of_step(config, sources, step)
        if len(rows) < world:  # the same on all ranks
            raise InputError(f"reward_model: a step has {len(rows)} rows of P for {world} ranks: more P in --mix, a "
                             "larger --batch, or fewer ranks")
        rows = rows[dist.get_rank() :: world]
        measures = pair_measures(margins(score_rows(model, tokenizer, rows), rows))
        pairs = all_reduce(len(measures["loss"]))
        (measures["loss"].sum() * world / pairs).backward()  # FSDP averages gradients over the ranks
        line = {"step": step, "grad_norm": urpo.step_optimizer(config, model, optimizer)}
        for name, value_N in measures.items():
            line[name] = all_reduce(value_N.sum()) / pairs
        clock("update")
        line |= clock.figures()
        on_rank_0(f"writing {run}", lambda: runs.append(run / "log.jsonl", [line]))
    weights = dict(policy.full_weights(model))  # all ranks gather
    with torch.no_grad():
        parts = [margins(score_rows(model, tokenizer, [row]), [row]) for row in heldout]
    right_N = pair_measures(torch.cat(parts))["accuracy"]
    figures = {"referee, constraints": {"single order": interval(right_N.tolist())}}
    result = {"model": f"{run}/model", "settings": {"preferences": config.heldout}, "figures": figures}

    def save():
        model.lm.save_pretrained(run / "model", state_dict=weights)
        tokenizer.save_pretrained(run / "model")
        runs.write_whole(run / "heldout-after.json", json.dumps(result, indent=1))

    on_rank_0(f"writing {run}", save)


# ------------------------------------------------------------------------------- GRPO with another judge


def check_judge(config: Baseline, head: str, made_by: str) -> None:
    """Refuse a --judge whose architecture does not end with `head`: another one would get a head of random weights."""

    def check():
        found = "no folder"
        if os.path.isdir(config.judge):
            found = policy.model_config(policy.check_folder(config.judge)).architectures
        if head not in str(found):
            raise InputError(f"--judge {config.judge!r} is {found}, and no ...{head}: give a folder that "
                             f"`{made_by}` made")

    on_rank_0(f"reading --judge {config.judge}", check)


def rm_gen(config: Baseline) -> None:
    """GRPO with a separate generative reward model [paper]: another model judges, and its weights never change."""
    check_judge(config, "ForCausalLM", "urpo.py --mix 1:1:0")
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


def as_points(score_G: Tensor) -> list[float]:
    """A group's scalars as scores of 1 to 10 (ours): their mean is 5.5 points, and a unit of log-odds is one.

    A unit is less in a group that would reach beyond 1 or 10: so no two answers tie that the scalar tells apart.

    >>> as_points(torch.tensor([6.0, 5.0, 4.0])), as_points(torch.tensor([6.0, 5.0, -20.0]))
    ([6.5, 5.5, 4.5], [7.882352828979492, 7.617647171020508, 1.0])
    """
    middle = (LOWEST_SCORE + HIGHEST_SCORE) / 2
    distance_G = score_G - score_G.mean()
    unit = ((HIGHEST_SCORE - middle) / distance_G.abs().max()).clamp(max=1)
    return (middle + unit * distance_G).tolist()


def rm_score(config: Baseline) -> None:
    """GRPO with a scalar reward model [paper]: it scores each answer by itself, in one forward pass."""
    check_judge(config, "ForSequenceClassification", "lab.baselines reward_model")
    tokenizer = chat.load_tokenizer(config.judge, config.chat_template)
    model = RewardModel(config.judge, config.precision).to(ranks.DEVICE).eval()

    @torch.no_grad()
    def score(config, sampler, policy_tokenizer, groups, step) -> None:
        for group in groups:
            if group.prompt.kind == "instruction":
                row = Prompt("preference", group.prompt.instruction, tuple(group.texts))
                points = as_points(score_rows(model, tokenizer, [row]))
                for order in data.judgement_orders(config, group.index, step):
                    text = data.score_line([points[i] for i in order])
                    judgement = {"order": order, "cut": 0, "prompt": None, "text": text, "finished": True}
                    group.judgements.append(judgement)

    urpo.train(config, score, "rm_score")


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
    sources, told = data.load_sources(config, tokenizer)
    worked = demonstrations(sources)
    log = runs.Log(asdict(config), program="sft", rows=data.checksums(sources), may_change=urpo.MAY_CHANGE,
                   about={"sources": told})
    model = policy.load_policy(folder, vocabulary=len(tokenizer), precision=config.precision)
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


COMMANDS = {"rm_gen": rm_gen, "reward_model": reward_model, "rm_score": rm_score, "sft": sft}


def main() -> None:
    try:
        command, *arguments = sys.argv[1:] or [""]
        if command not in COMMANDS:
            raise InputError(f"{command or 'no command'}: give one of {', '.join(COMMANDS)}, then the flags of urpo.py")
        config = parse(Baseline, urpo.PRESETS, arguments, COMMANDS[command].__doc__)
        urpo.check(config, world=int(os.environ.get("WORLD_SIZE", 1)))
        runs.check_name(config.name, config.resume)
        ranks.start_ranks()
        COMMANDS[command](config)
    except (InputError, FloatingPointError, RuntimeError) as error:
        ranks.stop(error)


if __name__ == "__main__":
    main()
    os._exit(0)  # as urpo.py ends
