"""How one layer's FFN is computed from flash: every neuron in a sweep, or the few that a gate names.

Both engines give the FFN's output for an input; `pieces` gives the same weights piece by piece, which is what the
gradient needs. Neither holds parameters, and one engine serves all copies of a module, on all threads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_flash import native, ops, trace
from hf_flash.cache import NeuronCache
from hf_flash.gates import CertifiedGate
from hf_flash.memory import aligned_empty
from hf_flash.packing import sparse_ffn
from hf_flash.plan import IntArray
from hf_flash.readers import Ticket
from hf_flash.stats import FlashStats
from hf_flash.step import NativeStep
from hf_flash.store import FlashLayer, FlashStore
from hf_flash.stream import Stream

EARLY_TOKENS = 2  # more want so much of a layer that guessing it does not pay
TRANSPOSE_ROWS = 128  # rows transposed at a time: stays in the CPU cache


Piece = tuple[slice | torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]  # neurons, gate, up, down rows


class Engine(ABC):
    """Computes one FFN from flash."""

    layer: FlashLayer

    @abstractmethod
    def forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        """The FFN's output.

        Args:
            x: [..., d_model].

        Returns:
            [..., d_out], dtype of x.

        Raises:
            ReadError: flash failed; the model stays usable.
        """

    @abstractmethod
    def pieces(self, x: torch.Tensor, biases: ops.Biases) -> contextlib.AbstractContextManager[Iterator[Piece]]:
        """Every neuron that can contribute for `x`, piece by piece; each valid until the next step."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self


