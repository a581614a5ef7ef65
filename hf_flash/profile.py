"""Where a token's time goes: spans of a generation, summed up per decoded token, and a trace file to look at.

Forward hooks time what is transformers' (layers, attention, norms, head), `trace` what is ours. Spans nest as calls do,
so each second is counted once, for the innermost span that it was spent in, and the rows of the table sum to the
token's time. Hooks cost a few microseconds per module while they are on; afterwards nothing is left of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_flash import trace
from hf_flash.attention_step import NO_WATCHER, AttentionStep
from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.ffn import FlashFFN
from hf_flash.format import atomic_text, explain_full_disk
from hf_flash.layer_step import LayerStep
from hf_flash.layout import format_size
from hf_flash.save import runtime_of
from hf_flash.trace import Recorder, Span

REST, PYTHON, OTHER = "norms and the rest of transformers", "our own Python", "sampling and other"
# Row of the table -> spans whose own time it sums. A span of any other name gets a row of that name.
_ROWS = {
    "attention": (trace.ATTENTION,),
    REST: (trace.FORWARD, trace.LAYER, trace.NATIVE, trace.NORM, trace.EMBEDDING),
    "FFN: gate scan": (trace.GATE_SCAN,),
    "FFN: arithmetic": (trace.ARITHMETIC,),
    PYTHON: (trace.FFN, trace.GATE, trace.STEP),
    "submitting reads": (trace.SUBMIT, trace.STREAM),
    "waiting for flash": (trace.WAIT,),
    "head": (trace.HEAD,),
}
_ROW_OF = {name: row for row, names in _ROWS.items() for name in names}


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The time of decoded tokens, by what it was spent on.

    Attributes:
        n_tokens: decoded tokens that were measured: the prompt's is not among them, nor the last one, whose end cannot
            be told.
        n_ffns: FFN layers on flash that a token passed.
        token_s: mean seconds of a token. median_s: the median.
        rows: what -> mean seconds per token; they sum to `token_s`.
        read_bytes: bytes per token whose reads were started during it.
        python_s: seconds per FFN layer of the median token inside FlashFFN.forward, and in what layer_step.py does in
            the place of a layer's modules, outside native kernels and matrix products, gate scans, the submission of
            reads and waits. `rows` has the mean, with what is done once, as kernels are compared with torch's.
    """

    n_tokens: int
    n_ffns: float
    token_s: float
    median_s: float
    rows: dict[str, float]
    read_bytes: float
    python_s: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The rows as text, with milliseconds and shares."""
        if not self.n_tokens:
            return "no decoded token was measured: generate three new tokens or more"
        width = max(map(len, [*self.rows, "a token"]))
        lines = [f"{'time of a new token':{width}}  {'ms':>9}  {'share':>6}"]
        for name, seconds in self.rows.items():
            lines.append(f"{name:{width}}  {seconds * 1e3:9.3f}  {seconds / self.token_s:6.1%}")
        lines.append(f"{'a token':{width}}  {self.token_s * 1e3:9.3f}  {1:6.1%}")
        lines.append(
            f"mean of {self.n_tokens} decoded token{'s' if self.n_tokens > 1 else ''} "
            f"(median {self.median_s * 1e3:.3f} ms); {format_size(self.read_bytes)} read per token"
        )
        lines.append(
            f"our own Python: {self.python_s * 1e6:.0f} µs per FFN layer of the median token, outside native calls and "
            "waits"
        )
        return "\n".join(lines)


class Profile:
    """What `profile` gives: spans while it runs, figures afterwards.

    Attributes:
        recorder: the spans.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()

    def breakdown(self) -> Breakdown:
        """The decoded tokens' time, summed up."""
        return summarize(self.recorder.spans)

    def table(self) -> str:
        """`breakdown()` as text."""
        return self.breakdown().table()

    def write(self, file: str | os.PathLike[str]) -> Path:
        """Write a trace that ui.perfetto.dev and chrome://tracing open; the whole file or none.

        Raises:
            DiskFullError: no room. FlashConfigError: the file cannot be written, and why.
        """
        path = check_file(Path(file))
        try:
            with explain_full_disk(path.parent), atomic_text(path) as text:
                text.append(json.dumps(self.recorder.to_chrome()))
        except BaseException:
            path.with_name(path.name + ".partial").unlink(missing_ok=True)
            raise
        return path


