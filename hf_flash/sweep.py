"""Gate `all`: every neuron of a layer, from pinned rows and from the stream."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hf_flash import native, ops, ordered, trace
from hf_flash.engine import Engine, Piece, WorkBuffers
from hf_flash.memory import aligned_empty
from hf_flash.native import NativeFFN
from hf_flash.packed_sum import Begun, PackedSum
from hf_flash.stats import FlashStats
from hf_flash.store import FlashLayer
from hf_flash.stream import Stream

TRANSPOSE_ROWS = 128  # rows transposed at a time: stays in the CPU cache


class SweepEngine(Engine):
    """Gate `all`: every neuron of the layer, from pinned rows and from the stream.

    Up and gate products are computed on the rows as they arrive; down rows are gathered so that the one product over
    all neurons is the same operation on the same numbers as in the stock block.

    Args:
        layer: where the bundles are.
        stream: what streams them.
        pinned_rows: neurons from the first on that stay in DRAM once read; all of them makes the layer resident.
        max_tokens: tokens computed in one sweep at most (bounds the hidden activations).
        unpacked: whether a resident layer is kept as the stock matrices although its rows are packed.
        exact: compute as the stock block does, to the bit; else a few tokens' sums over packed rows are float32.
    """

    def __init__(
        self, layer: FlashLayer, stream: Stream, work: WorkBuffers, stats: FlashStats, pinned_rows: int,
        max_tokens: int, unpacked: bool = True, exact: bool = True,
    ) -> None:  # fmt: skip
        self.layer, self._stream, self._work, self._stats = layer, stream, work, stats
        self._unit = stream.add(layer.rows)
        self._step = stream.chunk_rows(self._unit)
        whole = pinned_rows >= layer.n_neurons
        self._pin = layer.n_neurons if whole else pinned_rows // self._step * self._step
        can_sum = layer.packing is not None and native.available() and not (exact and self._step % ordered.MULTIPLE)
        most = max(self._step, self._pin)
        self._sum = PackedSum(layer, self._unit, most, exact, self._scratch) if can_sum else None
        self._to_dense = whole and (unpacked or layer.packing is None)
        stream.announce_pin(self._unit, self._pin)
        self._pinned: torch.Tensor | None = None  # [pin, row_bytes], rows of a layer pinned in part, or packed
        self._dense: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None  # gate, up, down (stock)
        self._max_tokens, self._native = max_tokens, NativeFFN()

    def forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        if self._sum is not None and self._has_its_rows:
            y = self._stream.sum(self._sum, x, act, biases)
            if y is not None:
                return y
        n_tokens = x.numel() // x.shape[-1]
        self._stats.add(neurons_wanted=self.layer.n_neurons)
        if n_tokens > self._max_tokens:
            flat = x.reshape(-1, x.shape[-1])
            parts = [self._forward(part, act, biases) for part in flat.split(self._max_tokens)]
            return torch.cat(parts).view(*x.shape[:-1], -1)
        return self._forward(x, act, biases)

    @property
    def _has_its_rows(self) -> bool:
        """Whether no row is to be kept on the way."""
        return self._pinned is not None or self._pin == 0

    @property
    def lock(self) -> threading.RLock:
        """The stream's."""
        return self._stream.lock

    def as_native(self, act: ops.Activation, biases: ops.Biases) -> NativeFFN | None:
        total = self._sum
        if total is None or not total.exact or not self._has_its_rows:
            return None
        ring = self._stream.as_native(total, act, biases)
        if ring != self._native.stream:
            self._native = NativeFFN(stream=ring or 0, sum=total.address)
        return None if ring is None else self._native

    def native_ended(self, result: int) -> None:
        self._stream.native_ended(result)

    def _forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        if self._dense is None:
            with self._stream.lock:
                if self._dense is None:  # another thread may have pinned the layer meanwhile
                    return self._sweep(x, act, biases)
        t0 = time.perf_counter()
        gate, up, down = self._dense
        y = ops.dense_ffn(x, up, down, act, gate, biases.up, biases.gate, biases.down)
        self._stats.add(compute_s=time.perf_counter() - t0, neurons_hit=self.layer.n_neurons)
        if trace.active is not None:
            trace.active.add(trace.ARITHMETIC, t0, time.perf_counter(), self.layer.path)
        return y

    def _sweep(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        if self._sum is not None and (begun := self._sum.begin(x, act, biases)) is not None:
            return self._sweep_packed(self._sum, begun)
        layout, n = self.layer.layout, self.layer.n_neurons
        column_major = x.dtype == torch.float16  # see ops.project
        shape = (layout.d_out, n) if column_major else (n, layout.d_out)
        down = self._work.get("down", shape, x.dtype)
        h = x.new_empty(*x.shape[:-1], n)
        t0, waited = time.perf_counter(), self._stats.wait_s
        with self._pinning() as chunks:
            for neurons, rows in chunks:
                t1 = time.perf_counter()
                to = down[:, neurons].t() if column_major else down[neurons]
                gate, up = self._split(neurons, rows, to)
                h[..., neurons] = ops.hidden(x, up, act, gate, *biases.part(neurons))
                if trace.active is not None:
                    trace.active.add(trace.ARITHMETIC, t1, time.perf_counter(), self.layer.path)
        t1 = time.perf_counter()
        if column_major:
            y = F.linear(h, down, None if biases.down is None else biases.down.to(x.dtype))
        else:
            y = ops.project(h, down, biases.down)
        if trace.active is not None:
            trace.active.add(trace.ARITHMETIC, t1, time.perf_counter(), self.layer.path)
        self._stats.add(compute_s=time.perf_counter() - t0 - (self._stats.wait_s - waited))
        return y

    def _sweep_packed(self, total: PackedSum, begun: Begun) -> torch.Tensor:
        """Packed rows as they are, summed by native kernels."""
        t0, waited = time.perf_counter(), self._stats.wait_s
        with self._pinning(whole=True) as chunks:
            for neurons, rows in chunks:
                t1 = time.perf_counter()
                total.add(begun, neurons, rows)
                if trace.active is not None:
                    trace.active.add(trace.ARITHMETIC, t1, time.perf_counter(), self.layer.path, native=True)
        self._stats.add(compute_s=time.perf_counter() - t0 - (self._stats.wait_s - waited))
        return total.end(begun)

    def _split(
        self, neurons: slice, rows: torch.Tensor, down: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate and up rows in whole weights; the down columns go to `down` [n, d_out]."""
        layout = self.layer.layout
        if self.layer.packing is None:
            gate, up, down_rows = layout.split(rows)
            down.copy_(down_rows)
            return gate, up
        first, (_, end), rest = layout.parts
        front = self._work.get("unpacked", (rows.shape[0], end), layout.dtype)
        self.layer.unpack(rows, neurons, front, (0, end))
        if down.dtype == layout.dtype and down.stride(1) == 1:
            self.layer.unpack(rows, neurons, down, rest)
        else:
            down.copy_(self.layer.unpack(rows, neurons, torch.empty(down.shape, dtype=layout.dtype), rest))
        return None if first is None else front[:, : layout.d_model], front[:, end - layout.d_model :]

    @contextlib.contextmanager
    def pieces(self, x: torch.Tensor, biases: ops.Biases) -> Iterator[Iterator[Piece]]:
        with self._stream.lock:
            if self._dense is not None:
                gate, up, down = self._dense
                yield iter([(slice(0, self.layer.n_neurons), gate, up, down.t())])
                return
            with self._chunks(None) as chunks:
                yield ((neurons, *self.layer.split(rows, neurons, self._whole_rows)) for neurons, rows in chunks)

    def _scratch(self, n_bytes: int) -> torch.Tensor:
        return self._work.get("sum", (1, n_bytes), torch.uint8)

    def _whole_rows(self, n: int, row_bytes: int) -> torch.Tensor:
        return self._work.get("unpacked", (n, row_bytes), torch.uint8)

    @contextlib.contextmanager
    def _pinning(self, whole: bool = False) -> Iterator[Iterator[tuple[slice, torch.Tensor]]]:
        """`_chunks` for a sweep to its end, after which what is to stay in DRAM is there."""
        pins = self._start_pinning()
        with self._chunks(pins, whole) as chunks:
            yield chunks
        self._finish_pinning(pins)

    @contextlib.contextmanager
    def _chunks(
        self, pins: tuple[torch.Tensor, ...] | None, whole: bool = False
    ) -> Iterator[Iterator[tuple[slice, torch.Tensor]]]:
        """The layer's rows as they lie on flash, a chunk (or all that are in DRAM) at a time, valid until the next."""
        with self._stream.unit(self._unit) as chunks:
            yield self._pinned_and_read(chunks, pins, self._pin if whole else self._step)

    def _pinned_and_read(
        self, chunks: Iterator[tuple[int, int, torch.Tensor]], pins: tuple[torch.Tensor, ...] | None, step: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._pinned is not None:
            self._stats.add(neurons_hit=self._pin)
            for start in range(0, self._pin, step):
                stop = min(start + step, self._pin)
                yield slice(start, stop), self._pinned[start:stop]
        for start, stop, rows in chunks:
            if self._pinned is not None and start < self._pin:  # Ctrl-C came before the stream knew
                continue
            self._stats.add(**{"neurons_hit" if self._stream.was_kept else "neurons_read": stop - start})
            if pins is not None:
                self._pin_chunk(pins, start, stop, rows)
            yield slice(start, stop), rows

    def _start_pinning(self) -> tuple[torch.Tensor, ...] | None:
        """Memory for what this sweep is to leave in DRAM, or None where that is done."""
        layout = self.layer.layout
        if self._pin == 0 or self._pinned is not None:
            return None
        if not self._to_dense:
            return (aligned_empty(self._pin * layout.row_bytes).view(self._pin, layout.row_bytes),)
        n, size = self._pin, layout.dtype.itemsize
        up = aligned_empty(n * layout.d_model * size).view(layout.dtype).view(n, layout.d_model)
        down = aligned_empty(n * layout.d_out * size).view(layout.dtype).view(layout.d_out, n)
        gate = torch.empty_like(up) if layout.gated else up
        return gate, up, down

    def _pin_chunk(self, pins: tuple[torch.Tensor, ...], start: int, stop: int, rows: torch.Tensor) -> None:
        if len(pins) == 1:
            if start < self._pin:
                pins[0][start:stop] = rows
            return
        gate_rows, up_rows, down_rows = self.layer.split(rows, slice(start, stop), self._whole_rows)
        gate, up, down = pins
        up[start:stop] = up_rows
        if gate_rows is not None:
            gate[start:stop] = gate_rows
        for i in range(0, stop - start, TRANSPOSE_ROWS):
            down[:, start + i : min(stop, start + i + TRANSPOSE_ROWS)] = down_rows[i : i + TRANSPOSE_ROWS].t()

    def _finish_pinning(self, pins: tuple[torch.Tensor, ...] | None) -> None:
        if pins is None:
            return
        if len(pins) == 1:
            if self._sum is not None:
                self._sum.pin(pins[0])
            self._pinned = pins[0]
        else:
            gate, up, down = pins
            self._dense = (gate if self.layer.layout.gated else None, up, down)
        held = sum(t.numel() * t.element_size() for t in {id(p): p for p in pins}.values())
        self._stats.add(cache_bytes=held)
        self._stream.pin_first(self._unit, self._pin)
