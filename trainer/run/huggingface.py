"""Exact exchange of weights with transformers' GPT2LMHeadModel, in both directions, and from nanoGPT.

That model fuses q, k and v into `c_attn` and stores its matrices as (in, out), transposed against torch's linear
layers; ours keeps them apart and pads the vocabulary with zero rows. nanoGPT fuses too, but has linear layers, and may
have no biases; to transformers, which always has them, such a model goes with biases of zero.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.model import GPTConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

PLAIN = {"norm1": "ln_1", "norm2": "ln_2", "attn.o": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old checkpoints carry along
PREFIXES = ("_orig_mod.", "module.", "model.", "transformer.")  # of torch.compile, DDP, wrappers, and the model itself


def hf_config(config: GPTConfig, vocab_size: int, seq_len: int, eos: int | None = None) -> "GPT2Config":
    """The transformers configuration of the same architecture; eos: by default the vocabulary's last token.

    Raises ValueError where GPT-2 cannot express it."""
    check_gpt2(config)
    from transformers import GPT2Config  # here, because it takes seconds and training needs none of it

    eos = vocab_size - 1 if eos is None else eos
    return GPT2Config(
        vocab_size=vocab_size, n_positions=seq_len, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=eos, eos_token_id=eos,
        pad_token_id=eos, architectures=["GPT2LMHeadModel"], dtype="float32",
    )  # fmt: skip


def check_gpt2(config: GPTConfig) -> None:
    """Raise ValueError, naming the setting, unless the architecture is GPT-2's."""
    if config._target_ != GPTConfig._target_:
        raise ValueError(f"model._target_={config._target_}: only {GPTConfig._target_} exchanges weights with "
                         "GPT2LMHeadModel")  # fmt: skip
    wanted = dict(position="learned", norm="layernorm", activation="gelu", tied=True, embed_norm=False,
                  qk_norm=False, attention_scale=None, softcap=None, param="standard")  # fmt: skip
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"model.{key}={getattr(config, key)}, but GPT2LMHeadModel has {key}={value}: "
                             "only models with GPT-2's architecture exchange weights with it")  # fmt: skip


def to_hf(state_dict: dict[str, Tensor], config: GPTConfig, vocab_size: int) -> dict[str, Tensor]:
    """Our whole (unsharded) state dict → GPT2LMHeadModel's. Copies: the result shares no memory with the input.

    Raises ValueError where the architecture is not GPT-2's, KeyError where a tensor is missing."""
    check_gpt2(config)
    state = {name: tensor.detach() for name, tensor in state_dict.items()}
    result = {"transformer.wte.weight": state["wte.weight"][:vocab_size].clone()}
    result["lm_head.weight"] = result["transformer.wte.weight"]  # tied there too
    result["transformer.wpe.weight"] = state["wpe.weight"].clone()
    if not config.bias:
        state |= {name.removesuffix("weight") + "bias": weight.new_zeros(weight.shape[0])
                  for name, weight in state.items() if name.startswith(("blocks.", "norm."))}  # fmt: skip
    for kind in ("weight", "bias"):
        result[f"transformer.ln_f.{kind}"] = state[f"norm.{kind}"].clone()
        for i in range(config.n_layer):
            ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
            fused = torch.cat([state[f"{ours}.attn.{part}.{kind}"] for part in "qkv"])
            result[f"{theirs}.attn.c_attn.{kind}"] = _transposed(fused)
            for here, there in PLAIN.items():
                result[f"{theirs}.{there}.{kind}"] = _transposed(state[f"{ours}.{here}.{kind}"])
    return result


def from_hf(
    hf_state_dict: dict[str, Tensor], config: GPTConfig, vocab_size: int | None = None, seq_len: int | None = None
) -> dict[str, Tensor]:
    """GPT2LMHeadModel's, GPT2Model's or nanoGPT's state dict → ours, with the vocabulary padded to a multiple of 128.

    Args:
        vocab_size: rows of the token table that count; default: all.
        seq_len: positions that are taken; default: all.

    Raises ValueError where the architecture is not GPT-2's, where a tensor is missing or unknown, or where the head is
    not the token embedding."""
    check_gpt2(config)
    rest = {bare_name(name): tensor.detach() for name, tensor in hf_state_dict.items()
            if not name.endswith(CAUSAL_MASKS)}  # fmt: skip
    head = rest.pop("lm_head.weight", None)
    first = rest.get("h.0.attn.c_attn.weight")
    turn = _transposed if first is None or tuple(first.shape) == (config.n_embd, 3 * config.n_embd) else torch.clone

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"the weights hold no {name}: are they GPT-2's, with {config.n_layer} layers?")
        return rest.pop(name)

    table, positions = take("wte.weight"), take("wpe.weight")
    for key, tensor, least in (("data.tokenizer", table, vocab_size), ("train.seq_len", positions, seq_len)):
        if tensor.shape[1] != config.n_embd or (least or 0) > len(tensor):
            raise ValueError(f"model.n_embd={config.n_embd}, {key} of {least}: the weights have {list(tensor.shape)}")
    if head is not None and not torch.equal(head, table):
        raise ValueError("lm_head.weight differs from wte.weight: a model with an untied head cannot be taken over")
    table = table[:vocab_size]
    padding = 128 * math.ceil(table.shape[0] / 128) - table.shape[0]
    result = {"wte.weight": torch.cat([table, table.new_zeros(padding, table.shape[1])])}
    result["wpe.weight"] = positions[:seq_len].clone()
    for kind in ("weight", "bias") if config.bias else ("weight",):
        result[f"norm.{kind}"] = take(f"ln_f.{kind}").clone()
        for i in range(config.n_layer):
            fused = turn(take(f"h.{i}.attn.c_attn.{kind}"))
            for part, tensor in zip("qkv", fused.chunk(3), strict=True):
                result[f"blocks.{i}.attn.{part}.{kind}"] = tensor.clone()
            for here, there in PLAIN.items():
                result[f"blocks.{i}.{here}.{kind}"] = turn(take(f"h.{i}.{there}.{kind}"))
    if rest:
        raise ValueError(f"the weights hold {len(rest)} unknown tensors, such as {next(iter(rest))}: "
                         f"are they GPT-2's, with {config.n_layer} layers?")  # fmt: skip
    return result


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _transposed(tensor: Tensor) -> Tensor:
    """A contiguous copy (safetensors asks for it): (out, in) ↔ (in, out) for matrices, vectors as they are."""
    return (tensor.t() if tensor.ndim == 2 else tensor).clone(memory_format=torch.contiguous_format)
