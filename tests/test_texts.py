"""Texts and questions from files: what is read, and what is refused with file, line and reason."""

import json
from pathlib import Path

import pytest

from hf_flash.errors import FlashError, TextError
from hf_flash.texts import Question, read_task, read_text

CHOICE = {"context": "Two and two are", "choices": [" four", " five", " six"], "label": 0, "id": 7}
TARGET = {"context": "She opened the", "target": " door"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffnaïve\n".encode())
    assert read_text(tmp_path / "a.txt") == "naïve\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"one\ntwo caf\xe9\n", "line 2: not UTF-8 (byte 0xe9)"),
        (None, "does not exist"),
    ],
)
def test_bad_texts(data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(TextError) as error:
        read_text(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert isinstance(error.value, FlashError) and isinstance(error.value, ValueError)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a folder"):
        read_text(tmp_path)


def test_choices(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "sums.jsonl", "", CHOICE, "  ", {**CHOICE, "label": 2}, ""))
    assert task.name == "sums" and not task.last_word
    assert task.questions[1] == Question("Two and two are", (" four", " five", " six"), 2) and len(task.questions) == 2


def test_last_words_and_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "words.jsonl", TARGET, TARGET, "this line is never reached")
    task = read_task(path, limit=2)
    assert task.last_word and task.questions == [Question("She opened the", (" door",), 0)] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{torn", "no JSON"),
        ('["a", "b"]', "list found, expected an object"),
        ({**CHOICE, "context": 3}, "`context` is 3, expected a string"),
        ({"choices": ["a", "b"], "label": 0}, "`context` is missing"),
        ({"context": "a"}, "`choices` is missing"),
        ({**CHOICE, "choices": ["one"]}, "expected a list of two strings or more"),
        ({**CHOICE, "choices": {"a": 1}}, "expected a list of two strings or more"),
        ({**CHOICE, "choices": ["one", " "]}, "choice 1 is ' '"),
        ({**CHOICE, "choices": ["one", 2]}, "choice 1 is 2"),
        ({"context": "a", "choices": ["b", "c"]}, "`label` is missing"),
        ({**CHOICE, "label": 3}, "`label` is 3, expected the number of the right choice, 0 to 2"),
        ({**CHOICE, "label": -1}, "`label` is -1"),
        ({**CHOICE, "label": True}, "`label` is True"),
        ({**CHOICE, "label": "0"}, "`label` is '0'"),
        ({**TARGET, "target": " "}, "`target` is ' '"),
        ({**TARGET, "target": None}, "`target` is None"),
        (TARGET, "Put them into two files"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_bad_questions_are_named_by_line(line: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", CHOICE, "", line)
    with pytest.raises(TextError) as error:
        read_task(path)
    assert f"{path}, line 3: " in str(error.value) and message in str(error.value) and len(str(error.value)) < 700


def test_a_file_of_questions_may_be_empty_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="has no question"):
        read_task(write(tmp_path / "none.jsonl", "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(CHOICE).encode() + b'\n{"context": "\xe9"}')
    with pytest.raises(TextError, match="line 2: not UTF-8"):
        read_task(tmp_path / "latin.jsonl")