@contextlib.contextmanager
def profile(model: nn.Module, file: str | os.PathLike[str] | None = None) -> Iterator[Profile]:
    """Record where the time of a generation goes.

    Args:
        model: one that runs from flash.
        file: trace to write when the block ends, however it ends; None for none.

    Yields:
        A `Profile`; ask it for `table()`.

    Raises:
        FlashError: the model does not run from flash, or a profile is running already.
        FlashConfigError: the file cannot be written; said before anything runs.

    Example:
        >>> with hf_flash.profile(model, "trace.json") as p:
        ...     model.generate(**inputs, max_new_tokens=32)
        >>> print(p.table())
    """
    runtime_of(model)
    if file is not None:
        check_file(Path(file))
    if trace.active is not None:
        raise FlashError("A profile is being recorded already; one at a time, for the whole process.")
    out = Profile()
    handles = attach(model, out.recorder)
    trace.active = out.recorder
    try:
        yield out
    finally:
        trace.active = None
        for handle in handles:
            handle.remove()
        if file is not None:
            out.write(file)


def check_file(path: Path) -> Path:
    """Refuse a trace file that cannot be written: before a model is run, not after.

    Raises:
        FlashConfigError: why not.
    """
    folder = path.parent
    why = ""
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        why = "permission denied"
    if why:
        raise FlashConfigError(f"{path} cannot be written: {why}. Name a file in a folder of yours.")
    return path


# Recording ---------------------------------------------------------------------------------------------------------


def attach(model: nn.Module, recorder: Recorder) -> list[Any]:
    """Time a model's parts from outside.

    Args:
        model: one with FlashFFN modules.
        recorder: who is told.

    Returns:
        Handles; `remove()` each to undo it.
    """
    handles: list[Any] = []
    for module, name, path in _timed(model):
        before, after = _hooks(recorder, name, path)
        handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    return handles


