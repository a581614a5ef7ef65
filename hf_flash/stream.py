"""Rows in large extents, in order, with the next ones under way: how whole layers pass through little DRAM.

A ring of a few chunk buffers: while the caller computes on one chunk others are being read, across the border from one
layer into the next, so the flash never waits for the arithmetic. Which unit follows which is learned from what was
asked last time: decoders repeat their layers, encoder-decoders do so after a first pass.

Reads are started in bursts of half the ring, each as the one before begins to land: a virtual disk tells of reads when
it has nothing left to do, and whoever asked for all at once comes back to an idle device and a full ring.

Reads through io_uring are kept in native memory (ring.py), so that a whole layer takes one call; what is done here,
step by step and with any reader, is the reference.

Memory that is lent (loan.py) keeps chunks that were read: they stay where they are, another buffer takes their place in
the ring, and they are not read again until the memory is wanted back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from operator import itemgetter
from typing import Any

import torch

from hf_flash import trace
from hf_flash.layout import DATA_ALIGN, chunk_rows, spread
from hf_flash.memory import Row, aligned_empty, round_up, shared_bytes, shares, view_bytes
from hf_flash.ops import Activation, Biases
from hf_flash.packed_sum import PackedSum
from hf_flash.readers import Read, Reader, Ticket, UringReader
from hf_flash.ring import NativeRing, Unit
from hf_flash.stats import FlashStats
from hf_flash.store import Extent2D

Chunk = tuple[int, int]  # (unit, number of the chunk in it)


@dataclasses.dataclass
class _Pending:
    chunk: Chunk
    buffer: torch.Tensor
    ticket: Ticket
    rows: torch.Tensor  # [n, row_bytes] view into buffer
    burst: int
    number: int  # of the buffer


class Stream:
    """The ring, its owner and its order.

    Args:
        reader: what reads.
        chunk_bytes: upper bound of a chunk (one row at least).
        n_buffers: chunks in flight or in use.
        stats: where bytes and waits are counted.
        overlap: False to fill the ring, wait for all of it, and read on only when it is used up: to measure what the
            difference is.
        helped: whether a thread of the reader's may start bursts while callers compute; without it what is read when
            does not depend on time.
    """

    def __init__(
        self, reader: Reader, chunk_bytes: int, n_buffers: int, stats: FlashStats, overlap: bool = True,
        helped: bool = True,
    ) -> None:  # fmt: skip
        self._helped, self._most_lent, self._n_lent = helped, 0, 0
        self._wanted: set[Chunk] = set()  # chunks that are to stay in lent memory
        self._kept: dict[Chunk, _Pending] = {}  # those that do
        self._lent = Row(0, 0)
        self._was_kept = False
        self._reader, self._stats, self.chunk_bytes, self._overlap = reader, stats, chunk_bytes, overlap
        self._free: list[tuple[int, torch.Tensor]] = []  # number and memory
        self._burst = 0  # number of the reads started together of which none has landed yet
        self._n_buffers, self._buffer_bytes = max(2, n_buffers), 0
        self._n_burst = self._n_buffers // 2 if overlap else self._n_buffers
        self._units: list[Extent2D] = []
        self._table = (Unit * 0)()  # where each unit lies, what is pinned of it, and which one follows
        self._order: list[int] = []
        self._last = -1  # the unit that was asked for last; the native ring knows it while there is one
        self._pending: deque[_Pending] = deque()
        self._ring: NativeRing | None = None
        self._in_use = False
        self.lock = threading.RLock()

    def add(self, unit: Extent2D) -> int:
        """Register rows to be streamed, in the order in which a forward pass asks for them; returns the unit's number.

        Raises nothing; memory for the ring is taken when the first chunk is asked for.
        """
        assert self._ring is None
        number, step = len(self._units), chunk_rows(unit.n_rows, unit.row_bytes, self.chunk_bytes)
        self._units.append(unit)
        lies = Unit(start=unit.start, n_rows=unit.n_rows, row_bytes=unit.row_bytes, step=step)
        self._table = (Unit * (number + 1))(*self._table, lies)
        size = step * unit.row_bytes + 2 * DATA_ALIGN
        self._buffer_bytes = max(self._buffer_bytes, round_up(size, DATA_ALIGN))
        self._order.append(number)
        self._relink()
        return number

    def _relink(self) -> None:
        for row in self._table:
            row.next = -1
        for unit, following in zip(self._order, self._order[1:] + self._order[:1], strict=True):
            self._table[unit].next = following

    def chunk_rows(self, unit: int) -> int:
        """Rows in one chunk of a unit."""
        return self._table[unit].step

    def announce_pin(self, unit: int, n_rows: int) -> None:
        """The caller will hold the first `n_rows` of a unit after one pass: they are read ahead once, not again."""
        self._table[unit].keep = n_rows

    def pin_first(self, unit: int, n_rows: int) -> None:
        """Stop streaming the first `n_rows` of a unit (whole chunks, or all rows): the caller holds them now."""
        with self.lock, self._still():
            step = self.chunk_rows(unit)
            assert n_rows % step == 0 or n_rows == self._units[unit].n_rows
            if self._ring is not None:
                self._ring.forget(unit, n_rows)
            elif any(p.chunk[0] == unit and p.chunk[1] * step < n_rows for p in self._pending):
                self._drop_pending()
            self._table[unit].first = n_rows
            if n_rows == self._units[unit].n_rows and unit in self._order:
                self._order.remove(unit)
                self._relink()
            self._choose(self._n_lent)

    @property
    def ring_bytes(self) -> int:
        """DRAM that the ring takes."""
        return shared_bytes([self._buffer_bytes] * self._n_buffers)

    @property
    def was_kept(self) -> bool:
        """Whether the chunk that was handed out last had stayed."""
        return self._was_kept if self._ring is None else self._ring.was_kept

    @property
    def buffer_bytes(self) -> int:
        """DRAM of a chunk that stays."""
        return self._buffer_bytes

    @property
    def most_lent(self) -> int:
        """Buffers that may be lent."""
        return self._most_lent

    @property
    def n_lent(self) -> int:
        """Buffers that are lent."""
        return self._n_lent

    def can_borrow(self, n_bytes: int) -> None:
        """Say how much memory may be lent at most, before anything is read."""
        assert self._ring is None and not self._free
        n_chunks = sum(-(-unit.n_rows // row.step) for unit, row in zip(self._units, self._table, strict=True))
        self._most_lent = min(n_chunks, n_bytes // max(1, self._buffer_bytes))

    def lend(self, n: int) -> None:
        """Let n chunks stay in lent memory, more or fewer than so far; what is taken back is the system's on return."""
        n = min(n, self._most_lent)
        with self.lock, self._still():
            # Wherever Ctrl-C comes, no more chunks are to stay than there is room for besides the ring.
            if n < self._n_lent:
                self._choose(n)
                self._resize(n)
            else:
                self._resize(n)
                self._choose(n)
            self._n_lent = n

    def _still(self) -> contextlib.AbstractContextManager[None]:
        """A block in which no thread of the ring's reads ahead."""
        return contextlib.nullcontext() if self._ring is None else self._ring.still()

    def _resize(self, n: int) -> None:
        """Have the memory of n lent buffers, from now on."""
        if self._ring is not None:
            self._ring.lend(n)
        elif n < self._n_lent:
            self._withdraw(self._n_buffers + n)
        elif self._free or self._pending or self._kept:
            used = {one.number for one in (*self._pending, *self._kept.values())} | {number for number, _ in self._free}
            rest = enumerate(self._lent.pieces[:n], start=self._n_buffers)
            self._free += [(number, piece) for number, piece in rest if number not in used]

    def _withdraw(self, first: int) -> None:
        """Lose the buffers from a number on, and what is in them."""
        self._drop_pending()
        for chunk in [chunk for chunk, kept in self._kept.items() if kept.number >= first]:
            del self._kept[chunk]
        self._free = [(number, buffer) for number, buffer in self._free if number < first]
        self._lent.shrink(first - self._n_buffers)

    def _choose(self, n: int) -> None:
        """Say which n chunks are to stay: spread over all, so that reads go on while they are computed with."""
        streamed = [
            (unit, row // self._table[unit].step)
            for unit in self._order
            for row in range(
                max(self._table[unit].first, self._table[unit].keep), self._units[unit].n_rows, self._table[unit].step
            )
        ]
        self._wanted = {streamed[i] for i in spread(len(streamed))[:n]}
        for chunk in [chunk for chunk in self._kept if chunk not in self._wanted]:
            kept = self._kept.pop(chunk)
            self._free.append((kept.number, kept.buffer))
        if self._ring is not None:
            self._ring.choose(self._wanted)

    @contextlib.contextmanager
    def unit(self, unit: int) -> Iterator[Iterator[tuple[int, int, torch.Tensor]]]:
        """Iterate over the chunks of a unit; the stream is this thread's until the block ends.

        Yields:
            An iterator of (start, stop, rows): rows[start:stop] of the unit as [stop - start, row_bytes] uint8, valid
            until the next step.

        Raises:
            ReadError: a read failed; the stream is usable again afterwards.
        """
        with self.lock:
            within, self._in_use = self._in_use, True
            to_read = self._table[unit].first < self._units[unit].n_rows
            ring = self._native() if to_read else self._ring
            if ring is not None and not within:
                ring.reclaim()
            chunks = self._chunks(unit) if ring is None else ring.chunks(unit)
            try:
                yield chunks
            finally:
                chunks.close()
                self._in_use = within

    def sum(self, total: PackedSum, x: torch.Tensor, act: Activation, biases: Biases) -> torch.Tensor | None:
        """Give the sum over all rows of a unit, in one native call.

        Returns:
            None where this cannot be had, and then nothing was done: go through `unit`.

        Raises:
            ReadError: a read failed; the stream is usable again afterwards.
        """
        with self.lock:
            ring = self._ring or self._native()
            if ring is None or (begun := total.begin(x, act, biases)) is None:
                return None
            ring.sum(total, begun)
            return begun[1] if total.exact else total.end(begun)

    def as_native(self, total: PackedSum, act: Activation, biases: Biases) -> int | None:
        """Address of the ring for native code that gives the sum over all rows of a unit, for one bfloat16 token.

        Hold the lock. None where this cannot be had.
        """
        ring = self._ring or self._native()
        return ring.expect(total) if ring is not None and total.prepare(torch.bfloat16, act, biases) else None

    def native_ended(self, result: int) -> None:
        """Learn what native code returned for that.

        Raises:
            ReadError: a read failed; the stream is usable again.
        """
        if self._ring is not None:
            self._ring.ended(result)

    def _comes(self, unit: int) -> None:
        """Learn that a unit follows the one before."""
        if self._table[unit].next < 0:
            return
        if self._last >= 0 and self._table[self._last].next >= 0:
            self._table[self._last].next = unit
        self._last = unit

    def _native(self) -> NativeRing | None:
        """The ring in native memory, where there can be one."""
        if self._ring is not None or not self._overlap or not isinstance(self._reader, UringReader):
            return self._ring
        if NativeRing.can(self._reader, [unit.file for unit in self._units]):
            for row, unit in zip(self._table, self._units, strict=True):
                row.fd = self._reader.fd(unit.file)
            self._ring = NativeRing(
                self._reader, self._table, self._last, self._n_buffers, self._buffer_bytes, self._n_burst,
                self._stats, [unit.name.removesuffix(".bundles") for unit in self._units], self._helped,
                self._most_lent,
            )  # fmt: skip
            with self._ring.still():
                self._ring.lend(self._n_lent)
                self._ring.choose(self._wanted)
        return self._ring

    def _chunks(self, unit: int) -> Generator[tuple[int, int, torch.Tensor]]:
        self._comes(unit)
        step, n_rows = self.chunk_rows(unit), self._units[unit].n_rows
        for start in range(self._table[unit].first, n_rows, step):
            chunk = (unit, start // step)
            kept = self._kept.get(chunk)
            if kept is not None:
                if self._overlap and self._pending:
                    self._refill(kept)
                self._was_kept = True
                yield start, start + kept.rows.shape[0], kept.rows
                continue
            pending = self._take(chunk)
            try:
                t0 = time.perf_counter()
                pending.ticket.wait()
                self._landed(pending)
                if self._overlap:
                    self._refill(pending)
                else:
                    for other in self._pending:
                        other.ticket.settle()
                self._stats.add(wait_s=time.perf_counter() - t0)
                if trace.active is not None:
                    trace.active.add(trace.WAIT, t0, time.perf_counter())
                self._was_kept = False
                yield start, start + pending.rows.shape[0], pending.rows
            finally:
                pending.ticket.settle()
                self._keep_or_free(pending)
                if self._overlap:
                    self._refill(pending)

    def _keep_or_free(self, used: _Pending) -> None:
        if used.chunk in self._wanted and used.chunk not in self._kept and used.ticket.error is None:
            self._kept[used.chunk] = used
        else:
            self._free.append((used.number, used.buffer))

    def _take(self, chunk: Chunk) -> _Pending:
        if not any(p.chunk == chunk for p in self._pending):
            self._drop_pending()
            self._schedule(chunk)
            self._read_ahead(self._pending[-1], self._n_burst - 1)
        while self._pending[0].chunk != chunk:
            self._recycle(self._pending.popleft())
        taken = self._pending.popleft()
        if self._overlap or not self._pending:
            self._refill(taken)
        return taken

    def _refill(self, taken: _Pending) -> None:
        """Start the next burst behind what was taken, once the one before has begun to land."""
        last = self._pending[-1] if self._pending else taken
        if last.burst != self._burst:
            self._read_ahead(last, self._n_burst)

    def _read_ahead(self, last: _Pending, n: int) -> None:
        """Start up to n reads behind one, as far as buffers are free."""
        for _ in range(min(n, len(self._free))):
            chunk = self._following(last.chunk)
            if chunk is None:
                return
            self._schedule(chunk)
            last = self._pending[-1]

    def _following(self, chunk: Chunk) -> Chunk | None:
        """The chunk to read ahead after this one; None where everything else stays in DRAM."""
        unit, number = chunk
        n_left = len(self._units)
        while True:
            number += 1
            while number * self.chunk_rows(unit) >= self._units[unit].n_rows:
                if n_left == 0:
                    return None
                n_left -= 1
                unit = unit if self._table[unit].next < 0 else self._table[unit].next
                first = self._table[unit].keep if self._table[unit].begun else self._table[unit].first
                number = -(-first // self.chunk_rows(unit))
            if (unit, number) not in self._kept:
                return unit, number

    def _schedule(self, chunk: Chunk) -> None:
        if not self._free and not self._pending and not self._kept:
            self._allocate()
        if not self._free:
            return
        unit, step = self._units[chunk[0]], self.chunk_rows(chunk[0])
        self._table[chunk[0]].begun = 1
        first = chunk[1] * step
        n = min(step, unit.n_rows - first)
        begin = unit.start + first * unit.row_bytes
        aligned = begin // DATA_ALIGN * DATA_ALIGN
        need = begin - aligned + n * unit.row_bytes
        buffer_number, buffer = self._free.pop(self._free.index(min(self._free, key=itemgetter(0))))
        length = round_up(need, DATA_ALIGN)
        try:
            view = view_bytes(buffer)[:length]
            ticket = self._reader.submit(_split_read(unit.file, aligned, view, need, self._reader.part_bytes))
        except BaseException:  # Ctrl-C too: what was started may still land in this buffer, so another takes its place
            self._free.append((buffer_number, aligned_empty(self._buffer_bytes)))
            raise
        self._stats.add(bytes_read=length, n_reads=1)
        rows = buffer[begin - aligned : need].view(n, unit.row_bytes)
        self._pending.append(_Pending(chunk, buffer, ticket, rows, self._burst, buffer_number))

    def _allocate(self) -> None:
        self._lent = Row(self._most_lent, self._buffer_bytes)
        buffers = shares([self._buffer_bytes] * self._n_buffers) + self._lent.pieces[: self._n_lent]
        self._free = list(enumerate(buffers))

    def _drop_pending(self) -> None:
        while self._pending:
            self._recycle(self._pending.popleft())

    def _recycle(self, pending: _Pending) -> None:
        pending.ticket.settle()  # the device may still be writing into the buffer
        self._landed(pending)
        self._free.append((pending.number, pending.buffer))

    def _landed(self, pending: _Pending) -> None:
        self._burst += pending.burst == self._burst

    def release(self) -> None:
        """Give the ring's memory back; the next use takes it again."""
        with self.lock:
            if self._ring is not None:
                self._ring.close()
                self._last = self._ring.last
            self._drop_pending()
            self._ring, self._free, self._lent, self._kept = None, [], Row(0, 0), {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        return self


def _split_read(file: int, offset: int, view: memoryview, need: int, part: int) -> list[Read]:
    """One extent as reads of at most `part` bytes, so that several threads share it."""
    reads = []
    for at in range(0, len(view), part):
        piece = view[at : at + part]
        reads.append(Read(file, offset + at, [piece], max(1, min(len(piece), need - at))))
    return reads
