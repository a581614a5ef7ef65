"""The early gate: guess what a layer will want before its attention has run, and let flash read meanwhile.

A layer's FFN input is its norm of the residual stream after attention. Before attention the stream is nearly that
already, so the same norm of it, scored by the sketch, names most of what the layer will want (DESIGN: 82-85 % of the
strongest neurons of a real model). A wrong guess costs a read, never a wrong token: the layer's own gate decides.

Which norm feeds the FFN is not known from names; it is seen in the first pass, where one norm's output arrives there.

Whether it pays depends on the disk: a second scan of the sketch costs arithmetic and buys waiting. So it is tried: some
tokens without, some with (few, if these are much slower), and the faster way is kept, until it is tried again.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_flash.ffn import FlashFFN
from hf_flash.sparse import EARLY_TOKENS, SparseEngine

logger = logging.get_logger(__name__)

WARM_TOKENS, TRIED_TOKENS, FEW_TOKENS, AGAIN_TOKENS = 24, 12, 3, 2048


class Trial:
    """Whether early gates are on: tried, decided by the time of a token, and tried again later.

    Attributes:
        on: what holds for the token that is being computed.
    """

    def __init__(self) -> None:
        self.on, self._n_tokens = False, 0
        self._last: float | None = None
        self._times: dict[bool, list[float]] = {False: [], True: []}

    def next_token(self, now: float | None) -> None:
        """A token begins, at `now` on time.perf_counter's clock; None for a pass of many, which is not counted."""
        if now is None:
            self._last = None
            return
        if self._last is not None:
            self._times[self.on].append(now - self._last)
        self._last = now
        self._n_tokens += 1
        if self._n_tokens == WARM_TOKENS:
            self._times[False].clear()
        elif self._n_tokens == WARM_TOKENS + TRIED_TOKENS:
            self.on = True
        elif self._hopeless():
            self._n_tokens = WARM_TOKENS + 2 * TRIED_TOKENS
        if self._n_tokens == WARM_TOKENS + 2 * TRIED_TOKENS:
            off_s, on_s = (statistics.median(self._times[way]) for way in (False, True))
            self.on = on_s < 0.98 * off_s
            word = "on" if self.on else "off"
            logger.info(f"hf_flash: early gate {word}: {1e3 * on_s:.1f} ms a token with it, {1e3 * off_s:.1f} without.")
        elif self._n_tokens >= AGAIN_TOKENS:
            self.__init__()  # type: ignore[misc]

    def _hopeless(self) -> bool:
        """Whether a few tokens with it have told enough."""
        trying = self.on and self._n_tokens < WARM_TOKENS + 2 * TRIED_TOKENS and len(self._times[True]) >= FEW_TOKENS
        return trying and statistics.median(self._times[True]) > 1.1 * statistics.median(self._times[False])

    def __deepcopy__(self, memo: dict[int, Any]) -> Trial:
        return self


class EarlyGate:
    """Hooks around one decoder layer.

    Args:
        layer: the decoder layer. ffn: its FFN, with a `SparseEngine`.
        trial: whether to guess. first: whether this is the layer that a token meets first.
    """

    def __init__(self, layer: nn.Module, ffn: FlashFFN, trial: Trial, first: bool) -> None:
        self._ffn, self._trial, self._first = ffn, trial, first
        self._norm: nn.Module | None = None
        self._seen: list[tuple[nn.Module, torch.Tensor]] = []
        norms = [child for child in layer.children() if "Norm" in type(child).__name__]
        self._learning = [norm.register_forward_hook(self._saw) for norm in norms]
        self._learning.append(ffn.register_forward_pre_hook(self._learn))
        self._layer = layer

    def _saw(self, norm: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._seen.append((norm, output))

    def _learn(self, ffn: nn.Module, args: tuple[Any, ...]) -> None:
        source = [norm for norm, output in self._seen if args and output.data_ptr() == args[0].data_ptr()]
        for hook in self._learning:
            hook.remove()
        self._seen, self._learning = [], []
        if source:
            self._norm = source[-1]
            self._layer.register_forward_pre_hook(self._guess, with_kwargs=True)

    @torch.compiler.disable
    def _guess(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        if torch.is_grad_enabled() or not isinstance(stream, torch.Tensor) or self._norm is None:
            return
        engine, few = self._ffn.engine, stream.numel() <= EARLY_TOKENS * stream.shape[-1]
        if self._first:
            self._trial.next_token(time.perf_counter() if few else None)
        if few and self._trial.on and isinstance(engine, SparseEngine):
            x = self._norm(stream)
            engine.early(x if self._ffn.compute_dtype is None else x.to(self._ffn.compute_dtype), self._ffn.biases())

    def __deepcopy__(self, memo: dict[int, Any]) -> EarlyGate:
        return self


def install(model: nn.Module, trial: Trial | None = None) -> int:
    """Give every FFN that can use it an early gate; returns how many there are."""
    found, trial = 0, trial or Trial()
    for path, module in list(model.named_modules()):
        if not isinstance(module, FlashFFN) or not isinstance(module.engine, SparseEngine) or not module.engine.steps:
            continue
        parent = path.rpartition(".")[0]
        while parent and not any("Norm" in type(child).__name__ for child in model.get_submodule(parent).children()):
            parent = parent.rpartition(".")[0]
        if parent:
            EarlyGate(model.get_submodule(parent), module, trial, found == 0)
            found += 1
    return found
