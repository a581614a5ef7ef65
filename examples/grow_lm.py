"""Begin a larger OPT from a smaller one, so that it computes the same at first and has room to learn more.

The residual stream is a number of copies of the small model's ("HyperCloning", arXiv 2409.12903), so that layer
norms see the same mean and variance. What writes to the stream writes to each copy. What reads from it reads a random
share of each weight from each copy, the shares of a weight adding up to it: the copies get unlike gradients and
drift apart. Neurons, heads and layers that the small model lacks begin as new ones do, but write zeros ("LLaMA
Pro", arXiv 2401.02415): no neuron is another one's copy.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import OPTForCausalLM

READS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")
WRITES = ("out_proj.weight", "fc2.weight")
ROWS = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "fc1.bias")  # one number a row of READS


def check_growth(small: OPTForCausalLM, large: OPTForCausalLM) -> None:
    """Leave with a message where `small` does not fit into `large`."""
    a, b = small.config, large.config
    if b.hidden_size % a.hidden_size:
        sys.exit(f"--d-model {b.hidden_size}: must be a multiple of {a.hidden_size}, the width of --grow.")
    if b.hidden_size // b.num_attention_heads != (dim := a.hidden_size // a.num_attention_heads):
        sys.exit(
            f"--heads {b.num_attention_heads}: heads must be {dim} wide as in --grow: --heads {b.hidden_size // dim}."
        )
    for option, name in (("layers", "num_hidden_layers"), ("ffn", "ffn_dim")):
        if getattr(b, name) < getattr(a, name):
            sys.exit(f"--{option} {getattr(b, name)}: --grow has {getattr(a, name)} already. Ask for as many or more.")
    if b.max_position_embeddings != a.max_position_embeddings or b.vocab_size != a.vocab_size:
        want = f"--seq {a.max_position_embeddings} --vocab {a.vocab_size}"
        sys.exit(f"--seq {b.max_position_embeddings} --vocab {b.vocab_size}: --grow has {want}. Ask for the same.")


def grown_tensor(name: str, old: Tensor, new: Tensor, copies: int) -> Tensor:
    """Put one tensor of the small model into the freshly initialized `new` one of the large model."""
    if name.endswith(READS):  # [rows, d_model]
        shares = torch.softmax(torch.randn(copies, *old.shape), dim=0)
        wide = (shares * old).permute(1, 0, 2).reshape(len(old), -1)
        return torch.cat((wide, new[len(old) :]))
    if name.endswith(WRITES):  # [d_model, columns]
        grown = torch.zeros_like(new)
        grown[:, : old.shape[1]] = old.repeat(copies, 1)
        return grown
    if name.endswith(ROWS):
        return torch.cat((old, new[len(old) :]))
    wide = old.repeat(*(1,) * (old.dim() - 1), copies)  # embeddings and layer norms, [..., d_model]
    return wide / copies if name.startswith("model.decoder.final_layer_norm") else wide  # the head adds copies up


@torch.no_grad()
def grow(small: OPTForCausalLM, large: OPTForCausalLM) -> None:
    """Overwrite the weights of `large`, as from its constructor, so that it computes what `small` does."""
    check_growth(small, large)
    copies = large.config.hidden_size // small.config.hidden_size
    n_small, n_large = small.config.num_hidden_layers, large.config.num_hidden_layers
    state, grown = small.state_dict(), large.state_dict()
    for name, tensor in grown.items():
        if name.endswith(WRITES):
            tensor.zero_()
    for name, old in state.items():
        to = name
        if ".layers." in name:
            head, rest = name.split(".layers.")
            layer, rest = rest.split(".", 1)
            to = f"{head}.layers.{int(layer) * n_large // n_small}.{rest}"
        grown[to] = grown_tensor(name, old.float(), grown[to], copies)
    large.load_state_dict(grown)
