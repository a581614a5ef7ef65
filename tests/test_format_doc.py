"""docs/format.md is true: the reader printed there reads what we write, and the rules hold for what we write."""

import ast
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_e2e import greedy, load
from safetensors import safe_open
from tiny_models import TINY, causal
from transformers import AutoModelForCausalLM
from transformers.utils.logging import warning_once

import hf_flash
from hf_flash import format as flash_format
from hf_flash import gate_file
from hf_flash.families import find_blocks
from hf_flash.format import FORMAT_VERSION, PAD_PREFIX, read_header
from hf_flash.store import LAYERS_KEY

DOC = Path(__file__).parents[1] / "docs" / "format.md"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def second_reader() -> Callable:
    """The function in the page's only code block, which imports nothing of ours."""
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    imports = {n.names[0].name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import)}
    imports |= {n.module for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)}
    assert imports == {"json", "pathlib", "numpy"}
    assert len(code.split("def neuron")[1].splitlines()) <= 32
    scope: dict[str, Callable] = {}
    exec(code, scope)
    return scope["neuron"]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
# Of widths that can be packed, which they are in bfloat16.
PACKABLE = {
    "llama-relu-64": lambda: causal("llama", **WIDE, num_hidden_layers=2, hidden_act="relu"),
    "phi3-64": lambda: causal("phi3", **WIDE, num_hidden_layers=2),
    "gpt2-128": lambda: causal("gpt2", n_embd=128, n_layer=2, n_head=4, n_positions=128),
}


@pytest.fixture(scope="module", params=["llama-relu", "opt", "phi3", "gpt2", *PACKABLE])
def converted(request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory):
    """(stock model, flash folder): gated, ungated with biases, fused, transposed; packed where that can be."""
    folder = tmp_path_factory.mktemp("format")
    model = {**TINY, **PACKABLE}[request.param]().to(dtype)
    with torch.no_grad():
        for block in find_blocks(model):  # weights of exponents that are rare
            down = model.get_parameter(block.down.key)
            down[0, 0], down[1, 1], down[2, 2] = 2.0**-14, -30.0, 0.0
    model.save_pretrained(folder / "stock")
    flash = hf_flash.repack(folder / "stock", folder / "flash", gate_bits=5, pack=True, progress=False)
    packed = request.param in PACKABLE and dtype == torch.bfloat16
    assert all(("exponent" in layer) == packed for layer in layers_in(flash).values())
    return model, flash


def layers_in(folder: Path) -> dict[str, dict]:
    """What the headers say of the layers, by tensor name."""
    headers = map(read_header, folder.glob("flash-*.safetensors"))
    return {k: v for header in headers for k, v in json.loads(header.metadata[LAYERS_KEY]).items()}


