"""Aligned anonymous memory that flash is read into.

Direct reads want buffers that start on a page; memory that belongs to a mapping of its own goes back to the system
the moment it is dropped, which a budget relies on and malloc does not promise.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

M_MMAP_THRESHOLD = -3  # of malloc.h
HUGE_BYTES = 8 << 20  # from here on memory is asked for in huge pages: rows lie anywhere in it


def aligned_empty(n_bytes: int) -> torch.Tensor:
    """Page-aligned anonymous memory that takes DRAM only as it is touched.

    Args:
        n_bytes: size; 0 gives an empty tensor.

    Returns:
        [n_bytes] uint8, zeros until written.
    """
    if n_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor as a buffer that `preadv` can fill; shares memory."""
    return tensor.numpy().data.cast("B")


def trim_malloc() -> None:
    """Give freed heap memory back to the system (glibc keeps it otherwise; reading a tokenizer leaves tens of MiB)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """Make malloc take blocks of 1 MiB and more from the system and give them back when they are freed.

    glibc raises that limit to 32 MiB as a program frees such blocks; from then on the scratch of a long prompt stays in
    the heap, in holes that the cap pays for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)
