"""The ordered kernels against torch itself, bit for bit; where torch sums otherwise they must say so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_flash import native, ordered
from hf_flash.packing import choose_base, count_exponents, pack

LIB = native.library()
HERE = LIB is not None and bool(LIB.hf_flash_ordered()) and ordered.agrees(256, 512)
needs_order = pytest.mark.skipif(not HERE, reason="no AVX512-BF16, or torch sums in another order here")


def with_escapes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) / 8
    return torch.where(torch.rand(shape, generator=generator) < 2e-3, w * 2.0**-30, w).bfloat16()


def packed(w: torch.Tensor):  # type: ignore[no-untyped-def]
    return pack(w, choose_base(count_exponents(w))[0])


@needs_order
@pytest.mark.parametrize("n", [16, 33, 100, 257])
@pytest.mark.parametrize("k", [448, 512, 576, 1600])
def test_matvec_has_torchs_bits(n: int, k: int) -> None:
    w, x, bias = with_escapes(n, k, seed=n * k), with_escapes(k, seed=1), with_escapes(n, seed=2)
    if not ordered.agrees(n, k):
        pytest.skip(f"torch sums [{n}, {k}] in another order here")
    rows, packing = packed(w)
    assert torch.equal(ordered.matvec(x, rows, packing), F.linear(x.view(1, k), w)[0])
    assert torch.equal(ordered.matvec(x, rows, packing, bias), F.linear(x.view(1, k), w, bias)[0])


@needs_order
def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = F.linear

    def otherwise(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        flipped = true(x.flip(-1).float(), w.flip(-1).float(), None if bias is None else bias.float())
        return flipped.to(x.dtype)

    monkeypatch.setattr(ordered.F, "linear", otherwise)
    ordered._compare.cache_clear()
    try:
        assert not ordered.agrees(256, 1024)
    finally:
        ordered._compare.cache_clear()


def test_what_cannot_be_ordered_is_refused() -> None:
    assert not ordered.agrees(16, 100)  # no whole blocks
    assert not ordered.agrees(0, 64)


def test_table_of_an_activation() -> None:
    table = ordered.table_of(F.silu)
    assert table is not None
    x = torch.linspace(-20, 20, 4099).bfloat16()
    assert torch.equal(table[x.view(torch.int16).int() & 0xFFFF], F.silu(x))
    assert ordered.table_of(nn.SiLU()) is table, "one table for all layers"
    assert ordered.table_of(nn.PReLU()) is None  # its parameter may change
    assert ordered.table_of(lambda t: t.cumsum(0)) is None  # not elementwise