def test_the_second_reader_gives_the_stock_weights(converted) -> None:
    model, folder = converted
    neuron, parameters = second_reader(), dict(model.named_parameters())
    for block in find_blocks(model):
        up = block.up.weight_of(parameters[block.up.key]).float()
        down = block.down.weight_of(parameters[block.down.key]).float()
        for i in (0, 1, block.d_ffn // 2, block.d_ffn - 1):
            got_gate, got_up, got_down = neuron(folder, block.path, i)
            if block.gate is None:
                assert got_gate is None
            else:
                gate = block.gate.weight_of(parameters[block.gate.key]).float()
                assert np.array_equal(got_gate, gate[i].detach().numpy())
            assert np.array_equal(got_up, up[i].detach().numpy())
            assert np.array_equal(got_down, down[:, i].detach().numpy())
        with pytest.raises(IndexError):
            neuron(folder, block.path, block.d_ffn)


def test_escapes_are_as_the_page_says(converted) -> None:
    """Rules 12 to 14: sorted, of code 0, and what 15 exponents leave out."""
    _, folder = converted
    for path in folder.glob("flash-*.safetensors"):
        with safe_open(path, "pt") as file:
            for name, layer in layers_in(folder).items():
                if "exponent" not in layer:
                    assert f"{layer['module']}.escapes" not in file.keys()  # noqa: SIM118
                    continue
                rows = file.get_tensor(name).numpy()
                neurons, values = file.get_tensor(f"{layer['module']}.escapes").numpy().view("<u4").T
                size = layer["d_model"] * (2 if layer["gated"] else 1) + layer["d_out"]
                assert rows.shape == (layer["n_neurons"], -(-size * 3 // 2 // 512) * 512)
                assert len(neurons) > 0 and (np.diff(neurons.astype(int)) >= 0).all()
                for neuron, value in zip(neurons, values, strict=True):
                    at = int(value) >> 16
                    field = int(value) >> 7 & 255
                    assert at < size and field and not 0 < field - layer["exponent"] <= 15
                    byte = rows[neuron, size + at // 64 * 32 + at % 32]
                    assert (byte >> 4 if at % 64 >= 32 else byte & 15) == 0
                assert not rows[:, size * 3 // 2 :].any()


def test_the_second_reader_refuses_a_newer_version(converted) -> None:
    model, folder = converted
    path = sorted(folder.glob("flash-*.safetensors"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"hf_flash.format_version":"2"', b'"hf_flash.format_version":"4"'))
    with pytest.raises(ValueError, match="format 4 is not known"):
        second_reader()(folder, find_blocks(model)[0].path, 0)
    path.write_bytes(whole)


def test_the_rules_hold_for_what_is_written(converted) -> None:
    """Rules 1 to 3, 5, 10, 11: files, guards, shapes and alignment, as any safetensors library sees them."""
    model, folder = converted
    blocks = find_blocks(model)
    index = json.loads((folder / "flash.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == sorted(f"{block.path}.bundles" for block in blocks)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "hf_flash"
    with safe_open(folder / "model.safetensors", "pt") as resident:
        for key in {part.key for block in blocks for part in (block.gate, block.up, block.down) if part}:
            stock = key if key in resident.keys() else key.partition(".")[2]  # noqa: SIM118 (no iterator there)
            assert resident.get_tensor(stock).numel() == 0
    for name in set(index.values()):
        data = (folder / name).read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        assert next(iter(header["__metadata__"])) == "hf_flash.header_crc32"
        assert header.pop("__metadata__")["hf_flash.format_version"] == str(FORMAT_VERSION)
        for tensor, entry in header.items():
            assert tensor in index or tensor.endswith(".escapes") or tensor.startswith(PAD_PREFIX)
            if tensor in index:
                assert (begin + entry["data_offsets"][0]) % 4096 == 0
                assert entry["dtype"] == "U8"
                assert entry["shape"][1] % 512 == 0


@pytest.mark.parametrize("bits", [4, 5])
def test_sketches_are_as_the_page_says(converted, bits: int) -> None:
    """Rules 15 to 19, decoded with integers from the words of the page alone; any number of bits that is there."""
    model, folder = converted
    if not (folder / "gates.safetensors").exists():
        return  # an activation that is never exactly zero
    parameters = dict(model.named_parameters())
    with safe_open(folder / "gates.safetensors", "pt") as file:
        kinds = json.loads(file.metadata()["hf_flash.gates"])
        for block in find_blocks(model):
            assert kinds[block.path] == {"kind": "dithered sketch", "bits": 5, "d_model": block.d_model}
            prefix = f"{block.path}.sketch."
            parts = {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
            assert sorted(parts) == ["dither", "nibbles", "norm", "plane5", "step"]
            part = block.gate or block.up
            weight = part.weight_of(parameters[part.key]).detach().double()
            assert parts["dither"].min() >= 0 and parts["dither"].max() < 1
            norm = weight.norm(dim=1) + 24 * parts["step"].double().norm(dim=1)
            assert (parts["norm"] >= norm).all()
            for i in (0, block.d_ffn - 1):
                for j in range(block.d_model):
                    nibble = int(parts["nibbles"][i, j // 64 * 32 + j % 32])
                    code = nibble >> 4 if j % 64 >= 32 else nibble & 15
                    if bits == 5:
                        code = code * 2 + (int(parts["plane5"][i, j // 8]) >> (j % 8) & 1)
                    step, dither = parts["step"][i, j // 64].item(), parts["dither"][j].item()
                    s = step / 2 ** (bits - 4)
                    about = s * (code - 2 ** (bits - 1) + 1 / 2 + (1 / 2 - dither) * 2 ** (bits - 4))
                    assert abs(about - weight[i, j].item()) <= s / 2 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_version_1_is_still_read(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bundles as they were; sketches of the old kind are passed over, and that is said."""
    model = PACKABLE["llama-relu-64"]().to(dtype)
    model.save_pretrained(tmp_path / "stock")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    with monkeypatch.context() as patch:
        patch.setattr(flash_format, "FORMAT_VERSION", 1)
        patch.setattr(gate_file, "SKETCH_KIND", "sketch")
        flash = hf_flash.repack(tmp_path / "stock", tmp_path / "flash", pack=False, progress=False)
    for path in flash.glob("*.safetensors"):
        assert read_header(path).metadata["hf_flash.format_version"] == "1"
    warning_once.cache_clear()  # another test may have had it
    with caplog.at_level(logging.WARNING):
        old = load(flash)
    assert set(old._hf_flash.plan.gates.values()) == {"all"}
    assert "no sketch" in caplog.text
    ids = torch.arange(3, 15).view(2, 6)
    assert torch.equal(greedy(old, ids, 10), greedy(dense, ids, 10))
    got, up, _ = second_reader()(flash, "model.layers.1.mlp", 7)
    assert np.array_equal(got, model.model.layers[1].mlp.gate_proj.weight[7].float().detach().numpy())
    assert np.array_equal(up, model.model.layers[1].mlp.up_proj.weight[7].float().detach().numpy())
