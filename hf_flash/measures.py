"""Measuring a causal language model: a text's perplexity, answers to questions, one token at a time.

Questions are scored as lm-evaluation-harness does, so that figures can be compared with others':

- A text becomes tokens, behind the tokenizer's first token (BOS, else EOS). A pass sees `window` of them and predicts
  each next one; the next pass starts `stride` later and is scored on what is new in it. With stride = window (the
  default) every token is predicted once, with up to `window` tokens before it.
- A choice's score is the sum of its tokens' log-probabilities behind the context; `acc` takes the highest, `acc_norm`
  the highest per character. A last word is right if each of its tokens is the likeliest.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_flash import kv
from hf_flash.errors import CheckpointError, TextError
from hf_flash.ffn import FlashFFN
from hf_flash.scoring import NO_TARGET, Scorer
from hf_flash.sparse import SparseEngine
from hf_flash.stats import FlashStats
from hf_flash.texts import Task, read_text


@dataclasses.dataclass(frozen=True)
class TextScore:
    """A text's log-likelihood `nats` (negative), over so many tokens, words and bytes; `windows` passes."""

    name: str
    tokens: int
    words: int
    bytes: int
    windows: int
    nats: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the ratios."""
        return {
            **dataclasses.asdict(self), "perplexity": math.exp(-self.nats / self.tokens),
            "word_perplexity": _exp(-self.nats / self.words), "bits_per_byte": -self.nats / self.bytes / math.log(2),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Answers to a file of questions.

    Attributes:
        name, n: of the file, and its questions. last_word: their kind.
        acc: share that is right. acc_norm: with scores per character; None for last words.
        perplexity: of last words, a word; None for choices.
        stderr: standard error of `acc`.
        n_cut: contexts that were longer than a window and lost their beginning.
        answers: which choice was taken for each question (last words: 0 where it was guessed, else -1).
    """

    name: str
    n: int
    last_word: bool
    acc: float
    acc_norm: float | None
    perplexity: float | None
    stderr: float
    n_cut: int
    answers: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One token at a time through the beginning of a text, after a prompt.

    Attributes:
        tokens: measured. perplexity: of them. stats: what the flash side did for them (see FlashStats), else None.
        share_wanted: neurons that the gate named for a token, of all in its layers; None without such a gate.
    """

    tokens: int
    perplexity: float
    stats: dict[str, Any] | None
    share_wanted: float | None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read from flash for a token."""
        return None if self.stats is None else self.stats["bytes_read"] / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "bytes_per_token": self.bytes_per_token}


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens of a text behind a first one [1 + n], and what of it they are."""

    name: str
    ids: torch.Tensor
    words: int
    bytes: int


def score_text(scorer: Scorer, text: Text, window: int, stride: int, batch_size: int, bar: Any) -> TextScore:
    """Log-likelihood of a text.

    Args:
        scorer: of the model. text: its tokens. window, stride, batch_size: of the passes.
        bar: advanced by tokens.
    """
    passes, nats = windows(len(text.ids) - 1, window, stride), 0.0
    for i in range(0, len(passes), batch_size):
        rows = [_pass(text.ids, *found) for found in passes[i : i + batch_size]]
        scores, _ = scorer.score([inputs for inputs, _ in rows], [targets for _, targets in rows])
        nats += float(scores.sum())
        bar.update(sum(int((targets != NO_TARGET).sum()) for _, targets in rows))
    return TextScore(text.name, len(text.ids) - 1, text.words, text.bytes, len(passes), nats)


def windows(n: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Passes over n tokens to predict: (first input, one after the last, first that is scored) by position.

    Position i predicts token i; every token is predicted in one pass.
    """
    out, done, start = [], 0, 0
    while done < n:
        stop = min(start + window, n)
        out.append((start, stop, done))
        done, start = stop, start + stride
    return out


def _pass(ids: torch.Tensor, start: int, stop: int, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets = ids[start + 1 : stop + 1].clone()
    targets[: scored - start] = NO_TARGET
    return ids[start:stop], targets


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A context with one choice behind it, in tokens: inputs and targets; of which question; was it cut."""

    question: int
    inputs: torch.Tensor
    targets: torch.Tensor
    cut: bool


def answer(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase, task: Task, window: int, batch_size: int, bar: Any
) -> TaskScore:
    """Have a model answer a file of questions.

    Args:
        scorer, tokenizer: of the model. task: the questions.
        window, batch_size: a pass has window * batch_size tokens at most, padding included.
        bar: advanced a question at a time.

    Raises:
        TextError: a choice has more tokens than a window.
    """
    pairs = [
        _pair(tokenizer, i, question.context, choice, window, task.name)
        for i, question in enumerate(task.questions) for choice in question.choices
    ]  # fmt: skip
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].inputs))  # a pass too large fails at once
    scores, guessed = [0.0] * len(pairs), [False] * len(pairs)
    left = [len(question.choices) for question in task.questions]
    for batch in _batches(order, pairs, window * batch_size):
        found, likeliest = scorer.score([pairs[i].inputs for i in batch], [pairs[i].targets for i in batch])
        for i, row, all_likeliest in zip(batch, found.sum(1).tolist(), likeliest.all(1).tolist(), strict=True):
            scores[i], guessed[i] = row, all_likeliest
            left[pairs[i].question] -= 1
            bar.update(left[pairs[i].question] == 0)
    n_cut = len({pair.question for pair in pairs if pair.cut})
    return _task_score(task, scores, guessed, n_cut)


def _batches(order: list[int], pairs: list[_Pair], tokens: int) -> Iterator[list[int]]:
    """Pairs, longest first, in batches of at most so many tokens with their padding."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(pairs[batch[0]].inputs) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _pair(
    tokenizer: PreTrainedTokenizerBase, question: int, context: str, choice: str, window: int, name: str
) -> _Pair:
    """Tokens of a context and of what follows it; blanks at the context's end count as the latter's."""
    stripped = context.rstrip()
    if stripped:
        whole = tokenizer(context + choice).input_ids
        n_context = len(tokenizer(stripped).input_ids)
    else:
        whole, n_context = (
            [_first_token(tokenizer), *tokenizer(context + choice, add_special_tokens=False).input_ids],
            1,
        )
    n = len(whole) - n_context
    if not 1 <= n <= window:
        raise TextError(
            f"{name}, question {question}: {choice[:40]!r} has {n} tokens, expected 1 to {window}. A larger --window "
            "takes longer choices."
        )
    kept = torch.tensor(whole[-(window + 1) :])
    targets = kept[1:].clone()
    targets[:-n] = NO_TARGET
    return _Pair(question, kept[:-1], targets, len(whole) > window + 1)


