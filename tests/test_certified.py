"""The certified gate misses no neuron that fires: not on drawn, on hostile or on real inputs, in any dtype.

The truth is what the dense model's own arithmetic gives: `F.linear` in the dtype of the computation, then the
activation; a neuron fires where that is not zero.
"""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ReLUSquaredActivation

from hf_flash.families import FATReLU, zero_below
from hf_flash.gates import certified
from hf_flash.gates.ago import NEVER
from hf_flash.gates.certified import GROUP, CertifiedGate, Sketch, join_codes, sketch_bytes, split_codes
from hf_flash.gates.known import MOST_NORM, N_DIRECTIONS, directions_of, known_tensors, levels, rest_of
from hf_flash.plan import IntArray

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BITS = range(4, 9)
PARAGRAPH = (
    "The old house stood at the end of the lane, and nobody had lived in it for twenty years. On the first of May a "
    "carriage came up the hill with two trunks and a lady in grey, who paid the driver, looked once at the broken "
    "windows, and went in without knocking. By evening there was a light in the kitchen, and the whole village knew it."
)


def draw(shape: tuple[int, ...], tail: str, seed: int) -> torch.Tensor:
    """Numbers that are normal, of a heavy tail, mostly zero, or all alike, in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, dtype=F64, generator=generator)
    if tail == "heavy":
        return normal / torch.rand(shape, dtype=F64, generator=generator).clamp_min(1e-4)
    if tail == "sparse":
        return normal * (torch.rand(shape, dtype=F64, generator=generator) < 0.1)
    return torch.ones(shape, dtype=F64) if tail == "equal" else normal


def fires(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: nn.Module) -> torch.Tensor:
    """[n_tokens, n_neurons] bool: what the dense model computes is not zero."""
    return act(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))) != 0


def decisions(gate: CertifiedGate, x: torch.Tensor, bias: torch.Tensor | None) -> list[torch.Tensor]:
    """[n_tokens, n_neurons] bool by torch operations, and token by token as `decide` has it (natively where built)."""
    last = [gate.decide(token[None], bias)[1] == 0 for token in x]
    return [gate.wanted(x, bias), torch.stack(last)]


def mask(ids: IntArray, n: int) -> torch.Tensor:
    """[n] bool, True at the ids, which are sorted."""
    assert (ids[1:] > ids[:-1]).all()
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.from_numpy(ids), True)


def count_missed(
    gate: CertifiedGate, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, act=None
) -> int:
    """How many neurons fire that a way of deciding leaves out."""
    fired = fires(x, weight, bias, act or nn.ReLU())
    return sum(int((fired & ~wanted).sum()) for wanted in decisions(gate, x, bias))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.sampled_from(BITS),
    st.sampled_from([F32, BF16, F16]), st.sampled_from([F32, BF16, F16, F64]),
    st.sampled_from(["normal", "heavy", "sparse", "equal"]), st.sampled_from(["normal", "heavy", "sparse", "equal"]),
    st.integers(-40, 10), st.integers(-40, 10), st.sampled_from(["none", "low", "high", "edge"]),
    st.sampled_from([0.0, 0.0, 1e-6, 0.01, 0.5028]), st.sampled_from([0.0, 1e-9]), st.integers(0, 1 << 30),
    st.sampled_from(["", "its own", "others"]),
)  # fmt: skip
def test_no_drawn_neuron_is_missed(
    d_model: int, n: int, n_tokens: int, bits: int, stored: torch.dtype, dtype: torch.dtype, weight_tail: str,
    input_tail: str, weight_scale: int, input_scale: int, kind: str, threshold: float, delta: float, seed: int,
    known: str,
) -> None:  # fmt: skip
    """`edge` biases put every decision of the first token where rounding decides it.

    In directions of the inputs themselves nothing is left to bound: then all rests on what arithmetic is given.
    """
    weight = (draw((n, d_model), weight_tail, seed) * 2.0**weight_scale).to(stored)
    x = (draw((n_tokens, d_model), input_tail, seed + 1) * 2.0**input_scale).to(dtype)
    edge = threshold - x[0].double() @ weight.double().t()
    bias = {"none": None, "low": -edge.abs(), "high": edge.abs(), "edge": edge}[kind]
    bias = None if bias is None else bias.to(dtype)
    act = FATReLU(threshold) if threshold else nn.ReLU()
    sketch = Sketch.of(weight, bits, seed + 2)
    if known:
        seen = x if known == "its own" else draw((20, d_model), input_tail, seed + 3)
        sketch = sketch.knowing(weight, directions_of(seen.float(), sketch.step.shape[1]))
    gate = CertifiedGate(sketch, delta, threshold, stored)
    assert count_missed(gate, x, weight, bias, act) == 0


def half_steps(n: int, d_model: int, bits: int = 8) -> torch.Tensor:
    """Weights that fill their range, the step of `bits` bits being 1."""
    top = 7 * 2 ** (bits - 4)
    weight = (
        torch.randint(-(top // 2), top // 2, (n, d_model), generator=torch.Generator().manual_seed(3)).float() + 0.5
    )
    weight[:, ::GROUP] = 7.5 * 2 ** (bits - 4) / (1 + 2.0**-7)  # the largest sets the step
    assert (Sketch.of(weight, bits).step == 2 ** (bits - 4)).all()
    return weight


def just_firing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Biases with which each neuron fires, by next to nothing. x: [1, d_model]"""
    size = x.double().norm() * weight.double().norm(dim=-1)
    return (1e-5 * size - (x.double() @ weight.double().t())[0]).float()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("direction", ["ones", "signs", "weights", "one entry", "one group"])
