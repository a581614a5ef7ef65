r"""The certified gate: read every neuron that cannot be proved silent, and no other.

The idea. A ReLU neuron with pre-activation z = w.x + b <= 0 contributes nothing, so its bundle need not be read. To
know the sign of z one needs w only roughly: a few bits per weight in DRAM (the *sketch*) and a bound on what the
rounding can hide.

The sketch. Weights are quantized in groups of 64 along d_model with step s (one per neuron and group), each rounded up
or down *at random* so that its mean is exact: q = floor(w / s + u), u uniform in [0, 1). The step leaves room, nothing
is clipped. With w^ = s q and E = w - w^, the entries E_j are independent, have mean zero and lie in an interval of
length s.

The bound. For a fixed input x, w.x = w^.x + E.x where E.x is a sum of independent zero-mean terms, term j in an
interval of length s_g |x_j|. Hoeffding's inequality gives

    P(E.x > t) <= exp(-2 t^2 / sum_g s_g^2 |x_g|^2),  so  t_H = sqrt(ln(1/delta) / 2 * sum_g s_g^2 |x_g|^2)

fails with probability at most delta per decision (over the random rounding, which never saw x). Independently,
Cauchy-Schwarz per group gives t_C = sum_g |E_g| |x_g|, which never fails. t = min(t_H, t_C).

"Never saw x" is meant in earnest: whoever reads the sketch can make an x that defeats t_H, and delta = 0 (t_C alone)
is for them. An FFN's inputs depend on the rounding only through the order in which float sums are taken.

The arithmetic. Let u = 2^-24, u' the unit roundoff of the dtype that the model computes in, and gamma = m u / (1 - m u)
with m = d_model + 8: the standard bound, relative to |w| |x|, of a sum of d_model float32 products in any order, with 8
roundings to spare for what is done to it here.
- Our score is off by at most gamma |w^| |x|, and |w^| <= |w| + |E|.
- Weights stored wider than the model computes are rounded once: by u' |w| |x|, in float16 by 2^-25 an entry besides.
- The dense model sums in float32, products and bias: gamma (|w| (1 + u') |x| + |b|).
- It rounds to its dtype after the product, after the bias, or after both. Rounding is monotone, so with
  U = fl(w^.x) + t + what is above, the pre-activation is at most (V + b) + u' |V + b|, V = U + u' |U|.
A neuron is silent if that is <= the threshold below which its activation is zero (0 for ReLU, ReLU^2 and ReLU-GLU,
theta for FATReLU). Float32 products may be told to round their operands (TF32, bfloat16 on some CPUs); that is added.

Underflow and overflow need no terms, because inputs and weights of no ordinary size are not judged: a token whose
largest entry is not within 2^-24 .. 2^60 wants every neuron, a neuron whose norm is not within 2^-24 .. 2^15 is always
wanted (zeros are exact). Where the dense model itself overflows, 0 * inf makes NaN there and nothing here.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from hf_flash import native, trace
from hf_flash.layout import round_up

GROUP = 64
BLOCK_NEURONS = 512  # neurons dequantized at a time: bounds the scratch memory
_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
_WEIGHTS, _INPUTS = (2.0**-24, 2.0**15), (2.0**-24, 2.0**60)  # norms and entries that are judged


@dataclasses.dataclass
class Sketch:
    """A low-bit copy of the matrix that decides (gate rows, or up rows where there is no gate).

    Attributes:
        codes: [n, groups * 8 * bits] uint8: a row's codes + 2^(bits-1), `bits` bits each, a little-endian bit stream.
        step: [n, groups] bfloat16, the group's step s.
        error: [n, groups] bfloat16, an upper bound of |E_g|.
        norm: [n] float32, an upper bound of |w| + |E|; infinite for a neuron that is always wanted.
        bits: 4 to 8.
        d_model: columns of the matrix.
    """

    codes: torch.Tensor
    step: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor
    bits: int
    d_model: int

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int = 8, seed: int = 0) -> Sketch:
        """Quantize a matrix with stochastic rounding.

        Args:
            weight: [n, d_model].
            bits: 4 to 8.
            seed: of the random rounding; stored nowhere, any will do.
        """
        assert 4 <= bits <= 8, bits
        generator = torch.Generator().manual_seed(seed)
        parts = [_quantize(block, bits, generator) for block in weight.split(BLOCK_NEURONS)]
        codes, step, error, norm = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(codes, step, error, norm, bits, weight.shape[1])

    @property
    def n_bytes(self) -> int:
        """DRAM that the sketch takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, as gates.safetensors holds them."""
        return {"codes": self.codes, "step": self.step, "error": self.error, "norm": self.norm}

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start..stop as float32 [n, d_model]."""
        codes = _unpack(self.codes[start:stop], self.bits)  # [n, groups * 64] float32
        n, groups = self.step[start:stop].shape
        values = codes.view(n, groups, GROUP) * self.step[start:stop].float().unsqueeze(-1)
        return values.view(n, groups * GROUP)[:, : self.d_model]


