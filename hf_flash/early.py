"""The early gate: guess what a layer will want before its attention has run, and let flash read meanwhile.

A layer's FFN input is its norm of the residual stream after attention. Before attention the stream is nearly that
already, so the same norm of it, scored by the sketch, names most of what the layer will want (DESIGN: 82-85 % of the
strongest neurons of a real model). A wrong guess costs a read, never a wrong token: the layer's own gate decides.

Which norm feeds the FFN is not known from names; it is seen in the first pass, where one norm's output arrives there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_flash.engine import EARLY_TOKENS, SparseEngine
from hf_flash.ffn import FlashFFN


class EarlyGate:
    """Hooks around one decoder layer.

    Args:
        layer: the decoder layer. ffn: its FFN, with a `SparseEngine`.
    """

    def __init__(self, layer: nn.Module, ffn: FlashFFN) -> None:
        self._ffn, self._norm = ffn, None
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
        engine = self._ffn.engine
        if isinstance(engine, SparseEngine) and stream.numel() <= EARLY_TOKENS * stream.shape[-1]:
            x = self._norm(stream)
            engine.early(x if self._ffn.compute_dtype is None else x.to(self._ffn.compute_dtype), self._ffn.biases())

    def __deepcopy__(self, memo: dict[int, Any]) -> EarlyGate:
        return self


def install(model: nn.Module) -> int:
    """Give every FFN that can use it an early gate; returns how many there are."""
    found = 0
    for path, module in list(model.named_modules()):
        if not isinstance(module, FlashFFN) or not isinstance(module.engine, SparseEngine) or not module.engine.steps:
            continue
        parent = path.rpartition(".")[0]
        while parent and not any("Norm" in type(child).__name__ for child in model.get_submodule(parent).children()):
            parent = parent.rpartition(".")[0]
        if parent:
            EarlyGate(model.get_submodule(parent), module)
            found += 1
    return found
