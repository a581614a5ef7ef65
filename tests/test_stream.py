"""The ring hands out the right rows whatever is asked of it, and in a steady order reads each chunk once a pass."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers_flash import FakeReader, random_bytes
from hypothesis import example, given, settings

from hf_flash.errors import ReadError
from hf_flash.layout import DATA_ALIGN
from hf_flash.memory import round_up
from hf_flash.readers import Read, Reader, ThreadReader, UringReader
from hf_flash.stats import FlashStats
from hf_flash.store import Extent2D
from hf_flash.stream import Stream

SIZE = 300_000
NOISE = random_bytes((SIZE,), seed=3)
UNITS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 2500), st.integers(0, 9000)), min_size=1, max_size=5)
SIZES = {"chunk_bytes": st.integers(1, 9000), "n_buffers": st.integers(1, 5)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "noise"
    path.write_bytes(NOISE.numpy().tobytes())
    return path


class Ring:
    """A stream over units of a file of noise: n_rows, row_bytes and bytes left out before each."""

    def __init__(
        self, file: Path, units: list[tuple[int, int, int]], chunk_bytes: int, n_buffers: int, reader: Reader,
        helped: bool = True,
    ) -> None:  # fmt: skip
        self.reader, self.stats = reader, FlashStats()
        self.stream = Stream(reader, chunk_bytes, n_buffers, self.stats, helped=helped)
        handle, at, self.units = reader.open(file), 0, []
        for number, (n_rows, row_bytes, gap) in enumerate(units):
            at = (at + gap) % (SIZE - n_rows * row_bytes)
            self.units.append(Extent2D(f"unit{number}", handle, at, n_rows, row_bytes))
            assert self.stream.add(self.units[-1]) == number
            at += n_rows * row_bytes

    def rows(self, unit: int, start: int, stop: int) -> torch.Tensor:
        u = self.units[unit]
        return NOISE[u.start + start * u.row_bytes : u.start + stop * u.row_bytes].view(-1, u.row_bytes)

    def use(self, unit: int, n_chunks: int = 1 << 30, first: int = 0) -> None:
        """Take chunks of a unit and compare each with the file; stop after n_chunks."""
        at, step = first, self.stream.chunk_rows(unit)
        with self.stream.unit(unit) as chunks:
            for number, (start, stop, rows) in enumerate(chunks):
                if number == n_chunks:
                    return
                assert (start, stop) == (at, min(at + step, self.units[unit].n_rows))
                assert torch.equal(rows, self.rows(unit, start, stop)), f"wrong rows {start}:{stop} of unit {unit}"
                at = stop
        assert at == self.units[unit].n_rows

    def chunks(self, unit: int, first: int = 0) -> dict[tuple[int, int], int]:
        """(offset, length) of the reads that a unit takes -> how often in one pass."""
        u, step = self.units[unit], self.stream.chunk_rows(unit)
        reads: Counter[tuple[int, int]] = Counter()
        for start in range(first, u.n_rows, step):
            begin, end = u.start + start * u.row_bytes, u.start + min(start + step, u.n_rows) * u.row_bytes
            aligned = begin // DATA_ALIGN * DATA_ALIGN
            reads[aligned, round_up(end - aligned, DATA_ALIGN)] += 1
        return reads

    def ahead(self) -> Counter[tuple[int, int]]:
        """(offset, length) of the reads under way, or landed and not yet taken; of a stream without a native ring."""
        found: Counter[tuple[int, int]] = Counter()
        for pending in self.stream._pending:
            unit, number = pending.chunk
            one = self.chunks(unit, number * self.stream.chunk_rows(unit))
            found[next(iter(one))] += 1  # a Counter keeps the order in which its keys came
        return found

    def is_whole(self) -> bool:
        """No buffer got lost or was made twice."""
        if self.stream._ring is not None:
            with self.stream._ring.still():  # what is looked at must not change meanwhile
                return self._ring_is_whole()
        used = [*self.stream._pending, *self.stream._kept.values()]
        buffers = [*(buffer for _, buffer in self.stream._free), *(one.buffer for one in used)]
        n = self.stream._n_buffers + self.stream.n_lent
        return len({b.data_ptr() for b in buffers}) == len(buffers) == n

    def has_memory(self) -> bool:
        """Whether the ring's memory is taken."""
        stream = self.stream
        return stream._ring is not None or bool(stream._free or stream._pending or stream._kept)

    def _ring_is_whole(self) -> bool:
        ring = self.stream._ring
        assert ring is not None
        slots, n, line = ring._slots, ring._s.n_slots, ring._line[: ring._s.n_line]
        stays = [slot for unit in ring._stays for slot in unit if slot >= 0]
        return (
            n == self.stream._n_buffers + self.stream.n_lent
            and sorted(line) == [i for i, slot in enumerate(slots) if slot.batch and not slot.taken]
            and sorted(stays) == [i for i, slot in enumerate(slots) if slot.kept]
            and max([*line, *stays], default=0) < n
        )


