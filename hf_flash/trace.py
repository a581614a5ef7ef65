"""Spans of time, noted where they happen and kept for whoever asked: the ground under `profile.py`.

Off, which is the rule, `active` is None and a place that could be timed costs one test:

    if trace.active is not None:
        trace.active.add("gate", start, time.perf_counter(), layer.path)

On, a span is one append to a list. Spans of a thread nest as their calls do, so the time that a span did not hand on to
others inside it is its own. Reads are different: they run beside the threads, so they get tracks of their own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

FLASH = 0  # the track of reads; threads have their idents, which are not 0

# What spans are called. Whoever times a new thing may use a new name: it gets a row of its own in the table.
FORWARD, LAYER, ATTENTION, NORM, EMBEDDING, HEAD = "forward", "layer", "attention", "norm", "embedding", "head"
STEP, NATIVE, BALANCE = "layer step", "layer in native code", "balancing the cache"
FFN, GATE, GATE_SCAN, EARLY, ARITHMETIC = "ffn", "gate", "gate scan", "early gate", "arithmetic"
WAIT, SUBMIT, READ, STREAM = "wait for flash", "submit reads", "read", "stream"


_KINDS = (WAIT, SUBMIT, READ, ARITHMETIC, STREAM)  # of native code's events, by number
_LOG_EVENTS = 1 << 14


class Span(NamedTuple):
    """Something that took time: name, start and stop on time.perf_counter's clock in seconds, where, and details."""

    name: str
    start: float
    stop: float
    layer: str
    track: int
    args: dict[str, Any]


class Recorder:
    """Keeps spans. Safe from any thread.

    Attributes:
        sources: give the spans that others kept since they were asked last.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._new: deque[tuple[Any, ...]] = deque()  # fields of spans: to make one takes time, which is being measured
        self.sources: list[Callable[[], list[Span]]] = []

    @property
    def spans(self) -> list[Span]:
        """What was noted so far."""
        while self._new:
            first, *rest = self._new.popleft()
            self._spans += first(*rest) if callable(first) else [Span(first, *rest)]
        for source in self.sources:
            self._spans += source()
        return self._spans

    def add(self, name: str, start: float, stop: float, layer: str = "", **args: Any) -> None:
        """Note a span of the calling thread.

        Args:
            name: what was done.
            start, stop: time.perf_counter() before and after, seconds.
            layer: module path of the FFN or layer that it was done for.
            args: details for the trace file, ready for JSON.
        """
        self._new.append((name, start, stop, layer, threading.get_ident(), args))

    def add_later(self, spans: Callable[..., list[Span]], *args: Any) -> None:
        """Note what `spans(track, *args)` will say once somebody asks: where to make spans would take too long.

        Args:
            spans: gives spans of a track, the calling thread's, and perhaps reads.
        """
        self._new.append((spans, threading.get_ident(), *args))

    def add_read(self, start: float, stop: float, n_bytes: int) -> None:
        """Note reads that were under way from their submission until they had landed.

        Where the kernel reads on its own (io_uring) they end when it was first seen that they had landed.
        """
        self._new.append((READ, start, stop, "", FLASH, {"bytes": n_bytes}))

    def to_chrome(self) -> dict[str, Any]:
        """The spans as Chrome's trace event JSON, which ui.perfetto.dev and chrome://tracing open.

        Returns:
            {"traceEvents": [...]}: one "X" event per span, `ts` and `dur` in microseconds; reads in lanes of their own,
            as many as were under way at a time.
        """
        spans = sorted(self.spans, key=lambda span: (span.start, -span.stop))
        origin = spans[0].start if spans else 0.0
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lanes: list[float] = []  # when each lane's last read landed
        tids: dict[tuple[int, int], int] = {}  # (track, lane) -> tid
        events: list[dict[str, Any]] = []
        for span in spans:
            lane = _lane(lanes, span) if span.track == FLASH else 0
            tid = tids.setdefault((span.track, lane), len(tids) + 1)
            args = {**({"layer": span.layer} if span.layer else {}), **span.args}
            events.append(
                {"name": span.name, "cat": "flash" if span.track == FLASH else "cpu", "ph": "X", "pid": os.getpid(),
                 "tid": tid, "ts": (span.start - origin) * 1e6, "dur": (span.stop - span.start) * 1e6, "args": args}
            )  # fmt: skip
        labels = {
            tid: f"flash {lane + 1}" if track == FLASH else names.get(track, f"thread {tid}")
            for (track, lane), tid in tids.items()
        }
        head = [_meta("process_name", 0, "hf_flash"), *(_meta("thread_name", *item) for item in labels.items())]
        return {"traceEvents": head + events, "displayTimeUnit": "ms"}


class Event(ctypes.Structure):
    """What native code notes; the fields of _native/stream.cpp, in its order."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("kind", "unit", "bytes")], ("thread", ctypes.c_uint64),
        *[(name, ctypes.c_double) for name in ("start", "stop")],
    ]  # fmt: skip


class _Log(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), ("most", ctypes.c_int64), ("events", Event * _LOG_EVENTS)]


class NativeLog:
    """Where native code notes events, which become spans when somebody asks.

    Args:
        names: of the units that events are about, by number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._log, self._names = _Log(most=_LOG_EVENTS), names
        self.address = ctypes.addressof(self._log)
        self._taken, self._kept = 0, b""  # events of the log that were handed over, others of a log before this one
        self._lock = threading.Lock()

    def make_room(self) -> None:
        """Called before native code, by its caller: more events than are left free here would be lost."""
        if self._log.n > _LOG_EVENTS // 2:
            with self._lock:
                self._kept += self._rest()
                self._taken = self._log.n = 0

    def take(self) -> list[Span]:
        """What was noted since this was called last."""
        with self._lock:
            rest = self._rest()
            data, self._kept = self._kept + rest, b""
            self._taken += len(rest) // ctypes.sizeof(Event)
        events = (Event * (len(data) // ctypes.sizeof(Event))).from_buffer_copy(data)
        return [self._span(event) for event in events]

    def _rest(self) -> bytes:
        first, size = ctypes.addressof(self._log.events), ctypes.sizeof(Event)
        return ctypes.string_at(first + self._taken * size, (self._log.n - self._taken) * size)

    def _span(self, event: Event) -> Span:
        name = _KINDS[event.kind]
        layer, track = ("", FLASH) if name == READ else (self._names[event.unit], event.thread)
        args = {"bytes": event.bytes} if event.bytes else {"native": True}
        return Span(name, event.start, event.stop, layer, track, args)


def _lane(lanes: list[float], span: Span) -> int:
    """The first lane that is free when a read starts: events of one track must nest, and reads overlap."""
    for lane, free in enumerate(lanes):
        if free <= span.start:
            lanes[lane] = span.stop
            return lane
    lanes.append(span.stop)
    return len(lanes) - 1


def _meta(what: str, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": os.getpid(), "tid": tid, "args": {"name": name}}


active: Recorder | None = None
"""Who is told, if anyone."""
