"""The norm kernel against torch's operations, bit for bit; where torch sums otherwise it is not used."""

from __future__ import annotations

import pytest
import torch

from hf_flash import native, norms

LIB = native.library()
needs_order = pytest.mark.skipif(
    LIB is None or not LIB.hf_flash_norms() or not norms.agrees(64, True),
    reason="no AVX2, or torch sums otherwise here",
)


def draw(d: int, seed: int, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x, spread, weight, bias = torch.randn(4, d, generator=generator)
    x = x * torch.exp(spread * (seed % 4)) + seed % 5 / 3
    return x.bfloat16().view(1, 1, d), weight.bfloat16(), bias.bfloat16() if has_bias else None


@needs_order
@pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 256, 272, 512, 768, 1008, 1024, 2048, 2560, 4096, 5120, 8192, 16384])
def test_it_has_torchs_bits(d: int, has_bias: bool) -> None:
    assert norms.agrees(d, has_bias)
    for seed in range(60):
        x, weight, bias = draw(d, seed, has_bias)
        for eps in (1e-5, 1e-6):
            want = norms.reference(x, weight, bias, eps)
            assert torch.equal(norms.norm(x, weight, bias, eps), want), seed
            assert torch.equal(norms.scale_of(x, has_bias, eps), norms.scale_in_torch(x, has_bias, eps)), seed


@needs_order
@pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_all_alike_and_what_is_not_finite(has_bias: bool) -> None:
    for number in (0.0, -3.0, 1e-30, 3e38, float("inf"), float("nan")):
        for at in (slice(None), slice(5, 6), slice(63, 64)):
            x, weight, bias = draw(64, 1, has_bias)
            x[..., at] = number
            found, want = norms.norm(x, weight, bias, 1e-5), norms.reference(x, weight, bias, 1e-5)
            assert torch.equal(found.isnan(), want.isnan()), (number, at)
            assert torch.equal(found.nan_to_num(7), want.nan_to_num(7)), (number, at)


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = norms.scale_in_torch
    monkeypatch.setattr(norms, "scale_in_torch", lambda x, *how: true(x.flip(-1), *how))
    norms.agrees.cache_clear()
    try:
        assert not norms.agrees(2048, True) and not norms.agrees(2048, False)
    finally:
        norms.agrees.cache_clear()


def test_another_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = norms.reference
    monkeypatch.setattr(norms, "reference", lambda x, weight, *how: true(x, weight * 1.01, *how))
    norms.agrees.cache_clear()
    try:
        assert not norms.agrees(64, True) and not norms.agrees(64, False)
    finally:
        norms.agrees.cache_clear()


def test_what_is_no_whole_vector_is_refused() -> None:
    assert not norms.agrees(72, True)
