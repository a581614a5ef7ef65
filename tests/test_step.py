"""The native step is the Python path: same outputs, same neurons, true books; and it survives what stops it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers_flash import write_layers
from torch import nn

from hf_flash import native, ops
from hf_flash.cache import NeuronCache
from hf_flash.engine import WorkBuffers
from hf_flash.errors import ReadError
from hf_flash.families import FATReLU, zero_below
from hf_flash.gates import CertifiedGate, Sketch
from hf_flash.layout import BundleLayout
from hf_flash.ops import Biases
from hf_flash.readers import UringReader, open_reader
from hf_flash.sparse import SparseEngine
from hf_flash.stats import FlashStats
from hf_flash.step import NativeStep
from hf_flash.store import FlashStore
from hf_flash.trial import Trial

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
N, D = 700, 128


class Layer:
    """Weights of one FFN, and the file that they lie in."""

    def __init__(self, folder: Path, stored: torch.dtype, gated: bool, biased: bool, packed: bool) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * 0.1).to(stored)

        self.up, self.down, self.gate = draw(N, D), draw(D, N), draw(N, D) if gated else None
        bias = draw(N) - 0.5
        self.biases = Biases(bias if gated else None, draw(N) if gated else bias, draw(D)) if biased else Biases()
        layout = BundleLayout(D, D, gated, stored, packed)
        rows = BundleLayout(D, D, gated, stored).pack(self.up, self.down.t(), self.gate)
        folder.mkdir(exist_ok=True)
        self.files = write_layers(folder, {"ffn": (layout, rows)})

    def engine(self, act: nn.Module, n_slots: int, native_step: bool, window: int = 3) -> SparseEngine:
        stats = FlashStats()
        store = FlashStore(self.files, open_reader())
        layer = store.layers["ffn"]
        deciding = self.up if self.gate is None else self.gate
        gate = CertifiedGate(Sketch.of(deciding, 6), threshold=zero_below(act) or 0.0, weight_dtype=deciding.dtype)
        engine = SparseEngine(
            store, layer, gate, NeuronCache(store, layer, n_slots, window, stats), 64, WorkBuffers(), stats
        )
        assert isinstance(store.reader, UringReader) == NativeStep.can(store, layer)
        if not isinstance(store.reader, UringReader):
            pytest.skip("io_uring cannot be had here")
        if not native_step:
            engine._step = None
        return engine


class Always(Trial):
    """Guesses from the first token on."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True


def guesser(layer: Layer, engine: SparseEngine) -> SparseEngine:
    """An engine that guesses what another one will want: as if that were given the same input."""
    first = layer.engine(nn.ReLU(), N, True)
    first.follow(engine, torch.ones(D), torch.zeros(D), Always())
    return first


def books_are_true(engine: SparseEngine) -> None:
    """Every slot holds the row of the neuron that it is said to hold."""
    slot_of, neuron_of, _ = engine.cache.books()
    held = (slot_of >= 0).nonzero()[0]
    assert (neuron_of[slot_of[held]] == held).all()
    assert len(set(slot_of[held].tolist())) == len(held) <= engine.cache.n_used <= engine.cache.n_slots
    rows = engine._store.read_rows(engine.layer, held)
    assert torch.equal(engine.cache.rows[torch.from_numpy(slot_of[held])], rows)


def walk(n: int, dtype: torch.dtype, n_tokens: int = 1) -> list[torch.Tensor]:
    """Inputs of which each is much like the one before."""
    generator, x = torch.Generator().manual_seed(7), torch.zeros(n_tokens, D)
    out = []
    for _ in range(n):
        x = 0.8 * x + torch.randn(n_tokens, D, generator=generator)
        out.append(x.to(dtype))
    return out


