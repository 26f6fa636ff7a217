"""The sampler: vLLM in the trainer's own process, and the trainer's weights on their way into it.

After every sync each tensor of the sampler is compared with the trainer's, by a sketch of it: the product of a matrix
with a fixed random vector, one number a row. A sketch moves when any number of the matrix does, or when two matrices,
rows or columns change places, and it costs what one token costs. The sampler may keep several matrices in one, in a
form that only multiplication reads, or a part of each on every rank: their sketches can be compared all the same. Drift
cannot see as much: with bf16 its noise is .02 nats a token, and a sampler one small step behind moves it by .008.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.chat import answer_text, stop_ids
from infra.policy import Policy, full_weights, model_config
from infra.ranks import GPU, InputError, all_reduce, exchange, ranks_here

SAMPLED_AT_ONCE = 8192  # tokens of one forward pass; a GPU reads a longer prompt in parts
PROMPTS_AT_ONCE = 4096 if GPU else 64  # that evaluation asks twice, while the cache still holds them
BLOCK = 32  # tokens of one piece of the cache on a CPU, its smallest: the answers to a prompt share whole pieces


def largest_drift(precision: str) -> float:
    """Nats a token between trainer and sampler that precision explains (ours): measured, .02 in bf16, 1e-5 in fp32."""
    return 0.1 if GPU or precision == "bfloat16" else 1e-3


def start_sampler(folder: str, *, max_tokens: int, chat_template: str, sequences: int | None = None,
                  gpu_memory: float | None = None, sleeps: bool = True, tensor_parallel: int = 1):
    """vLLM in this process, with the weights of a folder.

    max_tokens: of the longest sequence. chat_template: the trainer's, which says what ends an answer. sequences: the
    most that are sampled at a time; vLLM takes memory and CUDA graphs for as many.
    gpu_memory: in training, the share of the GPU that the sampler may take while it is awake. It then joins the group
    of all ranks, and on a GPU it can sleep while the trainer works, unless `sleeps` is False: vLLM lets one sampler of
    a process do so. tensor_parallel: so many neighbouring ranks hold one sampler together, a part of each matrix each.
    """
    if not GPU:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two ranks share one core
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # also of what it says before it reads the variable above
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # its own imports, no concern of a user
    from vllm import LLM

    options = dict(max_model_len=max_tokens, max_num_batched_tokens=SAMPLED_AT_ONCE, disable_log_stats=True,
                   load_format="safetensors", logprobs_mode="processed_logprobs", use_tqdm_on_load=False)
    if gpu_memory is not None:
        options.update(distributed_executor_backend="external_launcher", enable_sleep_mode=GPU and sleeps,
                       gpu_memory_utilization=gpu_memory, tensor_parallel_size=tensor_parallel)
    if tensor_parallel > 1:  # vLLM's own all-reduce has crashed beside a sampler that sleeps (its pull request 45611)
        options.update(disable_custom_all_reduce=True)
    if sequences is not None:
        options.update(max_num_seqs=min(sequences, SAMPLED_AT_ONCE))  # the others wait
    if GPU:
        options.update(dtype="bfloat16")
    else:
        # A prompt read in two parts crashes a seeded request on a CPU ("CPU Generator does not use offset").
        options.update(dtype="float32", enforce_eager=True, block_size=BLOCK, enable_chunked_prefill=False,
                       max_num_batched_tokens=max(SAMPLED_AT_ONCE, max_tokens),
                       kv_cache_memory_bytes=cpu_cache_bytes(folder, max_tokens))
    try:
        sampler = LLM(folder, **options)
    except ValueError as error:  # on a GPU too little memory is free, or no cache is left
        raise InputError(f"vLLM does not start ({error}): free the GPU, or set --max_*_tokens, --gpu_memory") from None
    sampler.get_tokenizer().chat_template = chat_template
    sampler.sharers = None
    if tensor_parallel > 1:
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        sampler.sharers = group.cpu_group
        # On a CPU vLLM leaves the names of its shared memory behind, and a later run's sampler could not begin.
        name = getattr(getattr(group.device_communicator, "dist_module", None), "group_name", "").strip("/")
        Path("/dev/shm", f"{name}_{group.rank_in_group}").unlink(missing_ok=True)
    return sampler


def cpu_cache_bytes(folder: str, max_tokens: int) -> int:
    """For keys and values on a CPU: a GiB shared by the ranks of this machine, or what four longest sequences take.

    While it is full, requests wait.
    """
    config = model_config(folder)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * head  # bytes: fp32 keys and values
    blocks = 4 * -(-max_tokens // BLOCK) + 1  # one is held back
    return max(2**30 // ranks_here(), blocks * BLOCK * token)


@dataclass
class Sample:
    """One answer of the sampler."""

    ids: list[int]  # the end token included
    text: str  # without the end token
    finished: bool  # False: cut off at its limit of tokens
    logprobs: list[float]  # of each token, by the sampler itself, nats


def generate(sampler, prompts: list[list[int]], *, n: int, max_tokens: list[int], seeds: list[int],
             temperature: float) -> list[list[Sample]]:
    """n answers to each prompt: token ids in, token ids and their log-probs out, nothing truncated.

    One seed a prompt, from which vLLM derives one for each of its n answers: a rerun samples the same tokens. Ranks
    that share a sampler all ask it for the answers of all of them, and each takes its own.
    """
    from vllm import SamplingParams

    asked, own = of_all_sharers(sampler, list(zip(prompts, max_tokens, seeds, strict=True)))
    if not asked:  # after all sharers have met: one of them may have a prompt
        return []
    # Padded ids exist in the head but mean nothing, so they are forbidden. A list of the allowed ids would say the
    # same, and vLLM goes through it for every answer: 1.7 times as long for 49,152 ids and 24 tokens an answer.
    tokenizer = sampler.get_tokenizer()
    padded = range(len(tokenizer), sampler.model_config.get_vocab_size())
    stops = stop_ids(tokenizer)
    params = []
    for _, limit, seed in asked:
        # vLLM makes text and dictionaries token by token, slower than all its work outside the model: text comes below.
        params.append(SamplingParams(n=n, max_tokens=limit, seed=seed, temperature=temperature, top_p=1.0, top_k=0,
                                     logprobs=0, flat_logprobs=True, detokenize=False, stop_token_ids=stops,
                                     logit_bias=dict.fromkeys(padded, -math.inf) or None))
    outputs = sampler.generate([{"prompt_token_ids": ids} for ids, _, _ in asked], params, use_tqdm=False)
    answers = []
    for output in outputs[own]:
        answers.append([])
        for sample in output.outputs:
            ids = list(sample.token_ids)
            text = answer_text(tokenizer, ids, stops)
            answers[-1].append(Sample(ids, text, sample.finish_reason == "stop", list(sample.logprobs.logprobs)))
    return answers


def of_all_sharers(sampler, requests: list) -> tuple[list, slice]:
    """(the requests of all ranks that share this sampler, where those of this rank stand)."""
    if sampler.sharers is None:
        return requests, slice(None)
    parts = exchange(requests, sampler.sharers)
    first = sum(map(len, parts[: dist.get_rank(sampler.sharers)]))
    return sum(parts, []), slice(first, first + len(requests))


def sleep(sampler) -> None:
    """The sampler leaves a GPU's memory to the trainer; `sync` brings it back. On a CPU both stay. Not yet run."""
    if GPU:
        sampler.sleep(level=2)


