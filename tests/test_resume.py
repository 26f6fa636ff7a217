"""Nothing lost: checkpoints that are whole or not there, damage that is noticed, signals, and errors of any rank.

That a resumed run repeats every digit is in test_end_to_end.py, with vLLM; the long fault campaign is bench/faults.py.
"""
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import machine
import runs
import urpo
from conftest import ROOT, random_groups
from data import InputError
from tiny_run import lines, run, start, wait_for

sys.path.append(str(ROOT / "tests" / "bench"))
import faults  # noqa: E402


def write_checkpoint(run_folder: Path, steps: int, keep: int = 0) -> Path:
    """A checkpoint of small files, finished as `save_checkpoint` finishes one."""
    folder = run_folder / "checkpoints" / f"step_{steps}"
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "trainer").mkdir(parents=True)
    (unfinished / "trainer" / "state").write_bytes(os.urandom(1000))
    (unfinished / "config.json").write_text('{"seed": 0}')
    runs.finish_checkpoint(unfinished, folder, keep, runs.file_list(unfinished))
    return folder


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_checksums_of_a_checkpoint_are_shared_out_over_the_ranks_and_none_is_missing(tmp_path, parts):
    for number in range(5):
        (tmp_path / f"part_{number}").mkdir()
        (tmp_path / f"part_{number}" / "state").write_bytes(os.urandom(100 + number))
    (tmp_path / "manifest.json").write_text("{}")
    found, shares = {}, []
    for part in range(parts):
        own = runs.file_list(tmp_path, part, parts)
        assert not found.keys() & own.keys()
        found |= own
        shares.append(len(own))
    assert found == runs.file_list(tmp_path) and len(found) == 5 and max(shares) - min(shares) <= 1


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


# ---- a checkpoint is whole or not there ----

def test_the_newest_checkpoint_counts_by_its_number_and_last_points_to_it(tmp_path):
    for steps in (9, 10):
        newest = write_checkpoint(tmp_path, steps)
    (tmp_path / "checkpoints" / "step_11.copy").mkdir()
    (tmp_path / "checkpoints" / "unfinished").mkdir()
    assert runs.last_checkpoint(tmp_path) == (10, newest)
    assert (tmp_path / "checkpoints" / "last").resolve() == newest.resolve()


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_keep_leaves_the_newest_and_0_leaves_all(tmp_path, keep, left):
    for steps in (1, 2, 3, 4):
        write_checkpoint(tmp_path, steps, keep)
    assert names(tmp_path) == ["last", *(f"step_{steps}" for steps in left)]


def test_a_damaged_checkpoint_of_later_steps_never_displaces_a_whole_one(tmp_path):
    for steps in (2, 4, 9):
        folder = write_checkpoint(tmp_path, steps)
    (folder / "config.json").unlink()
    newest = write_checkpoint(tmp_path, 6, keep=1)
    assert runs.last_checkpoint(tmp_path) == (6, newest)
    assert write_checkpoint(tmp_path, 9, keep=1) == folder  # now written anew, in place of the damaged one
    assert runs.last_checkpoint(tmp_path) == (9, folder) and names(tmp_path) == ["last", "step_9"]


class Crash(BaseException):
    pass


@pytest.mark.parametrize("keep", [0, 1])
def test_a_crash_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_whole(tmp_path, monkeypatch, capsys, keep):
    for moment in itertools.count():
        folder = tmp_path / str(moment)
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
            crashed, unfinished = False, folder / "checkpoints" / "unfinished"
            try:
                unfinished.mkdir()
                (unfinished / "state").write_text("new")
                runs.finish_checkpoint(unfinished, folder / "checkpoints" / "step_3", keep, runs.file_list(unfinished))
            except Crash:
                crashed = True
        steps, found = runs.last_checkpoint(folder)
        assert steps in (2, 3) and (found / "manifest.json").exists()
        pointed = (folder / "checkpoints" / "last").resolve()
        assert pointed.name in ("step_2", "step_3") and pointed.exists()
        assert "damaged" not in capsys.readouterr().out
        write_checkpoint(folder, 4)
        assert runs.last_checkpoint(folder)[0] == 4
        if not crashed:
            break
    assert moment > 5 and steps == 3


# ---- damage is noticed ----

