"""How one layer's FFN is computed from flash: every neuron in a sweep, or the few that a gate names.

Both engines give the FFN's output for an input; `pieces` gives the same weights piece by piece, which is what the
gradient needs. Neither holds parameters, and one engine serves all copies of a module, on all threads.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from hf_flash import ops, trace
from hf_flash.memory import aligned_empty
from hf_flash.native import NativeFFN
from hf_flash.store import FlashLayer

Piece = tuple[slice | torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]  # neurons, gate, up, down rows


class Engine(ABC):
    """Computes one FFN from flash."""

    layer: FlashLayer

    @property
    @abstractmethod
    def lock(self) -> threading.RLock:
        """Held by who computes."""

    @abstractmethod
    def forward(self, x: torch.Tensor, act: ops.Activation, biases: ops.Biases) -> torch.Tensor:
        """The FFN's output.

        Args:
            x: [..., d_model].
            biases: another object than before where one of them has changed.

        Returns:
            [..., d_out], dtype of x.

        Raises:
            ReadError: flash failed; the model stays usable.
        """

    def activation(self, act: ops.Activation) -> ops.Activation:
        """What is computed in place of the block's own activation: the same, unless the gate changes it."""
        return act

    @abstractmethod
    def pieces(self, x: torch.Tensor, biases: ops.Biases) -> contextlib.AbstractContextManager[Iterator[Piece]]:
        """Every neuron that can contribute for `x`, piece by piece; each valid until the next step."""

    def as_native(self, act: ops.Activation, biases: ops.Biases) -> NativeFFN | None:
        """How native code is to run this FFN for one bfloat16 token, now; hold `lock` meanwhile.

        Returns:
            None where only `forward` knows what to do.
        """
        del act, biases
        return None

    def native_ended(self, result: int) -> None:
        """Learn that native code came to an end there, and how: NO_ROOM is for `forward` to do again.

        Raises:
            ReadError: flash failed; the model stays usable.
        """
        del result

    def native_stopped(self) -> None:
        """An exception came between the native call and `native_ended`, perhaps of another engine; `lock` is held."""
        return

    def looks_at(self, following: Engine) -> bool:
        """Whether native code is to guess meanwhile what another engine will want, whose `as_native` was called."""
        del following
        return False

    def note_native(self, recorder: trace.Recorder, begun: float, stop: float) -> None:
        """As `note_spans`, of what native code did from one time.perf_counter() to another."""
        del recorder, begun, stop

    def note_spans(self, recorder: trace.Recorder) -> None:
        """Tell who records what the last `forward` kept back, since to tell it takes time."""
        del recorder  # most tell at once

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self


class WorkBuffers:
    """Scratch memory that all layers of a model share, one buffer per name; whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._spared = self._stays = False
        self.lock = threading.RLock()

    def get(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < n_bytes:
            buffer = self._buffers[name] = aligned_empty(n_bytes)
        return buffer[:n_bytes].view(dtype).view(shape)

    def can_spare(self, few: bool) -> bool:
        """A pass begins: whether it goes without scratch, as one of few tokens does; then the memory is given back.

        Once such a pass needed some all the same, the memory stays.
        """
        with self.lock:
            self._stays |= self._spared and bool(self._buffers)
            self._spared = few and not self._stays
            if self._spared:
                self.forget()
            return self._spared

    def forget(self) -> None:
        """Take fresh memory from now on; the old lives until whoever still reads into it is done."""
        self._buffers = {}
