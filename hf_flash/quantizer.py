"""The hook into from_pretrained: a quantizer that swaps FFN blocks before transformers loads what is left.

Thin on purpose: it refuses early and calls attach.py. Registered by `import hf_flash`.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from hf_flash import attach, hub, save
from hf_flash.checkpoint import locate
from hf_flash.config import LOADING_ATTRIBUTES, QUANT_METHOD, FlashConfig
from hf_flash.errors import CheckpointError, FlashConfigError
from hf_flash.families import find_blocks
from hf_flash.repack import Source, repack_to_cache


class Saving(threading.local):
    """The folder that this thread is saving a model to; a copy of the model saves nothing yet."""

    folder: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        return Saving()


class FlashQuantizer(HfQuantizer):
    """Runs a model's FFNs from flash."""

    requires_calibration = False

    def __init__(self, quantization_config: FlashConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: FlashConfig = quantization_config
        self._runtime: attach.FlashRuntime | None = None
        self.saving = Saving()

    def validate_environment(self, device_map: Any = None, weights_only: bool = True, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is loaded."""
        self.quantization_config.cap()

    def update_device_map(self, device_map: Any) -> Any:
        """One device: the engine computes on the CPU, and placing layers is what the plan does."""
        if device_map is None or device_map in ("auto", "cpu", "balanced", "balanced_low_0", "sequential"):
            return {"": "cpu"}
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if any(str(device) != "cpu" for device in devices):
            raise FlashConfigError(
                f"device_map={device_map!r}: hf_flash computes on the CPU and places layers itself. "
                "Leave device_map out and set the cap with FlashConfig(memory=...)."
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        files = [Path(f) for f in checkpoint_files or []]
        if not files or any(f.suffix != ".safetensors" for f in files):
            raise CheckpointError(
                f"{model.config.name_or_path}: hf_flash reads safetensors, found "
                f"{', '.join(f.name for f in files) or 'no checkpoint files'}. Save the model once with "
                "save_pretrained, which writes safetensors, and load that."
            )
        config = self.quantization_config
        name = str(model.config.name_or_path)
        blocks = find_blocks(model)
        located = locate(model, files)
        if self.pre_quantized:
            flash, gates = hub.flash_files(files[0], name)
        else:
            source = Source.open(model, files)
            attach.plan_for(model, blocks, source.geometry(config.gate_bits), config, located)  # refuse before writing
            folder = repack_to_cache(source, config, name)
            flash, gates = hub.flash_files(folder / "config.json", str(folder))
        geometry = attach.geometry_of(flash, gates)
        names = attach.stored_paths(model, blocks, geometry)
        geometry = {path: geometry[name] for path, name in names.items()}
        resident = files if self.pre_quantized else []
        attach.match_sources([*flash.values(), *([gates] if gates else []), *resident])
        attach.match_geometry(blocks, geometry, str(next(iter(flash.values())).parent))
        plan, demand = attach.plan_for(model, blocks, geometry, config, located)
        self._runtime = attach.FlashRuntime(config, plan, demand, blocks, located)
        self._runtime.files, self._runtime.gates_file, self._runtime.stored_paths = flash, gates, names
        attach.swap(model, blocks, self._runtime)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        assert self._runtime is not None
        attach.make_resident(model)
        attach.connect(model, self._runtime)
        save.install(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What save_pretrained writes: resident tensors, those that are streamed, and a guard per FFN tensor."""
        if self.saving.folder is not None:
            save.write_flash_side(model, Path(self.saving.folder))
        return save.state_dict(model), save.metadata(model)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the FFNs to whatever can be trained around them (adapters, norms)."""
        return True

    @property
    def is_compileable(self) -> bool:
        """generate() must not compile: engines read files."""
        return False


def register() -> None:
    """Make transformers know `quant_method: hf_flash`. Calling it twice does nothing."""
    if QUANT_METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(FlashConfig)
    auto.register_quantizer(QUANT_METHOD)(FlashQuantizer)
    names = "|".join(LOADING_ATTRIBUTES)
    warnings.filterwarnings(  # transformers warns that the caller's values win; here that is what is promised
        "ignore", message=rf"You passed `quantization_config`.*loading attributes \(e\.g\. \[('({names})',? ?)*\]\)"
    )
    # Without this, what the caller passes for a converted folder is dropped with a warning.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FlashConfig,)  # type: ignore[assignment]


assert os.name == "posix", "hf_flash needs a POSIX system"
