"""A run's folder: the log, the trajectories, the checkpoints, and how each is read back.

    runs/<name>/config.json        settings, machine, commit
    runs/<name>/log.jsonl          one line a step; every key is explained in docs/log.md
    runs/<name>/rollouts.jsonl     one line a group
    runs/<name>/checkpoints/       step_N/model loads in transformers and vLLM; step_N/trainer continues the run
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from tqdm import tqdm

from infra.policy import full_weights
from infra.ranks import InputError, about_machine, all_reduce, catch_signals, exchange, on_rank_0, write_failed

# ------------------------------------------------------------------------------- files that are whole


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


def append(path: Path, records: list[dict]) -> None:
    with open(path, "a") as out:
        for record in records:
            out.write(json.dumps(record) + "\n")
    flush(path)


def cut_lines(path: Path, first_step: int) -> None:
    """Drop the lines of `first_step` and later, which a resumed run repeats, and a torn last one.

    In place and without a copy, so that neither a full disk nor a crash can lose the lines that stay. Raises InputError
    at a damaged line before the last, for cutting there would lose whole ones.
    """
    with open(path, "ab+") as lines:
        lines.seek(0)
        kept = cut = 0
        for number, line in enumerate(lines, 1):
            step = re.match(rb'{"step": (\d+).*}\n', line)
            stays = step and int(step[1]) < first_step
            if stays and cut:
                raise InputError(f"{path}:{number - cut}: damaged, and whole lines stand behind it: mend or remove it")
            if stays:
                kept += len(line)
            else:
                cut += 1
        lines.truncate(kept)
    if cut:
        print(f"{path}: cut {cut} lines from step {first_step} on, which the run repeats", flush=True)


# ------------------------------------------------------------------------------- the log of a run


def check_name(name: str, resume: bool) -> None:
    """Refuse a run's name that is no plain folder name, or whose folder holds a run that is not to be continued."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(f"--name {name!r}: at most 100 letters, digits, '.', '_' and '-'; a folder in runs/")
    run = Path("runs") / name
    if os.path.lexists(run) and not run.is_dir():
        raise InputError(f"{run} is no folder: move it away, or give another --name")
    begun = (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size
    if not resume and (begun or checkpoints(run)):
        raise InputError(f"{run} holds a run: give --resume to continue it, or another --name")


class Log:
    """A run as it grows: its steps, what is written of each, and when a checkpoint is due. All ranks call all of it.

    settings: every setting of the run. program: what trains, which a resumed run must be again. rows: checksums of the
    data. may_change: settings that may differ on resume. about: what else config.json says.
    """

    def __init__(self, settings: dict, *, program: str, rows: dict, may_change: list[str], about: dict):
        self.settings, self.folder = {"program": program, **settings}, Path("runs") / settings["name"]
        self.not_finite, self.stopped = 0, False
        about = {"rows": rows, **about, **about_machine()}
        config = self.folder / "config.json"

        def start() -> tuple[int, Path | None]:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = hold(self.folder)
            done, saved = last_checkpoint(self.folder) if settings["resume"] else (0, None)
            if saved:
                check_resumed(saved, self.settings, may_change, read_about(self.folder).get("rows", rows), rows)
            for name in ("log.jsonl", "rollouts.jsonl"):
                cut_lines(self.folder / name, done)
            started = datetime.datetime.now().isoformat()
            write_whole(config, json.dumps({"config": self.settings, "started": started, **about}, indent=1))
            return done, saved

        self.first_step, self.saved = on_rank_0(f"writing {self.folder}", start)
        if len(set(exchange(config.read_text() if config.is_file() else None))) > 1:
            raise InputError(f"{config}: not all ranks see the same file: give every node one shared folder runs/")

    def steps(self):
        """The steps that are left, until the last one or a signal, with a live line on rank 0."""
        last, self.caught = self.settings["steps"], catch_signals()
        self.bar = tqdm(range(self.first_step, last), initial=self.first_step, total=last, disable=dist.get_rank() != 0)
        for step in self.bar:
            yield step
            if self.stopped:
                if dist.get_rank() == 0:
                    print(f"stopped by a signal; {step + 1} steps are saved and --resume continues", flush=True)
                return

    def write(self, line: dict, records: list[dict], shown: dict) -> None:
        """The line of a step in log.jsonl, the same on all ranks but for seconds; its groups' in rollouts.jsonl.

        shown: what the live line says. Raises FloatingPointError at the third step without a finite update since the
        last that had one.
        """

        def write() -> None:
            append(self.folder / "rollouts.jsonl", records)
            append(self.folder / "log.jsonl", [line])  # last: it has its trajectories

        on_rank_0(f"writing {self.folder}", write)
        self.bar.set_postfix(shown)
        self.not_finite = 0 if line["updates"] else self.not_finite + (line["nonfinite_updates"] > 0)
        if self.not_finite == 3:
            raise FloatingPointError(f"step {line['step']}: no finite update for 3 steps: lower --lr, or look at the "
                                     "last prompts in rollouts.jsonl")

    def save_if_due(self, step: int, policy, optimizer, tokenizer) -> None:
        """A checkpoint every `save_every` steps, after the last step, and before a signal ends the run.

        After the log: a run killed in between repeats the step, and its lines are cut from the log.
        """
        done, every = step + 1, self.settings["save_every"]
        self.stopped = all_reduce(len(self.caught)) > 0  # a signal to any rank stops all ranks at the same step
        if self.stopped or done == self.settings["steps"] or (every and done % every == 0):
            save_checkpoint(self.folder / "checkpoints" / f"step_{done}", policy, optimizer, tokenizer,
                            settings=self.settings)


# ------------------------------------------------------------------------------- checkpoints


def hold(folder: Path):
    """A lock on a run's folder for the life of this process: two runs in one folder would mix their lines."""
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process trains there: wait for it, or give another --name") from None
    return lock


def trainer_state(policy, optimizer) -> dict:
    if not optimizer.state:  # no update yet: torch makes the state by a step at rate 0, and counts that step
        get_optimizer_state_dict(policy, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()
    model, optimizer_state = get_state_dict(policy, optimizer)
    return {"model": model, "optimizer": optimizer_state}


def save_checkpoint(folder: Path, policy, optimizer, tokenizer, *, settings: dict) -> None:
    unfinished = folder.with_name("unfinished")
    on_rank_0(f"removing {unfinished}", lambda: unfinished.exists() and shutil.rmtree(unfinished))
    try:
        dcp.save(trainer_state(policy, optimizer), checkpoint_id=unfinished / "trainer")
    except dcp.CheckpointException as error:  # on all ranks alike
        raise write_failed(f"writing {folder}", next(iter(error.failures.values()))[0]) from None
    weights = {}
    for name, weight in full_weights(policy):  # all ranks gather, rank 0 keeps
        if dist.get_rank() == 0:
            weights[name] = weight.cpu()

    def finish():
        policy.lm.config.dtype = policy.compute
        policy.lm.save_pretrained(unfinished / "model", state_dict=weights)
        tokenizer.save_pretrained(unfinished / "model")
        (unfinished / "config.json").write_text(json.dumps(settings, indent=1))
        put_in_place(unfinished, folder, settings["keep"])

    on_rank_0(f"writing {folder}", finish)


def put_in_place(unfinished: Path, folder: Path, keep: int) -> None:
    """Flush and rename: a checkpoint is whole or not there, at whatever moment the power fails."""
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    unfinished.rename(folder)
    tidy_checkpoints(folder.parent.parent, keep)


def tidy_checkpoints(run: Path, keep: int) -> None:
    """`last` points at the newest checkpoint, all but the newest `keep` go (0: all stay), and nothing unfinished stays.

    A resume calls it, too, since a kill may have come between a checkpoint and this: then all stay.
    """
    folder, found = run / "checkpoints", checkpoints(run)
    pointer, new, unfinished = folder / "last", folder / "last.new", folder / "unfinished"
    if pointer.is_dir() and not pointer.is_symlink():  # a copy that followed the link
        shutil.rmtree(pointer)
    new.unlink(missing_ok=True)
    new.symlink_to(found[0][1].name)
    new.replace(pointer)
    flush(folder)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    for _, old in found[keep:] if keep else []:
        shutil.rmtree(old.rename(unfinished))  # never half a checkpoint under its own name


def load_checkpoint(folder: Path, policy, optimizer) -> None:
    """Weights, moments and the number of updates."""
    state = trainer_state(policy, optimizer)
    try:
        dcp.load(state, checkpoint_id=folder / "trainer")
    except dcp.CheckpointException as error:  # on all ranks alike
        reason = str(next(iter(error.failures.values()))[0])
        raise InputError(f"{folder}: damaged ({reason}): remove it, and --resume goes on from the one before") from None
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(steps done, path) of every checkpoint of a run, newest first."""
    found = [(int(path.name[5:]), path) for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, reverse=True)


def last_checkpoint(run: Path) -> tuple[int, Path | None]:
    """(steps done, folder) of the newest checkpoint; (0, None) for a run that has not begun.

    Raises InputError where there are steps and no checkpoint: to begin again would erase them.
    """
    if not checkpoints(run):
        if (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size:
            raise InputError(f"--resume: {run} holds steps and no checkpoint to go on from: move the folder away, or "
                             "give another --name")
        print(f"{run}: no checkpoint to resume from, starting at step 0", flush=True)
        return 0, None
    tidy_checkpoints(run, keep=0)
    done, saved = checkpoints(run)[0]
    if not (saved / "trainer" / ".metadata").exists():
        raise InputError(f"{saved}: without trainer/: remove it, or begin a new run with --model {saved / 'model'}")
    return done, saved


def check_resumed(saved: Path, settings: dict, may_change: list[str], old_rows: dict, rows: dict) -> None:
    """Name every setting that differs from the checkpoint's. Refuse those that a run must keep, and other rows."""
    before = read_about(saved)
    refused = [f"the rows of {kind}" for kind in rows if old_rows.get(kind) != rows[kind]]
    for name in before | settings:
        if settings.get(name) != before.get(name) and name != "resume":
            change = f"--{name} {before.get(name)} -> {settings.get(name, 'no setting of this version')}"
            if name in may_change:
                print(f"{saved}: resumed with another setting: {change}", flush=True)
            else:
                refused.append(change)
    if refused:
        raise InputError(f"--resume: a run keeps its rows and these settings from its first step to its last, and "
                         f"{saved} was made with others ({', '.join(refused)}): give the old ones, or start a new run "
                         f"with another --name and --model {saved / 'model'}")


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
    path = run / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{run}: no run here (no log.jsonl); give a folder such as runs/urpo")
    steps = [record for _, record in read_lines(path, repairs)]
    if not steps:
        raise InputError(f"{path}: no step is complete yet")
    return steps


def read_about(folder: Path) -> dict:
    """The config.json of a run or of a checkpoint; {} where there is none."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); remove it or restore it") from None
