"""The table finds the FFN blocks of every spelling, the check refuses whatever only has their names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import TINY, model_inputs, n_blocks
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING as SEQ2SEQ

from hf_flash import families
from hf_flash.check import check_block, check_blocks
from hf_flash.errors import BlockMismatchError, FlashError, UnknownArchitectureError
from hf_flash.families import FAMILIES, FATReLU, FFNBlock, find_blocks, get_activation, install, zero_below
from hf_flash.ops import dense_ffn

transformers.logging.set_verbosity_error()


class PlainFFN(nn.Module):
    """The formula over copies of a block's matrices, with no trace of the stock modules."""

    def __init__(self, model: nn.Module, block: FFNBlock) -> None:
        super().__init__()
        self.takes_residual, self.act, self.tensors = block.takes_residual, get_activation(model, block), {}
        for name in ("gate", "up", "down"):
            if (part := getattr(block, name)) is not None:
                self.tensors[name] = part.weight_of(model.get_parameter(part.key)).detach().clone()
                if part.bias:
                    self.tensors[name + "_bias"] = part.bias_of(model.get_parameter(part.bias)).detach().clone()
        assert self.tensors["up"].shape == (block.d_ffn, block.d_model)
        assert self.tensors["down"].shape == (block.d_out, block.d_ffn)

    def forward(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        out = dense_ffn(x, act=self.act, **self.tensors)
        return out + residual[0] if self.takes_residual else out


class Silent(nn.Module):
    def forward(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        return residual[0] if residual else torch.zeros_like(x)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**model_inputs(model)).logits


@pytest.mark.parametrize("name", TINY)
def test_swapping_every_block_for_the_formula_keeps_the_logits(name: str) -> None:
    model = TINY[name]()
    blocks = find_blocks(model)
    assert len(blocks) == n_blocks(model)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    check_blocks(model, blocks)
    before = logits(model)
    plain = [PlainFFN(model, block) for block in blocks]
    for block in blocks:
        install(model, block, Silent())
    assert (logits(model) - before).abs().max() > 1e-3, "the FFNs do not matter here, so nothing would be tested"
    for block, ffn in zip(blocks, plain, strict=True):
        install(model, block, ffn)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_model_without_memory_gives_the_same_table(name: str) -> None:
    with torch.device("meta"):
        model = TINY[name]()
    blocks = find_blocks(model)
    assert blocks == find_blocks(TINY[name]())
    check_blocks(model, blocks)


def test_tiny_models_cover_every_row() -> None:
    seen = set()
    with torch.device("meta"):
        for build in TINY.values():
            seen |= {block.family for block in find_blocks(build())}
    assert seen == {family.name for family in FAMILIES}


PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-family.md"


def test_the_docs_page_lists_every_row() -> None:
    rows = [f"| {f.name} | {f.gate or ''} | {f.up} | {f.down} | {f.members} |" for f in FAMILIES]
    assert PAGE.read_text().split("| --- | --- | --- | --- | --- |\n")[1].strip().split("\n") == rows


def test_the_docs_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(families, "FAMILIES", FAMILIES)  # undone afterwards: the page adds a row
    define, *rest = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(define, scope)
    with pytest.raises(UnknownArchitectureError, match=r"NovaFeedForward at 'layers\.0\.mlp' with expand, shrink"):
        find_blocks(scope["model"])
    for block in rest:
        exec(block, scope)
    assert capsys.readouterr().out == "2 layers.0.mlp 0.0\n"


def test_what_the_table_says_of_fused_transposed_inline_and_residual_blocks() -> None:
    def first(name: str) -> FFNBlock:
        return find_blocks(TINY[name]())[0]

    phi3 = first("phi3")
    assert phi3.gate.key == phi3.up.key == "model.layers.0.mlp.gate_up_proj.weight"
    assert (phi3.gate.rows, phi3.up.rows) == ((0, 80, 1), (80, 160, 1))
    gpt2 = first("gpt2")
    assert gpt2.up.transposed and gpt2.down.transposed and gpt2.up.bias == "transformer.h.0.mlp.c_fc.bias"
    opt = first("opt")
    assert opt.inline and (opt.path, opt.owner) == ("model.decoder.layers.0.fc1", "model.decoder.layers.0")
    assert opt.activation == "model.decoder.layers.0.activation_fn" and opt.block_class == "OPTDecoderLayer"
    bert = first("bert")
    assert (bert.path, bert.owner) == ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0")
    assert first("bloom").takes_residual and first("mpt").takes_residual and not first("falcon").takes_residual
    lfm2 = first("lfm2")
    assert lfm2.activation == "ACT2FN.silu" and (lfm2.d_model, lfm2.d_ffn, lfm2.d_out) == (32, 80, 32)


def test_each_distinct_block_is_checked_once() -> None:
    for name, n_distinct in (("llama", 1), ("bart", 2), ("qwen2_moe-mixed", 2)):
        model = TINY[name]()
        assert check_blocks(model, find_blocks(model)) == n_distinct


def test_checking_leaves_no_trace_and_minds_no_defaults() -> None:
    model = TINY["apertus"]()
    blocks = find_blocks(model)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained does
    try:
        with torch.device("meta"):
            check_blocks(model, blocks)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_patched_forward_or_hook_does_not_reach_the_check() -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the check ran the model's own, patched module")

    model = TINY["llama"]()
    model.model.layers[0].mlp.forward = forbidden  # accelerate's offloading replaces forward
    model.model.layers[1].mlp.gate_proj.register_forward_hook(forbidden)
    for block in find_blocks(model):
        check_block(model, block)


def on_meta(model_type: str, **settings: object) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


REFUSED = {
    "bitnet": (BlockMismatchError, "ffn_sub_norm", {}),
    "gemma3n_text": (BlockMismatchError, "Gemma3nTextMLP", {}),
    "deepseek_v4": (BlockMismatchError, "DeepseekV4MLP", {"num_hidden_layers": 2}),
    "minimax_m3_vl_text": (BlockMismatchError, "no activation", {"num_hidden_layers": 2}),
    "falcon_h1": (BlockMismatchError, "FalconH1MLP", {"mlp_multipliers": [0.9, 0.8], "num_hidden_layers": 2}),
    "mixtral": (UnknownArchitectureError, "mixtures of experts are not supported yet", {}),
    "gpt_oss": (UnknownArchitectureError, "mixtures of experts are not supported yet", {}),
    "jetmoe": (UnknownArchitectureError, "mixtures of experts are not supported yet", {}),
    "mamba": (UnknownArchitectureError, "MambaMixer at 'backbone.layers.0.mixer' with in_proj", {}),
    "rwkv": (UnknownArchitectureError, "RwkvFeedForward", {}),
    "zamba": (UnknownArchitectureError, "shares FFN weights between layers", {}),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name(model_type: str) -> None:
    error, words, settings = REFUSED[model_type]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = on_meta(model_type, **settings)
    with pytest.raises(error, match=words) as caught:
        check_blocks(model, find_blocks(model))
    assert "docs/adding-a-family.md" in str(caught.value)


def test_settings_that_differ_between_layers_of_one_class_are_all_checked() -> None:
    """Gemma 3n cuts off in its first layers only: accepting the first must not accept the class."""
    if "gemma3n_text" not in transformers.CONFIG_MAPPING:
        pytest.skip("no Gemma 3n")
    model = on_meta("gemma3n_text")
    blocks = find_blocks(model)
    check_block(model, blocks[-1])
    with pytest.raises(BlockMismatchError, match="largest error"):
        check_blocks(model, blocks[::-1])


def test_multipliers_of_one_are_no_reason_to_refuse() -> None:
    model = on_meta("falcon_h1", mlp_multipliers=[1.0, 1.0], num_hidden_layers=2)
    assert check_blocks(model, find_blocks(model)) == 1


def test_an_inline_activation_with_weights_is_refused() -> None:
    model = on_meta("opt", activation_function="prelu", num_hidden_layers=1)
    with pytest.raises(BlockMismatchError, match="PReLU holds weights"):
        check_blocks(model, find_blocks(model))


class Block(nn.Module):
    """A gated block of known names; subclasses do something else with them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 64, bias=False), nn.Linear(8, 64)
        self.down_proj, self.act_fn = nn.Linear(64, 8), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Dropout(Block):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.intermediate_size = nn.Dropout(0.5), 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.dropout(self.down_proj(hidden.view(*x.shape[:-1], self.intermediate_size)))


class Swapped(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Clamped(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=1000.0))


class Scaled(Block):
    scale = 1.0001

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class Pair(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x), None


class Wants(Block):
    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Plain(nn.Module):
    """fc1, act, fc2 with a norm, an adapter or nothing between, before and after."""

    def __init__(self, where: str, between: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(8, 64), nn.Linear(64, 8), nn.ReLU()
        self.where, self.extra = where, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.fc1(self.extra(x) if self.where == "before" else x))
        out = self.fc2(self.extra(hidden) if self.where == "between" else hidden)
        return self.extra(out) if self.where == "after" else out


def stack(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mlp": block}) for block in blocks)
    return model.eval()


@pytest.mark.parametrize("block", [Block, Dropout])
def test_accepted(block: type[nn.Module]) -> None:
    model = stack(block())
    assert check_blocks(model, find_blocks(model)) == 1


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Swapped, "largest error"),
        (Clamped, "largest error"),
        (Scaled, "largest error"),
        (Pair, "returns tuple"),
        (Wants, "wants more than hidden states: positions"),
    ],
)
def test_known_names_with_other_arithmetic_are_refused(block: type[nn.Module], words: str) -> None:
    model = stack(block())
    with pytest.raises(BlockMismatchError, match=rf"{block.__name__} at 'layers.0.mlp'.*{words}"):
        check_blocks(model, find_blocks(model))


@pytest.mark.parametrize(
    ("where", "extra", "fine"),
    [
        ("before", nn.LayerNorm(8), True),
        ("after", nn.LayerNorm(8), True),
        ("before", nn.Linear(8, 8), True),
        ("between", nn.Dropout(), True),
        ("between", nn.LayerNorm(48), False),
        ("between", nn.Linear(64, 64), False),  # a stub must not hide what stands between the matrices
        ("between", nn.Tanh(), False),
    ],
)
def test_what_stands_between_the_matrices_of_an_inline_block(where: str, extra: nn.Module, fine: bool) -> None:
    model = stack(Plain(where, extra))
    blocks = find_blocks(model)
    assert blocks[0].inline == (not isinstance(extra, nn.Dropout))
    if fine:
        check_blocks(model, blocks)
    else:
        with pytest.raises(BlockMismatchError):
            check_blocks(model, blocks)


def test_shared_weights_are_refused() -> None:
    block, twin = Block(), Block()
    with pytest.raises(UnknownArchitectureError, match="shares FFN weights"):
        find_blocks(stack(block, block))  # one module in two places
    twin.down_proj.weight = block.down_proj.weight
    with pytest.raises(UnknownArchitectureError, match=r"'layers\.1\.mlp' uses those of 'layers\.0\.mlp'"):
        find_blocks(stack(block, twin))


def test_weights_of_another_quantizer_are_not_taken() -> None:
    model = stack(Block())
    model.layers[0]["mlp"].up_proj.weight = nn.Parameter(torch.zeros(64, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnknownArchitectureError):
        find_blocks(model)


def test_towers_are_left_alone_unless_there_is_nothing_else() -> None:
    with torch.device("meta"):
        gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3"))
        vision = AutoModel.from_config(AutoConfig.for_model("clip_vision_model"))
    assert all(block.path.startswith("model.language_model.layers.") for block in find_blocks(gemma))
    assert len(find_blocks(vision)) == vision.config.num_hidden_layers
    both = nn.Module()
    both.tower, both.text = vision, on_meta("mixtral", num_hidden_layers=1)
    with pytest.raises(UnknownArchitectureError, match="mixtures of experts"):
        find_blocks(both)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_zero_below_is_exact_for_every_activation_of_transformers(name: str) -> None:
    activation, x = ACT2FN[name], torch.linspace(-4, 4, 801)
    threshold = zero_below(activation)
    assert threshold == (0.0 if name in ("relu", "relu2", "relu6") else None)
    with torch.no_grad():
        silent = (activation(x) == 0)[x <= 0].all()
    assert silent == (threshold is not None)


@pytest.mark.parametrize("function", [torch.relu, nn.functional.relu, nn.functional.relu6])
def test_zero_below_knows_functions(function: Callable) -> None:
    assert zero_below(function) == 0.0
    assert zero_below(nn.functional.gelu) is None


def test_fatrelu() -> None:
    act, x = FATReLU(0.5), torch.tensor([-1.0, 0.0, 0.5, 0.6, 2.0])
    assert act(x).tolist() == pytest.approx([0, 0, 0, 0.6, 2.0])
    assert act(x.bfloat16()).dtype == torch.bfloat16
    assert zero_below(act) == 0.5
    assert torch.equal(FATReLU()(x), torch.relu(x))
    with pytest.raises(ValueError, match="-1"):
        FATReLU(-1)


# Types whose default config does not build, with what it lacks.
SETTINGS: dict[str, dict[str, object]] = {
    "nemotron": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
}


def build_on_meta(config_class: type, model_class: type) -> nn.Module:
    """The type's default model with fewer layers, where its config lets itself be shortened."""
    settings = SETTINGS.get(config_class.model_type, {})
    with torch.device("meta"):
        try:
            return model_class(config_class(num_hidden_layers=6, **settings))
        except Exception:
            return model_class(config_class(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [CAUSAL, SEQ2SEQ], ids=["causal", "seq2seq"])
def test_every_language_model_of_transformers_is_found_or_refused_clearly(
    mapping: dict, record_property: Callable
) -> None:
    """At full width on the meta device: about 190 and 40 types."""
    found, refused, not_built = {}, {}, {}
    for config_class, classes in mapping.items():
        kind, model_class = config_class.model_type, classes[0] if isinstance(classes, tuple) else classes
        try:
            model = build_on_meta(config_class, model_class)
        except Exception as error:  # a config that does not build by default says nothing about us
            not_built[kind] = repr(error)
            continue
        try:
            blocks = find_blocks(model)
            check_blocks(model, blocks)
            found[kind] = len(blocks)
        except FlashError as error:
            refused[kind] = str(error)
    for name, kinds in (("found", found), ("refused", refused), ("not_built", not_built)):
        record_property(name, ", ".join(kinds))
        print(f"{name} {len(kinds)}: {', '.join(kinds)}")
    assert all("docs/adding-a-family.md" in message for message in refused.values())
    assert len(found) > 4 * len(refused) > 0
    assert not set(refused) & {
        "llama",
        "opt",
        "gpt2",
        "phi3",
        "t5",
        "bart",
        "gemma2",
        "falcon",
        "bloom",
        "qwen3",
    }
