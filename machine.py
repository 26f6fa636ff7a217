"""The machine under the algorithm: packed rows, FSDP2, vLLM, ranks. A reader of the paper need not enter this room,
but for the first section, the packed row.

EVERY line that differs between CPU and GPU stands in this file, behind `if GPU`, and so does all of vLLM. Functions
take values, not the settings object. What runs on a CPU is tested; what runs on a GPU alone has not been run yet.

From top to bottom: the packed row and its attention; the policy, sharded; the sampler; ranks.

Tensor names carry their shape: T tokens of a row, N answer tokens, V vocabulary, H hidden size, K attention heads.
"""

from __future__ import annotations

import datetime
import inspect
import logging
import math
import os
import re
import resource
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fingerprint
from data import Group, InputError, answer_text, checksum, share_evenly, stop_ids

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PRESET = "paper" if GPU else "smol"  # what --preset auto means here
SMOL_PRECISION = "bfloat16" if GPU else "float32"  # a CPU computes in fp32, with its sampler 1e-5 nats away
SMOL_DRIFT = 0.1 if GPU else 1e-3
OLDEST_DRIVER = {"12": "525", "13": "580"}  # that runs a CUDA of this major version, on Linux
ROW_BLOCK = 128 if GPU else 1  # rows of such a multiple, and of such a length at least, suit FlexAttention
SHORTEST_ROW = 256 if GPU else 1
# Large pages for large tensors: a CPU's update takes 1/8 less time. Torch reads this at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ------------------------------------------------------------------------------- the packed row


@dataclass
class Row:
    """Several groups in one row of tokens, each [prompt, answer 1, ..., answer G], the prompt stored once.

    Positions restart after the prompt for each answer, and an answer sees its prompt and itself alone. So G answers
    cost one prompt, while log-probs and gradients equal those of G separate sequences (tests/test_machine.py).
    """

    groups: list[Group]
    ids_T: Tensor
    position_T: Tensor
    group_T: Tensor  # which group a token belongs to
    answer_T: Tensor  # 0 in a prompt, 1 ... G in an answer
    source_N: Tensor  # where in the row stands the token that predicts answer token n
    target_N: Tensor  # answer token n
    lengths: list[list[int]]  # tokens of [prompt, answer 1, ..., answer G], for each group; last those of the padding
    # For the loss, a value for each answer token:
    advantage_N: Tensor = field(default_factory=lambda: torch.empty(0))
    weight_N: Tensor = field(default_factory=lambda: torch.empty(0))
    sampler_N: Tensor = field(default_factory=lambda: torch.empty(0))  # log-prob by the sampler, nats
    old_N: Tensor | None = None  # log-prob by the trainer at rollout weights, nats; None: not computed yet

    def keep_old(self, old_N: Tensor) -> None:
        """The trainer's log-probs at rollout weights, kept here and in the groups."""
        self.old_N = old_N
        sizes = [group.answer_tokens for group in self.groups]
        for group, part_N in zip(self.groups, old_N.split(sizes)):
            group.old_N = part_N


