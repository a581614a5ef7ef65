"""An evaluation as a table: a row a figure, a column a side. Nothing here prints."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_flash.evaluate import Report
from hf_flash.layout import format_size
from hf_flash.measures import Decoding, TaskScore, TextScore


def report_view(report: Report) -> RenderableType:
    """The dense model and every gate, side by side."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for side in report.sides:
        table.add_column(side.name, justify="right")
    texts = {name: score for side in report.sides for name, score in side.texts.items()}
    for name, text in texts.items():
        _text_rows(table, text, [side.texts.get(name) for side in report.sides])
    tasks = {name: score for side in report.sides for name, score in side.tasks.items()}
    for name, task in tasks.items():
        _task_rows(table, task, [side.tasks.get(name) for side in report.sides])
    if any(side.decoding for side in report.sides):
        _decoding_rows(table, [side.decoding for side in report.sides])
    table.add_row("gate", *(", ".join(side.gates or ["-"]) for side in report.sides))
    table.add_row("memory cap", *("-" if side.memory is None else format_size(side.memory) for side in report.sides))
    table.add_row("seconds", *(f"{side.seconds:.1f}" for side in report.sides))
    stride = "" if report.stride == report.window else f", {report.stride} apart"
    head = f"{report.model}: passes of {report.window} tokens{stride}, batch {report.batch_size}, {report.dtype}"
    lines = [head, f"{report.dense[0].upper()}{report.dense[1:]}."]
    if not report.complete:
        lines.append("INTERRUPTED: what is left blank was not measured.")
    return Group(*(Text(line, overflow="fold") for line in lines), table)


def _text_rows(table: Table, text: TextScore, scores: list[TextScore | None]) -> None:
    table.add_row(f"{text.name}, {text.tokens:,} tokens", *[""] * len(scores), style="bold")
    figures = [None if score is None else score.to_dict() for score in scores]
    for label, key in (
        ("perplexity per token", "perplexity"), ("perplexity per word", "word_perplexity"),
        ("bits per byte", "bits_per_byte"),
    ):  # fmt: skip
        table.add_row(f"  {label}", *("" if found is None else _number(found[key]) for found in figures))


def _task_rows(table: Table, task: TaskScore, scores: list[TaskScore | None]) -> None:
    cut = f", {task.n_cut} contexts cut" if task.n_cut else ""
    table.add_row(f"{task.name}, {task.n:,} questions{cut}", *[""] * len(scores), style="bold")
    table.add_row("  accuracy", *("" if s is None else f"{s.acc:.2%} ± {100 * s.stderr:.2f}" for s in scores))
    if task.last_word:
        table.add_row("  perplexity of the word", *("" if s is None else _number(s.perplexity) for s in scores))
    else:
        table.add_row("  accuracy per character", *("" if s is None else f"{s.acc_norm:.2%}" for s in scores))


def _decoding_rows(table: Table, found: list[Decoding | None]) -> None:
    n = next(decoding.tokens for decoding in found if decoding)
    table.add_row(f"decoding, {n:,} tokens", *[""] * len(found), style="bold")
    table.add_row("  perplexity", *("" if d is None else _number(d.perplexity) for d in found))
    read = ["" if d is None else "-" if d.bytes_per_token is None else format_size(d.bytes_per_token) for d in found]
    table.add_row("  read per token", *read)
    wanted = ["" if d is None else "-" if d.share_wanted is None else f"{d.share_wanted:.2%}" for d in found]
    table.add_row("  neurons wanted", *wanted)


def _number(value: float | None) -> str:
    """Five digits, or so many that three stand behind the point."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    return f"{value:.3f}" if value < 1e4 else f"{value:.4g}"
