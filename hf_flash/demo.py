"""The demo: the model that comes with the package, under a cap that it does not fit into, against itself in DRAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_flash.preview import Preview
from hf_flash.session import Session

MODEL = Path(__file__).parent / "models" / "relu-books-5m"
PROMPT = "It was a dark night and the"
N_TOKENS = 48
CONTEXT = 128
_STEP = 1 << 20


def tight_cap(preview: Preview, share: float = 0.4) -> int:
    """The smallest cap, in whole MiB, that leaves room for a share of the FFN weights: the rest has to be read.

    Args:
        preview: of the demo's model, with the demo's options.
        share: of the FFN bytes that the cache should hold at least.

    Returns:
        Bytes.
    """
    cap = preview.smallest_cap
    while preview.with_options(memory=cap).plan().parts["FFN cache"] < share * preview.ffn_bytes:
        cap += _STEP
    return cap


def dense_tokens(session: Session, inputs: dict[str, torch.Tensor], n_tokens: int) -> list[int]:
    """The tokens that the stock model, whole in DRAM, generates greedily from the same prompt."""
    dense: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=session.model.dtype)
    with torch.inference_mode():
        out = dense.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=n_tokens)
    return [int(token) for token in out[0, inputs["input_ids"].shape[1] :]]
