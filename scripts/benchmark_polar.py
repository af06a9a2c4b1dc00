"""Time every polar method against the matrix products that it cannot avoid, interleaved in one run.

    OMP_NUM_THREADS=1 python scripts/benchmark_polar.py
    OMP_NUM_THREADS=1 python scripts/benchmark_polar.py --dim 768 --count 2 --methods polar_express newton_schulz5

A method's bare products are as many torch.bmm calls of the same shapes on preallocated stacks. They leave out norms and
additions, but also symmetry and working in cached pieces: a ratio below 1 is time that those save.
Ratios are medians over the repeats, with (min-max); each repeat times every contender once, in turn.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim.minimax import polar_express_coefficients  # noqa: E402
from optim.polar import POLAR_METHODS, Iteration, newton_schulz, plan_segments, polar  # noqa: E402
from scripts.benchmarks.options import count  # noqa: E402


def bare_products(x: torch.Tensor, segments) -> Callable[[], None]:
    """The products of these segments of steps on the stack x [b, m, n], m <= n."""
    r, p, q = (torch.randn_like(x[..., : x.shape[-2]]) for _ in range(3))
    out = [torch.empty_like(r) for _ in range(2)]
    y = torch.empty_like(x)

    def run() -> None:
        for segment in segments:
            torch.bmm(x, x.mT, out=out[0])
            for step, (_, _, c) in enumerate(segment):
                factors = ([(r, r)] if c else []) + ([(r, p), (p, q), (q, r)] if step else [])
                for index, (left, right) in enumerate(factors):
                    torch.bmm(left, right, out=out[index % 2])
            torch.bmm(r, x, out=y)

    return run


def interleave(contenders: dict[str, Callable], repeats: int, synchronize: Callable | None) -> dict[str, list[float]]:
    """Seconds of every call; the first round only warms up."""
    # One thread waits for nothing but the scheduler: its own time leaves out what other programs take.
    clock = time.process_time if synchronize is None and torch.get_num_threads() == 1 else time.perf_counter
    synchronize = synchronize or (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if repeat:
                times[name].append(clock() - start)
    return times


def ratio(times: list[float], others: list[float]) -> str:
    values = [a / b for a, b in zip(times, others, strict=True)]
    return f"{statistics.median(values):5.2f} ({min(values):.2f}-{max(values):.2f})"


def compare(x: torch.Tensor, methods: list[str], repeats: int, synchronize: Callable | None) -> None:
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT.contiguous()
    steps, safety = polar_express_coefficients(5), 0.02
    forms = {"standard form": "standard", "Gram form, one return": (2,), "Gram form": "gram"}
    contenders: dict[str, Callable] = {}
    for name in methods:
        method = POLAR_METHODS[name]
        contenders[name] = lambda name=name: polar(x, name)
        if isinstance(method, Iteration):
            coefficients = method.coefficients(method.steps)
            segments = plan_segments(coefficients, method.form, x.shape, x.dtype)
            contenders[f"{name}: products"] = bare_products(wide, segments)
    for name, form in forms.items():
        contenders[name] = lambda form=form: newton_schulz(x, steps, safety, form)
    times = interleave(contenders, repeats, synchronize)
    count, rows, cols = x.shape
    print(f"\n{count} of {rows}x{cols}, {str(x.dtype).removeprefix('torch.')}")
    for name in methods:
        products = times.get(f"{name}: products")
        against = f"  {ratio(times[name], products)} of its bare products" if products else ""
        print(f"  {name:<22} {statistics.median(times[name]) / count * 1e3:8.2f} ms a matrix{against}")
    exact = polar(x.double(), "eigh")
    for name, form in forms.items():
        error = torch.linalg.vector_norm(newton_schulz(x, steps, safety, form).double() - exact) / exact.norm()
        speed = ratio(times["standard form"], times[name])
        print(f"  {name:<22} {speed} times as fast as the standard form, polar error {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=count, default=256, help="D of the shapes (3D,D), (D,D), (4D,D), (D,4D)")
    parser.add_argument("--count", type=count, default=4, help="matrices in a stack")
    parser.add_argument("--repeats", type=count, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(POLAR_METHODS), choices=list(POLAR_METHODS))
    args = parser.parse_args()
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else None
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.repeats} repeats")
    for rows, cols in ((3, 1), (1, 1), (4, 1), (1, 4)):
        shape = (args.count, rows * args.dim, cols * args.dim)
        x = torch.randn(shape, dtype=getattr(torch, args.dtype), device=args.device)
        compare(x, args.methods, args.repeats, synchronize)


if __name__ == "__main__":
    main()
