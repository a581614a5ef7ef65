"""Matrices in some 11.2 bits a weight that were bfloat16, without losing any: for those that stay in DRAM.

As in packing.py sign and mantissa stay as they are, 8 bits, and a code says which exponent. Here it has 3 bits: codes 0
to 6 are the exponents base .. base + 6 of the row (base is the row's own), and code 7 says that the exponent is the
next byte of the row's list of escapes. Of normal weights one in 30 to 50 is an escape. So a row's bytes are not known
before it is packed, which bundles in slots and on flash have to be; for a matrix that stays it does not matter.

Kernels decode 64 weights in a register: the codes are spread over bytes, looked up, and the escapes expanded into the
gaps. That takes AVX512-VBMI2 (Ice Lake, Zen 4 and newer); elsewhere such matrices are kept in 12 bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from hf_flash import native
from hf_flash.memory import aligned_empty
from hf_flash.packing import BLOCK

N_CODES = 7  # exponents of a row that have a code of their own
_ROW_SLACK, _ESCAPE_SLACK = 8, 64  # kernels read whole registers


@dataclasses.dataclass(frozen=True)
class Tight:
    """A packed matrix.

    Attributes:
        rows: [n, 11 E / 8] uint8: of each E bytes (mantissa << 1 | sign), then 3 bits of code for each weight.
        base: [n] uint8, exponent of code 0; never 0.
        start: [n + 1] int32, where each row's escapes begin.
        escapes: [m] uint8, exponents. Some bytes that belong to the matrix follow them, and the rows, in memory.
    """

    rows: torch.Tensor
    base: torch.Tensor
    start: torch.Tensor
    escapes: torch.Tensor

    @functools.cached_property
    def n_rows(self) -> int:
        """n."""
        return len(self.rows)

    @functools.cached_property
    def n_elements(self) -> int:
        """E, weights of a row."""
        return self.rows.shape[1] * 8 // 11

    @property
    def n_bytes(self) -> int:
        """DRAM that all of it takes."""
        parts = (self.rows, self.base, self.start, self.escapes)
        return sum(part.nbytes for part in parts) + _ROW_SLACK + _ESCAPE_SLACK

    def part(self, begin: int, end: int) -> Tight:
        """Rows begin .. end alone; no copy."""
        return Tight(self.rows[begin:end], self.base[begin:end], self.start[begin : end + 1], self.escapes)

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...]:
        """What the native calls are told of it."""
        pointers = (self.base.data_ptr(), self.start.data_ptr(), self.escapes.data_ptr())
        return self.rows.data_ptr(), self.rows.stride(0), len(self.rows), self.n_elements, *pointers

    @functools.cached_property
    def kernel(self) -> Any:
        """`hf_flash_tight_linear`, looked up once, or None where it is not there."""
        lib: Any = native.library()
        return lib.hf_flash_tight_linear if available() else None


def available() -> bool:
    """Whether this machine has the kernels: without them such a matrix is slow to compute with."""
    lib = native.library()
    return lib is not None and _has_kernels(lib)


@functools.cache
def _has_kernels(lib: Any) -> bool:
    return bool(lib.hf_flash_tight())


def row_bytes(n_elements: int) -> int:
    """Bytes of a row, its escapes apart."""
    return n_elements * 11 // 8


def empty_rows(n: int, n_elements: int) -> torch.Tensor:
    """Memory for rows, [n, 11 E / 8] uint8, with what kernels read beyond it."""
    return aligned_empty(n * row_bytes(n_elements) + _ROW_SLACK)[:-_ROW_SLACK].view(n, -1)


def join_escapes(parts: list[torch.Tensor]) -> torch.Tensor:
    """Escapes of some rows and of those that follow them, [m] uint8, with what kernels read beyond them."""
    n = sum(map(len, parts))
    return torch.cat(parts, out=aligned_empty(n + _ESCAPE_SLACK)[:n])  # not from the heap, where parts leave holes


def pack(values: torch.Tensor, rows: torch.Tensor | None = None) -> Tight:
    """Pack rows of bfloat16.

    Args:
        values: [n, E] bfloat16, E a multiple of 64.
        rows: [n, 11 E / 8] uint8 to write to, part of `empty_rows`; new memory without.
    """
    n, size = values.shape
    assert size % BLOCK == 0
    values = values if values.stride(-1) == 1 else values.contiguous()
    rows = empty_rows(n, size) if rows is None else rows
    base, start = torch.empty(n, dtype=torch.uint8), torch.zeros(n + 1, dtype=torch.int32)
    lib = native.library()
    if lib is not None:
        where = (rows.data_ptr(), rows.stride(0), base.data_ptr(), start.data_ptr())
        args = (values.data_ptr(), values.stride(0), n, size, *where)
        found = torch.empty(lib.hf_flash_tight_pack(*args, None), dtype=torch.uint8)
        if len(found):
            lib.hf_flash_tight_pack(*args, found.data_ptr())
        return Tight(rows, base, start, join_escapes([found]))
    bits = values.view(torch.int16).to(torch.int32) & 0xFFFF
    exponent = (bits >> 7) & 255
    counts = torch.zeros(n, 256, dtype=torch.int32).scatter_add_(1, exponent.long(), torch.ones_like(exponent))
    base.copy_(counts[:, 1:].unfold(1, N_CODES, 1).sum(-1).argmax(-1) + 1)
    code = exponent - base[:, None].int()
    escaped = (code < 0) | (code >= N_CODES)
    code[escaped] = N_CODES
    rows[:, :size] = ((bits & 0x7F) << 1 | bits >> 15).to(torch.uint8)
    eight = (code.view(n, size // 8, 8) << torch.arange(0, 24, 3, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    rows[:, size:] = torch.stack([eight & 255, eight >> 8 & 255, eight >> 16], -1).view(n, -1).to(torch.uint8)
    start[1:] = escaped.sum(1).cumsum(0)
    return Tight(rows, base, start, join_escapes([exponent[escaped].to(torch.uint8)]))


def unpack(matrix: Tight, ids: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows as bfloat16 again.

    Args:
        matrix: where from.
        ids: [k] int64, which rows; all without.
        out: [k, E] bfloat16 to write to.

    Returns:
        [k, E] bfloat16.
    """
    size = matrix.n_elements
    n = len(matrix.rows) if ids is None else len(ids)
    out = torch.empty(n, size, dtype=torch.bfloat16, device="cpu") if out is None else out
    if available():
        rows, stride, _, _, *how = matrix.arguments
        lib: Any = native.library()
        lib.hf_flash_tight_unpack(
            rows, stride, size, *how, native.pointer(ids), n, out.data_ptr(), out.stride(0)
        )  # fmt: skip
        return out
    which = torch.arange(n) if ids is None else ids
    chosen = matrix.rows[which]
    three = chosen[:, size:].view(n, size // 8, 3).to(torch.int32)
    eight = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    code = (eight[..., None] >> torch.arange(0, 24, 3, dtype=torch.int32) & 7).view(n, size)
    exponent = code + matrix.base[which, None].int()
    start = matrix.start.numpy()[which.numpy()]
    counts = matrix.start.numpy()[which.numpy() + 1] - start
    index = np.arange(counts.sum()) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    exponent[code == N_CODES] = matrix.escapes[torch.from_numpy(index)].int()
    low = chosen[:, :size].to(torch.int32)
    out.copy_(((low & 1) << 15 | exponent << 7 | low >> 1).to(torch.int16).view(torch.bfloat16))
    return out


def linear(x: torch.Tensor, matrix: Tight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A few inputs times a matrix, summed in float32 and rounded once.

    Reference: `(x.float() @ unpack(matrix).float().t() + bias.float()).to(x.dtype)`.

    Args:
        x: [..., E], float32, float16 or bfloat16.
        bias: [n], dtype of x.

    Returns:
        [..., n], dtype of x.
    """
    if matrix.kernel is None:
        y = x.float() @ unpack(matrix).float().t()
        return (y if bias is None else y + bias.float()).to(x.dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    assert bias is None or bias.dtype == x.dtype
    out = output_like(x, matrix.n_rows, matrix.n_elements)
    n_tokens, code = x.numel() // matrix.n_elements, native.CODES[x.dtype]
    matrix.kernel(*matrix.arguments, x.data_ptr(), native.pointer(bias), n_tokens, code, out.data_ptr())
    return out


def output_like(x: torch.Tensor, n_out: int, n_in: int) -> torch.Tensor:
    """Memory for what [..., n_in] becomes, [..., n_out]: the quicker way where they are the same."""
    return torch.empty_like(x) if n_out == n_in else x.new_empty(*x.shape[:-1], n_out)
