"""Weights in 12 bits that were bfloat16, without losing any: fewer bytes on flash, in DRAM, and through the memory bus.

A bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. The exponents of a weight matrix are nearly all among 15
neighbours: 4 bits say which, the other 8 bits stay as they are. Code 0 is exponent 0 (zero and what is smaller than any
weight that matters), code c is exponent base + c. The few weights outside (1 in 6,600 of a normal distribution) are
*escapes*: a short list in DRAM has their true values. Kernels compute on the packed rows, and what they multiply with
is the stored weight (in an escape's place stands a number below 2^-126 besides, which no sum of weights sees). Entropy
coding reaches 11 bits ("DFloat11", arXiv:2504.11651) at a price per weight that a CPU cannot pay for every token; 4
bits are one table look-up for 64 weights.

A row of E weights is E bytes (sign and mantissa), then E / 2 bytes of codes: of 64 weights, byte j has the code of
weight j in its lower half and that of weight j + 32 in its upper half.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from hf_flash import native, trace
from hf_flash.plan import IntArray

BLOCK = 64  # weights; what is packed has a multiple of it
N_CODES = 15  # exponents that have a code of their own
MAX_ESCAPES = 1 / 256  # share of weights above which packing does not pay


@dataclasses.dataclass(frozen=True)
class Packing:
    """How some rows are packed.

    Attributes:
        n_elements: E, weights of a row.
        base: exponent field of code 0, exclusive: code c is exponent base + c.
        start: [n + 1] int32, where each row's escapes begin.
        escapes: [m] int32, the bits of position << 16 | value.
    """

    n_elements: int
    base: int
    start: torch.Tensor
    escapes: torch.Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of a row without padding."""
        return packed_bytes(self.n_elements)

    @property
    def n_bytes(self) -> int:
        """DRAM that the list of escapes takes."""
        return self.start.nbytes + self.escapes.nbytes

    def rows(self, begin: int, end: int) -> Packing:
        """The packing of rows begin .. end alone; no copy."""
        return dataclasses.replace(self, start=self.start[begin : end + 1])


def can_pack(dtype: torch.dtype, *lengths: int) -> bool:
    """Whether rows made of parts of these lengths can be packed."""
    return dtype == torch.bfloat16 and all(n % BLOCK == 0 for n in lengths) and sum(lengths) <= 1 << 16


def packed_bytes(n_elements: int) -> int:
    """Bytes of a packed row, padding excluded."""
    return n_elements * 3 // 2


def count_exponents(values: torch.Tensor) -> torch.Tensor:
    """How many values have each exponent.

    Args:
        values: bfloat16, any shape.

    Returns:
        [256] int64.
    """
    lib, flat = native.library(), values.contiguous().view(torch.int16).view(-1)
    if lib is None:
        return torch.bincount((flat.to(torch.int32) >> 7) & 255, minlength=256)
    counts = torch.zeros(256, dtype=torch.int64)
    lib.hf_flash_exponents(flat.data_ptr(), flat.numel(), counts.data_ptr())
    return counts


def choose_base(counts: torch.Tensor) -> tuple[int, int]:
    """The base that leaves the fewest escapes, and how many these are.

    Args:
        counts: [256] from `count_exponents`.
    """
    windows = counts[1:].unfold(0, N_CODES, 1).sum(-1)  # of bases 0, 1, ...
    base = int(windows.argmax())
    return base, int(counts.sum() - counts[0] - windows[base])


