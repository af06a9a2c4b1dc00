"""Validation loss over a fixed number of tokens, shared by all ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from data import IGNORE_INDEX
from trainer.parallel import Parallel


def validation_loss(model: nn.Module, parallel: Parallel, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean loss per target token, in nats, over the batches of all ranks.

    ``batches`` yields (inputs, targets) [B, T], as many on every rank (a sharded model's forward is a collective);
    targets of -100 do not count.  Sums are in float64, so the split over ranks changes rounding only.
    """
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    with parallel.evaluation(model):
        for inputs, targets in batches:
            with parallel.autocast():
                loss = model(inputs, targets)
            total[0] += loss
            total[1] += (targets != IGNORE_INDEX).sum()
    loss, tokens = parallel.sum(total)
    return (loss / tokens).item()
