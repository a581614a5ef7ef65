"""io_uring reads: a whole plan in one system call, no Python per read.

What the ring cannot take (reads that are not aligned for direct access, buffered files) goes to the pool of threads
that this reader is built on. The bytes are the same either way.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import os
import signal
import time
import weakref
from itertools import accumulate
from typing import Any

import numpy as np

from hf_flash import native, trace
from hf_flash.errors import ReadError, ShortReadError
from hf_flash.memory import address
from hf_flash.plan import MAX_EXTENT_ROWS, IntArray
from hf_flash.readers.base import Read, Ticket, early_end, failed_read
from hf_flash.readers.threads import IOV_MAX, ThreadReader

DEPTH = 64  # reads in the kernel at a time


class UringReader(ThreadReader):
    """Reads through one io_uring.

    Args:
        n_threads: of the pool that serves what the ring cannot.
        depth: reads in flight.
        prompt: whether reads are known to have landed at once, whatever the thread that submitted them does. Costs that
            thread an interrupt for each; where it waits for them itself, as sparse steps do, there is no need.

    Attributes:
        ring: the native ring, None once it is closed.

    Raises:
        OSError: the kernel or a sandbox refuses io_uring, or the native extension is not built.
    """

    part_bytes = 4 << 20  # the kernel cuts it up; one submission is enough
    is_forked = False

    def __init__(self, n_threads: int = 8, depth: int = DEPTH, prompt: bool = True) -> None:
        lib = native.library()
        if lib is None:
            raise OSError(errno.ENOSYS, "the native extension is not built")
        self.ring: int | None = lib.hf_flash_ring_open(depth, prompt)
        if not self.ring:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._lib = lib
        self._live: dict[int, _UringTicket] = {}  # submitted and not yet known to have landed
        super().__init__(n_threads)
        _readers.add(self)

    def submit(self, reads: list[Read]) -> Ticket:
        with self._lock:
            self.check_open()
        if not reads:
            return Ticket(0)
        files = [self._files[read.file] for read in reads]
        counts = [len(read.buffers) for read in reads]
        buffers = [buffer for read in reads for buffer in read.buffers]
        fds = np.array([file.fd for file in files], np.int32)
        offsets = np.array([read.offset for read in reads], np.int64)
        first = np.array([0, *accumulate(counts)], np.int64)
        addresses = np.array([address(buffer) for buffer in buffers], np.uint64)
        lengths = np.array([len(buffer) for buffer in buffers], np.int64)
        need = np.array([read.need or sum(map(len, read.buffers)) for read in reads], np.int64)
        blocks = {file.block for file in files}
        if 1 in blocks or max(counts) > IOV_MAX or not _fit(max(blocks), offsets, addresses, lengths):
            return super().submit(reads)
        ticket = self._ticket(buffers)
        start = time.perf_counter()
        ticket.batch = self._lib.hf_flash_ring_submit(
            self.ring, len(reads), fds.ctypes.data, offsets.ctypes.data, need.ctypes.data, first.ctypes.data,
            addresses.ctypes.data, lengths.ctypes.data,
        )  # fmt: skip
        if trace.active is not None:
            ticket.n_bytes = int(lengths.sum())
            trace.active.add(trace.SUBMIT, start, time.perf_counter(), bytes=ticket.n_bytes, reads=len(reads))
        return ticket

    def submit_rows(
        self, file: int, start: int, row_bytes: int, rows: IntArray, targets: memoryview, slots: IntArray,
        max_gap_rows: int, sink: memoryview,
    ) -> tuple[Ticket, int, int]:  # fmt: skip
        block = self._files[file].block
        base = address(targets)
        if block == 1 or start % block or row_bytes % block or base % block:
            return super().submit_rows(file, start, row_bytes, rows, targets, slots, max_gap_rows, sink)
        with self._lock:
            self.check_open()
        rows, slots = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(slots, np.int64)
        n_bytes, n_reads = ctypes.c_int64(), ctypes.c_int64()
        ticket = self._ticket([targets, sink])
        begun = time.perf_counter()
        ticket.batch = self._lib.hf_flash_ring_submit_rows(
            self.ring, None, self._files[file].fd, start, row_bytes, rows.ctypes.data, len(rows), base,
            slots.ctypes.data, max_gap_rows, MAX_EXTENT_ROWS, address(sink), ctypes.byref(n_bytes),
            ctypes.byref(n_reads),
        )  # fmt: skip
        if trace.active is not None:
            ticket.n_bytes = n_bytes.value
            trace.active.add(trace.SUBMIT, begun, time.perf_counter(), bytes=n_bytes.value, reads=n_reads.value)
        return ticket, n_bytes.value, n_reads.value

    def forked(self) -> None:
        """This process was forked from the one that opened the ring, and shares its memory: it is not touched again."""
        self.ring, self._closed, self.is_forked = None, True, True

    def fd(self, file: int) -> int:
        """File descriptor of a file."""
        return self._files[file].fd

    def direct_rows(self, file: int, start: int, row_bytes: int) -> bool:
        """Whether rows of a tensor can be read straight into page-aligned slots."""
        block = self._files[file].block
        return block > 1 and start % block == 0 and row_bytes % block == 0

    def _ticket(self, memory: list[Any]) -> _UringTicket:
        """A ticket that this reader knows before the kernel does.

        Whatever happens to the caller (Ctrl-C between two lines), the memory that is read into lives until it is full.
        """
        for old in list(self._live.values()) if len(self._live) > DEPTH else ():
            if old.batch is not None and old.ready():
                old.settle()
        ticket = _UringTicket(self, memory)
        self._live[id(ticket)] = ticket
        return ticket

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._close_ring()
        super().close()

    def _close_ring(self) -> None:
        """Wait for what is in flight; files are closed and memory is freed only after that."""
        ring, self.ring = self.ring, None
        if ring:
            self._lib.hf_flash_ring_close(ring)
        self._live = {}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the interpreter's end
            self._close_ring()
        super().__del__()

    def error_of(self, batch: int | None) -> ReadError:
        """What went wrong with a batch, naming file and offset."""
        out = np.zeros(5, np.int64)
        self._lib.hf_flash_batch_error(batch, out.ctypes.data)
        code, fd, offset, got, want = out.tolist()
        path = next(file.path for file in self._files if file.fd == fd)
        if code == errno.ENODATA:
            return ShortReadError(errno.EIO, early_end(path, offset, want, got))
        return ReadError(code, failed_read(path, offset, os.strerror(code)))


def _fit(block: int, *numbers: np.ndarray) -> bool:
    """Whether all of them are multiples of a power of two."""
    return not any(np.bitwise_or.reduce(some) & some.dtype.type(block - 1) for some in numbers)


def _forked() -> None:
    for reader in _readers:
        reader.forked()


_readers: weakref.WeakSet[UringReader] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forked)


def _interrupt_soon() -> None:
    """Send this process again a Ctrl-C that came to a finalizer: Python ignores what a finalizer raises."""

    def send() -> None:
        time.sleep(0.001)  # it is over by then
        os.kill(os.getpid(), signal.SIGINT)

    _thread.start_new_thread(send, ())  # takes no lock that whoever was finalized in the middle of may hold


class _UringTicket(Ticket):
    """A batch in the ring; keeps the memory that it reads into alive until it has landed."""

    batch: int | None = None

    def __init__(self, reader: UringReader, memory: list[Any]) -> None:
        super().__init__(0)
        self._reader, self._memory = reader, memory
        self._landed = False

    def ready(self) -> bool:
        reader = self._reader
        return self._landed or bool(reader._lib.hf_flash_batch_ready(reader.ring, self.batch))

    def settle(self) -> None:
        reader, result = self._reader, 2
        while not self._landed:
            result = reader._lib.hf_flash_batch_wait(reader.ring, self.batch)
            if result != 2:  # 2: a signal; its handler runs between the calls, and may raise
                self.error = reader.error_of(self.batch) if result else None
                self._landed = True
                self.trace_landing()
        reader._live.pop(id(self), None)
        self._memory = []

    def wait(self) -> None:
        self.settle()
        super().wait()

    def __del__(self) -> None:
        """The model is gone, or this has landed; the kernel may still know a batch of a model that is gone."""
        interrupted = False
        while self.batch is not None:
            try:
                with contextlib.suppress(Exception):
                    if self._reader.ring:
                        self.settle()
                batch, self.batch = self.batch, None
                self._reader._lib.hf_flash_batch_free(batch)
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:
            _interrupt_soon()
