"""Calibration: run a model over a text, under its cap, and learn from what its neurons did.

What is learned goes into gates.safetensors of the flash checkpoint, the figures into config.json and the model card:
what is usual (usual.py), by which gate `certified` reads less; predictors for gate `predicted`, and lookahead
predictors if they are asked for. Nobody who needs this can hold the
dense model, so the flash model is run with gate `all`, which computes what the dense one does. Its FFN inputs and
firing neurons are recorded on disk (recording.py), then one layer after the other is trained from there (fit.py). All
of it is kept in a folder `.calibration` until the end: the same command goes on where an interrupted one stopped, and
ends with the same bytes.

For activations that are never exactly zero (SiLU, GELU) there is nothing to predict. One pass over the text sets the
thresholds of gate `threshold` (thresholds.py); an interrupted one starts anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import safe_open, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_flash import card, gate_file, hub, thresholds, usual
from hf_flash.checkpoint import WEIGHTS_INDEX, load_json
from hf_flash.config import QUANT_METHOD, FlashConfig
from hf_flash.corpus import check_text, sequences
from hf_flash.errors import CheckpointError, DiskFullError, FlashConfigError, MemoryCapError
from hf_flash.families import get_activation, zero_below
from hf_flash.fit import MIN_TOKENS, Fitted, Target, fit
from hf_flash.format import SOURCE_KEY, atomic_text, read_header
from hf_flash.gates import Predictor
from hf_flash.layout import format_size
from hf_flash.memory import blocks_kept
from hf_flash.output import copy_side_files, only_writer
from hf_flash.preview import Preview, look
from hf_flash.recording import WORK_NAME, Recording, record
from hf_flash.repack import repack
from hf_flash.save import link, runtime_of
from hf_flash.session import load_tokenizer, open_model
from hf_flash.store import GATES_NAME, INDEX_NAME, flash_file_names
from hf_flash.tap import watched_blocks

GATES = ("certified", "predicted")
_BATCH_TOKENS, _LENGTH = 2048, 512


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was made.

    Attributes:
        folder: the flash checkpoint.
        report: as config.json holds it under quantization_config.calibration.
    """

    folder: Path
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"folder": str(self.folder), **self.report}


@dataclasses.dataclass
class Findings:
    """What a recording taught, on its way into the checkpoint.

    Attributes:
        tensors: of gates.safetensors, by name. header: JSON-able values for its header, by key.
        report: figures for people, by subject. instead_of: parts of the names of tensors that these replace.
        later: tensors that are made while they are written.
    """

    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]
    report: dict[str, Any]
    instead_of: tuple[str, ...] = ()
    later: gate_file.Later | None = None