def sync(sampler, policy: Policy) -> float:
    """The trainer's weights into the sampler, one tensor at a time. What its prefix cache holds is stale after that.

    Returns the largest relative distance of a tensor that the sampler now holds from the trainer's. Raises
    FloatingPointError, on all ranks alike, where it is more than rounding makes.
    """
    if GPU:  # not yet run
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later, the sampler needs now
        sampler.wake_up(tags=["weights"])
    sketches: dict[str, Tensor] = {}
    weights = sketched(full_weights(policy), torch.bfloat16 if GPU else torch.float32, sketches)
    sampler.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if GPU:
        sampler.wake_up(tags=["kv_cache"])
    else:  # vLLM multiplies by a packed copy of the head, and reload_weights leaves that of a tied head as it was
        sampler.apply_model(lambda model: model.lm_head.quant_method.process_weights_after_loading(model.lm_head))
    sampler.reset_prefix_cache()
    found = differences(sketches, sampler.apply_model(sampler_sketches)[0])
    name = max(found, key=found.get)
    worst = all_reduce(found[name], dist.ReduceOp.MAX)
    if not worst <= LARGEST_DISTANCE:
        raise FloatingPointError(f"sync: the sampler does not hold the trainer's weights: {name} differs by "
                                 f"{found[name]:.1e} on this rank, where rounding makes {LARGEST_DISTANCE} at most")
    return worst


# ------------------------------------------------------------------------------- does it hold the trainer's weights?

# The largest relative distance of two sketches. Rounding in fp32 makes 6e-7 of SmolLM2, and grows with the root of a
# matrix's width. An AdamW step at a rate of 1e-6 makes 1e-5 or more.
LARGEST_DISTANCE = 4e-6


@lru_cache(maxsize=16)
def random_vector(size: int, dtype: torch.dtype, device: torch.device, part: int = 0, parts: int = 1) -> Tensor:
    """`size` fixed random numbers: part `part` of a vector of `parts` such parts."""
    generator = torch.Generator().manual_seed(parts * size)
    return torch.randn(parts * size, generator=generator).chunk(parts)[part].to(device, dtype)


