"""The gate `predicted` computes what its predictors name and nothing else; a lookahead changes no token at all."""

import itertools
from pathlib import Path

import pytest
import torch
from helpers_e2e import greedy, load_any, logits_of, plan_of
from helpers_predicted import add_predictors, draw, drawn_checkpoint, mask_activations, reference_scores
from test_early import Always
from tiny_models import TINY, VOCAB, model_inputs
from transformers import PreTrainedModel

import hf_flash
from hf_flash import lookahead
from hf_flash.errors import CheckpointError, FlashConfigError, FlashError, ReadError
from hf_flash.ffn import FlashFFN
from hf_flash.gate_file import GateFile
from hf_flash.gates import PredictedGate
from hf_flash.gates.predicted import predictor_bytes
from hf_flash.readers import Ticket
from hf_flash.sparse import SparseEngine
from hf_flash.store import GATES_NAME
from hf_flash.tap import tap


def engines_of(model: PreTrainedModel) -> list[SparseEngine]:
    return [module.engine for module in model.modules() if isinstance(module, FlashFFN)]


def shrink(model: PreTrainedModel, share: float) -> None:
    """Slots for a share of the neurons."""
    next(m for m in model.modules() if isinstance(m, FlashFFN)).on_pass = ()  # nobody gives the slots back
    for engine in engines_of(model):
        engine.cache.begin(int(engine.layer.n_neurons * share))


