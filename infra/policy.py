"""The policy: a language model whose forward pass gives log-probs of a packed row, sharded over all ranks by FSDP2.

Tensor names: N answer tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from infra.ranks import DEVICE, GPU, InputError, all_reduce, exchange, free_gib, ranks_here
from infra.rows import Example, Row, block_mask, build_row, row_attention

LOGIT_CHUNK = 1024  # answer tokens whose logits are made at once
RECOMPUTE = GPU  # layers and logits again in the backward pass: a third more work, and activations that fit a card
MOST_PADDED = 1024  # token ids that vLLM's kernel on a GPU can forbid, at most
# Large pages for large tensors: a CPU's update takes 1/8 less time. Torch reads this at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ------------------------------------------------------------------------------- a model's folder


def check_folder(model: str) -> str:
    """A hub id as it is, or a local folder that holds a model. Raises InputError that says what is missing."""
    if model.startswith((".", "/", "toy/")) or model.count("/") > 1 or os.path.exists(model):  # a hub id has one slash
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise InputError(f"{model}: no model here (no config.json); give a folder that save_pretrained wrote, or "
                             "toy/model, which `python -m lab.seed` writes")
        if not any(Path(model).glob("*.safetensors")):
            raise InputError(f"{model}: no *.safetensors here, and no other format is read, since a pickle "
                             "(pytorch_model.bin) can run code; save it as safetensors where you trust it")
    return model


def model_config(folder: str):
    """The config.json of a folder or hub id."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise no_language_model(folder, error) from None


def no_language_model(folder: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"--model {folder}: no language model that transformers knows, here or on the hub ({reason}); "
                      "check the name and the network, or use another")


def empty_model(folder: str, config):
    """The model without any weights. Refuses one that is not built as ours must be."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:  # wants its own code to be run; no language model
        raise no_language_model(folder, error) from None
    if not hasattr(lm, "lm_head") or not hasattr(getattr(lm, "model", None), "layers"):
        raise InputError(f"--model {folder}: {type(lm).__name__} has no model.layers and lm_head; use a model built "
                         "as Llama and Qwen are")
    return lm


def check_model(folder: str, *, vocabulary: int, tokens: int, tensor_parallel: int = 1) -> None:
    """Refuse a model that trainer or sampler could not use, before its weights are loaded.

    vocabulary: the tokenizer's size. tokens: the longest sequence. tensor_parallel: ranks that share a sampler.
    """
    from safetensors import SafetensorError, safe_open

    config = model_config(folder)
    empty_model(folder, config)
    if vocabulary > config.vocab_size:
        raise InputError(f"--model {folder}: its tokenizer has {vocabulary} tokens and the model {config.vocab_size}: "
                         "give the tokenizer that belongs to it")
    if config.vocab_size - vocabulary > MOST_PADDED:
        raise InputError(f"--model {folder}: the model has {config.vocab_size} token ids and its tokenizer only "
                         f"{vocabulary}. The sampler forbids the others one by one, and takes {MOST_PADDED} at most: "
                         f"cut the embedding (model.resize_token_embeddings({vocabulary})), save it, use that")
    check_attention(folder, config, tokens)
    check_heads(folder, config, tensor_parallel)
    for path in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):  # reads the header, and compares it with the size
                pass
        except SafetensorError as error:
            raise InputError(f"{path}: damaged or cut off ({error}); copy it again") from None


def check_attention(folder: str, config, tokens: int) -> None:
    """Refuse what a packed row or our log-probs leave out, caps and scales of logits, and sequences that are too long.

    To a window that slides a packed row would show more than the window.
    """
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1):
            raise InputError(f"--model {folder}: its {name} is {getattr(config, name)}, which our log-probs leave out; "
                             "use a model without it")
    limits = ["max_position_embeddings"]
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    if "sliding_attention" in layers and getattr(config, "use_sliding_window", True):
        limits.append("sliding_window")
    for name in limits:
        longest = getattr(config, name, None) or tokens
        if tokens > longest:
            raise InputError(f"--model {folder}: its {name} is {longest}, and the longest prompt with its answer may "
                             f"have {tokens} tokens: lower --max_prompt_tokens, --max_answer_tokens, "
                             "--max_referee_tokens and, in training, --max_judge_tokens, or use another model")


def check_heads(folder: str, config, tensor_parallel: int) -> None:
    """Refuse a number of sharers of one sampler that its attention heads cannot be dealt to."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    fine = [ranks for ranks in range(1, heads + 1)
            if heads % ranks == 0 and (key_heads % ranks == 0 or ranks % key_heads == 0)]
    if tensor_parallel not in fine:
        raise InputError(f"--tensor_parallel {tensor_parallel}: {folder} has {heads} attention heads and {key_heads} "
                         f"of keys, which go to {', '.join(map(str, fine))} ranks")


