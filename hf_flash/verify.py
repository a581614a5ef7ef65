"""Is a flash checkpoint whole? Every byte of it, and whether its files belong together.

Each safetensors file that `repack` writes covers itself with checksums (format.py), header and padding included, so a
flipped, missing or added byte anywhere is found. What one file cannot know is checked across files: that the index
names what is there, that config.json describes the model whose bundles lie beside it, that nothing is missing.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_flash import attach
from hf_flash.checkpoint import WEIGHTS_INDEX, checkpoint_files, load_json, locate
from hf_flash.config import QUANT_METHOD
from hf_flash.errors import CheckpointError, FlashError, UnknownArchitectureError
from hf_flash.families import FFNBlock, find_blocks, get_activation, zero_below
from hf_flash.format import TensorFile, read_header, verify_file
from hf_flash.preview import named_geometry, skeleton_of
from hf_flash.repack import parts_of
from hf_flash.store import GATES_NAME, INDEX_NAME, LAYERS_KEY, names_in_index


@dataclasses.dataclass(frozen=True)
class FileReport:
    """One file: its role ("flash", "sketches", "resident" or "stray"), its size, and what is wrong with it."""

    name: str
    role: str
    n_bytes: int
    problems: list[str]
    checked: bool = True  # False: it carries no checksums, so only its header was read


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        folder: that was checked.
        files: a report per safetensors file.
        problems: everything that is wrong, a line each; empty when the checkpoint is whole.
        notes: what could not be checked, and why. n_bytes: read. seconds: taken.
    """

    folder: str
    files: list[FileReport]
    problems: list[str]
    notes: list[str]
    n_bytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "ok": self.ok}


def verify(folder: str | os.PathLike[str], progress: bool = True, *, trust_remote_code: bool = False) -> VerifyReport:
    """Check every byte of a flash checkpoint, and that its files belong together.

    Args:
        folder: what `repack`, `save_pretrained` or a download wrote.
        progress: show a bar.
        trust_remote_code: as in from_pretrained, for models that bring their own code.

    Returns:
        What was found; `.ok` says whether it is whole.

    Raises:
        CheckpointError: there is no such folder, or it holds no flash checkpoint at all.
    """
    start, path = time.monotonic(), Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{folder} is no folder. Give one that `hf-flash repack` wrote.")
    problems, notes = [], []
    config_problem = _config_problem(path)
    if config_problem and not (path / INDEX_NAME).is_file() and not any(path.glob("flash-*.safetensors*")):
        raise CheckpointError(config_problem)
    if config_problem:
        problems.append(config_problem)
    roles, missing = _files(path)
    problems += missing
    reports = _check_files(path, roles, progress)
    for report in reports:
        problems += report.problems
        if not report.checked:
            notes.append(f"{report.name} carries no checksums (not ours): only its header was checked.")
    if not problems:
        problems += _together(path, roles, trust_remote_code, notes.append)
    n_bytes = sum(report.n_bytes for report in reports)
    return VerifyReport(os.fspath(folder), reports, problems, notes, n_bytes, time.monotonic() - start)


def _config_problem(folder: Path) -> str | None:
    try:
        raw = load_json(folder / "config.json")
        method = (raw.get("quantization_config") or {}).get("quant_method")
    except CheckpointError as error:
        return str(error)
    except AttributeError:
        return f"{folder / 'config.json'} is JSON, but no config."
    if method == QUANT_METHOD:
        return None
    found = f"one quantized with {method!r}" if method else "a stock checkpoint"
    return (
        f"{folder} is {found} by its config.json, not a flash checkpoint (quant_method {QUANT_METHOD!r}). Make one "
        f"with `hf-flash repack {folder} OUTPUT`."
    )