def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name, harm", [
    ("trainer/state", Path.unlink), ("trainer/state", lambda path: os.truncate(path, 999)),
    ("trainer/state", lambda path: flip(path, 500)), ("config.json", lambda path: flip(path, 3)),
    ("manifest.json", Path.unlink), ("manifest.json", lambda path: os.truncate(path, 30)),
    ("manifest.json", lambda path: path.write_bytes(b"\xff")),
], ids=["missing", "cut off", "bit flipped", "config flipped", "no manifest", "manifest cut off", "manifest no text"])
def test_a_damaged_checkpoint_is_named_and_the_next_older_one_is_taken(tmp_path, capsys, name, harm):
    older, newer = (write_checkpoint(tmp_path, steps) for steps in (3, 6))
    harm(newer / name)
    assert runs.last_checkpoint(tmp_path) == (3, older)
    assert capsys.readouterr().out == f"{newer} is damaged ({name}): falling back to {older}\n"


def test_every_single_flipped_bit_of_a_manifest_is_noticed(tmp_path, capsys):
    older, newer = (write_checkpoint(tmp_path, steps) for steps in (3, 6))
    for position in range(len((newer / "manifest.json").read_bytes().rstrip())):
        whole = (newer / "manifest.json").read_bytes()
        for bit in (1, 4, 32):
            (newer / "manifest.json").write_bytes(
                whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            steps, _ = runs.last_checkpoint(tmp_path)
            same = steps == 6 and json.loads((newer / "manifest.json").read_text()) == json.loads(whole)
            assert steps == 3 or same, (position, bit)  # a blank turned into another blank harms nothing
        (newer / "manifest.json").write_bytes(whole)


def test_without_any_whole_checkpoint_the_run_stops_rather_than_start_over(tmp_path):
    for steps in (3, 6):
        (write_checkpoint(tmp_path, steps) / "config.json").unlink()
    with pytest.raises(InputError, match=r"step_6 is damaged \(config.json\); .*step_3 is damaged .*bring one back"):
        runs.last_checkpoint(tmp_path)


# ---- what a checkpoint brings back ----

TOKENIZER = SimpleNamespace(save_pretrained=lambda folder: None)


@pytest.fixture
def new_trainer(make_policy):
    def new(lr=1e-3, weight_decay=0.01):
        policy = make_policy()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=weight_decay)
        return policy, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))

    return new


def advance(policy, optimizer, schedule):
    """One update of any kind."""
    policy(machine.build_row(random_groups(1))).sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def test_a_checkpoint_restores_weights_optimizer_and_schedule(new_trainer, tmp_path):
    first, second = new_trainer(), new_trainer()
    advance(*first)
    folder = tmp_path / "checkpoints" / "step_1"
    runs.save_checkpoint(folder, *first, TOKENIZER, settings={"seed": 7}, keep=0)
    assert runs.last_checkpoint(tmp_path) == (1, folder)
    assert json.loads((folder / "config.json").read_text()) == {"seed": 7}
    runs.load_checkpoint(folder, *second)
    advance(*first)
    advance(*second)
    for (name, a), (_, b) in zip(machine.full_weights(first[0]), machine.full_weights(second[0]), strict=True):
        assert torch.equal(a, b), name
    assert first[2].get_last_lr() == second[2].get_last_lr()


def test_the_rate_and_the_weight_decay_of_the_resumed_run_are_its_own(new_trainer, tmp_path):
    first, second = new_trainer(lr=1e-3, weight_decay=0.01), new_trainer(lr=5e-4, weight_decay=0.5)
    advance(*first)
    runs.save_checkpoint(tmp_path / "step_1", *first, TOKENIZER, settings={}, keep=0)
    runs.load_checkpoint(tmp_path / "step_1", *second)
    for done in (1, 2):  # the schedule goes on from the saved step: 1 / 2, then 1 / 3 of the rate
        (group,) = second[1].param_groups
        assert group["lr"] == pytest.approx(5e-4 / (done + 1)) and group["weight_decay"] == 0.5
        advance(*second)