def check_memory(folder: str, *, tensor_parallel: int = 1, offload: bool = False) -> None:
    """Refuse a model that cannot fit: its training state and the sampler's weights alone are larger than what is free.

    A lower bound, bytes a parameter of each rank: 16 / ranks for fp32 weights, gradient and AdamW's two moments, which
    `offload` keeps on the host, and the sampler's copy. `python -m lab.plan` counts the rest.
    """
    parameters = sum(weight.numel() for weight in empty_model(folder, model_config(folder)).parameters())
    gpu, host = free_gib()
    state, sampler = 16 * parameters / dist.get_world_size(), (2 if GPU else 4) * parameters / tensor_parallel
    on_gpu, on_host = (sampler, state) if offload else (sampler + state, 0)
    needs = [(on_gpu, gpu), (on_host * ranks_here(), host)]  # a machine's ranks share its memory
    if not GPU:
        needs = [((sampler + state) * ranks_here(), host)]
    fault = ""
    for needed, free in needs:
        if needed > free * 2**30:
            fault = (f"--model {folder}: {parameters / 1e6:.0f}M parameters take {needed / 2**30:.1f} GiB at least, "
                     f"and {free:.1f} GiB are free: use more ranks, --tensor_parallel or --offload, a smaller model, "
                     "or more memory (python -m lab.plan)")
    for found in exchange(fault):  # every node has its own memory, and all ranks must stop together
        if found:
            raise InputError(found)


# ------------------------------------------------------------------------------- log-probs of a row


class Policy(nn.Module):
    """The language model. Its forward pass gives the log-prob of every answer token of one packed row.

    This module is FSDP2's root, so that `forward` gathers and frees the embedding and the head by itself.
    vocabulary: the tokenizer's size. compute: the dtype of a forward pass; master weights are fp32.
    """

    def __init__(self, lm, vocabulary: int, temperature: float, compute: torch.dtype, recompute: bool):
        super().__init__()
        self.lm, self.vocabulary, self.temperature = lm, vocabulary, temperature
        self.compute, self.recompute = compute, recompute

    def forward(self, row: Row) -> Tensor:
        """Row -> log pi(token) [N], nats, fp32."""
        mask = block_mask(row) if GPU else None
        output = self.lm.model(input_ids=row.ids_T[None], position_ids=row.position_T[None], attention_mask=mask,
                               row=row, use_cache=False)
        hidden_NH = output.last_hidden_state[0, row.source_N]
        logprobs = []
        for chunk in zip(hidden_NH.split(LOGIT_CHUNK), row.target_N.split(LOGIT_CHUNK)):
            if self.recompute:  # all logits together, N x V, would be the largest tensor of all
                logprobs.append(checkpoint(self.token_logprobs, *chunk, use_reentrant=False))
            else:
                logprobs.append(self.token_logprobs(*chunk))
        return torch.cat(logprobs)

    def plain_logprobs(self, ids: list[int], answer: int) -> Tensor:
        """The log-probs of the last `answer` tokens of one sequence, as transformers computes them by itself."""
        ours = self.lm.config._attn_implementation
        self.lm.set_attn_implementation("sdpa")
        logits_NV = self.lm(input_ids=torch.tensor([ids], device=DEVICE), use_cache=False).logits[0, -answer - 1 : -1]
        self.lm.set_attn_implementation(ours)
        logits_NV = logits_NV[:, : self.vocabulary].float() / self.temperature
        return -nn.functional.cross_entropy(logits_NV, torch.tensor(ids[-answer:], device=DEVICE), reduction="none")

    def token_logprobs(self, hidden_NH: Tensor, target_N: Tensor) -> Tensor:
        # Padded vocabulary rows exist in the head but are never sampled, so they are no part of the softmax.
        logits_NV = self.lm.lm_head(hidden_NH)[:, : self.vocabulary].float()
        if self.temperature != 1:
            logits_NV = logits_NV / self.temperature
        return -nn.functional.cross_entropy(logits_NV, target_N, reduction="none")


