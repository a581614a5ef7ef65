"""Repos: uploading a flash checkpoint, and loading one by its name, from a Hub on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_hub import (
    CAP,
    PROMPT,
    TOKEN,
    FakeHub,
    Repo,
    dense_tokens,
    make_tokenizer,
    run_python,
    save_stock,
    tiny_llama,
    tokens_of,
    use_hub,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_flash
from hf_flash import FlashConfig, hub
from hf_flash.errors import CheckpointError, HubError

FLASH = FlashConfig(memory=CAP)
SHARDS = ["flash-00001-of-00003.safetensors", "flash-00002-of-00003.safetensors", "flash-00003-of-00003.safetensors"]

# What a fresh process does with a repo: loads it, and prints its tokens.
LOAD = """
import sys, json, torch, hf_flash
from transformers import AutoModelForCausalLM
name, kwargs = sys.argv[1], json.loads(sys.argv[2])
if "memory" in kwargs:
    kwargs["quantization_config"] = hf_flash.FlashConfig(memory=kwargs.pop("memory"))
model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
prompt = torch.tensor({prompt})
out = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False
)
print("TOKENS", json.dumps(out[0].tolist()), json.dumps(sorted(map(str, model._hf_flash.files.values()))))
"""


def load_elsewhere(name: str, env: dict[str, str], **kwargs: object) -> tuple[list[int], list[str]]:
    """Tokens and flash files of a repo, loaded in a process of its own."""
    code = LOAD.replace("{prompt}", json.dumps(PROMPT.tolist()))
    code = code.replace("sys.argv[1]", repr(name)).replace("sys.argv[2]", repr(json.dumps(kwargs)))
    done = run_python(code, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, files = done.stdout.split("TOKENS", 1)[1].strip().split("] [")
    return json.loads(tokens + "]"), json.loads("[" + files)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("hub") / "stock", tiny_llama())


@pytest.fixture(scope="module")
def flash(stock: Path) -> Path:
    return hf_flash.repack(stock, stock.parent / "flash", max_shard_size="1KB", progress=False)


@pytest.fixture(scope="module")
def want(stock: Path) -> list[int]:
    return dense_tokens(stock)


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub, and this process pointed at it with an empty cache in tmp_path/home."""
    server = FakeHub()
    with use_hub(server, tmp_path / "home", monkeypatch):
        yield server
    server.close()


# Uploading ---------------------------------------------------------------------------------------------------------


def test_push_uploads_every_file(the_hub: FakeHub, flash: Path) -> None:
    url = hf_flash.push(flash, "user/repo", token=TOKEN)
    assert url.startswith(the_hub.url + "/user/repo/commit/")
    pushed = the_hub.files("user/repo")
    local = {p.name: p.read_bytes() for p in flash.iterdir()}
    assert set(SHARDS) < set(local)
    assert {name: pushed.get(name) for name in local} == local