def test_the_first_step_after_a_resume_logs_the_rate_that_it_uses(new_trainer, tmp_path):
    first, second = new_trainer(lr=1e-3), new_trainer(lr=5e-4)
    advance(*first)
    runs.save_checkpoint(tmp_path / "step_1", *first, TOKENIZER, settings={}, keep=0)
    runs.load_checkpoint(tmp_path / "step_1", *second)
    used, step = [], second[1].step
    second[1].step = lambda: (used.append(second[1].param_groups[0]["lr"]), step())
    groups = random_groups(2)
    for group in groups:
        group.advantages, group.sampler_logprobs = [1.0, 0.0, -1.0], [[-6.0] * len(ids) for ids in group.answers]
    config = urpo.Config(minibatches=1, max_drift=1e9, row_tokens=4096)
    figures = urpo.update(config, *second, groups)
    assert used == [pytest.approx(5e-4 / 2)] and figures["lr"] == used[0]


def test_a_checkpoint_before_the_first_update_changes_nothing(new_trainer, tmp_path):
    """Torch fills an empty optimiser state by a step of its own, which Adam's bias correction would count."""
    undisturbed, saved, resumed = new_trainer(), new_trainer(), new_trainer()
    runs.save_checkpoint(tmp_path / "step_0", *saved, TOKENIZER, settings={}, keep=0)
    runs.load_checkpoint(tmp_path / "step_0", *resumed)
    for trainer in (undisturbed, saved, resumed):
        advance(*trainer)
        advance(*trainer)
    for other in (saved, resumed):
        for (name, a), (_, b) in zip(machine.full_weights(undisturbed[0]), machine.full_weights(other[0]), strict=True):
            assert torch.equal(a, b), name
        assert {state["step"].item() for state in other[1].state.values()} == {2}


def resume_with(tmp_path, capsys, **changes):
    """What a resume says whose settings differ from the checkpoint's, before anything is written."""
    folder = write_checkpoint(tmp_path, 3)
    settings = asdict(urpo.Config(name="mine"))
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "manifest.json").write_text(json.dumps(runs.file_list(folder)))
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    log = runs.Log(tmp_path, settings | {"resume": True} | changes)
    try:
        assert log.open({}) == (3, folder)
    except InputError as error:
        assert not (tmp_path / "config.json").exists()
        return str(error)
    return capsys.readouterr().out


def test_a_resume_names_every_setting_that_differs(process_group, tmp_path, capsys):
    out = resume_with(tmp_path, capsys, lr=3e-6, steps=2000, keep=2)
    for change in ("--steps 1000 -> 2000", "--lr 1e-06 -> 3e-06", "--keep 0 -> 2"):
        assert f"step_3: resumed with another setting: {change}\n" in out
    assert out.count("->") == 3 and "->" not in resume_with(tmp_path, capsys)


@pytest.mark.parametrize("name, value", [
    ("seed", 1), ("mix", "2:1:1"), ("batch", 96), ("warmup_steps", 0), ("both_orders", True), ("toy_rows", 8),
    ("preferences", "other.jsonl"), ("max_prompt_tokens", 100), ("tau", "strict"), ("advantage", "center"),
    ("loss", "sequence-mean"), ("minibatches", 1), ("group", 4), ("judgements", 2), ("rollouts_every", 2)])
def test_a_resume_refuses_what_moves_the_stream_of_prompts_or_what_explain_derives_by(tmp_path, capsys, name, value):
    error = resume_with(tmp_path, capsys, **{name: value, "lr": 3e-6})
    assert f"({'--' + name} {getattr(urpo.Config(), name)} -> {value}): give the old ones, or start a new run" in error
    assert error.endswith("step_3/model") and "--lr" not in error


def test_every_setting_that_may_change_exists():
    assert set(runs.MAY_CHANGE) <= {field.name for field in fields(urpo.Config)}


# ---- a disk that is full ----

@pytest.mark.parametrize("limit, part", [(10_000, "trainer"), (500_000, "trainer"), (900_000, "trainer"),
                                         (300_000, "model"), (1_000, "config")])
