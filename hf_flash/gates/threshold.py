"""Gate `threshold`: leave out neurons whose activation is small, for activations that are never exactly zero.

SiLU and GELU models have no silent neurons, but many that whisper. CATS (arXiv:2404.08763) cuts them: with a threshold
t per layer, set on a text so that a stated share of the activations falls below it (the sparsity),

    y = down((a * [|a| > t]) * up(x)),  a = act(gate(x)),  and without a gate  y = down(a * [|a| > t]),  a = act(up(x)).

**This changes the model's answers.** So it is never chosen unless asked for by name; docs/quality.md has the price.

Which neurons are above the threshold is not known before their gate rows are read, so the sketch that the certified
gate uses guesses: a neuron is read where the activation of its estimated pre-activation is above. Once the row is
there, the true value decides, in the model's own arithmetic. So the result is that of the formula, but for neurons that
the sketch wrongly left out, whose true activation is just above the threshold: the sketch's error is small beside it.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from hf_flash import native, trace
from hf_flash.gates.ago import NEVER, never, note
from hf_flash.gates.certified import BLOCK_NEURONS, INPUTS, Sketch
from hf_flash.ops import Activation
from hf_flash.plan import IntArray

SCORE_TOKENS = 1024  # tokens scored at a time: bounds the scratch memory
DEFAULT_SPARSITY = 0.5
_REACH, _GRID = 64.0, 1 << 14  # where |activation| crosses a threshold is looked for in -64 .. 64


class Thresholded(nn.Module):
    """An activation whose values of at most `threshold` in magnitude are zero; NaN stays.

    In place of a stock block's activation it is the reference of this gate.
    """

    def __init__(self, activation: Activation, threshold: float) -> None:
        super().__init__()
        self.activation, self.threshold = activation, threshold

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]; compared in float32, whatever the dtype."""
        a = self.activation(z)
        return torch.where(a.abs().float() <= self.threshold, torch.zeros((), dtype=a.dtype), a)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class ThresholdGate:
    """Decides by the estimated activation.

    Args:
        sketch: of the gate matrix, or of the up matrix where there is no gate.
        threshold: magnitude at and below which an activation counts as zero.
        activation: the block's own.
    """

    def __init__(self, sketch: Sketch, threshold: float, activation: Activation) -> None:
        self.sketch, self.threshold = sketch, threshold
        self.thresholded = Thresholded(activation, threshold)
        self._offset = sketch.offset()
        self._crossings = crossings(activation, threshold)

    def wanted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Which neurons each token is estimated to need: the reference.

        Args:
            x: [n_tokens, d_model]. bias: [n_neurons] or None.

        Returns:
            [n_tokens, n_neurons] bool. A NaN wants the neuron, and so does a weight that the sketch does not judge.
        """
        return torch.cat([block for _, block in self._blocks(x, bias)], dim=1)

    def _blocks(self, x: torch.Tensor, bias: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
        x32, sketch, out = x.float(), self.sketch, []
        for start in range(0, sketch.norm.shape[0], BLOCK_NEURONS):
            part = slice(start, min(start + BLOCK_NEURONS, sketch.norm.shape[0]))
            scores = x32 @ sketch.dequantize(part.start, part.stop).t()
            if bias is not None:
                scores += bias[part].to(x.dtype).float()
            above = ~(self.thresholded.activation(scores).abs() <= self.threshold)
            out.append((part, above | sketch.norm[part].isinf()))
        return out

    def decide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[IntArray, torch.Tensor]:
        """Which neurons any of some tokens is estimated to need, and how long ago; natively where built.

        Args:
            x: [n_tokens, d_model]. bias: [n_neurons] or None.

        Returns:
            Sorted neuron numbers; [n_neurons] int32, how many tokens ago each was wanted (ago.py), 0 by the last one.
        """
        start = time.perf_counter()
        ago, n_later = never(self.sketch.norm.shape[0]), len(x)
        few = native.available() and x.shape[0] <= native.MAX_TOKENS and self._crossings is not None
        for tokens in x.split(1 if few else SCORE_TOKENS):
            n_later -= len(tokens)
            if few:
                note(ago, self._scan(tokens, bias).unsqueeze(0), n_later)
                continue
            for part, wanted in self._blocks(tokens, bias):
                note(ago[part], wanted, n_later)
        if trace.active is not None:
            trace.active.add(trace.GATE_SCAN, start, time.perf_counter(), neurons=len(ago))
        return (ago < NEVER).nonzero()[:, 0].numpy(), ago

    def _scan(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One token's wanted neurons, [n_neurons] bool: scans that ask where the estimate is above a number."""
        assert self._crossings is not None
        rounded = None if bias is None else bias.detach().to(x.dtype).float().contiguous()

        def above(number: float) -> torch.Tensor:
            found = native.gate(
                x, self.sketch, self._offset, rounded, 0.0, 0.0, 0.0, 0.0, 0.0, float(np.float32(number)), INPUTS
            )  # a bound of width zero: the estimate itself
            return found[1].bool()

        *dips, last = self._crossings
        wanted = above(last[0])
        for low, high in dips:
            wanted = wanted | (above(low) & ~above(high))
        return wanted


def threshold_at(levels: torch.Tensor, sparsity: float) -> float:
    """The threshold for a sparsity, from a table for 1 %, 2 %, ... of the activations; straight lines between them."""
    at = sparsity * (len(levels) + 1) - 1
    low = min(max(int(at), 0), len(levels) - 2)
    a, b = levels[low].item(), levels[low + 1].item()
    return max(0.0, a + (b - a) * (at - low))


def scratch_bytes(d_model: int) -> int:
    """DRAM that scoring takes: inputs in float32, rows of the sketch, scores and what is made of them."""
    return SCORE_TOKENS * (d_model + 4 * BLOCK_NEURONS) * 4 + BLOCK_NEURONS * d_model * 8


def crossings(activation: Activation, threshold: float) -> list[tuple[float, float]] | None:
    """The intervals of z, ascending, in which |activation(z)| is above a threshold; the last one goes to infinity.

    Returns:
        (low, high) pairs, or None where there is no such last interval, or one that comes from minus infinity.
    """
    grid = torch.linspace(-_REACH, _REACH, _GRID + 1, dtype=torch.float32)

    def above(z: torch.Tensor) -> torch.Tensor:
        return ~(activation(z).abs() <= threshold)

    inside = above(grid)
    if inside[0] or not inside[-1]:
        return None
    edges = []
    for i in (inside[1:] != inside[:-1]).nonzero()[:, 0].tolist():
        low, high = grid[i : i + 1].clone(), grid[i + 1 : i + 2].clone()
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) == inside[i] else (low, middle)
        edges.append(float(high if inside[i] else low))
    return list(zip(edges[::2], [*edges[1::2], float("inf")], strict=True))