def test_push_leaves_out_what_is_unfinished(the_hub: FakeHub, flash: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    hf_flash.repack(flash.parent / "stock", folder, progress=False)
    (folder / "flash-00009-of-00009.safetensors.partial").write_bytes(b"half")
    hf_flash.push(folder, "user/repo", token=TOKEN)
    assert not [name for name in the_hub.files("user/repo") if "partial" in name]


@pytest.mark.parametrize("pattern", ["config.json", SHARDS[1], "gates.safetensors", "model-00002-*"])
def test_push_refuses_an_incomplete_folder(the_hub: FakeHub, stock: Path, tmp_path: Path, pattern: str) -> None:
    folder = hf_flash.repack(stock, tmp_path / "flash", max_shard_size="50KB", progress=False)
    (path,) = folder.glob(pattern)
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        hf_flash.push(folder, "user/repo", token=TOKEN)
    assert "user/repo" not in the_hub.repos


@pytest.mark.parametrize("name", [SHARDS[1], "gates.safetensors", "model.safetensors"])
def test_push_refuses_a_torn_file(the_hub: FakeHub, stock: Path, tmp_path: Path, name: str) -> None:
    folder = hf_flash.repack(stock, tmp_path / "flash", max_shard_size="50KB", progress=False)
    path = next(iter(folder.glob(name)), None) or next(folder.glob("model-00002-*"))
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        hf_flash.push(folder, "user/repo", token=TOKEN)
    assert "user/repo" not in the_hub.repos


def test_push_without_login_says_so(the_hub: FakeHub, flash: Path) -> None:
    with pytest.raises(HubError, match="hf auth whoami"):
        hf_flash.push(flash, "user/repo")


def test_push_without_network_says_so(the_hub: FakeHub, flash: Path) -> None:
    the_hub.close()
    with pytest.raises(HubError, match=r"Uploading .* to user/repo failed"):
        hf_flash.push(flash, "user/repo", token=TOKEN)


def test_push_to_hub_of_a_model_on_flash(the_hub: FakeHub, flash: Path, want: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(flash, quantization_config=FLASH)
    model.push_to_hub("user/repo2", token=TOKEN, private=True)
    assert the_hub.repos["user/repo2"].private
    pushed = the_hub.files("user/repo2")
    wanted = {"config.json", "model.safetensors", "gates.safetensors", "flash.safetensors.index.json", *SHARDS}
    assert wanted <= set(pushed)
    assert pushed[SHARDS[0]] == (flash / SHARDS[0]).read_bytes()
    header = json.loads(pushed["model.safetensors"][8:][: int.from_bytes(pushed["model.safetensors"][:8], "little")])
    assert header["model.layers.2.mlp.down_proj.weight"]["shape"] == [0]  # the guard
    assert json.loads(pushed["config.json"])["quantization_config"]["quant_method"] == "hf_flash"
    assert "- hf_flash" in pushed["README.md"].decode()
    again = AutoModelForCausalLM.from_pretrained("user/repo2", token=TOKEN, quantization_config=FLASH)
    assert tokens_of(again) == want


def test_save_pretrained_with_push(the_hub: FakeHub, flash: Path, tmp_path: Path, want: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(flash, quantization_config=FLASH)
    folder = tmp_path / "saved"
    model.save_pretrained(folder, push_to_hub=True, repo_id="user/saved", token=TOKEN)
    assert set(SHARDS) | {"gates.safetensors", "config.json", "model.safetensors"} <= set(the_hub.files("user/saved"))
    # Saving again into the same folder leaves the links' times alone; transformers uploads by time.
    model.save_pretrained(folder, push_to_hub=True, repo_id="user/again", token=TOKEN)
    assert set(SHARDS) | {"gates.safetensors", "config.json", "model.safetensors"} <= set(the_hub.files("user/again"))
    again = AutoModelForCausalLM.from_pretrained("user/again", quantization_config=FLASH)
    assert tokens_of(again) == want


def test_patched_model_pushes_a_flash_checkpoint(the_hub: FakeHub, stock: Path, want: list[int]) -> None:
    model = hf_flash.patch(AutoModelForCausalLM.from_pretrained(stock), memory=CAP)
    model.push_to_hub("user/patched", token=TOKEN)
    del model
    again = AutoModelForCausalLM.from_pretrained("user/patched", quantization_config=FLASH)
    assert tokens_of(again) == want


# Loading -----------------------------------------------------------------------------------------------------------


def test_load_by_name_fetches_every_file_once(the_hub: FakeHub, flash: Path, want: list[int]) -> None:
    the_hub.add("user/repo", flash)
    model = AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)
    assert tokens_of(model) == want
    fetched = the_hub.downloads()
    weights = [path.name for path in flash.glob("*.safetensors*")]
    assert set(SHARDS) < set(weights)
    assert {name: fetched.count(name) for name in weights} == dict.fromkeys(weights, 1)
    assert "snapshots" in str(next(iter(model._hf_flash.files.values())))
    the_hub.log.clear()
    assert tokens_of(AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)) == want
    assert the_hub.downloads() == []


def test_pipeline_by_name(the_hub: FakeHub, flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_MEMORY", CAP)
    the_hub.add("user/repo", flash)
    the_hub.repos["user/repo"].private = True
    pipe = pipeline("text-generation", model="user/repo", token=TOKEN)
    assert hf_flash.is_flash(pipe.model)
    out = pipe("w3 w9", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert out.startswith("w3 w9")
    assert out.count("w") == 6


def test_offline_from_the_cache(the_hub: FakeHub, flash: Path, tmp_path: Path, want: list[int]) -> None:
    """A repo without gates.safetensors: it is the optional file that must not be asked for."""
    silu = save_stock(tmp_path / "silu", tiny_llama("silu"))
    the_hub.add("user/repo", hf_flash.repack(silu, tmp_path / "silu-flash", progress=False))
    model = AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)
    assert tokens_of(model) == dense_tokens(silu)
    assert model._hf_flash.gates_file is None
    env = the_hub.env(tmp_path / "home", HF_HUB_OFFLINE="1")
    the_hub.close()
    tokens, files = load_elsewhere("user/repo", env, memory=CAP)
    assert tokens == dense_tokens(silu)
    assert all(str(tmp_path / "home" / "hub") in name for name in files)


def test_local_files_only_makes_no_request(the_hub: FakeHub, flash: Path, want: list[int], tmp_path: Path) -> None:
    the_hub.add("user/repo", flash)
    cache = tmp_path / "elsewhere"
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(
            "user/repo", quantization_config=FLASH, cache_dir=cache, local_files_only=True
        )
    AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH, cache_dir=cache)
    the_hub.log.clear()
    model = AutoModelForCausalLM.from_pretrained(
        "user/repo", quantization_config=FLASH, cache_dir=cache, local_files_only=True
    )
    assert the_hub.log == []
    assert tokens_of(model) == want


def test_local_files_only_with_a_shard_not_cached(the_hub: FakeHub, flash: Path) -> None:
    the_hub.add("user/repo", flash)
    model = AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)
    model._hf_flash.files[SHARDS[2]].unlink()
    with pytest.raises(HubError, match=rf"{SHARDS[2]} of user/repo is not in the cache .*hf download user/repo"):
        AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH, local_files_only=True)
    AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)  # online it is fetched again


