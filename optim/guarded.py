"""A step that a flag on the device takes back, of optimizers that have no ``found_inf`` of their own."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .base import COUNTERS, local

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def step_unless(found_inf: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """``optimizer.step()``, but where ``found_inf``, a number on the device, is not 0, weights and state have the bits
    of before; the host does not wait.

    Gradients become zero there first, so that no rule meets a NaN.  A copy of weights and state lives as long as the
    step.  State that begins in this step stays, at zero.

    Returns:
        What puts back the counters on the host too, to be called before anything reads them.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for dtype, grads in _bits(p.grad for p in params).items():
        torch._foreach_mul_(grads, (found_inf == 0).to(dtype))
    holders: list[dict[Any, Any]] = [{"param": p} for p in params] + [optimizer.state[p] for p in params]
    entries = [(holder, key, value) for holder in holders for key, value in holder.items()]
    groups = optimizer.param_groups
    live, counters = [], [(group, key, group[key]) for group in groups for key in COUNTERS if key in group]
    for holder, key, value in entries:
        if not isinstance(value, Tensor):
            counters.append((holder, key, value))
        elif value.device == found_inf.device:
            live.append((holder, key))
        else:  # such as the steps of torch's optimizers
            counters.append((holder, key, value.clone()))
    before = _bits(holder[key] for holder, key in live)
    for dtype, tensors in before.items():
        before[dtype] = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(before[dtype], tensors)
    was_taken_back = read_later(found_inf)
    optimizer.step()
    for dtype, tensors in _bits(holder[key] for holder, key in live).items():
        # As integers, which wrap: what is put back is exact, NaNs and signed zeros included.
        torch._foreach_sub_(before[dtype], tensors)
        torch._foreach_mul_(before[dtype], (found_inf != 0).to(dtype))
        torch._foreach_add_(tensors, before[dtype])

    def settle() -> None:
        if was_taken_back():
            for holder, key, value in counters:
                holder[key] = value

    return settle


def read_later(flag: Tensor) -> Callable[[], bool]:
    """Whether ``flag`` is not 0, to be asked a step later: a GPU has long known it then, and no later work is waited
    for."""
    if flag.device.type != "cuda":
        kept = flag.clone()
        return lambda: bool(kept)
    copy, copied = torch.empty_like(flag, device="cpu", pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
    copy.copy_(flag, non_blocking=True)
    copied.record(torch.cuda.current_stream(flag.device))  # where the copy is, whichever device is current

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read


def unscale(optimizer: torch.optim.Optimizer, scale: Tensor | None) -> None:
    """Divide the gradients by a GradScaler's scale, where it has not done so itself."""
    if scale is not None:
        grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(grads, scale.double().reciprocal().float())


def _bits(tensors: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Views of this rank's parts as integers, by width."""
    views: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        dtype = INTEGERS[tensor.itemsize]
        views[dtype].append(local(tensor.detach()).view(dtype))
    return views
