"""Write a model of random weights shard by shard: memory for one shard, not for the model."""

# ruff: noqa: PLC0415  (heavy packages are imported where they are used)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def generator_for(seed: int, shard: int) -> Any:
    """Random numbers of a shard: each can be remade alone."""
    import torch

    return torch.Generator().manual_seed(seed * 1000 + shard)


class ShardWriter:
    """A sharded safetensors checkpoint; config.json, which marks it as whole, is left to the caller."""

    def __init__(self, out_dir: Path, n_shards: int) -> None:
        self.out_dir, self.n_shards, self.n_done = out_dir, n_shards, 0
        self.index: dict[str, str] = {}
        self.total_bytes = 0
        out_dir.mkdir(parents=True, exist_ok=True)

    def add(self, tensors: dict[str, Any]) -> None:
        """Write the next shard."""
        from safetensors.torch import save_file

        self.n_done += 1
        file = f"model-{self.n_done:05d}-of-{self.n_shards:05d}.safetensors"
        save_file(tensors, self.out_dir / file, metadata={"format": "pt"})
        self.index.update(dict.fromkeys(tensors, file))
        self.total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, card: str) -> None:
        """Write the index and the model card."""
        meta = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.index}
        (self.out_dir / "model.safetensors.index.json").write_text(json.dumps(meta, indent=1))
        (self.out_dir / "README.md").write_text(card)
