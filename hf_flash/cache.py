"""The DRAM side of one layer: slots that hold bundles, and which neuron is in which.

A bundle is read from flash straight into its slot and computed on there, by index. Nothing is ever moved or
compacted, which replaces the delete-and-swap bookkeeping of "LLM in a flash" (§3.3): an FFN is a sum, so order is free.
One cache serves all sequences, beams and threads of a process.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import torch

from hf_flash.memory import aligned_empty, discard
from hf_flash.plan import IntArray
from hf_flash.readers import Ticket
from hf_flash.stats import FlashStats
from hf_flash.store import MAX_GAP_BYTES, FlashLayer, FlashStore
from hf_flash.window import NOTHING, Window

HALF_LIFE_OF_KNOWN = 256.0  # tokens, where scores begin with what was counted


@dataclasses.dataclass
class Lookup:
    """Where the wanted neurons are: hits now, the others once `ticket` is waited for.

    Attributes:
        neurons: [n] the wanted ones, sorted.
        slots: [n] their slots.
        ticket: reads under way, or None.
    """

    neurons: IntArray
    slots: IntArray
    ticket: Ticket | None


class Slots:
    """Memory for bundles of one size, which layers may share: each slot belongs to one of them.

    Args:
        n_slots: bundles that fit.
        row_bytes: of a bundle.
        n_more: slots behind these that may be used for a time; they take DRAM as they are.
    """

    def __init__(self, n_slots: int, row_bytes: int, n_more: int = 0) -> None:
        n = n_slots + n_more
        self.rows = aligned_empty(n * row_bytes).view(n, row_bytes)
        self.neuron_of = np.full(n, -1, dtype=np.int64)  # in the layer that has the slot

    def discard(self, first: int) -> None:
        """Give the memory of the slots from the first on back to the system, until they are used again."""
        discard(self.rows[first:].view(-1))


class _Field:
    """An integer of a cache that native code sees and changes, too: a place in its `state`."""

    def __init__(self, at: int) -> None:
        self._at = at

    def __get__(self, cache: NeuronCache, owner: type) -> int:
        return int(cache.state[self._at])

    def __set__(self, cache: NeuronCache, value: int) -> None:
        cache.state[self._at] = value


class NeuronCache:
    """Slots for the bundles of one layer.

    Args:
        store: where missing bundles come from.
        layer: whose bundles.
        n_slots: bundles that fit; with n_slots >= n_neurons everything read once stays.
        window: k, tokens whose neurons stay before any other; 0 for none.
        stats: where hits and reads are counted.
        slots, first: memory shared with other layers, of which `n_slots` from the first on are this one's; without,
            memory of its own.
        keeps: whether neurons stay from one pass to the next.
        use: [n_neurons] float32, share of tokens at which each fires; None where that is not known.

    Attributes:
        n_slots: slots that are this layer's now. n_used: of those, how many hold a neuron.
        largest: the most neurons that a pass of few tokens wanted lately.
        state: [4] these three and the window's clock, where native code finds them.
    """

    n_slots, n_used, largest = _Field(0), _Field(1), _Field(3)
    _CLOCK = 2

    def __init__(
        self, store: FlashStore, layer: FlashLayer, n_slots: int, window: int, stats: FlashStats,
        slots: Slots | None = None, first: int = 0, keeps: bool = True, use: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.state, self._keeps = np.zeros(4, np.int64), keeps
        self._store, self.layer, self._stats = store, layer, stats
        self._window, self._use = window, use
        self.max_gap_rows = MAX_GAP_BYTES // layer.layout.row_bytes
        self.lock = threading.RLock()
        self.begin(n_slots, slots, first)

    def reset(self) -> None:
        """Forget every neuron and take fresh memory, shared with no other layer.

        For a pass that was stopped in the middle (Ctrl-C, a failed read): reads of it that nobody can wait for any
        more land in the old memory, which lives until they have, and no slot that was not filled is ever found.
        """
        self.begin(self.n_slots)

    def begin(self, n_slots: int, slots: Slots | None = None, first: int = 0) -> None:
        """Forget every neuron and what it was worth, and go on with these slots; arguments as above."""
        row_bytes = self.layer.layout.row_bytes
        self.n_slots, self.largest = min(n_slots, self.layer.n_neurons), 0
        self._slot_of = np.full(self.layer.n_neurons, -1, dtype=np.int64)
        self.slots = Slots(self.n_slots, row_bytes) if slots is None else slots
        self.rows = self.slots.rows  # [n, row_bytes]
        self._owned = np.full(self.layer.n_neurons, -1, dtype=np.int64)  # this layer's slots; used ones come first
        self._owned[: self.n_slots] = np.arange(first, first + self.n_slots)
        self._stats.add(cache_bytes=-self.n_used * row_bytes)
        clock = self.state[self._CLOCK : self._CLOCK + 1]
        self.n_used = clock[0] = 0
        if self._use is None:
            self.window = Window(self.layer.n_neurons, self._window, time=clock)
        else:  # what was counted over many tokens is not to be forgotten within a few
            use = self._use.numpy()
            self.window = Window(self.layer.n_neurons, self._window, HALF_LIFE_OF_KNOWN, time=clock, use=use)

    def books(self) -> tuple[IntArray, IntArray, IntArray]:
        """Slot of each neuron [n_neurons] and neuron in each slot, -1 for none; slots owned: for the native step."""
        return self._slot_of, self.slots.neuron_of, self._owned

    def _now_used(self, n_used: int) -> None:
        """So many slots are in use now."""
        self._stats.add(cache_bytes=(n_used - self.n_used) * self.layer.layout.row_bytes)
        self.n_used = n_used

    def pass_begins(self, n_tokens: int) -> None:
        """A pass of `n_tokens` tokens begins. Hold `lock`."""
        self.window.tick(n_tokens)
        if not self._keeps:
            self._drop(self._owned[: self.n_used])
            self._now_used(0)

    def cached(self, neurons: IntArray) -> IntArray:
        """Slots of some neurons, -1 where they are not in DRAM. [n] -> [n]"""
        return self._slot_of[neurons]

    def fits(self, neurons: IntArray) -> bool:
        """Whether all of these can be in DRAM together."""
        return len(neurons) <= self.n_slots

    def fetch(self, neurons: IntArray) -> Lookup:
        """Find the wanted neurons and start reading the missing ones into slots of their own.

        Hold `lock` until the rows have been used. If this or waiting for the ticket fails, call `reset`.

        Args:
            neurons: [n] sorted, unique, n <= n_slots.

        Returns:
            Their slots and the ticket of the reads.
        """
        self.window.use(neurons)
        slots = self._slot_of[neurons].copy()
        missing = np.flatnonzero(slots < 0)
        ticket = None
        if len(missing):
            free = self._take_slots(len(missing), neurons)
            slots[missing] = free
            wanted = neurons[missing]
            self._slot_of[wanted] = free
            self.slots.neuron_of[free] = wanted
            ticket, n_bytes, n_reads = self._store.submit_rows(self.layer, wanted, self.rows, free, self.max_gap_rows)
            self._stats.add(bytes_read=n_bytes, n_reads=n_reads)
        n_hit = len(neurons) - len(missing)
        self._stats.add(neurons_wanted=len(neurons), neurons_hit=n_hit, neurons_read=len(missing))
        return Lookup(neurons, slots, ticket)

    def prefetch(self, neurons: IntArray, n_tokens: int) -> tuple[IntArray, Ticket | None]:
        """Start reading neurons that a pass to come may want. A guess takes only slots outside the window.

        Hold `lock`, and wait for the ticket before the slots are looked into. If that fails, call `reset`.

        Args:
            neurons: [n] sorted, unique. n_tokens: of that pass.

        Returns:
            Those that are being read, as far as there is room, and the ticket.
        """
        missing = neurons[self._slot_of[neurons] < 0]
        self.window.clock += n_tokens  # as of the pass to come
        try:
            spared = np.union1d(neurons, self.window.recent())
            missing = missing[: self.n_slots - int((self._slot_of[spared] >= 0).sum())]
            if not len(missing):
                return missing, None
            taken = self._take_slots(len(missing), spared)
            self._slot_of[missing] = taken
            self.slots.neuron_of[taken] = missing
            ticket, n_bytes, n_reads = self._store.submit_rows(self.layer, missing, self.rows, taken, self.max_gap_rows)
            self._stats.add(bytes_read=n_bytes, n_reads=n_reads)
        finally:
            self.window.clock -= n_tokens
        return missing, ticket

    @property
    def is_known(self) -> bool:
        """Whether it was counted how often each neuron fires."""
        return self._use is not None

    def likeliest(self) -> IntArray:
        """Neurons for the free slots, sorted: those that fire most often, as far as that is known. Hold `lock`."""
        worth = self.window.worth()
        absent = np.flatnonzero((self._slot_of < 0) & (worth > NOTHING))
        n = min(len(absent), self.n_slots - self.n_used)
        return np.sort(absent[np.argsort(-worth[absent], kind="stable")[:n]])

    def keep(self, neurons: IntArray, rows: torch.Tensor) -> None:
        """Copy bundles that passed by in a sweep into slots, as far as they are not there and room is found.

        Args:
            neurons: [n] sorted, unique.
            rows: [n, row_bytes] their bundles.
        """
        missing = np.flatnonzero(self._slot_of[neurons] < 0)
        absent = missing[: self.n_slots - (len(neurons) - len(missing))]
        if not len(absent):
            return
        slots = self._take_slots(len(absent), neurons)
        self.rows[torch.from_numpy(slots)] = rows[torch.from_numpy(absent)]
        self._slot_of[neurons[absent]] = slots
        self.slots.neuron_of[slots] = neurons[absent]

    def give(self, n: int) -> IntArray:
        """Give up n slots for good: those that hold nothing, then those of the neurons that are worth least.

        Hold `lock`, and let no read be under way.

        Returns:
            [n] which.
        """
        used, empty = self._owned[: self.n_used], self._owned[self.n_used : self.n_slots]
        victims = self.window.least(max(0, n - len(empty)), self.slots.neuron_of[used])
        given = np.concatenate([used[victims], empty])  # the first n go
        self._owned[: self.n_slots - n] = np.concatenate([np.delete(used, victims), given[n:]])
        self._drop(given[: len(victims)])
        self.n_slots -= n
        self._now_used(self.n_used - len(victims))
        return given[:n]

    def receive(self, slots: IntArray) -> None:
        """These slots are this layer's from now on. Hold `lock`."""
        self._owned[self.n_slots : self.n_slots + len(slots)] = slots
        self.n_slots += len(slots)

    def withdraw(self, first: int) -> None:
        """Lose the slots from the first on, with what they hold. Hold `lock`, and let no read be under way."""
        owned = self._owned[: self.n_slots]
        stays = owned < first
        used = owned[: self.n_used]
        self._drop(used[~stays[: self.n_used]])
        n_used = int(stays[: self.n_used].sum())
        left = owned[stays]  # used ones still come first
        self._owned[: len(left)] = left
        self.n_slots = len(left)
        self._now_used(n_used)

    def _take_slots(self, n: int, wanted: IntArray) -> IntArray:
        """Slots for n neurons more: unused ones, then those of the neurons that are worth least and not wanted."""
        used = self._owned[: self.n_used]
        fresh = self._owned[self.n_used : min(self.n_used + n, self.n_slots)].copy()
        self.n_used += len(fresh)
        self._stats.add(cache_bytes=len(fresh) * self.layer.layout.row_bytes)
        if len(fresh) == n:
            return fresh
        busy = np.zeros(self.layer.n_neurons, dtype=bool)
        busy[wanted] = True
        idle = used[~busy[self.slots.neuron_of[used]]]
        victims = idle[self.window.least(n - len(fresh), self.slots.neuron_of[idle])]
        self._drop(victims)
        return np.concatenate([fresh, victims])

    def _drop(self, slots: IntArray) -> None:
        self._slot_of[self.slots.neuron_of[slots]] = -1
        self.slots.neuron_of[slots] = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> NeuronCache:
        return self