def load_policy(folder: str, *, vocabulary: int, precision: str, temperature: float = 1.0,
                recompute: bool = RECOMPUTE, offload: bool = False) -> Policy:
    """The policy of a model's folder, sharded over all ranks: fp32 master weights, compute in `precision`.

    offload: weights, gradients and moments stay in the host's memory, and a layer comes to the GPU while it is at work.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method
    from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    AttentionInterface.register("row_attention", row_attention)
    with no_init_weights():
        lm = AutoModelForCausalLM.from_config(model_config(folder), dtype=torch.float32, trust_remote_code=False,
                                              attn_implementation="flex_attention" if GPU else "row_attention")
    lm.tie_weights()
    with suppress(OSError):  # not every model has one
        lm.generation_config = GenerationConfig.from_pretrained(folder)
    try:
        lm.generation_config.validate(strict=True)  # as the first checkpoint would
    except ValueError as error:
        raise InputError(f"--model {folder}: its generation_config.json contradicts itself, so no checkpoint could be "
                         f"written ({' '.join(str(error).split())[:200]}): correct or remove it") from None
    lm.train()
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = shard_policy(Policy(lm, vocabulary, temperature, getattr(torch, precision), recompute), offload)
    read_weights(policy, folder)
    register_fsdp_forward_method(policy, "plain_logprobs")
    return policy


@torch.no_grad()
def read_weights(policy: Policy, folder: str) -> None:
    """From the files of a folder or hub id, the rows of every tensor that this rank keeps, and no others."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    try:
        folder = folder if os.path.isdir(folder) else snapshot_download(folder, allow_patterns=["model*.safetensors"])
    except OSError as error:
        raise InputError(f"--model {folder}: no weights from the hub ({error}): check network and disk") from None
    files = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        files |= dict.fromkeys(file.keys(), file)
    for name, weight in policy.named_parameters():
        name, rows = name.removeprefix("lm."), len(weight)
        found = files[name].get_slice(name) if name in files else None
        if not found or found.get_shape() != list(weight.shape):
            raise InputError(f"{folder}: its files hold {found and found.get_shape()} for {name}, and this model needs "
                             f"{list(weight.shape)}: save it anew with save_pretrained")
        own, share = weight.to_local(), -(-rows // dist.get_world_size())  # FSDP2 deals rows out in order
        first = min(dist.get_rank() * share, rows)
        own.copy_(found[first : first + len(own)])


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Log-probs of one packed row of two groups against those of plain transformers, a sequence at a time.

    This finds what a model's attention or head does and ours does not. Raises FloatingPointError. After the optimiser
    is built: FSDP's first forward pass replaces the weights that it must hold.
    """
    limit = 1e-4 if policy.compute == torch.float32 else 0.1  # nats, the mean of ten tokens: in bf16 one may be .2
    groups = [Example([5, 6, 7, 8, 9], [[10, 11, 12], [13, 14]]), Example([15, 16, 17], [[18, 19], [20, 21, 22]])]
    packed_N = policy(build_row(groups, 1.0))
    plain = []
    for group in groups:
        for answer in group.answers:
            plain.append(policy.plain_logprobs(group.prompt_ids + answer, len(answer)))
    for layer in policy.lm.model.layers:  # without a backward pass they stay whole, which the optimiser does not know
        layer.reshard()
    distance = all_reduce((packed_N - torch.cat(plain)).abs().mean(), dist.ReduceOp.MAX)
    if not distance <= limit:
        raise FloatingPointError(f"packed rows: this model's log-probs differ by {distance:.3f} nats from those of "
                                 "plain transformers: its attention or head does what ours does not; use another model")


# ------------------------------------------------------------------------------- shards


def shard_policy(policy: Policy, offload: bool = False) -> Policy:
    """Each layer, then the rest, over all ranks. offload: what is sharded stays in the host's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = dist.init_device_mesh(DEVICE, (dist.get_world_size(),))
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=policy.compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=GPU) if offload else OffloadPolicy(),
    }
    for layer in policy.lm.model.layers:  # several CPU ranks gather a layer once an update, since gloo is slow
        fully_shard(layer, reshard_after_forward=GPU or mesh.size() == 1, **options)
    # The root frees its weights after a forward pass too. Otherwise a pass without gradient would leave the head
    # unsharded, and optimiser and sync would see a plain tensor in its place.
    return fully_shard(policy, reshard_after_forward=True, **options)


def accumulate(policy: Policy, rows: list[Row]):
    """The rows of one update, one after another; gradients are added up and meet those of other ranks at the end.

    A GPU reduces them after every row instead, since whole gradients would fill it.
    """
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        policy.set_requires_gradient_sync(GPU or last)
        policy.set_reshard_after_backward(GPU or dist.get_world_size() == 1 or last)
        yield row


def clip_gradient(policy: Policy, largest: float) -> float:
    """Scale the gradient to a norm of at most `largest`; returns its norm before that, over all ranks."""
    return nn.utils.clip_grad_norm_(policy.parameters(), largest).full_tensor().item()


def updates_done(optimizer) -> int:
    """How many steps an optimiser has made. It counts them itself, and its checkpoint keeps the count."""
    for state in optimizer.state.values():
        return int(state["step"].item())
    return 0


def full_weights(policy: Policy):
    """(name, whole tensor) one at a time, by the checkpoint's names, in compute precision. All ranks must iterate."""
    for name, weight in policy.state_dict().items():
        if name != "lm.lm_head.weight" or not policy.lm.config.tie_word_embeddings:
            own = weight.to_local().detach().to(DEVICE, policy.compute)  # before it travels: half the bytes, by NCCL
            shards = DTensor.from_local(own, weight.device_mesh, weight.placements, shape=weight.shape,
                                        stride=weight.stride())
            yield name.removeprefix("lm."), shards.full_tensor()
