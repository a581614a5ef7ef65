"""A model on flash, its tokenizer, and one generation that is measured while its text streams out.

Prompt and new tokens are measured apart, because flash serves them differently: a prompt needs most of a layer at once
and is swept through, a new token needs few neurons, and those mostly from the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TextStreamer,
)  # fmt: skip

from hf_flash import quantizer
from hf_flash.budget import Plan
from hf_flash.errors import CheckpointError, FlashConfigError, MemoryCapError
from hf_flash.layout import format_size
from hf_flash.preview import Preview
from hf_flash.save import runtime_of
from hf_flash.stats import FlashStats


@dataclasses.dataclass(frozen=True)
class Phase:
    """One half of a generation: its tokens, its seconds, and what the flash side did (see FlashStats)."""

    n_tokens: int
    seconds: float
    stats: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.n_tokens / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from flash per token."""
        return self.stats["bytes_read"] / self.n_tokens if self.n_tokens else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the wanted neurons that were in DRAM; None if none was wanted."""
        wanted = self.stats["neurons_wanted"]
        return self.stats["neurons_hit"] / wanted if wanted else None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rates = {"tokens_per_s": self.tokens_per_s, "bytes_per_token": self.bytes_per_token, "hit_rate": self.hit_rate}
        return {"n_tokens": self.n_tokens, "seconds": self.seconds, **rates, **self.stats}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came out of a prompt, and what it cost.

    Attributes:
        text, token_ids: the new ones only.
        prompt: up to the first new token; its seconds are the time to first token.
        decode: the new tokens after the first.
        interrupted: Ctrl-C ended it.
        peak_rss_bytes: of the process. base_rss_bytes: before the model was opened.
    """

    text: str
    token_ids: list[int]
    prompt: Phase
    decode: Phase
    interrupted: bool
    peak_rss_bytes: int
    base_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "prompt": self.prompt.to_dict(), "decode": self.decode.to_dict()}


class Session:
    """A model that runs from flash, and the tokenizer that belongs to it.

    Attributes:
        model, tokenizer: ready to use. load_s: seconds it took to open the model.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, load_s: float, base_rss_bytes: int) -> None:
        self.model, self.tokenizer, self.load_s, self._base = model, tokenizer, load_s, base_rss_bytes

    @classmethod
    def open(cls, preview: Preview, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Session:
        """Load the model that a preview is of, with the preview's options.

        Args:
            preview: of a converted or a stock checkpoint; a stock one is repacked into the cache first.
            tokenizer: what `load_tokenizer` gave.
            kwargs: of from_pretrained: revision, trust_remote_code.

        Raises:
            FlashError: it cannot run from flash, and why.
        """
        base = _status_bytes("VmRSS")
        with contextlib.suppress(OSError):  # forget the peak so far, where the kernel lets us
            Path("/proc/self/clear_refs").write_text("5")
        start = time.monotonic()
        model = open_model(preview, **kwargs)
        return cls(model, tokenizer, time.monotonic() - start, base)

    @property
    def stats(self) -> FlashStats:
        """The model's counters."""
        return runtime_of(self.model).stats

    def generate(
        self, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, on_text: Callable[[str], None], **kwargs: Any
    ) -> Generation:
        """Generate from one prompt, greedily unless told otherwise, and measure.

        Args:
            inputs: what `encode` gave.
            max_new_tokens: at most.
            on_text: called with each piece of text as soon as it is certain.
            kwargs: of generate, such as do_sample and temperature.

        Returns:
            Text, tokens and figures; of what there was until then if Ctrl-C ended it.
        """
        meter = _Meter(self.tokenizer, self.stats, on_text)
        interrupted = False
        try:
            with torch.inference_mode():
                self.model.generate(
                    **inputs, **{"do_sample": False, "num_beams": 1, **kwargs}, max_new_tokens=max_new_tokens,
                    streamer=meter,
                )  # fmt: skip
        except KeyboardInterrupt:
            interrupted = True
        prompt, decode = meter.phases(inputs["input_ids"].shape[1])
        return Generation(
            "".join(meter.pieces),
            meter.tokens,
            prompt,
            decode,
            interrupted,
            max(_status_bytes("VmHWM"), self._base),
            self._base,
        )


def open_model(preview: Preview, **kwargs: Any) -> Any:
    """Load the model that a preview is of, with the preview's options; see `Session.open`."""
    quantizer.register()
    auto = AutoModelForSeq2SeqLM if preview.skeleton.config.is_encoder_decoder else AutoModelForCausalLM
    options = {"quantization_config": preview.config, "dtype": preview.skeleton.dtype}
    return auto.from_pretrained(preview.name, **options, **kwargs).eval()


