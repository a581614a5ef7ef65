"""What share of fio's sequential bytes/s does a model read while it generates?

Gate `all`: nothing is sparse, so the flash is what a token waits for. One process decodes some tokens, then fio reads
one of the model's own files for about as long, in turns, so that both see the same disk and the same neighbours. fio
gets large direct sequential reads through io_uring, into huge pages, and the fastest of some sizes and depths. Bytes
are what the kernel says that the process had read; medians over the turns count.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import common
import models
import reads

MIN_SHARE = 0.9
MAX_READ = 1.02  # of the bytes that the plan does not pin
SETTINGS = [(1 << 16, 32), (common.MIB, 16), (common.MIB, 32), (4 * common.MIB, 4), (4 * common.MIB, 8)]  # size, depth


class Model:
    """A model under a cap that decodes without end."""

    def __init__(self, folder: Path, memory: int, ids: list[int], threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import hf_flash

        torch.set_num_threads(threads)
        config = hf_flash.FlashConfig(memory=memory, context=256, gate="all")
        self.model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        self.ids, self.stats = ids, hf_flash.stats(self.model)

    def run(self, n_tokens: int) -> dict[str, float]:
        """Decode; the prompt's pass does not count."""
        found = common.generate_greedy(self.model, self.ids, n_tokens + 1)
        return {"bytes": found["read_bytes_per_token"], "s": found["s_per_token"]}


def best_of_fio(file: Path, seconds: float) -> tuple[int, int]:
    """fio's fastest size and depth on a file."""
    fitting = [setting for setting in SETTINGS if setting[0] <= file.stat().st_size]
    return max(fitting, key=lambda setting: max(fio(file, setting, seconds) for _ in range(2)))


def fio(file: Path, setting: tuple[int, int], seconds: float) -> float:
    """Its bytes/s."""
    return reads.fio_run(file, *setting, seconds, in_order=True)["bytes_per_s"]


def one_model(args: Any, name: str) -> dict[str, Any]:
    """Decode and read in turns."""
    from hf_flash.layout import format_size

    model_dir, folder = models.get(name, args.dir), models.converted(name, args.dir)
    n_bytes = common.safetensors_bytes(model_dir)
    file = max(folder.glob("flash-*.safetensors"), key=lambda f: f.stat().st_size)
    memory = (64 * common.MIB) if name == "tiny" else int(n_bytes * args.cap)
    with_fio = shutil.which("fio") is not None
    setting = best_of_fio(file, args.seconds / 2) if with_fio else None
    model = Model(folder, memory, common.prompt_ids(model_dir, 16), args.threads)
    model.run(args.tokens)  # what is pinned comes to DRAM
    ours, theirs = [], []
    for turn in range(args.turns):
        for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            if side == "ours":
                ours.append(model.run(args.tokens))
            else:
                theirs.append(fio(file, setting, args.seconds) if setting else common.disk_bytes_per_s(folder, 1))
    speeds = [o["bytes"] / o["s"] for o in ours]
    expected = model.stats.plan["bytes_per_token"]
    result = {
        "model": name,
        "weights": models.describe(name),
        "memory": memory,
        "threads": args.threads,
        "other": f"fio, {format_size(setting[0])} x {setting[1]} deep" if setting else "eight threads of preadv, 1 MiB",
        "turns": [{"ours": o, "theirs": t} for o, t in zip(speeds, theirs, strict=True)],
        "bytes_per_s": statistics.median(speeds),
        "other_bytes_per_s": statistics.median(theirs),
        "share": statistics.median(speeds) / statistics.median(theirs),
        "s_per_token": statistics.median(o["s"] for o in ours),
        "read_bytes_per_token": statistics.median(o["bytes"] for o in ours),
        "unpinned_bytes": expected,
        "read_share": statistics.median(o["bytes"] for o in ours) / max(expected, 1),
    }
    result["met"] = result["share"] >= MIN_SHARE and result["read_share"] <= MAX_READ
    return result


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=common.names(models.MODELS), default=["random-llama"],
                        help="comma-separated (default random-llama)")  # fmt: skip
    parser.add_argument("--cap", type=float, default=0.5, help="memory as a share of the model (default 0.5)")
    parser.add_argument("--turns", type=int, default=9, help="of each side; medians count (default 9)")
    parser.add_argument("--tokens", type=int, default=12, help="decoded in a turn (default 12)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of fio in a turn (default 2)")
    args = parser.parse_args()
    if args.smoke:
        args.models, args.turns, args.tokens, args.seconds = ["tiny"], 1, 3, 0.05
    info = common.begin("bandwidth: bytes/s that are read while a model generates, beside fio's sequential figure")
    if not common.have_hf_flash():
        raise SystemExit("bandwidth: hf_flash is not installed")
    if shutil.which("fio") is None:
        print("fio is missing (apt install fio): threads that read the same files are the other side")
    elif reads.reserved_bytes() < 32 * common.MIB:
        print(f"fio gets small pages: {reads.reserved_bytes() >> 20} MiB of huge ones free, of 32 (vm.nr_hugepages=16)")
    rows = [one_model(args, name) for name in args.models]
    for r in rows:
        print(f"ceiling ({r['other']}): {common.mb(r['other_bytes_per_s'])} MB/s")
    print(table(rows))
    met = all(r["met"] for r in rows)
    common.finish({"benchmark": "bandwidth", "min_share": MIN_SHARE, "max_read": MAX_READ, "rows": rows, "met": met,
                   "right": True, "machine": info}, args.json)  # fmt: skip
    if not met and not args.smoke:
        raise SystemExit(
            f"bandwidth: below {MIN_SHARE:.0%} of the other side, or more than {MAX_READ} x what is not pinned was read"
        )


def table(rows: list[dict[str, Any]]) -> str:
    """One row per model."""
    head = [
        "model",
        "s/token",
        "read MB per token",
        "of what is not pinned",
        "MB/s while generating",
        "fio MB/s",
        "share",
    ]
    lines = [
        [f"{r['model']} ({r['weights']})", f"{r['s_per_token']:.3f}", common.mb(r["read_bytes_per_token"]),
         f"{r['read_share']:.3f}", common.mb(r["bytes_per_s"]), common.mb(r["other_bytes_per_s"]), f"{r['share']:.1%}"]
        for r in rows
    ]  # fmt: skip
    return common.table([head, *lines])


if __name__ == "__main__":
    main()
