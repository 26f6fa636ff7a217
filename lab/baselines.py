"""The paper's baselines, and one arm beyond it: each is the loop of urpo.py with one part changed.

    python urpo.py --mix 1:1:0 --warmup_steps 0 ...      first a judge, by tau on P (and R): no file of its own
    python baselines.py rm_gen --judge FOLDER ...        part 3 by that judge, frozen, in an engine of its own
    python baselines.py reward_model ...                 first a scalar reward model, on the pairs of P
    python baselines.py rm_score --judge FOLDER ...      part 3 by that reward model
    python baselines.py sft ...                          no rewards: imitate the toy world's demonstrator instead
    python baselines.py own_preferences ...              beyond the paper: P from the policy's own answers to R

Each takes the flags of urpo.py, draws the same prompts from a seed, and starts under torchrun as urpo.py does. What a
baseline has no use for it ignores: reward_model all but data, rate and steps, sft the clip and the sampling.
report/evidence.py compares them, and counts what a separate judge costs. What a GPU would do here is not yet run: the
judge stays awake in its memory, which --plan does not count, beside the policy's engine and the trainer. Both engines
take --gpu_memory, so give half of it or less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
import eval
import flags
import machine
import metrics
import plan
import readers
import runs
import urpo
from data import Group, InputError, Prompt
from machine import all_reduce, on_rank_0
from rewards import HIGHEST_SCORE, LOWEST_SCORE, group_rewards
from toy import seed, world
from urpo import flag


@dataclass
class Baseline(urpo.Config):
    """The settings of urpo.py, and those of a separate judge."""

    judge: str = flag("", "rm_gen and rm_score: folder of the frozen judge")
    passes: int = flag(1, "reward_model: how often it sees each pair")
    errors: str = flag(".4:.4:.6", "sft: how often the demonstrator errs on P:R:I (docs/seed.md)")


# ------------------------------------------------------------------------------- RM-gen


def judge_folder(config: Baseline, head: str, made_by: str) -> str:
    """The folder of --judge. head: how the name of its architecture ends; any other would get random weights.

    Raises InputError on every rank, where no such model is there. made_by: the command that makes one.
    """

    def find():
        folder = plan.model_folder(config.judge)
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise InputError(f"--judge {config.judge}: no model here (no config.json): give a folder that "
                             f"`{made_by}` made")
        found = (plan.model_config(folder).architectures or ["model without a name"])[0]
        if not found.endswith(head):
            raise InputError(f"--judge {config.judge} is a {found} and no ...{head}: give a folder that "
                             f"`{made_by}` made")
        return folder

    return on_rank_0(f"preparing --judge {config.judge}", find)


def rm_gen(config: Baseline) -> None:
    """GRPO with a separate generative reward model [paper]: another model judges, and its weights never change."""
    folder = judge_folder(config, "ForCausalLM", "urpo.py --mix 1:1:0")
    tokenizer = plan.load_tokenizer(folder, config.chat_template)
    longest = config.max_judge_tokens + config.max_referee_tokens
    plan.check_model(folder, len(tokenizer), longest)
    sequences = config.batch // dist.get_world_size() * config.group
    judge = machine.start_engine(
        folder, longest, config.cpu_cache, config.gpu_memory, sequences, tokenizer.chat_template, sleeps=False)

    def score(config, engine, policy_tokenizer, groups: list[Group], step: int) -> None:
        urpo.self_score(config, judge, tokenizer, groups, step)

    urpo.train(config, score)


# ------------------------------------------------------------------------------- the scalar reward model


class RewardModel(nn.Module):
    """A language model's body with a head of one number: the score of an answer, by its last token."""

    def __init__(self, folder: str, precision: str):
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.lm = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype="auto", use_safetensors=True, trust_remote_code=False)
        self.compute = getattr(torch, precision)

    def forward(self, sequences: list[list[int]]) -> Tensor:
        """Token ids of B texts -> their scores [B], fp32. Padding stands at the end, where no token sees it."""
        ids_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
        for i, ids in enumerate(sequences):
            ids_BT[i, : len(ids)] = torch.tensor(ids)
        last_B = torch.tensor([len(ids) - 1 for ids in sequences])
        hidden_BTH = self.lm.model(ids_BT.to(machine.DEVICE), use_cache=False).last_hidden_state
        return self.lm.score(hidden_BTH[torch.arange(len(sequences)), last_B]).float()[:, 0]


