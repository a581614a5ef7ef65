"""Write the tables of benchmarks/README.md from the files in benchmarks/results.

Every row carries the machine, the commit ('+': with changes that were not committed) and the command that measured it.

    python benchmarks/table.py            # write
    python benchmarks/table.py --check    # only say whether README.md is current
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

README = common.HERE / "README.md"
RESULTS = common.HERE / "results"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def markdown(rows: list[list[str]]) -> str:
    """Rows (the first is the head) as a Markdown table."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *body])


def source(result: dict[str, Any], file: Path) -> str:
    """Machine, commit, command and file of a result, in a line."""
    m = result["machine"]
    peers = "".join(f", {name} {version}" for name, version in m.get("peers", {}).items())
    return (
        f"{m['cpu']}, {m['n_cpus']} CPUs, {m['ram_bytes'] / 2**30:.0f} GiB, Linux {m['kernel'].split('-')[0]}, load "
        f"{m['load_1min']}; torch {m['torch']}, transformers {m['transformers']}, accelerate {m['accelerate']}{peers}; "
        f"commit {m['commit']}, {result['when'][:10]}: `{result['command']}` ([JSON](results/{file.name}))"
    )


def footprint(result: dict[str, Any]) -> str:
    """Warm and cold footprint."""
    rows = [["imported", "warm MB", "of it anonymous MB", "cold MB"]]
    sizes = map(common.mb, (result["warm_bytes"], result["warm_anon_bytes"], result["cold_bytes"]))
    return markdown([*rows, [", ".join(result["imported"]), *sizes]])


def cap(result: dict[str, Any]) -> str:
    """One row per cap."""
    rows = [["memory MB", "of the model", "cgroup MB", "peak MB", "anonymous MB", "s/token", "outcome"]]
    for r in result["rows"]:
        rows.append([
            common.mb(r["memory"]), f"{r['memory'] / result['model_bytes']:.0%}", common.mb(r["limit_bytes"]),
            common.mb(r["peak_bytes"]), common.mb(r["anon_bytes"]),
            f"{r['s_per_token']:.3f}" if "s_per_token" in r else "-", r["words"],
        ])  # fmt: skip
    return f"{result['model']}: {result['weights']}, {common.mb(result['model_bytes'])} MB\n\n{markdown(rows)}"


def generate(result: dict[str, Any]) -> str:
    """One row per model, cap and side; the ceiling as a row of its own."""
    head = (
        "model, cap | side | s/token (range) | CPU s/token | MB read/token | prefill s | peak MB | x hf_flash | tokens"
    )
    rows = [head.split(" | ")]
    notes = []
    for m in result["models"]:
        notes.append(
            f"{m['model']}: {m['weights']}, {common.mb(m['model_bytes'])} MB, {m['threads']} threads; "
            f"without a cap {m['dense_s_per_token']:.3f} s/token."
        )
        for c in m["caps"]:
            where = f"{m['model']}, {c['memory'] / m['model_bytes']:.0%} ({common.mb(c['memory'])} MB)"
            rows += generate_floors(where, c)
            rows += [generate_row(where, side, s, c) for side, s in c["sides"].items()]
        if "planted" in m:
            p = m["planted"]
            notes.append(
                f"Planted in {m['model']}, measured: {p['firing']:.2%} of the neurons fire; those of the last five "
                f"tokens hold {p['hits']:.1%} of the next one's."
            )
    return " ".join(notes) + "\n\n" + markdown(rows)


def generate_floors(where: str, c: dict[str, Any]) -> list[list[str]]:
    """What the machine allows: any lossless program on the bf16 weights, and our own run."""
    if "ceiling" in c:  # results of before there were two terms
        ceiling = c["ceiling"]
        least = max(ceiling["disk_s_per_token"], ceiling["uncapped_s_per_token"])
        return [[where, "*ceiling*", f"{least:.3f}", "-", common.mb(ceiling["must_read_bytes"]), *["-"] * 4]]
    rows = []
    for key, label in (("floor", "floor: every bf16 weight"), ("our_floor", "floor: what hf_flash reads and touches")):
        if key in c:
            f = c[key]
            terms = f"disk {f['disk_s']:.3f}, DRAM {f['memory_s']:.3f}"
            ratio = f"token / floor {c['token_over_floor']:.2f}" if key == "our_floor" else "-"
            rows.append([where, f"*{label}*", f"{f['s_per_token']:.3f} ({terms})", "-", common.mb(f["read_bytes"]),
                         "-", "-", "-", ratio])  # fmt: skip
    return rows


