"""Does the memory cap hold: does hf_flash finish in a cgroup of `memory` + a bare interpreter?

SmolLM2-135M runs with `FlashConfig(memory=...)` at 70 % and 50 % of its bf16 bytes, in a cgroup of that plus the
footprint of an interpreter that imported the same packages and did nothing (footprint.py, the smaller, `warm` one; the
library files are warm in the run, too). The run must finish, not be killed, and give the tokens of the dense model.
"""

from __future__ import annotations

import cgroup
import common
import footprint
import models
import sides


def one_cap(spec: dict, memory: int, limit: int | None, dense: dict, capped: bool) -> dict:
    """Run under one cap; returns what happened, in numbers and words."""
    run = sides.run_side("hf_flash", {**spec, "memory": memory}, limit, capped)
    row = {
        "memory": memory,
        "limit_bytes": limit,
        "finished": run.ok,
        "oom_killed": run.oom_killed,
        "peak_bytes": run.peak_bytes,
        "anon_bytes": run.anon_bytes,
    }
    if not run.ok:
        error = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return {**row, "right": False, "words": "KILLED" if run.oom_killed else f"FAILED: {error[:300]}"}
    result = run.result()
    compared = common.compare_tokens(result["tokens"], dense["tokens"], dense["margins"])
    row.update({key: result[key] for key in ("s_per_token", "read_bytes_per_token", "prefill_s", "load_s")})
    return {**row, "right": compared["right"], "words": f"finished, tokens {compared['words']}"}


def measure(args, name: str, capped: bool) -> tuple[int, int, list[dict]]:
    """Print the ceiling and the table for one model; returns its bytes, the allowance and the rows."""
    model_dir, converted_dir = models.get(name, args.dir), models.converted(name, args.dir)
    n_bytes = common.safetensors_bytes(model_dir)
    n_tokens = 8 if args.smoke else args.tokens
    ids = common.prompt_ids(model_dir, 32)
    spec = {"model_dir": str(model_dir), "ids": ids, "n_tokens": n_tokens, "threads": args.threads}
    dense = sides.run_side("dense", spec, None, capped).result()
    spec.update(converted_dir=str(converted_dir), context=32 + n_tokens, gate="all")
    allowance = footprint.allowance() if capped else 0
    caps = [cgroup.parse_size("128MiB")] if args.smoke else [int(n_bytes * share) for share in args.caps]
    print(f"model: {name}, {models.describe(name)}; {common.mb(n_bytes)} MB; 32 tokens in, {n_tokens} out, gate all")
    if capped:
        print(f"ceiling: the cgroup's limit, memory + {common.mb(allowance)} MB (bare interpreter, measured just now)")
    rows = [one_cap(spec, memory, memory + allowance if capped else None, dense, capped) for memory in caps]
    head = ["memory MB", "of model", "limit MB", "peak MB", "anonymous MB", "s/token", "outcome"]
    print_rows = [head]
    for row in rows:
        print_rows.append([
            common.mb(row["memory"]), f"{row['memory'] / n_bytes:.0%}", common.mb(row["limit_bytes"]),
            common.mb(row["peak_bytes"]), common.mb(row["anon_bytes"]),
            f"{row['s_per_token']:.3f}" if "s_per_token" in row else "-", row["words"],
        ])  # fmt: skip
    print(common.table(print_rows))
    return n_bytes, allowance, rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="smollm2", choices=sorted(models.MODELS), help="default smollm2")
    parser.add_argument("--caps", type=common.shares, default=[0.7, 0.5], help="shares of the model (default 0.7,0.5)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate (default 32)")
    args = parser.parse_args()
    info = common.begin("cap: does hf_flash finish in a memory cgroup of its budget + a bare interpreter?")
    why = cgroup.why_unavailable()
    if why:
        print(f"no cap is enforced here: {why}")
    name = "tiny" if args.smoke else args.model
    n_bytes, allowance, rows = measure(args, name, capped=why is None)
    right = all(row["right"] for row in rows)
    result = {
        "benchmark": "cap",
        "model": name,
        "weights": models.describe(name),
        "model_bytes": n_bytes,
        "allowance_bytes": allowance,
        "enforced": why is None,
        "rows": rows,
        "right": right,
        "machine": info,
    }
    common.finish(result, args.json)
    if not right:
        raise SystemExit("cap: a run was killed, failed, or gave other tokens than the dense model")


if __name__ == "__main__":
    main()
