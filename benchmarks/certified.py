"""How many neurons does the certified gate want for each one that truly fires, and does it miss any?

The dense model and the same model on flash (gate `certified`) read one text token by token, each with its KV cache, as
in decoding. Hooks on the dense model take what each FFN gets and which of its neurons fire (activation not 0). For
every token and layer the gate is then asked about exactly those inputs; what it wants on the flash model's own way is
counted as well. A miss, a neuron that fires and was not wanted, would make the output wrong: there must be none.

The model is the small ReLU model that ships with hf_flash, trained on books; --text gives other text to read.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import common

SHIPPED = common.REPO / "hf_flash" / "models" / "relu-books-5m"


def read_tokens(model: Any, ids: Any) -> Any:
    """Feed `ids` one by one with a KV cache; returns the logits, [n_tokens, vocab]."""
    import torch

    from hf_flash.kv import carried

    rows, past = [], {}
    with torch.no_grad():
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], **past, use_cache=True)
            past = carried(out)
            rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def watch_dense(model: Any, modules: dict[str, Any]) -> tuple[dict[str, list], dict[str, list]]:
    """Hooks that keep each FFN's input and which neurons fire, per module path of the flash model."""
    inputs: dict[str, list] = {path: [] for path in modules}
    fired: dict[str, list] = {path: [] for path in modules}

    def on_input(path: str) -> Any:
        return lambda _, args: inputs[path].append(args[0].reshape(1, -1).clone())

    def on_activation(path: str) -> Any:
        return lambda _, __, out: fired[path].append((out != 0).reshape(1, -1))

    for path, module in modules.items():
        block = module.block
        model.get_submodule(block.up.key.removesuffix(".weight")).register_forward_pre_hook(on_input(path))
        model.get_submodule(block.activation).register_forward_hook(on_activation(path))
    return inputs, fired


def watch_flash(modules: dict[str, Any]) -> dict[str, list]:
    """Keep what each gate answers while the model on flash runs, token by token."""
    import torch

    wanted: dict[str, list] = {path: [] for path in modules}
    for path, module in modules.items():
        gate, engine = module.engine.gate, module.engine
        ask, run = gate.decide, engine.forward

        def recording(x: Any, bias: Any = None, *, ask: Any = ask, path: str = path) -> Any:
            answer = ask(x, bias)
            wanted[path].append((answer[1] == 0).unsqueeze(0))  # by the last token, which is the only one
            return answer

        def running(*args: Any, run: Any = run, engine: Any = engine, path: str = path) -> Any:
            before = len(wanted[path])
            out = run(*args)
            if len(wanted[path]) == before:  # one native call, which asks its own scan
                mask = torch.zeros(1, engine.layer.n_neurons, dtype=torch.bool)
                mask[0, torch.from_numpy(engine.last_wanted)] = True
                wanted[path].append(mask)
            return out

        gate.decide, engine.forward = recording, running
    return wanted


