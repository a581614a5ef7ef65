"""What lies in a flash checkpoint, as its headers and config.json tell it; no weight is read."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from hf_flash import hub
from hf_flash.checkpoint import load_json
from hf_flash.config import QUANT_METHOD
from hf_flash.errors import CheckpointError
from hf_flash.format import read_header
from hf_flash.gate_file import GateFile
from hf_flash.gates.certified import sketch_bytes
from hf_flash.preview import headers_of
from hf_flash.store import GATES_NAME, LAYERS_KEY


@dataclasses.dataclass(frozen=True)
class LayerContents:
    """The FFN of one layer: shape, how a neuron's bundle lies, and what its sketch takes (0 bits: none).

    `packed` bundles have 12 bits a weight. `calibrated`: it is known what is usual of its inputs and neurons.
    """

    path: str
    n_neurons: int
    d_model: int
    d_out: int
    gated: bool
    dtype: str
    packed: bool
    row_bytes: int
    n_bytes: int
    sketch_bits: int
    sketch_bytes: int
    file: str
    calibrated: bool = False


@dataclasses.dataclass(frozen=True)
class FileContents:
    """A file, its size, and what it holds: "flash", "sketches", "resident" or "other"."""

    name: str
    role: str
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """What lies in a flash checkpoint.

    Attributes:
        name: as it was given.
        model_type, architecture: as config.json has them.
        gate: the gate it would run with. options: the rest of its quantization_config.
        layers, files: in order.
    """

    name: str
    model_type: str
    architecture: str
    gate: str
    options: dict[str, Any]
    layers: list[LayerContents]
    files: list[FileContents]

    def n_bytes(self, role: str) -> int:
        """Bytes of the files of one role."""
        return sum(file.n_bytes for file in self.files if file.role == role)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def contents(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Contents:
    """Describe a flash checkpoint.

    Args:
        model: its folder, or a Hub repo, of which headers are fetched.
        revision, token: as in from_pretrained.

    Raises:
        CheckpointError, HubError: there is none, or it is no flash checkpoint.
    """
    with headers_of(model, revision=revision, token=token) as folder:
        raw = load_json(folder / "config.json")
        options = dict(raw.get("quantization_config") or {})
        method = options.pop("quant_method", None)
        if method != QUANT_METHOD:
            found = f"one quantized with {method!r}" if method else "a stock checkpoint"
            raise CheckpointError(
                f"{model} is {found}, not a flash checkpoint. Make one with `hf-flash repack {model} OUTPUT`, or see "
                f"what it would need with `hf-flash plan {model}`."
            )
        flash, gates = hub.flash_files(folder / "config.json", str(folder))
        layers = _layers(flash, gates)
        files = _files(folder, set(flash))
    # Thresholds come with sketches too, of activations that the certified gate is not for.
    certified = all(layer.sketch_bits for layer in layers) and options.get("ffn", {}).get("certified", True)
    gate = options.get("gate", "auto")
    if gate == "auto":
        gate = "certified" if certified else "all"
    return Contents(
        os.fspath(model), str(raw.get("model_type", "?")), ", ".join(raw.get("architectures") or ["?"]), gate,
        options, layers, files,
    )  # fmt: skip


def _layers(flash: dict[str, Path], gates: Path | None) -> list[LayerContents]:
    gate_file = GateFile(gates) if gates else None
    kinds = gate_file.sketches if gate_file else {}
    found: list[tuple[int, LayerContents]] = []
    for name, path in flash.items():
        header = read_header(path)
        for entry, layer in json.loads(header.metadata.get(LAYERS_KEY, "{}")).items():
            shape = header.entries[entry].shape
            bits = kinds.get(layer["module"], {}).get("bits", 0)
            n, d_model = layer["n_neurons"], layer["d_model"]
            knows = gate_file is not None and gate_file.knows(layer["module"])
            found.append(
                (
                    layer["index"],
                    LayerContents(
                        layer["module"], n, d_model, layer["d_out"], layer["gated"], layer["dtype"],
                        layer.get("exponent") is not None, shape[1], n * shape[1], bits,
                        sketch_bytes(n, d_model, bits, knows) if bits else 0, name, knows,
                    ),
                )
            )  # fmt: skip
    return [layer for _, layer in sorted(found, key=lambda pair: pair[0])]


def _files(folder: Path, flash: set[str]) -> list[FileContents]:
    out = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            role = "flash" if path.name in flash else "sketches" if path.name == GATES_NAME else "other"
            if role == "other" and path.name.startswith("model") and path.suffix == ".safetensors":
                role = "resident"
            out.append(FileContents(path.name, role, path.stat().st_size))
    return out
