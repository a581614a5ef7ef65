"""docs/format.md is true: the reader printed there reads what we write, and the rules hold for what we write."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import TINY

import hf_flash
from hf_flash.families import find_blocks
from hf_flash.format import FORMAT_VERSION, PAD_PREFIX
from hf_flash.gates.certified import GROUP, Sketch

DOC = Path(__file__).parents[1] / "docs" / "format.md"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def second_reader() -> Callable:
    """The function in the page's only code block, which imports nothing of ours."""
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    imports = {n.names[0].name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import)}
    imports |= {n.module for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)}
    assert imports == {"json", "pathlib", "numpy"}
    assert len(code.split("def neuron")[1].splitlines()) <= 25
    scope: dict[str, Callable] = {}
    exec(code, scope)
    return scope["neuron"]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=["llama-relu", "opt", "phi3", "gpt2"])
def converted(request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory):
    """(stock model, flash folder): gated, ungated with biases, fused, transposed."""
    folder = tmp_path_factory.mktemp("format")
    model = TINY[request.param]().to(dtype)
    model.save_pretrained(folder / "stock")
    return model, hf_flash.repack(folder / "stock", folder / "flash", gate_bits=5, progress=False)


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


def test_the_second_reader_refuses_a_newer_version(converted) -> None:
    model, folder = converted
    path = sorted(folder.glob("flash-*.safetensors"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"hf_flash.format_version":"1"', b'"hf_flash.format_version":"2"'))
    with pytest.raises(ValueError, match="format 2 is not known"):
        second_reader()(folder, find_blocks(model)[0].path, 0)
    path.write_bytes(whole)


def test_the_rules_hold_for_what_is_written(converted) -> None:
    """Rules 1 to 3, 10, 11: files, guards, shapes and alignment, as any safetensors library sees them."""
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
            assert tensor in index or tensor.startswith(PAD_PREFIX)
            if tensor in index:
                assert (begin + entry["data_offsets"][0]) % 4096 == 0
                assert entry["dtype"] == "U8"
                assert entry["shape"][1] % 512 == 0


def test_sketches_are_packed_as_the_page_says(converted) -> None:
    """Rules 12 to 14, decoded with integers from the words of the page alone."""
    model, folder = converted
    if not (folder / "gates.safetensors").exists():
        return  # an activation that is never exactly zero
    parameters = dict(model.named_parameters())
    with safe_open(folder / "gates.safetensors", "pt") as file:
        kinds = json.loads(file.metadata()["hf_flash.gates"])
        for block in find_blocks(model):
            assert kinds[block.path] == {"kind": "sketch", "bits": 5, "d_model": block.d_model}
            parts = {n: file.get_tensor(f"{block.path}.sketch.{n}") for n in ("codes", "step", "error", "norm")}
            part = block.gate or block.up
            weight = part.weight_of(parameters[part.key]).detach()
            assert torch.equal(Sketch(**parts, bits=5, d_model=block.d_model).norm, parts["norm"])
            for i in (0, block.d_ffn - 1):
                stream = int.from_bytes(bytes(parts["codes"][i].tolist()), "little")
                for j in range(block.d_model):
                    step = parts["step"][i, j // GROUP].item()
                    about = step * ((stream >> (5 * j)) % 32 - 16)
                    assert abs(about - weight[i, j].item()) < step
