"""How shards become whole matrices at their owners, and shards again.

This is the only file of the package that communicates.  FSDP2 leaves every parameter in chunks of rows
(``Shard(0)``, ``torch.chunk`` sizes) over a shard group of W ranks.  A whole-matrix rule runs once per
matrix, on its *owner*, in three phases per bucket:

    1. gather    every rank packs its rows of the bucket's matrices, ordered by owner, into ``shards``;
                 one ``all_to_all_single`` fills each owner's ``wholes`` (ordered by source rank);
    2. compute   the owner joins the rows in a stack, runs the rule, and writes the result back into ``wholes``;
    3. scatter   the mirrored ``all_to_all_single`` (splits swapped) returns the rows to ``shards``.

While bucket b is computed, bucket b+1 is being gathered and bucket b-1 scattered.  A rank sends, per step,

    sum over matrices it does not own of its own rows        (gather)
  + sum over matrices it owns of everybody else's rows       (scatter)

elements: 2 S (W-1) / W^2 of the S matrix elements when shards and owners are balanced, against
S (W-1) / W for gathering every matrix everywhere, which also repeats all of the work on every rank.

Replicated parameters (DDP) need no gather: owners share the work and broadcast their results.  A process
alone does neither.  The classes at the end are these three cases.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import IN_FLIGHT, Item, Plan, shard_rows


class Transfer:
    """One bucket on its way: ``receive()``, then ``send_back(results)``, then ``updates()``, each called once.

    This base is the process alone: nothing travels, but it is rounded as if it did.
    """

    def __init__(self, plan: Plan, bucket: list[list[int]], rank: int, group, dtype: torch.dtype):
        self.plan, self.bucket, self.rank, self.group, self.dtype = plan, bucket, rank, group, dtype
        self.owned = bucket[rank]
        self.order = [i for items in bucket for i in items]

    def start(self, inputs: dict[int, Tensor]) -> "Transfer":
        """Begin with this rank's part of every item of the bucket (its rows, or the whole if replicated)."""
        self.inputs = {i: part.to(self.dtype) for i, part in inputs.items()}
        return self

    def receive(self) -> Callable[[int, Tensor], None]:
        """Wait; returns ``fill(i, whole)``, which writes the owned item i into a tensor of its shape."""
        return lambda i, whole: whole.copy_(self.inputs[i])

    def send_back(self, results: dict[int, Tensor]) -> None:
        """Hand over the preconditioned whole matrices; they begin their way back."""
        self.inputs, self.results = None, {i: result.to(self.dtype) for i, result in results.items()}

    def updates(self) -> dict[int, Tensor]:
        """This rank's part of every result of the bucket, shaped like the inputs."""
        return self.results


class ReplicatedTransfer(Transfer):
    """Replicated parameters: every rank has every input, owners broadcast their results."""

    def start(self, inputs):
        self.inputs = {i: inputs[i].to(self.dtype) for i in self.owned}
        self.device = next(iter(inputs.values())).device
        return self

    def send_back(self, results):
        regions = []
        for rank, items in enumerate(self.bucket):
            numel = sum(self.plan.items[i].numel for i in items)
            region = torch.empty(numel, dtype=self.dtype, device=self.device)
            if rank == self.rank and items:
                _copy_flat(region, [results[i] for i in items])
            regions.append(region)
        self.inputs, self.regions = None, regions
        self.works = [
            dist.broadcast(region, group=self.group, group_src=rank, async_op=True)
            for rank, region in enumerate(regions)
            if region.numel()
        ]

    def updates(self):
        for work in self.works:
            work.wait()
        result = {}
        for items, region in zip(self.bucket, self.regions, strict=True):
            shapes = [self.plan.items[i].shape for i in items]
            result.update(zip(items, _views(region, shapes), strict=True))
        return result


class ShardedTransfer(Transfer):
    """Rows over a shard group: two packed ``all_to_all_single``, the second mirroring the first."""

    def start(self, inputs):
        plan, world = self.plan, range(self.plan.world_size)
        self.to_owner = [sum(plan.shard_numel(i, self.rank) for i in items) for items in self.bucket]
        self.from_rank = [sum(plan.shard_numel(i, rank) for i in self.owned) for rank in world]
        self.shapes = [inputs[i].shape for i in self.order]
        device = inputs[self.order[0]].device
        self.shards = torch.empty(sum(self.to_owner), dtype=self.dtype, device=device)
        self.whole = torch.empty(sum(self.from_rank), dtype=self.dtype, device=device)
        _copy_flat(self.shards, [inputs[i] for i in self.order])
        self.work = dist.all_to_all_single(
            self.whole, self.shards, self.from_rank, self.to_owner, group=self.group, async_op=True
        )
        return self

    def _pieces(self) -> list[list[Tensor]]:
        """``pieces[j][rank]``: the rows of the j-th owned matrix that came from, and return to, ``rank``."""
        sizes = [self.plan.shard_numel(i, rank) for rank in range(self.plan.world_size) for i in self.owned]
        flat = self.whole.split(sizes)
        return [list(flat[j :: len(self.owned)]) for j in range(len(self.owned))]

    def receive(self):
        self.work.wait()
        self.work = None
        pieces = dict(zip(self.owned, self._pieces(), strict=True))
        return lambda i, whole: torch.cat([piece.view(-1, *whole.shape[1:]) for piece in pieces[i]], out=whole)

    def send_back(self, results):
        for i, rows in zip(self.owned, self._pieces(), strict=True):
            counts = [shard_rows(self.plan.items[i].shape[0], len(rows), rank) for rank in range(len(rows))]
            parts = results.pop(i).split(counts)
            torch._foreach_copy_([row.view(part.shape) for row, part in zip(rows, parts, strict=True)], list(parts))
        self.work = dist.all_to_all_single(
            self.shards, self.whole, self.to_owner, self.from_rank, group=self.group, async_op=True
        )

    def updates(self):
        self.work.wait()
        self.work = self.whole = None  # the work holds its buffers too
        return dict(zip(self.order, _views(self.shards, self.shapes), strict=True))


