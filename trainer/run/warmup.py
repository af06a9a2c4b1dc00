"""One update and one evaluation that leave no trace: all kernels are compiled and loaded before the clock runs."""

import torch
from torch import Tensor, nn

from optim.combined import Combined
from optim.matrix import local
from trainer.parallel import Parallel


def warm_up(model: nn.Module, optimizers: Combined, parallel: Parallel, batch: tuple[Tensor, Tensor]) -> None:
    """On any batch of (inputs, targets) [B, T].  Ranks call together."""
    inputs, targets = batch
    with parallel.accumulate(model, last=True):
        model(inputs, targets).backward()
    parallel.clip(model)
    dry_run_step(optimizers, parallel.device)
    optimizers.zero_grad()
    with parallel.evaluation(model):
        model(inputs, targets)


@torch.no_grad()
def dry_run_step(optimizers: Combined, device: torch.device) -> None:
    """Step every optimizer with zero gradients, then put back weights, state, counters and random numbers, bit for bit.

    A copy is kept of one role's weights and state at a time.  Parameters without a gradient are not stepped.
    """
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
            for tensor, before in zip(tensors, kept, strict=True):
                local(tensor).copy_(before)
            for group, settings in zip(member.param_groups, groups, strict=True):
                group.update(settings)
            for param in params:
                member.state.pop(param, None)
            member.state.update(states)
