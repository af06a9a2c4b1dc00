"""Stacks of equal matrices: their shape, and their owner's state joined and parted."""

import math
from typing import Any

import torch
from torch import Tensor


def matrix_shape(group: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., m, n] of a parameter: kernels [O, I, kh, kw] are one matrix [O, I·kh·kw], experts [E, m, n] are E."""
    is_stack = group["stack"] if group["stack"] is not None else len(shape) <= 3
    return tuple(shape) if is_stack or len(shape) == 2 else (shape[0], math.prod(shape[1:]))


def block_shape(group: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(number of blocks, fan_out, fan_in) of a parameter."""
    shape = matrix_shape(group, shape)
    fan_out, fan_in = (shape[-1], shape[-2]) if group["conv1d"] else (shape[-2], shape[-1])
    return math.prod(shape[:-2]) * group["split"], fan_out // group["split"], fan_in


def as_parameter(group: dict[str, Any], blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Blocks [k, fan_out, fan_in] in the parameter's shape; a view where the blocks are contiguous."""
    if group["conv1d"]:
        *stack, m, n = matrix_shape(group, shape)
        return blocks.reshape(*stack, n, m).mT.reshape(shape)
    return blocks.reshape(shape)


def block_parts(
    group: dict[str, Any], local: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]
) -> list[tuple[int, Tensor]]:
    """Of every block, the part that lies in ``local``, which begins at ``offset`` of a parameter of this shape: the
    first of its rows and a view [rows, ...], of no rows where nothing is here."""
    count, fan_out, _ = block_shape(group, shape)
    stacked = len(matrix_shape(group, shape)) > 2
    matrices = list(local.flatten(0, -3)) if stacked else [local]
    begin = offset[0] * math.prod(shape[1:-2]) if stacked else 0
    at = offset[-1] if group["conv1d"] else offset[-2 if stacked else 0]
    parts = []
    for number in range(count // group["split"]):
        here = begin <= number < begin + len(matrices)
        matrix = matrices[number - begin] if here else local.new_empty(0, 0)
        rows = matrix.mT if group["conv1d"] else matrix
        for start in range(0, fan_out * group["split"], fan_out):
            part = rows[max(0, start - at) : max(0, start + fan_out - at)]
            parts.append((max(0, at - start), part))
    return parts


def cat_states(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(states) == 1:
        return states[0]
    return {key: torch.cat([state[key] for state in states]) for key in states[0]}


def split_state(stacked: dict[str, Tensor], states: list[dict[str, Tensor]], sizes: list[int]) -> None:
    if len(states) == 1:
        return
    for key, tensor in stacked.items():
        torch._foreach_copy_([state[key] for state in states], torch.split(tensor, sizes))


def frobenius_norm(stack: Tensor) -> Tensor:
    """Of every matrix of a stack [..., m, n]: [..., 1, 1]."""
    norms: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    return norms
