"""What a model will need, before any of its weights is read.

A plan needs shapes, not weights: config.json gives the structure (built on the meta device) and the headers of the
safetensors files say where what lies. So a plan costs a few kilobytes of reading, and for a repo that is still on the
Hub a few range requests: its files are stood in for by hollow ones, a true header and a hole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever client it is built on
    HTTPError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)  # fmt: skip
from huggingface_hub.utils import SafetensorsFileMetadata
from transformers import PreTrainedConfig, PreTrainedModel

from hf_flash import attach, budget, hub
from hf_flash.budget import Demand, Plan
from hf_flash.checkpoint import Located, checkpoint_files, load_json, locate, read_config
from hf_flash.config import QUANT_METHOD, FlashConfig
from hf_flash.errors import CheckpointError, FlashConfigError, HubError
from hf_flash.families import FFNBlock, find_blocks
from hf_flash.format import read_header
from hf_flash.repack import Source, meta_model

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Preview:
    """A checkpoint seen through its headers.

    Attributes:
        name: as it was given.
        converted: whether it is a flash checkpoint already.
        config: the options it would be loaded with.
        skeleton: the model on the meta device, in the dtype it would compute in.
        blocks, geometry: its FFNs, and how they lie on flash, by module path.
        located: where its other tensors lie.
    """

    name: str
    converted: bool
    config: FlashConfig
    skeleton: PreTrainedModel
    blocks: list[FFNBlock]
    geometry: Mapping[str, attach.Geometry]
    located: Located

    @functools.cached_property
    def demand(self) -> Demand:
        """What the model asks for."""
        return attach.demand_of(self.skeleton, self.blocks, self.geometry, self.config, self.located)

    def plan(self) -> Plan:
        """Divide the config's cap.

        Raises:
            MemoryCapError: it is too small; names the smallest that would do.
        """
        return budget.make_plan(self.demand, self.config.cap(), "residents" not in self.config.without)

    @property
    def smallest_cap(self) -> int:
        """The smallest cap for which there is a plan, bytes."""
        return budget.smallest_cap(self.demand)

    @property
    def ffn_bytes(self) -> int:
        """Bytes of the FFNs on flash, padding included."""
        return sum(g.n_neurons * g.layout.row_bytes for g in (self.geometry[b.path] for b in self.blocks))

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights as they are stored, without padding."""
        ffn = sum(layer.matrix_bytes for layer in self.demand.layers)
        stored = sum(entry.n_bytes for entry in self.located.by_key.values())
        return stored + ffn if self.converted else stored

    def with_options(self, **options: Any) -> Preview:
        """The same checkpoint, planned for with other options (memory, context)."""
        config = copy.copy(self.config)
        vars(config).update(options)
        return dataclasses.replace(self, config=config)


def plan(
    model: str | os.PathLike[str], *, memory: int | str | None = None, gate: str = "auto", context: int | None = None,
    batch_size: int = 1, gate_bits: int = 8, dtype: str | torch.dtype | None = None, trust_remote_code: bool = False,
    revision: str | None = None, token: str | bool | None = None,
) -> Plan:  # fmt: skip
    """Who gets how much of a memory cap, without loading a weight.

    Args:
        model: a folder or a Hub repo, stock or converted. A repo is not downloaded.
        memory: the cap, bytes or a size such as "4GiB"; by default what FlashConfig takes.
        gate, context, batch_size: as in FlashConfig.
        gate_bits: of the sketch that repacking a stock checkpoint would make.
        dtype: in which the model would be loaded; by default what from_pretrained takes.
        trust_remote_code, revision, token: as in from_pretrained.

    Returns:
        The plan that from_pretrained would make.

    Raises:
        MemoryCapError: the cap is too small; names the smallest that would do.
        FlashError: the checkpoint is none, or cannot run from flash, and why.
    """
    config = FlashConfig(memory, gate=gate, context=context, batch_size=batch_size, gate_bits=gate_bits)
    return look(model, config, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, token=token).plan()


def smallest_cap(model: str | os.PathLike[str], **options: Any) -> int:
    """The smallest cap with which a model runs, in bytes.

    Args:
        model, options: as in `plan`.

    Raises:
        FlashError: the checkpoint is none, or cannot run from flash, and why.
    """
    loading = {k: options.pop(k) for k in ("dtype", "trust_remote_code", "revision", "token") if k in options}
    return look(model, FlashConfig(**options), **loading).smallest_cap


def look(
    model: str | os.PathLike[str], config: FlashConfig | None = None, *, dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False, revision: str | None = None, token: str | bool | None = None,
) -> Preview:  # fmt: skip
    """See a checkpoint through its headers.

    Args:
        model, dtype, trust_remote_code, revision, token: as in `plan`.
        config: options to plan with. What it leaves at its default, a converted checkpoint's own config decides.

    Raises:
        FlashError: the checkpoint is none, or cannot run from flash, and why.
    """
    config = config or FlashConfig()
    with headers_of(model, revision=revision, token=token) as folder:
        raw = load_json(folder / "config.json")
        stored = raw.get("quantization_config") or {}
        if stored and stored.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{model} is quantized with {stored.get('quant_method')!r}; hf_flash needs the original weights. Give "
                "the checkpoint it was made from."
            )
        files = checkpoint_files(folder)
        skeleton = skeleton_of(folder, files, dtype=dtype, trust_remote_code=trust_remote_code)
        if stored:
            config = _merged(stored, config)
            blocks, geometry, located = _converted(skeleton, folder, files)
        else:
            blocks, geometry, located = _stock(skeleton, files, config)
    return Preview(os.fspath(model), bool(stored), config, skeleton, blocks, geometry, located)


