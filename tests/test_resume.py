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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT  # first: it sets the path

import data
import urpo
from data import InputError
from tiny_run import lines, make_taught_model, run, start, wait_for

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
    data.finish_checkpoint(unfinished, folder, keep)
    return folder


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


# ---- a checkpoint is whole or not there ----

def test_the_newest_checkpoint_counts_by_its_number_and_last_points_to_it(tmp_path):
    for steps in (9, 10):
        newest = write_checkpoint(tmp_path, steps)
    (tmp_path / "checkpoints" / "step_11.copy").mkdir()
    (tmp_path / "checkpoints" / "unfinished").mkdir()
    assert data.last_checkpoint(tmp_path) == (10, newest)
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
    assert data.last_checkpoint(tmp_path) == (6, newest)
    assert write_checkpoint(tmp_path, 9, keep=1) == folder  # now written anew, in place of the damaged one
    assert data.last_checkpoint(tmp_path) == (9, folder) and names(tmp_path) == ["last", "step_9"]


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
                def crash(*arguments, real=getattr(os, name), **options):
                    if next(calls) == moment:
                        raise Crash
                    return real(*arguments, **options)

                patch.setattr(os, name, crash)
            crashed, unfinished = False, folder / "checkpoints" / "unfinished"
            try:
                unfinished.mkdir()
                (unfinished / "state").write_text("new")
                data.finish_checkpoint(unfinished, folder / "checkpoints" / "step_3", keep)
            except Crash:
                crashed = True
        steps, found = data.last_checkpoint(folder)
        assert steps in (2, 3) and (found / "manifest.json").exists()
        pointed = (folder / "checkpoints" / "last").resolve()
        assert pointed.name in ("step_2", "step_3") and pointed.exists()
        assert "damaged" not in capsys.readouterr().out
        write_checkpoint(folder, 4)
        assert data.last_checkpoint(folder)[0] == 4
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
    assert data.last_checkpoint(tmp_path) == (3, older)
    assert capsys.readouterr().out == f"{newer} is damaged ({name}): falling back to {older}\n"


def test_every_single_flipped_bit_of_a_manifest_is_noticed(tmp_path, capsys):
    older, newer = (write_checkpoint(tmp_path, steps) for steps in (3, 6))
    for position in range(len((newer / "manifest.json").read_bytes().rstrip())):
        whole = (newer / "manifest.json").read_bytes()
        for bit in (1, 4, 32):
            (newer / "manifest.json").write_bytes(
                whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            steps, _ = data.last_checkpoint(tmp_path)
            same = steps == 6 and json.loads((newer / "manifest.json").read_text()) == json.loads(whole)
            assert steps == 3 or same, (position, bit)  # a blank turned into another blank harms nothing
        (newer / "manifest.json").write_bytes(whole)


def test_without_any_whole_checkpoint_the_run_stops_rather_than_start_over(tmp_path):
    for steps in (3, 6):
        (write_checkpoint(tmp_path, steps) / "config.json").unlink()
    with pytest.raises(InputError, match=r"step_6 is damaged \(config.json\); .*step_3 is damaged .*bring one back"):
        data.last_checkpoint(tmp_path)


# ---- a disk that is full, a folder that cannot be written ----

@pytest.fixture
def trainer(tiny_model, process_group):
    policy = urpo.load_policy(urpo.Config(precision="float32", recompute=False), tiny_model, 500,
                              torch.distributed.init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(policy.parameters())
    return policy, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)


@pytest.mark.parametrize("limit, part", [(10_000, "trainer"), (500_000, "trainer"), (900_000, "trainer"),
                                         (300_000, "model"), (1_000, "config")])
def test_a_checkpoint_that_does_not_fit_is_one_plain_error_and_the_one_before_it_stays(
        trainer, tmp_path, monkeypatch, limit, part):
    """A limit on the size of files stands in for the full disk: the same errors from the same calls."""
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    before = tmp_path / "checkpoints" / "step_1"
    urpo.save_checkpoint(before, *trainer, tokenizer)
    if part != "trainer":  # whose file is the largest
        monkeypatch.setattr(urpo.dcp, "save", lambda state, checkpoint_id: checkpoint_id.mkdir(parents=True))
    if part == "config":
        monkeypatch.setattr(trainer[0].lm, "save_pretrained", lambda folder, state_dict: folder.mkdir())
        monkeypatch.setattr(urpo, "asdict", lambda config: {"long": "x" * 2000})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError) as caught:
            urpo.save_checkpoint(tmp_path / "checkpoints" / "step_2", *trainer, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith(f"writing {tmp_path / 'checkpoints' / 'step_2'} failed: ") and "\n" not in message
    assert "File too large" in message or "a file could not be written whole" in message
    assert "make room or mend the permissions, then --resume continues" in message
    assert data.last_checkpoint(tmp_path) == (1, before)
    urpo.save_checkpoint(tmp_path / "checkpoints" / "step_2", *trainer, tokenizer)
    assert data.last_checkpoint(tmp_path)[0] == 2 and "unfinished" not in names(tmp_path)


def test_a_run_folder_that_cannot_be_written_is_one_plain_error(process_group, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="writing .*mine failed: .*Not a directory.*; make room or mend the permiss"):
        urpo.on_rank_0(f"writing {tmp_path}/runs/mine",
                       lambda: urpo.Record().open(urpo.Config(), tmp_path / "runs" / "mine", 0, {}))


def test_other_errors_on_rank_0_are_not_called_a_full_disk(process_group):
    with pytest.raises(InputError, match="^--model x: no$"):
        urpo.on_rank_0("reading", lambda: (_ for _ in ()).throw(InputError("--model x: no")))
    with pytest.raises(ZeroDivisionError):
        urpo.on_rank_0("reading", lambda: 1 / 0)
    assert urpo.on_rank_0("reading", lambda: 7) == 7


# ---- the command ----

@pytest.fixture(scope="module")
def taught_model(tmp_path_factory, smol_tokenizer):
    return make_taught_model(tmp_path_factory.mktemp("taught"), smol_tokenizer)


def test_resume_without_a_checkpoint_starts_at_0_and_ctrl_c_saves_the_step_and_exits_0(taught_model, tmp_path):
    process = start(tmp_path, taught_model, "--method", "sft", "--steps", "100000", "--save_every", "0", "--resume",
                    ranks=1)
    log = tmp_path / "runs" / "e2e" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2, process)
    process.send_signal(signal.SIGINT)
    output = tmp_path / "output"
    assert process.wait(timeout=120) == 0, output.read_text()[-4000:]
    steps = len(lines(log))
    assert "runs/e2e: no checkpoint to resume from, starting at step 0\n" in output.read_text()
    assert f"stopped by a signal; {steps} steps are saved and --resume continues" in output.read_text()
    assert data.last_checkpoint(tmp_path / "runs" / "e2e")[0] == steps


