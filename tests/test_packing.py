"""Packed rows are the stored weights, bit for bit, with the native kernels and without; products are those of torch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash import native, packing

WAYS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "_lib", None)
    return request.param


def weights(n: int, size: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    out = (torch.randn(n, size) * 0.02).bfloat16()
    bits = out.view(torch.int16)
    bits[0, :8] = torch.tensor(
        [0, -32768, 1, 0x7F80, 0x7FC1, -128, 0x3F80, 0x4B00], dtype=torch.int16
    )  # zeros, inf, NaN
    bits[n - 1, -1] = 0x0100
    return out


def test_rows_come_back_bit_for_bit(way: str) -> None:
    w = weights(33, 320)
    base, outside = packing.choose_base(packing.count_exponents(w))
    rows, how = packing.pack(w, base)
    assert rows.shape == (33, 480) and len(how.escapes) == outside > 0
    assert torch.equal(packing.unpack(rows, how).view(torch.int16), w.view(torch.int16))


def test_some_rows_and_parts(way: str) -> None:
    w = weights(20, 256)
    rows, how = packing.pack(w, packing.choose_base(packing.count_exponents(w))[0])
    slots, ids = torch.tensor([3, 0, 7]), torch.tensor([0, 19, 4])
    cache = torch.zeros(9, 512, dtype=torch.uint8)
    cache[slots, :384] = rows[ids]
    out = torch.zeros(3, 300, dtype=torch.bfloat16)
    packing.unpack(cache, how, slots, ids, (64, 192), out[:, 10:138])
    assert torch.equal(out[:, 10:138].view(torch.int16), w[ids, 64:192].view(torch.int16))
    assert not out[:, :10].any() and not out[:, 138:].any()
    some = packing.unpack(rows[5:9], how.rows(5, 9))
    assert torch.equal(some.view(torch.int16), w[5:9].view(torch.int16))


@pytest.mark.skipif(not native.available(), reason="not built")
def test_native_and_torch_pack_alike(monkeypatch) -> None:
    w = weights(17, 192, 3)
    base, _ = packing.choose_base(packing.count_exponents(w))
    ours = packing.pack(w, base)
    monkeypatch.setattr(native, "_lib", None)
    theirs = packing.pack(w, base)
    assert torch.equal(ours[0], theirs[0])
    for field in dataclasses.fields(packing.Packing):
        a, b = getattr(ours[1], field.name), getattr(theirs[1], field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_products_are_those_of_the_weights(way: str, n_tokens: int) -> None:
    w = weights(70, 576, 1)
    w.view(torch.int16)[0, 3:6] = 0x3C00  # no inf or NaN here
    w.view(torch.int16)[0, 7] = 0x4000  # an escape that counts
    rows, how = packing.pack(w, packing.choose_base(packing.count_exponents(w))[0])
    x = torch.randn(n_tokens, 576)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        x, bias = x.to(dtype), torch.randn(len(w)).to(dtype)
        for added in (None, bias):
            want = x.float() @ w.float().t() + (0 if added is None else added.float())
            got = packing.linear(x, rows, how, added)
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), want, atol=1e-4 + 0.1 * rtol, rtol=rtol)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=64, max_size=64), st.integers(0, 240))
def test_any_bits_and_any_base_come_back(values: list[int], base: int) -> None:
    w = torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64)
    rows, how = packing.pack(w, base)
    assert torch.equal(packing.unpack(rows, how).view(torch.int16), w.view(torch.int16))


def test_what_can_be_packed() -> None:
    assert packing.can_pack(torch.bfloat16, 64, 576)
    assert not packing.can_pack(torch.float16, 64) and not packing.can_pack(torch.bfloat16, 96)
    assert not packing.can_pack(torch.bfloat16, 1 << 16, 64)
