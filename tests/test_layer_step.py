"""A decoder layer's token in a native call: to the bit what its modules make of it; else they run."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers_e2e import greedy
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
    held,
    steps_of,
    stock,
)
from torch import nn
from transformers import DynamicCache
from transformers.models.opt import modeling_opt

import hf_flash
from hf_flash import norms, trace
from hf_flash.layer_calls import NOTHING, WHOLE
from hf_flash.layer_step import KINDS, LayerStep

pytestmark = pytest.mark.skipif(
    not HERE or not norms.agrees(128, True) or not norms.agrees(128, False),
    reason="no AVX512-VBMI2, or torch sums in another order here",
)
KNOWN = [kind for kind in MODELS if kind not in ("gemma", "granite")]  # those norm, or add, in ways of their own


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("options", [{"gate": "all"}, {"gate": "all", "exact": False}, {"gate": "auto"}], ids=str)
@pytest.mark.parametrize("kind", KNOWN)
def test_it_has_the_modules_bits(folder_of: Folders, kind: str, options: dict[str, Any]) -> None:
    model = Model(folder_of(kind), LayerStep, **options)
    assert len(model.steps) == model.flash.config.num_hidden_layers
    found, want = generate(model.flash), generate(stock(folder_of(kind), **options))
    # The first token is the prompt's.
    assert model.n == len(model.steps) * (N - 1)
    assert all(step._proven for step in model.steps)
    assert_same(found, want)


def test_every_kind_is_tested(folder_of: Folders) -> None:
    names = set()
    for kind in KNOWN:
        names |= {type(step._layer).__name__ for step in Model(folder_of(kind), LayerStep, gate="all").steps}
    assert names == set(KINDS)


@pytest.mark.parametrize("kind", ["gemma", "granite"])
def test_others_keep_their_layers(folder_of: Folders, kind: str) -> None:
    assert not Model(folder_of(kind), LayerStep, gate="all").steps


@pytest.fixture
def opt(folder_of: Folders) -> tuple[Model, torch.Tensor]:
    """A model, and the tokens that it gives after the 9 of IDS."""
    return Model(folder_of("opt"), LayerStep, gate="all"), greedy(stock(folder_of("opt"), gate="all"), IDS, N)


@pytest.mark.parametrize(
    "part", ["self_attn", "self_attn_layer_norm", "final_layer_norm", "activation_fn", "fc1", "fc2"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_a_part_are_called(opt: tuple[Model, torch.Tensor], part: str, when: str) -> None:
    model, want = opt
    seen = []
    module = model.steps[1]._layer.get_submodule(part)
    register = module.register_forward_hook if when == "after" else module.register_forward_pre_hook
    handle = register(lambda *args: seen.append(1))
    assert torch.equal(model.tokens(), want) and len(seen) == N
    handle.remove()
    assert torch.equal(model.tokens(), want) and len(seen) == N
    assert model.n == (2 * len(model.steps) - (part != "fc1")) * (N - 1)  # the FFN is called as ever


def test_a_part_that_was_exchanged_is_used(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    layer = model.steps[0]._layer
    calls = []

    class Other(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(x)

    other = Other(128, dtype=torch.bfloat16)
    other.load_state_dict(layer.final_layer_norm.state_dict())
    layer.final_layer_norm = other
    assert torch.equal(model.tokens(), want) and len(calls) == N


def test_a_forward_that_was_wrapped_is_called(opt: tuple[Model, torch.Tensor]) -> None:
    """As accelerate does it."""
    model, want = opt
    layer = model.steps[0]._layer
    calls = []

    def wrap(module: Any) -> None:
        before = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return before(*args, **kwargs)

        module.forward = forward

    for module in (layer.final_layer_norm, layer.self_attn):
        wrap(module)
        calls.clear()
        assert torch.equal(model.tokens(), want) and calls


def test_a_norm_that_changed_counts(opt: tuple[Model, torch.Tensor]) -> None:
    model, _ = opt
    model.tokens()
    for step in model.steps:
        norm = step._layer.final_layer_norm
        norm.weight.data = norm.weight.data * 1.5
        with torch.no_grad():
            norm.bias += 0.25
    n = model.n
    assert_stock_logits(model.flash)
    assert model.n > n


def test_a_layer_that_is_filled_when_its_turn_comes(opt: tuple[Model, torch.Tensor]) -> None:
    """As offloading hooks do it."""
    model, want = opt
    model.tokens()
    n = model.n
    for step in model.steps:
        norm = step._layer.final_layer_norm
        weight = norm.weight.data

        def fill(*args: Any, norm: Any = norm, weight: torch.Tensor = weight) -> None:
            norm.weight.data = weight

        def empty(*args: Any, norm: Any = norm) -> None:
            norm.weight.data = torch.empty(0, dtype=torch.bfloat16)

        step._layer.register_forward_pre_hook(fill)
        step._layer.register_forward_hook(empty)
        empty()
    assert torch.equal(model.tokens(), want) and model.n == n + len(model.steps) * (N - 1)


def test_outputs_that_are_asked_for_are_there(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    options = {"max_new_tokens": N, "min_new_tokens": N, "do_sample": False, "return_dict_in_generate": True}
    for _ in range(2):
        found = model.flash.generate(IDS, output_hidden_states=True, **options)
        assert torch.equal(found.sequences, want)
        assert all(len(states) == len(model.steps) + 1 for states in found.hidden_states)
    expected = generate(model.flash)
    assert torch.equal(expected.sequences, want)


def test_training_goes_the_stock_way(opt: tuple[Model, torch.Tensor]) -> None:
    model, _ = opt
    model.flash.train()
    with torch.no_grad():
        model.tokens()
    assert model.n == 0


def test_a_profile_sees_an_attention_in_it(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    model.tokens()
    n = model.n
    with hf_flash.profile(model.flash) as profile:
        assert torch.equal(model.tokens(), want)
    assert model.n == n + len(model.steps) * (N - 1)
    paths = {path for path, module in model.flash.named_modules() if "forward" in vars(module)}
    attentions = [span for span in profile.recorder.spans if span.name == trace.ATTENTION]
    assert {span.layer for span in attentions} <= paths and len(attentions) == len(model.steps) * N
    assert profile.breakdown().rows["attention"] > 0


def test_a_copy_has_its_own(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    other = copy.deepcopy(model.flash)
    theirs = steps_of(other, LayerStep)
    modules = set(map(id, other.modules()))
    assert len(theirs) == len(model.steps) and all(id(step._layer) in modules for step in theirs)
    assert torch.equal(greedy(other, IDS, N), want) and model.n == 0
    assert all(step._proven for step in theirs)
    assert [step.chain.index(step) for step in theirs] == [step.at for step in theirs] == list(range(len(theirs)))
    assert all(step.chain == theirs for step in theirs)


def test_a_deep_model_can_be_copied(folder_of: Folders, opt: tuple[Model, torch.Tensor]) -> None:
    """Each layer names the others: copied one within the other, eighty of them would be too deep for Python."""
    chain = opt[0].steps[0].chain
    chain += [LayerStep(copy.deepcopy(step._layer), "") for step in chain * 60]
    for at, step in enumerate(chain):
        step.chain, step.at, step._layer.forward = chain, at, step
    assert len(copy.deepcopy(chain[0]._layer).forward.chain) == len(chain) == 122


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pass_that_was_left_keeps_no_cache(opt: tuple[Model, torch.Tensor], when: str) -> None:
    """Stopped when the layers are prepared, or when all have run and the second is about to say so."""
    model, want = opt
    model.tokens()
    ffn, second = model.steps[0]._layer.fc1, model.steps[1]._layer
    others, handles = ffn.on_pass, []

    def hook(n_tokens: int) -> None:
        handles.append(second.register_forward_pre_hook(_stop))

    cache = DynamicCache(config=model.flash.config)
    with torch.no_grad():
        for part in IDS.split([6, 1, 1, 1], 1):
            model.flash(part, use_cache=True, **{CACHE: cache})
        ffn.on_pass = [_stop if when == "before" else hook]
        with pytest.raises(KeyboardInterrupt):
            model.flash(want[:, 9:10], use_cache=True, **{CACHE: cache})
        ffn.on_pass = others
        for handle in handles:
            handle.remove()
    (ready,) = model.steps[1]._ready.values()
    assert ready.told.done == (NOTHING if when == "before" else WHOLE)
    del ready
    alive = [weakref.ref(cache), *map(weakref.ref, cache.layers), *map(weakref.ref, held(cache))]
    del cache
    gc.collect()
    assert not [one for one in alive if one() is not None]
    assert torch.equal(model.tokens(), want)


def _stop(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_result_that_a_hook_changed_is_used(opt: tuple[Model, torch.Tensor], folder_of: Folders) -> None:
    model, want = opt
    model.tokens()
    n = model.n

    def change(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * 1.25

    other = stock(folder_of("opt"), gate="all")
    for one in (model.flash, other):
        one.get_submodule(model.steps[0]._path).register_forward_hook(change)
    found = model.tokens()
    assert torch.equal(found, greedy(other, IDS, N)) and not torch.equal(found, want)
    assert model.n == n + len(model.steps) * (N - 1)


def test_a_cache_that_was_touched_in_between_is_used_as_it_is(
    opt: tuple[Model, torch.Tensor], folder_of: Folders
) -> None:
    """A hook of the first layer has the second one forget its first token."""
    model, _ = opt
    model.tokens()
    other = stock(folder_of("opt"), gate="all")
    logits = []
    for one in (model.flash, other):
        cache = DynamicCache(config=one.config)

        def forget(*args: Any, cache: Any = cache) -> None:
            layer = cache.layers[1]
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]

        with torch.no_grad():
            for part in IDS[:, :8].split([6, 1, 1], 1):
                one(part, use_cache=True, **{CACHE: cache})
            handle = one.get_submodule(model.steps[0]._path).register_forward_hook(forget)
            logits.append([one(IDS[:, -1:], use_cache=True, **{CACHE: cache}).logits for _ in range(3)])
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_threads_of_a_server(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model.tokens(), range(12)))
    assert all(torch.equal(tokens, want) for tokens in found) and model.n > 0
    assert all(step._proven for step in model.steps)


@pytest.mark.parametrize("what", ["result", "way to the FFN", "returned"])
def test_another_forward_is_noticed(
    folder_of: Folders, opt: tuple[Model, torch.Tensor], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A transformers that computes otherwise one day: its own results, and the kernel is asked no more."""
    true = modeling_opt.OPTDecoderLayer.forward

    def otherwise(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        if what == "way to the FFN":
            hidden_states = hidden_states * 1.5
        out = true(self, hidden_states, **kwargs)
        return out * 1.5 if what == "result" else out.view_as(out) + 0.0 if what == "returned" else out

    monkeypatch.setattr(modeling_opt.OPTDecoderLayer, "forward", otherwise)
    model = Model(folder_of("opt"), LayerStep, gate="all")
    want = greedy(stock(folder_of("opt"), gate="all"), IDS, N)
    assert torch.equal(model.tokens(), want)
    if what == "returned":
        assert all(step._proven for step in model.steps)
        return
    assert not torch.equal(want, opt[1])
    assert model.n == len(model.steps) and all(step._refused for step in model.steps)


def test_other_threads_are_another_proof(opt: tuple[Model, torch.Tensor]) -> None:
    model, want = opt
    model.tokens()
    n = torch.get_num_threads()
    torch.set_num_threads(3 - n if n < 3 else 1)
    try:
        assert torch.equal(model.tokens(), want)
        assert all(step._step.is_proven for step in model.steps)
        assert all(step._step._n_threads == torch.get_num_threads() for step in model.steps)
    finally:
        torch.set_num_threads(n)


def test_its_signature_is_the_stock_ones(opt: tuple[Model, torch.Tensor]) -> None:
    step = opt[0].steps[0]
    assert inspect.signature(step) == inspect.signature(step._stock)
