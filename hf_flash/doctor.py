"""`hf-flash doctor`, and what other commands make of its result."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_flash.options import Json
from hf_flash.terminal import hint, quiet, report

if TYPE_CHECKING:
    from hf_flash.budget import Plan
    from hf_flash.estimate import Estimate
    from hf_flash.preview import Preview

EPILOG = "Examples:\n\nhf-flash doctor\n\nhf-flash doctor /mnt/nvme/models --json"


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", show_default=False,
            help="Where flash checkpoints lie, or will. Default: the cache folder that stock models are repacked to.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure flash and memory in a few seconds, and say what limits this machine.

    Reads a flash file of FOLDER if one is large enough, else a temporary file of 512 MiB. The result is kept in the
    cache folder, for this machine and disk; `plan` uses it to say how fast a model will be.
    """
    quiet()
    from hf_flash import probe, show_speed
    from hf_flash.repack import default_cache

    cache = default_cache()
    if folder is None:
        folder = cache
        folder.mkdir(parents=True, exist_ok=True)
    found = probe.measure(folder)
    path = None
    try:
        path = probe.keep(found, cache)
    except OSError as error:
        hint(
            f"the result could not be kept in {cache} ({error.strerror or error}); HF_FLASH_CACHE names another folder"
        )
    report({**found.to_dict(), "kept": path and str(path)}, show_speed.doctor_view(found), as_json)
    if path is not None:
        hint(f"kept in {path}; next: hf-flash plan MODEL --memory SIZE")


def expected(preview: Preview, plan: Plan, active: float) -> Estimate | None:
    """How fast a plan will be, where `hf-flash doctor` has measured the disk that its flash checkpoint will lie on."""
    from huggingface_hub import constants

    from hf_flash import estimate, probe
    from hf_flash.repack import default_cache

    cache = default_cache()
    folder = Path(preview.name).expanduser()
    if not preview.converted:
        folder = cache  # where it will be repacked to
    elif not folder.is_dir():
        folder = Path(constants.HF_HUB_CACHE)
    found = probe.kept(cache, folder)
    return None if found is None else estimate.estimate(preview.demand, plan, found, active)


def with_profile(model: Any, file: Path | None) -> Any:
    """A context that records a profile, or None where no file is named for it."""
    from hf_flash.profile import profile

    return contextlib.nullcontext() if file is None else profile(model, file)
