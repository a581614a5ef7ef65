"""FFN arithmetic against float64, and both engines against the stock formula, whatever is in DRAM already."""

import itertools
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers_flash import FakeReader, write_layers
from hypothesis import HealthCheck, given, settings
from torch import nn
from transformers.activations import ReLUSquaredActivation

from hf_flash import native, ops
from hf_flash.cache import NeuronCache
from hf_flash.engine import Engine, WorkBuffers
from hf_flash.errors import ReadError
from hf_flash.families import FATReLU, zero_below
from hf_flash.gates import CertifiedGate, Sketch
from hf_flash.layout import BundleLayout
from hf_flash.ops import Biases
from hf_flash.sparse import SparseEngine
from hf_flash.stats import FlashStats
from hf_flash.store import FlashLayer, FlashStore
from hf_flash.stream import Stream
from hf_flash.sweep import SweepEngine

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
UNIT = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8, F64: 2.0**-53}
N, D_MODEL, D_OUT = 150, 100, 72
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu2": ReLUSquaredActivation(),
    "relu6": nn.ReLU6(),
    "fatrelu": FATReLU(0.5),
    "silu": nn.SiLU(),
}
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Weights:
    """A random FFN in the stock orientation, with what it computes in float64 and how far rounding may take that."""

    def __init__(self, stored: torch.dtype, gated: bool, biased: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.up, self.down = (draw(N, D_MODEL) / 10).to(stored), (draw(D_OUT, N) / 12).to(stored)
        self.gate = (draw(N, D_MODEL) / 10).to(stored) if gated else None
        self.biases = Biases()
        if biased:
            self.biases = Biases(draw(N).to(stored) if gated else None, draw(N).to(stored), draw(D_OUT).to(stored))

    def dense(self, x: torch.Tensor, act: ops.Activation) -> torch.Tensor:
        b = self.biases
        return ops.dense_ffn(x, self.up, self.down, act, self.gate, b.up, b.gate, b.down)

    def check(self, y: torch.Tensor, x: torch.Tensor, act: ops.Activation) -> None:
        """y is the FFN of x, as far as the rounding of its dtype allows."""
        assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], D_OUT))
        as_computed = [
            None if t is None else t.to(x.dtype).double() for t in (self.up, self.down, self.gate, *self.biases)
        ]
        up, down, gate, gate_bias, up_bias, down_bias = as_computed
        exact = ops.dense_ffn(x.double(), up, down, act, gate, up_bias, gate_bias, down_bias)
        size = [None if t is None else t.abs() for t in as_computed]
        reach = ops.dense_ffn(x.double().abs(), size[0], size[1], _identity(act), size[2], size[4], size[3], size[5])
        assert ((y.double() - exact).abs() <= 12 * UNIT[x.dtype] * reach + 1e-6 * (x.dtype == F16)).all()


def _identity(act: ops.Activation) -> ops.Activation:
    return torch.square if isinstance(act, ReLUSquaredActivation) else nn.Identity()


def inputs(n_tokens: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(n_tokens, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("gated,biased", itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dense_ffn_against_float64(act: str, dtype: torch.dtype, gated: bool, biased: bool) -> None:
    weights, x = Weights(BF16, gated, biased), inputs(6, dtype)
    weights.check(weights.dense(x, ACTIVATIONS[act]), x, ACTIVATIONS[act])
    weights.check(weights.dense(x.view(2, 3, -1), ACTIVATIONS[act]), x.view(2, 3, -1), ACTIVATIONS[act])


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 2, 5), (0, 5)])
def test_project_is_a_sum_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    h, down, bias = torch.randn(shape).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(4).to(dtype)
    for b in (None, bias):
        y = ops.project(h, down, b)
        want = h.double() @ down.double() + (0 if b is None else b.double())
        torch.testing.assert_close(y.double(), want, rtol=8 * UNIT[dtype], atol=40 * UNIT[dtype])
        assert y.dtype == dtype
        y.add_(1)  # some models add in place to what they get
    assert torch.equal(down, down.clone())


def test_silent_neurons_can_be_left_out() -> None:
    """The one property that all of this rests on."""
    weights, x = Weights(F32, True, True), inputs(1, F32)
    b = weights.biases
    h = ops.hidden(x, weights.up, nn.ReLU(), weights.gate, b.up, b.gate)
    some = h[0].nonzero()[:, 0].flip(0)  # in any order
    assert 0 < len(some) < N
    part = ops.hidden(x, weights.up[some], nn.ReLU(), weights.gate[some], *b.part(some))
    weights.check(ops.project(part, weights.down.t()[some], b.down), x, nn.ReLU())


