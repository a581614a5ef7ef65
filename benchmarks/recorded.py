"""What the simulations of a cache share: which neurons of a model fire at each token of a text, recorded once.

The model is the small ReLU model that ships with hf_flash; --model and --text give others.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from certified import SHIPPED, text_ids

Trace = Sequence[np.ndarray]  # of one layer: sorted neurons that fire, by token


def parse(doc: str, warm: int) -> argparse.Namespace:
    """The arguments: which model on which text, how much of it."""
    parser = common.parser(doc)
    parser.add_argument("--model", default=str(SHIPPED), help="folder of a ReLU model (default: the shipped one)")
    parser.add_argument("--text", help="text file to read (default: a built-in prompt, continued by the model)")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens to record (default 6144)")
    parser.add_argument("--recording", help="folder of a recording that is there, instead of model and text")
    parser.add_argument(
        "--warm", type=int, default=warm, help=f"tokens that warm the caches, not counted (default {warm})"
    )
    return parser.parse_args()


@contextlib.contextmanager
def recording(args: argparse.Namespace) -> Iterator[tuple[Any, int] | None]:
    """A recording of the model on the text, while the block runs, and the bytes of a bundle; None without a model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (Path(args.model) / "config.json").is_file():
        print(f"skipped: there is no model in {Path(args.model).name}")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="hf_flash-recording-") as folder:
        yield _record(args, Path(folder))


def _record(args: Any, folder: Path) -> tuple[Any, int]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_flash.families import find_blocks
    from hf_flash.layout import BundleLayout
    from hf_flash.recording import Recording, record

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    block = find_blocks(model)[0]
    row_bytes = BundleLayout(block.d_model, block.d_out, block.gate is not None, model.dtype).row_bytes
    if args.recording:
        return Recording.open(args.recording), row_bytes
    torch.manual_seed(0)
    ids = text_ids(args, model, AutoTokenizer.from_pretrained(args.model))
    length = min(512, getattr(model.config, "max_position_embeddings", 512))
    return record(model, ids.split(length, dim=1), folder, progress=False), row_bytes


def traces_of(recording: Any, start: int, stop: int) -> list[Trace]:
    """Fired neurons by layer and token."""
    out: list[Trace] = []
    for layer in recording.layers:
        fired = recording.fired(layer, start, stop).numpy()
        out.append([np.flatnonzero(row) for row in fired])
    return out
