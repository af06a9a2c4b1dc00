"""What an evaluation during training measures.  A further number goes into the dictionary that ``evaluate`` returns:
the record, W&B and the speedrun page take every key of it."""

from collections.abc import Iterable

import torch
from torch import nn

from trainer.evaluate.validation import Batch, validation_loss
from trainer.parallel import Parallel


def evaluate(model: nn.Module, parallel: Parallel, batches: Iterable[Batch]) -> dict[str, float]:
    """On all ranks: ``val/loss`` [nats per token], and ``perf/peak_memory_bytes``, the largest of any rank so far."""
    loss = validation_loss(model, parallel, batches)
    mine = torch.tensor([parallel.peak_memory_bytes()], dtype=torch.int64, device=parallel.device)
    return {"val/loss": loss, "perf/peak_memory_bytes": int(parallel.accelerator.gather(mine).max())}
