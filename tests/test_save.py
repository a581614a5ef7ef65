"""What save_pretrained writes loads again, wherever the model came from and whatever became of that place."""

import copy
import gc
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_e2e import assert_greedy, greedy, load, load_any, logits_of, plan_of, tightest_plan
from safetensors import safe_open
from tiny_models import TINY, model_inputs
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import hf_flash
from hf_flash.families import find_blocks
from hf_flash.quantizer import FlashQuantizer

N = 12
CapFor = Callable[..., int]


def assert_same(flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    assert hf_flash.is_flash(flash)
    assert_greedy(greedy(flash, prompts[:2], N), greedy(dense, prompts[:2], N), dense)


@pytest.mark.parametrize(("gate", "want"), [("all", "half"), ("all", "streamed"), ("certified", "all")])
def test_saved_folder_loads_with_nothing_passed_and_without_its_source(
    gate: str, want: str, flash_folder: Path, cap_for: CapFor, tmp_path: Path,
    dense: PreTrainedModel, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = shutil.copytree(flash_folder, tmp_path / "source")
    model = load(source, cap_for(gate, want), gate=gate)
    model.save_pretrained(tmp_path / "saved")
    del model
    gc.collect()
    shutil.rmtree(source)
    monkeypatch.setenv("HF_FLASH_MEMORY", "200MiB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert plan_of(again).memory == 200 << 20 and set(plan_of(again).gates.values()) == {gate}
    assert_same(again, dense, prompts)
    again.save_pretrained(tmp_path / "twice")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), dense, prompts)


def test_saved_folder_is_complete_small_and_shares_its_flash_files(flash_folder: Path, tmp_path: Path) -> None:
    load(flash_folder).save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    found = {path.name for path in (tmp_path / "saved").iterdir()}
    mine = {path.name for path in flash_folder.iterdir() if path.name.startswith(("flash", "gates"))}
    assert mine | {"config.json", "generation_config.json", "model.safetensors.index.json", "README.md"} <= found
    assert not [name for name in found if "partial" in name]
    for name in mine - {"flash.safetensors.index.json"}:
        a, b = flash_folder / name, tmp_path / "saved" / name
        assert a.read_bytes() == b.read_bytes()
        assert os.stat(a).st_dev != os.stat(b).st_dev or os.path.samefile(a, b)
    assert len([name for name in found if name.startswith("model-")]) > 1


def test_stock_transformers_refuses_a_saved_folder(
    flash_folder: Path, tmp_path: Path, dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(flash_folder).save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        guards = {name for name in file.keys() if 0 in file.get_slice(name).get_shape()}  # noqa: SIM118
    assert guards == {part.key for block in find_blocks(dense) for part in (block.up, block.down)}
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "hf_flash")  # as where nobody imported hf_flash
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_flash")
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


NAMES = ["llama", "llama-relu2-bias", "phi3", "gpt2", "bloom", "opt-plain", "t5", "bart", "apertus"]


@pytest.mark.parametrize("name", NAMES)
def test_families_loaded_from_stock_folders(name: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path / "stock")
    auto_of = type(TINY[name]())
    dense = auto_of.from_pretrained(tmp_path / "stock").eval()
    flash = load_any(tmp_path / "stock", dense, cache_dir=tmp_path / "cache")
    flash.save_pretrained(tmp_path / "saved")
    del flash
    gc.collect()
    shutil.rmtree(tmp_path / "stock")
    shutil.rmtree(tmp_path / "cache")
    again = load_any(tmp_path / "saved", dense)
    inputs = model_inputs(dense)
    torch.testing.assert_close(logits_of(again, **inputs), logits_of(dense, **inputs), rtol=1e-4, atol=1e-4)
    assert again.state_dict().keys() <= dense.state_dict().keys()


def test_saving_into_the_folder_that_it_was_loaded_from(
    flash_folder: Path, tmp_path: Path, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    folder = shutil.copytree(flash_folder, tmp_path / "model")
    model = load(folder)
    model.save_pretrained(folder)
    assert_same(model, dense, prompts)
    assert_same(load(folder), dense, prompts)


def test_saving_a_streamed_model_into_the_folder_that_it_was_loaded_from(tmp_path: Path) -> None:
    TINY["llama-relu"]().save_pretrained(tmp_path / "stock")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    folder = hf_flash.repack(tmp_path / "stock", tmp_path / "model", progress=False)
    with tightest_plan():
        model = load_any(folder, dense, gate="all")
    assert plan_of(model).streamed
    model.save_pretrained(folder)
    inputs = model_inputs(dense)
    for flash in (model, load_any(folder, dense)):
        torch.testing.assert_close(logits_of(flash, **inputs), logits_of(dense, **inputs), rtol=1e-4, atol=1e-4)


def test_saving_over_another_checkpoint_replaces_it(
    flash_folder: Path, tmp_path: Path, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    TINY["llama-relu"]().save_pretrained(tmp_path / "stock")
    hf_flash.repack(tmp_path / "stock", tmp_path / "model", progress=False)
    load(flash_folder).save_pretrained(tmp_path / "model")
    assert_same(load(tmp_path / "model"), dense, prompts)


def test_saving_after_the_source_was_deleted_says_so(flash_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(flash_folder, tmp_path / "source")
    model = load(source)
    shutil.rmtree(source)
    with pytest.raises(hf_flash.FlashError, match="source"):
        model.save_pretrained(tmp_path / "saved")


def test_model_runs_on_after_its_source_was_deleted(
    flash_folder: Path, tmp_path: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    for gate in ("all", "certified"):
        source = shutil.copytree(flash_folder, tmp_path / gate)
        model = load(source, cap_for(gate, "least"), gate=gate)
        shutil.rmtree(source)
        assert_same(model, dense, prompts)


def test_bf16_model_saves_bf16(flash_folder: Path, shipped: Path, tmp_path: Path, prompts: torch.Tensor) -> None:
    load(flash_folder, dtype="bfloat16", gate="all").save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", gate="all")
    assert again.dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(shipped, dtype="bfloat16").eval()
    want, got = logits_of(dense, input_ids=prompts), logits_of(again, input_ids=prompts)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_two_threads_save_one_model(
    flash_folder: Path, tmp_path: Path, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    model, failed = load(flash_folder), []

    def save(number: int) -> None:
        try:
            model.save_pretrained(tmp_path / str(number))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for number in range(3):
        assert_same(load(tmp_path / str(number)), dense, prompts)


# --- copies


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_copy_and_original_outlive_each_other(
    gate: str, flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    model = load(flash_folder, cap_for(gate, "half"), gate=gate)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    for one in (first, model, second):
        assert_same(one, dense, prompts)
    assert isinstance(first.hf_quantizer, FlashQuantizer)
    norms = [one.model.decoder.layers[0].self_attn_layer_norm.weight for one in (first, model)]
    assert norms[0].data_ptr() != norms[1].data_ptr()
    assert first.state_dict().keys() == model.state_dict().keys()
    del first
    gc.collect()
    assert_same(model, dense, prompts)
    del model, one
    gc.collect()
    assert_same(second, dense, prompts)


def test_copy_saves_itself_and_not_the_original(flash_folder: Path, tmp_path: Path, prompts: torch.Tensor) -> None:
    model = load(flash_folder)
    before = logits_of(model, input_ids=prompts)
    other = copy.deepcopy(model)
    with torch.no_grad():  # a bias inside an FFN, one that stands for fc2, and a norm
        other.model.decoder.layers[0].fc1.bias.add_(0.3)
        other.model.decoder.layers[1].fc2.bias.add_(0.3)
        other.model.decoder.final_layer_norm.weight.mul_(1.5)
    changed = logits_of(other, input_ids=prompts)
    assert not torch.allclose(changed, before, atol=0.1)
    assert torch.equal(logits_of(model, input_ids=prompts), before)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(load(tmp_path / "other"), input_ids=prompts), changed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(load(tmp_path / "model"), input_ids=prompts), before, rtol=1e-4, atol=1e-4)