def build_row(groups: list[Group]) -> Row:
    """Groups as one row of tensors.

    >>> row = build_row([Group(0, None, prompt_ids=[5, 6], answers=[[7, 8], [9]])])
    >>> row.ids_T.tolist(), row.position_T.tolist(), row.answer_T.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2], [0, 0, 1, 1, 2])
    >>> row.source_N.tolist(), row.target_N.tolist()
    ([1, 2, 1], [7, 8, 9])
    >>> row.lengths
    [[2, 2, 1]]
    """
    ids, position, group_of, answer_of, source, target, lengths = [], [], [], [], [], [], []
    for g, group in enumerate(groups):
        prompt_length = len(group.prompt_ids)
        prompt_end = len(ids) + prompt_length - 1
        lengths.append([])
        for a, part in enumerate([group.prompt_ids, *group.answers]):
            if a > 0:  # the last token of the prompt predicts the first token of every answer
                source.append(prompt_end)
                source.extend(range(len(ids), len(ids) + len(part) - 1))
                target.extend(part)
            first = prompt_length if a > 0 else 0
            ids.extend(part)
            position.extend(range(first, first + len(part)))
            group_of.extend([g] * len(part))
            answer_of.extend([a] * len(part))
            lengths[g].append(len(part))
    blocks = -(-len(ids) // ROW_BLOCK)
    padding = max(SHORTEST_ROW, blocks * ROW_BLOCK) - len(ids)
    if padding > 0:  # on a GPU: a group of its own, which no other token sees
        ids.extend([0] * padding)
        position.extend(range(padding))
        group_of.extend([len(groups)] * padding)
        answer_of.extend([0] * padding)
        lengths.append([padding])
    tensors = [torch.tensor(values, device=DEVICE) for values in (ids, position, group_of, answer_of, source, target)]
    row = Row(groups, *tensors, lengths)
    add_loss_values(row)
    return row


def add_loss_values(row: Row) -> None:
    """Advantage, weight, sampler's and trainer's log-prob of each answer token, as far as the groups have them."""
    advantages, weights, sampler = [], [], []
    for group in row.groups:
        for advantage, answer in zip(group.advantages, group.answers):
            advantages.extend([advantage] * len(answer))
        for logprobs in group.sampler_logprobs:
            sampler.extend(logprobs)
        weights.extend(group.weights)
    row.advantage_N = torch.tensor(advantages, device=DEVICE)
    row.weight_N = torch.tensor(weights, device=DEVICE)
    row.sampler_N = torch.tensor(sampler, device=DEVICE)
    if row.groups[0].old_N is not None:
        row.old_N = torch.cat([group.old_N for group in row.groups])


def visible(row: Row):
    """Token q sees token k when k stands before it in the same group, in the prompt or in the same answer.

    In the form that FlexAttention wants: a function of (batch, head, q, k), whose indices may be tensors.
    """

    def sees(b, h, q, k):
        same_group = row.group_T[q] == row.group_T[k]
        same_answer = (row.answer_T[k] == 0) | (row.answer_T[q] == row.answer_T[k])
        return same_group & same_answer & (k <= q)

    return sees


# ------------------------------------------------------------------------------- rows of a batch, and their attention


def pack(groups: list[Group], row_tokens: int) -> list[list[Group]]:
    """Groups into rows of at most `row_tokens` tokens, the longest first, each into the first row with room.

    A group that is longer gets a row of its own.
    """
    rows: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: -group.tokens):
        for row in rows:
            if sum(other.tokens for other in row) + group.tokens <= row_tokens:
                row.append(group)
                break
        else:
            rows.append([group])
    return rows


def build_rows(groups: list[Group], row_tokens: int) -> list[Row]:
    """Packed rows, as many on every rank: under FSDP every forward pass is a collective.

    A rank that has fewer rows than another gets idle ones, of one token whose weight in the loss is 0.
    """
    packed = pack(groups, row_tokens)
    most = int(all_reduce(len(packed), dist.ReduceOp.MAX))
    while len(packed) < most:
        packed.append([Group(-1, None, [0], [[0]], advantages=[0.0], sampler_logprobs=[[0.0]], weights=[0.0])])
    return [build_row(groups) for groups in packed]