def calibrate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str] | torch.Tensor,
    output: str | os.PathLike[str] | None = None,
    *,
    gate: str | None = None,
    memory: int | str | None = None,
    recall: float = 0.99,
    precision: float = 0.5,
    lookahead: bool = False,
    lookahead_recall: float = 0.9,
    max_tokens: int = 65536,
    epochs: int = 4,
    seed: int = 0,
    trust_remote_code: bool = False,
    keep_recording: bool = False,
    progress: bool = True,
) -> Calibration:
    """Learn from a text what gates can make use of.

    Args:
        model: a flash checkpoint folder, or with `output` also a stock folder or Hub repo, which is repacked first.
        text: a UTF-8 file like what the model will read; or its token ids, [n_sequences, length] int64, of a
            length of 512 at most.
        output: folder for the calibrated checkpoint; by default `model` itself, in place.
        gate: "certified" to learn what is usual and train no predictors, which takes a few passes of the text's tokens
            and no more; "predicted" or None for both.
        memory: cap for running the model, as in FlashConfig.
        recall: share of the firing neurons that the gate `predicted` must read, on held-out text.
        precision: share of what it reads that must fire, where a rank can do that.
        lookahead: make predictors that start a layer's reads one layer early, too.
        lookahead_recall: their recall; what they miss costs a read later, what they guess wrongly one now.
        max_tokens: of the text, taken from all over it.
        epochs, seed: of the training.
        trust_remote_code: as in from_pretrained.
        keep_recording: leave what was recorded in the folder's `.calibration`, for `repack(..., order=folder)`.
        progress: show bars.

    Returns:
        The folder and the report.

    Raises:
        FlashError: what is wrong with the model, the text or the disk, and what to do. What was done until then stays
            in the folder's `.calibration` and is continued.
    """
    target = Target(recall, precision, epochs, seed)
    ahead = Target(lookahead_recall, min(precision, 0.3), epochs, seed) if lookahead else None
    if type(max_tokens) is not int or max_tokens < MIN_TOKENS:
        raise FlashConfigError(f"max_tokens={max_tokens!r}: give at least {MIN_TOKENS} tokens to learn from.")
    if gate not in (None, *GATES):
        raise FlashConfigError(f"gate={gate!r}: calibration is for {' or '.join(map(repr, GATES))}.")
    if gate == "certified" and lookahead:
        raise FlashConfigError("lookahead=True trains predictors, gate='certified' none: leave one of them out.")
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest() if isinstance(text, torch.Tensor) else check_text(text)
    folder = _folder(model, output, trust_remote_code, progress)
    with only_writer(folder):
        preview = _preview(folder, memory, trust_remote_code)
        whispering = _never_silent(preview)
        ids = _token_ids(folder, text, preview, max_tokens, trust_remote_code)
        source = {"text": "token ids" if isinstance(text, torch.Tensor) else Path(text).name, "n_tokens": ids.numel()}
        if whispering and gate is not None:
            raise FlashConfigError(
                f"gate={gate!r} is for activations that are exactly zero below a threshold (ReLU); those of {folder} "
                "are not. Leave the gate out: thresholds will be set for gate 'threshold'."
            )
        if whispering:
            opened = open_model(preview, trust_remote_code=trust_remote_code)
            findings = _thresholds(opened, ids.split(preview.config.batch_size), progress)
        else:
            work = _work(folder, preview, digest, ids)
            recording = _record(preview, ids, work, trust_remote_code, progress)
            findings = _usual(preview, recording, folder, source, trust_remote_code, progress)
            if gate != "certified":
                _publish(folder, findings)
                findings = _predictors(recording, work, target, ahead, progress)
        findings.report = {**source, **findings.report}
        _publish(folder, findings)
        if not keep_recording:
            shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    return Calibration(folder, findings.report)