def sketch_bytes(n_neurons: int, d_model: int, bits: int) -> int:
    """DRAM that a sketch will take, known before it is made."""
    groups = round_up(d_model, GROUP) // GROUP
    return n_neurons * (groups * (8 * bits + 4) + 4)


def _quantize(weight: torch.Tensor, bits: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    n, d = weight.shape
    groups = round_up(d, GROUP) // GROUP
    size = weight.double().norm(dim=-1)
    w = torch.zeros(n, groups * GROUP, dtype=torch.float64)
    w[:, :d] = weight.nan_to_num(0.0, 0.0, 0.0)
    w = w.view(n, groups, GROUP)
    top = 2 ** (bits - 1) - 1
    largest = w.abs().amax(-1)
    step = (largest / top * (1 + 2.0**-6)).clamp_min(2.0**-100).bfloat16()  # rounded up, so nothing is clipped
    s = step.double().unsqueeze(-1)
    codes = torch.floor(w / s + torch.rand(w.shape, dtype=torch.float64, generator=generator))
    assert codes.abs().max() <= top
    error = w - codes * s
    bound = (error.norm(dim=-1) * (1 + 2.0**-7)).bfloat16()  # rounded up
    norm = ((size + error.flatten(1).norm(dim=-1)) * (1 + 1e-6)).float()
    judged = (size == 0) | ((norm >= _WEIGHTS[0]) & (norm <= _WEIGHTS[1]))
    norm = torch.where(judged, norm, math.inf)
    return _pack((codes + 2 ** (bits - 1)).view(n, -1).to(torch.int32), bits), step, bound, norm


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] codes of `bits` bits (m a multiple of 8) -> [n, m * bits / 8] uint8, little-endian bit stream."""
    if bits == 8:
        return codes.to(torch.uint8)
    n, m = codes.shape
    eights = codes.view(n, m // 8, 8).to(torch.int64)
    word = (eights << (torch.arange(8) * bits)).sum(-1)  # [n, m / 8], 8 * bits <= 56 bits
    return ((word.unsqueeze(-1) >> (torch.arange(bits) * 8)) & 255).to(torch.uint8).reshape(n, -1)


def _unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `_pack`, shifted back to signed values: [n, m * bits / 8] uint8 -> [n, m] float32."""
    if bits == 8:
        return codes.float().sub_(128.0)
    n = codes.shape[0]
    parts = codes.view(n, -1, bits).to(torch.int64)
    word = (parts << (torch.arange(bits) * 8)).sum(-1)  # [n, m / 8]
    eights = (word.unsqueeze(-1) >> (torch.arange(8) * bits)) & (2**bits - 1)
    return eights.reshape(n, -1).float().sub_(float(2 ** (bits - 1)))


