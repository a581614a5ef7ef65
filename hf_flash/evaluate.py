"""What a gate costs in quality: perplexity on a text and accuracy on questions, the dense model beside the flash one.

Both sides see the same passes in the same batches (measures.py), one model in memory at a time. The dense side is the
stock model; where that is not to be had or does not fit into memory, it is the flash model with gate `all`, which
computes the same, and the report says so.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from hf_flash.config import FlashConfig, available_memory
from hf_flash.errors import CheckpointError, FlashConfigError, TextError
from hf_flash.layout import format_size
from hf_flash.measures import Decoding, TaskScore, TextScore, answer, decode, score_text, tokens_of
from hf_flash.preview import Preview, look
from hf_flash.scoring import Scorer
from hf_flash.session import Session, load_tokenizer, planned
from hf_flash.stats import FlashStats
from hf_flash.texts import read_task

DEFAULT_WINDOW = 1024
DECODE_PROMPT = 128  # tokens before the measured ones, which fill the cache; the paper measures behind so many too


@dataclasses.dataclass
class Side:
    """One column of the report: a model with a gate, and what it scored; incomplete where a run was interrupted.

    Attributes:
        name: "dense", or the gate as it was asked for. gates: what the plan made of it, None for the stock model.
        kind: "stock" or "flash". memory: the cap, None for the stock model.
    """

    name: str
    kind: str
    gates: list[str] | None = None
    memory: int | None = None
    texts: dict[str, TextScore] = dataclasses.field(default_factory=dict)
    tasks: dict[str, TaskScore] = dataclasses.field(default_factory=dict)
    decoding: Decoding | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        parts = {
            "texts": {name: score.to_dict() for name, score in self.texts.items()},
            "tasks": {name: score.to_dict() for name, score in self.tasks.items()},
            "decoding": self.decoding and self.decoding.to_dict(),
        }
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **parts}


@dataclasses.dataclass
class Report:
    """Sides by side.

    Attributes:
        dense: what stands for the dense model, in words.
        complete: False where a run was interrupted: what is missing was not measured.
    """

    model: str
    dtype: str
    window: int
    stride: int
    batch_size: int
    dense: str
    sides: list[Side] = dataclasses.field(default_factory=list)
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "sides": [side.to_dict() for side in self.sides]}


class Evaluation:
    """An evaluation that is ready to run: everything was read and checked, nothing loaded.

    Args:
        model: folder or Hub repo, stock or flash.
        text, tasks: files.
        gates: each a column: those of FlashConfig. sparsities: of gate `threshold`, each a column.
        memory: the cap of the flash sides.
        dense: the stock model, where `model` is a flash checkpoint.
        window, stride, batch_size: of a pass; by default 1024 tokens or what the model takes, the window, and 1.
        limit: questions of each file. max_tokens: of the text. decode: tokens to decode one by one.
        dtype, revision, trust_remote_code: as in from_pretrained.
        progress: show bars.

    Attributes:
        report: what was measured so far.

    Raises:
        TextError: a file is not as it should be. FlashError: the model, a gate or the cap cannot work, and why.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, text: str | os.PathLike[str] | None = None,
        tasks: Sequence[str | os.PathLike[str]] = (), gates: Sequence[str] = ("auto",),
        sparsities: Sequence[float] = (),
        memory: int | str | None = None, dense: str | os.PathLike[str] | None = None, window: int | None = None,
        stride: int | None = None, batch_size: int = 1, limit: int | None = None, max_tokens: int | None = None,
        decode: int = 0, dtype: str | torch.dtype | None = None, revision: str | None = None,
        trust_remote_code: bool = False, progress: bool = True,
    ) -> None:  # fmt: skip
        if text is None and (decode or not tasks):
            raise FlashConfigError("There is no text to evaluate on. Give one with --text, or questions with --tasks.")
        self._tasks = [read_task(path, limit) for path in tasks]
        names = [task.name for task in self._tasks]
        if len(set(names)) < len(names):
            raise FlashConfigError(f"Two files of questions have one name ({', '.join(names)}): rename one.")
        self._loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._progress, self._decode = progress, decode
        first = look(model, FlashConfig(memory), dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
        window = _window(first, window)
        stride = window if stride is None else stride
        if not 1 <= stride <= window:
            raise FlashConfigError(f"--stride {stride} must be from 1 to the window, which has {window} tokens.")
        if decode >= window:
            raise FlashConfigError(f"--decode {decode} does not fit into a window of {window} tokens.")
        self._n_prompt = min(DECODE_PROMPT, window - decode)
        self._tokenizer = load_tokenizer(str(model), **self._loading)
        self._text = None if text is None else tokens_of(text, self._tokenizer, max_tokens)
        if decode and self._text is not None and len(self._text.ids) < self._n_prompt + decode + 1:
            raise TextError(f"{text} is too short to decode {decode} tokens after {self._n_prompt}. Lower --decode.")
        options = {"memory": first.config.cap(), "context": window, "batch_size": batch_size}  # "what is free" once
        if sparsities and "threshold" not in gates:
            raise FlashConfigError("--sparsity is for --gate threshold, which was not asked for.")
        self._flash: dict[str, Preview] = {}
        for gate in gates:
            for share in (sparsities if gate == "threshold" else ()) or (None,):
                name = gate if share is None else f"{gate} {share:.0%}"
                self._flash[name] = _with_gate(first, gate, share, options)
        self._dense, self._why = self._find_dense(first, dense)
        if self._dense is None and "all" not in self._flash:
            self._flash = {"all": _with_gate(first, "all", None, options), **self._flash}
        for preview in self._flash.values():
            planned(preview)
        dtype_name = str(first.skeleton.dtype).removeprefix("torch.")
        self.report = Report(str(model), dtype_name, window, stride, batch_size, self._why)

    def run(self) -> Report:
        """Load and score one side after the other, with progress bars.

        Returns:
            The report; the same as `.report`, which holds what was measured if this is interrupted.
        """
        if self._dense is not None:
            self._side(Side("dense", "stock"), self._dense)
        for gate, preview in self._flash.items():
            self._side(Side(gate, "flash", memory=preview.config.memory), preview)
        self.report.complete = True
        return self.report

    def _find_dense(self, first: Preview, dense: str | os.PathLike[str] | None) -> tuple[Preview | None, str]:
        """The stock model, or None where gate `all` stands for it; and what the dense side is, in words.

        Raises:
            CheckpointError: what was given as the dense model is another one.
        """
        instead = "the dense side is the flash model with gate `all`, which computes the same: "
        if dense is None and first.converted:
            return None, instead + "no stock model was given (--dense)"
        stock = first
        if dense is not None:
            trust = bool(self._loading["trust_remote_code"])
            stock = look(dense, dtype=first.skeleton.dtype, trust_remote_code=trust)
            if stock.converted:
                raise CheckpointError(
                    f"--dense {dense} is a flash checkpoint too. Give the stock model it is made from."
                )
            shapes = [{name: p.shape for name, p in side.skeleton.named_parameters()} for side in (first, stock)]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"--dense {dense} is another model than {first.name}: its weights differ in shape."
                )
        n_bytes = sum(p.numel() * p.element_size() for p in stock.skeleton.parameters())
        if n_bytes * 1.2 > available_memory():
            return None, f"{instead}the stock model takes {format_size(n_bytes)}, more than is free"
        return stock, f"the dense side is the stock model {stock.name}, whole in memory"

    def _side(self, side: Side, preview: Preview) -> None:
        """Load a model, score it, let it go."""
        gc.collect()  # the last side's model
        start, stats = time.monotonic(), None
        self.report.sides.append(side)
        if side.kind == "stock":
            given = (
                self._loading
                if preview.name == self.report.model
                else {"trust_remote_code": self._loading["trust_remote_code"]}
            )
            model: Any = AutoModelForCausalLM.from_pretrained(
                preview.name, dtype=preview.skeleton.dtype, **given
            ).eval()
        else:
            opened = Session.open(preview, self._tokenizer, **self._loading)
            model, stats = opened.model, opened.stats
            side.gates = sorted(set(stats.plan["gates"].values()))
        try:
            self._score(model, stats, side)
        finally:
            side.seconds = time.monotonic() - start

    def _score(self, model: Any, stats: FlashStats | None, side: Side) -> None:
        scorer, report, text = Scorer(model), self.report, self._text
        if text is not None:
            with self._bar(side, text.name, len(text.ids) - 1, "token") as bar:
                score = score_text(scorer, text, report.window, report.stride, report.batch_size, bar)
                side.texts[text.name] = score
        for task in self._tasks:
            with self._bar(side, task.name, len(task.questions), "question") as bar:
                side.tasks[task.name] = answer(scorer, self._tokenizer, task, report.window, report.batch_size, bar)
        if self._decode and text is not None:
            with self._bar(side, "decoding", self._decode, "token") as bar:
                ids = text.ids[: self._n_prompt + self._decode + 1]
                side.decoding = decode(model, ids, self._n_prompt, stats, bar)

    def _bar(self, side: Side, what: str, total: int, unit: str) -> Any:
        return tqdm(total=total, desc=f"{side.name}: {what}", unit=unit, unit_scale=True, disable=not self._progress)


