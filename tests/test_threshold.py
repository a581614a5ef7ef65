"""Gate `threshold`: what it computes, against a stock model whose activation is cut, and how thresholds are set."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_e2e import greedy, load, logits_of, tightest_plan
from helpers_hub import VOCAB, save_stock, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hf_flash
from hf_flash import gate_file, native, thresholds
from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.families import find_blocks, get_activation
from hf_flash.ffn import FlashFFN
from hf_flash.gate_file import GATES_KEY, THRESHOLDS_KEY, GateFile, rewrite
from hf_flash.gates import Sketch, Thresholded, ThresholdGate
from hf_flash.gates.threshold import crossings, threshold_at
from hf_flash.store import GATES_NAME, flash_file_names
from hf_flash.tap import watched_blocks

WAYS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
IDS = torch.arange(3, 43).view(2, 20)
ACTIVATIONS = {
    "silu": nn.SiLU(), "gelu": nn.GELU(), "tanh gelu": nn.GELU(approximate="tanh"),
}  # fmt: skip


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "_lib", None)
    return request.param


# The gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(threshold=st.floats(1e-4, 3.0))
@settings(max_examples=25, deadline=None)
def test_crossings_are_where_the_activation_is_above(name: str, threshold: float) -> None:
    act = ACTIVATIONS[name]
    found = crossings(act, threshold)
    assert found is not None and found[-1][1] == float("inf") and len(found) <= 2
    z = torch.linspace(-20, 20, 4001)
    inside = torch.zeros_like(z, dtype=torch.bool)
    for low, high in found:
        inside |= (z > low) & (z <= high)
    wrong = inside != (act(z).abs() > threshold)
    assert (act(z[wrong]).abs() - threshold).abs().le(1e-5 + 1e-5 * threshold).all()  # on an edge, at most


def test_an_activation_of_another_shape_has_no_such_intervals() -> None:
    assert crossings(torch.abs, 1.0) is None and crossings(torch.tanh, 2.0) is None


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_both_ways_want_the_same(name: str, threshold: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(300, 100) / 10, torch.randn(5, 100)
    bias = torch.randn(300) / 4 if has_bias else None
    weight[7] = float("nan")  # a row that is not judged
    gate = ThresholdGate(Sketch.of(weight), threshold, ACTIVATIONS[name])
    wanted = gate.wanted(x, bias)
    z = x @ weight.t() + (0 if bias is None else bias)
    near = (ACTIVATIONS[name](z).abs() - threshold).abs() < 0.02
    assert wanted[:, 7].all() and ((wanted == (ACTIVATIONS[name](z).abs() > threshold)) | near | z.isnan()).all()
    assert 0.1 < wanted.float().mean() < 0.99
    for few in (x, x[:1]):
        for lib in {native._lib, None} if native.available() else {None}:
            monkeypatch.setattr(native, "_lib", lib)
            neurons, ago = gate.decide(few, bias)
            differ = set(neurons.tolist()) ^ set(gate.wanted(few, bias).any(0).nonzero()[:, 0].tolist())
            last = gate.wanted(few, bias)[-1]
            assert len(differ) <= 1 and int(((ago == 0) != last).sum()) <= 1  # an estimate on the bar
            monkeypatch.undo()


def test_nan_is_not_swallowed() -> None:
    z = torch.tensor([float("nan"), 0.01, 2.0, -0.01])
    cut = Thresholded(torch.nn.functional.silu, 0.05)(z)
    assert cut[0].isnan() and cut[1] == 0 and cut[2] == torch.nn.functional.silu(z[2]) and cut[3] == 0


# Setting thresholds ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200), st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=40, deadline=None)
def test_thresholds_are_quantiles(values: list[float], dtype: torch.dtype) -> None:
    a = torch.tensor(values, dtype=dtype)
    counts = thresholds.Histograms()
    for part in a.split(7):
        counts.observe("mlp", torch.empty(0), part.unsqueeze(0))
    levels = counts.levels("mlp")
    assert levels.shape == (99,) and levels.dtype == torch.float32 and (levels.diff() >= 0).all()
    sizes = a.float().abs().sort().values
    for share in (0.01, 0.3, 0.5, 0.77, 0.99):
        t = threshold_at(levels, share)
        exact = sizes[max(0, -int(-share * len(sizes) // 1) - 1)]
        assert exact <= t <= exact * (1 + 2.0**-7) + 1e-38  # a bin is a 128th wide at most
        if dtype == torch.bfloat16:
            assert int((sizes <= t).sum()) >= share * len(sizes) - 1e-6


def test_between_whole_per_cents_lies_a_straight_line() -> None:
    levels = torch.arange(1, 100, dtype=torch.float32) / 100
    for share in (0.01, 0.015, 0.5, 0.123, 0.985, 0.99):
        assert threshold_at(levels, share) == pytest.approx(share, abs=1e-6)


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FlashError, match="not finite"):
        thresholds.Histograms().observe("mlp", torch.empty(0), torch.tensor([[1.0, float("nan")]]))


# Models ------------------------------------------------------------------------------------------------------------


def tiny_gpt2() -> PreTrainedModel:
    """No gate matrix; GELU; biases."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


