"""Who is given up: the least used of late; never one of the window while there is another. Eviction forgets nothing."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from hf_flash.window import Window

STEPS = st.lists(st.tuples(st.integers(0, 7), st.frozensets(st.integers(0, 11), max_size=12)), min_size=1, max_size=40)


class SlowWindow:
    """The same account kept as plainly as can be: a list of clocks at which each neuron was used."""

    def __init__(self, n_neurons: int, k: int, half_life: float) -> None:
        self.uses: list[list[int]] = [[] for _ in range(n_neurons)]
        self.k, self.half_life, self.clock = k, half_life, 0

    def score(self, neuron: int) -> float:
        return sum(2.0 ** (-(self.clock - clock) / self.half_life) for clock in self.uses[neuron])

    def worth(self, neuron: int) -> float:
        """Up to four times the score, for some tokens after a use."""
        age = self.clock - self.uses[neuron][-1] if self.uses[neuron] else 99
        return self.score(neuron) * 2.0 ** (2 * 2.0 ** (-age / 4) if age < 31 else 0)

    def is_recent(self, neuron: int) -> bool:
        return bool(self.uses[neuron]) and self.clock - self.uses[neuron][-1] < self.k


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(1, 12), st.integers(0, 9), st.sampled_from([1.0, 4.0, 32.0]), st.data())
def test_the_least_are_those_of_a_slow_reference(
    steps: list[tuple[int, frozenset[int]]], n_neurons: int, k: int, half_life: float, data: st.DataObject
) -> None:
    window, slow = Window(n_neurons, k, half_life), SlowWindow(n_neurons, k, half_life)
    for n_tokens, wanted in steps:
        neurons = sorted(i for i in wanted if i < n_neurons)
        window.tick(n_tokens)
        slow.clock += max(1, n_tokens)
        window.use(np.array(neurons, np.int64))
        for neuron in neurons:
            slow.uses[neuron].append(slow.clock)
        some = np.array(data.draw(st.permutations(range(n_neurons)))[: data.draw(st.integers(0, n_neurons))], np.int64)
        n = data.draw(st.integers(0, len(some)))
        positions = window.least(n, some)
        assert len(set(positions.tolist())) == len(positions) == n
        spared = np.delete(some, positions).tolist()
        for victim in some[positions].tolist():
            for other in spared:
                assert slow.is_recent(victim) <= slow.is_recent(other), "the window went first"
                if slow.is_recent(victim) == slow.is_recent(other):
                    assert slow.worth(victim) <= slow.worth(other) * 1.001 + 1e-12
        for neuron, worth in enumerate(window.worth().tolist()):
            assert 2.0**worth == pytest.approx(slow.worth(neuron), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("clock", [0, 1 << 20, 1 << 33])
def test_frequent_use_outweighs_one_recent_use_beyond_the_window(clock: int) -> None:
    window, three = Window(3, n_tokens=2, half_life=32), np.arange(3)
    window.tick(clock)
    for _ in range(10):
        window.tick()
        window.use(np.array([0]))
    window.tick()
    window.use(np.array([1]))
    assert window.least(1, np.arange(2)).tolist() == [1], "both are in the window"
    window.tick(5)
    assert sorted(window.least(2, three).tolist()) == [1, 2]
    window.tick(10_000)  # long unused, and still in order
    assert sorted(window.least(2, three).tolist()) == [1, 2]


def test_what_was_never_used_goes_first() -> None:
    window = Window(3)
    window.tick()
    window.use(np.array([0, 2]))
    assert window.least(1, np.array([2, 1, 0])).tolist() == [1]


def test_a_window_that_was_told_begins_as_if_it_had_watched() -> None:
    """What fires at every second token, and at every eighth, is worth what long watching would have made it worth."""
    told = Window(3, half_life=32, use=np.array([0.5, 0.125, 0.0], np.float32))
    watched = Window(3, half_life=32)
    for token in range(2000):
        watched.tick()
        if token % 2 == 0:
            watched.use(np.array([0]))
        if token % 8 == 0:
            watched.use(np.array([1]))
    watched.tick(40)  # the soft window is over
    faded = watched.worth() + 40 / 32
    assert np.abs(told.worth() - faded)[:2].max() < 0.2
    assert told.worth()[2] == watched.worth()[2] == -1e300  # nothing is known
    assert list(told.least(2, np.arange(3))) in ([2, 1], [1, 2])
