"""`verify` finds every flipped, missing or added byte, and files that do not belong together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_hub import save_stock, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hf_flash
from hf_flash import FlashConfig
from hf_flash.errors import CheckpointError
from hf_flash.format import PAD_PREFIX, read_header

D_FFN = 82  # rows of 1024 bytes: layers end in the middle of a page, so there is padding


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("verify") / "stock", tiny_llama(intermediate_size=D_FFN))


@pytest.fixture(scope="module")
def whole(stock: Path) -> Path:
    """Two flash files, the first with two layers and padding between them, and a sharded resident part."""
    folder = hf_flash.repack(stock, stock.parent / "flash", max_shard_size="180KB", progress=False)
    files = {path.name for path in folder.glob("*.safetensors")}
    assert {"flash-00001-of-00002.safetensors", "gates.safetensors", "model-00001-of-00002.safetensors"} <= files
    assert any(name.startswith(PAD_PREFIX) for name in read_header(folder / "flash-00001-of-00002.safetensors").entries)
    return folder


@pytest.fixture
def flash(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "flash"))


def problems(folder: Path) -> list[str]:
    return hf_flash.verify(folder, progress=False).problems


def test_whole(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = hf_flash.verify(whole)
    assert report.ok and report.problems == report.notes == []
    assert {file.name: file.role for file in report.files} == {
        "flash-00001-of-00002.safetensors": "flash", "flash-00002-of-00002.safetensors": "flash",
        "gates.safetensors": "sketches", "model-00001-of-00002.safetensors": "resident",
        "model-00002-of-00002.safetensors": "resident",
    }  # fmt: skip
    assert report.n_bytes == sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "Verifying" in capsys.readouterr().err


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found(whole: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(whole.glob("*.safetensors"))))
    size, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    offset = data.draw(st.one_of(st.integers(0, 7), st.integers(8, header - 1), st.integers(0, size - 1)))
    flip = data.draw(st.one_of(st.sampled_from([1 << i for i in range(8)]), st.integers(1, 255)))
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        try:
            file.seek(offset)
            file.write(bytes([byte[0] ^ flip]))
            file.flush()
            found = problems(whole)
        finally:
            file.seek(offset)
            file.write(byte)
    assert found, (path.name, offset, flip)
    assert path.name in found[0]


def test_padding_is_covered(flash: Path) -> None:
    path = flash / "flash-00001-of-00002.safetensors"
    entries = read_header(path).entries
    pad = next(entry for name, entry in entries.items() if name.startswith(PAD_PREFIX))
    for offset in (pad.start, pad.start + pad.n_bytes - 1):
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        assert PAD_PREFIX in problems(flash)[0]
        data[offset] ^= 1
        path.write_bytes(data)
    assert problems(flash) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_missing_or_added_byte_is_found(whole: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(whole.glob("*.safetensors"))))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    change: Callable[[], bytes] = data.draw(
        st.sampled_from(
            [
                lambda: content[:at],  # truncated
                lambda: content[:at] + content[at + 1 :],  # a byte lost
                lambda: content[:at] + b"\0" + content[at:],  # a byte too many
                lambda: content + b"\0" * (at + 1),
                lambda: content[:at] + b"\0" * (len(content) - at) if any(content[at:]) else b"",  # a hole
            ]
        )
    )
    try:
        path.write_bytes(change())
        assert problems(whole), path.name
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("flash-00002-of-00002.safetensors", "flash.safetensors.index.json names it"),
        ("model-00002-of-00002.safetensors", "model.safetensors.index.json names"),
        ("gates.safetensors", "is missing or lacks sketches"),
        ("flash.safetensors.index.json", "is missing"),
        ("model.safetensors.index.json", "holds no model.safetensors"),
        ("config.json", "is missing"),
    ],
)
def test_missing_file(flash: Path, name: str, word: str) -> None:
    (flash / name).unlink()
    found = problems(flash)
    assert any(name in problem or str(flash) in problem for problem in found)
    assert any(word in problem for problem in found), found


def test_interrupted_repack_says_go_on(flash: Path) -> None:
    (flash / "flash.safetensors.index.json").unlink()
    (flash / "flash-00002-of-00002.safetensors").rename(flash / "flash-00002-of-00002.safetensors.partial")
    assert any("run the same `hf-flash repack` again to go on" in problem for problem in problems(flash))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"quantization_config": {"quant_method": "awq"}}'])
def test_damaged_config(flash: Path, text: str) -> None:
    (flash / "config.json").write_text(text)
    assert "config.json" in problems(flash)[0]


def test_config_of_another_shape(flash: Path) -> None:
    config = json.loads((flash / "config.json").read_text())
    (flash / "config.json").write_text(json.dumps({**config, "intermediate_size": D_FFN + 1}))
    assert "another shape" in problems(flash)[0]
    (flash / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "no bundles for model.layers.3.mlp" in problems(flash)[0]


@pytest.mark.parametrize("index", ["flash.safetensors.index.json", "model.safetensors.index.json"])
def test_index_that_names_what_is_not_there(flash: Path, index: str) -> None:
    listed = json.loads((flash / index).read_text())
    tensor, file = next(iter(listed["weight_map"].items()))
    listed["weight_map"][f"{tensor}.more"] = file
    (flash / index).write_text(json.dumps(listed))
    assert f"{tensor}.more" in problems(flash)[0]


def test_index_that_leaves_a_layer_out(flash: Path) -> None:
    index = flash / "flash.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["model.layers.0.mlp.bundles"]
    index.write_text(json.dumps(listed))
    assert "model.layers.0.mlp.bundles is not listed" in problems(flash)[0]


@pytest.mark.parametrize("name", ["gates.safetensors", "flash-00002-of-00002.safetensors"])
def test_file_of_another_checkpoint(flash: Path, tmp_path: Path, name: str) -> None:
    other = save_stock(tmp_path / "other", tiny_llama(intermediate_size=D_FFN, initializer_range=0.1))
    foreign = hf_flash.repack(other, tmp_path / "other-flash", max_shard_size="180KB", progress=False)
    shutil.copyfile(foreign / name, flash / name)
    assert "different checkpoints" in problems(flash)[0]


def test_stray_file_is_a_note(flash: Path) -> None:
    shutil.copyfile(flash / "flash-00002-of-00002.safetensors", flash / "flash-00009-of-00009.safetensors")
    report = hf_flash.verify(flash, progress=False)
    assert report.ok and "flash-00009-of-00009.safetensors is named by no index" in report.notes[0]


def test_saved_again(whole: Path, tmp_path: Path) -> None:
    """Resident files that transformers writes get checksums like our own."""
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=FlashConfig(memory="64MiB"))
    model.save_pretrained(tmp_path / "saved")
    report = hf_flash.verify(tmp_path / "saved", progress=False)
    assert report.problems == []
    assert all(file.checked for file in report.files) and report.notes == []


def test_no_flash_checkpoint(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a stock checkpoint.*hf-flash repack"):
        hf_flash.verify(stock)
    with pytest.raises(CheckpointError, match="is missing"):
        hf_flash.verify(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        hf_flash.verify(tmp_path / "nothing")


def test_model_that_is_not_known_here(flash: Path) -> None:
    """Bytes can be checked without the model's class; that its shape was not is said."""
    config = json.loads((flash / "config.json").read_text())
    (flash / "config.json").write_text(json.dumps({**config, "model_type": "nosuch", "architectures": ["NoSuch"]}))
    report = hf_flash.verify(flash, progress=False)
    assert report.ok and "was not checked" in report.notes[0]
