"""From a stock checkpoint to a flash checkpoint, tensor by tensor.

Memory for one layer, not for the model; every file is written whole or not at all; an interrupted run goes on where
it stopped. The result is an ordinary Hub repo (docs/format.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_flash import card, hub, native
from hf_flash.attach import Geometry
from hf_flash.check import check_blocks
from hf_flash.checkpoint import WEIGHTS_INDEX, Located, checkpoint_files, load_json, locate, read_config, read_tensor
from hf_flash.config import FlashConfig
from hf_flash.errors import CheckpointError, UnknownArchitectureError
from hf_flash.families import FFNBlock, Part, find_blocks, get_activation, zero_below
from hf_flash.format import (
    FORMAT_VERSION,
    ORDER_KEY,
    ORDERED_VERSION,
    RUN_BYTES,
    SOURCE_KEY,
    VERSION_KEY,
    TensorEntry,
    TensorFileWriter,
    TensorSpec,
    atomic_text,
    explain_full_disk,
    read_header,
)
from hf_flash.gate_file import GATES_KEY, GateFile, sketch_kinds, sketch_specs
from hf_flash.gates.certified import Sketch
from hf_flash.layout import BundleLayout, parse_size
from hf_flash.memory import return_large_blocks
from hf_flash.order import orders_of
from hf_flash.output import check_contents, check_folders, check_room, copy_side_files, only_writer, remove_others
from hf_flash.packing import MAX_ESCAPES, can_pack, choose_base, count_exponents, pack
from hf_flash.recording import STATE_NAME, WORK_NAME, Recording
from hf_flash.store import (
    DTYPE_NAMES,
    DTYPES,
    GATES_NAME,
    LAYERS_KEY,
    escapes_name,
    flash_file_names,
    order_name,
    write_index,
)

logger = logging.get_logger(__name__)

DEFAULT_SHARD = "5GB"
PACK_NEURONS = 512  # packed at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """A stock checkpoint, opened for repacking: nothing but headers is in memory."""

    model: PreTrainedModel  # on the meta device
    blocks: list[FFNBlock]
    located: Located
    files: list[Path]
    pack: bool = True  # rows into 12 bits a weight, where that can be
    orders: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # path -> [n] neuron of each row
    surveys: dict[str, tuple[int, int] | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, model: PreTrainedModel, files: Sequence[Path], pack: bool | None = None) -> Source:
        """Find the FFN blocks of a model and their weights in its checkpoint, and prove that we compute them right.

        Args:
            model: on the meta device.
            files: its checkpoint.
            pack: pack rows where that can be; by default where the native kernels are there to compute on them.

        Raises:
            UnknownArchitectureError, BlockMismatchError: the model cannot be repacked, and why.
            CheckpointError: a tensor is missing, of another shape or stored in a way that cannot be bundled.
        """
        blocks = find_blocks(model)
        check_blocks(model, blocks)
        pack = native.available() if pack is None else pack
        source = cls(model, blocks, locate(model, files), list(files), pack)
        for part in (part for block in blocks for part in parts_of(block)):
            stored, wanted = source.entry(part), tuple(model.get_parameter(part.key).shape)
            if stored.shape != wanted:
                raise CheckpointError(
                    f"{part.key} is {list(stored.shape)} in {stored.path} and {list(wanted)} by config.json: the two "
                    "do not belong together. Fetch the checkpoint again."
                )
        return source

    def entry(self, part: Part) -> TensorEntry:
        """Where a block's matrix is stored."""
        found = self.located.by_param.get(part.key)
        if found is not None:
            return found
        why = (
            "transformers makes it out of several stored tensors, which cannot be bundled yet: load the model and "
            "save_pretrained it with save_original_format=False, then repack that"
            if part.key in self.located.merged
            else f"none of its {len(self.files)} files has it: the checkpoint is incomplete, or of another model"
        )
        raise CheckpointError(f"{part.key} was not found in {self.files[0].parent}: {why}.")

    def read(self, part: Part) -> torch.Tensor:
        """A stored matrix, as it is stored."""
        return read_tensor(self.entry(part))

    def dtype_name(self, part: Part) -> str:
        """Its dtype as safetensors names it."""
        return self.entry(part).dtype

    def n_bytes(self, block: FFNBlock) -> int:
        """Bytes of a block's matrices, fused ones counted once."""
        return sum(self.entry(p).n_bytes for p in {q.key: q for q in parts_of(block)}.values())

    def layout(self, block: FFNBlock) -> BundleLayout:
        """Geometry of a block's bundles, in the dtype that the checkpoint stores."""
        names = {self.dtype_name(part) for part in parts_of(block)}
        bad = names - set(DTYPES)
        if bad:
            raise CheckpointError(
                f"{block.path} is stored as {', '.join(sorted(bad))}; FFN weights must be one of {', '.join(DTYPES)}. "
                "A checkpoint that is quantized already cannot be repacked: start from the original weights."
            )
        dtype = next(iter(names)) if len(names) == 1 else "F32"
        plain = BundleLayout(block.d_model, block.d_out, block.gate is not None, DTYPES[dtype])
        can = self.pack and can_pack(plain.dtype, *(block.d_model for _ in range(1 + plain.gated)), block.d_out)
        packed = can and self.surveys.get(block.path, ()) is not None
        return dataclasses.replace(plain, packed=packed)

    def survey(self, block: FFNBlock) -> tuple[int, int] | None:
        """Base and number of escapes of a block's bundles; None where they are not packed. Reads the weights, once."""
        if self.layout(block).packed and block.path not in self.surveys:
            counts = torch.zeros(256, dtype=torch.int64)
            for part in parts_of(block):
                counts += count_exponents(part.weight_of(self.read(part)))
            base, n_escapes = choose_base(counts)
            few = n_escapes <= int(counts.sum()) * MAX_ESCAPES
            self.surveys[block.path] = (base, n_escapes) if few else None
        return self.surveys.get(block.path) if self.layout(block).packed else None

    def can_certify(self, block: FFNBlock) -> bool:
        """Whether the block's activation is zero below a threshold."""
        return zero_below(get_activation(self.model, block)) is not None

    def geometry(self, gate_bits: int) -> dict[str, Geometry]:
        """What the plan needs to know, by module path, before anything is repacked."""
        return {
            block.path: Geometry(self.layout(block), block.d_ffn, gate_bits if self.can_certify(block) else 0)
            for block in self.blocks
        }

    def identity(self) -> str:
        """Hash that changes when the checkpoint does: names, sizes and times, or blob names in a Hub cache.

        A blob is named for its content. What is sketched depends on the activation, which config.json says.
        """
        digest = hashlib.sha256()
        for path in self.files:
            real = path.resolve()
            stat = real.stat()
            when = "" if real.parent.name == "blobs" else stat.st_mtime_ns
            digest.update(f"{path.name}|{real.name}|{stat.st_size}|{when}\n".encode())
        prefix = f"{self.model.base_model_prefix}."  # with a head or without, it is the same checkpoint
        for block in self.blocks:
            name = block.path.removeprefix(prefix)
            digest.update(f"{name}:{block.family}:{self.can_certify(block)}\n".encode())
        return digest.hexdigest()