def test_biases_of_some_neurons() -> None:
    index = torch.tensor([3, 1])
    assert Biases().part(index) == (None, None)
    up, gate = Biases(torch.arange(5.0), torch.arange(5.0) + 10).part(index)
    assert (up.tolist(), gate.tolist()) == ([13, 11], [3, 1])


# Engines


@pytest.fixture(params=["native", "torch"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_lib", None)
    elif not native.available():
        pytest.skip("the native kernels are not built")
    return request.param


@pytest.fixture(scope="module")
def on_flash(tmp_path_factory: pytest.TempPathFactory):
    """(stored dtype, gated, biased) -> weights and the file they lie in."""
    made: dict[tuple, tuple[Weights, dict[str, Path]]] = {}

    def get(stored: torch.dtype, gated: bool, biased: bool) -> tuple[Weights, dict[str, Path]]:
        key = (stored, gated, biased)
        if key not in made:
            weights, layout = Weights(*key), BundleLayout(D_MODEL, D_OUT, gated, stored)
            rows = layout.pack(weights.up, weights.down.t(), weights.gate)
            made[key] = weights, write_layers(tmp_path_factory.mktemp("engine"), {"ffn": (layout, rows)})
        return made[key]

    return get


class Bench:
    """Engines over one layer on flash."""

    def __init__(self, weights: Weights, files: dict[str, Path], reader: FakeReader | None = None) -> None:
        self.weights, self.reader, self.stats = weights, reader or FakeReader(late=True), FlashStats()
        self.store, self.work = FlashStore(files, self.reader), WorkBuffers()
        self.layer: FlashLayer = self.store.layers["ffn"]

    def sweep(self, chunk_rows: int, pinned: int, max_tokens: int = 64) -> SweepEngine:
        stream = Stream(self.reader, chunk_rows * self.layer.layout.row_bytes, 3, self.stats)
        return SweepEngine(self.layer, stream, self.work, self.stats, pinned, max_tokens)

    def sparse(self, act: ops.Activation, n_slots: int, batch_rows: int, bits: int = 6) -> SparseEngine:
        deciding = self.weights.up if self.weights.gate is None else self.weights.gate
        gate = CertifiedGate(Sketch.of(deciding, bits), threshold=zero_below(act) or 0.0, weight_dtype=deciding.dtype)
        cache = NeuronCache(self.store, self.layer, n_slots, 3, self.stats)
        return SparseEngine(self.store, self.layer, gate, cache, batch_rows, self.work, self.stats)


TOKENS = st.lists(st.sampled_from([1, 1, 1, 2, 7, 8, 9, 65, 200]), min_size=1, max_size=5)
KINDS = {
    "stored": st.sampled_from([F32, F16, BF16]), "gated": st.booleans(), "biased": st.booleans(),
}  # fmt: skip


@FAST
@given(
    st.fixed_dictionaries(KINDS), st.sampled_from([F32, F16, BF16, F64]), st.sampled_from(sorted(ACTIVATIONS)),
    st.integers(1, 160), st.integers(0, N), TOKENS,
)  # fmt: skip
def test_sweep_engine_is_the_stock_formula(
    on_flash, kind: dict, dtype: torch.dtype, act: str, chunk_rows: int, pinned: int, tokens: list[int]
) -> None:
    bench = Bench(*on_flash(**kind))
    engine = bench.sweep(chunk_rows, pinned)
    for seed, n_tokens in enumerate(tokens):
        x = inputs(n_tokens, dtype, seed)
        bench.weights.check(engine.forward(x, ACTIVATIONS[act], bench.weights.biases), x, ACTIVATIONS[act])
    held = engine._pin * (bench.layer.layout.row_bytes if engine._pinned is not None else 0)
    if engine._dense is not None:
        held = N * bench.layer.layout.n_elements * kind["stored"].itemsize
    assert abs(bench.stats.cache_bytes - held) <= 3 * 4096


@FAST
@given(
    st.fixed_dictionaries(KINDS),
    st.sampled_from([F32, F16, BF16, F64]),
    st.sampled_from(["relu", "relu2", "relu6", "fatrelu"]),
    st.integers(1, N + 10), st.integers(1, N + 10), TOKENS,
)  # fmt: skip
def test_sparse_engine_is_the_stock_formula(
    arithmetic: str,
    on_flash,
    kind: dict,
    dtype: torch.dtype,
    act: str,
    n_slots: int,
    batch_rows: int,
    tokens: list[int],
) -> None:
    bench = Bench(*on_flash(**kind))
    engine = bench.sparse(ACTIVATIONS[act], n_slots, batch_rows)
    for seed, n_tokens in enumerate(tokens):
        x = inputs(n_tokens, dtype, seed)
        bench.weights.check(engine.forward(x, ACTIVATIONS[act], bench.weights.biases), x, ACTIVATIONS[act])
    stats = bench.stats
    assert stats.neurons_fired <= stats.neurons_wanted == stats.neurons_hit + stats.neurons_read
    assert stats.cache_bytes <= min(n_slots, N) * bench.layer.layout.row_bytes


@pytest.mark.parametrize("gated", [False, True])
def test_prompts_ask_for_few_shapes(on_flash, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's library keeps half a MiB of code for each: prompts of ever other lengths took 26 MB each."""
    bench = Bench(*on_flash(F32, gated, True))
    engine, true, widths = bench.sparse(nn.ReLU(), 20, 32), ops.hidden, set()

    def hidden(x: torch.Tensor, up: torch.Tensor, *more: Any) -> torch.Tensor:
        widths.add(up.shape[0])
        return true(x, up, *more)

    for seed in range(20):
        x = inputs(12, F32, seed)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "hidden", hidden)
            y = engine.forward(x, nn.ReLU(), bench.weights.biases)
        bench.weights.check(y, x, nn.ReLU())
    assert widths <= {4, 8, 12, 16, 20, 24, 28, 32}


def engines(bench: Bench) -> list[Engine]:
    """One of each kind of way through the engines, for ReLU."""
    return [
        bench.sweep(20, 0), bench.sweep(20, 40), bench.sweep(20, N),
        bench.sparse(nn.ReLU(), N, 32), bench.sparse(nn.ReLU(), 20, 32), bench.sparse(nn.ReLU(), 1, 7),
    ]  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 12])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pieces_sum_to_the_forward(arithmetic: str, on_flash, gated: bool, n_tokens: int, dtype: torch.dtype) -> None:
    """What the backward pass goes through: each neuron that can contribute, once."""
    bench = Bench(*on_flash(F32, gated, True))
    x, biases, act = inputs(n_tokens, dtype), bench.weights.biases, nn.ReLU()
    fired = ops.hidden(x, bench.weights.up, act, bench.weights.gate, biases.up, biases.gate).any(0)
    for engine in engines(bench):
        for _ in range(2):  # the second time from DRAM, as far as there is room
            seen, total = torch.zeros(N, dtype=torch.int64), torch.zeros(n_tokens, D_OUT, dtype=F64)
            with engine.pieces(x, biases) as pieces:
                for neurons, gate, up, down in pieces:
                    seen[neurons] += 1
                    h = ops.hidden(x, up, act, gate, *biases.part(neurons))
                    total += h.double() @ down.to(dtype).double()
            assert seen.max() <= 1
            assert seen[fired].all()
            bench.weights.check((total + biases.down.double()).to(dtype), x, act)
            bench.weights.check(engine.forward(x, act, biases), x, act)


