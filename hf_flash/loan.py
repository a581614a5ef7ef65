"""Memory that was planned for keys, values and activations to come holds neurons until they do.

A plan reserves the keys and values of every token of the context, and what a pass over all of them computes with. A
conversation begins with few tokens, a growing cache (kv.py) takes no DRAM for the others, and most passes are of one
token. What is left is lent to the layers as slots and taken back before a pass writes there, so the sum stays what was
planned. A slot that is taken back loses its neuron, which costs one read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_flash.balance import Balance
from hf_flash.memory import HUGE_BYTES

AHEAD_TOKENS = 32  # taken back together, so that most passes change nothing
LEAST_BYTES = 4 << 20  # that are worth a change


class Loan:
    """What the layers have of the memory that others do not fill.

    Args:
        balances: of the layers' slots.
        n_bytes: that were planned for the others. token_bytes: of the KV cache, for a token.
    """

    def __init__(self, balances: Sequence[Balance], n_bytes: int, token_bytes: int) -> None:
        self._balances, self._n_bytes, self._ahead_bytes = list(balances), n_bytes, AHEAD_TOKENS * token_bytes
        own = [max(1, balance.n_own) * balance.row_bytes for balance in self._balances]
        self._shares = [n / sum(own) for n in own]

    def told(self, filled: int | None) -> None:
        """A pass begins in which the others take so many bytes; all that was planned if nobody can say."""
        spare = 0 if filled is None else max(0, self._n_bytes - filled)
        for balance, share in zip(self._balances, self._shares, strict=True):
            most = _slots(balance, share * spare)
            fewer = _slots(balance, share * (spare - self._ahead_bytes))
            if balance.n_lent > most or (fewer - balance.n_lent) * balance.row_bytes >= LEAST_BYTES:
                balance.lend(fewer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Loan:
        return self


def _slots(balance: Balance, n_bytes: float) -> int:
    """Slots that fit into as much, to the end of a huge page."""
    own = balance.n_own * balance.row_bytes
    return max(0, ((own + int(n_bytes)) // HUGE_BYTES * HUGE_BYTES - own) // balance.row_bytes)
