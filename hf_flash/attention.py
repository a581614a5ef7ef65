"""Attention of a new token, to the bit what torch's scaled_dot_product_attention makes of it, at the speed of memory.

torch computes one bfloat16 query by general matrix products, 1.5 us per cached token and layer of OPT-1.3B; once the
context is long, that outweighs every weight. The kernel here sums in the order that torch's results show
(attention.cpp). No documentation promises that order, so nothing relies on it: `agrees` compares the kernel with torch
on the shape at hand, on inputs whose large terms cancel. Where they differ, torch is asked as ever.

It takes the place of transformers' "sdpa" for the modules that `install` was given, and leaves all others alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from hf_flash import native
from hf_flash.ordered import nearly_opposite

MULTIPLE = 16  # of head_dim
_PROOF_TOKENS = (1, 13, 37, 545, 1040)
_MARK = "_hf_flash_attends"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one query per sequence and head, over all keys.

    Reference: `scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)`, where `agrees`.

    Args:
        q: [B, H, 1, D] bfloat16; D a multiple of 16.
        k, v: [B, H / group, T, D] bfloat16, T at least 1; rows of D lie together.
        scale: of the scores.

    Returns:
        [B, 1, H, D] bfloat16.
    """
    lib: Any = native.library()
    (batch, n_heads, _, size), (_, n_shared, n_tokens, _) = q.shape, k.shape
    out = torch.empty(batch, 1, n_heads, size, dtype=q.dtype, device="cpu")
    lib.hf_flash_attend(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], batch, n_heads,
        n_heads // n_shared, n_tokens, size, scale, out.data_ptr(),
    )  # fmt: skip
    return out


def agrees(n_heads: int, n_shared: int, size: int) -> bool:
    """Whether the kernel and torch give the same bits on this machine, with these threads.

    Args:
        n_heads: of the queries, of all sequences; n_shared: of the keys. size: of a head.
    """
    if native.library() is None or size % MULTIPLE or n_heads < 2 or n_heads % n_shared:
        return False  # torch gives a single head to several threads, which share its sums
    return _compare(n_heads // n_shared, size, torch.get_num_threads())


@functools.cache
def _compare(group: int, size: int, n_threads: int) -> bool:
    """`n_threads` is a part of what was compared. Two heads with keys of their own, as in a cache that is not full."""
    lib = native.library()
    if lib is None or not lib.hf_flash_attention():
        return False
    generator = torch.Generator().manual_seed(n_threads)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    with torch.no_grad():
        for n in _PROOF_TOKENS:
            q, k, v = draw(1, 2 * group, 1, size) * 4, draw(1, 2, n + 3, size), draw(1, 2, n + 3, size).mul(5).exp()
            half, some = size // 2, n // 2
            q[..., half:] = q[..., :half]
            k[..., half:] = nearly_opposite(k[..., :half], generator)
            k[:, :, some : 2 * some] = k[:, :, :some]
            v[:, :, some : 2 * some] = nearly_opposite(v[:, :, :some], generator)
            q, k, v = q.bfloat16(), k.bfloat16()[:, :, :n], v.bfloat16()[:, :, :n]
            found = attend(q, k, v, size**-0.5).transpose(1, 2)
            if not torch.equal(found, scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)):
                return False
    return True


def install(model: nn.Module) -> None:
    """Let a model's attention modules use the kernel where it agrees with torch."""
    AttentionInterface.register("sdpa", forward)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            setattr(module, _MARK, True)


def forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' "sdpa", which see; a new token's by the kernel, if the module is ours."""
    if (
        attention_mask is None and query.shape[2] == 1 and hasattr(module, _MARK)
        and _can(query, key, value) and not dropout and _is_plain(kwargs)
    ):  # fmt: skip
        batch, n_heads, _, size = query.shape
        if agrees(batch * n_heads, batch * key.shape[1], size):
            return attend(query, key, value, size**-0.5 if scaling is None else scaling), None
    stock: Any = sdpa_attention_forward
    out: tuple[torch.Tensor, None] = stock(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out


def _can(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors."""
    bf16 = torch.bfloat16
    if not (q.dtype == k.dtype == v.dtype == bf16 and q.device.type == k.device.type == v.device.type == "cpu"):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    same = q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[3] == k.shape[3] and k.shape[2] > 0
    return same and q.stride(3) == k.stride(3) == v.stride(3) == 1


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked for that only the stock function knows."""
    asked = ("softcap", "output_attentions", "position_bias", "cache", "s_aux")
    return not any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in asked)
