"""The sides of the comparisons: each loads a model its own way, in a fresh interpreter, and generates greedily.

- `dense`: plain transformers without a cap: the tokens that every other side must give.
- `dense-gelu`: the same of an OPT with GELU for ReLU: the tokens that llama.cpp, which has no OPT, must give.
- `mmap`: plain transformers `from_pretrained`; weights are evictable pages of the files.
- `accelerate`: decoder layers on "disk" (read from the safetensors as they are), as many as fit kept in anonymous
  memory. Left to itself accelerate keeps them as mmapped pages, which the kernel evicts under a cap and which then hit
  nothing (cyclic access, half the memory): cloning them is the best it can be given. See `choose_resident`.
- `accelerate-plain`: the same with every decoder layer on "disk" and nothing else done, as the documentation has it.
- `airllm`, `airllm-nogc`: airllm_side.py. `llama.cpp`: llama_side.py.
- `hf_flash`: the converted folder with `FlashConfig(memory=..., gate=...)`.

`run_side` is what benchmarks call; the rest runs in the child.
"""

# ruff: noqa: PLC0415  (what is imported, and when, is part of what is measured)
from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import airllm_side
import cgroup
import common
import floors
import footprint

# model type -> where the decoder layers are, and what is beside them
TOPS = {
    "llama": ("model.layers", ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")),
    "opt": ("model.decoder.layers", ("model.decoder.embed_tokens", "model.decoder.embed_positions",
                                     "model.decoder.final_layer_norm", "lm_head")),
}  # fmt: skip


# --- in the child ----------------------------------------------------------------------------------------------------


def load_plain(spec: dict[str, Any]) -> Any:
    """Plain transformers, as anyone types it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec["model_dir"])
    if spec["side"] == "dense-gelu":
        config.activation_function = "gelu_new"
    return AutoModelForCausalLM.from_pretrained(spec["model_dir"], config=config)


def load_accelerate(spec: dict[str, Any]) -> Any:
    """Disk offload; `accelerate` with the resident part in anonymous memory, `accelerate-plain` as it comes.

    Plain: every decoder layer on "disk". Otherwise the first `n_resident` of them stay, with the final norm and the
    head. The embedding of an untied model stays an mmap view: a token touches one row of it, so its memory goes to
    layers instead.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = spec["side"] == "accelerate-plain"
    config = AutoConfig.from_pretrained(spec["model_dir"])
    prefix, others = TOPS[config.model_type]
    where = dict.fromkeys(others, "cpu")
    for layer in range(config.num_hidden_layers):
        where[f"{prefix}.{layer}"] = "cpu" if not plain and layer < spec["n_resident"] else "disk"
    model = AutoModelForCausalLM.from_pretrained(
        spec["model_dir"], device_map=where, offload_folder=tempfile.mkdtemp(prefix="offload-")
    )
    untied = not config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in () if plain else model.named_parameters():  # each shared parameter once
            if parameter.device.type == "cpu" and not (untied and name.endswith("embed_tokens.weight")):
                parameter.data = parameter.data.clone()
    return model


def load_hf_flash(spec: dict[str, Any]) -> Any:
    """The converted folder under a budget."""
    from transformers import AutoModelForCausalLM

    import hf_flash

    config = hf_flash.FlashConfig(memory=spec["memory"], context=spec["context"], gate=spec.get("gate", "all"))
    return AutoModelForCausalLM.from_pretrained(spec["converted_dir"], quantization_config=config)


LOADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dense": load_plain,
    "dense-gelu": load_plain,
    "mmap": load_plain,
    "accelerate": load_accelerate,
    "accelerate-plain": load_accelerate,
    "airllm": airllm_side.load,
    "airllm-nogc": airllm_side.load,
    "hf_flash": load_hf_flash,
}


def flash_stats(model: Any) -> dict[str, Any]:
    """hf_flash's own counters, as plain numbers."""
    import hf_flash

    stats = hf_flash.stats(model)
    found = stats.to_dict() if hasattr(stats, "to_dict") else dict(stats)
    return json.loads(json.dumps(found, default=str))


def start_counting(model: Any) -> Callable[[], None]:
    """What sets hf_flash's counters back when the prefill is done: they are to count decoding."""
    import hf_flash

    return hf_flash.stats(model).reset


