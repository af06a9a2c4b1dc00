"""QK-clip, ``optim.qk_clip``: attention layers note their heads' largest logits, and after an update heads above it are
scaled down."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import UserError
from optim import qk_clip
from trainer.attention import Attention
from trainer.parallel import Parallel


class QKClip:
    """Of the model's attention layers; without ``tau`` of none.  All ranks call together: there is one all_reduce of a
    number per head.

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