def test_cache_dir_holds_the_flash_files_too(the_hub: FakeHub, flash: Path, want: list[int], tmp_path: Path) -> None:
    the_hub.add("user/repo", flash)
    cache = tmp_path / "other-cache"
    model = AutoModelForCausalLM.from_pretrained("user/repo", cache_dir=cache, quantization_config=FLASH)
    assert tokens_of(model) == want
    assert all(path.is_relative_to(cache) for path in model._hf_flash.files.values())
    assert not (tmp_path / "home" / "hub" / "models--user--repo").exists()


@pytest.mark.parametrize("name_it", ["branch", "hash"])
def test_revision_gives_that_commit_s_flash_files(
    the_hub: FakeHub, flash: Path, want: list[int], tmp_path: Path, name_it: str
) -> None:
    """The branch `main` has other weights under the same names."""
    sha = the_hub.add("user/repo", flash, branch="v1")
    other = save_stock(tmp_path / "other", tiny_llama(rope_theta=5000.0, initializer_range=0.5, attention_bias=True))
    the_hub.add("user/repo", hf_flash.repack(other, tmp_path / "other-flash", max_shard_size="1KB", progress=False))
    revision = {"branch": "v1", "hash": sha}[name_it]
    model = AutoModelForCausalLM.from_pretrained("user/repo", revision=revision, quantization_config=FLASH)
    assert tokens_of(model) == want
    assert all(sha in str(path) for path in model._hf_flash.files.values())
    newest = AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)
    assert tokens_of(newest) == dense_tokens(other)


