"""What a sketch's rounding does to the directions in which most of a layer's inputs lie.

The certified gate bounds E.x, what rounding may hide, by the length of x: it knows nothing of the errors E of a neuron
but the size of their cells. Inputs of a layer are alike, though: a few directions u hold most of each. So E.u is kept,
16 numbers a neuron, and of x = sum_k a_k u_k + r only r is left to be bounded:

    E.x = sum_k a_k (E.u_k) + E.r

The dither never saw the directions, nor r, so the bound of E.r holds as that of E.x does: for any directions and any
a_k. That they fit the inputs makes it tight; where they do not, r is x and nothing is won or lost. `hf-flash calibrate`
finds them (usual.py).

The numbers E.u_k are kept in bytes, with a step for each neuron: off by half a step at most, which is added to the
bound, sum_k |a_k| / 2 steps.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Mapping

import torch

N_DIRECTIONS = 16
MOST_NORM = 1.01  # of a direction, once it is rounded to bfloat16
SLACK = 64  # roundings, each relative to (|w| + 24 |step|) |x|, that what is known of E adds to a score at most
REST_SLACK = 2.0**-18  # of |x_g| + sum_k |a_k|: what float32 may lose of r_g


class NativeKnown(ctypes.Structure):
    """The fields of `Known` in _native/gate.h, in its order."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("directions", "upper", "all", "upper_step", "all_step")]


@dataclasses.dataclass
class Known:
    """E.u of a layer's neurons.

    Attributes:
        directions: [16, groups * 64] bfloat16, u_k in rows, 0 beyond d_model; of norm MOST_NORM at most.
        codes: by bits of the sketch, [n, 16] int8. steps: by bits, [n] float32: E.u_k is code times step.
    """

    directions: torch.Tensor
    codes: Mapping[int, torch.Tensor]
    steps: Mapping[int, torch.Tensor]

    def tensors(self, bits: int) -> dict[str, torch.Tensor]:
        """What a sketch of so many bits has of it, by name, as gates.safetensors holds it."""
        out = {"directions": self.directions}
        for b in levels(bits):
            out |= {f"known{b}": self.codes[b], f"known{b}_step": self.steps[b]}
        return out

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, groups * 64] float32 -> a_k [T, 16], and r [T, groups * 64]."""
        u = self.directions.float()
        along = x @ u.t()
        return along, x - along @ u

    def score(self, along: torch.Tensor, bits: int) -> torch.Tensor:
        """The most that sum_k a_k (E.u_k) can be, for a sketch of so many bits. along: [T, 16]; [T, n]."""
        step = self.steps[bits]
        half = along.abs().sum(-1, keepdim=True) / 2
        return along @ (self.codes[bits].float() * step.unsqueeze(-1)).t() + half * step * (1 + 2.0**-12)

    def as_native(self, bits: int) -> NativeKnown:
        """Where it lies, for a sketch of so many bits; it must outlive that."""
        parts = self.directions, self.codes[4], self.codes[bits], self.steps[4], self.steps[bits]
        return NativeKnown(*(t.data_ptr() for t in parts))


def levels(bits: int) -> list[int]:
    """Sketches that a decision by `bits` bits looks at."""
    return sorted({4, bits})


def known_tensors(n_neurons: int, groups: int, of_bits: Iterable[int]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes of the tensors by name, for sketches of some bits: known before they are made."""
    n, k, d = n_neurons, N_DIRECTIONS, groups * 64
    out: dict[str, tuple[str, tuple[int, ...], int]] = {"directions": ("BF16", (k, d), 2 * k * d)}
    for b in of_bits:
        out |= {f"known{b}": ("I8", (n, k), n * k), f"known{b}_step": ("F32", (n,), 4 * n)}
    return out


def encode(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E.u [n, 16] float64 -> codes and step, off by half a step at most."""
    largest = products.abs().amax(-1)
    step = (largest / 127 * (1 + 2.0**-20)).float()
    s = step.double().unsqueeze(-1)
    codes = torch.where(s > 0, products / s, 0.0).round()
    assert codes.abs().max() <= 127
    return codes.to(torch.int8), step


def directions_of(inputs: torch.Tensor, groups: int, seed: int = 0) -> torch.Tensor:
    """The directions that hold most of some inputs, each weighed alike: [T, d_model] -> as `Known.directions`."""
    x = inputs.float()
    x = x[x.isfinite().all(-1)]
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-20)
    k = min(N_DIRECTIONS, *x.shape)
    out = torch.zeros(N_DIRECTIONS, groups * 64, dtype=torch.bfloat16)
    if k:
        with torch.random.fork_rng(devices=[]):  # what it draws is nobody else's
            torch.manual_seed(seed)
            basis = torch.svd_lowrank(x, q=min(2 * k, *x.shape), niter=4)[2]
        out[:k, : x.shape[1]] = basis[:, :k].t().bfloat16()
    norms = out.float().norm(dim=-1)
    return torch.where((norms <= MOST_NORM).unsqueeze(-1), out, 0.0).to(torch.bfloat16)


def rest_of(inputs: torch.Tensor, directions: torch.Tensor) -> float:
    """Of the length of some inputs [T, d_model] the share, on average, that no direction holds: 0 to 1."""
    x = inputs.float()
    u = directions.float()[:, : x.shape[1]]
    rest = x - (x @ u.t()) @ u
    shares = rest.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-20)
    shares = shares[shares.isfinite()]
    return min(1.0, float(shares.mean())) if len(shares) else 1.0
