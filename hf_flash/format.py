"""The files of a flash checkpoint: valid safetensors that are aligned, checksummed and written atomically.

Any safetensors reader opens them. What is added is where the bytes lie (data at multiples of 4096 bytes, so that
direct reads need no copy) and a CRC-32 per run of rows in the header's metadata, with one over the header itself, so
that every byte of a file is covered by the file alone. docs/format.md has the rules in MUST and MAY.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_flash.errors import CheckpointError, ChecksumError, DiskFullError
from hf_flash.layout import DATA_ALIGN, format_size
from hf_flash.memory import round_up

FORMAT_VERSION = 2
ORDERED_VERSION = 3  # of files whose rows are not in the stock model's order: who does not know that must not read them
READABLE = ("1", "2", "3")  # version 1 knows no packed bundles, and its sketches are not read any more
PAD_PREFIX = "hf_flash.pad."
VERSION_KEY = "hf_flash.format_version"
ORDER_KEY = "hf_flash.order"  # header metadata: hash of the order of all layers' rows; absent: as in the stock model
SOURCE_KEY = "hf_flash.source"  # header metadata: identity of the checkpoint that a file was made from
RUN_BYTES = 1 << 20  # a checksum covers about this much
_BLANK_CRC = "0" * 8


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written: name, safetensors dtype ("U8", "BF16"), shape, bytes, bytes per checksum run."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    run_bytes: int = RUN_BYTES


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: absolute byte offset `start` in `path`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An opened header: entries by name, metadata, and the checksums by tensor as (run_bytes, crcs)."""

    path: Path
    data_start: int
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    checksums: dict[str, tuple[int, list[int]]]


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """Read and check the header of a safetensors file; touches no tensor.

    Raises:
        CheckpointError: missing, truncated, longer than its header says, not safetensors, or of a newer format.
        ChecksumError: the header's own checksum does not match.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            head = file.read(8)
            n = int.from_bytes(head, "little")
            raw = file.read(n) if len(head) == 8 and 8 + n <= size else b""
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}. Fetch or repack the checkpoint again.") from error
    if len(head) != 8 or len(raw) != n:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {size} bytes, the header alone claims {n}.")
    entries, metadata, checksums = _parse(path, raw)
    end = max((e.start + e.n_bytes for e in entries.values()), default=8 + n)
    if size != end:
        word = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(
            f"{path} is {word}: {size} bytes, expected {end}. Fetch it again, or repack from the source checkpoint."
        )
    want = metadata.get("hf_flash.header_crc32")
    # Compared as text: "A" and "a" are the same digit and not the same byte.
    if want is not None and f"{zlib.crc32(raw.replace(str(want).encode(), _BLANK_CRC.encode(), 1)):08x}" != want:
        raise ChecksumError(f"{path}: the header differs from its checksum. Fetch the file again.")
    return TensorFile(path, 8 + n, entries, metadata, checksums)


def _parse(path: Path, raw: bytes) -> tuple[dict[str, TensorEntry], dict[str, str], dict[str, tuple[int, list[int]]]]:
    """Entries, metadata and checksums of a header."""
    begin = 8 + len(raw)
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata: dict[str, str] = header.pop("__metadata__", {})
        version = metadata.get(VERSION_KEY, str(FORMAT_VERSION))
        if version not in READABLE:  # before anything else is made of it
            raise CheckpointError(
                f"{path} has flash checkpoint format {version}, this hf_flash reads formats {', '.join(READABLE)}. "
                "`pip install -U hf_flash`, or repack the source checkpoint."
            )
        entries = {}
        for name, e in header.items():
            start, end = e["data_offsets"]
            if not 0 <= start <= end:
                raise ValueError(f"tensor {name} ends before it begins")
            entries[name] = TensorEntry(path, name, e["dtype"], tuple(e["shape"]), begin + start, end - start)
        runs = json.loads(metadata.get("hf_flash.crc32", "{}"))
        checksums = {k: (r, [int(c[i : i + 8], 16) for i in range(0, len(c), 8)]) for k, (r, c) in runs.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header does not parse ({error}); the file is torn.") from error
    return entries, metadata, checksums


def verify_file(path: str | os.PathLike[str], progress: Callable[[int], None] = lambda n: None) -> list[str]:
    """Compare every byte of a file with its checksums.

    Args:
        path: a file that this package wrote.
        progress: called with the number of bytes checked since the last call.

    Returns:
        A line per damaged run (tensor, byte range); empty when the file is whole. Damage to the header is one line.
    """
    try:
        file = read_header(path)
    except CheckpointError as error:
        return [str(error)]
    lacking = [key for key in ("hf_flash.crc32", "hf_flash.header_crc32") if key not in file.metadata]
    if lacking:  # one of the two alone is a damaged header, which the missing one would have shown
        return [f"{path} carries no checksums ({' and '.join(lacking)}): it is damaged or not written by hf_flash."]
    problems = []
    with open(path, "rb") as stream:
        for name, entry in file.entries.items():
            run_bytes, crcs = file.checksums.get(name, (RUN_BYTES, []))
            if len(crcs) != -(-entry.n_bytes // run_bytes):
                problems.append(f"{path}: tensor {name} has {len(crcs)} checksums, expected one per {run_bytes} bytes.")
                continue
            for i, crc in enumerate(crcs):
                start = entry.start + i * run_bytes
                n = min(run_bytes, entry.start + entry.n_bytes - start)
                stream.seek(start)
                if zlib.crc32(stream.read(n)) != crc:
                    problems.append(f"{path}: bytes {start} to {start + n} (tensor {name}) differ from their checksum.")
                progress(n)
    return problems


class TensorFileWriter:
    """Write a safetensors file tensor by tensor: resumable, and whole or absent under its final name.

    Bytes go to `<name>.partial`; a journal beside it says which tensors are on disk, so an interrupted writer goes
    on where it stopped. `finish()` fills in the checksums, flushes and renames.

    Args:
        path: final name.
        tensors: everything the file will hold, in order.
        metadata: strings for the header.
        aligned: start every tensor at a multiple of 4096 bytes (padding tensors fill the gaps).
        identity: of the source; what an interrupted run left is used only if it was made from the same.

    Raises:
        DiskFullError: the file system has no room for the whole file; raised before anything is written.
    """

    def __init__(
        self, path: Path, tensors: Sequence[TensorSpec], metadata: dict[str, str], aligned: bool = False,
        identity: str = "",
    ) -> None:  # fmt: skip
        self.path, self._partial = path, path.with_name(path.name + ".partial")
        self._journal = path.with_name(path.name + ".partial.journal")
        self._specs, self._offsets = _place(tensors, aligned)
        self._metadata = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION), **metadata}
        self._crcs = {spec.name: [0] * -(-spec.n_bytes // spec.run_bytes) for spec in self._specs}
        self._header_bytes = len(self._header())
        self.n_bytes = self._header_bytes + sum(spec.n_bytes for spec in self._specs)
        self._identity = json.dumps({"identity": identity})
        self._fd, self.done = self._open()

    def _open(self) -> tuple[int, set[str]]:
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        sized = self._partial.exists() and self._partial.stat().st_size == self.n_bytes
        fresh = not (sized and lines[:1] == [self._identity])
        if fresh:
            self._journal.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
        fd = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        if fresh:
            try:
                with self._explain():
                    os.posix_fallocate(fd, 0, self.n_bytes)
                    self._journal.write_text(self._identity + "\n")
            except OSError:
                os.close(fd)
                self._partial.unlink(missing_ok=True)
                raise
        return fd, set() if fresh else self._replay(fd, lines[1:])

    def _explain(self) -> contextlib.AbstractContextManager[None]:
        return explain_full_disk(self.path.parent, f" for {self.path.name}: it needs {format_size(self.n_bytes)}")

    def _replay(self, fd: int, lines: list[str]) -> set[str]:
        """Tensors that the journal lists and whose bytes still match their checksums."""
        done: set[str] = set()
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):  # a torn last line is a tensor to write again
                name, crcs = json.loads(line)
                spec = next((s for s in self._specs if s.name == name), None)
                if spec is None:
                    continue
                data = os.pread(fd, spec.n_bytes, self._header_bytes + self._offsets[name])
                if run_crcs(memoryview(data), spec.run_bytes) == crcs:
                    self._crcs[name] = crcs
                    done.add(name)
        return done

    def _header(self, header_crc: str = _BLANK_CRC) -> bytes:
        runs = {s.name: [s.run_bytes, "".join(f"{c:08x}" for c in self._crcs[s.name])] for s in self._specs}
        header: dict[str, Any] = {
            "__metadata__": {"hf_flash.header_crc32": header_crc, **self._metadata, "hf_flash.crc32": json.dumps(runs)}
        }
        for spec in self._specs:
            start, stop = self._offsets[spec.name], self._offsets[spec.name] + spec.n_bytes
            header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, stop]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw = raw.ljust(round_up(8 + len(raw), DATA_ALIGN) - 8)
        return len(raw).to_bytes(8, "little") + raw

    def write(self, name: str, data: memoryview | bytes) -> None:
        """Write one tensor's bytes and note it in the journal.

        Raises:
            DiskFullError: no space left.
        """
        spec = next(s for s in self._specs if s.name == name)
        data = memoryview(data).cast("B")
        assert len(data) == spec.n_bytes, (name, len(data), spec.n_bytes)
        with self._explain():
            _pwrite_all(self._fd, data, self._header_bytes + self._offsets[name])
            os.fdatasync(self._fd)
            self._crcs[name] = run_crcs(data, spec.run_bytes)
            with open(self._journal, "a") as journal:
                journal.write(json.dumps([name, self._crcs[name]]) + "\n")
        self.done.add(name)
        os.posix_fadvise(self._fd, self._header_bytes + self._offsets[name], spec.n_bytes, os.POSIX_FADV_DONTNEED)

    def finish(self) -> Path:
        """Complete the header, flush, and give the file its final name."""
        for spec in self._specs:
            if spec.name.startswith(PAD_PREFIX) and spec.name not in self.done:
                self.write(spec.name, bytes(spec.n_bytes))
        missing = [s.name for s in self._specs if s.name not in self.done and s.n_bytes]
        assert not missing, missing
        blank = self._header()
        crc = f"{zlib.crc32(blank[8:]):08x}"
        with self._explain():
            _pwrite_all(self._fd, memoryview(blank.replace(_BLANK_CRC.encode(), crc.encode(), 1)), 0)
            os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        os.replace(self._partial, self.path)
        self._journal.unlink(missing_ok=True)
        fsync_folder(self.path.parent)
        return self.path

    def close(self) -> None:
        """Close without finishing; what is written stays for the next run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def explain_full_disk(folder: Path, what: str = "") -> Iterator[None]:
    """Turn the system's "no space left" into an error that says how much is wanted and what to do.

    Raises:
        DiskFullError: no space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = os.statvfs(folder)
        raise DiskFullError(
            f"No room in {folder}{what}, {format_size(free.f_bavail * free.f_frsize)} are free. Nothing was lost; free "
            "some space or choose another folder, then run the same command again."
        ) from error


def add_checksums(path: Path) -> None:
    """Write a safetensors file that somebody else made again, with checksums; atomically, and only if it has none."""
    file = read_header(path)
    if "hf_flash.crc32" in file.metadata:
        return
    entries = sorted(file.entries.values(), key=lambda entry: entry.start)
    specs = [TensorSpec(e.name, e.dtype, e.shape, e.n_bytes) for e in entries]
    with contextlib.closing(TensorFileWriter(path, specs, file.metadata)) as writer, open(path, "rb") as source:
        with mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for entry in entries:
                with view[entry.start : entry.start + entry.n_bytes] as data:
                    writer.write(entry.name, data)
        writer.finish()


def _place(tensors: Sequence[TensorSpec], aligned: bool) -> tuple[list[TensorSpec], dict[str, int]]:
    """Offsets in the data section; with `aligned`, padding tensors make each start a multiple of 4096."""
    specs: list[TensorSpec] = []
    offsets: dict[str, int] = {}
    at = 0
    for spec in tensors:
        if aligned and at % DATA_ALIGN:
            gap = round_up(at, DATA_ALIGN) - at
            pad = TensorSpec(f"{PAD_PREFIX}{len(specs)}", "U8", (gap,), gap)
            offsets[pad.name] = at
            specs.append(pad)
            at += gap
        offsets[spec.name] = at
        specs.append(spec)
        at += spec.n_bytes
    return specs, offsets


def run_crcs(data: memoryview, run_bytes: int) -> list[int]:
    """Checksums of a tensor's bytes, one per run."""
    return [zlib.crc32(data[i : i + run_bytes]) for i in range(0, len(data), run_bytes)]


def _pwrite_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_text(path: Path) -> Iterator[list[str]]:
    """Collect strings, then write them to `path` at once: the old file or the new one, never half."""
    parts: list[str] = []
    yield parts
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(parts), encoding="utf-8")
    os.replace(temporary, path)
