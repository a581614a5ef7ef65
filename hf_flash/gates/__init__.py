"""Gates: what decides which neurons a token needs. Gate `all` needs no code of its own: it wants every neuron."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_flash.gates.certified import CertifiedGate, Sketch
from hf_flash.gates.predicted import PredictedGate, Predictor
from hf_flash.gates.threshold import Thresholded, ThresholdGate
from hf_flash.plan import IntArray

__all__ = ["CertifiedGate", "Gate", "PredictedGate", "Predictor", "Sketch", "ThresholdGate", "Thresholded"]


class Gate(Protocol):
    """Decides which neurons some tokens need."""

    def decide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[IntArray, torch.Tensor]:
        """Sorted numbers of the neurons that any token needs; [n_neurons] int32, how many tokens ago (ago.py)."""
