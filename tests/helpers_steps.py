"""Models whose layers and attentions take decoded tokens in one native call, and the same ones without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from helpers_e2e import greedy, load, packing_plan
from helpers_hub import VOCAB, save_stock, tiny_llama, tiny_opt
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.opt import modeling_opt

import hf_flash
from hf_flash import attention, native, tight
from hf_flash.attention_step import AttentionStep
from hf_flash.kv import CACHE_NAMES
from hf_flash.layer_calls import NOTHING, LayerCall
from hf_flash.layer_step import LayerStep

LIB = native.library()
HERE = LIB is not None and bool(LIB.hf_flash_attention()) and attention.agrees(4, 4, 32) and tight.available()
IDS = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
N = 12
CACHE = next(n for n in CACHE_NAMES if n in inspect.signature(modeling_opt.OPTForCausalLM.forward).parameters)


def tiny(kind: str) -> PreTrainedModel:
    """Two layers of a family that has no builder of its own."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": None,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: tiny_opt(hidden_size=128, word_embed_proj_dim=128),
    "llama": lambda: tiny_llama("silu", hidden_size=128, attention_bias=True),
    **{kind: lambda kind=kind: tiny(kind) for kind in ("mistral", "qwen2", "gemma", "granite", "starcoder2")},
}


class Folders:
    """Where flash checkpoints of the families lie; each is made when it is first asked for."""

    def __init__(self, base: Path) -> None:
        self._base, self._made = base, dict[str, Path]()

    def __call__(self, kind: str) -> Path:
        if kind not in self._made:
            folder = self._base / kind
            save_stock(folder / "stock", MODELS[kind]().bfloat16())
            self._made[kind] = hf_flash.repack(folder / "stock", folder / "flash", pack=True, progress=False)
        return self._made[kind]


def steps_of(model: PreTrainedModel, what: type = AttentionStep) -> list[Any]:
    found = [vars(module).get("forward") for module in model.modules()]
    return [step for step in found if isinstance(step, what)]


class Model:
    """A model from flash whose matrices are packed.

    Attributes:
        steps: of its attentions, or of its layers. n: tokens that native calls took through one of them.
    """

    def __init__(self, folder: Path, what: type, **options: Any) -> None:
        with packing_plan():
            self.flash = load(folder, **options)
        self._n = 0
        for module in self.flash.modules():
            if what is AttentionStep and isinstance(vars(module).get("forward"), LayerStep):
                del module.forward
        self.steps = steps_of(self.flash, what)
        self._calls: list[LayerCall] = []
        for step in self.steps:
            assert step.describe()
            if what is AttentionStep:
                step._run = self._counted(step._run)
            else:
                step.prepare = self._kept(step.prepare)

    def _counted(self, true: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            self._n += 1
            true(*args)

        return run

    def _kept(self, true: Callable[..., LayerCall | None]) -> Callable[..., LayerCall | None]:
        def prepare(*args: Any) -> LayerCall | None:
            call = true(*args)
            self._calls += [call] if call is not None else []
            return call

        return prepare

    @property
    def n(self) -> int:
        return self._n + sum(call.told.done != NOTHING for call in self._calls)

    def tokens(self, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
        return greedy(self.flash, ids, N, **options)


def stock(folder: Path, **options: Any) -> PreTrainedModel:
    """The same model, its attentions as transformers has them."""
    with packing_plan():
        model = load(folder, **options)
    take_away(model)
    return model


def take_away(model: PreTrainedModel) -> None:
    """Leave a model its modules' own forwards."""
    for module in model.modules():
        vars(module).pop("forward", None)


def assert_stock_logits(model: PreTrainedModel) -> None:
    """It generates what its modules make of it; afterwards they do."""
    found = generate(model)
    take_away(model)
    want = generate(model)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, want.logits, strict=True))


def assert_same(found: Any, want: Any) -> None:
    """Tokens, logits and caches of two generations are equal."""
    assert torch.equal(found.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, want.logits, strict=True))
    caches = [next(getattr(out, name) for name in CACHE_NAMES if hasattr(out, name)) for out in (found, want)]
    assert all(torch.equal(a, b) for a, b in zip(*map(held, caches), strict=True))


def held(cache: Any) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def generate(model: PreTrainedModel, n: int = N) -> Any:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(IDS, max_new_tokens=n, min_new_tokens=n, **options)