class LoadedSource(Source):
    """A model whose weights are in memory already; what is written from it belongs to this process alone."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> LoadedSource:
        """Find the FFN blocks of a loaded model, and prove that we compute them right.

        Raises:
            UnknownArchitectureError, BlockMismatchError: the model cannot be patched, and why.
        """
        blocks = find_blocks(model)
        check_blocks(model, blocks)
        return cls(model, blocks, Located({}, {}, frozenset()), [], native.available())

    def read(self, part: Part) -> torch.Tensor:
        return self.model.get_parameter(part.key).detach().cpu()

    def dtype_name(self, part: Part) -> str:
        dtype = self.model.get_parameter(part.key).dtype
        return DTYPE_NAMES.get(dtype, str(dtype))

    def n_bytes(self, block: FFNBlock) -> int:
        keys = {part.key for part in parts_of(block)}
        return sum(p.numel() * p.element_size() for p in map(self.model.get_parameter, keys))

    def identity(self) -> str:
        return uuid.uuid4().hex


def parts_of(block: FFNBlock) -> list[Part]:
    """The matrices of a block that are there."""
    return [part for part in (block.gate, block.up, block.down) if part is not None]


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, on the meta device: structure without weights.

    Raises:
        UnknownArchitectureError: transformers has no class of that name.
    """
    names = list(getattr(config, "architectures", None) or [])
    with torch.device("meta"):
        for name in names:
            cls = getattr(transformers, name, None)
            if cls is not None:
                model: PreTrainedModel = cls(config)
                return model
        if trust_remote_code or not names:
            out: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
            return out
    raise UnknownArchitectureError(
        f"transformers {transformers.__version__} has no model class {' or '.join(names)}. If the repo brings its own "
        "code, pass trust_remote_code=True (--trust-remote-code)."
    )


