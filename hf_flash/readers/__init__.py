"""Ways to get bytes from flash. All give identical bytes; `open_reader` picks one and logs the choice once."""

from __future__ import annotations

from hf_flash.readers.base import Read, Reader, Ticket
from hf_flash.readers.threads import ThreadReader

__all__ = ["Read", "Reader", "ThreadReader", "Ticket", "open_reader"]


def open_reader(name: str = "auto", n_threads: int = 8) -> Reader:
    """Open the reader called `name` ("auto" or "threads") with at most `n_threads` reads in flight."""
    return ThreadReader(n_threads)
