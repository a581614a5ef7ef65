"""How close are the native kernels to the memory's speed?

`sparse_ffn` at batch 1 on rows of OPT-6.7B's shape (d_model 4096, 16384 rows, no gate), all of them firing, so that
every byte of the rows is used: 500, 1000 and 2000 rows at random places, others in every call, which no cache holds.
Beside it the fastest plain sweep that torch has (sum, dot, matrix times vector) over 512 MiB that torch allocates, and
over 512 MiB in huge pages, where the rows lie too, with as many threads, in turns. Medians count; a share is taken in
each turn, as a machine that others use too may give half as much again in the next one, and is the median of those.
`gate_scan` (8 bits, 3 % of the neurons fire) reads 4 bits of its sketch from end to end, and the others where these do
not decide. Outputs are compared with torch operations.
On such a machine the sweep, one long pass, loses more than the kernels, too: a share above 100 % says so.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import common

MIN_SHARE = 0.8  # of the sweep
FIRING = 1.88  # standard deviations that 3 % of normal numbers are above
TOLERANCE = 2e-3  # relative error of an output, rounding of the hidden values included
DTYPES = ["bfloat16", "float16", "float32"]


def gb_per_s(n_bytes: int, call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return n_bytes / (time.perf_counter() - start) / 1e9


class Sweep:
    """Plain passes over memory: of torch, and in huge pages, where they are up to 8 % faster."""

    def __init__(self, n_bytes: int) -> None:
        import torch

        from hf_flash.memory import aligned_empty

        self.n_bytes, self._vector = n_bytes, torch.ones(4096)
        self._memories = [torch.ones(n_bytes // 4), aligned_empty(n_bytes).view(torch.float32).fill_(1)]

    def run(self) -> list[list[float]]:
        """GB/s of each kind of pass, over either memory."""
        import torch

        kinds = [torch.sum, lambda x: torch.dot(x, x), lambda x: torch.mv(x.view(-1, 4096), self._vector)]
        return [[gb_per_s(self.n_bytes, functools.partial(kind, x)) for kind in kinds] for x in self._memories]


def fastest(sweeps: list[list[float]]) -> list[float]:
    """Of GB/s of each kind of pass in each turn, those of the kind that is fastest."""
    return list(max(zip(*sweeps, strict=True), key=statistics.median))


def figures(speeds: list[list[float]], sweeps: list[list[list[float]]]) -> dict[str, float]:
    """Medians of each turn's speeds beside the fastest kind of sweep."""
    torchs, huge = (fastest(list(turns)) for turns in zip(*sweeps, strict=True))
    ours = [statistics.median(turn) for turn in speeds]
    return {
        "gb_per_s": statistics.median(ours), "best_gb_per_s": max(map(max, speeds)),
        "sweep_gb_per_s": statistics.median(torchs), "share": middle_share(ours, torchs),
        "huge_sweep_gb_per_s": statistics.median(huge), "share_of_huge": middle_share(ours, huge),
    }  # fmt: skip


