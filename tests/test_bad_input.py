"""Whatever a user, a file or a device can do wrong: an error that names it and says what to do, never a wrong token."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_hub import CAP, dense_tokens, run_python, save_stock, tiny_llama, tokens_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_flash
from hf_flash import FlashConfig, attach
from hf_flash.errors import (
    CheckpointError,
    ChecksumError,
    FlashConfigError,
    FlashError,
    MemoryCapError,
    ReadError,
    ShortReadError,
    UnknownArchitectureError,
)
from hf_flash.format import TensorFileWriter, read_header, verify_file
from hf_flash.output import only_writer
from hf_flash.readers import ThreadReader
from hf_flash.store import LAYERS_KEY

FLASH = FlashConfig(memory=CAP)
SHARD = "flash-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("bad") / "stock", tiny_llama())


@pytest.fixture(scope="module")
def whole(stock: Path) -> Path:
    return hf_flash.repack(stock, stock.parent / "flash", max_shard_size="1KB", progress=False)


@pytest.fixture
def flash(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashConfig(memory=CAP, **options))


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


# Damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, "gates.safetensors", "model-00003-of-*.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 300, 0.5, -1])
def test_truncated_file(flash: Path, name: str, keep: float) -> None:
    (path,) = flash.glob(name)
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 1 or keep == 0 else int(size * keep) if keep > 0 else size + int(keep))
    with pytest.raises(CheckpointError, match=rf"{path.name} is truncated.*\d+ bytes"):
        load(flash)
    assert path.name in verify_file(path)[0]


@pytest.mark.parametrize("name", [SHARD, "gates.safetensors", "model-00003-of-*.safetensors"])
def test_file_with_something_appended(flash: Path, name: str) -> None:
    (path,) = flash.glob(name)
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=rf"{path.name} is longer than its header says"):
        load(flash)


@pytest.mark.parametrize("name", [SHARD, "gates.safetensors", "model-00003-of-*.safetensors"])
def test_missing_file(flash: Path, name: str) -> None:
    (path,) = flash.glob(name)
    path.unlink()
    if name == "gates.safetensors":
        with pytest.raises(FlashConfigError, match=r"no sketch for model\.layers\.0\.mlp"):
            load(flash, gate="certified")
    else:
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load(flash)


def test_missing_index(flash: Path) -> None:
    (flash / "flash.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"flash.safetensors.index.json is missing.*hf-flash repack MODEL"):
        load(flash)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"other": {}}'])
def test_damaged_index(flash: Path, text: str) -> None:
    (flash / "flash.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"flash.safetensors.index.json does not parse.*repack the checkpoint"):
        load(flash)


def test_missing_sketches_are_reported_not_passed_over(
    flash: Path, stock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Exact still, but every neuron is read: that must not be silent."""
    (flash / "gates.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        model = load(flash)
    (said,) = (record.getMessage() for record in caplog.records if "no sketch" in record.getMessage())
    assert "no sketch for model.layers.0.mlp and 2 more" in said
    assert tokens_of(model) == dense_tokens(stock)


def test_flipped_byte_in_a_bundle_is_found_by_verify(flash: Path) -> None:
    entry = read_header(flash / SHARD).entries["model.layers.1.mlp.bundles"]
    flip(flash / SHARD, entry.start + 100)
    (line,) = verify_file(flash / SHARD)
    assert re.search(rf"{SHARD}: bytes {entry.start} to \d+ \(tensor model.layers.1.mlp.bundles\)", line)
    assert verify_file(flash / "flash-00001-of-00003.safetensors") == []


def test_flipped_byte_at_the_end_is_found_at_load(flash: Path) -> None:
    flip(flash / SHARD, (flash / SHARD).stat().st_size - 1)
    with pytest.raises(ChecksumError, match=rf"{SHARD}: the last bytes differ.*hf-flash verify"):
        load(flash)


@pytest.mark.parametrize("name", [SHARD, "gates.safetensors", "model-00003-of-*.safetensors"])
@pytest.mark.parametrize("offset", [0, 1, 8, 20, 60, 200, 400])
def test_flipped_byte_in_a_header_is_found_at_load(flash: Path, name: str, offset: int) -> None:
    (path,) = flash.glob(name)
    flip(path, offset)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(flash)
    assert verify_file(path)


@pytest.mark.parametrize("part", ["nibbles", "plane5", "plane8", "step", "dither", "norm"])
def test_flipped_byte_in_a_sketch_is_found_at_load(flash: Path, part: str) -> None:
    """A damaged sketch would prove neurons silent that are not."""
    entry = read_header(flash / "gates.safetensors").entries[f"model.layers.1.mlp.sketch.{part}"]
    flip(flash / "gates.safetensors", entry.start + entry.n_bytes // 2)
    with pytest.raises(ChecksumError, match=rf"gates.safetensors: model.layers.1.mlp.sketch.{part} differs"):
        load(flash)


def test_every_single_flip_in_a_header_is_caught(whole: Path, tmp_path: Path) -> None:
    """Not one of them may pass as a whole file."""
    raw = (whole / SHARD).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text_end = raw.rindex(b"}", 0, end) + 1
    path = tmp_path / SHARD
    for offset in [*range(text_end), *range(text_end, end, 97)]:
        path.write_bytes(raw)
        flip(path, offset)
        assert verify_file(path), f"byte {offset} ({raw[offset : offset + 1]!r})"


# Packed bundles: kernels check nothing, so the lists that they follow are checked before ------------------------------


@pytest.fixture(scope="module")
def packable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, with weights in layer 1 that have no code."""
    model = tiny_llama("silu").bfloat16()
    with torch.no_grad():
        for i in (3, 3, 70, 255):
            model.model.layers[1].mlp.up_proj.weight[i, i % 64] = 1e-20
        model.model.layers[1].mlp.down_proj.weight[0, 3] = 1e-20
    return save_stock(tmp_path_factory.mktemp("packed") / "stock", model)


def repack_with(
    packable: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    specs: Any = None,
    layers: Any = None,
    data: Any = None,
) -> Path:
    """A checkpoint whose checksums fit, but not what it says of layer 1; each function changes something in place."""
    init, write = TensorFileWriter.__init__, TensorFileWriter.write

    def with_other_header(self: Any, path: Path, tensors: Any, metadata: dict[str, str], **rest: Any) -> None:
        if specs is not None:
            tensors = [specs(spec) if spec.name == ESCAPES else spec for spec in tensors]
        if layers is not None and LAYERS_KEY in metadata:
            found = json.loads(metadata[LAYERS_KEY])
            layers(found["model.layers.1.mlp.bundles"])
            metadata = {**metadata, LAYERS_KEY: json.dumps(found)}
        init(self, path, tensors, metadata, **rest)

    def with_other_data(self: Any, name: str, bytes_: Any) -> None:
        if data is not None and name == ESCAPES:
            pairs = np.frombuffer(bytes_, np.int32).reshape(-1, 2).copy()
            data(pairs)
            bytes_ = pairs.data
        write(self, name, bytes_)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFileWriter, "__init__", with_other_header)
        patch.setattr(TensorFileWriter, "write", with_other_data)
        return hf_flash.repack(packable, out, pack=True, progress=False)


ESCAPES = "model.layers.1.mlp.escapes"


def set_to(index: tuple[int, int], value: int) -> Callable[[Any], None]:
    return lambda pairs: pairs.__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs.__setitem__(slice(None), pairs[::-1].copy()), "is not in order"),
        (set_to((0, 0), -1), "is not in order"),
        (set_to((-1, 0), 256), "is not in order"),
        (set_to((0, 1), 192 << 16), "names weights that are not there"),
        (set_to((0, 1), -1), "names weights that are not there"),
    ],
    ids=["reversed", "neuron -1", "neuron 256", "position 192", "position 65535"],
)
def test_escapes_that_cannot_be(
    packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    folder = repack_with(packable, tmp_path / "out", monkeypatch, data=change)
    assert hf_flash.verify(folder, progress=False).problems == [], "the bytes are those that were written"
    with pytest.raises(CheckpointError, match=rf"{ESCAPES} {message}.*Repack"):
        load(folder)


@pytest.mark.parametrize("exponent", [-1, 241, 255, 7.5, "7", True])
def test_exponent_that_cannot_be(
    packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exponent: object
) -> None:
    folder = repack_with(packable, tmp_path / "out", monkeypatch, layers=lambda layer: layer.update(exponent=exponent))
    with pytest.raises(CheckpointError, match=r"does not fit its tensors.*Repack"):
        load(folder)


@pytest.mark.parametrize(
    "specs",
    [
        lambda spec: dataclasses.replace(spec, dtype="F32"),
        lambda spec: dataclasses.replace(spec, shape=(2, spec.shape[0])),
        lambda spec: dataclasses.replace(spec, shape=(spec.n_bytes // 4,)),
    ],
    ids=["dtype", "transposed", "flat"],
)
def test_escapes_of_another_kind(packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, specs: Any) -> None:
    folder = repack_with(packable, tmp_path / "out", monkeypatch, specs=specs)
    with pytest.raises(CheckpointError, match=rf"{ESCAPES} is .*expected I32 \[m, 2\]"):
        load(folder)


def test_escapes_that_are_not_there(packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repack_with(packable, tmp_path / "out", monkeypatch, layers=lambda layer: layer.update(module="other"))
    with pytest.raises(CheckpointError, match="does not fit its tensors"):
        load(folder)


def test_flipped_byte_in_the_escapes(packable: Path, tmp_path: Path) -> None:
    folder = hf_flash.repack(packable, tmp_path / "out", pack=True, progress=False)
    assert tokens_of(load(folder)) == dense_tokens(packable)
    (path,) = folder.glob("flash-*")
    entry = read_header(path).entries[ESCAPES]
    flip(path, entry.start + entry.n_bytes - 1)
    (line,) = hf_flash.verify(folder, progress=False).problems
    assert f"bytes {entry.start} to {entry.start + entry.n_bytes} (tensor {ESCAPES}) differ" in line
    with pytest.raises(ChecksumError, match=rf"{ESCAPES} differs from its checksum"):
        load(folder)


# Files that do not belong together ---------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 128}, "bundles of another shape"),
        ({"num_hidden_layers": 4}, "no bundles for model.layers.3.mlp"),
    ],
)
def test_config_of_another_model(flash: Path, change: dict[str, int], message: str) -> None:
    edit_config(flash, **change)
    with pytest.raises(CheckpointError, match=rf"{message}.*do not belong together.*Repack"):
        load(flash)


@pytest.mark.parametrize("name", [SHARD, "gates.safetensors", "model-00003-of-*.safetensors"])
def test_file_of_another_checkpoint_of_the_same_shape(flash: Path, tmp_path: Path, name: str) -> None:
    """Bug: it loaded, and answered with a mixture of two models."""
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.neg_()
    save_stock(tmp_path / "other", other, tokenizer=False)
    foreign = hf_flash.repack(tmp_path / "other", tmp_path / "other-flash", max_shard_size="1KB", progress=False)
    (path,) = foreign.glob(name)
    shutil.copyfile(path, flash / path.name)
    with pytest.raises(CheckpointError, match="were made from different checkpoints and do not belong together"):
        load(flash)


def test_saved_model_keeps_what_says_that_its_files_belong_together(flash: Path, tmp_path: Path) -> None:
    load(flash).save_pretrained(tmp_path / "saved")
    load(tmp_path / "saved")
    other = save_stock(tmp_path / "other", tiny_llama(initializer_range=0.1), tokenizer=False)
    foreign = hf_flash.repack(other, tmp_path / "other-flash", progress=False)
    shutil.copyfile(foreign / "model.safetensors", tmp_path / "saved" / "model.safetensors")
    with pytest.raises(CheckpointError, match="different checkpoints"):
        load(tmp_path / "saved")


# Without the import ------------------------------------------------------------------------------------------------

WITHOUT = """
import transformers, sys
from transformers import AutoModelForCausalLM
for kwargs in ({{}}, {{"dtype": "float32"}}, {{"use_safetensors": True}}):
    try:
        model = AutoModelForCausalLM.from_pretrained({folder!r}, **kwargs)
    except Exception as error:
        print("REFUSED", type(error).__name__, str(error).replace(chr(10), " ")[:4000])
    else:
        print("LOADED", model)
assert "hf_flash" not in sys.modules
"""


def test_without_the_import_transformers_refuses(whole: Path) -> None:
    done = run_python(WITHOUT.format(folder=str(whole)))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("REFUSED", "LOADED"))]
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("REFUSED"), line
        assert "mismatch" in line
    assert "import hf_flash" in (whole / "config.json").read_text()


# Arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "lots"}, "'lots' is not a size. Write bytes, or a size such as '4GiB'"),
        ({"memory": "4 parsecs"}, "is not a size"),
        ({"memory": 0}, "must be positive"),
        ({"memory": -5}, "must be positive"),
        ({"memory": True}, "is not a size"),
        ({"memory": float("nan")}, "is not a size"),
        ({"memory": float("inf")}, "is not a size"),
        ({"gate": "magic"}, "gate='magic' is unknown. Choose one of"),
        ({"gate": None}, "gate=None is unknown"),
        ({"delta": 1}, "0 <= delta < 1"),
        ({"delta": -0.1}, "0 <= delta < 1"),
        ({"delta": "x"}, "0 <= delta < 1"),
        ({"gate_bits": 3}, "4 to 8 bits"),
        ({"gate_bits": 8.0}, "4 to 8 bits"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"window": 1.5}, "window=1.5 must be a whole number"),
        ({"n_threads": "8"}, "n_threads='8' must be a whole number"),
        ({"context": 0}, "context=0 must be a"),
        ({"context": "long"}, "context='long' must be a"),
    ],
    ids=str,
)
def test_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlashConfigError, match=re.escape(message)):
        FlashConfig(**options)
    with pytest.raises(ValueError):
        FlashConfig(**options)


def test_bad_environment_variable(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_MEMORY", "plenty")
    with pytest.raises(FlashConfigError, match="HF_FLASH_MEMORY: 'plenty' is not a size"):
        AutoModelForCausalLM.from_pretrained(whole)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": "cuda:0"}, {"model": "cpu", "lm_head": "disk"}, {"": 0}])
def test_device_map_that_is_not_the_cpu(whole: Path, device_map: Any) -> None:
    with pytest.raises(FlashConfigError, match=r"hf_flash computes on the CPU.*Leave device_map out"):
        AutoModelForCausalLM.from_pretrained(whole, quantization_config=FLASH, device_map=device_map)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_device_map_of_the_cpu(whole: Path, stock: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=FLASH, device_map=device_map)
    assert tokens_of(model) == dense_tokens(stock)


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_cap_too_small_names_the_smallest(whole: Path, stock: Path, gate: str) -> None:
    with pytest.raises(MemoryCapError, match=r"The smallest cap that would do is .*hf-flash plan MODEL") as caught:
        load_capped(whole, 1 << 20, gate)
    smallest = int(re.search(r"pass memory=(\d+)", str(caught.value)).group(1))
    assert tokens_of(load_capped(whole, smallest, gate)) == dense_tokens(stock)
    with pytest.raises(MemoryCapError):
        load_capped(whole, smallest - (2 << 20), gate)


def load_capped(folder: Path, memory: int, gate: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FlashConfig(memory=memory, gate=gate))


# Sources that cannot be repacked -----------------------------------------------------------------------------------

MIXTRAL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4,
}  # fmt: skip
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize(
    "make", [lambda: MixtralForCausalLM(MixtralConfig(**MIXTRAL)), lambda: MambaForCausalLM(MambaConfig(**MAMBA))]
)
def test_model_without_known_ffns(make: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", make(), tokenizer=False)
    page = r"docs/adding-a-family\.md"
    with pytest.raises(UnknownArchitectureError, match=page):
        hf_flash.repack(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnknownArchitectureError, match=page):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=FLASH)
    with pytest.raises(UnknownArchitectureError, match=page):
        hf_flash.patch(AutoModelForCausalLM.from_pretrained(source), memory=CAP)


def test_unknown_class(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    edit_config(source, architectures=["NobodysForCausalLM"])
    with pytest.raises(UnknownArchitectureError, match=r"NobodysForCausalLM.*trust_remote_code"):
        hf_flash.repack(source, tmp_path / "out", progress=False)


def test_source_is_the_output(stock: Path) -> None:
    before = sorted(p.name for p in stock.iterdir())
    for output in (stock, stock / ".." / "stock"):
        with pytest.raises(CheckpointError, match=r"is the source itself; give another folder"):
            hf_flash.repack(stock, output, progress=False)
    assert sorted(p.name for p in stock.iterdir()) == before


def test_output_is_a_file(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; give the name of a folder"):
        hf_flash.repack(stock, tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_source_is_a_file(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a file; give the folder that holds config.json"):
        hf_flash.repack(stock / "model.safetensors", tmp_path / "out", progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_output_holds_a_stock_checkpoint(stock: Path, tmp_path: Path) -> None:
    other = save_stock(tmp_path / "other", tiny_llama("silu"))
    before = contents(other)
    with pytest.raises(CheckpointError, match=r"other holds another checkpoint; give a new or an empty folder"):
        hf_flash.repack(stock, other, progress=False)
    assert contents(other) == before


def test_output_holds_weights_without_config(stock: Path, tmp_path: Path) -> None:
    """Bug: they were overwritten."""
    (tmp_path / "out").mkdir()
    save_file({"mine": torch.ones(3)}, tmp_path / "out" / "model.safetensors")
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds another checkpoint \(model.safetensors was not made"):
        hf_flash.repack(stock, tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == before


def test_output_holds_a_flash_checkpoint_of_another_source(flash: Path, tmp_path: Path) -> None:
    """Bug: it was overwritten file by file; stopped half way, it was a mixture that loads."""
    other = save_stock(tmp_path / "other", tiny_llama("relu2"))
    before = contents(flash)
    with pytest.raises(CheckpointError, match=r"holds another checkpoint \(.*was not made from this source\)"):
        hf_flash.repack(other, flash, progress=False)
    assert contents(flash) == before


def test_output_is_being_written_by_another_process(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"), pytest.raises(CheckpointError, match="Another process writes to"):
        hf_flash.repack(stock, tmp_path / "out", progress=False)
    hf_flash.repack(stock, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("method", "word"), [("hf_flash", "a flash checkpoint already"), ("bnb", "quantized with 'bnb'")]
)
def test_source_is_quantized(stock: Path, tmp_path: Path, method: str, word: str) -> None:
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    edit_config(source, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=f"is {word}. Repack the original weights instead"):
        hf_flash.repack(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_source_stored_in_eight_bits(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    tensors = load_file(source / "model.safetensors")
    tensors = {k: v.to(torch.float8_e4m3fn) if ".mlp." in k else v for k, v in tensors.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp .*F8_E4M3.*start from the original weights"):
        hf_flash.repack(source, tmp_path / "out", progress=False)


def bin_only(stock: Path, folder: Path) -> Path:
    shutil.copytree(stock, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_source_with_bin_files_only(stock: Path, tmp_path: Path) -> None:
    source = bin_only(stock, tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"holds PyTorch \.bin files: convert them once with .*save_pretrained"):
        hf_flash.repack(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin.*save_pretrained, which writes safetensors"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=FLASH)


def test_source_lacks_a_shard(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", tiny_llama(), max_shard_size="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}, which model.safetensors.index.json names"):
        hf_flash.repack(source, tmp_path / "out", progress=False)


def test_source_lacks_a_matrix(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight was not found.*incomplete"):
        hf_flash.repack(source, tmp_path / "out", progress=False)


def test_source_is_truncated(stock: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        hf_flash.repack(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=FLASH)


def test_source_with_the_config_of_another_model(stock: Path, tmp_path: Path) -> None:
    """Bug: bundles were written until a count did not come out; a plain AssertionError, and half a checkpoint."""
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    edit_config(source, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"is \[\d+, \d+\] in .*model.safetensors and .* by config.json"):
        hf_flash.repack(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"do not belong together"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=FLASH)


@pytest.mark.parametrize("size", ["big", 0, "-5GB"])
def test_bad_shard_size(stock: Path, tmp_path: Path, size: Any) -> None:
    with pytest.raises(FlashConfigError, match="size"):
        hf_flash.repack(stock, tmp_path / "out", max_shard_size=size, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["", "{", None], ids=["empty", "torn", "missing"])
def test_source_with_a_bad_config(stock: Path, tmp_path: Path, config: str | None) -> None:
    source = Path(shutil.copytree(stock, tmp_path / "stock"))
    (source / "config.json").unlink() if config is None else (source / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|is missing: .* is no checkpoint)"):
        hf_flash.repack(source, tmp_path / "out", progress=False)


def test_save_to_a_model_that_is_not_on_flash(stock: Path) -> None:
    with pytest.raises(FlashError, match=r"does not run from flash.*hf_flash.patch"):
        hf_flash.stats(AutoModelForCausalLM.from_pretrained(stock))


# The device --------------------------------------------------------------------------------------------------------

BIG = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A flash checkpoint of 9 MiB, of which the smallest cap leaves most on flash, and its dense tokens."""
    source = save_stock(tmp_path_factory.mktemp("device") / "stock", tiny_llama(**BIG), tokenizer=False)
    return hf_flash.repack(source, source.parent / "flash", progress=False), dense_tokens(source)


@pytest.fixture
def by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader whose system calls can be made to fail from here."""
    monkeypatch.setattr(attach, "open_reader", lambda *args, **kwargs: ThreadReader(2))


def load_big(big: tuple[Path, list[int]], gate: str) -> Any:
    """Under the smallest cap."""
    try:
        load_capped(big[0], 1 << 20, gate)
    except MemoryCapError as error:
        smallest = int(re.search(r"pass memory=(\d+)", str(error)).group(1))
    return load_capped(big[0], smallest, gate)


@pytest.fixture
def preadv(monkeypatch: pytest.MonkeyPatch, by_threads: None) -> Iterator[list[Callable[..., int] | None]]:
    """A place for a function (real, fd, buffers, offset) -> n that stands in for os.preadv while it is set."""
    real, place = os.preadv, [None]

    def called(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if place[0] is None:
            return real(fd, buffers, offset, *flags)
        return place[0](real, fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", called)
    yield place
    place[0] = None


class FailingOnce:
    """A device whose nth read fails, and leaves rubbish in the buffers."""

    def __init__(self, nth: int) -> None:
        self._left, self._lock = nth, threading.Lock()
        self.failed: tuple[str, int] | None = None

    def __call__(self, real: Callable[..., int], fd: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            self._left -= 1
            fails = self._left == -1
        if not fails:
            return real(fd, buffers, offset)
        self.failed = Path(os.readlink(f"/proc/self/fd/{fd}")).name, offset
        for buffer in buffers:
            buffer[:] = b"\xff" * len(buffer)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.usefixtures("by_threads")
@pytest.mark.parametrize("gate", ["all", "certified"])
def test_the_small_cap_does_read_from_flash(big: tuple[Path, list[int]], gate: str) -> None:
    """What the tests below rest on."""
    model = load_big(big, gate)
    assert tokens_of(model) == big[1]
    before = hf_flash.stats(model).bytes_read
    assert tokens_of(model) == big[1]
    assert hf_flash.stats(model).bytes_read > before


@pytest.mark.parametrize("gate", ["all", "certified"])
@pytest.mark.parametrize("nth", [0, 1, 4, 9, 30])
def test_a_failing_read_is_reported_and_forgotten(
    big: tuple[Path, list[int]], preadv: list[Any], gate: str, nth: int
) -> None:
    """EIO at the nth read, cold and warm; then the device is well again."""
    model = load_big(big, gate)
    for _ in range(2):
        preadv[0] = device = FailingOnce(nth)
        with pytest.raises(ReadError, match="Input/output error") as caught:
            tokens_of(model)
        preadv[0] = None
        assert device.failed is not None
        assert "{} at offset {} failed".format(*device.failed) in str(caught.value)
        assert "hf-flash verify" in str(caught.value)
        assert caught.value.errno == errno.EIO
        assert tokens_of(model) == big[1]


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_a_dead_range_fails_every_time(big: tuple[Path, list[int]], preadv: list[Any], gate: str) -> None:
    """A bad block does not heal; no run through it gives tokens."""
    (name,) = (p.name for p in big[0].glob("flash-*"))
    entry = read_header(big[0] / name).entries["model.layers.1.mlp.bundles"]
    dead = entry.start + entry.n_bytes // 2

    def fail(real: Any, fd: int, buffers: list[memoryview], offset: int) -> int:
        here = os.readlink(f"/proc/self/fd/{fd}").endswith(name)
        if here and offset <= dead + 100 * 512 and dead < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    model = load_big(big, gate)
    preadv[0] = fail
    for _ in range(3):
        with pytest.raises(ReadError, match=name):
            tokens_of(model, 40)
    preadv[0] = None
    assert tokens_of(model) == big[1]


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_file_truncated_while_the_model_runs(
    big: tuple[Path, list[int]], by_threads: None, tmp_path: Path, gate: str
) -> None:
    copy = Path(shutil.copytree(big[0], tmp_path / "flash"))
    model = load_big((copy, big[1]), gate)
    (path,) = copy.glob("flash-*.safetensors")
    os.truncate(path, 8192)
    with pytest.raises(ShortReadError, match=rf"{path.name} ended early: wanted \d+ bytes.*hf-flash verify"):
        tokens_of(model, 40)


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_short_reads_and_interruptions(big: tuple[Path, list[int]], preadv: list[Any], gate: str) -> None:
    """Every read gives one block at most, and every third is interrupted: the same tokens."""
    count = [0]

    def short(real: Any, fd: int, buffers: list[memoryview], offset: int) -> int:
        count[0] += 1
        if count[0] % 3 == 0:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return int(real(fd, [buffers[0][:4096]], offset))

    model = load_big(big, gate)
    preadv[0] = short
    assert tokens_of(model, 3) == big[1][: 5 + 3]
    assert count[0] > 100


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_direct_reads_refused(
    big: tuple[Path, list[int]], by_threads: None, monkeypatch: pytest.MonkeyPatch, gate: str,
    caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    """Buffered reads instead, said once, and the same tokens."""
    copy = Path(shutil.copytree(big[0], tmp_path / f"flash-{gate}"))  # a folder that nothing was logged about
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING):
        model = load_big((copy, big[1]), gate)
    assert tokens_of(model) == big[1]
    assert caplog.text.count("refuses direct reads") == 1
    assert all(file.block == 1 for file in model._hf_flash.store.reader._files)
