"""What operations allocate, and how much of it is alive at once; also of a whole pass over tensors without data."""

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations created: ``alive`` now, and ``peak``, the most at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known = WeakIdKeyDictionary()  # the storages among them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if is_plain(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if is_plain(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self.known:
                    self.known[storage] = None
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.note()
        return result

    def _free(self, nbytes: int) -> None:
        self.alive -= nbytes

    def note(self) -> None:
        self.peak = max(self.peak, self.alive)


def is_plain(tensor: object) -> bool:
    """A parameter too: a view of one allocates nothing."""
    return type(tensor) in (torch.Tensor, nn.Parameter, FakeTensor)


class PassBytes(LiveBytes):
    """Of a forward and backward pass without gradients before it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.gradients = 0
        self.most: dict[int, int] = {}  # bytes of gradients that are whole -> most activations beside them
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: torch.Tensor) -> None:
        self.gradients += parameter.nbytes

    def note(self) -> None:
        self.most[self.gradients] = max(self.most.get(self.gradients, 0), self.alive - self.gradients)

    @property
    def activations(self) -> int:
        """Most at once, without gradients."""
        return max(self.most.values())

    def peak_with(self, kept: float) -> int:
        """Most at once, where each gradient counts ``kept`` times from when it is whole."""
        return max(activations + int(kept * gradients) for gradients, activations in self.most.items())


PASSES: dict[str, PassBytes] = {}  # each takes seconds, and is the same on any number of ranks


def pass_bytes(make: type[nn.Module], arguments: Sequence[object], dtype: torch.dtype, recompute: str,
               shape: tuple[int, int]) -> PassBytes:  # fmt: skip
    """Of the model ``make(*arguments)`` on tokens of that shape, by operations that compute nothing."""
    key = repr((make, arguments, dtype, recompute, shape))
    if key in PASSES:
        return PASSES[key]
    usual = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(dtype)  # fake parameters cannot be cast
            model = make(*arguments)
        finally:
            torch.set_default_dtype(usual)
        if recompute != "none":
            model.recompute = recompute
        tokens = torch.zeros(shape, dtype=torch.int64)
        with PassBytes(model) as found:
            model(tokens, tokens).backward()
    PASSES[key] = found
    return found
