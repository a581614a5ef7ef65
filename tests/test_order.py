"""An order changes where neurons lie and nothing else: same tokens, same stock weights; and it is what was counted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers_e2e import greedy, load
from hypothesis import given, settings
from test_format_doc import PACKABLE, WIDE, second_reader
from tiny_models import TINY, causal
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_flash
from hf_flash import order as order_module
from hf_flash.errors import CheckpointError
from hf_flash.families import find_blocks
from hf_flash.ffn import FlashFFN
from hf_flash.format import read_header
from hf_flash.order import CoFiring, arrange, co_firing, orders_of
from hf_flash.recording import Recording, record
from hf_flash.verify import verify

MODELS = {
    **{name: TINY[name] for name in ("opt", "llama-relu")}, "llama-relu-64": PACKABLE["llama-relu-64"],
    "gpt2-relu": lambda: causal("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128, activation_function="relu"),
    "phi3-relu-64": lambda: causal("phi3", **WIDE, num_hidden_layers=2, hidden_act="relu"),
}  # fmt: skip


class Fired:
    """What `co_firing` wants of a recording."""

    def __init__(self, fired: torch.Tensor) -> None:
        self._fired, self.n_tokens, self.layers = fired, len(fired), ["ffn"]

    def shape(self, layer: str) -> tuple[int, int]:
        return 1, self._fired.shape[1]

    def fired(self, layer: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._fired[start:stop]


@pytest.mark.parametrize("quiet", [0, 1, 3, 8, 40])
@pytest.mark.parametrize("block", [(1024, 2048), (7, 5)])
def test_counts_are_those_of_all_pairs(block: tuple[int, int], quiet: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "BLOCK_NEURONS", block[0])
    monkeypatch.setattr(order_module, "BLOCK_TOKENS", block[1])
    fired = torch.rand(33, 40, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.9, 40)
    found = co_firing(Fired(fired), "ffn", 30, quiet)
    begun = fired[:30].clone()
    for t in range(30):
        begun[t] &= ~fired[max(0, t - quiet) : t].any(0)
    pairs = begun.float().t() @ begun.float()
    assert torch.equal(found.begun, pairs.diagonal())
    pairs.diagonal().zero_()
    assert torch.equal(found.together, pairs.sort(1, descending=True).values[:, :32])
    assert torch.equal(found.together, pairs.gather(1, found.friends))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))
def test_every_neuron_has_one_place(n: int, n_tokens: int, density: float, seed: int) -> None:
    fired = torch.rand(n_tokens, n, generator=torch.Generator().manual_seed(seed)) < density
    found = co_firing(Fired(fired), "ffn")
    order = arrange(found)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, arrange(found))


def test_what_fires_together_lies_together() -> None:
    """Groups of eight that fire as one, scattered; and a few neurons that fire with everything, which part none."""
    generator = torch.Generator().manual_seed(3)
    scattered = torch.randperm(96, generator=generator)
    fired = torch.zeros(400, 100, dtype=torch.bool)
    for token in range(400):
        for group in torch.randperm(12, generator=generator)[:1]:
            fired[token, scattered[group * 8 : group * 8 + 8]] = True
    fired[:, 96:] = torch.rand(400, 4, generator=generator) < 0.8
    order = [neuron for neuron in arrange(co_firing(Fired(fired), "ffn")).tolist() if neuron < 96]
    groups = [set(scattered[group * 8 : group * 8 + 8].tolist()) for group in range(12)]
    assert all(set(order[i : i + 8]) in groups for i in range(0, 96, 8))


def test_a_ring_of_friends_is_opened() -> None:
    friends, together = torch.tensor([[1, 2], [2, 0], [0, 1]]), torch.tensor([[3.0, 3], [3, 3], [3, 3]])
    assert sorted(arrange(CoFiring(torch.full((3,), 3.0), friends, together)).tolist()) == [0, 1, 2]


@pytest.fixture(scope="module", params=sorted(MODELS))
def ordered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """(stock model, checkpoint in an order): gated or not, with biases that differ, fused, transposed, packed."""
    folder = tmp_path_factory.mktemp("order")
    model = MODELS[request.param]().eval()
    model = model.to(torch.bfloat16) if request.param.endswith("-64") else model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.05 * torch.randn(parameter.shape))
        for block in find_blocks(model):  # weights of exponents that are rare
            model.get_parameter(block.down.key)[0, 0] = 2.0**-14
    model.save_pretrained(folder / "stock")
    record(model, [torch.arange(3, 43).view(2, 20)], folder / "recording", progress=False)
    out = hf_flash.repack(folder / "stock", folder / "flash", order=folder / "recording", pack=True, progress=False)
    return model, out


def test_neurons_lie_in_the_order(ordered: tuple[PreTrainedModel, Path]) -> None:
    model, folder = ordered
    want = orders_of(Recording.open(folder.parent / "recording"), progress=False)
    blocks = find_blocks(model)
    assert sorted(want) == sorted(block.path for block in blocks)
    assert any(not torch.equal(order, torch.arange(len(order))) for order in want.values())
    for module in load(folder, gate="all").modules():
        if isinstance(module, FlashFFN):
            assert torch.equal(module.engine.layer.order, want[module.block.path])
    neuron, parameters = second_reader(), dict(model.named_parameters())
    for block in blocks:
        for i in (0, 1, block.d_ffn - 1):
            gate, up, down = neuron(folder, block.path, i)
            for part, got in ((block.gate, gate), (block.up, up), (block.down, down)):
                if part is not None:
                    weight = part.weight_of(parameters[part.key]).detach().float()
                    assert np.array_equal(got, (weight.t() if part is block.down else weight)[i].numpy())
        with pytest.raises(IndexError):
            neuron(folder, block.path, block.d_ffn)


def test_outputs_are_the_stock_models(ordered: tuple[PreTrainedModel, Path]) -> None:
    """With either gate, for one token and for many; sums have another order than in the stock block."""
    model, folder = ordered
    ids = torch.arange(5, 29).view(2, 12)
    for gate in ("auto", "all"):
        flash = load(folder, gate=gate)
        for inputs in (ids, ids[:1, :1]):
            with torch.no_grad():
                want, got = (m(inputs, use_cache=False).logits.float() for m in (model, flash))
            exact = model.dtype == torch.float32
            torch.testing.assert_close(got, want, atol=1e-4 if exact else 0.1, rtol=1e-4 if exact else 0.05)
        if exact:
            assert torch.equal(greedy(flash, ids, 12), greedy(model, ids, 12))


def test_a_bias_that_changed_is_seen(ordered: tuple[PreTrainedModel, Path]) -> None:
    model, folder = ordered
    flash, ids = load(folder), torch.arange(5, 9)[None]
    ours = ("fc1.bias", "fc2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias")
    names = [name for name, _ in model.named_parameters() if name.endswith(ours)]
    for _ in range(3):
        for m in (model, flash):
            with torch.no_grad():
                for name in names:
                    parameter = m.get_parameter(name)
                    parameter.add_(torch.linspace(0, 0.3, len(parameter)))
        with torch.no_grad():
            want, got = (m(ids, use_cache=False).logits.float() for m in (model, flash))
        exact = model.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=1e-3 if exact else 0.1, rtol=1e-3 if exact else 0.05)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).sub_(0.9 * torch.linspace(0, 1, len(model.get_parameter(name))))


@pytest.mark.parametrize("gate", ["auto", "all"])
def test_inference_mode(gate: str, ordered: tuple[PreTrainedModel, Path]) -> None:
    """Tensors made in there have no version, by which a changed bias is known."""
    model, folder = ordered
    flash, ids = load(folder, gate=gate), torch.arange(5, 9)[None]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            want, got = (m(ids[:, :1], use_cache=False).logits.float() for m in (model, flash))
        torch.testing.assert_close(got, want, atol=0.1, rtol=0.05)


def test_a_gradient_reaches_the_bias_it_belongs_to(ordered: tuple[PreTrainedModel, Path]) -> None:
    model, folder = ordered
    names = [name for name, _ in model.named_parameters() if name.endswith(("fc1.bias", "c_fc.bias"))]
    if not names or model.dtype != torch.float32:
        return
    flash, ids, grads = load(folder), torch.arange(5, 17)[None], []
    for m in (model, flash):
        parameters = [m.get_parameter(name).requires_grad_() for name in names]
        grads.append(torch.autograd.grad(m(ids, labels=ids).loss, parameters))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-3)


def test_saved_again_it_is_the_same(ordered: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = ordered
    flash = load(folder)
    flash.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again", progress=False).ok and verify(folder, progress=False).ok
    ids = torch.arange(5, 13).view(2, 4)
    assert torch.equal(greedy(load(tmp_path / "again"), ids, 8), greedy(flash, ids, 8))
    stock = AutoModelForCausalLM.from_pretrained(folder.parent / "stock")
    kept = dict(stock.named_parameters())
    for name, parameter in load(tmp_path / "again").named_parameters():
        assert torch.equal(parameter, kept[name]), name


def test_files_of_two_orders_are_refused(ordered: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, folder = ordered
    if not (folder / "gates.safetensors").exists():
        return
    shutil.copytree(folder, tmp_path / "mixed")
    plain = hf_flash.repack(folder.parent / "stock", tmp_path / "plain", pack=True, progress=False)
    shutil.copy(plain / "gates.safetensors", tmp_path / "mixed")
    with pytest.raises(CheckpointError, match=r"different orders .*repack the checkpoint into a new folder"):
        load(tmp_path / "mixed")
    assert any("different orders" in problem for problem in verify(tmp_path / "mixed", progress=False).problems)


def test_an_older_reader_is_warned_by_the_version(ordered: tuple[PreTrainedModel, Path]) -> None:
    _, folder = ordered
    for path in [*folder.glob("flash-*.safetensors"), *folder.glob("gates.safetensors")]:
        assert read_header(path).metadata["hf_flash.format_version"] == "3"
    assert read_header(folder / "model.safetensors").metadata["hf_flash.format_version"] == "2"


@pytest.mark.parametrize("damage", ["twice", "flipped"])
def test_an_order_that_is_none_is_refused(ordered: tuple[PreTrainedModel, Path], tmp_path: Path, damage: str) -> None:
    _, folder = ordered
    shutil.copytree(folder, tmp_path / "bad")
    path = next((tmp_path / "bad").glob("flash-*.safetensors"))
    header = read_header(path)
    entry = next(e for name, e in header.entries.items() if name.endswith(".order"))
    data = bytearray(path.read_bytes())
    data[entry.start : entry.start + 4] = data[entry.start + 4 : entry.start + 8]
    if damage == "twice":  # with checksums that are right
        import zlib

        old = f"{zlib.crc32(path.read_bytes()[entry.start : entry.start + entry.n_bytes]):08x}".encode()
        new = f"{zlib.crc32(data[entry.start : entry.start + entry.n_bytes]):08x}".encode()
        assert data.count(old) == 1
        at = data.index(old)
        data[at : at + 8] = new
        raw = bytes(data[8 : header.data_start])
        want = header.metadata["hf_flash.header_crc32"].encode()
        crc = f"{zlib.crc32(raw.replace(want, b'0' * 8, 1)):08x}".encode()
        data[8 : header.data_start] = raw.replace(want, crc, 1)
    path.write_bytes(data)
    wrong = r"does not name every neuron once" if damage == "twice" else r"differs from its checksum"
    with pytest.raises(CheckpointError, match=wrong):
        load(tmp_path / "bad")


def test_a_recording_of_another_model_is_refused(tmp_path: Path) -> None:
    small, other = TINY["opt"](), PACKABLE["llama-relu-64"]()
    other.save_pretrained(tmp_path / "stock")
    record(small, [torch.arange(3, 13)[None]], tmp_path / "recording", progress=False)
    with pytest.raises(CheckpointError, match=r"recording of another model: .*not in it.*Record the model"):
        hf_flash.repack(tmp_path / "stock", tmp_path / "flash", order=tmp_path / "recording", progress=False)
    with pytest.raises(CheckpointError, match="holds no recording"):
        hf_flash.repack(tmp_path / "stock", tmp_path / "flash", order=tmp_path / "nothing", progress=False)


def test_the_shipped_model_in_order(
    shipped: Path, dense: PreTrainedModel, prompts: torch.Tensor, cap_for: Callable[[str, str], int], tmp_path: Path
) -> None:
    record(dense, [prompts], tmp_path / "recording", progress=False)
    folder = hf_flash.repack(shipped, tmp_path / "flash", order=tmp_path / "recording", progress=False)
    memory = cap_for("certified", "half")
    want = greedy(dense, prompts[:2], 40)
    for gate in ("certified", "all"):
        assert torch.equal(greedy(load(folder, gate=gate, memory=memory, context=256), prompts[:2], 40), want)


def test_an_order_from_what_calibration_kept(tmp_path: Path) -> None:
    model = TINY["opt"]()
    model.save_pretrained(tmp_path / "stock")
    record(model, [torch.arange(3, 43).view(2, 20)], tmp_path / "flash/.calibration/0123/recording", progress=False)
    one, other = (
        hf_flash.repack(tmp_path / "stock", tmp_path / name, order=tmp_path / order, progress=False)
        for name, order in (("one", "flash"), ("other", "flash/.calibration/0123/recording"))
    )
    for path in one.glob("flash-*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes()
