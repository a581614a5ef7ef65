"""From stock checkpoints to flash checkpoints: every way in which transformers saves one, and what comes out."""

from __future__ import annotations

import filecmp
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_hub import (
    CAP,
    PROMPT,
    clean_env,
    dense_tokens,
    make_tokenizer,
    run_python,
    save_stock,
    tiny_llama,
    tiny_opt,
    tokens_of,
)
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import causal
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_flash
from hf_flash import FlashConfig, gate_file, native
from hf_flash.errors import DiskFullError
from hf_flash.families import FFNBlock
from hf_flash.format import PAD_PREFIX, TensorFileWriter, read_header, verify_file
from hf_flash.store import LAYERS_KEY, flash_file_names

FLASH = FlashConfig(memory=CAP)


def same_folders(one: Path, other: Path) -> list[str]:
    """Names of files that differ or are in one folder only."""
    names = sorted({p.name for folder in (one, other) for p in folder.iterdir()})
    _, differ, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return sorted(differ + missing)


def stock_tensors(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        out.update(load_file(path))
    return out


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("repack") / "stock", tiny_llama())


@pytest.fixture(scope="module")
def flash(stock: Path) -> Path:
    """Three flash files, four resident ones."""
    return hf_flash.repack(stock, stock.parent / "flash", max_shard_size="50KB", progress=False)


# Sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "saved"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"max_shard_size": "100KB"}),
        (lambda: tiny_llama(tie_word_embeddings=True), {}),
        (lambda: tiny_llama(tie_word_embeddings=True), {"max_shard_size": "100KB"}),
        (lambda: tiny_llama("silu").bfloat16(), {}),
        (lambda: tiny_llama(mlp_bias=True).half(), {}),
        (tiny_opt, {}),
        (tiny_opt, {"max_shard_size": "60KB"}),
    ],
    ids=["single", "sharded", "tied", "tied-sharded", "bf16-silu", "f16-bias", "opt", "opt-sharded"],
)
def test_sources(make: Callable[[], torch.nn.Module], saved: dict[str, str], tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", make(), **saved)
    assert (source / "model.safetensors.index.json").exists() == bool(saved)
    out = hf_flash.repack(source, tmp_path / "flash", progress=False)
    assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)) == dense_tokens(source)
    on_first_use = FlashConfig(memory=CAP, cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=on_first_use)
    assert tokens_of(model) == dense_tokens(source)


