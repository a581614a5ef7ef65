"""What a model's FFNs saw and did on a text, on disk: the material that calibration learns from.

Per layer two plain files, one row a token: the FFN's input as the model computed it, and a bit per neuron that says
whether it fired. Rows are written as the model runs, a batch at a time, so memory stays that of one batch. A state file
says how far the recording is; a run that was killed goes on after its last whole batch and ends with the same bytes.

    recording.json   layers, shapes, dtypes, tokens so far, ends of the sequences, whether it is complete
    00000.inputs     [n_tokens, d_model], the dtype of the layer's input
    00000.fired      [n_tokens, ceil(d_ffn / 8)] uint8, the first neuron in the lowest bit
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_flash.errors import CheckpointError, FlashError
from hf_flash.families import FFNBlock
from hf_flash.ffn import FlashFFN
from hf_flash.format import SOURCE_KEY, atomic_text, explain_full_disk, read_header
from hf_flash.sparse import SparseEngine
from hf_flash.tap import tap, watched_blocks

STATE_NAME = "recording.json"
WORK_NAME = ".calibration"  # folder in a checkpoint where calibration works
_VERSION = 1


@dataclasses.dataclass
class _State:
    """What recording.json holds."""

    version: int
    model: str  # fingerprint
    layers: list[str]
    shapes: list[tuple[int, int]]  # d_model, d_ffn
    dtypes: list[str]
    n_tokens: int = 0
    n_batches: int = 0
    ends: list[int] = dataclasses.field(default_factory=list)
    text: str = ""  # digest of the batches so far
    complete: bool = False

    def write(self, folder: Path) -> None:
        with atomic_text(folder / STATE_NAME) as parts:
            parts.append(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> _State | None:
        try:
            return cls(**json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            message = f"{folder / STATE_NAME} is torn ({error}). Delete the folder and record again."
            raise CheckpointError(message) from None


class Recording:
    """A finished recording.

    Attributes:
        folder: where it lies. n_tokens: rows of every layer. layers: paths of the FFNs, in the model's order.
        ends: row after the last one of each sequence, ascending; rows of one sequence are consecutive tokens.
    """

    def __init__(self, folder: Path, state: _State) -> None:
        self.folder, self.n_tokens, self.layers, self.ends = folder, state.n_tokens, state.layers, state.ends
        self._number = {path: i for i, path in enumerate(state.layers)}
        self._shapes, self._dtypes = state.shapes, [getattr(torch, name) for name in state.dtypes]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Recording:
        """Open a recording.

        Raises:
            CheckpointError: there is none, it is not finished, or a file is not as long as it should be.
        """
        folder = Path(folder)
        state = _State.read(folder)
        if state is None or not state.complete:
            what = "no recording" if state is None else f"a recording that stopped after {state.n_tokens} tokens"
            raise CheckpointError(f"{folder} holds {what}. Run what records it again; it goes on where it stopped.")
        out = cls(folder, state)
        for i, (d_model, d_ffn) in enumerate(out._shapes):
            for path, row_bytes in zip(_paths(folder, i), _row_bytes(d_model, d_ffn, out._dtypes[i]), strict=True):
                want, have = out.n_tokens * row_bytes, path.stat().st_size if path.exists() else -1
                if have != want:
                    raise CheckpointError(f"{path} has {have} bytes, expected {want}. Delete {folder}, record again.")
        return out

    def shape(self, layer: str) -> tuple[int, int]:
        """d_model and d_ffn of a layer."""
        return tuple(self._shapes[self._number[layer]])  # type: ignore[return-value]

    def inputs(self, layer: str) -> torch.Tensor:
        """What an FFN was given: [n_tokens, d_model], mapped from the file."""
        i = self._number[layer]
        size = self.n_tokens * self._shapes[i][0]
        whole = torch.from_file(str(_paths(self.folder, i)[0]), False, size, dtype=self._dtypes[i])
        return whole.view(self.n_tokens, -1)

    def bits(self, layer: str) -> npt.NDArray[np.uint8]:
        """Which neurons fired, packed: [n_tokens, ceil(d_ffn / 8)] uint8, mapped from the file."""
        i = self._number[layer]
        shape = (self.n_tokens, -(-self._shapes[i][1] // 8))
        return np.memmap(_paths(self.folder, i)[1], np.uint8, "r", shape=shape)

    def unpack(self, layer: str, bits: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Rows of `bits` as [n, d_ffn] bool."""
        d_ffn = self.shape(layer)[1]
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=d_ffn, bitorder="little")).bool()

    def fired(self, layer: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Which neurons fired for tokens start..stop: [n, d_ffn] bool."""
        return self.unpack(layer, self.bits(layer)[start:stop])


def record(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Recording:
    """Run a model over token ids and record, layer by layer, its FFNs' inputs and which neurons fire.

    Args:
        model: stock, or on flash under its cap.
        batches: [B, T] int64 each, every entry a token of the text (no padding); the same ones when a run goes on.
        folder: to write; what an interrupted run of the same model and batches left in it is continued.
        max_tokens: stop after so many.
        progress: show a bar.

    Returns:
        The finished recording.

    Raises:
        FlashError: the folder holds a recording of another model or text, or there was no token.
        DiskFullError: no space left; what is recorded stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    was_training, blocks = model.training, watched_blocks(model)
    with _Writer(folder, fingerprint(model, blocks), blocks) as writer, explain_full_disk(folder):
        total = max_tokens
        if total is None and isinstance(batches, Sequence):
            total = sum(batch.numel() for batch in batches)
        bar = tqdm(total=total, desc="Recording", unit="token", unit_scale=True, disable=not progress)
        model.eval()
        try:
            with bar, tap(model, writer), torch.inference_mode():
                for ids in _up_to(batches, max_tokens):
                    if writer.begin(ids):
                        _forward(model, ids)
                        writer.commit()
                    bar.update(ids.numel())
        finally:
            model.train(was_training)
        return Recording(folder, writer.finish())


def _up_to(batches: Iterable[torch.Tensor], max_tokens: int | None) -> Iterator[torch.Tensor]:
    """The batches until `max_tokens` are reached; the last one is cut, sequence by sequence."""
    left = max_tokens
    for ids in batches:
        if left is None:
            yield ids
            continue
        n_rows, rest = divmod(left, ids.shape[1])
        if ids.numel() <= left:
            yield ids
        else:
            if n_rows:
                yield ids[:n_rows]
            if rest:
                yield ids[n_rows : n_rows + 1, :rest]
        left -= min(left, ids.numel())
        if left == 0:
            return


def _forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One pass without the head: logits of every token are what nobody has room for."""
    for module in model.modules():
        if isinstance(module, FlashFFN) and isinstance(module.engine, SparseEngine):
            with module.engine.cache.lock:
                module.engine.cache.reset()  # what is cached decides a sum's order; a run that goes on starts empty
    body: Any = model.base_model
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    body(input_ids=ids, use_cache=False, **options)


def fingerprint(model: PreTrainedModel, blocks: Sequence[FFNBlock]) -> str:
    """Hash that changes when a model's weights do: of vectors, of the first neurons, of what made the flash files."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or any(name == block.up.key for block in blocks):
            some = parameter.detach().reshape(-1)[:4096].to(torch.float64)
            digest.update(name.encode() + repr(tuple(parameter.shape)).encode() + some.numpy().tobytes())
    runtime = getattr(model, "_hf_flash", None)
    for path in runtime.files.values() if runtime is not None else ():
        digest.update(read_header(path).metadata.get(SOURCE_KEY, "").encode())
    return digest.hexdigest()


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:05d}.inputs", folder / f"{number:05d}.fired"


