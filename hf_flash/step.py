"""A few tokens through one FFN in one native call: gate, lookup, reads into slots, wait, sum.

Between hidden state and output nothing of it runs in Python. `SparseEngine` does the same step by step where this
cannot be had (no io_uring, no native kernels, an activation that they do not know, many tokens) and is its reference.
"""

from __future__ import annotations

import ctypes
import time

import numpy as np
import torch

from hf_flash import native, trace
from hf_flash.cache import NeuronCache
from hf_flash.gates import CertifiedGate
from hf_flash.gates.certified import INPUTS, UNIT
from hf_flash.memory import view_bytes
from hf_flash.ops import Activation, Biases
from hf_flash.plan import MAX_EXTENT_ROWS, IntArray
from hf_flash.readers import UringReader
from hf_flash.stats import Counters, FlashStats
from hf_flash.store import FlashLayer, FlashStore
from hf_flash.window import LATELY, Window

_P, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Step(ctypes.Structure):
    """The fields of _native/step.cpp, in its order."""

    _fields_ = [
        *[(name, _I) for name in ("d", "d_out", "n")],
        ("nibbles", _P), ("planes", _P * 4), ("step", _P), ("norm", _P), ("offset", _P), ("offset4", _P),
        ("arithmetic", _F * 4 * 3),
        ("tail", _F), ("bar", _F), ("least", _F), ("most", _F), ("bits", _I),
        *[(name, _P) for name in ("slot_of", "neuron_of", "owned", "last", "key", "rows")],
        *[(name, _I) for name in ("n_slots", "n_used", "row_bytes", "window", "clock")], ("half_life", _D),
        ("lately", _P), ("n_lately", _I),
        ("ring", _P), *[(name, _I) for name in ("fd", "start", "max_gap", "max_rows")], ("sink", _P),
        ("batch", _P), ("early", _P),
        *[(name, _I) for name in ("gated", "packed", "dtype", "base", "act")], ("threshold", _F),
        *[(name, _P) for name in ("escapes_start", "escapes", "gate_bias", "up_bias", "down_bias")],
        *[(name, _I) for name in ("n_wanted", "n_read", "n_bytes", "n_reads", "n_fired")],
        *[(name, _I) for name in ("n_early", "n_early_right", "early_bytes")],
        ("gate_s", _D), ("wait_s", _D), ("ffn_s", _D), ("ids", _P), ("slots", _P),
        ("early_ids", _P), ("marks", _P), ("counters", Counters),
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
        self._lib, self._reader, self._layer, self._cache = lib, store.reader, layer, cache
        self._s = s = _Step()
        self._by_reference = ctypes.byref(s)
        layout, sketch = layer.layout, gate.sketch
        self._scratch = [np.empty(layer.n_neurons, np.int64) for _ in range(3)]
        self._marks, self._offset = np.empty(layer.n_neurons, np.uint8), sketch.offset()
        self._keep = (store, gate, sketch)  # what the pointers below point into
        s.d, s.d_out, s.n = layout.d_model, layout.d_out, layer.n_neurons
        s.nibbles, s.step, s.norm = sketch.nibbles.data_ptr(), sketch.step.data_ptr(), sketch.norm.data_ptr()
        for i, plane in enumerate(sketch.planes):
            s.planes[i] = plane.data_ptr()
        self._offset4 = sketch.with_bits(4).offset()
        s.offset, s.bits, s.bar = self._offset.data_ptr(), sketch.bits, gate.bar
        s.offset4 = self._offset4.data_ptr()
        s.tail = -1.0 if gate.tail is None else gate.tail
        s.least, s.most = INPUTS
        for i, dtype in enumerate(_DTYPES):
            s.arithmetic[i][:] = gate.gamma(), *gate.per_norm(dtype), UNIT[dtype]
        s.row_bytes, s.half_life, s.window = layer.rows.row_bytes, cache.window.half_life, cache.window.n_tokens
        s.lately, s.n_lately = LATELY.ctypes.data, len(LATELY)
        s.ring, s.fd = self._reader.ring, self._reader.fd(layer.rows.file)
        s.start, s.max_gap, s.max_rows = layer.rows.start, cache.max_gap_rows, MAX_EXTENT_ROWS
        s.sink = np.frombuffer(view_bytes(store.sink), np.uint8).ctypes.data
        s.gated, s.packed, s.dtype = int(layout.gated), int(layout.packed), native.CODES[layout.dtype]
        if layer.packing is not None:
            s.base, s.escapes_start = layer.packing.base, layer.packing.start.data_ptr()
            s.escapes = layer.packing.escapes.data_ptr()
        s.ids, s.slots, s.early_ids = (a.ctypes.data for a in self._scratch)
        s.marks = self._marks.ctypes.data
        stats.count_in(s.counters)
        self._act: tuple[Activation | None, torch.dtype | None] = (None, None)
        self._known = False
        self._biases: list[tuple[object, torch.Tensor | None]] = [(None, None)] * 3
        self._window: Window | None = None

    @staticmethod
    def can(store: FlashStore, layer: FlashLayer) -> bool:
        """Whether steps can be had for a layer: native kernels, io_uring, and rows that are read directly."""
        reader = store.reader
        if not native.available() or not isinstance(reader, UringReader):
            return False
        return reader.direct_rows(layer.rows.file, layer.rows.start, layer.rows.row_bytes)

    def run(self, x: torch.Tensor, act: Activation, biases: Biases) -> torch.Tensor | None:
        """The FFN of a few tokens.

        Args:
            x: [T, d_model], T from 1 to native.MAX_TOKENS.

        Returns:
            [T, d_out], dtype of x; None where this is none for the kernels (the activation, the dtype, more neurons
            than slots), and then no time has passed.

        Raises:
            ReadError: flash failed.
        """
        s = self._s
        if self._act[0] is not act or self._act[1] != x.dtype:
            code = native.activation_code(act, x.dtype)
            self._act, self._known = (act, x.dtype), code is not None
            s.act, s.threshold = code or (0, 0.0)
        if not self._known:
            return None
        self._reader.check_open()
        self._point(x.dtype, biases)
        x = x.contiguous()
        y = torch.empty(x.shape[0], s.d_out, dtype=x.dtype, device="cpu")
        args = (self._by_reference, x.data_ptr(), x.shape[0], native.CODES[x.dtype], y.data_ptr())
        begun = time.perf_counter() if trace.active is not None else 0.0
        result = self._lib.hf_flash_step(*args)
        self._cache.largest = max(self._cache.largest, s.n_wanted)
        self._cache.took(s.n_used, s.clock)
        if result == 3:
            return None
        while result == 2:  # a signal came: its handler runs now, and may raise
            result = self._lib.hf_flash_step_on(*args)
        if result == 1:
            raise self._failure()
        if begun and trace.active is not None:
            self._trace(trace.active, begun)
        return y

    @property
    def wanted(self) -> IntArray:
        """Neurons that the last step wanted, sorted; a copy."""
        return self._scratch[0][: self._s.n_wanted].copy()

    def early(self, x: torch.Tensor, biases: Biases) -> None:
        """Start reading what the layer will likely want.

        Args:
            x: [T, d_model], a guess of the input to come.

        Raises:
            ReadError: an earlier read failed.
        """
        self._reader.check_open()
        self._point(x.dtype, biases)
        x = x.contiguous()
        begun = time.perf_counter() if trace.active is not None else 0.0
        result = 2
        while result == 2:
            result = self._lib.hf_flash_step_early(self._by_reference, x.data_ptr(), x.shape[0], native.CODES[x.dtype])
        if result == 1:
            raise self._failure()
        self._cache.took(self._s.n_used, self._s.clock)
        if begun and trace.active is not None:
            trace.active.add(trace.EARLY, begun, time.perf_counter(), self._layer.path, native=True)

    def land(self) -> None:
        """Wait for what was read early, before anyone else looks into the slots.

        Raises:
            ReadError: a read failed.
        """
        result = 2
        while result == 2:
            result = self._lib.hf_flash_step_land(self._by_reference)
        if result == 1:
            raise self._failure()

    def settle(self) -> None:
        """Wait until nothing is written into the slots any more; errors are not raised."""
        for name in ("early", "batch"):
            batch = getattr(self._s, name)
            while batch and self._lib.hf_flash_batch_wait(self._s.ring, batch) == 2:
                pass
            if batch:
                self._lib.hf_flash_batch_free(batch)
                setattr(self._s, name, None)

    def _point(self, dtype: torch.dtype, biases: Biases) -> None:
        """Pointers to what may have changed since the last call: the cache's memory, biases."""
        s, cache = self._s, self._cache
        if self._window is not cache.window:  # the cache began anew
            self._window = cache.window
            books = *cache.books(), *cache.window.books()
            s.slot_of, s.neuron_of, s.owned, s.last, s.key = (a.ctypes.data for a in books)
            s.rows = cache.rows.data_ptr()
        s.n_slots, s.n_used, s.clock = cache.n_slots, cache.n_used, cache.window.clock
        for i, bias in enumerate(biases):
            key_now = None if bias is None else (bias.data_ptr(), bias._version, dtype)
            if self._biases[i][0] != key_now:
                rounded = None if bias is None else bias.detach().to(dtype).float().contiguous()
                # The pointer first: if Ctrl-C comes between, the next call sees an old key and does it again.
                setattr(s, ("gate_bias", "up_bias", "down_bias")[i], None if rounded is None else rounded.data_ptr())
                self._biases[i] = key_now, rounded

    def _failure(self) -> BaseException:
        error = self._reader.error_of(self._s.early or self._s.batch)
        self.settle()
        return error

    def _trace(self, active: trace.Recorder, begun: float) -> None:
        """The spans of a step that began then, from the times that it noted."""
        s = self._s
        stop = time.perf_counter()
        scanned, path = begun + s.gate_s, self._layer.path
        computing = stop - s.ffn_s
        active.add(trace.GATE_SCAN, begun, scanned, path, native=True, wanted=s.n_wanted)
        active.add(trace.SUBMIT, scanned, computing - s.wait_s, path, native=True, reads=s.n_reads)
        active.add(trace.WAIT, computing - s.wait_s, computing, path)
        active.add(trace.ARITHMETIC, computing, stop, path, native=True, neurons=s.n_wanted)
        if s.n_read:
            active.add_read(computing - s.wait_s, computing, s.n_bytes)

    def __del__(self) -> None:
        if self._reader.ring:
            self.settle()
