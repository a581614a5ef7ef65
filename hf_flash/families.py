"""Which modules of a transformers model are FFN blocks, and where their matrices live.

Over a hundred model classes spell the same two formulas, `down(act(up(x)))` and `down(act(gate(x)) * up(x))`,
in some twenty ways. `FAMILIES` is the list of spellings, one row each: the names of the matrices below the
module that owns them. Whatever can be seen is not in the table but read off the modules:

* gated or not: a gate matrix is there, or `up` has twice the rows that `down` has columns (fused, gate rows
  first);
* transposed: GPT-2's `Conv1D` stores [in, out], `Linear` stores [out, in];
* biased: the module has a bias;
* inline: the owner has other parts than the block's (OPT's decoder layer owns `fc1` and `fc2` beside its
  attention);
* residual: `forward(x, residual)` adds the residual itself (Bloom, MPT).

Names promise nothing about arithmetic, BitNet has Llama's names and another formula. So `check.py` runs each
distinct block against the formula before a single weight is read. How to add a row: docs/adding-a-family.md.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN, ReLUSquaredActivation
from transformers.pytorch_utils import Conv1D

from hf_flash.errors import UnknownArchitectureError

DOCS = "docs/adding-a-family.md"
Activation = Callable[[torch.Tensor], torch.Tensor]
Dense = nn.Linear | Conv1D


@dataclass(frozen=True)
class Family:
    """One spelling of an FFN.

    Attributes:
        name: of the row, for messages and checkpoints.
        up, down, gate: dotted names below the owner; no gate, or a fused one: None.
        activation: its name below the owner; None for one of ACTIVATION_NAMES, beside `up` or on the owner.
        functional: key of ACT2FN when the block's code calls a function instead.
        members: models that use it, for the docs.
    """

    name: str
    up: str
    down: str
    gate: str | None = None
    activation: str | None = None
    functional: str | None = None
    members: str = ""


# The first row that fits wins, so rows with a gate stand before the same names without one.
FAMILIES = (
    Family("gate_up_down", "up_proj", "down_proj", gate="gate_proj", members="Llama, Mistral, Qwen, Gemma"),
    Family("gate_up_fused", "gate_up_proj", "down_proj", members="Phi-3, GLM, GLM-4"),
    Family("up_down", "up_proj", "down_proj", members="Nemotron, Arcee, Apertus, Jais 2, MPT"),
    Family("w1_w3_w2", "w3", "w2", gate="w1", functional="silu", members="LFM2, LFM3"),
    Family("fc1_fc2", "fc1", "fc2", members="OPT, BART, Marian, Whisper (inline); Phi, NanoChat"),
    Family("h_to_4h", "dense_h_to_4h", "dense_4h_to_h", members="Bloom, Falcon, GPT-NeoX, Persimmon"),
    Family("c_fc_c_proj", "c_fc", "c_proj", members="GPT-2, GPT-Neo, GPT-BigCode, StarCoder 2"),
    Family("fc_in_fc_out", "fc_in", "fc_out", members="GPT-J, CodeGen"),
    Family("wi_0_wi_1_wo", "wi_1", "wo", gate="wi_0", members="T5 v1.1, mT5, UMT5, Flan-T5"),
    Family("wi_wo", "wi", "wo", members="T5 v1.0"),
    Family("Wi_Wo", "Wi", "Wo", members="ModernBERT decoder"),
    Family("intermediate_dense", "intermediate.dense", "output.dense", members="BERT and its kin (inline)"),
    Family("intermediate_output", "intermediate", "output", members="ProphetNet"),
    Family("lin1_lin2", "lin1", "lin2", members="XLM, DistilBERT"),
    Family("layer_1_layer_2", "layer_1", "layer_2", members="XLNet (inline)"),
    Family("input_output_linear", "input_linear", "output_linear", members="Granite MoE hybrids (shared)"),
    Family("proj_up_down", "proj_up", "proj_down", gate="proj_up_gate", members="xLSTM"),
    Family("w_in_w_out", "w_in.w_1", "w_out", gate="w_in.w_0", members="CPM-Ant"),
    Family("sequential", "0", "2", activation="1", members="CTRL"),
)

ACTIVATION_NAMES = (
    "act_fn", "activation_fn", "act", "activation", "activation_function", "intermediate_act_fn", "gelu_impl",
)  # fmt: skip
_FUNCTIONAL = "ACT2FN."  # prefix of FFNBlock.activation when the block calls a function that is no attribute
_NOT_WEIGHTS = (nn.Dropout, nn.Identity)  # nothing in eval mode
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others belong to another quantizer


@dataclass(frozen=True)
class Part:
    """Where one of a block's three matrices lives in the stock model.

    Attributes:
        key: full parameter name, "model.layers.0.mlp.gate_up_proj.weight".
        bias: full name of the bias, None without one.
        transposed: stored [in, out] (Conv1D) and not [out, in] (Linear).
        rows: (start, stop, step) of the output rows that are this matrix (fused gate and up); None for all.
    """

    key: str
    bias: str | None
    transposed: bool
    rows: tuple[int, int, int] | None

    def weight_of(self, stored: torch.Tensor) -> torch.Tensor:
        """The matrix as [out, in], a view of the tensor stored under `key`."""
        weight = stored.T if self.transposed else stored
        return weight if self.rows is None else weight[slice(*self.rows)]

    def bias_of(self, stored: torch.Tensor | None) -> torch.Tensor | None:
        """The bias as [out], a view of the tensor stored under `bias`; None in, None out."""
        return stored if stored is None or self.rows is None else stored[slice(*self.rows)]


@dataclass(frozen=True)
class FFNBlock:
    """One FFN of a model, where it is and how it is spelled.

    Attributes:
        index: 0.. in the order of the model's modules (encoder first, where there are both).
        path: the module that is replaced: "model.layers.0.mlp", inline "model.decoder.layers.0.fc1".
        family: name of the row in FAMILIES.
        block_class: class name of the owner: the block, or the layer when inline.
        gate, up, down: the matrices; gate is None for `down(act(up(x)))`.
        activation: full path of the activation ("model.layers.0.mlp.act_fn"); one with parameters must stay
            there for the checkpoint to fill it. "ACT2FN.silu" when the block calls a function that is no
            attribute of it; "" when none was found (check.py refuses such a block).
        inline: the matrices belong to a layer that does other things too.
        takes_residual: forward(x, residual) returns residual + out.
        d_model, d_ffn, d_out: columns of up, rows of up, rows of down.
    """

    index: int
    path: str
    family: str
    block_class: str
    gate: Part | None
    up: Part
    down: Part
    activation: str
    inline: bool
    takes_residual: bool
    d_model: int
    d_out: int
    d_ffn: int

    @property
    def owner(self) -> str:
        """Path of the module of class `block_class`."""
        if not self.inline:
            return self.path
        up, down = self.path.split("."), self.down.key.split(".")
        n_common = next(i for i, (a, b) in enumerate(zip(up, down, strict=False)) if a != b)
        return ".".join(up[:n_common])


def find_blocks(model: nn.Module) -> list[FFNBlock]:
    """The dense FFN blocks of a model, in its order.

    Only layers are searched (paths with a number in them), so projectors and heads stay as they are. Routers
    and experts are left alone. Vision and audio towers of a multimodal model are left alone too, unless the
    model has no other FFNs: they run once per image, not once per token.

    Args:
        model: any module; its tensors may be on the meta device.

    Returns:
        At least one block; `index` counts from 0.

    Raises:
        UnknownArchitectureError: no row of FAMILIES fits, all FFNs are experts, or blocks share their
            weights.
    """
    towers: list[str] = []
    experts: list[str] = []
    found: list[FFNBlock] = []
    in_towers: list[FFNBlock] = []
    for path, module in model.named_modules():
        if path and _is_tower(module, model):
            towers.append(path + ".")
        if _is_expert(path, module):
            experts.append(path)
        elif _is_in_layer(path) and (block := match_block(module, path)) is not None:
            (in_towers if path.startswith(tuple(towers)) else found).append(block)
    taken = found or ([] if experts else in_towers)
    blocks = [replace(block, index=i) for i, block in enumerate(taken)]
    if not blocks:
        raise UnknownArchitectureError(_nothing_found(model, experts))
    _refuse_shared(model, blocks)
    return blocks


def match_block(module: nn.Module, path: str) -> FFNBlock | None:
    """The block that `module` owns directly, described as lying at `path`, by the first row that fits."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None  # nothing runs its members one after the other
    for family in FAMILIES:
        up, down = _linear(module, family.up), _linear(module, family.down)
        gate = _linear(module, family.gate) if family.gate else None
        if up is None or down is None or (family.gate and gate is None):
            continue
        if (block := _describe(module, path, family, up, down, gate)) is not None:
            return block
    return None


