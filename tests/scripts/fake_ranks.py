"""This process as any rank of a planned run: its peers answer collectives without sending anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from optim import routing
from optim.combined import Combined
from scripts.plan import Costs, compose
from trainer.mesh import build_mesh
from trainer.parallel import Parallel, unwrap


def costs_of(words: list[str], device: str, ranks: int) -> Costs:
    return Costs(compose(words, device, ranks), device)


@dataclass
class Rank:
    costs: Costs
    parallel: Parallel
    model: nn.Module
    optimizers: Combined

    def forward_backward(self) -> None:
        """All micro-batches of an update, as Trainer.forward_backward has them."""
        train = self.costs.train
        batch = torch.zeros(train.micro_batch, train.seq_len, dtype=torch.int64)
        for i in range(self.costs.passes):
            with self.parallel.accumulate(self.model, i + 1 == self.costs.passes):
                self.model(batch, batch).backward()


@contextmanager
def as_rank(costs: Costs, rank: int) -> Iterator[Rank]:
    config, ranks = costs.config, costs.ranks
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        mesh = build_mesh(config.parallel, costs.mode, "cpu", ranks)
        alone = SimpleNamespace(process_index=rank, local_process_index=rank, num_processes=ranks,
                                device=torch.device("cpu"))  # fmt: skip
        parallel = Parallel(config.parallel, costs.mode, alone, mesh, getattr(torch, config.train.dtype), 0)
        model = parallel.wrap(config.model, costs.model.vocab_size, config.train.seq_len)
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, all_reduce)
        bare = unwrap(model)
        optimizers = routing.build_from_config(bare, asdict(config.optim), parallel.replicas, bare.head)
        yield Rank(costs, parallel, model, optimizers)
    finally:
        dist.destroy_process_group()


def all_reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Of DDP: its own takes the answer from the group, and the fake one gives none."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
