"""How shards become whole matrices at their owners, and shards again.

This is the only file of the package that communicates in a step.  FSDP2 leaves every parameter in chunks of rows
(``Shard(0)``, ``torch.chunk`` sizes) over a shard group of W ranks; tensor parallelism, alone or below FSDP2, leaves
other rectangles, of which everything here holds as well.  A whole-matrix rule runs once per matrix, on its *owner*, in
three phases per bucket:

    1. gather    every rank packs its rows of the bucket's matrices, ordered by owner, into ``shards``;
                 one ``all_to_all_single`` fills each owner's ``packed`` (ordered by source rank);
    2. compute   the owner joins the rows in a stack, runs the rule, and writes the result back into ``packed``;
    3. scatter   the mirrored ``all_to_all_single`` (splits swapped) returns the rows to ``shards``.

While bucket b is computed, bucket b+1 is being gathered and bucket b-1 scattered.  A rank sends, per step,

    sum over matrices it does not own of its own rows        (gather)
  + sum over matrices it owns of everybody else's rows       (scatter)

elements: 2 S (W-1) / W^2 of the S matrix elements when shards and owners are balanced, against
S (W-1) / W for gathering every matrix everywhere, which also repeats all of the work on every rank.

Replicas of a shard group (HSDP) do the same side by side, or share the work: then the group is all of their ranks, an
owner gets the rows of its own replica, and returns those of all.

Replicated parameters (DDP) need no gather: owners share the work and broadcast.  A process by itself does neither.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import IN_FLIGHT, MatrixSpec, Plan, shard_rows

Bucket = list[list[int]]


class Transfer:
    """One bucket on its way: ``start_gather``, ``wait_gather``, ``unpack_into`` for every owned matrix,
    ``start_scatter``, ``wait_scatter``, in this order.

    This base is the single process: nothing travels, but it is rounded as if it did.

    The examples in comments are those of rank 1 of 2, for a bucket of three matrices: A (5, 4), which rank 0 owns, and
    B (6, 4) and C (1, 4), which rank 1 owns.
    """

    order: list[int]  # the bucket's matrices by owner: [A, B, C]
    owned: list[int]  # those of this rank: [B, C]

    def __init__(self, plan: Plan, bucket: Bucket, rank: int, group: dist.ProcessGroup | None, comm_dtype: torch.dtype):
        self.plan, self.bucket, self.rank, self.group, self.comm_dtype = plan, bucket, rank, group, comm_dtype
        self.owned = bucket[rank]
        self.order = [i for indices in bucket for i in indices]

    def start_gather(self, inputs: dict[int, Tensor]) -> None:
        """Begin with this rank's part of every matrix of the bucket (its rows, or the whole if replicated)."""
        self.wholes = {i: part.to(self.comm_dtype) for i, part in inputs.items()}

    def wait_gather(self) -> None:
        """Until the owned matrices are here."""

    def unpack_into(self, i: int, whole: Tensor) -> None:
        """Write the owned matrix i into ``whole``, a tensor of its shape, e.g. (6, 4), with any strides and dtype."""
        whole.copy_(self.wholes[i])

    def start_scatter(self, results: dict[int, Tensor]) -> None:
        """Send the preconditioned whole matrices back; this may empty ``results``."""
        self.wholes = {i: result.to(self.comm_dtype) for i, result in results.items()}

    def wait_scatter(self) -> dict[int, Tensor]:
        """This rank's part of every result of the bucket, shaped like the inputs."""
        return self.wholes


class ReplicatedTransfer(Transfer):
    """Replicated parameters: every rank has every input, owners broadcast their results."""

    results: list[Tensor]  # by owner, its results one after the other: [20], A's, and [28], B's and C's
    works: list[dist.Work | None]

    def start_gather(self, inputs: dict[int, Tensor]) -> None:
        super().start_gather({i: inputs[i] for i in self.owned})
        self.device = next(iter(inputs.values())).device

    def start_scatter(self, results: dict[int, Tensor]) -> None:
        sizes = [sum(self.plan.specs[i].numel for i in indices) for indices in self.bucket]
        self.results = [torch.empty(size, dtype=self.comm_dtype, device=self.device) for size in sizes]
        _copy_flat(self.results[self.rank], [results[i] for i in self.owned])
        del self.wholes
        self.works = [
            dist.broadcast(flat, group=self.group, group_src=rank, async_op=True)
            for rank, flat in enumerate(self.results)
            if flat.numel()
        ]

    def wait_scatter(self) -> dict[int, Tensor]:
        for work in self.works:
            _wait(work)
        parts: dict[int, Tensor] = {}
        for indices, flat in zip(self.bucket, self.results, strict=True):
            parts.update(zip(indices, _views(flat, [self.plan.specs[i].shape for i in indices]), strict=True))
        return parts


