"""Whether what is done early pays: tried while tokens are made, decided by their time, and tried again later.

A second look at a gate costs arithmetic and buys waiting, and whether it pays depends on the disk. So some tokens are
made without it and some with it (few, if these are much slower), and the faster way is kept.
"""

from __future__ import annotations

import statistics
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

WARM_TOKENS, TRIED_TOKENS, FEW_TOKENS, AGAIN_TOKENS = 24, 12, 3, 2048


class Trial:
    """Whether early gates are on: tried, decided by the time of a token, and tried again later.

    Attributes:
        on: what holds for the token that is being computed.
    """

    def __init__(self) -> None:
        self.on, self._n_tokens = False, 0
        self._last: float | None = None
        self._times: dict[bool, list[float]] = {False: [], True: []}

    def next_token(self, now: float | None) -> None:
        """A token begins, at `now` on time.perf_counter's clock; None for a pass of many, which is not counted."""
        if now is None:
            self._last = None
            return
        if self._last is not None:
            self._times[self.on].append(now - self._last)
        self._last = now
        self._n_tokens += 1
        if self._n_tokens == WARM_TOKENS:
            self._times[False].clear()
        elif self._n_tokens == WARM_TOKENS + TRIED_TOKENS:
            self.on = True
        elif self._hopeless():
            self._n_tokens = WARM_TOKENS + 2 * TRIED_TOKENS
        if self._n_tokens == WARM_TOKENS + 2 * TRIED_TOKENS:
            off_s, on_s = (statistics.median(self._times[way]) for way in (False, True))
            self.on = on_s < 0.98 * off_s
            word = "on" if self.on else "off"
            logger.info(f"hf_flash: early gate {word}: {1e3 * on_s:.1f} ms a token with it, {1e3 * off_s:.1f} without.")
        elif self._n_tokens >= AGAIN_TOKENS:
            self.__init__()  # type: ignore[misc]

    def _hopeless(self) -> bool:
        """Whether a few tokens with it have told enough."""
        trying = self.on and self._n_tokens < WARM_TOKENS + 2 * TRIED_TOKENS and len(self._times[True]) >= FEW_TOKENS
        return trying and statistics.median(self._times[True]) > 1.1 * statistics.median(self._times[False])

    def __deepcopy__(self, memo: dict[int, Any]) -> Trial:
        return self


class _Never(Trial):
    """Not even tried."""

    def next_token(self, now: float | None) -> None:
        """Nothing changes."""


NEVER = _Never()
