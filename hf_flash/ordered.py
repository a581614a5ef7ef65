"""One bfloat16 token times packed rows, to the bit what torch makes of the same matrix, at the speed of memory.

torch's library sums an output of a bfloat16 product as chains of 512 inputs where the CPU has AVX512-BF16, and the
kernels here do the same on the packed rows. No documentation promises that order, so nothing relies on it: `agrees`
compares the kernel with F.linear on each shape, on inputs whose large terms cancel, so that any other order shows in
every twentieth output. Where they differ, or the CPU is another, rows are unpacked and given to torch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from hf_flash import native
from hf_flash.ops import Activation
from hf_flash.packing import BLOCK, Packing, choose_base, count_exponents, pack
from hf_flash.tight import output_like

MULTIPLE = 8  # neurons of a chunk, but for the last one
_PROOF_BYTES = 16 << 20  # of weights that a comparison is made with; larger matrices are compared with fewer rows
_PROOFS = 2


def agrees(n: int, k: int) -> bool:
    """Whether the kernel and F.linear give the same bits for a matrix [n, k] on this machine, with these threads."""
    lib = native.library()
    if lib is None or not lib.hf_flash_ordered() or k % BLOCK or n < 1:
        return False
    return _compare(min(n, max(BLOCK, _PROOF_BYTES // (2 * k))), k, torch.get_num_threads())


@functools.cache
def _compare(n: int, k: int, n_threads: int) -> bool:
    """`n_threads` is a part of what was compared."""
    generator = torch.Generator().manual_seed(n_threads)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    half = k // 2
    with torch.device("cpu"), torch.no_grad():
        w = torch.empty(n, k, dtype=torch.bfloat16)
        for rows in w.split(BLOCK):
            rows[:, :half] = draw(len(rows), half) / 8
            rows[:, half:] = nearly_opposite(rows[:, : k - half].float(), generator)
        packed, packing = pack(w, choose_base(count_exponents(w))[0])
        bias = (draw(n) / 16).bfloat16()
        for proof in range(_PROOFS):
            x = draw(k).bfloat16()
            x[half:] = x[: k - half]
            added = bias if proof % 2 else None
            if not torch.equal(matvec(x, packed, packing, added), F.linear(x.view(1, k), w, added).view(n)):
                return False
    return True


def nearly_opposite(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """-x, a twentieth of it a little larger: how a sum of both was ordered shows. [...] float32 -> the same"""
    return -x * (1 + (torch.randn(x.shape, generator=generator, device="cpu") > 1.6) * 2.0**-7)


def matvec(x: torch.Tensor, rows: torch.Tensor, packing: Packing, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Packed rows times one token. Reference: `F.linear(x, unpack(rows, packing), bias)`, where `agrees`.

    Args:
        x: [..., E] bfloat16, of one token.
        rows: [n, stride] uint8, all rows of the packing.
        bias: [n] bfloat16.

    Returns:
        [..., n] bfloat16.
    """
    lib = native.library()
    assert lib is not None and x.dtype == torch.bfloat16 and x.is_contiguous() and x.numel() == packing.n_elements
    out = output_like(x, len(rows), packing.n_elements)
    lib.hf_flash_ordered_matvec(
        rows.data_ptr(), rows.stride(0), len(rows), packing.n_elements, packing.base, packing.start.data_ptr(),
        packing.escapes.data_ptr(), x.data_ptr(), native.pointer(bias), out.data_ptr(),
    )  # fmt: skip
    return out


_tables: list[torch.Tensor] = []  # one per activation, however many modules of it a model has


def table_of(act: Activation) -> torch.Tensor | None:
    """What an activation makes of every bfloat16, [65536] bfloat16 by their bits.

    None if it has parameters, which may change, or is not elementwise. Takes about a millisecond: ask once per layer.
    """
    if isinstance(act, torch.nn.Module) and next(act.parameters(), None) is not None:
        return None
    every = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
    with torch.no_grad():
        table = act(every)
        same = torch.equal(act(every.flip(0)).view(torch.int16), table.flip(0).view(torch.int16))
    if not same or table.dtype != torch.bfloat16:
        return None
    for known in _tables:
        if torch.equal(known.view(torch.int16), table.view(torch.int16)):
            return known
    _tables.append(table.contiguous())
    return _tables[-1]
