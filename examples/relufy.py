"""Make a SiLU or GELU model mostly silent: put ReLU in its FFNs, and let the original teach it back.

A ReLU in place of a SiLU breaks a model, which never saw zeros there. Little training mends most of it ("ReLU Strikes
Back", arXiv 2310.04564). Here the student learns the whole distribution that its former self has for each token:

    KL(original || student) + hidden weight * error of hidden states + penalty * sum over layers of mean |activation|

The last term is ProSparse's (arXiv 2402.13516): ramped in along a sine once the model has recovered somewhat, it
silences neurons that matter little. --shift begins with ReLU(x - shift), which silences more from the start; the shift
is held by the FFN's own bias, so stock classes load the result, and training moves it neuron by neuron.

The result is an ordinary transformers folder. `hf-flash repack` gives it the certified gate. Beside it lie relufy.json
with the curve of perplexity, zeros and KL against tokens trained, and relufy.png where matplotlib is installed.

    python examples/relufy.py HuggingFaceTB/SmolLM2-135M my-relu-model --text web.txt --valid other.txt --tokens 1e8
    hf-flash repack my-relu-model my-relu-model-flash

Ctrl-C and SIGTERM leave a checkpoint; the same command goes on from it, to the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from relu_lm import outputs, progress_interval, read_text, write
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_flash.errors import FlashError
from hf_flash.families import find_blocks, get_activation, zero_below

ACTIVATION_OPTIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # of a config
RUN = {  # what a checkpoint cannot be resumed without
    "shift": (0.0, "begin with ReLU(x - shift)"),
    "tokens": (1e6, "tokens to train on"),
    "seq": (256, "tokens of a row"),
    "batch": (4, "rows per step"),
    "lr": (3e-4, "peak learning rate"),
    "warmup": (20, "steps of learning rate warmup"),
    "decay-from": (0.5, "share of the run after which the learning rate falls to zero"),
    "hidden-weight": (0.0, "weight of the hidden states' relative squared error, mean over layers"),
    "penalty": (0.0, "weight of the activation penalty at the end of its ramp"),
    "penalty-from": (0.4, "share of the run where the penalty begins"),
    "penalty-until": (0.8, "share of the run where it is fully there"),
    "seed": (0, "for the order of the rows"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description="Swap a model's FFN activation for ReLU and distil it back to health.")
    p.add_argument("model", help="stock model to begin from and to learn from: folder or Hub repo")
    p.add_argument("out", type=Path, help="folder for the result, in Hugging Face layout")
    p.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files to train on")
    p.add_argument("--valid", type=Path, required=True, help="UTF-8 text, never trained on, to measure with")
    p.add_argument("--work-dir", type=Path, help="folder for the checkpoint (default: OUT-training)")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train (default: cpu)")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    p.add_argument("--points", type=int, default=10, help="points of the curve (default: 10)")
    p.add_argument("--eval-tokens", type=float, default=16384, help="held-out tokens to measure on (default: 16384)")
    p.add_argument("--save-minutes", type=float, default=5.0, help="minutes between checkpoints (default: 5)")
    group = p.add_argument_group("training")
    for name, (default, what) in RUN.items():
        group.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (default: {default:g})")
    args = p.parse_args(argv)
    args.work_dir = args.work_dir or args.out.with_name(args.out.name + "-training")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no GPU here. Leave --device out to train on the CPU.")
    for name in ("tokens", "seq", "batch", "points"):
        if getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name):g}: must be 1 or more.")
    if (args.out / "config.json").exists() and not (args.out / "relufy.json").exists():
        p.error(f"{args.out}: holds a model that this script did not make. Name another folder.")
    return args


def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The original in float32, frozen, and its tokenizer; or leave with why it cannot be had."""
    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None):
            sys.exit(f"{name}: quantized or repacked. Give the stock checkpoint that it was made from.")
        tokenizer = AutoTokenizer.from_pretrained(name)
        teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        sys.exit(f"{name}: {str(error).splitlines()[0]} Name a folder or repo of a causal language model.")
    if not len(tokenizer("a b c").input_ids):
        sys.exit(f"{name}: has no tokenizer. Put its tokenizer files into the folder.")
    return teacher.eval().requires_grad_(False), tokenizer


