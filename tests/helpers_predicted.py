"""Flash checkpoints with predictors that were drawn and not trained: what they answer is known."""

import itertools
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

import hf_flash
from hf_flash import gate_file
from hf_flash.families import find_blocks
from hf_flash.gates import Predictor
from hf_flash.store import GATES_NAME, flash_file_names


def draw(n_neurons: int, d_model: int, rank: int, seed: int, threshold: float = 0.0) -> Predictor:
    """A random predictor; about half of its scores are above 0."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(rank, d_model, generator=generator), torch.randn(n_neurons, rank, generator=generator)
    bias = torch.randn(n_neurons, generator=generator)
    return Predictor(inner.bfloat16(), outer.bfloat16(), bias, threshold)


def add_predictors(
    folder: Path, own: dict[str, Predictor], lookahead: dict[str, tuple[str, Predictor]] | None = None
) -> None:
    """Put predictors into a flash checkpoint."""
    tensors = {f"{path}.predictor.{k}": t for path, p in own.items() for k, t in p.tensors().items()}
    said = {path: {"rank": p.rank, "d_model": p.inner.shape[1], "threshold": p.threshold} for path, p in own.items()}
    words = {gate_file.PREDICTORS_KEY: said}
    if lookahead:
        tensors |= {f"{path}.lookahead.{k}": t for path, (_, p) in lookahead.items() for k, t in p.tensors().items()}
        words[gate_file.LOOKAHEAD_KEY] = {
            path: {"from": seen, "rank": p.rank, "d_model": p.inner.shape[1], "threshold": p.threshold}
            for path, (seen, p) in lookahead.items()
        }
    gate_file.rewrite(folder / GATES_NAME, tensors, words, folder / flash_file_names(folder)[0])


def drawn_checkpoint(model: PreTrainedModel, folder: Path) -> tuple[Path, dict[str, Predictor]]:
    """A model's flash checkpoint with drawn predictors, and lookahead predictors from each layer to the next."""
    model.save_pretrained(folder / "stock")
    hf_flash.repack(folder / "stock", folder / "flash", progress=False)
    blocks = find_blocks(model)
    own = {b.path: draw(b.d_ffn, b.d_model, 5, b.index) for b in blocks}
    ahead = {
        b.path: (a.path, draw(b.d_ffn, a.d_model, 4, 50 + b.index))
        for a, b in itertools.pairwise(blocks)
    }  # fmt: skip
    add_predictors(folder / "flash", own, ahead)
    return folder / "flash", own


def mask_activations(model: PreTrainedModel, predictors: dict[str, Predictor], union: bool) -> list[object]:
    """Make a dense model compute what the gate `predicted` leaves over: the reference.

    Args:
        union: a neuron that one token of a pass wants is computed for all of them, as the engine does.
    """
    handles = []
    for block in find_blocks(model):
        wanted: dict[str, torch.Tensor] = {}
        predictor = predictors[block.path]

        def see(module: nn.Module, args: tuple[torch.Tensor, ...], predictor=predictor, wanted=wanted) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            mask = ~(reference_scores(predictor, flat) <= predictor.threshold)
            wanted["mask"] = mask.any(0).expand_as(mask) if union else mask

        def hide(module: nn.Module, args: tuple[torch.Tensor, ...], wanted=wanted) -> tuple[torch.Tensor, ...]:
            return (args[0] * wanted["mask"].view(args[0].shape), *args[1:])

        up = model.get_submodule(block.up.key.removesuffix(".weight"))
        down = model.get_submodule(block.down.key.removesuffix(".weight"))
        handles += [up.register_forward_pre_hook(see), down.register_forward_pre_hook(hide)]
    return handles


def reference_scores(predictor: Predictor, x: torch.Tensor) -> torch.Tensor:
    """The formula, in the steps in which it is rounded: [n_tokens, d_ffn] float32."""
    between = (x.bfloat16().float() @ predictor.inner.float().t()).bfloat16().float()
    return (between @ predictor.outer.float().t()).bfloat16().float() + predictor.bias