def _task_score(task: Task, scores: list[float], guessed: list[bool], n_cut: int) -> TaskScore:
    at, answers, normed = 0, [], []
    for question in task.questions:
        own = scores[at : at + len(question.choices)]
        if task.last_word:
            answers.append(0 if guessed[at] else -1)
        else:
            answers.append(max(range(len(own)), key=own.__getitem__))
            lengths = [len(choice.lstrip()) for choice in question.choices]  # the blank before it is not the choice's
            per_character = [score / length for score, length in zip(own, lengths, strict=True)]
            normed.append(max(range(len(own)), key=per_character.__getitem__))
        at += len(own)
    labels, n = [question.label for question in task.questions], len(task.questions)
    acc = sum(a == b for a, b in zip(answers, labels, strict=True)) / n
    norm = None if task.last_word else sum(a == b for a, b in zip(normed, labels, strict=True)) / n
    perplexity = _exp(-sum(scores) / n) if task.last_word else None
    stderr = math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else math.nan
    return TaskScore(task.name, n, task.last_word, acc, norm, perplexity, stderr, n_cut, answers)


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, n_prompt: int, stats: FlashStats | None, bar: Any) -> Decoding:
    """Feed a text's own tokens one at a time, as generation would, and count what is read.

    Args:
        model: stock or on flash. ids: [n_prompt + n + 1]. n_prompt: tokens that come in one pass, unmeasured.
        stats: of a model on flash. bar: advanced a token at a time.
    """
    tail = {"logits_to_keep": 1} if Scorer(model).in_pieces else {}
    out = model(input_ids=ids[None, :n_prompt], use_cache=True, **tail)
    before = {} if stats is None else stats.counters()
    nats, n = 0.0, len(ids) - n_prompt - 1
    for i in range(n_prompt, n_prompt + n):
        out = model(input_ids=ids[None, i : i + 1], **kv.carried(out), use_cache=True)
        nats += float(out.logits[0, -1].float().log_softmax(-1)[ids[i + 1]])
        bar.update()
    perplexity = math.exp(-nats / n)
    if stats is None:
        return Decoding(n, perplexity, None, None)
    counts = {name: value - before[name] for name, value in stats.counters().items()}
    gated = [m for m in model.modules() if isinstance(m, FlashFFN) and isinstance(m.engine, SparseEngine)]
    n_neurons = sum(ffn.block.d_ffn for ffn in gated)
    return Decoding(n, perplexity, counts, counts["neurons_wanted"] / n / n_neurons if n_neurons else None)


def tokens_of(path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> Text:
    """A text's tokens, or its first `most`, and the words and bytes that they stand for.

    Raises:
        TextError: the file cannot be read, or has too few tokens.
    """
    whole = read_text(path)
    n_chars = len(whole) if most is None else 16 * (most + 64)  # tokenizing no more than is needed, and a bit behind it
    while True:
        text = whole[:n_chars]
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        if most is None or len(found.input_ids) >= most + 64 or n_chars >= len(whole):
            break
        n_chars *= 2
    ids = found.input_ids[:most]
    if len(ids) < len(found.input_ids):
        text = text[: found.offset_mapping[len(ids) - 1][1]] if tokenizer.is_fast else str(tokenizer.decode(ids))
    if len(ids) < 2:
        raise TextError(f"{path} is too short: {len(ids)} tokens, expected 2 at least. Give a longer text.")
    words = len(re.findall(r"\S+", text))
    return Text(Path(path).name, torch.tensor([_first_token(tokenizer), *ids]), words, len(text.encode()))


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text: BOS, else EOS, as in lm-evaluation-harness.

    Raises:
        CheckpointError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CheckpointError("The tokenizer has neither a BOS nor an EOS token to put before a text.")


def _exp(x: float) -> float:
    """e^x, infinite where that is too large: a broken model is still a result."""
    return math.exp(x) if x < 700 else math.inf