def _row_bytes(d_model: int, d_ffn: int, dtype: torch.dtype) -> tuple[int, int]:
    return d_model * dtype.itemsize, -(-d_ffn // 8)


class _Writer:
    """The observer that writes; a context, so that its files are closed."""

    def __init__(self, folder: Path, model: str, blocks: Sequence[FFNBlock]) -> None:
        self._folder = folder
        shapes = [(block.d_model, block.d_ffn) for block in blocks]
        fresh = _State(_VERSION, model, [block.path for block in blocks], shapes, [""] * len(blocks))
        self._state = _State.read(folder) or fresh
        if (self._state.version, self._state.model, self._state.layers) != (_VERSION, model, fresh.layers):
            raise self._other("model")
        self._number = {block.path: i for i, block in enumerate(blocks)}
        self._seen: tuple[str, int] = ("", 0)  # digest of the batches that passed, and how many
        self._ids = torch.empty(0, 0)
        self._written: set[str] = set()

    def __enter__(self) -> _Writer:
        flags = os.O_RDWR | os.O_CREAT
        pairs = [_paths(self._folder, i) for i in range(len(self._number))]
        self._fds = [[os.open(path, flags, 0o644) for path in pair] for pair in pairs]
        return self

    def __exit__(self, *error: object) -> None:
        for fd in (fd for pair in self._fds for fd in pair):
            os.close(fd)

    def _other(self, what: str) -> FlashError:
        return FlashError(
            f"{self._folder} holds a recording of another {what}. Delete it, or give another folder to record into."
        )

    def begin(self, ids: torch.Tensor) -> bool:
        """A batch comes; returns whether it still has to be run.

        Raises:
            FlashError: an interrupted run recorded another batch in this place.
        """
        if ids.dim() != 2 or not ids.numel():
            raise FlashError(f"A batch of token ids has shape {tuple(ids.shape)}, expected [B, T] with a token in it.")
        digest = hashlib.sha256(self._seen[0].encode() + repr(tuple(ids.shape)).encode() + ids.numpy().tobytes())
        self._seen = digest.hexdigest(), self._seen[1] + 1
        if self._seen[1] == self._state.n_batches and self._seen[0] != self._state.text:
            raise self._other("text")
        self._ids, self._written = ids, set()
        return self._seen[1] > self._state.n_batches

    def observe(self, layer: str, x: torch.Tensor, activations: torch.Tensor) -> None:
        """Write one layer's rows after those that are there."""
        i, n = self._number[layer], self._ids.numel()
        if x.shape[0] != n:
            raise FlashError(f"{layer} was given {x.shape[0]} tokens of {n}: it cannot be recorded token by token.")
        self._state.dtypes[i] = str(x.dtype).removeprefix("torch.")
        fired = np.packbits((activations != 0).numpy(), axis=1, bitorder="little")
        rows = (x.contiguous().view(torch.uint8).numpy(), fired)
        for fd, data in zip(self._fds[i], rows, strict=True):
            view, offset = memoryview(data.data).cast("B"), self._state.n_tokens * data.shape[1]
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done
        self._written.add(layer)

    def commit(self) -> None:
        """The batch is whole: note it, once its bytes are on the disk, and let the page cache go."""
        missing = set(self._number) - self._written
        if missing:
            raise FlashError(f"{min(missing)} did not run on the text, so there is nothing of it to record.")
        for fd in (fd for pair in self._fds for fd in pair):
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        start, (n_rows, length) = self._state.n_tokens, self._ids.shape
        self._state.ends += [start + length * (i + 1) for i in range(n_rows)]
        self._state.n_tokens += n_rows * length
        self._state.text, self._state.n_batches = self._seen
        self._state.write(self._folder)

    def finish(self) -> _State:
        """No batch is left."""
        if self._seen[1] == 0:
            raise FlashError("There is no token to record: the text is empty.")
        if self._seen[1] < self._state.n_batches:
            raise self._other("text")
        for i, ((d_model, d_ffn), dtype) in enumerate(zip(self._state.shapes, self._state.dtypes, strict=True)):
            sizes = _row_bytes(d_model, d_ffn, getattr(torch, dtype))
            for fd, row_bytes in zip(self._fds[i], sizes, strict=True):
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, self._state.n_tokens * row_bytes)  # a batch that was begun and is not wanted
        self._state.complete = True
        self._state.write(self._folder)
        return self._state
