"""A text as token ids: the sequences that a model is shown when something is to be learned about it."""

from __future__ import annotations

import codecs
import hashlib
import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hf_flash.errors import FlashConfigError

_BLOCK = 1 << 20
_SAMPLE = 1 << 16  # bytes from which bytes per token are told


def check_text(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a text file, once it is known to be one.

    Raises:
        FlashConfigError: there is none, it is empty, or it is not UTF-8.
    """
    path, digest, decoder, at, blank = Path(path), hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, True
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                blank = not decoder.decode(block).strip() and blank
                at += len(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        where = at + error.start - len(decoder.getstate()[0])
        raise FlashConfigError(
            f"{path} is not UTF-8: byte {max(0, where)} is no part of a character. Convert it, with "
            f"`iconv -f ISO-8859-1 -t UTF-8 {path}` if it is Latin-1, say."
        ) from None
    except OSError as error:
        raise FlashConfigError(f"{path} cannot be read: {error.strerror}. Give a text file.") from error
    if blank:
        raise FlashConfigError(f"{path} is empty: there is nothing to learn from. Give a file with text.")
    return digest.hexdigest()


def sequences(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int
) -> torch.Tensor:
    """Token ids from all over a text.

    Where the text is longer than what is wanted, pieces at even distances are taken: what comes first in a file is
    seldom like all of it.

    Args:
        path: of a file that `check_text` accepts.
        tokenizer: of the model.
        length: tokens a sequence.
        max_tokens: of all sequences at most.

    Returns:
        [n_sequences, length] int64; what is left over at the end of the text is dropped.

    Raises:
        FlashConfigError: the text has fewer tokens than one sequence, or the tokenizer makes none of it.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = _ids(file.read(_SAMPLE), tokenizer)
        if not len(first):
            raise FlashConfigError(f"The tokenizer makes no token of the beginning of {path}: it is not this model's.")
        per_token = min(size, _SAMPLE) / max(1, len(first))
        n_pieces = max(1, min(max_tokens // length, int(size / per_token / length)))
        piece = int(length * per_token * 2)
        found: list[torch.Tensor] = []
        if size <= n_pieces * piece:  # all of it, block by block
            file.seek(0)
            while sum(map(len, found)) < max_tokens and (block := file.read(_BLOCK)):
                found.append(_ids(block, tokenizer))
        for i in range(0 if found else n_pieces):
            file.seek(i * (size // n_pieces))
            found.append(_ids(file.read(piece), tokenizer, cut=i > 0)[:length])
    ids = torch.cat(found)[:max_tokens]
    n = len(ids) // length
    if not n:
        raise FlashConfigError(
            f"{path} has {len(ids)} tokens: too short, a sequence alone takes {length}. Give more text."
        )
    return ids[: n * length].view(n, length)


def _ids(block: bytes, tokenizer: PreTrainedTokenizerBase, cut: bool = False) -> torch.Tensor:
    """Tokens of some bytes; a character that is cut off at either end is dropped, and a word at the beginning."""
    text = block.decode("utf-8", errors="ignore")
    if cut:
        text = text.partition(" ")[2]
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
