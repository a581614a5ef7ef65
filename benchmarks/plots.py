"""Draw the figures of the documentation from the files in benchmarks/results (needs matplotlib: `hf_flash[bench]`).

- `docs/img/generate-MODEL.png`: seconds per token by side and cap, out of generate*.json; the floor as a line;
- `docs/img/scaling-SERIES.png`: token time by cap, size or sparsity, out of scaling*.json;
- `docs/img/eviction*.png`: bytes read per token by cache size and policy, out of eviction*.json.

    python benchmarks/plots.py
"""

# ruff: noqa: PLC0415  (--help needs no matplotlib)
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import table

OUT = common.REPO / "docs" / "img"
OURS, THEIRS, FLOOR, DENSE = "#c2410c", "#64748b", "#111827", "#2563eb"


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    return figure, axes


def save(figure: Any, file: Path) -> Path:
    """Write a PNG that is the same for the same results."""
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return file


def caption(axes: Any, title: str, result: dict[str, Any]) -> None:
    """Title, and where the figures come from."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['n_cpus']} CPUs; commit {machine['commit']}, {result['when'][:10]}"
    axes.figure.suptitle(f"{title}\n{where}", fontsize=9, x=0.01, ha="left")


def bars(result: dict[str, Any], m: dict[str, Any], file: Path) -> Path:
    """Seconds per token of one model: a group of bars for each cap, hf_flash's in colour."""
    caps = [c for c in m["caps"] if any("s_per_token" in s for s in c["sides"].values())]
    n_bars = sum(1 + len(c["sides"]) for c in caps)
    figure, axes = new_axes(7, 1.2 + 0.3 * n_bars)
    at, ticks = 0.0, []
    for c in caps:
        least = c.get("our_floor") or c.get("floor")
        for side, s in c["sides"].items():
            label = f"{table.side_label(side, c)}, {c['memory'] / m['model_bytes']:.0%}"
            ticks.append((at, label))
            if "s_per_token" in s:
                axes.barh(at, s["s_per_token"], color=OURS if side == "hf_flash" else THEIRS)
                axes.text(s["s_per_token"], at, f" {s['s_per_token']:.2f}", va="center", fontsize=8)
            else:
                axes.text(0, at, f" {s['words']}", va="center", fontsize=8, color=THEIRS)
            if side == "hf_flash" and least:
                axes.plot([least["s_per_token"]] * 2, [at - 0.45, at + 0.45], color=FLOOR, linewidth=2)
            at += 1
        at += 0.7
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds per token under the cap (less is better; black: floor of disk and DRAM)", fontsize=8)
    synthetic = ", RANDOM weights" if "RANDOM" in m["weights"] else ""
    caption(axes, f"{m['model']}{synthetic}, {m['model_bytes'] / 1e9:.2f} GB; share: memory cap / model bytes", result)
    return save(figure, file)


AXES = {
    "cap": ("memory cap, % of the model's bytes", lambda row: 100 * row["share"]),
    "size": ("model, GB", lambda row: row["model_bytes"] / 1e9),
    "sparsity": ("silent neurons, %", lambda row: 100 * (1 - row["firing"])),
}


def curve(result: dict[str, Any], series: str, file: Path) -> Path | None:
    """Token time of one series, its floor, and the dense model without a cap."""
    label, x_of = AXES[series]
    rows = sorted((row for row in result["series"][series] if "s_per_token" in row), key=x_of)
    if not rows:
        return None
    xs = [x_of(row) for row in rows]
    figure, axes = new_axes(6, 3.6)
    lines = (
        ("hf_flash under the cap", OURS, "o-", lambda row: row["s_per_token"]),
        ("floor: what it reads and touches", FLOOR, ":", lambda row: row["our_floor"]["s_per_token"]),
        ("floor: every bf16 weight", THEIRS, "--", lambda row: row["floor"]["s_per_token"]),
        ("dense, no cap", DENSE, "-.", lambda row: row["dense_s_per_token"]),
    )
    for name, colour, style, y_of in lines:
        axes.plot(xs, [y_of(row) for row in rows], style, color=colour, label=name)
    low, high = ([row["range"][i] for row in rows] for i in (0, 1))
    axes.fill_between(xs, low, high, color=OURS, alpha=0.15)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("seconds per token", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    names = sorted({row["model"] for row in rows})
    caption(axes, f"{', '.join(names)} (SYNTHETIC), gate {result['gate']}, {result['threads']} threads", result)
    return save(figure, file)


EVICTION = (  # policy, what the legend calls it, colour, style
    ("LRU", "LRU", THEIRS, "--"),
    ("LFU", "LFU", THEIRS, "-."),
    ("hottest half pinned, LRU", "hottest half pinned, LRU", THEIRS, ":"),
    ("window of 5, then LFU aged (before)", "window of 5, then aged LFU", DENSE, "--"),
    ("LFU aged, evicted ones remembered", "aged LFU that remembers", DENSE, "-"),
    ("LRU, one pool", "LRU, one pool for all layers", "#0f766e", "--"),
    ("hf_flash: that, a soft window, slots by layer", "hf_flash", OURS, "o-"),
    ("optimum, each layer alone", "optimum (Belady), each layer alone", FLOOR, ":"),
    ("optimum, one pool", "optimum (Belady), one pool", FLOOR, "-"),
)


def eviction(result: dict[str, Any], file: Path) -> Path:
    """Kilobytes per token against the cache, a line a policy; the paper's window by the slots that it needs."""
    figure, axes = new_axes(7, 4.4)
    xs = [100 * share for share in result["shares"]]
    for name, label, colour, style in EVICTION:
        ys = [n * result["row_bytes"] / 1e3 for n in result["read"][name]]
        axes.plot(xs, ys, style, color=colour, label=label, markersize=4, linewidth=1.4)
    points = [
        (100 * w["most"] / result["n_neurons"], w["read"] * result["row_bytes"] / 1e3, w["k"])
        for w in result["windows"]
    ]
    axes.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        "s",
        color="#7c3aed",
        label="window of k tokens",
        markersize=4,
    )
    for x, y, k in points:
        axes.annotate(f"k={k}", (x, y), fontsize=7, color="#7c3aed", xytext=(3, 3), textcoords="offset points")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cache, % of all FFN weights (window of k tokens: the most that it held)", fontsize=8)
    axes.set_ylabel("KB read per token", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    caption(axes, f"{result['model']}: what a token reads, by who stays in DRAM (traces, simulated)", result)
    return save(figure, file)


def draw(results: Path, out: Path) -> list[Path]:
    """Every figure that the results allow."""
    made: list[Path | None] = []
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text())
        if result["benchmark"] == "generate":
            for m in result["models"]:
                name = file.stem if file.stem.endswith(m["model"]) else f"{file.stem}_{m['model']}"
                made.append(bars(result, m, out / f"{name}.png"))
        if result["benchmark"] == "scaling":
            made += [curve(result, series, out / f"{file.stem}-{series}.png") for series in result["series"]]
        if result["benchmark"] == "eviction":
            made.append(eviction(result, out / f"{file.stem}.png"))
    return [file for file in made if file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=table.RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the PNG files (default docs/img)")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("plots: matplotlib is not installed: pip install 'hf_flash[bench]'") from None
    for file in draw(args.results, args.out):
        print(file.name)


if __name__ == "__main__":
    main()