class ShardedTransfer(Transfer):
    """Rows over a shard group: two packed ``all_to_all_single``, the second mirroring the first."""

    to_owner: list[int]  # elements of this rank's rows by owner: [8, 12], for 2 rows of A; 3 of B and 0 of C
    from_rank: list[int]  # elements of the owned matrices by holder: [16, 12], for 3 rows of B and 1 of C; 3 and 0
    shapes: list[torch.Size]  # of this rank's rows: [(2, 4), (3, 4), (0, 4)]
    shards: Tensor  # [20]: this rank's rows, ordered by owner
    packed: Tensor  # [28]: the owned matrices, ordered by the rank that holds the rows
    rows: dict[int, list[Tensor]]  # views of packed by matrix and holder: {B: [[12], [12]], C: [[4], [0]]}
    work: dist.Work | None

    def start_gather(self, inputs: dict[int, Tensor]) -> None:
        self.shapes = [inputs[i].shape for i in self.order]
        self._allocate(self.plan.given_numel, inputs[self.order[0]].device)
        _copy_flat(self.shards, [inputs[i] for i in self.order if self.plan.given_numel(i, self.rank)])
        self.work = dist.all_to_all_single(
            self.packed, self.shards, self.from_rank, self.to_owner, group=self.group, async_op=True
        )

    def wait_gather(self) -> None:
        _wait(self.work)
        del self.work  # it holds the buffers too

    def _allocate(self, numel: Callable[[int, int], int], device: torch.device) -> None:
        """Buffers for what ``numel(matrix, rank)`` says of everyone's part of a matrix."""
        ranks = range(self.plan.world_size)
        self.to_owner = [sum(numel(i, self.rank) for i in indices) for indices in self.bucket]
        self.from_rank = [sum(numel(i, rank) for i in self.owned) for rank in ranks]
        self.shards = torch.empty(sum(self.to_owner), dtype=self.comm_dtype, device=device)
        self.packed = torch.empty(sum(self.from_rank), dtype=self.comm_dtype, device=device)
        flat = torch.split(self.packed, [numel(i, rank) for rank in ranks for i in self.owned])
        self.rows = {i: list(flat[j :: len(self.owned)]) for j, i in enumerate(self.owned)}

    def unpack_into(self, i: int, whole: Tensor) -> None:
        if self.plan.specs[i].regions is None:
            torch.cat([rows.view(-1, *whole.shape[1:]) for rows in self.rows[i]], out=whole)
        else:
            pairs = [pair for pair in zip(self._parts(i, whole), self.rows[i], strict=True) if len(pair[1])]
            torch._foreach_copy_([part for part, _ in pairs], [flat.view(part.shape) for part, flat in pairs])

    def _parts(self, i: int, whole: Tensor) -> list[Tensor]:
        """Views of what every rank holds."""
        ranks, spec = range(self.plan.world_size), self.plan.specs[i]
        if spec.regions is None:
            return list(torch.split(whole, [shard_rows(spec.shape[0], len(ranks), rank) for rank in ranks]))
        return [whole[tuple(slice(*bounds) for bounds in region)] for region in spec.regions]

    def start_scatter(self, results: dict[int, Tensor]) -> None:
        if any(self.plan.specs[i].copies for i in self.order):  # more goes back than came
            self._allocate(self.plan.shard_numel, self.shards.device)
        pairs = [pair for i, of in self.rows.items() for pair in zip(of, self._parts(i, results.pop(i)), strict=True)]
        if pairs:
            torch._foreach_copy_([flat.view(part.shape) for flat, part in pairs], [part for _, part in pairs])
        self.work = dist.all_to_all_single(
            self.shards, self.packed, self.to_owner, self.from_rank, group=self.group, async_op=True
        )

    def wait_scatter(self) -> dict[int, Tensor]:
        _wait(self.work)
        del self.work, self.packed, self.rows
        return dict(zip(self.order, _views(self.shards, self.shapes), strict=True))


def _wait(work: dist.Work | None) -> None:
    if work is not None:  # None on a rank outside the group
        work.wait()


