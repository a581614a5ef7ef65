"""The flash side: an open flash checkpoint, and reads of bundles from it."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_flash.errors import CheckpointError, ChecksumError
from hf_flash.format import RUN_BYTES, TensorEntry, TensorFile, read_header, run_crcs
from hf_flash.layout import BundleLayout
from hf_flash.memory import Take, aligned_empty, view_bytes
from hf_flash.packing import Packing, can_pack, unpack
from hf_flash.plan import IntArray
from hf_flash.readers import Read, Reader, Ticket

INDEX_NAME = "flash.safetensors.index.json"
GATES_NAME = "gates.safetensors"
LAYERS_KEY = "hf_flash.layers"  # header metadata: geometry of the layers in a flash file
MAX_GAP_BYTES = 8 << 10  # bridging a gap this long costs a device less than another read
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Extent2D:
    """Rows that lie one after the other in a file: the unit that is streamed.

    Attributes:
        name: tensor name.
        file: reader's handle.
        start: byte offset of row 0.
        n_rows, row_bytes: shape.
    """

    name: str
    file: int
    start: int
    n_rows: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class FlashLayer:
    """One FFN on flash: where its bundles lie and how a bundle is laid out."""

    index: int
    path: str  # module path in the model, "model.layers.0.mlp"
    rows: Extent2D
    layout: BundleLayout
    file_name: str
    packing: Packing | None = None
    order: torch.Tensor | None = None  # [n_neurons] int64, the stock model's neuron that each row is; None: the same

    @property
    def n_neurons(self) -> int:
        return self.rows.n_rows

    def split(
        self, rows: torch.Tensor, neurons: slice | IntArray, scratch: Callable[[int, int], torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The three parts of some bundles in whole weights: views where they are not packed.

        Args:
            rows: [n, row_bytes] uint8.
            neurons: whose they are.
            scratch: gives memory for packed ones: (n, bytes of a row) -> [n, bytes] uint8.

        Returns:
            gate [n, d_model] or None, up [n, d_model], down [n, d_out], of the layout's dtype.
        """
        if self.packing is None:
            return self.layout.split(rows)
        whole = scratch(rows.shape[0], self.layout.n_elements * 2)
        self.unpack(rows, neurons, whole.view(torch.bfloat16), (0, self.layout.n_elements))
        return self.layout.split(whole)

    def unpack(
        self, rows: torch.Tensor, neurons: slice | IntArray, out: torch.Tensor, part: tuple[int, int]
    ) -> torch.Tensor:
        """Elements part[0] .. part[1] of some packed bundles, as bfloat16 into `out` [n, part[1] - part[0]]."""
        assert self.packing is not None
        if isinstance(neurons, slice):
            return unpack(rows, self.packing.rows(neurons.start, neurons.stop), part=part, out=out)
        return unpack(rows, self.packing, ids=torch.from_numpy(neurons), part=part, out=out)


class FlashStore:
    """An open flash checkpoint: layers by module path, read through one reader.

    Args:
        files: flash files by name, as the index lists them.
        reader: what reads them.

    Raises:
        CheckpointError: a file is missing, torn or truncated, or holds no bundles.
    """

    def __init__(self, files: Mapping[str, Path], reader: Reader) -> None:
        self.reader = reader
        self.sink = aligned_empty(MAX_GAP_BYTES)  # where the rows go that an extent only passes over
        self.layers: dict[str, FlashLayer] = {}
        self.files = dict(files)
        for file_name, path in self.files.items():
            header = read_header(path)
            _spot_check(header)
            for name, geometry in layers_of(header).items():
                layer = self._layer(header, header.entries[name], geometry, file_name)
                self.layers[layer.path] = layer

    @classmethod
    def open_folder(cls, folder: Path, reader: Reader) -> FlashStore:
        """Open the flash files that a folder's index names."""
        return cls({name: folder / name for name in flash_file_names(folder)}, reader)

    def _layer(self, header: TensorFile, entry: TensorEntry, geometry: dict[str, Any], file_name: str) -> FlashLayer:
        layout = layout_of(geometry)
        rows = Extent2D(entry.name, self.reader.open(entry.path), entry.start, *entry.shape)
        packing = _packing(header, geometry, layout) if layout.packed else None
        order = _order(header, geometry)
        return FlashLayer(geometry["index"], geometry["module"], rows, layout, file_name, packing, order)

    def submit_rows(
        self, layer: FlashLayer, rows: IntArray, targets: torch.Tensor, slots: IntArray, max_gap_rows: int = 0
    ) -> tuple[Ticket, int, int]:
        """Start reading bundles straight into their slots.

        A neuron's matrices lie side by side, so it costs one read ("LLM in a flash", §3.2); neighbours share one.

        Args:
            layer: whose bundles.
            rows: [n] neurons, sorted, unique.
            targets: [n_slots, row_bytes] uint8, page-aligned.
            slots: [n], where in `targets` each goes.
            max_gap_rows: unwanted rows that one read may skip over.

        Returns:
            The ticket to wait for, bytes requested, and the number of reads.
        """
        size = layer.rows.row_bytes
        assert max_gap_rows * size <= len(self.sink)
        return self.reader.submit_rows(
            layer.rows.file, layer.rows.start, size, rows, view_bytes(targets), slots, max_gap_rows,
            view_bytes(self.sink),
        )  # fmt: skip

    def read_rows(self, layer: FlashLayer, rows: IntArray) -> torch.Tensor:
        """Read some bundles into new memory: the plain way, for tests and tools.

        Returns:
            [n, row_bytes] uint8.
        """
        out = torch.empty(len(rows), layer.rows.row_bytes, dtype=torch.uint8)
        view = view_bytes(out.view(-1))
        size = layer.rows.row_bytes
        self.reader.read(
            [
                Read(layer.rows.file, layer.rows.start + row * size, [view[i * size : (i + 1) * size]])
                for i, row in enumerate(rows.tolist())
            ]
        )
        return out

    def close(self) -> None:
        self.reader.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashStore:
        return self


