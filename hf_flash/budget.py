"""Bytes of DRAM, and who has them: the plan that is made before any weight is loaded.

Order of claims when memory is short: what every token needs anyway (norms, biases, buffers, KV cache), then resident
matrices, then gates, then cache rows; what is left pins whole layers. A byte that is pinned saves one read per token
whatever matrix it belongs to, except for an input embedding, of which a token needs one row: that goes to flash first.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_flash.errors import MemoryCapError
from hf_flash.layout import chunk_rows, format_size, spread
from hf_flash.memory import round_up, shared_bytes

MAX_CHUNK_BYTES, MIN_CHUNK_BYTES = (4 << 20) - 8192, 256 << 10  # a buffer of the ring, 8 KiB longer, fills huge pages
MIN_BUFFERS, MAX_BUFFERS = 8, 16  # of the ring
# Of the length of a neuron and its input, what a score must have for 1 in 20 to fire, and the bound of a 4-bit sketch:
# for normal weights and inputs (docs/log.md).
_FIRES, _BOUND = 1.645, 0.596
# Modules imported late, threads' stacks, allocator slack, torch's scratch: measured, see docs/log.md.
RUNTIME_BYTES = 24 << 20
PAGE_TABLES = 512  # bytes of memory that a byte of its page tables maps: the kernel charges a cgroup for them, too
BOOKS_BYTES = 80  # a neuron in the cache's books, what is usual of it, and in the scratch of a step


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A resident matrix that could be streamed: module path, bytes, and whether a token needs one row only.

    On flash it is in the checkpoint's dtype, so `row_bytes` and `flash_bytes` may differ from what DRAM would hold.
    `packed_bytes` is the most that it takes packed (12 bits a weight), 0 where it cannot be packed. `tied` is the path
    of the embedding that shares it, if one does.
    """

    path: str
    n_bytes: int
    lookup: bool = False
    row_bytes: int = 0
    flash_bytes: int = 0
    packed_bytes: int = 0
    tied: str = ""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An FFN layer: bytes of a row, of its matrices, and of what its gate keeps in DRAM.

    That is a sketch in 4, 5, ... bits (gate `certified`) or a predictor (`predicted`); the gate `all` needs neither.
    """

    path: str
    n_neurons: int
    row_bytes: int
    matrix_bytes: int
    down_bytes: int  # the down matrix in the dtype of the computation
    sketches: tuple[int, ...] = ()
    gate_scratch_bytes: int = 0
    packed: bool = False  # rows are: what is computed on is unpacked first
    predictor_bytes: int = 0
    lookahead_bytes: int = 0  # of the predictor by which an earlier layer starts this one's reads
    thresholded: bool = False  # the sketch serves gate `threshold`
    rest: float = 1.0  # of an input's length, what the sketch's errors are bounded for

    @property
    def gate(self) -> str:
        """Name of the layer's gate."""
        if self.sketches:
            return "threshold" if self.thresholded else "certified"
        return "predicted" if self.predictor_bytes else "all"

    def pinned_bytes(self, unpacked: bool) -> int:
        """DRAM that the layer takes when it stays there: packed, or as the stock matrices."""
        return self.n_neurons * self.row_bytes if self.packed and not unpacked else self.matrix_bytes


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a model asks for.

    Attributes:
        fixed_bytes: parameters and buffers that always stay in DRAM.
        matrices: resident matrices that may be streamed.
        layers: the FFNs.
        kv_bytes: KV cache for the planned context and batch.
        activation_bytes: largest activations of a pass.
        tokenizer_bytes: what the tokenizer's tables take.
        max_tokens: tokens of the longest pass that is planned for.
    """

    fixed_bytes: int
    matrices: Sequence[Matrix]
    layers: Sequence[Layer]
    kv_bytes: int
    activation_bytes: int
    tokenizer_bytes: int = 0
    max_tokens: int = 1
    context: int = 1
    batch_size: int = 1


@dataclasses.dataclass
class Plan:
    """Who has what.

    Attributes:
        memory: the cap, bytes.
        parts: name -> bytes; they sum to at most `memory`.
        gates: FFN path -> "all", "certified", "predicted" or "threshold".
        pinned_rows: FFN path -> rows that stay in DRAM (gate `all`).
        slots: FFN path -> slots (the other gates).
        gate_bits: bits of the sketches that are kept in DRAM (0: there are none).
        streamed: paths of the matrices that are streamed.
        packed: paths of the resident matrices that are kept in 11 or 12 bits a weight.
        unpacked: whether pinned FFN layers are kept as the stock matrices, for which everything must fit.
        bytes_per_token: bytes that a decoded token reads of layers with gate `all` and of streamed matrices once the
            context is full (before, loan.py makes them fewer); what other layers read depends on the text.
        chunk_bytes, n_buffers, batch_bytes, max_tokens: sizes of the stream and the scratch.
    """

    memory: int
    parts: dict[str, int]
    gates: dict[str, str]
    pinned_rows: dict[str, int]
    slots: dict[str, int]
    gate_bits: int
    streamed: list[str]
    packed: list[str]
    unpacked: bool
    bytes_per_token: int
    chunk_bytes: int
    n_buffers: int
    batch_bytes: int
    max_tokens: int
    context: int
    batch_size: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes}

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self


def make_plan(demand: Demand, memory: int, residents: bool = True) -> Plan:
    """Divide `memory` among a model's claims.

    Args:
        demand: what the model asks for.
        memory: the cap in bytes.
        residents: False to leave on flash whatever can be, and room unused: what reading everything costs.

    Raises:
        MemoryCapError: it cannot be done; the message names the smallest cap that would do.
    """
    share = 128 if any(layer.gate == "all" for layer in demand.layers) else 512  # large chunks are for streams
    chunk = max(MIN_CHUNK_BYTES, min(MAX_CHUNK_BYTES, memory // share // MIN_CHUNK_BYTES * MIN_CHUNK_BYTES))
    while True:
        plan = _divide(demand, memory, chunk, residents)
        if plan is not None:
            return plan
        if chunk == MIN_CHUNK_BYTES:
            break
        chunk //= 2 if chunk > MIN_CHUNK_BYTES else 1
        chunk = max(chunk, MIN_CHUNK_BYTES)
    smallest = smallest_cap(demand)
    hint = ""
    if demand.kv_bytes + demand.activation_bytes > smallest // 3:
        spent = format_size(demand.kv_bytes + demand.activation_bytes)
        hint = f" A shorter context needs less: {demand.context} tokens take {spent} of it; pass context=256, say."
    raise MemoryCapError(
        f"memory={format_size(memory)} is too small for this model. The smallest cap that would do is "
        f"{format_size(smallest)}: pass memory={smallest}.{hint} `hf-flash plan MODEL` shows who needs what."
    )


def settle(plan: Plan, demand: Demand, taken: Mapping[str, int]) -> Plan:
    """The plan once the resident matrices are there: what they did not take goes to gates and FFNs.

    Args:
        plan: of `demand`.
        taken: path of each packed matrix -> bytes that it really takes; how many that are depends on its weights.

    Raises:
        MemoryCapError: they take so much more than was planned that the rest has no room.
    """
    by_path = {m.path: m for m in demand.matrices}
    packed = [by_path[path] for path in plan.packed]
    sparse = [layer for layer in demand.layers if layer.gate != "all"]
    parts = {name: n for name, n in plan.parts.items() if name != "FFN cache"}
    parts["resident matrices"] += sum(taken.values()) - sum(m.packed_bytes for m in packed)
    parts["gates"] = sum(layer.predictor_bytes + layer.lookahead_bytes for layer in sparse)
    streamed = [by_path[path] for path in plan.streamed]
    choice = _Choice(streamed, packed, parts["resident matrices"], _cache_floor(sparse), plan.unpacked)
    left = plan.memory - sum(parts.values())
    bits, sketches = _sketch_bits(sparse, left, choice.least_bytes)
    if choice.least_bytes + sketches > left:
        raise MemoryCapError(
            f"memory={format_size(plan.memory)} is too small for this model: its weights pack badly, and "
            f"{format_size(choice.least_bytes + sketches - left)} are missing. Pass that much more."
        )
    parts["gates"] += sketches
    return _finish(demand, plan.memory, plan.chunk_bytes, parts, choice, bits, True)


def smallest_cap(demand: Demand) -> int:
    """The smallest cap for which there is a plan, bytes, rounded up to a MiB."""
    low, high = 0, 1 << 50
    while high - low > 1 << 16:
        middle = (low + high) // 2
        low, high = (low, middle) if _divide(demand, middle, MIN_CHUNK_BYTES) is not None else (middle, high)
    return round_up(high, 1 << 20)


def _divide(demand: Demand, memory: int, chunk: int, residents: bool = True) -> Plan | None:
    """The plan that streams the least: nothing if all fits, else embeddings, then matrices, last layers first."""
    sparse = [layer for layer in demand.layers if layer.gate != "all"]
    sweeps = [layer for layer in demand.layers if layer.gate == "all"]
    parts = {
        "always resident": demand.fixed_bytes,
        "KV cache": demand.kv_bytes,
        "activations": demand.activation_bytes,
        "tokenizer": demand.tokenizer_bytes,
        "runtime": RUNTIME_BYTES + memory // PAGE_TABLES,
        "gates": 0,
        "books": sum(layer.n_neurons * BOOKS_BYTES for layer in sparse),
        "batches": _scratch_bytes(demand, sparse, chunk, memory),
        "down matrix": max((layer.down_bytes for layer in sweeps), default=0),
    }
    spare = memory - sum(parts.values())
    lookups = [m for m in demand.matrices if m.lookup]
    rest = [m for m in demand.matrices if not m.lookup]
    everything = sum(layer.pinned_bytes(True) for layer in sweeps)
    everything += sum(layer.n_neurons * layer.row_bytes for layer in sparse)
    predictors = sum(layer.predictor_bytes + layer.lookahead_bytes for layer in sparse)
    whole = _Choice([], [], sum(m.n_bytes for m in demand.matrices), everything, True)
    streams = (_choice(rest, n, lookups, sparse) for n in range(len(rest) if residents else 0, -1, -1))
    for choice in (whole, *streams) if residents else streams:
        needs_ring = sweeps or any(not m.lookup for m in choice.streamed)
        ring = _ring_bytes(demand, choice.streamed, memory, chunk) if needs_ring else 0
        left = spare - choice.resident_bytes - ring - predictors
        bits, sketches = _sketch_bits(sparse, left, choice.least_bytes)
        if choice.least_bytes + sketches <= left:
            parts |= {"gates": sketches + predictors, "stream": ring, "resident matrices": choice.resident_bytes}
            return _finish(demand, memory, chunk, parts, choice, bits, residents)
    return None


def _sketch_bits(sparse: Sequence[Layer], left: int, least: int) -> tuple[int, int]:
    """Bits of the sketches with which a token is expected to read least, and their bytes.

    More bits name fewer neurons in vain and leave less DRAM to cache them in. How many are wanted for 1 in 20 that fire
    follows from the bound for normal weights and inputs (docs/log.md); a cache of c misses exp(-c / 1.7 wanted) of them
    (the paper's window: 24 % of the neurons hold three quarters of the 10 % that a token wants).
    """
    certified = [layer for layer in sparse if layer.sketches]
    if not certified:
        return 0, 0
    if any(layer.thresholded for layer in certified):  # fewer bits would not cost reads, but quality
        return 3 + min(len(layer.sketches) for layer in certified), sum(layer.sketches[-1] for layer in certified)
    rows = sum(layer.n_neurons * layer.row_bytes for layer in certified)
    best, lowest = (4, sum(layer.sketches[0] for layer in certified)), float("inf")
    for bits in range(4, 4 + min(len(layer.sketches) for layer in certified)):
        n_bytes = sum(layer.sketches[bits - 4] for layer in certified)
        wanted = sum(_wanted(bits, layer.rest) for layer in certified) / len(certified)
        read = math.log(wanted) - max(0, left - n_bytes) / rows / (1.7 * wanted)  # its logarithm: it may be tiny
        if n_bytes + least <= left and read < lowest:
            best, lowest = (bits, n_bytes), read
    return best


def _wanted(bits: int, rest: float) -> float:
    """Share of neurons that a sketch of so many bits wants where 1 in 20 fires."""
    return statistics.NormalDist().cdf(_BOUND * rest / 2 ** (bits - 4) - _FIRES)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which matrices are streamed and which packed; bytes of the resident ones, and the least that FFNs must get."""

    streamed: list[Matrix]
    packed: list[Matrix]
    resident_bytes: int
    least_bytes: int
    unpacked: bool  # pinned FFN layers


def _choice(rest: list[Matrix], n: int, lookups: list[Matrix], sparse: Sequence[Layer]) -> _Choice:
    """The first n matrices resident, packed where they can be: memory is short, and 12 bits read faster than 16."""
    packed = [m for m in rest[:n] if m.packed_bytes]
    resident = sum(m.packed_bytes or m.n_bytes for m in rest[:n])
    return _Choice([*rest[n:], *lookups], packed, resident, _cache_floor(sparse), False)


def _cache_floor(sparse: Sequence[Layer]) -> int:
    """Slots that a layer with a gate must have: a cache below one token's working set never hits."""
    return sum(max(1, layer.n_neurons // 50) * layer.row_bytes for layer in sparse)


def _batch_bytes(memory: int, chunk: int) -> int:
    """Bundles that a prompt computes on at a time where a gate chose them: what they take is lost to the cache."""
    return max(MIN_CHUNK_BYTES, min(chunk, memory // 2048))


def _scratch_bytes(demand: Demand, sparse: Sequence[Layer], chunk: int, memory: int) -> int:
    """Gathered rows, two sweep buffers, their float32 copies, the gate's scores; and rows that are unpacked."""
    packed = any(layer.packed for layer in demand.layers)
    unpacked = 2 * chunk if packed and len(sparse) < len(demand.layers) else 0
    if not sparse:
        return unpacked
    batch = _batch_bytes(memory, chunk)
    batches = 7 * batch + max(unpacked, 2 * batch if packed else 0)
    return batches + max(layer.gate_scratch_bytes for layer in sparse)


def _n_buffers(memory: int, chunk: int) -> int:
    """Chunks in flight or in use: more where they cost little and layers are long, whose pinned rows come first."""
    return min(MAX_BUFFERS, max(MIN_BUFFERS, memory // 64 // chunk)) if chunk == MAX_CHUNK_BYTES else MIN_BUFFERS


def _ring_bytes(demand: Demand, streamed: Sequence[Matrix], memory: int, chunk: int) -> int:
    sizes = [layer.row_bytes for layer in demand.layers] + [m.row_bytes for m in streamed if not m.lookup]
    longest = max((max(size, chunk // size * size) for size in sizes), default=chunk)
    return shared_bytes([round_up(longest, 4096) + 8192] * _n_buffers(memory, chunk))


def _finish(
    demand: Demand, memory: int, chunk: int, parts: dict[str, int], choice: _Choice, bits: int, residents: bool
) -> Plan:
    """Give what is left to the FFNs: slots in proportion, pinned layers spread evenly, one of them in part."""
    left = memory - sum(parts.values()) if residents else 0
    sparse = [layer for layer in demand.layers if layer.gate != "all"]
    sweeps = [layer for layer in demand.layers if layer.gate == "all"]
    whole = sum(layer.n_neurons * layer.row_bytes for layer in sparse)
    everything = whole + sum(layer.pinned_bytes(choice.unpacked) for layer in sweeps)
    share = min(1.0, left / everything) if everything else 0.0
    slots = {layer.path: int(layer.n_neurons * share) for layer in sparse}
    cache = sum(slots[layer.path] * layer.row_bytes for layer in sparse)
    pinned = _pin(sweeps, left - cache, chunk, choice.unpacked)
    held = cache
    read = sum(m.row_bytes if m.lookup else m.flash_bytes for m in choice.streamed)
    for layer in sweeps:
        rows = pinned[layer.path]
        held += layer.pinned_bytes(choice.unpacked) if rows == layer.n_neurons else rows * layer.row_bytes
        read += (layer.n_neurons - rows) * layer.row_bytes
    return Plan(
        memory=memory, parts={**parts, "FFN cache": held},
        gates={layer.path: layer.gate for layer in demand.layers},
        pinned_rows=pinned, slots=slots, gate_bits=bits, streamed=[m.path for m in choice.streamed],
        packed=[m.path for m in choice.packed], unpacked=choice.unpacked, bytes_per_token=read,
        chunk_bytes=chunk, n_buffers=_n_buffers(memory, chunk), batch_bytes=_batch_bytes(memory, chunk),
        max_tokens=demand.max_tokens, context=demand.context, batch_size=demand.batch_size,
    )  # fmt: skip


def _pin(layers: Sequence[Layer], left: int, chunk: int, unpacked: bool) -> dict[str, int]:
    """Rows to pin per layer: so spread over the depth that reads go on while pinned ones compute."""
    pinned = {layer.path: 0 for layer in layers}
    if not layers or left <= 0:
        return pinned
    order = [layers[i] for i in spread(len(layers))]
    if not unpacked and all(layer.packed for layer in layers):
        return _pin_evenly(order, left, chunk)
    for layer in order:
        size = layer.pinned_bytes(unpacked)
        if size > left:
            step = chunk_rows(layer.n_neurons, layer.row_bytes, chunk)
            pinned[layer.path] = min(left // layer.row_bytes // step * step, layer.n_neurons // step * step)
            break
        pinned[layer.path] = layer.n_neurons
        left -= size
    return pinned


def _pin_evenly(layers: Sequence[Layer], left: int, chunk: int) -> dict[str, int]:
    """The same share of each layer, in whole chunks: pinned rows are computed with while the others come."""
    share = min(1.0, left / sum(layer.n_neurons * layer.row_bytes for layer in layers))
    steps = {layer.path: chunk_rows(layer.n_neurons, layer.row_bytes, chunk) for layer in layers}
    pinned = {layer.path: int(layer.n_neurons * share) // steps[layer.path] * steps[layer.path] for layer in layers}
    left -= sum(pinned[layer.path] * layer.row_bytes for layer in layers)
    for layer in layers:  # what was rounded off is enough for one more chunk of some
        more = min(steps[layer.path], layer.n_neurons - pinned[layer.path])
        if more * layer.row_bytes <= left:
            pinned[layer.path] += more
            left -= more * layer.row_bytes
    return pinned
