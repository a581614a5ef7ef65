"""benchmarks/eviction.py simulates what the package does, and its optimum is one."""

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers_flash import write_layers
from test_balance import LAYOUT, ROWS, N, engines

from hf_flash.balance import Balance

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def eviction(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("eviction")
    for name in {file.stem for file in BENCHMARKS.glob("*.py")} & set(sys.modules):
        sys.modules.pop(name, None)


def draw(n: int, n_tokens: int, most: int, seed: int) -> list[np.ndarray]:
    """Neurons by token: some often, some seldom."""
    random = np.random.default_rng(seed)
    often = random.dirichlet(np.full(n, 0.3)) + 1e-6
    wanted = (
        random.choice(n, random.integers(0, most + 1), replace=False, p=often / often.sum()) for _ in range(n_tokens)
    )
    return [np.sort(neurons) for neurons in wanted]


def least(trace: list[np.ndarray], n_slots: int) -> int:
    """The fewest reads that any choice of evictions could come to, by trying all."""
    best = {frozenset(): 0}
    for neurons in trace:
        wanted, after = frozenset(neurons.tolist()), {}
        for held, read in best.items():
            read += len(wanted - held)
            for kept in itertools.combinations(held - wanted, min(len(held - wanted), n_slots - len(wanted))):
                now = wanted | frozenset(kept)
                after[now] = min(after.get(now, read), read)
        best = after
    return min(best.values())


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_the_least_of_all_ways(eviction: ModuleType, seed: int) -> None:
    trace, n_slots = draw(8, 14, 3, seed), 3 + seed % 3
    read = eviction.alone(trace, 8, n_slots, eviction.Optimum(8, trace), 0) * len(trace)
    assert round(read) == least(trace, n_slots)
    for policy in (eviction.Recent(8), *(make(8, n_slots, np.arange(8)) for make in eviction.POLICIES.values())):
        assert eviction.alone(trace, 8, n_slots, policy, 0) * len(trace) >= read - 1e-9


def test_lru_by_stack_distance(eviction: ModuleType) -> None:
    """One neuron a token: a hit is one that was used among the last n_slots different ones."""
    trace, used, misses = draw(20, 300, 1, 5), [], 0
    for neurons in trace:
        for neuron in neurons.tolist():
            recent = list(dict.fromkeys(reversed(used)))[:6]
            misses += neuron not in recent
            used.append(neuron)
    assert eviction.alone(trace, 20, 6, eviction.Recent(20), 0) * len(trace) == pytest.approx(misses)


def test_ours_is_what_the_package_does(eviction: ModuleType, tmp_path: Path) -> None:
    files = write_layers(tmp_path, {name: (LAYOUT, rows) for name, rows in ROWS.items()})
    n_slots, traces = [12, 12, 12], [draw(N, 150, most, seed) for seed, most in enumerate((10, 4, 2))]
    some = engines(files, n_slots)
    balance, stats = Balance(some, n_slots), some[0]._stats
    missed: list[list[np.ndarray]] = []
    simulated = eviction.balanced(traces, [N] * 3, n_slots, 20, missed=missed)
    for t in range(150):
        balance.pass_begins()
        before = stats.neurons_read
        for engine, trace in zip(some, traces, strict=True):
            engine.cache.window.tick()
            engine.cache.largest = max(engine.cache.largest, len(trace[t]))
            assert engine.cache.fits(trace[t])
            engine.cache.fetch(trace[t])
        if t >= 20:
            assert stats.neurons_read - before == sum(map(len, missed[t - 20])), t
    assert simulated == pytest.approx(np.mean([sum(map(len, token)) for token in missed]))


def test_the_papers_window(eviction: ModuleType) -> None:
    trace = [np.array([0, 1]), np.array([1, 2]), np.array([3]), np.array([0, 1])]
    assert eviction.paper_window([trace], [4], 2, 0) == {"k": 2, "read": 5 / 4, "most": 3.0, "mean": 11 / 4}