def test_inputs_made_before_the_rounding_miss_nothing(direction: str, bits: int) -> None:
    """Chernoff's case: the adversary knows weights and method, and picks x and biases before the dice are thrown."""
    weight = half_steps(256, 1024, bits)
    x = {
        "ones": torch.ones(1, 1024),
        "signs": weight[:1].sign(),
        "weights": weight[:1].clone(),
        "one entry": F.one_hot(torch.tensor([7]), 1024).float(),
        "one group": (torch.arange(1024) // GROUP == 3).float()[None],
    }[direction] * 10
    bias = just_firing(x, weight)
    assert fires(x, weight, bias, nn.ReLU()).all()
    for seed in range(4):
        assert count_missed(CertifiedGate(Sketch.of(weight, bits, seed)), x, weight, bias) == 0


@pytest.mark.parametrize("bits", BITS)
def test_inputs_made_after_the_rounding_cannot_defeat_delta_0(bits: int) -> None:
    """Who has seen the sketch can align x with a neuron's rounding errors; only delta = 0 holds against that.

    delta > 0 is claimed for inputs that never saw the rounding: the bound is about the dice, and here x
    is made from how they fell. An FFN's own inputs do not depend on them, so the default is honest for a model's own
    text; this test shows both sides.
    """
    weight = half_steps(64, 4096, bits)
    sketch = Sketch.of(weight, bits, seed=1)
    error = weight.double() - sketch.dequantize().double()
    certain, likely = CertifiedGate(sketch, delta=0), CertifiedGate(sketch, delta=1e-9)
    n_defeated = 0
    for i in range(16):
        for x in (error[i].sign()[None].float() * 100, error[i][None].float() * 100):
            bias = just_firing(x, weight)
            assert count_missed(certain, x, weight, bias) == 0
            n_defeated += bool(count_missed(likely, x, weight, bias))
    assert n_defeated == 32


def test_the_probabilistic_bound_fails_no_more_often_than_delta() -> None:
    """3,000 dithers of the same neuron at deltas so large that failures can be counted.

    Of the bound, and of both decisions: the upper bits decide with a part of delta and all bits with the rest, so a
    neuron that fires is missed by either.
    """
    d_model, n_draws = 256, 3000
    weight = half_steps(1, d_model)
    rates = dict.fromkeys([(name, delta) for name in ("ones", "normal") for delta in (0.5, 0.05)], 0.0)
    missed = dict(rates)
    inputs = {"ones": torch.ones(1, d_model), "normal": draw((1, d_model), "normal", 6).float()}
    for seed in range(n_draws):
        sketch = Sketch.of(weight, 8, seed)
        for name, delta in rates:
            z, gate = (inputs[name].double() @ weight.double().t()).item(), CertifiedGate(sketch, delta)
            rates[name, delta] += (gate.upper(inputs[name]) < z).item() / n_draws
            barely = torch.tensor([-z + 2.0**-10])  # the bias with which it fires
            missed[name, delta] += (~gate.wanted(inputs[name], barely)).item() / n_draws
    assert all(rate <= delta for (_, delta), rate in rates.items())
    assert all(rate <= delta for (_, delta), rate in missed.items())
    assert missed["ones", 0.5] > rates["ones", 0.5], f"the upper bits miss nothing, so nothing was tested: {missed}"
    assert rates["ones", 0.5] > 0.05, f"the bound is far from tight here, so nothing was tested: {rates}"


def exact_in_sketch(n: int, d_model: int, seed: int) -> tuple[torch.Tensor, Sketch]:
    """Weights in the middle of the cells of an 8-bit sketch of step 1: what is left is the rounding of arithmetic."""
    codes = torch.randint(0, 256, (n, -(-d_model // GROUP) * GROUP), generator=torch.Generator().manual_seed(seed))
    codes[:, d_model:] = 128
    nibbles, *planes = split_codes(codes.to(torch.uint8), 8)
    groups = codes.shape[1] // GROUP
    weight = codes[:, :d_model].float() - 127.5
    step = torch.full((n, groups), 16.0, dtype=BF16)
    norm = (weight.norm(dim=-1) + 24 * step.float().norm(dim=-1)) * (1 + 1e-6)
    return weight, Sketch(nibbles, planes, step, norm, torch.full((groups * GROUP,), 0.5), d_model)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("d_model", [64, 1000, 4096])
def test_rounding_of_the_arithmetic_is_covered(d_model: int, dtype: torch.dtype) -> None:
    """No quantization error, decisions on the edge: what remains is the rounding of the dense model and of ours.

    Exact arithmetic would not do as a gate: in float32 some neurons fire that are silent in truth.
    """
    weight, sketch = exact_in_sketch(128, d_model, seed=d_model)
    assert torch.equal(sketch.dequantize(), weight)
    gate = CertifiedGate(sketch, delta=1 - 2.0**-53)  # no margin for the sketch,
    gate.upper_tail = CertifiedGate(sketch, delta=1e-9).upper_tail  # of which the upper bits alone are not exact
    n_missed_by_exact = 0
    for seed in range(8):
        x = draw((1 + seed % 3, d_model), "normal", seed).to(dtype)
        z = x.double() @ weight.double().t()
        bias = (-z[0]).to(dtype)
        for b in (bias, torch.nextafter(bias, torch.full_like(bias, math.inf))):
            assert count_missed(gate, x, weight, b) == 0
            n_missed_by_exact += int((fires(x, weight, b, nn.ReLU()) & (z + b.double() <= 0)).sum())
    if dtype == F32:
        assert n_missed_by_exact > 0, "rounding makes no difference here, so nothing was tested"


def test_weights_that_the_model_rounds_to_bfloat16() -> None:
    """Silent as stored, firing as computed: the first half of the weights is rounded up, the second down."""
    up, down = 1 + 0.501 * 2.0**-7, 1 + 1.499 * 2.0**-7
    weight = torch.tensor([up, -down]).repeat_interleave(2048)[None]
    x = torch.tensor([2.0, 2 - 2.0**-7]).repeat_interleave(2048)[None].to(BF16)
    assert (x.double() @ weight.double().t()).item() < 0
    assert fires(x, weight, None, nn.ReLU()).all()
    assert count_missed(CertifiedGate(Sketch.of(weight), weight_dtype=F32), x, weight) == 0


@pytest.mark.parametrize("stored", [F32, BF16])
def test_weights_that_the_model_rounds_near_zero_in_float16(stored: torch.dtype) -> None:
    """0.6 and 1.4 of the smallest float16 both become 1 of it: an error that no relative bound covers."""
    weight = (torch.tensor([0.6, -1.4]) * 2.0**-24).repeat_interleave(256)[None].to(stored)
    x = torch.tensor([1.0, 0.5]).repeat_interleave(256)[None].to(F16)
    assert (x.double() @ weight.double().t()).item() < 0
    assert fires(x, weight, None, nn.ReLU()).all()
    assert count_missed(CertifiedGate(Sketch.of(weight), weight_dtype=stored), x, weight) == 0


def test_a_product_that_is_rounded_before_the_bias_is_added() -> None:
    """4.016 is rounded to 4.031 in bfloat16, and minus 3.203 that is above the threshold which 0.813 was below."""
    weight, x = torch.ones(1, 1024), torch.full((1, 1024), 2.0**-8, dtype=BF16)
    x[:, :2] *= 3.015625
    bias, act = torch.tensor([-3.203125], dtype=BF16), FATReLU(0.82)
    exact = x.double() @ weight.double().t() + bias.double()
    assert not act(exact).any()
    assert act(F.linear(x, weight.to(BF16)) + bias).all()
    gate = CertifiedGate(Sketch.of(weight), threshold=0.82, weight_dtype=BF16)
    assert all(wanted.all() for wanted in decisions(gate, x, bias))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), ReLUSquaredActivation(), FATReLU(0.3), FATReLU(1e-7)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_activation_that_is_zero_below(act: nn.Module, dtype: torch.dtype) -> None:
    threshold = zero_below(act)
    assert threshold is not None
    weight, x = draw((300, 130), "normal", 1).to(dtype), draw((20, 130), "normal", 2).to(dtype)
    bias = (draw((300,), "normal", 3) * 3).to(dtype)
    gate = CertifiedGate(Sketch.of(weight, 6), threshold=threshold, weight_dtype=dtype)
    assert count_missed(gate, x, weight, bias, act) == 0
    silent = ~fires(x, weight, bias, act)
    assert gate.wanted(x, bias)[silent].float().mean() < 0.3  # and it does leave most of the silent ones out


def test_a_bias_in_another_dtype_is_rounded_as_the_model_does() -> None:
    weight, x = torch.zeros(1, 64), torch.zeros(1, 64, dtype=BF16)
    for b in (-1e-42, 1e-42, 2.0**-140, 1 + 2.0**-9, -1.0):
        assert count_missed(CertifiedGate(Sketch.of(weight)), x, weight, torch.tensor([b])) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_a_token_that_is_not_finite_wants_every_neuron(bad: float, dtype: torch.dtype) -> None:
    weight = draw((70, 100), "normal", 1).to(F32)
    weight[5] = 0
    x = draw((3, 100), "normal", 2).to(dtype)
    gate = CertifiedGate(Sketch.of(weight))
    before = decisions(gate, x, None)
    x[1, 17] = bad
    for wanted, alone in zip(decisions(gate, x, None), before, strict=True):
        assert wanted[1].all()
        assert torch.equal(wanted[[0, 2]], alone[[0, 2]])


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e-8, 1e8, 1e19, 1e30, 1e38])
@pytest.mark.parametrize("delta", [0.0, 1e-9])
def test_inputs_whose_squares_underflow_or_overflow(scale: float, delta: float) -> None:
    """Tokens of 1e-25 had |x|^2 = 0 and so no margin at all: neurons that fired were missed."""
    weight = draw((200, 128), "normal", 1).float()
    x = (draw((4, 128), "normal", 2) * scale).clamp(-3e38, 3e38).float()
    assert count_missed(CertifiedGate(Sketch.of(weight, 4), delta), x, weight) == 0
    x[:, 1:] = 0  # one tiny entry beside zeros
    assert count_missed(CertifiedGate(Sketch.of(weight, 4), delta), x, weight) == 0


def test_weights_of_no_ordinary_size_are_always_wanted() -> None:
    """NaN and infinite weights stopped repacking by an assertion; 3e38 overflowed in the sketch and was missed."""
    odd = [math.nan, math.inf, -math.inf, 3.385e38, -3.385e38, 1e5, 1e-30, 1e-44]
    weight = draw((len(odd) + 2, 100), "normal", 1).float()
    for i, value in enumerate(odd):
        weight[i] = 0 if abs(value) < 1 else weight[i]
        weight[i, 3] = value
    weight[-2] = 0
    x = draw((6, 100), "normal", 2).float()
    gate = CertifiedGate(Sketch.of(weight))
    for wanted in decisions(gate, x, None):
        assert wanted[:, : len(odd)].all()
        assert not wanted[:, -2].any()
        assert not wanted[:, -1].all()
    for wanted in decisions(gate, torch.zeros(1, 100), None):
        assert wanted[0].tolist() == [True] * len(odd) + [False] * 2


def test_a_zero_input_leaves_the_decision_to_the_bias() -> None:
    weight = draw((4, 100), "normal", 1).float()
    bias = torch.tensor([-1.0, 0.0, 1e-40, 1.0])
    gate = CertifiedGate(Sketch.of(weight))
    for wanted in decisions(gate, torch.zeros(1, 100), bias):
        assert wanted[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 8, 9, 40])
