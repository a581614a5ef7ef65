"""The attention kernel against torch's own, bit for bit; where torch sums otherwise, or more is asked for, torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_flash
from hf_flash import attention, native

LIB = native.library()
HERE = LIB is not None and bool(LIB.hf_flash_attention()) and attention.agrees(4, 4, 64)
needs_order = pytest.mark.skipif(not HERE, reason="no AVX-512, or torch sums in another order here")


def draw(
    batch: int, n_heads: int, n_shared: int, n: int, size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, keys and values [B, H, T, D] whose large terms cancel; keys and values lie in a longer cache."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_heads, 1, size, generator=generator) * 2
    k, v = (torch.randn(batch, n_shared, n + 5, size, generator=generator) for _ in range(2))
    v *= torch.exp(5 * torch.randn(v.shape, generator=generator))
    half = n // 2
    v[:, :, half : 2 * half] = -v[:, :, :half] * (
        1 + (torch.rand(batch, n_shared, half, size, generator=generator) < 0.1) / 128
    )
    q[..., size // 2 :] = q[..., : size // 2]
    k[..., size // 2 :] = -k[..., : size // 2] * (
        1 + (torch.rand(k[..., : size // 2].shape, generator=generator) < 0.1) / 128
    )
    k[:, :, half : 2 * half] = k[:, :, :half]
    return q.bfloat16(), k.bfloat16()[:, :, :n], v.bfloat16()[:, :, :n]


def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


@needs_order
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 64, 100, 303, 511, 512, 513, 600, 1024, 1530])
def test_it_has_torchs_bits(n: int, size: int) -> None:
    for batch, n_heads, n_shared in ((1, 8, 8), (2, 6, 2), (3, 2, 1)):
        q, k, v = draw(batch, n_heads, n_shared, n, size, seed=n)
        assert attention.agrees(batch * n_heads, batch * n_shared, size)
        assert torch.equal(attention.attend(q, k, v, 0.3), torchs(q, k, v, 0.3)), (batch, n_heads, n_shared)


@needs_order
def test_strides_of_any_kind() -> None:
    q, k, v = draw(2, 4, 4, 50, 32)
    want = torchs(q, k, v, 0.2)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(attention.attend(q, k, v, 0.2), want)


@needs_order
@pytest.mark.parametrize("n", [5, 16, 40, 600])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(n: int, number: float) -> None:
    for at in {0, 3, n // 2, n - 1}:
        q, k, v = draw(1, 4, 4, n, 16)
        q[0, 1:3] = q[0, 1:3].abs()
        v[0, 0, at, 3] = k[0, 1, at] = number
        k[0, 2, :] = -float("inf")  # no score counts
        found, want = attention.attend(q, k, v, 0.25), torchs(q, k, v, 0.25)
        assert torch.equal(found.isnan(), want.isnan())
        assert torch.equal(found.nan_to_num(7), want.nan_to_num(7))


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def otherwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **kwargs).bfloat16()

    monkeypatch.setattr(attention, "scaled_dot_product_attention", otherwise)
    attention._compare.cache_clear()
    try:
        assert not attention.agrees(8, 8, 64)
    finally:
        attention._compare.cache_clear()


def test_what_cannot_be_the_same_is_refused() -> None:
    assert not attention.agrees(4, 4, 40)  # no whole vectors
    assert not attention.agrees(1, 1, 64)  # torch shares one head among its threads


class Counted:
    """Counts the calls of the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, true = 0, attention.attend
        assert attention.agrees(4, 2, 16)  # compared before anything is counted
        assert attention.agrees(4, 4, 16)

        def attend(*args: Any) -> torch.Tensor:
            self.n += 1
            return true(*args)

        monkeypatch.setattr(attention, "attend", attend)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 128,
    }  # fmt: skip
    more = {"ffn_dim": 96, "word_embed_proj_dim": 64} if kind == "opt" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).bfloat16().eval()


@needs_order
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_model_generates_with_it_to_the_bit(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    dense, model = model_of(kind), model_of(kind)
    hf_flash.patch(model, memory="1GiB", gate="all", cache_dir=str(tmp_path))
    counted = Counted(monkeypatch)
    ids = torch.randint(3, 120, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = dense.generate(ids, **options)
    assert counted.n == 0, "a model that is not ours was given the kernel"
    found = model.generate(ids, **options)
    assert counted.n == 2 * 11
    assert torch.equal(found.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, want.logits, strict=True))


@needs_order
def test_padding_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    dense, model = model_of("llama"), model_of("llama")
    hf_flash.patch(model, memory="1GiB", gate="all", cache_dir=str(tmp_path))
    counted = Counted(monkeypatch)
    inputs = {"input_ids": torch.randint(3, 120, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    inputs["attention_mask"][0, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), dense.generate(**inputs, **options))
    assert counted.n == 0


def test_other_models_keep_transformers_function(tmp_path: Any) -> None:
    model = TINY["llama"]()
    hf_flash.patch(model, memory="1GiB", cache_dir=str(tmp_path))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.forward
    stranger = TINY["llama"]()
    assert not any(hasattr(module, "_hf_flash_attends") for module in stranger.modules())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(stranger(ids).logits, TINY["llama"]()(ids).logits)