def activation_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The activation of each FFN, in order."""
    try:
        found = [get_activation(model, block) for block in find_blocks(model)]
    except FlashError as error:
        sys.exit(f"{model.name_or_path}: {error}")
    if not all(isinstance(act, nn.Module) for act in found):
        sys.exit(f"{model.name_or_path}: its FFNs call a function, not a module, so that no config can swap it.")
    return list({id(act): act for act in found}.values())


def make_student(teacher: PreTrainedModel, shift: float) -> PreTrainedModel:
    """The same model with ReLU: another word in its config, the same class, the same weights.

    A shift is subtracted from the bias before the activation; where the FFN has none, the config must allow one
    (Llama's mlp_bias), and the biases that come with it begin at zero.
    """
    name = teacher.name_or_path
    if all(zero_below(act) is not None for act in activation_modules(teacher)) and not shift:
        sys.exit(f"{name}: has ReLU already. `hf-flash repack` takes it as it is; --shift 0.1 would silence more.")
    config = AutoConfig.from_pretrained(name)
    options = [option for option in ACTIVATION_OPTIONS if isinstance(getattr(config, option, None), str)]
    for option in options:
        setattr(config, option, "relu")
    before = [(block.gate or block.up) for block in find_blocks(teacher)]
    if shift and not all(part.bias for part in before):
        if not hasattr(config, "mlp_bias"):
            sys.exit(f"{name}: --shift needs a bias in the FFN, and its config has no mlp_bias. Leave --shift out.")
        config.mlp_bias = True
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if not all(zero_below(act) is not None for act in activation_modules(student)):
        sys.exit(f"{name}: none of its config's {', '.join(ACTIVATION_OPTIONS)} sets the FFN's activation.")
    new = student.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for key in new:
            student.get_parameter(key).zero_()
        for part in (block.gate or block.up for block in find_blocks(student)):
            if shift and part.bias:
                part.bias_of(student.get_parameter(part.bias)).sub_(shift)
    student.name_or_path = name
    return student.eval()  # no dropout: a resumed run goes on exactly


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """Texts as one stream of int32 token ids, without special tokens, a piece of about 100,000 characters at a time."""
    pieces: list[str] = []
    for text in texts:
        size = 0
        for line in text.splitlines(keepends=True):
            if not pieces or size == 0 or size > 100_000:
                pieces.append("")
                size = 0
            pieces[-1] += line
            size += len(line)
    bar = tqdm(pieces, "encoding", mininterval=progress_interval())
    return np.concatenate([np.array(tokenizer(p, add_special_tokens=False).input_ids, np.int32) for p in bar])


def batch_at(tokens: np.ndarray, step: int, args: argparse.Namespace) -> Tensor:
    """The rows of one step, [batch, seq] int64: a function of the step alone, another order each epoch."""
    n_rows = len(tokens) // args.seq
    epoch, at = divmod(step * args.batch, n_rows // args.batch * args.batch)
    picked = np.random.default_rng([args.seed, epoch]).permutation(n_rows)[at : at + args.batch]
    return torch.from_numpy(np.stack([tokens[i * args.seq : (i + 1) * args.seq] for i in picked]).astype(np.int64))


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student), mean over tokens, nats. [..., vocab] logits each."""
    p, q = (F.log_softmax(logits.float().flatten(0, -2), dim=-1) for logits in (teacher, student))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@torch.inference_mode()
def measure(model: PreTrainedModel, teacher: PreTrainedModel | None, held_out: Tensor, batch: int) -> dict[str, Any]:
    """Perplexity on rows of text, zeros by layer, and KL from the teacher where one is given.

    Args:
        held_out: [n, seq]; the first token of a row is not predicted.
    """
    nll = divergence = 0.0
    zeros: np.ndarray | int = 0
    with outputs(activation_modules(model)) as seen:
        for ids in held_out.split(batch):
            seen.clear()
            logits = model(input_ids=ids, use_cache=False).logits
            nll += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            zeros = zeros + np.array([float((a == 0).float().mean()) * len(ids) for a in seen])
            if teacher is not None:
                divergence += kl(teacher(input_ids=ids, use_cache=False).logits, logits).item() * len(ids)
    layers = zeros / len(held_out)
    found = {
        "perplexity": math.exp(nll / held_out[:, 1:].numel()),
        "zeros": float(layers.mean()),
        "zeros_per_layer": [round(z, 4) for z in layers.tolist()],
    }
    return found if teacher is None else {**found, "kl": divergence / len(held_out)}


class Relufier:
    """One run: student, optimizer, curve and step, all of them in the checkpoint."""

    def __init__(
        self, args: argparse.Namespace, teacher: PreTrainedModel, student: PreTrainedModel, tokens: np.ndarray,
        held_out: Tensor,
    ) -> None:  # fmt: skip
        self.args, self.teacher, self.student = args, teacher.to(args.device), student.to(args.device)
        self.tokens, self.held_out = tokens, held_out.to(args.device)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.n_steps = max(1, round(args.tokens / (args.batch * args.seq)))
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.run = {name: getattr(args, name.replace("-", "_")) for name in RUN}
        self.run |= {"model": args.model, "SHA-256 of the tokens": hashlib.sha256(tokens.tobytes()).hexdigest()}
        self.path = args.work_dir / "checkpoint.pt"
        if self.path.exists():
            self._resume(torch.load(self.path, map_location=args.device, weights_only=True))

    def _resume(self, state: dict[str, Any]) -> None:
        if differs := [f"{k} {state['run'].get(k)}, not {v}" for k, v in self.run.items() if state["run"].get(k) != v]:
            advice = "Ask for the same, or name another --work-dir."
            sys.exit(f"{self.args.work_dir}: holds a run with {'; '.join(differs)}. {advice}")
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        tqdm.write(f"resuming {self.path} at step {self.step} of {self.n_steps}", file=sys.stderr)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(), "run": self.run}
        state |= {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        write(self.path, lambda f: torch.save(state, f))

    def penalty(self) -> float:
        """Weight of the activation penalty now: 0, then up along a sine, then all of it."""
        args = self.args
        ramp = (self.step / self.n_steps - args.penalty_from) / max(1e-9, args.penalty_until - args.penalty_from)
        return args.penalty * (1 - math.cos(math.pi * min(1.0, max(0.0, ramp)))) / 2

    def train_step(self, modules: list[nn.Module]) -> float:
        """One step; gives its KL."""
        args, ids = self.args, batch_at(self.tokens, self.step, self.args).to(self.args.device)
        falling = (1 - self.step / self.n_steps) / max(1e-9, 1 - args.decay_from)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (self.step + 1) / args.warmup, falling)
        hidden = bool(args.hidden_weight)
        with torch.autocast(args.device, torch.bfloat16), outputs(modules) as seen:
            with torch.no_grad():
                want = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=hidden)
            got = self.student(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        divergence = loss = kl(want.logits, got.logits)
        if hidden:
            pairs = [(a.float(), b.float()) for a, b in zip(want.hidden_states[1:], got.hidden_states[1:], strict=True)]
            errors = [F.mse_loss(b, a) / a.square().mean() for a, b in pairs]
            loss = loss + args.hidden_weight * sum(errors) / len(errors)
        if weight := self.penalty():
            loss = loss + weight * sum(a.abs().mean(dtype=torch.float32) for a in seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not math.isfinite(value := divergence.item()):
            sys.exit(f"step {self.step}: KL is {value}. Start anew with --lr below {args.lr:g}.")
        self.step += 1
        return value

    def point(self) -> None:
        """Measure, and add a point to the curve."""
        found = measure(self.student, self.teacher, self.held_out, self.args.batch)
        tokens = self.step * self.args.batch * self.args.seq
        self.curve.append({"tokens": tokens, "seconds": round(self.seconds, 1), **found})
        words = f"{tokens:,} tokens: perplexity {found['perplexity']:.2f}, {found['zeros']:.1%} zeros"
        tqdm.write(f"{words}, KL {found['kl']:.3f}", file=sys.stderr)

    def train(self) -> None:
        """Train to the end; Ctrl-C and SIGTERM leave a checkpoint and exit."""
        stop: list[int] = []
        old = {s: signal.signal(s, lambda signum, _: stop.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
        due = {round(i * self.n_steps / self.args.points) for i in range(self.args.points + 1)}
        modules, saved = activation_modules(self.student), time.monotonic()
        try:
            with tqdm(total=self.n_steps, initial=self.step, mininterval=progress_interval()) as bar:
                while not stop:
                    if self.step in due and (
                        not self.curve or self.curve[-1]["tokens"] < self.step * self._step_tokens
                    ):
                        self.point()
                    if self.step >= self.n_steps:
                        break
                    began = time.monotonic()
                    bar.set_postfix_str(f"KL {self.train_step(modules):.3f}", refresh=False)
                    self.seconds += time.monotonic() - began
                    bar.update()
                    if time.monotonic() - saved > 60 * self.args.save_minutes:
                        self.save()
                        saved = time.monotonic()
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
        self.save()
        if stop:
            tqdm.write(f"stopped at step {self.step}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + stop[0])

    @property
    def _step_tokens(self) -> int:
        return self.args.batch * self.args.seq


def export(run: Relufier, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write the student and its curve beside OUT, read it again and measure that, then move all into OUT."""
    out = run.args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as name:
        facts = write_model(run, tokenizer, Path(name))
        out.mkdir(exist_ok=True)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name != "relufy.json"):  # it says whose OUT is
            path.chmod(0o644)  # safetensors writes 0600
            path.replace(out / path.name)
    return facts


def write_model(run: Relufier, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Model in its original's dtype, tokenizer, relufy.json and plot into a folder; gives what relufy.json says."""
    args = run.args
    dtype = AutoConfig.from_pretrained(args.model).dtype or torch.float32
    run.student.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    facts = {
        "original": args.model,
        "run": {k: v for k, v in run.run.items() if k != "model"},
        "seconds": round(run.seconds, 1),
        "text": [path.name for path in args.text],
        "held_out": {"text": args.valid.name, "tokens": run.held_out[:, 1:].numel()},
        "original_measured": measure(run.teacher, None, run.held_out, args.batch),
        "measured": measure(stored, run.teacher, run.held_out, args.batch),
        "curve": run.curve,
    }
    write(folder / "relufy.json", lambda f: f.write((json.dumps(facts, indent=2) + "\n").encode()))
    plot(facts, folder / "relufy.png")
    return facts


def plot(facts: dict[str, Any], path: Path) -> None:
    """Draw the curve, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (optional)
    except ImportError:
        tqdm.write("no plot: `pip install matplotlib` to have one; relufy.json holds the curve", file=sys.stderr)
        return
    tokens = [point["tokens"] for point in facts["curve"]]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot(tokens, [p["perplexity"] for p in facts["curve"]], "o-", label="perplexity, ReLU")
    left.axhline(facts["original_measured"]["perplexity"], linestyle=":", label="perplexity, original")
    left.set(xlabel="tokens trained", ylabel="perplexity", yscale="log")
    right = left.twinx()
    right.plot(tokens, [100 * p["zeros"] for p in facts["curve"]], "s--", color="tab:red", label="zeros")
    right.set(ylabel="% of FFN activations that are zero", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3)
    write(path, lambda f: figure.savefig(f, format="png", dpi=120))


def main(argv: list[str] | None = None) -> None:
    """Swap, train, export."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = [read_text(path) for path in args.text]
    valid = read_text(args.valid)  # a bad held-out file should show now, not after hours
    torch.manual_seed(args.seed)
    teacher, tokenizer = load_teacher(args.model)
    student = make_student(teacher, args.shift)
    tokens, held_out = encode(tokenizer, texts), encode(tokenizer, [valid])
    for path, stream, need in ((args.text[0], tokens, args.batch * args.seq), (args.valid, held_out, args.seq)):
        if len(stream) < need:
            sys.exit(f"{path}: {len(stream)} tokens, {need} are needed. Add text, or lower --batch or --seq.")
    n_rows = max(1, int(min(args.eval_tokens, len(held_out))) // args.seq)
    held_out = torch.from_numpy(held_out[: n_rows * args.seq].astype(np.int64)).view(n_rows, args.seq)
    run = Relufier(args, teacher, student, tokens, held_out)
    run.train()
    facts = export(run, tokenizer)
    print(json.dumps({"model": str(args.out), **facts["measured"]}))


if __name__ == "__main__":
    main()
