"""How one neuron lies on flash: the bundle.

A neuron's gate row, up row and down column are used together or not at all, so they are stored side by side and
cost one read instead of three ("LLM in a flash", §3.2). The row stride is a multiple of 512 bytes, the smallest
unit that a device reads, so that a row can be read straight into its slot.

    | gate row, d_model | up row, d_model | down column, d_out | padding to 512 B |
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch

from hf_flash.errors import FlashConfigError
from hf_flash.memory import round_up
from hf_flash.packing import packed_bytes

ROW_ALIGN = 512  # bytes; row stride inside a flash tensor
DATA_ALIGN = 4096  # bytes; start of every flash tensor inside its file

_UNITS = {"": 1, "b": 1}
for _i, _u in enumerate("kmgt", start=1):
    _UNITS.update({_u: 1000**_i, _u + "b": 1000**_i, _u + "ib": 1024**_i})


def parse_size(size: int | float | str) -> int:
    """Bytes of "4GiB", "512 MB", 1.5e9 or 4096.

    Raises:
        FlashConfigError: not a size, or not positive.
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        number: float = size
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?i?b?)\s*", str(size).lower())
        number = math.nan
        if match is not None and match.group(2) in _UNITS:
            number = float(match.group(1)) * _UNITS[match.group(2)]
    if not math.isfinite(number):
        raise FlashConfigError(f"{size!r} is not a size. Write bytes, or a size such as '4GiB', '512MiB', '1.5GB'.")
    n = int(number)
    if n <= 0:
        raise FlashConfigError(f"A size must be positive, got {size!r}. Write one such as '4GiB'.")
    return n


def format_size(n_bytes: float) -> str:
    """Bytes as people read them: 1536 -> '1.5 KiB'."""
    n = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


@dataclasses.dataclass(frozen=True)
class BundleLayout:
    """Geometry of the bundles of one layer.

    Attributes:
        d_model: length of a gate or up row, in elements.
        d_out: length of a down column, in elements.
        gated: whether there is a gate row.
        dtype: dtype of the stored weights.
        packed: whether rows are packed into 12 bits a weight (packing.py).
    """

    d_model: int
    d_out: int
    gated: bool
    dtype: torch.dtype
    packed: bool = False

    @property
    def n_elements(self) -> int:
        """Elements of one bundle, padding excluded."""
        return self.d_model * (2 if self.gated else 1) + self.d_out

    @property
    def row_bytes(self) -> int:
        """Stride from one bundle to the next, in bytes; a multiple of 512."""
        n_bytes = packed_bytes(self.n_elements) if self.packed else self.n_elements * self.dtype.itemsize
        return round_up(n_bytes, ROW_ALIGN)

    @property
    def parts(self) -> tuple[tuple[int, int] | None, tuple[int, int], tuple[int, int]]:
        """First element and end of gate row (or None), up row and down column."""
        start = self.d_model if self.gated else 0
        gate = (0, self.d_model) if self.gated else None
        return gate, (start, start + self.d_model), (start + self.d_model, self.n_elements)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Views of the three parts of some rows; no copy.

        Args:
            rows: [n, row_bytes] uint8 of rows that are not packed (or were unpacked), contiguous in its last dimension.

        Returns:
            gate [n, d_model] or None, up [n, d_model], down [n, d_out], of `dtype`.
        """
        elements = rows.view(self.dtype)  # [n, row_bytes / itemsize]
        gate, up, down = self.parts
        return None if gate is None else elements[:, slice(*gate)], elements[:, slice(*up)], elements[:, slice(*down)]

    def pack(self, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Bundle a layer's matrices, in whole weights.

        Args:
            up: [n, d_model].
            down: [n, d_out]: the down matrix transposed, a row per neuron.
            gate: [n, d_model], where the block is gated.

        Returns:
            [n, row_bytes] uint8.
        """
        assert not self.packed
        rows = torch.zeros(up.shape[0], self.row_bytes, dtype=torch.uint8)
        to_gate, to_up, to_down = self.split(rows)
        to_up.copy_(up)
        to_down.copy_(down)
        if to_gate is not None:
            assert gate is not None
            to_gate.copy_(gate)
        return rows


def spread(n: int) -> list[int]:
    """0..n-1 in an order whose every prefix is spread evenly: multiples of the golden ratio, sorted by fraction."""
    return sorted(range(n), key=lambda i: (i * 0.6180339887498949) % 1.0)


def chunk_rows(n_rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows that are streamed at a time: a multiple of 8 where there are so many, which kernels like."""
    n = max(1, chunk_bytes // row_bytes)
    return min(n_rows, n - n % 8 if n > 8 else n)
