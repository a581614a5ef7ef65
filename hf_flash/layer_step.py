"""One token through a decoder layer as far as its FFN in one native call: norm, attention, sum, norm.

What attention_step.py does for an attention, for the layers of models that add an FFN to an attention and norm before
each. The FFN stays a module (FlashFFN), and what stands behind it in the layer does nothing to a decoded token. Nothing
relies on how transformers spells a layer now: each one's first token goes both ways.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_flash import native, norms, trace
from hf_flash.attention_step import AttentionStep, Parts, Token, addresses, is_stock, is_watched, proves
from hf_flash.ffn import FlashFFN
from hf_flash.kv import GrowingLayer
from hf_flash.ops import Biases

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


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
RMS_NORMS = {f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2")}


class _Step(ctypes.Structure):
    """The fields of _native/layer_step.cpp, in its order."""

    _fields_ = [("attention", _P), ("d", _I), ("first_eps", _F), ("second_eps", _F)]


class _Call(NamedTuple):
    """What one layer is going to do to a token. It keeps no cache alive: a pass may be left before its turn comes."""

    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    arguments: tuple[int | None, ...]
    layer: weakref.ref[GrowingLayer]
    token: Token
    ffn: FlashFFN
    biases: Biases | None  # of the FFN; None where somebody is to be told when that is called

    def holds(self, kwargs: dict[str, Any]) -> bool:
        """Whether the layer is called as the first one was, and its part of the cache is as it was then."""
        layer = self.layer()
        return layer is not None and layer.awaits_row and self.token.holds(kwargs)


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
        self._s: _Step | None = None  # made once: another thread may be using it
        self.chain, self.at = [self], 0
        self._ready: dict[int, _Call] = {}  # by thread
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
        if call is None or call.x is not hidden_states or args or not call.holds(kwargs):
            call = None if args else self._prepare_all(hidden_states, kwargs, alone=call is not None)
        layer = None if call is None else call.layer()
        if call is None or layer is None:
            return self._stock(hidden_states, *args, **kwargs)
        begun = 0.0 if trace.active is None else time.perf_counter()
        self._run(*call.arguments)
        if not self.is_proven:
            return self._prove(layer, call, kwargs)
        layer.took_row()
        if begun and trace.active is not None:
            stop = time.perf_counter()
            trace.active.add(trace.STEP, entered, stop, self._path)
            trace.active.add(trace.ATTENTION, begun, stop, self._path)
        ffn = call.ffn
        return call.y.add_(ffn(call.z) if call.biases is None else ffn.decode(call.z, call.biases))

    @property
    def is_proven(self) -> bool:
        """Whether a token went both ways, with as many threads as there are now."""
        return self._proven and not self._step.proofs_left

    def _prepare_all(self, x: Any, kwargs: dict[str, Any], alone: bool) -> _Call | None:
        """This layer's call, and those of the layers behind it: here the code for it is in the CPU's caches.

        Args:
            alone: not of those behind it: they are prepared, or each layer is asked for something else.
        """
        if not self.describe():
            return None
        token = self._step.token(x, kwargs)
        first = call = None if token is None else self.prepare(x, token)
        step, thread = self, threading.get_ident()
        while token is not None and call is not None and step.is_proven and step.at + 1 < len(step.chain) and not alone:
            step = step.chain[step.at + 1]
            call = step.prepare(call.y, token) if step._is_open and step._step.is_like(self._step) else None
            if call is not None:
                step._ready[thread] = call
        return first

    @property
    def _is_open(self) -> bool:
        """Whether it can be prepared before its turn: nobody changes the layer when that comes."""
        return self.describe() and vars(self._layer).get("forward") is self and not is_watched(self._layer)

    def prepare(self, x: torch.Tensor, token: Token) -> _Call | None:
        """Find out what native code is to be told; None where the stock forward is to be called."""
        ffn = self._modules[self._kind.ffn]
        if self._layer.training or type(ffn) is not FlashFFN or not self._parts.are_plain():
            return None
        weights = addresses([parameters.get(name) for parameters in self._parameters for name in ("weight", "bias")])
        begun = None if weights is None else self._step.begin(token)
        if weights is None or begun is None:
            return None
        layer, where = begun
        y, z = torch.empty_like(x), torch.empty_like(x)
        arguments = self._address, x.data_ptr(), *weights, *where, y.data_ptr(), z.data_ptr()
        biases = None if is_watched(ffn) or "forward" in vars(ffn) else ffn.biases()
        return _Call(x, y, z, arguments, weakref.ref(layer), token, ffn, biases)

    def describe(self) -> bool:
        """Tell native code of the layer, once; False where it is none for it."""
        if self._s is not None or self._refused:
            return not self._refused
        self._modules, kind = self._layer._modules, self._kind
        found: list[Any] = [self._modules[name] for name in kind.norms]
        step = vars(self._modules["self_attn"]).get("forward")
        d = found[0].weight.numel()
        agree = all(norm.weight.numel() == d and norms.agrees(d, type(norm) is nn.LayerNorm) for norm in found)
        if not (agree and isinstance(step, AttentionStep) and step.describe() and step.d_model == d):
            self._refused = True
            return False
        lib: Any = native.library()
        assert lib.hf_flash_layer_step_bytes() == ctypes.sizeof(_Step)
        self._step, self._run = step, lib.hf_flash_layer_step
        self._parts = Parts(self._layer, ("self_attn", *kind.norms, *kind.idle), {"self_attn": step})
        self._parameters = [norm._parameters for norm in found]
        self._s = _Step(step.address, d, *[_eps_of(norm) for norm in found])
        self._address = ctypes.addressof(self._s)
        return True

    def _prove(self, layer: GrowingLayer, call: _Call, kwargs: Any) -> Any:
        """The stock forward's result; what the kernel made of the same token has to be the same."""
        rows, seen, me = [row.clone() for row in layer.written()], [], threading.get_ident()

        def see(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            if threading.get_ident() == me:
                seen.append((args[0].clone(), out.clone()))

        ffn: Any = self._modules[self._kind.ffn]
        handle, self._step.aside = ffn.register_forward_hook(see), me
        try:
            result = self._stock(call.x, **kwargs)
        finally:
            handle.remove()
            self._step.aside = None
        mine, theirs = [call.z, *rows], [held[:, :, -1] for held in (layer.keys, layer.values) if held is not None]
        if len(seen) == 1 and isinstance(result, torch.Tensor):
            mine.append(call.y + seen[0][1].view_as(call.y))
            theirs = [seen[0][0].view_as(call.z), *theirs, result]
        if proves(self._layer, mine, theirs):
            self._proven, self._step.proofs_left = True, 0
        else:
            self._refused = True
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStep:
        layer = copy.deepcopy(self._layer, memo)
        if id(self) not in memo:  # the layer has brought its own along
            new = memo[id(self)] = LayerStep(layer, self._path)
            new.chain, new.at = copy.deepcopy(self.chain, memo), self.at
        return memo[id(self)]  # type: ignore[no-any-return]


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
