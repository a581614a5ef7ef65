"""What is usual of a model: in which few directions a layer's inputs lie, and how often each of its neurons fires.

Neither changes an answer. The certified gate bounds only what of an input lies in none of the directions
(gates/known.py), so it wants fewer neurons that do not fire; the caches hold from the start what fires often, and know
a neuron that they have not seen yet. Learned from a recording, layer by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_flash.families import FFNBlock
from hf_flash.ffn import FlashFFN
from hf_flash.gate_file import GateFile, Later, known_specs
from hf_flash.gates.certified import BLOCK_NEURONS, GROUP, sketch_bytes
from hf_flash.gates.known import directions_of, rest_of
from hf_flash.memory import round_up
from hf_flash.recording import Recording

_SAMPLE, _ASIDE = 1024, 0.9  # tokens that directions are found on; the rest of them, on which they are judged
_ROWS = 1024  # tokens counted at a time


@dataclasses.dataclass(frozen=True)
class Usual:
    """What a recording says of one layer.

    Attributes:
        use: [d_ffn] float32, share of the tokens at which each neuron fires.
        directions: as `Known.directions`.
        rest: share of an input's length that none of them holds, on average over tokens that were kept aside.
    """

    use: torch.Tensor
    directions: torch.Tensor
    rest: float


def look(recording: Recording, layer: str) -> Usual:
    """What is usual of a layer, by a recording of it."""
    inputs, n = recording.inputs(layer), recording.n_tokens
    some = inputs[:: max(1, n // _SAMPLE)][:_SAMPLE]
    n_found = max(1, int(len(some) * _ASIDE))
    directions = directions_of(some[:n_found], round_up(inputs.shape[1], GROUP) // GROUP)
    fired = torch.zeros(recording.shape(layer)[1])
    for start in range(0, n, _ROWS):
        fired += recording.fired(layer, start, min(n, start + _ROWS)).sum(0)
    return Usual(fired / n, directions, rest_of(some[n_found:] if n_found < len(some) else some, directions))


def learn(recording: Recording, progress: bool = True) -> dict[str, Usual]:
    """What is usual of each layer, by path."""
    bar = tqdm(recording.layers, desc="Usual inputs", unit="layer", disable=not progress)
    return {layer: look(recording, layer) for layer in bar}


def known(model: PreTrainedModel, gates: Path, found: dict[str, Usual], progress: bool = True) -> Later:
    """What the sketches' rounding does to usual inputs: made one layer at a time, from what lies on flash.

    Args:
        model: on flash, with gate `all`.
        gates: its gates file, with the sketches.
        found: by path.
        progress: show a bar.
    """
    file = GateFile(gates)
    ffns = [m for m in model.modules() if isinstance(m, FlashFFN) and m.block.path in file.sketches]

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for ffn in tqdm(ffns, desc="Rounding errors", unit="layer", disable=not progress):
            path = ffn.block.path
            sketch = file.sketch(path, file.sketches[path]["bits"], known=False)
            sketch = sketch.knowing(ffn.deciding_rows(), found[path].directions)
            assert sketch.known is not None
            for bits in range(4, sketch.bits + 1):
                yield f"{path}.sketch.known{bits}", sketch.known.codes[bits]
                yield f"{path}.sketch.known{bits}_step", sketch.known.steps[bits]

    return Later(
        [spec for ffn in ffns for spec in known_specs(ffn.block, file.sketches[ffn.block.path]["bits"])], made()
    )


def scratch_bytes(block: FFNBlock) -> int:
    """What `known` takes at most while it looks at a layer: its matrix, the sketch, and copies of a few rows."""
    n_weights = block.d_ffn * block.d_model
    return 4 * n_weights + sketch_bytes(block.d_ffn, block.d_model, 8, True) + 4 * BLOCK_NEURONS * block.d_model * 8


def report(found: dict[str, Usual]) -> dict[str, Any]:
    """Figures for people, by layer and of all."""
    rests = {path: usual.rest for path, usual in found.items()}
    fired = {path: float(usual.use.mean()) for path, usual in found.items()}
    rows = [{"layer": path, "rest": round(rests[path], 4), "fired": round(fired[path], 5)} for path in found]
    n = max(1, len(rows))
    return {"rest": round(sum(rests.values()) / n, 4), "fired": round(sum(fired.values()) / n, 5), "layers": rows}
