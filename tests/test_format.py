"""Files are safetensors, aligned, covered by their checksums byte for byte, and whole or absent."""

import errno
import json
import os
import zlib
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from helpers_flash import FakeReader, random_bytes, write_layers
from hypothesis import given, settings
from safetensors import safe_open

from hf_flash.errors import CheckpointError, ChecksumError, DiskFullError, FlashError
from hf_flash.format import (
    PAD_PREFIX,
    TensorFileWriter,
    TensorSpec,
    atomic_text,
    read_header,
    verify_file,
)
from hf_flash.layout import DATA_ALIGN, BundleLayout
from hf_flash.store import LAYERS_KEY, FlashStore, flash_file_names, layers_of, write_index

SIZES = st.lists(st.integers(0, 9000), min_size=1, max_size=6)


def specs_of(sizes: list[int], run_bytes: int = 1000) -> list[TensorSpec]:
    return [TensorSpec(f"t{i}", "U8", (n,), n, run_bytes) for i, n in enumerate(sizes)]


def write(path: Path, sizes: list[int], run_bytes: int = 1000, aligned: bool = True, **metadata: str) -> list[bytes]:
    """A file of noise; returns each tensor's bytes."""
    data = [random_bytes((n,), seed=i).numpy().tobytes() for i, n in enumerate(sizes)]
    writer = TensorFileWriter(path, specs_of(sizes, run_bytes), metadata, aligned)
    for i, content in enumerate(data):
        if content:
            writer.write(f"t{i}", content)
    writer.finish()
    return data


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.safetensors"
    write(path, [5000, 300, 4096], note="x")
    return path


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 5000), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], run_bytes: int, aligned: bool
) -> None:
    path = tmp_path_factory.mktemp("format") / "a.safetensors"
    data = write(path, sizes, run_bytes, aligned, note="häh")
    file, raw = read_header(path), path.read_bytes()
    assert file.metadata["note"] == "häh"
    assert file.metadata["format"] == "pt"
    names = [name for name in file.entries if not name.startswith(PAD_PREFIX)]
    assert names == [f"t{i}" for i in range(len(sizes))]
    with safe_open(path, "pt") as stock:
        for name, content in zip(names, data, strict=True):
            entry = file.entries[name]
            assert raw[entry.start : entry.start + entry.n_bytes] == content
            assert bytes(stock.get_tensor(name).tolist()) == content
            assert not aligned or entry.start % DATA_ALIGN == 0
    assert file.data_start % DATA_ALIGN == 0
    assert verify_file(path) == []
    assert os.listdir(path.parent) == [path.name]


