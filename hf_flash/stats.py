"""Counters: what a model read, what it found in DRAM and what it waited for.

One `FlashStats` per model, shared by its layers. Native code counts in structs of its own, which are looked at when
somebody asks: to add to seven counters here took longer than all the rest of a layer's Python.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from typing import Any

_STATE = ("cache_bytes", "plan")  # fields that say what is, not what was done


class Counters(ctypes.Structure):
    """What native code counts; the fields of _native/calls.h, in its order."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("neurons_wanted", "neurons_hit", "neurons_read", "neurons_early")],
        *[(name, ctypes.c_int64) for name in ("neurons_fired", "bytes_read", "n_reads", "cache_bytes")],
        *[(name, ctypes.c_double) for name in ("gate_s", "wait_s", "compute_s")],
    ]  # fmt: skip


class _Counter:
    """A field that is the sum of what was added here and of what native code counted under the same name."""

    def __init__(self, start: float) -> None:
        self._start = start

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, stats: FlashStats | None, owner: type) -> float:
        if stats is None:
            return self._start  # the field's default, as dataclasses ask for it
        return stats._own[self._name] + stats._counted(self._name)  # type: ignore[no-any-return]

    def __set__(self, stats: FlashStats, value: float) -> None:
        stats.__dict__.setdefault("_own", {})[self._name] = value


def _counter(start: float = 0) -> Any:
    return _Counter(start)


@dataclasses.dataclass
class FlashStats:
    """What a model has done since it was loaded, or since `reset()`.

    Attributes:
        n_tokens: tokens that passed the first FFN layer (prefill, decode, pad and drafted ones alike).
        n_forwards: forward passes of the first FFN layer.
        bytes_read: bytes read from flash, alignment included.
        n_reads: read requests issued.
        neurons_wanted: neurons the gates asked for, summed over layers and forwards.
        neurons_hit: of those, how many were in DRAM already.
        neurons_read: of those, how many were read from flash.
        neurons_early: of those read, how many the early gate had guessed; its wrong guesses are in bytes_read alone.
        neurons_fired: of those wanted, how many had an activation other than zero (gate `certified`).
        gate_s: seconds in gates.
        wait_s: seconds spent waiting for flash.
        compute_s: seconds in FFN arithmetic.
        cache_bytes: DRAM that holds FFN weights (slots and pinned layers) now.
        plan: what the plan gave to whom, in bytes.
    """

    n_tokens: int = _counter()
    n_forwards: int = _counter()
    bytes_read: int = _counter()
    n_reads: int = _counter()
    neurons_wanted: int = _counter()
    neurons_hit: int = _counter()
    neurons_read: int = _counter()
    neurons_early: int = _counter()
    neurons_fired: int = _counter()
    gate_s: float = _counter(0.0)
    wait_s: float = _counter(0.0)
    compute_s: float = _counter(0.0)
    cache_bytes: int = _counter()
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._own: dict[str, Any]
        self._native: list[ctypes.Structure] = []

    def count_in(self, struct: ctypes.Structure) -> None:
        """Count what native code counts in a struct, whose fields are named as here and only grow."""
        self._native.append(struct)

    def _counted(self, name: str) -> Any:
        return sum(getattr(struct, name, 0) for struct in self._native)

    def add(self, **counts: float) -> None:
        """Add to several counters at once, safe from any thread."""
        own = self._own
        with self._lock:
            for name, value in counts.items():
                own[name] += value

    def reset(self) -> None:
        """Set every counter but `cache_bytes` and `plan` back to zero."""
        with self._lock:
            for name in self.counters():
                self._own[name] = -self._counted(name)

    def counters(self) -> dict[str, Any]:
        """What only grows until `reset`, by name: the difference of two is what was done between them."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _STATE]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON, with the ratios people ask for added."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["bytes_per_token"] = self.bytes_read / self.n_tokens if self.n_tokens else 0.0
        out["hit_rate"] = self.neurons_hit / self.neurons_wanted if self.neurons_wanted else 0.0
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashStats:
        return self  # copies of a model share its flash side, and so its counters
