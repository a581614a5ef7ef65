"""Caps under which not even attention fits: its matrices, the head and the embedding are streamed, the answers stay."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers_e2e import auto_class, load, load_any, logits_of, plan_of, tightest_plan
from tiny_models import TINY, causal, generate_kwargs, model_inputs
from transformers import PreTrainedModel

import hf_flash
from hf_flash.linear import FlashEmbedding, FlashLinear

# What is streamed at most: (attention matrices and others per model, the head, the embedding).
MODELS: dict[str, tuple[int, bool, bool]] = {
    "llama-relu": (8, True, True),
    "qwen2": (8, True, True),
    "cohere": (8, False, False),  # tied
    "opt": (8, False, False),  # tied
    "opt-postnorm": (8, False, False),
    "phi": (8, True, True),  # a head with a bias
    "gpt2": (0, False, False),  # Conv1D is not streamed
    "falcon-new": (0, False, False),  # neither is FalconLinear
    "bart": (24, False, False),
    "t5": (24, False, False),
}
Stock = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stock]:
    """A tiny model's folder, and what stock transformers loads from it: the oracle."""

    @cache
    def make(name: str) -> Stock:
        build = UNTIED if name == "wide" else TINY[name]
        build().save_pretrained(folder := tmp_path_factory.mktemp(name))
        with torch.device("meta"):
            auto = auto_class(build())
        return folder, auto.from_pretrained(folder).eval()

    return make


# Several chunks per matrix: [1536, 512] float32 is 3 MiB, a chunk a quarter.
UNTIED = partial(
    causal, "llama", hidden_size=512, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=1500, max_position_embeddings=128, hidden_act="relu", attention_bias=True,
)  # fmt: skip


def streamed(folder: Path, dense: PreTrainedModel, **options: object) -> PreTrainedModel:
    with tightest_plan():
        return load_any(folder, dense, **{"gate": "all", **options})


def assert_same(flash: PreTrainedModel, dense: PreTrainedModel) -> None:
    inputs = model_inputs(dense)
    torch.testing.assert_close(logits_of(flash, **inputs), logits_of(dense, **inputs), rtol=1e-4, atol=1e-4)
    assert torch.equal(flash.generate(**generate_kwargs(dense)), dense.generate(**generate_kwargs(dense)))


@pytest.mark.parametrize("name", MODELS)
def test_everything_that_can_be_streamed(name: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock(name)
    flash = streamed(folder, dense, cache_dir=tmp_path)
    plan = plan_of(flash)
    n_inner, head, embedding = MODELS[name]
    linears = [path for path, m in flash.named_modules() if isinstance(m, FlashLinear)]
    embeddings = [path for path, m in flash.named_modules() if isinstance(m, FlashEmbedding)]
    assert sorted(linears + embeddings) == sorted(plan.streamed)
    assert len(linears) == n_inner + head and len(embeddings) == embedding
    assert not {f"{path}.weight" for path in plan.streamed} & {n for n, _ in flash.named_parameters()}
    assert_same(flash, dense)


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_matrices_of_several_chunks(gate: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("wide")
    flash = streamed(folder, dense, gate=gate, cache_dir=tmp_path)
    assert plan_of(flash).chunk_bytes < 512 * 512 * 4
    assert len(plan_of(flash).streamed) == 10
    assert_same(flash, dense)


def test_bytes_per_token_count_what_is_streamed(stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("wide")
    flash = streamed(folder, dense, cache_dir=tmp_path)
    stats, plan = hf_flash.stats(flash), plan_of(flash)
    inner = 2 * (2 * 512 * 512 + 2 * 256 * 512) * 4
    assert plan.bytes_per_token == inner + 1500 * 512 * 4 + 512 * 4 + 2 * 768 * 3 * 512 * 4
    flash.generate(**generate_kwargs(dense, batch=1))
    stats.reset()
    flash.generate(**generate_kwargs(dense, batch=1, length=1, n_tokens=10))
    assert plan.bytes_per_token <= stats.bytes_read / 10 <= plan.bytes_per_token * 1.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, _ = stock("wide")
    dense = auto_class(stock("wide")[1]).from_pretrained(folder, dtype=dtype)
    with tightest_plan():
        flash = load(folder, dtype=dtype, gate="all", cache_dir=tmp_path)
    assert plan_of(flash).streamed
    got, want = logits_of(flash, **model_inputs(dense)), logits_of(dense, **model_inputs(dense))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_repacked_folder_and_saved_again(stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("llama-relu")
    out = hf_flash.repack(folder, tmp_path / "flash", progress=False)
    flash = streamed(out, dense)
    assert len(plan_of(flash).streamed) == 10
    flash.save_pretrained(tmp_path / "again")
    assert_same(load_any(tmp_path / "again", dense), dense)
    assert_same(streamed(tmp_path / "again", dense), dense)


def test_copy(stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("llama-relu")
    flash = streamed(folder, dense, cache_dir=tmp_path)
    other = copy.deepcopy(flash)
    del flash
    assert_same(other, dense)


@pytest.mark.parametrize("name", ["wide", "opt", "t5"])
def test_gradients_pass_through_streamed_matrices(name: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock(name)
    flash = streamed(folder, dense, cache_dir=tmp_path)

    def norm_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**model_inputs(dense), labels=model_inputs(dense)["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if "norm" in n and p.grad is not None}

    got, want = norm_gradients(flash), norm_gradients(dense)
    dense.zero_grad()
    assert got and got.keys() == want.keys()
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_token_ids_out_of_range_are_an_index_error(stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock("llama-relu")
    flash = streamed(folder, dense, cache_dir=tmp_path)
    assert isinstance(flash.get_input_embeddings(), FlashEmbedding)
    for bad in (-1, 128, 1 << 40):
        with pytest.raises(IndexError, match="128"):
            flash(input_ids=torch.tensor([[3, bad]]))
    assert flash.get_input_embeddings()(torch.empty(1, 0, dtype=torch.long)).shape == (1, 0, 32)
    assert_same(flash, dense)
