"""What every rank of ``run_threads`` sends and computes in its steps, counted, against what its optimizer plans."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch.distributed as dist

from optim.layout import ParamRef
from optim.matrix import MatrixOptimizer
from optim.stacks import block_shapes, matrix_shape

COLLECTIVES = [
    *("all_to_all_single", "all_to_all", "broadcast", "all_reduce", "reduce", "reduce_scatter_tensor", "all_gather"),
    *("all_gather_into_tensor", "gather", "scatter", "all_gather_object", "broadcast_object_list"),
]


@contextmanager
def counting() -> Iterator[dict[int, Counter]]:
    """Counts, by rank, the calls of every collective, elements that are ``sent`` to other ranks, and ``summed``."""
    counts: dict[int, Counter] = defaultdict(Counter)
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def call(name, *args, **kwargs):
        mine, group = counts[dist.get_rank()], kwargs.get("group")
        mine[name] += 1
        if name == "all_to_all_single":
            mine["sent"] += args[1].numel() - args[3][dist.get_rank(group)]
        elif name == "broadcast" and kwargs["group_src"] == dist.get_rank(group):
            mine["sent"] += args[0].numel()
        elif name == "all_reduce":
            mine["summed"] += args[0].numel()
        return real[name](*args, **kwargs)

    try:
        for name in COLLECTIVES:
            setattr(dist, name, partial(call, name))
        yield counts
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def counted(cls: type[MatrixOptimizer], counts: dict[int, Counter]) -> type[MatrixOptimizer]:
    """A rule that also counts its ``matrices`` and their ``flops``, and nothing of its construction."""

    class Counted(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            counts[dist.get_rank()].clear()

        def precondition(self, group, stack, state):
            flops = len(stack) * self.flops(group, tuple(stack.shape[1:]), stack.dtype)
            counts[dist.get_rank()].update(matrices=len(stack), flops=flops)
            return super().precondition(group, stack, state)

    return Counted


def assert_as_planned(optimizer: MatrixOptimizer, counts: dict[int, Counter], steps: int = 1, **sums) -> None:
    """That this rank's counts are those of its plans for so many steps, in each of which there were all gradients."""
    want = {key: steps * n for key, n in by_formula(optimizer, **sums).items() if n}
    assert +counts[dist.get_rank()] == pytest.approx(want, rel=1e-12), "sent or computed is other than planned"


def by_formula(optimizer: MatrixOptimizer, of_blocks: int = 0, of_rows: int = 0, all_rows: bool = False) -> Counter:
    """Counts of one step of this rank, all gradients there, for a rule that ``measure``s so many sums over blocks and
    over rows: these are sent where rows are cut, or where blocks are if ``apply`` needs ``all_rows``."""
    counts = Counter()
    for layout in optimizer._layouts:
        exchange, plan, refs = layout.exchange, layout.exchange.plan, layout.refs
        if exchange.group is not None:  # the agreement on who has gradients: two numbers
            counts.update(all_reduce=1, summed=2)
        for bucket in plan.buckets([i for i, ref in enumerate(refs) if ref.held]):
            mine, active = bucket[exchange.rank], [i for indices in bucket for i in indices]
            counts["flops"] += sum(plan.specs[i].flops for i in mine)
            counts["matrices"] += sum(_blocks(optimizer, refs[i]) for i in mine)
            if exchange.layout == "replicated":
                counts["broadcast"] += sum(bool(indices) for indices in bucket)
                counts["sent"] += sum(plan.specs[i].numel for i in mine)
            elif exchange.layout == "sharded":
                counts["all_to_all_single"] += 2
                counts["sent"] += plan.elements_sent(exchange.rank, active)
                cut = [refs[i] for i in active if refs[i].place.within]
                summed = sum(of_blocks * _blocks(optimizer, ref) for ref in cut)
                summed += sum(of_rows * _rows(optimizer, ref) for ref in cut if all_rows or _rows_cut(optimizer, ref))
                counts.update(all_reduce=bool(summed), summed=summed)
    return counts


def _blocks(optimizer: MatrixOptimizer, ref: ParamRef) -> int:
    return sum(k for k, *_ in block_shapes(optimizer.param_groups[ref.group_index], ref.shape))


def _rows(optimizer: MatrixOptimizer, ref: ParamRef) -> int:
    return sum(k * m for k, m, _ in block_shapes(optimizer.param_groups[ref.group_index], ref.shape))


def _rows_cut(optimizer: MatrixOptimizer, ref: ParamRef) -> bool:
    """Whether a mesh dimension cuts along the fan-in."""
    group, dims = optimizer.param_groups[ref.group_index], range(ref.param.ndim)
    kernel = len(matrix_shape(group, ref.shape)) < len(dims)
    fan_in = dims[1:] if kernel else [dims[-2 if group["conv1d"] else -1]]
    return any(ref.param.placements[dim].dim in fan_in for dim in ref.place.within)
