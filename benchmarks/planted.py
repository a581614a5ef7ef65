"""OPT-shaped models with RANDOM weights and planted sparsity: the speed of a sparse model at a real size.

No ReLU model of a useful size can be had without a download of gigabytes, so its two properties that decide the speed
are planted into random weights, and measured again on what came out:

- **Sparsity.** Before the ReLU a neuron's sum is close to Gaussian; the biases of fc1 are lowered, layer by layer,
  until the wanted share of neurons fires (3 % as in OPT-6.7B) on a random prompt that runs through the layers as they
  are drawn.
- **Overlap.** Tokens that follow each other fire many of the same neurons: "LLM in a flash" keeps those of the last
  five tokens and finds about three quarters of the next token's there. Here the position embeddings carry a part that
  all positions share and one that drifts slowly (in one half of the dimensions), the token embeddings the rest.

The final norm looks at the other half only, with random signs, so the tied head does not repeat the token it was
given; each position also leans towards one random token, which keeps the two best logits apart. So greedy tokens vary
and are the same for every program that computes the model right. They mean nothing.
"""

# ruff: noqa: PLC0415  (heavy packages are imported where they are used)
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards import ShardWriter, generator_for

CARD = """# {name}: SYNTHETIC, RANDOM WEIGHTS

Synthetic. The shape of {like}; every weight was drawn at random (seed {seed}) by
`benchmarks/planted.py`, with planted sparsity: it is for measuring bytes and seconds, never quality. What it writes is
noise.

Measured on {n_tokens} tokens of a prompt other than the one it was calibrated on (`planted.json` has it by layer):
{firing:.2%} of the FFN neurons fire per token ({least:.2%} to {most:.2%} by layer), the neurons of the last five tokens
hold {hits:.1%} of those that the next one fires and are {union:.2%} of all.
"""
MEASURED = "planted.json"
WINDOW = 5
EPS = 1e-5  # OPT's layer norms


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is planted. Energies are shares of a hidden state's; steps are relative to it."""

    firing: float = 0.03  # neurons that fire
    shared: float = 0.52  # energy that all positions share
    drifting: float = 0.36  # energy that drifts from position to position
    memory: float = 0.90  # correlation of the drifting part between neighbours
    lean: float = 7.0  # how far a position leans towards its token, in standard deviations of a logit
    step: float = 0.6  # what all attention outputs together add, relative to the embedding; the same for all FFNs


def opt_config(**sizes: int) -> Any:
    """A bf16 OPTConfig without special tokens: greedy generation never stops early."""
    from transformers import OPTConfig

    d = sizes["hidden_size"]
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return OPTConfig(
        **sizes, **no_tokens, ffn_dim=4 * d, word_embed_proj_dim=d, activation_function="relu", dtype="bfloat16",
        tie_word_embeddings=True, architectures=["OPTForCausalLM"],
    )  # fmt: skip


