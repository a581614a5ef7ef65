"""The cache that grows in place against transformers' own, whatever is done to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, generate_kwargs
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import hf_flash
from hf_flash import kv, memory

HEADS, SIZE = 2, 4


def rows(batch: int, n: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, HEADS, n, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def growing(n_reserved: int = 0) -> kv.GrowingLayer:
    layer = kv.GrowingLayer()
    layer.n_reserved = n_reserved
    return layer


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 5)),
        st.tuples(st.just("crop"), st.integers(1, 4)),
        st.tuples(st.just("reorder"), st.integers(0, 3)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 3)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=14,
)


@given(STEPS, st.sampled_from([0, 4, 64]))
def test_it_holds_what_the_stock_layer_holds(steps: list[tuple[str, int]], n_reserved: int) -> None:
    ours, stock = growing(n_reserved), DynamicLayer()
    earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, (what, n) in enumerate(steps):
        held = stock.get_seq_length()
        batch = stock.keys.shape[0] if held else 2
        if what == "update":
            new = rows(batch, n, 2 * i), rows(batch, n, 2 * i + 1)
            for a, b in zip(ours.update(*new), stock.update(*new), strict=True):
                assert torch.equal(a, b)
        elif what == "copy":
            earlier.append((ours.keys.clone(), ours.keys) if held else (torch.empty(0), torch.empty(0)))
            ours, stock = copy.deepcopy(ours), copy.deepcopy(stock)
        elif what == "reset":
            ours.reset(), stock.reset()
        elif held:
            for layer in (ours, stock):
                if what == "crop":
                    layer.crop(-min(n, held - 1))
                elif what == "reorder":
                    layer.reorder_cache(torch.arange(batch).flip(0) if n % 2 else torch.full((batch,), n % batch))
                elif what == "repeat":
                    layer.batch_repeat_interleave(n if batch < 8 else 1)
                else:
                    layer.batch_select_indices(torch.arange(batch)[n % batch :])
        assert ours.get_seq_length() == stock.get_seq_length()
        if stock.get_seq_length():
            assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
    assert all(torch.equal(was, now) for was, now in earlier), "a copy was written to by its original's successor"


def test_tokens_are_written_where_they_stay() -> None:
    layer = growing(64)
    layer.update(rows(1, 10, 0), rows(1, 10, 1))
    where = layer.keys.data_ptr(), layer.values.data_ptr()
    for i in range(50):
        layer.update(rows(1, 1, i), rows(1, 1, i))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == where
    layer.update(rows(1, 9, 0), rows(1, 9, 1))  # past what was reserved
    assert layer.keys.data_ptr() != where[0] and layer.keys.shape == (1, HEADS, 69, SIZE)
    grown = layer.keys.data_ptr()
    layer.update(rows(1, 20, 0), rows(1, 20, 1))
    assert layer.keys.data_ptr() == grown, "twice the room, so that it is copied seldom"


def test_beams_are_reordered_where_they_lie() -> None:
    layer, stock = growing(256), DynamicLayer()
    for one in (layer, stock):
        one.update(rows(3, 9, 0), rows(3, 9, 1))
        one.update(rows(3, 1, 2), rows(3, 1, 3))
    before = layer.keys.data_ptr(), layer.values.data_ptr()
    for order in ([2, 0, 0], [1, 1, 2]):
        for one in (layer, stock):
            one.reorder_cache(torch.tensor(order))
            one.update(rows(3, 1, 4), rows(3, 1, 5))
        assert torch.equal(layer.keys, stock.keys) and torch.equal(layer.values, stock.values)
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == before
    for one in (layer, stock):
        one.reorder_cache(torch.tensor([1, 0]))  # fewer of them
        one.update(rows(2, 1, 6), rows(2, 1, 7))
    assert torch.equal(layer.keys, stock.keys) and torch.equal(layer.values, stock.values)


def test_what_is_reserved_takes_no_memory_before_it_is_written() -> None:
    if not memory_in_use():
        pytest.skip("no /proc/self/statm")
    before = memory_in_use()
    layer = growing(1 << 21)
    layer.update(rows(1, 10, 0), rows(1, 10, 1))  # 128 MiB of addresses
    assert layer.keys.stride(1) == (1 << 21) * SIZE
    assert memory_in_use() - before < 4 << 20


def memory_in_use() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def test_another_dtype_and_gradients_are_concatenated_as_ever() -> None:
    layer = growing(64)
    layer.update(rows(1, 3, 0, torch.bfloat16), rows(1, 3, 1, torch.bfloat16))
    keys, _ = layer.update(rows(1, 1, 2), rows(1, 1, 3))
    assert keys.dtype == torch.float32 and keys.shape[2] == 4
    layer = growing(64)
    new = rows(1, 3, 0).requires_grad_(), rows(1, 3, 1).requires_grad_()
    layer.update(*new)
    keys, values = layer.update(rows(1, 1, 2), rows(1, 1, 3))
    (keys.sum() + values.sum()).backward()
    assert torch.equal(new[0].grad, torch.ones_like(new[0]))


def test_only_what_is_stock_is_exchanged() -> None:
    cache = DynamicCache()
    cache.update(rows(1, 3, 0), rows(1, 3, 1), 0)
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    kv._adopt(cache, 64)
    assert [type(layer) for layer in cache.layers] == [kv.GrowingLayer, DynamicSlidingWindowLayer]
    assert torch.equal(cache.layers[0].keys, rows(1, 3, 0))


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
def test_models_generate_the_same_with_it(name: str, how: dict[str, Any], tmp_path: Any) -> None:
    if "prompt_lookup_num_tokens" in how and name in ("t5", "bart"):
        pytest.skip("not with two halves")
    dense, model = TINY[name](), TINY[name]()
    inputs = {**generate_kwargs(dense, batch=1 if "prompt_lookup_num_tokens" in how else 2), **how}
    want = dense.generate(**inputs, return_dict_in_generate=True)
    hf_flash.patch(model, memory="1GiB", gate="all", cache_dir=str(tmp_path))
    found = model.generate(**inputs, return_dict_in_generate=True)
    assert torch.equal(found.sequences, want.sequences)
    (cache,) = kv.carried(found).values()
    cache = getattr(cache, "self_attention_cache", cache)
    assert all(type(layer) is kv.GrowingLayer for layer in cache.layers)


def test_untouched_memory_is_zero_and_writable() -> None:
    tensor = memory.untouched(10_000)
    assert tensor.dtype == torch.uint8 and not tensor.any()
    tensor.fill_(3)
    assert int(tensor.sum()) == 30_000