def test_a_run_whose_updates_are_not_finite_skips_them_names_the_prompts_and_stops(taught_model, tmp_path):
    """The first update, at this learning rate, is the last finite one."""
    output = run(tmp_path, taught_model, "--method", "sft", "--steps", "100", "--lr", "1e30", "--max_skipped", "2",
                 "--rollouts_every", "100", ranks=1, status=2)
    assert output.splitlines()[-1] == (
        f"error: step 2: no finite update for 2 steps, the last by prompts {list(range(12))} of rollouts.jsonl: "
        "look at them, or lower --lr")
    log = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
           for line in (tmp_path / "runs" / "e2e" / "log.jsonl").read_text().splitlines()]
    assert [(line["updates"], line["nonfinite_updates"]) for line in log] == [(1, 0), (0, 1), (0, 1)]
    recorded = [(line["step"], line["index"]) for line in lines(tmp_path / "runs" / "e2e" / "rollouts.jsonl")]
    assert recorded == [(step, index) for step in range(3) for index in range(12)]


def test_faults_on_two_ranks_lose_nothing_that_was_saved(taught_model, tmp_path):
    """The short form of bench/faults.py. `checkpoint bit flipped` stops the run by SIGTERM to torchrun."""
    table, good = faults.campaign(tmp_path / "campaign", taught_model, ["kill -9 one rank", "checkpoint bit flipped"],
                                  method="sft", seed=0)
    print(table)
    assert good, table


LATE = """
import sys
sys.path.insert(0, {root!r})
import data, urpo

def load_sources(config, tokenizer):
    if urpo.dist.get_rank() in {ranks}:
        raise data.InputError("only here")

if __name__ == "__main__":
    data.load_sources = load_sources
    urpo.main()
"""


@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["of rank 1", "of both ranks"])
def test_a_mistake_is_printed_once_whichever_rank_finds_it(taught_model, tmp_path, ranks):
    (tmp_path / "late.py").write_text(LATE.format(root=str(ROOT), ranks=ranks))
    output = run(tmp_path, taught_model, "--method", "sft", status=2, program=tmp_path / "late.py")
    assert output.count("error: only here") == 1