@pytest.mark.parametrize("shape", [(D_MODEL,), (1, 1, D_MODEL), (2, 3, D_MODEL), (0, D_MODEL), (2, 0, D_MODEL)])
def test_any_shape_of_input(arithmetic: str, on_flash, shape: tuple[int, ...]) -> None:
    """No tokens at all made the certified gate ask for the last one."""
    bench = Bench(*on_flash(F32, True, True))
    x = torch.randn(shape)
    for engine in engines(bench):
        bench.weights.check(engine.forward(x, nn.ReLU(), bench.weights.biases), x, nn.ReLU())


def test_inputs_that_are_not_contiguous(arithmetic: str, on_flash) -> None:
    bench = Bench(*on_flash(F32, True, True))
    turned, wide = torch.randn(D_MODEL, 4).t(), torch.randn(4, 2 * D_MODEL)[:, ::2]
    for engine, x in itertools.product(engines(bench), (turned, wide, turned[:1])):
        bench.weights.check(engine.forward(x, nn.ReLU(), bench.weights.biases), x, nn.ReLU())


@pytest.mark.parametrize("n_tokens", [2, 12])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_gives_what_the_stock_block_gives(
    arithmetic: str, on_flash, n_tokens: int, dtype: torch.dtype, bad: float
) -> None:
    bench = Bench(*on_flash(F32, False, True))
    x = inputs(n_tokens, dtype)
    x[1, 5] = bad
    want = bench.weights.dense(x, nn.ReLU())
    assert not want[1].isfinite().all()
    for engine in engines(bench):
        got = engine.forward(x, nn.ReLU(), bench.weights.biases)
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got[0], want[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_threshold_is_compared_as_the_stock_activation_does(arithmetic: str, on_flash, dtype: torch.dtype) -> None:
    """torch compares in the tensor's dtype, in which 0.5028 may be another number."""
    act = FATReLU(0.5028)
    at = torch.tensor(act.threshold, dtype=dtype)
    weights = Weights(F32, False, False)
    layout = BundleLayout(D_MODEL, D_OUT, False, F32)
    weights.up = torch.zeros(N, D_MODEL)
    weights.up[:, 0] = 1
    x = torch.zeros(3, D_MODEL, dtype=dtype)
    x[:, 0] = torch.stack([at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1)])
    want = weights.dense(x, act)
    assert want[1].any() and not want[0].any()
    files = on_flash(F32, False, False)[1]
    folder = next(iter(files.values())).parent / f"threshold-{dtype}-{arithmetic}"
    folder.mkdir()
    bench = Bench(weights, write_layers(folder, {"ffn": (layout, layout.pack(weights.up, weights.down.t()))}))
    for engine in (bench.sweep(20, 0), bench.sparse(act, N, 32), bench.sparse(act, 5, 32)):
        got = engine.forward(x, act, Biases())
        torch.testing.assert_close(got, want, rtol=8 * UNIT[dtype], atol=8 * UNIT[dtype])


