"""A model in training, as the sections of gpu_check.py need it: one pass, one step, all that it holds."""

from collections import ChainMap
from dataclasses import asdict
from typing import Any

import torch

from optim import routing
from optim.matrix import local
from trainer.config import TrainConfig
from trainer.guard import NonFiniteGuard
from trainer.parallel import Parallel, unwrap
from trainer.run.warmup import warm_up


class Run:
    """A model, its optimizers and a batch of random tokens."""

    def __init__(self, parallel: Parallel, config: Any, small: bool, document_start: int | None = None):
        self.parallel = parallel
        self.sequences, self.length = (2, 32) if small else (32, 1024)
        vocabulary = 250 if small else 50257
        torch.manual_seed(parallel.rank)
        self.model = parallel.wrap(config.model, vocabulary, self.length, document_start)
        self.optimizers = routing.build_from_config(unwrap(self.model), asdict(config.optim), parallel.replicas)
        self.guard = NonFiniteGuard(TrainConfig(non_finite="skip"), parallel.device)  # type: ignore[arg-type]
        self.guard.on_host, self.count = False, 0
        self.tokens = torch.randint(vocabulary, (64, self.length + 1)).to(parallel.device)

    @property
    def tokens_of_a_pass(self) -> int:
        return self.sequences * self.length

    def fit(self) -> None:
        """As a run's warm-up does."""
        self.sequences = warm_up(self.model, self.optimizers, self.parallel, [self.batch()] * 2)

    def fit_in(self, share: float) -> None:
        """The same where this process may have so much of the memory that it has had so far."""
        device = self.parallel.device
        held, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share * held / total, device)
        try:
            self.fit()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[: self.sequences, :-1], self.tokens[: self.sequences, 1:]

    def backward(self, passes: int = 1) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.parallel.device)
        for i in range(passes):
            with self.parallel.accumulate(self.model, last=i + 1 == passes):
                loss = self.model(*self.batch())
                (loss / (passes * self.tokens_of_a_pass)).backward()
            self.loss += loss.detach().double() / (passes * self.tokens_of_a_pass)

    @torch.no_grad()
    def step(self, loss: torch.Tensor | None = None) -> None:
        self.count += 1
        norm = self.parallel.clip(self.model, 1.0).double()
        measured = torch.stack([self.loss if loss is None else loss, norm])
        self.guard.step(self.optimizers, self.count, measured)

    def update(self, passes: int = 1) -> torch.Tensor:
        self.backward(passes)
        self.step()
        self.optimizers.zero_grad()
        return self.loss

    def state(self) -> dict[str, torch.Tensor]:
        live = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        states = ChainMap(*(member.state for member in self.optimizers.members.values()))
        for name, parameter in unwrap(self.model).named_parameters():
            live |= {f"optim.{name}.{key}": value for key, value in states.get(parameter, {}).items()}
        return {name: local(value) for name, value in live.items() if isinstance(value, torch.Tensor)}

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.state().items()}

    @torch.no_grad()
    def load(self, saved: dict[str, torch.Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(saved[name])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if not name.endswith(".step"))
