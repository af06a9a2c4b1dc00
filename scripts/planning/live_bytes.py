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
    """Of a forward and backward pass without gradients before it: ``peak``, where each gradient counts ``kept`` times
    from when it is whole, and ``activations``, the peak without gradients."""

    def __init__(self, model: nn.Module, kept: float):
        super().__init__()
        self.kept, self.gradients, self.activations = kept, 0, 0
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: torch.Tensor) -> None:
        self.gradients += parameter.nbytes

    def note(self) -> None:
        activations = self.alive - self.gradients
        self.activations = max(self.activations, activations)
        self.peak = max(self.peak, activations + int(self.kept * self.gradients))


def pass_bytes(make: type[nn.Module], arguments: Sequence[object], dtype: torch.dtype, recompute: bool,
               shape: tuple[int, int], kept: float) -> PassBytes:  # fmt: skip
    """Of the model ``make(*arguments)`` on tokens of that shape, by operations that compute nothing."""
    usual = torch.get_default_dtype()
    with FakeTensorMode():
        try:
            torch.set_default_dtype(dtype)  # fake parameters cannot be cast
            model = make(*arguments)
        finally:
            torch.set_default_dtype(usual)
        if recompute:
            model.recompute = True
        tokens = torch.zeros(shape, dtype=torch.int64)
        with PassBytes(model, kept) as found:
            model(tokens, tokens).backward()
    return found
