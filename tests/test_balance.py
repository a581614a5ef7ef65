"""Slots change layers: never one in two layers, never a stale row, and each layer's are the most valuable of all."""

import threading
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers_flash import FakeReader, random_bytes, write_layers
from hypothesis import given, settings
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_flash
from hf_flash.balance import EVERY_PASSES, FIRST_PASSES, Balance, divide
from hf_flash.cache import NeuronCache
from hf_flash.engine import WorkBuffers
from hf_flash.ffn import FlashFFN
from hf_flash.gates import CertifiedGate, Sketch
from hf_flash.layout import BundleLayout
from hf_flash.sparse import SparseEngine
from hf_flash.stats import FlashStats
from hf_flash.store import FlashStore

N, N_LAYERS = 30, 3
LAYOUT = BundleLayout(100, 60, True, torch.float16)
ROWS = {f"ffn{i}": random_bytes((N, LAYOUT.row_bytes), seed=i) for i in range(N_LAYERS)}
NEVER = -1e300


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_slots_go_to_the_most_valuable_neurons(data: st.DataObject, n_layers: int) -> None:
    sizes = [data.draw(st.integers(1, 9)) for _ in range(n_layers)]
    numbers = iter(data.draw(st.permutations(range(sum(sizes)))))  # no two alike, so that the answer is one
    worth = [np.array([data.draw(st.sampled_from([NEVER, next(numbers)])) for _ in range(n)], float) for n in sizes]
    least = np.array([data.draw(st.integers(0, n)) for n in sizes])
    n_slots = data.draw(st.integers(int(least.sum()), sum(sizes)))
    got = divide(worth, least, n_slots)
    assert got.sum() == n_slots and (got >= least).all() and (got <= sizes).all()
    best = {(layer, i) for layer in range(n_layers) for i in np.argsort(-worth[layer], kind="stable")[: least[layer]]}
    others = [(w, layer) for layer in range(n_layers) for i, w in enumerate(worth[layer]) if (layer, i) not in best]
    top = sorted((pair for pair in others if pair[0] > NEVER), reverse=True)[: n_slots - int(least.sum())]
    sure = least + np.bincount([layer for _, layer in top], minlength=n_layers)
    if len(top) == n_slots - int(least.sum()):
        assert got.tolist() == sure.tolist()
    assert (got >= sure).all()


def test_what_nothing_is_known_of_is_spread_evenly() -> None:
    worth = [np.full(100, NEVER), np.full(100, NEVER), np.full(50, NEVER)]
    assert divide(worth, np.array([2, 2, 1]), 125).tolist() == [50, 50, 25]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_layers(tmp_path_factory.mktemp("balance"), {name: (LAYOUT, rows) for name, rows in ROWS.items()})


def engines(files: dict[str, Path], n_slots: list[int]) -> list[SparseEngine]:
    stats, store = FlashStats(), FlashStore(files, FakeReader())
    out = []
    for name, n in zip(ROWS, n_slots, strict=True):
        layer = store.layers[name]
        gate = CertifiedGate(Sketch.of(torch.randn(N, 100), 4))
        cache = NeuronCache(store, layer, n, 0, stats)
        out.append(SparseEngine(store, layer, gate, cache, 8, WorkBuffers(), stats))
    return out


def check(balance: Balance, caches: list[NeuronCache], total: int) -> None:
    """Every slot belongs to one layer, and holds what that layer says."""
    owned = np.concatenate([cache._owned[: cache.n_slots] for cache in caches])
    assert sorted(owned.tolist()) == list(range(total)) and all(cache.slots is balance._slots for cache in caches)
    check_books(caches)


def check_books(caches: list[NeuronCache]) -> None:
    """Each layer's used slots hold the neurons that it says, and their bytes are counted."""
    for cache in caches:
        slots = cache.cached(np.arange(N))
        held = np.flatnonzero(slots >= 0)
        assert set(slots[held].tolist()) == set(cache._owned[: cache.n_used].tolist())
        assert (cache.slots.neuron_of[slots[held]] == held).all()
        assert torch.equal(cache.rows[torch.from_numpy(slots[held])], ROWS[cache.layer.path][torch.from_numpy(held)])
    used = sum(cache.n_used for cache in caches)
    assert caches[0]._stats.cache_bytes == used * LAYOUT.row_bytes


