"""Calibration makes predictors that the gate runs on, says what they are worth, and survives being killed."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_e2e import ROOMY, load, logits_of
from tiny_models import TINY
from transformers import PreTrainedModel

import hf_flash
from hf_flash import fit
from hf_flash.cache import HALF_LIFE_OF_KNOWN
from hf_flash.calibrate import WORK_NAME
from hf_flash.errors import CheckpointError, FlashConfigError, FlashError, MemoryCapError
from hf_flash.gate_file import GateFile
from hf_flash.sparse import SparseEngine
from hf_flash.store import GATES_NAME
from hf_flash.window import NOTHING

DOCS = Path(__file__).parent.parent / "docs"
QUICK: dict[str, Any] = {"max_tokens": 3072, "epochs": 1, "precision": 0.1, "memory": ROOMY, "progress": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own pages: some 20,000 words."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))))
    return path


@pytest.fixture(scope="module")
def calibrated(flash_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "relu"
    made = hf_flash.calibrate(flash_folder, text, folder, lookahead=True, **QUICK)
    assert made.folder == folder
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["calibration"]


def test_the_report_says_what_the_predictors_do(calibrated: Path) -> None:
    report = report_of(calibrated)
    assert report["text"] == "pages.txt"
    assert 2560 <= report["n_tokens"] <= 3072
    assert report == GateFile(calibrated / GATES_NAME).calibration
    for name, n_layers, least in (("predicted", 4, 0.97), ("lookahead", 3, 0.85)):
        part = report[name]
        assert len(part["layers"]) == n_layers
        assert least < part["recall"] < 1
        assert part["fired"] < part["wanted"] < 0.9
        assert part["precision"] == pytest.approx(part["recall"] * part["fired"] / part["wanted"], rel=1e-2)
        assert part["n_bytes"] == sum(row["n_bytes"] for row in part["layers"])
        for row in part["layers"]:
            assert row["rank"] in (16, 32, 64)
            assert f"| `{row['layer']}` | {row['rank']} |" in (calibrated / "README.md").read_text()
    assert [row["from"] for row in report["lookahead"]["layers"]] == [
        row["layer"] for row in report["predicted"]["layers"][:-1]
    ]
    assert not (calibrated / WORK_NAME).exists()
    assert hf_flash.verify(calibrated, progress=False).ok


def test_the_gate_runs_on_them(calibrated: Path, dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    model = load(calibrated, gate="predicted")
    want, got = logits_of(dense, input_ids=prompts[:4]), logits_of(model, input_ids=prompts[:4])
    loss = torch.nn.functional.kl_div(got.log_softmax(-1), want.log_softmax(-1), reduction="none", log_target=True)
    assert 0 < float(loss.sum(-1).mean()) < 0.2
    stats, report = hf_flash.stats(model), report_of(calibrated)["predicted"]
    assert stats.plan["parts"]["gates"] == report["n_bytes"]
    out = load(calibrated, gate="predicted", lookahead=True).generate(prompts[:1], max_new_tokens=5, do_sample=False)
    assert out.shape[1] == prompts.shape[1] + 5


def test_what_was_there_stays(calibrated: Path, flash_folder: Path, prompts: torch.Tensor) -> None:
    before, after = GateFile(flash_folder / GATES_NAME), GateFile(calibrated / GATES_NAME)
    assert after.sketches == before.sketches
    assert not before.predictors
    same = [logits_of(load(folder, gate="all"), input_ids=prompts[:2]) for folder in (calibrated, flash_folder)]
    assert torch.equal(*same)
    # Fewer neurons are wanted in vain, so sums have other zeros in them.
    near = [logits_of(load(folder), input_ids=prompts[:2]) for folder in (calibrated, flash_folder)]
    torch.testing.assert_close(*near, rtol=1e-5, atol=1e-4)


def test_what_is_usual_is_in_the_report_and_the_file(calibrated: Path) -> None:
    part, file = report_of(calibrated)["usual"], GateFile(calibrated / GATES_NAME)
    assert len(part["layers"]) == 4 and part["text"] == "pages.txt"
    for row in part["layers"]:
        assert 0.1 < row["rest"] < 0.95 and 0 < row["fired"] < 0.5
        assert file.usual[row["layer"]]["rest"] == pytest.approx(row["rest"], abs=1e-4)
        use = file.use(row["layer"])
        assert use is not None and float(use.mean()) == pytest.approx(row["fired"], abs=1e-5)
        assert file.knows(row["layer"])
    assert "## What is usual" in (calibrated / "README.md").read_text()


def test_what_is_known_of_errors_is_that_of_the_weights(calibrated: Path, dense: PreTrainedModel) -> None:
    file = GateFile(calibrated / GATES_NAME)
    for i, layer in enumerate(dense.model.decoder.layers):
        path = f"model.decoder.layers.{i}.fc1"
        for bits in (4, 6, 8):
            sketch = file.sketch(path, bits)
            assert sketch.known is not None and set(sketch.known.codes) == {4, bits}
            want = sketch.knowing(layer.fc1.weight.detach(), sketch.known.directions).known
            assert want is not None
            for b in {4, bits}:
                assert torch.equal(sketch.known.codes[b], want.codes[b])
                assert torch.equal(sketch.known.steps[b], want.steps[b])
        assert file.sketch(path, 8, known=False).known is None


def test_what_is_usual_makes_the_certified_gate_read_less(
    calibrated: Path, flash_folder: Path, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    """The same tokens, of fewer neurons that are wanted and with fewer reads; and slots are full before the first."""
    found: dict[Path, Any] = {}
    for folder in (flash_folder, calibrated):
        model = load(folder, memory=ROOMY)
        engines = [m.engine for m in model.modules() if isinstance(getattr(m, "engine", None), SparseEngine)]
        assert [e.gate.sketch.known is not None for e in engines] == [folder is calibrated] * 4
        for cache in (engine.cache for engine in engines):
            n_known = int((cache.window.worth() > NOTHING).sum())
            assert (n_known > 0) is (folder is calibrated)
            assert cache.n_used == min(cache.n_slots, n_known)
        for engine in engines:
            assert engine.cache.window.half_life == (HALF_LIFE_OF_KNOWN if folder is calibrated else 64)
        stats = hf_flash.stats(model)
        before = stats.counters()
        out = model.generate(prompts[:1], max_new_tokens=24, min_new_tokens=24, do_sample=False)
        found[folder] = out, {k: v - before[k] for k, v in stats.counters().items()}
    assert torch.equal(found[flash_folder][0], found[calibrated][0])
    plain, known = found[flash_folder][1], found[calibrated][1]
    assert known["neurons_fired"] == plain["neurons_fired"]
    assert known["neurons_wanted"] < plain["neurons_wanted"]
    assert known["n_reads"] < plain["n_reads"]


def test_the_certified_gate_alone_takes_no_training(
    calibrated: Path, flash_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report says what it learned and from what; what an earlier run trained stays, and is not trained again."""
    monkeypatch.setattr(importlib.import_module("hf_flash.calibrate"), "fit", None)
    alone = hf_flash.calibrate(flash_folder, text, tmp_path / "alone", gate="certified", **QUICK)
    assert set(alone.report) == {"text", "n_tokens", "usual"}
    assert not GateFile(alone.folder / GATES_NAME).predictors
    folder = shutil.copytree(calibrated, tmp_path / "copy")
    ids = torch.randint(3, 4000, (20, 128), generator=torch.Generator().manual_seed(0))
    again = hf_flash.calibrate(folder, ids, gate="certified", **QUICK)
    assert again.report["usual"]["text"] == "token ids" and again.report["usual"]["n_tokens"] == 2560
    assert again.report["predicted"] == report_of(calibrated)["predicted"] and again.report["text"] == "pages.txt"
    file, before = GateFile(folder / GATES_NAME), GateFile(calibrated / GATES_NAME)
    for path in before.predictors:
        assert torch.equal(file.predictor(path).outer, before.predictor(path).outer)
        assert not torch.equal(file.use(path), before.use(path))
    assert (folder / "README.md").read_text().count("## What is usual") == 1
    assert (folder / "README.md").read_text().count("## Predictors") == 1


