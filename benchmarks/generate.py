"""How fast does hf_flash generate under a memory cap, next to the best that transformers can do under the same cap?

For each model and cap (a share of the model's bf16 bytes) every side runs in a fresh interpreter in a memory cgroup of
cap + a bare interpreter, the same for all; model files are evicted first, library files are warm; same prompt, greedy,
same number of tokens; the sides take turns. The sides (sides.py): hf_flash with gate `all` (lossless), accelerate disk
offload with as much in anonymous memory as serves it best (searched for), plain transformers on mmapped weights.

Seconds, CPU seconds (all threads) and disk bytes are per decoded token; the first token is the prefill's and apart.
Every side's tokens are compared with those of the dense model without a cap.
"""

from __future__ import annotations

import statistics
from typing import Any

import cgroup
import common
import footprint
import models
import sides

FIGURES = ("s_per_token", "cpu_s_per_token", "read_bytes_per_token", "prefill_s", "load_s")


def ceilings(model_dir: Any, memory: int, dense: dict[str, Any], bytes_per_s: float) -> dict[str, float]:
    """What no lossless program could beat: bytes that cannot be in DRAM, at the disk's speed.

    A token needs every weight once, save the input embedding of an untied model (one row). At best all of `memory`
    holds weights and the rest is read for every token.
    """
    sizes = sides.tensor_bytes(model_dir)
    needed = sum(sizes.values())
    if "lm_head.weight" in sizes:
        needed -= sizes["model.embed_tokens.weight"]
    must_read = max(0, needed - memory)
    return {
        "disk_bytes_per_s": bytes_per_s,
        "must_read_bytes": must_read,
        "disk_s_per_token": must_read / bytes_per_s,
        "uncapped_s_per_token": dense["s_per_token"],
    }


def measure(run: cgroup.Run, dense: dict[str, Any]) -> dict[str, Any]:
    """One run as a row: figures if it finished, the reason if not."""
    row: dict[str, Any] = {"finished": run.ok, "oom_killed": run.oom_killed, "peak_bytes": run.peak_bytes}
    if not run.ok:
        error = (run.stderr.strip().splitlines() or ["no message"])[-1]
        why = "killed (out of memory)" if run.oom_killed else f"failed: {error[:200]}"
        return {**row, "right": False, "words": why}
    result = run.result()
    keys = (
        "s_per_token",
        "cpu_s_per_token",
        "read_bytes_per_token",
        "prefill_s",
        "prefill_read_bytes",
        "load_s",
        "load_read_bytes",
    )
    row.update({key: result[key] for key in (*keys, "token_s")}, anon_bytes=run.anon_bytes)
    compared = common.compare_tokens(result["tokens"], dense["tokens"], dense["margins"])
    if "stats" in result:
        row["stats"] = {k: v for k, v in result["stats"].items() if isinstance(v, (int, float))}
    return {**row, "right": compared["right"], "words": compared["words"]}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over a side's runs; the range of s/token beside it."""
    done = [row for row in rows if row["finished"]]
    summary: dict[str, Any] = {"runs": rows, "right": all(row["right"] for row in rows), "words": rows[-1]["words"]}
    if len(done) < len(rows):
        summary["words"] = next(row["words"] for row in rows if not row["finished"])
    if done:
        for key in FIGURES:
            summary[key] = statistics.median(row[key] for row in done)
        summary["range"] = [pick(row["s_per_token"] for row in done) for pick in (min, max)]
        if done[0]["peak_bytes"] is not None:
            summary["peak_bytes"] = max(row["peak_bytes"] for row in done)
    return summary


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """One line per side; ratio is its s/token over hf_flash's."""
    ours = found.get("hf_flash", {}).get("s_per_token")
    rows = [["side", "s/token", "range", "CPU s", "MB/token", "prefill s", "load s", "peak MB", "ratio", "tokens"]]
    for side, s in found.items():
        if "s_per_token" not in s:
            rows.append([side, *["-"] * 8, s["words"]])
            continue
        rows.append([
            side, f"{s['s_per_token']:.3f}", "{:.3f}-{:.3f}".format(*s["range"]), f"{s['cpu_s_per_token']:.3f}",
            common.mb(s["read_bytes_per_token"]), f"{s['prefill_s']:.2f}", f"{s['load_s']:.2f}",
            common.mb(s.get("peak_bytes")), f"{s['s_per_token'] / ours:.2f}" if ours else "-", s["words"],
        ])  # fmt: skip
    print(common.table(rows), flush=True)