def pack(values: torch.Tensor, base: int, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, Packing]:
    """Pack rows of bfloat16.

    Args:
        values: [n, E] bfloat16, E a multiple of 64.
        base: from `choose_base`.
        rows: [n, stride] uint8 to write to, stride >= 1.5 E; new memory without.

    Returns:
        The rows, and how they are packed.
    """
    n, size = values.shape
    values = values if values.stride(-1) == 1 else values.contiguous()
    if rows is None:
        rows = torch.zeros(n, packed_bytes(size), dtype=torch.uint8)
    start = torch.zeros(n + 1, dtype=torch.int32)
    lib = native.library()
    if lib is not None:
        args = (values.data_ptr(), values.stride(0), n, size, base, rows.data_ptr(), rows.stride(0), start.data_ptr())
        outside = lib.hf_flash_pack(*args, None)
        escapes = torch.empty(outside, dtype=torch.int32)
        if outside:
            lib.hf_flash_pack(*args, escapes.data_ptr())
        return rows, Packing(size, base, start, escapes)
    bits = values.view(torch.int16).to(torch.int32) & 0xFFFF
    exponent = (bits >> 7) & 255
    code = torch.where((exponent > base) & (exponent <= base + N_CODES), exponent - base, 0)
    rows[:, :size] = (((bits >> 8) & 0x80) | (bits & 0x7F)).to(torch.uint8)
    halves = code.view(n, size // BLOCK, 2, 32).to(torch.uint8)
    rows[:, size : packed_bytes(size)] = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(n, size // 2)
    row, at = ((code == 0) & (exponent != 0)).nonzero(as_tuple=True)
    start[1:] = torch.bincount(row, minlength=n).cumsum(0)
    return rows, Packing(size, base, start, (at << 16 | bits[row, at]).to(torch.int64).to(torch.int32))


def unpack(
    rows: torch.Tensor, packing: Packing, slots: torch.Tensor | None = None, ids: torch.Tensor | None = None,
    part: tuple[int, int] | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Rows as bfloat16 again.

    Args:
        rows: [n, stride] uint8.
        packing: of all rows.
        slots: [k] int64, which of `rows`; all of them without.
        ids: [k] int64, which rows of the packing these are; the first ones without.
        part: first weight and end, multiples of 64; all of a row without.
        out: [k, end - first] bfloat16 to write to.

    Returns:
        [k, end - first] bfloat16.
    """
    first, end = part or (0, packing.n_elements)
    n = rows.shape[0] if slots is None else len(slots)
    if out is None:
        out = torch.empty(n, end - first, dtype=torch.bfloat16, device="cpu")
    assert out.stride(1) == 1 and rows.stride(1) == 1 and len(packing.start) > (n if ids is None else 0)
    lib = native.library()
    if lib is not None:
        lib.hf_flash_unpack(
            rows.data_ptr(), rows.stride(0), native.pointer(slots), native.pointer(ids), n, packing.n_elements,
            packing.base, packing.start.data_ptr(), packing.escapes.data_ptr(), first, end, out.data_ptr(),
            out.stride(0),
        )  # fmt: skip
        return out
    chosen = rows if slots is None else rows[slots]
    size = packing.n_elements
    low = chosen[:, first:end].to(torch.int16)
    nibbles = chosen[:, size + first // 2 : size + end // 2].view(n, (end - first) // BLOCK, 1, 32)
    code = torch.cat([nibbles & 15, nibbles >> 4], dim=2).view(n, end - first).to(torch.int16)
    exponent = torch.where(code > 0, code + packing.base, 0)
    out.copy_((((low & 0x80) << 8) | (low & 0x7F) | exponent << 7).view(torch.bfloat16))
    row, at, value = _escapes_of(packing, np.arange(n) if ids is None else ids.numpy())
    inside = (at >= first) & (at < end)
    out.view(torch.int16)[row[inside], at[inside] - first] = value[inside]
    return out


def _escapes_of(packing: Packing, ids: IntArray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row (position in ids), position in it and bits of the escapes of some rows."""
    start = packing.start.numpy()
    counts = start[ids + 1] - start[ids]
    row = np.repeat(np.arange(len(ids)), counts)
    index = np.arange(len(row)) + np.repeat(start[ids] - (np.cumsum(counts) - counts), counts)
    bits = packing.escapes[torch.from_numpy(index)].to(torch.int64) & 0xFFFFFFFF
    return torch.from_numpy(row), bits >> 16, (bits & 0xFFFF).to(torch.int16)


def linear(
    x: torch.Tensor, rows: torch.Tensor, packing: Packing, bias: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """A few inputs times packed rows, summed in float32 and rounded once.

    Reference: `(x.float() @ unpack(rows, packing).float().t() + bias.float()).to(x.dtype)`.

    Args:
        x: [..., E], float32, float16 or bfloat16.
        rows: [n, stride] uint8, all rows of the packing.
        bias: [n], dtype of x.

    Returns:
        [..., n], dtype of x.
    """
    lib, x = native.library(), x.contiguous()
    if lib is None:
        y = x.float() @ unpack(rows, packing).float().t()
        return (y if bias is None else y + bias.float()).to(x.dtype)
    bias = None if bias is None else bias.contiguous()
    assert bias is None or bias.dtype == x.dtype
    out = x.new_empty(*x.shape[:-1], rows.shape[0])
    lib.hf_flash_packed_linear(
        rows.data_ptr(), rows.stride(0), rows.shape[0], packing.n_elements, packing.base, packing.start.data_ptr(),
        packing.escapes.data_ptr(), x.data_ptr(), native.pointer(bias), x.numel() // packing.n_elements,
        native.CODES[x.dtype], out.data_ptr(),
    )  # fmt: skip
    return out


def sparse_ffn(
    x: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, ids: torch.Tensor, packing: Packing, gated: bool,
    act: tuple[int, float], gate_bias: torch.Tensor | None = None, up_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """`native.sparse_ffn` over packed bundles; the native extension must be there.

    Args:
        x: [T, d_model], float32, float16 or bfloat16.
        rows: [n_slots, row_bytes] uint8.
        slots, ids: [n] int64, slot and neuron of each.
        packing: of the layer's bundles.
        gated: whether a bundle has a gate row.
        act: from `native.activation_code`.
        gate_bias, up_bias: [n] in the order of `slots`, or None.

    Returns:
        [T, d_out] float32 without the down bias, and how many neurons fired for any token.
    """
    lib = native.library()
    assert lib is not None and rows.dtype == torch.uint8 and rows.stride(1) == 1
    d_model = x.shape[1]
    x32 = x.float().contiguous()
    out = torch.zeros(x.shape[0], packing.n_elements - d_model * (2 if gated else 1), dtype=torch.float32, device="cpu")
    biases = [None if b is None else b.to(x.dtype).float().contiguous() for b in (gate_bias, up_bias)]
    begun = time.perf_counter()
    fired = lib.hf_flash_packed_ffn(
        x32.data_ptr(), x.shape[0], d_model, out.shape[1], rows.data_ptr(), rows.stride(0), slots.data_ptr(),
        ids.data_ptr(), len(slots), native.pointer(biases[0]), native.pointer(biases[1]), int(gated), packing.base,
        packing.start.data_ptr(), packing.escapes.data_ptr(), native.CODES[x.dtype], act[0], act[1], out.data_ptr(),
    )  # fmt: skip
    if trace.active is not None:
        trace.active.add(trace.ARITHMETIC, begun, time.perf_counter(), neurons=len(slots), native=True)
    return out, int(fired)
