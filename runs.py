"""A run's folder: the log, the trajectories, the checkpoints, and how each is read back. Values in, no settings object.

    runs/<name>/config.json        settings, machine, commit
    runs/<name>/log.jsonl          one line a step; every key is explained in docs/log.md
    runs/<name>/rollouts.jsonl     one line a group (data.Group.to_record)
    runs/<name>/checkpoints/       step_N/model loads in transformers and vLLM; step_N/trainer continues the run
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from hashlib import file_digest
from pathlib import Path
from statistics import pstdev

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

import machine
from data import KINDS, Group, InputError
from rewards import (
    SMALLEST_SPREAD,
    first_position_preference,
    kendall_tau,
    loss_denominator,
    mean,
    parse_scores,
    self_rewards,
    token_weight,
)
from toy import world

# ------------------------------------------------------------------------------- figures of a step


def figures_of_step(groups: list[Group], minibatches: int, loss: str) -> dict[str, dict]:
    """{kind: its figures} of a step, from the groups of its whole batch, in the order of the batch."""
    shares = gradient_shares(groups, minibatches, loss)
    figures = {}
    for kind in KINDS:
        part = [group for group in groups if group.prompt.kind == kind]
        if part:
            figures[kind] = {**figures_of_kind(part), "gradient_share": shares.get(kind)}
    return figures


def gradient_shares(groups: list[Group], minibatches: int, loss: str) -> dict[str, float]:
    """The part of each kind in what pulls at the weights: its sum of w |A| over all answer tokens, over that of all.

    w is a token's weight in the loss (rewards.token_weight), A its advantage. A mix by prompt count is no mix by
    gradient: long answers pull more, and so do kinds whose answers differ. Empty where no group has a signal.
    """
    pull = dict.fromkeys([group.prompt.kind for group in groups], 0.0)
    size = len(groups) // minibatches
    for first in range(0, size * minibatches, size or 1):
        minibatch = groups[first : first + size]
        denominator = loss_denominator([len(answer) for group in minibatch for answer in group.answers], loss)
        for group in minibatch:
            for answer, advantage in zip(group.answers, group.advantages):
                weight = token_weight(len(answer), denominator, loss)
                pull[group.prompt.kind] += len(answer) * weight * abs(advantage)
    total = sum(pull.values())
    return {kind: part / total for kind, part in pull.items()} if total else {}


def figures_of_kind(groups: list[Group]) -> dict:
    """The figures of one kind of prompt in one step, from the groups of all ranks. Empty for a kind not drawn.

    Readable judgements, a good mean tau and a lively spread of self-scores can all stand over a referee that writes
    one constant line. What exposes it: `zero_spread`, the share of judged groups without any gradient; `distinct`,
    the number of different answers in a group; and `first_position`.
    """
    if not groups:
        return {}
    rewards, spreads, advantages, lengths, finished = [], [], [], [], []
    for group in groups:
        if group.rewards is not None:  # else no judgement of the group could be read
            rewards += group.rewards
            spreads.append(pstdev(group.rewards))
        advantages += map(abs, group.advantages)
        lengths += map(len, group.answers)
        finished += group.finished
    figures = {
        "prompts": len(groups), "unjudged": len(groups) - len(spreads),
        "reward": mean(rewards), "reward_std": mean(spreads),
        "zero_spread": mean(spread < SMALLEST_SPREAD for spread in spreads),
        "advantage_scale": mean(advantages),
        "length": mean(lengths), "tokens": sum(lengths), "finished": mean(finished),
        "distinct": mean(len(set(group.texts)) for group in groups),
        "entropy": mean(group.entropy for group in groups if group.entropy is not None)}
    if groups[0].prompt.kind != "reasoning":
        figures |= referee_figures(groups)
    if groups[0].prompt.kind != "preference":
        figures["judge_tau"] = judge_tau(groups)
    if groups[0].prompt.kind == "instruction":
        figures |= gold_figures(groups)
    return figures


def referee_figures(groups: list[Group]) -> dict:
    """What the referee wrote: on P its answers, on I its self-judgements."""
    preference = groups[0].prompt.kind == "preference"
    judgements, taus = [], []  # the scores in the order shown, None: unreadable
    for group in groups:
        if preference:
            verdicts = [parse_scores(text, len(group.prompt.truth)) for text in group.texts]
            taus += [reward for reward, scores in zip(group.rewards, verdicts) if scores]
        else:
            verdicts = [parse_scores(judgement["text"], len(judgement["order"])) for judgement in group.judgements]
        judgements += verdicts
    read = [scores for scores in judgements if scores]
    if preference:
        figures = {"tau": mean(taus)}
    else:
        cuts = [judgement["cut"] > 0 for group in groups for judgement in group.judgements if "cut" in judgement]
        figures = {"score_std": mean(pstdev(scores) for scores in read), "cut": mean(cuts)}
    figures["format"] = len(read) / len(judgements) if judgements else None
    figures["first_position"] = first_position_preference(read) if read else None
    return figures


def hidden_gold(group: Group) -> list[dict] | None:
    """The parts of the toy world's hidden gold that each answer has; None for an instruction from elsewhere."""
    golds = [world.gold(group.prompt.instruction, text) for text in group.texts]
    return None if None in golds else golds


