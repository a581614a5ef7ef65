"""All layers of a token in one native call: what the modules make of it to the bit, whatever stops it on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_e2e import greedy, load, packing_plan
from helpers_hub import save_stock, tiny_llama, tiny_opt
from helpers_steps import CACHE, HERE, IDS, N, assert_same, generate, steps_of, take_away
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.opt import modeling_opt

import hf_flash
from hf_flash import attach, early, layer_calls, native, norms, trace
from hf_flash.budget import Demand, Plan
from hf_flash.errors import ReadError
from hf_flash.ffn import FlashFFN
from hf_flash.layer_step import LIKE_IT, LayerStep
from hf_flash.readers import UringReader, open_reader
from hf_flash.trial import Trial

pytestmark = pytest.mark.skipif(
    not HERE
    or not norms.agrees(128, True)
    or not norms.agrees(128, False)
    or not isinstance(open_reader(), UringReader),
    reason="no AVX512-VBMI2, no io_uring, or torch sums in another order here",
)
N_LAYERS = 4
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: tiny_opt(hidden_size=128, word_embed_proj_dim=128, ffn_dim=2048, num_hidden_layers=N_LAYERS),
    "llama": lambda: tiny_llama("silu", hidden_size=128, intermediate_size=2048, num_hidden_layers=N_LAYERS),
    "relu llama": lambda: tiny_llama("relu", hidden_size=128, intermediate_size=2048, num_hidden_layers=N_LAYERS),
}


@contextlib.contextmanager
def streaming_plan() -> Iterator[None]:
    """Models loaded in this block keep their attentions packed, and of their FFNs no row."""
    with packing_plan(), pytest.MonkeyPatch.context() as patch:
        true = attach.make_plan

        def none_pinned(demand: Demand, memory: int, residents: bool = True) -> Plan:
            plan = true(demand, memory, residents)
            return dataclasses.replace(plan, pinned_rows=dict.fromkeys(plan.pinned_rows, 0))

        patch.setattr(attach, "make_plan", none_pinned)
        yield


class Models:
    """A model whose layers run together, and the same one whose modules run one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_calls = folder, 0

    def __call__(self) -> PreTrainedModel:
        with streaming_plan():
            return load(self.folder)

    def stock(self) -> PreTrainedModel:
        model = self()
        take_away(model)
        return model


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("together")
    save_stock(folder / "stock", MODELS[request.param]().bfloat16())
    return Models(hf_flash.repack(folder / "stock", folder / "flash", pack=True, progress=False))


