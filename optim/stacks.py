"""Stacks of equal matrices: their shape, and their owner's state joined and parted."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .polar import power_of_two


def matrix_shape(group: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., m, n] of a parameter: kernels [O, I, kh, kw] are one matrix [O, I·kh·kw], experts [E, m, n] are E."""
    is_stack = group["stack"] if group["stack"] is not None else len(shape) <= 3
    return tuple(shape) if is_stack or len(shape) == 2 else (shape[0], math.prod(shape[1:]))


def split_sizes(group: dict[str, Any], fan_out: int) -> tuple[int, ...]:
    """Rows of the blocks of one matrix, in order."""
    split: int | tuple[int, ...] = group["split"]
    if isinstance(split, tuple):
        return split
    count = fan_out // group["head_dim"] if group["head_dim"] else split
    return (fan_out // count,) * count


def block_shapes(group: dict[str, Any], shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(number of blocks, fan_out, fan_in) of a parameter, of every size that its blocks have: usually one."""
    return _block_shapes(group["split"], group["head_dim"], group["conv1d"], group["stack"], shape)


@lru_cache(maxsize=4096)  # asked several times a step
def _block_shapes(
    split: int | tuple[int, ...], head_dim: int | None, conv1d: bool, stack: bool | None, shape: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    group = {"split": split, "head_dim": head_dim, "conv1d": conv1d, "stack": stack}
    shape = matrix_shape(group, shape)
    fan_out, fan_in = (shape[-1], shape[-2]) if group["conv1d"] else (shape[-2], shape[-1])
    sizes = split_sizes(group, fan_out)
    return [(math.prod(shape[:-2]) * sizes.count(size), size, fan_in) for size in dict.fromkeys(sizes)]


def as_parameter(group: dict[str, Any], blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Blocks [k, fan_out, fan_in], all of a parameter, in its shape; a view where the blocks are contiguous."""
    if group["conv1d"]:
        *stack, m, n = matrix_shape(group, shape)
        return blocks.reshape(*stack, n, m).mT.reshape(shape)
    return blocks.reshape(shape)


def unpack_blocks(
    group: dict[str, Any], blocks: Tensor, shape: tuple[int, ...], unpack_into: Callable[[Tensor], None]
) -> None:
    """Fill ``blocks`` [k, m, n], those of m rows of a parameter that ``unpack_into`` writes whole."""
    if len(block_shapes(group, shape)) == 1:
        unpack_into(as_parameter(group, blocks, shape))
        return
    whole = blocks.new_empty(shape)
    unpack_into(whole)
    for block, part in zip(blocks, _blocks_of_size(group, whole, blocks.shape[1]), strict=True):
        block.copy_(part.reshape(block.shape))


def pack_blocks(group: dict[str, Any], blocks: Tensor, shape: tuple[int, ...], whole: Tensor | None) -> Tensor:
    """The reverse: a tensor like the parameter, of which ``whole`` is what blocks of other sizes have filled."""
    if len(block_shapes(group, shape)) == 1:
        return as_parameter(group, blocks, shape)
    whole = blocks.new_empty(shape) if whole is None else whole
    for block, part in zip(blocks, _blocks_of_size(group, whole, blocks.shape[1]), strict=True):
        part.copy_(block.reshape(part.shape))
    return whole


def _blocks_of_size(group: dict[str, Any], whole: Tensor, rows: int) -> list[Tensor]:
    parts = block_parts(group, whole, tuple(whole.shape), (0,) * whole.ndim)
    return [part for _, part in parts if len(part) == rows]


def block_parts(
    group: dict[str, Any], local: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]
) -> list[tuple[int, Tensor]]:
    """Of every block, the part that lies in ``local``, which begins at ``offset`` of a parameter of this shape: the
    first of its rows and a view [rows, ...], of no rows where nothing is here."""
    whole = matrix_shape(group, shape)
    stacked = len(whole) > 2
    if group["conv1d"] and not stacked and len(shape) > 2:  # a view: what is written into blocks is written into it
        local, offset = local.view(len(local), -1), offset[:1] + (0,)
    matrices = local.flatten(0, -3) if stacked else [local]
    at = offset[-1] if group["conv1d"] else offset[-2 if stacked else 0]
    sizes = split_sizes(group, whole[-1 if group["conv1d"] else -2])
    parts = []
    for matrix in matrices:
        rows, start = matrix.mT if group["conv1d"] else matrix, 0
        for size in sizes:
            parts.append((max(0, at - start), rows[max(0, start - at) : max(0, start + size - at)]))
            start += size
    return parts


def owner_shapes(
    owner_state: Callable[[tuple[int, int, int]], dict[str, tuple[int, ...]]],
    group: dict[str, Any],
    shape: tuple[int, ...],
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a parameter's state at its owner; names end with the blocks' size where there are several:
    {"row_mean_square.64": (1, 64), "row_mean_square.16": (2, 16)} for NorMuon and ``split=(64, 16, 16)``."""
    shapes = block_shapes(group, shape)
    if len(shapes) == 1:
        return owner_state(shapes[0])
    return {f"{key}.{of[1]}": size for of in shapes for key, size in owner_state(of).items()}


def block_state(
    state: dict[str, Tensor], group: dict[str, Any], shape: tuple[int, ...], rows: int
) -> dict[str, Tensor]:
    """What belongs to the blocks of so many rows, by the rule's own names."""
    if len(block_shapes(group, shape)) == 1:
        return state
    return {key.removesuffix(f".{rows}"): value for key, value in state.items() if key.endswith(f".{rows}")}


def cat_states(states: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """The states of so many matrices each as one, by one kernel."""
    if len(states) == 1:
        return states[0]
    stacked = {key: value.new_empty(sum(sizes), *value.shape[1:]) for key, value in states[0].items()}
    if stacked:
        torch._foreach_copy_(*_parts_and_states(stacked, states, sizes))
    return stacked


def split_state(stacked: dict[str, Tensor], states: list[dict[str, Tensor]], sizes: list[int]) -> None:
    if len(states) > 1 and stacked:
        parts, held = _parts_and_states(stacked, states, sizes)
        torch._foreach_copy_(held, parts)


def _parts_and_states(
    stacked: dict[str, Tensor], states: list[dict[str, Tensor]], sizes: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    parts = [part for tensor in stacked.values() for part in torch.split(tensor, sizes)]
    return parts, [state[key] for key in stacked for state in states]


def schatten4_norm(stack: Tensor) -> Tensor:
    """Of every matrix of a stack [..., m, n], the 4-norm of its singular values, ||X Xt||_F^(1/2): [..., 1, 1]."""
    power = power_of_two(stack)  # fourth powers leave float32 early
    short = (stack if stack.shape[-2] <= stack.shape[-1] else stack.mT) * power
    return frobenius_norm(short @ short.mT).sqrt() / power


def frobenius_norm(stack: Tensor) -> Tensor:
    """Of every matrix of a stack [..., m, n]: [..., 1, 1]."""
    norms: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    return norms


def cast_like(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The tensors in the dtypes of others, by one kernel; those of the right dtype are the same."""
    dtypes = [other.dtype for other in like]
    if [tensor.dtype for tensor in tensors] == dtypes:
        return tensors
    casts = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(casts, tensors)
    return casts
