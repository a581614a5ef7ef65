"""Calibration makes predictors that the gate runs on, says what they are worth, and survives being killed."""

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
from hf_flash.calibrate import WORK_NAME
from hf_flash.errors import CheckpointError, FlashConfigError, FlashError, MemoryCapError
from hf_flash.gate_file import GateFile
from hf_flash.store import GATES_NAME

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
    for gate in ("auto", "all"):
        got = logits_of(load(calibrated, gate=gate), input_ids=prompts[:2])
        assert torch.equal(got, logits_of(load(flash_folder, gate=gate), input_ids=prompts[:2]))


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
