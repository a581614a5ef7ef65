"""Plans add up, pin whole chunks, read less the more memory there is, and are refused with the smallest cap."""

import dataclasses
import re

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from hf_flash.budget import (
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Demand,
    Layer,
    Matrix,
    Plan,
    make_plan,
    settle,
    smallest_cap,
)
from hf_flash.budget import _divide as divide
from hf_flash.errors import FlashConfigError, MemoryCapError
from hf_flash.layout import chunk_rows

MIB = 1 << 20


@st.composite
def layers(draw: st.DrawFn) -> list[Layer]:
    """FFNs of one model: one geometry or two, gated by a sketch or not, packed or not."""
    kinds = [
        (draw(st.integers(1, 6000)), 512 * draw(st.integers(1, 80)), draw(st.booleans()))
        for _ in range(draw(st.integers(1, 2)))
    ]
    out = []
    for i in range(draw(st.integers(1, 12))):
        n, row, certified = kinds[i % len(kinds)]
        packed = draw(st.booleans())
        matrix = n * (row * 4 // 3 if packed else row - draw(st.integers(0, 511)) // 2 * 2)
        full = n * row // 4
        sketches, scratch = (tuple(full * b // 8 for b in range(4, 9)), n * 1536 + 500_000) if certified else ((), 0)
        out.append(Layer(f"layers.{i}.mlp", n, row, matrix, matrix // 3, sketches, scratch, packed))
    return out


@st.composite
def demands(draw: st.DrawFn, wider: tuple[int, ...] = (1, 2)) -> Demand:
    """`wider` 2: matrices are stored in half precision and computed in single. Some can be packed."""
    width, wider = 2 * draw(st.integers(16, 8000)), draw(st.sampled_from(wider))
    matrices = [
        Matrix(f"matrix{i}", wider * n * width, i == 0 and draw(st.booleans()), width, n * width)
        for i, n in enumerate(draw(st.lists(st.integers(1, 3000), max_size=8)))
    ]
    matrices = [
        m if m.lookup or draw(st.booleans()) else dataclasses.replace(m, packed_bytes=m.flash_bytes * 3 // 4 + 1)
        for m in matrices
    ]
    return Demand(
        draw(st.integers(0, 50 * MIB)), matrices, draw(layers()), draw(st.integers(0, 50 * MIB)),
        draw(st.integers(0, 50 * MIB)), draw(st.integers(0, 10 * MIB)), 128, 128, 1,
    )  # fmt: skip


def most(demand: Demand) -> int:
    """A cap under which nothing is left on flash."""
    everything = sum(m.n_bytes for m in demand.matrices)
    everything += sum(max(x.n_neurons * x.row_bytes, x.matrix_bytes) for x in demand.layers)
    return 2 * smallest_cap(demand) + everything + 256 * MIB


def check(demand: Demand, plan: Plan, memory: int) -> None:
    assert plan.total_bytes == sum(plan.parts.values()) <= memory == plan.memory
    assert all(size >= 0 for size in plan.parts.values())
    assert MIN_CHUNK_BYTES <= plan.chunk_bytes <= MAX_CHUNK_BYTES
    held = read = 0
    for layer in demand.layers:
        certified = plan.gates[layer.path] == "certified"
        assert certified == (layer.gate == "certified")
        if certified:
            assert 0 <= plan.slots[layer.path] <= layer.n_neurons
            held += plan.slots[layer.path] * layer.row_bytes
            continue
        rows = plan.pinned_rows[layer.path]
        step = chunk_rows(layer.n_neurons, layer.row_bytes, plan.chunk_bytes)
        assert 0 <= rows <= layer.n_neurons
        assert rows == layer.n_neurons or rows % step == 0, "pinned rows are whole chunks"
        held += layer.pinned_bytes(plan.unpacked) if rows == layer.n_neurons else rows * layer.row_bytes
        read += (layer.n_neurons - rows) * layer.row_bytes
    assert plan.parts["FFN cache"] == held
    streamed = [m for m in demand.matrices if m.path in plan.streamed]
    assert len(streamed) == len(plan.streamed) == len(set(plan.streamed))
    assert plan.bytes_per_token == read + sum(m.row_bytes if m.lookup else m.flash_bytes for m in streamed)
    resident = [m for m in demand.matrices if m.path not in plan.streamed]
    packed = [m for m in resident if m.path in plan.packed]
    assert len(packed) == len(plan.packed) == len(set(plan.packed))
    assert all(m.packed_bytes for m in packed), "what cannot be packed is not"
    assert plan.unpacked or all(m in packed for m in resident if m.packed_bytes), "memory is short: all that can be is"
    assert not plan.unpacked or not (plan.packed or plan.streamed), "nothing is packed where everything fits"
    size = sum(m.packed_bytes for m in packed) + sum(m.n_bytes for m in resident if m not in packed)
    assert plan.parts["resident matrices"] == size
    sketches = [layer.sketches for layer in demand.layers if layer.sketches]
    assert plan.gate_bits == 0 if not sketches else 4 <= plan.gate_bits <= 8
    assert plan.parts["gates"] == sum(sizes[plan.gate_bits - 4] for sizes in sketches)


@settings(max_examples=150, deadline=None)
@given(demands(), st.floats(0, 1))
def test_a_plan_adds_up(demand: Demand, share: float) -> None:
    assume(len({layer.gate for layer in demand.layers}) == 1)  # pinned rows and slots of others share what is left
    low, high = smallest_cap(demand), most(demand)
    memory = int(low + share * (high - low))
    check(demand, make_plan(demand, memory), memory)


@settings(max_examples=150, deadline=None)
@given(demands(), st.floats(0, 1), st.floats(0.5, 1))
def test_what_packed_matrices_do_not_take_goes_to_the_ffns(demand: Demand, share: float, taken: float) -> None:
    demand = dataclasses.replace(demand, layers=[x for x in demand.layers if x.gate == demand.layers[0].gate])
    low, high = smallest_cap(demand), most(demand)
    plan = make_plan(demand, int(low + share * (high - low)))
    if not plan.packed:
        return
    planned = {m.path: m.packed_bytes for m in demand.matrices if m.path in plan.packed}
    assert settle(plan, demand, planned) == plan, "nothing else is decided than before"
    really = {path: int(n * taken) for path, n in planned.items()}
    known = dataclasses.replace(
        demand,
        matrices=[dataclasses.replace(m, packed_bytes=really.get(m.path, m.packed_bytes)) for m in demand.matrices],
    )
    settled = settle(plan, demand, really)
    check(known, settled, plan.memory)
    assert settled.bytes_per_token <= plan.bytes_per_token
    assert settled.streamed == plan.streamed and settled.packed == plan.packed
    if settled.gate_bits == plan.gate_bits:
        assert sum(settled.slots.values()) >= sum(plan.slots.values())


def test_matrices_that_pack_worse_than_planned_are_refused_only_where_nothing_is_left() -> None:
    demand = dataclasses.replace(
        DEMAND,
        matrices=[dataclasses.replace(m, packed_bytes=0 if m.lookup else m.n_bytes * 3 // 4) for m in DEMAND.matrices],
    )
    plan = make_plan(demand, smallest_cap(demand) + 64 * MIB)
    assert plan.packed
    worse = {m.path: m.packed_bytes * 21 // 20 for m in demand.matrices if m.path in plan.packed}
    assert settle(plan, demand, worse).total_bytes <= plan.memory
    with pytest.raises(MemoryCapError, match="pack badly"):
        settle(plan, demand, {path: 100 * n for path, n in worse.items()})


@settings(max_examples=150, deadline=None)
@given(demands())
def test_the_smallest_cap_works_and_a_step_less_does_not(demand: Demand) -> None:
    cap = smallest_cap(demand)
    check(demand, make_plan(demand, cap), cap)
    assert cap % MIB == 0
    with pytest.raises(MemoryCapError, match=f"pass memory={cap}"):
        make_plan(demand, cap - MIB - (64 << 10))


@settings(max_examples=50, deadline=None)
@given(demands())
def test_with_enough_memory_nothing_is_read(demand: Demand) -> None:
    plan = make_plan(demand, most(demand))
    assert plan.bytes_per_token == 0
    assert plan.streamed == plan.packed == []
    assert plan.unpacked
    assert plan.gate_bits == (8 if any(layer.sketches for layer in demand.layers) else 0)
    assert all(plan.slots[layer.path] == layer.n_neurons for layer in demand.layers if layer.gate == "certified")


@settings(max_examples=150, deadline=None)
@given(demands((1,)), st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted), st.sampled_from([1, 3, 16]))
def test_more_memory_never_reads_more_with_chunks_of_one_size(
    demand: Demand, shares: list[float], n_chunks: int
) -> None:
    assume(len({layer.gate for layer in demand.layers}) == 1)  # as below
    low, high = smallest_cap(demand), most(demand)
    less, more = (divide(demand, int(low + share * (high - low)), n_chunks * MIN_CHUNK_BYTES) for share in shares)
    assume(less is not None)
    assert more is not None
    assert more.bytes_per_token <= less.bytes_per_token
    if more.streamed == less.streamed and more.gate_bits == less.gate_bits:
        assert all(more.slots[path] >= n for path, n in less.slots.items())


@settings(max_examples=150, deadline=None)
@given(demands(), st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted), st.sampled_from([1, 3, 16]))
def test_more_memory_never_packs_what_fitted_unpacked(demand: Demand, shares: list[float], n_chunks: int) -> None:
    low, high = smallest_cap(demand), most(demand)
    less, more = (divide(demand, int(low + share * (high - low)), n_chunks * MIN_CHUNK_BYTES) for share in shares)
    assume(less is not None)
    assert more is not None
    assert more.unpacked >= less.unpacked
    assert len(more.streamed) <= len(less.streamed)
    if more.packed != less.packed:
        assert not more.packed or set(more.packed) > set(less.packed)


@settings(max_examples=150, deadline=None)
@given(demands((1,)), st.floats(0, 1))
def test_an_eighth_more_memory_never_reads_more(demand: Demand, share: float) -> None:
    """Larger chunks come with larger caps; the ring that they make larger must not eat up what was added.

    Not so where matrices are wider in DRAM than on flash: they become resident first, though pinning the same bytes of
    FFN rows would save more reads.
    """
    assume(len({layer.gate for layer in demand.layers}) == 1)  # pinned rows and slots of others share what is left
    low, high = smallest_cap(demand), most(demand)
    memory = int(low + share * (high - low))
    less, more = make_plan(demand, memory), make_plan(demand, memory + memory // 8)
    assert more.bytes_per_token <= less.bytes_per_token
    if more.streamed == less.streamed and more.gate_bits == less.gate_bits:
        assert all(more.slots[path] >= n for path, n in less.slots.items())


DEMAND = Demand(
    10 * MIB, [Matrix("embed", 30 * MIB, True, 4096, 30 * MIB), Matrix("q", 8 * MIB, False, 4096, 8 * MIB)],
    [Layer(f"layers.{i}.mlp", 1000, 12288, 12288000, 4096000) for i in range(4)], 5 * MIB, 2 * MIB,
)  # fmt: skip


def test_an_embedding_goes_to_flash_before_any_matrix() -> None:
    plans = [make_plan(DEMAND, memory) for memory in range(smallest_cap(DEMAND), most(DEMAND), MIB)]
    seen = list(dict.fromkeys(tuple(plan.streamed) for plan in plans))
    assert seen == [("q", "embed"), ("embed",), ()]


def test_packed_before_streamed_and_only_where_memory_is_short() -> None:
    packable = dataclasses.replace(
        DEMAND,
        matrices=[dataclasses.replace(m, packed_bytes=0 if m.lookup else m.n_bytes * 3 // 4) for m in DEMAND.matrices],
        layers=[
            dataclasses.replace(x, row_bytes=x.row_bytes * 3 // 4, packed=True) for x in DEMAND.layers
        ],
    )  # fmt: skip
    plans = [make_plan(packable, memory) for memory in range(smallest_cap(packable), most(packable), MIB)]
    seen = [(tuple(plan.streamed), tuple(plan.packed), plan.unpacked) for plan in plans]
    assert list(dict.fromkeys(seen)) == [
        (("q", "embed"), (), False), (("embed",), ("q",), False), ((), (), True),
    ]  # fmt: skip
    full = next(plan for plan in plans if plan.unpacked)
    assert full.parts["FFN cache"] == sum(layer.matrix_bytes for layer in packable.layers)
    tight = plans[plans.index(full) - 1]
    assert tight.parts["FFN cache"] <= sum(layer.n_neurons * layer.row_bytes for layer in packable.layers)
    assert tight.bytes_per_token == 4096, "packed, all but a row of the embedding stays in DRAM"


def test_sketch_bits_follow_memory() -> None:
    """A small cap keeps 4 bits and slots, a large one all 8; a tiny model under a huge cap too.

    Bug: expected reads that underflow to 0 for every number of bits made it 4.
    """
    sketches = tuple(1000 * bits * 2048 // 8 for bits in range(4, 9))
    layers = [Layer(f"{i}", 1000, 12288, 12288000, 4096000, sketches, MIB) for i in range(8)]
    demand = dataclasses.replace(DEMAND, layers=layers)
    low = smallest_cap(demand)
    bits = [make_plan(demand, memory).gate_bits for memory in (low, low + 4 * MIB, most(demand), 1 << 40)]
    assert bits[0] == 4 and bits[2:] == [8, 8] and bits == sorted(bits), bits
    few = dataclasses.replace(demand, layers=[dataclasses.replace(x, sketches=sketches[:2]) for x in layers])
    assert make_plan(few, most(few)).gate_bits == 5, "no more than are stored"


def test_pinned_layers_are_spread_over_the_depth() -> None:
    ten = dataclasses.replace(DEMAND, layers=[dataclasses.replace(DEMAND.layers[0], path=str(i)) for i in range(10)])
    least = smallest_cap(ten) + 8 * MIB  # q is resident, no FFN is
    plan = make_plan(ten, least + 5 * 12288000 + 2 * MIB)
    whole = [int(path) for path, n in plan.pinned_rows.items() if n == 1000]
    assert len(whole) >= 4
    assert max(b - a for a, b in zip([-1, *whole], [*whole, 10], strict=True)) <= 3, whole


@pytest.mark.parametrize("memory", [1, MIB, 20 * MIB])
def test_a_refusal_says_what_would_do(memory: int) -> None:
    with pytest.raises(MemoryCapError) as caught:
        make_plan(DEMAND, memory)
    assert isinstance(caught.value, ValueError)
    assert not isinstance(caught.value, FlashConfigError)
    (smallest,) = map(int, re.findall(r"pass memory=(\d+)\.", str(caught.value)))
    assert smallest == smallest_cap(DEMAND)
    make_plan(DEMAND, smallest)
    assert "hf-flash plan" in str(caught.value)
    assert "shorter context" not in str(caught.value)


def test_a_refusal_because_of_the_context_says_so() -> None:
    with pytest.raises(MemoryCapError, match=r"A shorter context needs less: 4096 tokens take .* pass context=256"):
        make_plan(dataclasses.replace(DEMAND, kv_bytes=500 * MIB, context=4096), 100 * MIB)


def test_a_plan_is_ready_for_json() -> None:
    import json

    plan = make_plan(DEMAND, most(DEMAND))
    assert json.loads(json.dumps(plan.to_dict()))["total_bytes"] == plan.total_bytes
