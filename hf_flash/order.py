"""In which order a layer's neurons lie on flash, so that what a token misses lies in few extents.

Hot neurons come first, by how often they fire: they are read together when the cache is cold and seldom afterwards. The
others are linked into chains: the pair that fires together most often become neighbours, then the next pair, as long
as each has a free side and no ring closes (a greedy path through the graph of co-activations, the idea of "Ripple",
arXiv:2410.19274). A link is worth the tokens at which both fire; that every neuron lies in one place only is what the
bundles of friends in "LLM in a flash" (its appendix D) lacked, where very active neurons were read many times.
"""

from __future__ import annotations

import dataclasses

import torch
from tqdm.auto import tqdm

from hf_flash.recording import Recording

HOT_SHARE = 1 / 8  # of the tokens: a neuron that fires as often as this is hot
FRIENDS = 32  # candidates for the two places beside a neuron
BLOCK_NEURONS, BLOCK_TOKENS = 1024, 2048  # bound the memory: counts of a block with all others


@dataclasses.dataclass(frozen=True)
class CoFiring:
    """What fires together in a layer.

    Attributes:
        fired: [n] tokens at which each neuron fired.
        friends: [n, FRIENDS] neurons that fired together with each most often, and [n, FRIENDS] at how many tokens.
    """

    fired: torch.Tensor
    friends: torch.Tensor
    together: torch.Tensor


def co_firing(recording: Recording, layer: str, n_tokens: int | None = None) -> CoFiring:
    """Count what fires together over the first `n_tokens` of a recording.

    Memory is that of BLOCK_NEURONS rows of counts; the work is n_tokens * n^2 multiplications.
    """
    stop, n = n_tokens or recording.n_tokens, recording.shape(layer)[1]
    fired = torch.zeros(n)
    blocks = [(i, min(i + BLOCK_NEURONS, n)) for i in range(0, n, BLOCK_NEURONS)]
    friends, together = [], []
    for first, last in blocks:
        counts = torch.zeros(last - first, n)
        for start in range(0, stop, BLOCK_TOKENS):
            some = recording.fired(layer, start, min(start + BLOCK_TOKENS, stop)).float()  # [T, n]
            counts += some[:, first:last].t() @ some
        fired[first:last] = counts.diagonal(first)
        counts.diagonal(first).zero_()
        best = counts.topk(min(FRIENDS, n), dim=1)
        friends.append(best.indices)
        together.append(best.values)
    return CoFiring(fired, torch.cat(friends), torch.cat(together))


def arrange(found: CoFiring, n_tokens: int, hot_share: float = HOT_SHARE) -> torch.Tensor:
    """An order of a layer's neurons: hot ones by frequency, then chains of those that fire together.

    Args:
        found: what fires together.
        n_tokens: that were counted.
        hot_share: of the tokens at which a hot neuron fires; above 1 for none.

    Returns:
        [n] int64, the neuron that lies in each row.
    """
    by_frequency = torch.argsort(found.fired, descending=True, stable=True)
    hot = found.fired > hot_share * n_tokens
    chains = _chains(found, hot)
    first = by_frequency[hot[by_frequency]].tolist()
    # Chains of often used neurons before those of seldom used ones, so that gaps between them are worth reading over.
    chains.sort(key=lambda chain: -float(found.fired[chain].mean()))
    return torch.tensor([*first, *(neuron for chain in chains for neuron in chain)], dtype=torch.int64)


def _chains(found: CoFiring, hot: torch.Tensor) -> list[list[int]]:
    """Paths through all neurons that are not hot, linked greedily, strongest links first."""
    n = len(hot)
    one = torch.arange(n).repeat_interleave(found.friends.shape[1])
    other, weight = found.friends.reshape(-1), found.together.reshape(-1)
    keep = (weight > 0) & ~hot[one] & ~hot[other]
    strongest = torch.argsort(weight[keep], descending=True, stable=True)
    links: list[list[int]] = [[] for _ in range(n)]
    root = list(range(n))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in zip(one[keep][strongest].tolist(), other[keep][strongest].tolist(), strict=True):
        if len(links[i]) < 2 and len(links[j]) < 2 and (a := find(i)) != (b := find(j)):
            root[a] = b
            links[i].append(j)
            links[j].append(i)
    chains, seen = [], hot.tolist()
    for start in range(n):
        if seen[start] or len(links[start]) == 2:
            continue
        chain, before, here = [], -1, start
        while here >= 0:
            chain.append(here)
            seen[here] = True
            before, here = here, next((k for k in links[here] if k != before), -1)
        chains.append(chain)
    return chains


def orders_of(recording: Recording, progress: bool = True) -> dict[str, torch.Tensor]:
    """An order for each layer of a recording; deterministic.

    Returns:
        Path of the FFN -> [n] int64, the neuron that lies in each row.
    """
    bar = tqdm(recording.layers, desc="Ordering neurons", unit="layer", disable=not progress)
    return {layer: arrange(co_firing(recording, layer), recording.n_tokens) for layer in bar}