def block_mask(row: Row):
    """`visible` for FlexAttention on a GPU, which skips the empty blocks. Not yet run there; tests build it here."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = len(row.ids_T)
    return create_block_mask(visible(row), None, None, length, length, device=row.ids_T.device)


def row_attention(module, query_1KTD, key_1KTD, value_1KTD, attention_mask, scaling=None, row=None, **_):
    """`visible` on a CPU, where FlexAttention has no gradient. The signature is that of transformers' attention.

    Every prompt sees itself, and every answer its prompt and itself, each in a call of its own. One mask over the
    whole row would compute mostly what it then hides: 5.6 times as much for 8 answers of 96 tokens and a prompt of 60.
    """
    lengths = [length for group in row.lengths for length in group]
    queries = query_1KTD.split(lengths, dim=2)
    keys = key_1KTD.split(lengths, dim=2)
    values = value_1KTD.split(lengths, dim=2)
    attended = []
    for group in row.lengths:
        first = len(attended)  # the group's prompt
        for part in range(first, first + len(group)):
            key, value, mask = keys[part], values[part], None
            if part > first:
                key = torch.cat([keys[first], key], dim=2)
                value = torch.cat([values[first], value], dim=2)
                tokens, seen = queries[part].shape[2], key.shape[2]
                mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
            attended.append(nn.functional.scaled_dot_product_attention(
                queries[part], key, value, attn_mask=mask, is_causal=part == first, scale=scaling, enable_gqa=True))
    return torch.cat(attended, dim=2).transpose(1, 2), None


# ------------------------------------------------------------------------------- the policy, sharded by FSDP2


class Policy(nn.Module):
    """The language model. Its forward pass gives the log-prob of every answer token of one packed row.

    This module is FSDP2's root, so that `forward` gathers and frees the embedding and the head by itself.
    vocabulary: the tokenizer's size. logit_chunk: answer tokens whose logits are made at once.
    """

    def __init__(self, lm, vocabulary: int, temperature: float, logit_chunk: int, recompute: bool):
        super().__init__()
        self.lm, self.vocabulary, self.temperature = lm, vocabulary, temperature
        self.logit_chunk, self.recompute = logit_chunk, recompute

    def forward(self, row: Row) -> Tensor:
        """Row -> log pi(token) [N], nats, fp32."""
        mask = block_mask(row) if GPU else None
        output = self.lm.model(input_ids=row.ids_T[None], position_ids=row.position_T[None], attention_mask=mask,
                               row=row, use_cache=False)
        hidden_NH = output.last_hidden_state[0, row.source_N]
        logprobs = []
        for chunk in zip(hidden_NH.split(self.logit_chunk), row.target_N.split(self.logit_chunk)):
            if self.recompute:  # all logits together, N x V, would be the largest tensor of all
                logprobs.append(checkpoint(self.token_logprobs, *chunk, use_reentrant=False))
            else:
                logprobs.append(self.token_logprobs(*chunk))
        return torch.cat(logprobs)

    def token_logprobs(self, hidden_NH: Tensor, target_N: Tensor) -> Tensor:
        # Padded vocabulary rows exist in the head but are never sampled, so they are no part of the softmax.
        logits_NV = self.lm.lm_head(hidden_NH)[:, : self.vocabulary].float()
        if self.temperature != 1:
            logits_NV = logits_NV / self.temperature
        return -nn.functional.cross_entropy(logits_NV, target_N, reduction="none")


def load_policy(folder: str, vocabulary: int, precision: str, temperature: float, logit_chunk: int,
                recompute: bool) -> Policy:
    """The policy of a model's folder, sharded over all ranks: fp32 master weights, compute in `precision`.

    Weights are read in the folder's own precision. Only the layer that is about to be sharded is whole in fp32, for
    eight ranks with a whole 7B model in fp32 would take 244 GB of the host's memory.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("row_attention", row_attention)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True,
                                              trust_remote_code=False,
                                              attn_implementation="flex_attention" if GPU else "row_attention")
    lm.train()
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, vocabulary, temperature, logit_chunk, recompute)
    policy.compute = getattr(torch, precision)
    return shard_policy(policy)


def shard_policy(policy: Policy) -> Policy:
    """Each layer, then the rest, in fp32 over all ranks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(DEVICE, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=policy.compute, reduce_dtype=torch.float32)
    for layer in policy.lm.model.layers:  # several CPU ranks gather a layer once an update, since gloo is slow
        to_fp32(layer)
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=GPU or mesh.size() == 1)
    # The root frees its weights after a forward pass too. Otherwise a pass without gradient would leave the head
    # unsharded, and optimiser and sync would see a plain tensor in its place.
    to_fp32(policy)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return policy


def to_fp32(module: nn.Module) -> None:
    """All weights of a module that are not sharded yet."""
    for weight in module.parameters():
        if not isinstance(weight, DTensor):
            weight.data = weight.data.float()


def accumulate(policy: Policy, rows: list[Row]):
    """The rows of one update, one after another; gradients are added up and meet those of other ranks at the end.

    A GPU reduces them after every row instead, since whole gradients would fill it.
    """
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        policy.set_requires_gradient_sync(GPU or last)
        policy.set_reshard_after_backward(GPU or dist.get_world_size() == 1 or last)
        yield row


def warmup_schedule(optimizer, updates: int):
    """A rate that rises linearly over so many updates, then stays."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / max(1, updates)))


def clip_gradient(policy: Policy, largest: float) -> float:
    """Scale the gradient to a norm of at most `largest`; returns its norm before that, over all ranks."""
    return nn.utils.clip_grad_norm_(policy.parameters(), largest).full_tensor().item()