def test_decide_is_the_union_and_the_last_token(n_tokens: int) -> None:
    weight, x = draw((300, 100), "normal", 1).float(), draw((100, n_tokens), "normal", 2).float().t()
    bias = draw((300, 2), "normal", 3).float()[:, 0]  # neither x nor the bias is contiguous
    gate = CertifiedGate(Sketch.of(weight, 6))
    ids, ago = gate.decide(x, bias)
    any_token = mask(ids, 300)
    each = decisions(gate, x, bias)[1] if n_tokens else torch.zeros(0, 300, dtype=torch.bool)
    assert (any_token != each.any(0)).sum() <= 1  # sums in another order may differ on the edge
    assert ((ago == 0) != each[-1:].any(0)).sum() <= 1
    latest = (n_tokens - 1 - torch.arange(n_tokens)[:, None]).expand(n_tokens, 300).clone()  # tokens ago
    latest = latest.masked_fill(~each, NEVER).amin(0) if n_tokens else torch.full((300,), NEVER)
    assert ((ago > latest) & (latest < NEVER)).sum() <= 1, "never longer ago than it was"
    assert ((latest - ago > certified.GATE_TOKENS) & (latest < NEVER)).sum() <= 1


def test_float32_products_in_less_than_float32_widen_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw((100, 256), "normal", 1).float(), draw((3, 256), "normal", 2).float()
    gate = CertifiedGate(Sketch.of(weight))
    before = gate.upper(x)
    monkeypatch.setattr(certified, "_operand_unit", lambda: 2.0**-6)
    assert (gate.upper(x) > before).all()


