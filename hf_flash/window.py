"""Who stays in DRAM: the window of recent tokens, and beyond it the budget.

"LLM in a flash" keeps the neurons of the last k tokens and drops the rest (§3.1). Dropping what still fits would
only cause reads, so here a neuron of the window cannot be evicted while anything older can, and the older ones go
in the order of a score that halves with every `half_life` tokens without use and grows by one with every use:
recent and frequent use both count, in one number per slot.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hf_flash.plan import IntArray


class Window:
    """Use of the slots of one layer.

    Args:
        n_slots: slots to keep account of.
        n_tokens: k, the tokens whose neurons are kept before any other.
        half_life: tokens after which an unused slot's score halves.
    """

    def __init__(self, n_slots: int, n_tokens: int = 5, half_life: float = 32.0) -> None:
        self._last = np.full(n_slots, -(1 << 40), dtype=np.int64)  # clock of the last use
        self._score = np.zeros(n_slots, dtype=np.float64)  # as of the last use
        self._k, self._half_life, self.clock = n_tokens, half_life, 0

    def tick(self, n_tokens: int = 1) -> None:
        """A forward pass of `n_tokens` tokens begins."""
        self.clock += max(1, n_tokens)

    def use(self, slots: IntArray) -> None:
        """These slots are used by the current tokens."""
        age = (self.clock - self._last[slots]) / self._half_life
        self._score[slots] = 1.0 + self._score[slots] * np.exp2(-np.minimum(age, 1000.0))
        self._last[slots] = self.clock

    def forget(self, slots: IntArray) -> None:
        """These slots hold another neuron from now on."""
        self._last[slots], self._score[slots] = -(1 << 40), 0.0

    def victims(self, n: int, busy: npt.NDArray[np.bool_]) -> IntArray:
        """The `n` slots to give up first.

        Args:
            n: how many; at most the number of slots that are not busy.
            busy: [n_slots], slots that must stay.

        Returns:
            [n] slot numbers.
        """
        age = self.clock - self._last
        worth = np.log2(np.maximum(self._score, 1e-300)) - np.minimum(age, 1 << 30) / self._half_life
        worth = np.where(age < self._k, worth + 1e12, worth)  # in the window: after everything older
        worth[busy] = np.inf
        if n >= len(worth):
            return np.arange(len(worth))
        return np.argpartition(worth, n)[:n] if n else np.empty(0, np.int64)
