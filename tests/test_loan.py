"""What the KV cache does not fill yet holds neurons: as much as there is, and never more."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

import hf_flash
from hf_flash import attach, kv, loan
from hf_flash.engine import WorkBuffers
from hf_flash.ffn import FlashFFN
from hf_flash.loan import Loan
from hf_flash.memory import HUGE_BYTES, round_up
from hf_flash.sparse import SparseEngine

ROW = 6144


@dataclasses.dataclass
class Lender:
    """Stands for a Balance."""

    n_own: int
    row_bytes: int = ROW
    n_lent: int = 0
    changes: int = 0

    def lend(self, n: int) -> None:
        self.n_lent, self.changes = n, self.changes + 1


@given(st.lists(st.one_of(st.none(), st.integers(0, 250 << 20)), min_size=1, max_size=20), st.integers(0, 50_000))
def test_no_more_is_lent_than_is_not_filled(filled: list[int | None], n_own: int) -> None:
    planned, balances = 200 << 20, [Lender(n_own), Lender(n_own // 2, 2 * ROW)]
    lending = Loan(balances, planned, 200_000)  # type: ignore[arg-type]
    for n in filled:
        lending.told(n)
        lent = sum(b.n_lent * b.row_bytes for b in balances)
        spare = 0 if n is None else max(0, planned - n)
        assert lent <= spare and all(b.n_lent >= 0 for b in balances)
        if n is None:
            assert lent == 0
        assert lent >= spare - 32 * 200_000 - 2 * (loan.LEAST_BYTES + HUGE_BYTES + 2 * ROW)


@dataclasses.dataclass
class Chunks:
    """Stands for a Stream."""

    most_lent: int
    buffer_bytes: int = (4 << 20) - 4096
    n_lent: int = 0

    def lend(self, n: int) -> None:
        self.n_lent = n

    def bytes(self) -> int:
        return round_up(self.n_lent * self.buffer_bytes, HUGE_BYTES)


@given(st.lists(st.one_of(st.none(), st.integers(0, 250 << 20)), min_size=1, max_size=20), st.integers(0, 60))
def test_the_stream_has_it_first(filled: list[int | None], most_lent: int) -> None:
    planned, token = 200 << 20, 200_000
    lender, seen = Lender(10_000), []
    chunks = Chunks(most_lent)
    true_lend, true_more = Lender.lend, Chunks.lend

    def lend(self: Lender, n: int) -> None:
        true_lend(self, n)
        seen.append(n * self.row_bytes + chunks.bytes())

    def more(self: Chunks, n: int) -> None:
        true_more(self, n)
        seen.append(lender.n_lent * lender.row_bytes + self.bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lender, "lend", lend)
        patch.setattr(Chunks, "lend", more)
        lending = Loan([lender], planned, token, chunks)  # type: ignore[list-item, arg-type]
        before = 0
        for n in filled:
            seen.clear()
            lending.told(n)
            spare = 0 if n is None else max(0, planned - n)
            together = lender.n_lent * lender.row_bytes + chunks.bytes()
            assert together <= spare and chunks.n_lent <= most_lent
            assert max(seen, default=0) <= max(before, spare), "for a moment more was lent than there was"
            room = (spare - 32 * token - loan.LEAST_BYTES - HUGE_BYTES) // chunks.buffer_bytes
            assert chunks.n_lent >= min(most_lent, room) - 1
            before = together


def test_a_token_seldom_changes_anything() -> None:
    lender, token = Lender(10_000), 200_000
    lending = Loan([lender], 1000 * token, token)  # type: ignore[list-item]
    for n in range(1000):
        lending.told(n * token)
    assert lender.changes < 50 and lender.n_lent == 0


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shipped model's KV cache is far smaller than a huge page."""
    monkeypatch.setattr(loan, "LEAST_BYTES", 1)
    monkeypatch.setattr(loan, "HUGE_BYTES", 1)
    monkeypatch.setattr(loan, "AHEAD_TOKENS", 2)
    yield


@pytest.fixture
def kv_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model's activations are larger than what its layers do not have."""
    monkeypatch.setattr(attach, "_activations", lambda *of: lambda n_tokens: 0)
    monkeypatch.setattr(attach, "_sparable", lambda *of: 0)


def opened(flash_folder: Path, cap: int, **options: Any) -> Any:
    config = hf_flash.FlashConfig(memory=cap, context=256, gate="certified", **options)
    return AutoModelForCausalLM.from_pretrained(flash_folder, quantization_config=config)