MODELS: dict[str, Any] = {
    "silu": lambda: tiny_llama("silu"),
    "gelu-bias": lambda: tiny_llama("gelu", mlp_bias=True),
    "gpt2": tiny_gpt2,
    "bf16": lambda: tiny_llama("silu").bfloat16(),
}


@pytest.fixture(scope="module", params=MODELS)
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    """A flash checkpoint with thresholds, set on random tokens; and the dense model."""
    folder = tmp_path_factory.mktemp(request.param)
    save_stock(folder / "stock", MODELS[request.param]())
    flash = hf_flash.repack(folder / "stock", folder / "flash", progress=False)
    add_thresholds(flash)
    return flash, AutoModelForCausalLM.from_pretrained(folder / "stock").eval()


def add_thresholds(folder: Path) -> None:
    model = load(folder, gate="all")
    torch.manual_seed(0)
    levels = thresholds.measure(model, [torch.randint(3, VOCAB, (4, 64))], progress=False)
    rewrite(
        folder / GATES_NAME,
        {f"{path}.thresholds": table for path, table in levels.items()},
        {
            GATES_KEY: gate_file.sketch_kinds(watched_blocks(model), 8),
            THRESHOLDS_KEY: {path: {"levels": 99} for path in levels},
        },
        folder / flash_file_names(folder)[0],
        later=thresholds.sketches(model, 8, progress=False),
    )


def reference(dense: PreTrainedModel, folder: Path, sparsity: float) -> PreTrainedModel:
    """The stock model with its activations cut at the checkpoint's thresholds: the formula itself."""
    gates = GateFile(folder / GATES_NAME)
    cut = AutoModelForCausalLM.from_pretrained(folder.parent / "stock").eval()
    for block in find_blocks(cut):
        parent, _, name = block.activation.rpartition(".")
        threshold = threshold_at(gates.levels(block.path), sparsity)
        setattr(cut.get_submodule(parent), name, Thresholded(get_activation(cut, block), threshold))
    return cut


