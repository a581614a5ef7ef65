"""Are the greedy tokens on flash the dense model's own?

Two models: the small ReLU model that ships with hf_flash, 20 prompts x 100 tokens with gates `all` and `certified`,
and SmolLM2-135M-Instruct in bfloat16, 5 prompts x 50 tokens with gate `all`. The cap leaves DRAM for about half of the
FFNs, so that flash is really used. Tokens are compared one by one; any difference fails the benchmark.
"""

# ruff: noqa: PLC0415  (--help needs no torch)
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import models

SHIPPED = common.REPO / "hf_flash" / "models" / "relu-books-5m"
PROMPTS = (
    "It was a dark and stormy night, and",
    "The old house stood at the end of",
    "She looked at him for a long time and",
    "In the beginning of the year",
    '"My dear sir," said the captain,',
    "There was once a king who",
    "The train arrived at",
    "He had never seen such a",
    "When the war was over, the soldiers",
    "The garden was full of",
    "I do not remember when",
    "The doctor took his hat and",
    "Far away across the sea",
    '"What shall we do now?" asked',
    "The letter was written in",
    "On the morning of the third day",
    "Nobody in the village knew",
    "The judge leaned forward and",
    "A small boy came running",
    "At last the door opened, and",
)


def compare(folder: Path, converted: Path, gate: str, n_prompts: int, n_tokens: int) -> dict[str, Any]:
    """Generate with both models and count equal tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_flash
    from hf_flash.layout import format_size

    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cap = half_cap(converted, gate)
    config = hf_flash.FlashConfig(memory=cap, context=160, gate=gate)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    flash = AutoModelForCausalLM.from_pretrained(converted, quantization_config=config)
    equal = total = 0
    for prompt in PROMPTS[:n_prompts]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
        want, got = (model.generate(**inputs, **settings)[0] for model in (dense, flash))
        n = inputs["input_ids"].shape[1]
        equal += int((want[n:] == got[n:]).sum())
        total += len(want) - n
    stats = hf_flash.stats(flash).to_dict()
    plan = stats.pop("plan")
    print(
        f"{folder.name}, {str(dense.dtype).removeprefix('torch.')}, gate {gate}, cap {format_size(cap)}: "
        f"{equal} of {total} tokens equal ({n_prompts} prompts x {n_tokens}); "
        f"{format_size(stats['bytes_read'])} read from flash, "
        f"{format_size(plan['parts']['FFN cache'])} of FFNs in DRAM",
        flush=True,
    )
    return {
        "model": folder.name,
        "gate": gate,
        "dtype": str(dense.dtype),
        "memory": cap,
        "equal": equal,
        "total": total,
    }


def half_cap(converted: Path, gate: str) -> int:
    """A cap under which about half of the FFN bytes stay in DRAM."""
    import hf_flash
    from hf_flash.checkpoint import load_json

    flash_bytes = load_json(converted / "config.json")["quantization_config"]["ffn"]["flash_bytes"]
    return int(hf_flash.smallest_cap(converted, context=160, gate=gate) + flash_bytes // 2)


def main() -> None:
    args = common.parser(__doc__).parse_args()
    info = common.begin("tokens: are the greedy tokens on flash the dense model's own?")
    print("ceiling: all of them")
    n_prompts, n_tokens = (2, 8) if args.smoke else (20, 100)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        import hf_flash

        converted = hf_flash.repack(SHIPPED, Path(folder) / "flash", progress=False)
        for gate in ("all", "certified"):
            rows.append(compare(SHIPPED, converted, gate, n_prompts, n_tokens))
    if not args.smoke:
        name = "smollm2"
        rows.append(compare(models.get(name, args.dir), models.converted(name, args.dir), "all", 5, 50))
    common.finish({"benchmark": "tokens", "machine": info, "rows": rows, "smoke": args.smoke}, args.json)
    if any(row["equal"] != row["total"] for row in rows):
        raise SystemExit("tokens: some differ from the dense model's")


if __name__ == "__main__":
    main()
