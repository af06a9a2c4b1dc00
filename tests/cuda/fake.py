"""A GPU's tensors without a GPU: shapes, dtypes and devices are real, nothing is computed.

One line of C++ tells torch that there are devices of type CUDA; fake tensors and the fake process group do the rest.
Whatever asks for a value raises DataDependentOutputException, so that a step which runs here lets no host wait.
"""

import ctypes
import functools
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from optim import guarded
from optim.exchange import Exchange
from optim.plan import shard_rows
from trainer.mesh import ParallelConfig
from trainer.parallel import Parallel

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""
W, RANK = 8, 1
LAYOUTS = ("single", "ddp", "fsdp")
GPT2 = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12  # GPT-2 124M: q, k, v, o, fc, proj
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@functools.cache
def no_cuda_tensors(folder: Path) -> str:
    """Why there can be none here; "" once there can.  For the life of this process."""
    if torch.cuda.is_available():
        return ""
    if shutil.which("g++") is None:
        return "no g++, which registers the device"
    source, library, torch_path = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__).parent
    source.write_text(GUARD)
    words = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{torch_path}/include", source, "-o", library,
             f"-L{torch_path}/lib", "-lc10"]  # fmt: skip
    built = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if built.returncode:
        return f"g++ cannot compile against torch's headers: {built.stderr.strip().splitlines()[0]}"
    ctypes.CDLL(os.fspath(library))
    return ""


@contextmanager
def fake_cuda(layout: str) -> Iterator[Parallel]:
    """Fake tensors, and this process as rank 1 of 8 (or alone)."""
    mesh = None
    if layout != "single":
        dist.init_process_group("fake", rank=RANK, world_size=W, store=FakeStore())
        mesh = init_device_mesh("cuda", (W,), mesh_dim_names=("shard",)) if layout == "fsdp" else None
    ranks, rank = (1, 0) if layout == "single" else (W, RANK)
    accelerator = SimpleNamespace(device=torch.device("cuda", 0), num_processes=ranks, process_index=rank,
                                  local_process_index=rank, reduce=lambda tensor, reduction: tensor)  # fmt: skip
    try:
        with (
            mock.patch.object(Exchange, "all_equal", lambda self, value: True),  # hosts compare notes over gloo
            mock.patch.object(guarded, "read_later", lambda flag: lambda: False),  # a pinned copy, and an event
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),  # an H100's
            mock.patch.object(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None)),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield Parallel(ParallelConfig(mode=layout), layout, accelerator, mesh, torch.bfloat16, 0)
    finally:
        if layout != "single":
            dist.destroy_process_group()


def parameters(shapes: list[tuple[int, ...]], parallel: Parallel, dtype=torch.float32) -> nn.ParameterList:
    """With gradients; laid out as ``parallel`` says."""
    values = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
    return with_gradients(nn.ParameterList(map(nn.Parameter, values)), parallel)


def with_gradients(model: nn.Module, parallel: Parallel) -> nn.Module:
    """The model, its parameters as FSDP2 shards them where there is a mesh."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = parameter.detach()
            if parallel.mesh is not None:
                part = value.new_empty(shard_rows(value.shape[0], W, RANK), *value.shape[1:])
                value = DTensor.from_local(part, parallel.mesh, [Shard(0)], run_check=False, shape=value.shape,
                                           stride=value.stride())  # fmt: skip
                setattr(module, name, nn.Parameter(value))
            module.get_parameter(name).grad = torch.zeros_like(value)
    return model


class Kernels(TorchDispatchMode):
    """Counts what a GPU is asked to do: its kernels (a foreach operation is one), the products among them by dtype,
    collectives, and copies between host and device, for which the host waits."""

    def __init__(self):
        super().__init__()
        self.kernels, self.collectives, self.products = Counter(), Counter(), Counter()
        self.crossings: list[str] = []

    @property
    def count(self) -> int:
        return sum(self.kernels.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, devices = function._schema.name.split("::")[1], set(_devices((args, kwargs, result)))
        if function.namespace in ("c10d", "_c10d_functional"):
            self.collectives[name] += 1
        elif "cuda" in devices and function.namespace == "aten" and not _is_free(function, name):
            self.kernels[name] += 1
            if name in PRODUCTS:
                self.products[result.dtype] += 1
            if name in ("_to_copy", "copy_") and "cpu" in devices:
                self.crossings.append(str(function))
        return result


def _is_free(function, name: str) -> bool:
    return function.is_view or "view" in name or "empty" in name


def _devices(value) -> Iterator[str]:
    if isinstance(value, torch.Tensor):
        yield value.device.type
    elif isinstance(value, dict):
        yield from _devices(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _devices(part)
