"""The loss on the validation set, over all ranks; also of parts of its tokens."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from data import IGNORE_INDEX, TrainValSplit, eval_batches
from data.loader import check_vocabulary
from data.shards import open_shard
from trainer.config import Config
from trainer.parallel import Parallel

Batch = tuple[Tensor, Tensor]
Bins = Mapping[str, tuple[int, Tensor]]  # by what: how many bins, and the bin of each token (V,) or place (T,)


def validation_batches(config: Config, split: TrainValSplit, parallel: Parallel) -> Iterator[Batch]:
    """This rank's part of the first ``eval.tokens`` validation tokens: (inputs, targets) [B, T]."""
    assert config.train.micro_batch is not None  # where it is not given, `validate` has chosen it
    return eval_batches(
        split.val, seq_len=config.train.seq_len, tokens=config.eval.tokens, micro_batch=config.train.micro_batch,
        rank=parallel.rank, world_size=parallel.world_size, device=parallel.device, vocab_size=split.vocab_size,
    )  # fmt: skip


def validation_loss(model: nn.Module, parallel: Parallel, batches: Iterable[Batch]) -> float:
    """Mean loss per target token, in nats, over the batches of all ranks."""
    return validation_losses(model, parallel, batches, {})[0]


def validation_losses(
    model: nn.Module, parallel: Parallel, batches: Iterable[Batch], bins: Bins
) -> tuple[float, dict[str, float]]:
    """Mean loss per target token, in nats, over the batches of all ranks: of all targets, and of those in each bin.

    ``batches`` yields (inputs, targets) [B, T], as many on every rank (a sharded model's forward is a collective);
    targets of -100 do not count.  Sums are in float64, so the split over ranks changes rounding only.  A bin without
    targets is left out; the others are named as in val/by_position/1_of_4.
    """
    names = [f"val/by_{what}/{i + 1}_of_{count}" for what, (count, _) in bins.items() for i in range(count)]
    total = torch.zeros(2, 1 + len(names), dtype=torch.float64, device=parallel.device)
    with parallel.evaluation(model):
        for inputs, targets in batches:
            known = targets != IGNORE_INDEX
            if not bins:
                total[0] += model(inputs, targets)
                total[1] += known.sum()
                continue
            losses = model(inputs, targets, reduction="none").double()
            for i, chosen in enumerate([known, *members(targets, bins)]):
                total[0, i] += losses.where(chosen & known, 0.0).sum()
                total[1, i] += (chosen & known).sum()
    loss, *others = [(loss / tokens).item() for loss, tokens in parallel.sum(total).T]
    return loss, {name: value for name, value in zip(names, others, strict=True) if value == value}


def members(targets: Tensor, bins: Bins) -> Iterator[Tensor]:
    """Which of the targets (B, T) are in each bin."""
    for what, (count, bin_of) in bins.items():
        found = bin_of[targets.clamp_min(0)] if what == "frequency" else bin_of.expand_as(targets)
        yield from (found == i for i in range(count))


def loss_bins(config: Config, split: TrainValSplit, parallel: Parallel) -> Bins:
    """Those of ``eval.by_frequency``, the most frequent tokens first, and of ``eval.by_position``, the beginning first.

    Raises UserError on every rank: a training shard is unreadable, or has a token that is not in the vocabulary."""
    bins, seq_len = dict[str, tuple[int, Tensor]](), config.train.seq_len
    if count := config.eval.by_frequency:
        bins["frequency"] = count, frequency_bins(token_counts(split, parallel), count)
    if count := config.eval.by_position:
        bins["position"] = count, torch.arange(seq_len, device=parallel.device) * count // seq_len
    return bins


def token_counts(split: TrainValSplit, parallel: Parallel) -> Tensor:
    """How often each token occurs in the training shards, (V,) int64 on the device; every rank reads some of them."""
    counts = np.zeros(split.vocab_size, dtype=np.int64)

    def read() -> None:
        for file in split.train[parallel.rank :: parallel.world_size]:
            shard = open_shard(file)
            for start in range(0, len(shard), 2**22):  # bincount makes int64 of what it reads
                tokens = shard[start : start + 2**22]
                check_vocabulary(file, start, tokens, split.vocab_size)
                counts[:] += np.bincount(tokens, minlength=split.vocab_size)

    parallel.gather(read)  # an error of one rank is raised on all
    return parallel.sum(torch.from_numpy(counts).to(parallel.device))


def frequency_bins(counts: Tensor, bins: int) -> Tensor:
    """The bin of each token: from the most frequent on, each has about the same part of all that was counted."""
    order = counts.argsort(descending=True, stable=True)
    ordered = counts[order]
    middle = 2 * ordered.cumsum(0) - ordered  # whole numbers, alike on every rank
    found = torch.empty_like(counts)
    found[order] = (middle * bins // (2 * counts.sum())).clamp_max(bins - 1)
    return found