def test_private_repo_with_token(the_hub: FakeHub, flash: Path, want: list[int]) -> None:
    the_hub.add("user/secret", flash, private=True)
    with pytest.raises(OSError, match="token"):
        AutoModelForCausalLM.from_pretrained("user/secret", quantization_config=FLASH)
    model = AutoModelForCausalLM.from_pretrained("user/secret", token=TOKEN, quantization_config=FLASH)
    assert tokens_of(model) == want


def test_private_repo_with_stored_token(
    the_hub: FakeHub, flash: Path, want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    the_hub.add("user/secret", flash, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert tokens_of(AutoModelForCausalLM.from_pretrained("user/secret", quantization_config=FLASH)) == want


def test_subfolder(the_hub: FakeHub, flash: Path, want: list[int]) -> None:
    files = {f"flash/{p.name}": p.read_bytes() for p in flash.iterdir()}
    the_hub.repos["user/nested"] = Repo()
    the_hub.repos["user/nested"].commit(files)
    model = AutoModelForCausalLM.from_pretrained("user/nested", subfolder="flash", quantization_config=FLASH)
    assert tokens_of(model) == want


@pytest.mark.parametrize("name", [SHARDS[1], "flash.safetensors.index.json"])
def test_repo_without_a_flash_file_is_named(the_hub: FakeHub, flash: Path, name: str) -> None:
    the_hub.add("user/broken", flash, skip=name)
    with pytest.raises(HubError, match=rf"user/broken lacks {name} .*hf-flash push"):
        AutoModelForCausalLM.from_pretrained("user/broken", quantization_config=FLASH)


@pytest.mark.parametrize("what", ["flash", "stock"])
def test_plan_of_a_repo_before_it_is_fetched(the_hub: FakeHub, flash: Path, stock: Path, what: str) -> None:
    the_hub.add("user/repo", {"flash": flash, "stock": stock}[what])
    planned = hf_flash.plan("user/repo", memory=CAP)
    model = AutoModelForCausalLM.from_pretrained("user/repo", quantization_config=FLASH)
    assert planned.parts == model._hf_flash.plan.parts


# Stock repos -------------------------------------------------------------------------------------------------------


def cache_entries(home: Path) -> dict[str, list[tuple[str, int]]]:
    """The flash cache: folders, their files, and when those were written."""
    root = home / "hf_flash"
    return {
        folder.name: [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.name != ".lock"]
        for folder in sorted(root.iterdir())
    }


def test_stock_repo_is_repacked_once(the_hub: FakeHub, stock: Path, want: list[int], tmp_path: Path) -> None:
    the_hub.add("user/stock", stock)
    home = tmp_path / "home"
    model = AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
    assert tokens_of(model) == want
    first = cache_entries(home)
    (entry,) = first
    assert entry.startswith("stock-")
    assert [name for name, _ in first[entry]] == [
        "flash-00001-of-00001.safetensors", "flash.safetensors.index.json", "gates.safetensors"
    ]  # fmt: skip
    assert tokens_of(AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)) == want
    assert cache_entries(home) == first
    tokens, files = load_elsewhere("user/stock", the_hub.env(home), memory=CAP)
    assert tokens == want
    assert entry in files[0]
    assert cache_entries(home) == first


def test_new_revision_of_a_stock_repo_is_repacked(the_hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    the_hub.add("user/stock", stock)
    AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
    first = cache_entries(tmp_path / "home")
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    the_hub.add("user/stock", save_stock(tmp_path / "new", model))
    again = AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
    assert tokens_of(again) == dense_tokens(tmp_path / "new")
    second = cache_entries(tmp_path / "home")
    assert len(second) == 2
    assert first.items() <= second.items()


def test_new_readme_of_a_stock_repo_changes_nothing(the_hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    the_hub.add("user/stock", stock)
    AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
    first = cache_entries(tmp_path / "home")
    the_hub.repos["user/stock"].commit({"README.md": b"# New words\n"})
    AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
    assert cache_entries(tmp_path / "home") == first


def test_other_activation_of_the_same_weights_is_another_entry(stock: Path, tmp_path: Path) -> None:
    """Bug: the cache entry of a SiLU model was used for the ReLU one, which then had no sketches."""
    folder = save_stock(tmp_path / "model", tiny_llama("silu"))
    cache = tmp_path / "cache"
    config = FlashConfig(memory=CAP, cache_dir=cache)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert len(list(cache.iterdir())) == 1
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "hidden_act": "relu"}))
    certified = FlashConfig(memory=CAP, cache_dir=cache, gate="certified")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=certified)
    assert tokens_of(model) == dense_tokens(folder)
    assert len(list(cache.iterdir())) == 2