def work(spec: dict[str, Any]) -> None:
    """In the child: import, load, generate, report."""
    footprint.import_everything()
    import torch

    torch.set_num_threads(spec["threads"])
    imported = common.read_bytes_so_far()
    start = time.perf_counter()
    model = LOADERS[spec["side"]](spec)
    result = {"load_s": time.perf_counter() - start, "load_read_bytes": common.read_bytes_so_far() - imported}
    if spec["n_tokens"]:
        margins = spec["side"] in ("dense", "dense-gelu")
        decoding = start_counting(model) if spec["side"] == "hf_flash" else None
        result.update(common.generate_greedy(model, spec["ids"], spec["n_tokens"], margins, decoding))
    if spec["side"] == "hf_flash":
        result["stats"] = flash_stats(model)
    common.say_result({**result, **common.status_bytes()})


# --- in the parent ---------------------------------------------------------------------------------------------------


def run_side(
    side: str, spec: dict[str, Any], limit_bytes: int | None, capped: bool = True, timeout_s: float = 1800
) -> cgroup.Run:
    """Run one side cold: model files evicted (checked), library files warm, in a cgroup of `limit_bytes`."""
    folders = [spec[key] for key in ("model_dir", "converted_dir", "split_dir", "gguf_dir") if spec.get(key)]
    footprint.warm_libraries()
    footprint.warm(spec.get("libraries", ()))
    stayed = cgroup.evict(folders)
    if stayed:
        print(f"warning: {common.mb(stayed)} MB of model files stay in the page cache; another process maps them")
    script = "llama_side.py" if side == "llama.cpp" else "sides.py"
    sent = {key: value for key, value in spec.items() if key not in ("libraries", "gelu")}
    return common.worker(script, {**sent, "side": side}, limit_bytes, [], capped, timeout_s)


def choose_resident(spec: dict[str, Any], limit_bytes: int, allowance: int) -> int | None:
    """The number of resident layers that serves accelerate best under this limit, found by trying.

    Starts from what fits beside the head and 40 MB of work memory, goes up while more layers are faster, and down while
    fewer are (which leave more room for the page cache) or until one run survives at all. A try has 180 s; what has not
    generated four tokens by then is too slow.

    Returns:
        The best number, or None if not even 0 survives.
    """
    sizes = floors.tensor_bytes(spec["model_dir"])
    layers = [re.search(r"\.layers\.(\d+)\.", name) for name in sizes]
    n_layers = 1 + max(int(found[1]) for found in layers if found)
    per_layer = sum(n for name, n in sizes.items() if ".layers.0." in name)
    head = sizes.get("lm_head.weight") or floors.embedding_bytes(sizes)
    start = min(n_layers, max(0, int((limit_bytes - allowance - head - 40e6) // per_layer)))
    seconds: dict[int, float] = {}

    def faster(n: int, than: int) -> bool:
        seconds[n] = _try_resident(spec, n, n_layers, limit_bytes)
        return seconds[n] < 0.97 * seconds.get(than, float("inf"))

    best = start
    faster(start, start)
    for step, end in ((1, n_layers), (-1, 0)):
        while best != end and seconds.get(best + step) is None and faster(best + step, best):
            best += step
        if best != start:
            break
    while seconds[best] == float("inf") and best > 0:
        best -= 1
        if best not in seconds:
            faster(best, best)
    return best if seconds[best] < float("inf") else None


def choose_threads(spec: dict[str, Any], limit_bytes: int) -> int:
    """The number of threads that serves llama.cpp best under this limit: all, half or one (they fault on one file)."""
    seconds = {}
    for n in sorted({spec["threads"], max(1, spec["threads"] // 2), 1}, reverse=True):
        few = {**spec, "threads": n, "n_tokens": min(4, spec["n_tokens"])}
        run = run_side("llama.cpp", few, limit_bytes, timeout_s=180)
        seconds[n] = run.result()["s_per_token"] if run.ok else float("inf")
        print(f"  trying llama.cpp, {n} threads: {seconds[n]:.3f} s/token", flush=True)
    return min(seconds, key=lambda n: seconds[n])


def _try_resident(spec: dict[str, Any], n: int, n_layers: int, limit_bytes: int) -> float:
    """Seconds per token with `n` layers resident; infinite if it did not get through."""
    run = run_side(
        "accelerate", {**spec, "n_resident": n, "n_tokens": min(4, spec["n_tokens"])}, limit_bytes, timeout_s=180
    )
    seconds = run.result()["s_per_token"] if run.ok else float("inf")
    words = "killed" if run.oom_killed else "slower than 180 s" if run.returncode == 124 else "failed"
    words = f"{seconds:.3f} s/token" if run.ok else words
    print(f"  trying accelerate, {n} of {n_layers} layers resident: {words}", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help="(internal) what the child is to do, as JSON")
    work(json.loads(parser.parse_args().worker))


if __name__ == "__main__":
    main()