class _Meter(TextStreamer):
    """Streams text on, and notes the time and the counters when the prompt is done and when the last token is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stats: FlashStats, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stats, self._on_text = stats, on_text
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self._marks = [self._mark()] * 3  # at the start, at the first new token, at the last

    def _mark(self) -> tuple[float, dict[str, Any]]:
        return time.monotonic(), self._stats.counters()

    def put(self, value: torch.Tensor) -> None:
        """Take a prompt or a token from generate()."""
        if not self.next_tokens_are_prompt:
            now = self._mark()
            self._marks[1:] = [self._marks[1] if self.tokens else now, now]
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on text that no later token can change."""
        self.pieces.append(text)
        self._on_text(text)

    def phases(self, n_prompt: int) -> tuple[Phase, Phase]:
        """Prompt with the first new token, and the new tokens after it."""
        (t0, a), (t1, b), (t2, c) = self._marks
        prompt = Phase(n_prompt, t1 - t0, {k: b[k] - a[k] for k in a})
        return prompt, Phase(max(0, len(self.tokens) - 1), t2 - t1, {k: c[k] - b[k] for k in a})


def load_tokenizer(
    name: str, *, instead: str = "Give another's with --tokenizer FOLDER_OR_REPO.", **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: folder or Hub repo.
        instead: what to do where there is none, for the error.
        kwargs: of from_pretrained: revision, trust_remote_code.

    Raises:
        CheckpointError: there is none that could be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of OPT without the files
            raise ValueError("the files of its vocabulary are missing")
        return tokenizer
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name} has no tokenizer that could be read ({why}). {instead}") from error


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool = False, system: str | None = None
) -> dict[str, torch.Tensor]:
    """Tokens of a prompt, in the chat template where there is one.

    Args:
        prompt: text.
        raw: leave the template out.
        system: system message, for a template.

    Returns:
        Arguments of generate: input_ids [1, n] and attention_mask [1, n].

    Raises:
        FlashConfigError: a system message without a template, or an empty prompt.
    """
    if tokenizer.chat_template is None or raw:
        if system is not None:
            raise FlashConfigError("A system message needs a chat template; none is used here. Leave --system out.")
        out = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        out = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if not out["input_ids"].numel():
        raise FlashConfigError("The prompt is empty. Give some text with --prompt.")
    return {name: out[name] for name in ("input_ids", "attention_mask") if name in out}


def fit_context(preview: Preview, inputs: Mapping[str, torch.Tensor], max_new_tokens: int) -> Preview:
    """Plan for the tokens that one generation will need, unless the options say for how many.

    Args:
        preview: of the model. inputs: what `encode` gave. max_new_tokens: of the generation.

    Raises:
        FlashConfigError: the model, or the context that was asked for, has no room for them.
    """
    n_prompt = inputs["input_ids"].shape[1]
    both = preview.skeleton.config.is_encoder_decoder  # each half has its own positions
    needed = max(n_prompt, max_new_tokens) if both else n_prompt + max_new_tokens
    text = preview.skeleton.config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    for name, most in (("the model takes", limit), ("--context plans for", preview.config.context)):
        if most is not None and needed > most:
            raise FlashConfigError(
                f"The prompt has {n_prompt} tokens, {max_new_tokens} new ones are asked for; {name} {most}. Shorten "
                "the prompt or lower --max-new-tokens."
            )
    return preview if preview.config.context else preview.with_options(context=needed)


def planned(preview: Preview) -> Plan:
    """The plan; where there is none, an error in the command line's words.

    Raises:
        MemoryCapError: the cap is too small; names the smallest that would do.
    """
    cap, smallest = preview.config.cap(), preview.smallest_cap
    if cap >= smallest:
        return preview.plan()
    demand = preview.demand
    spent = demand.kv_bytes + demand.activation_bytes
    hint = (
        f" {format_size(spent)} of it are for {demand.context} tokens: a shorter --context needs less."
        if spent > smallest // 4
        else ""
    )
    raise MemoryCapError(
        f"a memory cap of {format_size(cap)} is too small for {preview.name}; the smallest that would do is "
        f"{format_size(smallest)}.{hint} Pass --memory {smallest >> 20}MiB or more."
    )


def _status_bytes(field: str) -> int:
    """A figure of /proc/self/status in bytes; where there is none, the largest resident size so far."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
