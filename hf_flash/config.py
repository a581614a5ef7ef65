"""FlashConfig: what a user can say about running a model from flash. Passed as `quantization_config`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_flash.errors import FlashConfigError
from hf_flash.layout import parse_size

QUANT_METHOD = "hf_flash"
GATES = ("auto", "all", "certified", "predicted", "threshold")
MEMORY_VARIABLE = "HF_FLASH_MEMORY"
DEFAULT_CONTEXT = 1024
CERTIFIED_BITS = range(4, 9)
ABLATIONS = ("residents", "window", "bundling", "overlap")

NOTICE = (
    "The FFN weights of this model are in flash-*.safetensors. `pip install hf_flash` and `import hf_flash` before "
    "from_pretrained; without it transformers refuses the checkpoint with a size mismatch, on purpose."
)
LOADING_ATTRIBUTES = (
    "memory", "gate", "delta", "context", "batch_size", "exact", "window", "lookahead", "sparsity",
    "n_threads", "cache_dir", "without",
)  # fmt: skip


class FlashConfig(QuantizationConfigMixin):
    """How to run a model from flash.

    Args:
        memory (`int` or `str`, *optional*): cap on what the process holds because of the model, in bytes or as a size
            ("4GiB"). Counted: resident weights, sketches, cached neurons, buffers, KV cache for `context` tokens,
            activations. Default: the environment's `HF_FLASH_MEMORY`; without either, three quarters of the memory
            that is available (cgroup limits are respected).
        gate (`str`, defaults to `"auto"`): `"all"` reads every neuron, exact for any activation; `"certified"` reads
            every neuron that cannot be proved silent, exact for activations that are zero below zero; `"predicted"`
            reads those that a predictor trained by `hf-flash calibrate` names, at the loss that its report says;
            `"threshold"` reads those of a SiLU or GELU model whose activation exceeds a threshold that `hf-flash
            calibrate` set, and drops the others, which changes the answers (docs/quality.md);
            `"auto"` takes `certified` where the activation allows it, else `all`.
        delta (`float`, defaults to 1e-9): probability that one decision of the certified gate is wrong; 0 uses the
            deterministic bound alone.
        gate_bits (`int`, defaults to 8): bits per weight of the certified gate's sketch, 4 to 8. Used when repacking.
        context (`int`, *optional*): tokens per sequence for which KV cache and activations are planned (default: 1024,
            or what the model allows if that is less).
        batch_size (`int`, defaults to 1): sequences for which they are planned.
        exact (`bool`, defaults to `True`): gate `all` computes in the stock model's own order of operations, to the
            bit. `False` sums packed rows as they lie, in float32: as precise and up to twice as fast, but near ties
            between tokens may fall the other way.
        window (`int`, defaults to 0): tokens whose neurons stay in the cache before any other, as in the paper. 0 goes
            by how often and how lately a neuron was used, which reads less.
        sparsity (`float`, *optional*): share of the activations that gate `threshold` drops, 0.01 to 0.99 (default:
            0.5).
        n_threads (`int`, defaults to 8): reads in flight.
        cache_dir (`str`, *optional*): where stock checkpoints are repacked to. Default: `HF_FLASH_CACHE`, else
            `hf_flash` inside the Hugging Face cache folder.
        lookahead (`bool`, defaults to `False`): start a layer's reads one layer early, where a predictor made by
            `hf-flash calibrate --lookahead` says what it will want. Wrong guesses cost reads, never tokens.
        without (collection of `str`, *optional*): what to switch off to measure what it gives (`hf-flash bench
            --ladder` does): `"residents"`, nothing stays in DRAM that a token can read; `"window"`, no neuron stays
            from one token to the next; `"bundling"`, a neuron's matrices are read apart; `"overlap"`, nothing is read
            during arithmetic, and a layer's step is taken one call after the other. The answers are the same.

    Example:
        >>> AutoModelForCausalLM.from_pretrained("facebook/opt-1.3b", quantization_config=FlashConfig(memory="1.5GiB"))
    """

    def __init__(
        self,
        memory: int | float | str | None = None,
        gate: str = "auto",
        delta: float = 1e-9,
        gate_bits: int = 8,
        context: int | None = None,
        batch_size: int = 1,
        exact: bool = True,
        window: int = 0,
        n_threads: int = 8,
        cache_dir: str | os.PathLike[str] | None = None,
        lookahead: bool = False,
        sparsity: float | None = None,
        without: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.memory = None if memory is None else parse_size(memory)
        self.gate, self.delta, self.gate_bits = gate, delta, gate_bits
        self.context, self.batch_size = context, batch_size
        self.exact, self.window, self.n_threads, self.lookahead = exact, window, n_threads, lookahead
        self.sparsity = sparsity
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self.without = (without,) if isinstance(without, str) else tuple(without)
        kwargs.pop("quant_method", None)
        self.extra = {**kwargs.pop("extra", {}), **kwargs}  # written by a newer version; kept
        self._check()

    def _check(self) -> None:
        if self.gate not in GATES:
            raise FlashConfigError(f"gate={self.gate!r} is unknown. Choose one of {', '.join(map(repr, GATES))}.")
        if not (isinstance(self.gate_bits, int) and self.gate_bits in CERTIFIED_BITS):
            raise FlashConfigError(f"gate_bits={self.gate_bits!r}: the sketch takes 4 to 8 bits per weight.")
        if not isinstance(self.delta, int | float) or not 0 <= self.delta < 1:
            raise FlashConfigError(f"delta={self.delta!r} is a probability: 0 <= delta < 1, such as 1e-9.")
        for name, least in (("batch_size", 1), ("n_threads", 1), ("window", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise FlashConfigError(f"{name}={getattr(self, name)!r} must be a whole number, {least} or more.")
        for name in ("exact", "lookahead"):
            if not isinstance(getattr(self, name), bool):
                raise FlashConfigError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.sparsity is not None and not (isinstance(self.sparsity, float) and 0.01 <= self.sparsity <= 0.99):
            raise FlashConfigError(
                f"sparsity={self.sparsity!r} is a share of the activations: 0.01 to 0.99, such as 0.5."
            )
        if self.sparsity is not None and self.gate not in ("auto", "threshold"):
            raise FlashConfigError(f"sparsity={self.sparsity} is for gate='threshold', and the gate is {self.gate!r}.")
        if unknown := sorted(set(self.without) - set(ABLATIONS)):
            raise FlashConfigError(
                f"without={unknown[0]!r} is unknown. Choose among {', '.join(map(repr, ABLATIONS))}."
            )
        if self.context is not None and (type(self.context) is not int or self.context < 1):
            raise FlashConfigError(f"context={self.context!r} must be a number of tokens, 1 or more.")

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the caller passes wins over what a repo's config says (transformers asks for these)."""
        defaults = FlashConfig().__dict__
        return {name: getattr(self, name) for name in LOADING_ATTRIBUTES if getattr(self, name) != defaults[name]}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: nothing that belongs to one machine (memory, folders, threads)."""
        out: dict[str, Any] = {
            "quant_method": QUANT_METHOD, "notice": NOTICE, "gate": self.gate, "delta": self.delta,
            "gate_bits": self.gate_bits, "window": self.window,
        }  # fmt: skip
        if self.gate == "threshold":
            out["sparsity"] = self.sparsity
        return {**{k: v for k, v in self.extra.items() if k != "notice"}, **out}

    def cap(self) -> int:
        """The memory cap in bytes: as passed, from the environment, or three quarters of what is available."""
        if self.memory is not None:
            return self.memory
        variable = os.environ.get(MEMORY_VARIABLE)
        if variable:
            try:
                return parse_size(variable)
            except FlashConfigError as error:
                raise FlashConfigError(f"{MEMORY_VARIABLE}: {error}") from error
        return int(available_memory() * 0.75)


def available_memory() -> int:
    """Bytes of DRAM that this process may still take: the system's, or its cgroup's where that is less."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, KeyError, ValueError), open("/proc/meminfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in _cgroup_files():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(available, 1)


def cgroup_limit() -> int | None:
    """The smallest memory limit of this process's cgroups in bytes, None where there is none."""
    limits = []
    for limit, _ in _cgroup_files():
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(limit.read_text()))
    return min((n for n in limits if n < 1 << 60), default=None)  # version 1 writes a huge number for no limit


def _cgroup_files() -> Iterator[tuple[Path, Path]]:
    """Limit and usage files of this process's memory cgroups and their parents, version 1 and 2."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / name.lstrip("/")
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            yield place / names[0], place / names[1]
