"""Where a stock model's tensors lie in the files of its checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_flash.errors import CheckpointError, UnknownArchitectureError
from hf_flash.format import PAD_PREFIX, TensorEntry, read_header
from hf_flash.store import DTYPES, names_in_index

WEIGHTS_NAME, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Located:
    """A checkpoint's tensors.

    Attributes:
        by_param: model parameter name -> entry, for those stored as they are.
        by_key: checkpoint key -> entry, all of them.
        merged: model parameter names that transformers makes out of several stored tensors.
    """

    by_param: dict[str, TensorEntry]
    by_key: dict[str, TensorEntry]
    merged: frozenset[str]


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a stock checkpoint folder, sharded or not.

    Raises:
        CheckpointError: none there (with a hint where it holds .bin files), or a shard of the index is missing.
    """
    if (folder / WEIGHTS_INDEX).is_file():
        files = [folder / name for name in names_in_index(folder / WEIGHTS_INDEX)]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names. Fetch the missing shard"
                f"{'s' if len(missing) > 1 else ''} and run the same command again."
            )
        return files
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    hint = (
        "It holds PyTorch .bin files: convert them once with "
        "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR), which writes safetensors."
        if list(folder.glob("*.bin"))
        else "Give the path of a folder that save_pretrained wrote, or the name of a Hub repo."
    )
    raise CheckpointError(f"{folder} holds no {WEIGHTS_NAME} and no {WEIGHTS_INDEX}. {hint}")


def locate(model: nn.Module, files: Sequence[Path]) -> Located:
    """Find a model's parameters in safetensors files, with the renaming that transformers does when it loads them.

    Args:
        model: the stock model, on the meta device, nothing swapped.
        files: its checkpoint.

    Raises:
        CheckpointError: a file is missing or torn.
    """
    by_key: dict[str, TensorEntry] = {}
    for path in files:
        by_key.update({k: e for k, e in read_header(path).entries.items() if not k.startswith(PAD_PREFIX)})
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    by_param: dict[str, TensorEntry] = {}
    merged: set[str] = set()
    for key, entry in by_key.items():
        param, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if pattern is not None:
            merged.add(param)
        elif param in state:
            by_param[param] = entry
    for name, target in getattr(model, "all_tied_weights_keys", {}).items():
        if name not in by_param and target in by_param:
            by_param[name] = by_param[target]
    return Located(by_param, by_key, frozenset(merged))


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """One tensor of a safetensors file, in memory of its own.

    Raises:
        CheckpointError: a dtype that FFN weights cannot have, or the file ended early.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} is {entry.dtype}; FFN weights must be one of {', '.join(DTYPES)}. "
            "A checkpoint that is quantized already cannot be repacked: start from the original weights."
        )
    out = torch.empty(entry.n_bytes, dtype=torch.uint8)
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.start)
        view, got = out.numpy().data, 0
        while got < entry.n_bytes:
            n = file.readinto(view[got:])
            if not n:
                raise CheckpointError(
                    f"{entry.path} ended at byte {entry.start + got}, inside {entry.name}. Fetch it again."
                )
            got += n
    return out.view(DTYPES[entry.dtype]).view(entry.shape)


def unique_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters by name, each once however often it is shared."""
    return model.named_parameters(remove_duplicate=True)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, or no JSON.
    """
    try:
        out: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {path.parent} is no checkpoint. Give a folder that save_pretrained or "
            "`hf-flash repack` wrote, or the name of a Hub repo."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    return out


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a folder.

    Raises:
        UnknownArchitectureError: transformers does not know the model, or its code is not trusted.
    """
    raw = load_json(folder / "config.json")
    if raw.get("auto_map") and not trust_remote_code and "AutoConfig" in raw["auto_map"]:
        with contextlib.suppress(KeyError, ValueError):  # a type that transformers knows by now needs no remote code
            AutoConfig.for_model(raw.get("model_type", ""))
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        raise UnknownArchitectureError(
            f"{folder} brings its own code ({raw['auto_map']['AutoConfig']}). Read it, then pass "
            "trust_remote_code=True (--trust-remote-code)."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise UnknownArchitectureError(
            f"{folder / 'config.json'} describes no model that the installed transformers knows (model_type "
            f"{raw.get('model_type')!r}). `pip install -U transformers`, or choose another checkpoint."
        ) from error
