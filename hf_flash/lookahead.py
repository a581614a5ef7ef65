"""Lookahead: one layer's input tells what the next one will want, so its reads start a layer early.

The early gate (early.py) guesses from the residual stream just before a layer's attention; this one guesses a whole
layer sooner, from what the FFN before is given, by a predictor that was trained for that (calibrate.py). The reads
then have that FFN and an attention to land in. The layer's own gate, predicted or certified, decides what is computed,
and what the guess missed is read then. Like the early gate it is tried at run time, and kept only where a token gets
faster.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_flash import native
from hf_flash.ffn import FlashFFN
from hf_flash.gates import PredictedGate, Predictor
from hf_flash.sparse import SparseEngine
from hf_flash.trial import Trial


class Lookahead:
    """A hook on one FFN that starts the reads of another.

    Args:
        ahead: the FFN that will run, with a `SparseEngine`.
        predictor: of its neurons, from the input of the one that is hooked.
        trial: whether to guess. first: whether a token meets the hooked FFN first.
    """

    def __init__(self, ahead: FlashFFN, predictor: Predictor, trial: Trial, first: bool) -> None:
        self._ahead, self._gate, self._trial, self._first = ahead, PredictedGate(predictor), trial, first

    @torch.compiler.disable
    def __call__(self, ffn: nn.Module, args: tuple[Any, ...]) -> None:
        x, engine = args[0], self._ahead.engine
        few = x.numel() <= native.MAX_TOKENS * x.shape[-1]
        if torch.is_grad_enabled() or not isinstance(engine, SparseEngine):
            return
        if self._first:
            self._trial.next_token(time.perf_counter() if few else None)
        if few and self._trial.on:
            flat = x.reshape(-1, x.shape[-1])
            engine.prefetch(self._gate.decide(flat)[0], flat.shape[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Lookahead:
        return self


def install(model: nn.Module, pairs: Iterable[tuple[str, str, Predictor]], trial: Trial | None = None) -> None:
    """Hook FFNs of a model.

    Args:
        model: on flash.
        pairs: path of the FFN whose input is seen, path of the FFN that is guessed, predictor; in the model's order.
        trial: whether to guess, and when; by default where it makes tokens faster.
    """
    ffns = {module.block.path: module for module in model.modules() if isinstance(module, FlashFFN)}
    trial = trial or Trial()
    for number, (seen, guessed, predictor) in enumerate(pairs):
        ffns[seen].register_forward_pre_hook(Lookahead(ffns[guessed], predictor, trial, number == 0))
