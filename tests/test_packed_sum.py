"""Sums over packed bundles: some rows at a time and a whole unit in one native call, against the stock block."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_flash import write_layers
from torch import nn

from hf_flash import native, ops, ordered, trace
from hf_flash.engine import WorkBuffers
from hf_flash.errors import ReadError
from hf_flash.layout import BundleLayout
from hf_flash.packed_sum import PackedSum
from hf_flash.readers import Reader, ThreadReader, UringReader
from hf_flash.stats import FlashStats
from hf_flash.store import FlashStore
from hf_flash.stream import Stream
from hf_flash.sweep import SweepEngine

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
HERE = native.available() and bool(native.library().hf_flash_ordered()) and ordered.agrees(256, 512)
N_SIGNALS = int(os.environ.get("HF_FLASH_TEST_SIGNALS", "20"))  # more of them for a soak
EXACT = pytest.param(True, marks=pytest.mark.skipif(not HERE, reason="no AVX512-BF16, or torch sums otherwise here"))


def with_escapes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) / 8
    return torch.where(torch.rand(shape, generator=generator) < 2e-3, w * 2.0**-30, w).bfloat16()


class Bench:
    """A packed layer twice in one file, its engines over one stream, and what the stock block gives."""

    def __init__(
        self, folder: Path, reader: Reader, step: int, pinned: int, exact: bool,
        shape: tuple[int, int, bool] = (192, 1088, True), biased: bool = True,
    ) -> None:  # fmt: skip
        d, n, gated = shape
        self.up, self.down = with_escapes(n, d, seed=1), with_escapes(n, d, seed=2)
        self.gate = with_escapes(n, d, seed=3) if gated else None
        self.act: ops.Activation = nn.SiLU() if gated else nn.ReLU()
        gate, up, down = (with_escapes(m, seed=4) if biased else None for m in (n, n, d))
        self.biases = ops.Biases(gate if gated else None, up, down)
        self.reader, self.stats, layout = reader, FlashStats(), BundleLayout(d, d, gated, torch.bfloat16, True)
        rows = BundleLayout(d, d, gated, torch.bfloat16).pack(self.up, self.down, self.gate)
        files = write_layers(folder, {"a": (layout, rows), "b": (layout, rows)})
        self.store = FlashStore(files, reader)
        self.stream = Stream(reader, step * layout.row_bytes, 3, self.stats)
        work, layers = WorkBuffers(), self.store.layers.values()
        self.engines = [
            SweepEngine(layer, self.stream, work, self.stats, pinned, 64, unpacked=False, exact=exact)
            for layer in layers
        ]
        assert self.stream.chunk_rows(0) == step

    def check(self, x: torch.Tensor, exact: bool) -> None:
        wanted = ops.dense_ffn(
            x, self.up, self.down.t().contiguous(), self.act, self.gate, self.biases.up, self.biases.gate,
            self.biases.down,
        )  # fmt: skip
        for engine in self.engines:
            got = engine.forward(x, self.act, self.biases)
            if exact:
                assert torch.equal(got, wanted)
            else:
                torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
            got.zero_()  # nobody else looks at it


@pytest.fixture(params=["threads", "uring"])
def reader(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    if request.param == "threads":
        reader: Reader = ThreadReader(2)
    else:
        try:
            reader = UringReader()
        except OSError as error:
            pytest.skip(f"no io_uring: {error}")
    yield reader
    reader.close()


@pytest.mark.parametrize("pinned", [0, 192, 1 << 20])
@pytest.mark.parametrize("exact", [EXACT, False])
def test_tokens(pinned: int, exact: bool, reader: Reader, tmp_path: Path) -> None:
    bench = Bench(tmp_path, reader, 96, pinned, exact)
    n_forwards = 0
    for seed, n_tokens in enumerate((3, 1, 1, 9, 1, 1, 2)):
        bench.check(with_escapes(1, n_tokens, 192, seed=10 + seed) * 8, exact)
        n_forwards += 2
    stats = bench.stats
    assert stats.neurons_wanted == 1088 * n_forwards == stats.neurons_hit + stats.neurons_read
    held = min(pinned, 1088)
    assert stats.neurons_hit == held * (n_forwards - 2), "what is pinned was read once for each layer"
    assert stats.wait_s > 0 and stats.compute_s > 0


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(64, 40, False), (192, 1088, True), (576, 1536, True), (128, 1027, False)])
@pytest.mark.parametrize("exact", [EXACT, False])
def test_shapes(shape: tuple[int, int, bool], biased: bool, exact: bool, reader: Reader, tmp_path: Path) -> None:
    bench = Bench(tmp_path, reader, 8, 16, exact, shape, biased)
    for seed in range(3):
        bench.check(with_escapes(1, 1, shape[0], seed=20 + seed) * 8, exact)


@pytest.mark.parametrize("exact", [EXACT, False])
def test_what_changes_between_tokens_is_noticed(exact: bool, reader: Reader, tmp_path: Path) -> None:
    bench = Bench(tmp_path, reader, 96, 96, exact)
    x = with_escapes(1, 1, 192, seed=30) * 8
    bench.check(x, exact)
    for bias in bench.biases:
        assert bias is not None
        bias.neg_()  # in place, as an optimizer does it
        bench.biases = ops.Biases(*bench.biases)  # another object, as FlashFFN says it
        bench.check(x, exact)
    bench.biases = bench.biases._replace(up=bench.biases.up * 2)
    bench.check(x, exact)
    bench.biases = ops.NO_BIASES
    bench.check(x, exact)
    bench.act = F.gelu
    bench.check(x, exact)
    bench.act = nn.Tanh()
    bench.check(x, exact)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(n_threads, 2))
    try:
        bench.check(x, exact)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("exact", [EXACT, False])
def test_a_failed_read(exact: bool, tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, reader, 96, 96, exact)
    x = with_escapes(1, 1, 192, seed=40)
    bench.check(x, exact)
    bench.stream.release()
    path = next(iter(bench.store.files.values()))
    whole = path.read_bytes()
    with open(path, "r+b") as file:  # the open descriptor sees it
        file.truncate(8192)
    with pytest.raises(ReadError, match="ended early"):
        bench.engines[0].forward(x, bench.act, bench.biases)
    path.write_bytes(whole)
    for _ in range(5):  # what was read ahead and failed is raised where it is used
        try:
            bench.check(x, exact)
        except ReadError:
            continue
        break
    bench.check(x, exact)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C in a finalizer is dropped
@pytest.mark.parametrize("exact", [EXACT, False])
def test_ctrl_c_at_any_moment(exact: bool, reader: Reader, tmp_path: Path) -> None:
    bench, generator, n_stopped = Bench(tmp_path, reader, 16, 192, exact), torch.Generator().manual_seed(1), 0

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(N_SIGNALS):
            x = with_escapes(1, 1, 192, seed=60 + i)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 4e-3 * float(torch.rand(1, generator=generator)))
                for _ in range(100):
                    bench.engines[i % 2].forward(x, bench.act, bench.biases)
            except KeyboardInterrupt:
                n_stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            bench.check(x, exact)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert n_stopped


def test_a_trace_has_every_chunk(tmp_path: Path, reader: Reader) -> None:
    bench = Bench(tmp_path, reader, 96, 96, False)
    x = with_escapes(1, 1, 192, seed=50)
    bench.check(x, False)
    recorder, read = trace.Recorder(), bench.stats.bytes_read
    trace.active = recorder
    try:
        bench.check(x, False)
        n_spans = len(recorder.spans)
        bench.check(x, False)
    finally:
        trace.active = None
    spans = recorder.spans
    names = [span.name for span in spans if span.layer == "a"]
    n_chunks = -(-(1088 - 96) // 96)
    assert names.count(trace.ARITHMETIC) == 2 * (1 + n_chunks)
    reads = [span for span in spans if span.track == trace.FLASH]
    assert all(span.name == trace.READ and span.stop >= span.start for span in reads)
    assert sum(span.args["bytes"] for span in reads) == pytest.approx(bench.stats.bytes_read - read, rel=0.2)
    assert n_spans < len(spans) and len({span.track for span in spans} - {trace.FLASH}) <= 3
    bench.check(x, False)
    assert len(recorder.spans) == len(spans), "nothing is noted afterwards"


@pytest.mark.parametrize("exact", [EXACT, False])
def test_kernels_are_compared_when_a_prompt_comes(exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: at the token behind it, when the memory that this takes was lent to others."""
    seen: list[int] = []
    true = PackedSum._understand

    def understand(self: PackedSum, act: ops.Activation, dtype: torch.dtype) -> None:
        seen.append(self.unit)
        true(self, act, dtype)

    monkeypatch.setattr(PackedSum, "_understand", understand)
    bench = Bench(tmp_path, ThreadReader(), 64, 0, exact)
    bench.check(torch.randn(12, 192).bfloat16(), False)
    assert seen == [0, 1]
    bench.check(torch.randn(1, 192).bfloat16(), exact)
    assert seen == [0, 1]
