"""One contract for every reader: the bytes that were asked for, where they were asked for, or an error that names them.

The fake reader of the other tests passes it too, so what they show holds for the real ones.
"""

import errno
import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers_flash import FakeReader, random_bytes
from hypothesis import HealthCheck, given, settings

from hf_flash.errors import CheckpointError, FlashError, ReadError, ShortReadError
from hf_flash.memory import aligned_empty, view_bytes
from hf_flash.readers import Read, Reader, ThreadReader, UringReader, open_reader, threads

SIZE = 1_000_003  # no multiple of any block
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def uring(depth: int = 64) -> Reader:
    try:
        return UringReader(4, depth)
    except OSError as error:
        pytest.skip(f"io_uring cannot be had: {error}")


READERS: dict[str, Callable[[], Reader]] = {
    "threads": lambda: ThreadReader(4),
    "threads buffered": lambda: ThreadReader(4),  # the fixture takes O_DIRECT away
    "one thread": lambda: ThreadReader(1),
    "uring": uring,
    "uring, two deep": lambda: uring(2),
    "uring buffered": uring,
    "fake": FakeReader,
    "fake late": lambda: FakeReader(late=True),
}
REAL = [name for name in READERS if not name.startswith(("fake", "uring"))]  # those whose system call is preadv


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    if "buffered" in request.param:
        monkeypatch.delattr(os, "O_DIRECT")
    reader = READERS[request.param]()
    yield reader
    reader.close()


@pytest.fixture(params=REAL)
def real_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadReader]:
    if "buffered" in request.param:
        monkeypatch.delattr(os, "O_DIRECT")
    reader = READERS[request.param]()
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reads") / "noise"
    path.write_bytes(random_bytes((SIZE,)).numpy().tobytes())
    return path


@pytest.fixture(scope="module")
def content(file: Path) -> bytes:
    return file.read_bytes()


def buffers_for(sizes: list[int]) -> tuple[list[memoryview], torch.Tensor]:
    """Buffers of these sizes at addresses of no particular alignment, and the memory they lie in."""
    memory = torch.full((sum(sizes) + 1,), 0xEE, dtype=torch.uint8)
    view = view_bytes(memory)[1:]
    ends = np.cumsum([0, *sizes]).tolist()
    return [view[a:b] for a, b in itertools.pairwise(ends)], memory


@QUICK
@given(
    st.lists(
        st.tuples(st.integers(0, SIZE - 1), st.lists(st.sampled_from([0, 1, 7, 512, 513, 4096, 9000]), max_size=6)),
        max_size=12,
    )
)
def test_any_extents_scattered_over_any_buffers(
    reader: Reader, file: Path, content: bytes, extents: list[tuple[int, list[int]]]
) -> None:
    handle = reader.open(file)
    reads, wanted = [], []
    for offset, sizes in extents:
        offset = min(offset, SIZE - sum(sizes))
        buffers, _ = buffers_for(sizes)
        reads.append(Read(handle, offset, buffers))
        wanted.append(content[offset : offset + sum(sizes)])
    reader.read(reads)
    assert [b"".join(read.buffers) for read in reads] == wanted