class WorkBuffers:
    """Scratch memory that all layers of a model share, one buffer per name; whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self.lock = threading.RLock()

    def get(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < n_bytes:
            buffer = self._buffers[name] = aligned_empty(n_bytes)
        return buffer[:n_bytes].view(dtype).view(shape)

    def forget(self) -> None:
        """Take fresh memory from now on; the old lives until whoever still reads into it is done."""
        self._buffers = {}


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
    """

    def __init__(
        self, layer: FlashLayer, stream: Stream, work: WorkBuffers, stats: FlashStats, pinned_rows: int,
        max_tokens: int, unpacked: bool = True,
    ) -> None:  # fmt: skip
        self.layer, self._stream, self._work, self._stats = layer, stream, work, stats
        self._unit = stream.add(layer.rows)
        self._step = stream.chunk_rows(self._unit)
        whole = pinned_rows >= layer.n_neurons
        self._pin = layer.n_neurons if whole else pinned_rows // self._step * self._step
        self._numbers = torch.arange(self._step)
        self._to_dense = whole and (unpacked or layer.packing is None)
        stream.announce_pin(self._unit, self._pin)
        self._pinned: torch.Tensor | None = None  # [pin, row_bytes], rows of a layer pinned in part, or packed
        self._dense: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None  # gate, up, down (stock)
        self._max_tokens = max_tokens

    def forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        n_tokens = x.numel() // x.shape[-1]
        self._stats.add(neurons_wanted=self.layer.n_neurons)
        if n_tokens > self._max_tokens:
            flat = x.reshape(-1, x.shape[-1])
            parts = [self._forward(part, act, biases) for part in flat.split(self._max_tokens)]
            return torch.cat(parts).view(*x.shape[:-1], -1)
        return self._forward(x, act, biases)

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
        code = self._code(x, act)
        if code is not None:
            return self._few_tokens(x, code, biases)
        layout, n = self.layer.layout, self.layer.n_neurons
        column_major = x.dtype == torch.float16  # see ops.project
        shape = (layout.d_out, n) if column_major else (n, layout.d_out)
        down = self._work.get("down", shape, x.dtype)
        h = x.new_empty(*x.shape[:-1], n)
        pins = self._start_pinning()
        t0, waited = time.perf_counter(), self._stats.wait_s
        with self._chunks(pins) as chunks:
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
        self._finish_pinning(pins)
        self._stats.add(compute_s=time.perf_counter() - t0 - (self._stats.wait_s - waited))
        return y

    def _code(self, x: torch.Tensor, act: ops.Activation) -> tuple[int, float] | None:
        """What the native kernel for packed rows wants to know, where it can do this pass."""
        if self.layer.packing is None or not native.available() or x.numel() > native.MAX_TOKENS * x.shape[-1]:
            return None
        return native.any_activation_code(act, x.dtype)

    def _few_tokens(self, x: torch.Tensor, code: tuple[int, float], biases: ops.Biases) -> torch.Tensor:
        """Packed rows as they are, chunk by chunk, summed in float32."""
        layout, flat = self.layer.layout, x.reshape(-1, x.shape[-1])
        y = torch.zeros(flat.shape[0], layout.d_out, dtype=torch.float32, device="cpu")
        packing = self.layer.packing
        assert packing is not None
        pins = self._start_pinning()
        t0, waited = time.perf_counter(), self._stats.wait_s
        with self._chunks(pins) as chunks:
            for neurons, rows in chunks:
                up, gate = biases.part(neurons)
                slots = self._numbers[: rows.shape[0]]
                some = packing.rows(neurons.start, neurons.stop)
                y += sparse_ffn(flat, rows, slots, slots, some, layout.gated, code, gate, up)[0]
        self._finish_pinning(pins)
        self._stats.add(compute_s=time.perf_counter() - t0 - (self._stats.wait_s - waited))
        y = y if biases.down is None else y + biases.down
        return y.to(x.dtype).view(*x.shape[:-1], layout.d_out)

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

    def _whole_rows(self, n: int, row_bytes: int) -> torch.Tensor:
        return self._work.get("unpacked", (n, row_bytes), torch.uint8)

    @contextlib.contextmanager
    def _chunks(self, pins: tuple[torch.Tensor, ...] | None) -> Iterator[Iterator[tuple[slice, torch.Tensor]]]:
        """The layer's rows as they lie on flash, a chunk at a time, each valid until the next."""
        with self._stream.unit(self._unit) as chunks:
            yield self._pinned_and_read(chunks, pins)

    def _pinned_and_read(
        self, chunks: Iterator[tuple[int, int, torch.Tensor]], pins: tuple[torch.Tensor, ...] | None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._pinned is not None:
            self._stats.add(neurons_hit=self._pin)
            for start in range(0, self._pin, self._step):
                stop = min(start + self._step, self._pin)
                yield slice(start, stop), self._pinned[start:stop]
        for start, stop, rows in chunks:
            if self._pinned is not None and start < self._pin:  # Ctrl-C came before the stream knew
                continue
            self._stats.add(neurons_read=stop - start)
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
            self._pinned = pins[0]
        else:
            gate, up, down = pins
            self._dense = (gate if self.layer.layout.gated else None, up, down)
        held = sum(t.numel() * t.element_size() for t in {id(p): p for p in pins}.values())
        self._stats.add(cache_bytes=held)
        self._stream.pin_first(self._unit, self._pin)


class SparseEngine(Engine):
    """Gate `certified`: the neurons that cannot be proved silent, from the cache, the missing ones from flash.

    Args:
        store, layer: where bundles come from.
        gate: which neurons are wanted.
        cache: slots in DRAM.
        batch_rows: rows computed on at a time (bounds the scratch memory).
        work: scratch shared by all layers, used under `work.lock`.
    """

    def __init__(
        self, store: FlashStore, layer: FlashLayer, gate: CertifiedGate, cache: NeuronCache,
        batch_rows: int, work: WorkBuffers, stats: FlashStats,
    ) -> None:  # fmt: skip
        self.layer, self.gate, self.cache = layer, gate, cache
        self._store, self._work, self._stats = store, work, stats
        self._batch_rows = batch_rows
        self._step = NativeStep(store, layer, gate, cache, stats) if NativeStep.can(store, layer) else None

    def forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [T, d_model]
        if self._step is not None and 0 < flat.shape[0] <= native.MAX_TOKENS:
            found = self._native_step(self._step, flat, act, biases)
            if found is not None:
                return found.view(*x.shape[:-1], found.shape[-1])
        t0, waited = time.perf_counter(), self._stats.wait_s
        neurons, recent = self._wanted(flat, biases)
        t1 = time.perf_counter()
        if trace.active is not None:
            trace.active.add(trace.GATE, t0, t1, self.layer.path, wanted=len(neurons))
        few = native.available() and flat.shape[0] <= native.MAX_TOKENS
        code = native.activation_code(act, flat.dtype) if few else None
        if code is not None and self.cache.fits(neurons):
            y, n_fired = self._few_tokens(flat, code, biases, neurons)
        else:
            y, n_fired = self._many_tokens(flat, act, biases, neurons, recent)
        busy_s = time.perf_counter() - t1 - (self._stats.wait_s - waited)
        self._stats.add(gate_s=t1 - t0, compute_s=busy_s, neurons_fired=n_fired)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _native_step(
        self, step: NativeStep, flat: torch.Tensor, act: ops.Activation, biases: ops.Biases
    ) -> torch.Tensor | None:
        with self.cache.lock:
            try:
                return step.run(flat, act, biases)
            except BaseException:  # Ctrl-C too: no slot is trusted again, and none is given away while it is read into
                step.settle()
                self.cache.reset()
                raise

    @property
    def steps(self) -> bool:
        """Whether a few tokens take one native call."""
        return self._step is not None

    def early(self, x: torch.Tensor, biases: ops.Biases) -> None:
        """Start reading what the layer will likely want, from a guess of its input [..., d_model]."""
        flat = x.reshape(-1, x.shape[-1])
        if self._step is None or not 0 < flat.shape[0] <= EARLY_TOKENS:
            return
        with self.cache.lock:
            try:
                self._step.early(flat, biases)
            except BaseException:
                self._step.settle()
                self.cache.reset()
                raise

    def _few_tokens(
        self, flat: torch.Tensor, code: tuple[int, float], biases: ops.Biases, neurons: IntArray
    ) -> tuple[torch.Tensor, int]:
        """The native kernel on the slots themselves: no row is copied."""
        layout = self.layer.layout
        with self._guard(flat.shape[0]):
            lookup = self.cache.fetch(neurons)
            self._wait(lookup.ticket)
            ids, slots = torch.from_numpy(neurons), torch.from_numpy(lookup.slots)
            up, gate = biases.part(ids)
            if self.layer.packing is not None:
                packing = self.layer.packing
                y, n_fired = sparse_ffn(flat, self.cache.rows, slots, ids, packing, layout.gated, code, gate, up)
            else:
                y, n_fired = native.sparse_ffn(
                    flat, self.cache.rows, slots, layout.d_model, layout.d_out, layout.gated, layout.dtype, code,
                    gate, up,
                )  # fmt: skip
        return (y if biases.down is None else y + biases.down).to(flat.dtype), n_fired

    def _many_tokens(
        self, flat: torch.Tensor, act: ops.Activation, biases: ops.Biases, neurons: IntArray, recent: IntArray
    ) -> tuple[torch.Tensor, int]:
        """Matrix products on gathered rows, batch by batch."""
        y: torch.Tensor | None = None
        wide = torch.promote_types(flat.dtype, torch.float32)  # what parts are summed in
        fired = torch.zeros(self.layer.n_neurons, dtype=torch.bool)
        alone = len(neurons) <= min(self._batch_rows, self.cache.n_slots)
        with self._batches(neurons, recent, flat.shape[0]) as batches:
            for index, gate, up, down in batches:
                t1 = time.perf_counter()
                h = ops.hidden(flat, up, act, gate, *biases.part(index))
                fired[index] = (h != 0).any(0)
                if alone:  # one product, rounded once, as in the dense block
                    y = ops.project(h, down, biases.down)
                else:
                    part = ops.project(h.to(wide), down)
                    y = part if y is None else y.add_(part)
                if trace.active is not None:
                    trace.active.add(trace.ARITHMETIC, t1, time.perf_counter(), self.layer.path)
        if y is None or not alone:
            y = torch.zeros(flat.shape[0], self.layer.layout.d_out, dtype=wide) if y is None else y
            y = (y if biases.down is None else y + biases.down).to(flat.dtype)
        return y, int(fired.sum())

    def _wanted(self, flat: torch.Tensor, biases: ops.Biases) -> tuple[IntArray, IntArray]:
        """Neurons that any token wants, and (where they do not all fit) those that the last one does; both sorted."""
        bias = biases.gate if self.layer.layout.gated else biases.up
        neurons, recent = self.gate.decide(flat, bias)
        return neurons, neurons if self.cache.fits(neurons) else recent.nonzero()[:, 0].numpy()

    def pieces(self, x: torch.Tensor, biases: ops.Biases) -> contextlib.AbstractContextManager[Iterator[Piece]]:
        flat = x.reshape(-1, x.shape[-1])
        return self._batches(*self._wanted(flat, biases), flat.shape[0])

    @contextlib.contextmanager
    def _batches(self, neurons: IntArray, recent: IntArray, n_tokens: int) -> Iterator[Iterator[Piece]]:
        with self._guard(n_tokens):
            if self.cache.fits(neurons):
                lookup = self.cache.fetch(neurons)
                self._wait(lookup.ticket)
                yield self._from_slots(neurons, lookup.slots)
            else:
                with contextlib.closing(self._sweep(neurons, recent)) as batches:
                    yield batches

    @contextlib.contextmanager
    def _guard(self, n_tokens: int) -> Iterator[None]:
        """The cache and the scratch are this thread's; if the pass is stopped, neither is trusted again."""
        with self._work.lock, self.cache.lock:
            try:
                if self._step is not None:
                    self._step.land()
                self.cache.window.tick(n_tokens)
                yield
            except BaseException:  # Ctrl-C too: memory that a read may still fill must not be used again
                if self._step is not None:
                    self._step.settle()
                self.cache.reset()
                self._work.forget()
                raise

    def _wait(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            t0 = time.perf_counter()
            ticket.wait()
            self._stats.add(wait_s=time.perf_counter() - t0)
            if trace.active is not None:
                trace.active.add(trace.WAIT, t0, time.perf_counter(), self.layer.path)

    def _from_slots(self, neurons: IntArray, slots: IntArray) -> Iterator[Piece]:
        for i in range(0, len(neurons), self._batch_rows):
            index = torch.from_numpy(slots[i : i + self._batch_rows])
            rows = self._work.get("rows", (len(index), self.layer.layout.row_bytes), torch.uint8)
            torch.index_select(self.cache.rows, 0, index, out=rows)
            yield self._piece(neurons[i : i + self._batch_rows], rows)

    def _piece(self, neurons: IntArray, rows: torch.Tensor) -> Piece:
        return (torch.from_numpy(neurons), *self.layer.split(rows, neurons, self._whole_rows))

    def _whole_rows(self, n: int, row_bytes: int) -> torch.Tensor:
        return self._work.get("unpacked", (n, row_bytes), torch.uint8)

    def _sweep(self, neurons: IntArray, recent: IntArray) -> Generator[Piece]:
        """More neurons than slots: those in DRAM first, then the others, the next batch being read meanwhile."""
        slots = self.cache.cached(neurons)
        here = slots >= 0
        self._stats.add(neurons_wanted=len(neurons), neurons_hit=int(here.sum()), neurons_read=int((~here).sum()))
        self.cache.window.use(slots[here])
        missing = neurons[~here]
        batches = [missing[i : i + self._batch_rows] for i in range(0, len(missing), self._batch_rows)]
        ahead: list[tuple[IntArray, torch.Tensor, Ticket]] = []
        try:
            ahead += [self._read_batch(batch, i) for i, batch in enumerate(batches[:1])]
            yield from self._from_slots(neurons[here], slots[here])
            for i, batch in enumerate(batches):
                if i + 1 < len(batches):
                    ahead.append(self._read_batch(batches[i + 1], i + 1))
                _, rows, ticket = ahead[0]
                self._wait(ticket)
                keep = np.isin(batch, recent, assume_unique=True)
                self.cache.keep(batch[keep], rows[torch.from_numpy(keep)])
                yield self._piece(batch, rows)
                ahead.pop(0)
        finally:
            for _, _, ticket in ahead:
                ticket.settle()

    def _read_batch(self, batch: IntArray, number: int) -> tuple[IntArray, torch.Tensor, Ticket]:
        rows = self._work.get(f"sweep{number % 2}", (len(batch), self.layer.layout.row_bytes), torch.uint8)
        ticket, n_bytes, n_reads = self._store.submit_rows(
            self.layer, batch, rows, np.arange(len(batch)), self.cache.max_gap_rows
        )
        self._stats.add(bytes_read=n_bytes, n_reads=n_reads)
        return batch, rows, ticket
