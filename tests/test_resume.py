"""Nothing lost: checkpoints that are whole or not there, what they bring back, signals, and errors of any rank.

That a resumed run repeats every digit is in test_end_to_end.py, with vLLM; the long fault campaign is bench/faults.py.
"""
import itertools
import json
import os
import resource
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import urpo
from conftest import random_groups
from infra import runs
from infra.policy import full_weights, updates_done
from infra.ranks import InputError
from tiny_run import lines


def write_checkpoint(run_folder: Path, steps: int, keep: int = 0, settings: dict | None = None) -> Path:
    """A checkpoint of small files, put in place as `save_checkpoint` does it."""
    folder = run_folder / "checkpoints" / f"step_{steps}"
    unfinished = folder.with_name("unfinished")
    (unfinished / "trainer").mkdir(parents=True, exist_ok=True)
    (unfinished / "trainer" / ".metadata").write_text("whole")
    (unfinished / "config.json").write_text(json.dumps(settings or {}))
    runs.put_in_place(unfinished, folder, keep)
    return folder


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


# ---- a checkpoint is whole or not there ----

def test_the_newest_checkpoint_counts_by_its_number_and_a_log_without_any_is_not_erased(tmp_path, capsys):
    assert runs.last_checkpoint(tmp_path) == (0, None) and "no checkpoint" in capsys.readouterr().out
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(InputError, match="no checkpoint.*--name"):
        runs.last_checkpoint(tmp_path)
    for steps in (9, 10):
        newest = write_checkpoint(tmp_path, steps)
    for other in ("step_11.copy", "unfinished"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert runs.last_checkpoint(tmp_path) == (10, newest)
    assert (tmp_path / "checkpoints" / "last").resolve() == newest.resolve()


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_keep_leaves_the_newest_and_0_leaves_all(tmp_path, keep, left):
    for steps in (1, 2, 3, 4):
        write_checkpoint(tmp_path, steps, keep)
    assert names(tmp_path) == ["last", *(f"step_{steps}" for steps in left)]


class Crash(BaseException):
    pass


@pytest.mark.parametrize("keep", [0, 1])
def test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_whole(tmp_path, monkeypatch, keep):
    for moment in itertools.count():
        folder, crashed = tmp_path / str(moment), False
        for steps in (1, 2):
            write_checkpoint(folder, steps)
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace", "symlink", "unlink", "rmdir"):
                real = getattr(os, name)

                def crash(*arguments, real=real, **options):
                    if next(calls) == moment:
                        raise Crash
                    return real(*arguments, **options)

                patch.setattr(os, name, crash)
            try:
                write_checkpoint(folder, 3, keep)
            except Crash:
                crashed = True
        steps, found = runs.last_checkpoint(folder)
        assert steps in (2, 3) and (found / "trainer" / ".metadata").read_text() == "whole"
        assert (folder / "checkpoints" / "last").resolve().name in ("step_2", "step_3")
        assert (folder / "checkpoints" / "last" / "config.json").exists()
        write_checkpoint(folder, 4)
        assert runs.last_checkpoint(folder)[0] == 4
        if not crashed:
            break
    assert moment > 5 and steps == 3


# ---- what a checkpoint brings back ----

TOKENIZER = SimpleNamespace(save_pretrained=lambda folder: None)


@pytest.fixture
def new_trainer(make_policy):
    def new():
        policy = make_policy()
        return policy, torch.optim.AdamW(policy.parameters(), lr=1.0)

    return new


def advance(policy, optimizer, **changes) -> float:
    """One update; its rate."""
    groups = random_groups(2)
    for group in groups:
        group.advantages = [1.0, 0.0, -1.0]
    config = urpo.Config(**{"minibatches": 1, "row_tokens": 4096, "lr": 1e-3, "lr_warmup": 4} | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urpo, "largest_drift", lambda precision: 1e9)
        return urpo.update(config, policy, optimizer, urpo.build_minibatches(config, groups))["lr"]


def save(folder: Path, trainer, settings=None) -> None:
    runs.save_checkpoint(folder, *trainer, TOKENIZER, settings={"keep": 0} | (settings or {}))


def assert_same_weights(one, other) -> None:
    for (name, a), (_, b) in zip(full_weights(one[0]), full_weights(other[0]), strict=True):
        assert torch.equal(a, b), name


def test_a_resume_brings_back_weights_moments_and_the_number_of_updates(new_trainer, tmp_path):
    first, second = new_trainer(), new_trainer()
    advance(*first)
    advance(*first)
    folder = tmp_path / "checkpoints" / "step_1"
    save(folder, first, {"seed": 7})
    assert runs.last_checkpoint(tmp_path) == (1, folder)
    assert json.loads((folder / "config.json").read_text()) == {"keep": 0, "seed": 7}
    runs.load_checkpoint(folder, *second)
    assert updates_done(second[1]) == 2
    assert advance(*first) == advance(*second) == pytest.approx(1e-3 * 3 / 4)  # the rate of the third update
    assert_same_weights(first, second)


def test_a_damaged_checkpoint_and_one_without_the_trainers_state_are_named(new_trainer, tmp_path):
    folder = tmp_path / "checkpoints" / "step_1"
    save(folder, new_trainer())
    (part,) = (folder / "trainer").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="step_1: damaged .*remove it"):
        runs.load_checkpoint(folder, *new_trainer())
    shutil.rmtree(folder / "trainer")
    with pytest.raises(InputError, match="step_1: without trainer/.*--model"):
        runs.last_checkpoint(tmp_path)


