"""Each native op against its torch reference. Skipped, visibly, where the extension was not built."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import BuiltinFunctionType

import pytest
import torch
from transformers.activations import ReLUSquaredActivation

from hf_flash import FATReLU, native, ops, packing
from hf_flash.gates import CertifiedGate, Sketch
from hf_flash.gates.known import directions_of
from hf_flash.layout import BundleLayout

pytestmark = pytest.mark.skipif(
    not native.available(), reason="the native extension is not built, or HF_FLASH_NATIVE=0"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "act", [torch.nn.ReLU(), ReLUSquaredActivation(), FATReLU(0.3), torch.nn.ReLU6()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("n_tokens", [1, 3, 8])
def test_sparse_ffn_is_the_reference_on_the_gathered_rows(dtype, gated, act, n_tokens) -> None:
    torch.manual_seed(n_tokens)
    n_slots, d_model, d_out = 300, 72, 40
    layout = BundleLayout(d_model, d_out, gated, dtype)
    up, down, gate = torch.randn(n_slots, d_model), torch.randn(n_slots, d_out), torch.randn(n_slots, d_model)
    rows = layout.pack(up.to(dtype), down.to(dtype), gate.to(dtype) if gated else None)
    slots = torch.randperm(n_slots)[:137]
    x = torch.randn(n_tokens, d_model).to(dtype)
    up_bias = torch.randn(len(slots)).to(dtype)
    gate_bias = torch.randn(len(slots)).to(dtype) if gated else None
    code = native.activation_code(act)
    assert code is not None

    y, n_fired = native.sparse_ffn(x, rows, slots, d_model, d_out, gated, dtype, code, gate_bias, up_bias)

    g, u, d = layout.split(rows[slots])
    h = ops.hidden(x, u, act, g, up_bias, gate_bias)
    want = h.double() @ d.double()
    assert (y.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
    assert n_fired == int((h != 0).any(0).sum())


@pytest.mark.parametrize("n", [1, 3, 4, 5, 15, 16, 17, 33])
@pytest.mark.parametrize("gated", [False, True])
def test_sparse_ffn_of_any_number_of_rows(n, gated) -> None:
    """Four rows make a step and sixteen a block: what is left over counts once, and silent rows do not count."""
    torch.manual_seed(n)
    layout = BundleLayout(40, 24, gated, torch.float32)
    up, down, gate = torch.randn(50, 40), torch.randn(50, 24), torch.randn(50, 40)
    rows, slots = layout.pack(up, down, gate if gated else None), torch.randperm(50)[:n]
    x = torch.randn(2, 40)
    y, n_fired = native.sparse_ffn(x, rows, slots, 40, 24, gated, torch.float32, (0, 0.0))
    h = torch.relu(x @ (gate if gated else up)[slots].t()) * (x @ up[slots].t() if gated else 1)
    torch.testing.assert_close(y, h @ down[slots], rtol=1e-4, atol=1e-4)
    assert n_fired == int((h != 0).any(0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [64, 131, 400])
def test_sums_do_not_depend_on_who_takes_which_rows(n, dtype) -> None:
    """Threads take parts as they come free, and other work delays one of them; yet a token is the same each time."""
    torch.manual_seed(n)
    layout = BundleLayout(64, 96, False, dtype)
    up, down = torch.randn(n, 64).to(dtype), torch.randn(n, 96).to(dtype)
    rows, slots, x = layout.pack(up, down, None), torch.randperm(n), torch.randn(1, 64).to(dtype)
    ys = [native.sparse_ffn(x, rows, slots, 64, 96, False, dtype, (0, 0.0)) for _ in range(200)]
    want = torch.relu(x.double() @ up.double().t()).to(dtype).double() @ down.double()
    torch.testing.assert_close(ys[0][0].double(), want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    assert all(torch.equal(y, ys[0][0]) and n_fired == ys[0][1] for y, n_fired in ys)


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_rows_with_float32_inputs(gated) -> None:
    """Inputs that are no bfloat16 go another way than those that are, where the CPU multiplies pairs of bfloat16."""
    torch.manual_seed(0)
    n, d_model, d_out = 50, 136, 72
    layout = BundleLayout(d_model, d_out, gated, torch.bfloat16)
    up, down, gate = (torch.randn(n, size).bfloat16() for size in (d_model, d_out, d_model))
    rows, slots = layout.pack(up, down, gate if gated else None), torch.arange(n)
    x = torch.randn(2, d_model)
    y, n_fired = native.sparse_ffn(x, rows, slots, d_model, d_out, gated, torch.bfloat16, (0, 0.0))
    h = torch.relu(x @ (gate if gated else up).float().t()) * (x @ up.float().t() if gated else 1)
    torch.testing.assert_close(y, h @ down.float(), rtol=1e-4, atol=1e-3)
    assert n_fired == int((h != 0).any(0).sum())


def test_every_finite_half_is_widened_to_itself() -> None:
    """All 65536 halves but infinities and NaN: a weight alone in its row comes out as it is, subnormals too."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    down = halves[halves.isfinite()]
    rows = BundleLayout(1, len(down), False, torch.float16).pack(torch.ones(1, 1).half(), down.view(1, -1), None)
    y, _ = native.sparse_ffn(
        torch.ones(1, 1), rows, torch.zeros(1, dtype=torch.int64), 1, len(down), False, torch.float16, (0, 0.0)
    )
    assert torch.equal(y[0], down.float())


