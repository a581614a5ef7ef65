"""Positional reads from a pool of threads: works on every POSIX system, and is what other readers are compared with.

O_DIRECT keeps the page cache out: a capped process is charged for every page it reads through the cache, and what the
cache holds is not what the next token needs. Direct reads want offsets, lengths and addresses that are multiples of
the device's block; a read that is not takes a bounce through an aligned buffer. Where the file system refuses
O_DIRECT (tmpfs, some network mounts), reads are buffered and their pages dropped.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from transformers.utils import logging

from hf_flash import trace
from hf_flash.errors import CheckpointError, ReadError, ShortReadError
from hf_flash.memory import address, round_up
from hf_flash.readers.base import Read, Reader, Ticket, early_end, failed_read

logger = logging.get_logger(__name__)

IOV_MAX = 1024


class _File:
    """An open file: descriptor, name, and the block that direct reads must respect (1 where they are buffered)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd, self.block = _open_direct(path)
            self.size = os.fstat(self.fd).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}.") from error


def _open_direct(path: Path) -> tuple[int, int]:
    """Open with O_DIRECT if a read at 512 or 4096 bytes works; returns descriptor and block."""
    if hasattr(os, "O_DIRECT"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            probe = mmap.mmap(-1, 8192)
            for block in (512, 4096):
                try:
                    os.preadv(fd, [memoryview(probe)[block : 2 * block]], block if os.fstat(fd).st_size > block else 0)
                    return fd, block
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        os.close(fd)
                        raise
            os.close(fd)
    logger.warning_once(
        f"{path.parent} refuses direct reads (O_DIRECT): reading through the page cache instead. "
        "The memory cap still holds, the kernel may reclaim those pages; speed figures include the cache."
    )
    return os.open(path, os.O_RDONLY), 1


class _Pool:
    """Threads that take calls from a queue, no more: ThreadPoolExecutor's locks do not survive every Ctrl-C."""

    def __init__(self, n_threads: int) -> None:
        self._queue: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_serve, args=(self._queue,), name=f"hf_flash-read_{i}", daemon=True)
            for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., None], *args: Any) -> None:
        self._queue.put((call, args))

    def shutdown(self, wait: bool) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads if wait else ():
            thread.join()


def _serve(queue: SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None]) -> None:
    while (item := queue.get()) is not None:
        item[0](*item[1])
        del item  # it holds the reader, which may be waiting to be dropped


class ThreadReader(Reader):
    """A pool of threads, each with one positional read in flight.

    Args:
        n_threads: reads in flight at most.
    """

    def __init__(self, n_threads: int = 8) -> None:
        self._pool = _Pool(n_threads)
        self._n_threads = n_threads
        self._files: list[_File] = []
        self._by_path: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._closed = False

    def open(self, path: Path) -> int:
        path = Path(path).absolute()
        with self._lock:
            self.check_open()
            if path not in self._by_path:
                self._files.append(_File(path))
                self._by_path[path] = len(self._files) - 1
            return self._by_path[path]

    def block_of(self, file: int) -> int:
        """Bytes that direct reads of a file must be multiples of; 1 where its reads are buffered."""
        return self._files[file].block

    def submit(self, reads: list[Read]) -> Ticket:
        n_parts = min(len(reads), self._n_threads)
        ticket = Ticket(n_parts)
        if trace.active is not None:
            ticket.n_bytes = sum(len(buffer) for read in reads for buffer in read.buffers)
        with self._lock:
            self.check_open()
            for part in range(n_parts):
                self._pool.submit(self._run, reads[part::n_parts], ticket)
        return ticket

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True)
        self._close_files()

    def _close_files(self) -> None:
        files, self._files, self._by_path = self._files, [], {}
        for file in files:
            os.close(file.fd)

    def __del__(self) -> None:
        """The model is gone. Nothing is in flight, for that would hold this reader; this may be one of its threads."""
        with contextlib.suppress(Exception):  # half made, or at the interpreter's end
            self._pool.shutdown(wait=False)
            self._close_files()

    def check_open(self) -> None:
        if self._closed:
            raise ReadError(
                errno.EBADF,
                "the flash files of this model were closed (or this process is a fork); load the model again",
            )

    def _run(self, reads: list[Read], ticket: Ticket) -> None:
        error: BaseException | None = None
        try:
            for read in reads:
                self._read_one(read)
        except BaseException as caught:
            error = caught
        ticket.part_done(error)

    def _read_one(self, read: Read) -> None:
        file = self._files[read.file]
        total = sum(map(len, read.buffers))
        if total == 0:
            return
        if file.block > 1 and not is_aligned(read, file.block):
            self._bounce(file, read, total)
        else:
            _read_fully(file, read.offset, read.buffers, read.need or total)
        if file.block == 1:
            os.posix_fadvise(file.fd, read.offset, total, os.POSIX_FADV_DONTNEED)

    def _bounce(self, file: _File, read: Read, total: int) -> None:
        """Read the aligned range around `read` into a buffer of this thread, then copy out."""
        start = read.offset // file.block * file.block
        size = round_up(read.offset + total, file.block) - start
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = mmap.mmap(-1, round_up(size, mmap.PAGESIZE))
        view = memoryview(buffer)
        at = read.offset - start
        _read_fully(file, start, [view[:size]], at + (read.need or total), at)
        for target in read.buffers:
            target[:] = view[at : at + len(target)]
            at += len(target)


def is_aligned(read: Read, block: int) -> bool:
    """Whether a direct read can serve this as it is."""
    return not read.offset % block and not any(len(one) % block or address(one) % block for one in read.buffers)


def _read_fully(file: _File, offset: int, buffers: list[memoryview], need: int, extra: int = 0) -> None:
    """Fill the buffers, going on after short reads; direct reads go on at a whole block.

    Args:
        file, offset, buffers: from where to where.
        need: bytes that must arrive.
        extra: of these, how many at the start were not asked for (alignment).

    Raises:
        ReadError: the device failed. ShortReadError: the file ended before `need` bytes.
    """
    got = 0
    pending = list(buffers)
    while pending:
        try:
            n = os.preadv(file.fd, pending[:IOV_MAX], offset + got)
        except InterruptedError:
            continue
        except OSError as error:
            raise ReadError(error.errno, failed_read(file.path, offset + got, str(error.strerror))) from error
        if n > 0 and file.block > 1 and n % file.block:  # the end of the file
            got += n
            break
        if n == 0:
            break
        got += n
        while pending and n >= len(pending[0]):
            n -= len(pending.pop(0))
        if n:
            pending[0] = pending[0][n:]
    if got < need:
        raise ShortReadError(errno.EIO, early_end(file.path, offset + extra, need - extra, max(0, got - extra)))