@pytest.mark.parametrize("packed,stored", [(False, F32), (False, F16), (False, BF16), (True, BF16)])
@pytest.mark.parametrize("gated,biased", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_step_is_what_python_does(
    tmp_path: Path, stored: torch.dtype, packed: bool, gated: bool, biased: bool, dtype: torch.dtype
) -> None:
    layer = Layer(tmp_path, stored, gated, biased, packed)
    for act in (nn.ReLU(), FATReLU(0.05)):
        ours, theirs = (layer.engine(act, 500, way) for way in (True, False))
        for n_tokens in (1, 3, 8):
            for x in walk(6, dtype, n_tokens):
                y, want = (engine.forward(x, act, layer.biases) for engine in (ours, theirs))
                assert y.dtype == dtype and y.shape == want.shape
                torch.testing.assert_close(
                    y, want, atol=2e-5 if dtype == F32 else 2e-2, rtol=1e-5 if dtype == F32 else 2e-2
                )
        books_are_true(ours)
        for name in ("neurons_wanted", "neurons_fired"):
            assert getattr(ours._stats, name) == getattr(theirs._stats, name)
        assert ours._stats.neurons_read == pytest.approx(theirs._stats.neurons_read, rel=0.05)  # ties fall either way
        assert ours._stats.cache_bytes == theirs._stats.cache_bytes
        assert (
            ours._stats.bytes_read == ours._stats.neurons_read * ours.layer.layout.row_bytes or ours.cache.max_gap_rows
        )


def test_steps_and_sweeps_take_turns(tmp_path: Path) -> None:
    """Few slots and passes of many tokens between the steps: one set of books, and both keep it."""
    layer, act = Layer(tmp_path, BF16, False, True, True), nn.ReLU()
    ours, theirs = (layer.engine(act, 160, way) for way in (True, False))
    for i, x in enumerate(walk(12, F32)):
        x = x if i % 3 else torch.randn(40, D)
        y, want = (engine.forward(x, act, layer.biases) for engine in (ours, theirs))
        torch.testing.assert_close(y, want, atol=2e-5, rtol=1e-5)
        books_are_true(ours)


def test_a_step_that_found_no_room_leaves_room_for_the_next(tmp_path: Path) -> None:
    """Bug: what it had read counted as in use until its own time came, and another thread's step found no slots."""
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    ours, theirs = layer.engine(act, 400, True), layer.engine(act, N, False)
    first = guesser(layer, ours)
    for some, one in zip(walk(8, F32, 8), walk(8, F32), strict=True):
        first.forward(some[:1], act, layer.biases)
        assert ours._step is not None
        assert ours._step.run(some, act, layer.biases) is None, "8 tokens want more than there are slots for"
        got, want = (engine.forward(one, act, layer.biases) for engine in (ours, theirs))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        books_are_true(ours)


def test_a_bias_that_changed_is_seen(tmp_path: Path) -> None:
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    engine, x = layer.engine(act, N, True), torch.randn(1, D)
    before = engine.forward(x, act, layer.biases)
    layer.biases.down.add_(1)
    torch.testing.assert_close(engine.forward(x, act, Biases(*layer.biases)), before + 1)


def test_an_unknown_activation_goes_the_other_way(tmp_path: Path) -> None:
    layer = Layer(tmp_path, F32, False, True, False)
    engine, x = layer.engine(nn.ReLU(), N, True), torch.randn(1, D)
    want = engine.forward(x, nn.ReLU(), layer.biases)
    torch.testing.assert_close(engine.forward(x, lambda z: z.relu(), layer.biases), want)


def test_a_failed_read_is_an_error_and_the_next_step_is_right(tmp_path: Path) -> None:
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    engine, x = layer.engine(act, N, True), torch.randn(1, D)
    want = engine.forward(x, act, layer.biases)
    engine.cache.reset()
    path = next(iter(layer.files.values()))
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    with pytest.raises(ReadError, match="ended early"):
        engine.forward(x, act, layer.biases)
    path.write_bytes(whole)
    torch.testing.assert_close(engine.forward(x, act, layer.biases), want)
    books_are_true(engine)


def test_a_closed_reader_is_an_error(tmp_path: Path) -> None:
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    engine = layer.engine(act, N, True)
    engine._store.close()
    with pytest.raises(ReadError, match="closed"):
        engine.forward(torch.randn(1, D), act, layer.biases)


def test_signals_between_steps_lose_nothing(tmp_path: Path) -> None:
    """Ctrl-C at 60 different moments; what is computed afterwards is right each time."""
    layer, act = Layer(tmp_path, BF16, True, True, True), nn.ReLU()
    engine, inputs = layer.engine(act, 200, True), walk(40, F32)
    reference = layer.engine(act, N, False)
    want = [reference.forward(x, act, layer.biases) for x in inputs]
    n_stopped = 0
    for i in range(60):
        timer = threading.Timer(0.0002 * (1 + i % 20), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            deadline = time.monotonic() + 0.02
            while time.monotonic() < deadline:
                for x in inputs:
                    engine.forward(x, act, layer.biases)
        except KeyboardInterrupt:
            n_stopped += 1
        timer.join()
        try:
            torch.testing.assert_close(
                engine.forward(inputs[i % 40], act, layer.biases), want[i % 40], atol=2e-5, rtol=1e-5
            )
        except KeyboardInterrupt:
            n_stopped += 1
    assert n_stopped > 30
    books_are_true(engine)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("n_slots", [330, 400])
def test_wrong_guesses_give_way(tmp_path: Path, n_slots: int, window: int) -> None:
    """Bug: guesses that filled all slots could not be given up in the same step, and slot 0 went to several neurons."""
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    ours, theirs = layer.engine(act, n_slots, True, window), layer.engine(act, N, False)
    first = guesser(layer, ours)
    for x in walk(30, F32):
        first.forward(-x, act, layer.biases)  # what fires then is what does not now
        torch.testing.assert_close(
            ours.forward(x, act, layer.biases), theirs.forward(x, act, layer.biases), atol=2e-5, rtol=1e-5
        )
        books_are_true(ours)
        assert ours._step is not None and not ours._step._s.early
    assert ours.cache.n_used == n_slots, "there was something to give up"


def test_right_guesses_are_there_in_time(tmp_path: Path) -> None:
    """Slots for a part of the neurons; what is guessed for the very input that comes is what is read."""
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    ours, theirs = layer.engine(act, 500, True, window=0), layer.engine(act, N, False)
    first = guesser(layer, ours)
    for x in walk(30, F32):
        first.forward(x, act, layer.biases)
        want = theirs.forward(x, act, layer.biases)
        torch.testing.assert_close(ours.forward(x, act, layer.biases), want, atol=2e-5, rtol=1e-5)
        books_are_true(ours)
    stats = ours._stats
    assert stats.neurons_hit + stats.neurons_read == stats.neurons_wanted == theirs._stats.neurons_wanted
    assert 0.1 < stats.neurons_early / stats.neurons_read < 1, "those that were far from firing are not looked at"


def test_guesses_after_a_token_that_is_not_finite(tmp_path: Path) -> None:
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    ours, theirs = layer.engine(act, N // 2, True, window=0), layer.engine(act, N, False)
    first, bad = guesser(layer, ours), torch.full((1, D), float("nan"))
    for x in walk(6, F32):
        for engine in (first, ours):
            assert engine.forward(bad, act, layer.biases).isnan().all()
        first.forward(x, act, layer.biases)
        want = theirs.forward(x, act, layer.biases)
        torch.testing.assert_close(ours.forward(x, act, layer.biases), want, atol=2e-5, rtol=1e-5)
        books_are_true(ours)


def test_whoever_is_at_the_next_layer_is_left_alone(tmp_path: Path) -> None:
    """Another thread computes there: no guess goes into its slots, and nobody waits for it."""
    layer, act = Layer(tmp_path, F32, False, True, False), nn.ReLU()
    ours = layer.engine(act, 350, True)
    first, x, begun, done = guesser(layer, ours), torch.randn(1, D), threading.Event(), threading.Event()
    ours.forward(torch.randn(1, D), act, layer.biases)
    n_used = ours.cache.n_used

    def hold() -> None:
        with ours.cache.lock:
            begun.set()
            assert done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert begun.wait(60)
    first.forward(x, act, layer.biases)
    done.set()
    other.join()
    assert ours.cache.n_used == n_used
    first.forward(x, act, layer.biases)
    assert ours.cache.n_used > n_used
    ours.forward(x, act, layer.biases)
    books_are_true(ours)


def test_a_failed_guess_is_an_error_where_it_was_for(tmp_path: Path) -> None:
    layer, act = Layer(tmp_path / "a", F32, False, True, False), nn.ReLU()
    other = Layer(tmp_path / "b", F32, False, True, False)
    ours, x = layer.engine(act, N, True), torch.randn(1, D)
    first = guesser(other, ours)
    path = next(iter(layer.files.values()))
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    first.forward(x, act, other.biases)
    with pytest.raises(ReadError, match="ended early"):
        ours.forward(x, act, layer.biases)
    path.write_bytes(whole)
    want = layer.engine(act, N, False).forward(x, act, layer.biases)
    torch.testing.assert_close(ours.forward(x, act, layer.biases), want, atol=2e-5, rtol=1e-5)
    books_are_true(ours)


@pytest.mark.parametrize(("gated", "packed"), [(False, False), (True, True)])
def test_few_tokens_that_want_more_than_there_are_slots_take_no_torch_product(
    gated: bool, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's library keeps a kernel for each number of neurons: under a small cap 24 tokens took 60 MB more."""
    layer = Layer(tmp_path, BF16, gated, True, packed)
    act = nn.ReLU()
    wide = layer.engine(act, N, native_step=True)
    narrow = layer.engine(act, 8, native_step=True)
    monkeypatch.setattr(ops, "hidden", lambda *args, **kwargs: pytest.fail("a product of torch's"))
    for n_tokens in (1, 3):
        for x in walk(6, BF16, n_tokens):
            want, got = wide.forward(x, act, layer.biases), narrow.forward(x, act, layer.biases)
            torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    assert narrow._stats.neurons_wanted == wide._stats.neurons_wanted > 6 * 8 * 2
    assert narrow._stats.neurons_fired == wide._stats.neurons_fired
    books_are_true(narrow)