def test_the_precision_of_float32_products_is_asked_for() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("torch < 2.9 has one setting for all backends")
    before = matmul.fp32_precision
    assert certified._operand_unit() == 0
    try:
        matmul.fp32_precision = "bf16"
        assert certified._operand_unit() >= 2.0**-7
    finally:
        matmul.fp32_precision = before


def test_what_is_left_to_bound_fails_no_more_often_than_delta() -> None:
    """As above, of an input of which a known direction holds half: the rest is bounded, and no wider than need be."""
    d_model, n_draws, delta = 256, 3000, 0.5
    weight, x = half_steps(1, d_model), draw((1, d_model), "normal", 6).float()
    aside = draw((1, d_model), "normal", 7).float()
    aside -= (aside @ x.t()) / (x @ x.t()) * x
    u = torch.zeros(N_DIRECTIONS, d_model, dtype=torch.bfloat16)
    u[0] = torch.nn.functional.normalize(x / x.norm() + aside / aside.norm(), dim=-1)  # at 45 degrees
    z, missed, wider = (x.double() @ weight.double().t()).item(), 0.0, []
    for seed in range(n_draws):
        sketch = Sketch.of(weight, 8, seed)
        plain, gate = CertifiedGate(sketch, delta), CertifiedGate(sketch.knowing(weight, u), delta)
        missed += (gate.upper(x) < z).item() / n_draws
        if seed < 20:
            middles = sketch.dequantize() @ x.t(), gate.sketch.known.score(*gate._measure(x)[:1], 8)
            wider.append((plain.upper(x) - middles[0]) / (gate.upper(x) - sum(middles)))
    assert missed <= delta
    assert missed > 0.05, "the bound is far from tight here, so nothing was tested"
    assert 1.25 < torch.cat(wider).mean() < 1.45  # sqrt(2), less what arithmetic adds to both


