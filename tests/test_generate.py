"""generate() from flash gives the dense model's tokens, whatever decodes them and whatever the cap leaves in DRAM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_e2e import assert_greedy, greedy, load, logits_of, plan_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

import hf_flash
from hf_flash import early, kv

GATES = ["all", "certified"]
N_TOKENS = 100
CapFor = Callable[..., int]


@pytest.fixture(scope="module")
def wanted(dense: PreTrainedModel, prompts: torch.Tensor) -> torch.Tensor:
    """The dense model's continuation of each prompt: [20, prompt + 100]."""
    return greedy(dense, prompts, N_TOKENS)


@pytest.fixture(scope="module", params=GATES)
def flash(request: pytest.FixtureRequest, flash_folder: Path, cap_for: CapFor) -> PreTrainedModel:
    """The shipped model from flash, half of its neurons in DRAM."""
    return load(flash_folder, cap_for(request.param, "half"), gate=request.param)


# --- the same tokens under every cap


@pytest.mark.slow
def test_tokens_of_prompts_one_by_one_with_half_the_neurons_in_dram(
    flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor, wanted: torch.Tensor
) -> None:
    n = 6 if "certified" in plan_of(flash).gates.values() else 2  # gate `all` keeps no history that could matter
    got = torch.cat([greedy(flash, row[None], N_TOKENS) for row in prompts[:n]])
    assert_greedy(got, wanted[:n], dense)


@pytest.mark.slow
@pytest.mark.parametrize("want", ["all", "half", "least", "streamed"])
@pytest.mark.parametrize("gate", GATES)
def test_tokens_of_20_prompts_at_once_under_every_kind_of_cap(
    gate: str, want: str, flash_folder: Path, cap_for: CapFor,
    dense: PreTrainedModel, prompts: torch.Tensor, wanted: torch.Tensor,
) -> None:  # fmt: skip
    cap = cap_for(gate, want)
    model = load(flash_folder, cap, gate=gate)
    plan, n_neurons = plan_of(model), 4 * dense.config.ffn_dim
    held = sum(plan.pinned_rows.values()) + sum(plan.slots.values())
    assert plan.memory == cap and set(plan.gates.values()) == {gate}
    assert bool(plan.streamed) == (want == "streamed")
    if want in ("all", "half"):
        share = {"all": 1.0, "half": 0.5}[want]
        assert share - 0.01 <= held / n_neurons < share + 0.26  # gate `all` pins by the layer or the chunk
    else:
        assert held < 0.15 * n_neurons
    assert_greedy(greedy(model, prompts, N_TOKENS), wanted, dense)
    assert_greedy(greedy(model, prompts[:1], 40), wanted[:1, : prompts.shape[1] + 40], dense)