def full_weights(policy: Policy):
    """(name, whole tensor) one at a time, by the checkpoint's names, in compute precision. All ranks must iterate."""
    for name, weight in policy.state_dict().items():
        if name != "lm.lm_head.weight" or not policy.lm.config.tie_word_embeddings:
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            yield name.removeprefix("lm."), whole.detach().to(policy.compute)


# ------------------------------------------------------------------------------- the sampler, vLLM

SAMPLED_AT_ONCE = 8192  # tokens of one forward pass; a GPU reads a longer prompt in parts


def start_engine(folder: str, max_tokens: int, cpu_cache: float = 1.0, gpu_memory: float | None = None,
                 sequences: int | None = None, chat_template: str | None = None, sleeps: bool = True):
    """A vLLM engine in this process.

    max_tokens: of one sequence. cpu_cache: GiB for keys and values on a CPU; while they are full, requests wait.
    gpu_memory: in training, the share of the GPU that the engine may take while it is awake. It then joins the group
    of all ranks, and on a GPU it can sleep while the trainer works, unless `sleeps` is False: vLLM lets one engine of a
    process do so. sequences: the most that are sampled at a time; vLLM takes memory and CUDA graphs for as many.
    chat_template: the trainer's, which says what ends an answer.
    """
    if not GPU:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two ranks share one core
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # also of what it says before it reads the variable above
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # its own imports, no concern of a user
    from vllm import LLM
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the CPU's is one of its kind

    if "weights_iterator" not in inspect.signature(GPUModelRunner.reload_weights).parameters:
        raise InputError("this vLLM's reload_weights takes no weights_iterator, so the trainer's weights cannot reach "
                         "it; install the version that our requirements file names")
    options = dict(max_model_len=max_tokens, max_num_batched_tokens=SAMPLED_AT_ONCE, disable_log_stats=True,
                   load_format="safetensors", logprobs_mode="processed_logprobs", use_tqdm_on_load=False)
    if gpu_memory is not None:
        options.update(distributed_executor_backend="external_launcher", enable_sleep_mode=GPU and sleeps,
                       gpu_memory_utilization=gpu_memory)
    if sequences is not None:
        options.update(max_num_seqs=sequences)
    if GPU:
        options.update(dtype="bfloat16")
    else:
        # A prompt read in two parts crashes a seeded request on a CPU ("CPU Generator does not use offset").
        # The answers to a prompt share its keys and values in whole blocks: 32 is the CPU's smallest.
        options.update(dtype="float32", enforce_eager=True, block_size=32, enable_chunked_prefill=False,
                       max_num_batched_tokens=max(SAMPLED_AT_ONCE, max_tokens),
                       kv_cache_memory_bytes=int(cpu_cache * 2**30))
    engine = LLM(folder, **options)
    if chat_template is not None:
        engine.get_tokenizer().chat_template = chat_template
    return engine


@dataclass
class Sample:
    """One answer of the sampler."""

    ids: list[int]  # the end token included
    text: str  # without the end token
    finished: bool  # False: cut off at its limit of tokens
    logprobs: list[float]  # of each token, by the sampler itself, nats


def generate(engine, prompts: list[list[int]], n: int, max_tokens: list[int], seeds: list[int], temperature: float,
             progress: bool = False) -> list[list[Sample]]:
    """n answers to each prompt: token ids in, token ids and their log-probs out, nothing truncated.

    One seed a prompt, from which vLLM derives one for each of its n answers: a rerun samples the same tokens.
    """
    from vllm import SamplingParams

    if not prompts:
        return []
    # Padded ids exist in the head but mean nothing, so they are forbidden. A list of the allowed ids would say the
    # same, and vLLM goes through it for every answer: 1.7 times as long for 49,152 ids and 24 tokens an answer.
    tokenizer = engine.get_tokenizer()
    padded = range(len(tokenizer), engine.model_config.get_vocab_size())
    stops = stop_ids(tokenizer)
    params = []
    for limit, seed in zip(max_tokens, seeds):
        # vLLM's own text and its dictionary of log-probs, made token by token, would take longer than the rest of its
        # work outside the model: they are left out, and the text is made once, below.
        params.append(SamplingParams(n=n, max_tokens=limit, seed=seed, temperature=temperature, top_p=1.0, top_k=0,
                                     logprobs=0, flat_logprobs=True, detokenize=False, stop_token_ids=stops,
                                     logit_bias=dict.fromkeys(padded, -math.inf) or None))
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=progress)
    answers = []
    for output in outputs:
        answers.append([])
        for sample in output.outputs:
            ids = list(sample.token_ids)
            text = answer_text(tokenizer, ids, stops)
            answers[-1].append(Sample(ids, text, sample.finish_reason == "stop", list(sample.logprobs.logprobs)))
    return answers