def _stock(
    skeleton: PreTrainedModel, files: list[Path], config: FlashConfig
) -> tuple[list[FFNBlock], dict[str, attach.Geometry], Located]:
    source = Source.open(skeleton, files)
    return source.blocks, source.geometry(config.gate_bits), source.located


def _converted(
    skeleton: PreTrainedModel, folder: Path, files: list[Path]
) -> tuple[list[FFNBlock], dict[str, attach.Geometry], Located]:
    blocks = find_blocks(skeleton)
    flash, gates = hub.flash_files(folder / "config.json", str(folder))
    geometry = named_geometry(skeleton, blocks, flash, gates)
    attach.match_geometry(blocks, geometry, str(folder))
    return blocks, geometry, locate(skeleton, files)


def named_geometry(
    skeleton: PreTrainedModel, blocks: list[FFNBlock], flash: Mapping[str, Path], gates: Path | None
) -> dict[str, attach.Geometry]:
    """Geometry of a flash checkpoint by the module paths of a model, which may have another head than its source."""
    stored = attach.geometry_of(flash, gates)
    return {path: stored[name] for path, name in attach.stored_paths(skeleton, blocks, stored).items()}


def _merged(stored: dict[str, Any], config: FlashConfig) -> FlashConfig:
    """The options of a converted checkpoint, overridden by what the caller set: what transformers does."""
    merged = FlashConfig(**stored)
    for name, value in config.get_loading_attributes().items():
        setattr(merged, name, value)
    return merged


def skeleton_of(
    folder: Path, files: list[Path], *, dtype: str | torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a folder on the meta device, in the dtype in which from_pretrained would load it.

    Raises:
        UnknownArchitectureError: transformers does not know it.
        FlashConfigError: no such dtype.
    """
    config = read_config(folder, trust_remote_code)
    wanted = _dtype(dtype, config, files)
    config.dtype = wanted
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = wanted
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)  # as transformers does it
    try:
        return meta_model(config, trust_remote_code)
    finally:
        torch.set_default_dtype(before)


def _dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig, files: list[Path]) -> torch.dtype:
    if dtype is None or dtype == "auto":
        dtype = config.dtype
    if dtype is None:
        found = (e.dtype for e in read_header(files[0]).entries.values() if e.dtype in _FLOATS)
        dtype = _FLOATS[next(found, "F32")]
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FlashConfigError(
            f"dtype={dtype!r} is none to compute in. Write 'auto', 'bfloat16', 'float16' or 'float32'."
        )
    return dtype


@contextlib.contextmanager
def headers_of(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Iterator[Path]:
    """A folder with a model's small files and the headers of its weights.

    A local folder is itself; so is a Hub repo that is in the cache. Of any other repo the weights are not fetched: a
    temporary folder holds files of their size with their header and nothing else.

    Raises:
        CheckpointError, HubError: there is none.
    """
    name = os.fspath(model)
    if Path(name).expanduser().exists() or not hub.REPO_NAME.fullmatch(name):
        yield hub.local_folder(model)
        return
    cached = _cached(name, revision)
    if cached is not None:
        yield cached
        return
    with tempfile.TemporaryDirectory(prefix="hf_flash-") as temporary:
        yield _fetch_headers(name, Path(temporary), revision, token)


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a repo in the Hub cache, if its weights are there."""
    found = huggingface_hub.try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    try:
        checkpoint_files(folder)
        converted = "quantization_config" in load_json(folder / "config.json")
    except CheckpointError:
        return None
    return None if converted and hub.missing_files(folder) else folder


def _fetch_headers(repo: str, folder: Path, revision: str | None, token: str | bool | None) -> Path:
    """Fill a folder with a repo's small files and hollow weights.

    Raises:
        HubError: the repo cannot be reached or does not exist.
    """
    try:
        api = huggingface_hub.HfApi(token=token)
        snapshot = Path(api.snapshot_download(repo, revision=revision, allow_patterns=["*.json", "*.py"]))
        commit = snapshot.name  # every header from the commit that the small files are of
        for path in snapshot.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        for name in api.list_repo_files(repo, revision=commit):
            if name.endswith(".safetensors") and "/" not in name:
                _hollow(folder / name, api.parse_safetensors_file_metadata(repo, name, revision=commit))
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo} is no folder here and no repo on the Hub that you may read. Check the spelling, or log in with "
            "`hf auth login`."
        ) from error
    except (HTTPError, SafetensorsParsingError, OSError) as error:
        why = str(error).splitlines()[0]
        raise HubError(
            f"{repo} is no folder here, and the Hub could not be asked for it ({why}). Check the spelling and the "
            "network, or give the folder of a checkpoint that is on this disk."
        ) from error
    return folder


def _hollow(path: Path, seen: SafetensorsFileMetadata) -> None:
    """Write a safetensors file that has its header and, where its data was, a hole that takes no room."""
    header: dict[str, Any] = {"__metadata__": {k: v for k, v in seen.metadata.items() if k != "hf_flash.header_crc32"}}
    for name, info in seen.tensors.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + max((info.data_offsets[1] for info in seen.tensors.values()), default=0))
