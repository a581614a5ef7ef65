"""What end-to-end tests do over and over: load from flash, generate greedily, compare with the dense model."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_flash import FlashConfig
from hf_flash.budget import Plan

ROOMY = "1GiB"  # a cap under which everything tiny or shipped stays in DRAM


def load(folder: Path, memory: int | str = ROOMY, dtype: str | torch.dtype = "auto", **options) -> PreTrainedModel:
    """A causal model from flash; options are FlashConfig's."""
    config = FlashConfig(memory=memory, **{"context": 256, **options})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def plan_of(model: PreTrainedModel) -> Plan:
    return model._hf_flash.plan


def assert_greedy(got: torch.Tensor, want: torch.Tensor, dense: PreTrainedModel) -> None:
    """Two batches of greedy continuations agree, token by token.

    Where a pair differs, the dense model itself must have been undecided there: its two best tokens closer than
    float32 rounds (sums over neurons have no fixed order). What follows such a tie is not compared.
    """
    assert got.shape == want.shape
    for a, b in zip(got, want, strict=True):
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            with torch.no_grad():
                logits = dense(a[None, :at]).logits[0, -1].float()
            gap = abs(float(logits[a[at]] - logits[b[at]]))
            assert gap < 1e-5 * float(logits.abs().max()), f"token {at}: {int(a[at])}, dense {int(b[at])}, gap {gap}"


def greedy(model: PreTrainedModel, ids: torch.Tensor, n: int, **options) -> torch.Tensor:
    """Exactly n greedy tokens for each row."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, **options},
    )


def logits_of(model: PreTrainedModel, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits
