"""A few tokens through one FFN in one native call: gate, lookup, reads into slots, wait, sum.

Between hidden state and output nothing of it runs in Python. `SparseEngine` does the same step by step where this
cannot be had (no io_uring, no native kernels, an activation that they do not know, many tokens) and is its reference.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import torch

from hf_flash import native, trace
from hf_flash.cache import NeuronCache
from hf_flash.gates import CertifiedGate
from hf_flash.gates.certified import INPUTS, UNIT
from hf_flash.memory import untouched
from hf_flash.ops import Activation, Biases
from hf_flash.plan import MAX_EXTENT_ROWS, IntArray
from hf_flash.readers import UringReader
from hf_flash.stats import Counters, FlashStats
from hf_flash.store import FlashLayer, FlashStore
from hf_flash.trace import Span
from hf_flash.window import LATELY, Window

_P, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Step(ctypes.Structure):
    """The fields of _native/step.cpp, in its order."""

    _fields_ = [
        *[(name, _I) for name in ("d", "d_out", "n")],
        ("nibbles", _P), ("planes", _P * 4),
        *[(name, _P) for name in ("step", "norm", "offset", "upper_offset", "known")],
        ("arithmetic", _F * 4 * 3),
        ("tail", _F), ("bar", _F), ("least", _F), ("most", _F), ("bits", _I), ("upper_tail", _F),
        *[(name, _P) for name in ("slot_of", "neuron_of", "owned", "last", "key", "rows", "state")],
        ("row_bytes", _I), ("window", _I), ("half_life", _D),
        ("lately", _P), ("n_lately", _I),
        ("ring", _P), *[(name, _I) for name in ("fd", "start", "max_gap", "max_rows")], ("sink", _P),
        ("batch", _P), ("early", _P), ("next", _P), ("scale", _P), ("shift", _P),
        *[(name, _I) for name in ("gated", "packed", "dtype", "base", "act")], ("threshold", _F),
        *[(name, _P) for name in ("escapes_start", "escapes", *native.BIAS_FIELDS)],
        *[(name, _I) for name in ("n_wanted", "n_read", "n_bytes", "n_reads", "n_fired")],
        *[(name, _I) for name in ("n_early", "n_early_right", "early_bytes")],
        *[(name, _D) for name in ("gate_s", "early_s", "here_s", "wait_s", "ffn_s", "early_begun")],
        *[(name, _P) for name in ("ids", "who", "slots", "early_ids", "spare", "marks", "near", "list")],
        *[(name, _I) for name in ("n_here", "n_spare", "spare_time", "spare_left")], ("counters", Counters),
    ]  # fmt: skip


class NativeStep:
    """One layer's step. Whoever calls holds the cache's lock, and resets the cache if a call raises.

    Args:
        store, layer: where bundles come from; the reader must be a `UringReader` that reads them directly.
        gate: which neurons are wanted.
        cache: slots in DRAM; its books are kept as it keeps them itself.
        stats: where everything is counted.
    """

    def __init__(
        self, store: FlashStore, layer: FlashLayer, gate: CertifiedGate, cache: NeuronCache, stats: FlashStats
    ) -> None:
        lib = native.library()
        assert lib is not None and isinstance(store.reader, UringReader)
        assert lib.hf_flash_step_bytes() == ctypes.sizeof(_Step)
        self._lib, self._reader, self._layer, self._cache, self._stats = lib, store.reader, layer, cache, stats
        self._s = s = _Step()
        self._address = ctypes.addressof(s)
        self.as_native = native.NativeFFN(step=self._address)
        layout, sketch = layer.layout, gate.sketch
        n = layer.n_neurons
        # Room for all neurons, of which a step wants few: what is not written takes no DRAM.
        self._ids = untouched(5 * 8 * n).numpy().view(np.int64).reshape(5, n)
        self._offset, self._upper_offset = sketch.offset(), sketch.with_bits(4).offset()
        self._marks, self._list = np.empty(n, np.uint8), untouched(4 * n).numpy().view(np.int32)
        self._near = np.full(n, np.inf, np.float32)  # nothing is known: all are
        self._keep: list[object] = [store, gate, sketch]  # what the pointers below point into
        s.d, s.d_out, s.n = layout.d_model, layout.d_out, n
        s.nibbles, s.step, s.norm = sketch.nibbles.data_ptr(), sketch.step.data_ptr(), sketch.norm.data_ptr()
        for i, plane in enumerate(sketch.planes):
            s.planes[i] = plane.data_ptr()
        s.offset, s.upper_offset = self._offset.data_ptr(), self._upper_offset.data_ptr()
        s.bits, s.bar = sketch.bits, gate.bar
        if sketch.known is not None:
            known = sketch.known.as_native(sketch.bits)
            self._keep.append(known)
            s.known = ctypes.addressof(known)
        s.tail, s.upper_tail = -1.0 if gate.tail is None else gate.tail, gate.upper_tail_number
        s.least, s.most = INPUTS
        for i, dtype in enumerate(_DTYPES):
            s.arithmetic[i][:] = gate.gamma(), *gate.per_norm(dtype), UNIT[dtype]
        s.row_bytes, s.half_life, s.window = layer.rows.row_bytes, cache.window.half_life, cache.window.n_tokens
        s.lately, s.n_lately = LATELY.ctypes.data, len(LATELY)
        s.ring, s.fd = self._reader.ring, self._reader.fd(layer.rows.file)
        s.start, s.max_gap, s.max_rows = layer.rows.start, cache.max_gap_rows, MAX_EXTENT_ROWS
        s.sink = store.sink.data_ptr()
        s.gated, s.packed, s.dtype = int(layout.gated), int(layout.packed), native.CODES[layout.dtype]
        if layer.packing is not None:
            s.base, s.escapes_start = layer.packing.base, layer.packing.start.data_ptr()
            s.escapes = layer.packing.escapes.data_ptr()
        s.ids, s.who, s.slots, s.early_ids, s.spare = (row.ctypes.data for row in self._ids)
        s.marks, s.near, s.list = (a.ctypes.data for a in (self._marks, self._near, self._list))
        s.state = cache.state.ctypes.data
        stats.count_in(s.counters)
        self._step = lib.hf_flash_step
        self._d, self._is_square = layout.d_model, layout.d_model == layout.d_out
        self._act: Activation | None = None  # with the dtype, what `_known` was found for
        self._dtype, self._code, self._known = torch.float32, 0, False
        self._biases = native.BiasPointers(s, as_float=True)
        self._traced: tuple[float, float] | None = None  # when the last step began and ended, if nobody was told
        self._window: Window | None = None
        self._books: tuple[Any, ...] = ()

    @staticmethod
    def can(store: FlashStore, layer: FlashLayer) -> bool:
        """Whether steps can be had for a layer: native kernels, io_uring, and rows that are read directly."""
        reader = store.reader
        if not native.available() or not isinstance(reader, UringReader):
            return False
        return reader.direct_rows(layer.rows.file, layer.rows.start, layer.rows.row_bytes)

    def follow(self, step: NativeStep, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Say which step comes next, and how its input is guessed from this one's: x * scale + shift, [d_model]."""
        factors = [t.detach().float().contiguous() for t in (scale, shift)]
        self._keep += [step, *factors]
        self._s.scale, self._s.shift = (t.data_ptr() for t in factors)
        self._s.next = ctypes.addressof(step._s)

    def run(self, x: torch.Tensor, act: Activation, biases: Biases, looks: bool = False) -> torch.Tensor | None:
        """The FFN of a few tokens.

        Args:
            x: [..., d_model], of 1 to native.MAX_TOKENS tokens.
            looks: start reading what the next step will likely want. Hold its cache's lock, too, and call its `point`.

        Returns:
            [..., d_out], dtype of x; None where this is none for the kernels (the activation, the dtype, more neurons
            than slots), and then no time has passed.

        Raises:
            ReadError: flash failed.
        """
        s = self._s
        if not self.prepare(x.dtype, act, biases):
            return None
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty_like(x) if self._is_square else x.new_empty(*x.shape[:-1], s.d_out)
        begun = 0.0 if trace.active is None else time.perf_counter()
        n_tokens = x.numel() // self._d
        result = self._step(self._address, x.data_ptr(), n_tokens, self._code, y.data_ptr(), looks, None, None, None)
        if result:
            self.ended(result)
            return None
        if begun and trace.active is not None:
            self._traced = begun, time.perf_counter()
        return y

    def prepare(self, dtype: torch.dtype, act: Activation, biases: Biases) -> bool:
        """Tell native code what may have changed; False where this is none for the kernels."""
        if act is not self._act or dtype is not self._dtype:
            self._understand(act, dtype)
        if not self._known:
            return False
        if self._reader.ring is None:
            self._reader.check_open()
        if self._window is not self._cache.window:
            self.point()
        if biases is not self._biases.known:
            self._biases.point(biases, dtype)
        return True

    def ended(self, result: int) -> None:
        """Learn what a native call returned.

        Raises:
            ReadError: flash failed.
        """
        if result == native.NO_ROOM:  # what it read will be found in DRAM, by whoever does it the other way now
            self._stats.add(neurons_hit=-self._s.n_read, neurons_read=self._s.n_read)
        elif result:
            raise self._failure()

    def note_native(self, recorder: trace.Recorder, begun: float, stop: float) -> None:
        """Tell where the time of a step went that began and ended then."""
        self._traced = begun, stop
        self.note_spans(recorder)

    def note_spans(self, recorder: trace.Recorder) -> None:
        """Tell who records where the time of the last step went, if that was traced and not told."""
        traced, self._traced, s = self._traced, None, self._s
        if traced is not None:
            times = s.gate_s, s.early_begun, s.early_s, s.here_s, s.wait_s, s.ffn_s
            recorder.add_later(self._spans, *traced, *times, s.n_wanted, s.n_reads, s.n_bytes if s.n_read else 0)

    @property
    def wanted(self) -> IntArray:
        """Neurons that the last step wanted, sorted; a copy."""
        return self._ids[0, : self._s.n_wanted].copy()

    @property
    def is_known(self) -> bool:
        """Whether native code was told of the activation and the biases."""
        return self._known

    @property
    def has_reads(self) -> bool:
        """Whether reads are under way, or have failed, that nobody has waited for: what a step misses, or guesses."""
        return bool(self._s.batch or self._s.early)

    def land(self) -> None:
        """Wait for what was read early, before anyone else looks into the slots.

        Raises:
            ReadError: a read failed.
        """
        if self._lib.hf_flash_step_land(self._address):
            raise self._failure()

    def settle(self) -> None:
        """Wait until nothing is written into the slots any more; errors are not raised."""
        for name in ("early", "batch"):
            batch = getattr(self._s, name)
            while batch and self._lib.hf_flash_batch_wait(self._s.ring, batch) == native.SIGNAL:
                pass
            if batch:
                self._lib.hf_flash_batch_free(batch)
                setattr(self._s, name, None)

    def _understand(self, act: Activation, dtype: torch.dtype) -> None:
        """Find out whether the kernels know this activation in this dtype, and tell them."""
        self._act, self._biases.known, code = None, None, native.activation_code(act, dtype)
        self._s.act, self._s.threshold = code or (0, 0.0)
        self._known, self._code = code is not None, native.CODES.get(dtype, 0)
        self._dtype, self._act = dtype, act  # last: Ctrl-C may have come before

    def point(self) -> None:
        """Look where the cache's memory is, if it began anew since it was looked at last."""
        cache, s = self._cache, self._s
        if self._window is not cache.window:
            books = *cache.books(), *cache.window.books()
            s.slot_of, s.neuron_of, s.owned, s.last, s.key = (a.ctypes.data for a in books)
            s.rows = cache.rows.data_ptr()
            self._books = books, cache.rows
            self._window = cache.window

    def _failure(self) -> BaseException:
        error = self._reader.error_of(self._s.early or self._s.batch)
        self.settle()
        return error

    def _spans(
        self, track: int, begun: float, stop: float, gate_s: float, early_begun: float, early_s: float, here_s: float,
        wait_s: float, ffn_s: float, n_wanted: int, n_reads: int, n_bytes: int,
    ) -> list[Span]:  # fmt: skip
        """The spans of a step, from the times that it noted."""
        computing, path = stop - ffn_s, self._layer.path
        waiting = computing - wait_s
        here = waiting - here_s

        def span(name: str, start: float, stop: float, **args: Any) -> Span:
            return Span(name, start, stop, path, track, args)

        found = [
            span(trace.GATE_SCAN, begun, begun + gate_s, native=True, wanted=n_wanted),
            span(trace.SUBMIT, begun + gate_s, here, native=True, reads=n_reads),
            span(trace.WAIT, waiting, computing),
            span(trace.ARITHMETIC, computing, stop, native=True, neurons=n_wanted),
        ]
        if early_s:  # while other cores compute: what is in DRAM, or the next layer's attention
            found.append(span(trace.EARLY, early_begun, early_begun + early_s, native=True))
        if here_s:
            found.append(span(trace.ARITHMETIC, here, waiting, native=True))
        if n_bytes:
            found.append(Span(trace.READ, waiting, computing, "", trace.FLASH, {"bytes": n_bytes}))
        return found

    def __del__(self) -> None:
        if self._reader.ring:
            self.settle()