def judge_tau(groups: list[Group]) -> float | None:
    """What a self-score is worth: Kendall's tau of self-scores with the truth, a mean over groups. 0 is a blind judge.

    The truth of R is the verified reward (`--audit_judge`). On I of the toy world it is the number of parts of the
    hidden gold. Groups whose answers are all as good do not count; None if there is no other.
    """
    taus = []
    for group in groups:
        verdicts = [judgement["text"] for judgement in group.judgements]
        scores = self_rewards(verdicts, [judgement["order"] for judgement in group.judgements])
        truth = group.rewards
        if group.prompt.kind == "instruction":
            truth = [sum(gold.values()) for gold in hidden_gold(group) or []]
        if scores and len(set(truth)) > 1:
            taus.append(kendall_tau(scores, truth, "strict"))
    return mean(taus)


def gold_figures(groups: list[Group]) -> dict:
    """Share of answers to I that are on topic, whole and in order, and share that keeps the constraint.

    By the hidden gold, which no reward sees. Both rise while self-scores are worth something.
    """
    good, kept = [], []
    for group in groups:
        for gold in hidden_gold(group) or []:
            *text_parts, constraint = gold.values()  # in the order of world.GOLD
            good.append(all(text_parts))
            kept.append(constraint)
    return {"gold": mean(good), "gold_constraint": mean(kept)}


def count_not_finite(before: int, step: int, figures: dict) -> int:
    """Steps in a row whose updates were all skipped as not finite. Raises FloatingPointError at the third."""
    count = 0 if figures["updates"] else before + (figures["nonfinite_updates"] > 0)
    if count == 3:
        raise FloatingPointError(f"step {step}: no finite update for {count} steps: lower --lr, or look at the last "
                                 "prompts in rollouts.jsonl")
    return count


# ------------------------------------------------------------------------------- writing


def check_folder(name: str, resume: bool) -> None:
    """Refuse a run's name that is no plain folder name, or whose folder holds a run that is not to be continued."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"--name {name!r}: at most 100 letters, digits, '.', '_' and '-'; a folder in runs/")
    run = Path("runs") / name
    for folder in (run.parent, run):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{folder} is no folder: move it away, or run elsewhere")
    if not resume and ((run / "log.jsonl").exists() or checkpoints(run / "checkpoints")):
        raise InputError(f"{run} holds a run: give --resume to continue it, or another --name")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """A file that is either complete or absent."""
    unfinished = Path(f"{path}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    unfinished.rename(path)


def flush(path: Path) -> None:
    """What was written to a file or a folder is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def cut_lines(path: Path, first_step: int) -> None:
    """Drop the lines of `first_step` and later, and a torn one: a resumed run repeats the steps after its checkpoint.

    In place and without a copy, so that neither a full disk nor a crash can lose the lines that stay.
    """
    with open(path, "ab+") as lines:
        lines.seek(0)
        kept = cut = 0
        for line in lines:
            step = re.match(rb'{"step": (\d+).*}\n', line)
            if cut or not step or int(step[1]) >= first_step:
                cut += 1
            else:
                kept += len(line)
        lines.truncate(kept)
    if cut:
        print(f"{path}: cut {cut} lines from step {first_step} on, which the run repeats", flush=True)


def is_recorded(step: int, line: dict, rollouts_every: int) -> bool:
    """Whether rollouts.jsonl holds the trajectories of a step: every k-th does, and each whose numbers broke down."""
    return step % rollouts_every == 0 or bool(line.get("nonfinite_updates"))


