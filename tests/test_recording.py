"""Recordings hold what the dense model computes, whoever ran it, and an interrupted one ends with the same bytes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers_e2e import load, load_any
from tiny_models import TINY, VOCAB
from transformers import PreTrainedModel

import hf_flash
from hf_flash.errors import CheckpointError, FlashError
from hf_flash.recording import Recording, record
from hf_flash.tap import tap


def batches(n: int = 3, shape: tuple[int, int] = (2, 12), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, shape, generator=generator) for _ in range(n)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flash_of(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    model.save_pretrained(folder / "stock")
    hf_flash.repack(folder / "stock", folder / "flash", progress=False)
    return load_any(folder / "flash", model, **options)


def test_rows_are_the_inputs_and_the_bits_of_the_dense_block(tmp_path: Path) -> None:
    model, ids = TINY["opt"](), batches()
    seen = record(model, ids, tmp_path, progress=False)
    assert seen.n_tokens == 3 * 24
    assert seen.ends == list(range(12, 73, 12))
    for i, name in enumerate(seen.layers):
        fc1, rows = model.get_submodule(name), []
        hook = fc1.register_forward_hook(lambda m, args, out, rows=rows: rows.append((args[0].flatten(0, -2), out)))
        with torch.no_grad():
            for batch in ids:
                model(batch)
        hook.remove()
        x = torch.cat([row for row, _ in rows])
        h = F.relu(torch.cat([out.flatten(0, -2) for _, out in rows]))
        assert torch.equal(seen.inputs(name), x), i
        assert torch.equal(seen.fired(name), h != 0)
        assert torch.equal(seen.fired(name, 5, 30), (h != 0)[5:30])
        assert 0.1 < float((h != 0).float().mean()) < 0.9
        assert seen.shape(name) == (x.shape[1], h.shape[1])


@pytest.mark.parametrize("gate", ["all", "certified"])
@pytest.mark.parametrize("name", ["opt", "llama-relu", "bloom", "t5"])
def test_a_model_on_flash_gives_the_dense_models_recording(name: str, gate: str, tmp_path: Path) -> None:
    model = TINY[name]()
    if gate == "certified" and name == "bloom":
        gate = "auto"  # GELU
    want = record(model, batches(), tmp_path / "dense", progress=False)
    got = record(flash_of(model, tmp_path, gate=gate), batches(), tmp_path / "got", progress=False)
    assert got.layers == want.layers
    assert got.ends == want.ends
    for layer in want.layers:
        torch.testing.assert_close(got.inputs(layer), want.inputs(layer))
        assert float((got.fired(layer) != want.fired(layer)).float().mean()) < 1e-3  # rounding, near zero


def test_a_tap_sees_the_values_of_a_silu_gate(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows: dict[str, torch.Tensor] = {}

        def observe(self, layer: str, x: torch.Tensor, activations: torch.Tensor) -> None:
            self.rows[layer] = activations

    model, kept = TINY["llama"](), [Kept(), Kept()]
    ids = batches(1)[0]
    for one, m in zip(kept, (model, flash_of(model, tmp_path)), strict=True):
        with torch.inference_mode(), tap(m, one) as blocks:
            m(ids)
        m(ids)  # no longer watched
        assert list(one.rows) == [block.path for block in blocks]
    mlp = model.model.layers[0].mlp
    assert kept[0].rows["model.layers.0.mlp"].shape == (24, mlp.gate_proj.out_features)
    for layer, rows in kept[0].rows.items():
        torch.testing.assert_close(kept[1].rows[layer], rows)
        assert (rows < 0).any()


@pytest.mark.parametrize("how", ["dense", "all", "certified"])
def test_an_interrupted_recording_ends_with_the_same_bytes(how: str, tmp_path: Path) -> None:
    model, ids = TINY["opt"](), batches(5)
    if how != "dense":
        model = flash_of(model, tmp_path, gate=how)
    record(model, ids, tmp_path / "whole", max_tokens=100, progress=False)

    def broken(at: int) -> Iterator[torch.Tensor]:
        for i, batch in enumerate(ids):
            if i == at:
                raise KeyboardInterrupt
            yield batch

    for at in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            record(model, broken(at), tmp_path / "again", max_tokens=100, progress=False)
        with pytest.raises(CheckpointError, match="stopped after"):
            Recording.open(tmp_path / "again")
    (tmp_path / "again" / "00000.inputs").open("ab").write(b"half a batch")
    again = record(model, ids, tmp_path / "again", max_tokens=100, progress=False)
    assert again.n_tokens == 100
    assert again.ends[-3:] == [84, 96, 100]
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_a_finished_recording_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["opt"]()
    record(model, batches(), tmp_path, progress=False)
    monkeypatch.setattr(type(model), "forward", None)
    monkeypatch.setattr(type(model.base_model), "forward", None)
    assert record(model, batches(), tmp_path, progress=False).n_tokens == 72


def test_another_model_or_text_is_refused(tmp_path: Path) -> None:
    model = TINY["opt"]()
    record(model, batches(), tmp_path, progress=False)
    with pytest.raises(FlashError, match="another text"):
        record(model, batches(seed=1), tmp_path, progress=False)
    with pytest.raises(FlashError, match="another text"):
        record(model, batches(2), tmp_path, progress=False)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[0, 0] += 1
    with pytest.raises(FlashError, match="another model"):
        record(model, batches(), tmp_path, progress=False)


def test_nothing_to_record_and_damaged_files_are_errors(tmp_path: Path) -> None:
    model = TINY["opt"]()
    with pytest.raises(FlashError, match="no token"):
        record(model, [], tmp_path / "none", progress=False)
    with pytest.raises(FlashError, match="expected \\[B, T\\]"):
        record(model, [torch.zeros(3, dtype=torch.int64)], tmp_path / "flat", progress=False)
    with pytest.raises(CheckpointError, match="no recording"):
        Recording.open(tmp_path / "nowhere")
    record(model, batches(), tmp_path / "cut", progress=False)
    with open(tmp_path / "cut" / "00001.fired", "r+b") as file:
        file.truncate(10)
    with pytest.raises(CheckpointError, match="10 bytes, expected 720"):
        Recording.open(tmp_path / "cut")
    state = json.loads((tmp_path / "cut" / "recording.json").read_text())
    (tmp_path / "cut" / "recording.json").write_text(json.dumps(state)[:-9])
    with pytest.raises(CheckpointError, match="torn"):
        Recording.open(tmp_path / "cut")


def test_the_shipped_model_under_a_cap_it_does_not_fit_into(
    flash_folder: Path, dense: PreTrainedModel, prompts: torch.Tensor, tmp_path: Path
) -> None:
    want = record(dense, [prompts], tmp_path / "dense", progress=False)
    model = load(flash_folder, hf_flash.smallest_cap(flash_folder, gate="all", context=256), gate="all")
    got = record(model, [prompts], tmp_path / "flash", progress=False)
    for layer in want.layers:
        torch.testing.assert_close(got.inputs(layer), want.inputs(layer))
        assert float((got.fired(layer) != want.fired(layer)).float().mean()) < 1e-4
