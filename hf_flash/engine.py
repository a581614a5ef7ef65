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
from hf_flash.store import FlashLayer

Piece = tuple[slice | torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]  # neurons, gate, up, down rows


class Engine(ABC):
    """Computes one FFN from flash."""

    layer: FlashLayer

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

    def note_spans(self, recorder: trace.Recorder) -> None:
        """Tell who records what the last `forward` kept back, since to tell it takes time."""
        del recorder  # most tell at once

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