class Log:
    """config.json, log.jsonl and rollouts.jsonl of a run. For rank 0 alone."""

    def __init__(self, run: Path, settings: dict):
        self.run, self.settings = run, settings

    def open(self, about: dict) -> tuple[int, Path | None]:
        """(first step, checkpoint to load or None) of a new run, or with the setting `resume` of one that goes on."""
        first_step, saved = last_checkpoint(self.run) if self.settings["resume"] else (0, None)
        if saved:
            check_resumed(saved, self.settings)
            check_sources(read_about(self.run).get("sources"), about.get("sources", {}))
        self.run.mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "rollouts.jsonl"):
            cut_lines(self.run / name, first_step)
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        about = {"config": self.settings, **about, "commit": git.stdout.strip() or None, **machine.about_machine()}
        (self.run / "config.json").write_text(json.dumps(about, indent=1))
        return first_step, saved

    def write(self, step: int, records: list[dict], log: dict) -> str:
        """One line of log.jsonl, one record a group in rollouts.jsonl; returns the rewards for the live line.

        The figures of the log are made from the records alone, as `eval.py explain` makes them again.
        """
        records = sorted(records, key=lambda record: record["index"])
        groups = [Group.from_record(record) for record in records]
        kinds = figures_of_step(groups, self.settings["minibatches"], self.settings["loss"])
        shown, tokens = [], 0
        for kind, figures in kinds.items():
            tokens += figures["tokens"]
            if figures["reward"] is not None:
                shown.append(f"{kind} {figures['reward']:.2f}")
        log = {"step": step, **kinds, **log, "tokens_per_second": tokens / sum(log["seconds"].values())}
        if is_recorded(step, log, self.settings["rollouts_every"]):
            self.append("rollouts.jsonl", records)
        self.append("log.jsonl", [log])  # last: a step in the log has its trajectories
        return ", ".join(shown)

    def append(self, name: str, records: list[dict]) -> None:
        with open(self.run / name, "a") as out:
            for record in records:
                out.write(json.dumps(record) + "\n")
        flush(self.run / name)


# ------------------------------------------------------------------------------- checkpoints


def trainer_state(policy, optimizer, schedule) -> dict:
    if not optimizer.state:  # no update yet: torch makes the state by a step at rate 0, and counts that step
        get_optimizer_state_dict(policy, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()
    model, optimizer_state = get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": optimizer_state, "schedule": schedule.state_dict()}


def save_checkpoint(folder: Path, policy, optimizer, schedule, tokenizer, settings: dict, keep: int) -> None:
    """Written beside its place, flushed to the disk, then renamed: a checkpoint is whole or not there.

    keep: how many of the newest checkpoints stay; 0: all.
    """
    unfinished = folder.with_name("unfinished")
    machine.on_rank_0(f"removing {unfinished}", lambda: unfinished.exists() and shutil.rmtree(unfinished))
    try:
        dcp.save(trainer_state(policy, optimizer, schedule), checkpoint_id=unfinished / "trainer")
    except dcp.CheckpointException as error:  # on all ranks alike
        raise machine.write_failed(f"writing {folder}", next(iter(error.failures.values()))[0]) from None
    weights = {}
    for name, weight in machine.full_weights(policy):  # all ranks gather, rank 0 keeps
        if dist.get_rank() == 0:
            weights[name] = weight.cpu()

    def write_model():
        policy.lm.config.dtype = policy.compute
        policy.lm.save_pretrained(unfinished / "model", state_dict=weights)
        tokenizer.save_pretrained(unfinished / "model")
        (unfinished / "config.json").write_text(json.dumps(settings, indent=1))

    def finish():
        finish_checkpoint(unfinished, folder, keep, files)

    machine.on_rank_0(f"writing {folder}", write_model)
    part = file_list(unfinished, dist.get_rank(), dist.get_world_size())  # 107 GB of a 7B model: all ranks share it
    files = dict(machine.gather(list(part.items())) or [])
    machine.on_rank_0(f"writing {folder}", finish)


# What a resumed run may change: how it goes on. Everything else decides which prompts come, or what `eval.py explain`
# derives again by the settings in config.json, which must hold for all steps of a run.
MAY_CHANGE = """name preset steps lr lr_warmup weight_decay grad_clip clip_low clip_high importance_cap
    precision row_tokens logit_chunk recompute gpu_memory cpu_cache max_drift timeout save_every keep""".split()


def check_resumed(saved: Path, settings: dict) -> None:
    """Name every setting that differs from the checkpoint's. Refuse those that a run must keep."""
    before = json.loads((saved / "config.json").read_text())
    refused = []
    for name, value in settings.items():
        if value != before.get(name) and name != "resume":
            change = f"--{name} {before.get(name)} -> {value}"
            if name in MAY_CHANGE:
                print(f"{saved}: resumed with another setting: {change}", flush=True)
            else:
                refused.append(change)
    if refused:
        raise InputError(f"--resume: a run keeps these settings from its first step to its last, and {saved} was made "
                         f"with others ({', '.join(refused)}): give the old ones, or start a new run with another "
                         f"--name and --model {saved / 'model'}")


def check_sources(before: dict | None, now: dict) -> None:
    """Refuse to go on with other rows: the order of every later draw would be another one."""
    changed = [kind for kind in now if before and before.get(kind) != now[kind]]
    if changed:
        raise InputError(f"--resume: the rows of {', '.join(changed)} are not those that the run began with; bring the "
                         "old files back, or start a new run with another --name")


def load_checkpoint(folder: Path, policy, optimizer, schedule) -> None:
    """Weights, moments and the schedule's step. The rate and the weight decay of this run's flags stay."""
    rates, weight_decay = schedule.base_lrs, optimizer.defaults["weight_decay"]
    state = trainer_state(policy, optimizer, schedule)
    dcp.load(state, checkpoint_id=folder / "trainer")
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"] | {"base_lrs": rates})
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate * schedule.lr_lambdas[0](schedule.last_epoch)
        group["weight_decay"] = weight_decay


def file_list(folder: Path, part: int = 0, parts: int = 1) -> dict[str, list]:
    """{name: [bytes, checksum]} of all files below a folder but for the manifest, which holds this list.

    part, parts: of all files, sorted by size, every `parts`-th from `part` on. So each rank gets about as many bytes.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json"]
    files.sort(key=lambda path: (path.stat().st_size, path))
    found = {}
    for path in files[part::parts]:
        with open(path, "rb") as file:
            found[str(path.relative_to(folder))] = [path.stat().st_size, file_digest(file, "sha256").hexdigest()]
    return found


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(steps done, path) of every checkpoint in a run's folder `checkpoints`, newest first."""
    found = [(int(path.name[5:]), path) for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, reverse=True)


def finish_checkpoint(unfinished: Path, folder: Path, keep: int, files: dict[str, list]) -> None:
    """Manifest of `files`, flush, rename, pointer: `folder` is whole or not there, at whatever moment the power fails.

    Then all but the newest `keep` checkpoints go (0: all stay). Those of later steps, which a run that fell back to
    an older one left behind, do not count.
    """
    (unfinished / "manifest.json").write_text(json.dumps(files, indent=1))
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    if folder.exists():  # damaged: the run resumed from an older one
        shutil.rmtree(folder)
    unfinished.rename(folder)
    pointer = folder.with_name("last.new")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.name)
    pointer.replace(folder.with_name("last"))
    flush(folder.parent)
    if keep:
        found = checkpoints(folder.parent)
        newest = found.index((int(folder.name[5:]), folder))
        for _, old in found[newest + keep :]:
            shutil.rmtree(old.rename(unfinished))  # never half a checkpoint under its own name


