"""Counters: what a model read, what it found in DRAM and what it waited for.

One `FlashStats` per model, shared by its layers. Additions happen under the layer's or the stream's lock, or on
ints where a lost update would be harmless; nothing here decides anything.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

_STATE = ("cache_bytes", "plan")  # fields that say what is, not what was done


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

    n_tokens: int = 0
    n_forwards: int = 0
    bytes_read: int = 0
    n_reads: int = 0
    neurons_wanted: int = 0
    neurons_hit: int = 0
    neurons_read: int = 0
    neurons_early: int = 0
    neurons_fired: int = 0
    gate_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    cache_bytes: int = 0
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **counts: float) -> None:
        """Add to several counters at once, safe from any thread."""
        with self._lock:
            for name, value in counts.items():
                setattr(self, name, getattr(self, name) + value)

    def reset(self) -> None:
        """Set every counter but `cache_bytes` and `plan` back to zero."""
        with self._lock:
            for name, value in self.counters().items():
                setattr(self, name, type(value)(0))

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