@settings(max_examples=150, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.booleans(), st.data())
def test_any_order_of_units_whole_or_abandoned(
    file: Path, units: list[tuple[int, int, int]], sizes: dict[str, int], late: bool, data: st.DataObject
) -> None:
    ring = Ring(file, units, reader=FakeReader(late, strict=True), **sizes)
    assert not ring.stream._free, "memory is taken when the first chunk is asked for"
    asked = st.tuples(st.integers(0, len(units) - 1), st.sampled_from([1 << 30, 1 << 30, 0, 1, 2, 5]))
    for unit, n_chunks in data.draw(st.lists(asked, min_size=1, max_size=15)):
        ring.use(unit, n_chunks)
        assert ring.is_whole() or not ring.reader.log
    assert ring.stats.bytes_read == sum(length for _, _, length in ring.reader.log)
    assert ring.stats.n_reads == len(ring.reader.log)
    assert (
        ring.stream.ring_bytes
        == sum(b.numel() for _, b in ring.stream._free) + sum(p.buffer.numel() for p in ring.stream._pending)
        or not ring.reader.log
    )


@settings(max_examples=100, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.data())
def test_a_steady_order_reads_each_chunk_once_a_pass(
    file: Path, units: list[tuple[int, int, int]], sizes: dict[str, int], data: st.DataObject
) -> None:
    """Decoders repeat their layers; whatever the order is, it is known after two passes."""
    ring = Ring(file, units, reader=FakeReader(), **sizes)
    order = data.draw(st.permutations(range(len(units))))
    for _ in range(2):
        for unit in order:
            ring.use(unit)
    ring.reader.log.clear()
    got, before, n_passes = ring.ahead(), ring.stats.bytes_read, 3
    for _ in range(n_passes):
        for unit in order:
            ring.use(unit)
    want = sum((Counter(ring.chunks(unit)) for unit in order), Counter())
    log = Counter((offset, length) for _, offset, length in ring.reader.log)
    assert got + log == Counter({chunk: n_passes * n for chunk, n in want.items()}) + ring.ahead(), "read in vain"
    assert ring.stats.bytes_read - before == sum(length * n for (_, length), n in log.items())


