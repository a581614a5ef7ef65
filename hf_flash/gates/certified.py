r"""The certified gate: read every neuron that cannot be proved silent, and no other.

The idea. A ReLU neuron with pre-activation z = w.x + b <= 0 contributes nothing, so its bundle need not be read. To
know the sign of z one needs w only roughly: a few bits per weight in DRAM (the *sketch*) and a bound on what the
rounding can hide.

The sketch. Weights are quantized in groups of 64 along d_model with a step s (one per neuron and group) and a
*subtractive dither*: one random number U per column, uniform in [0, 1) and kept, is added before rounding down and
taken off again by the reader, which puts the weight in the middle of its cell. So the errors E_j = w_j - w^_j are
independent and uniform in [-s/2, s/2) whatever w is; nothing is clipped, because steps leave room. The dither is that
of the 4-bit code; each further bit halves the cell, and U scaled up is uniform modulo the smaller cell too. So a sketch
of 8 bits contains those of 7, 6, 5 and 4: up to four planes of one bit on top of a 4-bit code, as memory allows.

The bound. For a fixed input x, w.x = w^.x + E.x, a sum of independent terms, term j uniform in an interval of length
s_g |x_j|. A uniform variable is a sum of signs, +-1/4 +-1/8 +-1/16 ... (its binary digits), so E.x is a weighted sum of
independent signs, with the variance v = sum_g s_g^2 |x_g|^2 / 12. Such sums have hardly more than Gaussian tails
(Bentkus and Dzindzalieta, "A tight Gaussian bound for weighted sums of Rademacher random variables", Bernoulli, 2015):

    P(E.x >= z sqrt(v)) <= c Q(z),  Q the normal tail, c = 1 / (4 Q(sqrt(2))) = 3.18,  so  t_P = Q^-1(delta / c) sqrt(v)

fails with probability at most delta per decision (over the dither, which never saw x). Chernoff's bound exp(-z^2 / 2)
instead is 4 % wider at delta = 1e-9; Hoeffding's for rounding up or down at random, without a kept dither, 1.8 times.
Independently, t_C = sum_g 4 s_g |x_g| never fails, as |E_g| <= sqrt(64) s_g / 2. t = min(t_P, t_C).

"Never saw x" is meant in earnest: whoever reads the sketch can make an x that defeats t_P, and delta = 0 (t_C alone)
is for them. An FFN's inputs depend on the rounding only through the order in which float sums are taken.

In two steps. A sketch of more bits holds one of 4, and most neurons are silent by that alone: then the other planes
need not be touched. Either decision has a part of delta. A tenth for the first costs the other hardly a read (its z
goes from 6.18 to 6.20) and leaves it a fifth fewer neurons than a millionth would (6.54 instead of 8.09).

What is known of E (known.py). Where the products of E with a few directions of the inputs are kept, only what of x lies
in none of them, r, is left to the bound: x_g is r_g above. Both of the two steps have such products, of their own E.

The arithmetic. Let u = 2^-24, u' the unit roundoff of the dtype that the model computes in, and gamma = m u / (1 - m u)
with m = d_model + 8: the standard bound, relative to |w| |x|, of a sum of d_model float32 products in any order, with 8
roundings to spare for what is done to it here, and 64 more where E.u is added.
- Our score is a sum over codes and one over what a code of 0 stands for: off by at most gamma (|w| + 24 |s|) |x|.
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
import statistics
import time

import torch

from hf_flash import native, trace
from hf_flash.gates.ago import NEVER, never, note
from hf_flash.gates.known import REST_SLACK, SLACK, Known, encode, known_tensors, levels
from hf_flash.memory import round_up
from hf_flash.plan import IntArray

GROUP = 64
SKETCH_KIND = "dithered sketch"  # as gates.safetensors names it
BLOCK_NEURONS = 256  # neurons dequantized at a time: bounds the scratch memory
GATE_TOKENS, NATIVE_TOKENS = 16, 64  # tokens scored at a time, by torch and natively: the same
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
UPPER_SHARE = 0.1  # of delta, for decisions by the upper 4 bits alone
_WEIGHTS, INPUTS = (2.0**-24, 2.0**15), (2.0**-24, 2.0**60)  # norms and entries that are judged


@dataclasses.dataclass
class Sketch:
    """A low-bit copy of the matrix that decides (gate rows, or up rows where there is no gate).

    Attributes:
        nibbles: [n, groups * 32] uint8, the upper 4 bits of codes: of 64, byte j has those of j and of j + 32 (above).
        planes: the next bits of the codes, upper first, each [n, groups * 8] uint8: bit j of 64 is that of code j.
        step: [n, groups] bfloat16, the step of 4 bits; that of b bits is 2^(b - 4) times finer.
        norm: [n] float32, an upper bound of |w| + 24 |step|; infinite for a neuron that is always wanted.
        dither: [groups * 64] float32, U.
        d_model: columns of the matrix.
        known: what its rounding does to usual inputs, for 4 and for `bits` bits; None where nobody looked.
    """

    nibbles: torch.Tensor
    planes: list[torch.Tensor]
    step: torch.Tensor
    norm: torch.Tensor
    dither: torch.Tensor
    d_model: int
    known: Known | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int = 8, seed: int = 0) -> Sketch:
        """Quantize a matrix.

        Args:
            weight: [n, d_model].
            bits: 4 to 8.
            seed: of the dither.
        """
        assert 4 <= bits <= 8, bits
        groups = round_up(weight.shape[1], GROUP) // GROUP
        dither = torch.rand(groups * GROUP, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
        parts = [_quantize(block, bits, dither) for block in weight.split(BLOCK_NEURONS)]
        codes, step, norm = (torch.cat(column) for column in zip(*parts, strict=True))
        nibbles, *planes = split_codes(codes, bits)
        return cls(nibbles, planes, step, norm, dither, weight.shape[1])

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 + len(self.planes)

    @property
    def n_bytes(self) -> int:
        """DRAM that the sketch takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def with_bits(self, bits: int) -> Sketch:
        """The sketch of fewer bits that this one contains; no copy."""
        return dataclasses.replace(self, planes=self.planes[: bits - 4])

    def knowing(self, weight: torch.Tensor, directions: torch.Tensor) -> Sketch:
        """The same, with what is known of its errors and of those of all sketches that it contains.

        Args:
            weight: [n, d_model], which it was made of.
            directions: as `Known.directions`.
        """
        u = directions[:, : self.d_model].double().t()
        true = [block.nan_to_num(0.0, 0.0, 0.0).double() @ u for block in weight.split(BLOCK_NEURONS)]
        codes, steps = {}, {}
        for bits in range(4, self.bits + 1):
            rough = self.with_bits(bits)
            parts = [
                products - rough.dequantize(i * BLOCK_NEURONS, (i + 1) * BLOCK_NEURONS).double() @ u
                for i, products in enumerate(true)
            ]
            codes[bits], steps[bits] = encode(torch.where(self.norm.isfinite().unsqueeze(-1), torch.cat(parts), 0.0))
        return dataclasses.replace(self, known=Known(directions, codes, steps))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, as gates.safetensors holds them."""
        planes = {f"plane{i}": plane for i, plane in enumerate(self.planes, start=5)}
        known = self.known.tensors(self.bits) if self.known else {}
        return {"nibbles": self.nibbles, **planes, "step": self.step, "dither": self.dither, "norm": self.norm, **known}

    def offset(self) -> torch.Tensor:
        """What a code of 0 stands for by column, in steps of `bits` bits: [groups * 64] float32."""
        return 0.5 + (0.5 - self.dither) * 2.0 ** (self.bits - 4)

    def dequantize(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start..stop as float32 [n, d_model]."""
        codes = join_codes(self.nibbles[start:stop], [plane[start:stop] for plane in self.planes])
        n, groups = self.step[start:stop].shape
        step = self.step[start:stop].float() / 2.0 ** (self.bits - 4)
        values = (codes.float() - 2.0 ** (self.bits - 1) + self.offset()).view(n, groups, GROUP) * step.unsqueeze(-1)
        return values.view(n, groups * GROUP)[:, : self.d_model]


