"""Where a command's words go and how it ends: reports on stdout, the rest on stderr, errors as a line and code 1."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any, TextIO

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from hf_flash.errors import FlashError

DEBUG = "HF_FLASH_DEBUG"  # environment: show tracebacks, silence nothing


def _width(stream: TextIO) -> int | None:
    """A terminal's own; tables that go to a file are not folded."""
    return None if stream.isatty() else 160


out, err = Console(width=_width(sys.stdout)), Console(stderr=True, width=_width(sys.stderr))


class Commands(TyperGroup):
    """Turns exceptions into a line that says what to do, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        if os.environ.get(DEBUG):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = "; run the same command again to go on" if ctx.invoked_subcommand in ("repack", "calibrate") else ""
            err.print(f"\ninterrupted{again}", style="yellow", highlight=False)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `hf-flash inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(141) from None
        except FlashError as error:
            fail(str(error))
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error))
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "show"):  # typer's own
                raise
            fail(
                f"{type(error).__name__}: {error}\nThis was not expected. Run it again with {DEBUG}=1 to see where it "
                "comes from, and report it."
            )


def fail(message: str) -> None:
    """Say what is wrong and what to do, and exit with 1."""
    err.print("error: ", style="bold red", end="")
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def hint(text: str) -> None:
    """A line beside the report."""
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def report(figures: dict[str, Any], view: RenderableType, as_json: bool) -> None:
    """What a command is asked for, on stdout: as one JSON object, or for people."""
    if as_json:
        sys.stdout.write(json.dumps(figures, indent=2, default=str) + "\n")
        sys.stdout.flush()
    else:
        out.print(view, crop=False)


def quiet() -> None:
    """Silence what libraries say and a user of the command cannot act on. Errors and progress bars stay."""
    if os.environ.get(DEBUG):
        return
    warnings.simplefilter("ignore")
    import transformers  # noqa: PLC0415  (seconds)

    level = os.environ.get("TRANSFORMERS_VERBOSITY", "error")
    transformers.logging.set_verbosity(transformers.logging.log_levels.get(level, 40))
