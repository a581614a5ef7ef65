"""How much memory does an interpreter need that imported torch, transformers and hf_flash and did nothing?

A memory cap is a cap on the model, so a capped process gets its model's budget plus this. Two figures, both the peak
of a memory cgroup:

- `cold`: every file of the interpreter and its packages is evicted from the page cache first, so the cgroup is charged
  for the library pages it brings in. Most of those are evictable: a process given this much has slack.
- `warm`: the same files are in the page cache already, brought there (and charged) outside the cgroup, as on a machine
  where another Python runs. What is left is what the interpreter itself must have. It is the smaller, so the
  benchmarks add this one, and warm the same files before each capped run.
"""

# ruff: noqa: PLC0415  (what is imported, and when, is part of what is measured)
from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import cgroup
import common


def import_everything() -> list[str]:
    """Import what a user of hf_flash imports, and nothing more; returns what was imported."""
    import torch  # noqa: F401
    import transformers

    if common.have_hf_flash():
        import hf_flash  # noqa: F401

        return ["torch", "transformers", "hf_flash"]
    transformers.PreTrainedModel  # noqa: B018  (what hf_flash will import in any case)
    return ["torch", "transformers", "transformers.modeling_utils (hf_flash is not there)"]


def work(spec: dict) -> None:
    """In the child: import, then say what is resident and, if asked, which files the interpreter uses."""
    result = {"imported": import_everything()}
    if spec.get("files"):
        if spec.get("model"):  # also what loading and generating import, so that it is warm for those who do
            from accelerate import dispatch_model  # noqa: F401
            from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
        result["files"] = files_in_use()
    common.say_result({**result, **common.status_bytes(), "read_bytes": common.read_bytes_so_far()})


def files_in_use() -> list[str]:
    """Files that this interpreter has mapped or imported modules from."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split(maxsplit=5)[5] for line in maps if " /" in line}
    for module in list(sys.modules.values()):
        for attribute in ("__file__", "__cached__"):
            file = getattr(module, attribute, None)
            if isinstance(file, str):
                files.add(file)
    return sorted(f for f in files if os.path.isfile(f))


@functools.cache
def library_files() -> tuple[str, ...]:
    """Files of the interpreter and its packages, found by running one (once per benchmark)."""
    run = common.worker("footprint.py", {"files": True, "model": True}, None, [], capped=False)
    return tuple(run.result()["files"])


def warm_libraries() -> None:
    """Bring the library files into the page cache from here, so that no capped run is charged for them."""
    warm(library_files())


def warm(files: Iterable[str]) -> None:
    """Read files to the end."""
    for file in files:
        if not os.path.isfile(file):  # an editor or git may have taken a source file away
            continue
        with open(file, "rb", buffering=0) as f:
            while f.read(1 << 20):
                pass


def measure(cold: bool) -> cgroup.Run:
    """Run the bare interpreter in an unlimited cgroup; `peak_bytes` is the footprint."""
    if cold:
        return common.worker("footprint.py", {}, None, library_files())
    warm_libraries()
    return common.worker("footprint.py", {}, None, [])


def allowance(n_runs: int = 2) -> int:
    """Bytes that a capped run gets on top of its model's budget: the warm footprint, the largest of `n_runs`."""
    return max(measure(cold=False).peak_bytes for _ in range(n_runs))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=2, help="runs of each; the largest counts (default 2)")
    parser.add_argument("--worker", help="(internal) run as the measured child")
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    info = common.begin("footprint: memory of an interpreter that imported hf_flash and did nothing")
    why = cgroup.why_unavailable()
    if why:
        print(f"skipped: {why}")
        return
    n_runs = 1 if args.smoke else args.runs
    warm = [measure(cold=False) for _ in range(n_runs)]
    cold = [measure(cold=True) for _ in range(n_runs)]
    stayed = cgroup.evict(library_files())
    warm_libraries()
    print(f"imported: {', '.join(warm[0].result()['imported'])}")
    rows = [["", "peak MB", "of it anonymous MB", "read from disk MB"]]
    for name, runs in (("warm", warm), ("cold", cold)):
        top = max(runs, key=lambda r: r.peak_bytes)
        rows.append([name, *map(common.mb, (top.peak_bytes, top.anon_bytes, top.result()["read_bytes"]))])
    print(common.table(rows))
    if stayed:
        print(f"({common.mb(stayed)} MB of library files stay in the page cache: other processes have them mapped, so "
              "cold is not quite cold)")  # fmt: skip
    result = {
        "benchmark": "footprint",
        "warm_bytes": max(r.peak_bytes for r in warm),
        "warm_anon_bytes": max(r.anon_bytes for r in warm),
        "cold_bytes": max(r.peak_bytes for r in cold),
        "still_cached_bytes": stayed,
        "imported": warm[0].result()["imported"],
        "machine": info,
    }
    common.finish(result, args.json)


if __name__ == "__main__":
    main()
