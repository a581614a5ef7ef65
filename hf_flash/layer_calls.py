"""What decoder layers are about to do to a token, and the native call that does it, one layer after the other.

layer_step.py finds out what each layer is to be told; here it is handed over, while the locks of the FFNs are held.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_flash import native, trace
from hf_flash.attention_step import Token
from hf_flash.ffn import FlashFFN
from hf_flash.kv import GrowingLayer
from hf_flash.native import NativeFFN
from hf_flash.ops import Biases

_P, _I, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
NOTHING, WHOLE = 0, 3  # what native code has done of a layer, as in layer_step.cpp; in between: not the FFN and its sum


class Unchanging(ctypes.Structure):
    """What does not change from token to token. These have the fields of _native/layer_step.cpp, in its order."""

    _fields_ = [("attention", _P), ("d", _I), ("first_eps", _F), ("second_eps", _F)]


class Told(ctypes.Structure):
    """What native code is told of one token, and what it says of it."""

    _fields_ = [
        *[(name, _P) for name in ("layer", "x", "first_weight", "first_bias", "second_weight", "second_bias")],
        *[(name, _P) for name in ("cos", "sin", "keys", "values")], ("kv_head", _I), ("n", _I),
        *[(name, _P) for name in ("q_bias", "k_bias", "v_bias", "o_bias", "y", "z", "out")],
        *[(name, _P) for name in NativeFFN._fields], ("looks", _I), ("next", _P),
        ("done", _I), *[(name, _D) for name in ("begun", "attended", "fed", "stop")],
    ]  # fmt: skip


@dataclass(slots=True)
class LayerCall:
    """What one layer is going to do, or has done, to a token.

    It keeps no cache alive: a pass may be left before its end.

    Attributes:
        path: of the layer.
        x, y, z, out: its input, its result, the FFN's input and its output; layers behind use the last two after it.
        told: the same for native code.
        cache: its part of the cache.
        ffn: the FFN. biases: of that. calls_ffn: whether it must be called, since somebody is to be told.
        is_proven: whether it may be run without the layer's modules.
        following: what the layer behind is going to do.
        begun: whether the FFN was told that a pass begins.
    """

    path: str
    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    out: torch.Tensor
    told: Told
    cache: weakref.ref[GrowingLayer]
    token: Token
    ffn: FlashFFN
    biases: Biases
    calls_ffn: bool
    is_proven: bool
    following: LayerCall | None = None
    begun: bool = False

    def holds(self, x: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the layer is called with what was foreseen, and its part of the cache is as it was then."""
        cache = self.cache()
        if x is not self.x or cache is None or not cache.awaits_row or not self.token.holds(kwargs):
            return False
        return self.told.done == NOTHING or x._version == 0  # as native code left it

    def result(self) -> torch.Tensor:
        """The layer's result, once it was `run`."""
        if self.told.done == WHOLE:
            return self.y
        return self.y.add_(self.ffn(self.z) if self.calls_ffn else self.ffn.decode(self.z, self.biases, not self.begun))

    def note(self, recorder: trace.Recorder) -> None:
        """Tell who records where the time of this layer went, and of those that ran behind it."""
        for call in self.chain():
            told, engine = call.told, call.ffn.engine
            if told.done == NOTHING:
                break
            recorder.add(trace.ATTENTION, told.begun, told.attended, call.path)
            if told.done == WHOLE and engine is not None:
                recorder.add(trace.NATIVE, told.begun, told.stop, call.path)
                recorder.add(trace.FFN, told.attended, told.fed, call.ffn.block.path)
                engine.note_native(recorder, told.attended, told.fed)

    def chain(self) -> Iterator[LayerCall]:
        """This and what the layers behind are going to do."""
        call: LayerCall | None = self
        while call is not None:
            yield call
            call = call.following

    def _take_ffn(self, locks: list[Any]) -> bool:
        """Let native code run the FFN, too, if it can; the lock that it must hold meanwhile is added to `locks`."""
        told = self.told  # which may have been told before, by a call that came to an end before this layer
        told.step = told.stream = told.sum = told.next = None
        told.looks = 0
        engine, act = self.ffn.engine, self.ffn.native_act
        if engine is None or act is None or self.calls_ffn or not self.is_proven:
            return False
        lock = engine.lock
        if not locks or locks[-1] is not lock:
            locks.append(lock)  # Ctrl-C may come as soon as it is taken
            if not lock.acquire(blocking=False):
                locks.pop()
                return False
        found = engine.as_native(act, self.biases)
        if found is not None:
            told.step, told.stream, told.sum = found
        return found is not None


def check() -> None:
    """Make sure that native code knows the structs as they are here."""
    sizes = (_I * 2)()
    library: Any = native.library()
    library.hf_flash_layer_bytes(sizes)
    assert list(sizes) == [ctypes.sizeof(Unchanging), ctypes.sizeof(Told)]


def run(first: LayerCall) -> None:
    """Have native code run a layer, and those behind it as far as it can: all but an FFN that is not for it.

    Raises:
        ReadError: flash failed; the model stays usable.
    """
    if first.ffn.begins_passes and first.is_proven and not first.calls_ffn:
        first.ffn.begin_pass(1)
        first.begun = True
    locks: list[Any] = []
    try:
        _connect(first, locks)
        library: Any = native.library()
        at = _P(ctypes.addressof(first.told))
        result = native.SIGNAL
        while result == native.SIGNAL:  # its handler runs between the calls, and may raise
            result = library.hf_flash_layers(ctypes.addressof(at))
        if result:
            stopped: Any = next(call for call in first.chain() if ctypes.addressof(call.told) == at.value)
            stopped.ffn.engine.native_ended(result)
    except BaseException:  # Ctrl-C too, before anybody has looked at the result
        for call in first.chain():
            if call.ffn.engine is None or not (call.told.step or call.told.stream):
                break  # the locks of those behind it are not ours
            call.ffn.engine.native_stopped()
        raise
    finally:
        _release_all(locks)


def _connect(first: LayerCall, locks: list[Any]) -> None:
    """Say which layers are to be run one after the other."""
    call, goes_on = first, first._take_ffn(locks)
    while goes_on and call.following is not None and not call.following.ffn.begins_passes:
        following = call.following
        call.told.next = ctypes.addressof(following.told)
        goes_on = following._take_ffn(locks)
        engine, behind = call.ffn.engine, following.ffn.engine
        if goes_on and engine is not None and behind is not None and engine.looks_at(behind):
            call.told.looks = 1
        call = following


def _release_all(locks: list[Any]) -> None:
    try:
        while locks:
            with contextlib.suppress(RuntimeError):  # Ctrl-C came before it was taken, or after it was released
                locks[-1].release()
            locks.pop()
    finally:
        if locks:  # Ctrl-C came here
            _release_all(locks)


def results_like(x: torch.Tensor, n: int) -> list[torch.Tensor]:
    """n tensors like x, whose versions tell whether somebody changed them; inference mode has none that do."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return [torch.empty_like(x) for _ in range(n)]
    return [torch.empty_like(x) for _ in range(n)]