def test_cache_dir_of_the_config_and_of_the_environment(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "environment"))
    AutoModelForCausalLM.from_pretrained(stock, quantization_config=FLASH)
    AutoModelForCausalLM.from_pretrained(
        stock, quantization_config=FlashConfig(memory=CAP, cache_dir=tmp_path / "config")
    )
    assert len(list((tmp_path / "environment").iterdir())) == len(list((tmp_path / "config").iterdir())) == 1


def test_a_cache_entry_that_lost_a_file_is_made_again(
    the_hub: FakeHub, stock: Path, want: list[int], tmp_path: Path
) -> None:
    the_hub.add("user/stock", stock)
    model = AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
    for path in (*model._hf_flash.files.values(), model._hf_flash.gates_file):
        path.unlink()
        again = AutoModelForCausalLM.from_pretrained("user/stock", quantization_config=FLASH)
        assert tokens_of(again) == want
        assert again._hf_flash.gates_file is not None


def test_repack_of_a_repo(the_hub: FakeHub, stock: Path, want: list[int], tmp_path: Path) -> None:
    the_hub.add("user/stock", stock, private=True)
    with pytest.raises(HubError, match="no repo on the Hub that you may read"):
        hf_flash.repack("user/stock", tmp_path / "out", progress=False)
    out = hf_flash.repack("user/stock", tmp_path / "out", token=TOKEN, progress=False)
    assert tokens_of(AutoModelForCausalLM.from_pretrained(out, quantization_config=FLASH)) == want
    card = (out / "README.md").read_text()
    assert "base_model: user/stock" in card
    assert AutoTokenizer.from_pretrained(out)("w5 w6")["input_ids"] == make_tokenizer()("w5 w6")["input_ids"]


def test_repack_of_an_unknown_revision(the_hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    the_hub.add("user/stock", stock)
    with pytest.raises(HubError, match="no revision 'v7'"):
        hf_flash.repack("user/stock", tmp_path / "out", revision="v7", progress=False)


def test_repack_of_a_repo_with_bin_files_only(the_hub: FakeHub, stock: Path, tmp_path: Path) -> None:
    the_hub.add("user/old", stock, skip=".safetensors")
    the_hub.repos["user/old"].commit({"pytorch_model.bin": b"pickle"})
    with pytest.raises(HubError, match=r"user/old holds no safetensors files.*save_pretrained"):
        hf_flash.repack("user/old", tmp_path / "out", progress=False)
    assert "pytorch_model.bin" not in the_hub.downloads()


def test_repack_without_network(the_hub: FakeHub, tmp_path: Path) -> None:
    the_hub.close()
    with pytest.raises(HubError, match="the Hub could not be reached"):
        hf_flash.repack("user/stock", tmp_path / "out", progress=False)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./nowhere", "a/b/c"])
def test_no_such_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Give the folder of a checkpoint, or a Hub repo"):
        hub.local_folder(name or os.path.join("~", "none", "such"))
