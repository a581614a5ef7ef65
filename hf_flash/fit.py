"""Training a predictor of one layer from a recording: rank, factors, threshold, and what it is worth.

The tokens of a recording are divided in the order of the text: the first 80 % train, the next 10 % choose rank and
threshold, the last 10 % only measure. Ranks are tried from small to large. Each is trained from scratch with a loss in
which what fired and what did not weigh the same ("LLM in a flash", §3.1: few neurons fire, and an unbalanced loss would
call all of them silent); then the threshold is set where the stated share of what fired is above it; the first rank is
taken whose precision there will do. No rank is tried whose predictor would be larger than an 8-bit sketch: that one
names the neurons without a loss.

Everything is drawn from one seed, so that the same recording gives the same predictor, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hf_flash.errors import FlashConfigError, FlashError
from hf_flash.gates import Predictor
from hf_flash.gates.predicted import predictor_bytes
from hf_flash.recording import Recording

MIN_TOKENS = 2048  # fewer hold out too few to set a threshold on
RANKS = (16, 32, 64, 128, 256, 512, 1024)
_TRAIN, _CHOOSE = 0.8, 0.9  # where the parts of a recording end
_BATCH, _STEP, _SLICE = 128, 0.3, 1024  # tokens a step, step size at the start, tokens scored at a time
_BINS, _RANGE = 1 << 15, 64.0  # of the histogram of scores


@dataclasses.dataclass(frozen=True)
class Target:
    """What a predictor has to do.

    Attributes:
        recall: share of the neurons that fire which must be wanted.
        precision: share of the neurons that are wanted which must fire, if any rank can do that.
        epochs: passes over the training tokens for each rank.
        seed: of weights and batches.
    """

    recall: float = 0.99
    precision: float = 0.5
    epochs: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.recall < 1:
            raise FlashConfigError(f"recall={self.recall!r} is a share of neurons: 0 < recall < 1, such as 0.99.")
        if not 0 < self.precision < 1:
            raise FlashConfigError(f"precision={self.precision!r} is a share: 0 < precision < 1, such as 0.5.")
        if type(self.epochs) is not int or self.epochs < 1:
            raise FlashConfigError(f"epochs={self.epochs!r} must be a whole number, 1 or more.")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained predictor, and what it did on tokens that neither trained it nor set its threshold.

    Attributes:
        recall: share of what fired that was wanted. precision: share of what was wanted that fired.
        wanted, fired: neurons per token, of `n_neurons`.
    """

    predictor: Predictor
    recall: float
    precision: float
    wanted: float
    fired: float
    n_neurons: int

    def to_dict(self) -> dict[str, Any]:
        """Figures, ready for JSON."""
        figures = {k: getattr(self, k) for k in ("recall", "precision", "wanted", "fired")}
        rounded = {name: round(value, 5) for name, value in figures.items()}
        p = self.predictor
        return {
            "rank": p.rank, **rounded, "n_neurons": self.n_neurons, "threshold": p.threshold, "n_bytes": p.n_bytes,
        }  # fmt: skip


