"""What a step of sharded Muon is made of, each part alone: products, passes over memory, messages."""

import math

import torch
import torch.distributed as dist

from optim.plan import IN_FLIGHT


def bare_products(shapes):
    """The products alone, one matrix after another, of this rank's share: what no implementation can beat."""
    matrices = [torch.randn(min(s), max(s)) for s in shapes[: len(shapes) // dist.get_world_size()]]

    def step():
        for x in matrices:
            for _ in range(5):
                gram = x @ x.mT
                torch.addmm(x, torch.addmm(gram, gram, gram), x)

    return step


def bare_passes(shapes):
    """The passes of a sharded step over this rank's share, each once and into memory that is there already."""
    share = sum(map(math.prod, shapes)) // dist.get_world_size()
    weight, grad, momentum, update, buffer, stack = torch.randn(6, share).unbind()

    def step():
        momentum.lerp_(grad, 0.05)
        torch.lerp(momentum, grad, 0.05, out=update)
        if dist.get_world_size() == 1:
            return weight.add_(stack.copy_(update), alpha=-0.02)
        buffer.copy_(update)  # to the owner
        stack.copy_(buffer)
        buffer.copy_(stack)  # and back
        return weight.add_(buffer, alpha=-0.02)

    return step


def bare_messages(shapes):
    """The bytes of the exchange alone, in as many messages as its buckets are at least."""
    ranks = dist.get_world_size()
    sent = torch.randn(ranks, sum(map(math.prod, shapes)) // ranks**2 // IN_FLIGHT)
    received = torch.empty_like(sent)

    def step():
        for _ in range(2 * IN_FLIGHT):
            dist.all_to_all_single(received, sent)

    return step