WIDE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192}
FAMILIES = {
    "llama": lambda: tiny_llama("silu"),
    "llama-relu": tiny_llama,
    "opt": tiny_opt,
    "phi3": lambda: causal("phi3", **WIDE, num_attention_heads=4, num_key_value_heads=2),
    "gpt2": lambda: causal("gpt2", n_embd=128, n_layer=2, n_head=4, n_positions=128),
    "glm": lambda: causal("glm", **WIDE, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "not a multiple of 64": lambda: causal("llama", **{**WIDE, "hidden_size": 96}, num_attention_heads=4),
}


def packed_layers(folder: Path) -> list[bool]:
    layers = [json.loads(read_header(folder / name).metadata[LAYERS_KEY]) for name in flash_file_names(folder)]
    return ["exponent" in layer for found in layers for layer in found.values()]


@pytest.mark.parametrize("built", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_or_not_the_tokens_are_the_dense_model_s(
    name: str, built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; packed by default where the native kernels are, on demand without them too."""
    if built and not native.available():
        pytest.skip("not built")
    source = save_stock(tmp_path / "stock", FAMILIES[name]().bfloat16())
    if not built:
        monkeypatch.setattr(native, "_lib", None)
    want = dense_tokens(source)
    can = name != "not a multiple of 64"
    for pack, packed in ((False, False), (True, can), (None, can and built)):
        out = hf_flash.repack(source, tmp_path / f"flash-{pack}", pack=pack, progress=False)
        assert set(packed_layers(out)) == {packed}
        assert hf_flash.verify(out, progress=False).ok
        assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)) == want
    on_first_use = FlashConfig(memory=CAP, cache_dir=tmp_path / "cache")
    assert tokens_of(AutoModelForCausalLM.from_pretrained(source, quantization_config=on_first_use)) == want


@pytest.mark.parametrize("cached", [True, False])
def test_files_of_an_older_version_are_made_anew(
    cached: bool, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: without the native kernels they passed for finished ones, whose sketches are not read any more."""
    monkeypatch.setattr(native, "_lib", None)
    module = importlib.import_module("hf_flash.repack")
    config = FlashConfig(memory=CAP, cache_dir=tmp_path / "cache")
    out = tmp_path / "flash"

    def gates() -> set[str]:
        if cached:
            model = AutoModelForCausalLM.from_pretrained(stock, quantization_config=config)
        else:
            hf_flash.repack(stock, out, progress=False)
            model = AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)
        assert tokens_of(model) == dense_tokens(stock)
        return set(hf_flash.stats(model).plan["gates"].values())

    def older_kinds(blocks: list[FFNBlock], bits: int) -> dict[str, dict[str, Any]]:
        kinds = gate_file.sketch_kinds(blocks, bits)
        return {path: {**kind, "kind": "sketch"} for path, kind in kinds.items()}

    with monkeypatch.context() as patch:
        patch.setattr(module, "sketch_kinds", older_kinds)
        patch.setattr(module, "_identity", lambda source, gate_bits: f"{source.identity()}-{gate_bits}")
        assert gates() == {"all"}
    assert gates() == {"certified"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_bfloat16_is_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", tiny_llama().to(dtype))
    assert set(packed_layers(hf_flash.repack(source, tmp_path / "flash", pack=True, progress=False))) == {False}


def test_layer_of_too_many_exponents_stays_as_it_is(tmp_path: Path) -> None:
    """Layer 1 alone: packing it would leave a list of escapes that takes more than it saves."""
    model = tiny_llama("silu").bfloat16()
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.mul_(torch.exp2(torch.randint(-60, 2, weight.shape)).bfloat16())
    source = save_stock(tmp_path / "stock", model)
    out = hf_flash.repack(source, tmp_path / "flash", pack=True, max_shard_size="50KB", progress=False)
    assert packed_layers(out) == [True, False, True]
    names = {name for path in out.glob("flash-*.safetensors") for name in read_header(path).entries}
    assert {name for name in names if name.endswith(".escapes")} == {f"model.layers.{i}.mlp.escapes" for i in (0, 2)}
    assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)) == dense_tokens(source)
    described = json.loads((out / "config.json").read_text())["quantization_config"]["ffn"]
    entries = [entry for path in out.glob("flash-*.safetensors") for entry in read_header(path).entries.values()]
    bundles = [entry.n_bytes for entry in entries if entry.name.endswith(".bundles")]
    assert described["flash_bytes"] == sum(bundles), "bug: it was said before it was known"
    again = hf_flash.repack(source, tmp_path / "flash", pack=True, max_shard_size="50KB", progress=False)
    assert packed_layers(again) == [True, False, True]


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
@pytest.mark.parametrize("with_head", [True, False])
def test_bare_model_and_model_with_head_share_a_checkpoint(
    make: Callable[[], torch.nn.Module], with_head: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: blocks were looked up by path alone, and the prefix comes and goes with the head."""
    model = make()
    source = save_stock(tmp_path / "stock", model if with_head else model.model, tokenizer=False)
    out = hf_flash.repack(source, tmp_path / "flash", progress=False)
    on_first_use = FlashConfig(memory=CAP, cache_dir=tmp_path / "cache")
    want = AutoModel.from_pretrained(source)(PROMPT)[0]
    for folder, config in ((out, FLASH), (source, on_first_use)):
        bare = AutoModel.from_pretrained(folder, quantization_config=config)
        assert hf_flash.is_flash(bare)
        torch.testing.assert_close(bare(PROMPT)[0], want, rtol=1e-4, atol=1e-5)
        full, info = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, output_loading_info=True)
        assert not [key for key in info["unexpected_keys"] if "mlp" in key or "fc" in key]
        torch.testing.assert_close(full.model(PROMPT)[0], want, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    bare.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", quantization_config=FLASH)
    torch.testing.assert_close(again(PROMPT)[0], want, rtol=1e-4, atol=1e-5)


# What comes out ----------------------------------------------------------------------------------------------------


def test_resident_tensors_are_the_source_s_bytes(stock: Path, flash: Path) -> None:
    source = stock_tensors(stock)
    resident = {k: v for p in flash.glob("model*.safetensors") for k, v in load_file(p).items()}
    assert set(resident) == set(source)
    for name, tensor in resident.items():
        if ".mlp." in name:
            assert tensor.shape == (0,), name
            assert tensor.dtype == source[name].dtype
        else:
            assert torch.equal(tensor.view(torch.uint8), source[name].view(torch.uint8)), name


def test_one_flash_file_per_layer_and_an_index(flash: Path) -> None:
    names = [f"flash-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert flash_file_names(flash) == names
    assert sorted(p.name for p in flash.glob("flash-*.safetensors")) == names
    index = json.loads((flash / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in flash.glob("model-*.safetensors")}


def test_alignment(flash: Path) -> None:
    for name in flash_file_names(flash):
        header = read_header(flash / name)
        bundles = [e for e in header.entries.values() if not e.name.startswith(PAD_PREFIX)]
        assert {e.name for e in bundles} == set(json.loads(header.metadata[LAYERS_KEY]))
        for entry in bundles:
            assert entry.start % 4096 == 0
            assert entry.shape[1] % 512 == 0
            assert entry.shape[0] * entry.shape[1] == entry.n_bytes


def test_alignment_with_several_layers_in_a_file(tmp_path: Path) -> None:
    """Rows of 1536 bytes, 130 of them: 4096 does not divide a layer."""
    source = save_stock(tmp_path / "stock", tiny_llama(hidden_size=96, intermediate_size=130), tokenizer=False)
    out = hf_flash.repack(source, tmp_path / "flash", progress=False)
    (name,) = flash_file_names(out)
    entries = read_header(out / name).entries
    starts = [e.start for e in entries.values() if not e.name.startswith(PAD_PREFIX)]
    assert len(starts) == 3
    assert all(start % 4096 == 0 for start in starts)
    assert any(e.startswith(PAD_PREFIX) for e in entries)
    assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)) == dense_tokens(source)


def test_safetensors_reads_every_file(stock: Path, flash: Path) -> None:
    source = stock_tensors(stock)
    for path in flash.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                if key.endswith(".bundles"):
                    layer = key.removesuffix(".bundles")
                    rows = tensor.view(torch.float32)
                    assert torch.equal(rows[:, :64], source[f"{layer}.gate_proj.weight"])
                    assert torch.equal(rows[:, 64:128], source[f"{layer}.up_proj.weight"])
                    assert torch.equal(rows[:, 128:192], source[f"{layer}.down_proj.weight"].T)
        assert verify_file(path) == []


def test_side_files_are_kept(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", tiny_llama())
    GenerationConfig(max_new_tokens=7, temperature=0.3, do_sample=True).save_pretrained(source)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    (source / "LICENSE").write_text("words")
    (source / "modeling_x.py").write_text("x = 1\n")
    (source / ".hidden").write_text("no")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    out = hf_flash.repack(source, tmp_path / "flash", progress=False)
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and name.name not in ("config.json", "model.safetensors", ".hidden", "pytorch_model.bin"):
            assert (out / name).read_bytes() == path.read_bytes(), name
    assert not (out / ".hidden").exists()
    assert not (out / "pytorch_model.bin").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH).generation_config.temperature == 0.3
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    quantization = now.pop("quantization_config")
    assert now == was
    assert "import hf_flash" in quantization["notice"]


@pytest.mark.parametrize(
    "tags",
    [
        "tags:\n- story\n- small",
        "tags: [story, small]",
        "tags:\n  - story\n  - small",
        "tags: [story,\n  small,\n]",
        "tags:\n- story\n- small\n- hf_flash",
    ],
    ids=["block", "flow", "indented", "flow in lines", "there already"],
)
def test_card_keeps_front_matter_and_gets_tags(tags: str, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    source = save_stock(tmp_path / "stock", tiny_llama(), tokenizer=False)
    front = f"license: mit\n{tags}\npipeline_tag: text-generation"
    (source / "README.md").write_text(f"---\n{front}\n---\n# Mine\n\nWords.\n")
    out = hf_flash.repack(source, tmp_path / "flash", progress=False)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert card.data.tags.count("hf_flash") == 1
    assert {"story", "small"} < set(card.data.tags)
    assert "Words." in card.text
    assert "import hf_flash" in card.text


def test_card_without_a_source_card(flash: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(flash / "README.md")
    assert card.data.tags == ["hf_flash"]
    assert card.data.base_model is None


# Running it again --------------------------------------------------------------------------------------------------


def test_running_it_again_writes_no_weights(stock: Path, flash: Path) -> None:
    times = {p.name: p.stat().st_mtime_ns for p in flash.glob("*.safetensors")}
    hf_flash.repack(stock, flash, max_shard_size="50KB", progress=False)
    assert {p.name: p.stat().st_mtime_ns for p in flash.glob("*.safetensors")} == times


@pytest.mark.parametrize("sizes", [("50KB", "5GB"), ("5GB", "50KB"), ("500KB", "590KB")])
def test_another_shard_size_leaves_nothing_behind(stock: Path, tmp_path: Path, sizes: tuple[str, str]) -> None:
    """Bugs: stale shards stayed; a shard of the same name and source was taken for done whatever it held."""
    for size in sizes:
        out = hf_flash.repack(stock, tmp_path / "flash", max_shard_size=size, progress=False)
    fresh = hf_flash.repack(stock, tmp_path / "fresh", max_shard_size=sizes[1], progress=False)
    assert same_folders(out, fresh) == []


def test_fewer_bits_of_the_same_source(stock: Path, tmp_path: Path) -> None:
    for bits in (8, 6):
        out = hf_flash.repack(stock, tmp_path / "flash", gate_bits=bits, progress=False)
    assert same_folders(out, hf_flash.repack(stock, tmp_path / "fresh", gate_bits=6, progress=False)) == []


def test_sketches_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    """An unfinished folder may be continued from any source; sketches of the old one must not stay."""
    relu = save_stock(tmp_path / "relu", tiny_llama(), tokenizer=False)
    out = hf_flash.repack(relu, tmp_path / "flash", progress=False)
    (out / "config.json").unlink()
    silu = save_stock(tmp_path / "silu", tiny_llama("silu"), tokenizer=False)
    hf_flash.repack(silu, out, progress=False)
    assert not (out / "gates.safetensors").exists()
    assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)) == dense_tokens(silu)


def test_saving_into_the_folder_that_is_being_read(tmp_path: Path) -> None:
    """Under the smallest cap most resident tensors are streamed from the very file that is written."""
    source = save_stock(tmp_path / "stock", tiny_llama("silu", hidden_size=256, vocab_size=4096), tokenizer=False)
    out = hf_flash.repack(source, tmp_path / "flash", progress=False)
    config = FlashConfig(memory=hf_flash.smallest_cap(out))
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=config)
    assert model._hf_flash.plan.streamed
    model.save_pretrained(out)
    assert tokens_of(model) == dense_tokens(source)
    assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=config)) == dense_tokens(source)


# Interrupted -------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Thrown into a repacking."""


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
    """Let `n` tensors be written, then fail."""
    write, left = TensorFileWriter.write, [n]

    def counted(self: TensorFileWriter, name: str, data: memoryview) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1
        write(self, name, data)

    monkeypatch.setattr(TensorFileWriter, "write", counted)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8, 9, 14, 17, 25, 26, 30, 40])
