"""The whole of it on a tiny model: two ranks under torchrun, vLLM, three kinds of prompt, checkpoint, exact resume."""
import json
import shutil
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import readers
import runs
import urpo
from conftest import ROOT
from rewards import group_advantages, preference_reward, self_rewards, verify_answer
from tiny_run import SIX_STEPS, kill_all, lines, run, same_in_every_run, start, wait_for


def test_every_step_is_logged_with_its_seven_parts_and_in_step_with_the_sampler(finished):
    log = lines(finished / "log.jsonl")
    assert [line["step"] for line in log] == list(range(6))
    for line in log:
        assert list(line["seconds"]) == list(urpo.PARTS) and all(seconds >= 0 for seconds in line["seconds"].values())
        assert line["drift_mean"] < 1e-3
        assert line["updates"] + line["skipped_updates"] == 2 and line["peak_memory_gib"] > 0
    assert sum(line["updates"] for line in log) > 0, "nothing was learned, so drift was not put to the test"
    assert json.loads((finished / "config.json").read_text())["config"]["batch"] == 12


def test_warm_up_draws_no_instructions_and_the_mix_holds_after_it(finished):
    drawn = [{kind: line[kind]["prompts"] for kind in data.KINDS if kind in line}
             for line in lines(finished / "log.jsonl")]
    assert drawn == [{"preference": 6, "reasoning": 6}] + 5 * [{"preference": 4, "reasoning": 4, "instruction": 4}]


def test_every_recorded_reward_and_advantage_follows_from_its_text(finished, smol_tokenizer):
    recorded = list(runs.read_groups(finished / "rollouts.jsonl", []))
    assert len(recorded) == 6 * 12 and len({(step, group.index) for step, group in recorded}) == len(recorded)
    signal = set()
    for _, group in recorded:
        assert len(group.answers) == len(group.finished) == 4
        assert group.texts == [smol_tokenizer.decode(answer, skip_special_tokens=True) for answer in group.answers]
        if group.prompt.kind == "preference":
            rewards = [preference_reward(text, group.prompt.truth) for text in group.texts]
        elif group.prompt.kind == "reasoning":
            rewards = [verify_answer(text, group.prompt.answer) for text in group.texts]
        else:
            (judgement,) = group.judgements
            rewards = self_rewards([judgement["text"]], [judgement["order"]])
        assert group.rewards == rewards
        assert group.advantages == ([0.0] * 4 if rewards is None else group_advantages(torch.tensor(rewards)).tolist())
        assert group.entropy > 0
        if group.has_signal:
            signal.add(group.prompt.kind)
    assert {"preference", "instruction"} <= signal, "the taught model should earn rewards that differ"


def test_the_figures_of_the_log_follow_from_the_trajectories(finished):
    log = lines(finished / "log.jsonl")
    recorded = list(runs.read_groups(finished / "rollouts.jsonl", []))
    for line in log:
        groups = [group for step, group in recorded if step == line["step"]]
        assert runs.figures_of_step(groups, 2, "token-mean") == {
            kind: line[kind] for kind in data.KINDS if kind in line}


def test_the_batch_of_a_step_is_the_one_that_draw_states(finished):
    config = urpo.Config(**json.loads((finished / "config.json").read_text())["config"])
    sources = {kind: readers.load_source(kind, getattr(config, data.FLAGS[kind])[0], count=config.toy_rows)
               for kind in data.KINDS}
    for step in range(6):
        batch = data.draw(sources, config.mix, config.batch, config.warmup_steps, config.seed, step,
                          config.both_orders)
        recorded = [group for group in lines(finished / "rollouts.jsonl") if group["step"] == step]
        assert [(group["index"], group["instruction"]) for group in recorded] == [
            (index, prompt.instruction) for index, prompt in enumerate(batch)]


SAMPLE = """
import json, sys
sys.path.insert(0, {root!r})
import machine
import readers
if __name__ == "__main__":
    engine = machine.start_engine({folder!r}, 256)
    answers = machine.generate(engine, {prompts!r}, 1, [16] * 3, [0] * 3, 1.0)
    print("\\nsamples", json.dumps([[samples[0].ids, samples[0].logprobs] for samples in answers]))
"""


def test_the_checkpoint_loads_in_transformers_and_in_vllm_and_they_agree(finished, taught_model, tmp_path):
    folder = str(finished / "checkpoints" / "step_6" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(taught_model, dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))

    prompts = [data.encode_chat(tokenizer, text) for text in ("What is 1 + 1?", "Say hi.", "Tell me about owls.")]
    script = tmp_path / "sample.py"
    script.write_text(SAMPLE.format(root=str(ROOT), folder=folder, prompts=prompts))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    samples = json.loads(done.stdout.rpartition("\nsamples ")[2])
    for prompt, (ids, logprobs) in zip(prompts, samples, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = torch.log_softmax(logits, -1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)


def test_three_steps_kill_9_and_three_more_equal_six_to_every_digit_and_bit(finished, taught_model, tmp_path):
    """The kill falls into step 4 or 5: what was logged of them is cut, and repeated."""
    process, log = start(tmp_path, taught_model, *SIX_STEPS), tmp_path / "runs" / "e2e" / "log.jsonl"
    wait_for(lambda: len(lines(log)) >= 4, process)
    kill_all(process)
    assert [folder.name for folder in (log.parent / "checkpoints").glob("step_*")] == ["step_3"]
    killed = len(lines(log))
    output = run(tmp_path, taught_model, *SIX_STEPS, "--resume")
    assert f"runs/e2e/log.jsonl: cut {killed - 3} lines from step 3 on, which the run repeats" in output
    assert same_in_every_run(lines(log)) == same_in_every_run(lines(finished / "log.jsonl"))
    assert lines(log.parent / "rollouts.jsonl") == lines(finished / "rollouts.jsonl")
    weights = [folder / "checkpoints" / "last" / "model" / "model.safetensors" for folder in (log.parent, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


STALE = """
import sys
sys.path.insert(0, {root!r})
import machine, urpo
if __name__ == "__main__":
    machine.sync = lambda engine, policy: None
    urpo.main()
"""


def test_a_sampler_that_was_not_synced_stops_the_run_with_one_line(finished, taught_model, tmp_path):
    """The sampler starts from the base; the trainer resumes from its sixth step."""
    shutil.copytree(finished, tmp_path / "runs" / "e2e", symlinks=True)
    (tmp_path / "stale.py").write_text(STALE.format(root=str(ROOT)))
    output = run(tmp_path, taught_model, "--steps", "8", "--resume", ranks=1, status=2, program=tmp_path / "stale.py")
    assert output.splitlines()[-1].startswith("error: drift: trainer and sampler differ by ")
    assert "above --max_drift 0.001: the sampler does not hold the trainer's weights" in output
    assert "Traceback" not in output
    assert len(lines(tmp_path / "runs" / "e2e" / "log.jsonl")) == 6
    assert not (tmp_path / "runs" / "e2e" / "checkpoints" / "step_8").exists()
