"""Whatever stops a forward pass in the middle, the next one gives the right tokens."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_e2e import greedy, load
from transformers import PreTrainedModel, StoppingCriteria

from hf_flash.cache import NeuronCache
from hf_flash.errors import FlashConfigError, ReadError
from hf_flash.readers import Ticket, UringReader
from hf_flash.readers.threads import ThreadReader
from hf_flash.store import FlashStore
from hf_flash.window import Window

CapFor = Callable[..., int]
Load = Callable[..., PreTrainedModel]
N = 5
N_SIGNALS = int(os.environ.get("HF_FLASH_TEST_SIGNALS", "4"))  # more of them for a soak
KINDS = ["all half", "all streamed", "certified half", "certified least"]
READERS = ["threads", "uring"]


@pytest.fixture
def load_kind(flash_folder: Path, cap_for: CapFor, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A model by gate and kind of cap, "certified half", and by reader."""

    def make(kind: str, reader: str = "threads") -> PreTrainedModel:
        gate, want = kind.split()
        monkeypatch.setenv("HF_FLASH_READER", reader)
        try:
            return load(flash_folder, cap_for(gate, want), gate=gate)
        except FlashConfigError as error:
            pytest.skip(str(error))

    return make


@pytest.fixture(scope="module")
def want(dense: PreTrainedModel, prompts: torch.Tensor) -> torch.Tensor:
    """What the first two prompts must give, whatever happened before."""
    return greedy(dense, prompts[:2], N)


@contextlib.contextmanager
def slow_reads(seconds: float) -> Iterator[None]:
    """Every third read lands late: what an interrupted pass asked for arrives while the next one is running."""
    read_one, count = ThreadReader._read_one, itertools.count()

    def late(self: ThreadReader, read: Any) -> None:
        if next(count) % 3 == 0:
            time.sleep(seconds)
        read_one(self, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadReader, "_read_one", late)
        yield


@contextlib.contextmanager
def interrupted(owner: type, name: str, at: int, after: bool) -> Iterator[None]:
    """Ctrl-C arrives before or after the `at`-th call of a method."""
    method, calls = getattr(owner, name), itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == at
        if now and not after:
            raise KeyboardInterrupt
        out = method(*args, **kwargs)
        if now:
            raise KeyboardInterrupt
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


STEPS = {
    "threads": [(Ticket, "wait"), (ThreadReader, "submit")],
    "uring": [(Ticket, "wait"), (UringReader, "submit"), (UringReader, "submit_rows"), (UringReader, "_ticket")],
}
IN_THE_CACHE = [
    (FlashStore, "submit_rows"), (NeuronCache, "fetch"), (NeuronCache, "keep"), (NeuronCache, "_take_slots"),
    (NeuronCache, "_drop"), (Window, "use"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reader", "kind", "owner", "name"),
    [(reader, kind, *step) for reader in READERS for kind in KINDS for step in STEPS[reader]]
    + [("threads", kind, *step) for kind in KINDS if "certified" in kind for step in IN_THE_CACHE],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_ctrl_c_around_every_step_of_a_read(
    reader: str, kind: str, owner: type, name: str, load_kind: Load, want: torch.Tensor, prompts: torch.Tensor
) -> None:
    model, n_stopped = load_kind(kind, reader), 0
    for at, after in ((1, True), (2, False), (9, True)):
        with slow_reads(0.01), interrupted(owner, name, at, after):
            try:
                greedy(model, prompts[2:3], N)
            except KeyboardInterrupt:
                n_stopped += 1
        got = greedy(model, prompts[:2], N)
        assert torch.equal(got, want), f"after an interrupt {'after' if after else 'before'} call {at}"
    # A step that a model does not take: what fits is fetched, else it is swept and some of it kept; rows or extents.
    assert n_stopped or name in ("fetch", "keep") or reader == "uring"


class Stop(StoppingCriteria):
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.n -= 1
        if self.n == 0:
            raise RuntimeError("stopped by the test")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_error_in_a_stopping_criterion_and_in_a_hook(
    kind: str, load_kind: Load, want: torch.Tensor, prompts: torch.Tensor
) -> None:
    model = load_kind(kind)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        greedy(model, prompts[2:3], N, stopping_criteria=[Stop(3)])
    assert torch.equal(greedy(model, prompts[:2], N), want)

    def hook(*args: Any) -> None:
        raise RuntimeError("stopped by the test")

    for index in (0, 2, 3):
        handle = model.model.decoder.layers[index].register_forward_pre_hook(hook)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            greedy(model, prompts[3:4], N)
        handle.remove()
        assert torch.equal(greedy(model, prompts[:2], N), want)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_that_raises(kind: str, load_kind: Load, want: torch.Tensor, prompts: torch.Tensor) -> None:
    model = load_kind(kind)
    for at in (1, 3, 6):
        with interrupted(torch.nn.ReLU, "forward", at, True), pytest.raises(KeyboardInterrupt):
            greedy(model, prompts[2:3], N)
        assert torch.equal(greedy(model, prompts[:2], N), want)


@pytest.mark.parametrize("kind", KINDS)
def test_failed_read_is_an_error_and_the_next_pass_is_right(
    kind: str, load_kind: Load, want: torch.Tensor, prompts: torch.Tensor
) -> None:
    model, read_one, left = load_kind(kind), ThreadReader._read_one, [0]

    def failing(self: ThreadReader, read: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ReadError(5, "the test's device failed")
        read_one(self, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadReader, "_read_one", failing)
        for at in (1, 3, 10):
            left[0] = at
            with contextlib.suppress(ReadError):  # a chunk that was read ahead and is not asked for hurts nobody
                greedy(model, prompts[2:3], N)
            assert left[0] <= 0
            assert torch.equal(greedy(model, prompts[:2], N), want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ctrl-C in a finalizer is dropped
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_ctrl_c_at_any_moment(
    reader: str, kind: str, load_kind: Load, want: torch.Tensor, prompts: torch.Tensor
) -> None:
    model, generator, n_stopped = load_kind(kind, reader), torch.Generator().manual_seed(1), 0

    def raise_interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, raise_interrupt)
    try:
        for _ in range(N_SIGNALS):
            with slow_reads(0.005):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.05 * float(torch.rand(1, generator=generator)))
                    greedy(model, prompts[2:3], N)
                except KeyboardInterrupt:
                    n_stopped += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(greedy(model, prompts[:2], N), want)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert n_stopped
