"""The contract of every reader: submit reads, wait for the ticket, find the bytes where you asked for them."""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from hf_flash.errors import ReadError


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
    """Reads that were submitted together."""

    def __init__(self, n_parts: int) -> None:
        self._left, self._lock = n_parts, threading.Lock()
        self._event = threading.Event()
        self.error: BaseException | None = None
        if n_parts == 0:
            self._event.set()

    def part_done(self, error: BaseException | None = None) -> None:
        """Called by the reader when one part has landed or failed."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if self._left <= 0:
                self._event.set()

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event.is_set()

    def settle(self) -> None:
        """Wait until no part writes into its buffers any more; errors are not raised."""
        self._event.wait()

    def wait(self) -> None:
        """Wait for all bytes.

        Raises:
            ReadError: a part failed; the buffers hold no valid data.
        """
        self._event.wait()
        if self.error is not None:
            if isinstance(self.error, ReadError):
                raise type(self.error)(*self.error.args) from self.error
            raise self.error


class Reader(ABC):
    """Reads extents of files into memory that the caller owns. Safe from several threads."""

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