@pytest.mark.parametrize("want", ["all", "half", "least", "streamed"])
@pytest.mark.parametrize("gate", GATES)
def test_logits_under_every_kind_of_cap(
    gate: str, want: str, flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    model = load(flash_folder, cap_for(gate, want), gate=gate)
    for ids in (prompts[:1], prompts, prompts[3:5, :1]):
        expected = logits_of(dense, input_ids=ids)
        for _ in range(2):  # the first pass fills what the second finds in DRAM
            torch.testing.assert_close(logits_of(model, input_ids=ids), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("want", ["all", "half", "streamed"])
@pytest.mark.parametrize("gate", GATES)
def test_more_tokens_at_once_than_were_planned_for(
    gate: str, want: str, flash_folder: Path, cap_for: CapFor, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    model = load(flash_folder, cap_for(gate, want), gate=gate, context=16)
    assert plan_of(model).max_tokens == 16 < prompts.numel()
    for ids in (prompts, prompts.view(1, -1), prompts[:1], prompts):
        expected = logits_of(dense, input_ids=ids)
        torch.testing.assert_close(logits_of(model, input_ids=ids), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_certified_gate_loses_no_firing_neuron_at_any_width_or_delta(
    bits: int, shipped: Path, tmp_path: Path, dense: PreTrainedModel, prompts: torch.Tensor
) -> None:
    folder = hf_flash.repack(shipped, tmp_path / "flash", gate_bits=bits, progress=False)
    expected, fired = logits_of(dense, input_ids=prompts), set()
    for delta in (0.0, 1e-9, 1e-3):
        model = load(folder, gate="certified", delta=delta)
        torch.testing.assert_close(logits_of(model, input_ids=prompts), expected, rtol=1e-5, atol=2e-5)
        stats = hf_flash.stats(model)
        assert 0 < stats.neurons_fired <= stats.neurons_wanted <= 4 * dense.config.ffn_dim
        fired.add(stats.neurons_fired)
    assert len(fired) == 1  # the bits and delta change what is read, never what fires


# --- every way to decode

DECODERS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.8},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "no KV cache": {"use_cache": False},
    "static KV cache": {"cache_implementation": "static"},
    "dynamic KV cache": {"cache_implementation": "dynamic"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
}
ONE_ROW_ONLY = {"prompt lookup"}


def decode(model: PreTrainedModel, inputs: dict[str, torch.Tensor], options: dict[str, Any], n: int = 14) -> Any:
    torch.manual_seed(3)
    return model.generate(**inputs, **{"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, **options})


@pytest.mark.parametrize("name", DECODERS)
def test_decoding(name: str, flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    ids = prompts[:1] if name in ONE_ROW_ONLY else prompts[:2]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got, want = decode(flash, inputs, DECODERS[name]), decode(dense, inputs, DECODERS[name])
    if name == "scores":
        torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), rtol=1e-4, atol=1e-4)
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_batch_of_three_padded_on_the_left(
    options: dict[str, Any], flash: PreTrainedModel, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["The king", "It was a dark night and the wind had risen, and all the", "She looked at him for a moment"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    assert inputs["attention_mask"].min() == 0
    assert torch.equal(decode(flash, inputs, options), decode(dense, inputs, options))


@pytest.mark.parametrize("assistant", ["dense", "flash"])
def test_assisted_decoding(
    assistant: str, flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor, wanted: torch.Tensor
) -> None:
    got = greedy(flash, prompts[:1], 24, assistant_model=dense if assistant == "dense" else flash)
    assert_greedy(got, wanted[:1, : got.shape[1]], dense)


def test_flash_model_assists_the_dense_one(
    flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor, wanted: torch.Tensor
) -> None:
    got = greedy(dense, prompts[:1], 24, assistant_model=flash)
    assert_greedy(got, wanted[:1, : got.shape[1]], dense)


def test_continuing_from_a_kv_cache(flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    ids = prompts[:1]
    with torch.no_grad():
        first = flash(ids[:, :4], use_cache=True)
        second = flash(ids[:, 4:], **kv.carried(first))
    torch.testing.assert_close(second.logits, logits_of(dense, input_ids=ids)[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of what torch.compile does not know
def test_compiled_around_the_ffns(flash: PreTrainedModel, dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(flash.forward, backend="eager")
    with torch.no_grad():
        for ids in (prompts[:1], prompts[1:2], prompts[2:3]):
            got = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, logits_of(dense, input_ids=ids), rtol=1e-5, atol=2e-5)
    torch.compiler.reset()


def test_pipeline_by_folder_name(
    flash_folder: Path, shipped: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FLASH_MEMORY", "120MiB")
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    texts = ["The king", "It was a dark night and the wind had"]
    flash = pipeline("text-generation", model=str(flash_folder))
    assert hf_flash.is_flash(flash.model) and plan_of(flash.model).memory == 120 << 20
    stock = pipeline("text-generation", model=str(shipped))
    assert flash(texts, **options) == stock(texts, **options)


# --- what it read


def test_everything_is_read_once_and_then_nothing(flash_folder: Path, prompts: torch.Tensor) -> None:
    model = load(flash_folder, gate="all")
    stats, layers = hf_flash.stats(model), model._hf_flash.store.layers.values()
    flash_bytes = sum(layer.n_neurons * layer.layout.row_bytes for layer in layers)
    greedy(model, prompts[:1], 8)
    assert flash_bytes <= stats.bytes_read <= flash_bytes + 8192 * stats.n_reads
    assert stats.neurons_read == sum(layer.n_neurons for layer in layers)
    stats.reset()
    greedy(model, prompts[:2], 8)
    assert stats.bytes_read == stats.n_reads == stats.neurons_read == 0 and stats.wait_s == 0
    assert stats.neurons_hit == stats.neurons_wanted == 8 * sum(layer.n_neurons for layer in layers)


def test_certified_gate_reads_a_neuron_once_and_then_nothing(
    flash_folder: Path, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "install", lambda model: 0)  # nothing is guessed, and read in vain
    model = load(flash_folder, gate="certified")
    stats, layers = hf_flash.stats(model), model._hf_flash.store.layers.values()
    first = greedy(model, prompts[:1], 8)
    row_bytes = next(iter(layers)).layout.row_bytes
    assert 0 < stats.neurons_read < sum(layer.n_neurons for layer in layers)
    assert stats.neurons_read * row_bytes == stats.cache_bytes <= stats.bytes_read
    assert stats.neurons_hit + stats.neurons_read == stats.neurons_wanted
    stats.reset()
    assert torch.equal(greedy(model, prompts[:1], 8), first)
    assert stats.bytes_read == stats.n_reads == stats.neurons_read == 0
    assert stats.neurons_hit == stats.neurons_wanted > 0


@pytest.mark.parametrize("want", ["half", "least", "streamed"])
def test_bytes_per_token_are_those_of_the_plan(
    want: str, flash_folder: Path, cap_for: CapFor, prompts: torch.Tensor
) -> None:
    model = load(flash_folder, cap_for("all", want), gate="all")
    stats, plan = hf_flash.stats(model), plan_of(model)
    greedy(model, prompts[:1], 4)  # pins what it pins
    stats.reset()
    n = 10
    greedy(model, prompts[:1], n)
    assert stats.n_forwards == n and stats.n_tokens == prompts.shape[1] + n - 1
    slack = 8192 * stats.n_reads / n  # a read begins and ends on a page
    assert plan.bytes_per_token <= stats.bytes_read / n <= plan.bytes_per_token + slack
    assert slack < 0.1 * plan.bytes_per_token


def test_stats_count_tokens_and_time(flash: PreTrainedModel, prompts: torch.Tensor) -> None:
    stats = hf_flash.stats(flash)
    stats.reset()
    greedy(flash, prompts[:2], 5)
    found = stats.to_dict()
    assert found["n_tokens"] == 2 * (prompts.shape[1] + 4) and found["n_forwards"] == 5
    assert found["neurons_hit"] + found["neurons_read"] == found["neurons_wanted"]
    assert 0 <= found["hit_rate"] <= 1 and found["bytes_per_token"] == found["bytes_read"] / found["n_tokens"]
    assert found["compute_s"] > 0 and found["wait_s"] >= 0
    assert (found["gate_s"] > 0) == ("certified" in found["plan"]["gates"].values())
    parts = found["plan"]["parts"]
    assert 0 < found["cache_bytes"] <= parts["FFN cache"] + parts["KV cache"] + parts["activations"]  # which are lent
    with pytest.raises(hf_flash.FlashError, match="does not run from flash"):
        hf_flash.stats(torch.nn.Linear(1, 1))


def test_stats_through_a_wrapper(flash: PreTrainedModel) -> None:
    wrapper = torch.nn.Module()
    wrapper.model = flash
    assert hf_flash.stats(wrapper) is hf_flash.stats(flash)
