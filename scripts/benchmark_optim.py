"""Time one step of sharded Muon implementations, interleaved in one run.

    torchrun --nproc-per-node 2 scripts/benchmark_optim.py            # 12 layers of (3D,D), (D,D), (4D,D), (D,4D)
    PYTHONPATH=DION torchrun --nproc-per-node 4 scripts/benchmark_optim.py   # DION: a checkout of microsoft/dion
    torchrun --nproc-per-node 4 scripts/benchmark_optim.py --layout tp       # FSDP2 over tensor parallelism of 2
    PYTHONPATH=DION torchrun --nproc-per-node 2 scripts/benchmark_optim.py --layout experts   # (E,2D,D), (E,D,2D)

Floor: the products of 5 Newton-Schulz steps, 5 (4 s^2 l + 2 s^3) FLOPs a matrix (s <= l its sides), shared by the W
ranks (timed bare where these divide the layers), and 2 S (W-1)/W^2 elements sent by each.  All take the same weights,
gradients (seeded) and, unless named otherwise, the same Newton-Schulz iteration.  Packages have it as they write it,
but with float32 in place of bfloat16, which is many times slower on a CPU; where ours stands in a peer's place, its
name says so.  Peers from PyPI come with the ``bench`` extra; dion and heavyball join where they are importable.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
import types
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import Muon  # noqa: E402
from optim.matrix import local  # noqa: E402
from optim.minimax import polar_express_coefficients  # noqa: E402
from optim.polar import polar  # noqa: E402
from scripts.benchmarks.floors import bare_messages, bare_passes, bare_products  # noqa: E402
from scripts.benchmarks.options import count  # noqa: E402

STANDARD = "newton_schulz5"  # the one iteration that every contender knows; here in float32 for all
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
SAME, DEFAULT, FLOOR = "ours, same iteration", "ours, default", "bare products"
PASSES, MESSAGES = "bare passes", "bare messages"
DION, DION_EXPRESS, EVERYWHERE = "dion", "dion, Polar Express", "gather everywhere"
DION_BFLOAT16 = "dion, sends bfloat16"  # as it does by itself: half of the others' bytes
OURS_BFLOAT16 = "ours, sends bfloat16"  # the same iteration
PACKAGES = ("muon-fsdp2", "pytorch-optimizer", "heavyball")  # of PyPI
SLOW = ("torch.optim.Muon", *PACKAGES, EVERYWHERE)  # timed in the first rounds only
LAYOUTS = {  # and what can take them, beside ours; none of the packages of PyPI
    "fsdp": None,
    "tp": ("torch.optim.Muon", EVERYWHERE),
    "experts": (DION, DION_EXPRESS, EVERYWHERE),
}
TARGETS = [  # (world sizes, ours, against the fastest of, largest ratio)
    ((2, 4), SAME, (DION,), 0.60),
    ((2, 4), DEFAULT, (DION_EXPRESS,), 0.60),  # at the polar errors printed with it
    ((2, 4), OURS_BFLOAT16, (DION_BFLOAT16,), 0.75),
    ((2,), DEFAULT, PACKAGES, 0.40),
    ((4,), DEFAULT, (EVERYWHERE,), 0.25),
    ((1, 2), SAME, (FLOOR,), 1.15),
]
ENGINE_TARGET = 0.05  # of a step outside of products and waiting


class Matrices(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])


def shapes_of(layers: int, dim: int, layout: str) -> list[tuple[int, ...]]:
    if layout == "experts":
        return [(8, 2 * dim, dim), (8, dim, 2 * dim)] * layers
    return [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)] * layers


def sharded(shapes, layout: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    model, mesh = Matrices(shapes), init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "tp":  # rows and columns in turn
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("fsdp", "tp"))
        for i, weight in enumerate(model.weights):
            cut = distribute_tensor(weight.detach(), mesh["tp"], [Shard(i % 2)], src_data_rank=None)
            model.weights[i] = nn.Parameter(cut)
        mesh = mesh["fsdp"]
    fully_shard(model, mesh=mesh)
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


def plain_iteration(x: torch.Tensor, coefficients=JORDAN) -> torch.Tensor:
    """One matrix or a stack of them, the way that every package writes it, in float32; DTensors as they come."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.float().mT if tall else x.float()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