def flash_file_names(folder: Path) -> list[str]:
    """Names of a folder's flash files, from its index.

    Raises:
        CheckpointError: no index, or it does not parse.
    """
    return names_in_index(folder / INDEX_NAME)


def names_in_index(path: Path) -> list[str]:
    """File names in an index, in order, each once."""
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {path.parent} is no flash checkpoint, or an incomplete one. "
            f"Make one with `hf-flash repack MODEL {path.parent}`."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} does not parse ({error}). Fetch it again, or repack the checkpoint.") from error
    return names


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index that lists every flash tensor and its file."""
    text = json.dumps({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}, indent=2) + "\n"
    partial = folder / (INDEX_NAME + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / INDEX_NAME)


def layers_of(header: TensorFile) -> dict[str, dict[str, Any]]:
    """What a flash file says of its layers, by tensor name: index, module, n_neurons, d_model, d_out, gated, dtype.

    Raises:
        CheckpointError: it says nothing, or nothing that can be.
    """
    raw = header.metadata.get(LAYERS_KEY)
    if raw is None:
        raise CheckpointError(f"{header.path} holds no bundles (no {LAYERS_KEY} in its header). Repack the checkpoint.")
    try:
        layers: dict[str, dict[str, Any]] = json.loads(raw)
        for name, layer in layers.items():
            layout = layout_of(layer)
            shape = (layer["n_neurons"], layout.row_bytes)
            if header.entries[name].shape != shape or not {"index", "module"} <= set(layer):
                raise ValueError(f"{name} is {list(header.entries[name].shape)}, expected {list(shape)}")
            if layout.packed:
                _check_packed(header, name, layer, layout)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{header.path}: {LAYERS_KEY} in its header does not fit its tensors ({error!r}). Repack the checkpoint."
        ) from error
    return layers


def _check_packed(header: TensorFile, name: str, layer: Mapping[str, Any], layout: BundleLayout) -> None:
    """Refuse a packed layer that the kernels could not compute on: they check nothing."""
    lengths = (layout.d_model,) * (2 if layout.gated else 1) + (layout.d_out,)
    if not can_pack(layout.dtype, *lengths) or type(layer["exponent"]) is not int or not 0 <= layer["exponent"] <= 240:
        raise ValueError(f"{name} cannot be packed with exponent {layer['exponent']}")
    escapes = header.entries[escapes_name(layer["module"])]
    if escapes.dtype != "I32" or escapes.shape != (escapes.n_bytes // 8, 2) or escapes.n_bytes % 8:
        raise ValueError(f"{escapes.name} is {escapes.dtype} {list(escapes.shape)}, expected I32 [m, 2]")


def layout_of(layer: Mapping[str, Any]) -> BundleLayout:
    """Geometry of a layer's bundles, from what a header says of it."""
    packed = layer.get("exponent") is not None
    return BundleLayout(layer["d_model"], layer["d_out"], layer["gated"], DTYPES[layer["dtype"]], packed)


