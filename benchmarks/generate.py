"""How fast does hf_flash generate under a memory cap, next to the best that others can do under the same cap?

For each model and cap (a share of the model's bf16 bytes) every side runs in a fresh interpreter in a memory cgroup of
cap + a bare interpreter, the same for all; model files are evicted first, library files are warm; same prompt, greedy,
same number of tokens; the sides take turns. The sides (sides.py, peers.py): hf_flash; accelerate disk offload with as
much in anonymous memory as serves it best (searched for), and as it comes; plain transformers on mmapped weights;
AirLLM as shipped and without its garbage collector; llama.cpp on an mmapped GGUF.

Seconds, CPU seconds (all threads) and disk bytes are per decoded token; the first token is the prefill's and apart.
Every side's tokens are compared with those of the dense model without a cap. The floors (floors.py) say what the
machine allows. The large models are run only when they are named; --peer-tokens keeps their slow peers short.
"""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import cgroup
import common
import floors
import footprint
import models
import peers
import sides

FIGURES = ("s_per_token", "cpu_s_per_token", "read_bytes_per_token", "prefill_s", "load_s")


def speeds(model_dir: Any, threads: int) -> dict[str, float]:
    """Ceilings of the machine, measured now."""
    return {
        "disk_bytes_per_s": common.disk_bytes_per_s(model_dir),
        "memory_bytes_per_s": common.memory_bytes_per_s(threads),
    }


def measure(run: cgroup.Run, dense: dict[str, Any], whose: str = "") -> dict[str, Any]:
    """One run as a row: figures if it finished, the reason if not; `whose` tokens: added to the words."""
    row: dict[str, Any] = {"finished": run.ok, "oom_killed": run.oom_killed, "peak_bytes": run.peak_bytes}
    if not run.ok:
        error = (run.stderr.strip().splitlines() or ["no message"])[-1]
        error = re.sub(r"(/[^\s:]+)+/", "", error)  # no folders of this machine
        why = "killed (out of memory)" if run.oom_killed else f"failed: {error[:120]}"
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
    if "stats" in result:
        row["stats"] = {k: v for k, v in result["stats"].items() if isinstance(v, (int, float))}
        plan = result["stats"]["plan"]
        of_plan = {"sketch_bytes": plan["parts"].get("gates", 0), "resident_bytes": plan["parts"]["resident matrices"]}
        row["stats"] |= of_plan | {"gate_bits": plan["gate_bits"]}
    n = len(result["tokens"])
    equal = common.compare_tokens(result["tokens"], dense["tokens"][:n], dense["margins"])
    return {**row, "right": equal["right"], "words": equal["words"] + whose}


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
    rows = [
        ["side", "s/token", "range", "CPU s", "MB/token", "GB/s", "prefill s", "load s", "peak MB", "ratio", "tokens"]
    ]
    for side, s in found.items():
        if "s_per_token" not in s:
            rows.append([side, *["-"] * 9, s["words"]])
            continue
        rows.append([
            side, f"{s['s_per_token']:.3f}", "{:.3f}-{:.3f}".format(*s["range"]), f"{s['cpu_s_per_token']:.3f}",
            common.mb(s["read_bytes_per_token"]), f"{s['read_bytes_per_token'] / s['s_per_token'] / 1e9:.2f}",
            f"{s['prefill_s']:.2f}", f"{s['load_s']:.2f}",
            common.mb(s.get("peak_bytes")), f"{s['s_per_token'] / ours:.2f}" if ours else "-", s["words"],
        ])  # fmt: skip
    print(common.table(rows), flush=True)


def side_specs(args: Any, spec: dict[str, Any], memory: int, limit: int | None, allowance: int) -> dict[str, Any]:
    """What each side is told; a side that cannot run here is a sentence."""
    specs: dict[str, Any] = {"hf_flash": {**spec, "memory": memory}}
    for side in args.peers:
        why = peers.why_not(side, spec, args.dir)
        if why:
            specs[side] = why
            print(f"{side}: {why}", flush=True)
            continue
        specs[side] = peers.prepare(side, {**spec, "n_tokens": args.peer_tokens or args.tokens}, args.dir)
    if "accelerate" in specs:
        n = args.accelerate_layers
        if n is None:
            n = 1 if args.smoke or limit is None else sides.choose_resident(specs["accelerate"], limit, allowance)
        specs["accelerate"]["n_resident"] = n or 0
    if isinstance(specs.get("llama.cpp"), dict) and limit is not None and not args.smoke:
        specs["llama.cpp"]["threads"] = sides.choose_threads(specs["llama.cpp"], limit)
    return specs


