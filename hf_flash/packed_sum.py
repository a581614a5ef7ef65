"""The FFN of one token, or of a few, over packed bundles that come some at a time; the native kernels alone.

Exact: one bfloat16 token in torch's own order of sums (ordered.py). Otherwise sums are float32. What does not change
from token to token is in a struct that native code reads; what may (biases, the activation, threads) is compared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from hf_flash import native, ordered
from hf_flash.ops import Activation, Biases
from hf_flash.store import FlashLayer
from hf_flash.tight import output_like

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


Begun = tuple[torch.Tensor, torch.Tensor]  # the input and the sum


class _Sum(ctypes.Structure):
    """The fields of _native/stream.cpp, in its order."""

    _fields_ = [
        *[(name, _I) for name in ("unit", "n_pinned", "row")], ("pinned", _P),
        *[(name, _I) for name in ("d", "d_out", "n", "stride", "gated", "base")],
        *[(name, _P) for name in ("start", "escapes", "x", *native.BIAS_FIELDS, "out", "table", "h", "sums")],
        *[(name, _I) for name in ("n_tokens", "dtype", "act")], ("threshold", _F), ("numbers", _P),
    ]  # fmt: skip


class PackedSum:
    """One layer's sum: `begin`, then `add` all neurons in their order, then `end`. Whoever calls holds a lock.

    Args:
        layer: whose bundles; packed.
        unit: their number in the stream.
        n_rows: most neurons of an `add`.
        exact: give torch's bits.
        scratch: gives memory of some bytes, which all layers share.
    """

    def __init__(
        self, layer: FlashLayer, unit: int, n_rows: int, exact: bool, scratch: Callable[[int], torch.Tensor]
    ) -> None:
        lib = native.library()
        assert lib is not None and layer.packing is not None
        sizes = (_I * 5)()
        lib.hf_flash_stream_bytes(sizes)
        assert sizes[4] == ctypes.sizeof(_Sum)
        self._lib, self.exact, self._get, layout = lib, exact, scratch, layer.layout
        self._shapes = (layer.n_neurons, layout.d_model), (layout.d_out, layer.n_neurons)
        self._packing, self._numbers = layer.packing, torch.arange(0 if exact else n_rows)
        self._s = _Sum(
            unit=unit, d=layout.d_model, d_out=layout.d_out, n=layer.n_neurons, stride=layout.row_bytes,
            gated=layout.gated, base=layer.packing.base, start=layer.packing.start.data_ptr(),
            escapes=layer.packing.escapes.data_ptr(), numbers=self._numbers.data_ptr(),
        )  # fmt: skip
        self.address, self.unit = ctypes.addressof(self._s), unit
        self._act: Activation | None = None  # with dtype and threads, what `_can` was found for
        self._dtype, self._n_threads, self._can = torch.float32, 0, False
        self._biases = native.BiasPointers(self._s, as_float=not exact)
        self._most = layout.d_model * (1 if exact else native.MAX_TOKENS)  # entries of an input

    def pin(self, rows: torch.Tensor) -> None:
        """The first rows are in DRAM from now on: [n, row_bytes] uint8."""
        self._pinned, self._s.pinned, self._s.n_pinned = rows, rows.data_ptr(), len(rows)

    def begin(self, x: torch.Tensor, act: Activation, biases: Biases) -> Begun | None:
        """Start a sum. This is done for each layer and token, with the CPU's caches full of weights: little is touched.

        Args:
            x: [..., d_model], one token for an exact sum, native.MAX_TOKENS at most for others.

        Returns:
            What native code reads and writes; to be held until the last neurons are added. None where this is nothing
            for the kernels.
        """
        # With a prompt, too: kernels are compared then, in memory that is lent to others from the next token on.
        if not self.prepare(x.dtype, act, biases) or x.numel() > self._most:
            return None
        if self.exact:
            if not x.is_contiguous():
                x = x.contiguous()
            return x, output_like(x, self._s.d_out, self._s.d)
        self._s.n_tokens, self._down = x.numel() // x.shape[-1], biases.down
        x = x.float().contiguous()
        return x, x.new_zeros(*x.shape[:-1], self._s.d_out)

    def prepare(self, dtype: torch.dtype, act: Activation, biases: Biases) -> bool:
        """Tell native code what may have changed; False where this is none for the kernels."""
        if act is not self._act or dtype is not self._dtype or torch.get_num_threads() != self._n_threads:
            self._understand(act, dtype)
        if self._can and biases is not self._biases.known:
            self._biases.point(biases, dtype)
        return self._can

    def add(self, begun: Begun, neurons: slice, rows: torch.Tensor) -> None:
        """Add some neurons.

        Args:
            begun: from `begin`.
            neurons: their numbers; the first is a multiple of ordered.MULTIPLE where the sum is exact.
            rows: [n, row_bytes] uint8.
        """
        x, out = begun
        self._lib.hf_flash_sum_add(
            self.address, x.data_ptr(), out.data_ptr(), rows.data_ptr(), neurons.start, len(rows)
        )  # fmt: skip

    def end(self, begun: Begun) -> torch.Tensor:
        """The FFN's output once all neurons were added, [..., d_out], dtype of x."""
        out = begun[1]
        if self.exact:
            return out
        return (out if self._down is None else out + self._down).to(self._dtype)

    def _understand(self, act: Activation, dtype: torch.dtype) -> None:
        """Find out whether the kernels can do it with this activation, dtype and number of threads; tell them."""
        s, n_threads, self._act, self._biases.known = self._s, torch.get_num_threads(), None, None
        if self.exact:
            can = dtype == torch.bfloat16 and all(ordered.agrees(*shape) for shape in self._shapes)
            self._table = ordered.table_of(act) if can else None
            s.table, self._can = native.pointer(self._table), self._table is not None
            self._scratch = scratch = self._get(8 * s.d_out + 2 * s.n)
            s.sums, s.h = scratch.data_ptr(), scratch.data_ptr() + 8 * s.d_out
        else:
            code = native.any_activation_code(act, dtype)
            self._can = code is not None
            s.dtype, s.act, s.threshold = native.CODES.get(dtype, 0), *(code or (0, 0.0))
        self._dtype, self._n_threads, self._act = dtype, n_threads, act  # last: Ctrl-C may have come before
