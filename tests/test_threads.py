"""One model, several threads: every one gets the tokens that it would get alone."""

import copy
import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers_e2e import greedy, load, logits_of, tightest_plan
from tiny_models import TINY, model_inputs
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_flash

CapFor = Callable[..., int]
N = 8
N_TIMES = int(os.environ.get("HF_FLASH_TEST_REPEATS", "4"))  # more of them for a soak


def together(*works: Callable[[], None]) -> None:
    """Run functions at the same time, each in a thread of its own; the first failure is raised here."""
    failed: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a thread hangs"
    if failed:
        raise failed[0]


def repeatedly(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], n_times: int
) -> Callable[[], None]:
    def work() -> None:
        for i in range(n_times):
            ids, want = prompts[i % len(prompts)], wanted[i % len(wanted)]
            assert torch.equal(greedy(model, ids, N), want), f"repetition {i}"

    return work


@pytest.mark.slow
@pytest.mark.parametrize("want", ["all", "half", "least", "streamed"])
@pytest.mark.parametrize("gate", ["all", "certified"])
def test_two_threads_with_different_prompts(
    gate: str, want: str, flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    model = load(flash_folder, cap_for(gate, want), gate=gate)
    mine = [[prompts[:1], prompts[1:3]], [prompts[3:4], prompts[4:6, :5]]]
    wanted = [[greedy(dense, ids, N) for ids in some] for some in mine]
    together(*(repeatedly(model, some, some_wanted, N_TIMES) for some, some_wanted in zip(mine, wanted, strict=True)))


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_the_first_pass_of_four_threads_at_once(
    gate: str, flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    want = logits_of(dense, input_ids=prompts[:2])
    for _ in range(6):  # each a fresh model: what is pinned and cached is decided while they run
        model = load(flash_folder, cap_for(gate, "half"), gate=gate)

        def work(model: PreTrainedModel = model) -> None:
            for _ in range(2):
                torch.testing.assert_close(logits_of(model, input_ids=prompts[:2]), want, rtol=1e-5, atol=2e-5)

        together(work, work, work, work)


@pytest.mark.parametrize("gate", ["all", "certified"])
def test_model_and_copy_in_two_threads(
    gate: str, flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    model = load(flash_folder, cap_for(gate, "half"), gate=gate)
    other = copy.deepcopy(model)
    wanted = [greedy(dense, prompts[i : i + 1], N) for i in range(2)]
    together(
        repeatedly(model, [prompts[:1]], wanted[:1], 6),
        repeatedly(other, [prompts[1:2]], wanted[1:], 6),
    )


def test_streamed_embedding_and_head(tmp_path: Path) -> None:
    TINY["llama-relu"]().save_pretrained(tmp_path / "stock")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    with tightest_plan():
        model = load(tmp_path / "stock", gate="all", context=64, cache_dir=tmp_path / "cache")
    inputs = [model_inputs(dense, batch=1, length=length)["input_ids"] for length in (5, 9)]
    wanted = [greedy(dense, ids, N) for ids in inputs]
    together(*(repeatedly(model, [ids], [want], 15) for ids, want in zip(inputs, wanted, strict=True)))


def first_norm(model: PreTrainedModel) -> torch.Tensor:
    """A parameter whose gradient comes through every FFN."""
    return model.model.decoder.layers[0].self_attn_layer_norm.weight


def test_one_thread_trains_while_another_generates(
    flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    for gate in ("all", "certified"):
        model = load(flash_folder, cap_for(gate, "half"), gate=gate)
        want = torch.autograd.grad(dense(prompts[:2], labels=prompts[:2]).loss, first_norm(dense))

        def train(model: PreTrainedModel = model, want: tuple[torch.Tensor, ...] = want) -> None:
            for _ in range(4):
                loss = model(prompts[:2], labels=prompts[:2]).loss
                got = torch.autograd.grad(loss, first_norm(model))
                torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-5)

        together(train, repeatedly(model, [prompts[2:3]], [greedy(dense, prompts[2:3], N)], 6))


def test_one_thread_fails_and_the_other_goes_on(
    flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    for gate in ("all", "certified"):
        model = load(flash_folder, cap_for(gate, "half"), gate=gate)
        activation = model.model.decoder.layers[2].fc1.own_activation

        def fail(model: PreTrainedModel = model, activation: torch.nn.Module = activation) -> None:
            mine = threading.get_ident()

            def hook(*args: object) -> None:
                if threading.get_ident() == mine:
                    raise RuntimeError("stopped by the test")

            with activation.register_forward_pre_hook(hook):
                for _ in range(6):
                    with pytest.raises(RuntimeError, match="stopped by the test"):
                        greedy(model, prompts[4:5], N)

        together(fail, repeatedly(model, [prompts[:2]], [greedy(dense, prompts[:2], N)], 6))


def test_nothing_is_left_of_a_model(flash_folder: Path, cap_for: CapFor, prompts: torch.Tensor) -> None:
    def run_once() -> None:
        for gate in ("all", "certified"):
            greedy(load(flash_folder, cap_for(gate, "half"), gate=gate), prompts[:1], 2)
        gc.collect()

    run_once()
    time.sleep(0.1)
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        run_once()
    deadline = time.monotonic() + 5  # idle threads notice that their pool is gone
    while time.monotonic() < deadline and threading.active_count() > threads:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() <= threads


def test_counters_add_up(flash_folder: Path, cap_for: CapFor, prompts: torch.Tensor) -> None:
    for gate in ("all", "certified"):
        model = load(flash_folder, cap_for(gate, "half"), gate=gate)

        def work(model: PreTrainedModel = model) -> None:
            for _ in range(4):
                greedy(model, prompts[:1], N)

        together(work, work, work)
        stats = hf_flash.stats(model)
        assert stats.n_forwards == 3 * 4 * N and stats.n_tokens == 3 * 4 * (prompts.shape[1] + N - 1)
        assert stats.neurons_hit + stats.neurons_read == stats.neurons_wanted