def test_the_rate_of_a_resumed_run_is_its_own(new_trainer, tmp_path):
    first, second = new_trainer(), new_trainer()
    advance(*first)
    save(tmp_path / "checkpoints" / "step_1", first)
    runs.load_checkpoint(tmp_path / "checkpoints" / "step_1", *second)
    assert advance(*second, lr=5e-4) == pytest.approx(5e-4 * 2 / 4)


def test_a_checkpoint_before_the_first_update_changes_nothing(new_trainer, tmp_path):
    """Torch fills an empty optimiser state by a step of its own, which Adam's bias correction would count."""
    undisturbed, saved, resumed = new_trainer(), new_trainer(), new_trainer()
    save(tmp_path / "checkpoints" / "step_0", saved)
    runs.load_checkpoint(tmp_path / "checkpoints" / "step_0", *resumed)
    for trainer in (undisturbed, saved, resumed):
        advance(*trainer)
        advance(*trainer)
        assert updates_done(trainer[1]) == 2
        assert_same_weights(undisturbed, trainer)


# ---- what a resumed run may change ----

def resume_with(folder, monkeypatch, capsys, rows=None, program="urpo", **changes) -> str:
    """What a resume says whose settings or rows differ, and that nothing is written where it is refused."""
    monkeypatch.chdir(folder)
    settings, mine = asdict(urpo.Config(name="mine")), folder / "runs" / "mine"
    write_checkpoint(mine, 2)
    saved = write_checkpoint(mine, 3, settings=settings | {"program": "urpo"})
    about = '{"rows": {"preference": 1, "reasoning": 2}}'
    (mine / "config.json").write_text(about)
    (mine / "log.jsonl").write_text('{"step": 0}\n{"step": 5}\n')
    rows = rows or {"preference": 1, "reasoning": 2}
    try:
        log = runs.Log(settings | {"resume": True} | changes, program=program, rows=rows,
                       may_change=urpo.MAY_CHANGE, about={})
    except InputError as error:
        assert (mine / "config.json").read_text() == about and len(lines(mine / "log.jsonl")) == 2
        assert names(mine) == ["last", "step_2", "step_3"]
        return str(error)
    assert (log.first_step, log.saved) == (3, saved.relative_to(folder)) and len(lines(mine / "log.jsonl")) == 1
    return capsys.readouterr().out


