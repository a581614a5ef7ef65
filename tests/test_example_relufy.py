"""The ReLU-fying example at toy size: it recovers, resumes exactly, silences on request, and refuses what it must."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_hub import save_stock, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import hf_flash

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"tokens": 960, "seq": 16, "batch": 2, "lr": 3e-3, "warmup": 2, "points": 3, "eval-tokens": 256}


@pytest.fixture(scope="module")
def relufy(import_example: Callable[[str], Any]) -> Any:
    return import_example("relufy")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("relufy") / "silu", tiny_llama("silu", num_hidden_layers=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(f"w{words.randrange(3, 64)}" for _ in range(40)) for _ in range(40)))
    return path


def command(model: Path, out: Path, text: Path, **more: object) -> list[str]:
    options = {**TINY, **{name.replace("_", "-"): value for name, value in more.items()}}
    named = [f"--{name}={value}" for name, value in options.items()]
    return [str(model), str(out), "--text", str(text), "--valid", str(text), *named]


def facts_of(out: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((out / "relufy.json").read_text())
    return facts


def test_distillation_lowers_the_kl(relufy: Any, stock: Path, text: Path, tmp_path: Path) -> None:
    """As a user runs it: a stock folder with ReLU comes out, nearer to the original than the bare swap, and repacks."""
    out = tmp_path / "relu"
    relufy.main(command(stock, out, text, hidden_weight=0.5, lr=3e-4))
    facts = facts_of(out)
    assert [point["tokens"] for point in facts["curve"]] == [0, 320, 640, 960]
    assert 0 < facts["measured"]["kl"] < 0.7 * facts["curve"][0]["kl"]
    assert facts["measured"]["kl"] == pytest.approx(facts["curve"][-1]["kl"], rel=1e-3)
    assert 0.2 < facts["measured"]["zeros"] < 0.8 and facts["original_measured"]["zeros"] < 0.01
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.hidden_act == "relu"
    flash = hf_flash.repack(out, tmp_path / "flash", progress=False)
    assert set(hf_flash.plan(flash, memory="64MiB", context=32).gates.values()) == {"certified"}


def test_a_resumed_run_equals_the_unbroken_one(
    relufy: Any, stock: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Ctrl-C in the middle, then the same command: the same weights, bit for bit, and the same curve."""
    relufy.main(command(stock, tmp_path / "whole", text, penalty=0.1))
    step = relufy.Relufier.train_step

    def interrupted(self: Any, modules: Any) -> float:
        value = step(self, modules)
        if self.step == 13:
            signal.raise_signal(signal.SIGINT)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(relufy.Relufier, "train_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            relufy.main(command(stock, tmp_path / "parts", text, penalty=0.1))
    assert stop.value.code == 130 and not (tmp_path / "parts").exists()
    with pytest.raises(SystemExit, match=r"holds a run with lr 0.003, not 0.1.*--work-dir"):
        relufy.main(command(stock, tmp_path / "parts", text, penalty=0.1, lr=0.1))
    relufy.main(command(stock, tmp_path / "parts", text, penalty=0.1))
    assert "at step 13 of 30" in capsys.readouterr().err
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    curves = [[{**p, "seconds": 0} for p in facts_of(tmp_path / name)["curve"]] for name in ("whole", "parts")]
    assert curves[0] == curves[1]


def test_penalty_and_shift_silence(relufy: Any, stock: Path, text: Path, tmp_path: Path) -> None:
    zeros = {}
    for name, more in {"plain": {}, "penalty": {"penalty": 5.0, "penalty_from": 0.1}, "shift": {"shift": 0.3}}.items():
        relufy.main(command(stock, tmp_path / name, text, **more))
        zeros[name] = [point["zeros"] for point in facts_of(tmp_path / name)["curve"]]
    assert zeros["shift"][0] > zeros["plain"][0] + 0.05 and zeros["penalty"][0] == zeros["plain"][0]
    assert zeros["penalty"][-1] > zeros["plain"][-1] + 0.05, zeros
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shift")
    assert model.config.mlp_bias and model.model.layers[0].mlp.gate_proj.bias.mean() < -0.2
    flash = hf_flash.repack(tmp_path / "shift", tmp_path / "flash", progress=False)
    assert set(hf_flash.plan(flash, memory="64MiB", context=32).gates.values()) == {"certified"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"w3 w4", "2 tokens, 32 are needed"), (b"na\xefve", "not UTF-8"), (None, "no such file")],
)
def test_bad_text_is_refused(relufy: Any, stock: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        relufy.main(command(stock, tmp_path / "out", path))
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(relufy: Any, stock: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    relu = save_stock(tmp_path / "relu", tiny_llama("relu"))
    flash = hf_flash.repack(stock, tmp_path / "flash", progress=False)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    mistral = save_stock(tmp_path / "mistral", MistralForCausalLM(MistralConfig(**shape, **heads)))
    for model, more, message in (
        (relu, {}, "has ReLU already"),
        (flash, {}, "Give the stock checkpoint"),
        (tmp_path / "nothing", {}, "Name a folder or repo"),
        (mistral, {"shift": 0.1}, "has no mlp_bias"),
    ):
        with pytest.raises(SystemExit, match=message):
            relufy.main(command(model, tmp_path / "out", text, **more))
    with pytest.raises(SystemExit):
        relufy.main(command(stock, mistral, text))
    assert "holds a model that this script did not make" in capsys.readouterr().err
