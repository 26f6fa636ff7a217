"""Does the sampler hold the trainer's weights? Every tensor is compared after every sync, by a sketch of it.

A sketch of a matrix is its product with a fixed random vector: one number a row. It moves when any number of the
matrix does, or when two matrices, rows or columns change places, and it costs what one token costs. The sampler may
keep several matrices in one, or in a form that only multiplication reads: their sketches can be compared all the same.
Drift cannot see as much: with bf16 its noise is .02 nats a token, and a sampler one small step behind moves it by .008.
"""
import math
from functools import lru_cache

import torch
from torch import Tensor, nn

# The largest relative distance of two sketches. Rounding in fp32 makes 6e-7 of SmolLM2, and grows with the root of a
# matrix's width. An AdamW step at a rate of 1e-6 makes 1e-5 or more.
LARGEST = 4e-6


@lru_cache(maxsize=16)
def random_vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator).to(device, dtype)


def sketch(weight: Tensor) -> Tensor:
    """One number for each row of a matrix. A vector stands for itself.

    Of bf16 in fp64, which rounds nothing away: wide matrices on a GPU would else need a wider limit. Of fp32 in fp32,
    as the sampler of a CPU multiplies.

    >>> a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> torch.equal(sketch(a.flip(0)), sketch(a).flip(0)), torch.allclose(sketch(a.flip(1)), sketch(a))
    (True, False)
    """
    if weight.ndim == 1:
        return weight.float()
    dtype = torch.float64 if weight.dtype == torch.bfloat16 else torch.float32
    vector = random_vector(weight.shape[1], dtype, weight.device)
    return torch.cat([rows.to(dtype) @ vector for rows in weight.split(2048)])  # never a whole copy


def sketched(weights, dtype: torch.dtype, sketches: dict[str, Tensor]):
    """The trainer's (name, tensor) pairs as they pass by on their way to the sampler, which holds them in `dtype`."""
    for name, weight in weights:
        sketches[name] = sketch(weight.to(dtype))
        yield name, weight


def sampler_sketches(model: nn.Module) -> dict[str, tuple[list[str], Tensor]]:
    """Of a model of vLLM: {its name of a tensor: (the trainer's names of its parts, its sketch)}.

    On a CPU vLLM multiplies by a packed copy and keeps no other, but for the head and the embedding: then the copy is
    asked for its product. The embedding is read by row, and so its plain tensor counts.
    """
    held = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.numel():
            held[name] = weight.detach()
    sketches = {}
    for name, weight in held.items():
        parts = trainer_names(name, model.packed_modules_mapping)
        sketches[name] = (parts, sketch(weight))
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear") and name != "model.embed_tokens":
            is_head = hasattr(module, "embedding_dim")
            columns = module.embedding_dim if is_head else module.input_size_per_partition
            vector = random_vector(columns, torch.float32, torch.device("cpu"))
            product = module.cpu_linear(vector[None], module.weight, None)[0]
            parts = trainer_names(f"{name}.weight", model.packed_modules_mapping)
            sketches[f"{name}.weight, packed"] = (parts, product)
    return sketches


def trainer_names(name: str, packed: dict[str, list[str]]) -> list[str]:
    """What the trainer calls the parts of one tensor of the sampler.

    >>> trainer_names("model.layers.0.mlp.gate_up_proj.weight", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight']
    """
    path, _, kind = name.rpartition(".")
    before, dot, module = path.rpartition(".")
    return [f"{before}{dot}{part}.{kind}" for part in packed.get(module, [module])]


def differences(trainer: dict[str, Tensor], sampler: dict[str, tuple[list[str], Tensor]]) -> dict[str, float]:
    """{the sampler's name of a tensor: its relative distance from the trainer's}; infinite where one has no other."""
    trainer = dict(trainer)
    trainer.setdefault("lm_head.weight", trainer["model.embed_tokens.weight"])  # then the head is the embedding
    compared = {"lm_head.weight"}
    found = {}
    for name, (parts, own) in sampler.items():
        compared.update(parts)
        found[name] = math.inf
        if trainer.keys() >= set(parts):
            expected = torch.cat([trainer[part] for part in parts])
            if len(own) >= len(expected):  # the sampler pads the vocabulary
                distance = (own[: len(expected)].to(expected.device) - expected).norm()
                relative = (distance / expected.norm().clamp(min=1e-30)).item() if distance else 0.0
                found[name] = relative if math.isfinite(relative) else math.inf
    for name in trainer.keys() - compared:
        found[name] = math.inf
    return found
