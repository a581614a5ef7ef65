"""A token's attention in one call: to the bit what its modules make of it; they run where it is not plain."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers_e2e import greedy
from helpers_hub import tiny_opt
from helpers_steps import (
    CACHE,
    HERE,
    IDS,
    MODELS,
    Folders,
    Model,
    N,
    assert_same,
    assert_stock_logits,
    generate,
    steps_of,
    stock,
)
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface
from transformers.models.opt import modeling_opt

from hf_flash import attention
from hf_flash.attention_step import KINDS, AttentionStep
from hf_flash.linear import PackedLinear

pytestmark = pytest.mark.skipif(not HERE, reason="no AVX512-VBMI2, or torch sums in another order here")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_it_has_the_modules_bits(folder_of: Folders, kind: str, exact: bool) -> None:
    folder, options = folder_of(kind), {"gate": "all", "exact": exact}
    model = Model(folder, AttentionStep, **options)
    found, want = generate(model.flash), generate(stock(folder, **options))
    # The first token is the prompt's.
    assert model.n == len(model.steps) * (N - 1)
    assert all(step.is_proven for step in model.steps)
    assert_same(found, want)


def test_every_kind_is_tested(folder_of: Folders) -> None:
    names = {
        type(step._module).__name__
        for kind in MODELS
        for step in Model(folder_of(kind), AttentionStep, gate="all").steps
    }
    assert names == set(KINDS)


@pytest.fixture
def opt(folder_of: Folders) -> tuple[Model, torch.Tensor]:
    """A model, and the tokens that it gives after the 9 of IDS."""
    folder = folder_of("opt")
    return Model(folder, AttentionStep, gate="all"), greedy(stock(folder, gate="all"), IDS, N)


def test_several_sequences_and_padding_go_the_stock_way(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    assert torch.equal(model.tokens(IDS.repeat(2, 1)), want.repeat(2, 1))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    model.flash.generate(padded, attention_mask=mask, max_new_tokens=N, do_sample=False)
    assert model.n == 0


def test_eager_attention_and_gradients_go_the_stock_way(opt: tuple[Model, torch.Tensor]) -> None:
    model, _ = opt
    cache = DynamicCache(config=model.flash.config)
    for part in IDS.split([6, 1, 1, 1], 1):
        model.flash(part, use_cache=True, **{CACHE: cache})  # gradients are on
    assert model.n == 0
    model.flash.set_attn_implementation("eager")
    assert model.tokens().shape == (1, 9 + N) and model.n == 0


def test_a_function_that_was_registered_since_is_used(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    calls = []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return attention.forward(*args, **kwargs)

    AttentionInterface.register("sdpa", mine)
    try:
        assert torch.equal(model.tokens(), want) and calls and model.n == 0
    finally:
        AttentionInterface.register("sdpa", attention.forward)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_a_projection_are_called(opt: tuple[Model, torch.Tensor], when: str) -> None:
    model, want = opt
    seen = []
    part = model.steps[1]._module.get_submodule("k_proj")
    register = part.register_forward_hook if when == "after" else part.register_forward_pre_hook
    handle = register(lambda *args: seen.append(1))
    assert torch.equal(model.tokens(), want) and len(seen) == N
    assert model.n == (len(model.steps) - 1) * (N - 1)
    handle.remove()
    assert torch.equal(model.tokens(), want) and len(seen) == N
    assert model.n == (2 * len(model.steps) - 1) * (N - 1)


def test_a_projection_that_was_exchanged_is_used(opt: tuple[Model, torch.Tensor]) -> None:
    """As adapters do it."""
    model, want = opt

    class Wrapped(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.calls = base, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.base(x)

    module: Any = model.steps[0]._module
    module.q_proj = wrapped = Wrapped(module.q_proj)
    assert torch.equal(model.tokens(), want) and wrapped.calls == N


def test_a_bias_that_changed_counts(opt: tuple[Model, torch.Tensor]) -> None:
    model, _ = opt
    model.tokens()
    for name, part in model.flash.named_modules():
        if isinstance(part, PackedLinear) and "self_attn" in name:
            part.bias.data = torch.full_like(part.bias, 0.25)
    assert_stock_logits(model.flash)


def test_a_cache_that_was_cut_goes_on(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    cache = DynamicCache(config=model.flash.config)
    with torch.no_grad():
        for part in (want[:, :9], *want[:, 9:15].split(1, 1)):
            model.flash(part, use_cache=True, **{CACHE: cache})
        n = model.n
        cache.crop(11 - 15)
        for i in range(11, 9 + N - 1):
            logits = model.flash(want[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits
            assert int(logits[0, -1].argmax()) == int(want[0, i + 1])
    assert model.n > n > 0


def test_a_copy_has_its_own(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    other = copy.deepcopy(model.flash)
    theirs = steps_of(other)
    modules = set(map(id, other.modules()))
    assert len(theirs) == len(model.steps) and all(id(step._module) in modules for step in theirs)
    assert torch.equal(greedy(other, IDS, N), want) and model.n == 0
    assert all(step._can and step.is_proven for step in theirs)


def test_threads_of_a_server(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model.tokens(), range(12)))
    assert all(torch.equal(tokens, want) for tokens in found) and model.n > 0


def test_another_forward_is_noticed(
    folder_of: Folders, opt: tuple[Model, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformers that computes otherwise one day: its own results, and the kernel is asked no more."""
    true = modeling_opt.OPTAttention.forward

    def otherwise(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        out, weights = true(self, hidden_states, **kwargs)
        return out * 1.5, weights

    monkeypatch.setattr(modeling_opt.OPTAttention, "forward", otherwise)
    model = Model(folder_of("opt"), AttentionStep, gate="all")
    want = greedy(stock(folder_of("opt"), gate="all"), IDS, N)
    assert torch.equal(model.tokens(), want) and not torch.equal(want, opt[1])
    assert model.n == len(model.steps) and not any(step._can for step in model.steps)


def test_other_threads_are_another_proof(opt: tuple[Model, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, want = opt
    model.tokens()
    assert all(step.is_proven for step in model.steps)
    n = torch.get_num_threads()
    torch.set_num_threads(3 - n if n < 3 else 1)
    try:
        with torch.no_grad():
            assert torch.equal(model.tokens(), want)
        assert all(step._n_threads == torch.get_num_threads() for step in model.steps)
    finally:
        torch.set_num_threads(n)


def test_its_signature_is_the_stock_ones(opt: tuple[Model, torch.Tensor]) -> None:
    """transformers and peft look what a forward takes."""
    step = opt[0].steps[0]
    assert inspect.signature(step) == inspect.signature(step._stock)


def test_modules_of_other_kinds_keep_theirs() -> None:
    assert not any(AttentionStep.can(module) for module in tiny_opt().modules())  # nothing is packed