WANTED = st.lists(st.tuples(*[st.frozensets(st.integers(0, N - 1), max_size=6)] * N_LAYERS), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(6, N), min_size=N_LAYERS, max_size=N_LAYERS), WANTED, st.integers(0, 59))
def test_books_stay_true_whatever_moves(
    files: dict[str, Path], n_slots: list[int], tokens: list[tuple[frozenset[int], ...]], reset_at: int
) -> None:
    some = engines(files, n_slots)
    caches, balance = [engine.cache for engine in some], Balance(some, n_slots)
    for t, wanted in enumerate(tokens):
        if t % 3 == 2:
            balance._next = 0
        balance.pass_begins()
        check(balance, caches, sum(n_slots))
        assert sum(cache.n_slots for cache in caches) == sum(n_slots)
        if t == reset_at + 1:
            assert [cache.n_slots for cache in caches] == n_slots and not any(cache.n_used for cache in caches)
        if t == reset_at:
            caches[1].reset()
        for cache, neurons in zip(caches, wanted, strict=True):
            cache.window.tick()
            neurons = np.array(sorted(neurons), np.int64)
            cache.largest = max(cache.largest, len(neurons))
            if cache.fits(neurons):
                cache.fetch(neurons)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, N // 2), min_size=N_LAYERS, max_size=N_LAYERS), WANTED,
    st.lists(st.integers(0, 40), min_size=1, max_size=20),
)  # fmt: skip
def test_lent_slots_come_and_go(
    files: dict[str, Path], n_slots: list[int], tokens: list[tuple[frozenset[int], ...]], lent: list[int]
) -> None:
    some = engines(files, n_slots)
    caches, balance = [engine.cache for engine in some], Balance(some, n_slots, 40)
    for t, wanted in enumerate(tokens):
        balance.lend(lent[t % len(lent)])
        if t % 4 == 3:
            balance._next = 0
        balance.pass_begins()
        owned = np.concatenate([cache._owned[: cache.n_slots] for cache in caches])
        assert len(set(owned.tolist())) == len(owned), "a slot in two layers"
        assert set(range(sum(n_slots))) <= set(owned.tolist()), "a layer's own slot is nobody's"
        assert owned.max() < sum(n_slots) + balance.n_lent
        assert (balance._slots.neuron_of[sum(n_slots) + balance.n_lent :] == -1).all()
        assert all(1 <= cache.n_slots <= N for cache in caches)
        check_books(caches)
        for cache, neurons in zip(caches, wanted, strict=True):
            cache.window.tick()
            neurons = np.array(sorted(neurons), np.int64)
            if cache.fits(neurons):
                cache.fetch(neurons)
    check_books(caches)


def held_elsewhere(cache: NeuronCache) -> Callable[[], None]:
    """Let another thread hold a layer's lock, as a pass does; returns what ends that."""
    held, done = threading.Event(), threading.Event()

    def compute() -> None:
        with cache.lock:
            held.set()
            done.wait()

    def finish() -> None:
        done.set()
        other.join()

    other = threading.Thread(target=compute)
    other.start()
    held.wait()
    return finish


def test_lending_waits_for_a_pass_and_takes_its_memory_back(files: dict[str, Path]) -> None:
    some = engines(files, [5, 5, 5])
    balance = Balance(some, [5, 5, 5], 60)
    balance.lend(60)
    assert [engine.cache.n_slots for engine in some] == [25, 25, 25]
    some[0].cache.fetch(np.arange(25))
    finish = held_elsewhere(some[2].cache)
    back = threading.Thread(target=balance.lend, args=(0,))
    back.start()
    back.join(0.05)
    assert back.is_alive() and balance.n_lent == 60, "a slot was taken from under a pass"
    balance.pass_begins()  # does not wait for either
    finish()
    back.join()
    assert [engine.cache.n_slots for engine in some] == [5, 5, 5] and balance.n_lent == 0
    assert some[0].cache.n_used == 5
    pages = balance._slots.rows[15:].reshape(-1)[4096 : -2 * 4096]
    assert not pages.any(), "the memory was not given back"


