"""Predictors learn what a recording shows, keep the recall they are asked for, and come out the same each time."""

from pathlib import Path

import pytest
import torch
from tiny_models import TINY, VOCAB

from hf_flash import fit as fitting
from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.fit import Fitted, Target, fit, ranks_for
from hf_flash.gates.predicted import predictor_bytes
from hf_flash.recording import Recording, record

LAYERS = ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"]


def sparse_opt() -> torch.nn.Module:
    """Two layers in which about one neuron in six fires, and which one is a matter of a few directions."""
    model = TINY["opt"]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            low = torch.randn(80, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
            layer.fc1.weight.copy_(low + 0.02 * torch.randn(80, 32, generator=generator))
            layer.fc1.bias.fill_(-8.0)
    return model


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    ids = torch.randint(3, VOCAB, (40, 128), generator=torch.Generator().manual_seed(1))
    return record(sparse_opt(), list(ids.split(8)), tmp_path_factory.mktemp("rec"), progress=False)


@pytest.fixture(scope="module")
def fitted(recording: Recording) -> Fitted:
    return fit(recording, LAYERS[0], LAYERS[0], Target())


def held_out(recording: Recording, seen: str, guessed: str) -> tuple[torch.Tensor, torch.Tensor]:
    start = int(recording.n_tokens * 0.9)
    return recording.inputs(seen)[start:], recording.fired(guessed, start)


def test_figures_are_those_of_the_tokens_held_out(recording: Recording, fitted: Fitted) -> None:
    x, fired = held_out(recording, LAYERS[0], LAYERS[0])
    wanted = fitted.predictor.wanted(x)
    both = float((wanted & fired).sum())
    assert fitted.recall == pytest.approx(both / float(fired.sum()))
    assert fitted.precision == pytest.approx(both / float(wanted.sum()))
    assert fitted.wanted == pytest.approx(float(wanted.sum(1).float().mean()))
    assert fitted.fired == pytest.approx(float(fired.sum(1).float().mean()))
    assert 0.05 < fitted.fired / 80 < 0.4


def test_what_is_of_low_rank_is_found(fitted: Fitted) -> None:
    assert fitted.recall > 0.97
    assert fitted.precision > 0.7
    assert fitted.predictor.rank == 16
    assert fitted.to_dict()["rank"] == 16
    assert fitted.to_dict()["n_bytes"] == predictor_bytes(80, 32, 16)


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.995])
def test_the_threshold_gives_the_recall_that_was_asked_for(recall: float, recording: Recording) -> None:
    n = recording.n_tokens
    got = fit(recording, LAYERS[0], LAYERS[0], Target(recall=recall, epochs=1))
    chosen = slice(int(n * 0.8), int(n * 0.9))
    fired = recording.fired(LAYERS[0], chosen.start, chosen.stop)
    wanted = got.predictor.wanted(recording.inputs(LAYERS[0])[chosen])
    share = float((wanted & fired).sum()) / float(fired.sum())
    assert recall <= share < recall + 0.01


def test_the_same_recording_gives_the_same_bits(recording: Recording, fitted: Fitted) -> None:
    again = fit(recording, LAYERS[0], LAYERS[0], Target())
    for name, tensor in fitted.predictor.tensors().items():
        assert torch.equal(tensor, again.predictor.tensors()[name]), name
    assert again.to_dict() == fitted.to_dict()
    other = fit(recording, LAYERS[0], LAYERS[0], Target(seed=1))
    assert not torch.equal(other.predictor.inner, fitted.predictor.inner)


def test_a_layer_is_predicted_from_the_one_before(recording: Recording) -> None:
    early = fit(recording, LAYERS[0], LAYERS[1], Target(recall=0.9, precision=0.3))
    x, fired = held_out(recording, LAYERS[0], LAYERS[1])
    assert early.recall == pytest.approx(float((early.predictor.wanted(x) & fired).sum()) / float(fired.sum()))
    assert early.precision > 2 * float(fired.float().mean()), "no better than wanting neurons by lot"


def test_ranks_are_tried_until_one_is_precise_enough(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "ranks_for", lambda n, d: [1, 2, 8])
    shares: list[float] = []
    low = fit(recording, LAYERS[0], LAYERS[0], Target(precision=0.05), shares.append)
    assert low.predictor.rank == 1
    assert sum(shares) == pytest.approx(1)
    high = fit(recording, LAYERS[0], LAYERS[0], Target(precision=0.9999), shares.append)
    assert high.predictor.rank == 8  # none will do: the last one
    assert sum(shares) == pytest.approx(2)
    assert high.precision > low.precision


def test_no_rank_outgrows_an_8_bit_sketch() -> None:
    assert ranks_for(16384, 4096) == [16, 32, 64, 128, 256, 512, 1024]  # OPT-6.7B; the paper takes 128 and 1024
    assert ranks_for(1536, 256) == [16, 32, 64]
    assert ranks_for(80, 32) == [16]
    assert ranks_for(6, 2) == [1]


def test_the_loss_weighs_both_sides_the_same() -> None:
    fired = torch.zeros(4, 50, dtype=torch.bool)
    fired[0, 0] = fired[3, 7] = True
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    cross = torch.nn.functional.binary_cross_entropy_with_logits(scores, fired.float(), reduction="none")
    want = (cross[fired].mean() + cross[~fired].mean()) / 2
    torch.testing.assert_close(fitting._balanced_loss(scores, fired), want)
    assert torch.isfinite(fitting._balanced_loss(scores, torch.zeros_like(fired)))
    assert torch.isfinite(fitting._balanced_loss(scores, torch.ones_like(fired)))


def test_too_few_tokens_are_refused_and_a_silent_layer_wants_nothing(tmp_path: Path) -> None:
    model = sparse_opt()
    ids = torch.randint(3, VOCAB, (40, 64), generator=torch.Generator().manual_seed(1))
    few = record(model, [ids[:8]], tmp_path / "few", progress=False)
    with pytest.raises(FlashError, match="512 tokens are too few"):
        fit(few, LAYERS[0], LAYERS[0], Target())
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias.fill_(-1e6)
    silent = record(model, [ids], tmp_path / "silent", progress=False)
    got = fit(silent, LAYERS[1], LAYERS[1], Target(epochs=1))
    assert (got.recall, got.precision, got.wanted, got.fired) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    "options", [{"recall": 0}, {"recall": 1.0}, {"precision": 1.5}, {"epochs": 0}, {"epochs": 2.5}]
)
def test_targets_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(FlashConfigError, match=next(iter(options))):
        Target(**options)
