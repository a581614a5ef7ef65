"""Putting a model on flash: plan, swap the blocks, open the checkpoint, connect.

`swap` works on the meta device, before any weight is loaded; `connect` runs once the resident weights are there.
Between the two transformers loads what is left of the model as it always does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_flash import attention, attention_step, early, kv, layer_step, lookahead, native
from hf_flash.balance import Balance
from hf_flash.budget import Demand, Layer, Matrix, Plan, make_plan, settle
from hf_flash.cache import NeuronCache
from hf_flash.checkpoint import Located, unique_parameters
from hf_flash.config import DEFAULT_CONTEXT, FlashConfig
from hf_flash.engine import Engine, WorkBuffers
from hf_flash.errors import CheckpointError, FlashConfigError
from hf_flash.families import FFNBlock, get_activation, install, zero_below
from hf_flash.ffn import FlashFFN
from hf_flash.format import ORDER_KEY, SOURCE_KEY, read_header
from hf_flash.gate_file import GATES_KEY, PREDICTORS_KEY, GateFile
from hf_flash.gates import CertifiedGate, Gate, PredictedGate, ThresholdGate
from hf_flash.gates.certified import scratch_bytes as certified_scratch_bytes
from hf_flash.gates.certified import sketch_bytes
from hf_flash.gates.predicted import predictor_bytes
from hf_flash.gates.predicted import scratch_bytes as predicted_scratch_bytes
from hf_flash.gates.threshold import DEFAULT_SPARSITY, threshold_at
from hf_flash.gates.threshold import scratch_bytes as threshold_scratch_bytes
from hf_flash.layout import BundleLayout, format_size
from hf_flash.linear import FlashEmbedding, FlashLinear, PackedEmbedding, PackedLinear
from hf_flash.loan import Loan
from hf_flash.memory import Pool, keep_few_kernels, return_large_blocks, trim_malloc
from hf_flash.packing import can_pack, packed_bytes
from hf_flash.readers import UnbundledReader, open_reader
from hf_flash.resident import most_bytes
from hf_flash.sparse import SparseEngine
from hf_flash.stats import FlashStats
from hf_flash.store import DTYPES, LAYERS_KEY, Extent2D, FlashLayer, FlashStore, layers_of, layout_of
from hf_flash.stream import Stream
from hf_flash.sweep import SweepEngine
from hf_flash.tight import STRIPE

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What the plan needs to know of an FFN on flash."""

    layout: BundleLayout
    n_neurons: int
    sketch_bits: int  # 0: no sketch
    predictor_rank: int = 0  # 0: no predictor
    lookahead: tuple[int, int] = (0, 0)  # rank, and length of the input, of the one that sees another layer's input
    thresholds: bool = False  # for gate `threshold`
    rest: float | None = None  # of an input, what lies in no known direction; None where none is known


class FlashRuntime:
    """Everything that a model on flash owns besides its modules; shared by copies of the model.

    Attributes:
        config, plan, stats: as the user sees them.
        demand: what the plan divides memory among.
        store: the open checkpoint. files: its flash files by name. gates_file: sketches, or None.
        balances: of the layers whose caches share memory.
        located: where the resident tensors lie.
        tied: path of a head that is streamed or packed -> path of the embedding that it is.
        stored_paths: module path -> its name on flash, where the checkpoint was made from another class of the model.
    """

    def __init__(
        self, config: FlashConfig, plan: Plan, demand: Demand, blocks: list[FFNBlock], located: Located | None
    ) -> None:
        self.config, self.plan, self.demand, self.blocks, self.located = config, plan, demand, blocks, located
        self.stats = FlashStats(plan=plan.to_dict())
        self.stored_paths: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        self.gates_file: Path | None = None
        self.store: FlashStore | None = None
        self.balances: list[Balance] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FlashRuntime:
        return self