def one_cap(
    args: Any, spec: dict[str, Any], memory: int, allowance: int, dense: dict[str, Any], capped: bool
) -> dict[str, Any]:
    """All sides under one cap, taking turns; prints the floors, then what was measured."""
    limit = memory + allowance if capped else None
    found_speeds = speeds(spec["model_dir"], spec["threads"])
    print(
        f"\nmemory {common.mb(memory)} MB, cgroup {common.mb(limit)} MB; disk "
        f"{found_speeds['disk_bytes_per_s'] / 1e9:.2f} GB/s, DRAM {found_speeds['memory_bytes_per_s'] / 1e9:.1f} GB/s; "
        f"uncapped {dense['s_per_token']:.3f} s/token\n"
        f"{floors.in_words('floor, every bf16 weight', floors.lossless(spec['model_dir'], memory, found_speeds))}",
        flush=True,
    )
    specs = side_specs(args, spec, memory, limit, allowance)
    can_run = [side for side in specs if isinstance(specs[side], dict)]
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in can_run}
    after = common.memory_bytes_per_s(spec["threads"])
    for turn in range(args.runs):
        start = turn % len(can_run)
        for side in can_run[start:] + can_run[:start]:
            if args.settle:
                common.disk_passes(spec["model_dir"], args.settle)
            run = sides.run_side(side, specs[side], limit, capped)
            gelu = peers.reference(side, spec) == "dense-gelu"
            row = measure(run, spec["gelu"], " to dense with GELU") if gelu else measure(run, dense)
            # Neighbours on the host make DRAM half as fast again, or not, from one minute to the next.
            before, after = after, common.memory_bytes_per_s(spec["threads"])
            row["memory_bytes_per_s"] = max(before, after)
            rows[side].append(row)
    not_run = {"right": True, "runs": []}
    found = {side: summarize(rows[side]) if side in rows else {**not_run, "words": specs[side]} for side in specs}
    print_table(found)
    # Other jobs slow a pass down and virtual disks serve bursts: the ceiling is the fastest that was seen.
    seen = [
        row["read_bytes_per_token"] / row["s_per_token"] for side in rows.values() for row in side if row["finished"]
    ]
    again = common.disk_bytes_per_s(spec["model_dir"])
    found_speeds["disk_bytes_per_s"] = max(again, found_speeds["disk_bytes_per_s"], *seen)
    every = (row["memory_bytes_per_s"] for side in rows.values() for row in side)
    found_speeds["memory_bytes_per_s"] = max(found_speeds["memory_bytes_per_s"], *every)
    result = {"memory": memory, "limit_bytes": limit, "speeds": found_speeds, "sides": found}
    result["floor"] = floors.lossless(spec["model_dir"], memory, found_speeds)
    result["accelerate_resident"] = specs.get("accelerate", {}).get("n_resident")
    if "llama.cpp" in rows:
        result["llama_threads"] = specs["llama.cpp"]["threads"]
    return {**result, **our_floor(spec, found["hf_flash"], found_speeds, result["floor"])}


