"""Log-probabilities of given tokens under a model: what perplexity and accuracy are made of.

The logits of a long pass are its largest tensor (1024 tokens x 49,152 entries in float32: 201 MB). So the model's body
runs once, and its head on a few positions at a time, through the model's own forward with the body's output put in:
scalings and caps that a model applies to its logits stay in force.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

PIECE_BYTES = 16 << 20  # logits and what is made of them, at a time
NO_TARGET = -100


class Scorer:
    """Scores tokens with a causal language model, stock or on flash.

    Args:
        model: in evaluation mode.
        piece_bytes: memory for logits at a time.

    Attributes:
        in_pieces: whether the model can give logits of some positions only; one that cannot gives all at once.
    """

    def __init__(self, model: Any, piece_bytes: int = PIECE_BYTES) -> None:
        self.model, self._piece_bytes = model, piece_bytes
        self.in_pieces = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        base = model.base_model
        self._bodies = [
            base,
            *(m for name in ("decoder", "text_model") if (m := getattr(base, name, None)) is not None),
        ]

    @torch.inference_mode()
    def score(
        self, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each target at its position.

        Args:
            inputs: B rows of token ids, [T_i] int64; shorter ones are padded on the right and masked.
            targets: as long as their inputs: the token that follows each position, NO_TARGET where none is scored.

        Returns:
            [B, T] float64 log-probabilities (natural), 0 where none is scored; [B, T] bool, True where the target is
            the likeliest token, and where none is scored.
        """
        ids = pad_sequence(list(inputs), batch_first=True)
        wanted = pad_sequence(list(targets), batch_first=True, padding_value=NO_TARGET)
        mask = pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True)
        scores = torch.zeros(wanted.shape, dtype=torch.float64)
        likeliest = torch.ones(wanted.shape, dtype=torch.bool)
        positions = (wanted != NO_TARGET).any(0).nonzero()[:, 0]
        for at, logits in self._logits(ids, mask, positions):
            target = wanted[:, at]
            index = target.clamp_min(0).unsqueeze(-1)
            found = logits.gather(-1, index).squeeze(-1).double() - logits.logsumexp(-1).double()
            scored = target != NO_TARGET
            scores[:, at] = torch.where(scored, found, 0.0)
            likeliest[:, at] = ~scored | (logits.argmax(-1) == target)
        return scores, likeliest

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Float32 logits [B, n, vocab] at some positions, some at a time."""
        arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        n = max(1, self._piece_bytes // (ids.shape[0] * vocab * (2 * 4 + self.model.dtype.itemsize)))
        if not self.in_pieces:
            logits = self.model(**arguments).logits
            for at in positions.split(n):
                yield at, logits[:, at].float()
            return
        pieces = positions.split(n)
        with contextlib.ExitStack() as stack:
            seen = stack.enter_context(_outputs(self._bodies))
            yield pieces[0], self.model(**arguments, logits_to_keep=pieces[0]).logits.float()
            body = next((module for module in self._bodies if module in seen), None)
            if len(pieces) > 1 and body is not None:
                stack.enter_context(_answer(body, seen[body]))
            for at in pieces[1:]:
                yield at, self.model(**arguments, logits_to_keep=at).logits.float()


@contextlib.contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """What each of some modules returned when it ran, filled in while the context is open."""
    seen: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            seen[module] = output

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _answer(module: nn.Module, output: Any) -> Iterator[None]:
    """The module returns `output`, whatever it is called with."""
    had = module.__dict__.get("forward")  # accelerate's hooks put one there
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if had is not None:
            module.__dict__["forward"] = had
