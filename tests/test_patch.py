"""patch: a model that is in memory goes to flash in one line, or stays as it is and says why."""

import copy
import gc
from pathlib import Path

import pytest
import torch
from helpers_e2e import assert_flash, assert_greedy, greedy, load, logits_of, plan_of
from tiny_models import TINY, model_inputs
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_flash
from hf_flash import FlashConfig
from hf_flash.errors import FlashConfigError, FlashError, MemoryCapError, UnknownArchitectureError

N = 12


@pytest.fixture
def stock(shipped: Path) -> PreTrainedModel:
    """The shipped model in memory, for this test alone."""
    return AutoModelForCausalLM.from_pretrained(shipped).eval()


def held_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_same_tokens_in_less_memory(
    gate: str, stock: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor, tmp_path: Path
) -> None:
    before = held_bytes(stock)
    model = hf_flash.patch(stock, memory="60MiB", gate=gate, context=128, cache_dir=tmp_path)
    assert model is stock
    assert_flash(model, dense)
    config, plan = dense.config, plan_of(model)
    n_ffn = config.num_hidden_layers * 2 * config.ffn_dim * config.hidden_size
    assert held_bytes(model) == before - 4 * n_ffn
    assert plan.memory == 60 << 20 and plan.total_bytes <= plan.memory and set(plan.gates.values()) == {gate}
    assert not plan.streamed  # what is in memory is not taken from there
    assert_greedy(greedy(model, prompts, N), greedy(dense, prompts, N), dense)


def test_every_way_to_say_it(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    inputs = model_inputs(dense)
    want = logits_of(dense, **inputs)
    ways = [
        lambda model: hf_flash.patch(model, "90MB"),
        lambda model: hf_flash.patch(model, memory=90_000_000),
        lambda model: hf_flash.patch(model, config=FlashConfig(memory="90MB", cache_dir=tmp_path)),
        lambda model: hf_flash.patch(model, memory="90MB", config=FlashConfig(memory="1GB", context=64)),
    ]
    for way in ways:
        model = way(copy.deepcopy(dense))
        assert plan_of(model).memory == 90_000_000
        torch.testing.assert_close(logits_of(model, **inputs), want, rtol=1e-5, atol=1e-5)


def test_the_callers_config_is_not_changed(stock: PreTrainedModel, tmp_path: Path) -> None:
    config = FlashConfig(memory="1GB", cache_dir=tmp_path)
    hf_flash.patch(stock, memory="90MB", config=config)
    assert config.memory == 1_000_000_000


def test_config_and_single_options_together_are_refused(stock: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(FlashConfigError, match="gate"):
        hf_flash.patch(stock, config=FlashConfig(memory="90MB", cache_dir=tmp_path), gate="all")
    assert not hf_flash.is_flash(stock)


def test_memory_from_the_environment(stock: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_MEMORY", "77MiB")
    assert plan_of(hf_flash.patch(stock, cache_dir=tmp_path)).memory == 77 << 20


def test_half_precision_and_a_model_without_a_file(prompts: torch.Tensor, tmp_path: Path) -> None:
    dense = TINY["llama-relu"]().to(torch.bfloat16)
    model = hf_flash.patch(copy.deepcopy(dense), memory="300MiB", gate="all", cache_dir=tmp_path)
    inputs = model_inputs(dense)
    got, want = logits_of(model, **inputs), logits_of(dense, **inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_patched_model_saves_loads_copies_and_cleans_up(
    dense: PreTrainedModel, prompts: torch.Tensor, tmp_path: Path
) -> None:
    cache, want = tmp_path / "cache", greedy(dense, prompts[:2], N)
    model = hf_flash.patch(copy.deepcopy(dense), memory="60MiB", context=128, cache_dir=cache)
    other = copy.deepcopy(model)
    assert len(list(cache.iterdir())) == 1
    model.save_pretrained(tmp_path / "saved")
    del model
    gc.collect()
    assert torch.equal(greedy(other, prompts[:2], N), want)
    other.save_pretrained(tmp_path / "other")
    assert len(list(cache.iterdir())) == 1
    del other
    gc.collect()
    assert not list(cache.iterdir())
    for name in ("saved", "other"):
        assert torch.equal(greedy(load(tmp_path / name, "60MiB"), prompts[:2], N), want)


def assert_unchanged(model: PreTrainedModel, before: torch.Tensor, ids: torch.Tensor, cache: Path) -> None:
    assert not hf_flash.is_flash(model) and not list(cache.iterdir())
    assert torch.equal(logits_of(model, input_ids=ids), before)
    assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
    assert getattr(model.config, "quantization_config", None) is None


def test_refusals_leave_the_model_as_it_was(
    stock: PreTrainedModel, prompts: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, cache = prompts[:2], tmp_path / "cache"
    cache.mkdir()
    before = logits_of(stock, input_ids=ids)
    with pytest.raises(MemoryCapError, match="smallest cap"):
        hf_flash.patch(stock, memory="1MiB", cache_dir=cache)
    assert_unchanged(stock, before, ids, cache)
    with pytest.raises(FlashConfigError, match="gate"):
        hf_flash.patch(stock, memory="90MB", gate="sometimes", cache_dir=cache)
    assert_unchanged(stock, before, ids, cache)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_flash.layout.BundleLayout.pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hf_flash.patch(stock, memory="90MB", cache_dir=cache)
    assert_unchanged(stock, before, ids, cache)
    hf_flash.patch(stock, memory="90MB", cache_dir=cache)
    torch.testing.assert_close(logits_of(stock, input_ids=ids), before, rtol=1e-5, atol=2e-5)
    with pytest.raises(FlashError, match="already"):
        hf_flash.patch(stock, memory="90MB", cache_dir=cache)


def test_models_that_cannot_be_patched(tmp_path: Path) -> None:
    mixture = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(UnknownArchitectureError, match="experts"):
        hf_flash.patch(AutoModelForCausalLM.from_config(mixture), memory="300MiB", cache_dir=tmp_path)
    with pytest.raises(FlashError):
        hf_flash.patch(nn.Sequential(nn.Linear(4, 4)), memory="300MiB", cache_dir=tmp_path)
    model = TINY["llama"]()
    model.is_quantized = True
    with pytest.raises(FlashConfigError, match="quantized"):
        hf_flash.patch(model, memory="300MiB", cache_dir=tmp_path)


def test_is_flash(stock: PreTrainedModel, tmp_path: Path) -> None:
    assert not hf_flash.is_flash(stock) and not hf_flash.is_flash(nn.Linear(1, 1))
    assert hf_flash.is_flash(hf_flash.patch(stock, memory="90MB", cache_dir=tmp_path))