def test_a_resume_names_every_setting_that_differs(process_group, tmp_path, monkeypatch, capsys):
    out = resume_with(tmp_path, monkeypatch, capsys, lr=3e-6, steps=2000, keep=2)
    assert {line.rpartition(": ")[2] for line in out.splitlines() if "->" in line} == {
        "--steps 1000 -> 2000", "--lr 1e-06 -> 3e-06", "--keep 0 -> 2"}


KEPT = """seed mix batch warmup_steps both_orders group preferences max_prompt_tokens tau minibatches
    judgements temperature""".split()


@pytest.mark.parametrize("changes, said", [
    *(({name: "other"}, f"--{name} {getattr(urpo.Config(), name)} -> other") for name in KEPT),
    ({"program": "rm_gen"}, "--program urpo -> rm_gen"),
    ({"rows": {"preference": 1, "reasoning": 3}}, "(the rows of reasoning)")])
def test_a_resume_refuses_what_moves_the_stream_of_prompts_or_what_the_audit_derives_by(
        process_group, tmp_path, monkeypatch, capsys, changes, said):
    error = resume_with(tmp_path, monkeypatch, capsys, **changes, lr=3e-6)
    assert said in error and "--lr" not in error
    assert "--resume" in error and "--name" in error and error.endswith("step_3/model")


def test_a_resume_mends_what_a_kill_left_between_a_checkpoint_and_its_pointer(tmp_path):
    for steps in (1, 2):
        newest = write_checkpoint(tmp_path, steps)
    pointer = tmp_path / "checkpoints" / "last"
    pointer.unlink()
    shutil.copytree(newest, pointer)  # a copy that followed the link
    (tmp_path / "checkpoints" / "unfinished").mkdir()
    assert runs.last_checkpoint(tmp_path) == (2, newest)
    assert names(tmp_path) == ["last", "step_1", "step_2"] and pointer.is_symlink()


def test_a_run_folder_belongs_to_one_process(tmp_path):
    lock = runs.hold(tmp_path)
    with pytest.raises(InputError, match="another process.*--name"):
        runs.hold(tmp_path)
    lock.close()
    runs.hold(tmp_path).close()


# ---- a disk that is full ----

@pytest.mark.parametrize("limit, part", [(10_000, "trainer"), (900_000, "trainer"), (300_000, "model")])
def test_a_checkpoint_that_does_not_fit_is_one_plain_error_and_the_one_before_it_stays(
        new_trainer, tmp_path, monkeypatch, limit, part):
    """A limit on the size of files stands in for the full disk: the same errors from the same calls."""
    trainer = new_trainer()
    before, after = tmp_path / "checkpoints" / "step_1", tmp_path / "checkpoints" / "step_2"
    save(before, trainer)
    if part != "trainer":  # whose file is the largest
        monkeypatch.setattr(runs.dcp, "save", lambda state, checkpoint_id: checkpoint_id.mkdir(parents=True))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match="step_2 failed: .*; make room .*--resume") as caught:
            save(after, trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    assert "File too large" in str(caught.value) or "a file could not be written whole" in str(caught.value)
    assert runs.last_checkpoint(tmp_path) == (1, before)
    save(after, trainer)
    assert runs.last_checkpoint(tmp_path)[0] == 2 and "unfinished" not in names(tmp_path)


# ---- signals ----

def test_a_signal_ends_the_run_after_its_step_which_is_saved(process_group, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = runs.Log(asdict(urpo.Config(name="mine", save_every=2)), program="urpo", rows={}, may_change=[], about={})
    saved, before = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(runs, "save_checkpoint", lambda folder, *_, settings: saved.append(folder.name))
    try:
        for step in log.steps():
            if step == 4:
                signal.raise_signal(signal.SIGTERM)
            log.save_if_due(step, None, None, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert step == 4 and saved == ["step_2", "step_4", "step_5"]
    out = capsys.readouterr().out
    assert "signal; 5 steps" in out and "--resume" in out
