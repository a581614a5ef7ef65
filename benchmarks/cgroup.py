"""Run a command in a memory cgroup of its own, from a cold page cache, and say how much it needed.

A memory cap is only real when the kernel enforces it. `run` makes a fresh cgroup (version 1 or 2, whichever the
machine lets us write), sets its limit with no swap, starts the command inside, reports the peak, the exit, and whether
the out-of-memory killer came. Workers count their own disk reads (/proc/self/io, see common.py); with v2 the kernel's
count for the whole group is beside it.

Two traps this file is here for:

- A page of the page cache is charged to whoever touches it first. If a model file is warm from an earlier run, a
  capped run reads it for free and the cap means nothing. So files are evicted first, and `mincore` checks that they
  are gone.
- A peak counts page cache as well as memory that the process must have. `anon_bytes` is beside it for that reason.

    python benchmarks/cgroup.py --limit 1GiB --evict model.safetensors -- python my_script.py
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import mmap
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

V1_ROOT = Path("/sys/fs/cgroup/memory")
V2_ROOT = Path("/sys/fs/cgroup")
_counter = itertools.count()


class CgroupUnavailable(RuntimeError):
    """No writable memory cgroup; the message says what to do about it."""


@dataclass
class Run:
    """What one command did in its cgroup. `peak_bytes` counts page cache, `anon_bytes` (sampled) does not."""

    returncode: int
    oom_killed: bool
    limit_bytes: int | None
    peak_bytes: int | None
    anon_bytes: int | None
    disk_read_bytes: int | None
    wall_s: float
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and not self.oom_killed

    def result(self) -> dict:
        """The JSON object that a worker printed last on a line that starts with `RESULT `."""
        lines = [line for line in self.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            tail = "\n".join(self.stderr.splitlines()[-25:])
            what = "out-of-memory killed" if self.oom_killed else f"exit {self.returncode}"
            raise RuntimeError(f"worker gave no result ({what}):\n{tail}")
        return json.loads(lines[-1][len("RESULT ") :])


class Group:
    """A memory cgroup for one command; subclasses know the file names of their version."""

    version: int
    limit_file: str
    peak_file: str
    usage_file: str
    stat_anon_key: str
    oom_file: str

    def __init__(self, parent: Path) -> None:
        self.path = parent / f"hf_flash-bench-{os.getpid()}-{next(_counter)}"
        self.path.mkdir()

    def read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_text()
        except OSError:
            return None

    def set_limit(self, limit_bytes: int) -> None:
        (self.path / self.limit_file).write_text(str(limit_bytes))

    def number(self, name: str) -> int | None:
        text = self.read(name)
        return int(text) if text and text.strip().isdigit() else None

    def stat(self, key: str) -> int | None:
        found = re.search(rf"^{key} (\d+)$", self.read("memory.stat") or "", re.MULTILINE)
        return int(found[1]) if found else None

    def oom_kills(self) -> int:
        found = re.search(r"^oom_kill (\d+)$", self.read(self.oom_file) or "", re.MULTILINE)
        return int(found[1]) if found else 0

    def disk_read_bytes(self) -> int | None:
        return None

    def remove(self) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:  # the last process may still be leaving
                time.sleep(0.1)


class GroupV1(Group):
    """cgroup v1: /sys/fs/cgroup/memory. (Its blkio twin counts nothing on kernels of 2024 and later: left out.)"""

    version, limit_file, peak_file = 1, "memory.limit_in_bytes", "memory.max_usage_in_bytes"
    usage_file, stat_anon_key, oom_file = "memory.usage_in_bytes", "rss", "memory.oom_control"

    def set_limit(self, limit_bytes: int) -> None:
        super().set_limit(limit_bytes)
        swap = self.path / "memory.memsw.limit_in_bytes"
        if swap.exists():
            swap.write_text(str(limit_bytes))

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / "memory.force_empty").write_text("0")  # page cache must not stay behind with the parent
        super().remove()


class GroupV2(Group):
    """cgroup v2: one tree. The parent must hand the memory controller down and hold no process itself."""

    version, limit_file, peak_file, usage_file = 2, "memory.max", "memory.peak", "memory.current"
    stat_anon_key, oom_file = "anon", "memory.events"

    def set_limit(self, limit_bytes: int) -> None:
        super().set_limit(limit_bytes)
        swap = self.path / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")

    def disk_read_bytes(self) -> int | None:
        text = self.read("io.stat")
        return None if text is None else sum(int(n) for n in re.findall(r"rbytes=(\d+)", text))


def _v2_parents() -> list[Path]:
    """Where a v2 group may be made: a folder named by the user, our own group's parent, the root."""
    chosen = os.environ.get("HF_FLASH_BENCH_CGROUP")
    found = [Path(chosen)] if chosen else []
    own = re.search(r"^0::(/.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if own and own[1] != "/":
        found.append(V2_ROOT / own[1].lstrip("/") / "..")
    return [*found, V2_ROOT]


def make_group() -> Group:
    """Make a memory cgroup in the first place that lets us.

    Raises:
        CgroupUnavailable: neither version is writable; says why for each place tried.
    """
    reasons = []
    if (V1_ROOT / "memory.limit_in_bytes").exists() or (V1_ROOT / "memory.usage_in_bytes").exists():
        try:
            return GroupV1(V1_ROOT)
        except OSError as err:
            reasons.append(f"{V1_ROOT}: {err.strerror}")
    for parent in _v2_parents() if (V2_ROOT / "cgroup.controllers").exists() else []:
        try:
            control = parent / "cgroup.subtree_control"
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
            return GroupV2(parent)
        except OSError as err:
            reasons.append(f"{parent}: {err.strerror}")
    why = "; ".join(reasons) or "no memory cgroup is mounted"
    raise CgroupUnavailable(
        f"no writable memory cgroup ({why}). Run as root, or inside `systemd-run --user --scope -p Delegate=yes "
        "bash` with HF_FLASH_BENCH_CGROUP naming a sub-folder of that scope that holds no process."
    )


def why_unavailable() -> str | None:
    """None when commands can be capped here, else the reason."""
    try:
        make_group().remove()
    except CgroupUnavailable as err:
        return str(err)
    return None


def resident_bytes(path: str | os.PathLike) -> int:
    """Bytes of a file that are in the page cache now (mincore)."""
    size = os.path.getsize(path)
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    n_pages = -(-size // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * n_pages)()
    with open(path, "rb") as f, mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), vector)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(page & 1 for page in vector) * mmap.PAGESIZE