def _files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Role by name of every safetensors file that is there, and a problem for each that should be."""
    expected: dict[str, str] = {}
    problems: list[str] = []
    for role, names in (
        ("flash", lambda: names_in_index(folder / INDEX_NAME)),
        ("resident", lambda: [path.name for path in checkpoint_files(folder)]),
    ):
        try:
            expected.update(dict.fromkeys(names(), role))
        except CheckpointError as error:
            problems.append(str(error))
    problems += [
        f"{folder / name} is missing: {INDEX_NAME} names it. Fetch it again, or repack."
        for name in expected
        if not (folder / name).is_file()
    ]
    there = {path.name: "stray" for path in sorted(folder.glob("*.safetensors"))}
    there |= {name: role for name, role in expected.items() if (folder / name).is_file()}
    if GATES_NAME in there:
        there[GATES_NAME] = "sketches"
    if problems and any(folder.glob("*.partial")):
        problems.append(f"{folder} is what an interrupted repack left: run the same `hf-flash repack` again to go on.")
    return dict(sorted(there.items())), problems


def _check_files(folder: Path, roles: Mapping[str, str], progress: bool) -> list[FileReport]:
    total = sum((folder / name).stat().st_size for name in roles)
    reports = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="Verifying", disable=not progress) as bar:
        for name, role in roles.items():
            path = folder / name
            checked = role != "resident" or _has_checksums(path)
            problems = verify_file(path, bar.update) if checked else _header_problems(path)
            with open(path, "rb") as file:  # a checkpoint that was read once need not push others out of the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            reports.append(FileReport(name, role, path.stat().st_size, problems, checked))
        bar.update(max(0, total - bar.n))
    return reports


def _has_checksums(path: Path) -> bool:
    """False for a resident file that transformers wrote. One damaged byte cannot make ours look like that."""
    try:
        keys = read_header(path).metadata
    except CheckpointError:
        return True
    return any(key in keys for key in ("hf_flash.format_version", "hf_flash.crc32", "hf_flash.header_crc32"))


def _header_problems(path: Path) -> list[str]:
    try:
        read_header(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def _together(
    folder: Path, roles: Mapping[str, str], trust_remote_code: bool, note: Callable[[str], None]
) -> list[str]:
    """What is wrong between files that are each whole."""
    headers = {name: read_header(folder / name) for name in roles}
    problems = _index_problems(folder, headers)
    for name in [name for name, role in roles.items() if role == "stray"]:
        note(f"{name} is named by no index and will not be read; it may be removed.")
    files = checkpoint_files(folder)
    try:
        attach.match_sources(folder / name for name, role in roles.items() if role != "stray")
    except CheckpointError as error:
        problems.append(str(error))
    try:
        skeleton = skeleton_of(folder, files, trust_remote_code=trust_remote_code)
    except UnknownArchitectureError as error:
        note(f"Whether the bundles are this model's was not checked: {error}")
        return problems
    try:
        blocks = find_blocks(skeleton)
        sketches = folder / GATES_NAME
        flash = {name: folder / name for name, role in roles.items() if role == "flash"}
        geometry = named_geometry(skeleton, blocks, flash, sketches if sketches.is_file() else None)
        attach.match_geometry(blocks, geometry, str(folder))
        guards = locate(skeleton, files).by_param
    except FlashError as error:
        return [*problems, str(error)]
    if any(zero_below(get_activation(skeleton, b)) is not None and not geometry[b.path].sketch_bits for b in blocks):
        problems.append(f"{sketches} is missing or lacks sketches. Fetch it again, or repack.")
    return problems + _guard_problems(folder, blocks, guards)


def _guard_problems(folder: Path, blocks: list[FFNBlock], located: Mapping[str, Any]) -> list[str]:
    """The 0-element tensors that keep stock transformers from loading the folder with random FFNs."""
    lacking = [part.key for b in blocks for part in parts_of(b) if part.key not in located or located[part.key].n_bytes]
    if not lacking:
        return []
    return [f"{folder}: no guard tensor for {lacking[0]} ({len(lacking)} in all). Repack the checkpoint."]


def _index_problems(folder: Path, headers: Mapping[str, TensorFile]) -> list[str]:
    problems = []
    listed = load_json(folder / INDEX_NAME)["weight_map"]
    for name, header in headers.items():
        there = {entry for entry in header.entries if LAYERS_KEY in header.metadata and entry.endswith(".bundles")}
        for tensor in sorted(there ^ {t for t, file in listed.items() if file == name}):
            where = "not listed in" if tensor in there else "missing, but listed in"
            if name in listed.values():
                problems.append(f"{folder / name}: tensor {tensor} is {where} {INDEX_NAME}. Repack the checkpoint.")
    if (folder / WEIGHTS_INDEX).is_file():
        for tensor, name in load_json(folder / WEIGHTS_INDEX)["weight_map"].items():
            if tensor not in headers[name].entries:
                problems.append(f"{folder / name} lacks tensor {tensor}, which {WEIGHTS_INDEX} lists there.")
    return problems