def lent(model: Any) -> int:
    return sum(balance.n_lent * balance.row_bytes for balance in model._hf_flash.balances)


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What loans are told from now on, and bytes that are lent then."""
    seen: list[tuple[int, int]] = []
    true = Loan.told

    def told(self: Loan, filled: int | None) -> None:
        true(self, filled)
        assert filled is not None
        seen.append((filled, sum(balance.n_lent * balance.row_bytes for balance in self._balances)))

    monkeypatch.setattr(Loan, "told", told)
    return seen


def test_it_is_lent_and_taken_back_as_tokens_come(
    flash_folder: Path, dense: PreTrainedModel, cap_for: Callable[[str, str], int], small_steps: None,
    kv_alone: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = record(monkeypatch)
    model = opened(flash_folder, cap_for("certified", "half"))
    planned = model._hf_flash.plan.parts["KV cache"]
    ids = torch.arange(5, 12)[None]
    want = dense.generate(ids, max_new_tokens=150, min_new_tokens=150, do_sample=False)
    for _ in range(2):
        seen.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=150, min_new_tokens=150, do_sample=False), want)
        assert all(n_lent <= max(0, planned - filled) for filled, n_lent in seen)
        assert seen[0][1] > planned // 2 and seen[0][1] > seen[70][1] > seen[-1][1]
        assert [n for n, _ in seen[1:]] == sorted(n for n, _ in seen[1:])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled_cache(model, ids).layers)
    assert seen[-1][0] >= held, "more is filled than was told"


def test_what_is_streamed_stays_until_tokens_come(
    flash_folder: Path, dense: PreTrainedModel, cap_for: Callable[[str, str], int], small_steps: None,
    kv_alone: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Gate `all`: fewer bytes a token than planned while the context is short, and never wrong ones."""
    config = hf_flash.FlashConfig(memory=cap_for("all", "half"), context=256, gate="all")
    lent: list[tuple[int, int, int]] = []
    true = Loan.told

    def told(self: Loan, filled: int | None) -> None:
        true(self, filled)
        assert self._stream is not None and filled is not None
        lent.append((filled, self._stream.n_lent * self._stream.buffer_bytes, stats.bytes_read))

    monkeypatch.setattr(Loan, "told", told)
    model = AutoModelForCausalLM.from_pretrained(flash_folder, quantization_config=config)
    plan, stats = model._hf_flash.plan, hf_flash.stats(model)
    ids = torch.arange(5, 12)[None]
    want = dense.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)
    for _ in range(2):
        lent.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False), want)
        assert all(n <= max(0, plan.parts["KV cache"] - filled) for filled, n, _ in lent)
        assert lent[5][1] > plan.parts["KV cache"] // 2 and lent[-1][1] < lent[5][1]
        early, late = (lent[i + 20][2] - lent[i][2] for i in (10, 178))
        assert early < late and early < 20 * plan.bytes_per_token - 10 * lent[30][1]


def named(cache: Any) -> dict[str, Any]:
    """A cache as an argument that this transformers has."""
    return {"cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values": cache}


def cache_from(output: Any) -> Any:
    """The cache that a model gave back."""
    return next(iter(kv.carried(output).values()))


def filled_cache(model: Any, ids: torch.Tensor) -> Any:
    out = model.generate(ids, max_new_tokens=150, min_new_tokens=150, do_sample=False, return_dict_in_generate=True)
    return cache_from(out)


@pytest.mark.lends
def test_a_long_pass_has_its_activations_back(
    flash_folder: Path, dense: PreTrainedModel, cap_for: Callable[[str, str], int], small_steps: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = record(monkeypatch)
    model = opened(flash_folder, cap_for("certified", "least"))
    plan = model._hf_flash.plan
    ids = torch.randint(5, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    want = dense.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    for _ in range(2):
        seen.clear()
        assert torch.equal(model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False), want)
        first, *others = [n_lent for _, n_lent in seen]
        assert first <= plan.parts["KV cache"] + plan.parts["activations"] * 56 // 256
        assert min(others) > first and min(others) > plan.parts["KV cache"]


@pytest.mark.lends
def test_no_more_is_lent_than_there_is_room_for(
    flash_folder: Path, dense: PreTrainedModel, cap_for: Callable[[str, str], int], small_steps: None
) -> None:
    model = opened(flash_folder, cap_for("certified", "half"))
    ids = torch.arange(5, 12)[None]
    want = dense.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False), want)
    for balance in model._hf_flash.balances:
        caches = [engine.cache for engine in balance._engines]
        assert balance.n_lent > 0 and all(cache.n_slots <= cache.layer.n_neurons for cache in caches)
        assert max(int(cache._owned[: cache.n_slots].max()) for cache in caches) < len(balance._slots.rows)
        lent_bytes, parts = balance.n_lent * balance.row_bytes, model._hf_flash.plan.parts
        assert lent_bytes < parts["KV cache"] + parts["activations"] - (1 << 20), (
            "more could be lent than there is room for"
        )