def files_in(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Every regular file named by, or below, `paths`."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path] * path.is_file()
    return found


def evict(paths: Iterable[str | os.PathLike], count: bool = True) -> int:
    """Write files (or folders of files) back and drop them from the page cache.

    Returns:
        Bytes that stayed, because other processes have them mapped; 0 is cold. -1 if not counted.
    """
    files = files_in(paths)
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return sum(resident_bytes(file) for file in files) if count else -1


class _Sampler(threading.Thread):
    """Polls a group for what has no high-water mark: anonymous memory, and usage where memory.peak is missing."""

    def __init__(self, group: Group) -> None:
        super().__init__(daemon=True)
        self.group, self.anon, self.usage, self.done = group, 0, 0, threading.Event()

    def __enter__(self) -> _Sampler:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.anon = max(self.anon, self.group.stat(self.group.stat_anon_key) or 0)
            self.usage = max(self.usage, self.group.number(self.group.usage_file) or 0)


def run(
    command: Sequence[str],
    limit_bytes: int | None = None,
    evict_paths: Iterable[str | os.PathLike] = (),
    env: dict[str, str] | None = None,
    timeout_s: float = 3600,
    capped: bool = True,
) -> Run:
    """Run a command to its end in a fresh cgroup.

    Args:
        command: program and arguments.
        limit_bytes: the cap; None measures the peak without one.
        evict_paths: files or folders dropped from the page cache first.
        env: added to the environment.
        timeout_s: the command is killed after this long.
        capped: False runs without any cgroup (smoke runs where none is writable).

    Raises:
        CgroupUnavailable: see make_group.
    """
    evict(evict_paths, count=False)
    full_env = {**os.environ, **(env or {})}
    start = time.perf_counter()
    if not capped:
        done = _finish(command, full_env, timeout_s)
        wall_s = time.perf_counter() - start
        return Run(done.returncode, False, None, None, None, None, wall_s, done.stdout, done.stderr)
    group = make_group()
    try:
        if limit_bytes is not None:
            group.set_limit(limit_bytes)
        # The shell moves itself in, then becomes the command: nothing is charged to us.
        wrapped = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *command]
        with _Sampler(group) as sampler:
            done = _finish(wrapped, full_env, timeout_s)
        wall_s = time.perf_counter() - start
        return Run(
            returncode=done.returncode,
            oom_killed=group.oom_kills() > 0,
            limit_bytes=limit_bytes,
            peak_bytes=group.number(group.peak_file) or sampler.usage,
            anon_bytes=sampler.anon,
            disk_read_bytes=group.disk_read_bytes(),
            wall_s=wall_s,
            stdout=done.stdout,
            stderr=done.stderr,
        )
    finally:
        group.remove()


def _finish(command: Sequence[str], env: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run to the end; a command that ran out of time was killed and counts as exit 124."""
    try:
        return subprocess.run(command, check=False, env=env, timeout=timeout_s, capture_output=True, text=True)
    except subprocess.TimeoutExpired as late:
        texts = [t.decode(errors="replace") if isinstance(t, bytes) else t or "" for t in (late.stdout, late.stderr)]
        return subprocess.CompletedProcess(command, 124, texts[0], f"{texts[1]}\nran past {timeout_s} s")


def parse_size(text: str) -> int:
    """'1.5GiB', '130MB', '4096' → bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 130MiB, 1.5GB or a number of bytes")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=parse_size, help="cap, e.g. 1GiB (default: none, only measure)")
    parser.add_argument("--evict", nargs="*", default=[], help="files or folders to drop from the page cache first")
    parser.add_argument("command", nargs="+", help="the command, after --")
    args = parser.parse_args()
    try:
        done = run(args.command, args.limit, args.evict)
    except CgroupUnavailable as err:
        raise SystemExit(f"skipped: {err}") from None
    print(done.stdout, end="")
    print(done.stderr, end="")
    print(json.dumps({k: v for k, v in asdict(done).items() if k not in ("stdout", "stderr")}))


if __name__ == "__main__":
    main()
