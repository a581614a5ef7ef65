"""What do trained predictors cost in quality, and what do they save in bytes?

A calibrated flash checkpoint (`hf-flash calibrate`) reads a text that its predictors never saw, token by token with a
KV cache, as in decoding: many tokens at once would read what any of them wants, and lose less. Counted are recall
(neurons that fire and are read, of those that fire in the dense model), neurons read per token, perplexity beside the
dense model's, and the bytes read per token with a cache of some shares of the FFN: gate `predicted` beside `certified`,
which loses nothing. With a lookahead, the share of the wanted neurons that were in DRAM when their layer asked.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import common

WARM_TOKENS = 64  # not counted in bytes per token: the cache is filling


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--model", required=False, help="stock folder, the oracle (default: the shipped model)")
    parser.add_argument("--flash", help="its calibrated flash folder")
    parser.add_argument("--text", help="UTF-8 text that was not calibrated on")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens for perplexity (default 8192)")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence (default 512)")
    parser.add_argument("--io-tokens", type=int, default=512, help="tokens for each cache size (default 512)")
    parser.add_argument("--cache", type=common.shares, default=[0.1, 0.2, 0.5], help="shares of the FFN in DRAM")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.length, args.io_tokens, args.cache = 64, 32, 96, [0.5]
    return args


def smoke_checkpoint(work: Path) -> tuple[Path, Path]:
    """The shipped model, calibrated in seconds on the pages beside this folder."""
    import hf_flash
    from hf_flash.demo import MODEL

    text = work / "pages.txt"
    text.write_text("".join(page.read_text(encoding="utf-8") for page in sorted((common.REPO / "docs").glob("*.md"))))
    options: dict[str, Any] = {"max_tokens": 3072, "epochs": 1, "precision": 0.1, "lookahead": True}
    hf_flash.calibrate(MODEL, text, work / "flash", memory="1GiB", progress=False, **options)
    return work / "flash", text


def rows_of(args: Any, source: Path) -> Any:
    """[n, length] token ids from all over the text."""
    from transformers import AutoTokenizer

    from hf_flash.corpus import sequences

    return sequences(args.text, AutoTokenizer.from_pretrained(source), args.length, args.tokens)


def one_by_one(model: Any, row: Any) -> float:
    """Feed a sequence token by token with a KV cache; returns the sum of its negative log likelihoods."""
    import torch

    from hf_flash.kv import carried

    past, total = {}, 0.0
    with torch.inference_mode():
        for i in range(len(row) - 1):
            out = model(row[None, i : i + 1], **past, use_cache=True)
            past = carried(out)
            total -= float(out.logits[0, -1].float().log_softmax(-1)[row[i + 1]])
    return total


def dense_side(source: Path, dtype: Any, rows: Any) -> tuple[float, int]:
    """Perplexity of the dense model, and the neurons that fired, over all layers and tokens but each row's last."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_flash.tap import tap

    class Counter:
        n = 0

        def observe(self, layer: str, x: Any, activations: Any) -> None:
            self.n += int((activations != 0).sum())

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    counter, total = Counter(), 0.0
    with torch.inference_mode(), tap(model, counter):
        for row in rows:
            logits = model(row[None, :-1]).logits[0].float().log_softmax(-1)
            total -= float(logits.gather(1, row[1:, None]).sum())
    return math.exp(total / (rows.numel() - len(rows))), counter.n


