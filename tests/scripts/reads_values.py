"""A model whose forward pass depends on its weights' values."""

from torch import Tensor

from trainer.model import GPT


class ReadsValues(GPT):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(tokens, targets) * (1.0 if self.norm.weight.sum().item() > 0 else 2.0)
