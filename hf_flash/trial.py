"""Whether what is done early pays: tried while tokens are made, decided by their time, and tried again later.

A second look at a gate costs arithmetic and buys waiting, and whether it pays depends on the disk. So a conversation
begins with it, then some tokens are made without it and some with it (few, if these are slower), and the faster way is
kept.
"""

from __future__ import annotations

import statistics
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

WARM_TOKENS, TRIED_TOKENS, FEW_TOKENS, AGAIN_TOKENS = 8, 12, 6, 2048
HOPELESS = 1.05  # times as long as a token without, after few of them: the times of tokens differ by a tenth


class Trial:
    """Whether early gates are on: tried every second token, decided by the time of a token, and tried again later.

    In turns, since other jobs slow a machine down and let go of it again from one second to the next.

    Attributes:
        on: what holds for the token that is being computed.
    """

    def __init__(self) -> None:
        self.on, self._n_tokens, self._decided = True, 0, False
        self._last: float | None = None
        self._off_s = 0.0  # of the last token without
        self._ratios: list[float] = []  # of each token with it to the one before, which was without

    def next_token(self, now: float | None) -> None:
        """A token begins, at `now` on time.perf_counter's clock; None for a pass of many, which is not counted."""
        if now is None:
            self._last = None
            return
        if self._last is not None and self.on and self._off_s:
            self._ratios.append((now - self._last) / self._off_s)
        self._off_s = 0.0 if self._last is None or self.on else now - self._last
        self._last = now
        self._n_tokens += 1
        if self._n_tokens >= AGAIN_TOKENS:
            self.__init__()  # type: ignore[misc]
        elif self._n_tokens <= WARM_TOKENS or self._decided:
            return
        elif len(self._ratios) >= TRIED_TOKENS or self._hopeless():
            ratio = statistics.median(self._ratios)
            self.on, self._decided = ratio < 1, True
            word = "on" if self.on else "off"
            logger.info(f"hf_flash: early gate {word}: a token with it takes {ratio:.2f} times as long as one without.")
        else:
            self.on = not self.on

    def _hopeless(self) -> bool:
        """Whether a few tokens with it have told enough."""
        return len(self._ratios) >= FEW_TOKENS and statistics.median(self._ratios) > HOPELESS

    def __deepcopy__(self, memo: dict[int, Any]) -> Trial:
        return self


class _Never(Trial):
    """Not even tried."""

    def next_token(self, now: float | None) -> None:
        """Nothing changes."""


NEVER = _Never()
