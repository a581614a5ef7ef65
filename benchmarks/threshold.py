"""What does the gate `threshold` cost in quality, what does it save in bytes, and does it compute CATS' formula?

A SiLU or GELU model on flash with thresholds (`hf-flash calibrate`) reads a text at several sparsities. Beside it the
same text under the stock model with its activations cut at the same thresholds, in plain torch: what the gate would
give if its sketch missed no neuron. Perplexity is over windows that do not overlap; bytes per token are those of
decoding, one token at a time under the cap, beside the gate `all` under the same cap.

--smoke takes the small model that ships with hf_flash with its ReLU exchanged for SiLU, which writes nonsense.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import common

LARGEST_DIFFERENCE = 0.01  # of the perplexities of the gate and of the formula, relative


def parse() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="stock folder of a SiLU or GELU model")
    parser.add_argument("--flash", help="its flash folder, with thresholds")
    parser.add_argument("--text", help="UTF-8 text that the thresholds were not set on")
    parser.add_argument("--tokens", type=int, default=6144, help="of the text (default 6144)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a pass (default 1024)")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded for the bytes (default 64)")
    parser.add_argument("--sparsity", type=common.shares, default=[0.3, 0.5, 0.7], help="(default 0.3,0.5,0.7)")
    parser.add_argument("--memory", default="300MiB", help="cap of the flash model (default 300MiB)")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.window, args.decode, args.sparsity, args.memory = 256, 64, 8, [0.5], "64MiB"
    return args


def smoke_model(args: Any, work: Path) -> None:
    """A SiLU model of the shipped one's weights, repacked and with thresholds from the pages beside this folder."""
    import hf_flash
    from hf_flash.demo import MODEL

    stock = shutil.copytree(MODEL, work / "silu")
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({**config, "activation_function": "silu"}))
    pages = [page.read_text(encoding="utf-8") for page in sorted((common.REPO / "docs").glob("*.md"))]
    (work / "pages.txt").write_text("".join(pages[1:]))
    (work / "other.txt").write_text(pages[0])
    hf_flash.calibrate(stock, work / "pages.txt", work / "flash", memory="1GiB", max_tokens=2048, progress=False)
    args.model, args.flash, args.text = str(stock), str(work / "flash"), str(work / "other.txt")


def formula(args: Any, text: Any, dtype: Any) -> dict[float, float]:
    """Perplexity of the stock model with its activations cut, by sparsity; 0 is the stock model itself."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM

    from hf_flash.families import find_blocks, get_activation
    from hf_flash.gate_file import GateFile
    from hf_flash.gates import Thresholded
    from hf_flash.gates.threshold import threshold_at
    from hf_flash.measures import score_text
    from hf_flash.scoring import Scorer
    from hf_flash.store import GATES_NAME

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    gates, out = GateFile(Path(args.flash) / GATES_NAME), {}
    places = [
        (block, *block.activation.rpartition(".")[::2], get_activation(model, block)) for block in find_blocks(model)
    ]
    for sparsity in (0.0, *args.sparsity):
        for block, parent, name, activation in places:
            if sparsity:
                threshold = threshold_at(gates.levels(block.path), sparsity)
                setattr(model.get_submodule(parent), name, Thresholded(activation, threshold))
        found = score_text(Scorer(model), text, args.window, args.window, 1, tqdm(disable=True))
        out[sparsity] = math.exp(-found.nats / found.tokens)
    return out


def measure(args: Any) -> list[dict[str, Any]]:
    """A row for the dense model, for the gate `all`, and for each sparsity."""
    from hf_flash.evaluate import Evaluation
    from hf_flash.measures import tokens_of
    from hf_flash.session import load_tokenizer

    evaluation = Evaluation(
        args.flash, text=args.text, gates=("all", "threshold"), sparsities=args.sparsity, memory=args.memory,
        window=args.window, max_tokens=args.tokens, decode=args.decode, progress=False,
    )  # fmt: skip
    sides = evaluation.run().sides
    text = tokens_of(args.text, load_tokenizer(args.flash), args.tokens)
    exact = formula(args, text, evaluation.report.dtype)
    rows: list[dict[str, Any]] = [{"side": "dense", "formula": exact[0.0]}]
    for side, sparsity in zip(sides, (0.0, *args.sparsity), strict=True):
        (score,), decoding = side.texts.values(), side.decoding
        assert decoding is not None
        rows.append({
            "side": side.name, "sparsity": sparsity, "perplexity": score.to_dict()["perplexity"],
            "formula": exact[sparsity], "decoded_perplexity": decoding.perplexity, "wanted": decoding.share_wanted,
            "bytes_per_token": decoding.bytes_per_token, "tokens": score.tokens, "dtype": evaluation.report.dtype,
        })  # fmt: skip
    return rows


def main() -> None:
    args = parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    info = common.begin("threshold: perplexity and bytes per token of the gate `threshold` by sparsity")
    if not common.have_hf_flash():
        print("skipped: hf_flash is not installed")
        return
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="hf_flash-threshold-") as work:
        if args.smoke:
            smoke_model(args, Path(work))
        if not (args.model and args.flash and args.text):
            print("skipped: give --model, --flash and --text (or --smoke)")
            return
        rows = measure(args)
    print("ceiling: the formula's perplexity, in plain torch")
    shown = [["", "perplexity", "formula", "decoding", "neurons wanted", "MB read per token"]]
    for row in rows:
        cells = [row.get("perplexity"), row["formula"], row.get("decoded_perplexity")]
        share, n_bytes = row.get("wanted"), row.get("bytes_per_token")
        shown.append([
            row["side"], *("-" if cell is None else f"{cell:.3f}" for cell in cells),
            "-" if share is None else f"{share:.1%}", common.mb(n_bytes) if n_bytes is not None else "-",
        ])  # fmt: skip
    print(common.table(shown))
    right = all(abs(r["perplexity"] / r["formula"] - 1) < LARGEST_DIFFERENCE for r in rows if "perplexity" in r)
    head = {"benchmark": "threshold", "model": Path(args.model).name, "memory": args.memory, "window": args.window}
    common.finish({**head, "rows": rows, "right": right, "machine": info}, args.json)
    if not right:
        raise SystemExit("threshold: the gate's perplexity is not that of the formula")


if __name__ == "__main__":
    main()