@pytest.mark.parametrize("bits", BITS)
def test_what_is_known_of_errors_is_what_they_do(bits: int) -> None:
    weight = draw((600, 150), "heavy", bits).bfloat16()
    weight[5] = float("nan")  # a neuron that is always wanted
    u = directions_of(draw((40, 150), "normal", 3).float(), 3)
    sketch = Sketch.of(weight, bits, 9)
    known = sketch.knowing(weight, u).known
    assert known is not None and list(known.codes) == list(range(4, bits + 1))
    assert u.shape == (N_DIRECTIONS, 192) and not u[:, 150:].any()
    assert (u.float().norm(dim=-1) <= MOST_NORM).all()
    for b in range(4, bits + 1):
        error = weight.double() - sketch.with_bits(b).dequantize().double()
        off = error @ u[:, :150].double().t() - known.codes[b].double() * known.steps[b].double().unsqueeze(-1)
        fine = sketch.norm.isfinite()
        assert (off.abs() <= known.steps[b].double().unsqueeze(-1) * (0.5 + 1e-6))[fine].all()
        assert not fine[5] and not known.codes[b][5].any()
    held = known.tensors(bits)
    spec = known_tensors(600, 3, levels(bits))
    assert {n: (tuple(t.shape), t.nbytes) for n, t in held.items()} == {n: s[1:] for n, s in spec.items()}
    whole = dataclasses.replace(sketch, known=known)
    assert whole.n_bytes == sketch_bytes(600, 150, bits, known=True)


