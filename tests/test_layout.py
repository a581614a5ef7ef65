"""Bundles hold what was packed into them, bit for bit; sizes are read as people write them."""

import math

import hypothesis.strategies as st
import pytest
import torch
from helpers_flash import random_bytes
from hypothesis import given, settings

from hf_flash.errors import FlashConfigError
from hf_flash.layout import ROW_ALIGN, BundleLayout, format_size, parse_size
from hf_flash.memory import round_up

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def noise(n: int, d: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[n, d] of any bits at all, NaNs among them."""
    return random_bytes((n, d * dtype.itemsize), seed).view(dtype)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 700), st.integers(1, 700), st.booleans(), DTYPES)
def test_split_gives_back_what_pack_was_given(
    n: int, d_model: int, d_out: int, gated: bool, dtype: torch.dtype
) -> None:
    layout = BundleLayout(d_model, d_out, gated, dtype)
    up, down = noise(n, d_model, dtype, 1), noise(n, d_out, dtype, 2)
    gate = noise(n, d_model, dtype, 3) if gated else None
    rows = layout.pack(up, down, gate)
    assert rows.shape == (n, layout.row_bytes)
    assert rows.dtype == torch.uint8
    assert layout.row_bytes % ROW_ALIGN == 0
    assert 0 <= layout.row_bytes - layout.n_elements * dtype.itemsize < ROW_ALIGN
    for got, want in zip(layout.split(rows), (gate, up, down), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert torch.equal(got.contiguous().view(torch.uint8), want.view(torch.uint8))
            assert got.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr(), "split copies"
    assert not rows[:, layout.n_elements * dtype.itemsize :].any(), "padding is zero, so that checksums repeat"


def test_the_order_is_gate_up_down() -> None:
    layout = BundleLayout(2, 3, True, torch.float32)
    rows = layout.pack(torch.full((1, 2), 2.0), torch.full((1, 3), 3.0), torch.full((1, 2), 1.0))
    assert rows.view(torch.float32)[0, :8].tolist() == [1, 1, 2, 2, 3, 3, 3, 0]


def test_pack_takes_a_transposed_view_and_another_dtype() -> None:
    down = torch.arange(6.0).view(3, 2)
    rows = BundleLayout(1, 3, False, torch.bfloat16).pack(torch.ones(2, 1), down.t())
    assert BundleLayout(1, 3, False, torch.bfloat16).split(rows)[2].tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    "text,n_bytes",
    [
        ("4GiB", 4 << 30), ("4 gib", 4 << 30), (" 512MiB ", 512 << 20), ("1.5GB", 1_500_000_000), ("2k", 2000),
        ("1KiB", 1024), ("0.5TiB", 1 << 39), ("4096", 4096), ("100b", 100), ("1.5e9", 1_500_000_000),
        (4096, 4096), (1.5e9, 1_500_000_000), (".5M", 500_000),
    ],
)  # fmt: skip
def test_sizes_people_write(text: int | float | str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4 giraffes", "-1GiB", "4Gi B", "1,5GB", "nan", "inf", "0", 0, -5, 0.4, math.nan, math.inf, "1e999",
     True, None, "4ib", "1.2.3"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(FlashConfigError, match="4GiB"):
        parse_size(text)


@given(st.integers(1, 1 << 52))
def test_a_printed_size_reads_back_as_nearly_itself(n: int) -> None:
    text = format_size(n)
    assert parse_size(text) == pytest.approx(n, rel=0.06 if n >= 1024 else 0)
    assert parse_size(n) == parse_size(str(n)) == parse_size(f"{n}B") == n


def test_round_up() -> None:
    assert [round_up(n, 512) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
