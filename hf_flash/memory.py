"""Aligned anonymous memory that flash is read into.

Direct reads want buffers that start on a page; memory that belongs to a mapping of its own goes back to the system
the moment it is dropped, which a budget relies on and malloc does not promise.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
HUGE_BYTES = 2 << 20
KERNELS_KEPT = 32  # a pass of many tokens has some 20 shapes


Take = Callable[[int], torch.Tensor]  # gives memory as `aligned_empty` does


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple


def aligned_empty(n_bytes: int) -> torch.Tensor:
    """Page-aligned anonymous memory that takes DRAM only as it is touched; in huge pages where it holds some.

    A device gets a direct read as a list of contiguous pieces of memory, of which it takes a limited number: into pages
    of 4 KiB a virtual disk here read 1.1 GB/s, into huge pages 2.8. Rows that lie anywhere cost fewer page walks, too.

    Args:
        n_bytes: size; 0 gives an empty tensor.

    Returns:
        [n_bytes] uint8, zeros until written; starts at a huge page if it is as large as one.
    """
    if n_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    slack = HUGE_BYTES if n_bytes >= HUGE_BYTES else 0
    memory = mmap.mmap(-1, n_bytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if not slack:
        return tensor
    start = -tensor.data_ptr() % HUGE_BYTES
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a Python, without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, n_bytes // HUGE_BYTES * HUGE_BYTES)  # no page past the end
    return tensor[start : start + n_bytes]


def untouched(n_bytes: int) -> torch.Tensor:
    """Anonymous memory in small pages: what is never written takes no DRAM, whatever the system does with huge pages.

    Returns:
        [n_bytes] uint8, zeros until written.
    """
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel, or a Python, without them
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def discard(tensor: torch.Tensor) -> None:
    """Give the whole pages of some anonymous memory back to the system; what was there is lost.

    Args:
        tensor: contiguous uint8 of `aligned_empty` or `untouched`.
    """
    start = round_up(tensor.data_ptr(), mmap.PAGESIZE)
    n_bytes = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if n_bytes > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), mmap.MADV_DONTNEED)


class Pool:
    """Memory for pieces that stay equally long, one behind the other, so that all are in huge pages.

    A piece in a mapping of its own is in huge pages as far as it fills some. The rest, 2 of a matrix's 6 MB, was read
    at half of their speed.

    Args:
        n_bytes: of all pieces together, or more: what is never taken takes no DRAM. Pieces beyond it are on their own.
    """

    def __init__(self, n_bytes: int) -> None:
        self._whole, self._end = aligned_empty(n_bytes), 0

    def take(self, n_bytes: int) -> torch.Tensor:
        """[n_bytes] uint8, which starts a line of the cache; it may have been written to."""
        start = round_up(self._end, 64)
        if start + n_bytes > len(self._whole):
            return aligned_empty(n_bytes)
        self._end = start + n_bytes
        return self._whole[start : self._end]

    def give_back(self, piece: torch.Tensor) -> None:
        """The piece that was taken last is not wanted after all."""
        if len(piece) and piece.data_ptr() + len(piece) == self._whole.data_ptr() + self._end:
            self._end -= len(piece)


class Row:
    """Pieces of one size in a row. The first ones keep their DRAM when those behind give theirs back.

    Args:
        n: of them; nothing of them is touched yet. size: of one, in bytes.
    """

    def __init__(self, n: int, size: int) -> None:
        self._size = round_up(size, mmap.PAGESIZE)
        self._whole = aligned_empty(n * self._size)
        self.pieces = [self._whole[i * self._size : i * self._size + size] for i in range(n)]

    def shrink(self, n: int) -> None:
        """Keep n, and what else is in the huge page that they end in."""
        kept = round_up(n * self._size, HUGE_BYTES)
        if kept < self._whole.numel():
            discard(self._whole[kept:])


def shares(sizes: Sequence[int]) -> list[torch.Tensor]:
    """One piece of `aligned_empty` memory in page-aligned parts, all of it in huge pages where it fills several.

    Returns:
        A [size] uint8 tensor per size.
    """
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + round_up(size, mmap.PAGESIZE))
    whole = aligned_empty(shared_bytes(sizes))
    return [whole[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)]


def shared_bytes(sizes: Sequence[int]) -> int:
    """DRAM that `shares` takes."""
    n_bytes = sum(round_up(size, mmap.PAGESIZE) for size in sizes)
    return round_up(n_bytes, HUGE_BYTES) if n_bytes >= 8 * HUGE_BYTES else n_bytes


def view_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor as a buffer that `preadv` can fill; shares memory."""
    return tensor.numpy().data.cast("B")


def address(buffer: memoryview) -> int:
    """Where a writable buffer begins; 0 for one without bytes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0


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
    _mallopt(M_MMAP_THRESHOLD, 1 << 20)


def keep_few_kernels() -> None:
    """Make torch's matrix library keep the code of few shapes, unless the user has said of how many.

    oneDNN and the layer around it keep 1,024 each, half a MiB of compiled code for a shape: prompts of ever other
    lengths took 26 MB each, past any cap. Read when the first product is computed; later this changes nothing.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


@contextlib.contextmanager
def blocks_kept() -> Iterator[None]:
    """Let malloc keep what is freed meanwhile: training takes and drops the same large blocks thousands of times."""
    _mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
    _mallopt(M_TRIM_THRESHOLD, 256 << 20)
    try:
        yield
    finally:
        return_large_blocks()
        _mallopt(M_TRIM_THRESHOLD, 128 << 10)  # glibc's own
        trim_malloc()


def _mallopt(name: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(name, value)