def sleep(engine) -> None:
    """The engine leaves a GPU's memory to the trainer; `sync` brings it back. On a CPU both stay. Not yet run."""
    if GPU:
        engine.sleep(level=2)


def sync(engine, policy: Policy) -> float:
    """The trainer's weights into the engine, one tensor at a time. What its prefix cache holds is stale after that.

    Returns the largest relative distance of a tensor that the engine now holds from the trainer's. Raises
    FloatingPointError, on all ranks alike, where it is more than rounding makes.
    """
    if GPU:  # not yet run
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later, the engine needs now
        engine.wake_up(tags=["weights"])
    sketches: dict[str, Tensor] = {}
    weights = fingerprint.sketched(full_weights(policy), torch.bfloat16 if GPU else torch.float32, sketches)
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if GPU:
        engine.wake_up(tags=["kv_cache"])
    else:  # vLLM multiplies by a packed copy of the head, and reload_weights leaves that of a tied head as it was
        engine.apply_model(lambda model: model.lm_head.quant_method.process_weights_after_loading(model.lm_head))
    engine.reset_prefix_cache()
    found = fingerprint.differences(sketches, engine.apply_model(fingerprint.sampler_sketches)[0])
    name = max(found, key=found.get)
    worst = all_reduce(found[name], dist.ReduceOp.MAX)
    if not worst <= fingerprint.LARGEST:
        raise FloatingPointError(f"sync: the sampler does not hold the trainer's weights: {name} differs by "
                                 f"{found[name]:.1e} on this rank, where rounding makes {fingerprint.LARGEST} at most")
    return worst


# ------------------------------------------------------------------------------- ranks

STORE = None  # the ranks' common notes; made by start_ranks


def start_ranks(timeout_minutes: float) -> tuple[int, int]:
    """(rank, number of ranks), after all ranks have met. Without torchrun this process is a group of one.

    Before the engine, which would start a group of its own. Never destroyed, which vLLM would answer with an error.
    """
    global STORE
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any free port
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    if GPU:
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"local rank {local_rank} has no GPU: use --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    else:  # more threads than cores get in each other's way: an update took 7 times as long
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    STORE, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", store=STORE, rank=rank, world_size=world,
                            timeout=timeout)
    return rank, world


def stop(error: Exception) -> None:
    """Exit status 2 with one line on standard error. A RuntimeError that is no lost rank is raised again."""
    message = str(error)
    if isinstance(error, RuntimeError):  # gloo raises it for everything; its words tell whether a rank is lost
        if not re.search(r"Timed out|[Cc]onnection (closed|reset|refused)|Broken pipe", message):
            raise error
        message = ("another rank died, or stalled for longer than --timeout; its own message says why; --resume "
                   f"continues from the newest checkpoint ({message.splitlines()[0]})")
    try:  # once: mostly all ranks find the same mistake, but not always; torchrun holds notes before the ranks meet
        notes = STORE or ("TORCHELASTIC_RUN_ID" in os.environ and next(dist.rendezvous("env://"))[0])
        first = not notes or notes.add(message, 1) == 1
    except dist.DistError:  # the notes were on a node that is gone
        first = True
    if first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def catch_signals() -> list[int]:
    """A list that SIGTERM and Ctrl-C will be added to, instead of ending the process."""
    caught: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):  # torchrun passes both on, and kills after its --shutdown-timeout
        signal.signal(name, lambda number, frame: caught.append(number))
    return caught


def all_reduce(value: float, op=dist.ReduceOp.SUM) -> float:
    """One number over all ranks, in float64."""
    tensor = torch.tensor(float(value), dtype=torch.float64, device=DEVICE)
    dist.all_reduce(tensor, op)
    return tensor.item()