def test_directions_hold_what_inputs_share() -> None:
    torch.manual_seed(0)
    shared = torch.randn(5, 200)
    x = torch.randn(500, 5) @ shared + 0.1 * torch.randn(500, 200)
    x[7] = float("inf")  # one that is no number says nothing
    other, before = torch.randn(50, 200), torch.get_rng_state()
    u = directions_of(x, 4)
    assert rest_of(x[100:], u) < 0.1
    assert rest_of(other, u) > 0.9
    assert torch.equal(directions_of(x, 4), u)  # the same from the same
    assert torch.equal(torch.get_rng_state(), before)  # and nobody else's dice are thrown
    assert not directions_of(torch.zeros(3, 200), 4)[3:].any()
    assert rest_of(torch.zeros(3, 200), u) == 0


@pytest.mark.parametrize("bits", BITS)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1 << 30))
@settings(max_examples=20, deadline=None)
def test_codes_are_nibbles_and_planes_of_bits(bits: int, n: int, groups: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (n, GROUP * groups), generator=torch.Generator().manual_seed(seed))
    nibbles, *planes = split_codes(codes.to(torch.uint8), bits)
    assert nibbles.shape == (n, 32 * groups)
    assert [plane.shape for plane in planes] == [(n, 8 * groups)] * (bits - 4)
    assert torch.equal(join_codes(nibbles, planes), codes.to(torch.uint8))
    j = seed % (GROUP * groups)
    block, at = divmod(j, GROUP)
    byte = int(nibbles[0, 32 * block + at % 32])
    assert (byte >> 4 if at >= 32 else byte & 15) == int(codes[0, j]) >> (bits - 4)
    for k, plane in enumerate(planes, start=1):
        number = int.from_bytes(bytes(plane[0].tolist()), "little")
        assert number >> j & 1 == int(codes[0, j]) >> (bits - 4 - k) & 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tail", ["normal", "heavy", "equal"])
