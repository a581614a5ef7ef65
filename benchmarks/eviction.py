"""How many bytes does a token read with each way of choosing who stays in DRAM, next to the offline optimum?

A text is recorded once: which neurons of each layer fire at each token. Every policy then decides about the same
tokens with the same slots: a token's neurons must be in DRAM together, the missing ones are read, others give way. The
ceiling knows the future (Belady: who is wanted last goes first), with as many slots for every layer, and with one pool
of slots for all. `hf_flash` is simulated with the package's own modules (window.py, balance.py). The paper's window of
k tokens has no budget: it is given for each k, with the slots that it takes.

The model is the small ReLU model that ships with hf_flash; --model and --text give others. The last quarter of the
recording is for calibration (what is pinned) and not simulated; the first tokens warm the caches and are not counted.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import recorded
from recorded import Trace

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
WINDOWS = (1, 2, 3, 5, 8, 12, 20, 32)
HALF_LIFE = 64.0  # window.py's
HALF_LIVES = (8, 16, 32, 64, 128, 256)
PERIODS = (8, 32, 64, 256)


class Recent:
    """LRU: what was not used for longest goes first."""

    def __init__(self, n: int) -> None:
        self._last, self._clock = np.full(n, -1.0), 0

    def use(self, neurons: np.ndarray) -> None:
        self._clock += 1
        self._last[neurons] = self._clock

    def worth(self) -> np.ndarray:
        return self._last

    def evicted(self, neurons: np.ndarray) -> None:
        pass


class Frequent(Recent):
    """LFU with counts that halve every `half_life` tokens (never: LFU proper).

    Args:
        n: neurons.
        half_life: tokens.
        remembers: whether an evicted neuron keeps its count.
        window: tokens whose neurons go last.
    """

    def __init__(self, n: int, half_life: float = np.inf, remembers: bool = False, window: int = 0) -> None:
        super().__init__(n)
        self._count, self._growth, self._unit = np.zeros(n), 2 ** (1 / half_life), 1.0
        self._remembers, self._window = remembers, window

    def use(self, neurons: np.ndarray) -> None:
        super().use(neurons)
        self._unit *= self._growth  # what a use counts today, so that old ones need not be touched
        if self._unit > 1e100:
            self._count, self._unit = self._count / self._unit, 1.0
        self._count[neurons] += self._unit

    def worth(self) -> np.ndarray:
        recent = self._last > max(0, self._clock - self._window) if self._window else False
        return np.where(recent, self._count + 1e200, self._count)

    def evicted(self, neurons: np.ndarray) -> None:
        if not self._remembers:
            self._count[neurons] = 0


class Pinned(Recent):
    """The hottest neurons of the calibration stay for good; the others are LRU."""

    def __init__(self, n: int, hottest: np.ndarray) -> None:
        super().__init__(n)
        self._pinned = hottest

    def worth(self) -> np.ndarray:
        out = self._last.copy()
        out[self._pinned] = np.inf
        return out


class Optimum(Recent):
    """Belady: what is wanted last goes first. Knows the trace."""

    def __init__(self, n: int, trace: Trace) -> None:
        super().__init__(n)
        self._next, after = np.full(n, np.inf), np.full(n, np.inf)
        self._following = []
        for t in range(len(trace) - 1, -1, -1):
            self._following.append(after[trace[t]])
            after[trace[t]] = t

    def use(self, neurons: np.ndarray) -> None:
        self._next[neurons] = self._following.pop()

    def worth(self) -> np.ndarray:
        return -self._next


class Cache:
    """Which neurons of a layer are in DRAM."""

    def __init__(self, n: int, n_slots: int, policy: Any) -> None:
        self.n_slots, self.policy, self.held = n_slots, policy, np.zeros(n, bool)

    def token(self, neurons: np.ndarray) -> int:
        """A token wants these; returns how many had to be read."""
        missing = neurons[~self.held[neurons]]
        self.policy.use(neurons)
        if len(neurons) > self.n_slots:  # they pass by in batches: who was there stays, others fill the room
            self.held[:] = False
            stay = np.concatenate([np.setdiff1d(neurons, missing), missing])[: self.n_slots]
            if isinstance(self.policy, Optimum):
                stay = neurons[np.argsort(-self.policy.worth()[neurons])[: self.n_slots]]
            self.held[stay] = True
            return len(missing)
        self.held[missing] = True
        self.shrink(neurons)
        return len(missing)

    def shrink(self, busy: Sequence[int] | np.ndarray = ()) -> None:
        """Evict down to the slots."""
        over = int(self.held.sum()) - self.n_slots
        if over > 0:
            idle = self.held.copy()
            idle[list(busy)] = False
            idle = np.flatnonzero(idle)
            victims = idle[np.argpartition(self.policy.worth()[idle], over - 1)[:over]]
            self.held[victims] = False
            self.policy.evicted(victims)


def alone(trace: Trace, n: int, n_slots: int, policy: Any, warm: int) -> float:
    """Neurons read per token by a layer with slots of its own."""
    cache = Cache(n, n_slots, policy)
    return float(np.mean([cache.token(neurons) for neurons in trace][warm:]))


def balanced(
    traces: Sequence[Trace], sizes: Sequence[int], n_slots: Sequence[int], warm: int, half_life: float = HALF_LIFE,
    every: int | None = None,
    missed: list[list[np.ndarray]] | None = None,
) -> float:  # fmt: skip
    """Neurons read per token by all layers, with hf_flash's own account of use and division of slots.

    What each token reads, layer by layer, is appended to `missed`, once the caches are warm.
    """
    from hf_flash.balance import EVERY_PASSES, FIRST_PASSES, divide
    from hf_flash.window import Window

    class Account(Window):
        def use(self, neurons: np.ndarray) -> None:
            self.tick()
            super().use(neurons)

        def evicted(self, neurons: np.ndarray) -> None:
            pass

    every = every or EVERY_PASSES
    caches = [Cache(n, k, Account(n, half_life=half_life)) for n, k in zip(sizes, n_slots, strict=True)]
    largest, read, at = np.zeros(len(sizes), int), [], FIRST_PASSES
    for t in range(len(traces[0])):
        if t + 1 == at:
            at += min(at, every)
            total, least = sum(c.n_slots for c in caches), np.array([max(1, n // 50) for n in sizes])
            least = np.minimum(least, [c.n_slots for c in caches])
            needed = np.maximum(least, largest)
            least = needed if needed.sum() <= total else least
            for cache, k in zip(caches, divide([c.policy.worth() for c in caches], least, total), strict=True):
                cache.n_slots = int(k)
                cache.shrink()
            largest = largest * 7 // 8
        if missed is not None and t >= warm:
            missed.append([trace[t][~cache.held[trace[t]]] for cache, trace in zip(caches, traces, strict=True)])
        read.append(sum(cache.token(trace[t]) for cache, trace in zip(caches, traces, strict=True)))
        largest = np.maximum(largest, [len(trace[t]) for trace in traces])
    return float(np.mean(read[warm:]))


def paper_window(traces: Sequence[Trace], sizes: Sequence[int], k: int, warm: int) -> dict[str, float]:
    """The neurons of the last k tokens are in DRAM and no others: read per token, slots at most and on average."""
    read, held = 0, np.zeros(len(traces[0]))
    for trace, n in zip(traces, sizes, strict=True):
        last = np.full(n, -(k + 1))
        for t, neurons in enumerate(trace):
            read += int((last[neurons] < t - k).sum()) * (t >= warm)
            last[neurons] = t
            held[t] += int((last > t - k).sum())
    return {"k": k, "read": read / (len(traces[0]) - warm), "most": float(held.max()), "mean": float(held.mean())}


POLICIES: dict[str, Callable[[int, int, np.ndarray], Any]] = {  # of n neurons, n_slots, order by calibration
    "LRU": lambda n, k, hot: Recent(n),
    "LFU": lambda n, k, hot: Frequent(n),
    "LFU, evicted ones remembered": lambda n, k, hot: Frequent(n, remembers=True),
    "LFU aged": lambda n, k, hot: Frequent(n, 32),
    "window of 5, then LFU aged (before)": lambda n, k, hot: Frequent(n, 32, window=5),
    "hottest quarter pinned, LRU": lambda n, k, hot: Pinned(n, hot[: k // 4]),
    "hottest half pinned, LRU": lambda n, k, hot: Pinned(n, hot[: k // 2]),
    "LFU aged, evicted ones remembered": lambda n, k, hot: Frequent(n, 32, remembers=True),
}
OURS, CEILING, CEILING_EACH = (
    "hf_flash: that, a soft window, slots by layer",
    "optimum, one pool",
    "optimum, each layer alone",
)
LRU_POOL = "LRU, one pool"


def one_pool(traces: Sequence[Trace], sizes: Sequence[int]) -> Trace:
    """All layers as one of as many neurons. (A pass computes one layer after the other; this asks for all at once.)"""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [np.concatenate([t + s for t, s in zip(token, starts, strict=True)]) for token in zip(*traces, strict=True)]


def compare(traces: Sequence[Trace], sizes: Sequence[int], hot: Sequence[np.ndarray], args: Any) -> dict[str, Any]:
    """Neurons read per token: policy -> one figure a share."""
    pool, warm, n_all = one_pool(traces, sizes), args.warm, sum(sizes)
    found: dict[str, list[float]] = {name: [] for name in (CEILING, CEILING_EACH, OURS, LRU_POOL, *POLICIES)}
    for share in args.shares:
        n_slots = [max(1, int(n * share)) for n in sizes]
        found[CEILING].append(alone(pool, n_all, sum(n_slots), Optimum(n_all, pool), warm))
        found[LRU_POOL].append(alone(pool, n_all, sum(n_slots), Recent(n_all), warm))
        found[OURS].append(balanced(traces, sizes, n_slots, warm))
        layers = list(zip(traces, sizes, n_slots, hot, strict=True))
        found[CEILING_EACH].append(sum(alone(t, n, k, Optimum(n, t), warm) for t, n, k, _ in layers))
        for name, make in POLICIES.items():
            found[name].append(sum(alone(t, n, k, make(n, k, h), warm) for t, n, k, h in layers))
        print(f"  {share:.0%} of the neurons: {found[OURS][-1]:.1f} read per token", flush=True)
    middle = [int(n * args.middle) for n in sizes]
    return {
        "read": found,
        "windows": [paper_window(traces, sizes, k, warm) for k in args.windows],
        "half_lives": {h: balanced(traces, sizes, middle, warm, h) for h in args.half_lives},
        "periods": {p: balanced(traces, sizes, middle, warm, every=p) for p in args.periods},
        "fire": float(np.mean([len(neurons) for neurons in pool[warm:]])),
        "fire_by_layer": [float(np.mean([len(i) for i in t[warm:]])) / n for t, n in zip(traces, sizes, strict=True)],
    }


def rank(recording: Any, start: int) -> list[np.ndarray]:
    """Neurons by layer, those that fire most often after `start` first."""
    return [np.argsort(-recording.fired(layer, start).sum(0).numpy(), kind="stable") for layer in recording.layers]


def print_found(found: dict[str, Any], row_bytes: int, args: Any) -> None:
    """Kilobytes per token by policy and share."""

    def line(name: str) -> list[str]:
        return [name, *(f"{n * row_bytes / 1e3:.1f}" for n in found["read"][name])]

    rows = [
        ["KB read per token, cache of", *(f"{share:.0%}" for share in args.shares)],
        line(CEILING),
        line(CEILING_EACH),
    ]
    print(common.table([*rows, *map(line, (OURS, LRU_POOL, *POLICIES))]))
    for w in found["windows"]:
        most, mean = w["most"] / found["n_neurons"], w["mean"] / found["n_neurons"]
        kb = w["read"] * row_bytes / 1e3
        print(
            f"the paper's window, k={w['k']}: {kb:.1f} KB in {most:.0%} of the neurons at most, {mean:.0%} on average"
        )
    for name in ("half_lives", "periods"):
        cells = ", ".join(f"{k}: {n * row_bytes / 1e3:.1f}" for k, n in found[name].items())
        print(f"hf_flash at {args.middle:.0%}, KB by {name.replace('_', ' ')} in tokens: {cells}")


def parse() -> argparse.Namespace:
    args = recorded.parse(__doc__, warm=512)
    args.shares, args.windows, args.half_lives, args.periods, args.middle = SHARES, WINDOWS, HALF_LIVES, PERIODS, 0.5
    if args.smoke:
        args.tokens, args.warm = 96, 16
        args.shares, args.windows, args.half_lives, args.periods = (0.2, 0.5), (1, 5), (32,), (64,)
    return args


def main() -> None:
    args = parse()
    info = common.begin("eviction: bytes read per token by policy and cache size")
    with recorded.recording(args) as made:
        if made is None:
            return
        recording, row_bytes = made
        n_tokens = recording.n_tokens * 3 // 4
        sizes = [recording.shape(layer)[1] for layer in recording.layers]
        traces, hot = recorded.traces_of(recording, 0, n_tokens), rank(recording, n_tokens)
    found = {"n_neurons": sum(sizes), "row_bytes": row_bytes, "n_tokens": n_tokens - args.warm}
    found |= compare(traces, sizes, hot, args)
    fire = ", ".join(f"{share:.1%}" for share in found["fire_by_layer"])
    print(
        f"model: {Path(args.model).name}, {len(sizes)} layers, {sum(sizes)} neurons of {row_bytes} bytes; {n_tokens} "
        f"tokens, {found['fire'] * row_bytes / 1e3:.1f} KB fire per token (by layer {fire})"
    )
    print_found(found, row_bytes, args)
    read = found["read"]
    right = all(c <= x + 1e-9 for name in POLICIES for c, x in zip(read[CEILING_EACH], read[name], strict=True))
    right = right and all(c <= x + 1e-9 for c, x in zip(read[CEILING], read[OURS], strict=True))
    head = {"benchmark": "eviction", "model": Path(args.model).name, "shares": args.shares, "middle": args.middle}
    common.finish({**head, **found, "right": right, "machine": info}, args.json)
    if not right:
        raise SystemExit("eviction: a policy read less than the optimum, so the simulation is wrong")


if __name__ == "__main__":
    main()
