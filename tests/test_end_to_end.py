"""The whole of it on a tiny model: two ranks under torchrun, vLLM, three kinds of prompt, audit, checkpoint, resume."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import urpo
from conftest import free_port
from infra import chat
from lab import audit
from tiny_run import (
    SIX_STEPS,
    kill_all,
    lines,
    own_environment,
    run,
    run_program,
    same_in_every_run,
    start,
    urpo_with,
    wait_for,
)


def test_every_step_is_logged_in_step_with_the_sampler_and_at_the_mix(finished):
    log = lines(finished / "log.jsonl")
    assert [line["step"] for line in log] == list(range(6))
    for line in log:
        parts = re.findall(r"^    \d\. (\w+)  ", urpo.__doc__, re.M)
        assert list(line["seconds"]) == parts and min(line["seconds"].values()) >= 0
        assert line["drift_mean"] < 1e-4 and line["sync_difference"] < 4e-6
        assert line["updates"] + line["skipped_updates"] == 2 and line["peak_memory_gib"] > 0
        drawn = {kind: line[kind]["prompts"] for kind in data.KINDS if kind in line}
        warm_up = line["step"] == 0
        assert drawn == ({"preference": 6, "reasoning": 6} if warm_up else dict.fromkeys(data.KINDS, 4))
    assert sum(line["updates"] for line in log) > 6, "too little was learned to put drift to the test"


def test_the_audit_derives_every_number_of_the_run_again(finished, capsys):
    recorded = list(data.read_groups(finished / "rollouts.jsonl", []))
    assert len(recorded) == 6 * 12 and all(group.entropy > 0 for _, group in recorded)
    signal = {group.prompt.kind for _, group in recorded if group.has_signal}
    assert {"preference", "instruction"} <= signal, "the taught model should earn rewards that differ"
    audit.main([str(finished)])
    out, err = capsys.readouterr()
    assert "288 rewards and advantages" in out and "not compared" not in out and not err


def test_three_steps_kill_9_and_three_more_equal_six_to_every_digit_and_bit(finished, taught_model, tmp_path):
    """The kill falls into step 4 or 5: what was logged of them is cut, and repeated."""
    process, log = start(tmp_path, taught_model, *SIX_STEPS), tmp_path / "runs" / "e2e" / "log.jsonl"
    wait_for(lambda: len(lines(log)) >= 4, process)
    kill_all(process)
    assert [folder.name for folder in (log.parent / "checkpoints").glob("step_*")] == ["step_3"]
    killed = len(lines(log))
    output = run(tmp_path, taught_model, *SIX_STEPS, "--resume")
    assert f"log.jsonl: cut {killed - 3} lines from step 3 on" in output
    assert same_in_every_run(lines(log)) == same_in_every_run(lines(finished / "log.jsonl"))
    assert lines(log.parent / "rollouts.jsonl") == lines(finished / "rollouts.jsonl")
    weights = [folder / "checkpoints" / "last" / "model" / "model.safetensors" for folder in (log.parent, finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


SAMPLE = """
import json
from infra import sampler
if __name__ == "__main__":
    folder, prompts = {folder!r}, {prompts!r}
    llm = sampler.start_sampler(folder, max_tokens=256, chat_template={template!r})
    answers = sampler.generate(llm, prompts, n=1, max_tokens=[16] * 3, seeds=[0] * 3, temperature=1.0)
    print("\\nsamples", json.dumps([[samples[0].ids, samples[0].logprobs] for samples in answers]))
"""


@pytest.mark.slow
def test_the_checkpoint_loads_in_transformers_and_in_vllm_and_they_agree(finished, tmp_path):
    folder = str(finished / "checkpoints" / "step_6" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [chat.encode_chat(tokenizer, text) for text in ("What is 1 + 1?", "Say hi.", "Tell me about owls.")]
    program = SAMPLE.format(folder=folder, prompts=prompts, template=tokenizer.chat_template)
    samples = json.loads(run_program(tmp_path, program).rpartition("\nsamples ")[2].splitlines()[0])
    for prompt, (ids, logprobs) in zip(prompts, samples, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = torch.log_softmax(logits, -1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_four_ranks_with_two_samplers_draw_and_answer_as_two_and_two_ranks_go_on(finished, taught_model, tmp_path):
    """In one minibatch, since --batch 12 in two does not split over four ranks. Two share a sampler, and then none."""
    flags = ("--minibatches", "1", "--save_every", "2", "--offload")
    run(tmp_path, taught_model, *flags, "--steps", "2", "--tensor_parallel", "2", ranks=4)
    assert not [name for name in os.listdir("/dev/shm") if "[2-3]-cpushm" in name]  # else the next one would stop there
    run(tmp_path, taught_model, *flags, "--steps", "3", "--resume", ranks=2)
    four = tmp_path / "runs" / "e2e"
    drawn = [list(data.read_groups(path / "rollouts.jsonl", [])) for path in (four, finished)]
    assert len(drawn[0]) == 36
    for (step, own), (_, other) in zip(*drawn):
        assert own.prompt == other.prompt and (step > 0 or own.texts == other.texts)
    log = lines(four / "log.jsonl")
    assert max(line["drift_mean"] for line in log) < 1e-4 and max(line["sync_difference"] for line in log) < 4e-6
    assert audit.audit(four)


# ---- two nodes, played by two agents of torchrun on loopback: they meet over TCP alone, and share a folder ----

def start_agent(folder, model, node: int, port: str, *arguments) -> subprocess.Popen:
    """One node's torchrun with one rank, on a core of its own, as one of two ranks of one agent has one."""
    cores = sorted(os.sched_getaffinity(0))
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two", "--local_addr=127.0.0.1",
                f"--rdzv_conf=is_host={node == 0}"]  # both are at the endpoint: the first to come would hold the notes
    command = [sys.executable, *launcher, *urpo_with(model), "--steps", "5", "--save_every", "2", *arguments]
    with open(folder / f"output-{node}", "w") as output:
        return subprocess.Popen(command, cwd=folder, env=own_environment(), stdout=output, stderr=output,
                                preexec_fn=lambda: os.sched_setaffinity(0, {cores[node % len(cores)]}))


def outputs(folder) -> str:
    return "\n".join((folder / f"output-{node}").read_text()[-3000:] for node in (0, 1))


@pytest.mark.slow
def test_two_agents_train_as_one_agent_with_two_ranks_to_every_digit_and_resume_after_one_was_killed(
        finished, taught_model, tmp_path):
    one_agent = lines(finished / "log.jsonl")[:5]
    log, port = tmp_path / "runs" / "e2e" / "log.jsonl", free_port()
    agents = [start_agent(tmp_path, taught_model, node, port) for node in (0, 1)]
    wait_for(lambda: len(lines(log)) >= 3, agents[0], seconds=600)
    kill_all(agents[1])
    assert agents[0].wait(timeout=300) != 0, "the agent that was left ended as if all were well"
    assert "another rank died, or stalled" in outputs(tmp_path)
    done = len(lines(log))
    assert done < 5 and same_in_every_run(lines(log)) == same_in_every_run(one_agent)[:done]

    port = free_port()
    agents = [start_agent(tmp_path, taught_model, node, port, "--resume") for node in (0, 1)]
    assert [agent.wait(timeout=900) for agent in agents] == [0, 0], outputs(tmp_path)
    assert same_in_every_run(lines(log)) == same_in_every_run(one_agent)
