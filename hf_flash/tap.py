"""Watching FFNs at work: what each one is given, and what its neurons answer.

Calibration learns from both. Nothing of a block is changed for it: a hook beside the block computes the activations
once more, from the block's own matrices or, piece by piece, from flash. So a model that does not fit in DRAM is watched
under its cap like any other, and its outputs are what they always are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from hf_flash import ops
from hf_flash.errors import FlashError
from hf_flash.families import FFNBlock, find_blocks, get_activation
from hf_flash.ffn import FlashFFN
from hf_flash.gates import CertifiedGate
from hf_flash.sparse import SparseEngine


class Observer(Protocol):
    """Who is told."""

    def observe(self, layer: str, x: torch.Tensor, activations: torch.Tensor) -> None:
        """One pass through one FFN.

        Args:
            layer: path of the FFN.
            x: [n_tokens, d_model], what the FFN was given; valid during the call.
            activations: [n_tokens, d_ffn], what its activation function gave: of the gate where there is one, else of
                the up projection. A gate may leave exact zeros out, which are zero here too.
        """


def watched_blocks(model: nn.Module) -> list[FFNBlock]:
    """The FFNs of a model in its order, whether they lie in DRAM or on flash.

    Raises:
        UnknownArchitectureError: the model has none that is known.
    """
    on_flash = [module.block for module in model.modules() if isinstance(module, FlashFFN)]
    return on_flash or find_blocks(model)


@contextlib.contextmanager
def tap(model: nn.Module, observer: Observer) -> Iterator[list[FFNBlock]]:
    """Tell an observer of every FFN that runs, for as long as the context is open.

    Args:
        model: stock or on flash.
        observer: told after each block, in the order in which they run.

    Returns:
        The blocks that are watched.

    Raises:
        FlashError: the model's gate is one that loses neurons.
    """
    blocks = watched_blocks(model)
    for module in model.modules():
        engine = getattr(module, "engine", None)
        if isinstance(engine, SparseEngine) and not isinstance(engine.gate, CertifiedGate):
            raise FlashError(
                f"The gate of {engine.layer.path} leaves out neurons that fire, so not all that fires would be seen. "
                "Load the model with FlashConfig(gate='all')."
            )

    def told(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: FFNBlock) -> None:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        flat = x.detach().reshape(-1, x.shape[-1])
        with torch.no_grad():
            if isinstance(module, FlashFFN):
                flat = module.cast(flat)
                activations = _from_flash(module, flat)
            else:
                activations = _from_matrices(model, block, flat)
        observer.observe(block.path, flat, activations)

    hooks = []
    for block in blocks:
        module = model.get_submodule(block.path)
        hook = lambda m, args, kwargs, out, b=block: told(m, args, kwargs, b)  # noqa: E731
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield blocks
    finally:
        for handle in hooks:
            handle.remove()


def _from_flash(ffn: FlashFFN, x: torch.Tensor) -> torch.Tensor:
    """[n_tokens, d_ffn]; neurons that the gate proves silent are not read."""
    assert ffn.engine is not None
    out = x.new_zeros(x.shape[0], ffn.block.d_ffn)
    biases = ffn.biases()
    with ffn.engine.pieces(x, biases) as pieces:
        for neurons, gate, up, _ in pieces:
            up_bias, gate_bias = biases.part(neurons)
            rows, bias = (up, up_bias) if gate is None else (gate, gate_bias)
            out[:, neurons] = ops.activations(x, rows, ffn.own_activation, bias)
    return out


def _from_matrices(model: nn.Module, block: FFNBlock, x: torch.Tensor) -> torch.Tensor:
    part = block.up if block.gate is None else block.gate
    bias = part.bias_of(model.get_parameter(part.bias)) if part.bias else None
    rows = part.weight_of(model.get_parameter(part.key))
    return ops.activations(x, rows, get_activation(model, block), bias)
