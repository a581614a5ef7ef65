"""The same weights as a GGUF file, for the llama.cpp side: tensor by tensor, bf16 kept as bf16, no vocabulary.

- A Llama becomes arch `llama`. Its q and k rows are reordered, as llama.cpp rotates pairs of neighbouring rows where
  transformers rotates the two halves of a head. The tokens must come out the same.
- llama.cpp has no OPT. An OPT becomes arch `gpt2`, the nearest that it has: the same matrices, norms and biases at the
  same places, so the same bytes are read and multiplied; but its activation is GELU, so its tokens are compared with
  those of the dense model with GELU.
"""

# ruff: noqa: PLC0415  (gguf is needed to make a file, not to ask for its path)
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from typing import Any

LLAMA_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
# In the order of use, as converters write them: a page that is read ahead is then the next one needed.
OPT_NAMES = {
    "attn_norm": ("self_attn_layer_norm",),
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": ("self_attn.out_proj",),
    "ffn_norm": ("final_layer_norm",),
    "ffn_up": ("fc1",),
    "ffn_down": ("fc2",),
}


class Stored:
    """The tensors of a safetensors folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.where: dict[str, tuple[Path, int, int, str, list[int]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb") as f:
                n = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(n))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    self.where[name] = (file, 8 + n + start, end - start, entry["dtype"], entry["shape"])

    def read(self, name: str) -> Any:
        """A tensor as uint16 (bf16 bits) in its shape."""
        import numpy as np

        file, offset, n_bytes, dtype, shape = self.where[name]
        if dtype != "BF16":
            raise SystemExit(f"{file.name}: {name} is {dtype}; the GGUF writer of the benchmarks takes BF16 only")
        return np.fromfile(file, np.uint16, n_bytes // 2, offset=offset).reshape(shape)

    def shape(self, *names: str) -> tuple[int, ...]:
        """Shape of the named tensors, stacked along the first dimension."""
        shapes = [self.where[name][4] for name in names]
        return (sum(s[0] for s in shapes), *shapes[0][1:])


def rotary_order(weight: Any, n_heads: int) -> Any:
    """Rows of q or k [n_heads * head, d] from halves to pairs."""
    n_rows, d = weight.shape
    return weight.reshape(n_heads, 2, n_rows // n_heads // 2, d).swapaxes(1, 2).reshape(n_rows, d)


def llama_plan(config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """(GGUF name, names of the stored tensors to stack, heads to reorder or 0) for a Llama."""
    yield "token_embd.weight", ("model.embed_tokens.weight",), 0
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LLAMA_NAMES.items():
            key = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(ours)
            yield f"blk.{layer}.{ours}", (f"model.layers.{layer}.{theirs}",), config[key] if key else 0
    yield "output_norm.weight", ("model.norm.weight",), 0
    if not config["tie_word_embeddings"]:
        yield "output.weight", ("lm_head.weight",), 0


def opt_plan(config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The same for an OPT, as a gpt2."""
    top = "model.decoder."
    yield "token_embd.weight", (top + "embed_tokens.weight",), 0
    yield "position_embd.weight", (top + "embed_positions.weight",), 0
    for layer in range(config["num_hidden_layers"]):
        at = f"{top}layers.{layer}."
        for ours, theirs in OPT_NAMES.items():
            for kind in ("weight", "bias"):
                yield f"blk.{layer}.{ours}.{kind}", tuple(f"{at}{part}.{kind}" for part in theirs), 0
    for kind in ("weight", "bias"):
        yield f"output_norm.{kind}", (f"{top}final_layer_norm.{kind}",), 0


def add_metadata(writer: Any, config: dict[str, Any]) -> None:
    """Sizes and constants of the model; no vocabulary, only its size."""
    opt = config["model_type"] == "opt"
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["ffn_dim" if opt else "intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if opt:
        writer.add_layer_norm_eps(1e-5)
        return
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(f"the GGUF writer of the benchmarks knows plain rotary embeddings, not {rope['rope_type']}")
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])


def write(model_dir: Path, out_file: Path) -> Path:
    """Write the weights of `model_dir` as `out_file` if it is not there; matrices bf16, vectors float32.

    Nothing is left of a file that could not be written to its end.
    """
    if out_file.is_file():
        return out_file
    out_file.parent.mkdir(parents=True, exist_ok=True)
    partial = out_file.with_suffix(".partial")
    need, free = sum(part.stat().st_size for part in model_dir.glob("*.safetensors")), disk_usage(out_file.parent).free
    if need > free:
        raise SystemExit(
            f"{out_file} takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there: delete a model in "
            f"{model_dir.parent} that this run does not need, or name another folder with --dir"
        )
    try:
        _write(model_dir, partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.rename(out_file)
    return out_file


def _write(model_dir: Path, file: Path) -> None:
    import gguf
    import numpy as np

    config = json.loads((model_dir / "config.json").read_text())
    stored = Stored(model_dir)
    arch, plan = {"llama": ("llama", llama_plan), "opt": ("gpt2", opt_plan)}[config["model_type"]]
    writer = gguf.GGUFWriter(file, arch)
    add_metadata(writer, config)
    tensors = list(plan(config))
    for name, sources, _ in tensors:
        shape = stored.shape(*sources)
        if name == "position_embd.weight":  # OPT's positions start at row 2
            shape = (shape[0] - 2, *shape[1:])
        n = int(np.prod(shape))
        vector = len(shape) == 1
        kind = gguf.GGMLQuantizationType.F32 if vector else gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32 if vector else np.uint16), n * (4 if vector else 2), kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources, heads in tensors:
        data = np.concatenate([stored.read(source) for source in sources])
        if heads:
            data = rotary_order(data, heads)
        if name == "position_embd.weight":
            data = data[2:]
        if data.ndim == 1:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()