def other_leaves(owner: nn.Module, block: FFNBlock, path: str) -> list[str]:
    """What else lies below the owner (at `path`): not the block's matrices, its activation or dropout."""
    known = {part.key.rpartition(".")[0] for part in (block.gate, block.up, block.down) if part}
    return _others(owner, {name.removeprefix(path + ".") for name in (*known, block.activation)})


def install(model: nn.Module, block: FFNBlock, ffn: nn.Module) -> None:
    """Put `ffn` where the block was.

    Inline blocks have no module of their own: `ffn` takes the place of the first matrix and does the work of
    all, the activation and the second matrix become identities (`ffn.down_stub`, if it has one, stands for
    the latter: some layers ask `fc2.weight.dtype`).

    Args:
        model: the model in which find_blocks found `block`.
        block: what to replace.
        ffn: [..., d_model] → [..., d_out]; called with a residual too where block.takes_residual.
    """
    _set(model, block.path, ffn)
    if block.inline:
        _set(model, block.activation, nn.Identity())
        stub = getattr(ffn, "down_stub", None)
        _set(model, block.down.key.rpartition(".")[0], nn.Identity() if stub is None else stub)


def get_activation(model: nn.Module, block: FFNBlock) -> Activation:
    """The block's activation as found: a module (it may hold parameters) or a function.

    Raises:
        UnknownArchitectureError: the block has no activation under a known name.
    """
    if block.activation.startswith(_FUNCTIONAL):
        function: Activation = ACT2FN[block.activation.removeprefix(_FUNCTIONAL)]
        return function
    if not block.activation:
        raise UnknownArchitectureError(
            f"{block.block_class} at {block.owner!r} has the matrices of family {block.family!r}, but no "
            f"activation under a known name ({', '.join(ACTIVATION_NAMES)}). If it is hard-coded, add a row "
            f"that names it: {DOCS}"
        )
    parent, _, name = block.activation.rpartition(".")
    activation: Activation = getattr(model.get_submodule(parent), name)
    return activation


