"""The contract of every reader: submit reads, wait for the ticket, find the bytes where you asked for them."""

from __future__ import annotations

import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from hf_flash import trace
from hf_flash.errors import ReadError
from hf_flash.plan import IntArray, extents


@dataclasses.dataclass(slots=True)
class Read:
    """One contiguous extent of a file, scattered over buffers.

    Attributes:
        file: what `Reader.open` returned.
        offset: first byte in the file.
        buffers: writable byte views that are filled in order.
        need: bytes that must arrive; the rest may lie past the end of the file. 0 means all.
    """

    file: int
    offset: int
    buffers: list[memoryview]
    need: int = 0


class Ticket:
    """Reads that were submitted together.

    Waits on a bare lock and a counter: Ctrl-C inside `threading.Event.wait` can leave the event's own lock held, and
    whoever waits next waits for ever.
    """

    def __init__(self, n_parts: int) -> None:
        self._left, self._lock = n_parts, threading.Lock()
        self._landing = threading.Lock()  # held until the last part has landed
        if n_parts:
            self._landing.acquire()
        self.error: BaseException | None = None
        self.begun = 0.0 if trace.active is None else time.perf_counter()
        self.n_bytes = 0  # filled in where reads are traced

    def part_done(self, error: BaseException | None = None) -> None:
        """Called by the reader when one part has landed or failed."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if self._left == 0:
                self._landing.release()
                self.trace_landing()

    def trace_landing(self) -> None:
        """Tell the trace, if there is one, that the last part has landed."""
        recorder = trace.active  # another thread may end the trace meanwhile
        if recorder is not None and self.begun:
            recorder.add_read(self.begun, time.perf_counter(), self.n_bytes)

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._left <= 0

    def settle(self) -> None:
        """Wait until no part writes into its buffers any more; errors are not raised."""
        while self._left > 0:
            if self._landing.acquire(timeout=1.0):
                self._landing.release()

    def wait(self) -> None:
        """Wait for all bytes.

        Raises:
            ReadError: a part failed; the buffers hold no valid data.
        """
        self.settle()
        if self.error is not None:
            if isinstance(self.error, ReadError):
                raise type(self.error)(*self.error.args) from self.error
            raise self.error


def failed_read(path: Path, offset: int, why: str) -> str:
    """Words for a read that the device refused."""
    return (
        f"reading {path} at offset {offset} failed: {why}. "
        "The device or the mount is failing; check it, then run `hf-flash verify` on the folder"
    )


def early_end(path: Path, offset: int, want: int, got: int) -> str:
    """Words for a file that ended before the bytes that were asked for."""
    return (
        f"{path} ended early: wanted {want} bytes at offset {offset}, got {got}. "
        "The file was truncated; run `hf-flash verify` on the folder and fetch the file again"
    )


class Reader(ABC):
    """Reads extents of files into memory that the caller owns. Safe from several threads.

    Attributes:
        part_bytes: what a long extent is best cut into.
    """

    part_bytes = 1 << 20

    @abstractmethod
    def open(self, path: Path) -> int:
        """Open a file, direct where the file system allows it; returns its handle. Opening twice gives one handle.

        Raises:
            CheckpointError: it cannot be opened. ReadError: the reader is closed.
        """

    @abstractmethod
    def submit(self, reads: list[Read]) -> Ticket:
        """Start reads; they may land in any order.

        Raises:
            ReadError: the reader is closed. What goes wrong later is raised by the ticket.
        """

    def submit_rows(
        self, file: int, start: int, row_bytes: int, rows: IntArray, targets: memoryview, slots: IntArray,
        max_gap_rows: int, sink: memoryview,
    ) -> tuple[Ticket, int, int]:  # fmt: skip
        """Start reading rows of one tensor straight into slots; neighbours, and rows a small gap apart, share a read.

        Args:
            file, start, row_bytes: the tensor: row i lies at start + i * row_bytes.
            rows: [n] int64, sorted, unique.
            targets: the slots, row_bytes each.
            slots: [n] int64, where each row goes.
            max_gap_rows: unwanted rows that one read may skip over.
            sink: where those go; at least max_gap_rows * row_bytes.

        Returns:
            The ticket, bytes requested, and the number of reads.
        """
        reads: list[Read] = []
        n_bytes = 0
        for i, j in extents(rows, max_gap_rows):
            buffers: list[memoryview] = []
            previous = int(rows[i]) - 1
            for row, slot in zip(rows[i:j].tolist(), slots[i:j].tolist(), strict=True):
                if row > previous + 1:
                    buffers.append(sink[: (row - previous - 1) * row_bytes])
                buffers.append(targets[slot * row_bytes : (slot + 1) * row_bytes])
                previous = row
            reads.append(Read(file, start + int(rows[i]) * row_bytes, buffers))
            n_bytes += (int(rows[j - 1]) - int(rows[i]) + 1) * row_bytes
        return self.submit(reads), n_bytes, len(reads)

    @abstractmethod
    def close(self) -> None:
        """Finish what is in flight and close every file; closing twice does nothing."""

    def read(self, reads: list[Read]) -> None:
        """Submit and wait.

        Raises:
            ReadError: names file and offset.
        """
        self.submit(reads).wait()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        return self
