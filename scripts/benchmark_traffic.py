"""Bytes, collectives, FLOPs and optimizer state of every rank, measured and by formula, for GPT-2 124M's 48 matrices.

    python scripts/benchmark_traffic.py                       # W = 2, 4, 8, 32, 64; about a minute
    python scripts/benchmark_traffic.py --worlds 8 --dim 256
    python scripts/benchmark_traffic.py --worlds 8 --rule Dion2

Every rank of W takes one step in this process, one after the other, on torch's fake process group, which answers a
collective without moving anything: packing, buckets and calls are the real ones, the numbers in the matrices are not.
Counted are the c10d operations that reach the dispatcher, whoever calls them, so that a fallback to another
collective cannot hide; FLOPs are those of the products that the rule makes, on tensors without data.
"""

import argparse
import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optim  # noqa: E402
from optim import SOAP, MatrixOptimizer, Muon, NorMuon, Shampoo  # noqa: E402
from optim.matrix import local  # noqa: E402
from scripts.benchmarks.options import count  # noqa: E402

Shapes = list[tuple[int, int]]
STATE_PER_MATRIX = {  # elements for an m x n matrix, as docs/optimizers.md has them
    torch.optim.AdamW: lambda m, n: 2 * m * n,
    Muon: lambda m, n: m * n,
    NorMuon: lambda m, n: m * n + m,
    Shampoo: lambda m, n: 2 * (m * m + n * n) + 2 * m * n,
    SOAP: lambda m, n: 2 * (m * m + n * n) + 2 * m * n,
}


