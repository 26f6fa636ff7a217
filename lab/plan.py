"""Before a start: the model's folder and tokenizer, and whether model, settings and machine go together.

    python urpo.py --plan --gpu_gib 80 --nproc 8        what a rank needs in each part, how long a step takes, what to
                                                        change; no GPU is needed, and any other flag may stand beside

One formula of memory serves the plan and the check before a start, on GPUs and on a CPU. tests/test_plan.py holds it
against an update under fake tensors and against what the laptop's run took. Sizes are in GiB, of one rank.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import flags
import machine
from data import PARTS, InputError, mix_counts

# ------------------------------------------------------------------------------- the model


TOY_MODELS = ("raw", "half", "seed")  # made by toy/seed.py


def model_folder(model: str) -> str:
    """The folder or hub id that --model stands for: those of the toy world are made, others stay as given."""
    if model in TOY_MODELS:
        from toy import seed

        return seed.folder(model)
    if model.startswith((".", "/")) or os.path.exists(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise InputError(f"{model}: no model here (no config.json); give a folder that save_pretrained wrote")
        if not any(Path(model).glob("*.safetensors")):
            raise InputError(f"{model}: no *.safetensors here, and no other format is read, since a pickle "
                             "(pytorch_model.bin) can run code; save it as safetensors where you trust it")
    return model


def load_tokenizer(folder: str, chat_template: str = ""):
    """The tokenizer of a folder or hub id. Raises InputError where neither we nor the hub have such a model.

    chat_template: a file with a template in place of the tokenizer's own, for bases that have none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a damaged file raises anything; the reason is printed
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--model {folder}: no tokenizer that loads, here or on the hub as far as we can see "
                         f"({type(error).__name__}: {reason}); check the name, or save model and tokenizer "
                         "there") from None
    if not tokenizer.is_fast:
        raise InputError(f"--model {folder}: its tokenizer has no tokenizer.json, and only such tokenizers tell which "
                         "letters a token stands for; convert it, or use another model")
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def read_template(path: str) -> str:
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--chat_template {path}: cannot be read ({error}); give a file in Jinja, for example "
                         "plain_turns.jinja") from None
    if "messages" not in template:
        raise InputError(f"--chat_template {path}: it names no 'messages', so it would drop every prompt; give a "
                         "template in Jinja, for example plain_turns.jinja")
    return template


# ------------------------------------------------------------------------------- the shape of a model

SHAPES = {  # of the bases that the README names, for a plan without network
    "Qwen/Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "OctoThinker/OctoThinker-8B-Hybrid-Base": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
}
FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "tie_word_embeddings")


@dataclass
class Shape:
    """The sizes of a model: numbers of parameters, and widths."""

    parameters: int
    layer: int  # parameters of one layer
    layers: int
    root: int  # parameters outside the layers: embedding, head, last norm
    hidden: int
    inner: int  # width of the MLP
    key_values: int  # numbers that one token keeps for attention, all layers together
    vocabulary: int


def model_config(folder: str):
    """The config.json of a folder or hub id."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise no_language_model(folder, error) from None


def planned_shape(model: str) -> Shape:
    """The sizes of a model that need not be there: a few bases are known, of others config.json is enough."""
    from transformers import AutoConfig

    if model in SHAPES:
        return shape_of(empty_model(model, AutoConfig.for_model(**dict(zip(FIELDS, SHAPES[model])))))
    folder = model_folder(model) if model in TOY_MODELS else model
    return shape_of(empty_model(folder, model_config(folder)))


def no_language_model(folder: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"--model {folder}: its config.json names no language model that transformers knows ({reason}); "
                      "use another")


def empty_model(folder: str, config):
    """The model without any weights. Refuses one that trainer or sampler could not use."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:  # wants its own code to be run; no language model
        raise no_language_model(folder, error) from None
    if not hasattr(lm, "lm_head") or not hasattr(getattr(lm, "model", None), "layers"):
        raise InputError(f"--model {folder}: {type(lm).__name__} has no model.layers and lm_head; use a model built "
                         "as Llama and Qwen are")
    return lm