def side_label(side: str, c: dict[str, Any]) -> str:
    """A side as the tables and figures name it."""
    names = {
        "accelerate": f"accelerate disk, {c['accelerate_resident']} layers resident",
        "accelerate-plain": "accelerate disk, as it comes",
        "mmap": "transformers, mmap",
        "airllm": "AirLLM",
        "airllm-nogc": "AirLLM, garbage collector patched out",
        "llama.cpp": f"llama.cpp, mmap, {c.get('llama_threads')} threads",
    }
    return names.get(side, side)


def generate_row(where: str, side: str, s: dict[str, Any], c: dict[str, Any]) -> list[str]:
    """One side under one cap."""
    label = side_label(side, c)
    if "s_per_token" not in s:
        return [where, label, *["-"] * 6, s["words"]]
    ours = c["sides"].get("hf_flash", {}).get("s_per_token")
    return [
        where, label, f"{s['s_per_token']:.3f} ({s['range'][0]:.3f}-{s['range'][1]:.3f})",
        f"{s['cpu_s_per_token']:.3f}", common.mb(s["read_bytes_per_token"]), f"{s['prefill_s']:.2f}",
        common.mb(s.get("peak_bytes")), f"{s['s_per_token'] / ours:.2f}" if ours else "-", s["words"],
    ]  # fmt: skip


def load(result: dict[str, Any]) -> str:
    """One row per model."""
    rows = [["model", "model MB", "resident MB", "read MB", "read / resident", "s"]]
    for r in result["rows"]:
        sizes = map(common.mb, (r["model_bytes"], r["resident_bytes"], r["read_bytes"]))
        rows.append([f"{r['model']} ({r['weights']})", *sizes, f"{r['ratio']:.3f}", f"{r['load_s']:.2f}"])
    return markdown(rows)


def certified(result: dict[str, Any]) -> str:
    """One row per layer."""
    rows = [["layer", "fire", "wanted", "wanted / fired", "misses"]]
    for r in [*result["layers"], result["total"]]:
        slots = r["n_neurons"] * result["n_tokens"]
        ratio = f"{r['wanted'] / max(1, r['fired']):.3f}"
        rows.append([r["layer"], f"{r['fired'] / slots:.2%}", f"{r['wanted'] / slots:.2%}", ratio, str(r["misses"])])
    head = f"{result['model']}, {result['n_tokens']} tokens, sketch of {result['bits']} bits, delta {result['delta']:g}"
    return f"{head}\n\n{markdown(rows)}"


def tokens(result: dict[str, Any]) -> str:
    """One row per model and gate."""
    rows = [["model", "gate", "dtype", "memory MB", "tokens equal to dense"]]
    for r in result["rows"]:
        equal = f"{r['equal']} of {r['total']}"
        rows.append([r["model"], r["gate"], r["dtype"].removeprefix("torch."), common.mb(r["memory"]), equal])
    return markdown(rows)


def reads(result: dict[str, Any]) -> str:
    """One row per size and depth, then the gaps."""
    other = result["other"]
    rows = [
        ["KiB a read", "depth", "ours MB/s", f"{other} MB/s", "share", "ours CPU s/GB", f"{other} CPU s/GB", "x CPU"]
    ]
    for r in result["rows"]:
        ours, theirs = r["ours"], r[other]
        speeds = common.mb(ours["bytes_per_s"]), common.mb(theirs["bytes_per_s"])
        cpu = f"{ours['cpu_s_per_gb']:.3f}", f"{theirs['cpu_s_per_gb']:.3f}"
        rows.append([f"{r['size'] >> 10}", str(r["depth"]), *speeds, f"{r['share']:.1%}", *cpu, f"{r['cpu']:.2f}"])
    gaps = [["row KiB", "gap KiB: seconds of reading over it / of another read", "worth up to KiB"]]
    for r in result["gaps"]:
        each = ", ".join(f"{g['gap_bytes'] / 1024:g}: {g['over']:.2f}" for g in r["gaps"])
        gaps.append([f"{r['row_bytes'] / 1024:g}", each, f"{r['break_even_bytes'] / 1024:g}"])
    return f"{markdown(rows)}\n\n{markdown(gaps)}"


def bandwidth(result: dict[str, Any]) -> str:
    """One row per model, then the turns."""
    rows = [
        ["model", "s/token", "MB read per token", "of what is not pinned", "MB/s while generating", "fio MB/s", "share",
         "of each turn"]
    ]  # fmt: skip
    for r in result["rows"]:
        turns = ", ".join(f"{t['ours'] / t['theirs']:.0%}" for t in r["turns"])
        sizes = map(common.mb, (r["bytes_per_s"], r["other_bytes_per_s"]))
        rows.append([
            f"{r['model']} ({r['weights']})", f"{r['s_per_token']:.3f}", common.mb(r["read_bytes_per_token"]),
            f"{r['read_share']:.3f}", *sizes, f"{r['share']:.1%}", turns,
        ])  # fmt: skip
    others = {r["other"] for r in result["rows"]}
    return f"The other side: {', '.join(sorted(others))}, sequential.\n\n{markdown(rows)}"


