"""What if? Lines of urpo.py altered one by one, each of which fails a check."""
import importlib.util
import inspect
import sys

import pytest

import test_urpo
from conftest import ROOT
from lab import audit
from tiny_run import run


def altered(tmp_path, *changes: tuple[str, str]):
    """The path of a urpo.py in which some lines are others."""
    code = (ROOT / "urpo.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tmp_path / "urpo.py").write_text(code, encoding="utf-8")
    return tmp_path / "urpo.py"


# ---- the lines of the seven parts: the check is a test of test_urpo.py ----

UPDATE = ("test_an_update_equals_its_rebuild_in_float64",
          {"changes": {"minibatches": 2, "importance_cap": 1.1}, "clip": 1e9})
STALE = ("test_a_sampler_with_other_weights_stops_the_run_before_any_weight_moves",
         {"minibatches": 2, "sampler": "stale"})
BROKEN = ("test_an_update_that_is_not_finite_is_skipped_and_counted_and_the_next_is_made", {"broken": "weights"})
RATE = ("test_the_rate_follows_the_number_of_updates_that_were_made", {})
JUDGED = ("test_self_scores_follow_their_answers_through_the_shuffle_and_the_readable_ones_count",
          {"told": [(9, 1), (7, 3), ()], "changes": {"judgements": 2, "judge_list": 2}})
REWARDS = ("test_rewards_of_all_kinds_and_that_their_advantages_have_one_scale", {})
ROLLOUT = ("test_rollout_keeps_ids_texts_and_logprobs_of_every_sample", {})
LINES = [  # (old, new, check)
    ("        for sample in samples:", "        for sample in samples[:2]:", ROLLOUT),
    ('index, "answer")', '0, "answer")', ROLLOUT),
    ("temperature=config.temperature)\n    for group, samples", "temperature=1.0)\n    for group, samples", ROLLOUT),
    ("shown = [group.texts[i] for i in order]", "shown = group.texts", JUDGED),
    ("group_advantages(torch.tensor(", "group_advantages(-torch.tensor(", REWARDS),
    ("tokens += sum(map(len, group.answers))", "tokens += sum(map(len, group.answers * group.has_signal))", UPDATE),
    ("for rows in minibatches[1:]:", "for rows in minibatches[2:]:", UPDATE),
    ("row.keep_old(logprob_N.detach(), config.importance_cap)", "row.keep_old(logprob_N.detach())", UPDATE),
    ("(logprob_N - row.old_N).exp()", "(logprob_N - logprob_N.detach()).exp()", UPDATE),
    ("config.clip_low, config.clip_high)\n            loss", "0.0, config.clip_high)\n            loss", UPDATE),
    ("loss = -(row.weight_N", "loss = (row.weight_N", UPDATE),
    ("    optimizer.zero_grad()\n", "", UPDATE),
    ("        if m == 0:\n", "        if m == 1:\n", STALE),
    ("    if math.isfinite(norm):\n", "    if True:\n", BROKEN),
    ("learning_rate(config, updates_done(optimizer))\n        optimizer", "config.lr\n        optimizer", RATE)]


@pytest.mark.parametrize("old, new, check", LINES, ids=[new.strip() or "no zero_grad" for _, new, _ in LINES])
def test_an_altered_line_of_a_part_fails_its_test(request, process_group, tmp_path, monkeypatch, old, new, check):
    spec = importlib.util.spec_from_file_location("altered_urpo", altered(tmp_path, (old, new)))
    monkeypatch.setitem(sys.modules, "altered_urpo", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["altered_urpo"])
    monkeypatch.setattr(test_urpo, "urpo", sys.modules["altered_urpo"])
    test, given = getattr(test_urpo, check[0]), check[1]
    values = {name: given[name] if name in given else request.getfixturevalue(name)
              for name in inspect.signature(test).parameters}
    with pytest.raises((AssertionError, TypeError, FloatingPointError, pytest.fail.Exception)):
        test(**values)


# ---- the lines of the loop: the check is the run itself, or the audit of its record ----

AUDITED = [  # one a step, of three
    ("data.draw(config, sources, step)", "data.draw(config, sources, step + (step == 0))"),  # another step's batch
    ("data.shard(prompts, ", "data.shard(prompts[::-1] if step == 1 else prompts, "),
    ("        score(config, sampler,", "        step == 2 or score(config, sampler,")]  # nobody judges


@pytest.mark.slow
def test_a_loop_without_sync_stops_at_the_drift(taught_model, tmp_path):
    loop = altered(tmp_path, ("= sync(sampler, policy)\n        clock", "= 0.0\n        clock"))
    output = run(tmp_path, taught_model, "--steps", "3", ranks=1, program=loop, status=2)
    assert "error: drift: " in output.splitlines()[-1] and "Traceback" not in output
    assert not (tmp_path / "runs" / "e2e" / "checkpoints").exists()


@pytest.mark.slow
def test_the_audit_finds_each_altered_line_of_the_loop(taught_model, tmp_path, capsys):
    run(tmp_path, taught_model, "--steps", "3", ranks=1, program=altered(tmp_path, *AUDITED))
    assert not audit.audit(tmp_path / "runs" / "e2e")
    said = capsys.readouterr().err
    assert all(f"step {step}" in said for step in range(3)), said
