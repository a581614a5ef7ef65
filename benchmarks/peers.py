"""What the sides of a comparison need before the clock starts: packages, and the weights in their formats.

airllm and llama-cpp-python are looked for among the installed packages and in the folder `peers` beside the models, so
that they need not disturb the environment under test:

    pip install --target ~/.cache/hf_flash-bench/peers --no-deps airllm==4.0.0 llama-cpp-python==0.3.36 diskcache

(llama-cpp-python is compiled for the machine; that takes minutes.) A side that is not there, or cannot run a model, is
a line in the table that says why.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import gguf_files
import models

PEERS = ("accelerate", "accelerate-plain", "mmap", "airllm", "airllm-nogc", "llama.cpp")
PACKAGES = {"airllm": "airllm", "airllm-nogc": "airllm", "llama.cpp": "llama_cpp"}
VERSIONS = {"airllm": "airllm", "llama_cpp": "llama_cpp_python"}


def folder(models_dir: str | os.PathLike | None = None) -> Path:
    """Where peers may be installed without being in the environment."""
    return models.cache_dir(models_dir) / "peers"


def found(package: str, models_dir: str | os.PathLike | None = None) -> bool:
    """Whether a package is installed, or in the peers' folder."""
    return importlib.util.find_spec(package) is not None or (folder(models_dir) / package).is_dir()


def versions(models_dir: str | os.PathLike | None = None) -> dict[str, str]:
    """Versions of the peers that are there, for the JSON line."""
    places = [str(folder(models_dir)), *sys.path]
    kept = {}
    for package, distribution in VERSIONS.items():
        for made in importlib.metadata.distributions(name=distribution, path=places):
            kept[package] = made.version
    return kept


def config_of(model_dir: str | os.PathLike) -> dict[str, Any]:
    return json.loads((Path(model_dir) / "config.json").read_text())


def why_not(side: str, spec: dict[str, Any], models_dir: str | os.PathLike | None = None) -> str | None:
    """Why a side cannot run a model here; None if it can."""
    package = PACKAGES.get(side)
    if package and not found(package, models_dir):
        return f"not run: {package} is not installed"
    if side == "llama.cpp" and not found("gguf", models_dir):
        return "not run: gguf, which writes the file for llama.cpp, is not installed"
    if package == "airllm" and config_of(spec["model_dir"])["model_type"] != "llama":
        return "not run: AirLLM 4.0.0 looks for model.layers, which an OPT does not have"
    return None


def prepare(side: str, spec: dict[str, Any], models_dir: str | os.PathLike | None = None) -> dict[str, Any]:
    """Make what a side needs, and return the spec with it; nothing here is capped or timed."""
    model_dir = Path(spec["model_dir"])
    if side in PACKAGES:
        path = str(folder(models_dir))
        spec = {**spec, "peers_path": [path], "libraries": libraries(PACKAGES[side], models_dir)}
    if side.startswith("airllm"):
        spec["split_dir"] = str(model_dir.with_name(f"{model_dir.name}-airllm"))
        if not (Path(spec["split_dir"]) / "splitted_model" / "done").exists():
            command = [sys.executable, str(common.HERE / "airllm_side.py"), json.dumps({**spec, "side": side})]
            env = {**os.environ, "TQDM_DISABLE": "1"}
            Path(spec["split_dir"]).mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True, capture_output=True, env=env)
            (Path(spec["split_dir"]) / "splitted_model" / "done").touch()
    if side == "llama.cpp":
        gguf_dir = model_dir.with_name(f"{model_dir.name}-gguf")
        config = config_of(model_dir)
        spec["gguf"] = str(gguf_files.write(model_dir, gguf_dir / "model-bf16.gguf"))
        spec |= {"gguf_dir": str(gguf_dir), "n_vocab": config["vocab_size"], "never": end_of_text(model_dir)}
    return spec


def end_of_text(model_dir: Path) -> list[int]:
    """Tokens that generate() suppresses until it has made enough."""
    file = model_dir / "generation_config.json"
    ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def libraries(package: str, models_dir: str | os.PathLike | None = None) -> list[str]:
    """A peer's shared libraries and sources: warmed before a run like the interpreter's own."""
    spec = importlib.util.find_spec(package)
    root = Path(spec.origin).parent if spec and spec.origin else folder(models_dir) / package
    return [str(file) for file in sorted(root.rglob("*")) if file.suffix in (".so", ".py", ".pyc")]


def reference(side: str, spec: dict[str, Any]) -> str:
    """The dense side whose tokens a side must give: llama.cpp runs an OPT's weights with GELU (gguf_files.py)."""
    opt = config_of(spec["model_dir"])["model_type"] == "opt"
    return "dense-gelu" if side == "llama.cpp" and opt else "dense"


def drop_copies(model_dir: str | os.PathLike) -> None:
    """Delete the copies that `prepare` made of a model."""
    model_dir = Path(model_dir)
    for ending in ("-airllm", "-gguf"):
        shutil.rmtree(model_dir.with_name(model_dir.name + ending), ignore_errors=True)
