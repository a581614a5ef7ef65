"""How fast a plan can be on a measured machine: bytes per token over bytes per second.

A token cannot be faster than its reads, nor than the sweep over what it multiplies with: decoding does two operations
per weight, so memory and not arithmetic is the limit ("LLM in a flash", §2). Nothing here measures; `probe.py` does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_flash.budget import Demand, Layer, Plan
from hf_flash.gates.certified import looked_at_bytes
from hf_flash.probe import Probe

DEFAULT_ACTIVE = 0.05  # share of neurons that a ReLU model's token wants, where nobody says


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a decoded token of one sequence moves, and how long that takes at least.

    Attributes:
        streamed_bytes: read in large extents: layers with gate `all` and streamed matrices.
        sparse_bytes: read neuron by neuron: what certified layers want and have not cached.
        touched_bytes: of DRAM: weights multiplied with, sketches, and what is read, which is written there too. Not
            the KV cache, which grows with the text.
        active: the share of neurons assumed to be wanted in certified layers; None where there are none.
        stream_s, sparse_s, memory_s: seconds that each of the three takes alone.
    """

    streamed_bytes: int
    sparse_bytes: int
    touched_bytes: int
    active: float | None
    stream_s: float
    sparse_s: float
    memory_s: float

    @property
    def flash_s(self) -> float:
        """Seconds of reading."""
        return self.stream_s + self.sparse_s

    @property
    def floor_s(self) -> float:
        """No token is faster at these speeds: the longer of reading and sweeping memory, as if both ran at once."""
        return max(self.flash_s, self.memory_s)

    @property
    def expected_s(self) -> float:
        """The same, but neurons that a gate asked for are waited for; streams do run beside the arithmetic."""
        return max(self.stream_s, self.memory_s) + self.sparse_s

    @property
    def bound(self) -> str:
        """What the floor is set by: "flash" or "memory"."""
        return "flash" if self.flash_s > self.memory_s else "memory"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        more = ("flash_s", "floor_s", "expected_s", "bound")
        rates = {"tokens_per_s": 1 / self.expected_s, "most_tokens_per_s": 1 / self.floor_s}
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in more}, **rates}


def estimate(demand: Demand, plan: Plan, probe: Probe, active: float = DEFAULT_ACTIVE) -> Estimate:
    """Expected speed of a plan on a machine.

    Args:
        demand, plan: of a model under a cap.
        probe: of the machine and the disk that the flash checkpoint lies on.
        active: share of neurons that a token wants in layers with the certified gate, 0 to 1. The cache is assumed to
            hold of them what it holds of all neurons; a text that keeps to few neurons does better.
    """
    streamed = plan.bytes_per_token
    missing = {layer: active * _missing(layer, plan) for layer in sparse_layers(demand, plan)}
    sparse = sum(missing.values())
    touched = resident_bytes(demand, plan) + 2 * streamed + sparse
    gates = plan.parts.get("gates", 0)
    certified = "certified" in plan.gates.values()  # the others look at all that they keep
    touched += looked_at_bytes(gates, plan.gate_bits, active) if certified else gates
    touched += sum(active * layer.n_neurons * layer.row_bytes for layer in missing)
    return Estimate(
        streamed_bytes=streamed, sparse_bytes=round(sparse), touched_bytes=round(touched),
        active=active if missing else None, stream_s=streamed / probe.flash_bytes_per_s(),
        sparse_s=sum(n / probe.flash_bytes_per_s(layer.row_bytes) for layer, n in missing.items()),
        memory_s=touched / probe.memory_bytes_per_s,
    )  # fmt: skip


def sparse_layers(demand: Demand, plan: Plan) -> list[Layer]:
    """Layers of which a token reads neurons one by one."""
    return [layer for layer in demand.layers if plan.gates[layer.path] != "all"]


def resident_bytes(demand: Demand, plan: Plan) -> int:
    """Bytes of the weights in DRAM that every token multiplies with; an embedding is looked up, not multiplied with."""
    packed = set(plan.packed)
    stay = (m for m in demand.matrices if not m.lookup and m.path not in plan.streamed)
    matrices = sum(m.packed_bytes if m.path in packed else m.n_bytes for m in stay)
    pinned = 0
    for layer in demand.layers:
        rows = plan.pinned_rows.get(layer.path, 0)
        pinned += layer.pinned_bytes(plan.unpacked) if rows >= layer.n_neurons else rows * layer.row_bytes
    return demand.fixed_bytes + matrices + pinned


def _missing(layer: Layer, plan: Plan) -> float:
    """Bytes of a layer's rows that have no slot."""
    return max(0, layer.n_neurons - plan.slots[layer.path]) * layer.row_bytes
