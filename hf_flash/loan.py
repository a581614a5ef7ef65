"""Memory that was planned for keys, values and activations to come holds neurons until they do.

A plan reserves the keys and values of every token of the context, and what a pass over all of them computes with: its
activations, and batches of neurons on their way, of which a native step of few tokens needs none. A conversation begins
with few tokens, a growing cache (kv.py) takes no DRAM for the others, and most passes are of one token. What is left is
lent and taken back before a pass writes there, so the sum stays what was planned. The stream has it first: a chunk that
stays is a chunk that no token reads. The rest are slots of the layers with a gate; one that is taken back loses its
neuron, which costs one read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_flash.balance import Balance
from hf_flash.memory import HUGE_BYTES, round_up
from hf_flash.stream import Stream

AHEAD_TOKENS = 16  # taken back together, so that most passes change nothing
LEAST_BYTES = 4 << 20  # that are worth a change


class Loan:
    """What the layers have of the memory that others do not fill.

    Args:
        balances: of the layers' slots.
        n_bytes: that were planned for the others. token_bytes: of the KV cache, for a token.
        stream: whose chunks may stay, if any.
    """

    def __init__(
        self, balances: Sequence[Balance], n_bytes: int, token_bytes: int, stream: Stream | None = None
    ) -> None:
        self._balances, self._n_bytes, self._ahead_bytes = list(balances), n_bytes, AHEAD_TOKENS * token_bytes
        self._stream = stream
        own = [max(1, balance.n_own) * balance.row_bytes for balance in self._balances]
        self._shares = [n / sum(own) for n in own]

    def told(self, filled: int | None) -> None:
        """A pass begins in which the others take so many bytes; all that was planned if nobody can say."""
        spare = 0 if filled is None else max(0, self._n_bytes - filled)
        n_chunks = self._chunks(spare)
        if self._stream is not None and n_chunks < self._stream.n_lent:
            self._stream.lend(n_chunks)
        self._lend_slots(spare - self._stream_bytes(n_chunks))
        if self._stream is not None and n_chunks > self._stream.n_lent:  # only now: slots may have had that memory
            self._stream.lend(n_chunks)

    def _chunks(self, spare: int) -> int:
        """How many chunks are to stay."""
        stream = self._stream
        if stream is None or not stream.most_lent:
            return 0
        most, fewer = (
            min(stream.most_lent, max(0, n // HUGE_BYTES * HUGE_BYTES) // stream.buffer_bytes)
            for n in (spare, spare - self._ahead_bytes)
        )
        return _changed(stream.n_lent, most, fewer, stream.buffer_bytes)

    def _stream_bytes(self, n_chunks: int) -> int:
        return 0 if self._stream is None else round_up(n_chunks * self._stream.buffer_bytes, HUGE_BYTES)

    def _lend_slots(self, spare: int) -> None:
        for balance, share in zip(self._balances, self._shares, strict=True):
            most = _slots(balance, share * spare)
            fewer = _slots(balance, share * (spare - self._ahead_bytes))
            n = _changed(balance.n_lent, most, fewer, balance.row_bytes)
            if n != balance.n_lent:
                balance.lend(n)

    def __deepcopy__(self, memo: dict[int, Any]) -> Loan:
        return self


def _changed(n_lent: int, most: int, fewer: int, n_bytes: int) -> int:
    """How many pieces of so many bytes to lend: those that are lent, where another number is not worth a change."""
    return fewer if n_lent > most or (fewer - n_lent) * n_bytes >= LEAST_BYTES else n_lent


def _slots(balance: Balance, n_bytes: float) -> int:
    """Slots that fit into as much, to the end of a huge page."""
    own = balance.n_own * balance.row_bytes
    return max(0, ((own + int(n_bytes)) // HUGE_BYTES * HUGE_BYTES - own) // balance.row_bytes)
