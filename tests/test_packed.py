"""Matrices and FFNs in 11 and 12 bits a weight: they compute what the stock ones do, models answer alike."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_e2e import greedy, load, logits_of, packing_plan, plan_of
from helpers_hub import save_stock, tiny_llama, tiny_opt
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_flash
from hf_flash import linear, native, resident, tight
from hf_flash.linear import PackedLinear
from hf_flash.memory import Pool
from hf_flash.readers import open_reader
from hf_flash.resident import PackedMatrix, Resident, TightMatrix, read_matrix
from hf_flash.store import Extent2D

WAYS = [
    "torch",
    pytest.param("12 bits", marks=pytest.mark.skipif(not native.available(), reason="not built")),
    pytest.param("11 bits", marks=pytest.mark.skipif(not tight.available(), reason="not built, or no AVX512-VBMI2")),
]
IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "_lib", None)
    if request.param == "12 bits":
        monkeypatch.setattr(tight, "available", lambda: False)
    return request.param


# Matrices ----------------------------------------------------------------------------------------------------------


def stock_linear(n_in: int, n_out: int, bias: bool = False, seed: int = 0) -> nn.Linear:
    """bfloat16, with some weights of rare exponents."""
    torch.manual_seed(seed)
    module = nn.Linear(n_in, n_out, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.normal_(0, n_in**-0.5)
        for i, value in enumerate((0.0, 7.5, -(2.0**-20), 3e-30)):
            module.weight[i * 7 % n_out, i * 11] = value
        module.weight[n_out - 1, n_in - 1] = -5.0
    return module


@contextlib.contextmanager
def extent_of(weight: torch.Tensor, folder: Path) -> Iterator[tuple]:
    """A reader and where a matrix lies: not at a page's beginning, and with something after it."""
    path = folder / "matrix.bin"
    path.write_bytes(bytes(1000) + weight.detach().view(torch.uint8).numpy().tobytes() + bytes(5000))
    reader = open_reader()
    try:
        yield reader, Extent2D("w", reader.open(path), 1000, weight.shape[0], 2 * weight.shape[1])
    finally:
        reader.close()


def packed_linear(stock: nn.Linear, folder: Path, exact: bool) -> PackedLinear:
    module = PackedLinear(stock)
    with extent_of(stock.weight, folder) as (reader, rows):
        module.connect(reader, rows, exact, Pool(0))
    assert n_escapes(module.matrix) >= 3
    return module


def n_escapes(matrix: Resident) -> int:
    assert isinstance(matrix, PackedMatrix | TightMatrix)
    return len(matrix.packing.escapes if isinstance(matrix, PackedMatrix) else matrix.matrix.escapes)


def all_of(matrix: Resident, shape: torch.Size) -> torch.Tensor:
    return matrix.unpack(0, shape[0], torch.empty(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 3, 8, 50])
