"""Two nodes, played by two agents of torchrun on loopback: they meet over TCP alone, and share a folder."""
import os
import subprocess
import sys

import pytest

from conftest import free_port
from tiny_run import kill_all, lines, own_environment, same_in_every_run, urpo_with, wait_for


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