def damaged_files(folder: Path) -> list[str]:
    """The files of a checkpoint that are not as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return ["manifest.json"]
    found = file_list(folder)
    return [name for name, entry in manifest.items() if found.get(name) != entry]


def last_checkpoint(run: Path) -> tuple[int, Path | None]:
    """(steps done, folder) of the newest checkpoint whose files are as they were written; (0, None) without any."""
    damaged = []
    for steps, folder in checkpoints(run / "checkpoints"):
        wrong = damaged_files(folder)
        if not wrong:
            for line in damaged:
                print(f"{line}: falling back to {folder}", flush=True)
            return steps, folder
        damaged.append(f"{folder} is damaged ({', '.join(wrong)})")
    if damaged:
        raise InputError(f"{'; '.join(damaged)}: no whole checkpoint is left; bring one back, or remove {run} to start "
                         "at step 0")
    print(f"{run}: no checkpoint to resume from, starting at step 0", flush=True)
    return 0, None


# ------------------------------------------------------------------------------- reading a run back


def read_lines(path: Path, repairs: list[str]):
    """(line number, record) of a run's .jsonl. A last line that a crash cut short is left out; `repairs` says so."""
    cut = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, text in enumerate(lines, 1):
            if cut:
                raise InputError(f"{path}:{number - 1}: not JSON ({cut}); remove the line")
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                cut = error.msg
                continue
            if not isinstance(record, dict) or "step" not in record:
                raise InputError(f"{path}:{number}: no field 'step'; not a line that urpo.py wrote")
            yield number, record
    if cut:
        repairs.append(f"{path}:{number}: the last line is incomplete and was left out")


def read_log(run: Path, repairs: list[str]) -> list[dict]:
    """The steps of a run."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{run}: no run here (no log.jsonl); give a folder such as runs/urpo")
    steps = [record for _, record in read_lines(path, repairs)]
    if not steps:
        raise InputError(f"{path}: no step is complete yet")
    return steps


def read_groups(path: Path, repairs: list[str]):
    """(step, Group) of each line of a rollouts.jsonl."""
    for number, record in read_lines(path, repairs):
        try:
            yield record["step"], Group.from_record(record)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None


def read_about(run: Path) -> dict:
    """The run's config.json; {} where there is none."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); remove it or restore it") from None