def _hooks(recorder: Recorder, name: str, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that note a module's calls. A call that is stopped (Ctrl-C) leaves no span."""
    started: dict[int, tuple[float, dict[str, Any]]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        details = {"tokens": _n_tokens(args, kwargs)} if name == trace.FORWARD else {}
        started[threading.get_ident()] = (time.perf_counter(), details)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stop = time.perf_counter()
        start, details = started.pop(threading.get_ident(), (stop, {}))
        recorder.add(name, start, stop, path, **details)

    for hook in (before, after):
        setattr(hook, NO_WATCHER, True)
    return before, after


def _n_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens per sequence that a model is called with, 0 where that cannot be told."""
    for name, axis in (("decoder_input_ids", -1), ("input_ids", -1), ("inputs_embeds", -2)):
        if kwargs.get(name) is not None:
            return int(kwargs[name].shape[axis])
    return int(args[0].shape[-1]) if args and hasattr(args[0], "shape") else 0


def _timed(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Modules to time: (module, name of the span, module path), each module once."""
    out = [(model, trace.FORWARD, "")]
    for get, name in (("get_output_embeddings", trace.HEAD), ("get_input_embeddings", trace.EMBEDDING)):
        module = getattr(model, get, lambda: None)()
        out += [(module, name, "")] if isinstance(module, nn.Module) else []
    ffns = [path for path, module in model.named_modules() if isinstance(module, FlashFFN)]
    layers = {found.group(1) for path in ffns if (found := re.match(r"(.*?\.\d+)(?:\.|$)", path))}
    out += _parts(model, "", layers)
    return list({id(entry[0]): entry for entry in reversed(out)}.values())[::-1]


def _parts(module: nn.Module, path: str, layers: set[str]) -> Iterator[tuple[nn.Module, str, str]]:
    """What is below a module: layers with an FFN of ours, attentions and norms; nothing inside those, no FFN."""
    is_step = isinstance(vars(module).get("forward"), LayerStep)  # its norms are part of what is left of the layer
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        kind = type(child).__name__.lower()
        if isinstance(child, FlashFFN) or isinstance(vars(child).get("forward"), AttentionStep):
            continue  # these time themselves
        if any(isinstance(inner, FlashFFN) for inner in child.modules()):
            if below in layers:
                yield child, trace.LAYER, below
            yield from _parts(child, below, layers)
        elif "norm" in kind and is_step:
            continue
        elif "norm" in kind:
            yield child, trace.NORM, below
        elif "attention" in kind or re.search(r"attn|attention", name):
            yield child, trace.ATTENTION, below
        else:
            yield from _parts(child, below, layers)


# Summing up --------------------------------------------------------------------------------------------------------


def summarize(spans: Sequence[Span]) -> Breakdown:
    """Sum spans up per decoded token: a pass over one token, until the next pass begins.

    The first pass is the prompt's, and is not counted.

    Args:
        spans: of a `Recorder`.

    Returns:
        Means per token; without tokens and rows where no pass over a single token was followed by another.
    """
    track = Counter(span.track for span in spans if span.name == trace.FORWARD).most_common(1)
    mine = sorted((s for s in spans if track and s.track == track[0][0]), key=lambda s: (s.start, -s.stop))
    own = _own_times(mine)
    passes = [span for span in mine if span.name == trace.FORWARD]
    tokens = []  # (start, stop) of decoded tokens
    for this, following in itertools.pairwise(passes[1:]):  # the first one is the prompt's, however short
        if this.args.get("tokens") == 1 == following.args.get("tokens"):
            tokens.append((this.start, following.start))
    if not tokens:
        return Breakdown(0, 0.0, 0.0, 0.0, {}, 0.0, 0.0)
    rows = dict.fromkeys([*_ROWS, OTHER], 0.0)
    at, n_ffns, python = 0, [0] * len(tokens), [0.0] * len(tokens)
    for span, seconds in zip(mine, own, strict=True):
        while at < len(tokens) and span.start >= tokens[at][1]:
            at += 1
        if at < len(tokens) and span.start >= tokens[at][0]:
            row = _ROW_OF.get(span.name, span.name)
            rows[row] = rows.get(row, 0.0) + seconds
            n_ffns[at] += span.name == trace.FFN
            python[at] += seconds if row == PYTHON else 0.0
    n = len(tokens)
    total = sum(stop - start for start, stop in tokens)
    rows[OTHER] = total - sum(rows.values())
    read = sum(
        s.args["bytes"]
        for s in spans
        if s.name == trace.READ and any(start <= s.start < stop for start, stop in tokens)
    )
    return Breakdown(
        n_tokens=n, n_ffns=sum(n_ffns) / n, token_s=total / n,
        median_s=statistics.median(stop - start for start, stop in tokens),
        rows={name: seconds / n for name, seconds in rows.items() if seconds}, read_bytes=read / n,
        python_s=statistics.median(own / max(1, ffns) for own, ffns in zip(python, n_ffns, strict=True)),
    )  # fmt: skip


def _own_times(spans: Sequence[Span]) -> list[float]:
    """Seconds of each span of one thread that lie in no span inside it; `spans` sorted, the outer one first."""
    own = [span.stop - span.start for span in spans]
    outer: list[int] = []
    for i, span in enumerate(spans):
        while outer and spans[outer[-1]].stop <= span.start:
            outer.pop()
        if outer:
            own[outer[-1]] -= span.stop - span.start
        outer.append(i)
    return own
