"""What end-to-end tests do over and over: load from flash, generate greedily, compare with the dense model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_flash
from hf_flash import FlashConfig, attach
from hf_flash.budget import MIN_CHUNK_BYTES, Demand, Plan, make_plan, smallest_cap
from hf_flash.budget import _divide as divide
from hf_flash.ffn import FlashFFN

ROOMY = "1GiB"  # a cap under which everything tiny or shipped stays in DRAM


def load(
    folder: Path, memory: int | str = ROOMY, dtype: str | torch.dtype = "auto", auto: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:  # fmt: skip
    """A model from flash; options are FlashConfig's."""
    config = FlashConfig(memory=memory, **{"context": 256, **options})
    return auto.from_pretrained(folder, quantization_config=config, dtype=dtype)


def auto_class(model: PreTrainedModel) -> Any:
    """The Auto class that loads what `model` was saved as."""
    return AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM


def load_any(folder: Path, like: PreTrainedModel, memory: int | str = ROOMY, **options: Any) -> PreTrainedModel:
    """A causal or an encoder-decoder model from flash, by the dense one."""
    return load(folder, memory, auto=auto_class(like), **{"context": 64, **options})


@contextlib.contextmanager
def tightest_plan() -> Iterator[None]:
    """Models loaded in this block get the smallest plan there is, to the byte: whatever can be streamed is."""

    def tightest(demand: Demand, memory: int, residents: bool = True) -> Plan:
        low, high = 0, smallest_cap(demand)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                make_plan(demand, middle)
                high = middle
            except hf_flash.FlashError:
                low = middle
        return make_plan(demand, high)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "make_plan", tightest)
        yield


@contextlib.contextmanager
def packing_plan() -> Iterator[None]:
    """Models loaded in this block get the largest plan that is too small to keep everything as it is."""

    def largest(demand: Demand, memory: int, residents: bool = True) -> Plan:
        low, high = 0, 1 << 32
        while high - low > 1:
            middle = (low + high) // 2
            plan = divide(demand, middle, MIN_CHUNK_BYTES)
            low, high = (low, middle) if plan is not None and plan.unpacked else (middle, high)
        return make_plan(demand, low)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attach, "make_plan", largest)
        yield


def plan_of(model: PreTrainedModel) -> Plan:
    return model._hf_flash.plan


def assert_flash(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """The model runs every FFN from flash, and holds no matrix of one."""
    assert hf_flash.is_flash(model) and not hf_flash.is_flash(like)
    blocks = model._hf_flash.blocks
    assert sum(isinstance(m, FlashFFN) for m in model.modules()) == len(blocks) > 0
    mine = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for block in blocks:
        assert not {part.key for part in (block.gate, block.up, block.down) if part} & mine


def greedy(model: PreTrainedModel, ids: torch.Tensor, n: int, **options: Any) -> torch.Tensor:
    """Exactly n greedy tokens for each row."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, **options},
    )


def logits_of(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_greedy(got: torch.Tensor, want: torch.Tensor, dense: PreTrainedModel) -> None:
    """Two batches of greedy continuations agree, token by token.

    Where a pair differs, the dense model itself must have been undecided there: its two best tokens closer than
    float32 rounds (sums over neurons have no fixed order). What follows such a tie is not compared.
    """
    assert got.shape == want.shape
    for a, b in zip(got, want, strict=True):
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            logits = logits_of(dense, input_ids=a[None, :at])[0, -1]
            gap = abs(float(logits[a[at]] - logits[b[at]]))
            assert gap < 1e-5 * float(logits.abs().max()), f"token {at}: {int(a[at])}, dense {int(b[at])}, gap {gap}"
