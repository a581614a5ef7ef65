"""In which order a layer's neurons lie on flash, so that what a token misses lies in few extents.

Neurons are linked into chains: the pair that is wanted together most often become neighbours, then the next pair, as
long as each has a free side and no ring closes (a greedy path through the graph of co-activations, the idea of
"Ripple", arXiv:2410.19274). What counts is not that two neurons fire together but that they are *read* together: a
neuron that fired a moment ago is in DRAM, whoever fires with it. So a firing counts where the neuron was quiet for
QUIET_TOKENS before, which orders as well as the misses of a simulated cache do (docs/log.md), for any size of it.

Every neuron lies in one place only. The bundles of friends in "LLM in a flash" (its appendix D) lacked that, and very
active neurons were read many times.
"""

from __future__ import annotations

import dataclasses

import torch
from tqdm.auto import tqdm

from hf_flash.recording import Recording

QUIET_TOKENS = 8  # a neuron that did not fire for so long may have left DRAM
FRIENDS = 32  # candidates for the two places beside a neuron
BLOCK_NEURONS, BLOCK_TOKENS = 1024, 2048  # bound the memory: counts of a block with all others


@dataclasses.dataclass(frozen=True)
class CoFiring:
    """What begins to fire together in a layer.

    Attributes:
        begun: [n] tokens at which each neuron fired after it had been quiet.
        friends: [n, FRIENDS] neurons that did so together with each most often.
        together: [n, FRIENDS] at how many tokens.
    """

    begun: torch.Tensor
    friends: torch.Tensor
    together: torch.Tensor


def co_firing(
    recording: Recording, layer: str, n_tokens: int | None = None, quiet_tokens: int = QUIET_TOKENS
) -> CoFiring:
    """Count what begins to fire together over the first `n_tokens` of a recording.

    Memory is that of BLOCK_NEURONS rows of counts; the work is n_tokens * n^2 multiplications.
    """
    stop, n = n_tokens or recording.n_tokens, recording.shape(layer)[1]
    begun = torch.zeros(n)
    blocks = [(i, min(i + BLOCK_NEURONS, n)) for i in range(0, n, BLOCK_NEURONS)]
    friends, together = [], []
    for first, last in blocks:
        counts = torch.zeros(last - first, n)
        for start in range(0, stop, BLOCK_TOKENS):
            some = _begun(recording, layer, start, min(start + BLOCK_TOKENS, stop), quiet_tokens).float()  # [T, n]
            counts += some[:, first:last].t() @ some
        begun[first:last] = counts.diagonal(first)
        counts.diagonal(first).zero_()
        best = counts.topk(min(FRIENDS, n), dim=1)
        friends.append(best.indices)
        together.append(best.values)
    return CoFiring(begun, torch.cat(friends), torch.cat(together))


def _begun(recording: Recording, layer: str, start: int, stop: int, quiet_tokens: int) -> torch.Tensor:
    """[stop - start, n] bool: who fires and was quiet for some tokens before."""
    before = min(start, quiet_tokens)
    fired = recording.fired(layer, start - before, stop)
    out = fired[before:].clone()
    for back in range(1, quiet_tokens + 1):
        n = min(len(out), len(out) + before - back)  # rows that have one so far back
        if n > 0:
            out[len(out) - n :] &= ~fired[len(fired) - back - n : len(fired) - back]
    return out


def arrange(found: CoFiring) -> torch.Tensor:
    """An order of a layer's neurons: chains of those that are wanted together; deterministic.

    Returns:
        [n] int64, the neuron that lies in each row.
    """
    chains = _chains(found)
    # Chains of often read neurons before those of seldom read ones, so that gaps between them are worth reading over.
    chains.sort(key=lambda chain: -float(found.begun[chain].mean()))
    return torch.tensor([neuron for chain in chains for neuron in chain], dtype=torch.int64)


def _chains(found: CoFiring) -> list[list[int]]:
    """Paths through all neurons, linked greedily, strongest links first."""
    n = len(found.begun)
    one = torch.arange(n).repeat_interleave(found.friends.shape[1])
    other, weight = found.friends.reshape(-1), found.together.reshape(-1)
    keep = weight > 0
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
    chains, seen = [], [False] * n
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
    """An order for each layer of a recording.

    Returns:
        Path of the FFN -> [n] int64, the neuron that lies in each row.
    """
    bar = tqdm(recording.layers, desc="Ordering neurons", unit="layer", disable=not progress)
    return {layer: arrange(co_firing(recording, layer)) for layer in bar}