def ranks_for(n_neurons: int, d_model: int) -> list[int]:
    """The ranks that are tried, ascending: up to the bytes of an 8-bit sketch of the same matrix."""
    limit = n_neurons * d_model
    few = [rank for rank in RANKS if predictor_bytes(n_neurons, d_model, rank) <= limit]
    return few or [max(1, min(RANKS[0], d_model // 2))]


def fit(
    recording: Recording, seen: str, guessed: str, target: Target, done: Callable[[float], None] = lambda share: None
) -> Fitted:
    """Train the predictor of one layer.

    Args:
        recording: of a text.
        seen: the layer whose input the predictor is given.
        guessed: the layer whose neurons it names; the same one, or a later one (lookahead).
        target: what it has to do.
        done: called with the share of the work that is done since the last call; the shares sum to 1.

    Returns:
        The predictor and its figures on held-out tokens.

    Raises:
        FlashError: the recording is too short.
    """
    n = recording.n_tokens
    if n < MIN_TOKENS:
        raise FlashError(
            f"{n} tokens are too few to train predictors on: {MIN_TOKENS} or more are needed. Give more text."
        )
    parts = _Parts(recording, seen, guessed, int(n * _TRAIN), int(n * _CHOOSE))
    n_neurons = recording.shape(guessed)[1]
    ranks = ranks_for(n_neurons, recording.shape(seen)[0])
    costs = [rank + 32 for rank in ranks]  # what a step costs besides the products is that of some ranks more
    left = 1.0
    for rank, cost in zip(ranks, costs, strict=True):
        share = cost / sum(costs)
        trained = _train(parts, rank, target, functools.partial(_part_of, done, share))
        left -= share
        threshold = parts.threshold(trained, target.recall)
        predictor = dataclasses.replace(trained, threshold=threshold)
        if parts.measure(predictor, *parts.choosing).precision >= target.precision:
            break
    done(left)
    return parts.measure(predictor, *parts.measuring)


def _part_of(done: Callable[[float], None], whole: float, share: float) -> None:
    done(whole * share)


class _Parts:
    """A recording as one layer's training sees it: inputs, labels, and who may look at which tokens."""

    def __init__(self, recording: Recording, seen: str, guessed: str, train: int, choose: int) -> None:
        self._recording, self._guessed = recording, guessed
        self.inputs, self.n_neurons = recording.inputs(seen), recording.shape(guessed)[1]
        self.bits = recording.bits(guessed)
        self.n_train = train
        self.choosing, self.measuring = (train, choose), (choose, recording.n_tokens)

    def batch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [n, d_model] float32 and what fired [n, d_ffn] bool of some tokens, ascending."""
        return self.inputs[tokens].float(), self._recording.unpack(self._guessed, self.bits[tokens.numpy()])

    def slices(self, start: int, stop: int) -> Any:
        """The same, slice by slice."""
        for i in range(start, stop, _SLICE):
            j = min(i + _SLICE, stop)
            yield self.inputs[i:j], self._recording.fired(self._guessed, i, j)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the training inputs, [d_model] float64 each."""
        total = torch.zeros(2, self.inputs.shape[1], dtype=torch.float64)
        for i in range(0, self.n_train, _SLICE):
            x = self.inputs[i : min(i + _SLICE, self.n_train)].double()
            total += torch.stack([x.sum(0), x.square().sum(0)])
        mean, square = total / self.n_train
        return mean, (square - mean.square()).clamp_min(1e-12).sqrt()

    def threshold(self, predictor: Predictor, recall: float) -> float:
        """The highest score above which `recall` of what fired lies; exact to the histogram's step, downwards."""
        counts = torch.zeros(_BINS, dtype=torch.float64)
        for x, fired in self.slices(*self.choosing):
            scores = predictor.scores(x)[fired].nan_to_num(_RANGE).clamp(-_RANGE, _RANGE)
            counts += torch.histc(scores, _BINS, -_RANGE, _RANGE).double()
        if not counts.sum():
            return _RANGE  # none fires: none is wanted
        above = counts.flip(0).cumsum(0)
        n_bins = int((above >= recall * above[-1]).nonzero()[0]) + 1
        return _RANGE - 2 * _RANGE / _BINS * (n_bins + 0.5)

    def measure(self, predictor: Predictor, start: int, stop: int) -> Fitted:
        """What a predictor does on tokens start..stop."""
        n_wanted = n_fired = n_both = 0
        for x, fired in self.slices(start, stop):
            wanted = predictor.wanted(x)
            n_wanted, n_fired = n_wanted + int(wanted.sum()), n_fired + int(fired.sum())
            n_both += int((wanted & fired).sum())
        n = stop - start
        recall, precision = n_both / n_fired if n_fired else 1.0, n_both / n_wanted if n_wanted else 1.0
        return Fitted(predictor, recall, precision, n_wanted / n, n_fired / n, self.n_neurons)


def _train(parts: _Parts, rank: int, target: Target, done: Callable[[float], None]) -> Predictor:
    """AdamW on the balanced loss, on inputs of mean 0 and deviation 1; the step falls to nothing along a cosine."""
    mean, deviation = parts.moments()
    d, n_neurons = len(mean), parts.n_neurons
    generator = torch.Generator().manual_seed(target.seed)
    inner = torch.randn(rank, d, generator=generator).div_(math.sqrt(d)).requires_grad_()
    outer = torch.zeros(n_neurons, rank, requires_grad=True)
    bias = torch.zeros(n_neurons, requires_grad=True)
    steps = [0.8 * _STEP / math.sqrt(d), 0.3 * _STEP / math.sqrt(rank), _STEP]
    groups = [{"params": [p], "lr": step} for p, step in zip((inner, outer, bias), steps, strict=True)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    shift, scale = mean.float(), deviation.reciprocal().float()
    per_epoch = -(-parts.n_train // _BATCH)
    total = target.epochs * per_epoch
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: 0.5 * (1 + math.cos(math.pi * min(1.0, i / total))))
    for _ in range(target.epochs):
        order = torch.randperm(parts.n_train, generator=generator)
        for tokens in order.split(_BATCH):
            x, fired = parts.batch(tokens.sort().values)
            loss = _balanced_loss(F.linear(F.linear((x - shift) * scale, inner), outer, bias), fired)
            adam.zero_grad()
            loss.backward()
            adam.step()
            fall.step()
        done(1 / target.epochs)
    with torch.no_grad():
        folded = (inner.double() * scale.double()).to(torch.bfloat16)
        rounded = outer.to(torch.bfloat16)
        offset = bias.double() - rounded.double() @ (folded.double() @ mean)
    return Predictor(folded, rounded, offset.float(), 0.0)


def _balanced_loss(scores: torch.Tensor, fired: torch.Tensor) -> torch.Tensor:
    """Cross entropy in which what fired and what did not weigh a half each."""
    n_fired = fired.sum().clamp(1, fired.numel() - 1)
    weight = torch.where(fired, 0.5 / n_fired, 0.5 / (fired.numel() - n_fired))
    return (F.softplus(torch.where(fired, -scores, scores)) * weight).sum()
