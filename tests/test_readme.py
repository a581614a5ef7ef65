"""The README does what it says: its code runs, its table of families is the code's, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

from hf_flash.families import FAMILIES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SHIPPED = ROOT / "hf_flash" / "models" / "relu-books-5m"


def families_table() -> str:
    """The table of supported families, as the README shows it."""
    rows = [f"| `{f.name}` | `{', '.join(n for n in (f.gate, f.up, f.down) if n)}` | {f.members} |" for f in FAMILIES]
    return "\n".join(["| family | matrices | models, among others |", "| --- | --- | --- |", *rows])


def test_families_table_is_the_codes() -> None:
    text = README.read_text(encoding="utf-8")
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", text, re.DOTALL)
    assert shown is not None and shown.group(1) == families_table(), families_table()


def test_first_example_runs(tmp_path: Path) -> None:
    """As it stands, but for the name of the model: there is no Hub here."""
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    program, n = re.subn(r'name = ".*?"', f"name = {str(SHIPPED)!r}", code.group(1))
    assert n == 1
    env = {"HF_FLASH_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "A lighthouse keeper wrote" in done.stdout and "bytes_read" in done.stdout


def test_documents_that_are_named_exist() -> None:
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}, which is not there"


def test_ci_runs_the_readmes_commands() -> None:
    text = README.read_text(encoding="utf-8")
    for marker in ("install-demo", "install-tests", "run-tests"):
        assert f"<!-- {marker} -->\n```sh\n" in text
    assert "block install-tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
