"""Matrices that stay in DRAM in fewer bits than the 16 of bfloat16, and give the same weights.

11.2 bits (tight.py) where the CPU can compute with them and the weights are as weights are, else 12 (packing.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hf_flash import ordered, packing, tight
from hf_flash.memory import Pool, aligned_empty, view_bytes
from hf_flash.packing import Packing, choose_base, count_exponents, pack, packed_bytes
from hf_flash.readers import Read, Reader
from hf_flash.store import Extent2D
from hf_flash.tight import Tight

READ_BYTES = 1 << 20  # of a matrix at a time while it is packed
_MOST_ESCAPES = 1 / 8  # share of weights: with more of them 12 bits are fewer


class Resident(ABC):
    """A bfloat16 matrix [n, E] that stays in DRAM.

    Attributes:
        n_bytes: DRAM that it takes.
        bits: of a weight, on average.
    """

    n_bytes: int
    bits: float

    @abstractmethod
    def unpack(self, begin: int, end: int, out: torch.Tensor) -> torch.Tensor:
        """Rows begin .. end to `out`, [end - begin, E] bfloat16."""

    @abstractmethod
    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        """[k] int64 -> those rows, [k, E] bfloat16."""

    @abstractmethod
    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., E] times it, with a bias [n] or None -> [..., n]: summed in float32 and rounded once."""

    @abstractmethod
    def matvec(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One token, [..., E] bfloat16, times it -> [..., n], to the bit F.linear where `ordered.agrees`."""


class PackedMatrix(Resident):
    """In 12 bits a weight."""

    def __init__(self, rows: torch.Tensor, how: Packing) -> None:
        self.rows, self.packing = rows, how
        self.n_bytes = rows.nbytes + how.n_bytes
        self.bits = 8 * self.n_bytes / (len(rows) * how.n_elements)

    def unpack(self, begin: int, end: int, out: torch.Tensor) -> torch.Tensor:
        return packing.unpack(self.rows[begin:end], self.packing.rows(begin, end), out=out)

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        return packing.unpack(self.rows, self.packing, ids, ids)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return packing.linear(x, self.rows, self.packing, bias)

    def matvec(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return ordered.matvec(x, self.rows, self.packing, bias)


class TightMatrix(Resident):
    """In some 11.2 bits a weight."""

    def __init__(self, matrix: Tight) -> None:
        self.matrix, self.n_bytes = matrix, matrix.n_bytes
        self.bits = 8 * self.n_bytes / (matrix.n_rows * matrix.n_elements)

    def unpack(self, begin: int, end: int, out: torch.Tensor) -> torch.Tensor:
        return tight.unpack(self.matrix, (begin, end), out)

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        return tight.unpack(self.matrix, ids)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return tight.linear(x, self.matrix, bias)

    def matvec(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return tight.linear(x, self.matrix, bias)  # one kernel: its sums are in torch's order


def read_matrix(reader: Reader, rows: Extent2D, pool: Pool) -> Resident:
    """Read a bfloat16 matrix from a file, some rows at a time, and pack it.

    Args:
        reader: what reads.
        rows: [n, E * 2] bytes.
        pool: where it stays.
    """
    source = _Source(reader, rows)
    return (_tight(source, pool) if tight.available() else None) or _packed(source, pool)


def most_bytes(n_rows: int, n_columns: int) -> int:
    """What a matrix takes of a pool at most, unless escapes are unusually many."""
    fewest = packed_bytes(n_columns) * n_rows
    return max(fewest, tight.tile_bytes(n_rows, n_columns) + n_rows * n_columns // 16) if tight.available() else fewest


class _Source:
    """The rows of a matrix on flash, some at a time."""

    def __init__(self, reader: Reader, rows: Extent2D) -> None:
        self._reader, self._rows = reader, rows
        self.n_rows, self.n_columns = rows.n_rows, rows.row_bytes // 2
        step = max(1, READ_BYTES // rows.row_bytes // tight.STRIPE) * tight.STRIPE
        self.parts = [(i, min(i + step, rows.n_rows)) for i in range(0, rows.n_rows, step)]
        self._buffer = aligned_empty(min(step, rows.n_rows) * rows.row_bytes)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """[end - begin, E] bfloat16, valid until the next call."""
        rows = self._rows
        part = self._buffer[: (end - begin) * rows.row_bytes]
        self._reader.read([Read(rows.file, rows.start + begin * rows.row_bytes, [view_bytes(part)])])
        return part.view(torch.bfloat16).view(-1, self.n_columns)


def _tight(source: _Source, pool: Pool) -> TightMatrix | None:
    """None where so many weights are escapes that it does not pay."""
    memory = pool.take(tight.tile_bytes(source.n_rows, source.n_columns))
    tiles = tight.as_tiles(memory, source.n_columns)
    parts, n_escapes = [], 0
    for begin, end in source.parts:
        part = tight.pack(source.read(begin, end), tiles[begin // tight.STRIPE :])
        parts.append(part)
        n_escapes += len(part.escapes)
        if n_escapes > _MOST_ESCAPES * source.n_rows * source.n_columns:
            pool.give_back(memory)
            return None
    return TightMatrix(tight.join(tiles, parts, pool.take))


def _packed(source: _Source, pool: Pool) -> PackedMatrix:
    out = pool.take(source.n_rows * packed_bytes(source.n_columns)).view(source.n_rows, -1)

    def pack_all(base: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        counts, escapes = [torch.zeros(1, dtype=torch.int32)], []
        for begin, end in source.parts:
            values = source.read(begin, end)
            seen.add_(count_exponents(values))
            _, how = pack(values, base, out[begin:end])
            counts.append(how.start.diff())
            escapes.append(how.escapes)
        return counts, escapes

    seen = torch.zeros(256, dtype=torch.int64)
    base = choose_base(count_exponents(source.read(*source.parts[0])))[0]
    counts, escapes = pack_all(base)
    best, fewest = choose_base(seen)
    if sum(map(len, escapes)) > 2 * fewest + source.n_rows:  # the first rows were not like the others
        base = best
        counts, escapes = pack_all(base)
    start = torch.cat(counts).cumsum(0).to(torch.int32)
    return PackedMatrix(out, Packing(source.n_columns, base, start, torch.cat(escapes)))