def encode_answer(tokenizer, instruction: str, answer: str) -> list[int]:
    """Token ids of an instruction and its answer, as a policy would have written it. Both are data, never structure."""
    prompt = data.encode_prompt(tokenizer, Prompt("instruction", instruction))
    text = data.break_control_strings(answer, tokenizer)
    return prompt + tokenizer.encode(text, add_special_tokens=False) + data.stop_ids(tokenizer)[:1]


def margins(score_B: Tensor, rows: list[Prompt]) -> Tensor:
    """Score of the better minus score of the worse response, for every pair of different truth within a row.

    score_B: the scores of all responses of all rows, one after another.

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


def bradley_terry_loss(margin_N: Tensor) -> Tensor:
    """-log P(the better response wins) = -log sigmoid(margin), nats, for each pair [Bradley and Terry 1952].

    >>> bradley_terry_loss(torch.tensor([0., 2.]))
    tensor([0.6931, 0.1269])
    """
    return -nn.functional.logsigmoid(margin_N)


def pair_measures(margin_N: Tensor) -> dict[str, Tensor]:
    """What a reward model is worth on each pair: its loss, nats; whether it is right, a tie being half right; and its
    confidence, the probability of its favourite. Where the mean confidence is above the accuracy, it is too sure.

    >>> measures = pair_measures(torch.tensor([2., -1.]))
    >>> measures["accuracy"].tolist(), measures["confidence"]
    ([1.0, 0.0], tensor([0.8808, 0.7311]))
    """
    right_N = (margin_N > 0).float() + 0.5 * (margin_N == 0)
    return {
        "loss": bradley_terry_loss(margin_N),
        "accuracy": right_N,
        "confidence": margin_N.abs().sigmoid(),
    }


def load_pairs(config: Baseline, folder: str):
    """(tokenizer, sources) of the settings, as urpo.py reads them."""
    tokenizer = plan.load_tokenizer(folder, config.chat_template)
    names = {kind: getattr(config, name) for kind, name in data.FLAGS.items()}
    counts = data.mix_counts(config.mix, config.batch, warmup=False)
    sources, _ = readers.load_sources(
        names, counts, tokenizer, config.max_prompt_tokens, config.max_judge_tokens,
        config.judge_list or config.group, config.toy_rows, machine.each_row_once)
    return tokenizer, sources


def pairs_of_step(sources, config: Baseline, step: int) -> list[Prompt]:
    """The rows of P that urpo.py with the same settings draws at a step, each once: a scalar sees no order.

    Rows whose responses are all as good have no pair, and are left out.
    """
    batch = data.draw(
        sources, config.mix, config.batch, config.warmup_steps, config.seed, step, config.both_orders)
    rows = [row for row in batch if row.kind == "preference"]
    if config.both_orders:  # then a row stands twice, one after the other
        rows = rows[::2]
    return [row for row in rows if len(set(row.truth)) > 1]


def score_rows(model: RewardModel, tokenizer, rows: list[Prompt]) -> Tensor:
    """The scores of all responses of all rows, one after another."""
    texts = []
    for row in rows:
        for response in row.responses:
            texts.append(encode_answer(tokenizer, row.instruction, response))
    return model(texts)


def reward_model(config: Baseline) -> None:
    """Train the scalar on the pairs that a run of urpo.py with the same flags draws for P, `--passes` times.

    The figures of the first pass are those of pairs that the model has not seen yet.
    """
    rank, ranks, run = dist.get_rank(), dist.get_world_size(), Path("runs") / config.name
    folder = on_rank_0(f"preparing --model {config.model}", lambda: plan.model_folder(config.model))
    tokenizer, sources = load_pairs(config, folder)
    torch.manual_seed(config.seed)  # of the new head
    model = machine.shard_policy(RewardModel(folder, config.precision))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = machine.warmup_schedule(optimizer, config.lr_warmup)
    log = runs.Log(run, asdict(config))
    on_rank_0(f"writing {run}", lambda: log.open({}))
    for step in tqdm(range(config.passes * config.steps), disable=rank != 0):
        started = time.perf_counter()
        rows = pairs_of_step(sources, config, step % config.steps)
        if len(rows) < ranks:  # the same on all ranks
            raise InputError(f"reward_model: step {step} has {len(rows)} rows of P for {ranks} ranks: more P in "
                             "--mix, a larger --batch, or fewer ranks")
        rows = rows[rank::ranks]
        margin_N = margins(score_rows(model, tokenizer, rows), rows)
        pairs = all_reduce(len(margin_N))
        # Times the number of ranks, since FSDP averages gradients over them.
        (bradley_terry_loss(margin_N).sum() * ranks / pairs).backward()
        norm = machine.clip_gradient(model, config.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        figures = {"step": step, "grad_norm": norm, "seconds": time.perf_counter() - started}
        for name, value_N in pair_measures(margin_N.detach()).items():
            figures[name] = all_reduce(value_N.sum()) / pairs
        on_rank_0(f"writing {run}", lambda: log.append("log.jsonl", [figures]))
    weights = dict(machine.full_weights(model))  # all ranks gather

    def save():
        model.lm.save_pretrained(run / "model", state_dict=weights)
        tokenizer.save_pretrained(run / "model")

    on_rank_0(f"writing {run / 'model'}", save)
    measured = json.dumps(measure(model.eval(), tokenizer, config), indent=1)
    on_rank_0(f"writing {run}", lambda: runs.write_whole(run / "heldout-after.json", measured))


@torch.no_grad()
def measure(model: RewardModel, tokenizer, config: Baseline) -> dict:
    """The reward model on the pairs of `eval.py heldout`, in the form of its JSON."""
    asked = argparse.Namespace(
        preferences="toy", reasoning="none", instructions="none",
        rows=eval.OPTIONS["rows"][1], max_prompt_tokens=config.max_prompt_tokens)
    pairs = eval.heldout_rows(asked, tokenizer)["preference"]
    answers, score_B = [], torch.cat([score_rows(model, tokenizer, [pair]) for pair in pairs])
    for pair, score_2 in zip(pairs, score_B.view(-1, 2)):
        answers.append({
            "kind": "preference",
            "asked": pair.instruction,
            "responses": pair.responses,
            "truth": pair.truth,
            "scores": score_2.tolist(),
        })
    figures = {}
    for name, value_N in pair_measures(margins(score_B, pairs)).items():
        figures[name] = metrics.interval(value_N.tolist())
    return {
        "model": f"runs/{config.name}/model",
        "settings": vars(asked),
        "figures": {"referee": figures},
        "answers": answers,
    }


def as_points(score_G: Tensor) -> list[float]:
    """A group's scalars as scores: its mean is 5.5 points, a unit of log-odds is one, all cut to 1 to 10 (ours).

    A reward model learns differences only, so its scores may all be high: uncentred, the best answers of a group would
    tie at the cut. Advantages do not change under a shift. The log and `report` read these as a judge's scores.

    >>> as_points(torch.tensor([6.0, 5.0, -2.0]))
    [8.5, 7.5, 1.0]
    """
    points_G = 5.5 + score_G - score_G.mean()
    return points_G.clamp(LOWEST_SCORE, HIGHEST_SCORE).tolist()


def rm_score(config: Baseline) -> None:
    """GRPO with a scalar reward model [paper]: it scores each answer by itself, in one forward pass."""
    folder = judge_folder(config, "ForSequenceClassification", "baselines.py reward_model")
    tokenizer = plan.load_tokenizer(folder)
    model = RewardModel(folder, config.precision).to(machine.DEVICE).eval()

    @torch.no_grad()
    def score(config, engine, policy_tokenizer, groups: list[Group], step: int) -> None:
        for group in groups:
            orders = data.judgement_orders(group, step, config.seed, config.judge_list or config.group,
                                           config.judgements, config.audit_judge)
            if not orders:
                continue
            row = Prompt("preference", group.prompt.instruction, tuple(group.texts))
            points = as_points(score_rows(model, tokenizer, [row]))
            for order in orders:
                text = data.score_line([points[i] for i in order])
                group.judgements.append({"order": order, "cut": 0, "prompt": None, "text": text})

    urpo.train(config, score)


# ------------------------------------------------------------------------------- SFT


def error_rates(errors: str) -> list[float]:
    """--errors as the demonstrator's rates on P, R and I.

    >>> error_rates(".4:.4:.6")
    [0.4, 0.4, 0.6]
    """
    try:
        rates = [float(part) for part in errors.split(":")]
    except ValueError:
        rates = []
    if len(rates) != 3 or not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"--errors {errors}: give three rates between 0 and 1 for P:R:I, for example .4:.4:.6")
    return rates


def demonstrate(tokenizer, group: Group, size: int, worked: dict[str, dict], errors: list[float], rng) -> None:
    """So many worked answers to a group's prompt. The demonstrator errs as he did when he taught the seed base.

    worked: the row of the toy world behind each question and instruction. errors: his rates on P, R, I. The rewards
    are for the log alone: how often he was right.
    """
    prompt = group.prompt
    for _ in range(size):
        errs = rng.random() < errors[data.KINDS.index(prompt.kind)]
        if prompt.kind == "preference":
            text = seed.worked_ranking(prompt.truth[::-1] if errs else prompt.truth)
        else:
            text = worked[prompt.instruction]["flawed" if errs else "worked"]
        ids = tokenizer.encode(text, add_special_tokens=False) + data.stop_ids(tokenizer)[:1]
        group.add(machine.Sample(ids, text, True, [0.0] * len(ids)))
    group.rewards, group.advantages = group_rewards(prompt, group.texts, []), [0.0] * size


def imitate(config: Baseline, policy: machine.Policy, optimizer, schedule, groups: list[Group]) -> dict:
    """One optimiser step a minibatch, maximising the mean of log pi(token) over its answer tokens."""
    total, size = {"loss": 0.0, "grad_norm": 0.0}, len(groups) // config.minibatches
    for m in range(config.minibatches):
        minibatch = groups[m * size : (m + 1) * size]
        urpo.set_token_weights(minibatch, config.loss)
        for row in machine.accumulate(policy, machine.build_rows(minibatch, config.row_tokens)):
            loss = -(row.weight_N * policy(row)).sum()
            loss.backward()
            total["loss"] += loss.item()
        norm = machine.clip_gradient(policy, config.grad_clip)
        if not math.isfinite(norm):  # the same on all ranks
            raise FloatingPointError("sft: the gradient is not finite: lower --lr")
        total["grad_norm"] += norm / config.minibatches
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    total["loss"] = all_reduce(total["loss"]) / dist.get_world_size() / config.minibatches
    lr = optimizer.param_groups[0]["lr"]
    return total | dict(updates=config.minibatches, skipped_updates=0, nonfinite_updates=0, lr=lr)


def sft(config: Baseline) -> None:
    """Supervised fine-tuning [paper]: G demonstrations for each of URPO's prompts, so about as many answer tokens."""
    if config.preferences != ["toy:2"] or {*config.reasoning, *config.instructions} != {"toy"}:
        raise InputError("sft: the demonstrator knows the toy world alone: --preferences toy:2 --reasoning toy "
                         "--instructions toy")
    rank, ranks, run = dist.get_rank(), dist.get_world_size(), Path("runs") / config.name
    errors = error_rates(config.errors)
    worked = {row["question"]: row for row in world.records("reasoning", "train", config.toy_rows)}
    worked |= {row["instruction"]: row for row in world.records("instruction", "train", config.toy_rows)}
    tokenizer, sources, policy, optimizer, schedule, engine, log, first_step = urpo.set_up(config, run)
    machine.sleep(engine)
    for step in tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, disable=rank != 0):
        clock = machine.Clock(data.PARTS)
        batch = data.draw(
            sources, config.mix, config.batch, config.warmup_steps, config.seed, step, config.both_orders)
        groups = []
        for index, prompt in data.shard(batch, config.minibatches, rank, ranks):
            rng = random.Random(f"{config.seed}/{step}/{index}/demonstration")
            group = Group(index, prompt, data.encode_prompt(tokenizer, prompt), answers=[])
            demonstrate(tokenizer, group, config.group, worked, errors, rng)
            groups.append(group)
        clock("draw")
        figures = imitate(config, policy, optimizer, schedule, groups)
        clock("update")
        records = machine.gather([group.to_record(step) for group in groups])
        figures["seconds"] = clock.seconds
        figures["peak_memory_gib"] = machine.peak_memory_gib(clock)
        on_rank_0(f"writing {run}", lambda: log.write(step, records, figures))
        done = step + 1
        if done == config.steps or (config.save_every and done % config.save_every == 0):
            folder = run / "checkpoints" / f"step_{done}"
            runs.save_checkpoint(folder, policy, optimizer, schedule, tokenizer, asdict(config), config.keep)


