"""Texts are taken from all over a file, and what is no text is told apart."""

import itertools
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from hf_flash.corpus import check_text, sequences
from hf_flash.errors import FlashConfigError


def test_a_short_text_is_taken_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The old man sat down by the fire, and said nothing. " * 200
    (tmp_path / "t").write_text(text)
    want = tokenizer(text)["input_ids"]
    got = sequences(tmp_path / "t", tokenizer, 64, 100_000)
    assert got.shape == (len(want) // 64, 64)
    assert got.flatten().tolist() == want[: got.numel()]


def test_a_long_text_is_sampled_evenly(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    numbers = "".join(f"{i} and naïve café ☕ then " for i in range(60_000))
    (tmp_path / "t").write_text(numbers)
    got = sequences(tmp_path / "t", tokenizer, 128, 128 * 20)
    assert got.shape == (20, 128)
    words = [tokenizer.decode(row).split() for row in got]
    found = [next(int(w) for w in row if w.isdecimal() and len(w) >= 1) for row in words]
    assert found == sorted(found)
    assert found[0] < 10
    assert found[-1] > 50_000
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert max(gaps) < 1.5 * min(gaps[1:])
    assert "�" not in "".join(tokenizer.decode(row)[2:-2] for row in got)


@pytest.mark.parametrize("content,match", [
    (b"", "is empty"),
    (b" \n\t\n ", "is empty"),
    (b"caf\xe9 au lait", "not UTF-8: byte 3 "),
    (b"a" * (1 << 20) + b"x\xff", f"not UTF-8: byte {(1 << 20) + 1} "),
    (b"a" * ((1 << 20) - 1) + b"\xe2\x98", f"not UTF-8: byte {(1 << 20) - 1} "),
])  # fmt: skip
def test_what_is_no_text_is_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(FlashConfigError, match=match):
        check_text(tmp_path / "t")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(FlashConfigError, match="No such file"):
        check_text(tmp_path / "none")
    with pytest.raises(FlashConfigError, match="Is a directory"):
        check_text(tmp_path)


def test_a_character_across_a_block_is_one(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"a" * ((1 << 20) - 1) + "☕".encode())
    assert len(check_text(tmp_path / "t")) == 64


def test_a_text_that_is_too_short_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "t").write_text("Once upon a time.")
    with pytest.raises(FlashConfigError, match="too short, a sequence alone takes 64"):
        sequences(tmp_path / "t", tokenizer, 64, 1000)
