"""Tiny random models of every FFN spelling, built in code: no download, two layers, milliseconds to make.

`TINY[name]()` builds one. Names are model types, with a suffix where one type has several spellings. All
weights are drawn anew with a spread at which FFNs matter (transformers' initial biases are zero, and zero
hides a lost bias). Under `torch.device("meta")` the same models come without memory.

    model = TINY["opt"]()
    logits = model(**model_inputs(model)).logits
    model.generate(**generate_kwargs(model))
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

VOCAB, D_MODEL, D_FFN, N_LAYERS, N_HEADS = 128, 32, 80, 2, 4

_LLAMA = {  # names that most newer configs share
    "hidden_size": D_MODEL,
    "intermediate_size": D_FFN,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": 128}
_BERT = {**_LLAMA, "is_decoder": True}
_BART = {  # encoder and decoder; CausalLM classes take the decoder's half
    "d_model": D_MODEL,
    "encoder_layers": N_LAYERS,
    "decoder_layers": N_LAYERS,
    "encoder_attention_heads": N_HEADS,
    "decoder_attention_heads": N_HEADS,
    "encoder_ffn_dim": D_FFN,
    "decoder_ffn_dim": D_FFN + 16,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 1,
}
_T5 = {"d_model": D_MODEL, "d_kv": 8, "d_ff": D_FFN, "num_layers": N_LAYERS, "num_heads": N_HEADS}
_T5 = {**_T5, "num_decoder_layers": N_LAYERS, "decoder_start_token_id": 0}
_OPT = {**_LLAMA, "ffn_dim": D_FFN, "word_embed_proj_dim": D_MODEL}
_EIGHT = {"head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_XLM = {"emb_dim": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS}
_PROPHETNET = {
    "hidden_size": D_MODEL,
    "num_encoder_layers": N_LAYERS,
    "num_decoder_layers": N_LAYERS,
    "num_encoder_attention_heads": N_HEADS,
    "num_decoder_attention_heads": N_HEADS,
    "decoder_ffn_dim": D_FFN,
    "max_position_embeddings": 128,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
_CPMANT = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "dim_head": 8,
    "dim_ff": D_FFN,
    "prompt_types": 4,
    "prompt_length": 4,
}
_GRANITE_HYBRID = {
    **_LLAMA,
    "num_local_experts": 0,
    "shared_intermediate_size": D_FFN,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}


def _build(auto: type, model_type: str, **settings: Any) -> PreTrainedModel:
    settings = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings}
    torch.manual_seed(7)
    model = auto.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5 * min(parameter.shape[-2:]) ** -0.5)
            elif parameter.numel() > 1 and parameter.abs().max() == 0:
                parameter.normal_(0, 0.2)
    return model


causal = partial(_build, AutoModelForCausalLM)
seq2seq = partial(_build, AutoModelForSeq2SeqLM)

_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    # gate_proj, up_proj, down_proj
    "llama": ("llama", _LLAMA),
    "llama-relu": ("llama", {**_LLAMA, "hidden_act": "relu"}),
    "llama-relu2-bias": ("llama", {**_LLAMA, "hidden_act": "relu2", "mlp_bias": True}),
    "llama-prelu": ("llama", {**_LLAMA, "hidden_act": "prelu"}),
    "mistral": ("mistral", _LLAMA),
    "ministral": ("ministral", {**_LLAMA, **_EIGHT}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, **_EIGHT}),
    "gemma": ("gemma", {**_LLAMA, **_EIGHT}),
    "gemma2": ("gemma2", {**_LLAMA, **_EIGHT}),
    "gemma3_text": ("gemma3_text", {**_LLAMA, **_EIGHT}),
    "olmo": ("olmo", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "cohere": ("cohere", _LLAMA),
    "cohere2": ("cohere2", _LLAMA),
    "stablelm": ("stablelm", _LLAMA),
    "granite": ("granite", _LLAMA),
    "smollm3": ("smollm3", _LLAMA),
    "helium": ("helium", {**_LLAMA, **_EIGHT}),
    "ernie4_5": ("ernie4_5", {**_LLAMA, **_EIGHT}),
    "exaone4": ("exaone4", _LLAMA),
    "seed_oss": ("seed_oss", {**_LLAMA, **_EIGHT}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**_LLAMA, **_EIGHT}),
    "qwen2_moe-mixed": (
        "qwen2_moe",
        {**_LLAMA, **_MOE, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    ),
    # gate_up_proj, down_proj
    "phi3": ("phi3", _LLAMA),
    "glm": ("glm", {**_LLAMA, **_EIGHT}),
    "glm4": ("glm4", {**_LLAMA, **_EIGHT}),
    # up_proj, down_proj
    "nemotron": ("nemotron", _LLAMA),
    "arcee": ("arcee", _LLAMA),
    "jais2": ("jais2", _LLAMA),
    "apertus": ("apertus", _LLAMA),
    "mpt": ("mpt", {"d_model": D_MODEL, "n_heads": N_HEADS, "n_layers": N_LAYERS, "max_seq_len": 128}),
    # w1, w3, w2
    "lfm2": (
        "lfm2",
        {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    # fc1, fc2
    "opt": ("opt", _OPT),
    "opt-postnorm": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-plain": ("opt", {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "xglm": ("xglm", {**_BART, "num_layers": N_LAYERS, "attention_heads": N_HEADS, "ffn_dim": D_FFN}),
    "biogpt": ("biogpt", _LLAMA),
    "bart-decoder": ("bart", {**_BART, "is_decoder": True, "is_encoder_decoder": False}),
    "trocr": ("trocr", _BART),
    "phi": ("phi", _LLAMA),
    "nanochat": ("nanochat", _LLAMA),
    # dense_h_to_4h, dense_4h_to_h
    "bloom": ("bloom", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}),
    "falcon": ("falcon", {**_LLAMA, "ffn_hidden_size": D_FFN}),
    "falcon-new": ("falcon", {**_LLAMA, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "gpt_neox": ("gpt_neox", _LLAMA),
    "gpt_neox_japanese": ("gpt_neox_japanese", {**_LLAMA, "intermediate_multiple_size": 3}),
    "persimmon": ("persimmon", _LLAMA),
    # c_fc, c_proj
    "gpt2": ("gpt2", {**_GPT, "n_inner": D_FFN}),
    "openai-gpt": ("openai-gpt", _GPT),
    "gpt_neo": ("gpt_neo", {**_LLAMA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT, "n_inner": D_FFN}),
    "starcoder2": ("starcoder2", _LLAMA),
    # fc_in, fc_out
    "gptj": ("gptj", {**_GPT, "n_inner": D_FFN, "rotary_dim": 4}),
    "codegen": ("codegen", {**_GPT, "n_inner": D_FFN, "rotary_dim": 4}),
    # the rest, one each
    "modernbert-decoder": ("modernbert-decoder", {**_LLAMA, "mlp_bias": True}),
    "bert": ("bert", _BERT),
    "roberta-prelayernorm": ("roberta-prelayernorm", _BERT),
    "prophetnet": ("prophetnet", _PROPHETNET),
    "xlm": ("xlm", _XLM),
    "xlm-relu": ("xlm", {**_XLM, "gelu_activation": False}),
    "xlnet": ("xlnet", {"d_model": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "d_inner": D_FFN}),
    "ctrl": ("ctrl", {**_GPT, "dff": D_FFN}),
    "cpmant": ("cpmant", _CPMANT),
    "xlstm": (
        "xlstm",
        {"hidden_size": 64, "num_hidden_layers": N_LAYERS, "num_heads": 2, "qk_dim_factor": 1.0},
    ),
    "granitemoehybrid": ("granitemoehybrid", _GRANITE_HYBRID),
}

_SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5-gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "bart": ("bart", _BART),
    "mbart": ("mbart", _BART),
    "pegasus": ("pegasus", _BART),
    "marian": ("marian", _BART),
    "m2m_100": ("m2m_100", _BART),
    "blenderbot": ("blenderbot", _BART),
    "fsmt": ("fsmt", {**_BART, "langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}),
}

TINY: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: partial(causal, kind, **settings) for name, (kind, settings) in _CAUSAL.items()},
    **{name: partial(seq2seq, kind, **settings) for name, (kind, settings) in _SEQ2SEQ.items()},
}


def n_blocks(model: PreTrainedModel) -> int:
    """How many FFN blocks a tiny model has: one per layer, encoder's and decoder's."""
    return N_LAYERS * (2 if model.config.is_encoder_decoder else 1)


def model_inputs(model: PreTrainedModel, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Random tokens for a forward pass, the same for every call."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


def generate_kwargs(model: PreTrainedModel, batch: int = 2, length: int = 7, n_tokens: int = 8) -> dict[str, Any]:
    """Arguments of `generate` for n_tokens greedy tokens from random prompts; nothing stops early."""
    tokens = model_inputs(model, batch, length)["input_ids"]
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": n_tokens,
        "min_new_tokens": n_tokens,
        "do_sample": False,
        "num_beams": 1,
    }
