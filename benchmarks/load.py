"""How much does from_pretrained of a converted folder read from disk, next to what stays resident?

Everything is evicted first. A child imports the packages, loads the converted folder and compares its own disk reads
(/proc/self/io) during that call with the bytes that the folder stores of what is in DRAM afterwards, gates included
(bfloat16 matrices take fewer there). More than 1.2 times those would mean that loading touches weights that belong on
flash.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cgroup
import common
import models
import sides

LIMIT = 1.2


def stored_resident_bytes(folder: Path, plan: dict[str, Any]) -> int:
    """What a converted folder stores of all that the plan keeps in DRAM, FFNs apart: they come as they are needed."""
    from hf_flash.format import read_header  # noqa: PLC0415  (--help needs no torch)

    files = [file for file in folder.glob("*.safetensors") if not file.name.startswith(("flash-", "gates"))]
    kept = {name: entry.n_bytes for file in files for name, entry in read_header(file).entries.items()}
    on_flash = {f"{path}.weight" for path in plan["streamed"]}
    return sum(n for name, n in kept.items() if name not in on_flash) + plan["parts"].get("gates", 0)


def one_model(args, name: str, n_runs: int, capped: bool) -> dict:
    """Load one model cold `n_runs` times; the worst counts."""
    model_dir, converted_dir = models.get(name, args.dir), models.converted(name, args.dir)
    n_bytes = common.safetensors_bytes(model_dir)
    memory = cgroup.parse_size("128MiB") if name == "tiny" else int(n_bytes * args.cap)
    spec = {
        "converted_dir": str(converted_dir),
        "memory": memory,
        "context": 256,
        "n_tokens": 0,
        "threads": args.threads,
    }
    results = [sides.run_side("hf_flash", spec, None, capped).result() for _ in range(n_runs)]
    worst = max(results, key=lambda r: r["load_read_bytes"])
    resident = stored_resident_bytes(Path(converted_dir), worst["stats"]["plan"])
    ratio = worst["load_read_bytes"] / resident
    return {
        "model": name,
        "weights": models.describe(name),
        "model_bytes": n_bytes,
        "memory": memory,
        "resident_bytes": resident,
        "read_bytes": worst["load_read_bytes"],
        "ratio": ratio,
        "load_s": min(r["load_s"] for r in results),
        # Of the tiny model the files' headers and configs are most of what is read.
        "right": ratio <= LIMIT or n_bytes < 10 * common.MIB,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=common.names(models.MODELS), default=["smollm2", "random-llama"],
                        help="comma-separated (default smollm2,random-llama)")  # fmt: skip
    parser.add_argument("--cap", type=float, default=0.75, help="memory as a share of the model (default 0.75)")
    parser.add_argument("--runs", type=int, default=2, help="cold loads per model; the worst counts (default 2)")
    args = parser.parse_args()
    info = common.begin("load: disk bytes read by from_pretrained of a converted folder, cold")
    capped = cgroup.why_unavailable() is None
    names = ["tiny"] if args.smoke else args.models
    rows = [one_model(args, name, 1 if args.smoke else args.runs, capped) for name in names]
    print(f"ceiling: resident bytes x 1.00 (each read once); allowed x {LIMIT}")
    table = [["model", "model MB", "resident MB", "read MB", "ratio", "load s"]]
    for r in rows:
        sizes = map(common.mb, (r["model_bytes"], r["resident_bytes"], r["read_bytes"]))
        table.append([f"{r['model']} ({r['weights']})", *sizes, f"{r['ratio']:.3f}", f"{r['load_s']:.2f}"])
    print(common.table(table))
    right = all(r["right"] for r in rows)
    common.finish({"benchmark": "load", "limit": LIMIT, "rows": rows, "right": right, "machine": info}, args.json)
    if not right:
        raise SystemExit(f"load: more than {LIMIT} times the resident bytes were read")


if __name__ == "__main__":
    main()
