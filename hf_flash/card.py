"""The model card of a flash checkpoint: generated, so that a repo says what it is and how to run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hf_flash.config import QUANT_METHOD
from hf_flash.format import atomic_text
from hf_flash.layout import format_size

_BEGIN, _END = "<!-- calibration -->", "<!-- /calibration -->"


def write_card(output: Path, source_folder: Path, source_name: str, ffn: dict[str, Any]) -> None:
    """Write README.md: the source card's front matter with our tags, how to load, geometry, then the source card.

    Args:
        output: the flash checkpoint.
        source_folder: where the stock checkpoint's README.md may be.
        source_name: what the user called the source: a folder or a Hub repo.
        ffn: geometry, as `repack.describe` gives it.
    """
    source = source_folder / "README.md"
    text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    front, body = (match.group(1), text[match.end() :]) if match else ("", text)
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", source_name) and not Path(source_name).exists()
    gate = "`certified` (reads only neurons that may fire)" if ffn["certified"] else "`all` (streams every layer)"
    with atomic_text(output / "README.md") as parts:
        parts.append(f"---\n{_front_matter(front, source_name if is_repo else None)}\n---\n\n")
        parts.append(f"# {Path(source_name).name}, repacked for hf_flash\n\n")
        parts.append(
            "FFN weights lie neuron by neuron in `flash-*.safetensors`, so that transformers can run this model with "
            "less memory than it has weights. Nothing was rounded: the outputs are the original model's.\n\n"
            "```python\nimport hf_flash  # registers the backend; without it transformers refuses this checkpoint\n"
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("this/repo", '
            'quantization_config=hf_flash.FlashConfig(memory="4GiB"))\n```\n\n'
        )
        rows = {
            "FFN layers": ffn["n_layers"], "d_model": ffn["d_model"], "d_ffn": ffn["d_ffn"], "dtype": ffn["dtype"],
            "bytes per neuron": ffn["row_bytes"], "on flash": format_size(ffn["flash_bytes"]), "default gate": gate,
        }  # fmt: skip
        parts.append("| | |\n| --- | --- |\n" + "".join(f"| {k} | {v} |\n" for k, v in rows.items()))
        if body.strip():
            parts.append(f"\n## The original model's card\n\n{body.strip()}\n")


def write_calibration(folder: Path, report: dict[str, Any]) -> None:
    """Put what calibration measured into README.md, in place of what an earlier run put there.

    Args:
        folder: a flash checkpoint.
        report: as config.json holds it.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else f"# {folder.name}\n"
    text = re.sub(rf"{_BEGIN}.*?{_END}\n*", "", text, flags=re.DOTALL)
    before, mark, after = text.partition("## The original model's card")
    with atomic_text(path) as parts:
        parts.append(f"{before.rstrip()}\n\n{_BEGIN}\n{_calibration_section(report)}{_END}\n")
        parts.append(f"\n{mark}{after}" if mark else "")


def _calibration_section(report: dict[str, Any]) -> str:
    """Markdown: what was learned, by layer."""
    if "threshold" in report:
        return _threshold_section(report)
    parts = [_usual_section(report["usual"])] if "usual" in report else []
    if "predicted" in report:
        parts.append(_predictor_section(report))
    return "\n".join(parts)


def _usual_section(part: dict[str, Any]) -> str:
    lines = [
        "## What is usual\n",
        f"Learned from {part['n_tokens']:,} tokens of `{part['text']}`, for the gate `certified` and for caches; it "
        "changes no answer. Rest: of the length of a layer's inputs, what lies in none of its known directions; what "
        "rounding may hide grows with that alone. Fire: neurons per token.\n",
        "| layer | rest | fire |", "| --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| `{row['layer']}` | {row['rest']:.1%} | {row['fired']:.2%} |" for row in part["layers"]]
    return "\n".join([*lines, ""])


def _threshold_section(report: dict[str, Any]) -> str:
    part = report["threshold"]
    names = [name for name in part["layers"][0] if name != "layer"]
    lines = [
        "## Thresholds\n",
        f"Set on {report['n_tokens']:,} tokens of `{report['text']}`. `gate=\"threshold\"` drops the activations below "
        "them, which changes the answers; the share that it drops is chosen with `sparsity`. "
        f"{format_size(part['n_bytes'])} of sketches in DRAM.\n",
        "| layer | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names),
    ]  # fmt: skip
    lines += [f"| `{row['layer']}` | " + " | ".join(str(row[name]) for name in names) + " |" for row in part["layers"]]
    return "\n".join([*lines, ""])


def _predictor_section(report: dict[str, Any]) -> str:
    lines = [
        "## Predictors\n",
        f"Trained on {report['n_tokens']:,} tokens of `{report['text']}`; the figures are of the tenth of them that "
        'was kept aside. `gate="predicted"` reads what they name, and loses what they miss.\n',
    ]
    for name, title in (("predicted", "Gate `predicted`"), ("lookahead", "Lookahead, from the layer before")):
        if name not in report:
            continue
        part = report[name]
        lines += [
            f"{title}: recall {part['recall']:.2%}, precision {part['precision']:.1%}; {part['wanted']:.2%} of the "
            f"neurons are read for {part['fired']:.2%} that fire; {format_size(part['n_bytes'])} in DRAM.\n",
            "| layer | rank | recall | precision | read per token | fire per token | of | bytes |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| `{row['layer']}` | {row['rank']} | {row['recall']:.2%} | {row['precision']:.1%} | {row['wanted']:.1f} "
            f"| {row['fired']:.1f} | {row['n_neurons']} | {format_size(row['n_bytes'])} |"
            for row in part["layers"]
        ]
        lines.append("")
    return "\n".join(lines)


def _front_matter(front: str, base_model: str | None) -> str:
    """The source's front matter, word for word where it need not change, with the library, base model and our tag."""
    try:
        known = yaml.safe_load(front) or {}
        tags = known.get("tags") or []
    except (yaml.YAMLError, AttributeError):
        return front
    lines = [line for line in front.splitlines() if line.strip()]
    if "library_name" not in known:
        lines.insert(0, "library_name: transformers")
    if base_model and "base_model" not in known:
        lines.append(f"base_model: {base_model}")
    tags = [tags] if isinstance(tags, str) else list(tags)
    if QUANT_METHOD not in tags:
        lines = [*_without(lines, "tags"), "tags:", *(f"- {json.dumps(tag, ensure_ascii=False)}" for tag in tags)]
        lines.append(f"- {QUANT_METHOD}")
    return "\n".join(lines)


def _without(lines: list[str], key: str) -> list[str]:
    """Front matter lines without a top-level key and its value."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith(f"{key}:") or (inside and line[0] in " -]")
        if not inside:
            kept.append(line)
    return kept