def test_a_sketch_is_what_it_says(tail: str, bits: int) -> None:
    weight = draw((600, 150), tail, bits).bfloat16()  # more rows than are quantized at a time
    whole = Sketch.of(weight, 8, seed=9)
    sketch = whole.with_bits(bits)
    alone = Sketch.of(weight, bits, seed=9)
    assert all(torch.equal(tensor, alone.tensors()[name]) for name, tensor in sketch.tensors().items())
    error = weight.double() - sketch.dequantize().double()
    step = sketch.step.double().repeat_interleave(GROUP, 1)[:, :150] / 2 ** (bits - 4)
    assert (error.abs() <= step * (0.5 + 1e-4)).all()  # neither clipped nor further than the cell's border
    assert (sketch.norm.double() >= weight.double().norm(dim=-1)).all()
    assert sketch.n_bytes == sketch_bytes(600, 150, bits)
    assert torch.equal(sketch.dequantize(17, 400), sketch.dequantize()[17:400])


def test_zeros_are_exact() -> None:
    weight = draw((8, 130), "normal", 1).float()
    weight[3] = 0
    weight[:, 64:128] = 0
    back = Sketch.of(weight, 5).dequantize()
    assert not back[3].any()
    assert not back[:, 64:128].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_are_uniform_and_independent(bits: int) -> None:
    n_draws, d_model = 4000, 8
    weight = torch.tensor([[1.0, 0.1, -0.1, 1e-3, -0.77, 0.5, -1e-9, 0.0]])
    sketches = [Sketch.of(weight, bits, seed) for seed in range(n_draws)]
    step = sketches[0].step[0, 0].item() / 2 ** (bits - 4)
    errors = torch.cat([weight.double() - sketch.dequantize().double() for sketch in sketches]) / step
    assert errors.abs().max() <= 0.5 + 1e-4
    assert (errors.mean(0).abs() <= 5 * (1 / 12 / n_draws) ** 0.5).all()
    assert ((errors.square().mean(0) - 1 / 12).abs() <= 0.005).all()
    for share in (0.1, 0.3, 0.7, 0.9):
        assert (((errors < share - 0.5).double().mean(0) - share).abs() <= 5 * (0.25 / n_draws) ** 0.5).all()
    correlation = torch.corrcoef(errors.t()).fill_diagonal_(0)
    assert len(correlation) == d_model
    assert correlation.abs().max() < 5 / math.sqrt(n_draws)


@pytest.fixture(scope="module")
def real_inputs(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[torch.Tensor, nn.Linear]]:
    """What each FFN of the shipped model is given on a paragraph of text: [n_tokens, d_model], and its first matrix."""
    found: list[tuple[torch.Tensor, nn.Linear]] = []
    hooks = [
        layer.fc1.register_forward_pre_hook(lambda module, args: found.append((args[0].flatten(0, -2), module)))
        for layer in dense.model.decoder.layers
    ]
    with torch.no_grad():
        dense(**tokenizer(PARAGRAPH, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@torch.no_grad()
def test_no_neuron_of_a_real_model_is_missed(
    real_inputs: list[tuple[torch.Tensor, nn.Linear]], bits: int, dtype: torch.dtype, record_property
) -> None:
    n_fired = n_wanted = n_all = 0
    for number, (inputs, fc1) in enumerate(real_inputs):
        x, bias = inputs.to(dtype), fc1.bias.to(dtype)
        fired = fires(x, fc1.weight, bias, nn.ReLU())
        sketch = Sketch.of(fc1.weight, bits, seed=number)
        for delta in (0.0, 1e-9):
            gate = CertifiedGate(sketch, delta)
            wanted = gate.wanted(x, bias)
            assert not (fired & ~wanted).any(), f"layer {number}, {bits} bits, delta {delta}"
            some, _ = gate.decide(x[:8], bias)
            assert not (fired[:8].any(0) & ~mask(some, fired.shape[1])).any(), (
                f"layer {number}, {bits} bits, delta {delta}"
            )
        n_fired, n_wanted, n_all = n_fired + int(fired.sum()), n_wanted + int(wanted.sum()), n_all + fired.numel()
    record_property("fired, wanted, all", f"{n_fired}, {n_wanted}, {n_all}")
    assert n_all > 500_000
    assert n_fired <= n_wanted < 0.8 * n_all
    if bits == 8 and dtype == F32:
        assert n_wanted < 1.15 * n_fired
