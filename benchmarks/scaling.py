"""How does hf_flash's token time change with the model's size, the memory cap and the sparsity?

Three series on SYNTHETIC models, each run like those of generate.py (cgroup, cold files, tokens compared with dense):

- `cap`: one model at 30 % to 100 % of its bytes;
- `size`: OPT shapes from 125 M to 1.3 B parameters, each at half its bytes;
- `sparsity`: one OPT shape with 90, 95, 97 and 99 % of its neurons silent, at half its bytes. These models are made for
  the run and deleted after it.

A cap that hf_flash refuses as too small is a row that says so.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import cgroup
import common
import floors
import footprint
import generate
import models
import sides
import synthetic

SERIES = ("cap", "size", "sparsity")
SMOKE_MEMORY = 256 * common.MIB


def dense_run(args: Any, model_dir: Path, ids: list[int], capped: bool) -> dict[str, Any]:
    """The tokens that every run must give, and the time without a cap."""
    spec = {"model_dir": str(model_dir), "ids": ids, "n_tokens": args.tokens, "threads": args.threads}
    return sides.run_side("dense", spec, None, capped).result()


def point(
    args: Any, folders: tuple[Path, Path], share: float, dense: dict[str, Any], ids: list[int], allowance: int | None
) -> dict[str, Any]:
    """One model under one cap: the median run, its floor, and what can be said of the outcome."""
    model_dir, converted_dir = folders
    n_bytes = common.safetensors_bytes(model_dir)
    memory = SMOKE_MEMORY if args.smoke else int(n_bytes * share)
    spec = {
        "model_dir": str(model_dir), "converted_dir": str(converted_dir), "ids": ids, "n_tokens": args.tokens,
        "threads": args.threads, "context": len(ids) + args.tokens, "gate": args.gate, "memory": memory,
    }  # fmt: skip
    limit = None if allowance is None else memory + allowance
    capped = allowance is not None
    runs = [generate.measure(sides.run_side("hf_flash", spec, limit, capped), dense) for _ in range(args.runs)]
    found = generate.summarize(runs)
    row = {"memory": memory, "share": share, "model_bytes": n_bytes, "dense_s_per_token": dense["s_per_token"]}
    row |= {key: found[key] for key in (*generate.FIGURES, "range", "right", "words", "peak_bytes") if key in found}
    if "s_per_token" not in found:
        return row
    speeds = generate.speeds(model_dir, args.threads)
    best = min((r for r in runs if r["finished"]), key=lambda r: r["s_per_token"])
    spec["n_neurons"] = floors.n_neurons(model_dir)
    return {**row, "floor": floors.lossless(model_dir, memory, speeds), "our_floor": floors.ours(spec, best, speeds)}


def say(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as soon as it is there."""
    what = f"{row['model']}, {row['share']:.0%}" + (f", {1 - row['firing']:.1%} silent" if "firing" in row else "")
    if "s_per_token" in row:
        figures = f"{row['s_per_token']:.3f} s/token, {common.mb(row['read_bytes_per_token'])} MB/token"
        print(f"  {what}: {figures}, floor {row['our_floor']['s_per_token']:.3f}; {row['words']}", flush=True)
    else:
        print(f"  {what}: {row['words']}", flush=True)
    return row


def existing(args: Any, name: str, caps: list[float], allowance: int | None) -> list[dict[str, Any]]:
    """Rows of a model that models.py keeps."""
    folders = models.get(name, args.dir), models.converted(name, args.dir, **dict(args.convert))
    ids = common.prompt_ids(folders[0], args.prompt)
    dense = dense_run(args, folders[0], ids, allowance is not None)
    about = {"model": name, "weights": models.describe(name)}
    return [say({**about, **point(args, folders, share, dense, ids, allowance)}) for share in caps]


def planted(args: Any, name: str, firing: float, allowance: int | None) -> dict[str, Any]:
    """The row of a model that is made with `firing` of its neurons active, and deleted."""
    home = models.cache_dir(args.dir)
    home.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="scaling-", dir=home))
    try:
        model_dir = synthetic.planted_opt(work / f"synthetic-{name}", name, firing)
        flash_dir = work / "flash"
        models.repack(model_dir, flash_dir, dict(args.convert))
        ids = common.prompt_ids(model_dir, args.prompt)
        dense = dense_run(args, model_dir, ids, allowance is not None)
        about = {"model": name, "weights": models.describe(name), "firing": firing}
        return say({**about, **point(args, (model_dir, flash_dir), args.share, dense, ids, allowance)})
    finally:
        shutil.rmtree(work)


def parse() -> Any:
    parser = common.parser(__doc__)
    names = common.names(models.MODELS)
    parser.add_argument("--series", type=common.names(SERIES), default=list(SERIES), help="(default cap,size,sparsity)")
    parser.add_argument("--cap-model", default="opt-1.3b", choices=sorted(models.MODELS), help="(default opt-1.3b)")
    parser.add_argument("--sizes", type=names, default=["opt-125m", "opt-350m", "opt-1.3b"],
                        help="models of the series size (default opt-125m,opt-350m,opt-1.3b)")  # fmt: skip
    parser.add_argument("--sparse-model", default="opt-350m", choices=sorted(synthetic.OPTS), help="(default opt-350m)")
    parser.add_argument("--caps", type=common.shares, default=[0.3, 0.4, 0.5, 0.6, 0.8, 1.0],
                        help="shares of the series cap (default 0.3,0.4,0.5,0.6,0.8,1)")  # fmt: skip
    parser.add_argument("--firing", type=common.shares, default=[0.10, 0.05, 0.03, 0.01],
                        help="active shares of the series sparsity (default 0.1,0.05,0.03,0.01)")  # fmt: skip
    parser.add_argument("--share", type=float, default=0.5, help="cap of the series size and sparsity (default 0.5)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (default 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt (default 32)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (default 3)")
    parser.add_argument("--gate", choices=["auto", "all", "certified"], default="auto", help="(default auto)")
    parser.add_argument("--convert", nargs="*", metavar="OPTION=VALUE", type=models.option, default=[],
                        help="arguments of hf_flash.repack for the converted folders")  # fmt: skip
    args = parser.parse_args()
    if args.smoke:
        args.cap_model, args.sizes, args.sparse_model = "tiny-opt", ["tiny-opt", "tiny"], "tiny-opt"
        args.caps, args.firing, args.tokens, args.prompt, args.runs = [1.0], [0.05], 4, 8, 1
    return args


def main() -> None:
    args = parse()
    info = common.begin("scaling: token time against size, cap and sparsity")
    why = cgroup.why_unavailable()
    if why:
        print(f"no cap is enforced here: {why}")
    allowance = footprint.allowance() if why is None else None
    found: dict[str, list[dict[str, Any]]] = {}
    for series in args.series:
        print(series)
        if series == "cap":
            found[series] = existing(args, args.cap_model, args.caps, allowance)
        elif series == "size":
            found[series] = [row for name in args.sizes for row in existing(args, name, [args.share], allowance)]
        else:
            found[series] = [planted(args, args.sparse_model, firing, allowance) for firing in args.firing]
    done = [row for rows in found.values() for row in rows if "s_per_token" in row]
    right = bool(done) and all(row["right"] for row in done)
    settings = {"threads": args.threads, "gate": args.gate, "tokens": args.tokens, "prompt_tokens": args.prompt}
    result = {"benchmark": "scaling", "enforced": why is None, **settings, "series": found, "right": right}
    common.finish({**result, "machine": info}, args.json)
    if not right:
        raise SystemExit("scaling: no run finished, or one gave other tokens than the dense model")


if __name__ == "__main__":
    main()
