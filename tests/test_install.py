"""Both installs: with a C++ compiler the kernels are built; without one the package installs all the same and works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Run by the installed package, far from the checkout: repack the shipped model, generate, say what was there.
PROGRAM = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_flash
from hf_flash import native
torch.set_num_threads(1)
source = Path(hf_flash.__file__).parent / "models" / "relu-books-5m"
folder = hf_flash.repack(source, sys.argv[1], progress=False)
config = hf_flash.FlashConfig(memory="256MiB", context=64, gate="certified")
ids = AutoTokenizer.from_pretrained(source)("It was a dark night", return_tensors="pt").input_ids
def write(model):
    return model.generate(ids, do_sample=False, max_new_tokens=8).tolist()
flash = write(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
dense = write(AutoModelForCausalLM.from_pretrained(source))
print(json.dumps({"file": hf_flash.__file__, "native": native.available(), "same": flash == dense}))
"""


def compiler() -> str | None:
    """The C++ compiler that setuptools would take."""
    name = os.environ.get("CXX") or str(sysconfig.get_config_var("CXX") or "c++")
    return shutil.which(name.split()[0]) or shutil.which("c++")


@pytest.mark.slow
@pytest.mark.parametrize("with_compiler", [False, True], ids=["without a compiler", "with a compiler"])
def test_install_and_generate(with_compiler: bool, tmp_path: Path) -> None:
    found = compiler()
    if with_compiler and found is None:
        pytest.skip("there is no C++ compiler here")
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_flash", source / "hf_flash", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env.pop("HF_FLASH_NATIVE", None)
    if not with_compiler:
        env.update(CC="/bin/false", CXX="/bin/false")
    elif "CXX" not in env:
        env["CXX"] = str(found)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], env=env, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert bool(list((target / "hf_flash" / "_native").glob("kernels*.so"))) == with_compiler, done.stdout

    env.update(PYTHONPATH=str(target), HF_HUB_OFFLINE="1", HF_FLASH_CACHE=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "flash")], env=env, cwd=tmp_path,
                          capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(said["file"]).is_relative_to(target)
    assert said["native"] == with_compiler and said["same"]
    words = "native kernels" if with_compiler else "torch operations"
    assert done.stderr.count(f"hf_flash: computing with {words}") == 1, done.stderr
    assert done.stderr.count("hf_flash: computing with ") == 1
