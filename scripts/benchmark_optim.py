"""Time one step of sharded Muon implementations, interleaved in one run.

    torchrun --nproc-per-node 2 scripts/benchmark_optim.py            # 12 layers of (3D,D), (D,D), (4D,D), (D,4D)
    torchrun --nproc-per-node 1 scripts/benchmark_optim.py            # also against the bare products

Floor: the products of 5 Newton-Schulz steps, 5 (4 s^2 l + 2 s^3) FLOPs a matrix (s <= l its sides), shared by the W
ranks, and 2 S (W-1)/W^2 elements sent by each.  All contenders take the same weights, gradients (seeded) and, unless
named otherwise, the same Newton-Schulz iteration.  Packages have it as they write it, but in float32, since bfloat16
is many times slower on a CPU; where ours stands in a peer's place, its name says so.  Peers from PyPI come with the
``bench`` extra; dion joins where it is importable.
"""

import argparse
import importlib
import os
import statistics
import time
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from optim import Muon
from optim.polar import polar

STANDARD = "newton_schulz5"  # the one iteration that every contender knows; here in float32 for all


class Matrices(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])


def shapes_of(layers: int, dim: int) -> list[tuple[int, int]]:
    return [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * layers


def sharded(shapes) -> list[nn.Parameter]:
    torch.manual_seed(0)
    model = Matrices(shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for index, weight in enumerate(model.weights):
        torch.manual_seed(1 + index)
        full = torch.randn(weight.shape)
        weight.grad = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
    return list(model.weights)


class GatherEverywhere(torch.optim.Optimizer):
    """The naive way: every rank gathers every matrix and does all of the work.  A yardstick, not an option."""

    def __init__(self, params):
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            whole = polar(momentum.lerp(p.grad, 0.05).full_tensor(), STANDARD)
            p.add_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None), alpha=-0.02)


def bare_products(shapes):
    """The products alone, one matrix after another, at W = 1: what no implementation can beat."""
    matrices = [torch.randn(min(s), max(s)) for s in shapes]

    def step():
        for x in matrices:
            for _ in range(5):
                gram = x @ x.mT
                torch.addmm(x, torch.addmm(gram, gram, gram), x)

    return step


def optional(build):
    """The contender, or None with a note where its package is not installed."""
    try:
        return build()
    except ImportError as error:
        if dist.get_rank() == 0:
            print(f"left out: {error}")
        return None


def plain_newton_schulz(g: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Five steps of Jordan's iteration, the way that every package writes them, in float32.

    A DTensor is gathered first, which spares a package that would let DTensor communicate product by product.
    """
    if isinstance(g, DTensor):
        whole = plain_newton_schulz(g.full_tensor())
        return distribute_tensor(whole, g.device_mesh, g.placements, src_data_rank=None)
    x = g.float() if g.shape[-2] <= g.shape[-1] else g.float().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if g.shape[-2] <= g.shape[-1] else x.mT).to(g.dtype)


def in_float32(name: str, iteration: str):
    """The module, its bfloat16 iteration replaced by the one in float32."""
    module = importlib.import_module(name)
    assert hasattr(module, iteration), f"{name} has no {iteration} any more: the comparison would be unfair"
    setattr(module, iteration, plain_newton_schulz)
    return module


def muon_fsdp2(params):
    module = in_float32("muon_fsdp2", "zeropower_via_newtonschulz5")
    return module.Muon([dict(params=params, lr=0.02, use_muon=True)])


def pytorch_optimizer(params):
    in_float32("pytorch_optimizer.optimizer.muon.base", "zero_power_via_newton_schulz_5")
    module = importlib.import_module("pytorch_optimizer.optimizer.muon")
    return module.Muon([dict(params=params, use_muon=True)], lr=0.02)


def dion(params, iteration):
    """It sends bfloat16, half of the others' bytes."""
    module = importlib.import_module("dion")
    return module.Muon(params, params[0].device_mesh, lr=0.02, nesterov=True, newton_schulz_func=iteration)


def our_iteration(g: torch.Tensor, epsilon: float = 0) -> torch.Tensor:
    return polar(g.float(), STANDARD).to(g.dtype)


def contenders(shapes) -> dict:
    world = dist.get_world_size()
    built = {
        "ours, same iteration": Muon(sharded(shapes), polar=STANDARD),
        "ours, default": Muon(sharded(shapes)),
        "gather everywhere": GatherEverywhere(sharded(shapes)),
        "muon-fsdp2": optional(lambda: muon_fsdp2(sharded(shapes))),
        "pytorch-optimizer": optional(lambda: pytorch_optimizer(sharded(shapes))),
        "dion": optional(lambda: dion(sharded(shapes), plain_newton_schulz)),
        "dion, our iteration": optional(lambda: dion(sharded(shapes), our_iteration)),
    }
    steps = {name: optimizer.step for name, optimizer in built.items() if optimizer is not None}
    if world == 1:
        steps["bare products"] = bare_products(shapes)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    steps = contenders(shapes_of(args.layers, args.dim))
    failed = [name for name, step in steps.items() if not works(step)]
    times = {name: [] for name in steps if name not in failed}
    for _ in range(args.rounds):
        for name in times:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        report(times, failed)
    dist.destroy_process_group()


def works(step) -> bool:
    """Two untimed steps (compilation, allocation) on all ranks."""
    try:
        step()
        step()
        return True
    except Exception as error:
        if dist.get_rank() == 0:
            print(f"failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return False


def report(times: dict[str, list[float]], failed: list[str]) -> None:
    ours = times["ours, same iteration"]
    print(f"W={dist.get_world_size()}, one thread a rank; failed: {', '.join(failed) or 'none'}")
    print(f"{'contender':22s} {'s/step median (min-max)':28s} ours/it (min-max)    default/it")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(ours, seconds, strict=True)]
        default = [a / b for a, b in zip(times["ours, default"], seconds, strict=True)]
        print(
            f"{name:22s} {statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})".ljust(50)
            + f" {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})".ljust(22)
            + f" {statistics.median(default):.2f} ({min(default):.2f}-{max(default):.2f})"
        )


if __name__ == "__main__":
    main()