def geometry_of(files: Mapping[str, Path], gates_file: Path | None) -> dict[str, Geometry]:
    """Geometry by module path, from the headers of a flash checkpoint.

    Raises:
        CheckpointError: a file is missing or torn.
    """
    gates = GateFile(gates_file) if gates_file else None
    out = {}
    for path in files.values():
        for layer in layers_of(read_header(path)).values():
            name = layer["module"]
            bits = gates.sketches.get(name, {}).get("bits", 0) if gates else 0
            rank = gates.predictors.get(name, {}).get("rank", 0) if gates else 0
            ahead = gates.lookahead.get(name, {}) if gates else {}
            out[name] = Geometry(
                layout_of(layer), layer["n_neurons"], bits, rank, (ahead.get("rank", 0), ahead.get("d_model", 0)),
                gates is not None and name in gates.thresholds,
                gates.usual[name]["rest"] if gates is not None and gates.knows(name) else None,
            )  # fmt: skip
    return out


def match_geometry(blocks: list[FFNBlock], geometry: Mapping[str, Geometry], where: str) -> None:
    """Refuse a flash checkpoint that is not this model's.

    Raises:
        CheckpointError: a block has no bundles, or bundles of another shape.
    """
    for block in blocks:
        found = geometry.get(block.path)
        want = (block.d_model, block.d_out, block.gate is not None, block.d_ffn)
        have = (
            None if found is None else (found.layout.d_model, found.layout.d_out, found.layout.gated, found.n_neurons)
        )
        if have != want:
            what = "no bundles" if have is None else f"bundles of another shape ({have}, expected {want})"
            raise CheckpointError(
                f"{where} has {what} for {block.path} ({block.block_class}): flash files and config.json do not belong "
                "together. Repack the checkpoint."
            )