def repack(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    gate_bits: int = 8,
    max_shard_size: int | str = DEFAULT_SHARD,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    pack: bool | None = None,
    order: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Repack a stock checkpoint into a flash checkpoint folder.

    Args:
        model: a folder, or the name of a Hub repo.
        output: folder to write; an interrupted run's is continued.
        gate_bits: bits of the certified gate's sketch, 4 to 8.
        max_shard_size: bytes of a flash file at most, a layer at least.
        revision, token, trust_remote_code: as in from_pretrained.
        pack: keep bfloat16 bundles in 12 bits a weight (the same weights, a quarter less to read); by default where the
            native kernels are built, which compute on them.
        order: folder of a recording of the model, or of a checkpoint where `calibrate(..., keep_recording=True)` left
            one; neurons that are read together become neighbours. By default rows are in the stock model's order.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        FlashError: what is wrong with the source, the disk or the arguments, and what to do.
    """
    gate_bits = FlashConfig(gate_bits=gate_bits).gate_bits
    folder = hub.local_folder(model, revision=revision, token=token)
    output = Path(output)
    check_folders(folder, output)
    raw_config = load_json(folder / "config.json")
    if raw_config.get("quantization_config"):
        method = raw_config["quantization_config"].get("quant_method")
        word = "a flash checkpoint already" if method == "hf_flash" else f"quantized with {method!r}"
        raise CheckpointError(f"{model} is {word}. Repack the original weights instead.")
    config = read_config(folder, trust_remote_code)
    source = Source.open(meta_model(config, trust_remote_code), checkpoint_files(folder), pack)
    if order is not None:
        source.orders.update(_read_orders(source, order, progress))
    limit = parse_size(max_shard_size)
    n_bytes = sum(e.n_bytes for e in source.located.by_key.values())
    output.mkdir(parents=True, exist_ok=True)
    with only_writer(output), explain_full_disk(output):
        check_contents(output, source.identity())
        check_room(output, _room(source, n_bytes, gate_bits))
        (output / "config.json").unlink(missing_ok=True)  # written last: a folder without it is unfinished
        with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="Repacking", disable=not progress) as bar:
            written = write_flash(source, output, gate_bits, limit, bar)
            written += _write_resident(source, output, limit, bar)
        # Only now is it known which layers could be packed.
        raw_config["quantization_config"] = {**FlashConfig(gate_bits=gate_bits).to_dict(), "ffn": describe(source)}
        copy_side_files(folder, output)
        card.write_card(output, folder, str(model), raw_config["quantization_config"]["ffn"])
        if (output / GATES_NAME).is_file() and (known := GateFile(output / GATES_NAME).calibration):
            raw_config["quantization_config"]["calibration"] = known  # of a run before: the file was kept
            card.write_calibration(output, known)
        remove_others(output, written)
        with atomic_text(output / "config.json") as text:
            text.append(json.dumps(raw_config, indent=2) + "\n")
    return output


def _read_orders(source: Source, recording: str | os.PathLike[str], progress: bool) -> dict[str, torch.Tensor]:
    """An order for every block, from a recording of this model, or from a folder where `calibrate` kept one.

    Raises:
        CheckpointError: it is of another model.
    """
    folder = Path(recording)
    kept = sorted(folder.glob(f"{WORK_NAME}/*/recording"))
    found = Recording.open(kept[0] if kept and not (folder / STATE_NAME).is_file() else folder)
    have = {layer: found.shape(layer) for layer in found.layers}
    want = {block.path: (block.d_model, block.d_ffn) for block in source.blocks}
    if have != want:
        path = next((path for path in want if have.get(path) != want[path]), next(iter(have)))
        raise CheckpointError(
            f"{recording} is a recording of another model: {path} is {have.get(path, 'not in it')} there and "
            f"{want.get(path, 'not in the model')} here (d_model, d_ffn). Record the model that you repack."
        )
    return orders_of(found, progress)


def _room(source: Source, n_bytes: int, gate_bits: int) -> int:
    """Bytes that `n_bytes` of weights take on flash, sketches included."""
    return n_bytes + sum(b.d_ffn * b.d_model * gate_bits // 7 for b in source.blocks if source.can_certify(b))


def describe(source: Source) -> dict[str, Any]:
    """Geometry for config.json: what a reader of the repo wants to know without opening a file."""
    block = source.blocks[0]
    return {
        "n_layers": len(source.blocks), "family": block.family, "gated": block.gate is not None,
        "d_model": block.d_model, "d_ffn": block.d_ffn, "dtype": DTYPE_NAMES[source.layout(block).dtype],
        "row_bytes": source.layout(block).row_bytes, "certified": source.can_certify(block),
        "flash_bytes": sum(b.d_ffn * source.layout(b).row_bytes for b in source.blocks),
    }  # fmt: skip


def write_flash(source: Source, output: Path, gate_bits: int, max_shard_bytes: int, bar: Any) -> list[Path]:
    """Write the flash files, the sketches and, last, the index that makes them complete.

    Returns:
        The files written, gates.safetensors among them where there are sketches.
    """
    return_large_blocks()  # one layer's scratch is to be free before the next
    shards = _shards(source, max_shard_bytes)
    identity = _identity(source, gate_bits)
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    with _gates_writer(source, output, gate_bits, identity) as gates:
        for number, blocks in enumerate(shards, start=1):
            path = output / f"flash-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update({tensor_name(block): path.name for block in blocks})
            _write_shard(source, blocks, path, identity, gates, gate_bits, bar)
            written.append(path)
        if gates is not None:
            gates.finish()
    if any(source.can_certify(block) for block in source.blocks):
        written.append(output / GATES_NAME)
    write_index(output, weight_map, sum(p.stat().st_size for p in written))
    return written


def _identity(source: Source, gate_bits: int) -> str:
    """What a flash file was made from and how; the part before the first dash says from what."""
    order = order_metadata(source).get(ORDER_KEY, "")
    return f"{source.identity()}-{gate_bits}{'p' if source.pack else ''}-v{FORMAT_VERSION}{order and '-' + order}"


def order_metadata(source: Source) -> dict[str, str]:
    """What headers of flash files and sketches say of the order of their rows."""
    if not source.orders:
        return {}
    digest = hashlib.sha256()
    for path, order in sorted(source.orders.items()):
        digest.update(path.encode() + order.numpy().tobytes())
    return {ORDER_KEY: digest.hexdigest()[:16], VERSION_KEY: str(ORDERED_VERSION)}


def tensor_name(block: FFNBlock) -> str:
    """Name of a block's bundles in the flash files."""
    return f"{block.path}.bundles"


def _shards(source: Source, limit: int) -> list[list[FFNBlock]]:
    shards: list[list[FFNBlock]] = [[]]
    size = 0
    for block in source.blocks:
        n = block.d_ffn * source.layout(block).row_bytes
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(block)
        size += n
    return shards


def _write_shard(
    source: Source, blocks: list[FFNBlock], path: Path, identity: str,
    gates: TensorFileWriter | None, gate_bits: int, bar: Any,
) -> None:  # fmt: skip
    geometry = {}
    specs = []
    for block in blocks:
        survey = source.survey(block)
        layout = source.layout(block)
        geometry[tensor_name(block)] = {
            "index": block.index, "module": block.path, "n_neurons": block.d_ffn, "d_model": block.d_model,
            "d_out": block.d_out, "gated": layout.gated, "dtype": DTYPE_NAMES[layout.dtype],
        }  # fmt: skip
        if survey is not None:
            geometry[tensor_name(block)]["exponent"] = survey[0]
            specs.append(TensorSpec(escapes_name(block.path), "I32", (survey[1], 2), 8 * survey[1]))
        if block.path in source.orders:
            specs.append(TensorSpec(order_name(block.path), "I32", (block.d_ffn,), 4 * block.d_ffn))
        run = max(1, RUN_BYTES // layout.row_bytes) * layout.row_bytes
        specs.append(
            TensorSpec(tensor_name(block), "U8", (block.d_ffn, layout.row_bytes), block.d_ffn * layout.row_bytes, run)
        )
    sketched = gates is None or all(f"{b.path}.sketch.norm" in gates.done for b in blocks if source.can_certify(b))
    if sketched and _is_complete(path, identity, geometry):
        bar.update(sum(source.n_bytes(b) for b in blocks))
        return
    metadata = {LAYERS_KEY: json.dumps(geometry), SOURCE_KEY: identity, **order_metadata(source)}
    with contextlib.closing(TensorFileWriter(path, specs, metadata, aligned=True, identity=identity)) as writer:
        for block in blocks:
            stored: dict[str, torch.Tensor] = {}
            _write_block(source, block, writer, gates, gate_bits, stored)
            bar.update(source.n_bytes(block))
        writer.finish()


def _is_complete(path: Path, identity: str, names: Iterable[str] = ()) -> bool:
    """Whether a finished file from the same source, with these tensors, is there (a run was interrupted after it)."""
    if not path.is_file():
        return False
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    return header.metadata.get(SOURCE_KEY) == identity and set(names) <= set(header.entries)


def _write_block(
    source: Source, block: FFNBlock, writer: TensorFileWriter, gates: TensorFileWriter | None, gate_bits: int,
    stored: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    layout = source.layout(block)
    sketched = gates is not None and source.can_certify(block)
    todo_sketch = sketched and gates is not None and f"{block.path}.sketch.norm" not in gates.done
    if tensor_name(block) in writer.done and not todo_sketch:
        return

    order = source.orders.get(block.path)

    def matrix(part: Part) -> torch.Tensor:
        """A row for every neuron, in the order in which they are written."""
        if part.key not in stored:
            stored[part.key] = source.read(part)
        weight = part.weight_of(stored[part.key])
        weight = weight.t() if part is block.down else weight
        return weight if order is None else weight[order]

    gate = None if block.gate is None else matrix(block.gate)
    up = matrix(block.up)
    if order is not None and order_name(block.path) not in writer.done:
        writer.write(order_name(block.path), order.to(torch.int32).numpy().data)
    if tensor_name(block) not in writer.done:
        parts = (up, matrix(block.down), gate)
        rows = _pack_rows(source, block, parts, writer) if layout.packed else layout.pack(*parts)
        writer.write(tensor_name(block), rows.numpy().data)
        del rows
    if todo_sketch and gates is not None:
        sketch = Sketch.of(up if gate is None else gate, gate_bits, seed=block.index)
        for name, tensor in sketch.tensors().items():  # norm comes last and stands for all
            gates.write(f"{block.path}.sketch.{name}", tensor.contiguous().view(torch.uint8).numpy().data)


def _pack_rows(
    source: Source, block: FFNBlock, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    writer: TensorFileWriter,
) -> torch.Tensor:  # fmt: skip
    """A block's bundles in 12 bits a weight, made a few neurons at a time; their escapes are written."""
    survey, layout, (up, down, gate) = source.survey(block), source.layout(block), parts
    assert survey is not None
    out = torch.zeros(block.d_ffn, layout.row_bytes, dtype=torch.uint8)
    whole = dataclasses.replace(layout, packed=False)
    pairs = []
    for start in range(0, block.d_ffn, PACK_NEURONS):
        some = slice(start, min(start + PACK_NEURONS, block.d_ffn))
        rows = whole.pack(up[some], down[some], None if gate is None else gate[some]).view(torch.bfloat16)
        _, packing = pack(rows[:, : layout.n_elements], survey[0], out[some])
        neurons = torch.arange(some.start, some.stop, dtype=torch.int32).repeat_interleave(packing.start.diff())
        pairs.append(torch.stack([neurons, packing.escapes], dim=1))
    escapes = torch.cat(pairs).contiguous()
    if len(escapes):
        writer.write(escapes_name(block.path), escapes.view(torch.uint8).numpy().data)
    return out


@contextlib.contextmanager
def _gates_writer(source: Source, output: Path, bits: int, identity: str) -> Iterator[TensorFileWriter | None]:
    blocks = [block for block in source.blocks if source.can_certify(block)]
    if not blocks or _is_complete(output / GATES_NAME, identity):
        yield None
        return
    specs = sketch_specs(blocks, bits)
    metadata = {GATES_KEY: json.dumps(sketch_kinds(blocks, bits)), SOURCE_KEY: identity, **order_metadata(source)}
    with contextlib.closing(TensorFileWriter(output / GATES_NAME, specs, metadata, identity=identity)) as writer:
        yield writer


def _write_resident(source: Source, output: Path, limit: int, bar: Any) -> list[Path]:
    """Everything that is not on flash, byte for byte under its stock name, and a guard for each name that is.

    Vectors come first: they are loaded through a mapping, and the kernel reads megabytes around whatever is touched.

    Returns:
        The files written.
    """
    ffn = {source.entry(part).name: source.entry(part) for block in source.blocks for part in parts_of(block)}
    shards: list[list[TensorSpec]] = [[TensorSpec(name, e.dtype, (0,), 0) for name, e in ffn.items()]]
    size = 0
    for name, entry in sorted(source.located.by_key.items(), key=lambda item: len(item[1].shape) > 1):
        if name in ffn:
            continue
        if size and size + entry.n_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(TensorSpec(name, entry.dtype, entry.shape, entry.n_bytes))
        size += entry.n_bytes
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    identity = source.identity()
    for name, specs in zip(names, shards, strict=True):
        n_bytes = sum(spec.n_bytes for spec in specs)
        if _is_complete(output / name, identity, [spec.name for spec in specs]):
            bar.update(n_bytes)
            continue
        metadata = {SOURCE_KEY: identity}
        with contextlib.closing(TensorFileWriter(output / name, specs, metadata, identity=identity)) as writer:
            for spec in specs:
                if spec.n_bytes and spec.name not in writer.done:
                    _copy_raw(source.located.by_key[spec.name], writer)
                bar.update(spec.n_bytes)
            writer.finish()
    if len(shards) > 1:
        weight_map = {spec.name: name for name, specs in zip(names, shards, strict=True) for spec in specs}
        total = sum(spec.n_bytes for specs in shards for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with atomic_text(output / WEIGHTS_INDEX) as text:
            text.append(json.dumps(index, indent=2) + "\n")
    return [output / name for name in names]


def _copy_raw(entry: TensorEntry, writer: TensorFileWriter) -> None:
    """Copy one tensor's bytes, through a mapping that the kernel may reclaim."""
    with open(entry.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        with view, view[entry.start : entry.start + entry.n_bytes] as data:
            writer.write(entry.name, data)


def repack_to_cache(source: Source, config: FlashConfig, name: str) -> Path:
    """The flash side of a stock checkpoint, from the cache folder; made there on first use.

    Args:
        source: the stock checkpoint.
        config: gate_bits and cache_dir are used.
        name: of the model, for the folder's name.

    Returns:
        A folder with flash files, sketches and index. Resident tensors stay in the stock files.
    """
    from filelock import FileLock  # noqa: PLC0415

    root = Path(config.cache_dir) if config.cache_dir else default_cache()
    leaf = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name) or "model"
    folder = root / f"{leaf}-{source.identity()[:16]}-{config.gate_bits}bit"
    folder.mkdir(parents=True, exist_ok=True)
    sketches = [GATES_NAME] if any(source.can_certify(block) for block in source.blocks) else []
    with FileLock(folder / ".lock"):
        with contextlib.suppress(CheckpointError):
            names = [*flash_file_names(folder), *sketches]
            if all(_is_complete(folder / name, _identity(source, config.gate_bits)) for name in names):
                return folder
        n_bytes = sum(source.n_bytes(block) for block in source.blocks)
        logger.warning_once(f"Repacking {name} for flash, once, into {folder}.")
        check_room(folder, _room(source, n_bytes, config.gate_bits))
        # from_pretrained calls this where tensors are born on the meta device
        bar = tqdm(total=n_bytes, unit="B", unit_scale=True, desc="Repacking")
        with torch.device("cpu"), explain_full_disk(folder), bar:
            write_flash(source, folder, config.gate_bits, parse_size(DEFAULT_SHARD), bar)
    return folder


def default_cache() -> Path:
    """Where stock checkpoints are repacked to: HF_FLASH_CACHE, else a folder in the Hugging Face cache."""
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(os.environ.get("HF_FLASH_CACHE") or Path(constants.HF_HOME) / "hf_flash")
