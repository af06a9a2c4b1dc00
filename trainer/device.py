"""Memory of the device that a process computes on."""

import ctypes
import resource
import sys

import torch


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU leave behind, for the next step's, up to 1 GiB a tensor.

    By default it returns large blocks to the kernel, which hands them back page by page, zeroed, at every step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: below it, memory comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def peak_memory_bytes(device: torch.device) -> int:
    """This process' peak so far: allocated device memory on CUDA, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