def gpt2_shapes(layers: int, dim: int) -> Shapes:
    return [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * layers


class Traffic(TorchDispatchMode):
    """Calls of every collective, and the bytes that this rank sends to others by all_to_all."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.calls, self.sent = rank, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            self.calls[name] += 1
            if name == "alltoall_base_":
                received, buffer, group, splits, sent_splits, *rest = args
                self.sent += (sum(sent_splits) - sent_splits[self.rank]) * buffer.itemsize
                if not buffer.numel():  # the fake group, other than gloo and NCCL, refuses to send nothing
                    args = (received, received, group, splits, splits, *rest)
        return func(*args, **(kwargs or {}))


def counted(rule: type[MatrixOptimizer]) -> type[MatrixOptimizer]:
    """A rule that counts the FLOPs of its products instead of making them."""

    class Counted(rule):
        products = 0

        def precondition(self, group, stack, state):
            with FlopCounterMode(display=False) as counter:
                state = {key: value.to("meta") for key, value in state.items()}
                super().precondition(group, stack.to("meta"), state)
            self.products += counter.get_total_flops()
            return stack

    return Counted


@contextmanager
def rank_of(world_size: int, rank: int, replicas: int = 1):
    """This process as one rank of ``replicas`` groups of ``world_size`` shards; yields their mesh."""
    dist.init_process_group("fake", rank=rank, world_size=replicas * world_size, store=FakeStore())
    try:
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (replicas, world_size), mesh_dim_names=names)
        yield mesh if replicas > 1 else mesh["shard"]
    finally:
        dist.destroy_process_group()


def sharded(shapes: Shapes, mesh, device: str) -> nn.ParameterList:
    weights = nn.ParameterList([nn.Parameter(torch.empty(s, device="meta")) for s in shapes])
    fully_shard(weights, mesh=mesh)
    return weights if device == "meta" else weights.to_empty(device=device)


def one_step(shapes: Shapes, world_size: int, rank: int, replicas: int = 1, rule=Muon, **settings) -> dict:
    """What one rank of W, or of a number of groups of W, sends and computes in a step."""
    with rank_of(world_size, rank, replicas) as mesh:
        weights = sharded(shapes, mesh, "cpu")
        optimizer = counted(rule)(weights.parameters(), **settings)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        with Traffic(rank % world_size) as traffic:
            optimizer.step()
        plan = optimizer._layouts[0].exchange.plan
        buckets = len(plan.buckets(range(len(shapes))))
    return {
        "sent": traffic.sent, "calls": dict(traffic.calls), "buckets": buckets, "flops": optimizer.products,
        "planned flops": sum(spec.flops for spec in plan.specs),
        "largest flops": max(spec.flops for spec in plan.specs),
    }  # fmt: skip


def state_bytes(shapes: Shapes, world_size: int, rank: int) -> dict[type, int]:
    """Bytes of optimizer state on one rank of W, by optimizer; nothing is allocated."""
    with rank_of(world_size, rank) as mesh:
        weights, held = sharded(shapes, mesh, "meta"), {}
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for cls in STATE_PER_MATRIX:
            optimizer = cls(weights.parameters())
            if cls is torch.optim.AdamW:
                optimizer.step()  # its state appears in the first step
            states = [optimizer.state[weight].values() for weight in weights]
            tensors = [local(x) for values in states for x in values if isinstance(x, torch.Tensor) and x.ndim]
            held[cls] = sum(x.nbytes for x in tensors)
    return held


def verdict(value: float, target: float) -> str:
    return f"target {target:.2f} met" if value <= target else f"target {target:.2f} missed by {value / target - 1:.1%}"


def report_step(shapes: Shapes, world_size: int, title: str, **settings) -> None:
    ranks = [one_step(shapes, world_size, rank, **settings) for rank in range(world_size)]
    first, elements = ranks[0], sum(m * n for m, n in shapes)
    size = settings["dtype"].itemsize
    formula = 2 * size * elements * (world_size - 1) / world_size**2
    everywhere = size * elements * (world_size - 1) / world_size
    sent, flops = [rank["sent"] for rank in ranks], [rank["flops"] for rank in ranks]
    ideal = first["planned flops"] / world_size
    bound = max(ideal, first["largest flops"])
    print(f"\nW={world_size}, {title}")
    print(
        f"  MB sent per rank     mean {sum(sent) / world_size / 1e6:8.2f} / {formula / 1e6:.2f} by 2bS(W-1)/W^2"
        f" = {sum(sent) / world_size / formula:.4f}; {min(sent) / 1e6:.2f} to {max(sent) / 1e6:.2f};"
        f" gather-everywhere {everywhere / 1e6:.1f}"
    )
    expected = {"alltoall_base_": 2 * first["buckets"], "allreduce_": 1}
    equal = all(rank["calls"] == expected for rank in ranks)
    print(
        f"  collectives          {first['calls']} on {'every' if equal else 'the first'} rank / two all-to-all for each"
        f" of {first['buckets']} buckets and one 16-byte agreement: {'equal' if equal else 'DIFFERENT'}"
    )
    print(
        f"  TFLOP                all ranks {sum(flops) / 1e12:.3f} / {first['planned flops'] / 1e12:.3f}; slowest rank"
        f" {max(flops) / 1e12:.4f} / {ideal / 1e12:.4f} ideal = {max(flops) / ideal:.3f}"
        + (f" ({verdict(max(flops) / ideal, 1.05)})" if len(shapes) >= 4 * world_size else "")
        + f"; no owner can do less than {bound / ideal:.3f}"
    )


def report_state(shapes: Shapes, world_size: int) -> None:
    ranks = [state_bytes(shapes, world_size, rank) for rank in range(world_size)]
    for cls, per_matrix in STATE_PER_MATRIX.items():
        held = [rank[cls] for rank in ranks]
        formula = 4 * sum(per_matrix(m, n) for m, n in shapes) / world_size
        target = 1.10 if cls in (Shampoo, SOAP) else 1.05
        print(
            f"  state, MB a rank     {cls.__name__:8s} {min(held) / 1e6:.1f} to {max(held) / 1e6:.1f} /"
            f" {formula / 1e6:.1f}: largest {max(held) / formula:.3f} of formula/W"
            + (f" ({verdict(max(held) / formula, target)})" if len(shapes) >= 4 * world_size else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=count, nargs="+", default=[2, 4, 8, 32, 64])
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--dim", type=count, default=768)
    parser.add_argument("--rule", default="Muon", help="one whose products are all of its FLOPs: Muon, NorMuon, Dion2")
    args = parser.parse_args()
    shapes = gpt2_shapes(args.layers, args.dim)
    print(f"{len(shapes)} matrices, {sum(map(math.prod, shapes)) / 1e6:.1f} million elements")
    rule = getattr(optim, args.rule)
    for world_size in args.worlds:
        newton_schulz = dict(rule=rule, polar="newton_schulz5")
        report_step(shapes, world_size, "Newton-Schulz in bfloat16", dtype=torch.bfloat16, **newton_schulz)
        report_step(shapes, world_size, "the default in float32", dtype=torch.float32, rule=rule)
        report_state(shapes, world_size)


if __name__ == "__main__":
    main()