def test_every_cache_that_lives_counts(
    flash_folder: Path, cap_for: Callable[[str, str], int], small_steps: None, kv_alone: None
) -> None:
    model = opened(flash_folder, cap_for("certified", "half"))
    ids = torch.arange(5, 65)[None]
    with torch.no_grad():
        model(ids[:, :2], **named(DynamicCache()))
        free = lent(model)
        held = [cache_from(model(ids)) for _ in range(3)]  # made by the model itself
        model(ids[:, :2], **named(DynamicCache()))
        three = lent(model)
        assert free - three >= 3 * sum(layer.keys.nbytes + layer.values.nbytes for layer in held[0].layers)
        del held
        model(ids[:, :2], **named(DynamicCache()))
        assert lent(model) > three
        static = StaticCache(model.config, max_cache_len=64)
        model(ids, **named(static))
        model(ids[:, :2], **named(DynamicCache()))
        assert lent(model) == 0, "what a cache of another kind takes is not known"
        del static
        model(ids[:, :2], **named(DynamicCache()))
        assert lent(model) == free
        model(ids[:, :2], None, DynamicCache())  # somewhere among the arguments: the part that it is given to says it
        assert lent(model) == free
        cache = DynamicCache()
        model.base_model(ids[:, :2], **named(cache))  # without the model around it
        assert lent(model) == free
        model.base_model(torch.arange(5, 205)[None], **named(cache))
        held_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert free - lent(model) >= held_bytes * 2 // 3, "a page was counted ahead, not more"


@pytest.mark.parametrize("name", kv.CACHE_NAMES)
def test_what_another_thread_is_about_to_fill_counts(name: str) -> None:
    told: list[int | None] = []
    tokens: list[int] = []

    def tell(filled: int | None, n_tokens: int) -> None:
        told.append(filled)
        tokens.append(n_tokens)

    watch = kv.Watch(1000, 256, tell)
    long, short = DynamicCache(), DynamicCache()

    def begin(n: int, cache: Any) -> None:
        watch.begins(torch.nn.Identity(), (), {"input_ids": torch.zeros(1, n), name: cache})

    begin(1, short)
    alone = told[-1]
    other = threading.Thread(target=begin, args=(900, long))
    other.start()
    other.join()
    begin(1, short)  # the other pass has not written a token yet
    assert alone is not None and told[-1] is not None and told[-1] >= alone + 900 * 256
    assert tokens == [1, 900 + 1, 900 + 1]
    del long  # its thread gave up
    begin(1, short)
    assert told[-1] == alone


def test_a_copied_cache_has_its_tokens_and_no_room() -> None:
    layer = kv.GrowingLayer()
    layer.n_reserved = 1 << 16
    layer.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))
    twin = copy.deepcopy(layer)
    assert twin.keys.untyped_storage().nbytes() == twin.keys.nbytes and torch.equal(twin.keys, layer.keys)
    twin.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    assert layer.keys.shape[2] == 3 and layer.keys.all() and twin.keys.shape[2] == 4


def test_scratch_is_spared_until_a_pass_of_few_tokens_needs_it() -> None:
    """It is given back before such a pass, and lent; one that needed it all the same would exceed the cap again."""
    work = WorkBuffers()
    assert not work.can_spare(few=False)
    before = work.get("sweep0", (3, 8192), torch.uint8)
    assert work.can_spare(few=True) and work.can_spare(few=True)
    assert work.get("sweep0", (3, 8192), torch.uint8).data_ptr() != before.data_ptr(), "what was there is gone"
    assert not work.can_spare(few=False), "a prompt has its own"
    work.get("sweep0", (3, 8192), torch.uint8)
    assert not work.can_spare(few=True), "a pass of few tokens needed some"
    assert not work.can_spare(few=False) and not work.can_spare(few=True)


def test_scratch_that_only_prompts_used_is_spared_again() -> None:
    work = WorkBuffers()
    for _ in range(3):
        assert not work.can_spare(few=False)
        work.get("up", (5, 4096), torch.uint8)
        assert work.can_spare(few=True) and work.can_spare(few=True)


@pytest.mark.lends
def test_what_prompts_have_for_batches_holds_neurons_between_them(
    flash_folder: Path, dense: PreTrainedModel, cap_for: Callable[[str, str], int], small_steps: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Taken back before a prompt computes, lent again before its second token, and nothing holds what is lent."""
    monkeypatch.setattr(attach, "_lendable", lambda plan: plan.parts["KV cache"])
    monkeypatch.setattr(attach, "_activations", lambda *of: lambda n_tokens: 0)
    model = opened(flash_folder, cap_for("certified", "half"))
    engines = [module.engine for module in model.modules() if isinstance(module, FlashFFN)]
    if not all(isinstance(engine, SparseEngine) and engine.steps for engine in engines):
        pytest.skip("io_uring cannot be had here")
    plan, work, seen = model._hf_flash.plan, engines[0]._work, []
    true = Loan.told

    def told(self: Loan, filled: int | None) -> None:
        true(self, filled)
        assert filled is not None
        spared = plan.parts["KV cache"] + plan.parts["batches"] - filled
        assert lent(model) <= max(0, spared)
        seen.append((filled, sum(buffer.nbytes for buffer in work._buffers.values()), work._spared))

    monkeypatch.setattr(Loan, "told", told)
    ids = torch.arange(5, 65)[None]
    for _ in range(2):
        seen.clear()
        got = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert torch.equal(got, dense.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False))
        (first, _, spares), *others = seen
        assert not spares and first >= plan.parts["batches"]
        for filled, held, spares in others:
            assert held == 0 if spares else filled >= plan.parts["batches"], "what is lent is not held"
