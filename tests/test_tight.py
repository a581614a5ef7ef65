"""Matrices in some 11.2 bits: every bit comes back, and kernels compute what torch does from the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash import native, ordered, tight

needs_kernels = pytest.mark.skipif(not tight.available(), reason="not built, or no AVX512-VBMI2")


def weights(n: int, k: int, rare: float = 0.03, seed: int = 0) -> torch.Tensor:
    """[n, k] bfloat16 of which a share has other exponents; rows of many scales."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.exp2(torch.arange(n) % 9 - 8.0)[:, None]
    return torch.where(torch.rand(n, k, generator=generator) < rare, w * 2.0**-40, w).bfloat16()


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


@pytest.fixture(params=["torch", "native"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "_lib", None)


@pytest.mark.parametrize("rare", [0.0, 0.03, 0.9, 1.0])
def test_every_weight_comes_back(way: None, rare: float) -> None:
    w = weights(137, 192, rare)
    w[3] = 0
    w[4, :6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40])
    matrix = tight.pack(w)
    assert torch.equal(bits(tight.unpack(matrix)), bits(w))
    for begin, end in ((5, 21), (64, 128), (20, 137), (7, 8)):
        assert torch.equal(bits(tight.unpack(matrix, (begin, end))), bits(w[begin:end]))
    ids = torch.tensor([136, 0, 4, 4, 77, 63, 64])
    assert torch.equal(bits(tight.unpack(matrix, ids)), bits(w[ids]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=64, max_size=64), st.integers(1, 3))
def test_any_bits_come_back_from_both_ways(values: list[int], n: int) -> None:
    w = torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).repeat(n, 2)
    matrix = tight.pack(w)
    assert torch.equal(bits(tight.unpack(matrix)), bits(w))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_lib", None)
        again = tight.pack(w)
        assert torch.equal(bits(tight.unpack(matrix)), bits(w))
    for name in ("tiles", "base", "start", "escapes"):
        assert torch.equal(getattr(matrix, name), getattr(again, name)), name


def test_bits_of_normal_weights(way: None) -> None:
    matrix = tight.pack(weights(64, 2048, rare=0.0))
    assert 11 < 8 * matrix.n_bytes / (64 * 2048) < 11.4


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_linear_is_torchs_in_another_order(n_tokens: int, dtype: torch.dtype) -> None:
    for n, k in ((1, 64), (70, 448), (131, 1600)):
        w, x, bias = weights(n, k, seed=n), torch.randn(n_tokens, k).to(dtype), torch.randn(n).to(dtype)
        matrix = tight.pack(w)
        for added in (None, bias):
            want = F.linear(x.double(), w.double(), None if added is None else added.double())
            got = tight.linear(x, matrix, added)
            tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
            scale = (x.double().abs() @ w.double().abs().t()).clamp_min(1.0)
            assert got.dtype == dtype
            assert ((got.double() - want).abs() <= tolerance * scale).all()


@needs_kernels
@pytest.mark.parametrize("n", [16, 33, 100, 257])
@pytest.mark.parametrize("k", [448, 512, 576, 1600])
def test_matvec_has_torchs_bits(n: int, k: int) -> None:
    if not ordered.agrees(n, k):
        pytest.skip(f"torch sums [{n}, {k}] in another order here")
    w, x, bias = weights(n, k, seed=n * k), torch.randn(k).bfloat16(), torch.randn(n).bfloat16()
    matrix = tight.pack(w)
    assert torch.equal(tight.linear(x, matrix), F.linear(x.view(1, k), w)[0])
    assert torch.equal(tight.linear(x, matrix, bias), F.linear(x.view(1, k), w, bias)[0])