def _joined(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """A report, with what an earlier one says of other subjects."""
    before = load_json(folder / "config.json")["quantization_config"].get("calibration") or {}
    if "predicted" in report or "threshold" in report:
        return {**report, **({"usual": before["usual"]} if "usual" in before else {})}
    return {**report, **before, "usual": report["usual"]}


def _folder(
    model: str | os.PathLike[str], output: str | os.PathLike[str] | None, trust_remote_code: bool, progress: bool
) -> Path:
    """The flash checkpoint that is written to: `model` itself, a copy of it, or what repacking it gives."""
    source = hub.local_folder(model)
    is_flash = (load_json(source / "config.json").get("quantization_config") or {}).get("quant_method") == QUANT_METHOD
    target = source if output is None else Path(output)
    if output is None and (not is_flash or not Path(model).expanduser().is_dir()):
        what = "in the Hub's cache" if is_flash else "a stock checkpoint"
        raise CheckpointError(
            f"{model} is {what}, and calibration writes into a flash checkpoint folder. Give one to write with "
            "--output FOLDER (output=...)."
        )
    if not is_flash:  # an interrupted run's is continued, another checkpoint's refused
        return repack(model, target, trust_remote_code=trust_remote_code, progress=progress)
    if target.resolve() == source.resolve():
        return target
    if not (target / "config.json").is_file():
        _copy(source, target)
    elif not (target / INDEX_NAME).is_file() or _origin(target) != _origin(source):
        raise CheckpointError(f"{target} holds another checkpoint; give a new or an empty folder.")
    return target


def _origin(folder: Path) -> str | None:
    """What a flash checkpoint was made from."""
    return read_header(folder / flash_file_names(folder)[0]).metadata.get(SOURCE_KEY)


def _copy(source: Path, target: Path) -> None:
    """A checkpoint in another folder, config.json last; weights are linked where the file system allows it."""
    target.mkdir(parents=True, exist_ok=True)
    copy_side_files(source, target)
    for path in source.glob("*.safetensors"):
        link(path, target / path.name)
    for name in (WEIGHTS_INDEX, "README.md", "config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / (name + ".partial"))
            os.replace(target / (name + ".partial"), target / name)


def _preview(folder: Path, memory: int | str | None, trust_remote_code: bool) -> Preview:
    """The model as it will be run: gate `all`, as many sequences at once as the cap has room for."""
    preview = look(folder, FlashConfig(memory, gate="all"), trust_remote_code=trust_remote_code)
    limit = getattr(preview.skeleton.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(_LENGTH, limit if limit and limit > 0 else _LENGTH)
    cap, n = preview.config.cap(), max(1, _BATCH_TOKENS // length)
    while True:
        options = preview.with_options(memory=cap, context=length, batch_size=n)
        if cap >= options.smallest_cap:
            return options
        if n == 1:
            raise MemoryCapError(
                f"memory={format_size(cap)} is too small to run {folder} over sequences of {length} tokens. The "
                f"smallest cap that would do is {format_size(options.smallest_cap)}: pass --memory "
                f"{options.smallest_cap >> 20}MiB."
            )
        n //= 2


def _never_silent(preview: Preview) -> bool:
    """Whether the activations are never exactly zero: thresholds are for those, predictors for the others.

    Raises:
        FlashConfigError: some are, and some are not.
    """
    zero = {block.path: zero_below(get_activation(preview.skeleton, block)) is not None for block in preview.blocks}
    if len(set(zero.values())) > 1:
        some = [next(path for path, is_zero in zero.items() if is_zero == way) for way in (True, False)]
        raise FlashConfigError(
            f"{some[0]} has an activation that is zero below zero, {some[1]} one that is not: there is no gate that "
            "both could be calibrated for."
        )
    return not any(zero.values())


def _token_ids(folder: Path, text: Any, preview: Preview, max_tokens: int, trust_remote_code: bool) -> torch.Tensor:
    assert preview.config.context is not None
    if isinstance(text, torch.Tensor):
        known = preview.skeleton.config.get_text_config(decoder=True).vocab_size
        _check_ids(text, known, min(preview.config.context, max_tokens))
        return text[: max_tokens // text.shape[1]]
    tokenizer = load_tokenizer(str(folder), instead="Put the model's there.", trust_remote_code=trust_remote_code)
    ids = sequences(text, tokenizer, preview.config.context, max_tokens)
    if ids.numel() < MIN_TOKENS:
        raise FlashConfigError(
            f"{text} has {ids.numel()} tokens: too few, {MIN_TOKENS} are the least, 50,000 are better. Give more text."
        )
    return ids


def _check_ids(ids: torch.Tensor, n_known: int, longest: int) -> None:
    """Refuse token ids that the model cannot be given, or that there is no room for."""
    if ids.dim() != 2 or ids.numel() < MIN_TOKENS or ids.dtype not in (torch.int32, torch.int64):
        raise FlashConfigError(
            f"Token ids of shape {tuple(ids.shape)}, {str(ids.dtype).removeprefix('torch.')}: expected whole numbers "
            f"[n_sequences, length], {MIN_TOKENS} or more."
        )
    if ids.shape[1] > longest:
        raise FlashConfigError(
            f"Sequences of {ids.shape[1]} token ids: {longest} are the most that a pass takes. Give shorter ones: "
            f"ids.unfold(1, {longest}, {longest}).flatten(0, 1)."
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= n_known:
        raise FlashConfigError(
            f"Token ids from {least} to {most}, but the model knows 0 to {n_known - 1}: are they of its tokenizer?"
        )


def _work(folder: Path, preview: Preview, text: str, ids: torch.Tensor) -> Path:
    """The folder of what is done so far for these tokens and this way of running them; others' leftovers go."""
    key = f"{text}|{tuple(ids.shape)}|{preview.config.batch_size}|{preview.skeleton.dtype}"
    work = folder / WORK_NAME / hashlib.sha256(key.encode()).hexdigest()[:16]
    for other in (folder / WORK_NAME).glob("*"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    size = preview.skeleton.dtype.itemsize
    needed = ids.numel() * sum(block.d_model * size + -(-block.d_ffn // 8) for block in preview.blocks)
    have = shutil.disk_usage(work).free + sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
    if have < needed:
        raise DiskFullError(
            f"No room in {folder}: recording {ids.numel()} tokens takes {format_size(needed)}, {format_size(have)} are "
            "free. Free some space, or take fewer tokens with --max-tokens."
        )
    return work


def _record(preview: Preview, ids: torch.Tensor, work: Path, trust_remote_code: bool, progress: bool) -> Recording:
    model = open_model(preview, trust_remote_code=trust_remote_code)
    return record(model, list(ids.split(preview.config.batch_size)), work / "recording", progress=progress)


def _usual(
    preview: Preview, recording: Recording, folder: Path, source: dict[str, Any], trust_remote_code: bool,
    progress: bool,
) -> Findings:  # fmt: skip
    """What is usual of every layer, and what it means for the sketches that are there."""
    found, gates, later = usual.learn(recording, progress), folder / GATES_NAME, None
    if gates.is_file():
        room = max(usual.scratch_bytes(block) for block in preview.blocks)
        smaller = preview.with_options(memory=max(preview.smallest_cap, preview.config.cap() - room))
        later = usual.known(open_model(smaller, trust_remote_code=trust_remote_code), gates, found, progress)
    return Findings(
        {f"{path}.use": of.use for path, of in found.items()}
        | {f"{path}.sketch.directions": of.directions for path, of in found.items()},
        {gate_file.USUAL_KEY: {path: {"rest": of.rest} for path, of in found.items()}},
        {"usual": {**source, **usual.report(found)}}, (".sketch.directions", ".sketch.known", ".use"), later,
    )  # fmt: skip


def _thresholds(model: PreTrainedModel, batches: Sequence[torch.Tensor], progress: bool) -> Findings:
    """Thresholds and sketches of every layer."""
    bits = runtime_of(model).config.gate_bits
    levels = thresholds.measure(model, batches, progress)
    return Findings(
        {f"{path}.thresholds": table for path, table in levels.items()},
        {
            gate_file.GATES_KEY: gate_file.sketch_kinds(watched_blocks(model), bits),
            gate_file.THRESHOLDS_KEY: {path: {"levels": len(table)} for path, table in levels.items()},
        },
        {"threshold": thresholds.report(model, levels, bits)}, later=thresholds.sketches(model, bits, progress),
    )  # fmt: skip


def _train(
    recording: Recording, work: Path, target: Target, ahead: Target | None, progress: bool
) -> tuple[dict[str, Fitted], dict[str, tuple[str, Fitted]]]:
    """Predictors by module path, and lookahead predictors with the module whose input they see."""
    layers = recording.layers
    pairs = list(itertools.pairwise(layers)) if ahead is not None else []
    bar = tqdm(total=len(layers) + len(pairs), desc="Training", unit="predictor", disable=not progress,
               bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]")  # fmt: skip
    with bar, blocks_kept():
        own = {layer: _fitted(recording, work, layer, layer, target, bar) for layer in layers}
        early = {b: (a, _fitted(recording, work, a, b, ahead, bar)) for a, b in pairs if ahead is not None}
    return own, early


def _fitted(recording: Recording, work: Path, seen: str, guessed: str, target: Target, bar: Any) -> Fitted:
    """A predictor, trained or as an interrupted run left it."""
    key = json.dumps([seen, guessed, dataclasses.asdict(target)])
    path = work / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        made = fit(recording, seen, guessed, target, bar.update)
        figures = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "predictor"}
        words = {"figures": json.dumps({**figures, "threshold": made.predictor.threshold})}
        temporary = path.with_suffix(".partial")
        save_file(made.predictor.tensors(), temporary, words)
        os.replace(temporary, path)
    else:
        bar.update(1)
    with safe_open(path, framework="pt") as file:
        figures = json.loads(file.metadata()["figures"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Fitted(Predictor(**tensors, threshold=figures.pop("threshold")), **figures)


def _predictors(
    recording: Recording, work: Path, target: Target, ahead: Target | None, progress: bool
) -> Findings:  # fmt: skip
    """Predictors of every layer, and what they are worth."""
    own, early = _train(recording, work, target, ahead, progress)
    tensors: dict[str, torch.Tensor] = {}
    for path, fitted in own.items():
        tensors |= {f"{path}.predictor.{name}": t for name, t in fitted.predictor.tensors().items()}
    for path, (_, fitted) in early.items():
        tensors |= {f"{path}.lookahead.{name}": t for name, t in fitted.predictor.tensors().items()}

    def said(p: Predictor) -> dict[str, Any]:
        return {"rank": p.rank, "d_model": p.inner.shape[1], "threshold": p.threshold}

    header = {
        gate_file.PREDICTORS_KEY: {path: said(fitted.predictor) for path, fitted in own.items()},
        gate_file.LOOKAHEAD_KEY: {path: {"from": seen, **said(f.predictor)} for path, (seen, f) in early.items()},
    }
    report = {"predicted": _figures(target, [({"layer": path}, fitted) for path, fitted in own.items()])}
    if ahead is not None:
        rows = [({"layer": path, "from": seen}, fitted) for path, (seen, fitted) in early.items()]
        report["lookahead"] = _figures(ahead, rows)
    return Findings(tensors, header, report, instead_of=(".predictor.", ".lookahead."))


def _figures(target: Target, rows: list[tuple[dict[str, str], Fitted]]) -> dict[str, Any]:
    """Of all layers together, and by layer."""
    all_of = [fitted for _, fitted in rows]
    fired, wanted = sum(f.fired for f in all_of), sum(f.wanted for f in all_of)
    right, n = sum(f.fired * f.recall for f in all_of), sum(f.n_neurons for f in all_of)
    shares = {
        "recall": right / fired if fired else 1.0, "precision": right / wanted if wanted else 1.0,
        "fired": fired / n, "wanted": wanted / n,
    }  # fmt: skip
    return {
        "target": dataclasses.asdict(target), **{name: round(value, 5) for name, value in shares.items()},
        "n_bytes": sum(f.predictor.n_bytes for f in all_of), "layers": [{**name, **f.to_dict()} for name, f in rows],
    }  # fmt: skip


def _publish(folder: Path, findings: Findings) -> None:
    """Put what was found where readers look for it, each file at once."""
    findings.report = _joined(folder, findings.report)
    header = {**findings.header, gate_file.CALIBRATION_KEY: findings.report}
    like = folder / flash_file_names(folder)[0]
    gate_file.rewrite(folder / GATES_NAME, findings.tensors, header, like, findings.instead_of, findings.later)
    raw = load_json(folder / "config.json")
    raw["quantization_config"]["calibration"] = findings.report
    card.write_calibration(folder, findings.report)
    with atomic_text(folder / "config.json") as text:
        text.append(json.dumps(raw, indent=2) + "\n")
