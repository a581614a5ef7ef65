"""Calibration: run a model over a text, under its cap, and learn from what its neurons did.

What is learned goes into gates.safetensors of the flash checkpoint, the figures into config.json and the model card:
predictors for gate `predicted`, and lookahead predictors if they are asked for. Nobody who needs this can hold the
dense model, so the flash model is run with gate `all`, which computes what the dense one does. Its FFN inputs and
firing neurons are recorded on disk (recording.py), then one layer after the other is trained from there (fit.py). All
of it is kept in a folder `.calibration` until the end: the same command goes on where an interrupted one stopped, and
ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import safe_open, save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_flash import card, gate_file, hub, quantizer
from hf_flash.checkpoint import load_json
from hf_flash.config import QUANT_METHOD, FlashConfig
from hf_flash.corpus import check_text, sequences
from hf_flash.errors import CheckpointError, DiskFullError, FlashConfigError, MemoryCapError
from hf_flash.families import get_activation, zero_below
from hf_flash.fit import MIN_TOKENS, Fitted, Target, fit
from hf_flash.format import atomic_text
from hf_flash.gates import Predictor
from hf_flash.layout import format_size
from hf_flash.output import only_writer
from hf_flash.preview import Preview, look
from hf_flash.recording import Recording, record
from hf_flash.repack import repack
from hf_flash.store import GATES_NAME, flash_file_names

WORK_NAME = ".calibration"
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


def calibrate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    memory: int | str | None = None,
    recall: float = 0.99,
    precision: float = 0.5,
    lookahead: bool = False,
    lookahead_recall: float = 0.9,
    max_tokens: int = 65536,
    epochs: int = 4,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Calibration:
    """Train predictors for a model on a text.

    Args:
        model: a flash checkpoint folder, or with `output` also a stock folder or Hub repo, which is repacked first.
        text: a UTF-8 file like what the model will read.
        output: folder for the calibrated checkpoint; by default `model` itself, in place.
        memory: cap for running the model, as in FlashConfig.
        recall: share of the firing neurons that the gate `predicted` must read, on held-out text.
        precision: share of what it reads that must fire, where a rank can do that.
        lookahead: make predictors that start a layer's reads one layer early, too.
        lookahead_recall: their recall; what they miss costs a read later, what they guess wrongly one now.
        max_tokens: of the text, taken from all over it.
        epochs, seed: of the training.
        trust_remote_code: as in from_pretrained.
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
    digest = check_text(text)
    folder = _folder(model, output, trust_remote_code, progress)
    with only_writer(folder):
        preview = _preview(folder, memory, trust_remote_code)
        _check_activations(preview)
        ids = _token_ids(folder, text, preview, max_tokens, trust_remote_code)
        work = _work(folder, preview, digest, ids)
        recording = _record(preview, ids, work, trust_remote_code, progress)
        own, early = _train(recording, work, target, ahead, progress)
        report = _report(Path(text).name, recording, target, own, ahead, early)
        _publish(folder, own, early, recording.layers, report)
        shutil.rmtree(folder / WORK_NAME, ignore_errors=True)
    return Calibration(folder, report)


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
    if not is_flash:
        return target if _is_finished(target) else repack(
            model, target, trust_remote_code=trust_remote_code, progress=progress
        )  # fmt: skip
    if target.resolve() != source.resolve() and not _is_finished(target):
        _copy(source, target)
    return target


def _is_finished(folder: Path) -> bool:
    """Whether an interrupted calibration made this folder already; what it is of is checked when it is opened."""
    return (folder / "config.json").is_file()


def _copy(source: Path, target: Path) -> None:
    """A checkpoint's files in another folder, config.json last; weights are linked where the file system allows it."""
    target.mkdir(parents=True, exist_ok=True)
    names = sorted((p for p in source.iterdir() if p.is_file()), key=lambda p: p.name == "config.json")
    for path in names:
        temporary = target / (path.name + ".partial")
        temporary.unlink(missing_ok=True)
        try:
            if path.suffix != ".safetensors":
                raise OSError
            os.link(path.resolve(), temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, target / path.name)


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


def _check_activations(preview: Preview) -> None:
    for block in preview.blocks:
        activation = get_activation(preview.skeleton, block)
        if zero_below(activation) is None:
            name = getattr(activation, "__name__", type(activation).__name__)
            raise FlashConfigError(
                f"{block.path} has the activation {name}, which is zero nowhere to speak of: every neuron fires, and "
                "there is nothing to predict. Predictors are for ReLU and its kin."
            )


