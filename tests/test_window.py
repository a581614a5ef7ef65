"""Who is given up: never a busy slot, never one of the window while an older one is there, then the least used."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hf_flash.window import Window

STEPS = st.lists(st.tuples(st.integers(0, 7), st.frozensets(st.integers(0, 11), max_size=12)), min_size=1, max_size=40)


class SlowWindow:
    """The same account kept as plainly as can be: a list of clocks at which each slot was used."""

    def __init__(self, n_slots: int, k: int, half_life: float) -> None:
        self.uses: list[list[int]] = [[] for _ in range(n_slots)]
        self.k, self.half_life, self.clock = k, half_life, 0

    def score(self, slot: int) -> float:
        return sum(2.0 ** (-(self.clock - clock) / self.half_life) for clock in self.uses[slot])

    def is_recent(self, slot: int) -> bool:
        return bool(self.uses[slot]) and self.clock - self.uses[slot][-1] < self.k


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 12), st.integers(1, 9), st.sampled_from([1.0, 4.0, 32.0]), st.data())
def test_victims_are_those_of_a_slow_reference(
    steps: list[tuple[int, frozenset[int]]], n_slots: int, k: int, half_life: float, data: st.DataObject
) -> None:
    window, slow = Window(n_slots, k, half_life), SlowWindow(n_slots, k, half_life)
    for n_tokens, wanted in steps:
        slots = sorted(s for s in wanted if s < n_slots)
        window.tick(n_tokens)
        slow.clock += max(1, n_tokens)
        window.use(np.array(slots, np.int64))
        for slot in slots:
            slow.uses[slot].append(slow.clock)
        busy = np.zeros(n_slots, bool)
        busy[data.draw(st.lists(st.integers(0, n_slots - 1), max_size=n_slots - 1))] = True
        n = data.draw(st.integers(0, int((~busy).sum())))
        victims = window.victims(n, busy)
        assert len(set(victims.tolist())) == len(victims) == n
        assert not busy[victims].any()
        spared = [s for s in range(n_slots) if not busy[s] and s not in victims]
        for victim in victims.tolist():
            for other in spared:
                assert slow.is_recent(victim) <= slow.is_recent(other), "the window went first"
                if slow.is_recent(victim) == slow.is_recent(other):
                    assert slow.score(victim) <= slow.score(other) * 1.001 + 1e-12
        window.forget(victims)
        for victim in victims.tolist():
            slow.uses[victim] = []


def test_every_slot_when_all_are_asked_for() -> None:
    assert sorted(Window(4).victims(4, np.zeros(4, bool)).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("clock", [0, 1 << 20, 1 << 33])
def test_frequent_use_outweighs_one_recent_use_beyond_the_window(clock: int) -> None:
    window, busy = Window(3, n_tokens=2, half_life=32), np.zeros(3, bool)
    window.tick(clock)
    for _ in range(10):
        window.tick()
        window.use(np.array([0]))
    window.tick()
    window.use(np.array([1]))
    window.tick(5)
    assert window.victims(2, busy).tolist() in ([1, 2], [2, 1])
    window.tick(10_000)  # long unused, and still in order
    assert window.victims(2, busy).tolist() in ([1, 2], [2, 1])


def test_a_forgotten_slot_goes_first() -> None:
    window = Window(3)
    window.tick()
    window.use(np.array([0, 1, 2]))
    window.forget(np.array([1]))
    assert window.victims(1, np.zeros(3, bool)).tolist() == [1]
