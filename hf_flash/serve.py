"""`transformers serve` for models on flash: its OpenAI-compatible server, started with the backend registered.

transformers has no plugin entry points and its own console script imports no hf_flash, so it refuses flash checkpoints.
This module is imported together with the package, which registers the backend; then transformers' command takes over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from transformers import AutoConfig
from transformers.utils.import_utils import is_serve_available

from hf_flash.config import MEMORY_VARIABLE, QUANT_METHOD, FlashConfig
from hf_flash.errors import FlashError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `transformers serve` until it is stopped.

    Args:
        arguments: `[MODEL] [--memory SIZE]`, then options of `transformers serve` (--host, --port, ...). Default: the
            command line's. MODEL is loaded at once and served alone; without it, models are loaded when asked for.

    Raises:
        FlashError: the server's packages are missing, or MODEL is no flash checkpoint; says what to type.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    memory = _take_option(words, "--memory")
    if memory is not None:
        os.environ[MEMORY_VARIABLE] = str(FlashConfig(memory=memory).memory)
    if not is_serve_available():
        raise FlashError("The server needs more packages: `pip install 'transformers[serving]'`, then try again.")
    if words and not words[0].startswith("-"):
        _refuse_stock(words[0], trust_remote_code="--trust-remote-code" in words)
    from transformers.cli.transformers import app  # noqa: PLC0415  (slow, and needs the packages above)

    app(["serve", *words])


def _take_option(words: list[str], name: str) -> str | None:
    """Remove `name VALUE` or `name=VALUE` from a command line and return the value."""
    for i, word in enumerate(words):
        if word.startswith(name + "="):
            return words.pop(i).partition("=")[2]
        if word == name:
            if i + 1 == len(words):
                raise FlashError(f"{name} wants a value, such as {name} 4GiB.")
            del words[i]
            return words.pop(i)
    return None


def _refuse_stock(model: str, trust_remote_code: bool) -> None:
    """A stock checkpoint would be served from DRAM, whatever the cap: say so instead."""
    name, _, revision = model.partition("@")
    config = AutoConfig.from_pretrained(name, revision=revision or None, trust_remote_code=trust_remote_code)
    method = getattr(config, "quantization_config", None) or {}
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if method != QUANT_METHOD:
        raise FlashError(
            f"{name} is no flash checkpoint, so the server would hold all of it in memory. Make one with "
            f"`hf-flash repack {name} DIR`, then serve DIR."
        )


if __name__ == "__main__":
    main()
