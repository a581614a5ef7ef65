"""Train a small language model whose FFN is mostly silent, from any text you have.

A ReLU gives exactly zero wherever its input is negative. Where it does, the neuron's row of the up projection
and its column of the down projection need not be read: that is the saving hf_flash is about ("LLM in a
flash", 3.1). Plain training leaves many zeros; ProSparse (arXiv 2402.13516, 3.2) gets more with one more term
in the loss,

    cross entropy + weight * sum over layers of mean |activation|

ramped in once the model has learned the bulk of what it will. The right weight differs from model to model
and cannot be guessed, but the wanted share of zeros can be named: --target-zeros. Each step multiplies the
weight by exp(gain * (due - seen)), where the share due climbs in a line from what the model had at
--sparsify-from to the target at --sparsify-until, and stays there.

The rest is ordinary: byte-level BPE, OPT (pre-norm, tied embeddings), AdamW, a learning rate that warms up,
stays, and falls to zero, bf16 autocast over float32 weights. A row is <s> and the next tokens of the text, as
the tokenizer gives a prompt to the model later. Weights are stored in bf16 under a config that says float32:
half the bytes, and greedy tokens computed in float32 have no bf16 near-ties.

    python examples/train_relu_lm.py --text books.txt --valid other.txt --out my-model    # train or resume
    python examples/train_relu_lm.py --valid other.txt --out my-model --eval-only         # measure again
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import shlex
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from grow_lm import grow
from relu_lm import (
    BOS,
    EOS,
    PAD,
    activations,
    encode,
    evaluate,
    progress_interval,
    read_text,
    rows,
    write,
    write_facts,
)
from tokenizers import decoders, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

SHAPE = {  # what a checkpoint cannot be resumed without; the defaults are the model that ships with hf_flash
    "vocab": (4096, "BPE vocabulary"),
    "d-model": (256, "width"),
    "layers": (4, "decoder layers"),
    "ffn": (1536, "FFN neurons per layer"),
    "heads": (4, "attention heads"),
    "seq": (512, "longest context, and the length of a training row"),
    "batch": (8, "rows per step"),
    "seed": (0, "for the weights and the order of the rows"),
}
SCHEDULE = {
    "tokens": (11e6, "tokens to train on"),
    "lr": (1e-3, "peak learning rate"),
    "warmup": (200, "steps of learning rate warmup"),
    "decay-from": (0.4, "share of the run after which the learning rate falls to zero"),
    "weight-decay": (0.1, "AdamW's, on matrices"),
    "target-zeros": (0.92, "wanted share of zero activations; 0 trains without the penalty"),
    "sparsify-from": (0.4, "share of the run where the penalty begins"),
    "sparsify-until": (0.75, "share of the run where the target is due"),
    "gain": (0.2, "how fast the weight of the penalty is steered"),
    "save-minutes": (5.0, "minutes between checkpoints"),
    "export-minutes": (15.0, "minutes between exports of the unfinished model"),
    "eval-tokens": (1e9, "most held-out tokens to measure on"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description="Train a small, sparse ReLU language model on your own text.")
    p.add_argument("--text", type=Path, nargs="+", help="UTF-8 text files to train on")
    p.add_argument("--valid", type=Path, required=True, help="UTF-8 text, never trained on, to measure with")
    p.add_argument("--out", type=Path, required=True, help="folder for the model, in Hugging Face layout")
    p.add_argument("--work-dir", type=Path, help="folder for checkpoint and tokens (default: OUT-training)")
    p.add_argument("--grow", type=Path, help="begin from this smaller model of this script's, with its tokenizer")
    p.add_argument("--eval-only", action="store_true", help="train nothing, measure the model in OUT")
    p.add_argument("--max-hours", type=float, help="end by then, tokens left or not; the schedule follows")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    p.add_argument("--document-prefix", default="# Title: ", help="a line that begins so opens a document")
    p.add_argument("--data-note", default="", help="a sentence about the data, for the model card")
    p.add_argument("--license", default="", help="licence id for the model card, such as apache-2.0")
    for title, options in (("shape", SHAPE), ("schedule", SCHEDULE)):
        group = p.add_argument_group(title)
        for name, (default, what) in options.items():
            what = f"{what} (default: {default:g})"
            group.add_argument(f"--{name}", type=type(default), default=default, help=what)
    args = p.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.work_dir = args.work_dir or args.out.with_name(args.out.name + "-training")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no GPU here. Leave --device out to train on the CPU.")
    if not args.eval_only and not args.text:
        p.error("--text: nothing to train on. Name UTF-8 files, or add --eval-only to measure OUT.")
    if not 260 <= args.vocab <= 65536:
        p.error(f"--vocab {args.vocab}: must be 260 (the bytes and 4) to 65536 (ids are kept in 16 bits).")
    if args.d_model % args.heads:
        p.error(f"--d-model {args.d_model} does not divide into --heads {args.heads}. Choose a multiple.")
    return args


def train_tokenizer(texts: list[str], vocab: int, seq: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts <s> first, as each training row does, and pads on the left."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all of it, so that no byte is ever unknown
    options = {"special_tokens": [PAD, BOS, EOS], "initial_alphabet": alphabet, "show_progress": False}
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab, **options))
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", model_max_length=seq, **names)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that every transformers knows, without what loading it left behind."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "backend")}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write(path, lambda f: f.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode()))


def batch_at(tokens: np.ndarray, step: int, args: argparse.Namespace) -> Tensor:
    """Give the rows of one step, [batch, 1 + seq].

    A function of the step alone, so that a resumed run goes on exactly. Each epoch cuts the stream at another
    offset and takes its rows in another order.
    """
    seq, per_epoch = args.seq, (len(tokens) // args.seq - 1) // args.batch
    epoch, at = divmod(step, per_epoch)
    rng = np.random.default_rng([args.seed, epoch])
    offset = int(rng.integers(seq))
    picked = offset + seq * rng.permutation(per_epoch * args.batch)[at * args.batch : (at + 1) * args.batch]
    return rows(np.concatenate([tokens[i : i + seq] for i in picked]), seq, bos=1)


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Give tokenizer and training stream, from the work folder where an earlier run like this left them."""
    texts = [read_text(path) for path in args.text]
    read_text(args.valid)  # a bad held-out file should show now, not after hours
    run = {name: vars(args)[name.replace("-", "_")] for name in SHAPE}
    run["grown from"] = str(args.grow or "nothing")
    run["text of SHA-256"] = hashlib.sha256(args.document_prefix.join(texts).encode()).hexdigest()
    saved, folder = args.work_dir / "run.json", args.work_dir / "tokenizer"
    if saved.exists():
        earlier = json.loads(saved.read_text())
        if differs := [f"{k} {earlier.get(k)}, not {run[k]}" for k in run if run[k] != earlier.get(k)]:
            advice = "Ask for the same, or name another --work-dir."
            sys.exit(f"{args.work_dir}: holds a run with {'; '.join(differs)}. {advice}")
        return AutoTokenizer.from_pretrained(folder), np.load(args.work_dir / "tokens.npy", mmap_mode="r")
    if args.grow:
        tokenizer = AutoTokenizer.from_pretrained(args.grow)
    else:
        tqdm.write(f"training a {args.vocab}-token BPE on {sum(map(len, texts)) / 1e6:.1f} M characters")
        tokenizer = train_tokenizer(texts, args.vocab, args.seq)
    tokens = encode(tokenizer, texts, args.document_prefix)
    if len(tokens) < (need := args.seq * (args.batch + 1)):
        advice = "Add text, or lower --batch or --seq."
        sys.exit(f"{args.text[0]}: {len(tokens)} tokens, a step needs {need}. {advice}")
    save_tokenizer(tokenizer, folder)
    write(args.work_dir / "tokens.npy", lambda f: np.save(f, tokens))
    write(saved, lambda f: f.write(json.dumps(run).encode()))
    return tokenizer, tokens


