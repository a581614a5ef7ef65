"""Thresholds for the gate `threshold`, from what a model's activations are on a text.

Per layer the magnitudes |act(gate x)| of all neurons and tokens are counted in bins as fine as bfloat16, 32,768 of them:
exact for a model that computes in it, within a 256th otherwise, and memory does not grow with the text. What is kept is
a table of 99 thresholds, those that 1 % to 99 % of the activations do not exceed; which of them is used is
said when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.families import zero_below
from hf_flash.ffn import FlashFFN
from hf_flash.tap import tap

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


def threshold_at(levels: torch.Tensor, sparsity: float) -> float:
    """The threshold for a sparsity, between those of whole per cents by a straight line."""
    at = sparsity * (N_LEVELS + 1) - 1
    low = min(max(int(at), 0), N_LEVELS - 2)
    a, b = levels[low].item(), levels[low + 1].item()
    return max(0.0, a + (b - a) * (at - low))
