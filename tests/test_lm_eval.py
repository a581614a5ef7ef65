"""lm-evaluation-harness runs on models from flash, unchanged, and answers questions as `hf-flash eval` does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import OPENINGS
from helpers_hub import ROOT, clean_env

import hf_flash

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'hf_flash[eval]'")

CAP = "48MiB"

QUESTIONS = """
task: tiny_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with both tasks and their files; nothing of them is fetched from anywhere."""
    pieces = [line.rpartition(" ") for line in OPENINGS]
    tails = [tail for _, _, tail in pieces]
    lines = [
        {"context": head, "choices": [tails[(i + k) % len(tails)] for k in range(6)], "label": 0}
        for i, (head, _, _) in enumerate(pieces)
    ]
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{**line, "choices": [f" {choice}" for choice in line["choices"]]} for line in lines]
    (tmp_path / "ours.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = ". ".join(OPENINGS)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "text.jsonl").write_text(json.dumps({"page": text}))
    (tmp_path / "questions.yaml").write_text(QUESTIONS.format(file=tmp_path / "theirs.jsonl"))
    (tmp_path / "text.yaml").write_text(TEXT.format(file=tmp_path / "text.jsonl"))
    return tmp_path


def lm_eval(folder: Path, tasks: Path) -> dict[str, Any]:
    """The example, as a user runs it."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "lm_eval_flash.py", "--model", "hf", "--model_args",
         f"pretrained={folder},max_length=64", "--tasks", "tiny_questions,tiny_text", "--include_path", tasks,
         "--output_path", tasks / "out.json"],
        capture_output=True, text=True, check=False, timeout=600,
        env=clean_env(HF_FLASH_MEMORY=CAP, HF_HOME=str(tasks / "home"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tasks.glob("out*.json")
    out: dict[str, Any] = json.loads(found.read_text())["results"]
    return out


def test_lm_eval_scores_what_eval_scores(flash_folder: Path, tasks: Path) -> None:
    theirs = lm_eval(flash_folder, tasks)
    ours = hf_flash.evaluate(flash_folder, tasks=[tasks / "ours.jsonl"], memory=CAP, window=64, progress=False).sides[
        -1
    ]
    assert ours.gates == ["certified"]
    task = ours.tasks["ours"]
    assert 0.2 < task.acc < 1 and theirs["tiny_questions"]["acc,none"] == pytest.approx(task.acc)
    assert theirs["tiny_questions"]["acc_norm,none"] == pytest.approx(task.acc_norm)
    assert theirs["tiny_text"]["bits_per_byte,none"] > 0  # it is put together otherwise there: see docs/quality.md