@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_it_computes_the_cut_model(
    way: str, calibrated: tuple[Path, PreTrainedModel], sparsity: float, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate that misses nothing, which here wants every neuron: what was read in vain must add nothing."""
    folder, dense = calibrated
    monkeypatch.setattr(ThresholdGate, "_scan", _all_wanted)
    monkeypatch.setattr(ThresholdGate, "_blocks", _all_blocks)
    with tightest_plan() if tight else contextlib.nullcontext():
        flash = load(folder, gate="threshold", sparsity=sparsity, context=64)
    cut = reference(dense, folder, sparsity)
    want, tolerance = logits_of(cut, input_ids=IDS), 2e-5 if dense.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(logits_of(flash, input_ids=IDS), want, atol=tolerance, rtol=tolerance)
    plain = logits_of(dense, input_ids=IDS)
    assert (want.float() - plain.float()).abs().max() > 10 * tolerance  # the threshold does something
    for i in range(3):
        one = IDS[:1, i : i + 1]
        got, want = logits_of(flash, input_ids=one), logits_of(cut, input_ids=one)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def _all_wanted(self: ThresholdGate, x: torch.Tensor, bias: Any) -> torch.Tensor:
    return torch.ones(self.sketch.norm.shape[0], dtype=torch.bool)


def _all_blocks(self: ThresholdGate, x: torch.Tensor, bias: Any) -> list[tuple[slice, torch.Tensor]]:
    n = self.sketch.norm.shape[0]
    return [(slice(0, n), torch.ones(x.shape[0], n, dtype=torch.bool))]


def test_the_sketch_decides_what_is_read_and_misses_little(way: str, calibrated: tuple[Path, PreTrainedModel]) -> None:
    folder, dense = calibrated
    flash, cut = load(folder, gate="threshold", sparsity=0.6), reference(dense, folder, 0.6)
    error = (logits_of(flash, input_ids=IDS).float() - logits_of(cut, input_ids=IDS).float()).norm()
    change = (logits_of(dense, input_ids=IDS).float() - logits_of(cut, input_ids=IDS).float()).norm()
    assert error < 0.25 * change
    stats = hf_flash.stats(flash)
    stats.reset()
    logits_of(flash, input_ids=IDS[:1, :1])
    neurons = sum(block.d_ffn for block in flash._hf_flash.blocks)
    assert 0.2 * neurons < stats.neurons_wanted < 0.6 * neurons
    assert 0.9 * stats.neurons_wanted < stats.neurons_fired <= stats.neurons_wanted


def test_gradients_are_those_of_the_cut_model(calibrated: tuple[Path, PreTrainedModel]) -> None:
    folder, dense = calibrated
    flash, cut = load(folder, gate="threshold", sparsity=0.5), reference(dense, folder, 0.5)
    grads = []
    for model in (flash, cut):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=IDS).loss.backward()
        grads.append(embedded.grad.float())
    assert (grads[0] - grads[1]).norm() < 0.25 * grads[1].norm()


def test_it_is_never_chosen_unasked(calibrated: tuple[Path, PreTrainedModel]) -> None:
    folder, dense = calibrated
    flash = load(folder)
    assert set(flash._hf_flash.plan.gates.values()) == {"all"}
    assert torch.equal(greedy(flash, IDS, 8), greedy(dense, IDS, 8))
    from hf_flash.contents import contents

    assert contents(folder).gate == "all" and hf_flash.verify(folder, progress=False).ok


def test_saved_again_it_keeps_the_gate_that_was_asked_for(
    calibrated: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, _ = calibrated
    flash = load(folder, gate="threshold", sparsity=0.7)
    flash.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again._hf_flash.config.sparsity == 0.7 and set(again._hf_flash.plan.gates.values()) == {"threshold"}
    assert torch.equal(greedy(again, IDS, 6), greedy(flash, IDS, 6))
    exact = load(tmp_path / "saved", gate="all")
    assert set(exact._hf_flash.plan.gates.values()) == {"all"}


def test_what_it_cannot_do_is_said(flash_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlashConfigError, match="never exactly zero"):
        load(flash_folder, gate="threshold")
    stock = save_stock(tmp_path / "stock", tiny_llama("silu"))
    flash = hf_flash.repack(stock, tmp_path / "flash", progress=False)
    for folder in (stock, flash):
        with pytest.raises(FlashConfigError, match=r"no threshold for .* `hf-flash calibrate FOLDER --text FILE`"):
            load(folder, gate="threshold")
    with pytest.raises(FlashConfigError, match="to be asked for by name"):
        load(flash, sparsity=0.5)
    for options in ({"sparsity": 1.0}, {"sparsity": "half"}, {"sparsity": 0.5, "gate": "all"}):
        with pytest.raises(FlashConfigError, match="sparsity="):
            hf_flash.FlashConfig(**options)


def test_a_plan_counts_the_sketches(calibrated: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = calibrated
    flash = load(folder, gate="threshold")
    plan = flash._hf_flash.plan
    held = [m.engine.gate.sketch.n_bytes for m in flash.modules() if isinstance(m, FlashFFN)]
    assert plan.gate_bits == 8 and plan.parts["gates"] == sum(held) > 0
    assert dataclasses.asdict(plan)["gates"] == plan.gates
