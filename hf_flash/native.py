"""The native kernels, where they were built: found, bound and described in one place.

`pip install` builds hf_flash/_native when a C++ compiler is there and goes on without harm when not; everything then
runs on torch operations. `HF_FLASH_NATIVE=0` turns the kernels off. Which way was taken is logged once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.activations import ReLUSquaredActivation, SiLUActivation
from transformers.utils import logging

from hf_flash import trace
from hf_flash.families import zero_below
from hf_flash.ops import NO_BIASES, Biases
from hf_flash.plan import IntArray

logger = logging.get_logger(__name__)

ABI = 12
DONE, FAILED, SIGNAL, NO_ROOM = range(4)  # results of calls, as in calls.h
MAX_TOKENS = 8  # tokens of a pass that the kernels are made for; more are matrix products, which torch does best
_PASSED_OVER = 255  # gate.h
BIAS_FIELDS = tuple(f"{name}_bias" for name in Biases._fields)  # of structs that native code reads
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))  # of what was built for this Python
_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


class NativeFFN(NamedTuple):
    """How native code runs an FFN: by a `Step` (step.py), or by a `Sum` over a `Stream`. Addresses, 0 for none."""

    step: int = 0
    stream: int = 0
    sum: int = 0


def _load() -> ctypes.CDLL | None:
    if os.environ.get("HF_FLASH_NATIVE", "1") == "0":
        return None
    folder = Path(__file__).parent / "_native"
    for path in sorted(folder.glob("kernels*.so"), key=lambda path: (not path.name.endswith(_SUFFIX), path)):
        try:
            lib = _bind(ctypes.CDLL(str(path), use_errno=True))
        except (OSError, AttributeError) as error:
            logger.warning_once(f"hf_flash: {path.name} does not load ({error}); torch operations are used instead.")
            continue
        if lib.hf_flash_abi() == ABI:
            return _hasten(lib, path)
    return None


def _hasten(lib: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    """Put what is called for every layer and token past ctypes, if this Python's headers were there at the build."""
    spec = importlib.util.spec_from_file_location("hf_flash._native.kernels", path)
    if spec is None or not path.name.endswith(_SUFFIX):  # ctypes takes what was built for another Python, too
        return lib
    with contextlib.suppress(ImportError):
        for name, function in vars(importlib.util.module_from_spec(spec)).items():
            if name.startswith("hf_flash_"):
                setattr(lib, name, function)
    return lib