def test_what_calibration_cannot_do_is_refused(flash_folder: Path, text: Path) -> None:
    with pytest.raises(FlashConfigError, match="gate='all': calibration is for 'certified' or 'predicted'"):
        hf_flash.calibrate(flash_folder, text, gate="all", **QUICK)
    with pytest.raises(FlashConfigError, match="leave one of them out"):
        hf_flash.calibrate(flash_folder, text, gate="certified", lookahead=True, **QUICK)
    for ids, why in (
        (
            torch.zeros(3, 5, dtype=torch.int64),
            r"shape \(3, 5\), int64: expected whole numbers \[n_sequences, length\]",
        ),
        (torch.zeros(20, 128), r"float32: expected whole numbers"),
        (torch.zeros(2, 4096, dtype=torch.int64), "Sequences of 4096 token ids: [0-9]+ are the most"),
        (torch.full((20, 128), 10**6), "from 1000000 to 1000000, but the model knows 0 to [0-9]+: are they"),
        (torch.full((20, 128), -1), "from -1 to -1"),
    ):
        with pytest.raises(FlashConfigError, match=why):
            hf_flash.calibrate(flash_folder, ids, gate="certified", **QUICK)


def test_in_place_and_again(calibrated: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(calibrated, tmp_path / "copy")
    made = hf_flash.calibrate(folder, text, **QUICK)
    assert made.folder == folder
    assert "lookahead" not in report_of(folder)
    file = GateFile(folder / GATES_NAME)
    assert not file.lookahead
    assert not any("lookahead" in name for name in file._file.entries)
    same = GateFile(calibrated / GATES_NAME)
    for path in file.predictors:
        assert torch.equal(file.predictor(path).outer, same.predictor(path).outer)
    assert (folder / "README.md").read_text().count("## Predictors") == 1


def test_a_stock_model_is_repacked_first(shipped: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fit, "ranks_for", lambda n, d: [2])
    with pytest.raises(CheckpointError, match="--output FOLDER"):
        hf_flash.calibrate(shipped, text, **QUICK)
    hf_flash.calibrate(shipped, text, tmp_path / "made", **QUICK)
    assert hf_flash.verify(tmp_path / "made", progress=False).ok
    assert len(report_of(tmp_path / "made")["predicted"]["layers"]) == 4
    hf_flash.repack(shipped, tmp_path / "made", progress=False)  # given again: nothing of it is lost
    assert len(report_of(tmp_path / "made")["predicted"]["layers"]) == 4
    assert "## Predictors" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize("content,match", [
    (b"", "is empty"), (b"Once upon a time. ", "too short"), (b"word " * 700, "too few, 2048"), (b"\xff\xfe", "UTF-8"),
])  # fmt: skip
def test_texts_that_teach_nothing_are_refused(content: bytes, match: str, flash_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(FlashConfigError, match=match):
        hf_flash.calibrate(flash_folder, tmp_path / "t", tmp_path / "out", **QUICK)


def test_arguments_that_cannot_be_are_refused(flash_folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FlashConfigError, match="max_tokens=100"):
        hf_flash.calibrate(flash_folder, text, tmp_path / "out", max_tokens=100)
    with pytest.raises(FlashConfigError, match="recall=2"):
        hf_flash.calibrate(flash_folder, text, tmp_path / "out", recall=2)
    with pytest.raises(MemoryCapError, match=r"--memory [0-9]+MiB"):
        hf_flash.calibrate(flash_folder, text, tmp_path / "out", **{**QUICK, "memory": "20MiB"})
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "tokenizer_config.json").unlink()
    with pytest.raises(FlashError, match=r"not this model's|no tokenizer"):
        hf_flash.calibrate(tmp_path / "out", text, **QUICK)


def test_another_checkpoint_is_not_written_into(calibrated: Path, shipped: Path, text: Path, tmp_path: Path) -> None:
    TINY["opt"]().save_pretrained(tmp_path / "stock")
    other = hf_flash.repack(tmp_path / "stock", tmp_path / "other", progress=False)
    before = (other / "config.json").read_bytes()
    for model in (calibrated, shipped):
        with pytest.raises(CheckpointError, match="holds another checkpoint"):
            hf_flash.calibrate(model, text, other, **QUICK)
    assert (other / "config.json").read_bytes() == before


def test_the_model_is_run_under_the_cap(flash_folder: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    caps = []
    module = sys.modules["hf_flash.calibrate"]
    record = module.record

    def spy(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        plan = model._hf_flash.plan
        caps.append((plan.memory, plan.total_bytes, set(plan.gates.values()), sum(plan.pinned_rows.values())))
        return record(model, *args, **kwargs)

    monkeypatch.setattr(module, "record", spy)
    monkeypatch.setattr(fit, "ranks_for", lambda n, d: [2])
    cap = hf_flash.smallest_cap(flash_folder, gate="all", context=512)
    hf_flash.calibrate(flash_folder, text, tmp_path / "out", **{**QUICK, "memory": cap})
    assert caps[0][0] == cap >= caps[0][1]
    assert caps[0][2] == {"all"}
    assert caps[0][3] < 4 * 1536


@pytest.mark.slow
def test_killed_half_way_it_ends_with_the_same_bytes(flash_folder: Path, text: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(flash_folder, tmp_path / name) for name in ("whole", "killed")]
    quick = {**QUICK, "memory": "100MiB"}
    hf_flash.calibrate(folders[0], text, **quick)
    command = [
        sys.executable, "-m", "hf_flash", "calibrate", str(folders[1]), "--text", str(text), "--max-tokens", "3072",
        "--epochs", "1", "--precision", "0.1", "--memory", "100MiB",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((folders[1] / WORK_NAME).glob("*/*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not GateFile(folders[1] / GATES_NAME).predictors
    kept = {path: path.stat().st_mtime_ns for path in (folders[1] / WORK_NAME).glob("*/*.safetensors")}
    assert 2 <= len(kept) < 4
    made = hf_flash.calibrate(folders[1], text, **quick)
    assert made.report == report_of(folders[0]) == report_of(folders[1])
    one, other = ((folder / GATES_NAME).read_bytes() for folder in folders)
    assert one == other


def test_another_text_starts_anew(flash_folder: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fit, "ranks_for", lambda n, d: [2])
    folder = shutil.copytree(flash_folder, tmp_path / "model")
    module = sys.modules["hf_flash.calibrate"]
    with monkeypatch.context() as patch, pytest.raises(FlashError, match="stopped"):
        patch.setattr(module, "_publish", lambda *args: (_ for _ in ()).throw(FlashError("stopped")))
        hf_flash.calibrate(folder, text, **QUICK)
    assert len(list((folder / WORK_NAME).iterdir())) == 1
    (tmp_path / "other").write_text(text.read_text()[5000:])
    hf_flash.calibrate(folder, tmp_path / "other", **QUICK)
    assert report_of(folder)["text"] == "other"
    assert not (folder / WORK_NAME).exists()