def open_flash(folder: Path, gate: str, memory: Any, length: int, lookahead: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    import hf_flash

    config = hf_flash.FlashConfig(memory=memory, gate=gate, context=length, lookahead=lookahead)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def quality(folder: Path, source: Path, rows: Any, length: int) -> dict[str, Any]:
    """Gate `predicted` beside the dense model, with everything in DRAM."""
    import hf_flash

    model = open_flash(folder, "predicted", "8GiB", length)
    total = sum(one_by_one(model, row) for row in rows)
    n = rows.numel() - len(rows)
    stats = hf_flash.stats(model)
    n_neurons = sum(layer.n_neurons for layer in model._hf_flash.store.layers.values())
    perplexity, n_fired = dense_side(source, model.dtype, rows)
    return {
        "n_tokens": n, "n_neurons": n_neurons, "dense_perplexity": perplexity,
        "perplexity": math.exp(total / n), "change": math.exp(total / n) / perplexity - 1,
        "wanted_per_token": stats.neurons_wanted / n, "fired_per_token": n_fired / n,
        "recall": stats.neurons_fired / n_fired, "precision": stats.neurons_fired / stats.neurons_wanted,
    }  # fmt: skip


def cap_for(folder: Path, gate: str, share: float, length: int) -> tuple[int, float]:
    """The smallest cap, to 64 KiB, that holds a share of the FFN or more and every other matrix; the share it holds."""
    from hf_flash.config import FlashConfig
    from hf_flash.preview import look

    preview = look(folder, FlashConfig(gate=gate, context=length))
    lookups = {matrix.path for matrix in preview.demand.matrices if matrix.lookup}

    def held(cap: int) -> float:
        plan = preview.with_options(memory=cap).plan()
        return 0.0 if set(plan.streamed) - lookups else plan.parts["FFN cache"] / preview.ffn_bytes

    low, high = preview.smallest_cap, preview.smallest_cap + 2 * preview.n_bytes + (64 << 20)
    while high - low > 1 << 16:
        middle = (low + high) // 2
        low, high = (low, middle) if held(middle) >= share else (middle, high)
    return high, held(high)


def counters_by_layer(model: Any) -> dict[str, Any]:
    """A set of counters for each FFN, in place of those that the layers share."""
    from hf_flash.ffn import FlashFFN
    from hf_flash.stats import FlashStats

    out = {}
    for path, module in model.named_modules():
        if isinstance(module, FlashFFN):
            engine: Any = module.engine
            engine._stats = engine.cache._stats = out[path] = FlashStats()
            if engine._step is not None:
                out[path].count_in(engine._step._s.counters)
                out[path].reset()  # from now on
    return out


def bytes_read(folder: Path, gate: str, share: float, rows: Any, length: int, lookahead: bool) -> dict[str, Any]:
    """Bytes per token with a cache of a share of the FFN, after the first tokens."""
    from hf_flash import lookahead as ahead
    from hf_flash.gate_file import GateFile

    cap, held = cap_for(folder, gate, share, length)
    model = open_flash(folder, gate, cap, length)
    gates = GateFile(model._hf_flash.gates_file)
    if lookahead:  # always, not only where a token gets faster: its guesses are what is measured
        pairs = [(said["from"], path, gates.predictor(path, lookahead=True)) for path, said in gates.lookahead.items()]
        ahead.install(model, pairs, _Always())
    one_by_one(model, rows[0][: WARM_TOKENS + 1])
    layers = counters_by_layer(model)
    for row in rows:
        one_by_one(model, row)
    n = rows.numel() - len(rows)
    ffn = sum(layer.rows.n_rows * layer.rows.row_bytes for layer in model._hf_flash.store.layers.values())

    def total(name: str, paths: Any) -> float:
        return sum(getattr(layers[path], name) for path in paths)

    def in_dram(paths: Any) -> float:
        found = total("neurons_hit", paths) + (total("neurons_early", paths) if lookahead else 0)
        return found / max(1, total("neurons_wanted", paths))

    guessed = [path for path in layers if path in gates.lookahead]
    return {
        "gate": gate, "lookahead": lookahead, "asked_share": share, "cache_share": held, "memory": cap,
        "bytes_per_token": total("bytes_read", layers) / n, "share_read": total("bytes_read", layers) / n / ffn,
        "wanted_per_token": total("neurons_wanted", layers) / n,
        "in_dram_before": total("neurons_hit", layers) / total("neurons_wanted", layers),
        "in_dram_when_asked": in_dram(layers), "in_dram_when_asked_of_guessed_layers": in_dram(guessed),
        "in_dram_before_of_guessed_layers": total("neurons_hit", guessed) / max(1, total("neurons_wanted", guessed)),
    }  # fmt: skip


class _Always:
    """A trial that has decided."""

    on = True

    def next_token(self, now: float | None) -> None:
        pass


def main() -> None:
    args = parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    info = common.begin("predicted: recall, perplexity and bytes of the gate `predicted` on text it was not trained on")
    if not common.have_hf_flash():
        print("skipped: hf_flash is not installed")
        return
    import tempfile

    import torch

    from hf_flash.demo import MODEL
    from hf_flash.gate_file import GateFile
    from hf_flash.store import GATES_NAME

    torch.set_num_threads(args.threads)
    source = Path(args.model) if args.model else MODEL
    with tempfile.TemporaryDirectory(prefix="hf_flash-predicted-") as work:
        folder = Path(args.flash) if args.flash else None
        if args.smoke:
            folder, args.text = smoke_checkpoint(Path(work))
        if folder is None or args.text is None:
            print("skipped: give a calibrated folder with --flash and a text with --text (or --smoke)")
            return
        rows = rows_of(args, source)
        found = quality(folder, source, rows, args.length)
        print(
            f"{found['n_tokens']} tokens one by one: recall {found['recall']:.2%}, precision {found['precision']:.1%}, "
            f"{found['wanted_per_token']:.0f} neurons read per token for {found['fired_per_token']:.0f} that fire, of "
            f"{found['n_neurons']}; perplexity {found['perplexity']:.3f}, dense {found['dense_perplexity']:.3f} "
            f"({found['change']:+.2%})"
        )
        some = rows[: max(1, args.io_tokens // args.length)]
        ways = [("certified", False), ("predicted", False)]
        ways += [(gate, True) for gate, _ in ways] if GateFile(folder / GATES_NAME).lookahead else []
        io = [bytes_read(folder, gate, share, some, args.length, ahead) for share in args.cache for gate, ahead in ways]
    table = [["cache", "gate", "lookahead", "bytes/token", "of the FFN", "in DRAM when asked", "after the first layer"]]
    table += [
        [f"{r['cache_share']:.0%}", r["gate"], "yes" if r["lookahead"] else "no",
         f"{r['bytes_per_token'] / 1e3:.0f} kB", f"{r['share_read']:.2%}",
         f"{r['in_dram_when_asked']:.1%}", f"{r['in_dram_when_asked_of_guessed_layers']:.1%}"]
        for r in io
    ]  # fmt: skip
    print(common.table(table))
    common.finish({"benchmark": "predicted", "machine": info, "model": source.name, **found, "io": io}, args.json)


if __name__ == "__main__":
    main()