def test_sparse_ffn_of_no_slots_is_zero() -> None:
    rows = torch.zeros(4, 512, dtype=torch.uint8)
    y, n_fired = native.sparse_ffn(
        torch.randn(2, 16), rows, torch.empty(0, dtype=torch.int64), 16, 16, False, torch.float32, (0, 0.0)
    )
    assert n_fired == 0 and torch.equal(y, torch.zeros(2, 16))


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta", [0.0, 1e-9])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_gate_scan_decides_as_the_reference(bits, dtype, delta, biased, known) -> None:
    torch.manual_seed(bits)
    n, d_model = 700, 100  # d_model is no multiple of the group: the last one is padded
    weight = (torch.randn(n, d_model) * torch.rand(n, 1)).to(dtype)
    bias = (torch.randn(n) - 0.5).to(dtype) if biased else None
    sketch, usual = Sketch.of(weight, bits), torch.randn(3, d_model)
    inputs = lambda n: (torch.randn(n, 3) @ usual + torch.randn(n, d_model)) / 2  # noqa: E731
    if known:
        sketch = sketch.knowing(weight, directions_of(inputs(50), sketch.step.shape[1]))
    gate = CertifiedGate(sketch, delta, 0.0, dtype)
    for n_tokens in (1, 2, 8):
        x = inputs(n_tokens).to(dtype)
        ids, ago = gate.decide(x, bias)
        any_token = torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.from_numpy(ids), True)
        upper = gate.upper(x, bias)
        off = 1e-4 * upper.abs().max()  # here the order of a float sum decides
        if n_tokens == 1:  # scanned in whole numbers: inputs are rounded to 16 bits, which the bound makes up for
            off = off + gate.sketch.norm * x.float().abs().max() * d_model**0.5 / 32512
        sure = (upper.abs() > off).all(0)
        assert sure.float().mean() > 0.97
        wanted = gate.wanted(x, bias)
        assert torch.equal(any_token[sure], wanted.any(0)[sure])
        assert torch.equal((ago == 0)[sure], wanted[-1][sure])
        fires = torch.nn.functional.linear(x, weight, bias) > 0
        assert not (fires.any(0) & ~any_token).any()


def test_calls_past_ctypes_are_those_that_ctypes_makes() -> None:
    """Each function of the module takes as many arguments, and gives the same; what is no number is refused."""
    lib = native.library()
    assert lib is not None
    fast = {name: f for name, f in vars(lib).items() if isinstance(f, BuiltinFunctionType)}
    if not fast:
        pytest.skip("built without Python's headers")
    plain = native._bind(ctypes.CDLL(lib._name))
    torch.manual_seed(0)
    for name, function in fast.items():
        n = len(getattr(plain, name).argtypes)
        with pytest.raises(TypeError, match=f"0 arguments instead of {n}"):
            function()
        with pytest.raises(TypeError):
            function(*["no number"] * n)
    rows, how = packing.pack(torch.randn(24, 128).bfloat16(), 120)
    x, bias = torch.randn(2, 128), torch.randn(24)
    found = []
    for made_by in (fast["hf_flash_packed_linear"], plain.hf_flash_packed_linear):
        for added in (None, bias.data_ptr()):
            y = torch.zeros(2, 24)
            result = made_by(
                rows.data_ptr(), rows.stride(0), 24, 128, how.base, how.start.data_ptr(), how.escapes.data_ptr(),
                x.data_ptr(), added, 2, 0, y.data_ptr(),
            )  # fmt: skip
            assert result is None
            found.append(y)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]) and not torch.equal(found[0], found[1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_without_pythons_headers_ctypes_makes_all_calls(tmp_path) -> None:
    path = tmp_path / f"kernels{native._SUFFIX}"
    source = Path(native.__file__).parent / "_native" / "python.cpp"
    plain = {name: value for name, value in os.environ.items() if "INCLUDE" not in name and name != "CPATH"}
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", source, "-o", path], check=True, env=plain)
    lib = ctypes.CDLL(str(path))
    if hasattr(lib, "PyInit_kernels"):
        pytest.skip("this compiler finds Python's headers by itself")
    before = set(vars(lib))
    assert native._hasten(lib, path) is lib and set(vars(lib)) <= before | {"PyInit_kernels"}


def test_what_was_built_for_another_python_is_called_through_ctypes_alone(tmp_path) -> None:
    """Its functions would count references to None as that one does."""
    lib = native.library()
    assert lib is not None
    other = shutil.copy(lib._name, tmp_path / "kernels.cpython-38-another.so")
    assert native._hasten(ctypes.CDLL(other), Path(other)).__dict__.keys().isdisjoint({"hf_flash_step"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1e-30])
def test_gate_scan_wants_everything_where_nothing_is_promised(bad) -> None:
    gate = CertifiedGate(Sketch.of(torch.randn(64, 128)), weight_dtype=torch.float32)
    x = torch.zeros(1, 128)
    x[0, 3] = bad
    assert len(gate.decide(x)[0]) == 64 and gate.wanted(x).all()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx2", "plain"])
def test_loops_for_other_processors_agree_too(level: str) -> None:
    """The same tests with the loops that an older processor would take."""
    if os.environ.get("HF_FLASH_SIMD"):
        pytest.skip("this is such a run")
    files = [__file__, str(Path(__file__).with_name("test_packing.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        check=False, capture_output=True, text=True, env={**os.environ, "HF_FLASH_SIMD": level},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
