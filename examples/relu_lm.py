"""Measure a small ReLU language model: text to rows of tokens, rows to figures, figures to a model card.

`evaluate` takes a stored model the way a user meets it: loaded by from_pretrained, in float32, on text it
never saw. Its two figures belong together: zeros without perplexity say nothing, as a broken model can be
very sparse.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2: the tokenizer's trainer numbers special tokens first


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, or leave with what is wrong and what to do about it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        sys.exit(f"{path}: no such file. Name a UTF-8 text file.")
    except IsADirectoryError:
        sys.exit(f"{path}: a folder, not a file. Name the files in it: {path}/*.txt")
    except UnicodeDecodeError as e:
        fix = f"iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.txt"
        found = f"byte {e.object[e.start]:#04x} at offset {e.start}"
        sys.exit(f"{path}: not UTF-8 ({found}). Convert it, perhaps so: {fix}")
    if not text.strip():
        sys.exit(f"{path}: empty. Name a file with text in it; some megabytes give a model that makes sense.")
    return text


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], prefix: str) -> np.ndarray:
    """Turn texts into one uint16 stream with </s> after each document and no <s>: rows bring that.

    A line that begins with `prefix` opens a document; so does a text. Lines can be encoded one by one because
    the tokenizer was trained so: none of its tokens reaches over a line's end.
    """
    lines: list[str] = []
    for text in texts:
        for i, line in enumerate(text.splitlines(keepends=True)):
            lines += [EOS, line] if i and prefix and line.startswith(prefix) else [line]
        lines.append(EOS)
    stream = []
    for at in tqdm(range(0, len(lines), 4096), "encoding", mininterval=progress_interval()):
        block = tokenizer.backend_tokenizer.encode_batch_fast(lines[at : at + 4096], add_special_tokens=False)
        stream += [np.array(line.ids, dtype=np.uint16) for line in block]
    return np.concatenate(stream)


def rows(tokens: np.ndarray, seq: int, bos: int) -> Tensor:
    """Cut a stream into int64 [n_rows, 1 + seq], <s> before seq tokens; what fills no row is left out."""
    n = len(tokens) // seq
    cut = np.full((n, 1 + seq), bos, dtype=np.int64)
    cut[:, 1:] = tokens[: n * seq].reshape(n, seq)
    return torch.from_numpy(cut)


def write(path: Path, writer: Callable[[Any], Any]) -> None:
    """Call `writer` on a file beside `path`, then rename it: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        writer(f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def progress_interval() -> float:
    """Seconds between updates of a progress line: often on a screen, rarely in a log file."""
    return 0.2 if sys.stderr.isatty() else 30.0


def activations(model: OPTForCausalLM) -> AbstractContextManager[list[Tensor]]:
    """Collect what each layer's ReLU gives, n_layers of [..., d_ffn]; clear the list between passes."""
    return outputs([layer.activation_fn for layer in model.model.decoder.layers])


@contextmanager
def outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what some modules give, in the order in which they are called; clear the list between passes."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _module, _args, out: seen.append(out)) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def evaluate(
    folder: Path,
    text_file: Path,
    prefix: str,
    device: str = "cpu",
    batch: int = 8,
    most_tokens: float = math.inf,
) -> dict[str, Any]:
    """Measure the model in `folder` on a text: perplexity, and the share of FFN activations that are zero.

    Rows do not overlap: a token is predicted from those before it in its row, often fewer than the context
    allows, so a sliding window would give a somewhat lower perplexity.
    """
    tokenizer, text = AutoTokenizer.from_pretrained(folder), read_text(text_file)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    tokens = encode(tokenizer, [text], prefix)
    bytes_per_token = len(text.encode()) / len(tokens)
    seq = min(model.config.max_position_embeddings, len(tokens))
    held_out = rows(tokens[: int(max(seq, min(most_tokens, len(tokens))))], seq, tokenizer.bos_token_id)
    nll, zeros, count = 0.0, np.zeros(model.config.num_hidden_layers), 0
    with activations(model) as seen:
        for ids in tqdm(held_out.to(device).split(batch), "measuring", mininterval=progress_interval()):
            seen.clear()
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            nll += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            zeros += [a.numel() - int(a.count_nonzero()) for a in seen]
            count += seen[0].numel()
    per_token = nll / held_out[:, 1:].numel()
    return {
        "text": text_file.name,
        "tokens": held_out[:, 1:].numel(),
        "perplexity": round(math.exp(per_token), 3),
        "bits_per_byte": round(per_token / math.log(2) / bytes_per_token, 4),
        "zeros": round(float(zeros.mean()) / count, 4),
        "zeros_per_layer": [round(z / count, 4) for z in zeros.tolist()],
    }


CARD = """---
{license_line}library_name: transformers
pipeline_tag: text-generation
tags: [opt, relu, sparse-activations, hf_flash]
---
# A small ReLU language model with silent FFN neurons

{unfinished}OPT architecture, {parameters:,} parameters: {num_hidden_layers} layers of width {hidden_size},
{ffn_dim} ReLU neurons each, {vocab_size}-token byte-level BPE, context of {max_position_embeddings} tokens.
Made to run and test sparse FFN inference on: it continues text in the manner of what it was trained on, and
knows nothing. Weights are stored in bf16; `config.json` asks for float32 arithmetic.

**Data.** {data} {train_text_tokens:,} tokens in all.

**Training.** {steps:,} steps of AdamW, {tokens:,} tokens, with an L1 penalty on FFN activations steered to
a share of zeros:

    {command}

{note}**Measured** on the weights as stored, on `{text}` ({held_out_tokens:,} tokens, never trained on):
perplexity **{perplexity:.2f}** per token, {bits_per_byte:.3f} bits per byte;
**{zeros:.1%}** of FFN activations are exactly zero.

| layer | zeros |
| --- | --- |
{layers}
"""


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write training.json, and the model card that says the same in words."""
    held_out, config = facts["held_out"], json.loads((folder / "config.json").read_text())
    words = {
        "license_line": f"license: {facts['license']}\n" if facts["license"] else "",
        "unfinished": "" if facts["finished"] else "**Unfinished: written in the middle of training.**\n\n",
        "data": facts["data_note"] or ", ".join(f"`{t['name']}`" for t in facts["train_text"]) + ":",
        "note": facts["note"] + "\n\n" if facts.get("note") else "",
        "layers": "\n".join(f"| {i} | {z:.1%} |" for i, z in enumerate(held_out["zeros_per_layer"])),
        "held_out_tokens": held_out["tokens"],
    }
    card = CARD.format(**{**config, **held_out, **facts, **words})
    write(folder / "README.md", lambda f: f.write(card.encode()))
    write(folder / "training.json", lambda f: f.write((json.dumps(facts, indent=2) + "\n").encode()))
