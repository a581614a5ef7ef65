"""Planted OPT models fire what they should, and their layers are computed as transformers computes them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("models", "synthetic", "planted", "shards")


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("synthetic")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def folder(synthetic: ModuleType, tmp_path: Path) -> Path:
    return synthetic.planted_opt(tmp_path / "synthetic-tiny-opt", "tiny-opt", firing=0.05)


def test_the_planted_share_fires(folder: Path) -> None:
    found = json.loads((folder / "planted.json").read_text())
    assert found["synthetic"] and len(found["layers"]) == 4
    assert 0.03 < found["least"] <= found["firing"] <= found["most"] < 0.07
    assert found["hits"] > 0.5, "neighbouring tokens share neurons"
    assert found["union"] < 0.3
    card = (folder / "README.md").read_text()
    assert "SYNTHETIC" in card and f"{found['firing']:.2%}" in card


def test_layers_are_those_of_transformers(folder: Path, synthetic: ModuleType) -> None:
    planted = synthetic.planted
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = planted.random_ids(model.config, 40, seed=9)
    fired: list[torch.Tensor] = []
    for layer in model.model.decoder.layers:
        layer.activation_fn.register_forward_hook(lambda _, __, out: fired.append((out != 0).reshape(len(ids), -1)))
    with torch.no_grad():
        model(ids[None])
    found = planted.measure(folder, ids)
    assert [row["firing"] for row in found["layers"]] == pytest.approx([f.float().mean().item() for f in fired])
    assert found["layers"][-1]["hits"] == pytest.approx(planted.overlap(fired[-1])["hits"])


def test_greedy_tokens_vary_and_are_far_from_ties(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    new = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)[0, 16:].tolist()
    assert len(set(new)) > 8


def test_the_random_llama_is_the_same_as_ever(synthetic: ModuleType, tmp_path: Path) -> None:
    """Measured results name it: its weights must not change with this file."""
    folder = synthetic.random_llama(tmp_path / "tiny", "tiny")
    first = load_file(folder / "model-00001-of-00006.safetensors")["model.embed_tokens.weight"]
    assert first.shape == (512, 64) and first.flatten()[:3].tolist() == [-0.15234375, -0.0751953125, -0.0654296875]
    assert synthetic.in_words("random-llama") == "RANDOM weights, synthetic (Llama shape, 1.104 B parameters)"
    assert "synthetic" in synthetic.in_words("opt-1.3b") and "1.316 B" in synthetic.in_words("opt-1.3b")
