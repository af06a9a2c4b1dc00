"""One update and one evaluation that leave no trace: all kernels are compiled and loaded before the clock runs, and
the device has shown how many sequences it has room for."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optim.combined import Combined
from optim.matrix import local
from trainer.parallel import Parallel
from trainer.run.micro_batch import Batch, with_room


def warm_up(model: nn.Module, optimizers: Combined, parallel: Parallel, batches: Sequence[Batch]) -> int:
    """On the first of an update's batches of (inputs, targets) [B, T].  Ranks call together.

    Returns:
        Of how many of the B sequences a pass has room on every rank.  Elsewhere than on a GPU, B.

    Raises:
        UserError: there is no room for one.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    state = dry_run_step(optimizers, parallel.device)
    optimizers.zero_grad()
    batch = with_room(model, parallel, batches, state)
    with parallel.accumulate(model, last=True):
        model(*batch).backward()
    parallel.clip(model)
    optimizers.zero_grad()
    with parallel.evaluation(model):
        model(*batch)
    return len(batch[0])


@torch.no_grad()
def dry_run_step(optimizers: Combined, device: torch.device) -> int:
    """Step every optimizer with zero gradients, then put back weights, state, counters and random numbers, bit for bit.

    A copy is kept of one role's weights and state at a time.  Parameters without a gradient are not stepped.
    Returns the bytes of the state that has begun in it, and will again.
    """
    begun = 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for member in optimizers.members.values():
            params = [p for group in member.param_groups for p in group["params"] if p.grad is not None]
            for param in params:
                local(param.grad).zero_()
            groups = [{k: v for k, v in group.items() if k != "params"} for group in member.param_groups]
            states = {param: dict(member.state[param]) for param in params if param in member.state}
            tensors = params + [v for state in states.values() for v in state.values() if isinstance(v, Tensor)]
            kept = [local(tensor).clone() for tensor in tensors]
            member.step()
            begun += bytes_of(member.state[param] for param in params) - bytes_of(states.values())
            for tensor, before in zip(tensors, kept, strict=True):
                local(tensor).copy_(before)
            for group, settings in zip(member.param_groups, groups, strict=True):
                group.update(settings)
            for param in params:
                member.state.pop(param, None)
            member.state.update(states)
    return begun


def bytes_of(states: Iterable[dict[str, Any]]) -> int:
    return sum(local(value).nbytes for state in states for value in state.values() if isinstance(value, Tensor))
