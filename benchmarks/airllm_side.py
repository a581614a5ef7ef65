"""The AirLLM side: its own copy of the weights, one file per layer, streamed for every token.

`airllm` is the package as shipped, on the CPU, its prefetching on. `airllm-nogc` is the same with `clean_memory`, which
runs Python's garbage collector after every module, made a no-op: that is where most of its time goes on a CPU. It runs
Llama models; an OPT it refuses (it looks for `model.layers`).
"""

# ruff: noqa: PLC0415  (what is imported, and when, is part of what is measured)
from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

LAYERS = {"embed": "model.embed_tokens", "layer_prefix": "model.layers", "norm": "model.norm", "lm_head": "lm_head"}


def import_airllm(spec: dict[str, Any]) -> Any:
    """airllm, from the folder of the peers if it is not installed; it prints when it is imported."""
    sys.path.extend(spec["peers_path"])
    with contextlib.redirect_stdout(sys.stderr):
        import airllm
    return airllm


def load(spec: dict[str, Any]) -> Any:
    """The transformers model that AirLLM streams; a folder without a tokenizer is given none."""
    airllm = import_airllm(spec)
    base = airllm.AirLLMBaseModel
    if spec["side"] == "airllm-nogc":
        import airllm.airllm_base as module

        module.clean_memory = lambda: None
    if not os.path.isfile(os.path.join(spec["model_dir"], "tokenizer.json")):
        base.get_tokenizer = lambda self, hf_token=None: None
    with contextlib.redirect_stdout(sys.stderr):
        wrapper = base(spec["model_dir"], device="cpu", layer_shards_saving_path=spec["split_dir"], prefetching=True,
                       max_seq_len=len(spec["ids"]) + spec["n_tokens"])  # fmt: skip
    return wrapper.model


def split(spec: dict[str, Any]) -> None:
    """Make AirLLM's copy of the weights, outside any cap and any clock."""
    import_airllm(spec)
    from airllm.utils import split_and_save_layers

    with contextlib.redirect_stdout(sys.stderr):
        split_and_save_layers(spec["model_dir"], spec["split_dir"], layer_names=LAYERS)


if __name__ == "__main__":
    import json

    split(json.loads(sys.argv[1]))
