"""The norm of one bfloat16 token by a native kernel, to the bit what torch makes of it.

As in attention.py, no documentation promises the order in which torch sums, so nothing relies on it: `agrees` compares
the kernel with torch on tokens of the length at hand.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from hf_flash import native

_PROOFS = 32
_MULTIPLE = 16  # of d_model


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm, or without a bias RMSNorm as transformers' Llama has it. Reference: `reference`, where `agrees`.

    Args:
        x: [..., d] bfloat16, of one token; d a multiple of 16.
        weight, bias: [d] bfloat16.
    """
    lib: Any = native.library()
    out = torch.empty_like(x)
    lib.hf_flash_norm(
        x.data_ptr(), weight.numel(), weight.data_ptr(), native.pointer(bias), eps, out.data_ptr()
    )  # fmt: skip
    return out


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The same in torch's operations."""
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def scale_of(x: torch.Tensor, centred: bool, eps: float) -> torch.Tensor:
    """What the kernel scales by, and the mean that it subtracts (0 for RMSNorm), [2] float32, as `scale_in_torch`.

    In the results, which are rounded, another order of sums hardly ever shows.
    """
    lib: Any = native.library()
    out = torch.empty(2, dtype=torch.float32, device="cpu")
    lib.hf_flash_norm_scale(x.data_ptr(), x.numel(), centred, eps, out.data_ptr(), out[1:].data_ptr())
    return out


def scale_in_torch(x: torch.Tensor, centred: bool, eps: float) -> torch.Tensor:
    """The same in torch's operations."""
    if centred:
        ones = torch.ones(x.shape[-1], dtype=torch.float32, device="cpu")
        _, mean, scale = torch.native_layer_norm(x, ones.shape, ones, torch.zeros_like(ones), eps)
        return torch.cat([scale.view(1), mean.view(1)])
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).view(1)
    return torch.cat([scale, torch.zeros_like(scale)])


@functools.cache
def agrees(d: int, has_bias: bool) -> bool:
    """Whether the kernel and torch give the same bits for tokens of d numbers on this machine."""
    lib = native.library()
    if lib is None or not lib.hf_flash_norms() or d % _MULTIPLE:
        return False
    generator = torch.Generator().manual_seed(d)

    def draw() -> torch.Tensor:
        return torch.randn(d, generator=generator, device="cpu")

    with torch.no_grad():
        for proof in range(_PROOFS):  # numbers of very different sizes: their sum is another one in another order
            x = (draw() * torch.exp(draw() * (proof % 3)) + proof % 5 / 3).bfloat16().view(1, 1, d)
            weight, bias = draw().bfloat16(), draw().bfloat16() if has_bias else None
            if not torch.equal(scale_of(x, has_bias, 1e-5), scale_in_torch(x, has_bias, 1e-5)):
                return False
            if not torch.equal(norm(x, weight, bias, 1e-5), reference(x, weight, bias, 1e-5)):
                return False
    return True