def test_interrupted_anywhere_and_continued(
    stock: Path, flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, n, Stop())
        with pytest.raises(Stop):
            hf_flash.repack(stock, tmp_path / "out", max_shard_size="50KB", progress=False)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert verify_file(path) == []  # a final name is a whole file
    assert not (tmp_path / "out" / "config.json").exists()
    out = hf_flash.repack(stock, tmp_path / "out", max_shard_size="50KB", progress=False)
    assert same_folders(out, flash) == []


def test_continuing_writes_only_what_is_missing(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: finished sketches were thrown away, and with them every bundle was written again."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3 * (1 + 8) + 4, Stop())  # bundles and sketches of three layers, then resident tensors
        with pytest.raises(Stop):
            hf_flash.repack(stock, tmp_path / "out", progress=False)
    written: list[str] = []
    write = TensorFileWriter.write
    monkeypatch.setattr(
        TensorFileWriter, "write", lambda self, name, data: (written.append(name), write(self, name, data))
    )
    hf_flash.repack(stock, tmp_path / "out", progress=False)
    assert written
    assert not [name for name in written if name.endswith(".bundles") or ".sketch." in name]


def test_what_another_source_left_is_not_used(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    save_stock(tmp_path / "other", other)
    with monkeypatch.context() as patch:
        stop_after(patch, 12, Stop())
        with pytest.raises(Stop):
            hf_flash.repack(tmp_path / "other", tmp_path / "out", max_shard_size="50KB", progress=False)
    out = hf_flash.repack(stock, tmp_path / "out", max_shard_size="50KB", progress=False)
    assert same_folders(out, hf_flash.repack(stock, tmp_path / "fresh", max_shard_size="50KB", progress=False)) == []


# A repacking that says when it has started and waits, so that it can be hit while it writes.
SLOW = """
import sys, time
import hf_flash
from hf_flash.format import TensorFileWriter
write = TensorFileWriter.write
def slow(self, name, data):
    write(self, name, data)
    print(name, flush=True)
    time.sleep(2)
TensorFileWriter.write = slow
hf_flash.repack({source!r}, {out!r}, max_shard_size="50KB", progress=False)
"""


def test_killed_and_continued(stock: Path, flash: Path, tmp_path: Path) -> None:
    """Ctrl-C and kill -9, each in the middle of the first file."""
    children = {}
    for how in (signal.SIGINT, signal.SIGKILL):
        code = SLOW.format(source=str(stock), out=str(tmp_path / how.name))
        children[how] = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env()
        )
    for how, child in children.items():
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "model.layers.0.mlp.bundles"
        child.send_signal(how)
        _, errors = child.communicate(timeout=60)
        assert child.returncode != 0, errors
        out = tmp_path / how.name
        left = {p.name for p in out.iterdir()}
        assert any(name.endswith(".partial") for name in left), left
        assert not [name for name in left if name.endswith((".json", ".md"))]
        hf_flash.repack(stock, out, max_shard_size="50KB", progress=False)
        assert same_folders(out, flash) == []


# A full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A tmpfs of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None and sys.platform == "linux"
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take all room but `leave` bytes."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave)
    return ballast


def test_no_room_is_seen_before_anything_is_written(stock: Path, small_disk: Path) -> None:
    fill(small_disk, 600_000)
    with pytest.raises(DiskFullError, match=r"No room in .*takes about .*KiB.* are free.*run the same command again"):
        hf_flash.repack(stock, small_disk / "out", progress=False)
    assert list((small_disk / "out").iterdir()) == []


@pytest.mark.parametrize("n_tensors", [1, 5, 11, 16, 20])
@pytest.mark.parametrize("leave", [0, 70_000])
def test_disk_fills_up_under_way(
    stock: Path, flash: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, n_tensors: int, leave: int
) -> None:
    write, left, ballast = TensorFileWriter.write, [n_tensors], []

    def counted(self: TensorFileWriter, name: str, data: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            ballast.append(fill(small_disk, leave))
        write(self, name, data)

    out = small_disk / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TensorFileWriter, "write", counted)
        with pytest.raises(DiskFullError, match=rf"No room in {out}.*Nothing was lost.*run the same command again"):
            hf_flash.repack(stock, out, max_shard_size="50KB", progress=False)
    for path in out.glob("*.safetensors"):
        assert verify_file(path) == []
    assert not (out / "config.json").exists()
    ballast[0].unlink()
    hf_flash.repack(stock, out, max_shard_size="50KB", progress=False)
    assert same_folders(out, flash) == []


def test_disk_fills_up_at_the_small_files(
    stock: Path, flash: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a plain OSError without a file name, once the weights were written."""
    module = importlib.import_module("hf_flash.repack")
    real, ballast = module.copy_side_files, []

    def late(source: Path, output: Path) -> None:
        ballast.append(fill(small_disk, 4096))
        real(source, output)

    out = small_disk / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_side_files", late)
        with pytest.raises(DiskFullError, match=f"No room in {out}"):
            hf_flash.repack(stock, out, max_shard_size="50KB", progress=False)
    assert not (out / "config.json").exists()
    ballast[0].unlink()
    hf_flash.repack(stock, out, max_shard_size="50KB", progress=False)
    assert same_folders(out, flash) == []


def test_disk_full_on_first_use(stock: Path, small_disk: Path) -> None:
    config = FlashConfig(memory=CAP, cache_dir=small_disk / "cache")
    ballast = fill(small_disk, 600_000)
    with pytest.raises(DiskFullError, match="No room in"):
        AutoModelForCausalLM.from_pretrained(stock, quantization_config=config)
    ballast.unlink()
    assert tokens_of(AutoModelForCausalLM.from_pretrained(stock, quantization_config=config)) == dense_tokens(stock)


# Memory ------------------------------------------------------------------------------------------------------------

PEAK = """
import os, json, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaConfig
import hf_flash

folder, layers, d, n = Path({folder!r}), 8, 1024, 4096
config = LlamaConfig(
    vocab_size=64, hidden_size=d, intermediate_size=n, num_hidden_layers=layers, num_attention_heads=8,
    num_key_value_heads=1, hidden_act="relu", architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
)
config.save_pretrained(folder)
weight_map = {{}}
generator = torch.Generator().manual_seed(0)
base = torch.randn(n * d, generator=generator).bfloat16() / 32
for layer in range(layers):
    p = f"model.layers.{{layer}}."
    tensors = {{
        p + "mlp.gate_proj.weight": base.roll(layer).view(n, d),
        p + "mlp.up_proj.weight": base.roll(layer + 9).view(n, d),
        p + "mlp.down_proj.weight": base.roll(layer + 99).view(d, n), p + "self_attn.q_proj.weight": torch.zeros(d, d),
        p + "self_attn.k_proj.weight": torch.zeros(d // 8, d), p + "self_attn.v_proj.weight": torch.zeros(d // 8, d),
        p + "self_attn.o_proj.weight": torch.zeros(d, d), p + "input_layernorm.weight": torch.ones(d),
        p + "post_attention_layernorm.weight": torch.ones(d),
    }}
    if layer == 0:
        tensors |= {{"model.embed_tokens.weight": torch.zeros(64, d), "model.norm.weight": torch.ones(d)}}
    name = f"model-{{layer + 1:05d}}-of-{{layers:05d}}.safetensors"
    save_file({{k: v.bfloat16() for k, v in tensors.items()}}, folder / name, metadata={{"format": "pt"}})
    weight_map |= dict.fromkeys(tensors, name)
(folder / "model.safetensors.index.json").write_text(json.dumps({{"metadata": {{}}, "weight_map": weight_map}}))
del tensors, base

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field + ":"))
    return int(line.split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident now
before = status("VmRSS")
hf_flash.repack(folder, folder.parent / "flash", progress=False)
print("PEAK", status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs")
def test_memory_is_one_layer_s_not_the_model_s(tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    done = run_python(PEAK.format(folder=str(tmp_path / "stock")))
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.split("PEAK")[1])
    ffn = sum((tmp_path / "flash" / name).stat().st_size for name in flash_file_names(tmp_path / "flash"))
    layer = 3 * 1024 * 4096 * 2  # as it is stored; packed, it is less
    assert ffn > 150e6
    assert grown < 4 * layer, f"grew by {grown / 1e6:.0f} MB; a layer is {layer / 1e6:.0f} MB, all are {ffn / 1e6:.0f}"
