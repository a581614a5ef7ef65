"""Who stays in DRAM: the neurons that are used often and lately.

"LLM in a flash" keeps the neurons of the last k tokens and drops the rest (§3.1). Dropping what still fits only causes
reads, and the last tokens alone say little of the next ones: here every neuron has a score that halves with every
`half_life` tokens and grows by one with every use, and the least go first. Just after a use the score counts fourfold,
which fades over some ten tokens: a soft window. A neuron keeps its score when it is evicted, so one that comes back
often is known again. Where somebody counted how often neurons fire (usual.py), scores begin with that. The paper's
window can be had on top: its neurons go last then. On real traces that reads more (docs/log.md), so it is not the
default.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hf_flash.plan import IntArray

_NEVER = -1e300
NOTHING = -1e299  # what is worth no more was never used
# log2 of what a score counts for more, by tokens since the last use; 0 beyond.
LATELY: npt.NDArray[np.float64] = np.append(2 * np.exp2(-np.arange(31) / 4), 0.0)


class Window:
    """Use of the neurons of one layer.

    Args:
        n_neurons: neurons to keep account of.
        n_tokens: k, the tokens whose neurons are kept before any other; 0 for none.
        half_life: tokens after which the score of an unused neuron halves.
        use: [n_neurons] share of tokens at which each is used, as far as that is known.
        time: [1] where the clock is kept, zero at first; memory of its own without.
    """

    def __init__(
        self, n_neurons: int, n_tokens: int = 0, half_life: float = 64.0, time: IntArray | None = None,
        use: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        self._last = np.full(n_neurons, -(1 << 40), dtype=np.int64)  # clock of the last use
        # log2 of the score as of the last use, + that time in half lives: in this form it does not change with time.
        self._key = np.full(n_neurons, _NEVER, dtype=np.float64)
        if use is not None:
            used = np.flatnonzero(use > 0)
            self._key[used] = np.log2(use[used] / (1 - 2 ** (-1 / half_life)))
        self.n_tokens, self.half_life = n_tokens, half_life
        self._time = np.zeros(1, np.int64) if time is None else time

    @property
    def clock(self) -> int:
        """Tokens so far."""
        return int(self._time[0])

    @clock.setter
    def clock(self, tokens: int) -> None:
        self._time[0] = tokens

    def tick(self, n_tokens: int = 1) -> None:
        """A forward pass of `n_tokens` tokens begins."""
        self.clock += max(1, n_tokens)

    def use(self, neurons: IntArray, ago: IntArray | int = 0) -> None:
        """These neurons are used by the current tokens, or so many tokens ago."""
        when = self.clock - ago
        now = when / self.half_life
        self._key[neurons] = np.log2(1.0 + np.exp2(np.clip(self._key[neurons] - now, -1000.0, 1000.0))) + now
        self._last[neurons] = np.maximum(self._last[neurons], when)

    def recent(self) -> IntArray:
        """[k] neurons that the window's tokens used."""
        return np.flatnonzero(self.clock - self._last < self.n_tokens)

    def worth(self) -> npt.NDArray[np.float64]:
        """[n_neurons] log2 of what every neuron is worth now; -1e300 for those that were never used."""
        used = np.flatnonzero(self._key > _NEVER)
        out = np.full(len(self._key), _NEVER)
        out[used] = self._worth(used) - self.clock / self.half_life
        return out

    def _worth(self, neurons: IntArray) -> npt.NDArray[np.float64]:
        age = np.clip(self.clock - self._last[neurons], 0, len(LATELY) - 1)
        return self._key[neurons] + LATELY[age]

    def least(self, n: int, neurons: IntArray) -> IntArray:
        """Which of some neurons to give up first.

        Args:
            n: how many.
            neurons: [m], m >= n.

        Returns:
            [n] positions in `neurons`.
        """
        if n >= len(neurons):
            return np.arange(len(neurons))
        worth = self._worth(neurons)
        worth[self.clock - self._last[neurons] < self.n_tokens] += 1e12  # the window goes last
        return np.argpartition(worth, n)[:n]

    def books(self) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """[n_neurons] clock of the last use and [n_neurons] key of the score, as kept: for the native step."""
        return self._last, self._key
