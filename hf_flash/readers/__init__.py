"""Ways to get bytes from flash. All give identical bytes; `open_reader` picks one and logs the choice once."""

from __future__ import annotations

import os

from transformers.utils import logging

from hf_flash.errors import FlashConfigError
from hf_flash.readers.base import Read, Reader, Ticket
from hf_flash.readers.threads import ThreadReader
from hf_flash.readers.unbundled import UnbundledReader
from hf_flash.readers.uring import UringReader

__all__ = ["Read", "Reader", "ThreadReader", "Ticket", "UnbundledReader", "UringReader", "open_reader"]

READER_VARIABLE = "HF_FLASH_READER"
NAMES = ("auto", "uring", "threads")
logger = logging.get_logger(__name__)


def open_reader(name: str | None = None, n_threads: int = 8, prompt: bool = True) -> Reader:
    """Open a reader.

    Args:
        name: "uring", "threads", or "auto" (io_uring where it can be had); default: HF_FLASH_READER, else "auto".
        n_threads: reads in flight of a pool of threads.
        prompt: as of UringReader.

    Raises:
        FlashConfigError: no such reader, or "uring" was asked for and cannot be had.
    """
    name = name or os.environ.get(READER_VARIABLE) or "auto"
    if name not in NAMES:
        raise FlashConfigError(f"{name!r} is no reader. Set {READER_VARIABLE} to one of {', '.join(NAMES)}.")
    if name != "threads":
        try:
            return UringReader(n_threads, prompt=prompt)
        except OSError as error:
            if name == "uring":
                raise FlashConfigError(f"io_uring cannot be had ({error}). Use {READER_VARIABLE}=threads.") from error
            logger.info(f"hf_flash: reading with a pool of threads; io_uring cannot be had ({error}).")
    return ThreadReader(n_threads)