def escapes_name(module: str) -> str:
    """Tensor of the weights of a packed layer that have no code: I32 [m, 2], neuron and position << 16 | bits."""
    return f"{module}.escapes"


def order_name(module: str) -> str:
    """Tensor that says which of the stock model's neurons each row of a layer is: I32 [n_neurons]."""
    return f"{module}.order"


def _order(header: TensorFile, geometry: Mapping[str, Any]) -> torch.Tensor | None:
    """A layer's order, read into DRAM; None where it is the stock model's.

    Raises:
        ChecksumError: it differs from its checksum. CheckpointError: it does not name every neuron once.
    """
    entry = header.entries.get(order_name(geometry["module"]))
    if entry is None:
        return None
    n = geometry["n_neurons"]
    order = read_checked(header, entry)
    if entry.dtype != "I32" or entry.shape != (n,) or len(order) != 4 * n:
        raise CheckpointError(f"{header.path}: {entry.name} is {entry.dtype} {list(entry.shape)}, expected I32 [{n}].")
    order = order.view(torch.int32).to(torch.int64)
    if not torch.equal(order.sort().values, torch.arange(n)):
        raise CheckpointError(f"{header.path}: {entry.name} does not name every neuron once. Repack the checkpoint.")
    return order


def _packing(header: TensorFile, geometry: Mapping[str, Any], layout: BundleLayout) -> Packing:
    """A layer's escapes, read into DRAM.

    Raises:
        ChecksumError: they differ from their checksum. CheckpointError: they are not sorted, or of no neuron.
    """
    entry = header.entries[escapes_name(geometry["module"])]
    data = read_checked(header, entry)
    pairs = data.view(torch.int32).view(-1, 2)
    neurons, n = pairs[:, 0], geometry["n_neurons"]
    places = (pairs[:, 1].to(torch.int64) >> 16) & 0xFFFF
    if len(pairs) and not (neurons[0] >= 0 and neurons[-1] < n and (neurons.diff() >= 0).all()):
        raise CheckpointError(f"{header.path}: {entry.name} is not in order. Repack the checkpoint.")
    if len(pairs) and not places.max() < layout.n_elements:
        raise CheckpointError(f"{header.path}: {entry.name} names weights that are not there. Repack the checkpoint.")
    start = torch.zeros(n + 1, dtype=torch.int32)
    start[1:] = torch.bincount(neurons, minlength=n).cumsum(0)
    return Packing(layout.n_elements, geometry["exponent"], start, pairs[:, 1].contiguous())


def read_checked(header: TensorFile, entry: TensorEntry, take: Take = aligned_empty) -> torch.Tensor:
    """All bytes of a tensor, compared with their checksum: for what would be wrong everywhere if one bit were.

    Args:
        header, entry: the file and which of its tensors.
        take: gives the memory.

    Returns:
        [n_bytes] uint8.

    Raises:
        CheckpointError: the file ended early. ChecksumError: the bytes differ.
    """
    out = take(entry.n_bytes)
    if not entry.n_bytes:
        return out
    with open(header.path, "rb", buffering=0) as file:
        file.seek(entry.start)
        if file.readinto(out.numpy().data) != entry.n_bytes:
            raise CheckpointError(f"{header.path} ended inside {entry.name}. Fetch it again.")
    run_bytes, crcs = header.checksums.get(entry.name, (RUN_BYTES, []))
    if crcs and run_crcs(out.numpy().data, run_bytes) != crcs:
        raise ChecksumError(f"{header.path}: {entry.name} differs from its checksum. Fetch the file again, or repack.")
    return out


def _spot_check(header: TensorFile, n_runs: int = 1) -> None:
    """Compare the last run of the file with its checksum: cheap, and a torn end is where copies break off.

    Raises:
        ChecksumError: it differs.
    """
    named: Sequence[TensorEntry] = [e for e in header.entries.values() if e.name in header.checksums and e.n_bytes]
    for entry in sorted(named, key=lambda e: e.start)[-n_runs:]:
        run_bytes, crcs = header.checksums[entry.name]
        start = (len(crcs) - 1) * run_bytes
        with open(header.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            data = os.pread(file.fileno(), entry.n_bytes - start, entry.start + start)
        if zlib.crc32(data) != crcs[-1]:
            raise ChecksumError(
                f"{header.path}: the last bytes differ from their checksum; the file is torn. Fetch it again, or "
                "repack; `hf-flash verify` lists every damaged place."
            )
