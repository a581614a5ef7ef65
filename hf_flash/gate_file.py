"""gates.safetensors: what gates know of a model. Sketches, predictors, what calibration measured; read piece by piece.

Repacking writes the sketches; whatever is learned later joins them through `rewrite`, which keeps the rest as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_flash.families import FFNBlock
from hf_flash.format import ORDER_KEY, SOURCE_KEY, VERSION_KEY, TensorFile, TensorFileWriter, TensorSpec, read_header
from hf_flash.gates import Predictor, Sketch
from hf_flash.gates.certified import GROUP, SKETCH_KIND, sketch_tensors
from hf_flash.gates.known import Known, known_tensors, levels
from hf_flash.gates.predicted import TENSORS
from hf_flash.memory import Take, aligned_empty, round_up
from hf_flash.store import DTYPE_NAMES, read_checked

GATES_KEY = "hf_flash.gates"  # header metadata: module path -> its sketch
PREDICTORS_KEY = "hf_flash.predictors"  # module path -> its predictor
LOOKAHEAD_KEY = "hf_flash.lookahead"  # module path -> its predictor from another module's input
THRESHOLDS_KEY = "hf_flash.thresholds"  # module path -> its table of thresholds
USUAL_KEY = "hf_flash.usual"  # module path -> what is usual of its inputs and neurons
CALIBRATION_KEY = "hf_flash.calibration"  # what calibration measured
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F32": torch.float32}
_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64", torch.int32: "I32", **DTYPE_NAMES}


class GateFile:
    """An open gates file; only its header is in memory.

    Attributes:
        sketches, predictors, lookahead: what the header says of each, by module path; other kinds are left out.
        thresholds: what the header says of the tables for gate `threshold`, by module path.
        usual: what it says of a layer's usual inputs, by module path: "rest" as in usual.py.
        calibration: what was measured when the others were made, {} without.

    Raises:
        CheckpointError: it is torn.
    """

    def __init__(self, path: Path) -> None:
        self._file: TensorFile = read_header(path)
        kinds = _json(self._file, GATES_KEY)
        self.sketches = {path: kind for path, kind in kinds.items() if kind.get("kind") == SKETCH_KIND}
        self.predictors, self.lookahead = _json(self._file, PREDICTORS_KEY), _json(self._file, LOOKAHEAD_KEY)
        self.thresholds = _json(self._file, THRESHOLDS_KEY)
        self.usual = _json(self._file, USUAL_KEY)
        self.calibration = _json(self._file, CALIBRATION_KEY)

    def sketch(self, path: str, bits: int, take: Take = aligned_empty, known: bool = True) -> Sketch:
        """The first `bits` bits of a module's sketch, in memory that `take` gives; with what is known of it, or not."""
        get = lambda name: self._tensor(f"{path}.sketch.{name}", take)  # noqa: E731
        planes = [get(f"plane{i}") for i in range(5, bits + 1)]
        d_model = self.sketches[path]["d_model"]
        sketch = Sketch(get("nibbles"), planes, get("step"), get("norm"), get("dither"), d_model)
        if known and self.knows(path):
            codes = {b: get(f"known{b}") for b in levels(bits)}
            sketch.known = Known(get("directions"), codes, {b: get(f"known{b}_step") for b in levels(bits)})
        return sketch

    def knows(self, path: str) -> bool:
        """Whether there is what is known of a module's sketch."""
        return path in self.usual and f"{path}.sketch.known4" in self._file.entries

    def use(self, path: str) -> torch.Tensor | None:
        """How often each of a module's neurons fires, [n] float32, 0 to 1; None where nobody counted."""
        return self._tensor(f"{path}.use") if path in self.usual else None

    def predictor(self, path: str, lookahead: bool = False) -> Predictor:
        """A module's predictor, or the one that sees another module's input; in anonymous memory."""
        said, kind = (self.lookahead, "lookahead") if lookahead else (self.predictors, "predictor")
        inner, outer, bias = (self._tensor(f"{path}.{kind}.{name}") for name in TENSORS)
        return Predictor(inner, outer, bias, said[path]["threshold"])

    def levels(self, path: str) -> torch.Tensor:
        """A module's thresholds for 1 %, 2 %, ... 99 % sparsity: [99] float32."""
        return self._tensor(f"{path}.thresholds")

    def _tensor(self, name: str, take: Take = aligned_empty) -> torch.Tensor:
        entry = self._file.entries[name]
        return read_checked(self._file, entry, take).view(_DTYPES[entry.dtype]).view(entry.shape)


def _json(file: TensorFile, key: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(file.metadata.get(key, "{}"))
    return out


def sketch_specs(blocks: Iterable[FFNBlock], bits: int) -> list[TensorSpec]:
    """The tensors that sketches of some FFNs will be."""
    return [
        TensorSpec(f"{block.path}.sketch.{name}", *spec)
        for block in blocks
        for name, spec in sketch_tensors(block.d_ffn, block.d_model, bits).items()
    ]


def known_specs(block: FFNBlock, bits: int) -> list[TensorSpec]:
    """The tensors that say what is known of one sketch, of all sketches that it contains; directions apart."""
    groups = round_up(block.d_model, GROUP) // GROUP
    specs = known_tensors(block.d_ffn, groups, range(4, bits + 1))
    return [TensorSpec(f"{block.path}.sketch.{name}", *spec) for name, spec in specs.items() if name != "directions"]


def sketch_kinds(blocks: Iterable[FFNBlock], bits: int) -> dict[str, dict[str, Any]]:
    """What the header says of them, under GATES_KEY."""
    return {block.path: {"kind": SKETCH_KIND, "bits": bits, "d_model": block.d_model} for block in blocks}


@dataclasses.dataclass(frozen=True)
class Later:
    """Tensors too large to hold together: what they will be, and an iterator that makes one after the other."""

    specs: list[TensorSpec]
    made: Iterable[tuple[str, torch.Tensor]]


def rewrite(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], like: Path,
    instead_of: tuple[str, ...] = (), later: Later | None = None,
) -> None:  # fmt: skip
    """Write a gates file with some tensors and header entries replaced or added, and all else as it was; atomically.

    Args:
        path: of the gates file; there may be none yet.
        tensors: by name.
        metadata: JSON-able values by header key.
        like: a flash file of the same checkpoint, for the name of its source.
        instead_of: tensors of the file with one of these in their name are left out.
        later: tensors that are made while the file is written.
    """
    old = read_header(path) if path.is_file() else None
    new = {*tensors, *(spec.name for spec in later.specs)} if later else {*tensors}
    gone = lambda name: name in new or any(part in name for part in instead_of)  # noqa: E731
    kept = [entry for name, entry in old.entries.items() if not gone(name)] if old else []
    stored = (old or read_header(like)).metadata
    origin = (SOURCE_KEY, ORDER_KEY, VERSION_KEY)
    words = {k: v for k, v in stored.items() if k in origin or (old and not k.endswith("crc32"))}
    words |= {key: json.dumps(value) for key, value in metadata.items()}
    specs = [TensorSpec(entry.name, entry.dtype, entry.shape, entry.n_bytes) for entry in kept]
    specs += [TensorSpec(name, _NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    specs += later.specs if later else []
    with contextlib.closing(TensorFileWriter(path, specs, words)) as writer:
        for entry in kept:
            assert old is not None
            writer.write(entry.name, read_checked(old, entry).numpy().data)
        for name, tensor in itertools.chain(tensors.items(), later.made if later else ()):
            writer.write(name, tensor.contiguous().view(torch.uint8).numpy().data)
        writer.finish()
