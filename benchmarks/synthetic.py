"""SYNTHETIC models: the shapes of real ones, RANDOM weights, written shard by shard (memory for one layer).

They are for measuring bytes and seconds, never quality. The Llama shapes hold nothing but noise; the OPT shapes have
the sparsity of OPT-6.7B planted (planted.py). The large ones are made only when somebody names them.
"""

# ruff: noqa: PLC0415  (heavy packages are imported where they are used)
from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import planted
from shards import ShardWriter, generator_for

RANDOM_CARD = """# {name}: RANDOM WEIGHTS

Synthetic. Every weight of this folder was drawn at random (normal, standard deviation {std}, seed {seed}) by
`benchmarks/synthetic.py`. It has the shape of a real model and the meaning of none: it is for measuring bytes and
seconds, never quality.
"""
# hidden size, FFN size, layers, heads, key-value heads, vocabulary, positions
LLAMAS = {
    "random-llama": (2048, 8192, 16, 32, 8, 32000, 2048),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192),
    "tiny": (64, 1024, 4, 4, 2, 512, 512),
}
# hidden size, layers, heads, vocabulary (the FFN is four times as wide), the real model
OPTS = {
    "opt-125m": (768, 12, 12, 50272, "facebook/opt-125m"),
    "opt-350m": (1024, 24, 16, 50272, "facebook/opt-350m (which has its norms elsewhere)"),
    "opt-1.3b": (2048, 24, 32, 50272, "facebook/opt-1.3b"),
    "opt-2.7b": (2560, 32, 32, 50272, "facebook/opt-2.7b"),
    "opt-6.7b": (4096, 32, 32, 50272, "facebook/opt-6.7b"),
    "tiny-opt": (64, 4, 4, 512, "no real model"),
}


def llama_config(name: str) -> Any:
    """A bf16 LlamaConfig without special tokens: greedy generation never stops early."""
    from transformers import LlamaConfig

    d, d_ffn, n_layers, heads, kv_heads, vocab, positions = LLAMAS[name]
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(
        hidden_size=d, intermediate_size=d_ffn, num_hidden_layers=n_layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=positions,
        **no_tokens, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def llama_layer_shapes(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
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


def write_llama(out_dir: str | os.PathLike, config: Any, seed: int = 0, std: float = 0.02) -> Path:
    """Write a random Llama, one shard per layer; return the folder."""
    import torch

    d, vocab, n_layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    shapes: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, d)}]
    shapes += [llama_layer_shapes(config, layer) for layer in range(n_layers)]
    shapes += [{"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}]
    shards = ShardWriter(Path(out_dir), len(shapes))
    for number, shard in enumerate(shapes, start=1):
        generator = generator_for(seed, number)
        tensors = {}
        for name, shape in shard.items():
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 2:
                tensor.normal_(0.0, std, generator=generator)
            tensors[name] = tensor
        shards.add(tensors)
    shards.finish(RANDOM_CARD.format(name=Path(out_dir).name, std=std, seed=seed))
    config.save_pretrained(out_dir)
    return Path(out_dir)


def random_llama(out_dir: str | os.PathLike, name: str) -> Path:
    """Build the RANDOM Llama of shape `name` if it is not there; return the folder."""
    if not (Path(out_dir) / "config.json").is_file():
        write_llama(out_dir, llama_config(name), std=0.1 if name == "tiny" else 0.02)
    return Path(out_dir)


def planted_opt(out_dir: str | os.PathLike, name: str, firing: float = 0.03) -> Path:
    """Build the SYNTHETIC OPT of shape `name`, `firing` of its neurons active, if not there; return the folder."""
    out_dir = Path(out_dir)
    if not (out_dir / "config.json").is_file():
        d, n_layers, heads, vocab, like = OPTS[name]
        sizes = {"hidden_size": d, "num_hidden_layers": n_layers, "num_attention_heads": heads, "vocab_size": vocab}
        config = planted.opt_config(**sizes, max_position_embeddings=512 if name == "tiny-opt" else 2048)
        planted.write(out_dir, config, planted.Recipe(firing=firing), like)
    return out_dir


def n_parameters(name: str) -> int:
    """Parameters of a shape."""
    if name in LLAMAS:
        d, d_ffn, n_layers, heads, kv_heads, vocab, _ = LLAMAS[name]
        return 2 * vocab * d + d + n_layers * (2 * d * d + 2 * d * d // heads * kv_heads + 3 * d * d_ffn + 2 * d)
    d, n_layers, _, vocab, _ = OPTS[name]
    positions = 514 if name == "tiny-opt" else 2050
    return (vocab + positions) * d + 2 * d + n_layers * (12 * d * d + 13 * d)


def in_words(name: str) -> str:
    """What a model is; never without the word synthetic."""
    size = n_parameters(name)
    size_words = f"{size / 1e9:.3f} B" if size >= 1e9 else f"{size / 1e6:.1f} M"
    if name in LLAMAS:
        return f"RANDOM weights, synthetic (Llama shape, {size_words} parameters)"
    return f"RANDOM weights, synthetic, sparsity planted (OPT shape, {size_words} parameters)"


FOLDERS = {"random-llama": "random-llama-1.1b", "tiny": "tiny-random-llama"}
# name -> (builder, folder name, what it is)
MODELS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    **{name: (partial(random_llama, name=name), FOLDERS.get(name, f"synthetic-{name}"), in_words(name))
       for name in LLAMAS},
    **{name: (partial(planted_opt, name=name), f"synthetic-{name}", in_words(name)) for name in OPTS},
}  # fmt: skip