def middle_share(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def ffn_rows(args: Any, name: str, sweep: Sweep) -> list[dict[str, Any]]:
    """sparse_ffn in one dtype, for every number of rows."""
    import torch

    from hf_flash import native
    from hf_flash.memory import aligned_empty

    dtype, d, n_slots = getattr(torch, name), args.d_model, args.slots
    row_bytes = 2 * d * dtype.itemsize
    rows = aligned_empty(n_slots * row_bytes).view(n_slots, row_bytes)
    values = rows.view(dtype)  # [n_slots, up | down]
    torch.manual_seed(0)
    for block in values.split(512):
        block.copy_(torch.rand(block.shape) * 0.02 - 0.002)  # positive sums with a positive x: every row fires
    x = torch.rand(1, d).to(dtype)
    found = []
    for n in args.rows:
        speeds: list[list[float]] = []
        sweeps, right = [], True
        for _ in range(args.turns):
            places = torch.randperm(n_slots)
            speeds.append([])
            for slots in places[: n_slots // n * n].split(n):
                start = time.perf_counter()
                y, n_fired = native.sparse_ffn(x, rows, slots, d, d, False, dtype, (0, 0.0))
                speeds[-1].append(n * row_bytes / (time.perf_counter() - start) / 1e9)
                right &= n_fired == n
            sweeps.append(sweep.run())
        picked = values[slots].float()
        want = torch.relu(x.float() @ picked[:, :d].t()).to(dtype).float() @ picked[:, d:]
        error = float((y - want).norm() / want.norm())
        row = {"kernel": "sparse_ffn", "dtype": name, "rows": n, **figures(speeds, sweeps), "error": error}
        found.append({**row, "right": right and error <= TOLERANCE, "met": row["share"] >= MIN_SHARE})
    return found


def gate_row(args: Any, sweep: Sweep) -> dict[str, Any]:
    """gate_scan of an 8-bit sketch of the whole layer, of which 3 % fires: 4 bits, more where they do not decide."""
    import torch

    from hf_flash.gates import CertifiedGate, Sketch
    from hf_flash.gates.certified import UPPER_SHARE

    d, small = args.d_model, 512
    torch.manual_seed(0)
    sketch = Sketch.of(torch.randn(small, d) / math.sqrt(d), 8)
    gate = CertifiedGate(sketch, weight_dtype=torch.bfloat16)
    x = torch.randn(1, d).bfloat16()
    bias = torch.full((small,), -FIRING * float(x.float().norm()) / math.sqrt(d))
    wanted, upper = torch.zeros(small, dtype=torch.bool), gate.upper(x, bias)[0]
    wanted[torch.from_numpy(gate.decide(x, bias)[0])] = True
    undecided = CertifiedGate(sketch.with_bits(4), gate.delta * UPPER_SHARE).wanted(x, bias).float().mean().item()
    off = 1e-4 * upper.abs().max()  # here the order of a float sum decides, and what whole numbers leave out of x
    sure = upper.abs() > off + sketch.norm * x.float().abs().max() * math.sqrt(d) / 32512
    right = bool((wanted == (upper > 0))[sure].all())
    times = args.slots // small
    many = {name: t.repeat(times, *[1] * (t.dim() - 1)) for name, t in sketch.tensors().items() if name != "dither"}
    planes = [tensor for name, tensor in many.items() if name.startswith("plane")]
    big = Sketch(many["nibbles"], planes, many["step"], many["norm"], sketch.dither, d)
    gate, bias = CertifiedGate(big, weight_dtype=torch.bfloat16), bias.repeat(times)
    upper_bytes = big.with_bits(4).n_bytes
    n_bytes = upper_bytes + int(undecided * (big.n_bytes - upper_bytes))
    gate.decide(x, bias)
    speeds, sweeps = [], []
    for _ in range(args.turns):
        speeds.append([gb_per_s(n_bytes, lambda: gate.decide(x, bias)) for _ in range(4)])
        sweeps.append(sweep.run())
    row = {"kernel": "gate_scan", "dtype": "8 bits", "rows": big.norm.shape[0]}
    return {**row, **figures(speeds, sweeps), "right": right}


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--turns", type=int, default=6, help="turns of each side (default 6)")
    parser.add_argument("--kernel-threads", default=None, help="comma-separated (default 1 and --threads)")
    args = parser.parse_args()
    threads = args.kernel_threads.split(",") if args.kernel_threads else [1, args.threads]
    args.kernel_threads = sorted({int(n) for n in threads})
    args.d_model, args.slots, args.rows, args.sweep_bytes = 4096, 16384, [500, 1000, 2000], 512 * common.MIB
    if args.smoke:
        args.d_model, args.slots, args.rows, args.turns = 256, 512, [100], 1
        args.sweep_bytes, args.kernel_threads = 4 * common.MIB, [1]
    return args


def main() -> None:
    args = parse()
    info = common.begin("kernels: GB/s of the native kernels beside a plain sweep over memory")
    import torch

    from hf_flash import native

    if not native.available():
        print("skipped: the native extension is not built")
        return
    rows: list[dict[str, Any]] = []
    sweep = Sweep(args.sweep_bytes)
    for threads in args.kernel_threads:
        torch.set_num_threads(threads)
        ceiling = figures([[0]] * 3, [sweep.run() for _ in range(3)])
        print(
            f"ceiling: plain sweep, {threads} threads: {ceiling['sweep_gb_per_s']:.1f} GB/s, in huge pages "
            f"{ceiling['huge_sweep_gb_per_s']:.1f}"
        )
        found = [row for name in DTYPES for row in ffn_rows(args, name, sweep)]
        rows += [{"threads": threads, **row} for row in [*found, gate_row(args, sweep)]]
    table = [["kernel", "threads", "dtype", "rows", "GB/s", "best", "sweep GB/s", "share", "in huge pages", "share"]]
    for r in rows:
        of = f"{r['sweep_gb_per_s']:.1f}", f"{r['share']:.0%}", f"{r['huge_sweep_gb_per_s']:.1f}"
        cells = f"{r['gb_per_s']:.1f}", f"{r['best_gb_per_s']:.1f}", *of, f"{r['share_of_huge']:.0%}"
        table.append([r["kernel"], str(r["threads"]), r["dtype"], str(r["rows"]), *cells])
    print(common.table(table))
    right = all(r["right"] for r in rows)
    met_by = {n: all(r.get("met", True) for r in rows if r["threads"] == n) for n in args.kernel_threads}
    words = ", ".join(f"{'yes' if yes else 'not all'} with {n}" for n, yes in met_by.items())
    print(f"outputs {'right' if right else 'WRONG'}; sparse_ffn at {MIN_SHARE:.0%} of the sweep, by threads: {words}")
    result = {"benchmark": "kernels", "min_share": MIN_SHARE, "rows": rows, "met": met_by, "right": right}
    common.finish({**result, "machine": info}, args.json)
    if not right:
        raise SystemExit("kernels: an output differs from torch's")


if __name__ == "__main__":
    main()
