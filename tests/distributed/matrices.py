"""A module of nothing but matrices, the layouts that they are sharded in, and their gradients, equal on all ranks."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.optim.reference import seeded


class Matrices(nn.Module):
    """``weights[i]`` of shape ``shapes[i]``, drawn by i."""

    def __init__(self, shapes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(seeded(s, 0, i)) for i, s in enumerate(shapes)])


def mesh_of(layout: str, world_size: int) -> DeviceMesh | None:
    """Of "fsdp", "hsdp" (two replicas) or "fsdp x tp" (two and two); None for "ddp" and for one process."""
    if layout == "fsdp":
        return init_device_mesh("cpu", (world_size,))
    if layout == "hsdp":
        return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    if layout == "fsdp x tp":
        return init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("fsdp", "tp"))
    return None


def cut(model: Matrices, mesh: DeviceMesh, dims: dict[int, int]) -> None:
    """As tensor parallelism does: the weights ``dims`` (index -> dimension)."""
    for i, dim in dims.items():
        weight = distribute_tensor(model.weights[i].detach(), mesh, [Shard(dim)], src_data_rank=None)
        model.weights[i] = nn.Parameter(weight)


def place(shapes, mesh: DeviceMesh | None = None) -> Matrices:
    """The module, sharded if there is a mesh."""
    model = Matrices([tuple(shape) for shape in shapes])
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model


def sharded(shapes, layout: str, world_size: int) -> tuple[Matrices, dist.ProcessGroup | None]:
    """The module under a layout, and the process group that a matrix optimizer needs for it."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return place(shapes, mesh_of(layout, world_size)), dist.group.WORLD if layout == "ddp" else None


def gradient(param: Tensor, step: int, index: int) -> Tensor:
    """Of weight ``index`` at a step, laid out as the parameter."""
    full = seeded(param.shape, 1 + step, index)
    if isinstance(param, DTensor):
        return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    return full


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()
