"""Writes cli.md from the command itself: `python docs/make_cli.py`. A test checks that it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hf_flash.cli import app

PAGE = Path(__file__).parent / "cli.md"
HEAD = """# Command line

<!-- made by docs/make_cli.py -->

Reports go to stdout, everything else (progress, notes, errors) to stderr. With `--json` stdout holds one JSON object.
Exit codes: 0 done, 1 an error, said in a line with what to do next, 2 wrong usage, 130 Ctrl-C. Sizes are written
`4GiB`, `512MiB`, `1.5GB` or in bytes. `HF_FLASH_MEMORY` sets the cap where `--memory` is not given, `HF_FLASH_CACHE`
the folder that stock checkpoints are repacked to on first use, `HF_FLASH_DEBUG=1` shows tracebacks.
"""


def page() -> str:
    """The page, in Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["hf-flash", name, *map(_argument, arguments), "[OPTIONS]"])
        parts.append(f"\n## hf-flash {name}\n\n```\n{usage}\n```\n\n{_text(command.help)}\n")
        parts.append("\n| | |\n| --- | --- |\n")
        parts += [f"| `{p.metavar or p.name.upper()}` | {p.help} |\n" for p in arguments]
        parts += [f"| {_spelling(p)} | {_meaning(p)} |\n" for p in options]
        lines = [line for line in (command.epilog or "").split("\n\n") if line.startswith(("hf-flash", "cat "))]
        if lines:
            parts.append("\n```bash\n" + "\n".join(lines) + "\n```\n")
    return "".join(parts)


def _argument(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required else f"[{name}]"


def _text(text: str | None) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _spelling(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
    return ", ".join(f"`{name}{value}`" for name in sorted(option.opts, key=len, reverse=True))


def _meaning(option: Any) -> str:
    shown = option.default not in (None, False) and not option.required
    default = f" Default: {option.default}." if shown else " Required." if option.required else ""
    return f"{option.help or ''}{default}".replace("|", "\\|").strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
