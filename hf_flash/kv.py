"""A KV cache that grows where it lies.

transformers concatenates what a layer holds with the new token's keys and values: every token copies the whole cache
into fresh memory. Here a layer reserves address space for the planned context, which takes DRAM only as it fills, and a
token writes its own rows.
"""

from __future__ import annotations

import dataclasses
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from hf_flash.memory import untouched

Tell = Callable[[int | None, int], None]
CACHE_NAMES = ("cache", "past_key_values")  # of a model's argument and of its output: since transformers 5.24, before
PAGE_TOKENS = 64  # of a head in a page, or fewer: each head begins a page of its own


class _Held:
    """`keys` or `values` of a GrowingLayer: a view that is made when somebody asks; another may be set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, layer: GrowingLayer | None, owner: type) -> Any:
        if layer is None:
            return self
        layer.show()
        return getattr(layer, self._name)

    def __set__(self, layer: GrowingLayer, value: torch.Tensor | None) -> None:
        layer.show()
        setattr(layer, self._name, value)
        layer._is_known = False


class GrowingLayer(DynamicLayer):
    """One layer's cache: `keys` and `values`, [batch, n_heads, n_tokens, head_dim], are views of longer tensors.

    Everything else that a DynamicLayer can do (crop, reorder, repeat) it does as that does; where `keys` is no longer
    the beginning of its room, because of that or because someone assigned it, a new room is made.

    Attributes:
        n_reserved: tokens, of all sequences together, for which address space is taken at once.
    """

    n_reserved = 0
    keys: Any = _Held()
    values: Any = _Held()
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None
    # Rooms, where their first numbers lie, tokens that they are for, and the shape of the next one.
    _where: tuple[Any, int, int, int, tuple[int, ...]] | None = None
    _is_known = False  # whether rooms hold `_n` tokens and these are all: what was appended, and nothing else was done
    _n = 0
    _is_shown = True  # whether `_keys` and `_values` are all tokens
    _awaits = -1  # the row that `next_row` told of

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens' keys and values, [batch, n_heads, n, head_dim]; returns those of all tokens."""
        rooms, self._awaits = self._rooms, -1
        if (
            self._is_known and rooms is not None and not torch.is_grad_enabled()
            and _fits(rooms[0], key_states, self._n) and _fits(rooms[1], value_states, self._n)
        ):  # fmt: skip
            self._keys = keys = _append(rooms[0], self._n, key_states)
            self._values = values = _append(rooms[1], self._n, value_states)
            self._n, self._is_shown = keys.shape[2], True
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        self._is_known = False
        assert keys is not None and values is not None
        if not (_can_append(keys, key_states) and _can_append(values, value_states)):
            return super().update(key_states, value_states, *args, **kwargs)
        before = rooms or (None, None)
        more_keys = _room(before[0], keys, key_states, self.n_reserved)
        more_values = _room(before[1], values, value_states, self.n_reserved)
        self._rooms = more_keys, more_values
        self.keys = keys = _append(more_keys, _n_held(keys), key_states)
        self.values = values = _append(more_values, _n_held(values), value_states)
        self._n, self._is_known = keys.shape[2], keys.shape[2] == values.shape[2]
        return keys, values

    def show(self) -> None:
        """Have all tokens in `keys` and `values`."""
        if not self._is_shown and self._rooms is not None:
            self._keys, self._values = (room.narrow(2, 0, self._n) for room in self._rooms)
            self._is_shown = True

    def where_held(self) -> tuple[torch.Tensor | None, int]:
        """Keys, of more tokens perhaps, and how many are held: for another thread, which must not make a view."""
        rooms, n = self._rooms, self._n
        if self._is_known and rooms is not None:
            return rooms[0], n
        keys = self._keys
        return keys, 0 if keys is None else _n_held(keys)

    def next_row(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int, int] | None:
        """Where to write a token that is like those before, in place of `update`; `took_row` follows.

        Args:
            shape: of its keys and of its values, [1, n_heads, 1, head_dim].

        Returns:
            Addresses of the first token's keys and values, elements from one head to the next, and the number of
            tokens before; None where only `update` knows what to do.
        """
        rooms, where, n = self._rooms, self._where, self._n
        if not self._is_known or rooms is None:
            return None
        if where is None or where[0] is not rooms:
            if not rooms[0].dtype == rooms[1].dtype == dtype or rooms[0].shape != rooms[1].shape:
                return None
            batch, n_heads, capacity, head_dim = rooms[0].shape
            addresses = rooms[0].data_ptr(), rooms[1].data_ptr()
            self._where = where = rooms, *addresses, capacity, (batch, n_heads, 1, head_dim)
        if n >= where[3] or where[4] != shape:
            return None
        self._awaits = n
        return where[1], where[2], where[3] * shape[3], n

    @property
    def awaits_row(self) -> bool:
        """Whether what `next_row` said still holds."""
        return self._is_known and self._awaits == self._n

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the row that `next_row` told of, [1, n_heads, head_dim] each; not held yet."""
        assert self._rooms is not None
        return self._rooms[0][:, :, self._awaits], self._rooms[1][:, :, self._awaits]

    def took_row(self) -> None:
        """Hold one token more: it has been written to where `next_row` said."""
        self._n, self._awaits, self._is_shown = self._awaits + 1, -1, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the sequences in another order, where they lie: no plan has room for a copy of every layer."""
        rooms, keys, values, n = self._rooms, self.keys, self.values, len(beam_idx)
        lie = rooms is not None and _can_reorder(rooms[0], keys, n) and _can_reorder(rooms[1], values, n)
        if keys is None or values is None or not lie:
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            return
        for held in (keys, values):
            held.copy_(held.index_select(0, beam_idx.to(held.device)))

    def reset(self) -> None:
        """Forget all tokens."""
        self._is_shown, self._rooms, self._where = True, None, None
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: the tokens, not the room for more."""
        held = {f"_{name}": t.clone() for name in ("keys", "values") if (t := getattr(self, name)) is not None}
        return {**vars(self), "_rooms": None, "_where": None, "_is_known": False, **held}


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Tokens that a pass adds, of all its sequences together, and the cache that it was given, if any."""

    cache: weakref.ref[Any] | None
    n_sequences: int
    n_tokens: int


