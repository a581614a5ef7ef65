"""Repos: finding a flash checkpoint's files in the ordinary Hub cache, and uploading them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from hf_flash.errors import CheckpointError, HubError
from hf_flash.store import GATES_NAME, INDEX_NAME, names_in_index


def local_folder(model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a model: itself, or a Hub repo's snapshot with every safetensors file fetched.

    Raises:
        CheckpointError: no such folder, and no name that a repo could have.
        HubError: the repo cannot be reached or does not exist.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(model)
    if path.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the weights.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        raise CheckpointError(f"{name} does not exist. Give the folder of a checkpoint, or a Hub repo such as user/name.")
    try:
        skip = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*"]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, token=token, ignore_patterns=skip))
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{name} is no folder here and no repo on the Hub that you may read. Check the spelling, or log in with "
            "`hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(f"{name} is no folder here, and the Hub could not be reached ({error}).") from error


def flash_files(checkpoint_file: Path, name_or_path: str, commit: str | None) -> tuple[dict[str, Path], Path | None]:
    """The flash files of a checkpoint, local or in the Hub cache; missing ones are fetched.

    Args:
        checkpoint_file: a resident file, as transformers resolved it.
        name_or_path: what from_pretrained was given.
        commit: the commit that transformers resolved, for a Hub repo.

    Returns:
        Flash files by name, and gates.safetensors or None.

    Raises:
        CheckpointError, HubError: a file is missing and cannot be fetched.
    """
    folder = checkpoint_file.parent
    remote = None if Path(name_or_path).is_dir() else name_or_path

    def resolve(name: str, required: bool = True) -> Path | None:
        path = folder / name
        if path.is_file():
            return path
        if remote is not None:
            cache = _cache_of(folder)
            try:
                return Path(huggingface_hub.hf_hub_download(remote, name, revision=commit, cache_dir=cache))
            except EntryNotFoundError as error:
                if not required:
                    return None
                raise HubError(f"{remote} lacks {name}. Ask its owner to push the whole folder again.") from error
            except (HfHubHTTPError, OSError) as error:
                if not required and isinstance(error, LocalEntryNotFoundError):
                    return None
                raise HubError(f"{name} of {remote} could not be fetched ({error}).") from error
        if required:
            raise CheckpointError(
                f"{path} is missing: the flash checkpoint is incomplete. Fetch the file, or repack with "
                f"`hf-flash repack MODEL {folder}`."
            )
        return None

    index = resolve(INDEX_NAME)
    assert index is not None
    files = {}
    for name in names_in_index(index):
        path = resolve(name)
        assert path is not None
        files[name] = path
    return files, resolve(GATES_NAME, required=False)


def _cache_of(snapshot: Path) -> Path | None:
    """The cache folder that a snapshot lies in (cache/models--user--name/snapshots/commit), None elsewhere."""
    if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
        return snapshot.parent.parent.parent
    return None


def push(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | bool | None = None,
    commit_message: str = "Upload flash checkpoint", create_pr: bool = False,
) -> str:  # fmt: skip
    """Upload a flash checkpoint folder to the Hub.

    Args:
        folder: what `repack` or `save_pretrained` wrote.
        repo_id: "user/name"; made if it does not exist.
        private, token, commit_message, create_pr: as in huggingface_hub.

    Returns:
        The URL of the commit.

    Raises:
        CheckpointError: the folder is incomplete. HubError: the upload failed.
    """
    path = Path(folder)
    missing = missing_files(path)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}. Repack it before pushing.")
    try:
        api = huggingface_hub.HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.upload_folder(
            folder_path=path, repo_id=repo, commit_message=commit_message, create_pr=create_pr,
            ignore_patterns=["*.partial", "*.partial.journal", ".*"],
        )  # fmt: skip
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(f"Uploading {path} to {repo_id} failed: {error}. Check `hf auth whoami` and the repo's name.") from error
    return str(info.commit_url)


def missing_files(folder: Path) -> Sequence[str]:
    """Names of files that a flash checkpoint folder should have and does not."""
    if not (folder / "config.json").is_file() or not (folder / INDEX_NAME).is_file():
        return [name for name in ("config.json", INDEX_NAME) if not (folder / name).is_file()]
    return [name for name in names_in_index(folder / INDEX_NAME) if not (folder / name).is_file()]
