"""What a machine can do: how fast its flash answers by size and number of reads, how fast its memory is swept.

These two bound every token ("LLM in a flash", §2.2: throughput rises with the size of a read and with how many are
under way), so they are measured with the readers that models use, in seconds, and kept for `hf-flash plan`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hf_flash import native
from hf_flash.config import available_memory, cgroup_limit
from hf_flash.errors import DiskFullError, FlashConfigError
from hf_flash.format import atomic_text, explain_full_disk
from hf_flash.layout import format_size
from hf_flash.memory import aligned_empty, view_bytes
from hf_flash.readers import READER_VARIABLE, ThreadReader, UringReader, open_reader

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS = (1, 8, 32, 64)
FILE_BYTES = 512 << 20
SWEEP_BYTES = 256 << 20
CELL_S = 0.12  # per size and depth
_WRITE_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class ReadSpeed:
    """Reads of one size, so many under way at a time, at random places of a file."""

    n_bytes: int
    depth: int
    reads_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth."""
        return self.n_bytes * self.reads_per_s


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was found out about a machine and one of its disks.

    Attributes:
        date: when, ISO 8601 in UTC.
        machine, cpu: its name and processor.
        device, disk: of the file system that was measured: number "major:minor" and name, where it has one.
        folder: where. file_bytes: size of the file that was read. fresh: it was written just before.
        virtual: the machine is one; a fresh file may lie in its host's memory, and no flash be measured.
        reader: "io_uring" or "threads". reader_note: why not io_uring, or "".
        direct: O_DIRECT works; if not, the figures include the page cache.
        native: the native extension is in use. instruction_set: what its kernels run on.
        reads: speeds by size and depth.
        memory: threads -> bytes/s of a read-only sweep over `sweep_bytes` of DRAM.
        available_bytes: memory that the process could still take. cgroup_bytes: its cgroup's limit, or None.
    """

    date: str
    machine: str
    cpu: str
    device: str
    disk: str
    folder: str
    file_bytes: int
    fresh: bool
    virtual: bool
    reader: str
    reader_note: str
    direct: bool
    native: bool
    instruction_set: str
    reads: tuple[ReadSpeed, ...]
    memory: dict[int, float]
    sweep_bytes: int
    available_bytes: int
    cgroup_bytes: int | None

    def best(self, n_bytes: int) -> ReadSpeed:
        """The fastest depth for one of the sizes that were measured."""
        return max((r for r in self.reads if r.n_bytes == n_bytes), key=lambda r: r.reads_per_s)

    def sizes(self) -> list[int]:
        """The sizes that were measured, ascending."""
        return sorted({r.n_bytes for r in self.reads})

    def flash_bytes_per_s(self, n_bytes: int | None = None) -> float:
        """Bandwidth of the flash with enough reads under way.

        Args:
            n_bytes: of a read; by default what gives most. Between two sizes that were measured by interpolation.
        """
        speeds = [self.best(size) for size in self.sizes()]
        if n_bytes is None:
            return max(speed.bytes_per_s for speed in speeds)
        if n_bytes <= speeds[0].n_bytes:  # bound by requests
            return n_bytes * speeds[0].reads_per_s
        points = np.log([(speed.n_bytes, speed.bytes_per_s) for speed in speeds])
        return float(np.exp(np.interp(math.log(n_bytes), points[:, 0], points[:, 1])))

    @property
    def memory_bytes_per_s(self) -> float:
        """Bandwidth of the memory on as many threads as give most."""
        return max(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **dataclasses.asdict(self), "memory": {str(n): speed for n, speed in self.memory.items()},
            "reads": [{**dataclasses.asdict(r), "bytes_per_s": r.bytes_per_s} for r in self.reads],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Probe:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        values = {field.name: kept[field.name] for field in dataclasses.fields(cls)}
        reads = tuple(ReadSpeed(r["n_bytes"], r["depth"], r["reads_per_s"]) for r in values["reads"])
        memory = {int(n): float(speed) for n, speed in values["memory"].items()}
        if not reads or not memory:
            raise ValueError("nothing was measured")
        return cls(**{**values, "reads": reads, "memory": memory})


def measure(
    folder: Path, *, file_bytes: int = FILE_BYTES, sweep_bytes: int = SWEEP_BYTES, seconds: float = CELL_S,
    progress: bool = True,
) -> Probe:  # fmt: skip
    """Measure a machine and the disk that a folder lies on.

    Reads a flash file of the folder if there is one of that size, else a file that is written for it and gone
    afterwards, Ctrl-C or not.

    Args:
        folder: where flash checkpoints lie or will lie.
        file_bytes: to read from; a multiple of 1 MiB, more than the disk's own cache.
        sweep_bytes: of DRAM to sweep over.
        seconds: per size and depth.
        progress: show a bar.

    Raises:
        FlashConfigError: the folder does not exist or cannot be written to. DiskFullError: it has no room.
    """
    reader, note = _reader_kind()
    if not folder.is_dir():
        raise FlashConfigError(f"{folder} is no folder. Give one that exists, on the disk for flash checkpoints.")
    n_cells = len(SIZES) * len(DEPTHS)
    sweep_bytes = max(16 << 20, min(sweep_bytes, available_memory() // 4))
    with tqdm(total=n_cells + 2, desc="Measuring", disable=not progress, file=sys.stderr, leave=False) as bar:
        with _file(folder, file_bytes) as (path, size, fresh):
            reads, direct = _reads(reader, path, size, seconds, bar.update)
        memory = {n: _sweep(n, sweep_bytes) for n in sorted({1, torch.get_num_threads()})}
        bar.update(2)
    return Probe(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), machine=platform.node(),
        cpu=_cpu(), device=device_of(folder), disk=_disk(device_of(folder)), folder=str(folder.resolve()),
        file_bytes=size, fresh=fresh, virtual="hypervisor" in _cpu_info("flags").split(),
        reader=reader, reader_note=note, direct=direct, native=native.available(),
        instruction_set=_instruction_set(), reads=reads, memory=memory, sweep_bytes=sweep_bytes,
        available_bytes=available_memory(), cgroup_bytes=cgroup_limit(),
    )  # fmt: skip


def keep(probe: Probe, cache: Path) -> Path:
    """Keep a result for `kept`, in place of an older one of the same machine and device.

    Args:
        cache: the hf_flash cache folder; made if need be.

    Raises:
        OSError: it cannot be written.
    """
    path = _place(cache, probe.machine, probe.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explain_full_disk(path.parent), atomic_text(path) as text:
            text.append(json.dumps(probe.to_dict(), indent=2) + "\n")
    except BaseException:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        raise
    return path


def kept(cache: Path, folder: Path) -> Probe | None:
    """The result that was kept for this machine and the device of a folder, or of the nearest one above that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        text = _place(cache, platform.node(), device_of(folder)).read_text(encoding="utf-8")
        return Probe.from_dict(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another version
        return None


def _place(cache: Path, machine: str, device: str) -> Path:
    return cache / "doctor" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', machine)}-{device.replace(':', '-')}.json"


# Flash -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _file(folder: Path, n_bytes: int) -> Iterator[tuple[Path, int, bool]]:
    """A file of the folder to read from, its size, and whether it was written for the occasion."""
    found = _flash_file(folder, n_bytes)
    if found is not None:
        yield found, found.stat().st_size, False
        return
    free = shutil.disk_usage(folder).free
    if _disk(device_of(folder)).endswith("(tmpfs)"):  # its files are memory, and may be all that is allowed
        free = min(free, available_memory() // 2)
    if free < n_bytes * 1.05:
        raise DiskFullError(
            f"No room in {folder}: the file to measure with takes {format_size(n_bytes)}, {format_size(free)} are "
            "free. Free some space, or name a folder on the same disk that holds a flash checkpoint."
        )
    try:
        temporary = tempfile.NamedTemporaryFile(prefix=".hf_flash-doctor-", dir=folder, buffering=0)
    except OSError as error:
        raise FlashConfigError(
            f"{folder} cannot be written to ({error.strerror}). Name a folder of yours on the same disk: "
            "hf-flash doctor FOLDER."
        ) from error
    with temporary, explain_full_disk(folder):
        random = np.random.default_rng(0)
        block = random.integers(0, 1 << 63, _WRITE_BYTES // 8, dtype=np.int64)  # nothing that a disk could compress
        for at in range(0, n_bytes, _WRITE_BYTES):
            temporary.write((block ^ at).data.cast("B")[: n_bytes - at])
        os.fsync(temporary.fileno())
        os.posix_fadvise(temporary.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(temporary.name), n_bytes, True


def _flash_file(folder: Path, n_bytes: int) -> Path | None:
    """The largest flash file in a folder or one below it, on the same device, of `n_bytes` at least."""
    device = folder.stat().st_dev
    found: list[tuple[int, Path]] = []
    for pattern in ("flash-*.safetensors", "*/flash-*.safetensors", "models--*/snapshots/*/flash-*.safetensors"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # a link to nothing
                status = path.stat()
                if status.st_dev == device and status.st_size >= n_bytes and os.access(path, os.R_OK):
                    found.append((status.st_size, path))
    return max(found)[1] if found else None


def _reads(
    kind: str, path: Path, file_bytes: int, seconds: float, tick: Callable[[int], Any]
) -> tuple[tuple[ReadSpeed, ...], bool]:
    """Reads/s by size and depth, and whether the reads were direct."""
    random = np.random.default_rng(1)
    speeds: list[ReadSpeed] = []
    targets = aligned_empty(max(DEPTHS) * max(SIZES))
    direct = True
    for depth in DEPTHS:
        reader = UringReader(depth, depth) if kind == "io_uring" else ThreadReader(depth)
        with contextlib.closing(reader):
            file = reader.open(path)
            direct = reader.block_of(file) > 1
            for size in SIZES:
                speed = _speed(reader, file, size, file_bytes // size, depth, seconds, targets, random)
                speeds.append(ReadSpeed(size, depth, speed))
                tick(1)
    return tuple(sorted(speeds, key=lambda s: (s.n_bytes, s.depth))), direct


def _speed(
    reader: ThreadReader, file: int, size: int, n_places: int, depth: int, seconds: float, targets: torch.Tensor,
    random: np.random.Generator,
) -> float:  # fmt: skip
    """Reads/s of one size: batches of reads at random places, each long enough to hide its beginning and its end."""
    most = max(1, n_places // 2)  # every second place: neighbours would become one read
    into, sink = view_bytes(targets)[: depth * size], view_bytes(aligned_empty(4096))

    def batch(n: int) -> float:
        rows = np.sort(random.choice(most, n, replace=False)).astype(np.int64) * 2
        slots = np.arange(n, dtype=np.int64) % depth  # what lands there is not looked at
        start = time.perf_counter()
        reader.submit_rows(file, 0, size, rows, into, slots, 0, sink)[0].wait()
        return time.perf_counter() - start

    n = min(most, 2 * depth)
    once = batch(n)
    n = min(most, 4096, max(n, int(n * seconds / max(once, 1e-6))))
    total, spent = 0, 0.0
    while spent < seconds:
        total, spent = total + n, spent + batch(n)
    return total / spent


def _reader_kind() -> tuple[str, str]:
    """The reader that models get, and why it is not io_uring.

    Raises:
        FlashConfigError: HF_FLASH_READER names none that can be had.
    """
    with contextlib.closing(open_reader()) as reader:
        if isinstance(reader, UringReader):
            return "io_uring", ""
    if os.environ.get(READER_VARIABLE) == "threads":
        return "threads", f"{READER_VARIABLE}=threads"
    try:
        UringReader().close()
    except OSError as error:
        return "threads", f"io_uring cannot be had: {error.strerror or error}"
    return "threads", ""


# Memory and machine ------------------------------------------------------------------------------------------------


def _sweep(n_threads: int, n_bytes: int) -> float:
    """Bytes/s of adding up integers that no cache holds: the best of five, for others only slow it down."""
    data = torch.ones(n_bytes // 8, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            data.sum()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return n_bytes / min(times[1:])


def device_of(folder: Path) -> str:
    """Number of the device that a folder lies on, "major:minor"."""
    device = folder.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _disk(device: str) -> str:
    """What is mounted there, such as /dev/nvme0n1p2 (ext4); "" where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == device:
                kind, source = after.split()[:2]
                return f"{source} ({kind})"
    return ""


def _cpu_info(field: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.split(":")[0].strip() == field:
                return line.partition(":")[2].strip()
    return ""


def _cpu() -> str:
    return f"{_cpu_info('model name') or platform.machine()}, {os.cpu_count()} cores"


def _instruction_set() -> str:
    """What the loader picks among the kernels' versions (see _native/common.h)."""
    if not native.available():
        off = os.environ.get("HF_FLASH_NATIVE") == "0"
        return f"torch operations ({'HF_FLASH_NATIVE=0' if off else 'the native extension is not built'})"
    if platform.machine() != "x86_64":
        return platform.machine()
    flags = set(_cpu_info("flags").split())
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "x86-64-v4 (AVX-512)"
    return "x86-64-v3 (AVX2)" if {"avx2", "fma", "bmi2", "f16c"} <= flags else "x86-64 (SSE2)"
