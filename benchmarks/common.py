"""What every benchmark needs: the machine in words, the disk's ceiling, greedy decoding with its bytes, one JSON line.

The order of every benchmark's output is: what is asked, on which machine, the ceiling (what no program could beat
here), what was measured, whether the outputs were right, and one JSON line.
"""

# ruff: noqa: PLC0415  (what is imported, and when, is part of what is measured)
from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import mmap
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cgroup

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
MIB = 1 << 20
sys.path.append(str(REPO))  # a checkout that is not installed will do; an installed package goes first
# The opening of "A Scandal in Bohemia" (A. Conan Doyle, 1891; public domain).
PROMPT = (
    "To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name. In his "
    "eyes she eclipses and predominates the whole of her sex. It was not that he felt any emotion akin to love for "
    "Irene Adler. All emotions, and that one particularly, were abhorrent to his cold, precise but admirably balanced "
    "mind."
)


def have_hf_flash() -> bool:
    """Whether the package under test can be found (installed, or beside this folder)."""
    spec = importlib.util.find_spec("hf_flash")
    return spec is not None and spec.origin is not None


def machine() -> dict[str, Any]:
    """Machine and versions, for the JSON line."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    packages = {}
    for name in ("torch", "transformers", "accelerate", "safetensors"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "cpu": cpu,
        "n_cpus": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nice": os.nice(0),
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": commit(),
        **packages,
    }


def commit() -> str:
    """Short commit of the repository, with '+' when tracked files differ from it; 'unknown' outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(REPO), *args], check=False, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    dirty = "+" if head and git("--no-optional-locks", "status", "--porcelain", "-uno") else ""
    return head + dirty or "unknown"


def begin(question: str) -> dict[str, Any]:
    """Print the question and the machine; return the machine."""
    info = machine()
    print(question)
    print(
        f"machine: {info['cpu']}, {info['n_cpus']} CPUs, {info['ram_bytes'] / 2**30:.0f} GiB, kernel {info['kernel']}, "
        f"load {info['load_1min']}; torch {info['torch']}, transformers {info['transformers']}, "
        f"accelerate {info['accelerate']}; commit {info['commit']}"
    )
    return info


def finish(result: dict[str, Any], json_file: str | None) -> None:
    """Print the one JSON line, and write it to a file if one was named."""
    result = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": command_line(), **result}
    line = json.dumps(result)
    if json_file:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")
    print(line, flush=True)


def command_line() -> str:
    """The command as it can be typed again, without this machine's folders."""
    args = [Path(arg).name if arg.startswith("/") else arg for arg in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *args])


def parser(doc: str, **kwargs: Any) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
    made.add_argument("--dir", help="folder of the models (default: $HF_FLASH_BENCH_DIR, ~/.cache/hf_flash-bench)")
    made.add_argument("--json", metavar="FILE", help="also write the JSON line to FILE")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads (default: all)")
    made.add_argument("--smoke", action="store_true", help="seconds, not minutes: tiny random model, few tokens")
    return made


def shares(text: str) -> list[float]:
    """'0.5,0.75' -> [0.5, 0.75], for argparse."""
    return [float(part) for part in text.split(",")]