def shape_of(lm) -> Shape:
    config = lm.config
    parameters = sum(weight.numel() for weight in lm.parameters())
    layer = sum(weight.numel() for weight in lm.model.layers[0].parameters())
    layers = len(lm.model.layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(parameters, layer, layers, parameters - layers * layer, config.hidden_size,
                 getattr(config, "intermediate_size", 4 * config.hidden_size),
                 2 * layers * config.num_key_value_heads * head_dim, config.vocab_size)


# ------------------------------------------------------------------------------- memory of a rank

TRAINING, AWAKE = ("old_logprobs", "update"), ("draw", "rollout", "self_score", "sync")  # what the sampler does
OTHER_GPU = 4.0  # GiB: CUDA contexts, NCCL's buffers, CUDA graphs. From the sources and others' reports
OTHER_CPU = 1.3  # GiB: Python with torch and vLLM, and what the C library's heap keeps


def longest_row(settings: dict) -> int:
    """Tokens: a group that is longer than --row_tokens gets a row of its own."""
    answers = max(settings["max_answer_tokens"], settings["max_referee_tokens"])
    return max(settings["row_tokens"], settings["max_prompt_tokens"] + settings["group"] * answers)


def update_pieces(shape: Shape, settings: dict, world: int) -> dict[str, float]:
    """What an update takes beside weights, gradients and moments, in GiB. Not all of it at one time."""
    tokens = longest_row(settings)
    size = 2 if settings["precision"] == "bfloat16" else 4  # bytes of a number in compute
    pieces = {
        "root": size * shape.root,  # embedding and head, gathered from all ranks
        "root gradient": (size + 4) * shape.root,  # whole, in the compute precision and in fp32
        "layer": (2 * size + 4 + 6 / world) * shape.layer,  # gathered, the next one too, and its gradient on its way
        "inputs": size * shape.layers * tokens * shape.hidden,  # of each layer, kept for the backward pass
        "working": size * tokens * (9 * shape.inner + 5 * shape.hidden),  # one layer, computed again
        "forward": size * tokens * (5 * shape.inner + 5 * shape.hidden),  # one layer, without a gradient
        "logits": 15 * min(settings["logit_chunk"], tokens) * shape.vocabulary,
        "block mask": 4 * tokens**2,  # while it is made, before the layers' work begins
    }
    return {name: value / 2**30 for name, value in pieces.items()}


def update_peak(pieces: dict[str, float]) -> float:
    """The largest sum of what an update needs at one time: at the head, in a layer, or at its end."""
    head = pieces["root"] + pieces["inputs"] + pieces["logits"]
    layer = pieces["root"] + pieces["inputs"] + pieces["layer"] + pieces["working"]
    return max(head, layer, pieces["root gradient"], pieces["block mask"])


def gpu_memory(shape: Shape, settings: dict, world: int, gpu_gib: float) -> dict[str, dict[str, float]]:
    """{what: {part: GiB}} of one rank from the second step on. "together" is the most at one time, no plain sum."""
    state = 4 * shape.parameters / world / 2**30
    pieces = update_pieces(shape, settings, world)
    weights = 2 * shape.parameters / 2**30
    largest = 6 * shape.vocabulary * shape.hidden / 2**30  # one whole tensor on its way, in fp32 and in bf16
    steady = {
        "parameters": fill(PARTS, state),
        "gradients": fill(("update",), state),
        "moments": fill(PARTS, 2 * state),
        "sampler weights": fill(AWAKE, weights),
        "KV cache and its work": fill(AWAKE, settings["gpu_memory"] * gpu_gib - weights),
        "CUDA, NCCL, graphs": fill(PARTS, OTHER_GPU),
    }
    passing = {
        "gathered weights": fill(TRAINING, pieces["root"] + pieces["layer"]) | {"sync": largest},
        "activations": {"old_logprobs": pieces["forward"], "update": pieces["inputs"] + pieces["working"]},
        "logits": fill(TRAINING, pieces["logits"]),
        "block mask": fill(TRAINING, pieces["block mask"]),
    }
    together = {}
    for part in PARTS:
        together[part] = sum(row.get(part, 0.0) for row in steady.values())
    forward = pieces["root"] + max(pieces["layer"] + pieces["forward"], pieces["logits"])
    together["old_logprobs"] += max(forward, pieces["block mask"])
    together["update"] += update_peak(pieces)
    together["sync"] += largest
    return {**steady, **passing, "together": together}


def fill(parts, value: float) -> dict[str, float]:
    return dict.fromkeys(parts, value)


def cpu_memory(shape: Shape, settings: dict, world: int) -> dict[str, dict[str, float]]:
    """The same for a rank on a CPU in fp32. Nothing sleeps there, and what was once taken is kept.

    Several ranks gather a layer once an update, so that all weights and gradients are whole on each of them.
    """
    state = 4 * shape.parameters / 2**30
    tokens = longest_row(settings)
    whole = 2 * state if world > 1 else 8 * (shape.root + 2 * shape.layer) / 2**30
    layers = 1 if settings["recompute"] else shape.layers
    layer = 4 * tokens * (4 * shape.inner + 6 * shape.hidden) / 2**30
    answer_tokens = tokens // 2  # about half of a row
    chunk = min(settings["logit_chunk"], answer_tokens) if settings["recompute"] else answer_tokens
    packed_head = 4 * shape.vocabulary * shape.hidden / 2**30  # vLLM's copy
    sizes = {
        "parameters": state / world,
        "gradients": state / world,
        "moments": 2 * state / world,
        "gathered weights": whole,
        "activations": layers * layer + 4 * shape.layers * tokens * shape.hidden / 2**30 * settings["recompute"],
        "logits": 8 * chunk * shape.vocabulary / 2**30,
        "sampler weights": state + packed_head,
        "KV cache": settings["cpu_cache"],
        "Python and its heap": OTHER_CPU,
    }
    rows = {name: fill(PARTS, size) for name, size in sizes.items()}
    return {**rows, "together": fill(PARTS, sum(sizes.values()))}


def cache_tokens(shape: Shape, settings: dict, world: int, gpu_gib: float | None) -> float:
    """Tokens whose keys and values the sampler's cache holds. Negative: not even the work beside it has room."""
    if gpu_gib is None:
        room = settings["cpu_cache"] * 2**30
        token = 4 * shape.key_values
    else:
        sequences = settings["batch"] // world * settings["group"]
        work = 4 * machine.SAMPLED_AT_ONCE * (2 * shape.inner + 4 * shape.hidden) + 16 * sequences * shape.vocabulary
        room = settings["gpu_memory"] * gpu_gib * 2**30 - 2 * shape.parameters - work
        token = 2 * shape.key_values
    return room / token


def cache_sequences(shape: Shape, settings: dict, world: int, gpu_gib: float | None) -> float:
    """How many answers of full length, and their prompts, the sampler's cache holds at a time."""
    answer = max(settings["max_answer_tokens"], settings["max_referee_tokens"])
    prompt = settings["max_prompt_tokens"] / settings["group"]
    return max(0.0, cache_tokens(shape, settings, world, gpu_gib)) / (prompt + answer)


def longest_to_cache(settings: dict) -> int:
    """Tokens that the cache must hold, else vLLM does not start: one longest sequence, in blocks of 32 at most.

    One block it holds back.
    """
    return -(-flags.longest_sequence(SimpleNamespace(**settings)) // 32) * 32 + 32


# ------------------------------------------------------------------------------- time of a step

# Rates of one H100, stated, not measured by us. The cost formula and where they come from: docs/gpu.md.
MATMUL = 989e12  # FLOP a second of bf16, by the data sheet
BANDWIDTH = 3.35e12  # bytes a second, by the data sheet
UPDATE_SHARE, FORWARD_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.30, 0.25, 0.5, 0.7  # of these two, reached
DECODE_OVERHEAD = 0.004  # seconds of a decode step outside the model
SYNC_SECONDS, GATHER = 2.0, 100e9  # a wake-up; bytes a second of weights gathered and loaded


def decode_seconds(shape: Shape, answers: int, mean_tokens: float, longest: float, context: float) -> float:
    """Seconds in which one GPU samples `answers` answers at a time, until the longest of them ends.

    A decode step reads all weights once, and the keys and values of every answer that still runs.
    """
    weights, cache = 2 * shape.parameters, 2 * shape.key_values * (context + mean_tokens / 2)
    full = (weights + answers * cache) / (DECODE_SHARE * BANDWIDTH) + DECODE_OVERHEAD
    last = weights / (DECODE_SHARE * BANDWIDTH) + DECODE_OVERHEAD
    return mean_tokens * full + (longest - mean_tokens) * last


def step_seconds(shape: Shape, world: int, kinds: list[tuple[int, int, float, float, int]], judged: tuple[int, float],
                 minibatches: int, trained: float = 1.0) -> dict[str, float]:
    """Seconds of the parts that cost anything, on so many H100.

    kinds: (prompts, G, prompt tokens, mean answer tokens, limit of an answer) of each kind of a batch.
    judged: (judgements, tokens of their prompts). trained: share of the groups that have a signal.
    """
    answers = sum(prompts * group for prompts, group, *_ in kinds)
    prompt_tokens = sum(prompts * tokens for prompts, _, tokens, _, _ in kinds)
    answer_tokens = sum(prompts * group * mean for prompts, group, _, mean, _ in kinds)
    longest = max(limit for *_, limit in kinds)
    prefill = 2 * shape.parameters / (PREFILL_SHARE * MATMUL * world)
    rollout = prompt_tokens * prefill + decode_seconds(
        shape, answers / world, answer_tokens / answers, longest, prompt_tokens / max(1, sum(k[0] for k in kinds)))
    count, judge_tokens = judged
    judging = count * judge_tokens * prefill
    judging += decode_seconds(shape, count / world, 100, 400, judge_tokens) if count else 0.0
    flop = trained * (prompt_tokens + answer_tokens) * 2 * shape.parameters
    forward = flop / (FORWARD_SHARE * MATMUL * world)
    return {"rollout": rollout, "self_score": judging, "old_logprobs": forward * (minibatches - 1) / minibatches,
            "update": 3 * flop / (UPDATE_SHARE * MATMUL * world),
            "sync": SYNC_SECONDS + 4 * shape.parameters / GATHER}


ANSWER_SHARE = 0.4  # of its limit is the mean length of an answer; measured runs of others: .2 to .5
PROMPT_SHARE = {"preference": 0.4, "reasoning": 0.05, "instruction": 0.05}  # of --max_prompt_tokens


def planned_seconds(shape: Shape, settings: dict, world: int) -> dict[str, float]:
    """`step_seconds` of these settings, after warm-up, all groups with a signal."""
    counts = mix_counts(settings["mix"], settings["batch"], warmup=False)
    kinds = []
    for kind, prompts in counts.items():
        limit = settings["max_referee_tokens"] if kind == "preference" else settings["max_answer_tokens"]
        if prompts:
            kinds.append((prompts, settings["group"], PROMPT_SHARE[kind] * settings["max_prompt_tokens"],
                          ANSWER_SHARE * limit, limit))
    return step_seconds(shape, world, kinds, planned_judging(settings, counts["instruction"]), settings["minibatches"])


def planned_judging(settings: dict, prompts: int) -> tuple[int, float]:
    """(K G / n judgements of each prompt, tokens of theirs): n answers are listed, and cut where they do not fit.

    >>> planned_judging({"group": 8, "judge_list": 2, "judgements": 4, "max_answer_tokens": 500,
    ...                  "max_prompt_tokens": 1000, "max_judge_tokens": 9999}, prompts=10)
    (160, 450.0)
    """
    listed = settings["judge_list"] or settings["group"]
    instruction = PROMPT_SHARE["instruction"] * settings["max_prompt_tokens"]
    tokens = listed * ANSWER_SHARE * settings["max_answer_tokens"] + instruction
    return prompts * settings["judgements"] * settings["group"] // listed, min(tokens, settings["max_judge_tokens"])


# ------------------------------------------------------------------------------- does it fit, and what to change

LEAST_SEQUENCES = 4  # that the cache must hold, else the sampler works one answer after another


def does_not_fit(shape: Shape, settings: dict, world: int, gpu_gib: float) -> str:
    """"" or what is too large: a part of the step, or too small a cache."""
    together = gpu_memory(shape, settings, world, gpu_gib)["together"]
    worst = max(PARTS, key=lambda part: together[part])
    if together[worst] > gpu_gib:
        return f"part {worst} needs {together[worst]:.1f} GiB of a GPU with {gpu_gib:.1f} GiB"
    return cache_too_small(shape, settings, world, gpu_gib)


def cache_too_small(shape: Shape, settings: dict, world: int, gpu_gib: float | None) -> str:
    """"" or how much less the sampler's cache holds than it must."""
    tokens, longest = cache_tokens(shape, settings, world, gpu_gib), longest_to_cache(settings)
    if tokens < longest:
        return (f"the sampler's cache holds {max(0.0, tokens):.0f} tokens, and the longest prompt with its answer may "
                f"take {longest} (--max_judge_tokens, --max_prompt_tokens)")
    sequences = cache_sequences(shape, settings, world, gpu_gib)
    if sequences < LEAST_SEQUENCES:
        return f"the sampler's cache holds {sequences:.1f} answers of full length"
    return ""


def what_to_change(shape: Shape, settings: dict, world: int, gpu_gib: float) -> str:
    """The nearest choice that fits: other flags on these GPUs, or else more GPUs."""
    splits = [ranks for ranks in (world * 2**n for n in range(7))
              if settings["batch"] % (ranks * settings["minibatches"]) == 0]  # flags.check refuses the others
    for ranks in splits:
        for row_tokens in (settings["row_tokens"], 8192, 4096, 2048):
            for share in (settings["gpu_memory"], 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
                for chunk in (settings["logit_chunk"], 256):
                    changed = dict(gpu_memory=share, row_tokens=min(row_tokens, settings["row_tokens"]),
                                   logit_chunk=min(chunk, settings["logit_chunk"]))
                    if not does_not_fit(shape, settings | changed, ranks, gpu_gib):
                        flags = [f"--{name} {value}" for name, value in changed.items() if value != settings[name]]
                        if ranks != world:
                            flags.append(f"{ranks} GPUs")
                        return " and ".join(flags)
    longest = settings["max_prompt_tokens"] + settings["group"] * settings["max_answer_tokens"]
    return (f"nothing fits on up to {max(splits, default=world)} GPUs, over which --batch splits: one packed "
            f"group may take {longest} tokens and a sequence in the sampler {longest_to_cache(settings)}, so lower "
            "--max_answer_tokens, --max_prompt_tokens or --max_judge_tokens, or take a smaller model or larger GPUs")


# ------------------------------------------------------------------------------- checks

MOST_PADDED = 1024  # the largest logit bias that vLLM's kernel on a GPU takes


def check_model(folder: str, vocabulary: int, tokens: int) -> Shape:
    """The sizes of a model. Refuses one that trainer or sampler could not use, before weights are loaded.

    vocabulary: the tokenizer's size. tokens: the longest sequence.
    """
    from safetensors import SafetensorError, safe_open

    config = model_config(folder)
    lm = empty_model(folder, config)
    if vocabulary > config.vocab_size:
        raise InputError(f"--model {folder}: its tokenizer has {vocabulary} tokens and the model {config.vocab_size}: "
                         "give the tokenizer that belongs to it")
    if config.vocab_size - vocabulary > MOST_PADDED:
        raise InputError(f"--model {folder}: the model has {config.vocab_size} token ids and its tokenizer only "
                         f"{vocabulary}. The sampler forbids the others one by one, and takes {MOST_PADDED} at most: "
                         f"cut the embedding (model.resize_token_embeddings({vocabulary})), save it, use that")
    longest = getattr(config, "max_position_embeddings", tokens)
    if tokens > longest:
        raise InputError(f"--model {folder} reads {longest} tokens, and the longest prompt with its answer may have "
                         f"{tokens}: lower --max_judge_tokens, --max_prompt_tokens, --max_answer_tokens or "
                         "--max_referee_tokens")
    for path in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):  # reads the header, and compares it with the size
                pass
        except SafetensorError as error:
            raise InputError(f"{path}: damaged or cut off ({error}); copy it again") from None
    return shape_of(lm)


def check_start(folder: str, vocabulary: int, tokens: int, settings: dict) -> None:
    """Refuse what would fail later: a model that cannot be used, settings that this machine's memory cannot hold."""
    shape = machine.on_rank_0("reading the model", lambda: check_model(folder, vocabulary, tokens))
    world = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    fault, faults = "", [""] * world
    try:
        check_memory(shape, settings, world, here, *machine.free_gib())
    except InputError as error:
        fault = str(error)
    dist.all_gather_object(faults, fault)  # every node and GPU has its own memory, and all ranks must stop together
    if any(faults):
        raise InputError(max(faults))


def enough_cache(shape: Shape, settings: dict) -> float:
    """GiB of a CPU's cache, rounded up to a tenth, for the longest sequence and for the least number of answers."""
    one = cache_tokens(shape, settings | {"cpu_cache": 1.0}, 1, None)
    answers = cache_sequences(shape, settings | {"cpu_cache": 1.0}, 1, None)
    return math.ceil(10 * max(longest_to_cache(settings) / one, LEAST_SEQUENCES / answers)) / 10


def node_memory(shape: Shape, settings: dict, nproc: int, nodes: int) -> float:
    """GiB that the ranks of one machine without GPUs take together."""
    return nproc * cpu_memory(shape, settings, nproc * nodes)["together"]["update"]


def loading_memory(shape: Shape, here: int) -> float:
    """GiB of a GPU node's own memory: each of its ranks reads the whole model in bf16 before it keeps its share."""
    return here * (2 * shape.parameters / 2**30 + 5)


def check_memory(shape: Shape, settings: dict, world: int, here: int, gpu_gib: float | None, host_gib: float) -> None:
    """here: ranks on this machine. gpu_gib: of one GPU; None on a CPU. host_gib: free in this machine."""
    if gpu_gib is not None:
        reason = does_not_fit(shape, settings, world, gpu_gib)
        if reason:
            raise InputError(f"{world} GPUs, {shape.parameters / 1e9:.1f}B parameters: {reason}: use "
                             f"{what_to_change(shape, settings, world, gpu_gib)} (python urpo.py --plan shows all)")
        loading = loading_memory(shape, here)
        if loading > host_gib:
            raise InputError(f"{here} ranks of this node load {loading:.0f} GiB into its own memory, and "
                             f"{host_gib:.0f} GiB are free: use a node with more, or a smaller model")
        return
    reason = cache_too_small(shape, settings, world, None)
    if reason:
        raise InputError(f"--cpu_cache {settings['cpu_cache']}: {reason}: use --cpu_cache "
                         f"{enough_cache(shape, settings)}, or shorter sequences")
    needed = node_memory(shape, settings, here, world // here)
    if needed > host_gib:
        fitting = here
        while fitting and node_memory(shape, settings, fitting, world // here) > host_gib:
            fitting -= 1
        raise InputError(f"{here} ranks of a {shape.parameters / 1e6:.0f}M model need about {needed:.1f} GiB and "
                         f"{host_gib:.1f} GiB are free: use --nproc_per_node={fitting}, or a smaller model or "
                         "--row_tokens where that is 0")


# ------------------------------------------------------------------------------- python urpo.py --plan


def split_arguments(arguments: list[str]):
    """(what belongs to the plan, the other arguments). Its flags are refused where a run would ignore them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--nproc", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu_gib", type=float, default=0.0)
    names = [argument.partition("=")[0] for argument in arguments]
    for flag in ("--nproc", "--nodes", "--gpu_gib"):
        if flag in names and "--plan" not in names:
            raise InputError(f"{flag}: no setting of a run, it belongs to --plan; give --plan too, or leave it out "
                             "(torchrun's --nproc_per_node and --nnodes start ranks)")
    own, rest = parser.parse_known_args(arguments)
    if (own.gpu_gib or own.plan and machine.missing_gpu()) and "--preset" not in names:
        rest += ["--preset", "paper"]
    return own, rest


def ranks(asked, preset: str) -> int:
    """Of the plan; without one, of this run."""
    if not asked.plan:
        return int(os.environ.get("WORLD_SIZE", 1))
    asked.nproc = asked.nproc or (8 if preset == "paper" else 2)
    return asked.nproc * asked.nodes


def show(settings: dict, asked) -> str:
    """The plan as text. Without --gpu_gib: the GPU here, or one of 80 GB (79 GiB) where the preset wants GPUs."""
    here, host = machine.free_gib()
    on_gpu = bool(asked.gpu_gib) or here is not None or settings["preset"] == "paper"
    gpu_gib = (asked.gpu_gib or here or 79.0) if on_gpu else None
    world = ranks(asked, settings["preset"])
    nproc, nodes = asked.nproc, asked.nodes
    shape = planned_shape(settings["model"])
    rows = gpu_memory(shape, settings, world, gpu_gib) if on_gpu else cpu_memory(shape, settings, world)
    place = f"{gpu_gib:.0f} GiB each" if on_gpu else f"{host:.0f} GiB free in all"
    lines = [f"{settings['model']}: {shape.parameters / 1e9:.2f}B parameters on {nodes} x {nproc} ranks, {place}", "",
             f"{'GiB of one rank':22}" + " ".join(f"{part:>12}" for part in PARTS)]
    for name, row in rows.items():
        cells = " ".join(f"{row[part]:12.2f}" if row.get(part) else f"{'-':>12}" for part in PARTS)
        lines.append(f"{name:22}{cells}")
    sequences = cache_sequences(shape, settings, world, gpu_gib)
    loading = loading_memory(shape, nproc) if on_gpu else nproc * rows["together"]["update"]
    lines += ["", f"cache of a rank: {sequences:.0f} answers of full length at a time, of "
              f"{settings['batch'] // world * settings['group']} a step",
              f"longest packed row: {longest_row(settings)} tokens",
              f"host memory of a node: {loading:.0f} GiB; disk: {14 * shape.parameters / 1e9:.1f} GB a checkpoint"]
    lines += ["", *time_lines(shape, settings, world, on_gpu), ""]
    lines += [verdict(shape, settings, nproc, nodes, gpu_gib, host)]
    return "\n".join(lines)


def time_lines(shape: Shape, settings: dict, world: int, on_gpu: bool) -> list[str]:
    if not on_gpu:
        return ["time: docs/speed.md has a formula with rates that were measured on a CPU"]
    seconds = planned_seconds(shape, settings, world)
    total = sum(seconds.values())
    parts = ", ".join(f"{part} {value:.0f}" for part, value in seconds.items())
    return [f"a step: about {total:.0f} s on H100s, within a factor of two ({parts})",
            f"the run: {settings['steps'] * total / 3600:.0f} hours for {settings['steps']} steps. The rates are "
            "stated in plan.py and compared with published steps in docs/gpu.md"]


def verdict(shape: Shape, settings: dict, nproc: int, nodes: int, gpu_gib: float | None, host: float) -> str:
    world = nproc * nodes
    if gpu_gib is None:
        needed = node_memory(shape, settings, nproc, nodes)
        reason = cache_too_small(shape, settings, world, None)
        if reason:
            return f"does NOT fit: {reason}. Use --cpu_cache {enough_cache(shape, settings)}"
        return f"all ranks of a node: {needed:.1f} GiB, " + ("which fits" if needed <= host else "which does NOT fit")
    reason = does_not_fit(shape, settings, world, gpu_gib)
    return f"does NOT fit: {reason}. Use {what_to_change(shape, settings, world, gpu_gib)}" if reason else "it fits"