def _bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the C signatures, in the order of the files in _native."""
    lib.hf_flash_attention.restype = _N
    lib.hf_flash_attention.argtypes = []
    lib.hf_flash_attend.restype = None
    lib.hf_flash_attend.argtypes = [_P, _P, _P, *[_I] * 13, _F, _P]
    lib.hf_flash_attention_step.restype = None
    lib.hf_flash_attention_step.argtypes = [*[_P] * 6, _I, _I, *[_P] * 7]
    lib.hf_flash_attention_step_bytes.restype = _I
    lib.hf_flash_attention_step_bytes.argtypes = []
    lib.hf_flash_sparse_ffn.restype = _I
    lib.hf_flash_sparse_ffn.argtypes = [_P, _I, _I, _I, _P, _I, _P, _I, _P, _P, _N, _N, _N, _N, _F, _P]
    lib.hf_flash_gate.restype = _I
    lib.hf_flash_gate.argtypes = [
        _P, _I, _I, _I, *[_P] * 10, _N, *[_F] * 8, _P, _P, _F, _P, _P, _P, _P,
    ]  # fmt: skip
    lib.hf_flash_layers.restype = _N
    lib.hf_flash_layers.argtypes = [_P]
    lib.hf_flash_layer_bytes.restype = None
    lib.hf_flash_layer_bytes.argtypes = [_P]
    lib.hf_flash_norms.restype = _N
    lib.hf_flash_norms.argtypes = []
    lib.hf_flash_norm_scale.restype = None
    lib.hf_flash_norm_scale.argtypes = [_P, _I, _N, _F, _P, _P]
    lib.hf_flash_norm.restype = None
    lib.hf_flash_norm.argtypes = [_P, _I, _P, _P, _F, _P]
    lib.hf_flash_step.restype = _N
    lib.hf_flash_step.argtypes = [_P, _P, _I, _N, _P, _N, _P, _P, _P]
    lib.hf_flash_step_bytes.restype = _I
    lib.hf_flash_step_bytes.argtypes = []
    lib.hf_flash_step_land.restype = _N
    lib.hf_flash_step_land.argtypes = [_P]
    lib.hf_flash_pack.restype = _I
    lib.hf_flash_pack.argtypes = [_P, _I, _I, _I, _N, _P, _I, _P, _P]
    lib.hf_flash_exponents.restype = None
    lib.hf_flash_exponents.argtypes = [_P, _I, _P]
    lib.hf_flash_unpack.restype = None
    lib.hf_flash_unpack.argtypes = [_P, _I, _P, _P, _I, _I, _N, _P, _P, _I, _I, _P, _I]
    lib.hf_flash_packed_linear.restype = None
    lib.hf_flash_packed_linear.argtypes = [_P, _I, _I, _I, _N, _P, _P, _P, _P, _I, _N, _P]
    lib.hf_flash_packed_ffn.restype = _I
    lib.hf_flash_packed_ffn.argtypes = [
        _P, _I, _I, _I, _P, _I, _P, _P, _I, _P, _P, _N, _N, _P, _P, _N, _N, _F, _P,
    ]  # fmt: skip
    lib.hf_flash_ordered.restype = _N
    lib.hf_flash_ordered.argtypes = []
    lib.hf_flash_ordered_matvec.restype = None
    lib.hf_flash_ordered_matvec.argtypes = [_P, _I, _I, _I, _N, _P, _P, _P, _P, _P]
    lib.hf_flash_ordered_ffn.restype = None
    lib.hf_flash_ordered_ffn.argtypes = [
        _P, _I, _I, _I, _I, _I, _N, _N, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P,
    ]  # fmt: skip
    lib.hf_flash_tight.restype = _N
    lib.hf_flash_tight.argtypes = []
    lib.hf_flash_tight_pack.restype = _I
    lib.hf_flash_tight_pack.argtypes = [_P, _I, _I, _I, _P, _P, _P, _P]
    lib.hf_flash_tight_unpack.restype = None
    lib.hf_flash_tight_unpack.argtypes = [_P, _I, _I, _P, _P, _P, _P, _I, _I, _P, _I]
    lib.hf_flash_tight_linear.restype = None
    lib.hf_flash_tight_linear.argtypes = [_P, _I, _I, _P, _P, _P, _P, _P, _I, _N, _P]
    lib.hf_flash_ring_open.restype = _P
    lib.hf_flash_ring_open.argtypes = [ctypes.c_uint, _N]
    lib.hf_flash_ring_close.restype = None
    lib.hf_flash_ring_close.argtypes = [_P]
    lib.hf_flash_ring_submit.restype = _P
    lib.hf_flash_ring_submit.argtypes = [_P, _I, _P, _P, _P, _P, _P, _P]
    lib.hf_flash_ring_submit_rows.restype = _P
    lib.hf_flash_ring_submit_rows.argtypes = [_P, _P, _N, _I, _I, _P, _I, _P, _P, _I, _I, _P, _P, _P]
    lib.hf_flash_batch_wait.restype = _N
    lib.hf_flash_batch_wait.argtypes = [_P, _P]
    lib.hf_flash_batch_ready.restype = _N
    lib.hf_flash_batch_ready.argtypes = [_P, _P]
    lib.hf_flash_batch_error.restype = None
    lib.hf_flash_batch_error.argtypes = [_P, _P]
    lib.hf_flash_batch_free.restype = None
    lib.hf_flash_batch_free.argtypes = [_P]
    lib.hf_flash_stream_bytes.restype = None
    lib.hf_flash_stream_bytes.argtypes = [_P]
    lib.hf_flash_stream_comes.restype = None
    lib.hf_flash_stream_comes.argtypes = [_P, _I]
    lib.hf_flash_stream_take.restype = _N
    lib.hf_flash_stream_take.argtypes = [_P, _I, _I, _P]
    lib.hf_flash_stream_give.restype = None
    lib.hf_flash_stream_give.argtypes = [_P, _I]
    lib.hf_flash_stream_drop.restype = _N
    lib.hf_flash_stream_drop.argtypes = [_P]
    for watch in (lib.hf_flash_stream_watch, lib.hf_flash_stream_unwatch):
        watch.restype = None
        watch.argtypes = [_P]
    lib.hf_flash_sum_add.restype = None
    lib.hf_flash_sum_add.argtypes = [_P, _P, _P, _P, _I, _I]
    lib.hf_flash_stream_sum.restype = _N
    lib.hf_flash_stream_sum.argtypes = [_P, _P, _P, _P]
    return lib


_lib = _load()


def library() -> ctypes.CDLL | None:
    """The loaded extension, for the modules that call it themselves; None where it was not built."""
    return _lib


def available() -> bool:
    """Whether the native kernels are built and switched on. Logged once, when first asked."""
    _say_which()
    return _lib is not None


@functools.cache
def _say_which() -> None:
    why = (
        "HF_FLASH_NATIVE=0" if os.environ.get("HF_FLASH_NATIVE") == "0" else "the extension was not built or not loaded"
    )
    logger.info("hf_flash: computing with " + ("native kernels." if _lib else f"torch operations ({why})."))


def activation_code(
    act: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32
) -> tuple[int, float] | None:
    """Number and threshold of an activation that the kernels know, in a dtype that they do; None for others."""
    threshold = zero_below(act)
    if threshold is None or dtype not in CODES:
        return None
    if isinstance(act, ReLUSquaredActivation):
        return 1, 0.0
    if type(act).__name__ == "FATReLU":
        return 2, torch.tensor(threshold, dtype=dtype).item()  # torch compares in the tensor's dtype
    if isinstance(act, torch.nn.ReLU6) or act is torch.nn.functional.relu6:
        return 3, 0.0
    return 0, 0.0


def any_activation_code(
    act: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32
) -> tuple[int, float] | None:
    """`activation_code`, with those that are never exactly zero: SiLU and GELU."""
    if dtype not in CODES:
        return None
    inner = getattr(act, "act", None)  # transformers' GELUs have a variant that rounds after every step
    if isinstance(act, torch.nn.SiLU | SiLUActivation) or act is torch.nn.functional.silu:
        return 4, 0.0
    if (isinstance(act, torch.nn.GELU) and act.approximate == "none") or inner is torch.nn.functional.gelu:
        return 5, 0.0
    if (isinstance(act, torch.nn.GELU) and act.approximate == "tanh") or (
        isinstance(inner, functools.partial) and inner.func is torch.nn.functional.gelu
    ):
        return 6, 0.0
    return activation_code(act, dtype)


def sparse_ffn(
    x: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, d_model: int, d_out: int, gated: bool,
    weight_dtype: torch.dtype, act: tuple[int, float],
    gate_bias: torch.Tensor | None = None, up_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """A few tokens' FFN over bundles in slots, in place: no row is copied, silent ones are hardly touched.

    Intermediate values are rounded to x's dtype where the dense block rounds them; sums are float32. Reference:
    `ops.hidden` and `ops.project` on the gathered rows.

    Args:
        x: [T, d_model], float32, float16 or bfloat16.
        rows: [n_slots, row_bytes] uint8.
        slots: [n] int64.
        d_model, d_out, gated, weight_dtype: the layout of a row.
        act: from `activation_code`.
        gate_bias, up_bias: [n] in the order of `slots`, or None.

    Returns:
        [T, d_out] float32 without the down bias, and how many neurons fired for any token.
    """
    assert _lib is not None and rows.dtype == torch.uint8 and slots.dtype == torch.int64 and rows.stride(1) == 1
    x32 = x.float().contiguous()
    out = torch.zeros(x.shape[0], d_out, dtype=torch.float32, device="cpu")
    biases = [None if b is None else b.to(x.dtype).float().contiguous() for b in (gate_bias, up_bias)]
    start = time.perf_counter()
    fired = _lib.hf_flash_sparse_ffn(
        x32.data_ptr(), x.shape[0], d_model, d_out, rows.data_ptr(), rows.stride(0), slots.contiguous().data_ptr(),
        len(slots), pointer(biases[0]), pointer(biases[1]), int(gated), CODES[weight_dtype], CODES[x.dtype],
        act[0], act[1], out.data_ptr(),
    )  # fmt: skip
    if trace.active is not None:
        trace.active.add(trace.ARITHMETIC, start, time.perf_counter(), neurons=len(slots), native=True)
    return out, int(fired)


def gate(
    x: torch.Tensor, sketch: Any, offset: torch.Tensor, bias: torch.Tensor | None, tail: float | None,
    gamma: float, per_norm: float, tiny: float, unit: float, threshold: float, judged: tuple[float, float],
    decided: torch.Tensor | None = None, upper_tail: float = math.nan,
) -> tuple[IntArray, torch.Tensor]:  # fmt: skip
    """Which neurons cannot be proved silent. Reference: `CertifiedGate.upper`, which has the same quantities.

    One token is scanned in whole numbers where the CPU has AVX512-VNNI: its entries are rounded to 16 bits, and
    the bound grows by the norm of what that leaves out (about a hundredth).

    Args:
        x: [T, d_model].
        sketch: a `Sketch`; offset: its `offset()`.
        bias: [n] float32 or None.
        tail: as in `CertifiedGate`, None for the deterministic bound alone.
        gamma, per_norm, tiny, unit, threshold: as in `CertifiedGate`.
        judged: largest entries between which a token is judged.
        decided: [n] bool, neurons that need not be looked at; none without.
        upper_tail: as in `CertifiedGate`, negative for the deterministic bound; without, all bits are looked at.

    Returns:
        Sorted neurons that any token wants; [n] uint8, 1 where the last one does, else 2 where the last 8 do, 3 the 8
        before, ..., 0 where none does.
    """
    assert _lib is not None
    x32 = x.float().contiguous()
    n = sketch.norm.shape[0]
    ids, marks = np.empty(n, np.int64), torch.zeros(n, dtype=torch.uint8, device="cpu")
    if decided is not None:
        marks[decided] = _PASSED_OVER
    planes = [plane.data_ptr() for plane in sketch.planes] + [None] * (4 - len(sketch.planes))
    known = None if sketch.known is None else sketch.known.as_native(sketch.bits)
    start = time.perf_counter()
    n_ids = _lib.hf_flash_gate(
        x32.data_ptr(), x.shape[0], sketch.d_model, n, sketch.nibbles.data_ptr(), *planes,
        sketch.step.data_ptr(), sketch.norm.data_ptr(), offset.data_ptr(),
        None if known is None else ctypes.addressof(known), pointer(bias), sketch.bits,
        -1.0 if tail is None else tail, gamma, per_norm, tiny, unit, threshold, *judged, ids.ctypes.data,
        marks.data_ptr(), upper_tail, None, None, None, None,
    )  # fmt: skip
    if trace.active is not None:
        trace.active.add(trace.GATE_SCAN, start, time.perf_counter(), neurons=n, native=True)
    if decided is not None:
        marks[decided] = 0
    return ids[:n_ids], marks


class BiasPointers:
    """Where a struct's `gate_bias`, `up_bias` and `down_bias` point: to the biases of a layer, rounded to a dtype.

    Args:
        struct: which has these fields.
        as_float: keep them in float32; else in the dtype that they are rounded to.

    Attributes:
        known: the biases that the struct has; None where that is to be found out.
    """

    def __init__(self, struct: ctypes.Structure, as_float: bool) -> None:
        self._struct, self._as_float = struct, as_float
        self.known: Biases | None = NO_BIASES
        self._held: list[tuple[object, ...]] = [(None,)] * len(NO_BIASES)

    def point(self, biases: Biases, dtype: torch.dtype) -> None:
        """Have the struct point to these; they are made again where they changed."""
        for i, (name, bias) in enumerate(zip(BIAS_FIELDS, biases, strict=True)):
            key = None if bias is None else (bias.data_ptr(), bias._version, dtype)
            if self._held[i][0] != key:
                rounded = None if bias is None else bias.detach().to(dtype).contiguous()
                ours = rounded if rounded is None or not self._as_float else rounded.float()
                # The pointer first: if Ctrl-C comes between, the next call sees an old key and does it again.
                setattr(self._struct, name, pointer(ours))
                self._held[i] = key, ours, bias  # which stays, so that no other can take its place in memory
        self.known = biases


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's numbers for a native call; None, which is null there, for none."""
    return None if tensor is None else tensor.data_ptr()
