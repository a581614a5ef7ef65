"""The folder that a repacking writes: what may be overwritten, whether it fits, and what is left in it at the end.

Written last, config.json says that a folder is finished; without it transformers loads nothing from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_flash.checkpoint import WEIGHTS_INDEX, WEIGHTS_NAME, load_json
from hf_flash.errors import CheckpointError, DiskFullError
from hf_flash.format import SOURCE_KEY, read_header
from hf_flash.layout import format_size

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".partial")
_MINE = ("config.json", "README.md", WEIGHTS_INDEX, "pytorch_model.bin.index.json")
_TEMPLATES = ("chat_templates", "additional_chat_templates")


def check_folders(source: Path, output: Path) -> None:
    """Refuse an output that is no folder, the source itself, or another checkpoint.

    Raises:
        CheckpointError: which, and what to give instead.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; give the name of a folder to write.")
    if output.resolve() == source.resolve():
        raise CheckpointError(f"{output} is the source itself; give another folder, nothing is repacked in place.")
    if (output / "config.json").is_file():
        method = (load_json(output / "config.json").get("quantization_config") or {}).get("quant_method")
        if method != "hf_flash":
            raise CheckpointError(f"{output} holds another checkpoint; give a new or an empty folder.")


def check_contents(output: Path, identity: str) -> None:
    """Refuse to overwrite weights that somebody can use and that this source would not give again.

    Args:
        output: the folder.
        identity: of the source.

    Raises:
        CheckpointError: which file, and what to do.
    """
    finished = (output / "config.json").is_file()
    for path in sorted(output.glob("*.safetensors")):
        try:
            origin = read_header(path).metadata.get(SOURCE_KEY)
        except CheckpointError:
            continue  # torn: to be written again
        if origin is None or (finished and not origin.startswith(identity)):
            raise CheckpointError(
                f"{output} holds another checkpoint ({path.name} was not made from this source); give a new or an "
                "empty folder, or delete that one first."
            )


def check_room(output: Path, n_bytes: int) -> None:
    """Refuse to start what will not fit; what an earlier run left in the folder counts as room.

    Raises:
        DiskFullError: bytes needed, bytes free, and what to do.
    """
    needed = int(n_bytes * 1.02)
    have = shutil.disk_usage(output).free + sum(f.stat().st_size for f in output.iterdir() if f.is_file())
    if have < needed:
        raise DiskFullError(
            f"No room in {output}: the repacked checkpoint takes about {format_size(needed)}, {format_size(have)} are "
            "free. Free some space or choose another folder, then run the same command again."
        )


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other processes from writing to the same folder; the kernel lets go when this one ends, however it does.

    Raises:
        CheckpointError: another process is at it.
    """
    fd = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise CheckpointError(f"Another process writes to {output}. Wait for it, or give another folder.") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(fd)


def copy_side_files(source: Path, output: Path) -> None:
    """Tokenizer, generation config, chat template, code: whatever is neither weights nor ours to write."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and path.name not in _MINE:
            if path.name[0] == ".":
                continue
            temporary = output / (path.name + ".partial")
            shutil.copyfile(path, temporary)
            os.replace(temporary, output / path.name)
    for name in _TEMPLATES:
        if (source / name).is_dir():
            shutil.copytree(source / name, output / name, dirs_exist_ok=True)


def remove_others(output: Path, written: Sequence[Path]) -> None:
    """Delete what earlier runs wrote under names that this one does not use (another shard size, no sketches)."""
    names = {path.name for path in written}
    for pattern in ("*.safetensors", "*.partial", "*.partial.journal"):
        for path in output.glob(pattern):
            if path.name not in names:
                path.unlink()
    if WEIGHTS_NAME in names:
        (output / WEIGHTS_INDEX).unlink(missing_ok=True)
