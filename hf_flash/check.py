"""Proof by experiment that a block computes our formula, before any of its weights is read.

hf_flash replaces a block by `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`. The table in families.py
knows blocks by the names of their matrices, and names lie: BitNet normalises before `down`, Falcon-H1
multiplies, DeepSeek-V4 clamps, all under Llama's names. So each distinct block is copied in small, with
random weights and 48 neurons, and both the copy's own forward and our formula run on the same random input. A
block that differs is refused by name.

The model may be on the meta device and huge; nothing of its size is allocated. For an inline block the whole
decoder layer is copied, and whatever else holds matrices in it, attention above all, is replaced by a stub
that hands its input through and keeps it: what reaches the stubs must not change either.
"""

import copy
import inspect
from collections import OrderedDict

import torch
from torch import nn

from hf_flash.errors import BlockMismatchError, UnknownArchitectureError
from hf_flash.families import DOCS, Dense, FFNBlock, Part, get_activation, install, match_block, other_leaves
from hf_flash.ops import dense_ffn

_N_NEURONS = 48
_SEED = 20
# Pre-activations spread over three decades, so that a clamp at 7 or a cut-off near 0 shows in some neurons.
_SCALES = (0.3, 3.0, 30.0)
_TOLERANCE = 1e-5  # of the largest output; float32 rounds at 6e-8
# Attributes of a block that may hold its number of neurons, and those that do not change what it computes.
_SIZE_NAMES = ("inter", "ffn", "proj_dim")
_POSITIONS = {"layer_idx", "layer_id", "layer_index", "layer_num", "training"}


def check_blocks(model: nn.Module, blocks: list[FFNBlock]) -> int:
    """Check each distinct block once: same class, spelling, activation, flags and settings count as one.

    Args:
        model: the model in which find_blocks found `blocks`, untouched; meta tensors will do.
        blocks: what is to be replaced.

    Returns:
        The number of distinct blocks that were run.

    Raises:
        BlockMismatchError: a block computes something else.
    """
    seen = set()
    for block in blocks:
        key = _signature(model, block)
        if key not in seen:
            check_block(model, block)
            seen.add(key)
    return len(seen)


