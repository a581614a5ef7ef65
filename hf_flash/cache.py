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

from hf_flash.memory import aligned_empty
from hf_flash.plan import IntArray
from hf_flash.readers import Ticket
from hf_flash.stats import FlashStats
from hf_flash.store import MAX_GAP_BYTES, FlashLayer, FlashStore
from hf_flash.window import Window


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


class NeuronCache:
    """Slots for the bundles of one layer.

    Args:
        store: where missing bundles come from.
        layer: whose bundles.
        n_slots: bundles that fit; with n_slots >= n_neurons everything read once stays.
        window: k, tokens whose neurons stay before any other; 0 keeps no neuron from one pass to the next.
        stats: where hits and reads are counted.
        memory: [n_slots * row_bytes] uint8, page-aligned, to begin with; memory of its own without.
    """

    def __init__(
        self, store: FlashStore, layer: FlashLayer, n_slots: int, window: int, stats: FlashStats,
        memory: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.n_slots = min(n_slots, layer.n_neurons)
        self._store, self.layer, self._stats = store, layer, stats
        self._window, self.n_used = window, 0
        self.max_gap_rows = MAX_GAP_BYTES // layer.layout.row_bytes
        self.lock = threading.RLock()
        self._begin(memory)

    def reset(self) -> None:
        """Forget every neuron and take fresh memory.

        For a pass that was stopped in the middle (Ctrl-C, a failed read): reads of it that nobody can wait for any
        more land in the old memory, which lives until they have, and no slot that was not filled is ever found.
        """
        self._begin(None)

    def _begin(self, memory: torch.Tensor | None) -> None:
        self._slot_of = np.full(self.layer.n_neurons, -1, dtype=np.int64)
        self._neuron_of = np.full(self.n_slots, -1, dtype=np.int64)
        memory = aligned_empty(self.n_slots * self.layer.layout.row_bytes) if memory is None else memory
        self.rows = memory.view(self.n_slots, -1)  # [n_slots, row_bytes]
        self._stats.add(cache_bytes=-self.n_used * self.layer.layout.row_bytes)
        self.n_used = 0
        self.window = Window(self.n_slots, self._window)

    def books(self) -> tuple[IntArray, IntArray]:
        """[n_neurons] slot of each neuron and [n_slots] neuron in each slot, -1 for none: for the native step."""
        return self._slot_of, self._neuron_of

    def took(self, n_used: int, clock: int) -> None:
        """The native step has kept the books: so many slots are in use now, and so late it is."""
        if n_used != self.n_used:
            self._stats.add(cache_bytes=(n_used - self.n_used) * self.layer.layout.row_bytes)
        self.n_used, self.window.clock = n_used, clock

    def begin(self, n_tokens: int) -> None:
        """A pass of `n_tokens` tokens begins."""
        self.window.tick(n_tokens)
        if self._window == 0:
            self._drop(np.arange(self.n_used))
            self._stats.add(cache_bytes=-self.n_used * self.layer.layout.row_bytes)
            self.n_used = 0

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
        slots = self._slot_of[neurons].copy()
        missing = np.flatnonzero(slots < 0)
        ticket = None
        if len(missing):
            free = self._take_slots(len(missing), slots[slots >= 0])
            slots[missing] = free
            wanted = neurons[missing]
            self._slot_of[wanted] = free
            self._neuron_of[free] = wanted
            ticket, n_bytes, n_reads = self._store.submit_rows(self.layer, wanted, self.rows, free, self.max_gap_rows)
            self._stats.add(bytes_read=n_bytes, n_reads=n_reads)
        self.window.use(slots)
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
        window, slots = self.window, self._slot_of[neurons]
        missing = neurons[slots < 0]
        self.window.clock += n_tokens  # as of the pass to come
        try:
            room = self.n_slots - self.n_used
            if len(missing) > room:
                idle = window.idle()
                idle[slots[slots >= 0]] = False
                missing = missing[: room + int(idle[: self.n_used].sum())]
            if not len(missing):
                return missing, None
            taken = self._take_slots(len(missing), slots[slots >= 0])
            self._slot_of[missing] = taken
            self._neuron_of[taken] = missing
            ticket, n_bytes, n_reads = self._store.submit_rows(self.layer, missing, self.rows, taken, self.max_gap_rows)
            self._stats.add(bytes_read=n_bytes, n_reads=n_reads)
            window.use(taken, worth=-3)
        finally:
            self.window.clock -= n_tokens
        return missing, ticket

    def keep(self, neurons: IntArray, rows: torch.Tensor) -> None:
        """Copy bundles that passed by in a sweep into slots, as far as they are not there and room is found.

        Args:
            neurons: [n] sorted, unique.
            rows: [n, row_bytes] their bundles.
        """
        present = self._slot_of[neurons]
        present = present[present >= 0]
        absent = np.flatnonzero(self._slot_of[neurons] < 0)[: self.n_slots - len(present)]
        if not len(absent):
            return
        slots = self._take_slots(len(absent), present)
        self.rows[torch.from_numpy(slots)] = rows[torch.from_numpy(absent)]
        self._slot_of[neurons[absent]] = slots
        self._neuron_of[slots] = neurons[absent]
        self.window.use(slots)

    def _take_slots(self, n: int, busy_slots: IntArray) -> IntArray:
        fresh = np.arange(self.n_used, min(self.n_used + n, self.n_slots), dtype=np.int64)
        self.n_used += len(fresh)
        self._stats.add(cache_bytes=len(fresh) * self.layer.layout.row_bytes)
        if len(fresh) == n:
            return fresh
        busy = np.zeros(self.n_slots, dtype=bool)
        busy[busy_slots] = True
        busy[fresh] = True
        victims = self.window.victims(n - len(fresh), busy)
        self._drop(victims)
        return np.concatenate([fresh, victims])

    def _drop(self, slots: IntArray) -> None:
        neurons = self._neuron_of[slots]
        self._slot_of[neurons[neurons >= 0]] = -1
        self._neuron_of[slots] = -1
        self.window.forget(slots)

    def __deepcopy__(self, memo: dict[int, Any]) -> NeuronCache:
        return self