def sketch(weight: Tensor, part: int = 0, parts: int = 1) -> Tensor:
    """One number for each row of a matrix, or of part `part` of its columns. A vector stands for itself.

    Of bf16 in fp64, which rounds nothing away: wide matrices on a GPU would else need a wider limit. Of fp32 in fp32,
    as the sampler of a CPU multiplies.

    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> torch.equal(sketch(a.flip(0)), sketch(a).flip(0)), torch.allclose(sketch(a.flip(1)), sketch(a))
    (True, False)
    """
    if weight.ndim == 1:
        return weight.float()
    dtype = torch.float64 if weight.dtype == torch.bfloat16 else torch.float32
    vector = random_vector(weight.shape[1], dtype, weight.device, part, parts)
    return torch.cat([rows.to(dtype) @ vector for rows in weight.split(2048)])  # never a whole copy


def sketched(weights, dtype: torch.dtype, sketches: dict[str, Tensor]):
    """The trainer's (name, tensor) pairs as they pass by on their way to the sampler, which holds them in `dtype`."""
    for name, weight in weights:
        sketches[name] = sketch(weight.to(dtype))
        yield name, weight


@dataclass
class Held:
    """One tensor of the sampler, which may be made of several of the trainer's, and be shared with other ranks."""

    parts: list[str]  # the trainer's names of its parts
    sizes: list[int]  # rows of each part that this rank holds
    sketch: Tensor
    rank: int  # of this rank among those that share the sampler
    sharers: int

    def expected(self, trainer: dict[str, Tensor]) -> Tensor:
        """The trainer's sketch of the same rows. A part of which all sharers together hold more than there is stands
        with several of them, one after another: so do key heads where there are fewer than sharers, and vectors."""
        rows = []
        for part, size in zip(self.parts, self.sizes, strict=True):
            copies = max(1, self.sharers * size // len(trainer[part]))
            first = self.rank // copies * size
            rows.append(trainer[part][first : first + size])
        return torch.cat(rows)


def sampler_sketches(model: nn.Module) -> dict[str, Held]:
    """Of a model of vLLM: {its name of a tensor: what is held}.

    On a CPU vLLM multiplies by a packed copy and keeps no other, but for the head and the embedding: then the copy is
    asked for its product. The embedding is read by row, and so its plain tensor counts.
    """
    found = {}
    for path, module in model.named_modules():
        rank, sharers, products = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1), {}
        by_column = sharers > 1 and hasattr(module, "input_is_parallel")  # then the sharers' products add up
        part = (rank, sharers) if by_column else (0, 1)
        for name, weight in module.named_parameters(recurse=False):
            if weight.numel():
                own = sketch(weight.detach(), *part)
                products[name] = sum_of_sharers(own) if by_column and weight.ndim == 2 else own
        if hasattr(module, "cpu_linear") and path != "model.embed_tokens":
            is_head = hasattr(module, "embedding_dim")
            columns = module.embedding_dim if is_head else module.input_size_per_partition
            vector = random_vector(columns, torch.float32, torch.device("cpu"), *part)
            own = module.cpu_linear(vector[None], module.weight, None)[0]
            products["weight, packed"] = sum_of_sharers(own) if by_column else own
        for name, own in products.items():
            parts = trainer_names(f"{path}.{name.removesuffix(', packed')}", model.packed_modules_mapping)
            sizes = getattr(module, "output_partition_sizes", [len(own)])
            found[f"{path}.{name}"] = Held(parts, sizes, own, rank, sharers)
    return found


def sum_of_sharers(product: Tensor) -> Tensor:
    from vllm.distributed.parallel_state import get_tp_group

    dist.all_reduce(product, group=get_tp_group().device_group)
    return product


def trainer_names(name: str, packed: dict[str, list[str]]) -> list[str]:
    """What the trainer calls the parts of one tensor of the sampler.

    >>> trainer_names("model.layers.0.mlp.gate_up_proj.weight", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight']
    """
    path, _, kind = name.rpartition(".")
    before, dot, module = path.rpartition(".")
    return [f"{before}{dot}{part}.{kind}" for part in packed.get(module, [module])]


def differences(trainer: dict[str, Tensor], sampler: dict[str, Held]) -> dict[str, float]:
    """{the sampler's name of a tensor: its relative distance from the trainer's}; infinite where one has no other."""
    trainer = dict(trainer)
    trainer.setdefault("lm_head.weight", trainer["model.embed_tokens.weight"])  # then the head is the embedding
    found, missing = {}, trainer.keys() - {"lm_head.weight"}
    for name, own in sampler.items():
        missing -= set(own.parts)
        found[name] = math.inf
        if trainer.keys() >= set(own.parts):
            expected = own.expected(trainer)
            if len(own.sketch) >= len(expected):  # the sampler pads the vocabulary
                distance = (own.sketch[: len(expected)].to(expected.device) - expected).norm()
                relative = (distance / expected.norm().clamp(min=1e-30)).item()
                found[name] = relative if math.isfinite(relative) else math.inf
    return found | dict.fromkeys(missing, math.inf)
