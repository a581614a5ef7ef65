"""A profile's rows sum to the token's time, count what they say, and leave a model as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_e2e import greedy, load
from transformers import PreTrainedModel

import hf_flash
from hf_flash import early, trace
from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.profile import OTHER, PYTHON, REST, summarize
from hf_flash.trace import Recorder

N = 8


def n_hooks(model: PreTrainedModel) -> int:
    """Hooks but for those of the early gate, which come and go by themselves."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(type(getattr(hook, "__self__", hook)).__module__ != early.__name__ for hook in hooks)


@pytest.mark.parametrize("reader", ["threads", "auto"])
@pytest.mark.parametrize("gate", ["all", "certified"])
def test_a_generation(
    gate: str, reader: str, flash_folder: Path, cap_for: Callable[..., int], dense: PreTrainedModel,
    prompts: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_FLASH_READER", reader)
    model = load(flash_folder, cap_for(gate, "least"), gate=gate)
    hooks = n_hooks(model)
    with hf_flash.profile(model, tmp_path / "trace.json") as profile:
        read = hf_flash.stats(model).bytes_read
        out = greedy(model, prompts[:1], N)
        read = hf_flash.stats(model).bytes_read - read
    assert torch.equal(out, greedy(dense, prompts[:1], N)), "a profiled model gives the same tokens"
    assert trace.active is None and n_hooks(model) == hooks

    found = profile.breakdown()
    assert found.n_tokens == N - 2  # not the prompt's, not the last
    assert found.n_ffns == 4
    assert sum(found.rows.values()) == pytest.approx(found.token_s, rel=1e-6)
    assert all(seconds >= -1e-6 for seconds in found.rows.values()), found.rows
    needed = {"attention", REST, "FFN: arithmetic", PYTHON, "waiting for flash", "head", OTHER}
    assert needed <= set(found.rows) and ("FFN: gate scan" in found.rows) == (gate == "certified")
    assert 0 < found.python_s < found.token_s / 4
    assert 4 * found.python_s <= 2 * found.rows[PYTHON]  # at least half of the tokens take as long as the median one
    text = profile.table()
    assert "µs per FFN layer of the median token" in text and all(name in text for name in found.rows)
    assert json.loads(json.dumps(found.to_dict()))["n_tokens"] == N - 2

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e["args"]["bytes"] for e in events if e["name"] == trace.READ) >= 0.9 * read > 0
    assert sum(e["name"] == trace.LAYER for e in events) == 4 * N
    n_spans = len(profile.recorder.spans)
    greedy(model, prompts[:1], 2)
    assert len(profile.recorder.spans) == n_spans, "nothing is recorded afterwards"


def test_other_models_parts_are_found(flash_folder: Path, tmp_path: Path) -> None:
    """Inline FFNs, layers inside layers, an encoder beside the decoder."""
    from tiny_models import TINY

    for kind, parts in (("opt", {"attention", "norm", "ffn", "layer", "head"}), ("t5", {"attention", "norm", "ffn"})):
        model = TINY[kind]().eval()
        hf_flash.patch(model, memory="256MiB", cache_dir=tmp_path / kind)
        with hf_flash.profile(model) as profile, torch.no_grad():
            model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert parts <= {span.name for span in profile.recorder.spans}
        found = profile.breakdown()
        assert found.n_tokens >= 2 and found.rows["attention"] > 0


def test_what_was_recorded_until_an_error_is_written(
    flash_folder: Path, cap_for: Callable[..., int], prompts: torch.Tensor, tmp_path: Path
) -> None:
    model = load(flash_folder, cap_for("all", "all"), gate="all")
    with pytest.raises(KeyboardInterrupt), hf_flash.profile(model, tmp_path / "trace.json"):
        greedy(model, prompts[:1], 2)
        raise KeyboardInterrupt
    assert trace.active is None
    assert any(e["name"] == "layer" for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_refusals(flash_folder: Path, cap_for: Callable[..., int], dense: PreTrainedModel, tmp_path: Path) -> None:
    model = load(flash_folder, cap_for("all", "all"), gate="all")
    hooks = n_hooks(model)
    with pytest.raises(FlashError, match="does not run from flash"), hf_flash.profile(dense):
        pass
    with pytest.raises(FlashError, match="one at a time"), hf_flash.profile(model), hf_flash.profile(model):
        pass
    assert trace.active is None and n_hooks(model) == hooks
    for file, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x.json", "there is no folder")):
        with pytest.raises(FlashConfigError, match=why), hf_flash.profile(model, file):
            raise AssertionError("said before anything runs")
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(FlashConfigError, match="permission denied"), hf_flash.profile(model, tmp_path / "x.json"):
            pass


def test_a_full_disk_leaves_nothing(
    flash_folder: Path, cap_for: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(flash_folder, cap_for("all", "all"), gate="all")

    def full(self: Path, text: str, **kwargs: object) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(hf_flash.FlashError, match="No room in"), hf_flash.profile(model, tmp_path / "trace.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_own_time_is_counted_once() -> None:
    recorder = Recorder()
    for token in range(4):
        at = token * 10.0
        recorder.add("new thing", at + 3.5, at + 4)
        recorder.add(trace.GATE, at + 1, at + 2)
        recorder.add(trace.WAIT, at + 2, at + 4.5)
        recorder.add(trace.FFN, at + 1, at + 5)
        recorder.add(trace.FORWARD, at, at + 8, tokens=1)
        recorder.add_read(at + 1.5, at + 3, 100)
    found = summarize(recorder.spans)
    assert (found.n_tokens, found.token_s, found.median_s, found.n_ffns, found.read_bytes) == (2, 10, 10, 1, 100)
    assert found.python_s == 1.5
    assert found.rows == {REST: 4, PYTHON: 1.5, "waiting for flash": 2, OTHER: 2, "new thing": 0.5}
    assert summarize([]).n_tokens == 0
    assert "generate three new tokens" in summarize([]).table()
