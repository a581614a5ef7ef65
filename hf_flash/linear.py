"""Matrices that are not FFNs, when memory is short.

An embedding on flash costs one row per token, nearly nothing, so it goes there first. What stays in DRAM is packed
(resident.py). Attention and the head are streamed, row by row of their output, only under caps that leave no choice
(each streamed byte is read again for every token).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from hf_flash import native, ordered
from hf_flash.memory import Pool, view_bytes
from hf_flash.ops import autocast_input
from hf_flash.readers import Read, Reader
from hf_flash.resident import Resident, read_matrix
from hf_flash.stats import FlashStats
from hf_flash.store import Extent2D
from hf_flash.stream import Stream

UNPACKED_BYTES = 1 << 18  # of a matrix at a time while it is computed with: stays in the CPU's cache


class _OnFlash(nn.Module):
    """A module whose weight is on flash: `weight` has no numbers, but a dtype and a device to ask for."""

    weight: torch.Tensor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _OnFlash:
        self.weight = fn(self.weight)  # model.to(dtype)
        super()._apply(fn, recurse)
        return self


class OnFlashLinear(_OnFlash):
    """A Linear whose weight comes in pieces.

    Args:
        stock: the module that it replaces; its bias stays a parameter.
    """

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.bias: torch.nn.Parameter | None
        self.register_parameter("bias", stock.bias)
        self.weight = _no_weight(stock.weight.dtype)

    def pieces(self) -> contextlib.AbstractContextManager[Iterator[tuple[int, int, torch.Tensor]]]:
        """The weight, some rows at a time: (start, stop, [stop - start, in_features]), each valid until the next."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], as nn.Linear."""
        if is_compiling():
            return self._untraced(x)
        if torch.is_autocast_enabled("cpu"):
            x = autocast_input(x)
        if torch.is_grad_enabled():
            bias = self.bias
            if x.requires_grad or (bias is not None and bias.requires_grad):
                y: torch.Tensor = _LinearFunction.apply(x, self, bias)
                return y
        return self.compute(x)

    @torch.compiler.disable  # a read is not to be traced; around `forward` it would cost as much as all of it
    def _untraced(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], self.out_features)
        with self.pieces() as pieces:
            for start, stop, rows in pieces:
                bias = None if self.bias is None else self.bias[start:stop].to(x.dtype)
                y[..., start:stop] = F.linear(x, rows.to(x.dtype), bias)
        return y


class FlashLinear(OnFlashLinear):
    """A Linear whose weight is streamed from flash at every call."""

    def connect(self, stream: Stream, rows: Extent2D, dtype: torch.dtype) -> None:
        """Say where the weight lies: rows is [out_features, in_features * itemsize], of the stored dtype."""
        self._stream, self._unit, self._dtype = stream, stream.add(rows), dtype

    @contextlib.contextmanager
    def pieces(self) -> Iterator[Iterator[tuple[int, int, torch.Tensor]]]:
        with self._stream.unit(self._unit) as chunks:
            yield ((start, stop, rows.view(self._dtype)) for start, stop, rows in chunks)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, streamed from flash"


