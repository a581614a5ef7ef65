"""Each rung of the ladder is really run: it reads what it says, and answers as the dense model does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_e2e import greedy
from helpers_flash import FakeReader, random_bytes, write_layers
from helpers_hub import PROMPT, save_stock, tiny_llama, tiny_opt
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_flash
from hf_flash import FlashConfig, budget, ladder
from hf_flash.cache import NeuronCache
from hf_flash.cli import app
from hf_flash.errors import FlashConfigError, FlashError, MemoryCapError
from hf_flash.layout import BundleLayout
from hf_flash.preview import look
from hf_flash.readers import ThreadReader, UnbundledReader, open_reader
from hf_flash.stats import FlashStats
from hf_flash.store import FlashStore
from hf_flash.stream import Stream

N = 6


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_opt()
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data -= 1.5  # so that few neurons fire
    stock = save_stock(tmp_path_factory.mktemp("ladder") / "stock", model)
    return hf_flash.repack(stock, stock.parent / "flash", progress=False)


def climbed(folder: Path, n_tokens: int = N) -> ladder.Ladder:
    preview = look(folder, FlashConfig(context=96))
    preview = preview.with_options(memory=ladder.half_cap(preview))
    rungs, left_out = ladder.rungs_for(preview)
    return ladder.climb(preview, PROMPT, n_tokens, rungs, left_out)


def test_every_rung_reads_what_it_says(relu: Path) -> None:
    found = climbed(relu)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["naive", "half resident", "+ gate", "+ window", "+ bundling", "+ overlap"]
    preview = look(relu, FlashConfig(context=96))
    matrices = sum(m.flash_bytes for m in preview.demand.matrices if not m.lookup)
    everything = preview.ffn_bytes + matrices
    assert everything <= rows["naive"].bytes_per_token < 1.1 * everything + 65536
    assert rows["half resident"].bytes_per_token < rows["naive"].bytes_per_token
    assert rows["+ gate"].bytes_per_token < preview.ffn_bytes
    assert rows["+ window"].bytes_per_token < rows["+ gate"].bytes_per_token
    assert rows["+ window"].reads_per_token > rows["+ bundling"].reads_per_token
    assert rows["+ gate"].dram_bytes < rows["+ window"].dram_bytes
    for row in found.rows:
        assert row.n_tokens == N and row.token_s > 0 and row.tokens_per_s == 1 / row.token_s
        assert row.io_s + row.memory_s + row.compute_s == pytest.approx(row.token_s)
        assert min(row.io_s, row.memory_s, row.compute_s) >= 0


def test_the_answer_is_the_dense_models(relu: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(relu.parent / "stock").eval()
    found = climbed(relu)
    n = len(found.token_ids)
    assert found.token_ids == greedy(stock, PROMPT, n)[0, PROMPT.shape[1] :].tolist()


def test_rungs_that_save_nothing_are_left_out_and_said(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock", tiny_llama("silu"))
    found = climbed(hf_flash.repack(stock, tmp_path / "flash", progress=False))
    assert [row.name for row in found.rows] == ["naive", "half resident", "+ overlap"]
    assert "every token needs every neuron" in found.left_out
    half, overlap = found.rows[1:]
    ahead = budget.MIN_BUFFERS * budget.MIN_CHUNK_BYTES  # what is under way as the count begins and as it ends differs
    assert half.dram_bytes == overlap.dram_bytes
    assert abs(half.bytes_per_token - overlap.bytes_per_token) * half.n_tokens <= ahead


def test_different_answers_are_no_table(relu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ladder._run

    def wrong(preview, rung, *args):
        row, answer = run(preview, rung, *args)
        return row, ([*answer[:3], answer[3] + 1, *answer[4:]] if rung.name == "+ window" else answer)

    monkeypatch.setattr(ladder, "_run", wrong)
    with pytest.raises(FlashError, match=r"'\+ window' answered differently"):
        climbed(relu, 2)


def test_the_command(relu: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(relu), "--tokens", "2", "--json", "--ladder", "--prompt", "w3 w9"])
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures["rows"]) == 6 and figures["rows"][0]["n_tokens"] == 2
    done = CliRunner().invoke(app, ["bench", str(relu), "--tokens", "2", "--prompt", "w3 w9"])
    assert done.exit_code == 0 and "tokens/s" in done.stdout and "naive" not in done.stdout
    done = CliRunner().invoke(app, ["bench", str(relu), "--memory", "1MiB", "--ladder"])
    assert done.exit_code == 1 and "smallest that would do is" in done.stderr and "--memory" in done.stderr


def test_a_model_without_tokenizer_gets_random_tokens(relu: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(relu, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    done = CliRunner().invoke(app, ["bench", str(bare), "--tokens", "2"])
    assert done.exit_code == 0 and "32 random tokens" in done.stderr
    done = CliRunner().invoke(app, ["bench", str(bare), "--prompt", "w3"])
    assert done.exit_code == 1 and "error:" in done.stderr


def test_seconds_under_way_are_counted_once() -> None:
    assert ladder._union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert ladder._union([]) == 0


# What is switched off ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["threads", "auto"])
@pytest.mark.parametrize("n_pieces", [2, 3])
@pytest.mark.parametrize("row_bytes", [512, 1024, 1536, 4096, 3584])
def test_pieces_have_the_same_bytes_and_reads_of_their_own(
    row_bytes: int, n_pieces: int, reader: str, tmp_path: Path
) -> None:
    data = random_bytes((40, row_bytes))
    path = tmp_path / "rows"
    path.write_bytes(bytes(8192) + data.numpy().tobytes())
    below = open_reader(reader)
    apart = UnbundledReader(below, n_pieces)
    rows, slots = np.array([0, 1, 2, 7, 30, 31, 39]), np.array([4, 0, 6, 1, 2, 8, 5])
    memory = hf_flash.memory.aligned_empty(10 * row_bytes)
    view = hf_flash.memory.view_bytes(memory)
    args = (apart.open(path), 8192, row_bytes, rows, view, slots, 8, memoryview(bytearray(8 * row_bytes)))
    ticket, n_bytes, n_reads = apart.submit_rows(*args)
    ticket.wait()
    assert ticket.ready()
    assert torch.equal(memory.view(10, row_bytes)[torch.from_numpy(slots)], data[torch.from_numpy(rows)])
    assert n_reads == n_pieces * len(rows)
    whole_blocks = sum(
        -(-((i + 1) * row_bytes // 512) // n_pieces) - i * row_bytes // 512 // n_pieces for i in range(n_pieces)
    )
    assert n_bytes == 512 * whole_blocks * len(rows) >= row_bytes * len(rows)
    apart.close()


def test_nothing_is_read_during_arithmetic(tmp_path: Path) -> None:
    layout = BundleLayout(128, 128, False, torch.float32)
    rows = {f"m.{i}": random_bytes((37, layout.row_bytes), i) for i in range(3)}
    reader = FakeReader(late=True)
    store = FlashStore(write_layers(tmp_path, {name: (layout, r) for name, r in rows.items()}), reader)
    stream = Stream(reader, 4 * layout.row_bytes, 3, FlashStats(), overlap=False)
    units = {name: stream.add(store.layers[name].rows) for name in rows}
    for _ in range(3):
        for name, unit in units.items():
            with stream.unit(unit) as chunks:
                for start, stop, got in chunks:
                    assert all(pending.ticket.ready() for pending in stream._pending)
                    before = len(reader.log)
                    assert torch.equal(got, rows[name][start:stop])
                    assert len(reader.log) == before
    assert len(reader.log) in range(3 * 3 * 10, 3 * 3 * 10 + 3)  # each chunk once, and the ring's beginning of a fourth


def test_a_cache_without_window_keeps_nothing(tmp_path: Path) -> None:
    layout = BundleLayout(128, 128, False, torch.float32)
    files = write_layers(tmp_path, {"m": (layout, random_bytes((20, layout.row_bytes)))})
    stats, wanted = FlashStats(), np.array([1, 5, 6])
    store = FlashStore(files, ThreadReader())
    for keeps, hits in ((True, 3), (False, 0)):
        cache = NeuronCache(store, store.layers["m"], 10, 0, stats, keeps=keeps)
        cache.pass_begins(1)
        cache.fetch(wanted).ticket.wait()
        stats.reset()
        cache.pass_begins(1)
        cache.fetch(wanted)
        assert stats.neurons_hit == hits
    assert stats.cache_bytes == 2 * 3 * layout.row_bytes
    store.close()


def test_a_plan_without_residents(relu: Path) -> None:
    preview = look(relu, FlashConfig("64MiB", gate="all", context=96))
    plan = preview.with_options(without=("residents",)).plan()
    assert plan.parts["FFN cache"] == 0 and not any(plan.pinned_rows.values())
    assert len(plan.streamed) == len(preview.demand.matrices) > len(preview.plan().streamed)
    with pytest.raises(MemoryCapError):
        preview.with_options(without=("residents",), memory=1 << 20).plan()


def test_unknown_words_are_refused() -> None:
    assert FlashConfig(without="window").without == ("window",)
    with pytest.raises(FlashConfigError, match=r"without='windows' is unknown.*'window'"):
        FlashConfig(without=["windows"])
