"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MEMORY, LOADING, TEXT = "Memory", "Loading", "Text"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="Folder or Hub repo, stock or repacked.")
]
Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", show_default=False, help="A folder that `hf-flash repack` wrote.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", "-m", metavar="SIZE", rich_help_panel=MEMORY, show_default=False,
        help="Cap on all that the model takes, such as 4GiB. Default: HF_FLASH_MEMORY, else three quarters of what is "
        "free.",
    ),
]  # fmt: skip
DemoMemory = Annotated[
    str | None,
    typer.Option(
        "--memory", "-m", metavar="SIZE", rich_help_panel=MEMORY, show_default=False,
        help="Cap. Default: one under which most FFN weights stay on flash.",
    ),
]  # fmt: skip
Gate = Annotated[
    str,
    typer.Option(
        metavar="GATE", rich_help_panel=MEMORY,
        help="all: stream every neuron. certified: read those that may fire (ReLU and its kin). predicted: those that "
        "`hf-flash calibrate` learned to name, not exact. threshold: those above a threshold (SiLU, GELU), not exact. "
        "auto: the best that is exact.",
    ),
]  # fmt: skip
Sparsity = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", rich_help_panel=MEMORY, show_default=False,
        help="Of the activations, this much is dropped by gate threshold. Default: 0.5.",
    ),
]  # fmt: skip
Context = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS", min=1, rich_help_panel=MEMORY, show_default=False,
        help="Tokens to plan the KV cache for. Default: plan, 1024; run, what it will need.",
    ),
]  # fmt: skip
GateBits = Annotated[int, typer.Option(metavar="BITS", help="Bits per weight of the certified gate's sketch, 4 to 8.")]
Active = Annotated[
    float,
    typer.Option(
        "--active", metavar="SHARE", min=0, max=1, rich_help_panel=MEMORY,
        help="Neurons that a token wants in layers with the certified gate, for the expected speed.",
    ),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", rich_help_panel=LOADING, show_default=False,
        help="Compute in bfloat16, float16 or float32. Default: as the checkpoint's config says.",
    ),
]  # fmt: skip
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", rich_help_panel=LOADING, show_default=False, help="Branch, tag or commit of a repo."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", rich_help_panel=LOADING, help="Run the code that a repo brings along.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]

Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", rich_help_panel=TEXT, show_default=False, help="Text, or - for stdin."
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, rich_help_panel=TEXT, help="At most.")
]
Raw = Annotated[bool, typer.Option("--raw", rich_help_panel=TEXT, help="Continue the text; no chat template.")]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", rich_help_panel=TEXT, show_default=False, help="System message of a chat."),
]
Temperature = Annotated[
    float, typer.Option(metavar="T", min=0, rich_help_panel=TEXT, help="0 takes the likeliest token, 1 samples.")
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=TEXT, show_default=False, help="Of the sampling.")
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="FILE", show_default=False,
        help="Say where a token's time goes, and write a trace for ui.perfetto.dev or chrome://tracing.",
    ),
]  # fmt: skip
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="MODEL", rich_help_panel=LOADING, show_default=False, help="Take another model's."),
]
