"""Whatever stops a forward pass in the middle, the next one gives the right tokens."""

import contextlib
import itertools
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
from hf_flash.errors import ReadError
from hf_flash.readers import Ticket
from hf_flash.readers.threads import ThreadReader
from hf_flash.store import FlashStore
from hf_flash.window import Window

CapFor = Callable[..., int]
N = 12


@pytest.fixture(params=["all half", "all least", "all streamed", "certified all", "certified half", "certified least"])
def model(request: pytest.FixtureRequest, flash_folder: Path, cap_for: CapFor) -> PreTrainedModel:
    gate, want = request.param.split()
    return load(flash_folder, cap_for(gate, want), gate=gate)


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
def interrupted(owner: type, name: str, at: int, after: bool) -> Iterator[list[int]]:
    """Ctrl-C arrives before or after the `at`-th call of a method; yields a list with the number of calls."""
    method, calls = getattr(owner, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and not after:
            raise KeyboardInterrupt
        out = method(*args, **kwargs)
        if calls[0] == at:
            raise KeyboardInterrupt
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Ticket, "wait"), (ThreadReader, "submit"), (FlashStore, "submit_rows"), (NeuronCache, "fetch"),
        (NeuronCache, "keep"), (NeuronCache, "_take_slots"), (NeuronCache, "_drop"), (Window, "use"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_around_every_step_of_a_read(
    owner: type, name: str, after: bool, model: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    want = greedy(dense, prompts[:2], N)
    for at in (1, 2, 7, 19):
        with slow_reads(0.01), interrupted(owner, name, at, after), contextlib.suppress(KeyboardInterrupt):
            greedy(model, prompts[2:3], N)
        got = greedy(model, prompts[:2], N)
        assert torch.equal(got, want), f"after an interrupt at call {at}"


class Stop(StoppingCriteria):
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.n -= 1
        if self.n == 0:
            raise RuntimeError("stopped by the test")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_error_in_a_stopping_criterion_and_in_a_hook(
    model: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    want = greedy(dense, prompts[:2], N)
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


def test_failed_read_is_an_error_and_the_next_pass_is_right(
    model: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    want = greedy(dense, prompts[:2], N)
    read_one, left = ThreadReader._read_one, [0]

    def failing(self: ThreadReader, read: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ReadError(5, "the test's device failed")
        read_one(self, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadReader, "_read_one", failing)
        for at in (1, 3, 10):
            left[0] = at
            with contextlib.suppress(ReadError):
                greedy(model, prompts[2:3], N)
            assert left[0] <= 0
            assert torch.equal(greedy(model, prompts[:2], N), want)


@pytest.mark.slow
def test_ctrl_c_at_any_moment(model: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    want = greedy(dense, prompts[:2], N)
    generator, n_stopped = torch.Generator().manual_seed(1), 0

    def raise_interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, raise_interrupt)
    try:
        for _ in range(12):
            with slow_reads(0.005):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.08 * float(torch.rand(1, generator=generator)))
                    greedy(model, prompts[2:3], N)
                except KeyboardInterrupt:
                    n_stopped += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(greedy(model, prompts[:2], N), want)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert n_stopped