def _cache_of(get: Callable[[str], Any]) -> Any:
    """The cache among what a model is called with, or gives back; None for none."""
    return next((found for name in CACHE_NAMES if (found := get(name)) is not None), None)


def carried(output: Any) -> dict[str, Any]:
    """The cache that a model gave back, as it is to be called with next: named as this transformers names it."""
    return next({name: found} for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None)


def _pass_of(cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Pass | None:
    """What the arguments of a model say; None where they do not."""
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if len(args) > 1 or not isinstance(ids, torch.Tensor) or ids.dim() < 2:  # a cache may be among the arguments
        return None
    return _Pass(None if cache is None else weakref.ref(cache), ids.shape[0], ids.shape[0] * ids.shape[1])


class Watch:
    """What the caches that a model is called with take, as a pass begins.

    Args:
        n_tokens: of all sequences together, that memory was planned for. token_bytes: keys and values of one.
        tell: called with the bytes that will be filled when the passes under way are done, or with None where nobody
            can say, and the tokens of those passes.
        nested: the modules whose passes are watched, each a part of the one before.
    """

    def __init__(
        self, n_tokens: int, token_bytes: int, tell: Tell | None = None, nested: Sequence[nn.Module] = ()
    ) -> None:
        self._n_tokens, self._token_bytes, self._tell = n_tokens, token_bytes, tell
        self._depth = {module: depth for depth, module in enumerate(nested)}
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._passes: dict[int, _Pass | None] = {}  # under way, by thread; None: what it fills cannot be known
        self._within: dict[int, list[nn.Module]] = {}  # by thread: the modules whose passes these are, outermost first
        self._lock = threading.Lock()

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook: let the cache of a pass grow in place, and tell what all of them take."""
        cache = _cache_of(kwargs.get)
        with self._lock:
            self._adopt(cache)
            if self._tell is not None:
                thread = threading.get_ident()
                within, before = self._within.get(thread, []), self._passes.get(thread)
                found = self._passes[thread] = _pass_of(cache, args, kwargs)
                if within and self._depth.get(within[-1], 0) < self._depth.get(module, 0):
                    within.append(module)  # a part of the pass that was told of; it may know more
                    if found == before:
                        return
                else:
                    self._within[thread] = [module]
                n_tokens = sum(one.n_tokens for one in self._passes.values() if one is not None)
                self._tell(self._bytes_after(), n_tokens)  # with the lock held: what is told later was found later

    def _bytes_after(self) -> int | None:
        """Bytes of all caches when the passes that are under way are done."""
        total, new = 0, {}
        for one in self._passes.values():
            if one is None:
                return None
            cache = None if one.cache is None else one.cache()
            if cache is not None and cache.get_seq_length() > 0:
                new[id(cache)] = one.n_tokens
            elif cache is not None or one.cache is None:
                total += (one.n_tokens + PAGE_TOKENS * one.n_sequences) * self._token_bytes
        for known in self._caches:
            n_bytes = _filled(known, new.get(id(known), 0))
            if n_bytes is None:
                return None
            total += n_bytes
        return total

    def ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook: a cache that the model made itself is one that its next pass is called with."""
        with self._lock:
            thread = threading.get_ident()
            if self._within.get(thread, [None])[0] is module:
                del self._within[thread], self._passes[thread]
            self._adopt(_cache_of(lambda name: getattr(output, name, None)))

    def _adopt(self, cache: Any) -> None:
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if isinstance(cache, Cache):
            self._caches.add(cache)
            _adopt(cache, self._n_tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self


def install(model: PreTrainedModel, n_tokens: int, token_bytes: int = 0, tell: Tell | None = None) -> None:
    """Let every DynamicCache that a model is called with grow in place; arguments as of `Watch`."""
    # Parts that may be called without the model around them.
    parts = (model.base_model, model.get_decoder()) if tell is not None else ()
    nested = list(dict.fromkeys((model, *(part for part in parts if isinstance(part, nn.Module)))))
    watch = Watch(n_tokens, token_bytes, tell, nested)
    for module in nested:
        module.register_forward_pre_hook(watch.begins, with_kwargs=True)
        if tell is not None:
            module.register_forward_hook(watch.ended)


def _filled(cache: Cache, n_new: int) -> int | None:
    """Bytes of a cache once so many tokens more of all its sequences are there; None for a cache of another kind."""
    layers = [layer for layer in cache.layers if type(layer) is GrowingLayer]
    if len(layers) < len(cache.layers):
        return None
    keys, n_held = layers[0].where_held() if layers else (None, 0)
    if keys is None or not n_held:
        return 0
    batch, n_heads = keys.shape[:2]
    pages = -(-(n_held + n_new // batch) * keys.stride(2) * keys.itemsize // mmap.PAGESIZE)
    return 2 * len(layers) * batch * n_heads * (pages + 1) * mmap.PAGESIZE


def _adopt(cache: Cache, n_reserved: int) -> None:
    """Exchange the stock layers of a cache, with what they hold."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = new = GrowingLayer()
            for name, value in vars(layer).items():
                setattr(new, name, value)
            new.n_reserved = n_reserved


def _can_append(held: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether torch.cat would do nothing but copy: on a CPU, of one dtype, nothing to differentiate."""
    if new.device.type != "cpu" or held.dtype != new.dtype or new.dim() != 4:
        return False
    if torch.is_grad_enabled() and (new.requires_grad or held.requires_grad):
        return False
    return held.numel() == 0 or (held.shape[:2], held.shape[3]) == (new.shape[:2], new.shape[3])


def _fits(room: torch.Tensor, new: torch.Tensor, n_held: int) -> bool:
    """Whether new tokens are like those in a room, and have their place behind them."""
    (batch, n_heads, capacity, head_dim), shape = room.shape, new.shape
    return (
        len(shape) == 4 and shape[:2] == (batch, n_heads) and shape[3] == head_dim and n_held + shape[2] <= capacity
        and new.dtype is room.dtype
    )  # fmt: skip


def _room(room: torch.Tensor | None, held: torch.Tensor, new: torch.Tensor, n_reserved: int) -> torch.Tensor:
    """[batch, n_heads, capacity, head_dim] that begins with what is held and has space for what is new."""
    n_held = _n_held(held)
    needed = n_held + new.shape[-2]
    if room is not None and room.shape[-2] >= needed and _begins(room, held, n_held):
        return room
    batch, n_heads, _, head_dim = new.shape
    # twice what is needed beyond what was planned for: copied seldom, and not touched before it is written
    shape = (batch, n_heads, max(n_reserved // batch, 2 * needed if room is not None else needed), head_dim)
    room = untouched(torch.Size(shape).numel() * new.itemsize).view(new.dtype).view(shape)
    if n_held:
        room[:, :, :n_held] = held
    return room


def _begins(room: torch.Tensor, held: torch.Tensor, n_held: int) -> bool:
    """Whether what is held is the beginning of the room."""
    if n_held == 0:
        return True
    same_rows = (held.stride(), held.shape[:2], held.shape[3]) == (room.stride(), room.shape[:2], room.shape[3])
    return same_rows and held.data_ptr() == room.data_ptr()


def _can_reorder(room: torch.Tensor, held: torch.Tensor | None, n_sequences: int) -> bool:
    """Whether what is held lies in the room, and can be written to."""
    if held is None or not held.numel() or len(held) != n_sequences or held.requires_grad:
        return False
    return _begins(room, held, held.shape[-2]) and (torch.is_inference_mode_enabled() or not held.is_inference())


def _n_held(held: torch.Tensor) -> int:
    """Tokens of `keys` or `values`, which are empty and of one dimension at first."""
    return held.shape[-2] if held.numel() else 0


def _append(room: torch.Tensor, n_held: int, new: torch.Tensor) -> torch.Tensor:
    """Write what is new behind what is held; returns both."""
    n_new = new.shape[-2]
    room.narrow(2, n_held, n_new).copy_(new)
    return room.narrow(2, 0, n_held + n_new)
