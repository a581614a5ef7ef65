"""Every spelling of an FFN gives the dense model's logits and tokens: from a stock folder, repacked, and patched."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers_e2e import assert_flash, auto_class, load_any, logits_of, plan_of
from tiny_models import TINY, generate_kwargs, model_inputs
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_flash
from hf_flash import FlashConfig
from hf_flash.families import FATReLU, find_blocks, get_activation, zero_below

Stock = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stock]:
    """A tiny model's folder as save_pretrained writes it, and what stock transformers loads from it: the oracle."""

    @cache
    def make(name: str) -> Stock:
        TINY[name]().save_pretrained(folder := tmp_path_factory.mktemp(name))
        with torch.device("meta"):
            auto = auto_class(TINY[name]())
        return folder, auto.from_pretrained(folder).eval()

    return make


def sparse(model: PreTrainedModel) -> bool:
    """Whether gate `certified` can be had for every block."""
    return all(zero_below(get_activation(model, block)) is not None for block in find_blocks(model))


with torch.device("meta"):
    SPARSE = [name for name, build in TINY.items() if sparse(build())]


def assert_same(flash: PreTrainedModel, dense: PreTrainedModel, generate: bool = True) -> None:
    """Logits within float32's rounding, and the same greedy tokens."""
    assert_flash(flash, dense)
    for shape in ((2, 7), (1, 1)):
        inputs = model_inputs(dense, *shape)
        torch.testing.assert_close(logits_of(flash, **inputs), logits_of(dense, **inputs), rtol=1e-4, atol=1e-4)
    if generate:
        assert torch.equal(flash.generate(**generate_kwargs(dense)), dense.generate(**generate_kwargs(dense)))


@pytest.mark.parametrize("name", TINY)
def test_stock_folder(name: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock(name)
    flash = load_any(folder, dense, gate="all", cache_dir=tmp_path)
    assert set(plan_of(flash).gates.values()) == {"all"}
    assert_same(flash, dense)


@pytest.mark.parametrize("name", SPARSE)
def test_certified_gate(name: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock(name)
    flash = load_any(folder, dense, gate="certified", cache_dir=tmp_path)
    assert set(plan_of(flash).gates.values()) == {"certified"}
    assert_same(flash, dense)
    stats = hf_flash.stats(flash)
    assert 0 < stats.neurons_fired <= stats.neurons_wanted


@pytest.mark.parametrize("name", TINY)
def test_repacked_folder_with_nothing_passed(
    name: str, stock: Callable[[str], Stock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, dense = stock(name)
    out = hf_flash.repack(folder, tmp_path / "flash", progress=False)
    monkeypatch.setenv("HF_FLASH_MEMORY", "300MiB")
    flash = auto_class(dense).from_pretrained(out)
    assert plan_of(flash).memory == 300 << 20
    assert set(plan_of(flash).gates.values()) == {"certified" if name in SPARSE else "all"}
    assert_same(flash, dense, generate=False)


@pytest.mark.parametrize("name", TINY)
def test_patched(name: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    _, dense = stock(name)
    flash = hf_flash.patch(copy.deepcopy(dense), memory="300MiB", cache_dir=tmp_path)
    assert_same(flash, dense, generate=False)


def test_memory_by_default_is_what_the_machine_has(stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("llama")
    out = hf_flash.repack(folder, tmp_path / "flash", progress=False)
    flash = AutoModelForCausalLM.from_pretrained(out)
    assert plan_of(flash).memory > 50 << 20
    assert_same(flash, dense)


def test_the_list_of_sparse_models_is_what_the_names_say() -> None:
    assert {"opt", "llama-relu", "llama-relu2-bias", "nemotron", "t5", "m2m_100", "xlm-relu"} <= set(SPARSE)
    assert not {"llama", "gpt2", "bloom", "phi3", "t5-gated", "llama-prelu"} & set(SPARSE)


def test_gate_certified_is_refused_where_it_cannot_be_had(stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("llama")
    with pytest.raises(hf_flash.FlashError, match="certified"):
        load_any(folder, dense, gate="certified", cache_dir=tmp_path)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_fatrelu_patched(threshold: float, tmp_path: Path) -> None:
    dense = TINY["llama-relu"]()
    for layer in dense.model.layers:
        layer.mlp.act_fn = FATReLU(threshold)
    flash = hf_flash.patch(copy.deepcopy(dense), config=FlashConfig(memory="300MiB", cache_dir=tmp_path))
    assert set(plan_of(flash).gates.values()) == {"certified"}
    assert_same(flash, dense)
