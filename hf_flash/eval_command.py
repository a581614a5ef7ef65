"""`hf-flash eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_flash.options import MEMORY, Dtype, Json, Memory, Model, Revision, Trust
from hf_flash.terminal import quiet, report

EPILOG = (
    "Examples:\n\nhf-flash eval ./my-model-flash --text held-out.txt --dense ./my-model --memory 1GiB\n\n"
    "hf-flash eval facebook/opt-1.3b --tasks piqa.jsonl --tasks lambada.jsonl --gate all --gate certified --limit 500"
)
_PASSES = "What is measured"


def evaluate(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, rich_help_panel=_PASSES, help="UTF-8; for perplexity."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", show_default=False, rich_help_panel=_PASSES,
            help="Questions, one JSON object a line: context, choices and label, or context and target (a last word). "
            "May be given several times.",
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE", show_default=False, rich_help_panel=MEMORY,
            help="As in run; a column each. Default: auto. May be given several times.",
        ),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE", show_default=False, rich_help_panel=MEMORY,
            help="Of gate threshold; a column each. Default: 0.5. May be given several times.",
        ),
    ] = None,
    memory: Memory = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", show_default=False, rich_help_panel=_PASSES,
            help="The stock model to compare a repacked one with. Default: the repacked one with gate all.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", show_default=False, rich_help_panel=_PASSES,
            help="Of a pass. Default: 1024, or what the model takes.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", show_default=False, rich_help_panel=_PASSES,
            help="From a pass over the text to the next. Default: the window.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_PASSES, help="Windows a pass.")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, rich_help_panel=_PASSES, help="Questions of each file."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", min=2, show_default=False, rich_help_panel=_PASSES, help="Of the text."
        ),
    ] = None,
    decode: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=_PASSES, help="Tokens to feed one by one, for what each reads."
        ),
    ] = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what a gate costs in quality: perplexity and accuracy, the dense model beside the flash one.

    A text is scored in passes of --window tokens, each token once; choices by the sum of their tokens'
    log-probabilities and, as a second figure, per character, as lm-evaluation-harness does. One model is in memory at
    a time. After Ctrl-C the table shows what was measured until then, and says so.
    """
    quiet()
    from hf_flash.evaluate import Evaluation
    from hf_flash.show_eval import report_view

    evaluation = Evaluation(
        model, text=text, tasks=tasks or (), gates=gate or ("auto",), sparsities=sparsity or (),
        memory=memory, dense=dense,
        window=window, stride=stride, batch_size=batch_size, limit=limit, max_tokens=max_tokens, decode=decode,
        dtype=dtype, revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    try:
        evaluation.run()
    finally:
        found = evaluation.report
        if any(side.texts or side.tasks for side in found.sides):
            report(found.to_dict(), report_view(found), as_json)