def sketch_tensors(
    n_neurons: int, d_model: int, bits: int, known: bool = False
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes of a sketch's tensors by name, known before it is made."""
    n, groups = n_neurons, round_up(d_model, GROUP) // GROUP
    planes = {f"plane{i}": ("U8", (n, groups * 8), n * groups * 8) for i in range(5, bits + 1)}
    return {
        "nibbles": ("U8", (n, groups * 32), n * groups * 32), **planes, "step": ("BF16", (n, groups), 2 * n * groups),
        "dither": ("F32", (groups * GROUP,), 4 * groups * GROUP), "norm": ("F32", (n,), 4 * n),
        **(known_tensors(n, groups, levels(bits)) if known else {}),
    }  # fmt: skip


def sketch_bytes(n_neurons: int, d_model: int, bits: int, known: bool = False) -> int:
    """DRAM that a sketch will take."""
    return sum(n_bytes for _, _, n_bytes in sketch_tensors(n_neurons, d_model, bits, known).values())


def looked_at_bytes(n_bytes: float, bits: int, share: float) -> float:
    """Of a sketch's bytes those that a token looks at, at least.

    The upper four bits of every neuron; the others where it is wanted. They decide for some that are not, too.

    Args:
        n_bytes: of the sketch. bits: in which it is kept. share: of the neurons that are wanted, 0 to 1.
    """
    of_steps = 16 / GROUP  # bits a weight: a bfloat16 for each group
    return n_bytes * (4 + of_steps + (bits - 4) * share) / (bits + of_steps)


def _quantize(weight: torch.Tensor, bits: int, dither: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [n, groups * 64] uint8, the step of 4 bits, and the norm."""
    n, d = weight.shape
    groups = round_up(d, GROUP) // GROUP
    size = weight.double().norm(dim=-1)
    w = torch.zeros(n, groups * GROUP, dtype=torch.float64)
    w[:, :d] = weight.nan_to_num(0.0, 0.0, 0.0)
    w = w.view(n, groups, GROUP)
    largest = w.abs().amax(-1)
    # Rounded up, so that codes stay in range; 0 for zeros, which are exact.
    step = torch.where(largest > 0, (largest / 7.5 * (1 + 2.0**-7)).clamp_min(2.0**-100), 0.0).bfloat16()
    s = step.double().unsqueeze(-1)
    cells = torch.where(s > 0, w / s, 0.0).view(n, -1) + (dither.double() - 0.5)
    codes = torch.floor(cells * 2 ** (bits - 4)) + 2 ** (bits - 1)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    norm = ((size + 24 * step.double().norm(dim=-1)) * (1 + 1e-6)).float()
    judged = (size == 0) | ((norm >= _WEIGHTS[0]) & (norm <= _WEIGHTS[1]))
    return codes.to(torch.uint8), step, torch.where(judged, norm, math.inf)


def split_codes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Codes [n, groups * 64] uint8 of `bits` bits -> nibbles [n, groups * 32] and bits - 4 planes [n, groups * 8]."""
    n = codes.shape[0]
    halves = (codes >> (bits - 4)).view(n, -1, 2, 32)
    out = [(halves[:, :, 0] | halves[:, :, 1] << 4).reshape(n, -1)]
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    for k in range(bits - 5, -1, -1):
        out.append((((codes >> k) & 1).view(n, -1, 8) * weight).sum(-1, dtype=torch.uint8))
    return out


def join_codes(nibbles: torch.Tensor, planes: list[torch.Tensor]) -> torch.Tensor:
    """Inverse of `split_codes`: [n, groups * 64] uint8."""
    n = nibbles.shape[0]
    parts = nibbles.view(n, -1, 1, 32)
    codes = torch.cat([parts & 15, parts >> 4], dim=2).view(n, -1)
    for plane in planes:
        bit = (plane.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        codes = codes << 1 | bit.view(n, -1)
    return codes


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
        first = UPPER_SHARE * delta if sketch.bits > 4 else 0.0
        self.tail = _tail(delta - first) if delta > 0 else None
        self.upper_tail = _tail(first) if first > 0 else None
        self._offset = sketch.offset()
        self._bias: tuple[object, torch.Tensor | None] = (None, None)  # the last bias that was seen, and as float32
        # A bar above 0 is lowered by what float16 rounds off near 0 and by what comparing in float32 does.
        self.bar = threshold * (1 - 2.0**-20) - 2.0**-24 if threshold > 0 else 0.0

    @property
    def upper_tail_number(self) -> float:
        """`upper_tail` as native code is told it."""
        return -1.0 if self.upper_tail is None else self.upper_tail

    def upper(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Upper bound of the pre-activations that the dense model computes.

        Args:
            x: [n_tokens, d_model], the FFN's input in the dtype that the model computes in.
            bias: [n_neurons] or None.

        Returns:
            [n_tokens, n_neurons] float32; infinite or NaN where nothing is promised.
        """
        return self._upper(x, bias, self.sketch, self.tail)

    def _upper(self, x: torch.Tensor, bias: torch.Tensor | None, sketch: Sketch, tail: float | None) -> torch.Tensor:
        """`upper` by a sketch and a bound of that tail."""
        unit, operand = UNIT[x.dtype], _operand_unit()
        x32 = x.float()
        along, squares, size = self._measure(x32)
        scores = torch.cat(
            [x32 @ sketch.dequantize(i, i + BLOCK_NEURONS).t() for i in range(0, sketch.norm.shape[0], BLOCK_NEURONS)],
            dim=1,
        )  # [T, n]
        step = sketch.step.float() / 2.0 ** (sketch.bits - 4)
        t = 4 * (squares.sqrt() @ step.t())  # for certain
        if tail is not None:
            t = torch.minimum(t, (tail * (squares @ step.square().t())).sqrt_())
        gamma = self.gamma()
        if sketch.known is not None:
            scores = scores + sketch.known.score(along, sketch.bits)
        v = scores + t * (1 + 2.0**-12 + operand) + size * self._slack(x.dtype)
        v = v + unit * v.abs()
        if bias is not None:
            b = bias.to(x.dtype).float()
            v = v + (b + gamma * b.abs())
            v = v + unit * v.abs()
        return v

    def _measure(self, x32: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """a_k [T, 16]; |r_g|^2 from above [T, groups]; and |x| [T, 1], infinite where not judged.

        Where nothing is known of E, r is x, and a is empty.
        """
        groups, known = self.sketch.step.shape[1], self.sketch.known
        padded = torch.nn.functional.pad(x32, (0, groups * GROUP - self.sketch.d_model))
        squares = padded.view(-1, groups, GROUP).square().sum(-1) * (1 + 2.0**-16)
        largest = x32.abs().amax(-1, keepdim=True)
        judged = (largest == 0) | ((largest >= INPUTS[0]) & (largest <= INPUTS[1]))
        size = torch.where(judged, squares.sum(-1, keepdim=True).sqrt(), math.inf)
        if known is None:
            return x32.new_empty(len(x32), 0), squares, size
        along, rest = known.split(padded)
        lost = REST_SLACK * (squares.sqrt() + along.abs().sum(-1, keepdim=True))
        norms = rest.view(-1, groups, GROUP).norm(dim=-1) + lost
        return along, norms.square() * (1 + 2.0**-16), size

    def gamma(self) -> float:
        """Bound of what a float32 sum of d_model products is off by, relative to |w| |x|."""
        m = (self.sketch.d_model + 8 + (SLACK if self.sketch.known else 0)) * 2.0**-24
        return m / (1 - m) + _operand_unit()

    def per_norm(self, dtype: torch.dtype) -> tuple[float, float]:
        """What arithmetic in `dtype` may add to a score: per |x| and per norm of the neuron, and per |x| alone."""
        unit, stored = UNIT[dtype], self._weight_dtype
        per_norm = self.gamma() * (2 + unit) + (unit if unit > UNIT[stored] else 0.0)
        return per_norm, 2.0**-25 * math.sqrt(self.sketch.d_model) if dtype == torch.float16 != stored else 0.0

    def _slack(self, dtype: torch.dtype) -> torch.Tensor:
        """What arithmetic in `dtype` may add to a score, per |x|. [n_neurons]"""
        per_norm, tiny = self.per_norm(dtype)
        return self.sketch.norm * per_norm + tiny

    def wanted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Which neurons each token may need.

        Returns:
            [n_tokens, n_neurons] bool; False is a proof of silence. A NaN or infinite input wants every neuron.
        """
        silent = self.upper(x, bias) <= self.bar
        if self.sketch.bits > 4:
            silent |= self._upper(x, bias, self.sketch.with_bits(4), self.upper_tail) <= self.bar
        return ~silent

    def decide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[IntArray, torch.Tensor]:
        """Which neurons any of some tokens may need, and how long ago; natively where that is built.

        Args:
            x: [n_tokens, d_model]. bias: [n_neurons] or None.

        Returns:
            Sorted neuron numbers; [n_neurons] int32, how many tokens ago each was wanted (ago.py), 0 by the last one.
        """
        ago = never(self.sketch.norm.shape[0])
        start, n_later = time.perf_counter(), len(x)
        if native.available():
            for tokens in reversed(x.split(NATIVE_TOKENS)):
                self._scan(tokens, bias, ago, len(x) - n_later)
                n_later -= len(tokens)
        else:
            for tokens in x.split(GATE_TOKENS):
                n_later -= len(tokens)
                note(ago, self.wanted(tokens, bias), n_later)
            if trace.active is not None:
                trace.active.add(trace.GATE_SCAN, start, time.perf_counter(), neurons=len(ago))
        return (ago < NEVER).nonzero()[:, 0].numpy(), ago

    def _scan(self, x: torch.Tensor, bias: torch.Tensor | None, ago: torch.Tensor, n_later: int) -> None:
        """Notes in `ago` who is wanted, of those that no later token wants."""
        per_norm, tiny = self.per_norm(x.dtype)
        ids, marks = native.gate(
            x, self.sketch, self._offset, self._bias_like(x, bias), self.tail, self.gamma(), per_norm, tiny,
            UNIT[x.dtype], self.bar, INPUTS, decided=ago < NEVER if n_later else None,
            upper_tail=self.upper_tail_number,
        )  # fmt: skip
        new = torch.from_numpy(ids)
        mark = marks[new].to(torch.int32)
        ago[new] = n_later + torch.where(mark == 1, 0, ((mark - 2) * native.MAX_TOKENS).clamp_min(1))

    def _bias_like(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias rounded to x's dtype, in float32; made anew when it changed."""
        if bias is None:
            return None
        key = (bias.data_ptr(), bias._version, x.dtype)
        if self._bias[0] != key:
            self._bias = key, bias.detach().to(x.dtype).float().contiguous()
        return self._bias[1]


def _tail(delta: float) -> float:
    """t_P^2 over sum_g s_g^2 |x_g|^2."""
    normal = statistics.NormalDist()
    c = 1 / (4 * normal.cdf(-math.sqrt(2)))
    z = -normal.inv_cdf(min(0.5, delta / c))
    return z * z / 12


def scratch_bytes(n_neurons: int, d_model: int) -> int:
    """The most that a decision takes while it is made."""
    if native.available():
        return NATIVE_TOKENS * d_model * 12
    return GATE_TOKENS * n_neurons * 4 * 6 + BLOCK_NEURONS * d_model * 8


def _operand_unit() -> float:
    """What torch may round off the operands of a float32 product, relative to it: nothing unless the user said so."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    name = torch.get_float32_matmul_precision() if matmul is None else matmul.fp32_precision
    return 0.0 if name in ("none", "ieee", "highest") else 2.0**-6
