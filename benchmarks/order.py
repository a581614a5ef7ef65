"""How many extents and bytes does a token read in each order of the neurons on flash?

A text is recorded; its first half says how often neurons fire and which fire together, its second half is read with
the package's own cache (window.py, balance.py) and planner (plan.py, gaps included). The orders: the stock model's, by
frequency, chains of what fires together, chains of what begins to fire together (the package's), and a random one,
which shows what luck gives. The ceiling is one extent a layer and token, without a gap. What is missed does not depend
on the order.

The model is the small ReLU model that ships with hf_flash; --model and --text give others.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import numpy as np
import recorded
from eviction import balanced

SHARES = (0.1, 0.2, 0.5)


def count(missed: list[list[np.ndarray]], rank: list[np.ndarray], gap: int, row_bytes: int) -> dict[str, float]:
    """Extents, kilobytes and rows per token, in the order in which neuron i lies in row rank[layer][i]."""
    from hf_flash.plan import extents

    n_extents, n_rows, n_wanted = 0, 0, 0
    for token in missed:
        for neurons, where in zip(token, rank, strict=True):
            rows = np.sort(where[neurons])
            found = extents(rows, gap)
            n_extents += len(found)
            n_wanted += len(rows)
            n_rows += sum(int(rows[j - 1] - rows[i]) + 1 for i, j in found)
    n = len(missed)
    return {"extents": n_extents / n, "kb": n_rows * row_bytes / 1e3 / n, "wanted_kb": n_wanted * row_bytes / 1e3 / n}


def orders(recording: Any, n_tokens: int, sizes: list[int]) -> dict[str, list[np.ndarray]]:
    """Order -> per layer, the row of each neuron."""
    from hf_flash.order import arrange, co_firing

    fired = [co_firing(recording, layer, n_tokens, 0) for layer in recording.layers]
    begun = [co_firing(recording, layer, n_tokens) for layer in recording.layers]
    random = np.random.default_rng(0)
    by = {
        "stock": [np.arange(n) for n in sizes],
        "random": [random.permutation(n) for n in sizes],
        "by frequency": [np.argsort(-f.begun.numpy(), kind="stable") for f in fired],
        "chains, fire together": [arrange(f).numpy() for f in fired],
        "chains, begin together": [arrange(f).numpy() for f in begun],
    }
    for name, rows in by.items():
        assert all(np.array_equal(np.sort(row), np.arange(len(row))) for row in rows), name
    return {name: [np.argsort(row) for row in rows] for name, rows in by.items()}


def parse() -> argparse.Namespace:
    args = recorded.parse(__doc__, warm=256)
    args.shares = SHARES
    if args.smoke:
        args.tokens, args.warm, args.shares = 96, 8, (0.3,)
    return args


def main() -> None:
    args = parse()
    info = common.begin("order: extents and bytes per token by the order of the neurons on flash")
    with recorded.recording(args) as made:
        if made is None:
            return
        from hf_flash.store import MAX_GAP_BYTES

        recording, row_bytes = made
        half = recording.n_tokens // 2
        sizes = [recording.shape(layer)[1] for layer in recording.layers]
        ranks = orders(recording, half, sizes)
        traces = recorded.traces_of(recording, half, recording.n_tokens)
    gap = MAX_GAP_BYTES // row_bytes
    print(
        f"model: {Path(args.model).name}, {len(sizes)} layers, {row_bytes} bytes a row, gaps up to {gap} rows read "
        f"over; {half} tokens counted, {len(traces[0]) - args.warm} others read\nceiling: {len(sizes)} extents a token"
    )
    results, table = [], [["cache", "order", "extents", "KB read", "of them missed", "KB an extent"]]
    for share in args.shares:
        missed: list[list[np.ndarray]] = []
        read = balanced(traces, sizes, [max(1, int(n * share)) for n in sizes], args.warm, missed=missed)
        assert abs(sum(len(m) for token in missed for m in token) / len(missed) - read) < 1e-6
        for name, rank in ranks.items():
            row = {"share": share, "order": name, **count(missed, rank, gap, row_bytes)}
            results.append(row)
            table.append([
                f"{share:.0%}", name, f"{row['extents']:.1f}", f"{row['kb']:.1f}", f"{row['wanted_kb']:.1f}",
                f"{row['kb'] / max(1e-9, row['extents']):.1f}",
            ])  # fmt: skip
    print(common.table(table))
    right = all(r["kb"] >= r["wanted_kb"] - 1e-9 for r in results)
    head = {"benchmark": "order", "model": Path(args.model).name, "row_bytes": row_bytes, "max_gap_rows": gap}
    common.finish({**head, "rows": results, "right": right, "machine": info}, args.json)


if __name__ == "__main__":
    main()
