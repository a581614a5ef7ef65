"""How long ago tokens of a pass wanted a neuron: whom of a prompt's neurons to keep for the tokens to come."""

from __future__ import annotations

import torch

NEVER = 1 << 30


def never(n_neurons: int) -> torch.Tensor:
    """[n_neurons] int32 of what no token wants."""
    return torch.full((n_neurons,), NEVER, dtype=torch.int32, device="cpu")


def note(ago: torch.Tensor, wanted: torch.Tensor, n_later: int) -> None:
    """Some tokens more, which are later than those before.

    Args:
        ago: [n_neurons] int32, tokens since each neuron was wanted, as exactly as is known; 0 by the last token only.
        wanted: [T, n_neurons] bool.
        n_later: tokens of the pass after these.
    """
    ago[wanted.any(0)] = max(1, n_later)
    if not n_later and len(wanted):
        ago[wanted[-1]] = 0