def kernels(result: dict[str, Any]) -> str:
    """One row per kernel, number of threads, dtype and number of rows."""
    rows = [["kernel", "threads", "dtype", "rows", "GB/s", "sweep GB/s", "share", "sweep in huge pages", "share"]]
    for r in result["rows"]:
        sweeps = f"{r['sweep_gb_per_s']:.1f}", f"{r['share']:.0%}", f"{r['huge_sweep_gb_per_s']:.1f}"
        figures = f"{r['gb_per_s']:.1f}", *sweeps, f"{r['share_of_huge']:.0%}"
        rows.append([r["kernel"], str(r["threads"]), r["dtype"], str(r["rows"]), *figures])
    return markdown(rows)


def scaling(result: dict[str, Any]) -> str:
    """One row per point, series by series."""
    rows = [["series", "model", "cap", "silent", "s/token (range)", "MB read/token", "floor", "no cap", "outcome"]]
    for series, points in result["series"].items():
        for r in points:
            cap = f"{r['share']:.0%} ({common.mb(r['memory'])} MB)"
            silent = f"{1 - r['firing']:.0%}" if "firing" in r else "-"
            figures = ["-"] * 3
            if "s_per_token" in r:
                low, high = r["range"]
                figures = [f"{r['s_per_token']:.3f} ({low:.3f}-{high:.3f})", common.mb(r["read_bytes_per_token"]),
                           f"{r['our_floor']['s_per_token']:.3f}"]  # fmt: skip
            rows.append([series, r["model"], cap, silent, *figures, f"{r['dense_s_per_token']:.3f}", r["words"]])
    head = f"SYNTHETIC models (random weights), gate {result['gate']}, {result['threads']} threads"
    return f"{head}. Floor: what the run read and touched, at the speeds of disk and DRAM.\n\n{markdown(rows)}"


def eviction(result: dict[str, Any]) -> str:
    """One row per policy, then the paper's window."""
    shares, row_bytes, n = result["shares"], result["row_bytes"], result["n_neurons"]
    rows = [["KB read per token, cache of", *(f"{share:.0%} of the FFN" for share in shares)]]
    rows += [[name, *(f"{r * row_bytes / 1e3:.1f}" for r in read)] for name, read in result["read"].items()]
    windows = [["window of k tokens", "KB read per token", "of the FFN in DRAM, at most", "on average"]]
    for w in result["windows"]:
        windows.append(
            [str(w["k"]), f"{w['read'] * row_bytes / 1e3:.1f}", f"{w['most'] / n:.0%}", f"{w['mean'] / n:.0%}"]
        )
    fire = ", ".join(f"{share:.1%}" for share in result["fire_by_layer"])
    head = (
        f"{result['model']}: {n} neurons of {row_bytes} bytes, {result['n_tokens']} tokens, "
        f"{result['fire'] * row_bytes / 1e3:.1f} KB fire per token; by layer {fire}. Simulated on traces."
    )
    return f"{head}\n\n{markdown(rows)}\n\n{markdown(windows)}"


def order(result: dict[str, Any]) -> str:
    """One row per cache size and order."""
    rows = [["cache", "order on flash", "reads per token", "KB read per token", "KB of them missed"]]
    for r in result["rows"]:
        rows.append([f"{r['share']:.0%}", r["order"], *(f"{r[key]:.1f}" for key in ("extents", "kb", "wanted_kb"))])
    head = f"{result['model']}: rows of {result['row_bytes']} bytes, gaps up to {result['max_gap_rows']} rows read over"
    return f"{head}. Simulated on traces.\n\n{markdown(rows)}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "generate": generate, "cap": cap, "footprint": footprint, "load": load, "certified": certified,
    "tokens": tokens, "reads": reads, "bandwidth": bandwidth, "kernels": kernels, "scaling": scaling,
    "eviction": eviction, "order": order,
}  # fmt: skip


def figures() -> str:
    """All results as Markdown, in the order of SECTIONS, then by file name."""
    parts = []
    found = [(json.loads(file.read_text()), file) for file in sorted(RESULTS.glob("*.json"))]
    for name, section in SECTIONS.items():
        for result, file in found:
            if result["benchmark"] == name:
                parts.append(f"### {file.stem}\n\n{section(result)}\n\n{source(result, file)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is not what would be written")
    args = parser.parse_args()
    old = README.read_text()
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{figures()}\n{END}{after}"
    if args.check:
        sys.exit(0 if new == old else "README.md is not current: python benchmarks/table.py")
    README.write_text(new)


if __name__ == "__main__":
    main()