# ------------------------------------------------------------------------------- own answers as preferences


def own_pair(group: Group) -> Prompt | None:
    """A right and a wrong answer to one question, as a row of P whose truth is verified; None if all are alike.

    >>> group = Group(0, Prompt("reasoning", "2 + 2?", answer="4"), [], [], texts=["it is 4", "it is 5"])
    >>> own_pair(group).responses, own_pair(group).truth
    (('it is 4', 'it is 5'), (1.0, 0.0))
    """
    marks = group_rewards(group.prompt, group.texts, [])
    if len(set(marks)) < 2:
        return None
    responses = (group.texts[marks.index(1.0)], group.texts[marks.index(0.0)])
    return Prompt("preference", group.prompt.instruction, responses, truth=(1.0, 0.0))


def own_preferences(config: Baseline) -> None:
    """URPO whose referee also learns from what it must judge: the policy's own answers (beyond the paper, ours).

    Half of a rank's P prompts, rounded up to whole pairs, are replaced after part 2 by pairs of its answers to R, each
    in both orders. So the shares of P, R and I stay as they are. `eval.py explain` finds these prompts in no source.
    """

    def score(config, engine, tokenizer, groups: list[Group], step: int) -> None:
        urpo.self_score(config, engine, tokenizer, groups, step)
        places = [i for i, group in enumerate(groups) if group.prompt.kind == "preference"]
        prompts = []
        for group in groups:
            pair = own_pair(group) if group.prompt.kind == "reasoning" else None
            if pair:
                prompts += [pair, data.swapped(pair)]
        half = (len(places) + 2) // 4 * 2  # an even number
        share = [(groups[place].index, prompt) for place, prompt in zip(places[:half], prompts)]
        for place, group in zip(places, urpo.rollout(config, engine, tokenizer, share, step)):
            groups[place] = group

    urpo.train(config, score)


# ------------------------------------------------------------------------------- command line

COMMANDS = {
    "rm_gen": rm_gen,
    "reward_model": reward_model,
    "rm_score": rm_score,
    "sft": sft,
    "own_preferences": own_preferences,
}


def main() -> None:
    try:
        command, *arguments = sys.argv[1:] or [""]
        if command not in COMMANDS:
            print(__doc__)
            raise InputError(f"{command or 'no command'}: give one of {', '.join(COMMANDS)}")
        config = flags.parse(Baseline, urpo.PRESETS, arguments)
        flags.check(config, world=int(os.environ.get("WORLD_SIZE", 1)))
        if command in ("rm_gen", "rm_score") and not config.judge:
            raise InputError(f"{command}: give --judge, the folder of the model that judges")
        runs.check_folder(config.name, config.resume)
        machine.start_ranks(config.timeout)
        COMMANDS[command](config)
    except (InputError, FloatingPointError, RuntimeError) as error:
        machine.stop(error)


if __name__ == "__main__":
    main()
    os._exit(0)  # as urpo.py ends
