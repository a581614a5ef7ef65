"""One token through decoder layers in one native call: norm, attention, sum, norm, FFN, sum, and the next layer.

What attention_step.py does for an attention, for the layers of models that add an FFN to an attention and norm before
each. The first layer that is called prepares those behind it and has native code run them, as far as their FFNs are
native code's too (`Engine.as_native`); each of them then only looks whether it is called with what was foreseen, and
gives what is there. Nothing relies on how transformers spells a layer now: a token goes both ways, through two layers
of those that are alike in all but their number and their weights.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_flash import layer_calls, norms, trace
from hf_flash.attention_step import AttentionStep, Parts, Token, Watchers, addresses, is_stock, proves
from hf_flash.ffn import FlashFFN
from hf_flash.kv import GrowingLayer
from hf_flash.layer_calls import NOTHING, LayerCall, Told, Unchanging


@dataclass(frozen=True)
class Kind:
    """What a class of layers calls its parts; the attention is `self_attn`.

    Attributes:
        norms: before the attention, and before the FFN.
        ffn: the FFN. idle: what runs behind it and has nothing left to do.
    """

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    ffn: str = "mlp"
    idle: tuple[str, ...] = ()


KINDS = {
    "OPTDecoderLayer": Kind(("self_attn_layer_norm", "final_layer_norm"), "fc1", ("activation_fn", "fc2")),
    **{f"{name}DecoderLayer": Kind() for name in ("Llama", "Mistral", "Qwen2", "Starcoder2")},
}
LIKE_IT = 2  # layers whose proof is one for those like them
RMS_NORMS = {f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2")}


class LayerStep:
    """The forward of one decoder layer.

    Args:
        layer: of a class in KINDS, whose attention has an AttentionStep.
        path: its name in the model, for a trace.

    Attributes:
        chain: the layers that follow each other and have such a forward. at: this one's place in it.
    """

    def __init__(self, layer: nn.Module, path: str) -> None:
        self._layer, self._path, self._kind = layer, path, KINDS[type(layer).__name__]
        self._stock = type(layer).forward.__get__(layer)
        self._modules: dict[str, Any] = {}  # the layer's own
        self._refused, self._proven = False, False
        self._went_both_ways = False
        self._alike: tuple[Any, ...] = ()  # what layers share that one proof is for
        self._s: Unchanging | None = None  # made once: another thread may be using it
        self.chain, self.at = [self], 0
        self._ready: dict[int, LayerCall] = {}  # by thread: what it is going to do, or has done before its turn
        functools.update_wrapper(self, self._stock)

    @staticmethod
    def can(layer: nn.Module) -> bool:
        """Whether a layer may have such a forward."""
        kind = KINDS.get(type(layer).__name__)
        if kind is None or not is_stock(layer):
            return False
        parts = dict(layer.named_children())
        if set(parts) != {"self_attn", *kind.norms, kind.ffn, *kind.idle}:
            return False
        if not isinstance(vars(parts["self_attn"]).get("forward"), AttentionStep):
            return False
        return type(parts[kind.ffn]) is FlashFFN and all(_eps_of(parts[name]) is not None for name in kind.norms)

    def __call__(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock forward."""
        entered = 0.0 if trace.active is None else time.perf_counter()
        call = self._ready.pop(threading.get_ident(), None)
        if call is None or args or not call.holds(hidden_states, kwargs):
            call = None if args else self._prepare_all(hidden_states, kwargs, alone=call is not None)
        cache = None if call is None else call.cache()
        if call is None or cache is None:
            return self._stock(hidden_states, *args, **kwargs)
        runs = call.told.done == NOTHING
        if runs:
            layer_calls.run(call)
        if not call.is_proven:
            return self._prove(cache, call, kwargs)
        cache.took_row()
        if entered and trace.active is not None:
            trace.active.add(trace.STEP, entered, time.perf_counter(), self._path)
            if runs:  # only now: it is not what is measured
                call.note(trace.active)
        return call.result()

    @property
    def is_proven(self) -> bool:
        """Whether a token went both ways with as many threads as now, here or through two layers like this."""
        if not (self._proven and self._step.is_proven) and self._step.can_be_proven:
            traits = self._step.traits
            like_it = (step for step in self.chain if step._alike == self._alike and step._went_both_ways)
            if sum(step._step.is_proven and step._step.traits == traits for step in like_it) >= LIKE_IT:
                self._proven = self._step.is_proven = True
        return self._proven and self._step.is_proven

    def _prepare_all(self, x: Any, kwargs: dict[str, Any], alone: bool) -> LayerCall | None:
        """What this layer is going to do, and those behind it: here the code for it is in the CPU's caches.

        Args:
            alone: not those behind it: they are prepared, or each layer is asked for something else.
        """
        token = self._step.token(x, kwargs) if self.describe() else None
        if token is None:
            return None
        behind = self.chain[self.at + 1 :] if self._is_open and not alone else []
        y, *results = layer_calls.results_like(x, 1 + len(behind))
        scratch = torch.empty_like(x), torch.empty_like(x)
        first = call = self.prepare(token, x, y, *scratch)
        thread, traits = threading.get_ident(), self._step.traits
        indices = range(self._step.index + 1, self._step.n_layers)
        for index, step, y in zip(indices, behind, results, strict=False):
            if call is None or not call.is_proven or not step._can_be_early(index, traits):
                break
            following = step.prepare(token, call.y, y, *scratch)
            if following is not None:
                step._ready[thread] = call.following = following
            call = following
        return first

    @property
    def _is_open(self) -> bool:
        """Whether nobody changes the layer when its turn comes, nor its input or its result."""
        return not self._watchers.any and self._own.get("forward") is self

    def _can_be_early(self, index: int, traits: tuple[Any, ...]) -> bool:
        """Whether it can be run before its turn.

        Args:
            index: of the layer in the model. traits: of the attention, as AttentionStep has them.
        """
        return self.describe() and self._is_open and self._step.index == index and self._step.traits == traits

    def prepare(
        self, token: Token, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, out: torch.Tensor
    ) -> LayerCall | None:
        """Find out what native code is to be told; None where the stock forward is to be called.

        Args:
            x: the input. y: for the result. z, out: scratch. All are like x, bfloat16 [1, 1, d_model].
        """
        ffn = self._ffn
        if self._layer.training or self._modules[self._kind.ffn] is not ffn or not self._parts.are_plain():
            return None
        weights = addresses([parameters.get(name) for parameters in self._parameters for name in ("weight", "bias")])
        begun = None if weights is None else self._step.begin(token)
        if weights is None or begun is None:
            return None
        if weights[0] is None or weights[2] is None:  # a norm's weight is computed from others
            return None
        cache, where = begun
        calls_ffn = self._ffn_watchers.any or "forward" in vars(ffn)
        if calls_ffn:  # who is told may keep it
            z = torch.empty_like(x)
        told = Told(self._address, x.data_ptr(), *weights, *where, y.data_ptr(), z.data_ptr(), out.data_ptr())
        return LayerCall(
            self._path, x, y, z, out, told, weakref.ref(cache), token, ffn, ffn.biases(), calls_ffn, self.is_proven
        )

    def describe(self) -> bool:
        """Tell native code of the layer, once; False where it is none for it."""
        if self._s is not None or self._refused:
            return not self._refused
        self._modules, kind = self._layer._modules, self._kind
        found: list[Any] = [self._modules[name] for name in kind.norms]
        step = vars(self._modules["self_attn"]).get("forward")
        known = type(self._modules[kind.ffn]) is FlashFFN and all(_eps_of(norm) is not None for norm in found)
        d = found[0].weight.numel() if known else 0
        agree = known and all(
            norm.weight.numel() == d and norms.agrees(d, type(norm) is nn.LayerNorm) for norm in found
        )
        if not (agree and isinstance(step, AttentionStep) and step.describe() and step.d_model == d):
            self._refused = True
            return False
        layer_calls.check()
        self._step, self._ffn, self._own = step, self._modules[kind.ffn], vars(self._layer)
        self._watchers, self._ffn_watchers = Watchers([self._layer]), Watchers([self._ffn])
        self._parts = Parts(self._layer, ("self_attn", *kind.norms, *kind.idle), {"self_attn": step})
        self._parameters = [norm._parameters for norm in found]
        s = Unchanging(step.address, d, *[_eps_of(norm) for norm in found])
        self._address = ctypes.addressof(s)
        parts: list[Any] = [self._layer, *(part for name, part in self._modules.items() if name != kind.ffn)]
        self._alike = s.first_eps, s.second_eps, *[constants(part) for part in parts]
        self._s = s  # last: Ctrl-C may come before, and another thread may ask
        return True

    def _prove(self, cache: GrowingLayer, call: LayerCall, kwargs: Any) -> Any:
        """The stock forward's result; what the kernel made of the same token has to be the same."""
        rows, seen, me = [row.clone() for row in cache.written()], [], threading.get_ident()

        def see(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            if threading.get_ident() == me:
                seen.append((args[0].clone(), out.clone()))

        handle, self._step.aside = call.ffn.register_forward_hook(see), me
        try:
            result = self._stock(call.x, **kwargs)
        finally:
            handle.remove()
            self._step.aside = None
        mine, theirs = [call.z, *rows], [held[:, :, -1] for held in (cache.keys, cache.values) if held is not None]
        if len(seen) == 1 and isinstance(result, torch.Tensor):
            mine.append(call.y + seen[0][1].view_as(call.y))
            theirs = [seen[0][0].view_as(call.z), *theirs, result]
        if proves(self._layer, mine, theirs):
            self._proven = self._step.is_proven = self._went_both_ways = True
        else:
            self._refused = True
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStep:
        layer = copy.deepcopy(self._layer, memo)
        if id(self) not in memo:  # the layer has brought its own along
            new = memo[id(self)] = LayerStep(layer, self._path)
            new.chain, new.at = copy.deepcopy(self.chain, memo), self.at
        return memo[id(self)]  # type: ignore[no-any-return]


def constants(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes with besides tensors and its place in the model: its class, numbers and names."""
    plain = (bool, int, float, str, tuple, type(None))
    held = [(k, v) for k, v in vars(module).items() if isinstance(v, plain) and k not in ("layer_idx", "training")]
    return type(module), *sorted(held, key=lambda pair: pair[0])


def _eps_of(norm: nn.Module) -> float | None:
    """What a norm adds to the variance; None for a norm of another kind."""
    if type(norm) is nn.LayerNorm and norm.bias is not None:
        return norm.eps
    if type(norm).__name__ in RMS_NORMS and type(norm).__module__.startswith("transformers."):
        return float(norm.variance_epsilon)  # type: ignore[arg-type]
    return None


def install(model: nn.Module) -> None:
    """Give a model's layers such a forward, where they may have it; after attention_step.install."""
    chains: dict[int, list[LayerStep]] = {}  # by the module that has the layers
    owner = {id(child): id(module) for module in model.modules() for child in module.children()}
    for path, module in model.named_modules():
        if LayerStep.can(module):
            module.forward = step = LayerStep(module, path)  # type: ignore[assignment]
            step.chain = chains.setdefault(owner[id(module)], [])
            step.at = len(step.chain)
            step.chain.append(step)