def names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names out of `allowed`, for argparse."""
    known = list(allowed)

    def parse(text: str) -> list[str]:
        found = [part.strip() for part in text.split(",") if part.strip()]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name!r}; choose from {', '.join(known)}")
        return found

    return parse


def safetensors_bytes(folder: str | os.PathLike) -> int:
    """Bytes of a folder's tensors on disk: the model's bytes in its dtype (headers included, a few KiB)."""
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def worker(
    script: str, spec: dict[str, Any], limit_bytes: int | None, evict: Sequence[str | os.PathLike], capped: bool = True,
    timeout_s: float = 1800,
) -> cgroup.Run:  # fmt: skip
    """Run `script` (a file of this folder) in a fresh interpreter and cgroup, with `spec` as its JSON argument."""
    command = [sys.executable, str(HERE / script), "--worker", json.dumps(spec)]
    path = os.pathsep.join(p for p in (str(REPO), os.environ.get("PYTHONPATH")) if p)
    env = {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return cgroup.run(command, limit_bytes, evict, env, timeout_s, capped)


def say_result(result: dict[str, Any]) -> None:
    """What a worker says last: the line that cgroup.Run.result() looks for."""
    print("RESULT " + json.dumps(result), flush=True)


def read_bytes_so_far() -> int:
    """Bytes that this process has had read from disk (all its threads; page cache hits are not in it)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def status_bytes() -> dict[str, int]:
    """Resident memory of this process by kind, from /proc/self/status."""
    keys = {"VmHWM": "rss_peak", "RssAnon": "rss_anon", "RssFile": "rss_file"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {keys[k[0][:-1]]: int(k[1]) * 1024 for k in lines if k and k[0][:-1] in keys}


def disk_bytes_per_s(folder: str | os.PathLike, n_passes: int = 5, n_threads: int = 8) -> float:
    """The disk's ceiling: the fastest of some sequential O_DIRECT passes over (up to 512 MiB of) the folder's files.

    Reads of 1 MiB, eight in flight. A ceiling is what the disk can do, so a pass that other jobs slowed down must not
    count: the best one does.
    """
    return max(disk_passes(folder, n_passes, n_threads))


def disk_passes(folder: str | os.PathLike, n_passes: int, n_threads: int = 8) -> list[float]:
    """Bytes per second of each pass."""
    files = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in sorted(Path(folder).rglob("*.safetensors"))]
    pieces = [(fd, at) for fd in files for at in range(0, os.fstat(fd).st_size, MIB)][:512]
    try:
        return [_pass_bytes_per_s(pieces, n_threads) for _ in range(n_passes)]
    finally:
        for fd in files:
            os.close(fd)


def memory_bytes_per_s(n_threads: int) -> float:
    """DRAM's ceiling: the fastest of some passes over a buffer far larger than any cache, in small or huge pages."""
    return max(_sweep_bytes_per_s(n_threads, huge) for huge in (False, True))


def _sweep_bytes_per_s(n_threads: int, huge: bool, n_passes: int = 5, n_bytes: int = 1 << 30) -> float:
    part = n_bytes // n_threads // 2
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffers = [(mmap.mmap(-1, part, flags=flags), mmap.mmap(-1, part, flags=flags)) for _ in range(n_threads)]
    for buffer in (one for pair in buffers for one in pair if huge):
        with contextlib.suppress(OSError, AttributeError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    libc = ctypes.CDLL(None)
    sides = []
    for pair in buffers:
        starts = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in pair]
        for start in starts:
            libc.memset(ctypes.c_void_p(start), 1, ctypes.c_size_t(part))  # a page of its own for every page
        sides.append(starts)

    def sweep(pair: Sequence[int]) -> None:  # reads both; ctypes lets the other threads run meanwhile
        libc.memcmp(ctypes.c_void_p(pair[0]), ctypes.c_void_p(pair[1]), ctypes.c_size_t(part))

    best = 0.0
    for _ in range(n_passes):
        threads = [threading.Thread(target=sweep, args=(pair,)) for pair in sides]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, 2 * part * n_threads / (time.perf_counter() - start))
    return best


def _huge_buffer() -> memoryview:
    """1 MiB inside one huge page where the system gives them: a disk takes a limited number of pieces a request."""
    memory = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % (2 * MIB)
    return memoryview(memory)[start : start + MIB]


