"""The loss on the validation set, over all ranks."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from data import IGNORE_INDEX, TrainValSplit, eval_batches
from trainer.config import Config
from trainer.parallel import Parallel

Batch = tuple[Tensor, Tensor]


def validation_batches(config: Config, split: TrainValSplit, parallel: Parallel) -> Iterator[Batch]:
    """This rank's part of the first ``eval.tokens`` validation tokens: (inputs, targets) [B, T]."""
    assert config.train.micro_batch is not None  # where it is not given, `validate` has chosen it
    return eval_batches(
        split.val, seq_len=config.train.seq_len, tokens=config.eval.tokens, micro_batch=config.train.micro_batch,
        rank=parallel.rank, world_size=parallel.world_size, device=parallel.device, vocab_size=split.vocab_size,
    )  # fmt: skip


def validation_loss(model: nn.Module, parallel: Parallel, batches: Iterable[Batch]) -> float:
    """Mean loss per target token, in nats, over the batches of all ranks.

    ``batches`` yields (inputs, targets) [B, T], as many on every rank (a sharded model's forward is a collective);
    targets of -100 do not count.  Sums are in float64, so the split over ranks changes rounding only.
    """
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    with parallel.evaluation(model):
        for inputs, targets in batches:
            total[0] += model(inputs, targets)
            total[1] += (targets != IGNORE_INDEX).sum()
    loss, tokens = parallel.sum(total)
    return (loss / tokens).item()