class FATReLU(nn.Module):
    """x above `threshold`, 0 at or below it: ReLU with a raised bar, which silences more neurons.

    Kurtz et al., ICML 2020; ProSparse (arXiv:2402.13516) ends its training with it.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        if threshold < 0:
            raise ValueError(f"FATReLU's threshold is {threshold}, expected one that is not negative")
        self.threshold = float(threshold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > self.threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


_ZERO_BELOW_ZERO = (nn.ReLU, nn.ReLU6, ReLUSquaredActivation)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, nn.functional.relu6)


def zero_below(activation: Activation) -> float | None:
    """The number at and below which the activation is exactly 0; None where there is none (SiLU, GELU, ...).

    Exactly 0 is what makes a neuron skippable without loss: its row of `up` and column of `down` are
    multiplied by it.
    """
    if isinstance(activation, _ZERO_BELOW_ZERO) or any(activation is f for f in _RELU_FUNCTIONS):
        return 0.0
    if type(activation).__name__ == "FATReLU" and hasattr(activation, "threshold"):
        return float(activation.threshold)
    return None


def _describe(
    owner: nn.Module, path: str, family: Family, up: Dense, down: Dense, gate: Dense | None
) -> FFNBlock | None:
    """The block these modules make, or None when their shapes do not fit each other."""
    (n_up, d_model), (d_out, d_ffn) = _shape(up), _shape(down)
    fused = gate is None and n_up == 2 * d_ffn
    if n_up != d_ffn * (2 if fused else 1) or (gate is not None and _shape(gate) != (n_up, d_model)):
        return None
    activation = _activation_name(owner, family)
    if activation is None and family.activation is not None:
        return None  # a Sequential, say, is no FFN by its names alone
    known = {name for name in (family.up, family.down, family.gate, activation) if name}
    inline = gate is None and not fused and bool(_others(owner, known))
    if activation is not None:
        where = _join(path, activation)
    else:
        where = _FUNCTIONAL + family.functional if family.functional and not inline else ""
    gate_part = _part(path, family.gate, gate) if family.gate and gate is not None else None
    if fused:
        gate_part = _part(path, family.up, up, (0, d_ffn, 1))
    return FFNBlock(
        index=0,
        path=_join(path, family.up) if inline else path,
        family=family.name,
        block_class=type(owner).__name__,
        gate=gate_part,
        up=_part(path, family.up, up, (d_ffn, 2 * d_ffn, 1) if fused else None),
        down=_part(path, family.down, down),
        activation=where,
        inline=inline,
        takes_residual=not inline and "residual" in inspect.signature(type(owner).forward).parameters,
        d_model=d_model,
        d_out=d_out,
        d_ffn=d_ffn,
    )


def _part(path: str, name: str, module: Dense, rows: tuple[int, int, int] | None = None) -> Part:
    full = _join(path, name)
    bias = f"{full}.bias" if module.bias is not None else None
    return Part(f"{full}.weight", bias, isinstance(module, Conv1D), rows)


def _linear(owner: nn.Module, name: str) -> Dense | None:
    """The dense float matrix called `name` below the owner, or None."""
    module = _child(owner, name)
    if not isinstance(module, nn.Linear | Conv1D):
        return None
    weight = module._parameters.get("weight")
    return module if weight is not None and weight.dim() == 2 and weight.dtype in _FLOATS else None


def _shape(linear: Dense) -> tuple[int, int]:
    """(rows, columns) as `Linear` would store it."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _activation_name(owner: nn.Module, family: Family) -> str | None:
    if family.activation is not None:
        child = _child(owner, family.activation)
        return family.activation if child is not None and not child._modules else None
    for prefix in dict.fromkeys((family.up.rpartition(".")[0], "")):
        beside = _child(owner, prefix)
        for name in ACTIVATION_NAMES:
            if callable(getattr(beside, name, None)):
                return _join(prefix, name)
    return None


