"""Matrices that are not FFNs and still do not fit: streamed like them, row by row of their output.

An embedding on flash costs one row per token, nearly nothing, so it goes there first; attention and the head follow
only under caps that leave no choice (each streamed byte is read again for every token).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_flash.memory import view_bytes
from hf_flash.ops import autocast_input
from hf_flash.readers import Read, Reader
from hf_flash.stats import FlashStats
from hf_flash.store import Extent2D
from hf_flash.stream import Stream


class _OnFlash(nn.Module):
    """A module whose weight is on flash: `weight` has no numbers, but a dtype and a device to ask for."""

    weight: torch.Tensor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _OnFlash:
        self.weight = fn(self.weight)  # model.to(dtype)
        super()._apply(fn, recurse)
        return self


class FlashLinear(_OnFlash):
    """A Linear whose weight is streamed from flash at every call.

    Args:
        stock: the module that it replaces; its bias stays a parameter.
        dtype: of the stored weight.
    """

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.bias: torch.nn.Parameter | None
        self.register_parameter("bias", stock.bias)
        self.weight = _no_weight(stock.weight.dtype)
        self._stream: Stream | None = None

    def connect(self, stream: Stream, rows: Extent2D, dtype: torch.dtype) -> None:
        """Say where the weight lies: rows is [out_features, in_features * itemsize]."""
        self._stream, self._unit, self._dtype = stream, stream.add(rows), dtype

    @torch.compiler.disable  # a read is not to be traced
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], as nn.Linear."""
        assert self._stream is not None
        x = autocast_input(x)
        bias = self.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            y: torch.Tensor = _LinearFunction.apply(x, self, bias)
            return y
        return self.compute(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        assert self._stream is not None
        y = x.new_empty(*x.shape[:-1], self.out_features)
        with self._stream.unit(self._unit) as chunks:
            for start, stop, rows in chunks:
                bias = None if self.bias is None else self.bias[start:stop].to(x.dtype)
                y[..., start:stop] = F.linear(x, rows.view(self._dtype).to(x.dtype), bias)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, streamed from flash"


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: FlashLinear, bias: nn.Parameter | None) -> torch.Tensor:
        ctx.module, ctx.bias = module, bias
        return module.compute(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        module: FlashLinear = ctx.module
        assert module._stream is not None
        out = torch.zeros(*grad.shape[:-1], module.in_features, dtype=torch.float32)
        with module._stream.unit(module._unit) as chunks:
            for start, stop, rows in chunks:
                out += (grad[..., start:stop] @ rows.view(module._dtype).to(grad.dtype)).float()
        summed = None if ctx.bias is None else grad.flatten(0, -2).sum(0).to(ctx.bias.dtype)
        return out.to(grad.dtype), None, summed


class FlashEmbedding(_OnFlash):
    """An Embedding whose rows are read from flash as tokens ask for them.

    Args:
        stock: the module that it replaces.
    """

    def __init__(self, stock: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.padding_idx = stock.padding_idx
        self.weight = _no_weight(stock.weight.dtype)
        scale = getattr(stock, "embed_scale", None)  # some families subclass nn.Embedding to scale its output
        assert scale is None and type(stock) is nn.Embedding
        self._reader: Reader | None = None

    def connect(self, reader: Reader, rows: Extent2D, dtype: torch.dtype, stats: FlashStats) -> None:
        """Say where the weight lies: rows is [num_embeddings, embedding_dim * itemsize]."""
        self._reader, self._rows, self._dtype, self._stats = reader, rows, dtype, stats

    @torch.compiler.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] token ids -> [..., embedding_dim], as nn.Embedding.

        Raises:
            IndexError: an id is out of range, as nn.Embedding does.
        """
        assert self._reader is not None
        ids, inverse = input.reshape(-1).unique(return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise IndexError(f"token ids {int(ids[0])}..{int(ids[-1])} are not all below {self.num_embeddings}")
        size = self._rows.row_bytes
        out = torch.empty(len(ids), size, dtype=torch.uint8)
        view = view_bytes(out.view(-1))
        self._reader.read(
            [
                Read(self._rows.file, self._rows.start + i * size, [view[n * size : (n + 1) * size]])
                for n, i in enumerate(ids.tolist())
            ]
        )
        self._stats.add(bytes_read=len(ids) * size, n_reads=len(ids))
        rows = out.view(self._dtype)[inverse].to(self.weight.dtype)
        return rows.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, on flash"


def _no_weight(dtype: torch.dtype) -> torch.Tensor:
    """What `module.weight` shows where the weight is on flash: no numbers, but a dtype and a device to ask for."""
    return torch.empty(0, dtype=dtype, device="cpu")
