"""The paper's Tables 2 and 3 for one model, cap and machine: what each of the paper's ideas is worth there.

"LLM in a flash" climbs from reading everything for every token to its whole method, and prints bytes, bandwidth and
times of each step. Here every rung is run, in the same engine with parts of it switched off (`FlashConfig.without`), on
the same prompt; the tokens must be equal on all of them. Up to the last rung nothing is read during arithmetic, as in
the paper's sums of I/O, memory management and compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from hf_flash import trace
from hf_flash.errors import FlashError
from hf_flash.preview import Preview
from hf_flash.profile import PYTHON, profile, summarize
from hf_flash.save import runtime_of
from hf_flash.session import open_model
from hf_flash.trace import Span

N_TOKENS = 32
PROMPT = "It was a dark night and the wind had risen. The old man sat down by the fire with his"
_WARM, _COLD = 48, 2  # tokens before those that are measured, where a cache fills and where none does
_WEIGHTS = ("always resident", "resident matrices", "gates", "stream", "down matrix")  # parts of a plan


@dataclasses.dataclass(frozen=True)
class Rung:
    """One configuration of the engine: its name, the gate, what is switched off, and what it is in words."""

    name: str
    gate: str
    without: tuple[str, ...]
    what: str


NAIVE = Rung("naive", "all", ("residents", "overlap"), "every matrix is read for every token")
HALF = Rung("half resident", "all", ("overlap",), "what fits the cap stays in DRAM, the rest is read for every token")
GATED = (
    Rung("+ gate", "auto", ("window", "bundling", "overlap"), "of the FFNs the neurons that may fire, each anew"),
    Rung("+ window", "auto", ("bundling", "overlap"), "neurons of earlier tokens stay in the cache"),
    Rung("+ bundling", "auto", ("overlap",), "one read for a neuron's matrices, neighbours share one"),
)
OVERLAP = Rung(
    "+ overlap", "auto", (),
    "the engine as it runs: streams read ahead, one native call a layer, an early gate where it pays",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What a token cost on one rung; means over the measured tokens.

    Attributes:
        name, what: of the rung.
        n_tokens: measured.
        bytes_per_token, reads_per_token: read from flash, alignment included.
        bytes_per_s: bytes per second during which a read was under way; 0 where none was.
        io_s: a token's seconds of submitting reads and waiting for them.
        memory_s: of keeping the books of what is in DRAM: our Python around gate, reads and sums.
        compute_s: of all else: attention, norms, gate scans, arithmetic, head, sampling.
        token_s: their sum.
        dram_bytes: weights, sketches, cached neurons and read buffers in DRAM, at most.
    """

    name: str
    what: str
    n_tokens: int
    bytes_per_token: float
    reads_per_token: float
    bytes_per_s: float
    io_s: float
    memory_s: float
    compute_s: float
    token_s: float
    dram_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return 1 / self.token_s

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "tokens_per_s": self.tokens_per_s}


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The rows, and what they are of.

    Attributes:
        model, memory: what ran, under which cap. n_bytes: of its weights.
        rows: from the slowest idea to the whole method.
        token_ids: what every rung answered, as far as the shortest went.
        left_out: why some rungs are missing, or empty.
    """

    model: str
    memory: int
    n_bytes: int
    rows: list[Row]
    token_ids: list[int]
    left_out: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


def rungs_for(preview: Preview, ladder: bool = True) -> tuple[list[Rung], str]:
    """The rungs that mean something for a model, and why others do not.

    Args:
        preview: of the model. ladder: False for the last one alone.
    """
    if not ladder:
        return [dataclasses.replace(OVERLAP, name="hf_flash")], ""
    if any(layer.gate != "all" for layer in preview.with_options(gate="auto").demand.layers):
        return [NAIVE, HALF, *GATED, OVERLAP], ""
    why = (
        "gate, window and bundling, as every token needs every neuron where the activation is not zero below a "
        "threshold, or there is no sketch"
    )
    return [NAIVE, HALF, OVERLAP], why


def half_cap(preview: Preview) -> int:
    """A cap that leaves DRAM for half of the weights, as in the paper; the smallest that will do where that is more."""
    least = max(preview.with_options(gate=gate, memory=None).smallest_cap for gate in ("all", "auto"))
    parts = preview.with_options(memory=least).plan().parts
    rest = sum(n_bytes for part, n_bytes in parts.items() if part not in (*_WEIGHTS, "FFN cache"))
    return max(least, preview.n_bytes // 2 + rest)


def random_prompt(vocab: int) -> torch.Tensor:
    """Tokens to begin with, [1, 32] int64, for a model without a tokenizer: always the same."""
    return torch.randint(vocab, (1, 32), generator=torch.Generator().manual_seed(0))


def n_new_tokens(rung: Rung, n_tokens: int) -> int:
    """Tokens to generate for `n_tokens` measured ones: before them the cache fills, after them one ends the last."""
    keeps = rung.gate != "all" and "window" not in rung.without
    return (_WARM if keeps else _COLD) + n_tokens + 2


def climb(
    preview: Preview, ids: torch.Tensor, n_tokens: int, rungs: Sequence[Rung], left_out: str = "", **kwargs: Any
) -> Ladder:
    """Run every rung, from a model that is opened anew for each.

    Args:
        preview: of the model, with the cap, and the context that the longest rung needs.
        ids: [1, n] the prompt.
        n_tokens: decoded tokens to measure on each.
        kwargs: of from_pretrained.

    Raises:
        FlashError: a rung cannot be run, or two answered differently.
    """
    rows: list[Row] = []
    answers: list[list[int]] = []
    with _one_bar(sum(n_new_tokens(rung, n_tokens) for rung in rungs)) as bar:
        for rung in rungs:
            bar.set_description(rung.name)
            row, answer = _run(preview, rung, ids, n_tokens, bar, kwargs)
            rows.append(row)
            answers.append(answer)
    shortest = min(answers, key=len)
    for rung, answer in zip(rungs, answers, strict=True):
        if answer[: len(shortest)] != shortest:
            raise FlashError(
                f"{preview.name}: rung {rung.name!r} answered differently from {rungs[0].name!r}, at one of the first "
                f"{len(shortest)} tokens. Figures of different answers cannot be compared. If `hf-flash verify` finds "
                "the folder whole, please report this."
            )
    return Ladder(preview.name, preview.config.cap(), preview.n_bytes, rows, shortest, left_out)


@contextlib.contextmanager
def _one_bar(n_tokens: int) -> Iterator[Any]:
    """A progress bar, and none of transformers' own for each model that is opened."""
    logging.disable_progress_bar()
    try:
        with tqdm(total=n_tokens, unit="token") as bar:
            yield bar
    finally:
        logging.enable_progress_bar()


