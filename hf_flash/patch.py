"""patch: put a model that is already in memory on flash, in one line."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_flash import attach, save
from hf_flash.config import FlashConfig
from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.quantizer import FlashQuantizer
from hf_flash.repack import GATES_NAME, LoadedSource, default_cache, parse_size, write_flash
from hf_flash.store import flash_file_names


def patch(
    model: PreTrainedModel, memory: int | str | None = None, *, config: FlashConfig | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Move the FFN weights of a loaded model to flash and keep what the cap has room for.

    The weights are written to a folder of this process, removed when the model is. Weights that the model was loaded
    with as views of a file (the default of from_pretrained on a CPU) cost no DRAM before either.

    Args:
        model: a transformers model on the CPU.
        memory: the cap, bytes or a size such as "4GiB".
        config: every other option; or pass them as keywords (`gate="all"`, `context=2048`).

    Returns:
        The same model, changed in place.

    Raises:
        FlashError: the model cannot be put on flash, and why. It is unchanged then.
    """
    if getattr(model, "_hf_flash", None) is not None:
        raise FlashError("This model runs from flash already; load it again to change its cap.")
    if getattr(model, "is_quantized", False):
        raise FlashConfigError("This model is quantized by another backend. Patch one that was loaded without it.")
    if config is not None and kwargs:
        raise FlashConfigError(f"Pass {', '.join(kwargs)} to FlashConfig, or no config: patch takes one or the other.")
    config = FlashConfig(memory=memory, **kwargs) if config is None else copy.copy(config)
    if memory is not None:
        config.memory = parse_size(memory)
    source = LoadedSource.of(model)
    root = Path(config.cache_dir) if config.cache_dir else default_cache()
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="patched-", dir=root))
    try:
        n_bytes = sum(source.n_bytes(block) for block in source.blocks)
        with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="Moving FFNs to flash") as bar:
            write_flash(source, folder, config.gate_bits, parse_size("5GB"), bar)
        runtime = _runtime(model, source, folder, config)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(runtime, shutil.rmtree, folder, ignore_errors=True)
    return _swap(model, source, runtime)


def _runtime(model: PreTrainedModel, source: LoadedSource, folder: Path, config: FlashConfig) -> attach.FlashRuntime:
    files = {name: folder / name for name in flash_file_names(folder)}
    gates = folder / GATES_NAME if (folder / GATES_NAME).is_file() else None
    geometry = attach.geometry_of(files, gates)
    plan, demand = attach.plan_for(model, source.blocks, geometry, config, None)
    runtime = attach.FlashRuntime(config, plan, demand, source.blocks, None)
    runtime.files, runtime.gates_file = files, gates
    return runtime


def _swap(model: PreTrainedModel, source: LoadedSource, runtime: attach.FlashRuntime) -> PreTrainedModel:
    attach.swap(model, source.blocks, runtime)
    attach.make_resident(model)
    attach.connect(model, runtime)
    quantizer = FlashQuantizer(runtime.config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = runtime.config
    model.is_quantized, model.quantization_method = True, runtime.config.quant_method  # type: ignore[assignment]
    save.install(model)
    return model


def is_flash(model: nn.Module) -> bool:
    """Whether a model runs from flash."""
    return getattr(model, "_hf_flash", None) is not None
