"""Batches: a pure function of (shards, seed, step, world size, rank).

A window is `seq_len` inputs and the same tokens one place on as targets, so neighbouring windows share a token.
The global batch of step t is `batch_sequences` windows; rank r takes the r-th contiguous slice of it. How it is
cut into ranks and micro-batches never changes which tokens step t sees. The loader's whole state is the step.

order=sequential, that of the speedrun's simple loader: a shard of n tokens gives (n − 1) // B batches of
    B = batch_sequences · seq_len contiguous tokens (+1); its tail is dropped; after the last shard, the first again.
order=shuffled: the (n − 1) // seq_len windows of every shard, all N together in an order drawn anew each epoch
    from (seed, epoch). Step t takes places t·batch … t·batch + batch − 1 of the endless sequence of epochs, so a
    batch may straddle two epochs and each window comes exactly once in each.
order=llmc: the batches of sequential, whose eighths come from different ones; see data/llmc.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import UserError
from data.config import check_order
from data.llmc import RANKS, LLMCOrder
from data.permutation import permute
from data.shards import open_shard

Batch = tuple[Tensor, Tensor]
IGNORE_INDEX = -100  # the target that cross-entropy leaves out


class Loader:
    """Training batches from shards; see the module's docstring for the order.

    Raises UserError if a shard is unreadable, if the shards hold less than one batch, or if `batch_sequences`
    is not a multiple of world_size · micro_batch; while training, if a token is not below `vocab_size`.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        *,
        seq_len: int,
        batch_sequences: int,
        order: str = "sequential",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
    ) -> None:
        check_order(order)
        if order == "llmc" and batch_sequences % RANKS:
            mend = f"give train.batch_tokens a multiple of {RANKS * seq_len}"
            raise UserError(f"data.order=llmc cuts {batch_sequences} sequences into {RANKS} equal parts: {mend}")
        self.seq_len, self.batch_sequences, self.order, self.seed = seq_len, batch_sequences, order, seed
        self.rank, self.device, self.vocab_size = rank, torch.device(device), vocab_size
        self.local_sequences = batch_sequences // world_size
        self.micro_batch = micro_batch or self.local_sequences
        if batch_sequences % (world_size * self.micro_batch):
            parts = f"{world_size} ranks x micro-batches of {self.micro_batch}"
            raise UserError(f"a batch of {batch_sequences} sequences does not divide into {parts}")
        self.files = [Path(file) for file in files]
        # Plain views: slicing a np.memmap itself costs several times as much as copying a window.
        self.shards = [np.asarray(open_shard(file)) for file in self.files]
        unit = seq_len if order == "shuffled" else seq_len * batch_sequences
        # Places before each shard: windows if shuffled, otherwise whole batches.
        self._ends = np.cumsum([(len(shard) - 1) // unit for shard in self.shards], dtype=np.int64)
        self.windows_per_epoch = int(self._ends[-1]) * unit // seq_len if self.shards else 0
        if self.windows_per_epoch < (batch_sequences if order == "shuffled" else 1):
            given = f"{len(self.files)} training shards with {sum(map(len, self.shards))} tokens"
            batch = f"one batch of {batch_sequences} x {seq_len} tokens"
            raise UserError(f"{given} hold less than {batch}: take a smaller train.batch_tokens or prepare more data")
        self._llmc = LLMCOrder(np.diff(self._ends, prepend=0), seed) if order == "llmc" else None
        # A thread begins on GPU 0, and pinning memory there would open a context on it from every rank.
        on_device = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=on_device)
        self._next: tuple[int, Future] | None = None

    def batch(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step` (from 0): (inputs, targets), int64 [micro_batch, seq_len].

        Reads the following step in the background meanwhile; steps may be asked for in any order.
        """
        prefetched, self._next = self._next, None
        ready = prefetched[1] if prefetched and prefetched[0] == step else self._worker.submit(self._read, step)
        pairs = ready.result()
        self._next = (step + 1, self._worker.submit(self._read, step + 1))
        return [_to_device(pair, self.device) for pair in pairs]

    def set_micro_batch(self, sequences: int) -> None:
        """Cut all further steps into micro-batches of so many sequences, a divisor of what they had."""
        self.micro_batch, self._next = sequences, None

    def windows(self, step: int) -> list[tuple[int, int]]:
        """The whole global batch of `step` as (shard, offset of its first token) pairs, for every rank alike."""
        if self.order == "sequential":
            shard, batch = self._locate(np.array([step % int(self._ends[-1])]))
            units = batch * self.batch_sequences + np.arange(self.batch_sequences)
            shards = np.repeat(shard, self.batch_sequences)
        elif self._llmc:
            shards, batches = (np.repeat(x, self.batch_sequences // RANKS) for x in self._locate(self._llmc.at(step)))
            units = batches * self.batch_sequences + np.arange(self.batch_sequences)
        else:
            first = step * self.batch_sequences
            epochs, places = np.divmod(np.arange(first, first + self.batch_sequences), self.windows_per_epoch)
            for epoch in np.unique(epochs):
                inside = epochs == epoch
                places[inside] = permute(places[inside], self.windows_per_epoch, (self.seed, int(epoch)))
            shards, units = self._locate(places)
        return list(zip(shards.tolist(), (units * self.seq_len).tolist(), strict=True))

    def close(self) -> None:
        """Stop the background thread; a later `batch` raises RuntimeError."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, place inside it) of places counted over all shards."""
        shards = np.searchsorted(self._ends, places, side="right")
        return shards, places - np.concatenate([[0], self._ends])[shards]

    def _read(self, step: int) -> list[Batch]:
        mine = slice(self.rank * self.local_sequences, (self.rank + 1) * self.local_sequences)
        length = self.seq_len + 1
        windows = self.windows(step)[mine]
        rows = np.stack([self.shards[shard][offset : offset + length] for shard, offset in windows])
        if self.vocab_size is not None and rows.max() >= self.vocab_size:
            for (shard, offset), row in zip(windows, rows, strict=True):
                check_vocabulary(self.files[shard], offset, row, self.vocab_size)
        parts = np.split(rows, len(rows) // self.micro_batch)
        return [(self._tensor(part[:, :-1]), self._tensor(part[:, 1:])) for part in parts]

    def _tensor(self, tokens: np.ndarray) -> Tensor:
        return _pinned(torch.from_numpy(tokens.astype(np.int64)), self.device)


def check_vocabulary(file: Path, offset: int, tokens: np.ndarray, vocab_size: int) -> None:
    """Raises UserError if a window, the tokens from `offset` on, has one that is not in the vocabulary."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        where = f"{file}: token {largest} near place {offset}"
        raise UserError(f"{where} is not in the vocabulary of {vocab_size}: check data.tokenizer and the file")


def document_ids(inputs: Tensor, eos: int) -> Tensor:
    """Which document of its window each token belongs to, from 0: int64 [batch, seq_len].

    Documents start with `eos`; tokens may attend to each other only where their ids are equal.
    """
    return (inputs == eos).cumsum(dim=1)


def eval_windows(shards: Sequence[np.ndarray], seq_len: int, tokens: int | None = None) -> list[tuple[int, int, int]]:
    """Neighbouring windows over the first `tokens` targets: (shard, offset, number of targets that count)."""
    found, left = [], sum(len(shard) - 1 for shard in shards) if tokens is None else tokens
    for index, shard in enumerate(shards):
        for offset in range(0, min(len(shard) - 1, left), seq_len):
            found.append((index, offset, min(seq_len, len(shard) - 1 - offset, left - offset)))
        left -= min(len(shard) - 1, left)
    return found


def eval_batches(
    files: Sequence[Path | str],
    *,
    seq_len: int,
    tokens: int | None,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """The first `tokens` targets of the validation shards, in order, a contiguous part for each rank.

    Yields (inputs, targets), int64 [micro_batch, seq_len]. Every rank yields the same number of batches; places
    beyond its part have target −100. All ranks together score min(tokens, available) targets (`tokens` None: all
    of them), each once. Raises UserError if a shard is unreadable.
    """
    device, shards = torch.device(device), [open_shard(file) for file in files]
    windows = eval_windows(shards, seq_len, tokens)
    per_rank = -(-len(windows) // world_size)
    mine = windows[rank * per_rank : (rank + 1) * per_rank]
    for start in range(0, per_rank, micro_batch):
        inputs = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
        targets = torch.full((micro_batch, seq_len), IGNORE_INDEX, dtype=torch.int64)
        for row, (shard, offset, count) in enumerate(mine[start : start + micro_batch]):
            tokens_read = shards[shard][offset : offset + count + 1]
            if vocab_size is not None:
                check_vocabulary(Path(files[shard]), offset, tokens_read, vocab_size)
            window = torch.from_numpy(tokens_read.astype(np.int64))
            inputs[row, :count], targets[row, :count] = window[:-1], window[1:]
        yield _to_device((_pinned(inputs, device), _pinned(targets, device)), device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """From where a copy to the device does not let the host wait."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _to_device(batch: Batch, device: torch.device) -> Batch:
    inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    return inputs, targets