def test_progress_counts_every_byte(whole: Path) -> None:
    seen: list[int] = []
    verify_file(whole, seen.append)
    assert sum(seen) == whole.stat().st_size - read_header(whole).data_start


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A name to write damaged files under, and the bytes of a whole one."""
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    write(path, [5000, 300, 4096])
    return path, path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found(scratch: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = scratch[0], bytearray(scratch[1])
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 1200))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    problems = verify_file(path)
    assert problems
    assert all(str(path) in line for line in problems)
    if at >= 8192:  # past the header: the run is named
        assert any("differ from their checksum" in line for line in problems)


def test_damage_names_tensor_and_range(whole: Path) -> None:
    start = read_header(whole).entries["t2"].start
    with open(whole, "r+b") as file:
        file.seek(start + 1500)
        byte = file.read(1)
        file.seek(start + 1500)
        file.write(bytes([byte[0] ^ 255]))
    (problem,) = verify_file(whole)
    assert f"bytes {start + 1000} to {start + 2000} (tensor t2) differ" in problem


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_truncation_is_refused(scratch: tuple[Path, bytes], data: st.DataObject) -> None:
    path, content = scratch
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


def test_a_longer_file_is_refused(whole: Path) -> None:
    with open(whole, "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(whole)


def rewrite_header(path: Path, change) -> None:
    """Change the parsed header, keep its length, and give it a checksum that matches."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    change(header)
    header["__metadata__"]["hf_flash.header_crc32"] = "0" * 8
    text = json.dumps(header, separators=(",", ":")).encode().ljust(n)
    assert len(text) == n
    header["__metadata__"]["hf_flash.header_crc32"] = f"{zlib.crc32(text):08x}"
    path.write_bytes(raw[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(n) + raw[8 + n :])


@pytest.mark.parametrize("version", ["4", "10", "0", ""])
def test_another_format_version_is_refused(whole: Path, version: str) -> None:
    """Readers took any version for their own."""
    rewrite_header(whole, lambda header: header["__metadata__"].update({"hf_flash.format_version": version}))
    with pytest.raises(
        CheckpointError, match=rf"format {version}, this hf_flash reads formats 1, 2, 3.*pip install -U"
    ):
        read_header(whole)
    assert "pip install -U" in verify_file(whole)[0]


def test_a_file_without_a_version_is_stock_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "stock.safetensors")
    assert read_header(tmp_path / "stock.safetensors").entries["a"].shape == (3,)
    assert "carries no checksums" in verify_file(tmp_path / "stock.safetensors")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["t0"].update(data_offsets=[4000, 3000]),
        lambda h: h["t0"].update(data_offsets=[-8, 3000]),
        lambda h: h["t0"].update(data_offsets=[1]),
        lambda h: h["t0"].pop("shape"),
        lambda h: h.update(t0=7),
        lambda h: h["__metadata__"].update({"hf_flash.crc32": "{"}),
        lambda h: h["__metadata__"].update({"hf_flash.crc32": '{"t0": [1]}'}),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(whole: Path, change) -> None:
    rewrite_header(whole, change)
    with pytest.raises(CheckpointError, match="does not parse"):
        read_header(whole)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 100, b"\x04\0\0\0\0\0\0\0[1]]", b"\x02\0\0\0\0\0\0\0{]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="junk"):
        read_header(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)


def test_a_header_checksum_that_does_not_match_is_its_own_error(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes().replace(b'"note":"x"', b'"note":"y"'))
    with pytest.raises(ChecksumError, match="differs from its checksum"):
        read_header(whole)


# Writing