def evaluate(model: str | os.PathLike[str], **options: Any) -> Report:
    """Perplexity and accuracy of a model from flash, with one gate or several, beside the dense model's.

    Args:
        model, options: as in `Evaluation`.

    Returns:
        The report; `.to_dict()` for JSON.

    Raises:
        TextError: a file is not as it should be. FlashError: the model, a gate or the cap cannot work, and why.
    """
    return Evaluation(model, **options).run()


def _window(preview: Preview, window: int | None) -> int:
    """Tokens of a pass.

    Raises:
        FlashConfigError: the model takes fewer, or is none that predicts the next token.
    """
    config = preview.skeleton.config
    if config.is_encoder_decoder or preview.skeleton.get_output_embeddings() is None:
        raise FlashConfigError(f"{preview.name} does not predict next tokens ({type(preview.skeleton).__name__}).")
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or -1
    if window is None:
        return min(DEFAULT_WINDOW, limit) if limit > 0 else DEFAULT_WINDOW
    if window < 2 or 0 < limit < window:
        raise FlashConfigError(f"--window {window}: expected 2 or more, and at most the {limit} that the model takes.")
    return window


def _with_gate(preview: Preview, gate: str, sparsity: float | None, options: dict[str, Any]) -> Preview:
    """A preview with another gate.

    Raises:
        FlashConfigError: there is no such gate.
    """
    FlashConfig(gate=gate, sparsity=sparsity)
    return preview.with_options(gate=gate, sparsity=sparsity, **options)
