"""The llama.cpp side: a GGUF file of the same weights, mmapped, on the same number of threads.

It runs in an interpreter that imports neither torch nor transformers, so llama.cpp has what those take in the others
as page cache on top. Token ids go in and the argmax of the logits comes out: no vocabulary, no sampler.
"""

# ruff: noqa: PLC0415  (what is imported, and when, is part of what is measured)
from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import common


def load(spec: dict[str, Any]) -> tuple[Any, Any]:
    """(library, context): mmap, no mlock, no GPU layers, nothing repacked."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, _: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp._benchmark_quiet = quiet  # the callback must outlive this function
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    if hasattr(params, "load_mode"):  # 0.3.36; use_mmap and use_mlock before it
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    else:
        params.use_mmap, params.use_mlock = True, False
    model = llama_cpp.llama_model_load_from_file(spec["gguf"].encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp could not load {spec['gguf']}")
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = -(-(len(spec["ids"]) + spec["n_tokens"]) // 256) * 256
    wanted.n_batch = wanted.n_ubatch = max(32, len(spec["ids"]))
    wanted.n_threads = wanted.n_threads_batch = spec["threads"]
    context = llama_cpp.llama_init_from_model(model, wanted)
    if not context:
        raise SystemExit("llama.cpp could not make a context")
    return llama_cpp, context


def next_token(lib: Any, context: Any, ids: Sequence[int], n_vocab: int, never: Sequence[int]) -> int:
    """Feed `ids`, return the most likely token that is not in `never`."""
    import numpy as np

    array = (lib.llama_token * len(ids))(*ids)
    failed = lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids)))
    if failed:
        raise SystemExit(f"llama_decode returned {failed}")
    logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(n_vocab,))
    logits[list(never)] = -np.inf
    return int(logits.argmax())


def generate(lib: Any, context: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Greedy decoding; the same figures as common.generate_greedy."""
    clock = common.Clock()
    tokens = [next_token(lib, context, spec["ids"], spec["n_vocab"], spec["never"])]
    clock.tick()
    for _ in range(spec["n_tokens"] - 1):
        tokens.append(next_token(lib, context, tokens[-1:], spec["n_vocab"], spec["never"]))
        clock.tick()
    return {"tokens": tokens, **clock.figures()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help="(internal) what the child is to do, as JSON")
    spec = json.loads(parser.parse_args().worker)
    sys.path.extend(spec["peers_path"])
    import llama_cpp  # noqa: F401

    before, start = common.read_bytes_so_far(), time.perf_counter()
    lib, context = load(spec)
    result = {"load_s": time.perf_counter() - start, "load_read_bytes": common.read_bytes_so_far() - before}
    common.say_result({**result, **generate(lib, context, spec), **common.status_bytes()})


if __name__ == "__main__":
    main()