def _pass_bytes_per_s(pieces: Sequence[tuple[int, int]], n_threads: int) -> float:
    todo, sizes, lock = iter(pieces), [], threading.Lock()

    def read() -> None:
        buffer = _huge_buffer()
        while True:
            with lock:
                piece = next(todo, None)
            if piece is None:
                return
            sizes.append(os.preadv(piece[0], [buffer], piece[1]))

    threads = [threading.Thread(target=read) for _ in range(n_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(sizes) / (time.perf_counter() - start)


def prompt_ids(model_dir: str | os.PathLike, n_tokens: int) -> list[int]:
    """The prompt's ids: real text where the folder has a tokenizer, seeded random ids for a random model."""
    model_dir = Path(model_dir)
    if (model_dir / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(PROMPT).ids
        return (ids * (1 + n_tokens // len(ids)))[:n_tokens]
    import random

    vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    return random.Random(0).choices(range(3, vocab), k=n_tokens)


def generate_greedy(
    model: Any,
    ids: Sequence[int],
    n_tokens: int,
    margins: bool = False,
    after_prefill: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Stock greedy `generate()` of exactly `n_tokens`, with time and disk bytes taken after every token.

    Args:
        model: a transformers causal language model.
        ids: the prompt.
        n_tokens: how many to generate; end-of-text is suppressed, so all sides do the same work.
        margins: also the gap between the two best logits at each step, relative to the best: tells a tie from an error.
        after_prefill: called when the first token is there, for counters that are to count decoding only.

    Returns:
        tokens, the figures of Clock, and margins.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    clock = Clock()

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            clock.tick()
            if after_prefill and len(clock.times) == 2:
                after_prefill()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    clock.start()
    out = model.generate(
        torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=n_tokens, min_new_tokens=n_tokens, stopping_criteria=StoppingCriteriaList([Watch()]),
        return_dict_in_generate=True, output_logits=margins,
    )  # fmt: skip
    result = {"tokens": out.sequences[0, len(ids) :].tolist(), **clock.figures()}
    if margins:
        best = [step[0].float().topk(2).values for step in out.logits]
        result["margins"] = [float((b[0] - b[1]) / b[0].abs().clamp_min(1e-6)) for b in best]
    return result


class Clock:
    """Time, CPU time and disk bytes after every token; the first token is the prefill's."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.times, self.reads, self.cpu = [], [], []
        self.tick()

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        self.reads.append(read_bytes_so_far())
        self.cpu.append(time.process_time())

    def figures(self) -> dict[str, Any]:
        """prefill_s; s, CPU s (all threads) and disk bytes per decoded token; the series of time and bytes."""
        start, *times = self.times
        start_read, *reads = self.reads
        steps = max(1, len(times) - 1)
        return {
            "prefill_s": times[0] - start,
            "prefill_read_bytes": reads[0] - start_read,
            "s_per_token": (times[-1] - times[0]) / steps,
            "cpu_s_per_token": (self.cpu[-1] - self.cpu[1]) / steps,
            "read_bytes_per_token": (reads[-1] - reads[0]) / steps,
            "token_s": [round(b - a, 4) for a, b in itertools.pairwise(times)],
            "token_read_bytes": [b - a for a, b in itertools.pairwise(reads)],
        }


def compare_tokens(found: Sequence[int], dense: Sequence[int], margins: Sequence[float]) -> dict[str, Any]:
    """Compare greedy tokens with the dense model's.

    bf16 keeps 8 bits: two logits closer than 1/64 of the best may come out in either order when sums are made in
    another order. A first difference at such a step is called a tie; any other is an error.
    """
    for i, (a, b) in enumerate(zip(found, dense, strict=False)):
        if a != b:
            tie = margins[i] <= 1 / 64
            words = f"{i}/{len(dense)} equal, then {'a tie' if tie else 'WRONG'} (margin {margins[i]:.2%})"
            return {"equal": i, "of": len(dense), "right": tie, "words": words}
    right = len(found) == len(dense)
    return {"equal": len(found), "of": len(dense), "right": right, "words": f"{len(found)}/{len(dense)} equal"}


def mb(n_bytes: float | None) -> str:
    """Bytes in MB (10^6), as the tables print them."""
    return "-" if n_bytes is None else f"{n_bytes / 1e6:.1f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows (the first is the head) as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