def our_floor(
    spec: dict[str, Any], ours: dict[str, Any], found_speeds: dict[str, float], lossless: dict[str, float]
) -> dict[str, Any]:
    """The floors of our runs by DRAM's speed around each; printed for the run in the middle of their ratios to it."""
    spec = {**spec, "n_neurons": floors.n_neurons(spec["model_dir"])}
    found = []
    for row in ours["runs"]:
        if row["finished"]:
            speeds = {**found_speeds, "memory_bytes_per_s": row["memory_bytes_per_s"]}
            floor = floors.ours(spec, row, speeds)
            found.append((row["s_per_token"] / floor["s_per_token"], floor, speeds["memory_bytes_per_s"]))
    if not found:
        return {}
    found.sort(key=lambda one: one[0])
    ratio, floor, speed = found[len(found) // 2]
    every = ", ".join(f"{one:.2f} at {memory / 1e9:.0f} GB/s" for one, _, memory in found)
    print(floors.in_words("floor, every bf16 weight, at the fastest rates seen", lossless))
    print(
        f"{floors.in_words('floor, what hf_flash read and touched', floor)}, with DRAM at {speed / 1e9:.1f} GB/s "
        f"around that run; its token / floor {ratio:.2f} (runs: {every})"
    )
    return {"our_floor": floor, "token_over_floor": ratio, "tokens_over_floors": [one for one, _, _ in found]}


def one_model(args: Any, name: str, capped: bool) -> dict[str, Any]:
    """All caps of one model."""
    model_dir, converted_dir = models.get(name, args.dir), models.converted(name, args.dir, **dict(args.convert))
    n_bytes = common.safetensors_bytes(model_dir)
    ids = common.prompt_ids(model_dir, args.prompt)
    print(
        f"\nmodel: {name}, {models.describe(name)}; {common.mb(n_bytes)} MB; {len(ids)} tokens in, {args.tokens} out, "
        f"{args.threads} threads, gate {args.gate}"
    )
    base = {"model_dir": str(model_dir), "ids": ids, "n_tokens": args.tokens, "threads": args.threads}
    run = sides.run_side("dense", base, None, capped)
    dense = run.result()
    spec = {**base, "converted_dir": str(converted_dir), "context": len(ids) + args.tokens, "gate": args.gate}
    can_run = [side for side in args.peers if not peers.why_not(side, spec, args.dir)]
    if any(peers.reference(side, spec) == "dense-gelu" for side in can_run):
        spec["gelu"] = sides.run_side("dense-gelu", base, None, capped).result()
    allowance = footprint.allowance() if capped else 0
    print(
        f"dense, no cap: {dense['s_per_token']:.3f} s/token, peak {common.mb(run.peak_bytes)} MB; "
        f"bare interpreter {common.mb(allowance) if capped else '-'} MB"
    )
    sizes = [256 * common.MIB] if args.smoke else [int(n_bytes * share) for share in args.caps]
    caps = [one_cap(args, spec, memory, allowance, dense, capped) for memory in sizes]
    if args.drop_copies:
        peers.drop_copies(model_dir)
    result = {"model": name, "weights": models.describe(name), "model_bytes": n_bytes, "allowance_bytes": allowance}
    result |= {"threads": args.threads, "prompt_tokens": len(ids), "gate": args.gate}
    if (model_dir / "planted.json").is_file():
        planted = json.loads((model_dir / "planted.json").read_text())
        result["planted"] = {key: planted[key] for key in ("firing", "hits", "union", "ever", "n_tokens")}
    return {**result, "dense_s_per_token": dense["s_per_token"], "dense_tokens": dense["tokens"], "caps": caps}


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=common.names(models.MODELS), default=list(models.DEFAULT),
                        help=f"of {', '.join(models.MODELS)} (default {','.join(models.DEFAULT)})")  # fmt: skip
    parser.add_argument(
        "--caps", type=common.shares, default=[0.5, 0.75], help="shares of its bytes (default 0.5,0.75)"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (default 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt (default 32)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; the median counts (default 3)")
    parser.add_argument("--peers", type=common.names(peers.PEERS), default=list(peers.PEERS),
                        help=f"sides beside hf_flash (default {','.join(peers.PEERS)}; '' for none)")  # fmt: skip
    parser.add_argument(
        "--peer-tokens", type=int, help="tokens for the peers, where each takes long (default: --tokens)"
    )
    parser.add_argument("--settle", type=int, default=0, metavar="N",
                        help="before each run read 512 MiB N times, past the cache: spends a disk's burst credit "
                             "(default 0)")  # fmt: skip
    parser.add_argument("--gate", choices=["auto", "all", "certified"], default="auto", help="(default auto)")
    parser.add_argument("--convert", nargs="*", metavar="OPTION=VALUE", type=models.option, default=[],
                        help="arguments of hf_flash.repack for the converted folder")  # fmt: skip
    parser.add_argument("--accelerate-layers", type=int, metavar="N",
                        help="layers that accelerate keeps resident (default: the best, found by trying)")  # fmt: skip
    parser.add_argument("--drop-copies", action="store_true", help="delete AirLLM's and llama.cpp's weights afterwards")
    args = parser.parse_args()
    if args.smoke:
        args.models, args.tokens, args.prompt, args.runs = ["tiny", "tiny-opt"], 4, 8, 1
    return args


def main() -> None:
    args = parse()
    info = common.begin("generate: seconds and disk bytes per token under a memory cap, hf_flash and its peers")
    why = cgroup.why_unavailable()
    if why:
        print(f"no cap is enforced here, so the peers run from memory and the comparison means nothing: {why}")
    info["peers"] = peers.versions(args.dir)
    found = [one_model(args, name, why is None) for name in args.models]
    sides_found = [side for m in found for cap in m["caps"] for side in cap["sides"].items()]
    right = all(s["right"] for name, s in sides_found if name == "hf_flash")
    result = {"benchmark": "generate", "enforced": why is None, "models": found, "right": right, "machine": info}
    common.finish(result, args.json)
    if not right:
        raise SystemExit("generate: a run of hf_flash failed or gave other tokens than the dense model")


if __name__ == "__main__":
    main()
