"""Who owns which matrix, and in which bucket it travels: pure arithmetic, the same on every rank."""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

IN_FLIGHT = 3
"""Buckets alive at once: one on its way to its owners, one computed, one on its way back."""
FLOPS_PER_BYTE = 8000.0
"""FLOPs in the time of a byte between replicas: 400 TFLOP/s of an H100, and 50 GB/s of its adapter to other nodes."""


Region = tuple[tuple[int, int], ...]
"""A rectangle of a matrix: (first, last + 1) of every dimension."""


@dataclass(frozen=True)
class MatrixSpec:
    """One parameter as the plan sees it, e.g. a layer's (3072, 768) or an expert stack (8, 3072, 768)."""

    shape: tuple[int, ...]  # of the whole
    flops: float  # of the rule
    stack: tuple[int, ...]  # (group, m, n): parameters of equal ones are computed as one stack
    workspace: float = 0.0  # bytes that its owner allocates to compute it, its part of the stack included
    regions: tuple[Region, ...] | None = None  # what each rank holds; None: rows, as FSDP2 cuts them
    copies: tuple[int, ...] = ()  # which copy it is of that; (): there is one, or they repeat the work

    @property
    def row_numel(self) -> int:
        """Elements of one row of dimension 0."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=65536)
def shard_rows(rows: int, world_size: int, rank: int) -> int:
    """Rows of dimension 0 that ``rank`` holds under FSDP2's ``Shard(0)`` (``torch.chunk`` sizes, possibly 0)."""
    chunk = -(-rows // world_size)
    return max(0, min(chunk, rows - chunk * rank))


def numel(region: Region) -> int:
    return math.prod(stop - start for start, stop in region)


def assign_owners(flops: Sequence[float], world_size: int) -> list[int]:
    """Owner rank of every matrix: largest first onto the least loaded rank, then swaps that relieve the heaviest.

    Deterministic, so that every rank computes the same answer.  Graham's bound for largest-first is 4/3 of the
    ideal makespan; the swaps bring it within a few percent when ranks hold four or more matrices.
    """
    heap = [(0.0, rank) for rank in range(world_size)]
    owners = [0] * len(flops)
    for item in sorted(range(len(flops)), key=lambda i: (-flops[i], i)):
        load, rank = heapq.heappop(heap)
        owners[item] = rank
        heapq.heappush(heap, (load + flops[item], rank))
    loads = [0.0] * world_size
    for item, rank in enumerate(owners):
        loads[rank] += flops[item]
    while _relieve_heaviest(flops, owners, loads):
        pass
    return owners


def _relieve_heaviest(flops: Sequence[float], owners: list[int], loads: list[float]) -> bool:
    """Swap one matrix of the heaviest rank for a lighter one elsewhere if that lowers the larger of both loads."""
    heavy = max(range(len(loads)), key=lambda r: (loads[r], -r))
    best = None
    seen = set()
    for a, b in ((a, b) for a in range(len(flops)) if owners[a] == heavy for b in range(len(flops))):
        light, difference = owners[b], flops[a] - flops[b]
        if light == heavy or difference <= 0 or (difference, light) in seen:
            continue
        seen.add((difference, light))
        worst = max(loads[heavy] - difference, loads[light] + difference)
        if worst < loads[heavy] * (1 - 1e-9) and (best is None or worst < best[0]):
            best = (worst, a, b, difference)
    if best is None:
        return False
    _, a, b, difference = best
    loads[heavy] -= difference
    loads[owners[b]] += difference
    owners[a], owners[b] = owners[b], owners[a]
    return True


def worth_sharing(specs: Sequence[MatrixSpec], world_size: int, copies: int, itemsize: int) -> bool:
    """Whether ``copies`` shard groups of ``world_size`` ranks, which hold the same, take less time if each matrix is
    computed in one of them alone: what the slowest rank then saves in FLOPs, against the bytes that a rank then sends
    to other copies."""
    flops = [spec.flops for spec in specs]

    def slowest(ranks: int) -> float:
        loads = [0.0] * ranks
        for owner, work in zip(assign_owners(flops, ranks), flops, strict=True):
            loads[owner] += work
        return max(loads)

    sent = sum(spec.numel for spec in specs) * itemsize * (copies - 1) / (copies * world_size)
    return slowest(world_size) - slowest(world_size * copies) > FLOPS_PER_BYTE * sent


class Plan:
    """Owners and buckets of a list of matrices over ``world_size`` ranks; pure arithmetic, equal on every rank.

    ``bucket_elements`` caps the elements of the whole matrices that one owner holds in one bucket, counted as if every
    shard had the rows of the largest, and ``bucket_workspace`` the bytes to compute them; one above either travels
    alone.  The first cap is lower where an owner's matrices would otherwise make fewer than ``IN_FLIGHT`` buckets: with
    a single one, nothing is computed while matrices travel, and all memory is new.
    """

    def __init__(
        self, specs: Sequence[MatrixSpec], world_size: int, bucket_elements: int, bucket_workspace: float = float("inf")
    ):
        self.specs, self.world_size, self.bucket_workspace = list(specs), world_size, bucket_workspace
        self.owners = assign_owners([spec.flops for spec in self.specs], world_size)
        owned = [0] * world_size
        for spec, owner in zip(self.specs, self.owners, strict=True):
            owned[owner] += self._padded(spec)
        self.bucket_elements = max(1, min(bucket_elements, -(-max(owned) // IN_FLIGHT)))

    def digest(self) -> int:
        """A 62-bit hash of everything on which ranks must agree."""
        text = repr((self.specs, self.world_size, self.bucket_elements, self.bucket_workspace, self.owners))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2

    def buckets(self, active: Sequence[int]) -> list[list[list[int]]]:
        """``buckets[b][rank]``: the active matrices that ``rank`` owns in bucket ``b``, equal stacks side by side;
        e.g. [[[0, 3], [1, 2]], [[4], [5]]] for six matrices, two ranks and two buckets."""
        queues = [
            sorted(
                (i for i in active if self.owners[i] == rank),
                key=lambda i: (-self.specs[i].flops, repr(self.specs[i].stack), i),
            )
            for rank in range(self.world_size)
        ]
        buckets = []
        while any(queues):
            buckets.append([self._take(queue) for queue in queues])
        return buckets

    def _take(self, queue: list[int]) -> list[int]:
        taken: list[int] = []
        elements, workspace = 0, 0.0
        while queue:
            elements += self._padded(self.specs[queue[0]])
            workspace += self.specs[queue[0]].workspace
            if taken and (elements > self.bucket_elements or workspace > self.bucket_workspace):
                break
            taken.append(queue.pop(0))
        return taken

    def _padded(self, spec: MatrixSpec) -> int:
        if spec.regions is not None:
            return self.world_size * max(map(numel, spec.regions))
        return shard_rows(spec.shape[0], self.world_size, 0) * self.world_size * spec.row_numel

    def region(self, index: int, rank: int) -> Region:
        """What ``rank`` holds of matrix ``index``."""
        spec = self.specs[index]
        if spec.regions is not None:
            return spec.regions[rank]
        rows = spec.shape[0]
        start = min(rows, shard_rows(rows, self.world_size, 0) * rank)
        return (start, start + shard_rows(rows, self.world_size, rank)), *((0, size) for size in spec.shape[1:])

    def shard_numel(self, index: int, rank: int) -> int:
        """Elements of matrix ``index`` that ``rank`` holds."""
        spec = self.specs[index]
        if spec.regions is not None:
            return numel(spec.regions[rank])
        return shard_rows(spec.shape[0], self.world_size, rank) * spec.row_numel

    def given_numel(self, index: int, rank: int) -> int:
        """Elements of matrix ``index`` that ``rank`` gives its owner, who needs no other copy than its own."""
        copies = self.specs[index].copies
        if copies and copies[rank] != copies[self.owners[index]]:
            return 0
        return self.shard_numel(index, rank)

    def elements_sent(self, rank: int, active: Sequence[int]) -> int:
        """Elements that ``rank`` sends to others in one step over sharded parameters (the formula of exchange.py)."""
        sent = 0
        for i in active:
            copies = len(set(self.specs[i].copies)) or 1
            back = copies * self.specs[i].numel - self.shard_numel(i, rank)
            sent += back if self.owners[i] == rank else self.given_numel(i, rank)
        return sent
