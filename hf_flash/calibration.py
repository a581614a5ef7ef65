"""`hf-flash calibrate`: what a text teaches about a model, as a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hf_flash.options import MEMORY, Json, Memory, Trust
from hf_flash.terminal import hint, quiet, report

if TYPE_CHECKING:
    from rich.console import RenderableType

EPILOG = (
    "Examples:\n\nhf-flash calibrate ./opt-6.7b-flash --text books.txt --memory 4GiB\n\n"
    "hf-flash calibrate ./opt-6.7b-flash --text books.txt --gate certified --max-tokens 4096\n\n"
    "hf-flash calibrate facebook/opt-1.3b --text books.txt --output ./opt-1.3b-flash --lookahead"
)
TRAINING = "Training"


def calibrate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", show_default=False, help="Repacked folder; with --output also a stock one."),
    ],
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", show_default=False, help="UTF-8 text like what it will read.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default=False, help="Write here. Default: into MODEL itself."),
    ] = None,
    gate: Annotated[
        Literal["certified", "predicted"] | None,
        typer.Option(
            metavar="GATE",
            show_default=False,
            help="certified: learn what is usual and train nothing; 4096 tokens do. Default: both, for ReLU.",
        ),
    ] = None,
    memory: Memory = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Tokens of the text, from all over it.")
    ] = 65536,
    recall: Annotated[
        float, typer.Option(metavar="SHARE", rich_help_panel=TRAINING, help="Of what fires, this much must be read.")
    ] = 0.99,
    precision: Annotated[
        float,
        typer.Option(
            metavar="SHARE", rich_help_panel=TRAINING, help="Of what is read, this much should fire: decides the ranks."
        ),
    ] = 0.5,
    lookahead: Annotated[
        bool,
        typer.Option("--lookahead", rich_help_panel=MEMORY, help="Also predict each layer from the one before it."),
    ] = False,
    epochs: Annotated[int, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Passes over the tokens.")] = 4,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Of the training.")] = 0,
    keep_recording: Annotated[
        bool, typer.Option("--keep-recording", help="Keep what was recorded, for `hf-flash repack --order FOLDER`.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Learn from a text what gates can make use of, for a model that need not fit into memory.

    For ReLU models: what is usual of their inputs and neurons, by which the lossless gate `certified` reads less; and,
    without --gate certified, the predictors of the gate `predicted`. For SiLU and GELU models, which have nothing to
    predict, the thresholds of the gate `threshold` instead.

    Runs the repacked model under the cap, records on disk what its neurons do, and learns layer by layer. Writes
    gates.safetensors and a report by layer. An interrupted run goes on where it stopped when the same command is given
    again.
    """
    quiet()
    from hf_flash.calibrate import calibrate as train

    made = train(
        model, text, output, gate=gate, memory=memory, recall=recall, precision=precision, lookahead=lookahead,
        max_tokens=max_tokens, epochs=epochs, seed=seed, trust_remote_code=trust_remote_code,
        keep_recording=keep_recording,
    )  # fmt: skip
    report(made.to_dict(), _view(made.report), as_json)
    asked = "" if gate == "certified" else "--gate predicted "
    asked = "--gate threshold --sparsity 0.5 " if "threshold" in made.report else asked
    hint(f"next: hf-flash run {made.folder} {asked}--memory SIZE --prompt TEXT")


def _view(figures: dict[str, Any]) -> RenderableType:
    """The report as tables."""
    from rich.console import Group
    from rich.table import Table

    from hf_flash.layout import format_size

    tables: list[RenderableType] = []
    if "usual" in figures:
        part = figures["usual"]
        tables.append("gate certified: of inputs' length, what no known direction holds; neurons that fire")
        table = Table(box=None)
        for column in ("layer", "rest", "fire"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for row in part["layers"]:
            table.add_row(row["layer"], f"{row['rest']:.1%}", f"{row['fired']:.2%}")
        table.add_section()
        table.add_row("all", f"{part['rest']:.1%}", f"{part['fired']:.2%}")
        tables.append(table)
    for name, title in (("predicted", "gate predicted"), ("lookahead", "lookahead, from the layer before")):
        if name not in figures:
            continue
        part = figures[name]
        columns = ("layer", "rank", "recall", "precision", "read", "fire", "of", "bytes")
        table = Table(title=f"{title}, on text kept aside", title_justify="left", box=None)
        for column in columns:
            table.add_column(column, justify="left" if column == "layer" else "right")
        for row in part["layers"]:
            shares = (f"{row['recall']:.2%}", f"{row['precision']:.1%}", f"{row['wanted']:.1f}", f"{row['fired']:.1f}")
            table.add_row(row["layer"], str(row["rank"]), *shares, str(row["n_neurons"]), format_size(row["n_bytes"]))
        shares = (f"{part['recall']:.2%}", f"{part['precision']:.1%}", f"{part['wanted']:.2%}", f"{part['fired']:.2%}")
        table.add_section()
        table.add_row("all", "", *shares, "", format_size(part["n_bytes"]))
        tables.append(table)
    if "threshold" in figures:
        part = figures["threshold"]
        size = format_size(part["n_bytes"])
        tables.append(f"gate threshold: sketches of {part['bits']} bits, {size}; thresholds by sparsity")
        table = Table(box=None)
        names = list(part["layers"][0])
        for column in names:
            table.add_column(column, justify="left" if column == "layer" else "right")
        for row in part["layers"]:
            table.add_row(*(str(row[column]) for column in names))
        tables.append(table)
    return Group(*tables)