def test_what_is_lent_ends_with_a_stopped_pass(files: dict[str, Path]) -> None:
    some = engines(files, [5, 5, 5])
    balance = Balance(some, [5, 5, 5], 60)
    balance.lend(60)
    some[1].cache.reset()
    balance.lend(30)
    assert some[1].cache.n_slots == 25, "it has memory of its own"
    balance.pass_begins()
    assert balance.n_lent == 0 and [engine.cache.n_slots for engine in some] == [5, 5, 5]


def test_a_busy_layer_takes_the_slots_of_a_quiet_one(files: dict[str, Path]) -> None:
    some = engines(files, [10, 10, 10])
    caches, balance = [engine.cache for engine in some], Balance(some, [10, 10, 10])
    random, passes_at = np.random.default_rng(0), []
    for t in range(1, 200):
        before = [cache.n_slots for cache in caches]
        balance.pass_begins()
        if before != [cache.n_slots for cache in caches]:
            passes_at.append(t)
        for cache, width in zip(caches, (22, 3, 1), strict=True):
            cache.window.tick()
            cache.fetch(np.sort(random.choice(width, min(width, 6), replace=False)))
    assert passes_at[0] == FIRST_PASSES and set(passes_at) <= {8, 16, 32, *range(64, 200, EVERY_PASSES)}
    assert caches[0].n_slots >= 22 and caches[1].n_slots >= 3 and caches[2].n_slots >= 1
    read = caches[0]._stats.neurons_read
    for cache, width in zip(caches, (22, 3, 1), strict=True):
        cache.fetch(np.arange(width))
    assert caches[0]._stats.neurons_read == read, "every neuron that is ever wanted is in DRAM"


def test_another_threads_pass_is_not_disturbed(files: dict[str, Path]) -> None:
    some = engines(files, [10, 10, 10])
    balance = Balance(some, [10, 10, 10])
    for t in range(7):
        balance.pass_begins()
        some[0].cache.window.tick()
        some[0].cache.fetch(np.arange(t, t + 6))
    finish = held_elsewhere(some[2].cache)
    balance.pass_begins()
    assert [engine.cache.n_slots for engine in some] == [10, 10, 10]
    assert some[1].cache.lock.acquire(blocking=False), "a lock is kept"
    some[1].cache.lock.release()
    finish()
    balance.pass_begins()
    assert some[0].cache.n_slots > 10


def test_ctrl_c_while_slots_change_hands(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    some = engines(files, [10, 10, 10])
    caches, balance = [engine.cache for engine in some], Balance(some, [10, 10, 10])
    for _ in range(FIRST_PASSES - 1):
        balance.pass_begins()
        caches[0].window.tick()
        caches[0].fetch(np.arange(9))

    def stop(self: NeuronCache, slots: np.ndarray) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NeuronCache, "receive", stop)
        with pytest.raises(KeyboardInterrupt):
            balance.pass_begins()
    check(balance, caches, 30)
    assert [cache.n_slots for cache in caches] == [10, 10, 10]


@pytest.mark.parametrize("window", [0, 4])
def test_tokens_are_the_dense_models_while_slots_move(
    flash_folder: Path, dense: PreTrainedModel, cap_for: Callable[[str, str], int], window: int
) -> None:
    """The shipped model with slots for half of its neurons: its first layer fires twelve times as often as the next."""
    config = hf_flash.FlashConfig(memory=cap_for("certified", "half"), context=256, window=window)
    flash = AutoModelForCausalLM.from_pretrained(flash_folder, quantization_config=config)
    caches = [m.engine.cache for m in flash.modules() if isinstance(m, FlashFFN)]
    before = [cache.n_slots for cache in caches]
    ids = torch.arange(5, 12)[None]
    want = dense.generate(ids, max_new_tokens=100, min_new_tokens=100, do_sample=False)
    assert torch.equal(flash.generate(ids, max_new_tokens=100, min_new_tokens=100, do_sample=False), want)
    after = [cache.n_slots for cache in caches]
    assert sum(after) == sum(before) and after[0] > before[0] and min(after) < min(before)
    found = hf_flash.stats(flash)
    assert found.cache_bytes == sum(c.n_used * c.layer.layout.row_bytes for c in caches)
    assert found.neurons_hit + found.neurons_read == found.neurons_wanted