def on_rank_0(what: str, work):
    """What `work()` returns on rank 0, for all ranks. So do its errors: the others must not wait for a dead rank."""
    from safetensors import SafetensorError

    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except InputError as error:
            outcome = [error]
        except (OSError, SafetensorError) as error:
            outcome = [write_failed(what, error)]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def write_failed(what: str, error: BaseException) -> InputError:
    if not isinstance(error, OSError):  # torch and safetensors hide why
        error = f"a file could not be written whole: {error}"
    return InputError(f"{what} failed: {error}; make room or mend the permissions, then --resume continues from "
                      "the newest complete checkpoint")


def gather(items: list) -> list | None:
    """The lists of all ranks as one, on rank 0; None elsewhere."""
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(items, parts)
    return parts and [item for part in parts for item in part]


def each_row_once(fits, rows: list) -> list[bool]:
    """Whether each row fits; every rank measures a part, and all get the whole.

    Raises InputError on every rank where not all have read the same rows: the batch of a step must be one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    parts, found = [None] * world, [False] * len(rows)
    bar = tqdm(rows[rank::world], "measuring prompts", delay=10, leave=False, disable=rank != 0)
    dist.all_gather_object(parts, (checksum(rows), [fits(row) for row in bar]))
    if any(rows_read != parts[0][0] for rows_read, _ in parts):
        raise InputError("the ranks have read different rows: give every node the same files and versions")
    for other, (_, part) in enumerate(parts):
        found[other::world] = part
    return found


def rebalance(groups: list[Group], minibatches: int) -> list[Group]:
    """The groups of each minibatch handed out to the ranks once more, equally many to each, the work about even.

    Only after part 4 it is known which groups have a signal, and only they cost anything in parts 5 and 6. A minibatch
    keeps its groups, so the update stays the same. Here the ranks wait for the one that sampled longest.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone, size = [None] * world, len(groups) // minibatches
    dist.all_gather_object(everyone, groups)
    own = []
    for m in range(minibatches):
        minibatch = []
        for part in everyone:
            minibatch += part[m * size : (m + 1) * size]
        own += share_evenly(minibatch, world)[rank]
    return own


class Clock:
    """Seconds of each part of a step, and the highest memory at their ends: `clock(name)` closes the part just run."""

    def __init__(self, parts: tuple[str, ...]):
        self.seconds = dict.fromkeys(parts, 0.0)
        self.peak_bytes = 0
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.peak_bytes = max(self.peak_bytes, used_bytes())
        now = time.perf_counter()
        self.seconds[part] = now - self.last
        self.last = now


def used_bytes() -> int:
    """A GPU: taken now, which includes what torch's allocator keeps of a part's peak and leaves out what sleeps in the
    engine. A CPU: the most that this process has had so far."""
    if GPU:
        free, total = torch.cuda.mem_get_info()
        return total - free
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory_gib(clock: Clock) -> float:
    """The highest memory of a step (on a CPU: so far), of all ranks together."""
    return all_reduce(clock.peak_bytes) / 2**30


def free_gib() -> tuple[float | None, float]:
    """(memory that is free on this rank's GPU, or None; free in this machine)."""
    import psutil

    host = psutil.virtual_memory().available / 2**30
    if not GPU:
        return None, host
    free, _ = torch.cuda.mem_get_info()
    return free / 2**30, host


def missing_gpu() -> str:
    """What to do when this torch was built for GPUs and sees none; "" otherwise."""
    if GPU or not torch.version.cuda:
        return ""
    major = torch.version.cuda.split(".")[0]
    driver = OLDEST_DRIVER.get(major, "that torch names")
    return (f"this torch is built for CUDA {torch.version.cuda} and sees no GPU. That CUDA needs an NVIDIA driver of "
            f"{driver} or newer (nvidia-smi shows yours). --preset smol trains on the CPU")


def about_machine() -> dict:
    """What a run's config.json says of the machine and its software."""
    sampler = packages_distributions()["vllm"][0]  # vllm or vllm-cpu
    versions = {name: version(name) for name in ("torch", "transformers", sampler)}
    device = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} CPU cores"
    return {"ranks": dist.get_world_size(), "device": device, "versions": versions}
