"""The cache against a dict: whatever was asked for before, a looked-up slot holds the neuron's bytes."""

import threading
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers_flash import FakeReader, random_bytes, write_layers
from hypothesis import given, settings

from hf_flash.cache import Lookup, NeuronCache
from hf_flash.errors import ReadError
from hf_flash.layout import BundleLayout
from hf_flash.readers import ThreadReader
from hf_flash.stats import FlashStats
from hf_flash.store import FlashStore

N = 40
LAYOUT = BundleLayout(100, 60, True, torch.float16)  # rows of 1024 bytes
ROWS = random_bytes((N, LAYOUT.row_bytes), seed=1)
NEURONS = st.frozensets(st.integers(0, N - 1), min_size=1).map(sorted)
STEPS = st.lists(
    st.tuples(st.sampled_from(["fetch", "fetch", "fetch", "failing", "refused", "keep"]), NEURONS), max_size=25
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_layers(tmp_path_factory.mktemp("cache"), {"ffn": (LAYOUT, ROWS)})


class Model:
    """A cache under test and the dict that it must agree with: which neuron is in DRAM, and what its bytes are."""

    def __init__(
        self, files: dict[str, Path], n_slots: int, reader: FakeReader | ThreadReader, window: int = 3
    ) -> None:
        self.reader, self.stats = reader, FlashStats()
        store = FlashStore(files, reader)
        self.cache = NeuronCache(store, store.layers["ffn"], n_slots, window, self.stats)

    def cached(self) -> set[int]:
        return set(np.flatnonzero(self.cache.cached(np.arange(N)) >= 0).tolist())

    def check(self) -> None:
        """Every neuron that the cache claims to have is in a slot of its own, with its own bytes."""
        slots = self.cache.cached(np.arange(N))
        held = slots[slots >= 0]
        assert len(set(held.tolist())) == len(held) <= self.cache.n_slots
        assert (held < self.cache.n_slots).all()
        for neuron in self.cached():
            assert torch.equal(self.cache.rows[slots[neuron]], ROWS[neuron]), f"a stale row for neuron {neuron}"

    def fetch(self, neurons: np.ndarray) -> Lookup:
        before, hit, read = self.cached(), self.stats.neurons_hit, self.stats.neurons_read
        lookup = self.cache.fetch(neurons)
        assert self.stats.neurons_hit - hit == len(before & set(neurons.tolist()))
        assert self.stats.neurons_read - read == len(set(neurons.tolist()) - before)
        return lookup


@settings(max_examples=120, deadline=None)
@given(st.integers(1, N + 5), STEPS, st.booleans())
def test_a_looked_up_row_is_the_row_on_flash(
    files: dict[str, Path], n_slots: int, steps: list[tuple[str, list[int]]], late: bool
) -> None:
    failing = False
    reader = FakeReader(late, fail=lambda read: failing)
    model = Model(files, n_slots, reader)
    cache = model.cache
    assert cache.n_slots == min(n_slots, N)
    for kind, wanted in steps:
        cache.window.tick()
        neurons = np.array(wanted[: cache.n_slots], np.int64)
        assert cache.fits(neurons)
        if kind == "keep":
            before = model.cached()
            cache.keep(neurons, ROWS[torch.from_numpy(neurons)])
            assert len(model.cached() & set(wanted)) >= min(len(neurons), cache.n_slots) > 0
            assert len(model.cached()) >= len(before)
        elif kind == "fetch" or set(neurons.tolist()) <= model.cached():
            lookup = model.fetch(neurons)
            if lookup.ticket is not None:
                lookup.ticket.wait()
            assert torch.equal(cache.rows[torch.from_numpy(lookup.slots)], ROWS[torch.from_numpy(neurons)])
            assert set(neurons.tolist()) <= model.cached()
        else:  # a read fails, or the reader does not take it (closed, or Ctrl-C while reads are handed over)
            failing, reader.closed = kind == "failing", kind == "refused"
            with pytest.raises(ReadError):
                cache.fetch(neurons).ticket.wait()
            failing = reader.closed = False
            cache.reset()
            assert model.cached() == set()
        model.check()
    assert model.stats.cache_bytes == cache.n_used * LAYOUT.row_bytes <= cache.n_slots * LAYOUT.row_bytes


def test_a_cache_as_large_as_the_layer_reads_each_neuron_once(files: dict[str, Path]) -> None:
    model = Model(files, 1000, FakeReader())
    for seed in range(30):
        neurons = np.sort(np.random.default_rng(seed).choice(N, 10, replace=False))
        model.fetch(neurons)
        model.check()
    assert model.stats.neurons_read == len(model.cached()) <= N
    assert model.stats.cache_bytes == len(model.cached()) * LAYOUT.row_bytes


def test_neurons_of_the_window_outlive_older_ones(files: dict[str, Path]) -> None:
    model = Model(files, 20, FakeReader(), window=3)
    for start in (0, 5, 10):  # three tokens, five neurons each; then three more in the place of nothing
        model.cache.window.tick()
        model.fetch(np.arange(start, start + 5))
    model.cache.window.tick()
    model.fetch(np.arange(20, 30))  # five slots are free, five must be given up: the first token's are the oldest
    assert model.cached() == {*range(5, 15), *range(20, 30)}


@pytest.mark.parametrize("gap", [0, 1, 7])
def test_rows_between_the_wanted_ones_are_read_over(files: dict[str, Path], gap: int) -> None:
    """A gap of up to 8 KiB costs less than a read of its own; its bytes go nowhere, and bytes_read counts them."""
    model = Model(files, N, FakeReader())
    neurons = np.arange(0, N, gap + 1)
    model.fetch(neurons)
    model.check()
    assert model.stats.n_reads == 1
    assert model.stats.bytes_read == (int(neurons[-1]) + 1) * LAYOUT.row_bytes
    assert [length for _, _, length in model.reader.log] == [model.stats.bytes_read]


def test_a_gap_that_is_too_long_is_not_read(files: dict[str, Path]) -> None:
    model = Model(files, N, FakeReader())
    assert model.cache.max_gap_rows == 8
    model.fetch(np.array([0, 10]))
    assert (model.stats.n_reads, model.stats.bytes_read) == (2, 2 * LAYOUT.row_bytes)


def test_bridging_a_gap_keeps_a_direct_read_direct(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was skipped over landed in memory of no alignment, so that the whole read took a bounce and a copy."""
    reader = ThreadReader(1)
    model = Model(files, N, reader)
    if reader._files[0].block == 1:
        pytest.skip("the temporary folder refuses O_DIRECT")
    monkeypatch.setattr(reader, "_bounce", lambda *args: pytest.fail("an aligned read took the bounce buffer"))
    lookup = model.fetch(np.array([0, 2, 9, 11, 12, 39]))
    assert lookup.ticket is not None
    lookup.ticket.wait()
    model.check()
    reader.close()


def test_threads_share_a_cache(files: dict[str, Path]) -> None:
    reader = ThreadReader(4)
    model = Model(files, 12, reader)
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            neurons = np.sort(random.choice(N, 6, replace=False))
            with model.cache.lock:
                model.cache.window.tick()
                lookup = model.cache.fetch(neurons)
                if lookup.ticket is not None:
                    lookup.ticket.wait()
                rows = model.cache.rows[torch.from_numpy(lookup.slots)]
                if not torch.equal(rows, ROWS[torch.from_numpy(neurons)]):
                    wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    model.check()
    reader.close()
