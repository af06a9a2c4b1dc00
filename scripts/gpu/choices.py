"""The other side of each choice that the step has made: what gpu_check.py times one after the other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer import attention


@dataclass(frozen=True)
class Choice:
    """Settings of Check.run, and what holds around the model's life."""

    settings: dict[str, Any] = field(default_factory=dict)
    around: Any = nullcontext
    gpu_only: bool = False

    def within(self) -> AbstractContextManager[Any]:
        return self.around()


@contextmanager
def three_products() -> Iterator[None]:
    with mock.patch.object(attention, "as_one_product", lambda x: False):
        yield


def torchs_choice(device: torch.device, dtype: torch.dtype) -> str:
    """Its backend of causal attention with GPT-2's heads, where nothing else is asked for."""
    q = torch.zeros(2, 12, 1024, 64, dtype=dtype, device=device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name  # which has no public name


def backend(chosen: SDPBackend) -> Choice:
    return Choice(around=partial(sdpa_kernel, chosen), gpu_only=True)


CHOICES = {
    "as it is": Choice(),
    "q, k, v as three products": Choice(around=three_products),
    "attention by flash": backend(SDPBackend.FLASH_ATTENTION),
    "attention by cuDNN": backend(SDPBackend.CUDNN_ATTENTION),
    "attention by efficient": backend(SDPBackend.EFFICIENT_ATTENTION),
    "all logits at once": Choice(dict(loss_chunk=2**20)),
    "logits by 2048": Choice(dict(loss_chunk=2048)),
    "documents apart": Choice(dict(document_start=0)),
    "activations recomputed": Choice(dict(recompute="full")),
    "activations but products recomputed": Choice(dict(recompute="selective")),
    "not compiled": Choice(dict(compiled=False)),
    "float32": Choice(dict(dtype=torch.float32)),
}
