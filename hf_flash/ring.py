"""The stream's ring in native memory: a layer's chunks are waited for, read ahead and summed up in one call.

`Stream` does the same step by step where this cannot be had (another reader, files that are not read directly) and is
its reference. What is under way is known to the native structs alone: Ctrl-C between two lines here loses nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Generator, Iterator, Sequence, Set

import torch

from hf_flash import native, trace
from hf_flash.layout import DATA_ALIGN
from hf_flash.memory import Row, shares
from hf_flash.native import FAILED, SIGNAL
from hf_flash.packed_sum import Begun, PackedSum
from hf_flash.readers import UringReader
from hf_flash.stats import Counters, FlashStats

WANTED, NOT_WANTED = -1, -2
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Unit(ctypes.Structure):
    """Rows that are streamed. These structs have the fields of _native/stream.cpp, in its order.

    Attributes:
        fd, start, n_rows, row_bytes: where the rows lie.
        step: rows of a chunk.
        next: the unit to read ahead after this one; -1 for one that is not streamed any more.
        first: rows that are pinned and no longer streamed.
        keep: rows that will be pinned after the first pass.
        begun: whether the first pass has been read, or is being read.
        stays: [n_chunks] the slot in which each chunk stays, WANTED where it shall, else NOT_WANTED.
    """

    _fields_ = [
        *[(name, _I) for name in ("fd", "start", "n_rows", "row_bytes", "step", "next", "first", "keep", "begun")],
        ("stays", _P),
    ]  # fmt: skip


class _Slot(ctypes.Structure):
    _fields_ = [
        ("memory", _P), ("rows", _P), ("batch", _P), ("unit", _I), ("row", _I), ("n", _I), ("taken", _I),
        ("bytes", _I), ("burst", _I), ("kept", _I), ("begun", _D),
    ]  # fmt: skip


class _Ring(ctypes.Structure):
    _fields_ = [
        ("ring", _P), ("units", _P), ("n_units", _I), ("slots", _P), ("n_slots", _I), ("line", _P), ("n_line", _I),
        ("last", _I), ("n_burst", _I), ("burst", _I), ("failed", _P), ("counters", Counters), ("log", _P),
        ("helper", _P),
    ]  # fmt: skip


class NativeRing:
    """Buffers and the reads into them. Whoever calls holds the stream's lock.

    Args:
        reader: what reads.
        units: an array of `Unit`, in memory that both sides see: the stream goes on changing `next`, `first`, `keep`.
        last: the unit that was asked for last, -1 before the first.
        n_buffers, buffer_bytes: of the ring. n_burst: reads that are started together.
        stats: where bytes and waits are counted.
        names: of the units, for a trace.
        helped: whether a thread of the reader's starts bursts while callers compute.
        most_lent: buffers that may be lent.
    """

    def __init__(
        self, reader: UringReader, units: ctypes.Array[Unit], last: int, n_buffers: int, buffer_bytes: int,
        n_burst: int, stats: FlashStats, names: Sequence[str], helped: bool = True, most_lent: int = 0,
    ) -> None:  # fmt: skip
        lib = native.library()
        assert lib is not None
        sizes = (_I * 5)()
        lib.hf_flash_stream_bytes(sizes)
        assert list(sizes)[:4] == [ctypes.sizeof(struct) for struct in (Unit, _Slot, trace.Event, _Ring)]
        self._lib, self._reader, self._units = lib, reader, units
        self._n_buffers = n_buffers
        self._lent = Row(most_lent, buffer_bytes)
        self._buffers = shares([buffer_bytes] * n_buffers) + self._lent.pieces
        self._slots, self._line = (_Slot * len(self._buffers))(), (_I * len(self._buffers))()
        self._stays = [(_I * -(-row.n_rows // row.step))() for row in units]
        for row, stays in zip(units, self._stays, strict=True):
            row.stays = ctypes.addressof(stays)
        for slot, buffer in zip(self._slots, self._buffers, strict=True):
            slot.memory = buffer.data_ptr()
        self._s = _Ring(
            ring=reader.ring, units=ctypes.addressof(units), n_units=len(units), slots=ctypes.addressof(self._slots),
            n_slots=n_buffers, line=ctypes.addressof(self._line), last=last, n_burst=n_burst,
        )  # fmt: skip
        self._address = ctypes.addressof(self._s)
        self._recorder: trace.Recorder | None = None  # who is told what happens
        self._log: trace.NativeLog | None = None
        self._first = -1  # while there is a log: the unit that came first in it
        self._names = names
        self._sum = lib.hf_flash_stream_sum
        stats.count_in(self._s.counters)
        self._helped, self.was_kept = helped, False  # was_kept: of the chunk that was handed out last
        self.choose(set())
        self._watch()

    @staticmethod
    def can(reader: UringReader, files: Sequence[int]) -> bool:
        """Whether there can be one: the reader is open, and files are read directly."""
        blocks = [reader.block_of(file) for file in set(files)] if reader.ring else [1]
        return all(block > 1 and DATA_ALIGN % block == 0 for block in blocks)

    def chunks(self, unit: int) -> Generator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows) of each chunk that is not pinned; rows [stop - start, row_bytes] uint8 until the next.

        Raises:
            ReadError: a read failed; the ring is usable again afterwards.
        """
        self._lib.hf_flash_stream_comes(self._address, unit)
        rows, taken = self._units[unit], _I()
        at = rows.first
        while at < rows.n_rows:
            self._take(unit, at, taken)
            number = taken.value
            try:
                slot = self._slots[number]
                begin, n = slot.rows - slot.memory, slot.n
                part = self._buffers[number][begin : begin + n * rows.row_bytes]
                self.was_kept = bool(slot.kept)
                yield at, at + n, part.view(n, rows.row_bytes)
            finally:
                self._s.ring = self._reader.ring
                self._lib.hf_flash_stream_give(self._address, number)
            at += n

    def sum(self, total: PackedSum, begun: Begun) -> None:
        """Add a whole unit to a sum that has begun: what is pinned, then what is streamed, in one call.

        Raises:
            ReadError: a read failed; the sum is worthless, the ring is usable again.
        """
        self.expect(total)
        x, out = begun
        result = self._sum(self._address, total.address, x.data_ptr(), out.data_ptr())
        while result == SIGNAL:  # its handler runs between the calls, and may raise
            result = self._sum(self._address, total.address, None, None)
        self.ended(result)

    def expect(self, total: PackedSum) -> int:
        """Native code is to add a whole unit to a sum; returns the ring's address."""
        if trace.active is not self._recorder or total.unit == self._first:
            self._listen(total.unit)
        self._reader.check_open()
        return self._address

    def ended(self, result: int) -> None:
        """Learn what a native call returned that was not to be called again.

        Raises:
            ReadError: a read failed; the ring is usable again.
        """
        if result:
            raise self._failure(result)

    @property
    def last(self) -> int:
        """The unit that was asked for last."""
        return self._s.last  # type: ignore[no-any-return]

    def lend(self, n: int) -> None:
        """Have n buffers besides the ring's. Within `still`."""
        first, s = self._n_buffers + n, self._s
        if first < s.n_slots:
            self.drop()
            for slot in self._slots[first : s.n_slots]:
                if slot.kept:
                    self._stays[slot.unit][slot.row // self._units[slot.unit].step] = WANTED
                slot.kept = 0
            self._lent.shrink(n)
        s.n_slots = first

    def choose(self, wanted: Set[tuple[int, int]]) -> None:
        """Say which chunks, (unit, number), shall stay: fewer than are lent, or as many. Within `still`."""
        for unit, stays in enumerate(self._stays):
            for number, slot in enumerate(stays):
                if (unit, number) not in wanted:
                    stays[number] = NOT_WANTED
                    if slot >= 0:
                        self._slots[slot].kept = 0
                elif slot < 0:
                    stays[number] = WANTED

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """A block in which nothing is read ahead: the table of units may be changed."""
        self._lib.hf_flash_stream_unwatch(self._address)
        try:
            yield
        finally:
            self._watch()

    def _watch(self) -> None:
        self._s.ring = self._reader.ring
        if self._helped:
            self._lib.hf_flash_stream_watch(self._address)

    def forget(self, unit: int, n_rows: int) -> None:
        """Drop all reads if one is of the first rows of a unit."""
        line = [self._slots[i] for i in self._line[: self._s.n_line]]
        if any(slot.unit == unit and slot.row < n_rows for slot in line):
            self.drop()

    def close(self) -> None:
        """Wait for all reads and forget them, once and for all."""
        self._lib.hf_flash_stream_unwatch(self._address)
        self.drop()

    def drop(self) -> None:
        """Wait for all reads and forget them."""
        self._s.ring = self._reader.ring
        while self._lib.hf_flash_stream_drop(self._address) == SIGNAL:
            pass

    def reclaim(self) -> None:
        """No chunk is in use, whatever became of those who had one."""
        for slot in self._slots:
            slot.taken = 0

    def _take(self, unit: int, row: int, number: ctypes.c_int64) -> None:
        """Wait for a chunk; `number` is its slot then."""
        self._listen(unit)
        self._reader.check_open()
        result = SIGNAL
        while result == SIGNAL:
            result = self._lib.hf_flash_stream_take(self._address, unit, row, ctypes.byref(number))
        self.ended(result)

    def _failure(self, result: int) -> BaseException:
        assert result == FAILED, "more chunks in use than the ring has"
        error = self._reader.error_of(self._s.failed)
        self._lib.hf_flash_batch_free(self._s.failed)
        return error

    def _listen(self, unit: int) -> None:
        """Have native code note what it does for who wants to know now, and room for it, once a pass."""
        if self._log is not None:
            self._log.make_room()
        if trace.active is self._recorder:
            return
        self._s.log, self._first = None, -1
        self._recorder, self._log = trace.active, None
        if self._recorder is not None:
            self._log, self._first = trace.NativeLog(self._names), unit
            self._recorder.sources.append(self._log.take)
            self._s.log = self._log.address

    def __del__(self) -> None:
        landed = not hasattr(self, "_address") or self._reader.is_forked  # half made, or not ours
        while not landed:  # Ctrl-C is dropped in a finalizer anyway; the device may still be writing into the buffers
            with contextlib.suppress(KeyboardInterrupt):
                self.close()
                landed = True