# --- scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(80, 32, 5), (1536, 256, 64), (7, 300, 1)])
def test_scores_are_the_formulas(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    predictor = draw(*shape, seed=3)
    x = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    got, want = predictor.scores(x), reference_scores(predictor, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0.02 * float(want.abs().max()))  # a bfloat16 step or two


def test_decide_unites_the_tokens_and_tells_the_last_one() -> None:
    predictor = draw(200, 24, 6, seed=1, threshold=9.0)
    x = torch.randn(150, 24, generator=torch.Generator().manual_seed(2))
    wanted = torch.cat([predictor.wanted(row[None]) for row in x])
    neurons, ago = PredictedGate(predictor).decide(x)
    assert torch.equal(torch.from_numpy(neurons), wanted.any(0).nonzero()[:, 0])
    assert torch.equal(ago == 0, wanted[-1])
    assert 0 < len(neurons) < 200
    assert len(PredictedGate(predictor).decide(x[:0])[0]) == 0


def test_an_input_that_is_no_number_wants_everything() -> None:
    predictor = draw(40, 8, 2, seed=1, threshold=1e9)
    assert not predictor.wanted(torch.ones(1, 8)).any()
    assert predictor.wanted(torch.full((1, 8), torch.nan)).all()


def test_bytes_are_those_of_the_tensors() -> None:
    predictor = draw(200, 24, 6, seed=1)
    assert predictor.n_bytes == sum(t.nbytes for t in predictor.tensors().values())


# --- the engine against the dense model whose other neurons are silenced


@pytest.mark.parametrize("share", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("name", ["opt", "llama-relu", "t5"])
def test_one_token_at_a_time_computes_what_is_predicted(name: str, share: float, tmp_path: Path) -> None:
    dense = TINY[name]()
    folder, predictors = drawn_checkpoint(dense, tmp_path)
    model = load_any(folder, dense, gate="predicted")
    assert set(plan_of(model).gates.values()) == {"predicted"}
    shrink(model, share)
    plain = logits_of(dense, **model_inputs(dense, 1, 1))
    mask_activations(dense, predictors, union=False)
    for i in range(6):
        inputs = {k: (v + i) % VOCAB for k, v in model_inputs(dense, 1, 1).items()}
        want = logits_of(dense, **inputs)
        torch.testing.assert_close(logits_of(model, **inputs), want, rtol=1e-4, atol=1e-4)
        if i == 0:
            assert not torch.allclose(plain, want, atol=1e-3), "the predictors silence nothing: nothing was tested"
    stats = hf_flash.stats(model)
    assert stats.neurons_hit + stats.neurons_read == stats.neurons_wanted
    assert 0.1 < stats.neurons_wanted / sum(e.layer.n_neurons * 6 for e in engines_of(model)) < 0.9


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 30), (3, 4), (4, 1), (2, 90)])
def test_many_tokens_compute_what_any_of_them_wants(shape: tuple[int, int], share: float, tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, predictors = drawn_checkpoint(dense, tmp_path)
    model = load_any(folder, dense, gate="predicted")
    shrink(model, share)
    mask_activations(dense, predictors, union=True)
    inputs = model_inputs(dense, *shape)
    for _ in range(2):
        torch.testing.assert_close(logits_of(model, **inputs), logits_of(dense, **inputs), rtol=1e-4, atol=1e-4)


def test_a_gradient_comes_back_through_what_was_computed(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, predictors = drawn_checkpoint(dense, tmp_path)
    model = load_any(folder, dense, gate="predicted")
    mask_activations(dense, predictors, union=True)
    grads = []
    for m in (dense, model):
        embeddings = m.get_input_embeddings()(model_inputs(dense)["input_ids"]).detach().requires_grad_()
        m(inputs_embeds=embeddings).logits.square().mean().backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-6)


# --- plan and errors


def test_the_plan_counts_predictors(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, predictors = drawn_checkpoint(dense, tmp_path)
    own = sum(p.n_bytes for p in predictors.values())
    plan = hf_flash.plan(folder, memory="1GiB", gate="predicted")
    assert plan.parts["gates"] == own
    assert plan.gate_bits == 0
    assert plan.slots == dict.fromkeys(predictors, 80)
    early = plan_of(load_any(folder, dense, gate="predicted", lookahead=True)).parts["gates"] - own
    assert early == predictor_bytes(80, 32, 4) * (len(predictors) - 1)
    certified = plan_of(load_any(folder, dense, gate="certified")).parts["gates"]
    assert plan_of(load_any(folder, dense, gate="certified", lookahead=True)).parts["gates"] == certified + early
    smallest = hf_flash.smallest_cap(folder, gate="predicted")
    assert smallest <= hf_flash.smallest_cap(folder, gate="certified")


def test_predictors_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    dense.save_pretrained(tmp_path / "stock")
    folder = hf_flash.repack(tmp_path / "stock", tmp_path / "flash", progress=False)
    with pytest.raises(FlashConfigError, match="hf-flash calibrate FOLDER --text FILE"):
        load_any(folder, dense, gate="predicted")
    with pytest.raises(FlashConfigError, match="--lookahead"):
        load_any(folder, dense, gate="certified", lookahead=True)
    with pytest.raises(FlashConfigError, match="hf-flash calibrate"):
        load_any(tmp_path / "stock", dense, gate="predicted")
    drawn, _ = drawn_checkpoint(dense, tmp_path / "drawn")
    with pytest.raises(FlashConfigError, match="gate='predicted' or 'certified'"):
        load_any(drawn, dense, gate="all", lookahead=True)
    with pytest.raises(FlashConfigError, match="lookahead='yes' must be True or False"):
        hf_flash.FlashConfig(lookahead="yes")


def test_what_a_lossy_gate_leaves_out_cannot_be_watched(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    model = load_any(drawn_checkpoint(dense, tmp_path)[0], dense, gate="predicted")
    with pytest.raises(FlashError, match="gate='all'"), tap(model, None):
        pass


def test_a_damaged_predictor_is_an_error(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, _ = drawn_checkpoint(dense, tmp_path)
    path = folder / GATES_NAME
    raw = bytearray(path.read_bytes())
    at = GateFile(path)._file.entries["model.decoder.layers.1.fc1.predictor.outer"].start
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="predictor\\.outer"):
        load_any(folder, dense, gate="predicted")


def test_rewriting_keeps_what_others_wrote(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    dense.save_pretrained(tmp_path / "stock")
    folder = hf_flash.repack(tmp_path / "stock", tmp_path / "flash", progress=False)
    before, want = GateFile(folder / GATES_NAME), logits_of(load_any(folder, dense), **model_inputs(dense))
    block = "model.decoder.layers.0.fc1"
    for seed in (1, 2):
        add_predictors(folder, {block: draw(80, 32, 3, seed)})
        after = GateFile(folder / GATES_NAME)
        assert after.sketches == before.sketches
        for name in before.sketches:
            for a, b in zip(
                before.sketch(name, 8).tensors().values(), after.sketch(name, 8).tensors().values(), strict=False
            ):
                assert torch.equal(a, b)
        assert torch.equal(after.predictor(block).outer, draw(80, 32, 3, seed).outer)
    assert hf_flash.verify(folder, progress=False).ok
    assert torch.equal(logits_of(load_any(folder, dense), **model_inputs(dense)), want)


def test_a_saved_copy_keeps_its_predictors(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, _ = drawn_checkpoint(dense, tmp_path)
    model = load_any(folder, dense, gate="predicted")
    model.save_pretrained(tmp_path / "copy")
    copy = load_any(tmp_path / "copy", dense, gate="predicted")
    inputs = model_inputs(dense)
    assert torch.equal(logits_of(copy, **inputs), logits_of(model, **inputs))


# --- lookahead


@pytest.mark.parametrize("gate", ["predicted", "certified"])
def test_lookahead_changes_no_token(gate: str, tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, predictors = drawn_checkpoint(dense, tmp_path)
    ids = torch.arange(5, 12)[None]
    plain = load_any(folder, dense, gate=gate)
    shrink(plain, 0.8)
    want = greedy(plain, ids, 24)
    model = load_any(folder, dense, gate=gate)
    shrink(model, 0.8)
    trial = Always()
    blocks = list(predictors)
    gates = GateFile(folder / GATES_NAME)
    pairs = [(a, b, gates.predictor(b, lookahead=True)) for a, b in itertools.pairwise(blocks)]
    lookahead.install(model, pairs, trial)
    assert torch.equal(greedy(model, ids, 24), want)
    stats = hf_flash.stats(model)
    assert trial.n >= 22
    assert 0 < stats.neurons_early <= stats.neurons_read
    assert stats.neurons_hit + stats.neurons_read == stats.neurons_wanted
    assert all(engine._ahead is None for engine in engines_of(model))
    n_slots = [engine.cache.n_slots for engine in engines_of(model)]
    assert all(engine.cache.n_used <= n for engine, n in zip(engines_of(model), n_slots, strict=True))


def test_lookahead_is_tried_when_it_is_asked_for(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, _ = drawn_checkpoint(dense, tmp_path)
    model = load_any(folder, dense, gate="predicted", lookahead=True, window=1)  # room for guesses
    want = greedy(load_any(folder, dense, gate="predicted"), torch.arange(5, 9)[None], 60)
    shrink(model, 0.8)
    assert torch.equal(greedy(model, torch.arange(5, 9)[None], 60), want)
    assert hf_flash.stats(model).neurons_early > 0  # of the tokens for which it was tried


def test_a_failed_read_ahead_is_raised_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = TINY["opt"]()
    folder, _predictors = drawn_checkpoint(dense, tmp_path)
    monkeypatch.setenv("HF_FLASH_READER", "threads")
    model = load_any(folder, dense, gate="predicted")
    inputs = model_inputs(dense, 1, 1)
    want = logits_of(model, **inputs)
    engine = engines_of(model)[1]
    engine.cache.reset()
    wait = Ticket.wait

    def fails(self: Ticket) -> None:
        wait(self)
        raise ReadError(5, "injected")

    engine.prefetch(torch.arange(60).numpy(), 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._ahead), "wait", fails)
        with pytest.raises(ReadError, match="injected"):
            logits_of(model, **inputs)
    assert engine.cache.n_used == 0
    assert torch.equal(logits_of(model, **inputs), want)


def test_guesses_never_take_the_slots_of_recent_tokens(tmp_path: Path) -> None:
    dense = TINY["opt"]()
    folder, _ = drawn_checkpoint(dense, tmp_path)
    model = load_any(folder, dense, gate="predicted", window=5)
    engine = engines_of(model)[0]
    shrink(model, 0.9)
    cache = engine.cache
    logits_of(model, **model_inputs(dense, 1, 1))
    used = [int(n) for n in cache.slots.neuron_of if n >= 0]
    assert 0 < len(used) < 72
    engine.prefetch(torch.tensor([n for n in range(80) if n not in used]).numpy(), 1)
    engine._land()
    assert all(cache._slot_of[n] >= 0 for n in used)
    assert cache.n_used == 72
