"""Initial values of GPT's parameters: functions of (seed, name) alone."""

import math
from typing import Any

import torch
from torch import Tensor

from trainer.language_model import init_generator, init_tensor

INITS = ("gpt2", "fan_in", "torch", "muonh", "soap_muon")
MUONH = {"attn.o": 1.25, "mlp.proj": 3.0, "mlp.fc": 1.5}


def initial_value(config: Any, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole value of one parameter of a model with this GPTConfig, float32 on the CPU.

    gpt2: normal, 0.02, into the residual stream 0.02/sqrt(2 n_layer) (Radford et al. 2019, section 2.3, and its code).
    fan_in: normal, 1/sqrt(3 fan_in), as wide as torch's own linear layer draws; embeddings 0.02.
    The others are those of records of the speedrun's track 3 (KellerJordan/modded-nanogpt), otherwise as fan_in:
    torch (#2): torch's own linear layer, uniform within 1/sqrt(fan_in), biases too.
    muonh (#37): attn.o 1.25 times, mlp.proj 3 times, mlp.fc 1.5 times as wide.
    soap_muon (#44): as torch; mlp.fc smaller by up to 0.3 towards the last layer; gains 1 -+ 0.125, see ``signs``.

    Under muP these are the values at ``base_width``; at another width a block's matrices are as wide as 1/sqrt(fan_in)
    and everything else is as wide as there (Yang et al., arXiv 2203.03466, table 8).
    """
    value = standard_value(config, name, shape, seed)
    if config.width_ratio == 1 or (len(shape) == 1 and not name.endswith(".bias")):
        return value
    follows = config.init != "gpt2" and not name.startswith(("wte.", "wpe."))  # its standard width is 1/sqrt(fan_in)
    hidden = name.startswith("blocks.") and len(shape) > 1
    return value * config.width_ratio ** (0.5 * (follows - hidden))


def standard_value(config: Any, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The value in the standard parametrisation."""
    owner, kind = name.rpartition(".")[::2]
    matrix = owner.split(".", 2)[-1] if owner.startswith("blocks.") else owner  # such as attn.o
    zero = config.zero_init_proj and (matrix in ("attn.o", "mlp.proj") or owner == "lm_head")
    uniform = config.init in ("torch", "soap_muon") and owner.startswith("blocks.")
    if kind == "bias":
        return uniform_tensor(name, shape, seed, config.n_embd**-0.5) if uniform and not zero else torch.zeros(shape)
    if len(shape) == 1:
        return gains(config, owner, shape, seed)
    if zero:
        return torch.zeros(shape)
    if owner == "wte" and config.embed_norm and not config.tied:
        return init_tensor(name, shape, seed, 0.0, 1.0)
    if config.init == "gpt2" or owner in ("wte", "wpe"):
        residual = matrix in ("attn.o", "mlp.proj")
        return init_tensor(name, shape, seed, 0.0, 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
    if uniform:
        value = uniform_tensor(name, shape, seed, shape[1] ** -0.5)
        deeper = config.init == "soap_muon" and matrix == "mlp.fc" and config.n_layer > 1
        return value * (1 - 0.3 * layer_of(owner) / (config.n_layer - 1)) if deeper else value
    wider = MUONH.get(matrix, 1.0) if config.init == "muonh" else 1.0
    return init_tensor(name, shape, seed, 0.0, wider * (3 * shape[1]) ** -0.5)


def uniform_tensor(name: str, shape: torch.Size, seed: int, bound: float) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=init_generator(name, seed))


def layer_of(owner: str) -> int:
    return int(owner.split(".")[1])


def gains(config: Any, owner: str, shape: torch.Size, seed: int) -> Tensor:
    """1, but for soap_muon 1 - 0.125 s in a block's norm1 and 1 + 0.125 s in its norm2."""
    if config.init != "soap_muon" or not owner.startswith("blocks."):
        return torch.ones(shape)
    side = -0.125 if owner.endswith("norm1") else 0.125
    return 1 + side * signs(layer_of(owner), config.n_embd, config.head_dim, seed)


def signs(layer: int, width: int, head_dim: int, seed: int) -> Tensor:
    """-1 or 1 for every channel of a layer.

    From layer 6 on, layers come in pairs: in each head's channels the first of a pair has a number of ones that is
    half as far from the middle as chance had it, the second has as many minus ones, both in random order.
    """
    if layer < 6:
        return torch.randint(0, 2, (width,), generator=init_generator(f"blocks.{layer}.signs", seed)) * 2.0 - 1
    first = layer - layer % 2
    generator = init_generator(f"blocks.{first}.signs", seed)
    heads = []
    for _ in range(width // head_dim):
        drawn = int(torch.randint(0, 2, (head_dim,), generator=generator).sum())
        ones = round(head_dim / 2 + 0.5 * (drawn - head_dim / 2))
        orders = [torch.randperm(head_dim, generator=generator) for _ in range(2)]
        heads.append((orders[0] < ones) if layer == first else (orders[1] < head_dim - ones))
    return torch.cat(heads) * 2.0 - 1
