"""Speeds as tables and words for a terminal: what a machine can do, and what a plan will. Nothing here prints."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_flash.estimate import Estimate
from hf_flash.ladder import Ladder
from hf_flash.layout import format_size
from hf_flash.probe import Probe

_NEAR = 0.8  # of the most: as good as the most, on a machine where others work too


def doctor_view(probe: Probe) -> RenderableType:
    """What was measured, what is in use, and what limits the machine."""
    sizes, depths = probe.sizes(), sorted({read.depth for read in probe.reads})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("reads of")
    for depth in depths:
        table.add_column("one at a time" if depth == 1 else f"{depth} at a time", justify="right")
    table.add_column("reads/s", justify="right")
    speeds = {(read.n_bytes, read.depth): read for read in probe.reads}
    for size in sizes:
        cells = [f"{format_size(speeds[size, depth].bytes_per_s)}/s" for depth in depths]
        table.add_row(format_size(size), *cells, f"{probe.best(size).reads_per_s:,.0f}")
    memory = ", ".join(f"{format_size(speed)}/s on {_threads(n)}" for n, speed in sorted(probe.memory.items()))
    limit = "no cgroup limit" if probe.cgroup_bytes is None else f"cgroup limit {format_size(probe.cgroup_bytes)}"
    direct = "O_DIRECT" if probe.direct else "O_DIRECT refused here: figures include the page cache"
    note = f" ({probe.reader_note})" if probe.reader_note else ""
    facts = [
        f"memory: {memory}",
        f"reader: {probe.reader}{note}, {direct}",
        f"kernels: {'native, ' if probe.native else ''}{probe.instruction_set}",
        f"free memory: {format_size(probe.available_bytes)}, {limit}",
    ]
    disk = f"{probe.disk}, " if probe.disk else ""
    head = f"{probe.machine}: {probe.cpu}; {probe.folder} on {disk}device {probe.device}"
    return Group(_line(head), table, *map(_line, facts), Text(), *map(_line, limits(probe)))


def limits(probe: Probe) -> list[str]:
    """What limits a machine, in words."""
    sizes, most = probe.sizes(), probe.flash_bytes_per_s()
    small = probe.best(sizes[0])
    enough = next(size for size in sizes if probe.best(size).bytes_per_s >= _NEAR * most)
    lines = []
    if enough > sizes[0]:
        lines.append(
            f"Reads below {format_size(enough)} are bound by requests: {small.reads_per_s:,.0f}/s of "
            f"{format_size(small.n_bytes)} ({format_size(small.bytes_per_s)}/s). From {format_size(enough)} by "
            f"bandwidth: {format_size(most)}/s."
        )
    else:
        lines.append(f"Reads of every size are bound by bandwidth: {format_size(most)}/s.")
    alone = next((read for read in probe.reads if read.n_bytes == sizes[0] and read.depth == 1), None)
    if alone is not None and small.depth > 1:
        lines.append(
            f"A small read alone takes {1e6 / alone.reads_per_s:.0f} µs; {small.depth} under way give "
            f"{small.reads_per_s / alone.reads_per_s:.1f} times as many."
        )
    lines.append(
        f"A byte from flash costs as much time as {probe.memory_bytes_per_s / most:.0f} bytes from memory: a model "
        f"that fits is bound by memory at {format_size(probe.memory_bytes_per_s)}/s, another by what it reads."
    )
    if probe.disk.endswith("(tmpfs)"):
        lines.append(f"{probe.folder} is a file system in memory, no flash: name a folder on the disk.")
    elif probe.fresh and probe.virtual:
        lines.append(
            "This is a virtual machine, and its host may hold the file that was just written in memory. Name a folder "
            f"with a flash checkpoint of {format_size(probe.file_bytes)} or more to measure what has been at rest."
        )
    return lines


def estimate_lines(found: Estimate | None) -> list[str]:
    """What a plan's token will take, and why."""
    if found is None:
        return ["run `hf-flash doctor` to see the expected speed"]
    read = found.streamed_bytes + found.sparse_bytes
    terms = (
        f"a token reads {format_size(read)} from flash ({_time(found.flash_s)}) and touches "
        f"{format_size(found.touched_bytes)} of memory ({_time(found.memory_s)}), as `hf-flash doctor` measured them"
    )
    floor = (
        f"expected: {_rate(1 / found.expected_s)} tokens/s at best; floor {_time(found.floor_s)} per token, set by the "
        f"{found.bound}"
    )
    assumed = (
        [f"assumed: {found.active:.3g} of the neurons are wanted (--active), the cache holds its share of them"]
        if found.active is not None
        else []
    )
    return [terms, floor, *assumed]


def ladder_view(ladder: Ladder) -> RenderableType:
    """A row for each rung, as in the paper's Tables 2 and 3."""
    titles = ["", "DRAM", "flash to DRAM", "reads", "bandwidth", "I/O", "memory", "compute", "a token", "tokens/s"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row in ladder.rows:
        table.add_row(
            row.name, format_size(row.dram_bytes), format_size(row.bytes_per_token), f"{row.reads_per_token:,.0f}",
            f"{format_size(row.bytes_per_s)}/s" if row.bytes_per_s else "-",
            *(f"{seconds * 1e3:,.1f} ms" for seconds in (row.io_s, row.memory_s, row.compute_s, row.token_s)),
            _rate(row.tokens_per_s),
        )  # fmt: skip
    head = (
        f"{ladder.model}: {format_size(ladder.n_bytes)} of weights, cap {format_size(ladder.memory)}; means of "
        f"{ladder.rows[0].n_tokens} new tokens"
    )
    notes = [f"{row.name}: {row.what}" for row in ladder.rows]
    notes += [f"left out: {ladder.left_out}"] if ladder.left_out else []
    if len(ladder.rows) > 1:
        notes.append(f"all rows gave the same {len(ladder.token_ids)} tokens")
    return Group(_line(head), table, *map(_line, notes))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _rate(n: float) -> str:
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def _line(text: str) -> Text:
    return Text(text, overflow="fold")