def stored_paths(model: PreTrainedModel, blocks: list[FFNBlock], geometry: Mapping[str, Geometry]) -> dict[str, str]:
    """What a model's blocks are called on flash: a bare model's lack the prefix that the same model with a head has."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for block in blocks:
        for name in (block.path, prefix + block.path, block.path.removeprefix(prefix)):
            if name in geometry:
                names[block.path] = name
                break
    return names


def match_sources(files: Iterable[Path]) -> None:
    """Refuse files that were made from different checkpoints: of one shape they would load, and answer wrongly.

    Raises:
        CheckpointError: names two files that do not belong together.
    """
    seen: dict[str, Path] = {}
    orders: dict[str, Path] = {}
    for path in files:
        metadata = read_header(path).metadata
        origin = metadata.get(SOURCE_KEY)
        if origin is not None:
            seen.setdefault(origin.partition("-")[0], path)
        if not {LAYERS_KEY, GATES_KEY, PREDICTORS_KEY}.isdisjoint(metadata):  # what has a row for every neuron
            orders.setdefault(metadata.get(ORDER_KEY, ""), path)
    if len(orders) > 1:
        one, other = list(orders.values())[:2]
        raise CheckpointError(
            f"{one} and {other.name} have their neurons in different orders and do not belong together. Fetch the repo "
            "again, or repack the checkpoint into a new folder."
        )
    if len(seen) > 1:
        one, other = list(seen.values())[:2]
        raise CheckpointError(
            f"{one} and {other.name} were made from different checkpoints and do not belong together. Fetch the repo "
            "again, or repack the checkpoint into a new folder."
        )


def demand_of(
    model: PreTrainedModel, blocks: list[FFNBlock], geometry: Mapping[str, Geometry], config: FlashConfig,
    located: Located | None,
) -> Demand:  # fmt: skip
    """What a model asks for, from its structure alone; it may be on the meta device.

    Raises:
        FlashConfigError: gate `certified` was asked for and cannot be had.
    """
    size = model.dtype.itemsize
    ffn_keys = {part.key for b in blocks for part in (b.gate, b.up, b.down) if part is not None}
    matrices = _matrices(model, ffn_keys, located)
    elsewhere = ffn_keys | {f"{path}.weight" for m in matrices for path in (m.path, m.tied)}
    elsewhere |= set(model.all_tied_weights_keys)
    fixed = sum(p.numel() * p.element_size() for n, p in unique_parameters(model) if n not in elsewhere) + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    text, vocab = model.config.get_text_config(decoder=True), _vocab_size(model)
    limit = getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT
    context = config.context or min(DEFAULT_CONTEXT, limit if limit > 0 else DEFAULT_CONTEXT)  # XLNet: -1
    tokens = context * config.batch_size
    layers = [_layer(model, block, geometry[block.path], config, size) for block in blocks]
    if config.gate == "auto":
        _say_what_lacks_sketches(model, [block for block in blocks if not geometry[block.path].sketch_bits])
    return Demand(
        fixed_bytes=fixed, matrices=matrices, layers=layers, kv_bytes=tokens * kv_bytes(text, size),
        activation_bytes=_activations(model, blocks, config.batch_size)(tokens), tokenizer_bytes=vocab * 300,
        max_tokens=tokens, context=context, batch_size=config.batch_size,
    )  # fmt: skip


def _say_what_lacks_sketches(model: nn.Module, without: list[FFNBlock]) -> None:
    able = [block.path for block in without if zero_below(get_activation(model, block)) is not None]
    if able:
        others = f" and {len(able) - 1} more" if len(able) > 1 else ""
        logger.warning_once(
            f"The checkpoint has no sketch for {able[0]}{others}, though the activation allows the certified gate: "
            "every neuron will be read. The answers are the same; fetch gates.safetensors, or repack, to read less."
        )


def _vocab_size(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(decoder=True), "vocab_size", 0) or 0


def _activations(model: PreTrainedModel, blocks: list[FFNBlock], batch_size: int) -> Callable[[int], int]:
    """What a pass takes besides weights and KV cache: bytes by its number of tokens."""
    widest, logits = max(b.d_ffn for b in blocks), 2 * batch_size * _vocab_size(model) * 4
    per_token = (8 * max(b.d_model for b in blocks) + widest) * model.dtype.itemsize
    return lambda n_tokens: n_tokens * per_token + min(n_tokens, 256) * widest * 8 + logits


def _layer(model: nn.Module, block: FFNBlock, geometry: Geometry, config: FlashConfig, size: int) -> Layer:
    layout, n = geometry.layout, geometry.n_neurons
    can = zero_below(get_activation(model, block)) is not None
    if config.gate == "certified" and not (can and geometry.sketch_bits):
        why = (
            f"{block.path} has an activation that is not zero below a threshold (SiLU and GELU are not)"
            if not can
            else f"the checkpoint has no sketch for {block.path}"
        )
        raise FlashConfigError(f"gate='certified' cannot be had: {why}. Use gate='all' or leave it 'auto'.")
    if config.gate == "predicted" and not geometry.predictor_rank:
        raise FlashConfigError(
            f"gate='predicted' cannot be had: the checkpoint has no predictor for {block.path}. Make them with "
            "`hf-flash calibrate FOLDER --text FILE` (a folder that `hf-flash repack` wrote), or leave the gate 'auto'."
        )
    if config.gate == "threshold":
        _check_thresholds(block.path, can, geometry)
    elif config.gate == "auto" and config.sparsity is not None:
        raise FlashConfigError(
            f"sparsity={config.sparsity} is for gate='threshold', which has to be asked for by name."
        )
    thresholded = config.gate == "threshold"
    certified = can and geometry.sketch_bits > 0 and config.gate in ("auto", "certified")
    predicted = config.gate == "predicted"
    stored = range(4, geometry.sketch_bits + 1) if certified or thresholded else ()
    scratch = {
        "certified": certified_scratch_bytes(n, layout.d_model), "predicted": predicted_scratch_bytes(n),
        "threshold": threshold_scratch_bytes(layout.d_model),
    }  # fmt: skip
    kind = config.gate if predicted or thresholded else "certified"
    rank, d_before = geometry.lookahead if config.lookahead and (certified or predicted) else (0, 0)
    return Layer(
        block.path, n, layout.row_bytes, n * layout.n_elements * layout.dtype.itemsize, n * layout.d_out * size,
        tuple(sketch_bytes(n, layout.d_model, bits, certified and geometry.rest is not None) for bits in stored),
        scratch[kind] if certified or predicted or thresholded else 0, layout.packed,
        predictor_bytes(n, layout.d_model, geometry.predictor_rank) if predicted else 0,
        predictor_bytes(n, d_before, rank) if rank else 0, thresholded,
        1.0 if geometry.rest is None else geometry.rest,
    )  # fmt: skip


def _check_thresholds(path: str, is_zero_below: bool, geometry: Geometry) -> None:
    """Refuse gate `threshold` where it cannot be had; where it can, say once that it costs quality."""
    if is_zero_below:
        raise FlashConfigError(
            f"gate='threshold' is for activations that are never exactly zero (SiLU, GELU); that of {path} is. Use "
            "gate='certified', which loses nothing, or leave it 'auto'."
        )
    if not (geometry.thresholds and geometry.sketch_bits):
        raise FlashConfigError(
            f"gate='threshold' cannot be had: the checkpoint has no threshold for {path}. Make them with `hf-flash "
            "calibrate FOLDER --text FILE` (a folder that `hf-flash repack` wrote), or leave the gate 'auto'."
        )
    logger.warning_once(
        "gate='threshold' drops activations below a threshold: answers differ from the model's. `hf-flash eval` "
        "measures by how much."
    )


def _matrices(model: PreTrainedModel, ffn_keys: set[str], located: Located | None) -> list[Matrix]:
    """Matrices that may be streamed or packed: stored as they are, stock classes, tied to nothing.

    One tie is understood: a head that is the input embedding, both of stock classes, where it can be packed.
    """
    if located is None:
        return []
    ties = _ties(model)
    tied = set(ties) | set(ties.values())
    embedding = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "")
    head, out = [], []
    for path, module in model.named_modules():
        key = f"{path}.weight"
        entry = located.by_param.get(key)
        if type(module) not in (nn.Linear, nn.Embedding) or key in ffn_keys or entry is None:
            continue
        is_tied_head = (
            type(module) is nn.Linear and module is model.get_output_embeddings()
            and ties.get(key) == f"{embedding}.weight" and list(ties.values()).count(ties[key]) == 1
            and type(model.get_input_embeddings()) is nn.Embedding
        )  # fmt: skip
        if key in tied and not is_tied_head:
            continue
        if entry.dtype not in DTYPES or tuple(module.weight.shape) != entry.shape:
            continue
        row = entry.n_bytes // entry.shape[0]
        n_bytes = module.weight.numel() * module.weight.element_size()
        packed = _packed_bytes(module.weight.shape) if can_pack(DTYPES[entry.dtype], entry.shape[1]) else 0
        if module is model.get_input_embeddings() and type(module) is nn.Embedding:
            out.append(Matrix(path, n_bytes, True, row, entry.n_bytes))
        elif type(module) is nn.Linear and module is model.get_output_embeddings():
            if packed or not is_tied_head:
                head.append(Matrix(path, n_bytes, False, row, entry.n_bytes, packed, embedding if is_tied_head else ""))
        elif type(module) is nn.Linear and re.search(r"\.\d+\.", path):
            out.append(Matrix(path, n_bytes, False, row, entry.n_bytes, packed))
    return head + out


def _ties(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one: name -> the other's name."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _packed_bytes(shape: torch.Size) -> int:
    """DRAM of a packed matrix, in 12 bits a weight and with room for one escape in 512, or in 11 and filled up."""
    n, size = shape
    return max(n * (packed_bytes(size) + 4) + n * size // 128, most_bytes(n, size) if n % STRIPE else 0)


def kv_bytes(text: Any, size: int) -> int:
    """Bytes of KV cache per token of one sequence."""
    n_layers = getattr(text, "num_hidden_layers", 0) or 0
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    hidden = getattr(text, "hidden_size", 0) or 0
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return int(2 * n_layers * kv_heads * head_dim * size) * (2 if getattr(text, "is_encoder_decoder", False) else 1)


def swap(model: PreTrainedModel, blocks: list[FFNBlock], runtime: FlashRuntime) -> None:
    """Replace the FFN blocks, and the matrices that the plan streams, by modules without weights.

    Args:
        model: stock structure, on meta (from_pretrained) or loaded (patch).
        blocks: what find_blocks found in it.
        runtime: holds the plan; becomes reachable as `model._hf_flash`.
    """
    state = dict(model.named_parameters())
    patterns = []
    kept = model._get_dtype_plan(model.dtype)
    for block in blocks:
        parts = [part for part in (block.gate, block.up, block.down) if part is not None]
        biases = {part.bias: state[part.bias] for part in parts if part.bias}
        ffn = FlashFFN(block, get_activation(model, block), biases, state[block.up.key].dtype)
        if any(re.search(rf"(^|\.){name}\.", block.down.key) for name in kept):  # T5's wo overflows in fp16
            ffn.compute_dtype = torch.float32
        install(model, block, ffn)
        patterns += [re.escape(part.key) for part in parts]
    for path in (*runtime.plan.streamed, *runtime.plan.packed):
        embedding = _ties(model).pop(f"{path}.weight", "").removesuffix(".weight")
        if embedding:
            runtime.tied[path] = embedding
            patterns.append(re.escape(f"{embedding}.weight"))
        for name in filter(None, (path, embedding)):
            parent, _, leaf = name.rpartition(".")
            new = _replacement(model.get_submodule(name), path in runtime.plan.packed)
            setattr(model.get_submodule(parent), leaf, new)
        patterns.append(re.escape(f"{path}.weight"))
    _forget_ties(model, {f"{path}.weight" for path in runtime.tied})
    ignore = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    prefix = re.escape(f"{getattr(model, 'base_model_prefix', '')}.")
    # The checkpoint may have been made from the model with a head, or without one.
    model._keys_to_ignore_on_load_unexpected = ignore | {f"^({prefix})?{p.removeprefix(prefix)}$" for p in patterns}
    model._hf_flash = runtime  # type: ignore[assignment]


def _forget_ties(model: PreTrainedModel, names: set[str]) -> None:
    """Let model.tie_weights(), which others call (lm-evaluation-harness does), pass over what is no parameter now."""
    for path, module in model.named_modules():
        ties = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and isinstance(ties, dict):
            prefix = f"{path}." if path else ""
            module._tied_weights_keys = {k: v for k, v in ties.items() if prefix + k not in names}


def _replacement(stock: Any, packed: bool) -> nn.Module:
    if isinstance(stock, nn.Embedding):
        return PackedEmbedding(stock) if packed else FlashEmbedding(stock)
    return PackedLinear(stock) if packed else FlashLinear(stock)


def connect(model: PreTrainedModel, runtime: FlashRuntime) -> None:
    """Open the flash checkpoint and give every swapped module its engine.

    Raises:
        CheckpointError: a file is missing, torn or truncated.
    """
    return_large_blocks()
    keep_few_kernels()
    config, stats = runtime.config, runtime.stats
    reader = open_reader(n_threads=config.n_threads, prompt=runtime.plan.parts["stream"] > 0)
    apart = "bundling" in config.without
    n_matrices = 3 if any(block.gate is not None for block in runtime.blocks) else 2
    runtime.store = store = FlashStore(runtime.files, UnbundledReader(reader, n_matrices) if apart else reader)
    plan = _pack_residents(model, runtime)
    overlap = "overlap" not in config.without
    stream = Stream(reader, plan.chunk_bytes, plan.n_buffers, stats, overlap)
    keeps = "window" not in config.without
    one_call = overlap and keeps
    work = WorkBuffers()
    gates = GateFile(runtime.gates_file) if runtime.gates_file else None
    sketches = Pool(plan.parts["gates"])
    first = next(module for module in model.modules() if isinstance(module, FlashFFN))
    for path, module in model.named_modules():
        if isinstance(module, FlashFFN):
            name = module.block.path
            layer = store.layers[runtime.stored_paths.get(name, name)]
            module.order = layer.order
            if plan.gates[name] == "all":
                rows = plan.pinned_rows[name]
                module.engine = SweepEngine(
                    layer, stream, work, stats, rows, plan.max_tokens, plan.unpacked, config.exact
                )
            else:
                assert gates is not None
                gate = _gate(plan.gates[name], gates, module, layer, runtime, sketches)
                use = gates.use(layer.path) if keeps else None
                cache = NeuronCache(store, layer, max(1, plan.slots[name]), config.window, stats, keeps=keeps, use=use)
                batch = max(1, plan.batch_bytes // layer.layout.row_bytes)
                module.engine = SparseEngine(store, layer, gate, cache, batch, work, stats, one_call)
            if module is first:
                module.stats, module.trim = stats, True
        elif isinstance(module, FlashLinear):
            module.connect(stream, *_extent_of(path, runtime))
        elif isinstance(module, FlashEmbedding):
            module.connect(reader, *_extent_of(path, runtime), stats)
    engines = [m.engine for m in model.modules() if isinstance(m, FlashFFN)]
    runtime.balances = _share_slots(engines, _lendable(plan) + _sparable(plan, engines)) if keeps else []
    for root in (model, model.get_decoder()) if model.config.is_encoder_decoder else (model,):
        begins = next(module for module in root.modules() if isinstance(module, FlashFFN))
        begins.on_pass = [balance.pass_begins for balance in runtime.balances]
    if config.lookahead and overlap:
        assert gates is not None
        _look_ahead(model, runtime, gates)
    elif overlap:
        early.install(model)
    for balance in runtime.balances:
        balance.fill()
    _watch_kv(model, runtime, engines, work, None if config.without else stream)
    attention.install(model)
    attention_step.install(model)
    layer_step.install(model)
    for path, embedding in runtime.tied.items():
        head, looked_up = model.get_submodule(path), model.get_submodule(embedding)
        if isinstance(looked_up, PackedEmbedding) and isinstance(head, PackedLinear):
            looked_up.connect(head)
    logger.info(
        f"hf_flash: {len(store.layers)} FFN layers on flash, memory {format_size(plan.memory)}, of which "
        f"{format_size(plan.parts['FFN cache'])} for FFN weights; gates {sorted(set(plan.gates.values()))}."
    )


def _watch_kv(
    model: PreTrainedModel, runtime: FlashRuntime, engines: Sequence[Engine | None], work: WorkBuffers,
    stream: Stream | None,
) -> None:  # fmt: skip
    """Let KV caches grow in place, and the FFNs have the memory that they, activations and batches do not fill."""
    plan = runtime.plan
    token_bytes = plan.parts["KV cache"] // plan.max_tokens
    if stream is not None:
        stream.can_borrow(_lendable(plan))
    sparable = _sparable(plan, engines)
    loan = Loan(runtime.balances, _lendable(plan) + sparable, token_bytes, stream)
    activations = _activations(model, runtime.blocks, plan.batch_size)

    def tell(filled: int | None, n_tokens: int) -> None:
        spared = sparable and work.can_spare(n_tokens <= native.MAX_TOKENS)
        taken = activations(max(n_tokens, native.MAX_TOKENS)) + (0 if spared else sparable)
        loan.told(None if filled is None else filled + taken)

    has_use = runtime.balances or (stream is not None and stream.most_lent)
    lends = has_use and not model.config.is_encoder_decoder
    kv.install(model, plan.max_tokens, token_bytes, tell if lends else None)


def _lendable(plan: Plan) -> int:
    return plan.parts["KV cache"] + plan.parts["activations"]


def _sparable(plan: Plan, engines: Sequence[Engine | None]) -> int:
    """What passes of few tokens leave of the memory for batches: all, where each layer takes native steps."""
    steps = all(isinstance(engine, SparseEngine) and engine.steps for engine in engines)
    return plan.parts["batches"] if steps else 0


def _share_slots(engines: Sequence[Engine | None], lendable: int) -> list[Balance]:
    """One memory of slots for all layers whose rows have one size, with room for what is lent to them."""
    sizes: dict[int, list[SparseEngine]] = {}
    for engine in engines:
        if isinstance(engine, SparseEngine):
            sizes.setdefault(engine.layer.layout.row_bytes, []).append(engine)
    balances = []
    for row_bytes, some in sizes.items():
        absent = sum(engine.layer.n_neurons - engine.cache.n_slots for engine in some)
        balances.append(Balance(some, [engine.cache.n_slots for engine in some], min(absent, lendable // row_bytes)))
    return balances


def _pack_residents(model: PreTrainedModel, runtime: FlashRuntime) -> Plan:
    """Read the matrices that stay in DRAM in fewer bits; what they do not take of their part goes to the FFNs."""
    exact = runtime.config.exact and "all" in runtime.plan.gates.values()
    modules = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    pool, taken = Pool(sum(most_bytes(m.out_features, m.in_features) for m in modules.values())), {}
    for path, module in modules.items():
        assert runtime.store is not None
        module.connect(runtime.store.reader, _extent_of(path, runtime)[0], exact, pool)
        taken[path] = module.matrix.n_bytes
    if taken:
        runtime.plan = settle(runtime.plan, runtime.demand, taken)
        runtime.stats.plan = runtime.plan.to_dict()
    return runtime.plan


def _extent_of(path: str, runtime: FlashRuntime) -> tuple[Extent2D, torch.dtype]:
    """Where a matrix lies, [out_features, in_features * itemsize], and its dtype there."""
    assert runtime.located is not None and runtime.store is not None
    entry = runtime.located.by_param[f"{path}.weight"]
    file = runtime.store.reader.open(entry.path)
    rows = Extent2D(entry.name, file, entry.start, entry.shape[0], entry.n_bytes // entry.shape[0])
    return rows, DTYPES[entry.dtype]


def _gate(kind: str, gates: GateFile, ffn: FlashFFN, layer: FlashLayer, runtime: FlashRuntime, pool: Pool) -> Gate:
    """The gate of one layer, with what it knows read into DRAM: its sketch into the pool."""
    if kind == "predicted":
        return PredictedGate(gates.predictor(layer.path))
    sketch = gates.sketch(layer.path, runtime.plan.gate_bits, pool.take, known=kind == "certified")
    if kind == "threshold":
        threshold = threshold_at(gates.levels(layer.path), runtime.config.sparsity or DEFAULT_SPARSITY)
        return ThresholdGate(sketch, threshold, ffn.own_activation)
    return CertifiedGate(sketch, runtime.config.delta, zero_below(ffn.own_activation) or 0.0, layer.layout.dtype)


def _look_ahead(model: PreTrainedModel, runtime: FlashRuntime, gates: GateFile) -> None:
    """Let FFNs start the reads of those behind them.

    Raises:
        FlashConfigError: the checkpoint cannot do that.
    """
    stored = runtime.stored_paths
    paths = {stored.get(b.path, b.path): b.path for b in runtime.blocks}
    pairs = [
        (paths[said["from"]], paths[name], gates.predictor(name, lookahead=True))
        for name, said in gates.lookahead.items()
        if name in paths and said["from"] in paths and runtime.plan.gates[paths[name]] != "all"
    ]
    if not pairs:
        raise FlashConfigError(
            "lookahead=True cannot be had: it needs gate='predicted' or 'certified' and a checkpoint with lookahead "
            "predictors. Make them with `hf-flash calibrate FOLDER --text FILE --lookahead`."
        )
    lookahead.install(model, pairs)


def make_resident(model: PreTrainedModel) -> None:
    """Copy every parameter and buffer that is a view of a mapped file into anonymous memory, shared ones once.

    Mapped pages are evictable: under a cap they thrash, and the kernel charges them where it likes.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.data.clone()
        tensor.data = copies[key]
    trim_malloc()


def plan_for(
    model: PreTrainedModel, blocks: list[FFNBlock], geometry: Mapping[str, Geometry], config: FlashConfig,
    located: Located | None,
) -> tuple[Plan, Demand]:  # fmt: skip
    """Cap to plan, and what it divides the cap among.

    Raises:
        MemoryCapError: the cap is too small; names the smallest that would do.
    """
    demand = demand_of(model, blocks, geometry, config, located)
    return make_plan(demand, config.cap(), "residents" not in config.without), demand