def _others(owner: nn.Module, known: set[str]) -> list[str]:
    """Leaves and loose tensors below the owner that are not under one of the known names."""
    names = []
    for name, module in owner.named_modules():
        if any(name == k or name.startswith(k + ".") for k in known) or isinstance(module, _NOT_WEIGHTS):
            continue
        if name and not module._modules:
            names.append(name)
        else:
            names += [_join(name, key) for key in (*module._parameters, *module._buffers)]
    return names


def _is_in_layer(path: str) -> bool:
    """Below a numbered layer, and no router (Zaya's is an MLP) nor gated norm (AXK2's holds one) of it."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return number < len(parts) and not any("router" in part or "norm" in part for part in parts[number:])


def _is_expert(path: str, module: nn.Module) -> bool:
    """A module of experts (3-D parameters), or part of a list of them; shared experts are ordinary blocks."""
    if "experts" in path.split("."):
        return True
    stacked = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    return stacked and "expert" in type(module).__name__.lower()


def _is_tower(module: nn.Module, model: nn.Module) -> bool:
    """A sub-model that takes images or sound but no text, by what it declares or its config is called."""
    if not isinstance(module, PreTrainedModel):
        return False
    modalities, config = module.input_modalities, type(module.config)
    takes_text = "text" in ((modalities,) if isinstance(modalities, str) else tuple(modalities))
    own_config = config is not type(getattr(model, "config", None))
    return not takes_text or (own_config and any(sense in config.__name__ for sense in ("Vision", "Audio")))


def _refuse_shared(model: nn.Module, blocks: list[FFNBlock]) -> None:
    """The layout has one tensor per layer, so no two may own one; nor can a swap reach two parents."""
    owners: dict[int, str] = {}
    n_parents = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for block in blocks:
        tensors = [id(model.get_parameter(part.key)) for part in (block.gate, block.up, block.down) if part]
        other = next((o for t in tensors if (o := owners.setdefault(t, block.owner)) != block.owner), None)
        if other is None and n_parents[id(model.get_submodule(block.path))] == 1:
            continue
        raise UnknownArchitectureError(
            f"{type(model).__name__} shares FFN weights between layers ({block.owner!r} uses those of "
            f"{other or 'another'!r}), which the flash layout, one tensor per layer, does not hold yet. "
            f"Load this model without hf_flash. See {DOCS}"
        )


def _nothing_found(model: nn.Module, experts: list[str]) -> str:
    name = type(model).__name__
    if experts:
        return (
            f"every FFN of {name} is a mixture of experts (first: {experts[0]!r}), and mixtures of experts "
            f"are not supported yet. Load this model without hf_flash, or choose a dense one. See {DOCS}"
        )
    seen: dict[str, str] = {}
    for path, module in model.named_modules():
        names = [n for n, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)]
        kind = type(module).__name__
        if names and _is_in_layer(path):
            seen.setdefault(kind, f"{kind} at {path!r} with {', '.join(names)}")
    found = "; ".join(list(seen.values())[:8]) or "no layers with linear modules"
    return f"no FFN block was recognised in {name}. Found: {found}. Known spellings, how to add one: {DOCS}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _child(owner: nn.Module, name: str) -> nn.Module | None:
    child: nn.Module | None = owner
    for part in name.split(".") if name else ():
        child = child._modules.get(part) if child is not None else None
    return child


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
