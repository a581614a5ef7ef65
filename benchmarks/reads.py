"""How close do our reads come to fio's on the same file, and how long a gap is worth reading over?

Ours is what the engines call: `submit_rows` of random rows into slots (`submit` of consecutive 1 MiB pieces, as
streamed layers are read), two batches under way, `depth` reads in the kernel and as many in line or more. fio's
io_uring engine gets the same file, sizes and depth, with O_DIRECT. Both read into `depth` pieces of memory, again and
again, as fio always does: a virtual disk copies, into 1 MiB that a core's cache holds a sixth faster than into 8 MiB.
(Before the clock runs every batch is read into memory of its own, and every page of it is looked at.) The sides take
short turns, at random which of them first, and the median of each counts. A virtual disk may save up what was not read
and lend it to whoever comes next, so both leave it idle for as long before a turn, fio's start and end included, and
read for as long (fio looks at its clock every quarter of a second). CPU is user + system time, per GB read.
The file is read once before: the disk's host may keep a cache, and then whoever reads second would win. Without fio our
pool of threads is the other side, and no target is judged.

The gap: rows in runs with k unwanted rows between two wanted ones, read one by one and read over. The longest gap at
which reading over is the faster way says what `hf_flash.store.MAX_GAP_BYTES` should be.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

KIB, PAGE = 1 << 10, 4096
SIZES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, common.MIB]
DEPTHS = [1, 4, 16, 32, 64]
JUDGED, JUDGED_DEPTH = (16 * KIB, 64 * KIB, common.MIB), 16
MIN_SHARE, MAX_CPU = 0.95, 2.0  # of fio's bytes/s, of fio's CPU seconds per byte
REST_S = 0.4  # before a turn; before ours as much more as fio takes to start and to end
BATCH_BYTES, BATCH_READS = 4 * common.MIB, 256  # of a batch, where that is twice the depth or more
GAP_ROWS, GAPS = [1 * KIB, 2 * KIB, 4 * KIB, 8 * KIB, 16 * KIB], [1, 2, 4, 8, 16, 32]  # row bytes, rows between two


def make_file(path: Path, n_bytes: int) -> None:
    """Noise, with its number at the start of every page, so that any page can be recognized."""
    import numpy as np

    noise = np.random.default_rng(0)
    with open(path, "wb") as file:
        for at in range(0, n_bytes, 16 * common.MIB):
            pages = noise.integers(0, 1 << 62, (min(16 * common.MIB, n_bytes - at) // PAGE, PAGE // 8), np.int64)
            pages[:, 0] = np.arange(at // PAGE, at // PAGE + len(pages))
            file.write(pages.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_once(path: Path) -> None:
    """Read the file from the device once."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        import mmap

        buffer, at = mmap.mmap(-1, common.MIB), 0
        while n := os.preadv(fd, [buffer], at):
            at += n
    finally:
        os.close(fd)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Ours:
    """One reader at one size and depth; batches are made before the clock runs."""

    def __init__(self, reader: Any, path: Path, size: int, depth: int, n_batches: int = 16) -> None:
        import numpy as np

        from hf_flash.memory import aligned_empty, view_bytes

        self.reader, self.size = reader, size
        self.file = reader.open(path)
        self.sequential = size >= common.MIB
        n_rows = path.stat().st_size // size
        self.n = max(1, min(max(2 * depth, min(BATCH_READS, BATCH_BYTES // size)), n_rows // 4))
        draw = np.random.default_rng(depth)
        # Even rows only, so that no two are neighbours and every row is a read of its own, as it is in fio.
        self.batches = [
            np.arange(i * self.n, (i + 1) * self.n) % n_rows if self.sequential
            else 2 * np.sort(draw.choice(n_rows // 2, self.n, replace=False))
            for i in range(n_batches)
        ]  # fmt: skip
        self.target = aligned_empty(self.n * size).fill_(1)
        self.view, self.sink = view_bytes(self.target), view_bytes(aligned_empty(PAGE))
        self.read_into(np.arange(self.n))
        for number in range(n_batches):
            self.submit(number).wait()
            self.check(number)
        self.read_into(np.arange(self.n) % depth)

    def read_into(self, places: Any) -> None:
        """Have row i of every batch land in piece places[i] of the memory, [n]."""
        from hf_flash.readers import Read

        self.places, size = places, self.size
        pieces = [self.view[at * size : (at + 1) * size] for at in places.tolist()]
        self.reads = [
            [Read(self.file, row * size, [piece]) for row, piece in zip(rows.tolist(), pieces, strict=True)]
            for rows in self.batches
        ]

    def submit(self, number: int) -> Any:
        """Start batch `number`."""
        number %= len(self.batches)
        if self.sequential:
            return self.reader.submit(self.reads[number])
        rows = self.batches[number]
        return self.reader.submit_rows(self.file, 0, self.size, rows, self.view, self.places, 0, self.sink)[0]

    def run(self, seconds: float) -> dict[str, float]:
        """Read for some seconds."""
        number, cpu, start = 0, cpu_s(), time.perf_counter()
        under_way = [self.submit(0)]
        while time.perf_counter() - start < seconds or number < 1:
            number += 1
            under_way.append(self.submit(number))
            under_way.pop(0).wait()
        under_way.pop(0).wait()
        took, cpu = time.perf_counter() - start, cpu_s() - cpu
        n_bytes = (number + 1) * self.n * self.size
        return {"bytes_per_s": n_bytes / took, "cpu_s_per_gb": cpu / n_bytes * 1e9}

    def check(self, number: int) -> None:
        """Look at every page of a batch that was read into places of its own."""
        import numpy as np
        import torch

        per_row = self.size // PAGE
        found = self.target.view(torch.int64).view(self.n, per_row, PAGE // 8)[:, :, 0].numpy()
        rows = self.batches[number]
        if not np.array_equal(found, rows[:, None] * per_row + np.arange(per_row)):
            raise SystemExit(f"reads: wrong bytes at {self.size} bytes a read")


def fio_run(path: Path, size: int, depth: int, seconds: float, in_order: bool = False) -> dict[str, float]:
    """fio on the same file; its own clock and its own CPU figures, so its start is not charged.

    Ours reads into transparent huge pages; fio can have huge pages too, where some are reserved (vm.nr_hugepages).
    """
    command = [
        "fio", "--name=reads", f"--filename={path}", "--ioengine=io_uring", "--direct=1", f"--bs={size}",
        f"--rw={'read' if in_order or size >= common.MIB else 'randread'}", f"--iodepth={depth}", "--time_based",
        f"--runtime={max(1, round(seconds * 1000))}ms", "--norandommap", "--gtod_reduce=1", "--output-format=json",
        *(["--iomem=mmaphuge"] if size * depth <= reserved_bytes() else []),
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.perf_counter() - start
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    read, seconds = job["read"], job["job_runtime"] / 1000
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
    return {
        "bytes_per_s": read["bw_bytes"], "cpu_s_per_gb": cpu / read["io_bytes"] * 1e9, "s": seconds,
        "idle_s": max(0.0, wall - seconds),
    }  # fmt: skip


def reserved_bytes() -> int:
    """Bytes of huge pages that are reserved and free."""
    found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(found["HugePages_Free"]) * int(found["Hugepagesize"].split()[0]) * 1024


@contextlib.contextmanager
def reader_of(kind: str, depth: int) -> Iterator[Any]:
    from hf_flash.readers import ThreadReader, UringReader

    reader = UringReader(1, depth) if kind == "uring" else ThreadReader(depth)
    try:
        yield reader
    finally:
        reader.close()


def middle(turns: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the best bytes/s."""
    return {
        "bytes_per_s": statistics.median(t["bytes_per_s"] for t in turns),
        "cpu_s_per_gb": statistics.median(t["cpu_s_per_gb"] for t in turns),
        "best_bytes_per_s": max(t["bytes_per_s"] for t in turns),
    }


def compare(args: Any, path: Path, other: str) -> list[dict[str, Any]]:
    """Every size and depth, both sides in turns."""
    rows, chance = [], random.Random(0)
    for size in args.sizes:
        for depth in args.depths:
            turns: dict[str, list[dict[str, float]]] = {"ours": [], other: []}
            with reader_of("uring", depth) as ring, reader_of("threads", depth) as pool:
                ours = Ours(ring, path, size, depth)
                theirs = None if other == "fio" else Ours(pool, path, size, depth)
                judged = other == "fio" and size in JUDGED and depth >= JUDGED_DEPTH
                last = fio_run(path, size, depth, args.seconds) if other == "fio" else {"s": args.seconds, "idle_s": 0}
                for _ in range(args.turns if judged else -(-args.turns // 3)):
                    for side in chance.sample(["ours", other], 2):
                        time.sleep(REST_S)
                        if side == "ours" or theirs:
                            time.sleep(last["idle_s"])
                            turns[side].append((ours if side == "ours" else theirs).run(last["s"]))
                        else:
                            last = fio_run(path, size, depth, args.seconds)
                            turns[side].append(last)
            row = {"size": size, "depth": depth, **{side: middle(t) for side, t in turns.items()}, "judged": judged}
            row["share"] = row["ours"]["bytes_per_s"] / row[other]["bytes_per_s"]
            row["cpu"] = row["ours"]["cpu_s_per_gb"] / max(1e-9, row[other]["cpu_s_per_gb"])
            row["met"] = not row["judged"] or (row["share"] >= MIN_SHARE and row["cpu"] <= MAX_CPU)
            rows.append(row)
    return rows


def gap_seconds(reader: Any, path: Path, row_bytes: int, gap: int, over: bool, seconds: float) -> float:
    """Seconds per wanted row where runs of 8 wanted rows have `gap` rows between two."""
    import numpy as np

    from hf_flash.memory import aligned_empty, view_bytes

    step, run = gap + 1, 8
    n_rows = path.stat().st_size // row_bytes
    n_runs = max(1, min(256, n_rows // (step * run * 2)))
    starts = np.sort(np.random.default_rng(gap).choice(n_rows // (step * run), n_runs, replace=False)) * step * run
    rows = (starts[:, None] + np.arange(0, step * run, step)).reshape(-1)
    # Whole runs end before the next begins: a hole of one gap between two runs is not there to be bridged.
    keep = np.concatenate([[True], np.diff(rows) >= step])
    rows = rows[keep]
    targets, sink = view_bytes(aligned_empty(len(rows) * row_bytes)), view_bytes(aligned_empty(gap * row_bytes))
    file, slots, turns, start = reader.open(path), np.arange(len(rows)), 0, time.perf_counter()
    while turns < 1 or time.perf_counter() - start < seconds:
        reader.submit_rows(file, 0, row_bytes, rows, targets, slots, gap if over else 0, sink)[0].wait()
        turns += 1
    return (time.perf_counter() - start) / turns / len(rows)


def gaps(args: Any, path: Path) -> list[dict[str, Any]]:
    """Reading over against reading one by one; per row size, the longest gap at which it is the faster way."""
    rows = []
    with reader_of("uring", 64) as reader:
        for row_bytes in args.gap_rows:
            found = []
            for gap in args.gaps:
                times: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(-(-args.turns // 3)):
                    for over in (False, True):
                        times[over].append(gap_seconds(reader, path, row_bytes, gap, over, args.seconds / 2))
                found.append({"gap_bytes": gap * row_bytes, "over": min(times[True]) / min(times[False])})
            worth = [f["gap_bytes"] for f in found if f["over"] < 1]
            rows.append({"row_bytes": row_bytes, "gaps": found, "break_even_bytes": max(worth, default=0)})
    return rows


def print_reads(rows: list[dict[str, Any]], other: str) -> None:
    table = [
        ["KiB", "depth", "ours MB/s", f"{other} MB/s", "share", "ours CPU s/GB", f"{other} CPU s/GB", "CPU", "met"]
    ]
    for r in rows:
        table.append([
            str(r["size"] // KIB), str(r["depth"]), common.mb(r["ours"]["bytes_per_s"]),
            common.mb(r[other]["bytes_per_s"]), f"{r['share']:.1%}", f"{r['ours']['cpu_s_per_gb']:.3f}",
            f"{r[other]['cpu_s_per_gb']:.3f}", f"{r['cpu']:.2f}", ("yes" if r["met"] else "NO") if r["judged"] else "-",
        ])  # fmt: skip
    print(common.table(table))


def print_gaps(rows: list[dict[str, Any]]) -> None:
    from hf_flash.store import MAX_GAP_BYTES

    print("gap: seconds of reading over a gap / seconds of one more read; below 1 reading over is the faster way")
    for r in rows:
        each = ", ".join(f"{g['gap_bytes'] / KIB:g} KiB {g['over']:.2f}" for g in r["gaps"])
        print(f"rows of {r['row_bytes'] / KIB:g} KiB: {each}; worth up to {r['break_even_bytes'] / KIB:g} KiB")
    print(f"MAX_GAP_BYTES is {MAX_GAP_BYTES / KIB:g} KiB")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=numbers, default=SIZES, help="bytes a read, comma-separated")
    parser.add_argument("--depths", type=numbers, default=DEPTHS, help="reads in flight (default 1,4,16,32,64)")
    parser.add_argument(
        "--turns", type=int, default=25, help="turns of each side where judged, else a third (default 25)"
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="of one turn (default 0.15)")
    parser.add_argument("--file-bytes", type=int, default=512 * common.MIB, help="size of the file (default 512 MiB)")
    args = parser.parse_args()
    args.gap_rows, args.gaps = GAP_ROWS, GAPS
    if args.smoke:
        args.sizes, args.depths, args.turns, args.seconds = [16 * KIB, common.MIB], [16], 1, 0.05
        args.file_bytes, args.gap_rows, args.gaps = 16 * common.MIB, [4 * KIB], [1]
    return args


def main() -> None:
    args = parse()
    info = common.begin("reads: bytes/s and CPU of our reader beside fio's on the same file")
    from hf_flash import native

    if not native.available():
        print("skipped: the native extension is not built, so there is no io_uring reader")
        return
    other = "fio" if shutil.which("fio") else "threads"
    if other != "fio":
        print("fio is missing (apt install fio): our own pool of threads is the other side")
    work = Path(tempfile.mkdtemp(prefix="hf_flash-reads-", dir=args.dir))
    try:
        path = work / "noise"
        make_file(path, args.file_bytes)
        read_once(path)
        ceiling = max(fio_run(path, common.MIB, 32, args.seconds)["bytes_per_s"] for _ in range(2)) if other == "fio" \
            else common.disk_bytes_per_s(work)  # fmt: skip
        print(
            f"huge pages that fio can have: {reserved_bytes() >> 20} MiB (64 reads of 1 MiB want 64; vm.nr_hugepages)"
        )
        print(f"ceiling: {other}, sequential 1 MiB: {common.mb(ceiling)} MB/s")
        rows = compare(args, path, other)
        print_reads(rows, other)
        bridges = gaps(args, path)
        print_gaps(bridges)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    met = all(r["met"] for r in rows)
    common.finish({
        "benchmark": "reads", "other": other, "ceiling_bytes_per_s": ceiling, "min_share": MIN_SHARE,
        "max_cpu": MAX_CPU,
        "rows": rows, "gaps": bridges, "met": met, "right": True, "machine": info,
    }, args.json)  # fmt: skip
    if not met and not args.smoke:
        raise SystemExit(f"reads: less than {MIN_SHARE:.0%} of fio's bytes/s, or more than {MAX_CPU} x its CPU time")


if __name__ == "__main__":
    main()