@pytest.fixture
def n_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Results of the native calls."""
    library: Any = native.library()
    results, true = [], library.hf_flash_layers

    def call(at: int) -> int:
        results.append(true(at))
        return results[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(library, "hf_flash_layers", call)
    return results


def ffns_of(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FlashFFN)]


def shrink(model: PreTrainedModel, n_slots: int) -> None:
    """So many slots for each layer with a gate, so that tokens read."""
    ffns_of(model)[0].on_pass = ()  # nobody gives the slots back
    for ffn in ffns_of(model):
        if hasattr(ffn.engine, "cache"):
            ffn.engine.cache.begin(n_slots)


def assert_free(model: PreTrainedModel) -> None:
    """No thread holds a lock of an FFN."""
    with ThreadPoolExecutor(1) as pool:
        for ffn in ffns_of(model):
            lock = ffn.engine.lock
            assert pool.submit(lock.acquire, blocking=False).result()
            pool.submit(lock.release).result()


def test_one_call_takes_a_token_through_all_layers(models: Models, n_calls: list[int]) -> None:
    model, other = models(), models.stock()
    assert len(steps_of(model, LayerStep)) == N_LAYERS
    for one in (model, other):
        shrink(one, 1500)
    assert_same(generate(model), generate(other))
    # A prompt is none for it; of the first token's layers two go both ways, by themselves, and speak for the others.
    assert n_calls == [native.DONE] * (LIKE_IT + 1 + N - 2)
    found, want = (hf_flash.stats(one).counters() for one in (model, other))
    for name in ("n_tokens", "n_forwards", "neurons_wanted", "neurons_fired"):
        assert found[name] == want[name] > 0 or (name == "neurons_fired" and want[name] == 0), name
    ahead = model._hf_flash.plan.parts.get("stream", 0)  # how much is read ahead depends on when reads land
    assert abs(found["bytes_read"] - want["bytes_read"]) <= ahead < want["bytes_read"]
    assert found["neurons_hit"] + found["neurons_read"] == found["neurons_wanted"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_was_changed_on_the_way_counts(
    models: Models, mode: Any, n_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a hook, which is looked for, but by who calls the layers: in place, and with another tensor."""
    model, other = models(), models.stock()
    for cls in (modeling_opt.OPTDecoderLayer, modeling_llama.LlamaDecoderLayer):

        def called(self: Any, x: torch.Tensor, *args: Any, true: Any = cls.__call__, **kwargs: Any) -> Any:
            index = self.self_attn.layer_idx
            if index == 1:
                x.mul_(1.25)
            return true(self, x * 0.5 if index == 3 else x, *args, **kwargs)

        monkeypatch.setattr(cls, "__call__", called)
    found = []
    for one in (model, other):
        cache = DynamicCache(config=one.config)
        with mode():
            found.append([one(ids, use_cache=True, **{CACHE: cache}).logits for ids in IDS.split([3, *[1] * 6], 1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and n_calls


def test_layers_that_are_left_out_do_not_run(models: Models, n_calls: list[int]) -> None:
    """As when a model drafts for itself with its first layers."""
    model, other = models(), models.stock()
    if model.config.model_type == "opt":
        pytest.skip("calls all layers that it has")
    assert_same(generate(model), generate(other))
    for one in (model, other):
        one.config.num_hidden_layers = 2
    wanted = [hf_flash.stats(one).neurons_wanted for one in (model, other)]
    del n_calls[:]
    assert_same(generate(model), generate(other))
    assert len(n_calls) == N - 1
    wanted = [hf_flash.stats(one).neurons_wanted - n for one, n in zip((model, other), wanted, strict=True)]
    assert wanted[0] == wanted[1] > 0


def test_more_neurons_than_slots(models: Models, n_calls: list[int]) -> None:
    model, other = models(), models.stock()
    for one in (model, other):
        shrink(one, 20)
    assert_same(generate(model), generate(other))
    has_gate = hasattr(ffns_of(model)[0].engine, "cache")
    assert (native.NO_ROOM in n_calls) == has_gate and len(n_calls) > N
    counts = hf_flash.stats(model).counters()
    assert counts["neurons_hit"] + counts["neurons_read"] == counts["neurons_wanted"]
    assert_free(model)


def test_a_layer_that_another_thread_is_at_waits_for_it(models: Models, n_calls: list[int]) -> None:
    model = models()
    want = greedy(model, IDS, N)
    lock = ffns_of(model)[2].engine.lock
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    assert torch.equal(greedy(model, IDS, N), want)
    done.set()
    thread.join()
    assert_free(model)


def test_a_failed_read_is_an_error_and_the_next_token_is_right(models: Models, n_calls: list[int]) -> None:
    model = models()
    shrink(model, 1500)
    want = greedy(model, IDS, N)
    path = max(models.folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    whole = path.read_bytes()
    for _ in range(2):
        for ffn in ffns_of(model):
            if hasattr(ffn.engine, "cache"):
                ffn.engine.cache.reset()
        cut = _after(model, 3, lambda: os.truncate(path, len(whole) // 4))
        try:
            with cut, pytest.raises(ReadError, match="ended early"):
                greedy(model, IDS, N)
        finally:
            path.write_bytes(whole)
        assert_free(model)
        found = None
        for _ in range(8):  # what was read ahead meanwhile has failed, too
            with contextlib.suppress(ReadError):
                found = greedy(model, IDS, N)
                break
        assert found is not None and torch.equal(found, want)
    assert native.FAILED in n_calls


@contextlib.contextmanager
def _after(model: PreTrainedModel, n: int, call: Callable[[], Any]) -> Iterator[None]:
    """Call something as the n-th pass begins, with nothing in DRAM that was read before."""
    first, passes = ffns_of(model)[0], []
    before = first.on_pass

    def begins(n_tokens: int) -> None:
        passes.append(n_tokens)
        if len(passes) == n:
            call()
            for ffn in ffns_of(model):
                if hasattr(ffn.engine, "cache"):
                    ffn.engine.cache.reset()

    first.on_pass = [*before, begins]
    yield
    first.on_pass = before


def test_ctrl_c_at_any_time_loses_nothing(models: Models) -> None:
    model = models()
    shrink(model, 1500)
    want, n_stopped = greedy(model, IDS, N), 0
    for i in range(40):
        timer = threading.Timer(0.0005 * (1 + i), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()  # it may fire before this returns
            for _ in range(100):
                greedy(model, IDS, N)
        except KeyboardInterrupt:
            n_stopped += 1
        timer.join()
        if i % 5 == 0:
            assert torch.equal(greedy(model, IDS, N), want)
    assert n_stopped >= 39  # Python drops one that comes as a finalizer, of ours or of others, begins
    assert torch.equal(greedy(model, IDS, N), want)
    assert_free(model)


def test_a_signal_is_handled_between_calls(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code that says that a signal came is called again, unless the handler raises."""
    model, library = models(), native.library()
    shrink(model, 1500)
    want, true, raises, n = greedy(model, IDS, N), library.hf_flash_layers, False, 0

    def call(at: int) -> int:
        nonlocal n
        n += 1
        if n % 2:
            if raises:
                raise KeyboardInterrupt
            return native.SIGNAL
        return true(at)  # type: ignore[no-any-return]

    monkeypatch.setattr(library, "hf_flash_layers", call)
    assert torch.equal(greedy(model, IDS, N), want) and n == 2 * (N - 1)
    raises = True
    with pytest.raises(KeyboardInterrupt):
        greedy(model, IDS, N)
    assert_free(model)
    monkeypatch.undo()
    assert torch.equal(greedy(model, IDS, N), want)


class Always(Trial):
    """Guesses for every token."""

    def next_token(self, now: float | None) -> None:
        self.on = now is not None


def test_a_layer_that_is_unlike_the_others_goes_both_ways_itself(models: Models) -> None:
    """Whatever a layer may compute with, and its attention: a number that only it has is one reason to look."""
    for part in ("", "self_attn"):
        model, other = models(), models.stock()
        last = steps_of(model, LayerStep)[-1]._layer
        last.get_submodule(part).scale_of_its_own = 0.5
        assert_same(generate(model), generate(other))
        assert [step._went_both_ways for step in steps_of(model, LayerStep)] == [True, True, False, True]


def test_guesses_are_read_while_layers_run(models: Models, n_calls: list[int]) -> None:
    model, other = models(), models.stock()
    for one in (model, other):
        shrink(one, 1200)
    n = early.install(model, Always())
    assert_same(generate(model), generate(other))
    assert len(n_calls) == LIKE_IT + 1 + N - 2
    assert (hf_flash.stats(model).neurons_early > 0) == (n > 0)


def test_threads_of_a_server(models: Models) -> None:
    model = models()
    shrink(model, 1200)
    want = greedy(model, IDS, N)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: greedy(model, IDS, N), range(12)))
    assert all(torch.equal(tokens, want) for tokens in found)
    assert_free(model)


def test_a_profile_knows_every_layer(models: Models, n_calls: list[int]) -> None:
    model = models()
    shrink(model, 1500)
    greedy(model, IDS, 4)
    with hf_flash.profile(model) as profile:
        greedy(model, IDS, N)
    spans = profile.recorder.spans
    for name in (trace.NATIVE, trace.STEP):
        assert sum(span.name == name for span in spans) == N_LAYERS * (N - 1), name
    for name in (trace.ATTENTION, trace.FFN):
        assert sum(span.name == name for span in spans) == N_LAYERS * N, name
    found = profile.breakdown()
    assert found.n_ffns == N_LAYERS and sum(found.rows.values()) == pytest.approx(found.token_s, rel=1e-6)
    assert all(seconds >= -1e-6 for seconds in found.rows.values()), found.rows
    assert {"attention", "FFN: arithmetic"} <= set(found.rows)


def test_what_is_told_is_told_anew(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: what a layer was told stayed when its FFN could not be taken the next time."""
    model, seen = models(), []
    shrink(model, 1500)
    want, true = greedy(model, IDS, N), layer_calls.run
    last = ffns_of(model)[-1].engine
    if not hasattr(last, "cache"):
        pytest.skip("one lock for all layers")

    def run(first: layer_calls.LayerCall) -> None:
        """Told of all FFNs, then of those that are free."""
        layer_calls._connect(first, locks := [])
        layer_calls._release_all(locks)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(last.lock.acquire).result()
            true(first)
            pool.submit(last.lock.release).result()
        call = first
        while call.following is not None:
            call = call.following
        seen.append((call.told.step, call.told.stream, call.told.next))

    monkeypatch.setattr(layer_calls, "run", run)
    assert torch.equal(greedy(model, IDS, N), want)
    assert seen and all(not any(told) for told in seen)


def test_ctrl_c_before_a_failure_is_looked_at(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that a failed read was for are not trusted, whoever comes first."""
    model, library = models(), native.library()
    shrink(model, 1500)
    want, prompt = greedy(model, IDS, N), torch.cat([IDS] * 3, dim=1)
    want_prompt, true = greedy(model, prompt, 3), library.hf_flash_layers
    path = max(models.folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    whole, results = path.read_bytes(), []

    def call(at: int) -> int:
        results.append(true(at))
        if results[-1] == native.FAILED:
            raise KeyboardInterrupt
        return results[-1]  # type: ignore[no-any-return]

    for ffn in ffns_of(model):
        if hasattr(ffn.engine, "cache"):
            ffn.engine.cache.reset()
    with monkeypatch.context() as patch, _after(model, 3, lambda: os.truncate(path, len(whole) // 4)):
        patch.setattr(library, "hf_flash_layers", call)
        try:
            with pytest.raises((KeyboardInterrupt, ReadError)):
                greedy(model, IDS, N)
        finally:
            path.write_bytes(whole)
    assert_free(model)
    for _ in range(8):  # what was read ahead meanwhile has failed, too
        with contextlib.suppress(ReadError):
            assert torch.equal(greedy(model, prompt, 3), want_prompt)
            break
    assert torch.equal(greedy(model, IDS, N), want)


def test_what_a_hook_of_an_ffn_keeps_stays(models: Models) -> None:
    """Bug: all layers of a token shared the memory of an FFN's input."""
    model, other, kept = models(), models.stock(), []
    for one in (model, other):
        kept.append([])
        for ffn in ffns_of(one):
            ffn.register_forward_hook(lambda module, args, out, to=kept[-1]: to.append(args[0]))
        assert greedy(one, IDS, N) is not None
    assert len(kept[0]) == len(kept[1]) == N_LAYERS * N
    assert all(torch.equal(a.view(-1), b.view(-1)) for a, b in zip(*kept, strict=True))


def test_an_ffn_that_was_wrapped_is_called(models: Models) -> None:
    """Before the first token, when nothing is known of the layers."""
    model = models()
    want = greedy(models.stock(), IDS, N)
    layer = steps_of(model, LayerStep)[1]._layer
    name = layer.forward._kind.ffn
    calls: list[int] = []

    class Probe(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.inner(x)  # type: ignore[no-any-return]

    setattr(layer, name, Probe(getattr(layer, name)))
    assert torch.equal(greedy(model, IDS, N), want) and len(calls) == N
