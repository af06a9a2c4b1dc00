"""DCP's files, read without trusting them.

DCP loads tensors with ``weights_only``, but it unpickles its index (.metadata) and whatever is not a tensor freely.
Here the index is read with a list of the few classes that it consists of, and may name nothing but tensors.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.run import storage
from trainer.run.storage import CheckpointError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP in one process

# What DCP's index (.metadata) of tensors consists of; every class only holds values.  BytesStorageMetadata is not among
# them: DCP would unpickle what it stands for.
INDEX = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"PosixPath", "WindowsPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in INDEX.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Reader(dcp.FileSystemReader):
    """Reads tensors by an index that has been read and checked already."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def read_index(folder: Path) -> Metadata:
    """DCP's index of a checkpoint.  Raises CheckpointError: it holds anything but tensors in this folder's files."""
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        files = {info.relative_path for info in metadata.storage_data.values()}
    except Exception as error:  # a foreign pickle fails in any way it likes
        raise CheckpointError(
            f"checkpoint {folder}: .metadata is not an index of tensors ({one_line(error)})"
        ) from None
    if any(Path(name).name != name for name in files):
        raise CheckpointError(f"checkpoint {folder}: .metadata is not an index of tensors in this folder")
    return metadata


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint by parameter name, in one process, on the CPU.

    Raises CheckpointError: it is damaged.
    """
    storage.verify(folder)
    metadata = read_index(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model/") and isinstance(entry, TensorStorageMetadata)
    }
    load_tensors(tensors, folder, metadata)
    return {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}


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