def build_model(args: argparse.Namespace, vocab: int) -> OPTForCausalLM:
    """Build a pre-norm OPT with ReLU and tied embeddings; a small model on much text needs no dropout."""
    config = transformers.OPTConfig(
        vocab_size=vocab,
        hidden_size=args.d_model,
        word_embed_proj_dim=args.d_model,
        num_hidden_layers=args.layers,
        ffn_dim=args.ffn,
        num_attention_heads=args.heads,
        max_position_embeddings=args.seq,
        activation_function="relu",
        do_layer_norm_before=True,
        tie_word_embeddings=True,
        **{"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    return OPTForCausalLM(config)


class Trainer:
    """One run: model, optimizer and the numbers that say how far it is, all of them in the checkpoint."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray):
        self.args, self.tokenizer, self.tokens = args, tokenizer, tokens
        torch.manual_seed(args.seed)
        model = build_model(args, len(tokenizer))
        if args.grow:
            grow(OPTForCausalLM.from_pretrained(args.grow), model)
        self.model = model.to(args.device).train()
        params = list(self.model.parameters())
        matrices = {"params": [p for p in params if p.dim() > 1], "weight_decay": args.weight_decay}
        vectors = {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}  # thresholds, norms
        self.optimizer = torch.optim.AdamW([matrices, vectors], lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.zeros, self.zeros_at_start, self.weight = 0.0, -1.0, 0.03
        self.path = args.work_dir / "checkpoint.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            vars(self).update(state["numbers"])
            tqdm.write(f"resuming {self.path} at step {self.step}")

    def save(self) -> None:
        """Write the checkpoint."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, (int, float))}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        write(self.path, lambda f: torch.save({**state, "numbers": numbers}, f))

    @property
    def tokens_seen(self) -> int:
        return self.step * self.args.batch * self.args.seq

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by tokens or by time, whichever ends first."""
        by_time = self.seconds / 3600 / self.args.max_hours if self.args.max_hours else 0.0
        return min(1.0, max(by_time, self.tokens_seen / self.args.tokens))

    def learning_rate(self) -> float:
        """Linear warmup, constant, linear decay to zero."""
        falling = (1 - self.progress) / max(1e-9, 1 - self.args.decay_from)
        return self.args.lr * min(1.0, (self.step + 1) / self.args.warmup, falling)

    def penalty_weight(self) -> float:
        """Steer the weight of the penalty towards the share of zeros that is due now; 0 before it begins."""
        args = self.args
        if args.target_zeros <= 0 or self.progress < args.sparsify_from:
            return 0.0
        if self.zeros_at_start < 0:
            self.zeros_at_start = self.zeros
        ramp = (self.progress - args.sparsify_from) / max(1e-9, args.sparsify_until - args.sparsify_from)
        due = self.zeros_at_start + min(1.0, ramp) * max(0.0, args.target_zeros - self.zeros_at_start)
        self.weight = min(10.0, max(1e-3, self.weight * math.exp(args.gain * (due - self.zeros))))
        return self.weight

    def status(self) -> str:
        """What the progress line says of the model."""
        text = f"{self.tokens_seen / 1e6:.2f} M tokens, loss {self.loss:.3f}, {self.zeros:.1%} zeros"
        return f"{text}, penalty {self.weight:.3g}"

    def train_step(self, seen: list[Tensor]) -> None:
        """Take one step on cross entropy and the penalty on what the ReLUs let through."""
        batch = batch_at(self.tokens, self.step, self.args).to(self.args.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        seen.clear()
        with torch.autocast(self.args.device, torch.bfloat16):
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits  # [batch, seq, vocab]
        total = loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        if weight := self.penalty_weight():
            total = loss + weight * sum(a.mean(dtype=torch.float32) for a in seen)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not math.isfinite(value := loss.item()):
            sys.exit(f"step {self.step}: loss is {value}. Start anew with --lr below {self.args.lr:g}.")
        first = math.isnan(self.loss)
        self.loss = value if first else 0.98 * self.loss + 0.02 * value
        if first or self.step % 4 == 0:  # counting costs a pass over the activations
            zeros = 1 - sum(int(a.count_nonzero()) for a in seen) / sum(a.numel() for a in seen)
            self.zeros = zeros if first else 0.8 * self.zeros + 0.2 * zeros
        self.step += 1

    def run(self) -> None:
        """Train to the end, saving and exporting on the way; Ctrl-C and SIGTERM leave a checkpoint."""
        stop: list[int] = []
        signals = (signal.SIGINT, signal.SIGTERM)
        old = [signal.signal(s, lambda signum, _: stop.append(signum)) for s in signals]
        saved = time.monotonic()
        exported = saved - 60 * max(0.0, self.args.export_minutes - 3)  # the first one after three minutes
        bar = tqdm(total=1000, initial=int(1000 * self.progress), mininterval=progress_interval())
        bar.bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        start_tokens, start_seconds = self.tokens_seen, self.seconds
        with activations(self.model) as seen, bar:
            while self.progress < 1 and not stop:
                began = time.monotonic()
                self.train_step(seen)
                now = time.monotonic()
                self.seconds += now - began
                speed = (self.tokens_seen - start_tokens) / (self.seconds - start_seconds)
                bar.set_postfix_str(f"{self.status()}, {speed:,.0f} tok/s", refresh=False)
                bar.update(int(1000 * self.progress) - bar.n)
                if now - saved > 60 * self.args.save_minutes:
                    self.save()
                    saved = now
                if now - exported > 60 * self.args.export_minutes:
                    export(self)
                    exported = now
        for s, handler in zip(signals, old, strict=True):
            signal.signal(s, handler)
        self.save()
        if stop:
            tqdm.write(f"stopped at step {self.step}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + stop[0])


def training_facts(trainer: Trainer) -> dict[str, Any]:
    """What training.json says of the run. Paths lose their folders, which are nobody's business."""
    args = trainer.args
    command = shlex.join(["python", "examples/train_relu_lm.py", *args.argv])
    for path in (*args.text, args.valid, args.work_dir, args.out, *filter(None, [args.grow])):
        command = command.replace(str(path), path.name)
    return {
        "finished": trainer.progress >= 1,
        "command": command,
        "parameters": trainer.model.num_parameters(),
        "tokens": trainer.tokens_seen,
        "steps": trainer.step,
        "hours": round(trainer.seconds / 3600, 3),
        "train_loss": round(trainer.loss, 4),
        "penalty_weight": trainer.weight,
        "train_text": [{"name": path.name, "bytes": path.stat().st_size} for path in args.text],
        "train_text_tokens": len(trainer.tokens),
        "data_note": args.data_note,
        "license": args.license,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def measure(folder: Path, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Measure the model in `folder`, a little where unfinished, and write facts and figures beside it."""
    most = args.eval_tokens if facts["finished"] else min(args.eval_tokens, 50_000)
    facts["held_out"] = evaluate(folder, args.valid, args.document_prefix, args.device, args.batch, most)
    write_facts(folder, facts)


def export(trainer: Trainer) -> dict[str, Any]:
    """Round to bf16, write and measure the model in a folder beside OUT, then move its files into OUT."""
    out, facts = trainer.args.out, training_facts(trainer)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as name:
        folder = Path(name)
        model = build_model(trainer.args, len(trainer.tokenizer))
        model.load_state_dict(trainer.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        model.config.dtype = torch.float32  # stored in bf16, computed in float32
        model.config.save_pretrained(folder)
        save_tokenizer(trainer.tokenizer, folder)
        measure(folder, facts, trainer.args)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
            path.replace(out / path.name)
    return facts


def keep_freed_memory() -> None:
    """Ask glibc to keep a step's big buffers for the next: faulting them in anew can double its time."""
    with suppress(OSError, AttributeError, TypeError):  # another libc: slower, nothing else
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def main(argv: list[str] | None = None) -> None:
    """Train and export, or measure only."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.eval_only:
        if not (args.out / "training.json").exists():
            sys.exit(f"{args.out}: no training.json, so no model of this script's. To train one: --text FILE")
        facts = json.loads((args.out / "training.json").read_text())
        measure(args.out, facts, args)
    else:
        trainer = Trainer(args, *prepare_text(args))
        tqdm.write(f"{trainer.model.num_parameters():,} parameters, {len(trainer.tokens):,} tokens of text")
        trainer.run()
        facts = export(trainer)
    tqdm.write(json.dumps({"model": str(args.out), "trained_tokens": facts["tokens"], **facts["held_out"]}))


if __name__ == "__main__":
    keep_freed_memory()
    main()
