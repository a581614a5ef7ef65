"""Matrices in some 11.2 bits a weight that were bfloat16, without losing any: for those that stay in DRAM.

As in packing.py sign and mantissa stay as they are, 8 bits, and a code says which exponent. Here it has 3 bits: codes 1
to 7 are the exponents base + 1 .. base + 7 of the row (base is the row's own), and code 0 says that the exponent is the
next byte of a list of escapes. Of normal weights one in 30 to 50 is an escape. So a row's bytes are not known before it
is packed, which bundles in slots and on flash have to be; for a matrix that stays it does not matter.

64 rows lie side by side, a stripe, for a register of a product has 16 outputs, and four are summed at once: kernels
decode 64 weights at a time, four columns of 16 rows, which are what two steps of the product take. That needs
AVX512-VBMI2 (Ice Lake, Zen 4 and newer); elsewhere such matrices are kept in 12 bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from hf_flash import native
from hf_flash.memory import Take, aligned_empty
from hf_flash.packing import BLOCK

STRIPE = 64  # rows that lie side by side
_N_CODES = 7  # exponents of a row that have a code of their own
_TILE = 16  # columns whose bytes lie together
_TILE_BYTES = STRIPE * _TILE * 11 // 8
_SLACK, _ESCAPE_SLACK = 8, 64  # kernels read whole registers


@dataclasses.dataclass(frozen=True)
class Tight:
    """A packed matrix.

    Attributes:
        tiles: [ceil(n / 64), E / 16, 1408] uint8, of 64 rows and 16 columns each: of every weight in the order of
            `_in_order` a byte, mantissa << 1 | sign, then 3 bits of code for each.
        n_rows: n; the last stripe is filled up with what is never looked at.
        base: [64 ceil(n / 64)] uint8, the exponent below that of code 1.
        start: [ceil(n / 64) + 1] int32, where each stripe's escapes begin.
        escapes: [m] uint8, exponents. Some bytes that belong to the matrix follow them, and the tiles, in memory.
    """

    tiles: torch.Tensor
    n_rows: int
    base: torch.Tensor
    start: torch.Tensor
    escapes: torch.Tensor

    @functools.cached_property
    def n_elements(self) -> int:
        """E, weights of a row."""
        return self.tiles.shape[1] * _TILE

    @property
    def n_bytes(self) -> int:
        """DRAM that all of it takes."""
        parts = (self.tiles, self.base, self.start, self.escapes)
        return sum(part.nbytes for part in parts) + _SLACK + _ESCAPE_SLACK

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...]:
        """What the native calls are told of it."""
        pointers = (self.base.data_ptr(), self.start.data_ptr(), self.escapes.data_ptr())
        return self.tiles.data_ptr(), self.n_rows, self.n_elements, *pointers

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


def tile_bytes(n: int, n_elements: int) -> int:
    """Bytes of memory for the tiles of n rows, with what kernels read beyond them."""
    return -(-n // STRIPE) * (n_elements // _TILE) * _TILE_BYTES + _SLACK


def as_tiles(memory: torch.Tensor, n_elements: int) -> torch.Tensor:
    """`tile_bytes` of memory as tiles."""
    return memory[:-_SLACK].view(-1, n_elements // _TILE, _TILE_BYTES)


def join(tiles: torch.Tensor, parts: list[Tight], take: Take = aligned_empty) -> Tight:
    """The matrix whose rows were packed to `tiles` part by part; `take` gives the memory for its escapes."""
    counts = [torch.zeros(1, dtype=torch.int32), *(part.start.diff() for part in parts)]
    start = torch.cat(counts).cumsum(0).to(torch.int32)
    base = torch.cat([part.base for part in parts])
    return Tight(
        tiles, sum(part.n_rows for part in parts), base, start, _joined([part.escapes for part in parts], take)
    )


def _joined(escapes: list[torch.Tensor], take: Take = aligned_empty) -> torch.Tensor:
    n = sum(map(len, escapes))
    return torch.cat(escapes, out=take(n + _ESCAPE_SLACK)[:n])  # not from the heap, where parts leave holes


def pack(values: torch.Tensor, tiles: torch.Tensor | None = None) -> Tight:
    """Pack rows of bfloat16.

    Args:
        values: [n, E] bfloat16, E a multiple of 64.
        tiles: what to write the stripes to, the first of `as_tiles` or of what is left of them; new memory without.
    """
    n, size = values.shape
    assert size % BLOCK == 0
    values = values if values.stride(-1) == 1 else values.contiguous()
    n_stripes = -(-n // STRIPE)
    tiles = as_tiles(aligned_empty(tile_bytes(n, size)), size) if tiles is None else tiles[:n_stripes]
    lib = native.library()
    if lib is not None:
        base, start = torch.empty(n_stripes * STRIPE, dtype=torch.uint8), torch.empty(n_stripes + 1, dtype=torch.int32)
        escapes = torch.empty(n_stripes * STRIPE * size + 1, dtype=torch.uint8)  # if every weight were one
        to = (tiles.data_ptr(), base.data_ptr(), start.data_ptr(), escapes.data_ptr())
        count = lib.hf_flash_tight_pack(values.data_ptr(), values.stride(0), n, size, *to)
        return Tight(tiles, n, base, start, _joined([escapes[:count]]))
    bits = torch.full((n_stripes * STRIPE, size), 1 << 7, dtype=torch.int32)  # of the rows that are missing: no escapes
    bits[:n] = values.view(torch.int16).to(torch.int32) & 0xFFFF
    exponent = (bits >> 7) & 255
    counts = torch.zeros(len(bits), 256, dtype=torch.int32).scatter_add_(1, exponent.long(), torch.ones_like(exponent))
    base = counts[:, 1:].unfold(1, _N_CODES, 1).sum(-1).argmax(-1).to(torch.uint8)
    code = exponent - base[:, None].int()
    code[(code < 1) | (code > _N_CODES)] = 0
    code, exponent = _in_order(code), _in_order(exponent)
    low = _in_order((bits & 0x7F) << 1 | bits >> 15)
    eight = (code.view(*code.shape[:2], -1, 8) << torch.arange(0, 24, 3, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    packed = torch.stack([eight & 255, eight >> 8 & 255, eight >> 16], -1).flatten(2)
    tiles.copy_(torch.cat([low, packed], -1).to(torch.uint8))
    escaped = code == 0
    start = torch.zeros(n_stripes + 1, dtype=torch.int32)
    start[1:] = escaped.sum((1, 2)).cumsum(0)
    return Tight(tiles, n, base, start, _joined([exponent[escaped].to(torch.uint8)]))


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """[64 s, E] -> [s, E / 16, 1024], as tiles have them.

    Four columns come first, of four rows after four: of these the first two columns, row by row, then the other two.
    """
    n_tiles = values.shape[1] // _TILE
    split = values.view(-1, STRIPE // 4, 4, n_tiles, _TILE // 4, 2, 2)  # stripe, rows, row, tile, columns, two, one
    return split.permute(0, 3, 4, 1, 5, 2, 6).reshape(-1, n_tiles, STRIPE * _TILE)


def _in_rows(values: torch.Tensor) -> torch.Tensor:
    """What _in_order was given."""
    n_tiles = values.shape[1]
    split = values.view(-1, n_tiles, _TILE // 4, STRIPE // 4, 2, 4, 2)
    return split.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, n_tiles * _TILE)


def unpack(
    matrix: Tight, rows: torch.Tensor | tuple[int, int] | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows as bfloat16 again.

    Args:
        matrix: where from.
        rows: [k] int64, which; or the first and the one behind the last; all without.
        out: [k, E] bfloat16 to write to.

    Returns:
        [k, E] bfloat16.
    """
    size = matrix.n_elements
    ids = rows if isinstance(rows, torch.Tensor) else None
    begin, end = rows if isinstance(rows, tuple) else (0, matrix.n_rows)
    n = end - begin if ids is None else len(ids)
    out = torch.empty(n, size, dtype=torch.bfloat16, device="cpu") if out is None else out
    if available():
        lib: Any = native.library()
        which = (native.pointer(ids), begin, n)
        lib.hf_flash_tight_unpack(*matrix.arguments, *which, out.data_ptr(), out.stride(0))
        return out
    n_low = STRIPE * _TILE
    three = matrix.tiles[..., n_low:].reshape(*matrix.tiles.shape[:2], n_low // 8, 3).to(torch.int32)
    eight = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    code = (eight[..., None] >> torch.arange(0, 24, 3, dtype=torch.int32) & _N_CODES).flatten(2)
    exponent = code + _in_order(matrix.base[:, None].int().expand(-1, size))
    exponent[code == 0] = matrix.escapes.int()
    low = matrix.tiles[..., :n_low].to(torch.int32)
    values = _in_rows((low & 1) << 15 | exponent << 7 | low >> 1).to(torch.int16).view(torch.bfloat16)
    out.copy_(values[begin:end] if ids is None else values[ids])
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