def compare(args: Any, source: Path, folder: Path) -> dict[str, Any]:
    """Run both models over the text and count, layer by layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_flash
    from hf_flash.ffn import FlashFFN

    hf_flash.repack(source, folder, gate_bits=args.bits, progress=False)
    config = hf_flash.FlashConfig(memory=args.memory, context=args.tokens, gate="certified", delta=args.delta)
    flash = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=flash.dtype)
    ids = text_ids(args, dense, AutoTokenizer.from_pretrained(source))

    modules = {name: m for name, m in flash.named_modules() if isinstance(m, FlashFFN)}
    answers = {path: module.engine.gate.decide for path, module in modules.items()}
    inputs, fired = watch_dense(dense, modules)
    asked = watch_flash(modules)
    logits = read_tokens(dense, ids)
    flash_logits = read_tokens(flash, ids)
    rows = []
    for path, module in modules.items():
        bias = module.biases().gate if module.engine.layer.layout.gated else module.biases().up
        truth = torch.cat(fired[path])  # [n_tokens, d_ffn]
        wanted = torch.stack([answers[path](x, bias)[1] == 0 for x in inputs[path]])
        on_its_way = torch.cat(asked[path])
        rows.append({
            "layer": path,
            "n_neurons": truth.shape[1],
            "fired": int(truth.sum()),
            "wanted": int(wanted.sum()),
            "misses": int((truth & ~wanted).sum()),
            "wanted_in_flash_run": int(on_its_way.sum()),
        })  # fmt: skip
    counters = hf_flash.stats(flash).to_dict()
    kept = ("neurons_wanted", "neurons_hit", "neurons_read", "bytes_read", "n_reads", "n_tokens", "cache_bytes")
    return {
        "n_tokens": ids.shape[1],
        "dtype": str(flash.dtype).removeprefix("torch."),
        "layers": rows,
        "same_argmax": float((logits.argmax(-1) == flash_logits.argmax(-1)).float().mean()),
        "largest_logit_difference": float((logits - flash_logits).abs().max()),
        "stats": {key: counters[key] for key in kept},
    }


def text_ids(args: Any, dense: Any, tokenizer: Any) -> Any:
    """[1, n] ids: the start of --text, or the prompt and what the dense model goes on to write (sampled, seed 0)."""
    import torch

    if args.text:
        text = Path(args.text).read_text(encoding="utf-8")[: args.tokens * 16]
        return tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens]
    ids = tokenizer(common.PROMPT, return_tensors="pt").input_ids[:, : args.tokens]
    torch.manual_seed(0)
    n = args.tokens - ids.shape[1]
    if n > 0:
        mask = torch.ones_like(ids)
        ids = dense.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=n, min_new_tokens=n)
    return ids


def print_found(found: dict[str, Any]) -> None:
    """Per layer: what fires, what is wanted, their ratio, the misses."""
    rows = [["layer", "neurons", "fire", "wanted", "wanted / fired", "misses"]]
    for r in [*found["layers"], found["total"]]:
        slots = r["n_neurons"] * found["n_tokens"]
        rows.append([
            r["layer"], str(r["n_neurons"]), f"{r['fired'] / slots:.2%}", f"{r['wanted'] / slots:.2%}",
            f"{r['wanted'] / max(1, r['fired']):.3f}", str(r["misses"]),
        ])  # fmt: skip
    print(common.table(rows))
    s = found["stats"]
    print(
        f"flash run: {s['neurons_wanted']} neurons wanted, {s['neurons_hit']} in DRAM, {s['neurons_read']} read; "
        f"same next token as dense at {found['same_argmax']:.2%} of positions, logits differ by "
        f"{found['largest_logit_difference']:.2g} at most"
    )


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(SHIPPED), help="folder of a ReLU model (default: the shipped one)")
    parser.add_argument("--text", help="text file to read (default: a built-in prompt, continued by the model)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to read (default 512)")
    parser.add_argument("--bits", type=int, default=8, help="bits of the sketch, 4 to 8 (default 8)")
    parser.add_argument("--delta", type=float, default=1e-9, help="failure probability per decision (default 1e-9)")
    parser.add_argument("--memory", default="256MiB", help="memory of the flash run (default 256MiB)")
    args = parser.parse_args()
    if args.smoke:
        args.tokens = 24
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    info = common.begin("certified: neurons wanted by the certified gate for each that truly fires")
    source = Path(args.model)
    if not (source / "config.json").is_file():
        print(f"skipped: there is no model in {source.name}")
        return
    work = Path(tempfile.mkdtemp(prefix="hf_flash-certified-"))
    try:
        found = compare(args, source, work / "flash")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    keys = ("n_neurons", "fired", "wanted", "misses", "wanted_in_flash_run")
    found["total"] = {"layer": "all", **{key: sum(row[key] for row in found["layers"]) for key in keys}}
    print(
        f"model: {source.name} ({found['dtype']}); {found['n_tokens']} tokens read one by one; sketch of {args.bits} "
        f"bits, delta {args.delta:g}\nceiling: wanted / fired 1.000, no misses"
    )
    print_found(found)
    right = found["total"]["misses"] == 0
    head = {"benchmark": "certified", "model": source.name, "bits": args.bits, "delta": args.delta}
    common.finish({**head, **found, "right": right, "machine": info}, args.json)
    if not right:
        raise SystemExit("certified: a neuron that fires was not wanted")


if __name__ == "__main__":
    main()