def _token_ids(folder: Path, text: Any, preview: Preview, max_tokens: int, trust_remote_code: bool) -> torch.Tensor:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder} has no tokenizer that could be read ({why}). Put the model's there."
        ) from error
    assert preview.config.context is not None
    ids = sequences(text, tokenizer, preview.config.context, max_tokens)
    if ids.numel() < MIN_TOKENS:
        raise FlashConfigError(
            f"{text} has {ids.numel()} tokens: too few, {MIN_TOKENS} are the least, 50,000 are better. Give more text."
        )
    return ids


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
    batches = list(ids.split(preview.config.batch_size))
    quantizer.register()
    encoder = preview.skeleton.config.is_encoder_decoder
    auto: Any = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(
        preview.name, quantization_config=preview.config, dtype=preview.skeleton.dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return record(model, batches, work / "recording", progress=progress)


def _train(
    recording: Recording, work: Path, target: Target, ahead: Target | None, progress: bool
) -> tuple[dict[str, Fitted], dict[str, tuple[str, Fitted]]]:
    """Predictors by module path, and lookahead predictors with the module whose input they see."""
    layers = recording.layers
    pairs = list(itertools.pairwise(layers)) if ahead is not None else []
    bar = tqdm(total=len(layers) + len(pairs), desc="Training", unit="predictor", disable=not progress,
               bar_format="{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]")  # fmt: skip
    with bar:
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


def _report(
    text: str, recording: Recording, target: Target, own: dict[str, Fitted], ahead: Target | None,
    early: dict[str, tuple[str, Fitted]],
) -> dict[str, Any]:  # fmt: skip
    """Figures for config.json and the card: of all layers together, and by layer."""

    def figures(fitted: list[Fitted], aim: Target) -> dict[str, Any]:
        fired, wanted = sum(f.fired for f in fitted), sum(f.wanted for f in fitted)
        right = sum(f.fired * f.recall for f in fitted)
        n = sum(f.n_neurons for f in fitted)
        shares = {
            "recall": right / max(1e-9, fired), "precision": right / max(1e-9, wanted), "fired": fired / n,
            "wanted": wanted / n,
        }  # fmt: skip
        return {
            "target": dataclasses.asdict(aim), **{name: round(value, 5) for name, value in shares.items()},
            "n_bytes": sum(f.predictor.n_bytes for f in fitted),
        }  # fmt: skip

    out: dict[str, Any] = {"text": text, "n_tokens": recording.n_tokens}
    layers = [{"layer": path, **f.to_dict()} for path, f in own.items()]
    out["predicted"] = {**figures(list(own.values()), target), "layers": layers}
    if ahead is not None:
        layers = [{"layer": path, "from": seen, **f.to_dict()} for path, (seen, f) in early.items()]
        out["lookahead"] = {**figures([f for _, f in early.values()], ahead), "layers": layers}
    return out


def _publish(
    folder: Path, own: dict[str, Fitted], early: dict[str, tuple[str, Fitted]], layers: list[str],
    report: dict[str, Any],
) -> None:  # fmt: skip
    """Put predictors and figures where readers look for them, each file at once."""
    tensors: dict[str, torch.Tensor] = {}
    for path in layers:
        tensors |= {f"{path}.predictor.{name}": t for name, t in own[path].predictor.tensors().items()}
    for path, (_, fitted) in early.items():
        tensors |= {f"{path}.lookahead.{name}": t for name, t in fitted.predictor.tensors().items()}

    def said(predictor: Predictor) -> dict[str, Any]:
        return {"rank": predictor.rank, "d_model": predictor.inner.shape[1], "threshold": predictor.threshold}

    metadata = {
        gate_file.PREDICTORS_KEY: {path: said(own[path].predictor) for path in layers},
        gate_file.LOOKAHEAD_KEY: {path: {"from": seen, **said(f.predictor)} for path, (seen, f) in early.items()},
        gate_file.CALIBRATION_KEY: report,
    }
    like = folder / flash_file_names(folder)[0]
    gate_file.rewrite(folder / GATES_NAME, tensors, metadata, like, instead_of=(".predictor.", ".lookahead."))
    raw = load_json(folder / "config.json")
    raw["quantization_config"]["calibration"] = report
    card.write_calibration(folder, report)
    with atomic_text(folder / "config.json") as text:
        text.append(json.dumps(raw, indent=2) + "\n")