def _run(
    preview: Preview, rung: Rung, ids: torch.Tensor, n_tokens: int, bar: Any, kwargs: dict[str, Any]
) -> tuple[Row, list[int]]:
    """One rung; its model is gone afterwards."""
    preview = preview.with_options(gate=rung.gate, without=rung.without)
    model = open_model(preview, **kwargs)
    n = n_new_tokens(rung, n_tokens)
    clock = _Clock(runtime_of(model).stats, bar)
    with torch.inference_mode(), profile(model) as profiled:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=n, min_new_tokens=n,
            streamer=clock,
        )  # fmt: skip
    resident = sum(runtime_of(model).plan.parts.get(part, 0) for part in _WEIGHTS)
    row = _row(rung, profiled.recorder.spans, clock.marks[-2 - n_tokens :], n_tokens, resident)
    del model
    gc.collect()  # the next rung needs its memory
    return row, clock.tokens


@dataclasses.dataclass(frozen=True)
class _Mark:
    """The counters when a token was known."""

    time: float
    bytes_read: int
    n_reads: int
    cache_bytes: int


class _Clock(BaseStreamer):
    """Notes each new token, and the counters then."""

    def __init__(self, stats: Any, bar: Any) -> None:
        self._stats, self._bar, self._prompt = stats, bar, True
        self.marks: list[_Mark] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time, from generate()."""
        if not self._prompt:
            s = self._stats
            self.marks.append(_Mark(time.perf_counter(), s.bytes_read, s.n_reads, s.cache_bytes))
            self.tokens += value.flatten().tolist()
            self._bar.update()
        self._prompt = False

    def end(self) -> None:
        """Generation is over."""


def _row(rung: Rung, spans: Sequence[Span], marks: Sequence[_Mark], n_tokens: int, resident: int) -> Row:
    """Sum up the measured tokens.

    Args:
        spans: of the whole generation.
        marks: [n_tokens + 2] from the last token before those that are measured to the one that ends them.
        resident: bytes of weights in DRAM besides the cache.
    """
    begin, end = marks[0], marks[n_tokens]
    mine = [span for span in spans if begin.time <= span.start]
    passes = [span for span in spans if span.name == trace.FORWARD and span.start < begin.time]
    times = summarize([passes[-1], *mine])  # it takes the first pass for the prompt's
    assert times.n_tokens == n_tokens
    reads = [s for s in mine if s.name in (trace.READ, trace.SUBMIT, trace.WAIT) and s.start < end.time]
    busy = _union((s.start, s.stop) for s in reads)
    io = times.rows.get("submitting reads", 0.0) + times.rows.get("waiting for flash", 0.0)
    memory = times.rows.get(PYTHON, 0.0)
    n_bytes = end.bytes_read - begin.bytes_read
    return Row(
        rung.name, rung.what, n_tokens, n_bytes / n_tokens, (end.n_reads - begin.n_reads) / n_tokens,
        n_bytes / busy if busy else 0.0, io, memory, times.token_s - io - memory, times.token_s,
        resident + max(mark.cache_bytes for mark in marks),
    )  # fmt: skip


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of some intervals."""
    total, reached = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
