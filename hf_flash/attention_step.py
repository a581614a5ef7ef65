"""One token through an attention in one native call: projections, rotation, KV cache, scores and sums.

A small model's attention runs in its Python as long as in its kernels, since streamed weights have emptied the CPU's
caches of code by then. Here the forward of attentions that transformers spells in one of the ways of `KINDS`, and whose
matrices stay in DRAM packed (resident.py), calls the same kernels with nothing in between. Whatever is not a plain
decoded token goes to the stock forward. That may change with transformers: nothing relies on how it is spelled now, as
each module's first such token goes both ways, and it stays with the stock forward for good where one bit differs.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hf_flash import attention, native, ordered, tight, trace
from hf_flash.kv import CACHE_NAMES, GrowingLayer
from hf_flash.linear import PackedLinear
from hf_flash.resident import TightMatrix

logger = logging.get_logger(__name__)

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
NO_WATCHER = "_hf_flash_no_watcher"  # mark of a hook that need not be called
_GLOBAL_HOOKS: list[Any] = [modules._global_forward_hooks, modules._global_forward_pre_hooks]


@dataclass(frozen=True)
class Kind:
    """How a class of attentions computes.

    Attributes:
        out: name of the last projection; the others are q_proj, k_proj and v_proj.
        rotary: whether queries and keys are turned by `position_embeddings`; else queries are scaled.
    """

    out: str
    rotary: bool

    @property
    def projections(self) -> tuple[str, ...]:
        """Their names."""
        return "q_proj", "k_proj", "v_proj", self.out


KINDS = {
    "OPTAttention": Kind("out_proj", False),
    **{
        f"{name}Attention": Kind("o_proj", True)
        for name in ("Llama", "Mistral", "Qwen2", "Gemma", "Granite", "Starcoder2")
    },
}
# What a forward may be called with besides, as it changes nothing here; of any other name, nothing but None and False.
_NO_MATTER = {"position_embeddings", "position_ids", "cache_position", "use_cache"}


@dataclass(frozen=True)
class Token:
    """A plain decoded token: what holds for every layer that it passes.

    Attributes:
        cache: of the model, which this does not keep alive. cache_name: of the argument. n_arguments: that have names.
        given: the position embeddings. turn: addresses of cos and sin, or None.
    """

    cache: weakref.ref[DynamicCache]
    cache_name: str
    n_arguments: int
    given: Any = None
    turn: tuple[int | None, int | None] = (None, None)

    def holds(self, kwargs: dict[str, Any]) -> bool:
        """Whether a layer is called as the first one was."""
        return (
            len(kwargs) == self.n_arguments and kwargs.get(self.cache_name) is self.cache()
            and kwargs.get("attention_mask") is None and kwargs.get("position_embeddings") is self.given
        )  # fmt: skip


class Watchers:
    """Whether somebody is to be told when some modules are called.

    This is asked for every token, so hooks are seldom looked at: torch numbers the handles of all hooks of a process.
    """

    __slots__ = ("_found", "_modules", "_n_handles", "_n_looks")

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules, self._n_handles, self._n_looks, self._found = modules, -1, 0, False

    @property
    def any(self) -> bool:
        """Whether there is one."""
        n_handles = RemovableHandle.next_id
        if n_handles != self._n_handles:
            self._n_handles, self._n_looks = n_handles, 0
        if self._found or self._n_looks < 2:  # the handle is made first, and another thread may be about to use it
            self._n_looks += 1
            self._found = any(is_watched(module) for module in self._modules)
        return self._found


class Parts:
    """Modules whose work a native call does in their place.

    Args:
        owner: the module that has them. names: of them, in it.
        forwards: of those that are to have another forward than their class.
    """

    __slots__ = ("_forwards", "_modules", "_names", "_own", "_watchers", "known")

    def __init__(self, owner: nn.Module, names: Sequence[str], forwards: Mapping[str, Any] | None = None) -> None:
        self._modules, self._names = owner._modules, names
        self.known: tuple[Any, ...] = tuple(self._modules[name] for name in names)
        self._own = [vars(part) for part in self.known]
        self._forwards = [(forwards or {}).get(name) for name in names]
        self._watchers = Watchers(self.known)

    def are_plain(self) -> bool:
        """Whether they are where they were, as they were, and nobody is to be told when one is called."""
        if tuple(map(self._modules.get, self._names)) != self.known:
            return False
        return [own.get("forward") for own in self._own] == self._forwards and not self._watchers.any


Begun = tuple[GrowingLayer, tuple[int | None, ...]]


class _Projection(ctypes.Structure):
    """The fields of _native/attention_step.cpp, in its order."""

    _fields_ = [
        ("tiles", _P), ("n", _I), ("E", _I), ("base", _P), ("start", _P), ("escapes", _P),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _Projection) for name in "qkvo"],
        *[(name, _I) for name in ("n_heads", "n_shared", "head_dim")],
        ("q_scale", _F), ("scale", _F),
    ]  # fmt: skip


class AttentionStep:
    """The forward of one attention module.

    Args:
        module: of a class in KINDS.
        path: its name in the model, for a trace.

    Attributes:
        is_proven: whether a token went both ways, with as many threads as there are.
        aside: a thread whose calls go the stock way.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.aside: int | None = None
        self._module, self._path = module, path
        self._kind = KINDS[type(module).__name__]
        self.is_proven = False
        self._n_threads, self._can = 0, False  # whether the kernels can be had, with so many threads
        self._s: _Step | None = None  # made once: another thread may be using it
        self.address: int | None = None  # of that
        self._stock = type(module).forward.__get__(module)
        functools.update_wrapper(self, self._stock)

    @staticmethod
    def can(module: nn.Module) -> bool:
        """Whether a module may have such a forward."""
        kind = KINDS.get(type(module).__name__)
        if kind is None or not is_stock(module):
            return False
        parts = dict(module.named_children())
        return set(parts) == set(kind.projections) and all(type(part) is PackedLinear for part in parts.values())

    def __call__(self, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock forward."""
        begun = 0.0 if trace.active is None else time.perf_counter()
        out = self._forward(hidden_states, *args, **kwargs)
        if begun and trace.active is not None:
            trace.active.add(trace.ATTENTION, begun, time.perf_counter(), self._path)
        return out

    def _forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        aside = args or self.aside == threading.get_ident()
        token = None if aside else self.token(hidden_states, kwargs)
        begun = None if token is None else self.begin(token)
        if begun is None:
            return self._stock(hidden_states, *args, **kwargs)
        layer, where = begun
        out = torch.empty_like(hidden_states)
        self._run(self.address, hidden_states.data_ptr(), *where, out.data_ptr(), None, None)
        if not self.is_proven:
            return self._prove(layer, out, hidden_states, kwargs)
        layer.took_row()
        return out, None

    def token(self, x: Any, kwargs: dict[str, Any]) -> Token | None:
        """What a call with these arguments is about, if it is a plain token; None for everything else."""
        if is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if torch.get_num_threads() != self._n_threads:
            self._prepare()
        if not self._can or x is None or x.dtype is not torch.bfloat16 or x.shape != self._x_shape:
            return None
        cache, cache_name = None, ""
        for name, value in kwargs.items():
            if name in CACHE_NAMES:
                cache, cache_name = value, name
            elif value is not None and value is not False and name not in _NO_MATTER:
                return None
        config: Any = self._module.config
        if config._attn_implementation != "sdpa" or ALL_ATTENTION_FUNCTIONS["sdpa"] is not attention.forward:
            return None
        if type(cache) is not DynamicCache or cache.offloading or not x.is_contiguous() or x.device.type != "cpu":
            return None
        known, given = (weakref.ref(cache), cache_name, len(kwargs)), kwargs.get("position_embeddings")
        if not self._kind.rotary:
            return Token(*known, given)
        if not isinstance(given, tuple) or not all(
            t.dtype is torch.bfloat16 and t.shape == self._turn_shape and t.is_contiguous() for t in given
        ):
            return None
        cos, sin = given
        return Token(*known, given, (cos.data_ptr(), sin.data_ptr()))

    @property
    def can_be_proven(self) -> bool:
        """Whether the kernels can be had, with as many threads as it was last asked for."""
        return self._can

    @property
    def traits(self) -> tuple[Any, ...]:
        """Two attentions of a model that have the same of these have the same plain tokens."""
        return self._n_threads, self._x_shape, self._turn_shape, self._kind, id(self._module.config)

    @property
    def n_layers(self) -> int:
        """Layers of the model now: fewer than it has while somebody leaves the last ones out."""
        return self._module.config.num_hidden_layers  # type: ignore[return-value, union-attr]

    def begin(self, token: Token) -> Begun | None:
        """Find out where everything is.

        Returns:
            The layer of the cache, whose `took_row` follows, and what the native call is told between the token and its
            result: cos, sin, row of the cache, biases. None where the stock forward is to be called.
        """
        cache = token.cache()
        layer = cache.layers[self.index] if cache is not None and self.index < len(cache.layers) else None
        if not self._can or self._module.training or type(layer) is not GrowingLayer or not self._parts.are_plain():
            return None
        row = layer.next_row(self._shape, torch.bfloat16)
        if row is None:
            return None
        biases = addresses([parameters["bias"] for parameters in self._parameters])
        return None if biases is None else (layer, (*token.turn, *row, *biases))

    def _prepare(self) -> None:
        """Find out whether the kernels can be had, with as many threads as there are now."""
        self._n_threads, self._can = torch.get_num_threads(), False
        if not self.describe():
            return
        s = self._s
        assert s is not None
        can = attention.agrees(s.n_heads, s.n_shared, s.head_dim)
        if self._exact:
            can = can and all(ordered.agrees(part.out_features, part.in_features) for part in self._parts.known)
        self.is_proven, self._can = False, can

    def describe(self) -> bool:
        """Tell native code of the module, once; False where it is none for it."""
        if self._s is not None:
            return True
        module: Any = self._module
        parts: list[Any] = [module._modules[name] for name in self._kind.projections]
        if not (tight.available() and all(type(part) is PackedLinear for part in parts)):
            return False
        if not all(type(part.matrix) is TightMatrix for part in parts):
            return False
        q, k, v, o = parts
        size = module.head_dim
        n_heads, n_shared = q.out_features // size, k.out_features // size
        if k.out_features != v.out_features or q.in_features != o.out_features:
            return False
        lib: Any = native.library()
        assert lib.hf_flash_attention_step_bytes() == ctypes.sizeof(_Step)
        scales = (1.0, module.scaling) if self._kind.rotary else (module.scaling, 1.0)
        matrices = [_Projection(*part.matrix.matrix.arguments) for part in parts]
        s = _Step(*matrices, n_heads, n_shared, size, *scales)
        self.address, self._run = ctypes.addressof(s), lib.hf_flash_attention_step
        self._parts, self._parameters = Parts(module, self._kind.projections), [part._parameters for part in parts]
        self.index, self.d_model, self._exact = module.layer_idx, q.in_features, q.exact
        self._x_shape, self._shape, self._turn_shape = (1, 1, q.in_features), (1, n_shared, 1, size), (1, 1, size)
        self._s = s  # last: Ctrl-C may come before, and another thread may ask
        return True

    def _prove(self, layer: GrowingLayer, out: torch.Tensor, x: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """The stock forward's result; what the kernel made of the same token has to be the same."""
        mine = [out, *(row.clone() for row in layer.written())]
        result = self._stock(x, **kwargs)
        theirs = [result[0], *(held[:, :, -1] for held in (layer.keys, layer.values) if held is not None)]
        if proves(self._module, mine, theirs):
            self.is_proven = True
        else:
            self._can = False  # until the number of threads changes
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionStep:
        return AttentionStep(copy.deepcopy(self._module, memo), self._path)


def is_stock(module: nn.Module) -> bool:
    """Whether a module's forward is that of transformers' class, whose name says how it computes."""
    return type(module).__module__.startswith("transformers.") and "forward" not in vars(module)


def addresses(tensors: Sequence[torch.Tensor | None]) -> list[int | None] | None:
    """Of bfloat16 tensors, None for those that are not there; None where one has another dtype."""
    found: list[int | None] = []
    for given in tensors:
        if given is None:
            found.append(None)
        elif given.dtype is torch.bfloat16:
            found.append(given.data_ptr())
        else:
            return None
    return found


def proves(module: nn.Module, mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether a native call and a module's own forward made the same of a token; says once where not."""
    if len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
        return True
    logger.info_once(
        f"hf_flash: {type(module).__name__} does not compute as its native call does: its modules run one by one."
    )
    return False


def is_watched(module: Any) -> bool:
    """Whether somebody wants to be told when a module is called. profile.py need not be: a trace says the same."""
    if any(_GLOBAL_HOOKS):
        return True
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if hooks and not all(hasattr(watcher, NO_WATCHER) for watcher in hooks.values()):
            return True
    return False


def install(model: nn.Module) -> None:
    """Give a model's attentions such a forward, where they may have it."""
    for path, module in model.named_modules():
        if AttentionStep.can(module):
            module.forward = AttentionStep(module, path)  # type: ignore[assignment]