class PackedLinear(OnFlashLinear):
    """A Linear whose weight stays in DRAM in 11 or 12 bits a weight (resident.py)."""

    matrix: Resident

    def connect(self, reader: Reader, rows: Extent2D, exact: bool, pool: Pool) -> None:
        """Read the weight and pack it.

        Args:
            reader: what reads.
            rows: [out_features, in_features * 2], bfloat16.
            exact: compute as torch does, to the bit; else sums are float32 in another order, and faster.
            pool: where it stays.
        """
        self.exact = exact
        n_tokens = 1 if exact else native.MAX_TOKENS if native.library() is not None else 0
        self._most = n_tokens * self.in_features  # entries of an input that the kernels take
        self._n_threads = torch.get_num_threads()
        # Found out now, not when the first token waits.
        self._agrees = exact and ordered.agrees(self.out_features, self.in_features)
        self.matrix = read_matrix(reader, rows, pool)

    @contextlib.contextmanager
    def pieces(self) -> Iterator[Iterator[tuple[int, int, torch.Tensor]]]:
        yield self._unpacked()

    def _unpacked(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        step = max(64, UNPACKED_BYTES // (2 * self.in_features))
        buffer = torch.empty(min(step, self.out_features), self.in_features, dtype=torch.bfloat16, device="cpu")
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            out = buffer[: stop - start]
            yield start, stop, self.matrix.unpack(start, stop, out)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > self._most:
            return super().compute(x)
        bias = self._parameters["bias"]
        if self.exact:
            if x.numel() == self._most and self._can_order(x, bias):
                return self.matrix.matvec(x if x.is_contiguous() else x.contiguous(), bias)
        elif x.dtype in native.CODES:
            return self.matrix.linear(x, bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype))
        return super().compute(x)

    def _can_order(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether the ordered kernel gives torch's bits for this input."""
        if torch.get_num_threads() != self._n_threads:
            self._n_threads = torch.get_num_threads()
            self._agrees = ordered.agrees(self.out_features, self.in_features)
        return self._agrees and x.dtype is torch.bfloat16 and (bias is None or bias.dtype is x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {_bits(self)}"


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: OnFlashLinear, bias: nn.Parameter | None) -> torch.Tensor:
        ctx.module, ctx.bias = module, bias
        return module.compute(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        module: OnFlashLinear = ctx.module
        out = torch.zeros(*grad.shape[:-1], module.in_features, dtype=torch.float32)
        with module.pieces() as pieces:
            for start, stop, rows in pieces:
                out += (grad[..., start:stop] @ rows.to(grad.dtype)).float()
        summed = None if ctx.bias is None else grad.flatten(0, -2).sum(0).to(ctx.bias.dtype)
        return out.to(grad.dtype), None, summed


class OnFlashEmbedding(_OnFlash):
    """An Embedding whose rows are fetched as tokens ask for them.

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

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] int64, sorted and unique -> their rows, [n, embedding_dim], in the stored dtype."""
        raise NotImplementedError

    @torch.compiler.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[...] token ids -> [..., embedding_dim], as nn.Embedding.

        Raises:
            IndexError: an id is out of range, as nn.Embedding does.
        """
        ids = input.reshape(-1).to(torch.int64)
        inverse = None
        if len(ids) > 1:
            ids, inverse = ids.unique(return_inverse=True)
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise IndexError(f"token ids {int(ids[0])}..{int(ids[-1])} are not all below {self.num_embeddings}")
        rows = self.fetch(ids)
        rows = (rows if inverse is None else rows[inverse]).to(self.weight.dtype)
        return rows.view(*input.shape, self.embedding_dim)


class FlashEmbedding(OnFlashEmbedding):
    """An Embedding whose rows are read from flash."""

    def connect(self, reader: Reader, rows: Extent2D, dtype: torch.dtype, stats: FlashStats) -> None:
        """Say where the weight lies: rows is [num_embeddings, embedding_dim * itemsize]."""
        self._reader, self._rows, self._dtype, self._stats = reader, rows, dtype, stats

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
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
        return out.view(self._dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, on flash"


class PackedEmbedding(OnFlashEmbedding):
    """An Embedding that is a head as well, and stays in DRAM in 11 or 12 bits a weight."""

    matrix: Resident

    def connect(self, head: PackedLinear) -> None:
        """Say which head has the weight."""
        self.matrix = head.matrix

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix.fetch(ids)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_bits(self)}"


def _bits(module: PackedLinear | PackedEmbedding) -> str:
    return f"{module.matrix.bits:.1f} bits a weight" if hasattr(module, "matrix") else "packed"


def _no_weight(dtype: torch.dtype) -> torch.Tensor:
    """What `module.weight` shows where the weight is on flash: no numbers, but a dtype and a device to ask for."""
    return torch.empty(0, dtype=dtype, device="cpu")
