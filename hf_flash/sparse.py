"""All gates but `all`: the few neurons that a gate names, from the cache, the missing ones from flash."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from hf_flash import native, ops, trace
from hf_flash.cache import NeuronCache
from hf_flash.engine import Engine, Piece, WorkBuffers
from hf_flash.gates import CertifiedGate, Gate, ThresholdGate
from hf_flash.memory import round_up
from hf_flash.native import NativeFFN
from hf_flash.packing import sparse_ffn
from hf_flash.plan import IntArray
from hf_flash.readers import Ticket
from hf_flash.stats import FlashStats
from hf_flash.step import NativeStep
from hf_flash.store import FlashLayer, FlashStore
from hf_flash.trial import NEVER, Trial

Batch = tuple[IntArray, torch.Tensor, IntArray]  # neurons, memory [n, row_bytes] uint8, where in it each is

N_WIDTHS = 8  # numbers of rows that matrix products of a batch come in


class SparseEngine(Engine):
    """The neurons that a gate names, from the cache, the missing ones from flash.

    Args:
        store, layer: where bundles come from.
        gate: which neurons are wanted.
        cache: slots in DRAM.
        batch_rows: rows computed on at a time (bounds the scratch memory).
        work: scratch shared by all layers, used under `work.lock`.
        one_call: take a few tokens in one native call, where that can be had.
    """

    def __init__(
        self, store: FlashStore, layer: FlashLayer, gate: Gate, cache: NeuronCache,
        batch_rows: int, work: WorkBuffers, stats: FlashStats, one_call: bool = True,
    ) -> None:  # fmt: skip
        self.layer, self.gate, self.cache = layer, gate, cache
        self._store, self._work, self._stats = store, work, stats
        self._batch_rows = batch_rows
        native_gate = one_call and isinstance(gate, CertifiedGate) and NativeStep.can(store, layer)
        self._step = NativeStep(store, layer, gate, cache, stats) if native_gate else None  # type: ignore[arg-type]
        self._few = native.MAX_TOKENS * layer.layout.d_model
        self._next: SparseEngine | None = None  # whose reads this one starts early
        self._trial: Trial = NEVER
        self._ahead: Ticket | None = None  # reads that `prefetch` started
        self._ahead_neurons = np.empty(0, np.int64)

    def forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        if self._step is not None and 0 < x.numel() <= self._few:
            found = self._native(self._step, x, act, biases)
            if found is not None:
                return found
        flat, act = x.reshape(-1, x.shape[-1]), self.activation(act)  # [T, d_model]
        t0, waited = time.perf_counter(), self._stats.wait_s
        neurons, ago = self._wanted(flat, biases)
        t1 = time.perf_counter()
        if trace.active is not None:
            trace.active.add(trace.GATE, t0, t1, self.layer.path, wanted=len(neurons))
        few = native.available() and flat.shape[0] <= native.MAX_TOKENS
        code = native.activation_code(act, flat.dtype) if few else None
        if flat.shape[0] <= native.MAX_TOKENS:
            self.cache.largest = max(self.cache.largest, len(neurons))
        if code is not None:
            y, n_fired = self._few_tokens(flat, code, biases, neurons, ago)
        else:
            y, n_fired = self._many_tokens(flat, act, biases, neurons, ago)
        busy_s = time.perf_counter() - t1 - (self._stats.wait_s - waited)
        self._stats.add(gate_s=t1 - t0, compute_s=busy_s, neurons_fired=n_fired)
        if len(self._ahead_neurons):
            self._count_ahead(neurons)
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def lock(self) -> threading.RLock:
        """The cache's."""
        return self.cache.lock

    def as_native(self, act: ops.Activation, biases: ops.Biases) -> NativeFFN | None:
        step = self._step
        if step is None or self._ahead is not None or len(self._ahead_neurons):
            return None
        return step.as_native if step.prepare(torch.bfloat16, act, biases) else None

    def native_ended(self, result: int) -> None:
        assert self._step is not None
        try:
            self._step.ended(result)
        except BaseException:
            self._forget()
            raise

    def native_stopped(self) -> None:
        if self._step is not None and self._step.has_reads:
            self._forget()

    def looks_at(self, following: Engine) -> bool:
        return following is self._next and self._trial.on

    def note_native(self, recorder: trace.Recorder, begun: float, stop: float) -> None:
        assert self._step is not None
        self._step.note_native(recorder, begun, stop)

    def note_spans(self, recorder: trace.Recorder) -> None:
        if self._step is not None:
            self._step.note_spans(recorder)

    def activation(self, act: ops.Activation) -> ops.Activation:
        return self.gate.thresholded if isinstance(self.gate, ThresholdGate) else act

    def _native(
        self, step: NativeStep, x: torch.Tensor, act: ops.Activation, biases: ops.Biases
    ) -> torch.Tensor | None:
        """The native step, which nobody disturbs; if it is stopped, the slots are not trusted again.

        Its guess of what the next layer will want goes into that one's slots, unless another thread is at them.
        """
        with self.cache.lock:
            looks = self._trial.on and self._can_look() and self._next.cache.lock.acquire(blocking=False)  # type: ignore[union-attr]
            try:
                if self._ahead is not None:
                    self._land()
                if looks:
                    self._next._step.point()  # type: ignore[union-attr]
                y = step.run(x, act, biases, looks)
                if y is not None and len(self._ahead_neurons):
                    self._count_ahead(step.wanted)
                return y
            except BaseException:  # Ctrl-C too: none is given away while it is read into
                self._forget()
                if looks:
                    self._next._forget()  # type: ignore[union-attr]
                raise
            finally:
                if looks:
                    self._next.cache.lock.release()  # type: ignore[union-attr]

    def _can_look(self) -> bool:
        """Whether the next layer's step was told what it needs to guess with, its biases too, by a step of its own."""
        step = None if self._next is None else self._next._step
        return step is not None and step.is_known

    def land(self) -> None:
        """Wait for what was read early: then no read into the slots is under way. Hold the cache's lock.

        Raises:
            ReadError: one failed.
        """
        try:
            self._land()
            if self._step is not None:
                self._step.land()
        except BaseException:
            self._forget()
            raise

    @property
    def steps(self) -> bool:
        """Whether a few tokens take one native call."""
        return self._step is not None

    @property
    def last_wanted(self) -> IntArray:
        """Neurons that the last native step wanted, sorted."""
        assert self._step is not None
        return self._step.wanted

    def follow(self, engine: SparseEngine, scale: torch.Tensor, shift: torch.Tensor, trial: Trial) -> None:
        """Guess what the engine that runs next will want, while this one waits for flash; see early.py.

        Args:
            engine: that one; both have `steps`.
            scale, shift: [d_model]; its input is guessed to be this one's times `scale` plus `shift`.
            trial: whether to guess.
        """
        assert self._step is not None and engine._step is not None and engine is not self
        self._step.follow(engine._step, scale, shift)
        self._next, self._trial = engine, trial

    def prefetch(self, neurons: IntArray, n_tokens: int) -> None:
        """Start reading what the layer will likely want into slots that nobody needs; its next pass waits for it.

        Args:
            neurons: sorted, unique. n_tokens: of the pass to come.

        Raises:
            ReadError: an earlier read failed.
        """
        with self.cache.lock:
            try:
                self._land()
                self._ahead_neurons, self._ahead = self.cache.prefetch(neurons, n_tokens)
            except BaseException:
                self._forget()
                raise

    def fill(self) -> None:
        """Have in the free slots what fires most often, where that is known.

        Raises:
            ReadError: flash failed.
        """
        with self.cache.lock:
            try:
                self._wait(self.cache.prefetch(self.cache.likeliest(), 0)[1])
            except BaseException:
                self._forget()
                raise

    def _land(self) -> None:
        """Wait for what was read ahead, before anyone looks into the slots."""
        self._wait(self._ahead)
        self._ahead = None

    def _count_ahead(self, wanted: IntArray) -> None:
        """Of the neurons that were wanted and found, some were there only because they had been read ahead."""
        n = len(np.intersect1d(self._ahead_neurons, wanted, assume_unique=True))
        self._ahead_neurons = np.empty(0, np.int64)
        self._stats.add(neurons_hit=-n, neurons_read=n, neurons_early=n)

    def _few_tokens(
        self, flat: torch.Tensor, code: tuple[int, float], biases: ops.Biases, neurons: IntArray, ago: IntArray
    ) -> tuple[torch.Tensor, int]:
        """The native kernel: on the slots themselves, where no row is copied, or batch by batch if they are too few.

        Never torch's products: of every number of neurons its library would keep a kernel of its own.
        """
        y: torch.Tensor | None = None
        n_fired = 0
        with self._batches(neurons, ago, flat.shape[0]) as batches:
            for index, rows, slots in batches:
                part, fired = self._sum(flat, code, biases, index, rows, slots)
                y, n_fired = part if y is None else y.add_(part), n_fired + fired
        if y is None:
            y = torch.zeros(flat.shape[0], self.layer.layout.d_out, dtype=torch.float32)
        return (y if biases.down is None else y + biases.down).to(flat.dtype), n_fired

    def _sum(
        self, flat: torch.Tensor, code: tuple[int, float], biases: ops.Biases, neurons: IntArray, rows: torch.Tensor,
        slots: IntArray,
    ) -> tuple[torch.Tensor, int]:  # fmt: skip
        """What some neurons add, [T, d_out] float32, and how many of them fired."""
        layout, ids, at = self.layer.layout, torch.from_numpy(neurons), torch.from_numpy(slots)
        up, gate = biases.part(ids)
        if self.layer.packing is not None:
            return sparse_ffn(flat, rows, at, ids, self.layer.packing, layout.gated, code, gate, up)
        return native.sparse_ffn(
            flat, rows, at, layout.d_model, layout.d_out, layout.gated, layout.dtype, code, gate, up
        )  # fmt: skip

    def _many_tokens(
        self, flat: torch.Tensor, act: ops.Activation, biases: ops.Biases, neurons: IntArray, ago: IntArray
    ) -> tuple[torch.Tensor, int]:
        """Matrix products on gathered rows, batch by batch."""
        y: torch.Tensor | None = None
        wide = torch.promote_types(flat.dtype, torch.float32)  # what parts are summed in
        fired = torch.zeros(self.layer.n_neurons, dtype=torch.bool)
        alone = len(neurons) <= min(self._batch_rows, self.cache.n_slots)
        with self._pieces(neurons, ago, flat.shape[0]) as batches:
            for index, gate, up, down in batches:
                t1 = time.perf_counter()
                h = self._hidden(flat, up, act, gate, *biases.part(index))
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

    def _hidden(self, flat: torch.Tensor, up: torch.Tensor, act: ops.Activation, gate: torch.Tensor | None,
                up_bias: torch.Tensor | None, gate_bias: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        """`ops.hidden`, on a few more rows than asked for: torch's library keeps half a MiB of code for every shape.

        The rows behind are what an earlier batch left in the scratch; what comes of them is dropped.
        """
        n = up.shape[0]
        step = -(-self._batch_rows // N_WIDTHS)
        more = min(round_up(n, step), self._batch_rows) - n
        if more <= 0:
            return ops.hidden(flat, up, act, gate, up_bias, gate_bias)
        gate = None if gate is None else _with_more(gate, more)
        biases = [None if bias is None else F.pad(bias, (0, more)) for bias in (up_bias, gate_bias)]
        return ops.hidden(flat, _with_more(up, more), act, gate, *biases)[:, :n]

    def _wanted(self, flat: torch.Tensor, biases: ops.Biases) -> tuple[IntArray, IntArray]:
        """Neurons that any token wants, sorted, and how many tokens ago each was wanted."""
        neurons, ago = self.gate.decide(flat, biases.gate if self.layer.layout.gated else biases.up)
        return neurons, ago[torch.from_numpy(neurons)].numpy()

    def pieces(self, x: torch.Tensor, biases: ops.Biases) -> contextlib.AbstractContextManager[Iterator[Piece]]:
        flat = x.reshape(-1, x.shape[-1])
        return self._pieces(*self._wanted(flat, biases), flat.shape[0])

    @contextlib.contextmanager
    def _pieces(self, neurons: IntArray, ago: IntArray, n_tokens: int) -> Iterator[Iterator[Piece]]:
        with self._batches(neurons, ago, n_tokens) as batches:
            yield (piece for batch in batches for piece in self._gathered(*batch))

    @contextlib.contextmanager
    def _batches(self, neurons: IntArray, ago: IntArray, n_tokens: int) -> Iterator[Iterator[Batch]]:
        with self._guard(n_tokens):
            if self.cache.fits(neurons):
                lookup = self.cache.fetch(neurons)
                self._wait(lookup.ticket)
                yield iter([(neurons, self.cache.rows, lookup.slots)])
            else:
                with contextlib.closing(self._sweep(neurons, ago)) as batches:
                    yield batches

    @contextlib.contextmanager
    def _guard(self, n_tokens: int) -> Iterator[None]:
        """The cache and the scratch are this thread's; if the pass is stopped, neither is trusted again."""
        with self._work.lock, self.cache.lock:
            try:
                self._land()
                if self._step is not None:
                    self._step.land()
                self.cache.pass_begins(n_tokens)
                yield
            except BaseException:  # Ctrl-C too: memory that a read may still fill must not be used again
                self._forget()
                self._work.forget()
                raise

    def _forget(self) -> None:
        """A pass was stopped: wait for what is being read, and trust no slot."""
        if self._step is not None:
            self._step.settle()
        if self._ahead is not None:
            self._ahead.settle()
        self._ahead, self._ahead_neurons = None, np.empty(0, np.int64)
        self.cache.reset()

    def _wait(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            t0 = time.perf_counter()
            ticket.wait()
            self._stats.add(wait_s=time.perf_counter() - t0)
            if trace.active is not None:
                trace.active.add(trace.WAIT, t0, time.perf_counter(), self.layer.path)

    def _gathered(self, neurons: IntArray, rows: torch.Tensor, slots: IntArray) -> Iterator[Piece]:
        """A batch as matrices, some neurons at a time where it is still in the cache's slots."""
        for i in range(0, len(neurons), self._batch_rows):
            some, index = neurons[i : i + self._batch_rows], torch.from_numpy(slots[i : i + self._batch_rows])
            part = rows
            if rows is self.cache.rows:
                part = self._scratch("rows", len(index), self.layer.layout.row_bytes)
                torch.index_select(rows, 0, index, out=part)
            yield (torch.from_numpy(some), *self.layer.split(part, some, self._whole_rows))

    def _whole_rows(self, n: int, row_bytes: int) -> torch.Tensor:
        return self._scratch("unpacked", n, row_bytes)

    def _scratch(self, name: str, n: int, row_bytes: int) -> torch.Tensor:
        """[n, row_bytes] uint8, with memory behind them for a whole batch."""
        return self._work.get(name, (max(n, self._batch_rows), row_bytes), torch.uint8)[:n]

    def _sweep(self, neurons: IntArray, ago: IntArray) -> Generator[Batch]:
        """More neurons than slots: those in DRAM first, then the others, the next batch being read meanwhile.

        Those that the last tokens wanted stay, as many as there are slots.
        """
        latest = np.sort(np.argsort(ago, kind="stable")[: self.cache.n_slots])
        recent = neurons[latest]
        slots = self.cache.cached(neurons)
        here = slots >= 0
        self._stats.add(neurons_wanted=len(neurons), neurons_hit=int(here.sum()), neurons_read=int((~here).sum()))
        self.cache.window.use(recent, ago[latest])
        missing = neurons[~here]
        batches = [missing[i : i + self._batch_rows] for i in range(0, len(missing), self._batch_rows)]
        ahead: list[tuple[IntArray, torch.Tensor, Ticket]] = []
        try:
            ahead += [self._read_batch(batch, i) for i, batch in enumerate(batches[:1])]
            yield neurons[here], self.cache.rows, slots[here]
            for i, batch in enumerate(batches):
                if i + 1 < len(batches):
                    ahead.append(self._read_batch(batches[i + 1], i + 1))
                _, rows, ticket = ahead[0]
                self._wait(ticket)
                keep = np.isin(batch, recent, assume_unique=True)
                self.cache.keep(batch[keep], rows[torch.from_numpy(keep)])
                yield batch, rows, np.arange(len(batch))
                ahead.pop(0)
        finally:
            for _, _, ticket in ahead:
                ticket.settle()

    def _read_batch(self, batch: IntArray, number: int) -> tuple[IntArray, torch.Tensor, Ticket]:
        rows = self._scratch(f"sweep{number % 2}", len(batch), self.layer.layout.row_bytes)
        ticket, n_bytes, n_reads = self._store.submit_rows(
            self.layer, batch, rows, np.arange(len(batch)), self.cache.max_gap_rows
        )
        self._stats.add(bytes_read=n_bytes, n_reads=n_reads)
        return batch, rows, ticket


def _with_more(rows: torch.Tensor, more: int) -> torch.Tensor:
    """Rows in `_scratch` and what lies behind them."""
    return rows.as_strided((rows.shape[0] + more, rows.shape[1]), rows.stride(), rows.storage_offset())
