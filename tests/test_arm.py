"""The kernels on Arm, which another processor can imitate: compiled for it, run by QEMU, compared with torch's results.

Skipped, visibly, where the compiler or QEMU is missing: apt install g++-aarch64-linux-gnu qemu-user-static
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_flash import native, ops, packing
from hf_flash.gates import CertifiedGate, Sketch
from hf_flash.layout import BundleLayout

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
NATIVE = Path(native.__file__).parent / "_native"
FLAGS = ["-O3", "-std=c++17", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-static"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++ (apt install g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 (apt install qemu-user-static)"),
]
Call = Callable[..., int]


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that runs one of the library's on the other processor; arrays are tensors, which it may change."""
    folder = tmp_path_factory.mktemp("arm")
    driver = folder / "driver"
    sources = [Path(__file__).parent / "arm" / "driver.cpp", *(NATIVE / f"{n}.cpp" for n in ("ffn", "gate", "packed"))]
    done = subprocess.run([COMPILER, *FLAGS, *sources, "-o", driver], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def call(name: str, *args: Any) -> int:
        into, back = folder / "in", folder / "out"
        into.write_bytes(b"".join(map(_packed, args)))
        subprocess.run([str(QEMU), driver, name, into, back], check=True)
        left = memoryview(back.read_bytes())
        (result,), left = struct.unpack("<q", left[:8]), left[8:]
        for arg in args:
            if isinstance(arg, torch.Tensor):
                n = arg.nbytes
                arg.view(-1).view(torch.uint8).copy_(torch.from_numpy(np.frombuffer(left[:n], np.uint8).copy()))
                left = left[n:]
        return int(result)

    return call


def _packed(arg: Any) -> bytes:
    """An argument as the driver reads it."""
    if arg is None:
        return struct.pack("<q", 0)
    if isinstance(arg, torch.Tensor):
        return struct.pack("<q", arg.nbytes) + arg.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("<qd", -2, arg) if isinstance(arg, float) else struct.pack("<qq", -1, arg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_sparse_ffn(arm: Call, dtype: torch.dtype, gated: bool, n_tokens: int) -> None:
    torch.manual_seed(n_tokens)
    n_slots, d_model, d_out = 90, 72, 40
    layout = BundleLayout(d_model, d_out, gated, dtype)
    gate, up = torch.randn(2, n_slots, d_model).to(dtype)
    rows = layout.pack(up, torch.randn(n_slots, d_out).to(dtype), gate if gated else None)
    slots, x = torch.randperm(n_slots)[:37], torch.randn(n_tokens, d_model).to(dtype)
    up_bias = torch.randn(37).to(dtype)
    y = torch.zeros(n_tokens, d_out)
    fired = arm(
        "sparse_ffn", x.float(), n_tokens, d_model, d_out, rows, rows.stride(0), slots, len(slots), None,
        up_bias.float(), int(gated), native.CODES[dtype], native.CODES[dtype], 0, 0.0, y,
    )  # fmt: skip
    g, u, d = layout.split(rows[slots])
    h = ops.hidden(x, u, torch.relu, g, up_bias, None)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    want = h.double() @ d.double()
    assert (y.double() - want).norm() <= tolerance * want.norm()
    assert fired == int((h != 0).any(0).sum())


def test_packed_rows(arm: Call) -> None:
    """Packed, unpacked and multiplied, escapes included."""
    torch.manual_seed(0)
    n, size = 50, 192
    w = torch.randn(n, size).bfloat16()
    w[3, 7], w[4, 100], w[5] = 2.0**40, float("inf"), 0
    base, n_escapes = packing.choose_base(packing.count_exponents(w))
    assert n_escapes >= 2
    rows, start = torch.zeros(n, packing.packed_bytes(size), dtype=torch.uint8), torch.zeros(n + 1, dtype=torch.int32)
    escapes = torch.zeros(n_escapes, dtype=torch.int32)
    assert arm("pack", w, size, n, size, base, rows, rows.stride(0), start, escapes) == n_escapes
    ours, how = packing.pack(w, base)
    assert torch.equal(rows, ours) and torch.equal(start, how.start) and torch.equal(escapes, how.escapes)
    back, ids = torch.zeros(20, 128, dtype=torch.bfloat16), torch.arange(0, 40, 2)
    arm("unpack", rows, rows.stride(0), ids, ids, 20, size, base, start, escapes, 64, 192, back, 128)
    assert torch.equal(back.view(torch.int16), w[ids, 64:].contiguous().view(torch.int16))
    w[4, 100] = 1
    rows, how = packing.pack(w, base)
    x, bias = torch.randn(2, size).bfloat16(), torch.randn(n).bfloat16()
    out = torch.zeros(2, n, dtype=torch.bfloat16)
    arm("packed_linear", rows, rows.stride(0), n, size, how.base, how.start, how.escapes, x, bias, 2, 2, out)
    want = x.float() @ w.float().t() + bias.float()
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=1e-2 * float(want.abs().median()))


@pytest.mark.parametrize("gated", [False, True])
def test_packed_ffn(arm: Call, gated: bool) -> None:
    torch.manual_seed(1)
    n, d = 60, 128
    w = torch.randn(n, (3 if gated else 2) * d).bfloat16()
    base, _ = packing.choose_base(packing.count_exponents(w))
    rows, how = packing.pack(w, base)
    ids, x = torch.randperm(n)[:33].sort().values, torch.randn(2, d).bfloat16()
    y = torch.zeros(2, d)
    fired = arm(
        "packed_ffn", x.float(), 2, d, d, rows, rows.stride(0), ids, ids, len(ids), None, None, int(gated), base,
        how.start, how.escapes, 2, 0, 0.0, y,
    )  # fmt: skip
    *gate, up, down = w[ids].split(d, dim=1)
    h = ops.hidden(x, up, torch.relu, gate[0] if gated else None, None, None)
    want = h.double() @ down.double()
    assert (y.double() - want).norm() <= 3e-2 * want.norm()
    assert fired == int((h != 0).any(0).sum())


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("n_tokens", [1, 3, 8])
def test_gate(arm: Call, bits: int, n_tokens: int) -> None:
    torch.manual_seed(bits)
    n, d = 200, 100
    weight = (torch.randn(n, d) * torch.rand(n, 1)).bfloat16()
    gate, x = CertifiedGate(Sketch.of(weight, bits), weight_dtype=torch.bfloat16), torch.randn(n_tokens, d).bfloat16()
    sketch, bias = gate.sketch, (torch.randn(n) - 0.5).bfloat16()
    ids, marks = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.uint8)
    planes = [*sketch.planes, *[None] * (4 - len(sketch.planes))]
    per_norm, tiny = gate.per_norm(x.dtype)
    n_ids = arm(
        "gate", x.float(), n_tokens, d, n, sketch.nibbles, *planes, sketch.step, sketch.norm, sketch.offset(), None,
        bias.float(), bits, float(gate.tail or 0), gate.gamma(), per_norm, tiny, 2.0**-8, gate.bar, 2.0**-24, 2.0**60,
        ids, marks, float("nan"), None, None, None, None,
    )  # fmt: skip
    upper = gate.upper(x, bias)
    sure = (upper.abs() > 1e-4 * upper.abs().max()).all(0)  # elsewhere the order of a float sum decides
    found = torch.zeros(n, dtype=torch.bool).index_fill_(0, ids[:n_ids], True)
    assert sure.float().mean() > 0.97
    assert torch.equal(found[sure], (upper > gate.bar).any(0)[sure])
    assert torch.equal((marks == 1)[sure], (upper > gate.bar)[-1][sure])