def check_block(model: nn.Module, block: FFNBlock) -> None:
    """Run a small random copy of the block and our formula on the same input; both must agree in float32.

    Raises:
        BlockMismatchError: they differ, the block holds parts that a swap would lose, or its copy could not
            be run; names the class, the largest error and the docs page.
    """
    owner = model.get_submodule(block.owner)
    try:
        activation = get_activation(model, block)
    except UnknownArchitectureError as error:
        raise BlockMismatchError(str(error)) from error
    if block.inline and isinstance(activation, nn.Module) and activation.state_dict():
        raise _refusal(block, f"{type(activation).__name__} holds weights, which an inline swap would lose")
    if not block.inline and (lost := other_leaves(owner, block, block.owner)):
        raise _refusal(block, f"it holds more than its matrices and activation: {', '.join(lost[:8])}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would touch the accelerator's too
        small = _small_copy(owner, block)
        small_block = match_block(small, "layer")
        assert small_block is not None and small_block.family == block.family
        model_copy = nn.ModuleDict({"layer": small})
        reference = _Reference(model_copy, small_block)
        x, residual = _draw(2, 2, 5, block.d_model)
        try:
            expected = _run(small, block, x, residual)
            if block.inline:
                install(model_copy, small_block, reference)
                got = _run(small, block, x, residual)
            else:
                got = [reference(x) + residual if block.takes_residual else reference(x)]
        except BlockMismatchError:
            raise
        except Exception as error:
            raise _refusal(block, f"its forward could not be run on a small copy ({error!r})") from error
    _compare(block, got, expected)


class _Reference(nn.Module):
    """Our formula over a block's matrices, as a module that `install` accepts."""

    def __init__(self, model: nn.Module, block: FFNBlock) -> None:
        super().__init__()
        self.act = get_activation(model, block)
        self.gate, self.gate_bias = _tensors(model, block.gate)
        self.up, self.up_bias = _tensors(model, block.up)
        self.down, self.down_bias = _tensors(model, block.down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.up is not None and self.down is not None
        biases = {"up_bias": self.up_bias, "gate_bias": self.gate_bias, "down_bias": self.down_bias}
        return dense_ffn(x, self.up, self.down, self.act, self.gate, **biases)


def _tensors(model: nn.Module, part: Part | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if part is None:
        return None, None
    bias = model.get_parameter(part.bias) if part.bias else None
    return part.weight_of(model.get_parameter(part.key)), part.bias_of(bias)


def _run(owner: nn.Module, block: FFNBlock, x: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
    """The owner's own forward on x [2, 5, d_model]: its output, then what its stubs were given.

    A block gets x (and the residual) alone; a layer gets None for masks, caches and the like.
    """
    wanted = _required(owner)[1:]
    if not block.inline:
        if unknown := [name for name in wanted if not (block.takes_residual and name == "residual")]:
            raise _refusal(block, f"its forward wants more than hidden states: {', '.join(unknown)}")
        return [_first_tensor(owner(x, residual) if block.takes_residual else owner(x), block)]
    arguments: dict[str, object] = {n: x if n.endswith("hidden_states") else None for n in wanted}
    if "use_cache" in inspect.signature(owner.forward).parameters:
        arguments["use_cache"] = False
    stubs = [module for module in owner.modules() if isinstance(module, _Stub)]
    error: Exception | None = None
    for n_outputs in (2, 3, 1, 0):  # attention modules return (hidden, weights), more, or the bare tensor
        for stub in stubs:
            stub.n_outputs, stub.given = n_outputs, []
        try:
            return [_first_tensor(owner(x, **arguments), block), *[t for stub in stubs for t in stub.given]]
        except (ValueError, TypeError, IndexError, AttributeError) as e:
            error = error or e
    assert error is not None
    raise error


def _required(module: nn.Module) -> list[str]:
    """Names of the forward's positional arguments without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def _first_tensor(out: object, block: FFNBlock) -> torch.Tensor:
    if block.inline and isinstance(out, tuple):
        out = out[0]
    if not isinstance(out, torch.Tensor):
        raise _refusal(block, f"its forward returns {type(out).__name__}, expected a tensor")
    return out


def _compare(block: FFNBlock, got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    shapes, wanted = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
    if shapes != wanted:
        raise _refusal(block, f"it makes tensors of shapes {wanted}, the formula {shapes}")
    for ours, stock in zip(got, expected, strict=True):
        error, largest = (ours - stock).abs().max().item(), stock.abs().max().item()
        if not error <= _TOLERANCE * largest:  # NaN fails too
            raise _refusal(block, f"largest error {error:.3g} where outputs reach {largest:.3g}")


def _refusal(block: FFNBlock, why: str) -> BlockMismatchError:
    formula = "down(act(gate(x)) * up(x))" if block.gate else "down(act(up(x)))"
    return BlockMismatchError(
        f"{block.block_class} at {block.owner!r} has the names of family {block.family!r}, but was not shown "
        f"to be {formula}: {why}. Replacing it could change this model's answers. Load the model without "
        f"hf_flash, or see {DOCS}"
    )


def _signature(model: nn.Module, block: FFNBlock) -> tuple[object, ...]:
    """What decides a block's arithmetic: two blocks with equal signatures need one check."""
    owner = model.get_submodule(block.owner)
    settings = tuple(sorted((k, repr(v)) for k, v in vars(owner).items() if _is_setting(k, v)))
    parts = (block.gate, block.up, block.down)
    spelling = tuple(p and (p.transposed, p.bias is not None, p.rows is not None) for p in parts)
    activation = get_activation(model, block) if block.activation else None
    act = getattr(activation, "__qualname__", None) or (type(activation).__qualname__, repr(activation))
    leaves = tuple(other_leaves(owner, block, block.owner))
    return type(owner), block.family, spelling, act, block.inline, block.takes_residual, settings, leaves


def _is_setting(name: str, value: object) -> bool:
    return name not in _POSITIONS and isinstance(value, int | float | str | tuple | list | None)


class _Stub(nn.Module):
    """Stands for whatever else a layer computes: hands its first tensor through, as often as is unpacked."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        vars(self).update({k: v for k, v in vars(original).items() if _is_setting(k, v)})
        self.n_outputs = 2
        self.given: list[torch.Tensor] = []

    def forward(self, *args: object, **kwargs: object) -> object:
        hidden = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        self.given.append(hidden)
        return (hidden,) * self.n_outputs if self.n_outputs else hidden


def _small_copy(owner: nn.Module, block: FFNBlock) -> nn.Module:
    """A float32 CPU copy of the owner in eval mode: _N_NEURONS neurons, random weights, no hooks."""
    memo: dict[int, object] = {id(v): v for name, v in vars(owner).items() if "config" in name}
    matrices = []
    for part, neurons_first in ((block.gate, True), (block.up, True), (block.down, False)):
        if part is None:
            continue
        path = part.key.rpartition(".")[0].removeprefix(block.owner + ".")
        big = owner.get_submodule(path)
        matrices.append(path)
        if id(big) not in memo and isinstance(big, Dense):
            memo[id(big)] = _small_linear(big, part.transposed, neurons_first, 2 if part.rows else 1)
    if block.inline:
        for name, child in owner.named_children():
            own = any(m == name or m.startswith(name + ".") for m in matrices)
            if not own and any(p.dim() > 1 for p in child.parameters()):
                memo[id(child)] = _Stub(child)
    small = copy.deepcopy(owner, memo)
    for module in small.modules():
        _strip(module, block.d_ffn)
    return small.eval()


def _small_linear(big: Dense, transposed: bool, neurons_first: bool, n_fused: int) -> nn.Module:
    """A matrix of the same class with _N_NEURONS neurons (n_fused times), scaled by _SCALES in turn."""
    n = _N_NEURONS * (n_fused if neurons_first else 1)
    d_out, d_in = big.weight.T.shape if transposed else big.weight.shape
    n_out, n_in = (n, d_in) if neurons_first else (d_out, n)
    weight = _draw(n_out, n_in) / n_in**0.5
    if neurons_first:
        weight *= torch.tensor(_SCALES, dtype=torch.float32).repeat(n // len(_SCALES)).unsqueeze(1)
    small = copy.copy(big)
    small._parameters = {"weight": nn.Parameter(weight.T.contiguous() if transposed else weight)}
    small._parameters["bias"] = None if big.bias is None else nn.Parameter(_draw(n_out))
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    vars(small).update(zip(names, (n_out, n_in), strict=True))
    return small


def _strip(module: nn.Module, d_ffn: int) -> None:
    """Make a copied module small and real: sizes, float32 CPU tensors, no hooks, no patched forward."""
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate
        vars(module).pop(name, None)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(module, name, OrderedDict())
    for name, value in vars(module).items():
        if isinstance(value, int) and value in (d_ffn, 2 * d_ffn) and any(s in name for s in _SIZE_NAMES):
            vars(module)[name] = _N_NEURONS * (value // d_ffn)
    if isinstance(module, Dense):
        return
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, value in tensors:
        if value.is_floating_point():
            fresh = _draw(*value.shape).sigmoid() + 0.5  # positive, so that norms stay norms
            setattr(module, name, nn.Parameter(fresh) if isinstance(value, nn.Parameter) else fresh)


def _draw(*shape: int) -> torch.Tensor:
    """Normal numbers in float32 on the CPU, whatever defaults a model that is being loaded has set."""
    return torch.randn(shape, dtype=torch.float32, device="cpu")
