"""What the trainer asks of a model; `model._target_` names any class that fulfils it.

Shapes: B sequences, T tokens.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass
class ModelConfig:
    """What the section `model` has for every class. A class of one's own adds its settings in a dataclass that extends
    this one, and may override the two methods."""

    _target_: str = "trainer.model.GPT"  # importable path of the class, a LanguageModel
    name: str = ""  # of the model in the run's name and its record; default: the class's name in lower case
    family: str = "custom"  # which value an optimizer's preset gives to this model where it has {family: value}
    presets: str | None = None  # the family whose values it takes from presets that have none for its own

    def check(self) -> None:
        """Raise ValueError, in one line, for the first setting that cannot work."""

    def activation_bytes(self, seq_len: int, width: int) -> int:
        """Estimate of what one sequence keeps for the backward pass, where an activation has `width` bytes; it decides
        the default of train.micro_batch. 0, unknown: a rank's whole share goes through in one pass."""
        return 0


class LanguageModel(nn.Module, ABC):
    """A model that the trainer can train: `model._target_=my.module.MyModel`, a class that extends this one.

    It is built under torch.device("meta"), then sharded, then filled tensor by tensor by `init_parameter`. Buffers are
    not filled, so compute constants in `forward`. An example in one page: examples/grouped_query_gpt.py.
    """

    Config: ClassVar[type[ModelConfig]]  # the dataclass of its settings
    head: ClassVar[str] = "lm_head"  # name of the output projection's module: its weights have the role `head`
    blocks: nn.ModuleList  # what is sharded, recomputed and compiled, each as one
    # A class whose forward pass can recompute its blocks has `recompute = False`, which
    # parallel.activation_checkpointing sets to True: keep only the blocks' inputs for the backward pass.
    recompute: bool

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int, document_start: int | None = None):
        """With `document_start`, the token that starts each document, attention is to stay inside a document."""
        super().__init__()
        config.check()
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        self.document_start = document_start

    @abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) int64 → the sum of the tokens' losses, in nats, without the targets IGNORE_INDEX."""

    @abstractmethod
    def init_parameter(self, name: str, seed: int) -> Tensor:
        """The whole initial value of one parameter on the CPU: a function of (seed, name) alone; see `init_tensor`."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Floating-point operations of one token's forward and backward pass."""

    def modules_to_compile(self) -> list[nn.Module]:
        return list(self.blocks)


def init_tensor(name: str, shape: torch.Size, seed: int, mean: float, std: float) -> Tensor:
    """Normal values that depend on (seed, name, shape) only: not on rank, order or any global random state."""
    if std == 0:
        return torch.full(shape, mean)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(mean, std, generator=generator)