def embeddings(config: Any, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Token and position embeddings and the final norm, of unit energy per dimension altogether."""
    import torch

    d, half, vocab = config.hidden_size, config.hidden_size // 2, config.vocab_size
    n_positions = config.max_position_embeddings + 2
    generator = generator_for(seed, 0)
    rest = (1 - recipe.shared - recipe.drifting) ** 0.5
    tokens = torch.randn(vocab, d, generator=generator).mul_(rest).bfloat16()
    steps = torch.randn(n_positions, half, generator=generator)
    drift = steps.clone()
    for position in range(1, n_positions):
        drift[position] = recipe.memory * drift[position - 1] + (1 - recipe.memory**2) ** 0.5 * steps[position]
    common = torch.randn(half, generator=generator)
    positions = torch.empty(n_positions, d)
    positions[:, :half] = 2**0.5 * (recipe.shared**0.5 * common + recipe.drifting**0.5 * drift)  # all of it in a half
    signs = torch.randint(0, 2, (d - half,), generator=generator) * 2.0 - 1.0
    leads_to = torch.randint(3, vocab, (n_positions,), generator=generator)
    noise = (rest**2 + 2 * recipe.step**2) ** 0.5  # of the last hidden states, per dimension
    lean = recipe.lean * noise / (rest * (d - half) ** 0.5)
    positions[:, half:] = lean * signs * tokens[leads_to, half:].float()
    norm = torch.zeros(d)
    norm[half:] = signs
    return {
        "model.decoder.embed_tokens.weight": tokens,
        "model.decoder.embed_positions.weight": positions.bfloat16(),
        "model.decoder.final_layer_norm.weight": norm.bfloat16(),
        "model.decoder.final_layer_norm.bias": torch.zeros(d, dtype=torch.bfloat16),
    }


def draw_layer(config: Any, recipe: Recipe, seed: int, layer: int) -> dict[str, Any]:
    """One decoder layer's tensors under their short names, fc1's bias still zero."""
    import torch

    d, d_ffn, n_layers = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    generator = generator_for(seed, 1 + layer)
    per_layer = recipe.step / n_layers**0.5
    firing_energy = expected_energy(recipe.firing) * d_ffn  # sum of squares of what the ReLU lets through
    std = {
        "self_attn.q_proj": d**-0.5, "self_attn.k_proj": d**-0.5, "self_attn.v_proj": d**-0.5,
        "self_attn.out_proj": per_layer * (d * (recipe.shared + 0.1)) ** -0.5,  # the mean over a context
        "fc1": d**-0.5, "fc2": per_layer * firing_energy**-0.5,
    }  # fmt: skip
    tensors = {}
    for name, scale in std.items():
        n_out, n_in = {"fc1": (d_ffn, d), "fc2": (d, d_ffn)}.get(name, (d, d))
        weight = torch.empty(n_out, n_in, dtype=torch.bfloat16)
        for rows in weight.split(1024):  # float32 only for a piece at a time
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(scale))
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.bias"] = torch.zeros(n_out, dtype=torch.bfloat16)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        tensors[f"{name}.weight"] = torch.ones(d, dtype=torch.bfloat16)
        tensors[f"{name}.bias"] = torch.zeros(d, dtype=torch.bfloat16)
    return tensors


def expected_energy(firing: float) -> float:
    """E[relu(z - t)^2] of a standard normal z that passes t with probability `firing`."""
    from statistics import NormalDist

    normal = NormalDist()
    t = normal.inv_cdf(1 - firing)
    return (1 + t * t) * firing - t * normal.pdf(t)


def attend(x: Any, tensors: dict[str, Any], n_heads: int) -> Any:
    """x [n_tokens, d] -> x + causal self-attention of its norm, as OPTDecoderLayer computes it."""
    import torch.nn.functional as F

    h = F.layer_norm(x, x.shape[-1:], tensors["self_attn_layer_norm.weight"].float(),
                     tensors["self_attn_layer_norm.bias"].float(), EPS)  # fmt: skip
    q, k, v = (
        linear(h, tensors, f"self_attn.{part}_proj").unflatten(-1, (n_heads, -1)).transpose(0, 1) for part in "qkv"
    )
    mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    return x + linear(mixed.transpose(0, 1).flatten(1), tensors, "self_attn.out_proj")


def before_relu(x: Any, tensors: dict[str, Any]) -> Any:
    """x [n_tokens, d] -> the FFN's sums, [n_tokens, d_ffn]."""
    import torch.nn.functional as F

    weight, bias = tensors["final_layer_norm.weight"].float(), tensors["final_layer_norm.bias"].float()
    return linear(F.layer_norm(x, x.shape[-1:], weight, bias, EPS), tensors, "fc1")


def linear(x: Any, tensors: dict[str, Any], name: str) -> Any:
    import torch.nn.functional as F

    return F.linear(x, tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float())


def start(parts: dict[str, Any], ids: Any) -> Any:
    """Hidden states that enter the first layer; OPT's positions start at row 2."""
    tokens, positions = (parts[f"model.decoder.embed_{name}.weight"] for name in ("tokens", "positions"))
    return tokens[ids].float() + positions[2 : 2 + len(ids)].float()


def random_ids(config: Any, n_tokens: int, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (n_tokens,), generator=generator)


def write(out_dir: Path, config: Any, recipe: Recipe, like: str, seed: int = 0, n_tokens: int = 192) -> Path:
    """Draw, calibrate and write a model shard by shard (memory for two layers), then measure it on other tokens."""
    import torch

    shards = ShardWriter(out_dir, config.num_hidden_layers + 1)
    parts = embeddings(config, recipe, seed)
    shards.add(parts)
    n_tokens = min(n_tokens, config.max_position_embeddings)
    x, y = (start(parts, random_ids(config, n_tokens, seed=seed + n)) for n in (1, 2))  # to calibrate, to measure
    del parts
    rows = []
    for layer in range(config.num_hidden_layers):
        tensors = draw_layer(config, recipe, seed, layer)
        x, y = (attend(h, tensors, config.num_attention_heads) for h in (x, y))
        sums = before_relu(x, tensors)
        threshold = torch.quantile(sums.flatten()[:: 1 + sums.numel() // 8_000_000], 1 - recipe.firing)
        tensors["fc1.bias"] -= threshold
        shards.add({f"model.decoder.layers.{layer}.{name}": t for name, t in tensors.items()})
        x = x + linear(before_relu(x, tensors).relu_(), tensors, "fc2")
        fires = before_relu(y, tensors).relu_()
        y = y + linear(fires, tensors, "fc2")
        rows.append({"layer": layer, **overlap(fires > 0)})
    found = summary(rows, n_tokens)
    (out_dir / MEASURED).write_text(json.dumps(found, indent=1) + "\n")
    words = {key: found[key] for key in ("n_tokens", "firing", "least", "most", "hits", "union")}
    shards.finish(CARD.format(name=out_dir.name, like=like, seed=seed, **words))
    config.save_pretrained(out_dir)
    return out_dir


def overlap(fires: Any) -> dict[str, float]:
    """Of fires [n_tokens, d_ffn] (bool): the share that fires, what the last WINDOW tokens cover of it, their size."""
    import torch

    windows = torch.stack([fires[t - WINDOW : t].any(0) for t in range(WINDOW, len(fires))])
    now = fires[WINDOW:]
    hits = (windows & now).sum() / now.sum().clamp_min(1)
    by_token = fires.float().mean(1)
    return {
        "firing": float(by_token.mean()), "firing_most_by_token": float(by_token.max()), "hits": float(hits),
        "union": float(windows.float().mean()), "ever": float(fires.any(0).float().mean()),
    }  # fmt: skip


def summary(rows: list[dict[str, float]], n_tokens: int) -> dict[str, Any]:
    """Means over the layers, and the layers themselves."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("firing", "hits", "union", "ever")}
    firing = [row["firing"] for row in rows]
    found = {"synthetic": True, "n_tokens": n_tokens, "window": WINDOW, **mean, "least": min(firing)}
    return {**found, "most": max(firing), "layers": rows}


def stored_layers(folder: Path, n_layers: int) -> Iterator[dict[str, Any]]:
    """The layers of a written model, one at a time."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in range(n_layers):
        prefix = f"model.decoder.layers.{layer}."
        names = [name for name in index if name.startswith(prefix)]
        with safe_open(folder / index[names[0]], "pt") as file:
            yield {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def measure(folder: Path, ids: Any = None, n_tokens: int = 192, seed: int = 3) -> dict[str, Any]:
    """Measure sparsity and overlap of a written model on `ids` (default: random), layer by layer from its files."""
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = [f"model.decoder.embed_{name}.weight" for name in ("tokens", "positions")]
    ids = random_ids(config, min(n_tokens, config.max_position_embeddings), seed) if ids is None else ids
    with safe_open(folder / index[names[0]], "pt") as file:
        x = start({name: file.get_tensor(name) for name in names}, ids)
    rows = []
    for layer, tensors in enumerate(stored_layers(folder, config.num_hidden_layers)):
        x = attend(x, tensors, config.num_attention_heads)
        fires = before_relu(x, tensors).relu_()
        x = x + linear(fires, tensors, "fc2")
        rows.append({"layer": layer, **overlap(fires > 0)})
    return summary(rows, len(ids))