def test_what_float16_rounds_to_zero_is_silent(arithmetic: str, on_flash, tmp_path: Path) -> None:
    """2^-26 is nothing in float16, and 1e-3 once a down row of 60,000 has multiplied it."""
    weights = Weights(F32, False, False)
    weights.up, weights.down = torch.full((N, D_MODEL), 2.0**-26), torch.full((D_OUT, N), 60_000.0)
    weights.up[0] = 2.0**-24
    layout, x = BundleLayout(D_MODEL, D_OUT, False, F32), torch.zeros(1, D_MODEL, dtype=F16)
    x[0, 0] = 1
    want = weights.dense(x, nn.ReLU())
    assert want.float().max() == torch.tensor(2.0**-24 * 60_000).half()
    bench = Bench(weights, write_layers(tmp_path, {"ffn": (layout, layout.pack(weights.up, weights.down.t()))}))
    for engine in (bench.sweep(20, 0), bench.sparse(nn.ReLU(), N, N), bench.sparse(nn.ReLU(), 5, 32)):
        torch.testing.assert_close(engine.forward(x, nn.ReLU(), Biases()), want)


def test_another_default_dtype_changes_nothing(arithmetic: str, on_flash) -> None:
    bench = Bench(*on_flash(F32, True, True))
    torch.set_default_dtype(F16)
    try:
        for engine, n_tokens in itertools.product(engines(bench), (1, 12)):
            x = inputs(n_tokens, F32)
            bench.weights.check(engine.forward(x, nn.ReLU(), bench.weights.biases), x, nn.ReLU())
    finally:
        torch.set_default_dtype(F32)


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_read_is_raised_and_the_next_forward_is_right(arithmetic: str, on_flash, late: bool) -> None:
    weights, files = on_flash(F16, True, True)
    failing = False
    bench = Bench(weights, files, FakeReader(late, fail=lambda read: failing))
    for engine in engines(bench):
        for n_tokens in (1, 12, 1):
            x, n_errors = inputs(n_tokens, F32, n_tokens), 0
            failing = True
            try:
                engine.forward(x, nn.ReLU(), weights.biases)
            except ReadError:
                n_errors += 1
            failing = False
            for _ in range(6):  # what was read ahead while the device failed is raised where it is used
                try:
                    weights.check(engine.forward(x, nn.ReLU(), weights.biases), x, nn.ReLU())
                    break
                except ReadError:
                    n_errors += 1
            else:
                pytest.fail("a transient error never went away")


def test_threads_share_an_engine(arithmetic: str, on_flash) -> None:
    bench = Bench(*on_flash(BF16, True, False))
    failures: list[BaseException] = []

    def work(engine: Engine, seed: int) -> None:
        try:
            for i in range(12):
                x = inputs((1, 3, 20)[i % 3], F32, seed + i)
                bench.weights.check(engine.forward(x, nn.ReLU(), bench.weights.biases), x, nn.ReLU())
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(e, s)) for e in engines(bench) for s in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
