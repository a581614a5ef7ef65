"""A plan made from headers is the plan that from_pretrained makes, and asks no repo for its weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_hub import FakeHub, save_stock, tiny_llama, tiny_opt, use_hub
from tiny_models import TINY
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_flash
from hf_flash import FlashConfig, preview
from hf_flash.errors import CheckpointError, FlashConfigError, HubError, MemoryCapError, UnknownArchitectureError

CAP = 48 << 20


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("preview") / "stock", tiny_llama())


@pytest.fixture(scope="module")
def flash(stock: Path) -> Path:
    return hf_flash.repack(stock, stock.parent / "flash", max_shard_size="100KB", progress=False)


def loaded_plan(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> dict[str, Any]:
    loading = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    model = auto.from_pretrained(folder, quantization_config=FlashConfig(**options), **loading)
    return hf_flash.stats(model).plan


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "all"}, {"context": 64, "batch_size": 3}, {"dtype": "bfloat16"}, {"dtype": torch.float16}],
)
def test_plan_is_the_one_of_from_pretrained(stock: Path, flash: Path, options: dict[str, Any]) -> None:
    smallest = {preview.smallest_cap(folder, **options) for folder in (stock, flash)}
    assert len(smallest) == 1
    for folder in (stock, flash):
        for cap in (CAP, *smallest):
            assert hf_flash.plan(folder, memory=cap, **options).to_dict() == loaded_plan(folder, memory=cap, **options)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "phi3", "t5"])
def test_other_spellings(kind: str, tmp_path: Path) -> None:
    model = TINY[kind]()
    model.save_pretrained(tmp_path / "stock")
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    folder = hf_flash.repack(tmp_path / "stock", tmp_path / "flash", progress=False)
    assert hf_flash.plan(folder, memory=CAP).to_dict() == loaded_plan(folder, auto, memory=CAP)
    assert hf_flash.plan(tmp_path / "stock", memory=CAP).to_dict() == hf_flash.plan(folder, memory=CAP).to_dict()


def test_dtype_comes_from_the_weights_where_the_config_has_none(tmp_path: Path) -> None:
    model = tiny_opt().to(torch.bfloat16)
    model.config.dtype = None
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"dtype": "bfloat16",', "")
    (tmp_path / "config.json").write_text(config)
    assert preview.look(tmp_path).skeleton.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_gate_bits_are_those_that_repacking_would_use(stock: Path) -> None:
    eight, four = (hf_flash.plan(stock, memory=CAP, gate_bits=bits).parts["gates"] for bits in (8, 4))
    assert 0 < four < eight


def test_sizes(stock: Path, flash: Path) -> None:
    seen = [preview.look(folder) for folder in (stock, flash)]
    assert [look.converted for look in seen] == [False, True]
    weights = sum(p.numel() * p.element_size() for p in tiny_llama().parameters())
    assert {look.n_bytes for look in seen} == {weights}
    assert {look.ffn_bytes for look in seen} == {3 * 256 * 1024}  # a neuron's 768 bytes, padded to whole blocks


def test_too_small_a_cap_names_the_smallest(flash: Path) -> None:
    smallest = hf_flash.smallest_cap(flash)
    with pytest.raises(MemoryCapError, match=str(smallest)):
        hf_flash.plan(flash, memory=smallest - (1 << 20))
    assert hf_flash.plan(flash, memory=smallest).total_bytes <= smallest


def test_wrong_arguments(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(FlashConfigError, match="dtype='wide' is none to compute in"):
        hf_flash.plan(stock, dtype="wide")
    with pytest.raises(FlashConfigError, match="gate='magic' is unknown"):
        hf_flash.plan(stock, gate="magic")
    with pytest.raises(CheckpointError, match="is missing"):
        hf_flash.plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nosuch", "architectures": ["NoSuch"]}')
    (tmp_path / "model.safetensors").write_bytes((stock / "model.safetensors").read_bytes())
    with pytest.raises(UnknownArchitectureError, match="model_type 'nosuch'"):
        hf_flash.plan(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Config"}}')
    with pytest.raises(UnknownArchitectureError, match="--trust-remote-code"):
        hf_flash.plan(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(CheckpointError, match="quantized with 'gptq'"):
        hf_flash.plan(tmp_path)


# From the Hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    with use_hub(server, tmp_path / "home", monkeypatch):
        yield server
    server.close()


def test_a_repo_s_weights_are_not_fetched(the_hub: FakeHub, stock: Path, flash: Path, tmp_path: Path) -> None:
    for name, folder in (("user/stock", stock), ("user/flash", flash)):
        the_hub.add(name, folder)
        assert hf_flash.plan(name, memory=CAP).to_dict() == hf_flash.plan(folder, memory=CAP).to_dict()
    cached = sum(path.stat().st_size for path in (tmp_path / "home").rglob("*.safetensors") if path.is_file())
    assert cached == 0


def test_a_repo_in_the_cache_is_not_asked_for(the_hub: FakeHub, flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    the_hub.add("user/flash", flash)
    AutoModelForCausalLM.from_pretrained("user/flash", quantization_config=FlashConfig(memory=CAP))
    asked = len(the_hub.log)
    assert hf_flash.plan("user/flash", memory=CAP).to_dict() == hf_flash.plan(flash, memory=CAP).to_dict()
    assert len(the_hub.log) == asked


def test_no_such_repo(the_hub: FakeHub) -> None:
    with pytest.raises(HubError, match="no folder here and no repo"):
        hf_flash.plan("user/nothing")


def test_no_hub(the_hub: FakeHub) -> None:
    the_hub.close()
    with pytest.raises(HubError, match="could not be asked"):
        hf_flash.plan("user/nothing")
