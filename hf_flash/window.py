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

_NEVER = -1e300


class Window:
    """Use of the slots of one layer.

    Args:
        n_slots: slots to keep account of.
        n_tokens: k, the tokens whose neurons are kept before any other.
        half_life: tokens after which an unused slot's score halves.
    """

    def __init__(self, n_slots: int, n_tokens: int = 5, half_life: float = 32.0) -> None:
        self._last = np.full(n_slots, -(1 << 40), dtype=np.int64)  # clock of the last use
        # log2 of the score as of the last use, + that time in half lives: in this form it does not change with time.
        self._key = np.full(n_slots, _NEVER, dtype=np.float64)
        self.n_tokens, self.half_life, self.clock = n_tokens, half_life, 0

    def tick(self, n_tokens: int = 1) -> None:
        """A forward pass of `n_tokens` tokens begins."""
        self.clock += max(1, n_tokens)

    def idle(self) -> npt.NDArray[np.bool_]:
        """[n_slots] which slots none of the window's tokens used."""
        idle: npt.NDArray[np.bool_] = self.clock - self._last >= self.n_tokens
        return idle

    def use(self, slots: IntArray, worth: int = 0) -> None:
        """These slots are used by the current tokens, or, with a worth below 0, only guessed to be."""
        now = self.clock / self.half_life
        self._key[slots] = np.log2(1.0 + np.exp2(np.maximum(self._key[slots] - now, -1000.0))) + now
        self._key[slots] += worth
        self._last[slots] = self.clock

    def forget(self, slots: IntArray) -> None:
        """These slots hold another neuron from now on."""
        self._last[slots], self._key[slots] = -(1 << 40), _NEVER

    def victims(self, n: int, busy: npt.NDArray[np.bool_]) -> IntArray:
        """The `n` slots to give up first.

        Args:
            n: how many; at most the number of slots that are not busy.
            busy: [n_slots], slots that must stay.

        Returns:
            [n] slot numbers.
        """
        worth = np.where(self.idle(), self._key, self._key + 1e12)  # the window goes last
        worth[busy] = np.inf
        if n >= len(worth):
            return np.arange(len(worth))
        return np.argpartition(worth, n)[:n] if n else np.empty(0, np.int64)

    def books(self) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """[n_slots] clock of the last use and [n_slots] worth, as they are kept: for the native step."""
        return self._last, self._key