@pytest.mark.parametrize("n_done", [0, 1, 2, 3])
def test_an_interrupted_writer_goes_on(tmp_path: Path, n_done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, path = [5000, 300, 4096], tmp_path / "a.safetensors"
    data = [random_bytes((n,), seed=i).numpy().tobytes() for i, n in enumerate(sizes)]
    first = TensorFileWriter(path, specs_of(sizes), {}, aligned=True, identity="one")
    for i in range(n_done):
        first.write(f"t{i}", data[i])
    first.close()
    assert not path.exists()
    second = TensorFileWriter(path, specs_of(sizes), {}, aligned=True, identity="one")
    assert second.done == {f"t{i}" for i in range(n_done)}
    for i in range(n_done, 3):
        second.write(f"t{i}", data[i])
    second.finish()
    assert verify_file(path) == []
    write(tmp_path / "b.safetensors", sizes)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "spoil,n_left",
    [
        ("identity", 0), ("sizes", 0), ("journal gone", 0), ("journal torn", 1), ("journal junk", 2), ("bytes", 1),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_is_written_again(tmp_path: Path, spoil: str, n_left: int) -> None:
    sizes, path = [5000, 300, 4096], tmp_path / "a.safetensors"
    writer = TensorFileWriter(path, specs_of(sizes), {}, identity="one")
    writer.write("t0", bytes(5000))
    writer.write("t1", b"1" * 300)
    writer.close()
    journal, partial = tmp_path / "a.safetensors.partial.journal", tmp_path / "a.safetensors.partial"
    if spoil == "journal gone":
        journal.unlink()
    elif spoil == "journal torn":
        journal.write_text(journal.read_text()[:-20])
    elif spoil == "journal junk":
        journal.write_text(journal.read_text() + '["t9", [1]]\n{}\n')
    elif spoil == "bytes":
        content = bytearray(partial.read_bytes())
        content[content.index(b"111") + 2] = 0
        partial.write_bytes(content)
    again = TensorFileWriter(
        path, specs_of([5000, 300, 4097] if spoil == "sizes" else sizes), {},
        identity="two" if spoil == "identity" else "one",
    )  # fmt: skip
    assert len(again.done) == n_left
    again.close()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"a.safetensors: it needs .*free"):
        TensorFileWriter(tmp_path / "a.safetensors", specs_of([5000]), {})
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorFileWriter(tmp_path / "a.safetensors", specs_of([5000, 20]), {})
    writer.write("t1", bytes(20))

    def full(*args: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match="run the same command again"):
            writer.write("t0", bytes(5000))
    writer.close()
    assert TensorFileWriter(tmp_path / "a.safetensors", specs_of([5000, 20]), {}).done == {"t1"}


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, bytes(data[:777]), offset))
    write(tmp_path / "a.safetensors", [5000, 300])
    assert verify_file(tmp_path / "a.safetensors") == []


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with atomic_text(path) as parts:
        parts.append("old")
    with pytest.raises(RuntimeError), atomic_text(path) as parts:
        parts.append("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_text(path) as parts:
        parts += ["ne", "w"]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["config.json"]


# What a store makes of a header

LAYOUT = BundleLayout(10, 7, True, torch.float16)


@pytest.fixture
def flash(tmp_path: Path) -> Path:
    (path,) = write_layers(tmp_path, {"ffn": (LAYOUT, random_bytes((9, LAYOUT.row_bytes)))}).values()
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F64"},
        {"dtype": None},
        {"n_neurons": 8},
        {"d_model": 300},
        {"n_neurons": "9"},
        {"n_neurons": None},
        {"d_out": "7"},
    ],
)
def test_geometry_that_does_not_fit_the_tensor_is_refused(flash: Path, change: dict[str, object]) -> None:
    """Unknown dtypes and missing keys came out as KeyErrors."""

    def spoil(header: dict) -> None:
        layers = json.loads(header["__metadata__"][LAYERS_KEY])
        layers["ffn.bundles"].update(change)
        header["__metadata__"][LAYERS_KEY] = json.dumps(layers)

    rewrite_header(flash, spoil)
    with pytest.raises(CheckpointError, match="does not fit its tensors"):
        FlashStore({flash.name: flash}, FakeReader())


@pytest.mark.parametrize("layers", ["{", "[]", "{}x", '{"other.bundles": {}}', '{"ffn.bundles": 3}'])
def test_geometry_that_does_not_parse_is_refused(flash: Path, layers: str) -> None:
    rewrite_header(flash, lambda header: header["__metadata__"].update({LAYERS_KEY: layers}))
    with pytest.raises(CheckpointError, match=r"flash-00001"):
        layers_of(read_header(flash))


def test_a_file_without_geometry_holds_no_bundles(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no bundles"):
        FlashStore({whole.name: whole}, FakeReader())


def test_a_torn_end_is_seen_when_a_file_is_opened(flash: Path) -> None:
    content = bytearray(flash.read_bytes())
    content[-1] ^= 1
    flash.write_bytes(content)
    with pytest.raises(ChecksumError, match=r"torn.*hf-flash verify"):
        FlashStore({flash.name: flash}, FakeReader())


def test_a_folder_is_opened_by_its_index(flash: Path) -> None:
    with pytest.raises(CheckpointError, match="hf-flash repack"):
        flash_file_names(flash.parent)
    write_index(flash.parent, {"ffn.bundles": flash.name}, flash.stat().st_size)
    store = FlashStore.open_folder(flash.parent, FakeReader())
    assert store.layers["ffn"].layout == LAYOUT
    assert store.layers["ffn"].n_neurons == 9
    for text in ("{", "[]", '{"weight_map": 3}', "\xff"):
        (flash.parent / "flash.safetensors.index.json").write_bytes(text.encode("latin1"))
        with pytest.raises(FlashError, match="does not parse"):
            flash_file_names(flash.parent)