def test_exact_is_the_stock_module_to_the_bit(way: str, n_tokens: int, bias: bool, tmp_path: Path) -> None:
    stock = stock_linear(256, 1300, bias)  # several pieces
    module = packed_linear(stock, tmp_path, exact=True)
    assert linear.UNPACKED_BYTES // 512 < 1300
    x = torch.randn(n_tokens, 256).bfloat16()
    with torch.no_grad():
        assert torch.equal(module(x), stock(x))
        assert torch.equal(module(x.view(1, n_tokens, 256)), stock(x)[None])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_tokens", [0, 1, 3, 8, 9, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fast_is_as_good_as_the_stock_module(
    way: str, dtype: torch.dtype, n_tokens: int, bias: bool, tmp_path: Path
) -> None:
    stock = stock_linear(256, 700, bias)
    module = packed_linear(stock, tmp_path, exact=False)
    x = torch.randn(2, n_tokens, 256).to(dtype)
    with torch.no_grad():
        want = stock.double()(x.double())
        got = module(x)
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_is_the_stock_module_s(way: str, exact: bool, tmp_path: Path) -> None:
    stock = stock_linear(128, 2300, bias=True)
    module = packed_linear(stock, tmp_path, exact)
    x = torch.randn(3, 5, 128)
    wide = nn.Linear(128, 2300).requires_grad_(True)
    wide.load_state_dict({name: tensor.float() for name, tensor in stock.state_dict().items()})
    stock.float()
    grads = []
    for f in (module, wide):
        y = x.clone().requires_grad_(True)
        f(y).square().sum().backward()
        grads.append((y.grad, f.bias.grad.float()))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def test_first_rows_unlike_the_others(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 12 bits the base is guessed from the first rows; where that was wrong, all is packed again."""
    monkeypatch.setattr(resident, "READ_BYTES", 64 * 256)
    torch.manual_seed(0)
    weight = torch.randn(305, 128)
    weight[:64] *= 2.0**-40
    weight = weight.bfloat16()
    with extent_of(weight, tmp_path) as (reader, rows):
        packed = read_matrix(reader, rows, Pool(1 << 20))
    assert torch.equal(all_of(packed, weight.shape), weight)
    if isinstance(packed, PackedMatrix):
        assert 64 * 128 <= n_escapes(packed) < 66 * 128, "the first rows are the rare ones"
        assert len(packed.packing.start) == 306 and int(packed.packing.start[-1]) == n_escapes(packed)
    else:
        assert n_escapes(packed) < 305 * 128 / 20, "each row has a base of its own"


def test_no_weight_has_a_common_exponent(way: str, tmp_path: Path) -> None:
    """Every bit pattern: most are escapes, and come back. 11 bits are no gain here, and not taken."""
    weight = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256).t().contiguous()
    with extent_of(weight, tmp_path) as (reader, rows):
        packed = read_matrix(reader, rows, Pool(1 << 20))
    assert isinstance(packed, PackedMatrix)
    assert torch.equal(all_of(packed, weight.shape).view(torch.int16), weight.view(torch.int16))


# Models ------------------------------------------------------------------------------------------------------------


MODELS = {
    "silu": lambda: tiny_llama("silu"),
    "relu": tiny_llama,
    "biases": lambda: tiny_llama("silu", attention_bias=True, mlp_bias=True),
    "opt": tiny_opt,
}


@pytest.fixture(scope="module", params=MODELS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A flash checkpoint with packed bundles, and the dense model."""
    folder = tmp_path_factory.mktemp(request.param)
    save_stock(folder / "stock", MODELS[request.param]().bfloat16())
    dense = AutoModelForCausalLM.from_pretrained(folder / "stock").eval()  # .bfloat16() would round buffers too
    return hf_flash.repack(folder / "stock", folder / "flash", pack=True, progress=False), dense


@pytest.mark.parametrize("gate", ["all", "auto"])
def test_under_a_cap_that_packs_the_tokens_are_the_dense_model_s(
    way: str, packed: tuple[Path, PreTrainedModel], gate: str
) -> None:
    folder, dense = packed
    with packing_plan():
        flash = load(folder, gate=gate)
    plan = plan_of(flash)
    found = {path: m for path, m in flash.named_modules() if isinstance(m, PackedLinear)}
    assert sorted(found) == sorted(plan.packed) and len(found) >= 8 and not plan.unpacked
    assert all(layer.layout.packed for layer in flash._hf_flash.store.layers.values())
    assert not {f"{path}.weight" for path in found} & {name for name, _ in flash.named_parameters()}
    assert "bits a weight" in repr(flash)
    assert {type(m.matrix) for m in found.values()} == {TightMatrix if way == "11 bits" else PackedMatrix}
    size = sum(m.matrix.n_bytes for m in found.values())
    assert plan.parts["resident matrices"] == size and sum(plan.parts.values()) <= plan.memory
    for _ in range(2):  # the second time from DRAM
        assert torch.equal(greedy(flash, IDS, 12), greedy(dense, IDS, 12))
    if "certified" not in plan.gates.values():
        assert torch.equal(logits_of(flash, input_ids=IDS), logits_of(dense, input_ids=IDS))


def test_saved_again_it_has_the_stock_weights(packed: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, dense = packed
    with packing_plan():
        flash = load(folder)
    assert plan_of(flash).packed
    flash.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    weights = dict(dense.named_parameters())
    for path in plan_of(flash).packed:
        stored = flash._hf_flash.tied.get(path, path)  # a head that is the embedding is saved once, as that
        (key,) = (name for name in saved if f"{stored}.weight".endswith(name))
        assert torch.equal(saved[key], weights[f"{stored}.weight"])
    for name in ("flash-00001-of-00001.safetensors",):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert hf_flash.verify(tmp_path / "saved", progress=False).ok
    want = greedy(dense, IDS, 12)
    assert torch.equal(greedy(load(tmp_path / "saved"), IDS, 12), want)
    with packing_plan():
        again = load(tmp_path / "saved")
    assert plan_of(again).packed and torch.equal(greedy(again, IDS, 12), want)


def test_gradients_pass_through(packed: tuple[Path, PreTrainedModel]) -> None:
    folder, dense = packed
    with packing_plan():
        flash = load(folder, gate="all")
    grads = []
    for model in (flash, dense):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if "norm" in n and p.grad is not None})
    dense.zero_grad()
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, want in grads[1].items():
        error = (grads[0][name].float() - want.float()).norm() / want.float().norm()
        assert error < 0.05, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_computed_in_another_dtype(packed: tuple[Path, PreTrainedModel], dtype: torch.dtype) -> None:
    folder, _ = packed
    with packing_plan():
        flash = load(folder, dtype=dtype)
    assert plan_of(flash).packed
    got = logits_of(flash, input_ids=IDS)
    assert got.dtype == dtype
    stock = AutoModelForCausalLM.from_pretrained(folder.parent / "stock", dtype=torch.float32)
    want = logits_of(stock, input_ids=IDS)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_sums_in_another_order_are_close(packed: tuple[Path, PreTrainedModel]) -> None:
    """exact=False: one token at a time over packed rows, with the activations that the kernels know."""
    folder, dense = packed
    with packing_plan():
        flash = load(folder, exact=False)
    for i in range(4):
        one = IDS[:, i : i + 1]
        for _ in range(2):  # the second time from DRAM
            got, want = logits_of(flash, input_ids=one), logits_of(dense, input_ids=one)
            torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)


def test_tie_weights_may_be_called_on_a_packed_head(packed: tuple[Path, PreTrainedModel]) -> None:
    """lm-evaluation-harness does, right after loading: it raised, since the embedding is no parameter any more."""
    folder, dense = packed
    with packing_plan():
        flash = load(folder)
    flash.tie_weights()
    assert torch.equal(greedy(flash, IDS, 4), greedy(dense, IDS, 4))
