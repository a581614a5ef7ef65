"""Thresholds for the gate `threshold`, from what a model's activations are on a text.

Per layer the magnitudes |act(gate x)| of all neurons and tokens are counted in bins as fine as bfloat16, 32,768 of
them: exact for a model that computes in it, within a 128th otherwise, and memory does not grow with the text. What is
kept is a table of 99 thresholds, those that 1 % to 99 % of the activations do not exceed; which of them is used is said
when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_flash.errors import FlashError
from hf_flash.ffn import FlashFFN
from hf_flash.gate_file import Later, sketch_specs
from hf_flash.gates import Sketch
from hf_flash.gates.certified import sketch_bytes
from hf_flash.gates.threshold import threshold_at
from hf_flash.tap import tap

SHOWN = (0.3, 0.5, 0.7, 0.9)  # sparsities in reports
N_LEVELS = 99  # a threshold for each whole per cent
_BINS = 1 << 15  # bit patterns of a bfloat16 without its sign


class Histograms:
    """Counts of |activation| by layer; an observer of `tap`."""

    def __init__(self) -> None:
        self.counts: dict[str, torch.Tensor] = {}

    def observe(self, layer: str, x: torch.Tensor, activations: torch.Tensor) -> None:
        """Count one pass of one layer."""
        counts = self.counts.setdefault(layer, torch.zeros(_BINS, dtype=torch.int64))
        for part in activations.split(64):
            if not part.isfinite().all():
                raise FlashError(f"{layer} gives activations that are not finite; no threshold can be set on them.")
            bins = part.float().view(torch.int32).bitwise_and(0x7FFFFFFF) >> 16
            counts += torch.bincount(bins.flatten(), minlength=_BINS)

    def levels(self, layer: str) -> torch.Tensor:
        """[99] float32: the least thresholds that 1, 2, ... 99 % of a layer's activations do not exceed."""
        below = self.counts[layer].cumsum(0)
        wanted = torch.arange(1, N_LEVELS + 1, dtype=torch.float64) / (N_LEVELS + 1) * below[-1]
        bins = torch.searchsorted(below.double(), wanted)
        return (bins.to(torch.int32) << 16 | 0xFFFF).view(torch.float32)  # the upper end of the bin


def measure(model: PreTrainedModel, batches: Iterable[torch.Tensor], progress: bool = True) -> dict[str, torch.Tensor]:
    """Run a model over a text and set its thresholds.

    Args:
        model: stock, or on flash with gate `all`.
        batches: [B, T] int64 each.
        progress: show a bar.

    Returns:
        Per FFN the thresholds for 1 % to 99 % sparsity, [99] float32.

    Raises:
        FlashError: an activation is not finite, or there was no token.
    """
    counts, body = Histograms(), model.base_model
    ids_name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    total = sum(map(torch.Tensor.numel, batches)) if isinstance(batches, list | tuple) else None
    with tap(model, counts), torch.inference_mode(), tqdm(
        total=total, desc="Thresholds", unit="token", unit_scale=True, disable=not progress
    ) as bar:  # fmt: skip
        for ids in batches:
            body(**{"input_ids": ids, ids_name: ids}, use_cache=False)
            bar.update(ids.numel())
    if not counts.counts:
        raise FlashError("There is no token to set thresholds on: the text is empty.")
    return {layer: counts.levels(layer) for layer in counts.counts}


def sketches(model: PreTrainedModel, bits: int, progress: bool = True) -> Later:
    """The sketches by which the gate guesses: made one layer at a time, from what lies on flash.

    Args:
        model: on flash, with gate `all`.
        bits: 4 to 8.
        progress: show a bar.
    """
    ffns = [module for module in model.modules() if isinstance(module, FlashFFN)]

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for ffn in tqdm(ffns, desc="Sketches", unit="layer", disable=not progress):
            sketch = Sketch.of(ffn.deciding_rows(), bits, seed=ffn.block.index)
            for name, tensor in sketch.tensors().items():
                yield f"{ffn.block.path}.sketch.{name}", tensor

    return Later(sketch_specs([ffn.block for ffn in ffns], bits), made())


def report(model: PreTrainedModel, levels: dict[str, torch.Tensor], bits: int) -> dict[str, Any]:
    """Figures for people: thresholds by layer for some sparsities, and what the sketches take."""
    blocks = [module.block for module in model.modules() if isinstance(module, FlashFFN)]
    rows = [
        {"layer": path, **{f"{share:.0%}": float(f"{threshold_at(table, share):.4g}") for share in SHOWN}}
        for path, table in levels.items()
    ]
    return {"bits": bits, "n_bytes": sum(sketch_bytes(b.d_ffn, b.d_model, bits) for b in blocks), "layers": rows}