def gathered_iteration(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The same, a DTensor gathered first: spares a package that would let DTensor communicate product by product."""
    if not isinstance(x, DTensor):
        return plain_iteration(x)
    return distribute_tensor(plain_iteration(x.full_tensor()), x.device_mesh, x.placements, src_data_rank=None)


def jordan(x: torch.Tensor, epsilon: float = 0) -> torch.Tensor:
    return plain_iteration(x)


def plain_polar_express(x: torch.Tensor, epsilon: float = 0) -> torch.Tensor:
    return plain_iteration(x / 1.02, polar_express_coefficients(5))


def in_float32(name: str, iteration: str, replacement=gathered_iteration):
    """The module, its bfloat16 iteration replaced by the one in float32."""
    module = importlib.import_module(name)
    assert hasattr(module, iteration), f"{name} has no {iteration} any more: the comparison would be unfair"
    setattr(module, iteration, replacement)
    return module


def torch_muon(params):
    """Product by product: DTensor inserts the collectives."""
    in_float32("torch.optim._muon", "_zeropower_via_newtonschulz", lambda x, *settings: plain_iteration(x))
    return torch.optim.Muon(params, lr=0.02)


def muon_fsdp2(params):
    module = in_float32("muon_fsdp2", "zeropower_via_newtonschulz5")
    return module.Muon([dict(params=params, lr=0.02, use_muon=True)])


def pytorch_optimizer(params):
    in_float32("pytorch_optimizer.optimizer.muon.base", "zero_power_via_newton_schulz_5")
    module = importlib.import_module("pytorch_optimizer.optimizer.muon")
    return module.Muon([dict(params=params, use_muon=True)], lr=0.02)


def heavyball(params):
    in_float32("heavyball.utils", "zeropower_via_newtonschulz5").compile_mode = "default"  # no search for kernels
    return importlib.import_module("heavyball").Muon(params, lr=0.02)


def dion(params, iteration, module):
    return module.Muon(params, params[0].device_mesh, lr=0.02, nesterov=True, newton_schulz_func=iteration)


def dion_in_float32():
    """A second copy of its module, whose text says float32 wherever it says bfloat16, the dtype that it sends in."""
    found = importlib.import_module("dion.muon")
    text = Path(found.__file__).read_text()
    assert "dtype=torch.bfloat16" in text, "dion has no bfloat16 any more: the comparison would be unfair"
    module = types.ModuleType("dion.muon_in_float32")
    module.__package__ = found.__package__
    exec(compile(text.replace("torch.bfloat16", "torch.float32"), found.__file__, "exec"), module.__dict__)
    return module


class TimedMuon(Muon):
    """Counts the CPU time of its products: of this thread, so that neither waiting nor gloo is in it."""

    products = 0.0

    def precondition(self, group, stack, state):
        TimedMuon.products -= time.thread_time()
        update = super().precondition(group, stack, state)
        TimedMuon.products += time.thread_time()
        return update


FLOORS = {FLOOR: bare_products, PASSES: bare_passes, MESSAGES: bare_messages}
BUILDERS = {
    SAME: lambda params: TimedMuon(params, polar=STANDARD),
    DEFAULT: Muon,
    OURS_BFLOAT16: lambda params: Muon(params, polar=STANDARD, comm_dtype=torch.bfloat16),
    EVERYWHERE: GatherEverywhere,
    "torch.optim.Muon": torch_muon,
    "muon-fsdp2": muon_fsdp2,
    "pytorch-optimizer": pytorch_optimizer,
    "heavyball": heavyball,
    DION: lambda params: dion(params, jordan, dion_in_float32()),
    DION_EXPRESS: lambda params: dion(params, plain_polar_express, dion_in_float32()),
    "dion, our products": lambda params: dion(params, lambda x, epsilon=0: polar(x, STANDARD), dion_in_float32()),
    DION_BFLOAT16: lambda params: dion(params, jordan, importlib.import_module("dion.muon")),
}


def contender(name: str, shapes, layout: str):
    """Its step, or None with a note where its package is not installed."""
    if name in FLOORS:
        return FLOORS[name](shapes)
    params = sharded(shapes, layout)
    grads = [p.grad for p in params]
    try:
        optimizer = BUILDERS[name](params)
    except ImportError as error:
        if dist.get_rank() == 0:
            print(f"left out: {error}")
        return None

    def step():
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad  # heavyball drops it
        optimizer.step()

    step.first_weight = params[0]
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--dim", type=count, default=256)
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--slow-rounds", type=count, default=3, help=f"rounds of {', '.join(SLOW)}")
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp", help="tp takes an even number of ranks")
    parser.add_argument("--only", nargs="+", help="contenders by name, beside ours")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    shapes = shapes_of(args.layers, args.dim, args.layout)
    names = [*BUILDERS, *(FLOORS if args.layers % dist.get_world_size() == 0 else [])]
    allowed = [args.only or names, LAYOUTS[args.layout] or names]
    chosen = [name for name in names if name in (SAME, DEFAULT) or all(name in few for few in allowed)]
    steps = {name: step for name in chosen if (step := contender(name, shapes, args.layout))}
    first = {name: first_step(name, step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name, seconds in first.items() if seconds is not None}
    work, engine = {name: [] for name in times}, []
    for number in range(args.rounds):
        for name in times:
            if name in SLOW and number >= args.slow_rounds:
                continue
            dist.barrier()
            TimedMuon.products = 0.0
            start, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
            steps[name]()
            engine += [1 - TimedMuon.products / (time.thread_time() - thread)] if name == SAME else []
            busiest = torch.tensor(time.process_time() - cpu)
            dist.barrier()
            times[name].append(time.perf_counter() - start)
            dist.all_reduce(busiest, dist.ReduceOp.MAX)
            work[name].append(busiest.item())
    if dist.get_rank() == 0:
        report("s a step", times, first)
        if args.layout == "fsdp":
            report_targets(times, engine)
        report("CPU s a step on the busiest rank, whatever else ran", work, first)
        report_errors(shapes)
    dist.destroy_process_group()


def first_step(name: str, step) -> float | None:
    """Seconds of the first step (a user waits for its compilation), after which one more goes untimed."""
    try:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        before = None if name in FLOORS else local(step.first_weight).detach().clone()
        step()
        if before is not None and torch.equal(before, local(step.first_weight)):
            raise RuntimeError("its second step changed nothing")
        return seconds
    except Exception as error:
        if dist.get_rank() == 0:
            print(f"failed: {name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return None


def ratio(ours: list[float], others: list[float]) -> tuple[float, str]:
    """Median of the rounds in which both were timed, and the same with what 80% of them lie within (all, below 10)."""
    ratios = sorted(a / b for a, b in zip(ours, others, strict=False))
    median, tenth = statistics.median(ratios), len(ratios) // 10
    return median, f"{median:.2f} ({ratios[tenth]:.2f}-{ratios[-1 - tenth]:.2f})"


def report(unit: str, times: dict[str, list[float]], first: dict[str, float | None]) -> None:
    print(f"\nW={dist.get_world_size()}, one thread a rank, torch {torch.__version__}, {unit}")
    print(f"{'contender':22s} {'median (min-max)':24s} {'first':>6s}  {SAME + ' / it':26s} {DEFAULT} / it")
    for name, seconds in times.items():
        spread = f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
        same, default = (ratio(times[ours], seconds)[1] for ours in (SAME, DEFAULT))
        print(f"{name:22s} {spread:24s} {first[name]:6.1f}  {same:26s} {default}")


def report_targets(times: dict[str, list[float]], engine: list[float]) -> None:
    spread = f"{statistics.median(engine):.1%} ({min(engine):.1%}-{max(engine):.1%})"
    print(f"{SAME}, CPU time of the first rank outside of its products: {spread}, target {ENGINE_TARGET:.0%}")
    if times.keys() >= FLOORS.keys():
        floor = [sum(parts) for parts in zip(*(times[name] for name in FLOORS), strict=True)]
        print(f"{SAME} / {', '.join(FLOORS)}, one after the other: {ratio(times[SAME], floor)[1]}")
    for worlds, ours, against, target in TARGETS:
        others = [name for name in against if name in times]
        if dist.get_world_size() not in worlds or ours not in times or not others:
            continue
        fastest = min(others, key=lambda name: statistics.median(times[name]))
        value, spread = ratio(times[ours], times[fastest])
        verdict = "met" if value <= target else f"missed by {value / target - 1:.0%}"
        print(f"{ours} / {fastest}: {spread}, target {target:.2f} {verdict}")


def report_errors(shapes) -> None:
    methods = {SAME: lambda x: polar(x, STANDARD), DEFAULT: polar, DION_EXPRESS: plain_polar_express}
    print("\npolar error, ||X - UV^T|| / ||UV^T||, largest over the shapes:")
    for name, method in methods.items():
        print(f"  {name:22s} {max(polar_error(method, shape) for shape in set(shapes)):.4f}")


def polar_error(method, shape) -> float:
    torch.manual_seed(0)
    x = torch.randn(shape)
    exact = polar(x.double(), "eigh")
    return ((method(x).double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()
