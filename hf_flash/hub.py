"""Repos: finding a flash checkpoint's files in the ordinary Hub cache, and uploading them."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_flash.checkpoint import WEIGHTS_INDEX, WEIGHTS_NAME, load_json
from hf_flash.errors import CheckpointError, HubError
from hf_flash.format import read_header
from hf_flash.store import GATES_NAME, INDEX_NAME, names_in_index

REPO_NAME = re.compile(r"[A-Za-z0-9]([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?")  # what could be a repo on the Hub

# Weights in formats that are not read, and what other libraries keep beside them.
_SKIP = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*"]


def local_folder(
    model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Path:
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
    if not REPO_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name} does not exist. Give the folder of a checkpoint, or a Hub repo such as user/name."
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, token=token, ignore_patterns=_SKIP))
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{name} is no folder here and no repo on the Hub that you may read. Check the spelling, or log in with "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision!r}. Give a branch, a tag or a whole commit hash.") from error
    except Exception as error:  # the Hub's, the network library's, the disk's
        raise HubError(f"{name} is no folder here, and the Hub could not be reached ({error}).") from error
    if not any(folder.glob("*.safetensors")):
        raise HubError(
            f"{name} holds no safetensors files, and hf_flash reads no others. Convert it once with "
            f"AutoModel.from_pretrained({name!r}).save_pretrained(NEW_DIR), then give NEW_DIR."
        )
    return folder


def flash_files(checkpoint_file: Path, name_or_path: str) -> tuple[dict[str, Path], Path | None]:
    """The flash files of a checkpoint, local or in the Hub cache; missing ones are fetched.

    transformers fetches what it knows of, the resident files. The rest comes from the same commit, into the same cache
    and with the same token.

    Args:
        checkpoint_file: a resident file, as transformers resolved it.
        name_or_path: what from_pretrained was given.

    Returns:
        Flash files by name, and gates.safetensors or None.

    Raises:
        CheckpointError, HubError: a file is missing and cannot be fetched.
    """
    folder = checkpoint_file.parent
    snapshot = None if Path(name_or_path).is_dir() else _Snapshot.of(folder, name_or_path)

    def resolve(name: str, required: bool = True) -> Path | None:
        path = folder / name
        if path.is_file():
            return path
        if snapshot is not None:
            return snapshot.fetch(name, required)
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


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """A commit of a repo in a Hub cache: cache/models--user--name/snapshots/commit[/subfolder].

    Attributes:
        repo: its name on the Hub.
        cache: the cache folder. commit: what the snapshot is of. subfolder: "" or one that ends in a slash.
        options: token and local_files_only, as the caller of from_pretrained passed them.
    """

    repo: str
    cache: Path
    commit: str
    subfolder: str
    options: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, repo: str) -> _Snapshot | None:
        """The snapshot that a folder is or lies in, None elsewhere."""
        for top in (folder, *folder.parents):
            if top.parent.name == "snapshots" and top.parent.parent.name.startswith("models--"):
                below = folder.relative_to(top).as_posix()
                given = _caller_arguments()
                options = {name: given[name] for name in ("token", "local_files_only") if given.get(name) is not None}
                return cls(repo, top.parent.parent.parent, top.name, "" if below == "." else below + "/", options)
        return None

    def fetch(self, name: str, required: bool) -> Path | None:
        """Download a file, None if the repo has none of that name and it is not required.

        Raises:
            HubError: why it cannot be had, and what to do.
        """
        full = self.subfolder + name
        known = huggingface_hub.try_to_load_from_cache(self.repo, full, cache_dir=self.cache, revision=self.commit)
        if not required and known is huggingface_hub._CACHED_NO_EXIST:
            return None
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self.repo, full, revision=self.commit, cache_dir=self.cache, **self.options
                )
            )
        except LocalEntryNotFoundError as error:
            if not required:
                return None
            raise HubError(
                f"{full} of {self.repo} is not in the cache {self.cache}, and the Hub was not asked or did not answer "
                f"({error}). Load the model once online, or run `hf download {self.repo}`."
            ) from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"{full} of {self.repo} may not be read. Log in with `hf auth login`, or pass token=... to "
                "from_pretrained."
            ) from error
        except EntryNotFoundError as error:
            if not required:
                return None
            raise HubError(
                f"{self.repo} lacks {full} at commit {self.commit[:8]}: the upload was incomplete. Ask its owner to "
                f"run `hf-flash push FOLDER {self.repo}` again."
            ) from error
        except Exception as error:  # the Hub's, the network library's, the disk's
            raise HubError(
                f"{full} of {self.repo} could not be fetched ({error}). Run the same command again."
            ) from error


def _caller_arguments() -> dict[str, Any]:
    """What from_pretrained was told about downloading: token, cache, revision, local_files_only.

    transformers hands none of it to a quantizer, and a private repo's flash files need the token that its other files
    were fetched with. So it is read off the caller's frame; where there is none, the stored token has to do.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and isinstance(frame.f_locals.get("download_kwargs"), dict):
            return dict(frame.f_locals["download_kwargs"])
        frame = frame.f_back  # type: ignore[assignment]
    return {}


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
        CheckpointError: the folder is incomplete, or a file of it is torn. HubError: the upload failed.
    """
    path = Path(folder)
    missing = missing_files(path)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}. Repack it before pushing.")
    for file in sorted(path.glob("*.safetensors")):
        read_header(file)  # nobody is to download a torn one
    try:
        api = huggingface_hub.HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.upload_folder(
            folder_path=path, repo_id=repo, commit_message=commit_message, create_pr=create_pr,
            ignore_patterns=["*.partial", "*.partial.journal", ".*"],
        )  # fmt: skip
    except Exception as error:  # the Hub's, the network library's, the disk's
        raise HubError(
            f"Uploading {path} to {repo_id} failed: {error}. Check `hf auth whoami` and the repo's name."
        ) from error
    return str(info.commit_url)


def missing_files(folder: Path) -> Sequence[str]:
    """Names of files that a flash checkpoint folder should have and does not."""
    names = ["config.json", INDEX_NAME]
    if (folder / INDEX_NAME).is_file():
        names += names_in_index(folder / INDEX_NAME)
    resident = folder / WEIGHTS_INDEX
    names += names_in_index(resident) if resident.is_file() else [WEIGHTS_NAME]
    if (folder / "config.json").is_file():
        ffn = load_json(folder / "config.json").get("quantization_config", {}).get("ffn", {})
        names += [GATES_NAME] if ffn.get("certified") else []
    return [name for name in names if not (folder / name).is_file()]
