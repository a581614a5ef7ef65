"""save_pretrained of a model on flash: a flash checkpoint that loads again."""

from __future__ import annotations

import os
import shutil
import types
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_flash import card
from hf_flash.attach import FlashRuntime
from hf_flash.config import QUANT_METHOD
from hf_flash.errors import CheckpointError, FlashError
from hf_flash.format import SOURCE_KEY, add_checksums, read_header
from hf_flash.store import DTYPE_NAMES, GATES_NAME, write_index


def install(model: PreTrainedModel) -> None:
    """Make a model save itself as a flash checkpoint, and tag what it pushes."""
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[method-assign]
    model._get_files_timestamps = types.MethodType(_get_files_timestamps, model)  # type: ignore[method-assign]
    model.add_model_tags(QUANT_METHOD)


def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """PreTrainedModel.save_pretrained, with the flash files written beside what it saves.

    Takes the same arguments; also what `push_to_hub` calls.
    """
    quantizer: Any = self.hf_quantizer
    quantizer.saving.folder = os.fspath(save_directory)
    try:
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
    finally:
        quantizer.saving.folder = None
    if not kwargs.get("push_to_hub"):  # then it has been uploaded by now, and the Hub keeps hashes of its own
        for path in Path(save_directory).glob("model*.safetensors"):
            add_checksums(path)


def _get_files_timestamps(self: PreTrainedModel, working_dir: str | os.PathLike[str]) -> dict[str, float]:
    """Times by which transformers tells what to upload: not of flash files, whose links keep the times they had."""
    stamps: dict[str, float] = type(self)._get_files_timestamps(self, working_dir)
    mine = {*runtime_of(self).files, GATES_NAME}
    return {name: time for name, time in stamps.items() if name not in mine}


def runtime_of(model: torch.nn.Module) -> FlashRuntime:
    """The flash side of a model.

    Raises:
        FlashError: the model does not run from flash.
    """
    runtime = getattr(model, "_hf_flash", None)
    if runtime is None:
        inner = getattr(model, "model", None)
        runtime = getattr(inner, "_hf_flash", None) if inner is not None else None
    if not isinstance(runtime, FlashRuntime):
        raise FlashError(
            f"This {type(model).__name__} does not run from flash. Load it with quantization_config=FlashConfig(...) "
            "or call hf_flash.patch(model, memory=...) first."
        )
    return runtime


def state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Resident tensors, streamed ones as views of their files, and a 0-element guard under each replaced name."""
    runtime = runtime_of(model)
    out = dict(model.state_dict())
    for path in (*runtime.plan.streamed, *runtime.plan.packed):
        assert runtime.located is not None
        entry = runtime.located.by_param[f"{path}.weight"]
        with safe_open(entry.path, framework="pt") as file:
            out[f"{runtime.tied.get(path, path)}.weight"] = file.get_tensor(entry.name)  # a shared one once
    for block in runtime.blocks:
        for part in (block.gate, block.up, block.down):
            if part is not None:
                out[part.key] = torch.empty(0, dtype=model.dtype)
    return out


def metadata(model: PreTrainedModel) -> dict[str, str]:
    """Header metadata of the resident files: what says that they belong to the flash files."""
    path = next(iter(runtime_of(model).files.values()))
    origin = read_header(path).metadata.get(SOURCE_KEY)
    return {} if origin is None else {SOURCE_KEY: origin.partition("-")[0]}


def write_flash_side(model: PreTrainedModel, folder: Path) -> None:
    """Put the flash files into a folder: hard links where the file system allows, copies elsewhere."""
    runtime = runtime_of(model)
    assert runtime.store is not None
    streamed = [
        runtime.located.by_param[f"{path}.weight"].path
        for path in (*runtime.plan.streamed, *runtime.plan.packed)
        if runtime.located
    ]
    gone = [path for path in (*runtime.files.values(), runtime.gates_file, *streamed) if path and not path.is_file()]
    if gone:
        raise CheckpointError(
            f"{gone[0]} is gone. This model runs on from the file that it has open, but cannot be saved without it: "
            "put the file back, or repack the model and load that."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in runtime.files.items():
        link(path, folder / name)
    if runtime.gates_file is not None:
        link(runtime.gates_file, folder / GATES_NAME)
    weight_map = {layer.rows.name: layer.file_name for layer in runtime.store.layers.values()}
    sizes = sum((folder / name).stat().st_size for name in runtime.files)
    write_index(folder, weight_map, sizes)
    layer = next(iter(runtime.store.layers.values()))
    ffn = {
        "n_layers": len(runtime.store.layers), "d_model": layer.layout.d_model, "d_ffn": layer.n_neurons,
        "dtype": DTYPE_NAMES[layer.layout.dtype], "row_bytes": layer.layout.row_bytes, "flash_bytes": sizes,
        "certified": runtime.gates_file is not None,
    }  # fmt: skip
    name = str(model.config.name_or_path)
    source = Path(name) if Path(name).is_dir() else folder / "nowhere"
    if not (folder / "README.md").exists():
        card.write_card(folder, source, name or "model", ffn)


def link(source: Path, target: Path) -> None:
    """Put a file into another place: a hard link where the file system allows it, else a copy; at once."""
    real = source.resolve()
    if target.exists() and target.resolve() == real:
        return
    temporary = target.with_name(target.name + ".partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(real, temporary)
    except OSError:  # another file system
        shutil.copyfile(real, temporary)
    os.replace(temporary, target)