def _copy_flat(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(torch.split(flat, [t.numel() for t in tensors]), [t.reshape(-1) for t in tensors])


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    pieces = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class Exchange:
    """The pipeline over the buckets of one set of parameters that are laid out alike.

    Args:
        specs: one per parameter, the same list on every rank.
        layout: ``"single"``, ``"replicated"`` or ``"sharded"``.
        group: process group of the W ranks (``None`` when single).
        copy_group: those of them that hold one copy together, if there are several copies.
        comm_dtype: in which matrices travel.
        bucket_bytes: a step's transient memory is at most twice this, unless a single matrix exceeds its share.

    Raises:
        RuntimeError: if the ranks of the group do not hold the same plan.
    """

    TRANSFERS = {"single": Transfer, "replicated": ReplicatedTransfer, "sharded": ShardedTransfer}

    def __init__(
        self,
        specs: Sequence[MatrixSpec],
        layout: str,
        group: dist.ProcessGroup | None,
        comm_dtype: torch.dtype,
        bucket_bytes: int,
        copy_group: dist.ProcessGroup | None = None,
    ):
        self.layout, self.group, self.comm_dtype = layout, group, comm_dtype
        self.copy_group = copy_group or group
        self.rank = dist.get_rank(group) if group is not None else 0
        world_size = dist.get_world_size(group) if group is not None else 1
        self.bucket_bytes = bucket_bytes
        self.plan = plan_exchange(specs, layout, world_size, comm_dtype, bucket_bytes)
        self._buckets: dict[tuple[int, ...], list[Bucket]] = {}
        self.host_group = _host_group(group)
        if not self.all_equal(self.plan.digest()):
            raise RuntimeError(
                "the ranks of a shard group were given different matrices (number, shapes, order or settings); "
                "build the optimizer from the same parameters, in the same order, on every rank"
            )

    def all_equal(self, value: int) -> bool:
        """Whether all ranks hold the same 62-bit value.  One 16-byte all_reduce between hosts; no device sync."""
        if self.host_group is None:
            return True
        extremes = torch.tensor([value, -value])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.host_group)
        return bool(extremes[0] == -extremes[1])

    def all_reduce(self, partial: Tensor) -> None:
        """Sum, in place, over the ranks that together hold one copy of the parameters."""
        if self.layout == "sharded":
            dist.all_reduce(partial, group=self.copy_group)

    def warm_up(self, device: torch.device) -> None:
        """Open NCCL's peer connections now: a first all_to_all inside a step can deadlock across nodes."""
        if self.layout == "sharded" and device.type == "cuda":
            peers = torch.zeros(self.plan.world_size, device=device)
            dist.all_to_all_single(torch.empty_like(peers), peers, group=self.group)

    def run(
        self,
        active: Sequence[int],
        prepare: Callable[[list[int]], dict[int, Tensor]],
        precondition: Callable[[Transfer], dict[int, Tensor]],
        apply: Callable[[dict[int, Tensor]], None],
        sums_up: bool = False,
    ) -> None:
        """One step: ``prepare(indices)`` on shards, ``precondition(transfer)`` at the owner of the whole matrices,
        which the transfer has gathered, ``apply(updates)`` on shards.  One that ``sums_up`` comes before the next
        scatter, for which its all_reduce would wait otherwise."""
        sums_up = sums_up and self.layout == "sharded"
        key = tuple(active)
        if key not in self._buckets:
            self._buckets[key] = self.plan.buckets(active)
        gathering: Transfer | None = None
        scattering: Transfer | None = None
        for bucket in [*self._buckets[key], None, None]:
            gathered, gathering = gathering, self._start_gather(bucket, prepare) if bucket else None
            if gathered is not None:
                gathered.wait_gather()
                results = precondition(gathered)
            if scattering is not None and sums_up:
                apply(scattering.wait_scatter())
            if gathered is not None:
                gathered.start_scatter(results)
                del results
            if scattering is not None and not sums_up:
                apply(scattering.wait_scatter())
            scattering = gathered

    def _start_gather(self, bucket: Bucket, prepare: Callable[[list[int]], dict[int, Tensor]]) -> Transfer:
        transfer = self.TRANSFERS[self.layout](self.plan, bucket, self.rank, self.group, self.comm_dtype)
        transfer.start_gather(prepare(transfer.order))
        return transfer


def plan_exchange(
    specs: Sequence[MatrixSpec], layout: str, world_size: int, comm_dtype: torch.dtype, bucket_bytes: int
) -> Plan:
    """The plan that an :class:`Exchange` of these arguments has, over a number of ranks that need not be there."""
    # An element that an owner holds in a bucket costs two buffers in each of the IN_FLIGHT buckets (where results
    # are broadcast, those of all owners). The rest is left to the one bucket that is computed: as much as suits
    # most matrices, so that an outlier travels alone instead of making all buckets small.
    buffers = 2 * IN_FLIGHT * (world_size if layout == "replicated" else 1) * comm_dtype.itemsize
    workspace = statistics.median(spec.workspace / max(1, spec.numel) for spec in specs)
    elements = 2 * bucket_bytes / (buffers + workspace)
    return Plan(specs, world_size, int(elements), elements * workspace)


def _host_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A gloo group of the same ranks, so that hosts can compare notes without touching the device."""
    if group is None or "nccl" not in dist.get_backend(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    hosts: dist.ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return hosts
