"""How many slots each layer has: a row of DRAM belongs where it saves most reads.

Layers fire very unevenly (a fifth of the neurons of one, one in sixty of the next), so equal shares waste what a quiet
layer does not need and starve a busy one. The scores by which neurons are evicted count expected uses, whatever the
layer: the best division gives a layer as many slots as it has neurons among the most valuable of all layers. That is
what one cache for all layers with one order of eviction would come to; here slots change hands now and then, between
passes, so that a layer's books stay its own and a token touches only what it wants. No row is moved.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.utils.logging import tqdm

from hf_flash import trace
from hf_flash.cache import NeuronCache, Slots
from hf_flash.plan import IntArray
from hf_flash.sparse import SparseEngine
from hf_flash.window import NOTHING

FIRST_PASSES, EVERY_PASSES = 8, 64  # balanced after 8 passes, 16, 32, 64, and then every 64


def divide(worth: Sequence[npt.NDArray[np.float64]], least: IntArray, n_slots: int) -> IntArray:
    """Slots by layer: its least, and one for each of its neurons among the most valuable of what else there is.

    Args:
        worth: per layer [n_neurons], as `Window.worth` gives it.
        least: [n_layers] slots that each must have; no more than `n_slots` together, nor than neurons in any.
        n_slots: to divide; no more than there are neurons.

    Returns:
        [n_layers], summing to n_slots, none above the layer's number of neurons.
    """
    known = [w[w > NOTHING] for w in worth]  # of a neuron that was never used nothing is known
    n_rest = [max(0, len(w) - n) for w, n in zip(known, least, strict=True)]
    rest = [np.partition(w, n - 1)[:n] if n else w[:0] for w, n in zip(known, n_rest, strict=True)]
    values, n_left = np.concatenate(rest), n_slots - int(least.sum())
    best = np.arange(len(values))
    if len(values) > n_left:
        best = np.argpartition(values, len(values) - n_left - 1)[len(values) - n_left :]
    owner = np.searchsorted(np.cumsum(n_rest), best, side="right")
    out = least + np.bincount(owner, minlength=len(rest))
    room = np.array([len(w) for w in worth]) - out
    n_left = n_slots - int(out.sum())
    spread = room * n_left // max(1, int(room.sum()))  # what nothing is known of, evenly
    out += spread
    for i in np.argsort(spread - room)[: n_left - int(spread.sum())]:
        out[i] += 1
    return out


def _least(cache: NeuronCache) -> int:
    return max(1, cache.layer.n_neurons // 50)


class Balance:
    """The layers that share one memory of slots.

    Args:
        engines: of the layers, whose rows have one size.
        n_slots: per layer, to begin with.
        n_more: the most that are lent to them together.

    Attributes:
        row_bytes: of a slot. n_own: slots of the layers. n_lent: how many they have besides.
    """

    def __init__(self, engines: Sequence[SparseEngine], n_slots: Sequence[int], n_more: int = 0) -> None:
        self._engines, self._shares, self._n_more = list(engines), list(n_slots), n_more
        self.row_bytes, self.n_own = self._engines[0].layer.layout.row_bytes, sum(n_slots)
        self._lock = threading.Lock()  # of the division; never taken by who holds a cache's
        self._begin()

    def _begin(self, by_use: bool = True) -> None:
        """Every layer forgets its neurons and has the slots that it had to begin with, in fresh memory.

        Args:
            by_use: divide them by how often neurons fire, if that is known.
        """
        self._slots = Slots(self.n_own, self.row_bytes, self._n_more)
        self._n_passes, self._next, self.n_lent = 0, FIRST_PASSES, 0
        is_known = all(engine.cache.is_known for engine in self._engines)
        first = 0
        for engine, n in zip(self._engines, self._shares, strict=True):
            engine.cache.begin(n, self._slots, first)
            first += n
        if by_use and is_known:  # as good as balanced: few passes say less than what was counted
            self._balance()
            self._next = EVERY_PASSES

    def pass_begins(self, n_tokens: int = 1) -> None:
        """Count a pass, and balance where it is time and no other thread computes.

        Args:
            n_tokens: of it; they count as one.

        Raises:
            ReadError: an earlier read failed.
        """
        del n_tokens
        self._n_passes += 1
        alone = len(self._sharers()) < len(self._engines)  # a pass was stopped
        if self._n_passes < self._next and not alone:
            return
        if not self._lock.acquire(blocking=False):
            return  # the next pass tries again
        with contextlib.ExitStack() as held:
            held.callback(self._lock.release)
            for engine in self._engines:
                if not engine.cache.lock.acquire(blocking=False):
                    return
                held.callback(engine.cache.lock.release)
            begun = time.perf_counter()
            for engine in self._engines:
                engine.land()
            if alone:
                self._begin()
            else:
                self._balance()
                self._next = self._n_passes + min(self._n_passes, EVERY_PASSES)
            if trace.active is not None:
                trace.active.add(trace.BALANCE, begun, time.perf_counter())

    def fill(self) -> None:
        """Read what fires most often, as far as somebody counted that, before anybody asks for it.

        Raises:
            ReadError: flash failed.
        """
        known = [engine for engine in self._engines if engine.cache.is_known]
        for engine in tqdm(known, desc="Filling caches", unit="layer", delay=1):
            engine.fill()

    def lend(self, n: int) -> None:
        """Let the layers have n slots besides their own, more or fewer than they have so far; `n_more` at most.

        The slots that they lose go with what they hold, and their memory back to the system, before this returns.

        Raises:
            ReadError: an earlier read failed.
        """
        n = min(n, self._n_more)  # there are no others, nor neurons for them
        with self._lock:
            if n < self.n_lent:
                self._withdraw(self.n_own + n)
                self.n_lent = n
                self._feed()
            elif n > self.n_lent:
                first, self.n_lent = self.n_own + self.n_lent, n  # what a Ctrl-C leaves out nobody has
                self._hand_out(np.arange(first, self.n_own + n))

    def _withdraw(self, first: int) -> None:
        for engine in self._engines:
            with engine.cache.lock:
                engine.land()
                if engine.cache.slots is self._slots:
                    engine.cache.withdraw(first)
        self._slots.discard(first)

    def _sharers(self) -> list[NeuronCache]:
        """All layers' caches but those that a stopped pass has left with memory of their own."""
        return [engine.cache for engine in self._engines if engine.cache.slots is self._slots]

    def _hand_out(self, slots: IntArray) -> None:
        """To all layers, as many as they have already; those that they have no neurons for nobody gets."""
        caches = self._sharers()
        have = np.array([cache.n_slots for cache in caches])
        bounds = np.cumsum(have) * len(slots) // max(1, int(have.sum()))
        for cache, some in zip(caches, np.split(slots, bounds[:-1]), strict=True):
            with cache.lock:
                cache.receive(some[: cache.layer.n_neurons - cache.n_slots])

    def _feed(self) -> None:
        """Give a layer whose slots were mostly lent ones the least that it must have."""
        caches = self._sharers()
        for cache in caches:
            missing = _least(cache) - cache.n_slots
            if missing > 0:
                richest = max(caches, key=lambda c: c.n_slots - _least(c))
                with richest.lock:
                    given = richest.give(max(0, min(missing, richest.n_slots - _least(richest))))
                with cache.lock:
                    cache.receive(given)

    def _balance(self) -> None:
        caches = [engine.cache for engine in self._engines]
        n_slots = np.array([cache.n_slots for cache in caches])
        least = np.array([min(cache.n_slots, _least(cache)) for cache in caches])
        needed = np.maximum(least, [min(cache.largest, cache.layer.n_neurons) for cache in caches])
        if needed.sum() <= n_slots.sum():  # a layer with fewer slots than a pass wants must sweep, past its slots
            least = needed
        change = divide([cache.window.worth() for cache in caches], least, int(n_slots.sum())) - n_slots
        try:
            free = [caches[i].give(int(-change[i])) for i in np.flatnonzero(change < 0)]
            bounds = np.cumsum(np.maximum(change, 0))[:-1]
            for cache, slots in zip(
                caches, np.split(np.concatenate([*free, np.empty(0, np.int64)]), bounds), strict=True
            ):
                cache.receive(slots)
        except BaseException:  # Ctrl-C: no slot may belong to two layers
            self._begin(by_use=False)
            raise
        for cache in caches:
            cache.largest = cache.largest * 7 // 8

    def __deepcopy__(self, memo: dict[int, Any]) -> Balance:
        return self
