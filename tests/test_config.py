"""What a user may say, what is refused, what a repo keeps, and whose word counts."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers.quantizers import AutoQuantizationConfig

from hf_flash import FlashConfig, config
from hf_flash.errors import FlashConfigError
from hf_flash.quantizer import FlashQuantizer, register


def test_the_defaults_are_lossless_and_need_nothing() -> None:
    defaults = FlashConfig()
    assert (defaults.memory, defaults.gate, defaults.delta, defaults.gate_bits) == (None, "auto", 1e-9, 8)
    assert defaults.get_loading_attributes() == {}


@pytest.mark.parametrize(
    "options,words",
    [
        ({"gate": "fast"}, "'fast' is unknown. Choose one of 'auto', 'all', 'certified'"),
        ({"gate": None}, "Choose one of"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"memory": 0}, "must be positive"),
        ({"memory": -1}, "must be positive"),
        ({"gate_bits": 3}, "4 to 8 bits"),
        ({"gate_bits": 9}, "4 to 8 bits"),
        ({"gate_bits": 8.0}, "4 to 8 bits"),
        ({"gate_bits": "8"}, "4 to 8 bits"),
        ({"delta": 1}, "0 <= delta < 1"),
        ({"delta": -1e-9}, "0 <= delta < 1"),
        ({"delta": float("nan")}, "0 <= delta < 1"),
        ({"delta": "small"}, "0 <= delta < 1"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"window": 2.5}, "window=2.5 must be"),
        ({"n_threads": True}, "n_threads=True must be"),
        ({"context": 0}, "context=0 must be a number of tokens"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, object], words: str) -> None:
    with pytest.raises(FlashConfigError) as caught:
        FlashConfig(**options)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@given(
    st.sampled_from(config.GATES), st.floats(0, 0.999), st.sampled_from(config.CERTIFIED_BITS), st.integers(1, 100),
    st.integers(1, 1 << 45),
)  # fmt: skip
def test_what_config_json_holds_reads_back(gate: str, delta: float, bits: int, window: int, memory: int) -> None:
    made = FlashConfig(gate=gate, delta=delta, gate_bits=bits, window=window, memory=memory, n_threads=3, cache_dir="x")
    kept = json.loads(json.dumps(made.to_dict()))
    again = AutoQuantizationConfig.from_dict(dict(kept))
    assert isinstance(again, FlashConfig)
    assert (again.gate, again.delta, again.gate_bits, again.window) == (gate, delta, bits, window)
    assert again.to_dict() == kept
    for mine in ("memory", "n_threads", "cache_dir", "context", "batch_size"):
        assert mine not in kept, f"{mine} belongs to one machine"
    assert "import hf_flash" in kept["notice"]


def test_what_a_newer_version_wrote_is_kept() -> None:
    again = FlashConfig.from_dict({**FlashConfig().to_dict(), "ffn": {"n_layers": 4}, "predictor": {"rank": 64}})
    assert again.to_dict()["ffn"] == {"n_layers": 4}
    assert again.to_dict()["predictor"] == {"rank": 64}
    assert FlashConfig.from_dict(again.to_dict()).to_dict() == again.to_dict()


def test_what_the_caller_passes_wins() -> None:
    options = {
        "memory": "1GiB", "gate": "threshold", "delta": 0.0, "context": 7, "batch_size": 2, "exact": False, "window": 9,
        "n_threads": 1, "cache_dir": "somewhere", "lookahead": True, "sparsity": 0.5, "without": ("window",),
    }  # fmt: skip
    assert FlashConfig(**options).get_loading_attributes() == {**options, "memory": 1 << 30}
    assert set(options) == set(config.LOADING_ATTRIBUTES)


def test_the_cap_is_the_callers_then_the_environments_then_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "available_memory", lambda: 4000)
    assert FlashConfig().cap() == 3000
    monkeypatch.setenv("HF_FLASH_MEMORY", "2GiB")
    assert FlashConfig().cap() == 2 << 30
    assert FlashConfig(memory="1GiB").cap() == 1 << 30
    monkeypatch.setenv("HF_FLASH_MEMORY", "lots")
    with pytest.raises(FlashConfigError, match="HF_FLASH_MEMORY: 'lots' is not a size"):
        FlashConfig().cap()


def test_available_memory_respects_the_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = config.available_memory()
    assert 1 << 20 < free < 1 << 45
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(config, "_cgroup_files", lambda: iter([(limit, used)]))
    limit.write_text("300000000\n")
    used.write_text("100000000\n")
    assert config.available_memory() == 200_000_000
    used.write_text("400000000\n")
    assert config.available_memory() == 1
    limit.write_text("max\n")
    assert config.available_memory() > 1 << 20


def test_registering_twice_does_nothing() -> None:
    register()
    register()
    assert isinstance(AutoQuantizationConfig.from_dict({"quant_method": "hf_flash"}), FlashConfig)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_the_only_device_is_the_cpu(device_map: object) -> None:
    got = FlashQuantizer(FlashConfig()).update_device_map(device_map)
    assert {str(device) for device in got.values()} == {"cpu"}


@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, {"a": "cpu", "b": "disk"}])
def test_another_device_is_refused(device_map: object) -> None:
    with pytest.raises(FlashConfigError, match="Leave device_map out"):
        FlashQuantizer(FlashConfig()).update_device_map(device_map)