class CertifiedGate:
    """Decides which neurons may fire, from a sketch.

    Args:
        sketch: of the deciding matrix.
        delta: probability that one decision is wrong; 0 uses the deterministic bound alone.
        threshold: the activation is exactly 0 at and below this.
        weight_dtype: dtype of the stored weights.
    """

    def __init__(
        self, sketch: Sketch, delta: float = 1e-9, threshold: float = 0.0, weight_dtype: torch.dtype = torch.float32
    ) -> None:
        self.sketch, self.delta, self.threshold = sketch, delta, threshold
        self._weight_dtype = weight_dtype
        self._log = -math.log(delta) / 2 if delta > 0 else None
        # A bar above 0 is lowered by what float16 rounds off near 0 and by what comparing in float32 does.
        self._bar = threshold * (1 - 2.0**-20) - 2.0**-24 if threshold > 0 else 0.0

    def upper(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Upper bound of the pre-activations that the dense model computes.

        Args:
            x: [n_tokens, d_model], the FFN's input in the dtype that the model computes in.
            bias: [n_neurons] or None.

        Returns:
            [n_tokens, n_neurons] float32; infinite or NaN where nothing is promised.
        """
        unit, sketch, operand = _UNIT[x.dtype], self.sketch, _operand_unit()
        x32 = x.float()
        _, squares, size = self._measure(x32)
        scores = torch.cat(
            [x32 @ sketch.dequantize(i, i + BLOCK_NEURONS).t() for i in range(0, sketch.codes.shape[0], BLOCK_NEURONS)],
            dim=1,
        )  # [T, n]
        t = squares.sqrt() @ sketch.error.float().t()  # Cauchy-Schwarz
        if self._log is not None:
            t = torch.minimum(t, (self._log * (squares @ sketch.step.float().square().t())).sqrt_())
        gamma = self._gamma()
        v = scores + t * (1 + 2.0**-12 + operand) + size * self._slack(x.dtype, gamma)
        v = v + unit * v.abs()
        if bias is not None:
            b = bias.to(x.dtype).float()
            v = v + (b + gamma * b.abs())
            v = v + unit * v.abs()
        return v

    def _measure(self, x32: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs padded to whole groups, |x_g|^2 from above [T, groups], and |x| [T, 1], infinite where not judged."""
        groups = self.sketch.step.shape[1]
        padded = torch.nn.functional.pad(x32, (0, groups * GROUP - self.sketch.d_model)).contiguous()
        squares = padded.view(-1, groups, GROUP).square().sum(-1) * (1 + 2.0**-16)
        largest = x32.abs().amax(-1, keepdim=True)
        judged = (largest == 0) | ((largest >= _INPUTS[0]) & (largest <= _INPUTS[1]))
        return padded, squares, torch.where(judged, squares.sum(-1, keepdim=True).sqrt(), math.inf)

    def _gamma(self) -> float:
        """Bound of what a float32 sum of d_model products is off by, relative to |w| |x|."""
        m = (self.sketch.d_model + 8) * 2.0**-24
        return m / (1 - m) + _operand_unit()

    def _slack(self, dtype: torch.dtype, gamma: float) -> torch.Tensor:
        """What arithmetic in `dtype` may add to a score, per |x|. [n_neurons]"""
        unit, stored = _UNIT[dtype], self._weight_dtype
        per_norm = gamma * (2 + unit) + (unit if unit > _UNIT[stored] else 0.0)
        tiny = 2.0**-25 * math.sqrt(self.sketch.d_model) if dtype == torch.float16 != stored else 0.0
        return self.sketch.norm * per_norm + tiny

    def wanted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Which neurons each token may need.

        Returns:
            [n_tokens, n_neurons] bool; False is a proof of silence. A NaN or infinite input wants every neuron.
        """
        return ~(self.upper(x, bias) <= self._bar)

    def decide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which neurons any of some tokens may need, and which the last one may; natively where that is built.

        Returns:
            [n_neurons] bool, [n_neurons] bool.
        """
        if native.available() and x.shape[0] <= native.MAX_TOKENS:
            padded, squares, size = self._measure(x.float())
            gamma = self._gamma()
            b = None if bias is None else bias.to(x.dtype).float().contiguous()
            return native.gate_scan(
                padded, squares, size, self.sketch, self._slack(x.dtype, gamma), b, self._log, gamma, _UNIT[x.dtype],
                self._bar,
            )  # fmt: skip
        start = time.perf_counter()
        wanted = self.wanted(x, bias)
        if trace.active is not None:
            trace.active.add(trace.GATE_SCAN, start, time.perf_counter(), neurons=wanted.shape[1])
        return wanted.any(0), wanted[-1:].any(0)  # which holds for no tokens too


def _operand_unit() -> float:
    """What torch may round off the operands of a float32 product, relative to it: nothing unless the user said so."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    name = torch.get_float32_matmul_precision() if matmul is None else matmul.fp32_precision
    return 0.0 if name in ("none", "ieee", "highest") else 2.0**-6