def _copy_flat(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    views = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(list(views), [t.reshape(-1) for t in tensors])


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    pieces = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class Exchange:
    """The pipeline over the buckets of one set of parameters that are laid out alike.

    Args:
        items: one per parameter, the same list on every rank.
        layout: ``"alone"``, ``"replicated"`` or ``"sharded"``.
        group: process group of the W ranks (``None`` when alone).
        dtype: in which matrices travel.
        bucket_bytes: a step's transient memory is at most twice this, unless a single item exceeds its share.

    Raises:
        RuntimeError: if the ranks of the group do not hold the same plan.
    """

    TRANSFERS = {"alone": Transfer, "replicated": ReplicatedTransfer, "sharded": ShardedTransfer}

    def __init__(self, items: Sequence[Item], layout: str, group, dtype: torch.dtype, bucket_bytes: int):
        self.layout, self.group, self.dtype = layout, group, dtype
        self.rank = dist.get_rank(group) if group is not None else 0
        world_size = dist.get_world_size(group) if group is not None else 1
        # An element that an owner holds in a bucket costs two buffers in each of the IN_FLIGHT buckets (where results
        # are broadcast, those of all owners). The rest is left to the one bucket that is computed: as much as suits
        # most items, so that an outlier travels alone instead of making all buckets small.
        buffers = 2 * IN_FLIGHT * (world_size if layout == "replicated" else 1) * dtype.itemsize
        workspace = statistics.median(item.workspace / max(1, item.numel) for item in items)
        elements = 2 * bucket_bytes / (buffers + workspace)
        self.plan = Plan(items, world_size, int(elements), elements * workspace)
        self.transfer = self.TRANSFERS[layout]
        self._buckets: dict[tuple[int, ...], list] = {}
        self.host_group = _host_group(group)
        if not self.agree(self.plan.digest()):
            raise RuntimeError(
                "the ranks of a shard group were given different matrices (number, shapes, order or settings); "
                "build the optimizer from the same parameters, in the same order, on every rank"
            )

    def agree(self, value: int) -> bool:
        """Whether all ranks hold the same 62-bit value.  One 16-byte all_reduce between hosts; no device sync."""
        if self.host_group is None:
            return True
        extremes = torch.tensor([value, -value])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.host_group)
        return bool(extremes[0] == -extremes[1])

    def warm_up(self, device: torch.device) -> None:
        """Open NCCL's peer connections now: a first all_to_all inside a step can deadlock across nodes."""
        if self.layout == "sharded" and device.type == "cuda":
            peers = torch.zeros(self.plan.world_size, device=device)
            dist.all_to_all_single(torch.empty_like(peers), peers, group=self.group)

    def run(
        self,
        active: Sequence[int],
        prepare: Callable[[list[int]], dict[int, Tensor]],
        precondition: Callable[[list[int], Callable[[int, Tensor], None]], dict[int, Tensor]],
        apply: Callable[[dict[int, Tensor]], None],
    ) -> None:
        """One step: ``prepare(items)`` on shards, ``precondition(owned, fill)`` at the owner of the whole matrices,
        which ``fill(i, whole)`` brings, ``apply(updates)`` on shards."""
        key = tuple(active)
        if key not in self._buckets:
            self._buckets[key] = self.plan.buckets(active)
        buckets = self._buckets[key]
        gathering = self._start(buckets[0], prepare) if buckets else None
        scattering = None
        for following in [*buckets[1:], None]:
            if gathering is None:
                return
            current, gathering = gathering, self._start(following, prepare) if following else None
            current.send_back(precondition(current.owned, current.receive()))
            if scattering is not None:
                apply(scattering.updates())
            scattering = current
        apply(scattering.updates())

    def _start(self, bucket, prepare) -> Transfer:
        transfer = self.transfer(self.plan, bucket, self.rank, self.group, self.dtype)
        return transfer.start(prepare(transfer.order))


def _host_group(group):
    """A gloo group of the same ranks, so that hosts can compare notes without touching the device."""
    if group is None or "nccl" not in dist.get_backend(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
