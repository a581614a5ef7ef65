"""What no program could beat: bytes that must be read at the disk's speed, bytes that must be touched at DRAM's.

- Gate `all`, and every lossless program on these weights: a token needs every weight once, save the input embedding of
  an untied model (one row). At best all of `memory` holds weights; the rest is read for every token.
- Our own run: what it truly read per token, and what it truly had to touch: the resident matrices in the bits that it
  keeps them in, the upper four bits of the sketches, their other bits where a neuron was wanted (they decide for some
  that were not, too, which nobody counts), the rows of the neurons that it wanted, and the keys and values of the
  tokens before it.

Reading and computing can overlap, so a floor is the larger of the two terms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_flash.attach import kv_bytes
from hf_flash.gates.certified import looked_at_bytes


def tensor_bytes(model_dir: str | Path) -> dict[str, int]:
    """Bytes of every tensor of a folder, from the headers of the safetensors."""
    found = {}
    for file in sorted(Path(model_dir).glob("*.safetensors")):
        with open(file, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = entry["data_offsets"][1] - entry["data_offsets"][0]
    return found


def embedding_bytes(sizes: dict[str, int]) -> int:
    """Bytes of the input embedding, out of what tensor_bytes gave."""
    return next(n for name, n in sizes.items() if name.endswith("embed_tokens.weight"))


def looked_up_bytes(sizes: dict[str, int]) -> int:
    """Bytes of tensors of which a token needs one row only: positions, and the embedding where the head is another."""
    untied = embedding_bytes(sizes) if "lm_head.weight" in sizes else 0
    return untied + sum(n for name, n in sizes.items() if name.endswith("embed_positions.weight"))


def floor(read: float, touched: float, speeds: dict[str, float]) -> dict[str, float]:
    """Both terms and the larger."""
    disk_s, memory_s = read / speeds["disk_bytes_per_s"], touched / speeds["memory_bytes_per_s"]
    return {"read_bytes": read, "disk_s": disk_s, "touched_bytes": touched, "memory_s": memory_s,
            "s_per_token": max(disk_s, memory_s)}  # fmt: skip


def lossless(model_dir: str | Path, memory: int, speeds: dict[str, float]) -> dict[str, float]:
    """The floor of any program that needs every weight for every token."""
    sizes = tensor_bytes(model_dir)
    needed = sum(sizes.values()) - looked_up_bytes(sizes)
    return floor(max(0, needed - memory), needed, speeds)


def ours(spec: dict[str, Any], row: dict[str, Any], speeds: dict[str, float]) -> dict[str, float]:
    """The floor of what hf_flash read and touched in a run (its counters are those of decoding alone)."""
    stats = row["stats"]
    config = AutoConfig.from_pretrained(spec["model_dir"]).get_text_config(decoder=True)
    n_before = len(spec["ids"]) + spec["n_tokens"] / 2
    every_token = stats["resident_bytes"] + n_before * kv_bytes(config, 2)
    flash = sum(f.stat().st_size for f in Path(spec["converted_dir"]).glob("flash-*.safetensors"))
    sketches, wanted = stats["sketch_bytes"], stats["neurons_wanted"]
    if not sketches:  # gate `all`
        return floor(row["read_bytes_per_token"], every_token + flash, speeds)
    share = wanted / stats["n_tokens"] / spec["n_neurons"]
    looked_at = looked_at_bytes(sketches, stats["gate_bits"], share)
    return floor(row["read_bytes_per_token"], every_token + looked_at + flash * share, speeds)


def n_neurons(model_dir: str | Path) -> int:
    """FFN neurons of all layers, from config.json."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    return config["num_hidden_layers"] * config["ffn_dim" if "ffn_dim" in config else "intermediate_size"]


def in_words(name: str, found: dict[str, float]) -> str:
    """A floor as a line of output."""
    return (
        f"{name}: read {found['read_bytes'] / 1e6:.1f} MB/token = {found['disk_s']:.3f} s, touch "
        f"{found['touched_bytes'] / 1e6:.1f} MB/token = {found['memory_s']:.3f} s; {found['s_per_token']:.3f} s/token"
    )
