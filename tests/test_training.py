"""Training around FFNs on flash: gradients are the dense model's, with and without gradient checkpointing."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers_e2e import auto_class, load, load_any, plan_of, tightest_plan
from tiny_models import TINY, model_inputs
from torch import nn
from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*is deprecated")
Stock = tuple[Path, PreTrainedModel]
CapFor = Callable[..., int]


class Adapter(nn.Module):
    """A linear map with a low-rank correction beside it, as LoRA adds one."""

    def __init__(self, stock: nn.Module, d_in: int, d_out: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stock = stock
        self.a = nn.Parameter(torch.randn(4, d_in, generator=generator) / d_in**0.5)
        self.b = nn.Parameter(0.1 * torch.randn(d_out, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stock(x) + x @ self.a.t() @ self.b.t()


def add_adapters(model: PreTrainedModel) -> None:
    """Adapters around the query (or fused) projections; everything else is frozen."""
    model.requires_grad_(False)
    leaves = ("q_proj", "q", "c_attn", "query_key_value")
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves]
    assert paths
    for seed, path in enumerate(paths):
        parent, _, leaf = path.rpartition(".")
        stock = model.get_submodule(path)
        d_in = getattr(stock, "in_features", None) or stock.nx
        d_out = getattr(stock, "out_features", None) or stock.nf
        setattr(model.get_submodule(parent), leaf, Adapter(stock, d_in, d_out, seed))


def gradients(model: PreTrainedModel, checkpointing: bool, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the loss by parameter, and of the input embeddings; matrices that flash has no use for left out."""
    model.zero_grad()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    model(inputs_embeds=embeddings, labels=inputs["input_ids"], use_cache=False, **rest).loss.backward()
    model.eval()
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**out, "embeddings": embeddings.grad.clone()}


def on_flash(model: PreTrainedModel) -> set[str]:
    """Names of the parameters whose place flash has taken, or 12 bits a weight have."""
    parts = {part.key for b in model._hf_flash.blocks for part in (b.gate, b.up, b.down) if part}
    tied = model._hf_flash.tied  # a head that is the embedding is a parameter under the embedding's name
    return parts | {f"{tied.get(path, path)}.weight" for path in (*plan_of(model).streamed, *plan_of(model).packed)}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    size = max(float(gradient.abs().max()) for gradient in want.values())  # some are 0 but for rounding: key biases
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, want[name], rtol=1e-3, atol=1e-5 * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stock]:
    """A tiny model's folder, and what stock transformers loads from it, without dropout: the oracle."""

    @cache
    def make(name: str) -> Stock:
        model = TINY[name]()
        for key in vars(model.config):
            if "drop" in key and isinstance(getattr(model.config, key), float):
                setattr(model.config, key, 0.0)
        model.save_pretrained(folder := tmp_path_factory.mktemp(name))
        return folder, auto_class(model).from_pretrained(folder)

    return make


NAMES = ["llama", "llama-relu2-bias", "opt", "gpt2", "bloom", "falcon", "falcon-new", "phi3", "apertus"]
NAMES += ["llama-prelu", "modernbert-decoder", "gpt_neox", "t5", "bart"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_parameter_that_is_there(
    name: str, checkpointing: bool, stock: Callable[[str], Stock], tmp_path: Path
) -> None:
    folder, dense = stock(name)
    flash = load_any(folder, dense, cache_dir=tmp_path)  # gate `certified` where it can be had
    inputs = model_inputs(dense)
    want = gradients(dense, checkpointing, inputs)
    got = gradients(flash, checkpointing, inputs)
    assert_close(got, want)
    assert want.keys() - got.keys() == on_flash(flash) & want.keys()
    assert any("norm" in key or "ln" in key for key in got) and got["embeddings"].abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("want_cap", ["all", "half", "least", "streamed"])
@pytest.mark.parametrize("gate", ["all", "certified"])
def test_gradients_of_the_shipped_model_under_every_kind_of_cap(
    gate: str, want_cap: str, checkpointing: bool, shipped: Path, flash_folder: Path, cap_for: CapFor,
    dense: PreTrainedModel, prompts: torch.Tensor,
) -> None:  # fmt: skip
    dense, inputs = copy.deepcopy(dense), {"input_ids": prompts[:4]}
    flash = load(flash_folder, cap_for(gate, want_cap), gate=gate)
    want = gradients(dense, checkpointing, inputs)
    for _ in range(2):
        got = gradients(flash, checkpointing, inputs)
        assert_close(got, want)
        assert want.keys() - got.keys() == on_flash(flash)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bloom", "t5"])
def test_training_adapters(name: str, checkpointing: bool, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock(name)
    flash, dense = load_any(folder, dense, cache_dir=tmp_path), copy.deepcopy(dense)
    inputs, losses = model_inputs(dense), {}
    for model in (dense, flash):
        add_adapters(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses[model] = []
        for _ in range(4):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[model].append(float(loss.detach()))
    assert losses[flash] == pytest.approx(losses[dense], rel=1e-4)
    assert losses[flash][-1] < losses[flash][0]
    adapters = [(n, p) for n, p in flash.named_parameters() if p.requires_grad]
    mine = dict(dense.named_parameters())
    assert adapters
    for n, parameter in adapters:
        torch.testing.assert_close(parameter, mine[n], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama-relu2-bias"])
def test_training_biases_alone(name: str, stock: Callable[[str], Stock], tmp_path: Path) -> None:
    folder, dense = stock(name)
    found = []
    for model in (copy.deepcopy(dense), load_any(folder, dense, cache_dir=tmp_path)):
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path.endswith(("fc2.bias", "mlp.c_proj.bias", "gate_proj.bias")))
        inputs = model_inputs(dense)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 2 and found[0].keys() == found[1].keys()
    assert_close(found[1], found[0])


def test_gradients_with_streamed_attention_and_reentrant_checkpoints(
    stock: Callable[[str], Stock], tmp_path: Path
) -> None:
    folder, dense = stock("llama")
    with tightest_plan():
        flash = load_any(folder, dense, cache_dir=tmp_path)
    inputs = model_inputs(dense)
    want = gradients(dense, False, inputs)
    flash.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    flash.train()
    embeddings = flash.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    flash(inputs_embeds=embeddings, labels=inputs["input_ids"], use_cache=False).loss.backward()
    got = {n: p.grad for n, p in flash.named_parameters() if p.grad is not None}
    assert_close({**got, "embeddings": embeddings.grad}, want)