@settings(max_examples=100, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_what_is_lent_is_not_read_again(
    file: Path, units: list[tuple[int, int, int]], sizes: dict[str, int], lent: list[int]
) -> None:
    """As many chunks as there is memory for are read in the first pass after it was lent, and the others in each."""
    ring = Ring(file, units, reader=FakeReader(), **sizes)
    ring.stream.can_borrow(12 * ring.stream.buffer_bytes)
    order = range(len(units))
    n_chunks = sum(sum(ring.chunks(unit).values()) for unit in order)
    for n in lent:
        ring.stream.lend(n)
        assert ring.stream.n_lent == min(n, n_chunks)
        for _ in range(sizes["n_buffers"] + 2):  # what was under way for chunks that stay now is dropped one by one
            for unit in order:
                ring.use(unit)
        ahead, before, n_passes = len(ring.stream._pending), ring.stats.n_reads, 3
        for _ in range(n_passes):
            for unit in order:
                ring.use(unit)
        n_taken = ring.stats.n_reads - before + ahead - len(ring.stream._pending)
        assert n_taken == n_passes * (n_chunks - ring.stream.n_lent)
        assert ring.is_whole()
    ring.stream.release()
    assert not ring.stream._kept


@settings(max_examples=100, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.booleans(), st.data())
def test_pinned_rows_are_read_once_ever(
    file: Path, units: list[tuple[int, int, int]], sizes: dict[str, int], late: bool, data: st.DataObject
) -> None:
    """As an engine does it: announce, keep what the first pass brings, pin; nothing else is read twice for it."""
    ring = Ring(file, units, reader=FakeReader(late, strict=True), **sizes)
    stream, n_passes, pins = ring.stream, 4, []
    for unit, extent in enumerate(ring.units):
        whole, step = data.draw(st.booleans()), stream.chunk_rows(unit)
        pins.append(extent.n_rows if whole else data.draw(st.integers(0, extent.n_rows // step)) * step)
        stream.announce_pin(unit, pins[-1])
    for unit in range(len(units)):
        ring.use(unit)
        if pins[unit]:
            stream.pin_first(unit, pins[unit])
    streamed = [unit for unit, pin in enumerate(pins) if pin < ring.units[unit].n_rows]
    for _ in range(n_passes - 1):
        for unit in streamed:
            ring.use(unit, first=pins[unit])
    passes = Counter((offset, length) for _, offset, length in ring.reader.log)
    want = sum((Counter(ring.chunks(unit)) for unit in range(len(units))), Counter())
    for unit in streamed:
        for _ in range(n_passes - 1):
            want += Counter(ring.chunks(unit, pins[unit]))
    ahead = passes - want
    assert not want - passes
    assert sum(ahead.values()) == len(stream._pending) <= stream._n_buffers, f"read in vain: {ahead}"


@settings(max_examples=100, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.booleans(), st.sets(st.integers(0, 60), max_size=15), st.data())
def test_a_failed_read_is_raised_and_the_next_use_is_right(
    file: Path, units: list[tuple[int, int, int]], sizes: dict[str, int], late: bool, bad: set[int], data: st.DataObject
) -> None:
    numbers = iter(range(1 << 30))
    ring = Ring(file, units, reader=FakeReader(late, lambda read: next(numbers) in bad, strict=True), **sizes)
    n_raised = 0
    for unit in data.draw(st.lists(st.integers(0, len(units) - 1), min_size=3, max_size=12)):
        try:
            ring.use(unit)
        except ReadError as error:
            assert "injected" in str(error)
            n_raised += 1
    assert n_raised <= len(bad)
    bad.clear()
    for _ in range(sizes["n_buffers"] + 2):  # what was read ahead and failed is raised where it is used
        try:
            for unit in range(len(units)):
                ring.use(unit)
        except ReadError:
            continue
        break
    else:
        pytest.fail("a transient error never went away")
    assert ring.is_whole()


# The ring in native memory ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uring(file: Path):  # type: ignore[no-untyped-def]
    try:
        reader = UringReader()
    except OSError as error:
        pytest.skip(f"no io_uring: {error}")
    if reader.block_of(reader.open(file)) == 1:
        pytest.skip("no direct reads here")
    yield reader
    reader.close()


def under_way(stream: Stream) -> list[tuple[int, int]]:
    """(unit, first row) of what is being read, in order."""
    if stream._ring is None:
        return [(p.chunk[0], p.chunk[1] * stream.chunk_rows(p.chunk[0])) for p in stream._pending]
    s = stream._ring._s
    return [(slot.unit, slot.row) for slot in (stream._ring._slots[i] for i in stream._ring._line[: s.n_line])]


def walk(rings: list[Ring], steps: list[tuple[int, str]]) -> Iterator[None]:
    """Use rings alike, pinning and abandoning; stops after each step."""
    units = rings[0].units
    pins = [number % 3 * rings[0].stream.chunk_rows(number) for number in range(len(units))]
    pins = [min(pin, unit.n_rows) for pin, unit in zip(pins, units, strict=True)]
    for ring in rings:
        ring.stream.can_borrow(6 * ring.stream.buffer_bytes)
        for unit, pin in enumerate(pins):
            ring.stream.announce_pin(unit, pin)
    pinned = [0] * len(units)
    for unit, what in steps:
        unit %= len(units)
        for ring in rings:
            if what == "pin":
                ring.stream.pin_first(unit, pins[unit])
            elif what == "release":
                ring.stream.release()
            elif what.startswith("lend"):
                ring.stream.lend(unit + 2 * (what == "lend more"))
            else:
                ring.use(unit, {"use": 1 << 30, "some": 2, "none": 0}[what], pinned[unit])
        pinned[unit] = pins[unit] if what == "pin" else pinned[unit]
        yield


STEPS = st.tuples(
    st.integers(0, 4), st.sampled_from(["use", "use", "use", "some", "none", "pin", "release", "lend", "lend more"])
)


@settings(max_examples=150, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.lists(STEPS, min_size=1, max_size=20))
@example([(1, 1, 0)] * 2, {"chunk_bytes": 1, "n_buffers": 1}, [(0, "use"), (0, "release"), (1, "pin"), (1, "use")])
def test_the_native_ring_does_what_the_reference_does(
    file: Path, uring: UringReader, units: list[tuple[int, int, int]], sizes: dict[str, int],
    steps: list[tuple[int, str]],
) -> None:  # fmt: skip
    """Whatever is asked for, pinned and abandoned: the same rows, the same reads under way, the same counts."""
    rings = [Ring(file, units, reader=reader, helped=False, **sizes) for reader in (uring, FakeReader())]
    for _ in walk(rings, steps):
        ours, theirs = (under_way(ring.stream) for ring in rings)
        assert ours == theirs
        ours, theirs = ((ring.stats.bytes_read, ring.stats.n_reads) for ring in rings)
        assert ours == theirs
        assert rings[0].has_memory() == rings[1].has_memory() or not rings[1].reader.log
        assert all(ring.is_whole() for ring in rings if ring.has_memory())
        kept = rings[0].stream._ring._stays if rings[0].stream._ring else []
        ours = {(unit, i) for unit, stays in enumerate(kept) for i, slot in enumerate(stays) if slot >= 0}
        assert ours == set(rings[1].stream._kept)
    rings[0].stream.release()


@settings(max_examples=150, deadline=None)
@given(UNITS, st.fixed_dictionaries(SIZES), st.lists(STEPS, min_size=1, max_size=20))
def test_a_helped_ring_gives_the_right_rows(
    file: Path, uring: UringReader, units: list[tuple[int, int, int]], sizes: dict[str, int],
    steps: list[tuple[int, str]],
) -> None:  # fmt: skip
    """A thread that starts reads whenever it likes: `use` compares each row with the file, and no buffer gets lost."""
    ring = Ring(file, units, reader=uring, **sizes)
    for _ in walk([ring], steps):
        assert ring.is_whole() or not ring.has_memory()
    ring.stream.release()


def test_reads_are_started_while_the_caller_computes(file: Path, uring: UringReader) -> None:
    """Who holds a chunk calls nothing; yet the ring fills up, as far as there are buffers."""
    for helped, n_ahead in ((True, 7), (False, 4)):  # of eight buffers, with the last chunk of the first burst held
        ring = Ring(file, [(40, 4096, 0)], 4096, 8, uring, helped=helped)
        with ring.stream.unit(0) as chunks:
            for _ in range(4):
                next(chunks)
            until = time.monotonic() + (10 if helped else 0.3)
            while (n := len(under_way(ring.stream))) < n_ahead + (not helped) and time.monotonic() < until:
                time.sleep(0.01)
        assert n == n_ahead
        ring.use(0)
        ring.stream.release()


def ring_threads() -> int:
    """Threads of this process that belong to a ring. Others come and go: the kernel's for io_uring, other pools."""
    n = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            n += (thread / "comm").read_text().strip() == "hf_flash-ring"
    return n


def test_the_rings_thread_ends_with_its_reader(file: Path, uring: UringReader) -> None:
    before = ring_threads()
    for _ in range(3):
        reader = UringReader(n_threads=1)
        rings = [Ring(file, [(40, 4096, 0)], 4096, 8, reader) for _ in range(2)]
        for ring in rings:
            ring.use(0, n_chunks=2)
        rings[0].stream.release()
        rings[1].use(0)
        assert ring_threads() == before + 1
        reader.close()
        until = time.monotonic() + 10
        while ring_threads() > before and time.monotonic() < until:  # /proc shows one a little longer than it runs
            time.sleep(0.01)
        assert ring_threads() == before
        rings[1].stream.release()


def test_a_failed_read_of_the_native_ring(file: Path, uring: UringReader) -> None:
    """A unit that the file is too short for: an error each time it is asked for, and nothing lost."""
    ring = Ring(file, [(20, 1000, 0), (30, 4000, 100)], 2000, 3, uring)
    gone = ring.stream.add(Extent2D("gone", uring.open(file), SIZE - 5000, 20, 1000))
    for _ in range(3):
        ring.use(0)
        ring.use(1)
        with pytest.raises(ReadError, match="ended early"), ring.stream.unit(gone) as chunks:
            for _ in chunks:
                pass
    assert ring.stream._ring is not None and not any(slot.taken for slot in ring.stream._ring._slots)
    ring.use(1)
    ring.stream.release()


def test_the_native_ring_of_a_closed_reader(file: Path, uring: UringReader) -> None:
    reader = UringReader()
    ring = Ring(file, [(20, 1000, 0), (30, 4000, 100)], 2000, 3, reader)
    ring.use(0, n_chunks=2)
    assert under_way(ring.stream)
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        ring.use(1)
    ring.stream.release()


def test_a_lost_chunk_is_found_again(file: Path, uring: UringReader) -> None:
    """Ctrl-C between the native call and the generator's next line: nobody knows of the buffer that was handed out."""
    ring = Ring(file, [(20, 1000, 0)], 2000, 2, uring)
    ring.use(0)
    assert ring.stream._ring is not None
    for slot in ring.stream._ring._slots[:1]:
        ring.stream._ring.drop()
        slot.taken = 1
    ring.use(0)
    assert not any(slot.taken for slot in ring.stream._ring._slots)
    ring.stream.release()


# Ends and corners ---------------------------------------------------------------------------------------------------


def test_a_reader_that_takes_nothing_costs_no_buffer(file: Path) -> None:
    ring = Ring(file, [(20, 1000, 0)], 2000, 3, FakeReader())
    ring.use(0)
    for _ in range(5):
        ring.stream.release()
        ring.reader.closed = True
        with pytest.raises(ReadError, match="closed"):
            ring.use(0)
        ring.reader.closed = False
        ring.use(0)
        assert ring.is_whole()


@pytest.mark.parametrize("native", [False, True])
def test_one_unit_inside_another(file: Path, native: bool, uring: UringReader) -> None:
    """A gradient's backward pass may enter the stream again from the thread that is in it."""
    ring = Ring(file, [(20, 1000, 0), (15, 700, 100)], 2000, 2, uring if native else FakeReader())
    n_rows = 0
    with ring.stream.unit(0) as chunks:
        for start, stop, rows in chunks:
            assert torch.equal(rows, ring.rows(0, start, stop))
            ring.use(1)
            assert torch.equal(rows, ring.rows(0, start, stop)), "the inner unit took the outer one's buffer"
            n_rows += stop - start
    assert n_rows == 20


def test_released_memory_is_taken_again(file: Path) -> None:
    ring = Ring(file, [(20, 1000, 0)], 2000, 3, FakeReader())
    ring.use(0, n_chunks=2)
    ring.stream.release()
    assert not ring.stream._free
    ring.use(0)
    assert ring.is_whole()


@pytest.mark.parametrize(
    "make", [FakeReader, lambda: FakeReader(late=True, strict=True), lambda: ThreadReader(3), UringReader]
)
def test_two_threads_share_a_ring(file: Path, make: Callable[[], Reader]) -> None:
    ring = Ring(file, [(30, 1024, 512), (17, 999, 7), (5, 4096, 0)], 4096, 3, make())
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(25):
                ring.use(int(random.integers(3)), int(random.choice([1, 3, 1 << 30])))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert ring.is_whole()
    ring.reader.close()


def test_a_chunk_of_megabytes_is_read_in_parts_that_threads_share(tmp_path: Path) -> None:
    noise = random_bytes((5 << 20,))
    (tmp_path / "big").write_bytes(noise.numpy().tobytes())
    reader, submitted = ThreadReader(4), []
    stream = Stream(reader, 3 << 20, 2, FlashStats())
    submit = reader.submit
    reader.submit = lambda reads: submitted.append(len(reads)) or submit(reads)  # type: ignore[method-assign]
    stream.add(Extent2D("big", reader.open(tmp_path / "big"), 700, 5000, 1000))
    at = 0
    with stream.unit(0) as chunks:
        for start, stop, rows in chunks:
            assert torch.equal(rows.flatten(), noise[700 + start * 1000 : 700 + stop * 1000])
            at = stop
    assert at == 5000
    assert max(submitted) >= 3
    stream.release()
    reader.close()


def test_a_unit_that_ends_the_file_needs_no_whole_block(tmp_path: Path) -> None:
    noise = random_bytes((10_001,))
    (tmp_path / "odd").write_bytes(noise.numpy().tobytes())
    reader = ThreadReader(2)
    stream = Stream(reader, 4000, 2, FlashStats())
    stream.add(Extent2D("odd", reader.open(tmp_path / "odd"), 1, 10_000 // 16, 16))
    with stream.unit(0) as chunks:
        got = torch.cat([rows.flatten().clone() for _, _, rows in chunks])
    assert torch.equal(got, noise[1:10_001])
    stream.release()
    reader.close()


def test_reads_never_ask_for_more_than_the_file_must_have(file: Path) -> None:
    seen: list[Read] = []
    reader = FakeReader(fail=lambda read: bool(seen.append(read)))
    Ring(file, [(7, 1111, 3)], 3000, 2, reader).use(0)
    assert all(read.offset + read.need <= 3 + 7 * 1111 for read in seen)