@QUICK
@given(st.integers(0, SIZE // 512 - 80), st.lists(st.integers(1, 8), min_size=1, max_size=10), st.integers(0, 7))
def test_aligned_reads_go_straight_into_place(
    reader: Reader, file: Path, content: bytes, block: int, lengths: list[int], shift: int
) -> None:
    """Offsets, lengths and addresses are multiples of 512: the way of a cache slot."""
    memory = aligned_empty(512 * (sum(lengths) + shift))
    view, at, buffers = view_bytes(memory), 512 * shift, []
    for length in reversed(lengths):  # slots come in any order
        buffers.insert(0, view[at : at + 512 * length])
        at += 512 * length
    reader.read([Read(reader.open(file), 512 * block, buffers)])
    assert b"".join(buffers) == content[512 * block : 512 * (block + sum(lengths))]
    assert not memory[: 512 * shift].any()


@pytest.mark.parametrize("size", [1, 512])
@pytest.mark.parametrize("offset", [0, 512, 1000])
def test_more_buffers_than_one_system_call_takes(
    reader: Reader, file: Path, content: bytes, size: int, offset: int
) -> None:
    n = 1500
    view = view_bytes(aligned_empty(n * size))
    buffers = [view[i * size : (i + 1) * size] for i in reversed(range(n))]
    reader.read([Read(reader.open(file), offset, buffers)])
    assert b"".join(buffers) == content[offset : offset + n * size]


@pytest.mark.parametrize("start", [SIZE - 3, SIZE // 512 * 512, SIZE // 4096 * 4096 - 4096])
def test_the_end_of_a_file_that_is_no_whole_block(reader: Reader, file: Path, content: bytes, start: int) -> None:
    """A direct read must ask for whole blocks, so the last one reaches past the end: `need` says what must arrive."""
    buffer = view_bytes(aligned_empty(8192))
    reader.read([Read(reader.open(file), start, [buffer], need=SIZE - start)])
    assert bytes(buffer[: SIZE - start]) == content[start:]


@pytest.mark.parametrize("offset,wanted,need", [
    (SIZE - 10, 11, 0), (SIZE - 10, 4096, 11), (SIZE // 512 * 512, 512, 0), (SIZE - 10, 4096, 0), (SIZE + 5000, 100, 0),
    (SIZE // 4096 * 4096 - 4096, 16384, 0),
])  # fmt: skip
def test_a_file_that_ends_early_is_named_with_offset_wanted_and_got(
    real_reader: Reader, file: Path, offset: int, wanted: int, need: int
) -> None:
    buffer = view_bytes(aligned_empty(wanted))
    with pytest.raises(ShortReadError) as caught:
        real_reader.read([Read(real_reader.open(file), offset, [buffer], need)])
    got = max(0, SIZE - offset)
    for part in (str(file), f"wanted {need or wanted} bytes", f"offset {offset},", f"got {got}.", "hf-flash verify"):
        assert part in str(caught.value)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value, (ReadError, FlashError, OSError))


def test_one_bad_read_spoils_its_own_ticket_only(reader: Reader, file: Path, content: bytes) -> None:
    handle = reader.open(file)
    (good,), (bad,) = buffers_for([1000])[0], buffers_for([1000])[0]
    first = reader.submit([Read(handle, SIZE, [bad])])
    second = reader.submit([Read(handle, 5, [good])])
    second.wait()
    assert bytes(good) == content[5:1005]
    first.settle()  # raises nothing
    for _ in range(2):  # waiting again raises again
        with pytest.raises(ReadError):
            first.wait()
    assert first.ready()


def test_several_threads_share_a_reader(reader: Reader, file: Path, content: bytes) -> None:
    handle, wrong = reader.open(file), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            offsets = random.integers(0, SIZE - 5000, 4).tolist()
            reads = [Read(handle, offset, buffers_for([4096, 900])[0]) for offset in offsets]
            reader.read(reads)
            wrong.extend(r.offset for r in reads if b"".join(r.buffers) != content[r.offset : r.offset + 4996])

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_nothing_to_read_is_ready_at_once(reader: Reader, file: Path) -> None:
    ticket = reader.submit([])
    assert ticket.ready()
    ticket.wait()
    reader.read([Read(reader.open(file), 3, [])])


def test_opening_twice_gives_one_handle(real_reader: Reader, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert real_reader.open(file) == real_reader.open(Path(file.name))


def test_more_files_than_a_ring_registers(tmp_path: Path) -> None:
    reader, paths = uring(), [tmp_path / f"file{i}" for i in range(70)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 8192)
    handles = [reader.open(path) for path in paths]
    for turn in (handles, handles[::-1]):
        into = [view_bytes(aligned_empty(4096)) for _ in turn]
        reader.read([Read(handle, 4096, [buffer]) for handle, buffer in zip(turn, into, strict=True)])
        assert [buffer[0] for buffer in into] == [handles.index(handle) for handle in turn]
        assert all(len(set(buffer)) == 1 for buffer in into)
    reader.close()


def test_a_missing_file_is_named(real_reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing-here"):
        real_reader.open(tmp_path / "nothing-here")


def test_a_file_that_shrinks_after_it_was_opened(real_reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(bytes(16384))
    handle = real_reader.open(path)
    os.truncate(path, 8192)
    with pytest.raises(ShortReadError, match=r"shrinks ended early: wanted 8192 bytes at offset 4096, got 4096"):
        real_reader.read([Read(handle, 4096, [view_bytes(aligned_empty(8192))])])


def test_a_closed_reader_says_so(reader: Reader, file: Path) -> None:
    """Submitting to a closed pool raised a RuntimeError that nobody expects from a file."""
    handle = reader.open(file)
    (buffer,) = buffers_for([10])[0]
    reader.close()
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        reader.submit([Read(handle, 0, [buffer])])


def test_closing_waits_for_what_is_under_way(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, gate, preadv = ThreadReader(2), threading.Event(), os.preadv
    handle = reader.open(file)
    buffers = [buffers_for([2000])[0] for _ in range(6)]
    monkeypatch.setattr(os, "preadv", lambda *args: gate.wait() and preadv(*args))
    ticket = reader.submit([Read(handle, 0, list(b)) for b in buffers])
    closing = threading.Thread(target=reader.close)
    closing.start()
    assert not ticket.ready()
    gate.set()
    closing.join()
    ticket.wait()
    assert [b"".join(b) for b in buffers] == [content[:2000]] * 6


@pytest.mark.parametrize("at_most", [512, 1024, 4096 + 512])
def test_short_reads_are_gone_on_with(
    real_reader: Reader, file: Path, content: bytes, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may return less than was asked for, and signals interrupt."""
    handle, preadv, calls = real_reader.open(file), os.preadv, []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) % 3 == 0:
            raise InterruptedError
        memory = mmap.mmap(-1, at_most)
        n = preadv(fd, [memory], offset // 512 * 512)
        skip = offset % 512
        left = memoryview(memory)[skip:n]
        total = 0
        for buffer in buffers:
            piece = left[total : total + len(buffer)]
            buffer[: len(piece)] = piece
            total += len(piece)
        return total

    monkeypatch.setattr(os, "preadv", short)
    view = view_bytes(aligned_empty(20 * 512))
    buffers = [view[a * 512 : b * 512] for a, b in ((0, 3), (3, 4), (4, 15), (15, 20))]
    real_reader.read([Read(handle, 1024, buffers)])
    assert bytes(view) == content[1024 : 1024 + 20 * 512]
    unaligned, _ = buffers_for([3000, 10, 5000])
    real_reader.read([Read(handle, 777, unaligned)])
    assert b"".join(unaligned) == content[777 : 777 + 8010]
    assert len(calls) > 5


def test_a_failing_device_is_named(real_reader: Reader, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    handle = real_reader.open(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(ReadError, match=r"noise at offset 4096 failed: .*hf-flash verify") as caught:
            real_reader.read([Read(handle, 4096, [view_bytes(aligned_empty(512))])])
        assert caught.value.errno == errno.EIO
        assert not isinstance(caught.value, ShortReadError)
    real_reader.read([Read(handle, 4096, [view_bytes(aligned_empty(512))])])  # and it works again


def test_a_failing_ring_names_its_file(file: Path) -> None:
    reader = uring()
    assert isinstance(reader, UringReader)
    handle = reader.open(file)
    real = reader._files[handle].fd
    reader._files[handle].fd = os.open(file.parent, os.O_RDONLY)  # a folder: every read of it fails
    with pytest.raises(ReadError, match=r"noise at offset 4096 failed: .*hf-flash verify") as caught:
        reader.read([Read(handle, 4096, [view_bytes(aligned_empty(512))])])
    assert caught.value.errno == errno.EISDIR
    os.close(reader._files[handle].fd)
    reader._files[handle].fd = real
    reader.read([Read(handle, 4096, [view_bytes(aligned_empty(512))])])
    reader.close()


def test_ctrl_c_that_comes_to_a_finalizer_is_not_lost(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints and forgets what a finalizer raises."""
    reader, freed = uring(), []
    assert isinstance(reader, UringReader)
    free = reader._lib.hf_flash_batch_free

    def interrupted(batch: int) -> None:
        free(batch)
        freed.append(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(reader._lib, "hf_flash_batch_free", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.read([Read(reader.open(file), 4096, [view_bytes(aligned_empty(512))])])
        time.sleep(10)
    monkeypatch.undo()
    reader.close()
    assert len(freed) == 1


def test_direct_reads_are_used_where_the_file_system_has_them(file: Path, tmp_path: Path) -> None:
    reader = ThreadReader(1)
    reader.open(file)
    block = reader._files[0].block
    reader.close()
    if block == 1:
        pytest.skip(f"{file.parent} refuses O_DIRECT")
    assert block in (512, 4096)
    empty = tmp_path / "empty"
    empty.touch()
    reader = ThreadReader(1)
    reader.read([Read(reader.open(empty), 0, [])])
    reader.close()


def test_the_reader_of_a_name() -> None:
    reader = open_reader("auto", n_threads=2)
    assert isinstance(reader, Reader)
    reader.close()
    assert os.sysconf("SC_IOV_MAX") >= threads.IOV_MAX


FORKED = """
import os, sys
from hf_flash.errors import ReadError
from hf_flash.readers import UringReader
from hf_flash.stats import FlashStats
from hf_flash.store import Extent2D
from hf_flash.stream import Stream

reader = UringReader(1)
file = reader.open(sys.argv[1])
stream = Stream(reader, 4096, 8, FlashStats())
stream.add(Extent2D("rows", file, 0, 64, 4096))
with stream.unit(0) as chunks:
    next(chunks)
child = os.fork()
if child == 0:
    try:
        with stream.unit(0) as chunks:
            list(chunks)
    except ReadError as error:
        assert "fork" in str(error)
        sys.exit(7)  # as a program ends that has not heard of os._exit: every object is finalized
    sys.exit(1)
for _ in range(3):
    with stream.unit(0) as chunks:
        assert len(list(chunks)) == 64
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
"""


def test_a_forked_process_leaves_the_ring_alone(tmp_path: Path) -> None:
    """The ring's memory is shared with it: it says so instead of reading, and ends without waiting for reads."""
    uring().close()
    (tmp_path / "file").write_bytes(random_bytes((64 * 4096,)).numpy().tobytes())
    command = [sys.executable, "-c", FORKED, str(tmp_path / "file")]
    done = subprocess.run(command, check=False, timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
