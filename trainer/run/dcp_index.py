"""DCP's files, read without trusting them.

DCP loads tensors with ``weights_only``, but it unpickles its index (.metadata) and whatever is not a tensor freely.  So
index.json says the same beside it, for tensors alone, and .metadata is left to other tools:

    {"model.norm.weight": {"dtype": "float32", "shape": [128], "chunks": [
        {"offset": [0], "shape": [64], "file": "__0_0.distcp", "start": 1024, "bytes": 1536}, …]}, …}
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what DCP's reader looks up; there is no public name
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from common import write_json
from optim.schedule import in_steps
from trainer.run import storage
from trainer.run.storage import INDEX, CheckpointError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP in one process


class _Reader(dcp.FileSystemReader):
    """Reads tensors by an index that has been read and checked already."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def write_index(folder: Path, metadata: Metadata) -> None:
    """What ``dcp.save`` has returned, of tensors alone, as index.json."""
    write_json(folder / INDEX, {name: _entry(name, held, metadata) for name, held in tensor_entries(metadata).items()})


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {name: e for name, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}


def _entry(name: str, held: TensorStorageMetadata, metadata: Metadata) -> dict[str, Any]:
    chunks = []
    for chunk in held.chunks:
        info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        where = {"file": info.relative_path, "start": info.offset, "bytes": info.length}
        chunks.append({"offset": list(chunk.offsets), "shape": list(chunk.sizes), **where})
    return {"dtype": str(held.properties.dtype).removeprefix("torch."), "shape": list(held.size), "chunks": chunks}


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint, as DCP wants it.  Raises CheckpointError: it is not one of this folder's tensors."""
    content = storage.read_json(folder, INDEX)
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    try:
        for name, entry in ((_present_name(name), entry) for name, entry in content.items()):
            dtype = getattr(torch, str(entry["dtype"]), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} is of {entry['dtype']}")
            chunks, elements = [], 0
            for number, chunk in enumerate(entry["chunks"]):
                offset, count = torch.Size(chunk["offset"]), math.prod(chunk["shape"])
                places[MetadataIndex(name, offset, number)] = _place(folder, chunk, count * dtype.itemsize)
                chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk["shape"])))
                elements += count
            if elements != math.prod(entry["shape"]):
                raise ValueError(f"{name} has {elements} elements, not those of {entry['shape']}")
            if not _are_apart(chunks, entry["shape"]):
                raise ValueError(f"{name} has chunks that overlap or lie outside of {entry['shape']}")
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {INDEX} is not an index of tensors ({one_line(error)})") from None
    return Metadata(entries, storage_data=places)


def _are_apart(chunks: list[ChunkStorageMetadata], shape: list[int]) -> bool:
    """Whether no element has two places, nor one outside of ``shape``: with the right number, each has its own."""
    chunks = [chunk for chunk in chunks if chunk.sizes.numel()]
    first = np.asarray([list(chunk.offsets) for chunk in chunks], dtype=np.int64).reshape(len(chunks), len(shape))
    end = first + np.asarray([list(chunk.sizes) for chunk in chunks], dtype=np.int64).reshape(first.shape)
    overlap = np.logical_and(first[:, None] < end, first < end[:, None]).all(axis=-1)  # [k, k], each with itself too
    return bool((first >= 0).all() and (end <= np.asarray(shape)).all() and overlap.sum() <= len(chunks))


def _present_name(name: str) -> str:
    """Format 2 had model/<parameter>, optim/<role>/<parameter>/<key>, rng/<rank>/<device>, average/<parameter>."""
    kind, *rest = name.split("/")
    if kind not in ("model", "optim", "rng", "lookahead", "average"):
        return name
    return ".".join(["optim", "state", *rest[1:]] if kind == "optim" and rest else [kind, *rest])


def _place(folder: Path, chunk: dict[str, Any], size: int) -> _StorageInfo:
    """Where a chunk of ``size`` bytes lies, which must be in a file of the folder."""
    name, start, length = str(chunk["file"]), int(chunk["start"]), int(chunk["bytes"])
    if Path(name).name != name or not (folder / name).is_file():
        raise ValueError(f"{name} is no file of this folder")
    if start < 0 or length < size or start + length > (folder / name).stat().st_size:
        raise ValueError(f"{name} does not hold {size} bytes from {start} on")
    return _StorageInfo(name, start, length)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint by parameter name, in one process, on the CPU: those that its evaluation saw,
    an average of late weights blended in where the run has one.

    Raises CheckpointError: it is damaged.
    """
    storage.verify(folder)
    blend = _blend(storage.read_state(folder), folder)
    metadata = read_index(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in tensor_entries(metadata).items()
        if name.startswith("model.") or (blend and name.startswith("average."))
    }
    load_tensors(tensors, folder, metadata)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    for name, value in tensors.items():
        if name.startswith("average."):
            weights[name.removeprefix("average.")].lerp_(value, blend)
    return weights


def _blend(state: dict[str, Any], folder: Path) -> float:
    """The share that the average has in the evaluation of this step.  Raises CheckpointError: the state is damaged."""
    config = state["config"]
    try:
        if not (blend := float(config.get("average.blend", 0.0))):
            return 0.0
        end = config.get("schedule.horizon") or config["train.steps"]
        return blend if state["step"] >= max(1, in_steps(float(config.get("average.start", 0.0)), int(end))) else 0.0
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {folder}: {storage.STATE} lacks what its average needs ({error})") from None


def load_tensors(
    tensors: dict[str, Tensor], folder: Path, metadata: Metadata, group: dist.ProcessGroup | None = None
) -> None:
    """Fill this rank's tensors (plain or DTensor) from a checkpoint that any sharding has written.

    Raises CheckpointError: a name is missing, or a shape is another one.
    """
    try:
        dcp.load(tensors, storage_reader=_Reader(folder, metadata), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The first failure that DCP reports, or the error itself, without its trace."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {one_line(cause)}"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0]
