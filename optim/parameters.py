"""What can be trained: parameters as they are given to an optimizer, and their gradients in a step."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

Named = tuple[Tensor, str]


def check_trainable(params: Iterable[Named]) -> None:
    """Raises ValueError for a parameter, given with its name, that no rule here can train."""
    for param, name in params:
        if not param.is_floating_point() or param.dtype.itemsize == 1:
            raise ValueError(f"{name} is {param.dtype}: give real floating-point tensors, such as view_as_real's")
        if param.layout == torch.strided and _span(param) < param.numel():
            raise ValueError(f"{name} has elements that share memory, as expand makes them: give its clone()")


def check_apart(params: Iterable[Named]) -> None:
    """Raises ValueError for two parameters that share memory, which would be updated twice in a step."""
    lying: dict[StorageWeakRef, list[tuple[Tensor, str, int, int]]] = defaultdict(list)
    for param, name in params:
        part = local_part(param)
        if part.layout == torch.strided and part.numel():
            start = int(part.storage_offset())
            storage = StorageWeakRef(part.untyped_storage())  # type: ignore[no-untyped-call]
            lying[storage].append((part, name, start, start + _span(part)))
    for parts in lying.values():
        for (a, first, start, end), (b, second, other_start, other_end) in combinations(parts, 2):
            if other_start < end and start < other_end and _share(a, b):
                raise ValueError(
                    f"{second} shares memory with {first}: tie the modules by one parameter, head.weight = "
                    "embedding.weight, not by its data"
                )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without its history, or the tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def local_gradient(param: Tensor) -> Tensor:
    """This rank's part of a gradient, in the dtype of its parameter and cut as that is: tensor parallelism may leave
    the gradient of a replicated parameter as partial sums.  There, ranks call together."""
    grad = param.grad
    assert grad is not None
    if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_part(grad).to(param.dtype)


def _span(param: Tensor) -> int:
    """Elements of memory from the first of a tensor to its last."""
    return 1 + sum(max(size - 1, 0) * stride for size, stride in zip(param.shape, param.stride(), strict=True))


def _share(*parts: Tensor) -> bool:
    """Whether tensors of one storage have an element in common; columns of a matrix, say, lie between one another."""
    memory = torch.arange(max(int(part.storage_offset()) + _span(part) for part in parts), device="cpu")
    places = [memory.as_strided(part.shape, part.stride(), part.storage_offset()).flatten() for part in parts]
    return len(torch.unique(torch.cat(places))) < sum(map(len, places))
