"""What must not go on: updates that are not finite, attention logits that grow, and replicas that differ."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError
from optim import qk_clip
from optim.combined import Combined
from optim.matrix import local
from optim.named_state import replicated_tensors
from trainer.attention import Attention
from trainer.config import NonFinite, TrainConfig
from trainer.parallel import Parallel


class DivergedError(UserError):
    """A loss or gradient norm is not finite, and the run must not go on."""


class NonFiniteGuard:
    """Applies an update only if its loss and gradient norm are finite.

    The decision is taken from sums over all ranks, so it is the same everywhere.  On the CPU the host looks at them.
    On a GPU they stay on the device, which undoes the update itself, and counts; the host reads the counters where it
    calls ``check``.
    """

    def __init__(self, train: TrainConfig, device: torch.device):
        self.stops, self.max_skips = train.non_finite == NonFinite.stop, train.max_skips
        self.on_host = device.type == "cpu"
        self.tripped = torch.tensor(False, device=device)  # with non_finite=stop, after the first
        self.in_a_row = self.longest = torch.zeros((), dtype=torch.float64, device=device)  # updates skipped
        # The last skipped update (with stop: the first), its loss and norm.
        self.at = torch.zeros((), dtype=torch.int64, device=device)
        self.measured = torch.zeros(2, dtype=torch.float64, device=device)

    def step(self, optimizers: Combined, step: int, measured: Tensor) -> Tensor:
        """Apply update number ``step``, from 1, or skip it.

        Args:
            measured: loss and gradient norm, float64 [2] on the device, the same on all ranks.

        Returns:
            How many updates in a row have been skipped by now: a scalar on the device, 0 if this one is applied.
        """
        noted = skip = bad = ~torch.isfinite(measured).all()
        if self.stops:
            noted, skip = bad & ~self.tripped, bad | self.tripped
            self.tripped = skip
        if not self.on_host:
            guarded_step(optimizers, skip)
        elif not skip:
            optimizers.step()
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        self.at, self.measured = torch.where(noted, step, self.at), torch.where(noted, measured, self.measured)
        return self.in_a_row

    @property
    def skipped(self) -> int:
        """Updates in a row, up to the last one; waits for the device."""
        return int(self.in_a_row)

    @skipped.setter
    def skipped(self, count: int) -> None:
        self.in_a_row = torch.full_like(self.in_a_row, count)

    def check(self) -> None:
        """Waits for the device.  Raises DivergedError: the run must not go on."""
        longest = int(self.longest)
        if not longest or not (self.stops or longest > self.max_skips):
            return
        step, (loss, norm) = int(self.at), self.measured.tolist()
        if self.stops:
            mend = "the update was not applied; lower optim.*.lr, or set train.clip=1.0 or train.non_finite=skip"
        else:
            mend = f"{longest} updates in a row were skipped, train.max_skips={self.max_skips}"
        raise DivergedError(f"step {step} has loss {loss} and gradient norm {norm}: {mend}")


def guarded_step(optimizers: Combined, bad: Tensor) -> None:
    """``optimizers.step()``, but where ``bad`` (a bool on the device) holds nothing changes; the host never waits."""
    optimizers.found_inf = bad.float()
    try:
        optimizers.step()
    finally:
        optimizers.found_inf = None


class QKClip:
    """``optim.qk_clip``: attention layers note their heads' largest logits, and after an update those above ``tau`` are
    scaled down; without it no layer does.  All ranks call together, for one all_reduce of a number per head.

    Raises:
        UserError: there is no such layer, or its queries and keys are normalised.
    """

    def __init__(self, tau: float | None, model: nn.Module, parallel: Parallel):
        self.tau, self.parallel = tau or 0.0, parallel
        layers = [layer for layer in model.modules() if isinstance(layer, Attention)] if tau is not None else []
        if tau is not None and not layers:
            raise UserError(f"optim.qk_clip={tau}: {type(model).__name__} has no trainer.attention.Attention, which "
                            "notes the logits: let it have one, or leave qk_clip out")  # fmt: skip
        if any(layer.qk_norm for layer in layers):
            raise UserError(f"optim.qk_clip={tau} does nothing where model.qk_norm=true fixes the length of queries "
                            "and keys: leave one of them out")  # fmt: skip
        wide = torch.promote_types(parallel.dtype, torch.float32)
        self.layers = [(layer, layer.note_largest(parallel.device, wide)) for layer in layers]

    def step(self, skipped: Tensor) -> None:
        """After an update, whose logits count no more; where it was ``skipped`` (not 0) the weights stay."""
        if not self.layers:
            return
        largest = torch.stack([noted for _, noted in self.layers])  # [layers, heads]
        if self.parallel.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        largest.masked_fill_(skipped > 0, 0.0)
        for (layer, noted), of in zip(self.layers, largest, strict=True):
            qk_clip(layer.q.parameters(), layer.k.parameters(), of, self.tau)
            noted.zero_()


def check_replicas(model: nn.Module, optimizers: Combined, averages: Mapping[str, Tensor], parallel: Parallel) -> None:
    """Compare the bits of weights, of their averages and of the optimizers' state over the ranks that hold the same
    ones; waits for the device.  On all ranks.

    Owners alone hold state of whole matrices, and their faults reach all replicas alike; buffers may be a rank's own.

    Raises UserError: naming the ranks and the first tensor that differs.
    """
    if parallel.replicate_group is None:
        return
    weights = {name.removeprefix("module."): weight for name, weight in model.named_parameters()}
    tensors = {**weights, **averages, **replicated_tensors(optimizers)}
    parallel.gather(lambda: _compare_replicas(tensors, parallel.replicate_group))


def _compare_replicas(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    names = list(tensors)
    mine = torch.stack([_sum_of_bits(local(tensor.detach())) for tensor in tensors.values()])
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, mine, group=group)
    sums = torch.stack(everywhere).cpu()  # [replicas, tensors]
    differing = (sums != sums[0]).any(0).nonzero().flatten().tolist()
    if not differing:
        return
    tensor, ranks = differing[0], dist.get_process_group_ranks(group)
    usual = sums[:, tensor].mode().values
    odd = [rank for rank, value in zip(ranks, sums[:, tensor], strict=True) if value != usual]
    two = f"ranks {' and '.join(map(str, ranks))} hold different values"
    who = f"rank {odd[0]} holds other values than its replicas" if len(ranks) > 2 else two
    raise UserError(
        f"{names[tensor]}: {who} ({len(differing)} of {len(names)} tensors), as after a fault of memory or network; go "
        "on from a checkpoint of before, with run.dir or run.from, on other machines"
    )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """A sum that changes with any single bit of the tensor, and with places exchanged: an int64 scalar on its device.

    Rows and columns have weights of their own, without a copy of the tensor; that of a place, their sum, is odd.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    integers = tensor.contiguous().view(kinds[tensor.itemsize])
    integers = integers.flatten(1) if integers.ndim > 1 else integers.reshape(1, -1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for dim, factor, odd in ((0, 0x2545F4914F6CDD1D, 0), (1, 0x1B873593CC9E2D51, 1)):
        sums = integers.sum(dim, dtype=torch.int64)
        places = torch.arange(len(sums), device=tensor.device)
        total += (sums * (2 * factor * places + odd)).sum()  # modulo 2^64
    return total