def test_a_checkpoint_that_does_not_fit_is_one_plain_error_and_the_one_before_it_stays(
        new_trainer, tmp_path, monkeypatch, limit, part):
    """A limit on the size of files stands in for the full disk: the same errors from the same calls."""
    trainer, settings = new_trainer(), {}
    before, after = tmp_path / "checkpoints" / "step_1", tmp_path / "checkpoints" / "step_2"
    runs.save_checkpoint(before, *trainer, TOKENIZER, settings, keep=0)
    if part != "trainer":  # whose file is the largest
        monkeypatch.setattr(runs.dcp, "save", lambda state, checkpoint_id: checkpoint_id.mkdir(parents=True))
    if part == "config":
        monkeypatch.setattr(trainer[0].lm, "save_pretrained", lambda folder, state_dict: folder.mkdir())
        settings = {"long": "x" * 2000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError) as caught:
            runs.save_checkpoint(after, *trainer, TOKENIZER, settings, keep=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith(f"writing {after} failed: ") and "\n" not in message
    assert "File too large" in message or "a file could not be written whole" in message
    assert "make room or mend the permissions, then --resume continues" in message
    assert runs.last_checkpoint(tmp_path) == (1, before)
    runs.save_checkpoint(after, *trainer, TOKENIZER, {}, keep=0)
    assert runs.last_checkpoint(tmp_path)[0] == 2 and "unfinished" not in names(tmp_path)


def test_a_run_folder_that_cannot_be_written_is_one_plain_error(process_group, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    log = runs.Log(tmp_path / "runs" / "mine", {"resume": False})
    with pytest.raises(InputError, match="writing .*mine failed: .*Not a directory.*; make room or mend the permiss"):
        machine.on_rank_0(f"writing {log.run}", lambda: log.open({}))


# ---- the command ----

def test_resume_without_a_checkpoint_starts_at_0_and_ctrl_c_saves_the_step_and_exits_0(taught_model, tmp_path):
    process = start(tmp_path, taught_model, "--steps", "100000", "--save_every", "0", "--resume", ranks=1)
    log = tmp_path / "runs" / "e2e" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2, process)
    process.send_signal(signal.SIGINT)
    output = tmp_path / "output"
    assert process.wait(timeout=120) == 0, output.read_text()[-4000:]
    steps = len(lines(log))
    assert "runs/e2e: no checkpoint to resume from, starting at step 0\n" in output.read_text()
    assert f"stopped by a signal; {steps} steps are saved and --resume continues" in output.read_text()
    assert runs.last_checkpoint(tmp_path / "runs" / "e2e")[0] == steps


BROKEN = """
import math, sys
sys.path.insert(0, {root!r})
import machine, urpo

clip, calls = machine.clip_gradient, []

def broken_after_two(policy, largest):
    calls.append(clip(policy, largest))
    return calls[-1] if len(calls) <= 2 else math.nan

if __name__ == "__main__":
    machine.clip_gradient = broken_after_two
    urpo.main()
"""


def test_a_run_whose_updates_are_not_finite_skips_them_and_stops(taught_model, tmp_path):
    """The gradient of every update after the first two is broken. The weights must stay as they were."""
    (tmp_path / "broken.py").write_text(BROKEN.format(root=str(ROOT)))
    output = run(tmp_path, taught_model, "--steps", "100", ranks=1, status=2, program=tmp_path / "broken.py")
    assert output.splitlines()[-1] == ("error: step 3: no finite update for 3 steps: lower --lr, or look at the last "
                                       "prompts in rollouts.jsonl")
    log = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
           for line in (tmp_path / "runs" / "e2e" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    assert [line["updates"] for line in log] == [2, 0, 0, 0]
    assert all(line["nonfinite_updates"] > 0 and line["drift_mean"] < 1e-3 for line in log[1:])
    assert not (tmp_path / "runs" / "e2e" / "checkpoints").exists()


def test_faults_on_two_ranks_lose_nothing_that_was_saved(taught_model, tmp_path):
    """The short form of bench/faults.py. `checkpoint bit flipped` stops the run by SIGTERM to torchrun."""
    plan = ["kill -9 one rank", "checkpoint bit flipped"]
    table, good = faults.campaign(tmp_path / "campaign", taught_model, plan, seed=0)
    print(table)
    assert good, table


LATE = """
import sys
sys.path.insert(0, {root!r})
import data, readers, urpo

def load_sources(*arguments):
    if urpo.dist.get_rank() == 1:
        raise data.InputError("only here")

if __name__ == "__main__":
    readers.load_sources = load_sources
    urpo.main()
"""


def test_a_mistake_that_another_rank_than_0_finds_is_printed_too(taught_model, tmp_path):
    (tmp_path / "late.py").write_text(LATE.format(root=str(ROOT)))
    output = run(tmp_path, taught_model, status=2, program=tmp_path / "late.py")
    assert output.count("error: only here") == 1
