"""The estimate is bytes over bytes per second, for every plan; more memory or a faster machine never makes it worse."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budget import demands, most
from test_probe import MIB, PROBE

from hf_flash.budget import Demand, Layer, Matrix, make_plan, smallest_cap
from hf_flash.estimate import DEFAULT_ACTIVE, Estimate, estimate, resident_bytes
from hf_flash.gates.certified import looked_at_bytes
from hf_flash.probe import Probe
from hf_flash.show_speed import estimate_lines

GIB = 1024 * MIB
MATRICES = [Matrix("embed", 30 * MIB, True, 4096, 30 * MIB), Matrix("head", 8 * MIB, False, 4096, 8 * MIB)]
DENSE = Demand(10 * MIB, MATRICES, [Layer(f"{i}", 1000, 12288, 12288000, 4096000) for i in range(4)], 5 * MIB, MIB)
SKETCHES = (1_000_000, 1_250_000, 1_500_000, 1_750_000, 2_000_000)  # of 4 to 8 bits
SPARSE = dataclasses.replace(
    DENSE, layers=[Layer(f"{i}", 1000, 12288, 12288000, 4096000, SKETCHES, 1000) for i in range(4)]
)


def test_streams() -> None:
    plan = make_plan(DENSE, 60 * MIB)
    found = estimate(DENSE, plan, PROBE)
    assert plan.streamed == ["embed"] and found.active is None and found.sparse_bytes == 0
    assert found.streamed_bytes == plan.bytes_per_token > 4096
    pinned = sum(n * 12288 for n in plan.pinned_rows.values())
    assert resident_bytes(DENSE, plan) == 18 * MIB + pinned
    assert found.touched_bytes == 18 * MIB + pinned + 2 * plan.bytes_per_token
    assert found.flash_s == pytest.approx(plan.bytes_per_token / GIB)
    assert found.memory_s == pytest.approx(found.touched_bytes / (20 * GIB))
    assert found.floor_s == found.expected_s == found.flash_s and found.bound == "flash"
    first, second = estimate_lines(found)
    assert f"({1e3 * found.flash_s:.3g} ms)" in first and "set by the flash" in second


def test_neurons_one_by_one() -> None:
    plan = make_plan(SPARSE, 80 * MIB)
    found = estimate(SPARSE, plan, PROBE, active=0.1)
    missing = sum((1000 - n) * 12288 for n in plan.slots.values())
    assert 0 < missing < 4 * 12288000
    assert found.sparse_bytes == pytest.approx(0.1 * missing, abs=1)
    assert found.sparse_s == pytest.approx(found.sparse_bytes / PROBE.flash_bytes_per_s(12288), rel=1e-3)
    assert plan.gate_bits > 4
    sketches = 4 * looked_at_bytes(SPARSE.layers[0].sketches[plan.gate_bits - 4], plan.gate_bits, 0.1)
    want = resident_bytes(SPARSE, plan) + sketches + 0.1 * 4 * 12288000 + found.sparse_bytes + 2 * found.streamed_bytes
    assert found.touched_bytes == pytest.approx(want, abs=2)
    assert found.expected_s == pytest.approx(found.memory_s + found.sparse_s, rel=0.01)
    assert "assumed: 0.1 of the neurons are wanted (--active)" in estimate_lines(found)[-1]
    assert estimate(SPARSE, plan, PROBE).active == DEFAULT_ACTIVE
    assert estimate(SPARSE, plan, PROBE, active=0.0).sparse_bytes == 0


def test_what_fits_is_bound_by_memory() -> None:
    found = estimate(DENSE, make_plan(DENSE, most(DENSE)), PROBE)
    assert (found.flash_s, found.bound) == (0, "memory")
    assert found.floor_s == found.expected_s == found.memory_s > 0


@settings(max_examples=100, deadline=None)
@given(demands((1,)), st.floats(0, 1), st.floats(0, 1), st.floats(1, 10))
def test_properties(demand: Demand, share: float, active: float, factor: float) -> None:
    low, high = smallest_cap(demand), most(demand)
    plan = make_plan(demand, int(low + share * (high - low)))
    found = estimate(demand, plan, PROBE, active)
    assert 0 < found.floor_s <= found.expected_s * (1 + 1e-9)
    assert found.sparse_bytes >= 0 and found.touched_bytes >= 2 * found.streamed_bytes
    faster = dataclasses.replace(PROBE, memory={n: speed * factor for n, speed in PROBE.memory.items()})
    assert estimate(demand, plan, faster, active).expected_s <= found.expected_s * (1 + 1e-9)
    assert estimate(demand, plan, PROBE, active / 2).floor_s <= found.floor_s * (1 + 1e-9)
    everything = estimate(demand, make_plan(demand, most(demand)), PROBE, active)
    assert everything.streamed_bytes == everything.sparse_bytes == 0


def test_json() -> None:
    found = estimate(SPARSE, make_plan(SPARSE, 80 * MIB), PROBE)
    out = json.loads(json.dumps(found.to_dict()))
    assert out["tokens_per_s"] == pytest.approx(1 / found.expected_s)
    assert out["tokens_per_s"] <= out["most_tokens_per_s"]
    assert {field.name for field in dataclasses.fields(Estimate)} < set(out)


def test_without_a_measurement() -> None:
    assert estimate_lines(None) == ["run `hf-flash doctor` to see the expected speed"]
    assert isinstance(PROBE, Probe)
