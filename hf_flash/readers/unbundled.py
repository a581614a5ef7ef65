"""Rows read in pieces, each piece a read of its own: what a layout without bundles would cost.

A measure for `hf-flash bench --ladder`, not a way to run: where up rows and down columns lie apart ("LLM in a flash",
Table 2, the rows without bundling), a neuron takes a read per matrix and neighbours share none. The same bytes are
fetched here from the bundles, in as many pieces, and all first pieces before all second ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hf_flash.layout import ROW_ALIGN
from hf_flash.plan import IntArray
from hf_flash.readers.base import Read, Reader, Ticket


class UnbundledReader(Reader):
    """Another reader, with rows in pieces.

    Args:
        reader: what reads; closed with this one.
        n_pieces: reads that a row takes: 2 for up and down, 3 with a gate.
    """

    def __init__(self, reader: Reader, n_pieces: int) -> None:
        self._reader, self._n_pieces = reader, n_pieces
        self.part_bytes = reader.part_bytes

    def open(self, path: Path) -> int:
        return self._reader.open(path)

    def submit(self, reads: list[Read]) -> Ticket:
        return self._reader.submit(reads)

    def submit_rows(
        self, file: int, start: int, row_bytes: int, rows: IntArray, targets: memoryview, slots: IntArray,
        max_gap_rows: int, sink: memoryview,
    ) -> tuple[Ticket, int, int]:  # fmt: skip
        """Rows as pieces of whole blocks. A block that two pieces share is read twice; no two pieces share a read."""
        unit, n_units, pieces = self._pieces(row_bytes)
        tickets, n_bytes, n_reads = [], 0, 0
        for piece in pieces:
            # A piece that is a whole row would share reads with its neighbours: every other row, then the rest.
            for some in (slice(0, None, 2), slice(1, None, 2)) if len(piece) == n_units else (slice(None),):
                if not len(rows[some]):
                    continue
                units = (rows[some, None] * n_units + piece).ravel()
                places = (slots[some, None] * n_units + piece).ravel()
                ticket, more, n = self._reader.submit_rows(file, start, unit, units, targets, places, 0, sink)
                tickets.append(ticket)
                n_bytes, n_reads = n_bytes + more, n_reads + n
        return JoinedTicket(tickets), n_bytes, n_reads

    def _pieces(self, row_bytes: int) -> tuple[int, int, list[IntArray]]:
        """Bytes of a unit, units of a row, and those of each piece: equal shares, rounded to the blocks around them."""
        n, n_blocks = self._n_pieces, row_bytes // ROW_ALIGN
        bounds = [(i * n_blocks // n, -(-(i + 1) * n_blocks // n)) for i in range(n)]
        size = math.gcd(n_blocks, *(at for pair in bounds for at in pair))  # blocks of a unit
        return size * ROW_ALIGN, n_blocks // size, [np.arange(a // size, b // size) for a, b in bounds]

    def close(self) -> None:
        self._reader.close()


class JoinedTicket(Ticket):
    """Several tickets as one."""

    def __init__(self, tickets: list[Ticket]) -> None:
        super().__init__(0)
        self._tickets = tickets

    def ready(self) -> bool:
        return all(ticket.ready() for ticket in self._tickets)

    def settle(self) -> None:
        for ticket in self._tickets:
            ticket.settle()

    def wait(self) -> None:
        self.settle()
        for ticket in self._tickets:
            ticket.wait()
