"""The early gate: guess what a layer will want while the one before waits for flash, and let flash go on reading.

A layer's FFN input is its norm of the residual stream, to which the FFN before and an attention have added little since
the FFN before saw it through a norm of its own. So one norm's output, its scale and shift exchanged for the other's, is
nearly the input to come. Scored by the next layer's sketch, it names most of what that layer will want, and those
reads then have an FFN and an attention to land in. A wrong guess costs a read, never a wrong token: the layer's own
gate decides. The guess is a part of the native step (step.cpp), which looks at those neurons only that are not in DRAM
and came near to firing at the last token.

Which norm feeds an FFN is not known from names; it is seen in the first pass, where its output arrives there. What it
scales and shifts by is found by asking it, since some norms add one to their weight.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from hf_flash.ffn import FlashFFN
from hf_flash.sparse import SparseEngine
from hf_flash.trial import Trial


class _Norm:
    """Hooks that see which norm's output one FFN is given; they go after the first pass.

    Attributes:
        found: the norm, once it is known.
    """

    def __init__(self, parent: nn.Module, ffn: FlashFFN) -> None:
        self.found: nn.Module | None = None
        self._seen: list[tuple[nn.Module, torch.Tensor]] = []
        norms = [child for child in parent.children() if "Norm" in type(child).__name__]
        self._hooks = [norm.register_forward_hook(self._saw) for norm in norms]
        self._hooks.append(ffn.register_forward_pre_hook(self._learn))

    def _saw(self, norm: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._seen.append((norm, output))

    def _learn(self, ffn: nn.Module, args: tuple[Any, ...]) -> None:
        source = [norm for norm, output in self._seen if args and output.data_ptr() == args[0].data_ptr()]
        for hook in self._hooks:
            hook.remove()
        self._seen, self._hooks = [], []
        self.found = source[-1] if source else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Norm:
        return self


class EarlyGate:
    """The FFNs of a model that can guess for each other, in the order in which a token meets them.

    Args:
        ffns: each with a `SparseEngine` that takes native steps; norms: of each.
        trial: whether to guess.
    """

    def __init__(self, ffns: list[FlashFFN], norms: list[_Norm], trial: Trial) -> None:
        self._ffns, self._norms, self._trial = ffns, norms, trial
        self._linked = False

    def pass_begins(self, n_tokens: int) -> None:
        """The first of them is called with so many tokens."""
        if torch.is_grad_enabled():
            return
        if n_tokens == 1 and not self._linked:
            self._link()
        self._trial.next_token(time.perf_counter() if n_tokens == 1 else None)

    def _link(self) -> None:
        """The first pass is over, and norms are known."""
        self._linked = True
        affine = [_affine(norm.found, ffn.block.d_model) for norm, ffn in zip(self._norms, self._ffns, strict=True)]
        for i in range(len(self._ffns) - 1):
            this, following = self._ffns[i].engine, self._ffns[i + 1].engine
            (scale, shift), (next_scale, next_shift) = affine[i], affine[i + 1]
            if not isinstance(this, SparseEngine) or not isinstance(following, SparseEngine) or this is following:
                continue
            if scale.shape == next_scale.shape:
                ratio = torch.where(scale.abs() > 1e-6, next_scale / scale, 0.0)
                this.follow(following, ratio, next_shift - ratio * shift, self._trial)

    def __deepcopy__(self, memo: dict[int, Any]) -> EarlyGate:
        return self


def _affine(norm: nn.Module | None, d_model: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a norm, [d_model] float32: what it makes of inputs that are normal already."""
    one = torch.ones(d_model, dtype=torch.float32, device="cpu")
    if norm is None:
        return one, torch.zeros_like(one)
    x = one.clone()
    x[1::2] = -1
    like = next(norm.parameters(), one)
    with torch.no_grad():
        up, down = (norm((sign * x).to(like.dtype)[None]).float()[0] for sign in (1, -1))
    return (up - down) / 2 * x, (up + down) / 2


def install(model: nn.Module, trial: Trial | None = None) -> int:
    """Let every FFN that can guess for the next one; returns how many there are."""
    ffns, norms = [], []
    for path, module in model.named_modules():
        if not isinstance(module, FlashFFN) or not isinstance(module.engine, SparseEngine) or not module.engine.steps:
            continue
        parent = path.rpartition(".")[0]
        while parent and not any("Norm" in type(child).__name__ for child in model.get_submodule(parent).children()):
            parent = parent.rpartition(".")[0]
        ffns.append(module)
        norms.append((parent, module))
    gates = [_Norm(model.get_submodule(parent), ffn) for parent, ffn in norms]
    if ffns:
        ffns[0].on_pass = [*ffns[0].on_pass, EarlyGate(ffns, gates, trial or Trial()).pass_begins]
    return len(ffns)
