"""Gate `predicted`: a trained low-rank guess of which neurons fire, as in "LLM in a flash" (§3.1).

A neuron fires when its pre-activation w.x + b is above a threshold. Neurons fire together, so a matrix of low rank
tells most of that: scores = outer (inner x) + bias, with `inner` [rank, d_model] and `outer` [d_ffn, rank]. It is
trained on what fired on a text (fit.py), with a loss that gives those that fired and those that did not the same
weight. A neuron is wanted where its score is above the layer's threshold, which is set on tokens held out of the
training so that a stated share of what fires is wanted (the recall).

The paper's predictor sees what the FFN sees, and so does this one. A *lookahead* predictor sees the input of the FFN
one layer earlier: its guess comes a layer early, and only starts reads. What a layer computes is its own gate's to say.

Neurons that fire and are not wanted are lost: this gate changes the model's answers, by as much as its report says.
"""

from __future__ import annotations

import dataclasses
import time

import torch
import torch.nn.functional as F

from hf_flash import trace
from hf_flash.gates.ago import NEVER, never, note
from hf_flash.plan import IntArray

PREDICT_TOKENS = 64  # tokens scored at a time: bounds the scratch memory
TENSORS = ("inner", "outer", "bias")


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Scores of a layer's neurons, of low rank.

    Attributes:
        inner: [rank, d_model] bfloat16. outer: [d_ffn, rank] bfloat16.
        bias: [d_ffn] float32.
        threshold: a neuron is wanted where its score is above.
    """

    inner: torch.Tensor
    outer: torch.Tensor
    bias: torch.Tensor
    threshold: float

    @property
    def rank(self) -> int:
        """Length of what is between the two factors."""
        return self.inner.shape[0]

    @property
    def n_bytes(self) -> int:
        """DRAM that the predictor takes."""
        return predictor_bytes(self.outer.shape[0], self.inner.shape[1], self.rank)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, as gates.safetensors holds them."""
        return {name: getattr(self, name) for name in TENSORS}

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """How likely each neuron fires, on a scale of its own.

        Args:
            x: [n_tokens, d_model], the FFN's input.

        Returns:
            [n_tokens, d_ffn] float32. NaN for an input that holds one.
        """
        return F.linear(F.linear(x.to(torch.bfloat16), self.inner), self.outer).float().add_(self.bias)

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """Which neurons each token is said to need: [n_tokens, d_ffn] bool. A NaN wants every neuron."""
        return ~(self.scores(x) <= self.threshold)


def predictor_tensors(n_neurons: int, d_model: int, rank: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes of a predictor's tensors by name, known before it is made."""
    return {
        "inner": ("BF16", (rank, d_model), 2 * rank * d_model),
        "outer": ("BF16", (n_neurons, rank), 2 * n_neurons * rank),
        "bias": ("F32", (n_neurons,), 4 * n_neurons),
    }


def predictor_bytes(n_neurons: int, d_model: int, rank: int) -> int:
    """DRAM that a predictor of some rank takes."""
    return sum(n_bytes for _, _, n_bytes in predictor_tensors(n_neurons, d_model, rank).values())


def scratch_bytes(n_neurons: int) -> int:
    """DRAM that scoring takes: scores in bfloat16 and float32, what is wanted, its opposite."""
    return PREDICT_TOKENS * n_neurons * 8


class PredictedGate:
    """Decides by a trained predictor.

    Args:
        predictor: of the layer.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def decide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[IntArray, torch.Tensor]:
        """Which neurons any of some tokens are said to need, and how long ago.

        Args:
            x: [n_tokens, d_model]. bias: of the layer; the predictor has learned it.

        Returns:
            Sorted neuron numbers; [n_neurons] int32, how many tokens ago each was wanted (ago.py), 0 by the last one.
        """
        start = time.perf_counter()
        ago, n_later = never(self.predictor.outer.shape[0]), len(x)
        for tokens in x.split(PREDICT_TOKENS):
            n_later -= len(tokens)
            note(ago, self.predictor.wanted(tokens), n_later)
        if trace.active is not None:
            trace.active.add(trace.GATE_SCAN, start, time.perf_counter(), neurons=len(ago))
        return (ago < NEVER).nonzero()[:, 0].numpy(), ago
