"""`hf-flash bench`: what a token costs on this machine, and with --ladder what each of the paper's ideas is worth."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from hf_flash.errors import CheckpointError, FlashConfigError
from hf_flash.options import MEMORY, TEXT, Dtype, Json, Model, Revision, Trust
from hf_flash.terminal import hint, quiet, report

EPILOG = (
    "Examples:\n\nhf-flash bench ./opt-1.3b-flash --ladder\n\n"
    "hf-flash bench facebook/opt-6.7b --memory 4GiB --ladder --tokens 64 --json"
)


def bench(
    model: Model,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", "-m", metavar="SIZE", rich_help_panel=MEMORY, show_default=False,
            help="Cap on all that the model takes, such as 4GiB. Default: HF_FLASH_MEMORY, else half of the weights.",
        ),
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="A row for each idea: naive, half resident, + gate, + window, ...")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", "-n", metavar="N", min=1, help="To measure on each row.")] = 32,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", rich_help_panel=TEXT, show_default=False, help="To begin with."),
    ] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what a new token costs: bytes, bandwidth, and the seconds of reads, bookkeeping and arithmetic.

    --ladder runs the model with parts of the engine switched off, from reading everything for every token to the whole
    method, as Tables 2 and 3 of "LLM in a flash" do. Every row is run, and all must give the same tokens. A stock model
    is repacked into the cache first.
    """
    quiet()
    from hf_flash import ladder as steps
    from hf_flash import session, show_speed
    from hf_flash.config import MEMORY_VARIABLE, FlashConfig
    from hf_flash.preview import look

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    preview = look(model, FlashConfig(memory or os.environ.get(MEMORY_VARIABLE)), dtype=dtype, **options)
    vocab = preview.skeleton.config.get_text_config(decoder=True).vocab_size
    try:
        inputs = session.encode(session.load_tokenizer(model, **options), prompt or steps.PROMPT, raw=True)
    except (CheckpointError, FlashConfigError):  # none, or, where transformers makes do with an empty one, no tokens
        if prompt is not None:
            raise
        hint("no tokenizer: the prompt is 32 random tokens, always the same")
        inputs = {"input_ids": steps.random_prompt(vocab)}
    longest = steps.n_new_tokens(steps.OVERLAP, tokens)
    preview = session.fit_context(preview, inputs, longest)
    preview = preview.with_options(memory=preview.config.memory or steps.half_cap(preview))
    rungs, left_out = steps.rungs_for(preview, ladder)
    for rung in rungs:  # a cap that is too small shows now, not after minutes
        session.planned(preview.with_options(gate=rung.gate, without=rung.without))
    found = steps.climb(preview, inputs["input_ids"], tokens, rungs, left_out, **options)
    report(found.to_dict(), show_speed.ladder_view(found), as_json)
