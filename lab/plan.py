"""What a run would need: memory of a GPU, seconds of a step, cache, host memory, disk; does it fit?

    python -m lab.plan [--gpu_gib 79.6] [--nproc 8] [--nodes 1] [any flag of urpo.py]

It needs no GPU, no weights, and no network for the bases in SHAPES.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Literal

import data
import urpo
from infra.policy import LOGIT_CHUNK, check_heads, empty_model, model_config
from infra.ranks import InputError, one_line_errors
from infra.sampler import BLOCK, SAMPLED_AT_ONCE
from infra.settings import parse, setting


@dataclass
class Plan(urpo.Config):
    """The settings of urpo.py, and the machine that they are planned for."""

    preset: Literal["auto", "smol", "paper"] = setting("paper", "by hardware | SmolLM2-135M | Qwen2.5-7B")
    gpu_gib: float = setting(79.6, "GiB of one GPU", above=0)
    nproc: int = setting(8, "ranks of a node, a GPU each", above=0)
    nodes: int = setting(1, "machines", above=0)
    judge: bool = setting(False, "a frozen judge has a sampler of its own, which never sleeps: lab.baselines rm_gen")


FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "tie_word_embeddings")
SHAPES = {  # of the bases that the pages name
    "Qwen/Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "Qwen/Qwen2.5-14B": ("qwen2", 152064, 5120, 13824, 48, 40, 8, False),
    "Qwen/Qwen2.5-32B": ("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "Qwen/Qwen2.5-72B": ("qwen2", 152064, 8192, 29568, 80, 64, 8, False),
    "OctoThinker/OctoThinker-8B-Hybrid-Base": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
}


def planned_shape(model: str) -> SimpleNamespace:
    """The sizes of a model that need not be there: numbers of parameters, and widths."""
    from transformers import AutoConfig

    known = SHAPES.get(model)
    config = AutoConfig.for_model(**dict(zip(FIELDS, known))) if known else model_config(model)
    lm, layers = empty_model(model, config), config.num_hidden_layers
    layer = sum(weight.numel() for weight in lm.model.layers[0].parameters())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return SimpleNamespace(
        parameters=lm.num_parameters(), layers=layers,
        layer=layer,  # parameters of one layer
        root=lm.num_parameters() - layers * layer,  # those outside the layers: embedding, head, last norm
        hidden=config.hidden_size, inner=config.intermediate_size, vocabulary=config.vocab_size,
        config=config,
        key_values=2 * layers * config.num_key_value_heads * head)  # that one token keeps, all layers together


# The two parts that need the most: rollout needs less than sync, old_logprobs less than update.
PARTS = ("update", "sync")
OTHER = 4.0  # GiB: CUDA contexts, NCCL's buffers, CUDA graphs. From the sources and others' reports


def longest_row(config) -> int:
    """Tokens: a group that is longer than --row_tokens gets a row of its own."""
    answers = max(config.max_answer_tokens, config.max_referee_tokens)
    return max(config.row_tokens, config.max_prompt_tokens + config.group * answers)


def update_peak(shape, config, world: int) -> float:
    """GiB: the most that an update takes at one time, beside weights, gradients and moments."""
    tokens = longest_row(config)
    size = 2 if config.precision == "bfloat16" else 4  # bytes of a number in compute
    root = size * shape.root  # embedding and head, gathered from all ranks
    root_gradient = (size + 4) * shape.root  # whole, in the compute precision and in fp32
    layer = (2 * size + 4 + 6 / world) * shape.layer  # gathered, the next one too, and its gradient on its way
    inputs = size * shape.layers * tokens * shape.hidden  # of each layer, kept for the backward pass
    working = size * tokens * (9 * shape.inner + 5 * shape.hidden)  # one layer, computed again
    logits = 15 * min(LOGIT_CHUNK, tokens) * shape.vocabulary
    block_mask = 4 * tokens**2  # while it is made, before the layers' work begins
    return max(root + inputs + logits, root + inputs + layer + working, root_gradient, block_mask) / 2**30


def gpu_memory(shape, config, world: int) -> dict[str, dict[str, float]]:
    """{what: {part: GiB}} of one rank from the second step on."""
    state = 0 if config.offload else 4 * shape.parameters / world / 2**30
    weights = 2 * shape.parameters / config.tensor_parallel / 2**30
    largest = 2 * shape.vocabulary * shape.hidden / 2**30  # one whole tensor, in bf16
    rows = {
        "parameters": dict.fromkeys(PARTS, state),
        "gradients": {"update": state},
        "moments": dict.fromkeys(PARTS, 2 * state),
        "sampler weights": {"sync": weights},
        "KV cache and its work": {"sync": max(0.0, config.gpu_memory * config.gpu_gib - weights)},
        "frozen judge": dict.fromkeys(PARTS, config.judge * config.gpu_memory * config.gpu_gib),
        "CUDA, NCCL, graphs": dict.fromkeys(PARTS, OTHER),
        "peak of the update": {"update": update_peak(shape, config, world)},
        "a tensor on its way": {"sync": largest},
    }
    return rows | {"together": {part: sum(row.get(part, 0.0) for row in rows.values()) for part in PARTS}}


def cache_tokens(shape, config, world: int) -> float:
    """Tokens whose keys and values the cache of a sampler holds."""
    sharers = config.tensor_parallel
    sequences = config.batch // world * config.group * sharers
    work = 4 * SAMPLED_AT_ONCE * (2 * shape.inner / sharers + 4 * shape.hidden) + 16 * sequences * shape.vocabulary
    room = max(0.0, config.gpu_memory * config.gpu_gib * 2**30 - 2 * shape.parameters / sharers - work)
    parts = min(sharers, shape.config.num_key_value_heads)  # a key head is held at least once
    return room * parts / (2 * shape.key_values)


# Shares of an H100's data sheet that others' runs reach (docs/gpu.md), and its link to the host. None measured by us.
MATMUL, UPDATE_SHARE = 989e12, 0.25  # FLOP a second
BANDWIDTH, DECODE_SHARE = 3.35e12, 0.55  # bytes a second of weights; the rest is keys and values
HOST_LINK = 16e9  # bytes a second
TOKEN_OVERHEAD, REDUCE_SECONDS = 0.004, 20e-6  # of a decode step; of an all-reduce among sharers, two a layer
ANSWER_SHARE = 0.4  # of its limit is the mean length of an answer; measured runs of others: .2 to .5


def step_seconds(shape, config, world: int) -> dict[str, float]:
    """Seconds of the parts that cost most, on so many H100, when all groups have a signal. Not checked on a GPU.

    The sampler reads all its weights for each token of the longest answer; answers for which its cache has no room
    wait, and it reads them again. A parameter costs 2 FLOP a token in
    log-probs and 6 in the update. --offload moves it to the GPU twice and its gradient back, for each row.
    """
    counts, tokens, longest = data.mix_counts(config, warmup=False), 0, 0
    for kind, prompts in counts.items():
        limit = config.max_referee_tokens if kind == "preference" else config.max_answer_tokens
        tokens += prompts * config.group * ANSWER_SHARE * limit / world
        longest = max(longest, limit if prompts else 0)
    reading = 2 * shape.parameters / config.tensor_parallel / (DECODE_SHARE * BANDWIDTH) + TOKEN_OVERHEAD
    reading += 2 * shape.layers * REDUCE_SECONDS * (config.tensor_parallel > 1)
    answers = config.batch // world * config.group * config.tensor_parallel
    waves = max(1, answers * ANSWER_SHARE * longest / cache_tokens(shape, config, world))
    forward = 2 * shape.parameters * tokens / (UPDATE_SHARE * MATMUL)
    rows = config.offload * max(config.minibatches, tokens / longest_row(config))
    judgement = ANSWER_SHARE * config.max_referee_tokens if counts["instruction"] else 0
    return {"rollout": waves * longest * reading, "self_score": judgement * reading,
            "old_logprobs": forward * (1 - 1 / config.minibatches),
            "update": 3 * forward + 12 * rows * shape.parameters / world / HOST_LINK}


def does_not_fit(shape, config, world: int) -> str:
    """"" or what is too large for a GPU: a part of the step, or the sampler's longest sequence."""
    memory = gpu_memory(shape, config, world)
    together, sampler = memory.pop("together"), memory["sampler weights"]["sync"]
    if sampler > config.gpu_memory * config.gpu_gib:
        return (f"a sampler's weights take {sampler:.1f} GiB of each GPU that holds it, and --gpu_memory "
                f"{config.gpu_memory} gives {config.gpu_memory * config.gpu_gib:.1f}")
    worst = max(together, key=together.get)
    if together[worst] > config.gpu_gib:
        most = max(memory, key=lambda what: memory[what].get(worst, 0.0))
        return (f"part {worst} needs {together[worst]:.1f} GiB of a GPU with {config.gpu_gib:.1f} GiB, of which "
                f"{memory[most][worst]:.1f} are {most}")
    held = cache_tokens(shape, config, world)
    longest = -(-data.longest_sequence(config) // BLOCK) * BLOCK + BLOCK  # in blocks, of which vLLM holds one back
    if held < longest:
        return (f"the sampler's cache holds {held:.0f} tokens, and the longest prompt with its answer may take "
                f"{longest} (--max_judge_tokens, --max_prompt_tokens, --gpu_memory)")
    return ""


def advice(shape, plan: Plan) -> str:
    """The first of the few settings that exist under which it fits, with the time of a step."""
    for more, *values in product((1, 2, 4, 8), (plan.offload, True), (1, 2, 4, 8), (0.6, 0.5, 0.4, 0.3, 0.7, 0.8)):
        changes = dict(zip(("nodes", "offload", "tensor_parallel", "gpu_memory"), (more * plan.nodes, *values)))
        tried = replace(plan, **changes)
        world = tried.nproc * tried.nodes
        try:
            urpo.check(tried, world)
            check_heads(plan.model, shape.config, tried.tensor_parallel)
        except InputError:  # these do not split
            continue
        if plan.nproc % tried.tensor_parallel == 0 and not does_not_fit(shape, tried, world):
            changed = [(name, value) for name, value in vars(tried).items() if value != getattr(plan, name)]
            flags = [f"--{name}" if value is True else f"--{name} {value}" for name, value in changed]
            return f"{' '.join(flags)}, about {sum(step_seconds(shape, tried, world).values()):.0f} s a step"
    return "nothing that this plan tries"


def show(plan: Plan) -> str:
    import pandas

    world, shape = plan.nproc * plan.nodes, planned_shape(plan.model)
    urpo.check(plan, world)
    check_heads(plan.model, shape.config, plan.tensor_parallel)
    memory = pandas.DataFrame.from_dict(gpu_memory(shape, plan, world), orient="index", columns=PARTS)
    answer = plan.max_prompt_tokens / plan.group + max(plan.max_answer_tokens, plan.max_referee_tokens)
    # 5: a process. 24 bytes: moments 8, weights and gradients 8 each, since pinned memory comes in powers of two.
    host = plan.nproc * (5 + plan.offload * 24 * shape.parameters / world / 2**30)
    fault = does_not_fit(shape, plan, world)
    if fault:
        verdict = f"does NOT fit: {fault}\nwhat fits: {advice(shape, plan)}"
    else:
        seconds = step_seconds(shape, plan, world)
        total, parts = sum(seconds.values()), ", ".join(f"{part} {value:.0f}" for part, value in seconds.items())
        verdict = (f"a step: about {total:.0f} s on H100s, prompts left out, not checked on any ({parts})\n"
                   f"the run: {plan.steps * total / 3600:.0f} hours for {plan.steps} steps\n\nit fits")
    return f"""{plan.model}: {shape.parameters / 1e9:.2f}B parameters on {world} GPUs of {plan.gpu_gib:g} GiB

GiB of one rank, in the two parts that need the most
{memory.to_string(float_format="%.2f", na_rep="-")}

cache of a sampler: {cache_tokens(shape, plan, world) / answer:.0f} answers of full length at a time, of \
{plan.batch // world * plan.group * plan.tensor_parallel} a step
longest packed row: {longest_row(plan)} tokens
host memory of a node: up to {host:.0f} GiB; disk: {14 * shape.parameters / 1e9:.1f} GB a checkpoint

{verdict}"""


def main() -> None:
    with one_line_errors():
        print(show(parse(Plan, urpo.PRESETS, sys.argv[1:], "What a run would need; no GPU is needed for that")))


if __name__ == "__main__":
    main()
