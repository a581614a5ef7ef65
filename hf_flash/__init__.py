"""hf_flash: run transformers models that are larger than the memory they are allowed.

FFN weights stay on flash, neuron by neuron; `import hf_flash` registers the backend with transformers, and
`from_pretrained` does the rest. Method: "LLM in a flash" (arXiv:2312.11514), lossless by default.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "FATReLU", "FlashConfig", "FlashError", "FlashStats", "calibrate", "evaluate", "is_flash", "patch", "plan",
    "profile", "push", "repack", "smallest_cap", "stats", "verify",
]  # fmt: skip


def _is_command() -> bool:
    """Whether this process is `hf-flash`, which imports torch and transformers when a command needs them."""
    return Path((sys.argv or [""])[0]).name == "hf-flash" or sys.orig_argv[1:3] == ["-m", "hf_flash"]


if TYPE_CHECKING or not _is_command():
    from torch import nn

    from hf_flash.calibrate import calibrate
    from hf_flash.config import FlashConfig
    from hf_flash.errors import FlashError
    from hf_flash.evaluate import evaluate
    from hf_flash.families import FATReLU
    from hf_flash.hub import push
    from hf_flash.patch import is_flash, patch
    from hf_flash.preview import plan, smallest_cap
    from hf_flash.profile import profile
    from hf_flash.quantizer import register
    from hf_flash.repack import repack
    from hf_flash.save import runtime_of
    from hf_flash.stats import FlashStats
    from hf_flash.verify import verify

    register()


def stats(model: nn.Module) -> FlashStats:
    """What a model has read, found in DRAM and waited for since it was loaded or its stats were reset.

    Args:
        model: one that runs from flash.

    Returns:
        Counters that go on counting; `.to_dict()` for JSON, `.reset()` to start again.

    Raises:
        FlashError: the model does not run from flash.
    """
    return runtime_of(model).stats


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module 'hf_flash' has no attribute {name!r}; it has {', '.join(__all__)}")