def one_cap(
    args: Any, spec: dict[str, Any], memory: int, allowance: int, dense: dict[str, Any], capped: bool
) -> dict[str, Any]:
    """All sides under one cap, taking turns; prints ceiling, then measured."""
    limit = memory + allowance if capped else None
    ceiling = ceilings(spec["model_dir"], memory, dense, common.disk_bytes_per_s(spec["model_dir"]))
    least = max(ceiling["disk_s_per_token"], ceiling["uncapped_s_per_token"])
    print(
        f"\nmemory {common.mb(memory)} MB, cgroup {common.mb(limit)} MB\n"
        f"ceiling: {common.mb(ceiling['must_read_bytes'])} MB/token cannot stay in DRAM; disk "
        f"{ceiling['disk_bytes_per_s'] / 1e9:.2f} GB/s, so {ceiling['disk_s_per_token']:.3f} s/token; uncapped compute "
        f"{ceiling['uncapped_s_per_token']:.3f}; no side can be under {least:.3f} s/token",
        flush=True,
    )
    specs = {side: dict(spec) for side in ("hf_flash", *args.peers)}
    specs["hf_flash"]["memory"] = memory
    if "accelerate" in specs:
        n = 1 if args.smoke or limit is None else sides.choose_resident(spec, limit, allowance)
        specs["accelerate"]["n_resident"] = n or 0
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in specs}
    for turn in range(args.runs):
        order = list(specs)[turn % len(specs) :] + list(specs)[: turn % len(specs)]
        for side in order:
            rows[side].append(measure(sides.run_side(side, specs[side], limit, capped), dense))
    found = {side: summarize(rows[side]) for side in specs}
    print_table(found)
    again = common.disk_bytes_per_s(spec["model_dir"])  # other jobs can slow a pass down, none can speed it up
    if again > ceiling["disk_bytes_per_s"]:
        ceiling = ceilings(spec["model_dir"], memory, dense, again)
        print(f"ceiling, disk measured again: {again / 1e9:.2f} GB/s, so {ceiling['disk_s_per_token']:.3f} s/token")
    resident = specs.get("accelerate", {}).get("n_resident")
    return {"memory": memory, "limit_bytes": limit, "ceiling": ceiling, "accelerate_resident": resident, "sides": found}


def one_model(args: Any, name: str, capped: bool) -> dict[str, Any]:
    """All caps of one model."""
    model_dir, converted_dir = models.get(name, args.dir), models.converted(name, args.dir)
    n_bytes = common.safetensors_bytes(model_dir)
    ids = common.prompt_ids(model_dir, args.prompt)
    print(
        f"\nmodel: {name}, {models.describe(name)}; {common.mb(n_bytes)} MB; {len(ids)} tokens in, {args.tokens} out, "
        f"{args.threads} threads"
    )
    base = {"model_dir": str(model_dir), "ids": ids, "n_tokens": args.tokens, "threads": args.threads}
    run = sides.run_side("dense", base, None, capped)
    dense = run.result()
    spec = {**base, "converted_dir": str(converted_dir), "context": len(ids) + args.tokens, "gate": "all"}
    allowance = footprint.allowance() if capped else 0
    print(
        f"dense, no cap: {dense['s_per_token']:.3f} s/token, peak {common.mb(run.peak_bytes)} MB; "
        f"bare interpreter {common.mb(allowance) if capped else '-'} MB"
    )
    sizes = [256 * common.MIB] if args.smoke else [int(n_bytes * share) for share in args.caps]
    caps = [one_cap(args, spec, memory, allowance, dense, capped) for memory in sizes]
    result = {"model": name, "weights": models.describe(name), "model_bytes": n_bytes, "allowance_bytes": allowance}
    result |= {"threads": args.threads, "prompt_tokens": len(ids)}
    return {**result, "dense_s_per_token": dense["s_per_token"], "dense_tokens": dense["tokens"], "caps": caps}


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=common.names(models.MODELS), default=["smollm2", "random-llama"],
                        help="comma-separated (default smollm2,random-llama)")  # fmt: skip
    parser.add_argument(
        "--caps", type=common.shares, default=[0.5, 0.75], help="shares of its bytes (default 0.5,0.75)"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (default 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt (default 32)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; the median counts (default 3)")
    parser.add_argument("--peers", type=common.names(["accelerate", "mmap"]), default=["accelerate", "mmap"],
                        help="sides beside hf_flash (default accelerate,mmap; '' for none)")  # fmt: skip
    args = parser.parse_args()
    if args.smoke:
        args.models, args.tokens, args.prompt, args.runs = ["tiny"], 4, 8, 1
    return args


def main() -> None:
    args = parse()
    info = common.begin("generate: seconds and disk bytes per token under a memory cap, hf_flash and transformers")
    why = cgroup.why_unavailable()
    if why:
        print(f"no cap is enforced here, so the peers run from memory and the comparison means nothing: {why}")
    found = [one_model(args, name, why is None) for name in args.models]
    sides_found = [side for m in found for cap in m["caps"] for side in cap["sides"].items()]
    right = all(s["right"] for name, s in sides_found if name == "hf_flash")
    result = {"benchmark": "generate", "enforced": why is None, "models": found, "right": right, "machine": info}
    common.finish(result, args.json)
    if not right:
        raise SystemExit("generate: a run of hf_flash failed or gave other tokens than the dense model")


if __name__ == "__main__":
    main()
