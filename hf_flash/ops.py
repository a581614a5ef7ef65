"""FFN arithmetic, as plain torch: the reference that every kernel is compared with.

An FFN is a sum over its neurons, `y = down_bias + sum_i act(gate_i . x + b_i) * (up_i . x + c_i) * down_i`, so any
subset whose complement is silent gives the same result, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


class Biases(NamedTuple):
    """The biases of a block, each [d_ffn], [d_ffn], [d_out] or None."""

    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None

    def part(self, index: slice | torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Up and gate bias of some neurons, in the order of `ops.hidden`."""
        return (None if self.up is None else self.up[index], None if self.gate is None else self.gate[index])


NO_BIASES = Biases()


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that a stock Linear would compute in: under torch.autocast that is not x's own."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def hidden(
    x: torch.Tensor,
    up: torch.Tensor,
    act: Activation,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Activations of some neurons: `act(gate x) * (up x)`, or `act(up x)` without a gate.

    Args:
        x: [..., d_model].
        up: [n, d_model], any dtype; computed in x's.
        act: elementwise activation.
        gate: [n, d_model] or None.
        up_bias, gate_bias: [n] or None.

    Returns:
        [..., n], dtype of x.
    """
    if gate is None:
        return activations(x, up, act, up_bias)
    u = F.linear(x, up.to(x.dtype), None if up_bias is None else up_bias.to(x.dtype))
    return activations(x, gate, act, gate_bias) * u


def activations(x: torch.Tensor, rows: torch.Tensor, act: Activation, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the activation gives: of the gate rows of some neurons, or of their up rows where there is no gate.

    Args:
        x: [..., d_model]. rows: [n, d_model], any dtype; computed in x's. bias: [n] or None.

    Returns:
        [..., n], dtype of x. A neuron whose entry is zero adds nothing to the FFN's output.
    """
    return act(F.linear(x, rows.to(x.dtype), None if bias is None else bias.to(x.dtype)))


def project(h: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the down rows of some neurons, weighted by their activations.

    Args:
        h: [..., n].
        down: [n, d_out], a row per neuron (the stock matrix transposed).
        down_bias: [d_out] or None.

    Returns:
        [..., d_out], dtype of h. Always a fresh tensor: some models add in place to what they get.
    """
    down = down.to(h.dtype)
    flat = h.reshape(-1, h.shape[-1])
    if h.dtype == torch.float16:  # mm with a row-major right side runs at 0.3 GB/s in fp16; linear at 20
        out = F.linear(flat, down.t().contiguous())
        out = out if down_bias is None else out + down_bias.to(h.dtype)
    elif down_bias is None:
        out = torch.mm(flat, down)
    else:
        out = torch.addmm(down_bias.to(h.dtype), flat, down)
    return out.reshape(*h.shape[:-1], down.shape[-1])


def dense_ffn(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    act: Activation,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A whole FFN from its stock matrices, operation for operation what the stock block does.

    Args:
        x: [..., d_model].
        up, gate: [d_ffn, d_model]; gate None where the block has none.
        down: [d_out, d_ffn], as stock checkpoints hold it.
        act: elementwise activation.
        up_bias, gate_bias: [d_ffn] or None; down_bias: [d_out] or None.

    Returns:
        [..., d_out], dtype of x.
    """
    h = hidden(x, up, act, gate, up_bias, gate_bias)
    return F.linear(h, down.to(x.dtype), None if down_bias is None else down_bias.to(x.dtype))
