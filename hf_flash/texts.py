"""Texts and files of questions, as a user hands them over: read, checked, and refused with the line that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_flash.errors import TextError


@dataclasses.dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of that does.

    Attributes:
        context: may be empty.
        choices: each is put behind the context as it stands, blanks included; one alone where a last word is asked for.
        label: the right one, 0 <= label < len(choices).
    """

    context: str
    choices: tuple[str, ...]
    label: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """A file of questions, all of one kind: several choices, or (`last_word`) one target that is to be guessed."""

    name: str
    questions: list[Question]
    last_word: bool


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 text file; a byte order mark is dropped.

    Raises:
        TextError: it is missing, a folder, not UTF-8, or holds nothing but blanks.
    """
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, 1 + data[: error.start].count(b"\n")) from None
    if not text.strip():
        raise TextError(f"{path} is empty. Give a file with some text in it.")
    return text


def read_task(path: str | os.PathLike[str], limit: int | None = None) -> Task:
    """A file of questions, one JSON object a line: `context` and `choices` and `label`, or `context` and `target`.

    Args:
        path: the task is called as its file, without the suffix.
        limit: stop after so many questions.

    Raises:
        TextError: it cannot be read, has no question, or a line is wrong; names file, line and field.
    """
    questions: list[Question] = []
    kinds: set[bool] = set()
    for number, line in _lines(path):
        question, last_word = _question(line, f"{path}, line {number}")
        questions.append(question)
        kinds.add(last_word)
        if len(kinds) > 1:
            raise TextError(
                f"{path}, line {number}: some lines have `choices`, others a `target`. Put them into two files."
            )
        if len(questions) == limit:
            break
    if not questions:
        raise TextError(f"{path} has no question in it. Write one JSON object a line.")
    return Task(Path(path).stem, questions, kinds.pop())


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path} does not exist. Give a UTF-8 text file.") from None
    except IsADirectoryError:
        raise TextError(f"{path} is a folder. Give a file in it.") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}).") from error


def _not_utf8(path: str | os.PathLike[str], error: UnicodeDecodeError, line: int) -> TextError:
    return TextError(
        f"{path}, line {line}: not UTF-8 (byte {error.object[error.start]:#04x}). Convert it first, perhaps with "
        f"`iconv -f WINDOWS-1252 -t UTF-8 {path}`."
    )


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Number and JSON value of every line that is not blank."""
    for number, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, number) from None
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(
                f"{path}, line {number}: no JSON ({error}). Each line is one object such as "
                '{"context": "2 + 2 =", "choices": [" 4", " 5"], "label": 0}.'
            ) from None


def _question(line: Any, where: str) -> tuple[Question, bool]:
    """A checked question, and whether it asks for a last word."""
    if not isinstance(line, dict):
        raise TextError(f"{where}: {type(line).__name__} found, expected an object with `context` and `choices`.")
    context = line.get("context")
    if not isinstance(context, str):
        raise TextError(f"{where}: `context` is {_found(line, 'context')}, expected a string.")
    if "target" in line and "choices" not in line:
        target = line["target"]
        if not isinstance(target, str) or not target.strip():
            raise TextError(f"{where}: `target` is {_found(line, 'target')}, expected the text that follows.")
        return Question(context, (target,)), True
    choices, label = line.get("choices"), line.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise TextError(f"{where}: `choices` is {_found(line, 'choices')}, expected a list of two strings or more.")
    bad = next((i for i, c in enumerate(choices) if not isinstance(c, str) or not c.strip()), None)
    if bad is not None:
        raise TextError(f"{where}: choice {bad} is {choices[bad]!r}, expected a string that is not empty.")
    if type(label) is not int or not 0 <= label < len(choices):
        raise TextError(
            f"{where}: `label` is {_found(line, 'label')}, expected the number of the right choice, 0 to "
            f"{len(choices) - 1}."
        )
    return Question(context, tuple(choices), label), False


def _found(line: dict[str, Any], name: str) -> str:
    if name not in line:
        return "missing"
    shown = repr(line[name])
    return shown if len(shown) <= 60 else shown[:57] + "..."
