"""The training example at toy size, and the model that ships: its card must hold when measured again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, SHIPPED = ROOT / "examples", ROOT / "hf_flash" / "models" / "relu-books-5m"
TINY = {"vocab": 300, "d-model": 16, "layers": 2, "ffn": 64, "heads": 2, "seq": 16, "batch": 2, "tokens": 384}

# Jane Austen, Pride and Prejudice (1813), chapter 1; Herman Melville, Moby-Dick (1851), chapter 1.
PROSE = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in \
want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, \
this truth is so well fixed in the minds of the surrounding families, that he is considered as the \
rightful property of some one or other of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at \
last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, \
and nothing particular to interest me on shore, I thought I would sail about a little and see the watery \
part of the world. It is a way I have of driving off the spleen, and regulating the circulation. \
Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul; \
whenever I find myself involuntarily pausing before coffin warehouses, and bringing up the rear of every \
funeral I meet; and especially whenever my hypos get such an upper hand of me, that it requires a strong \
moral principle to prevent me from deliberately stepping into the street, and methodically knocking \
people's hats off - then, I account it high time to get to sea as soon as I can. This is my substitute \
for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to \
the ship. There is nothing surprising in this. If they but knew it, almost all men in their degree, some \
time or other, cherish very nearly the same feelings towards the ocean with me.
"""


@pytest.fixture(scope="module")
def example(import_example: Callable[[str], ModuleType]) -> tuple[ModuleType, ModuleType]:
    """The example's two files as modules: the script, and what it measures with."""
    return import_example("train_relu_lm"), import_example("relu_lm")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    return [
        "--text",
        str(text),
        "--valid",
        str(text),
        "--out",
        str(out),
        *(f"--{k}={v}" for k, v in TINY.items()),
        *more,
    ]


def test_trains_and_loads(text: Path, tmp_path: Path) -> None:
    """As a user runs it: the folder loads, weights are bf16 on disk and float32 in use, no path leaks."""
    out = tmp_path / "model"
    script = [sys.executable, str(EXAMPLES / "train_relu_lm.py"), *command(text, out, "--threads=1")]
    done = subprocess.run(script, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.ffn_dim == 64 and model.dtype == torch.float32
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert tokenizer.decode(tokenizer("naïve 鯨 \n\n x").input_ids, skip_special_tokens=True) == "naïve 鯨 \n\n x"
    facts = json.loads((out / "training.json").read_text())
    assert facts["finished"] and facts["tokens"] == 384 and len(facts["held_out"]["zeros_per_layer"]) == 2
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "training.json").read_text()
    assert json.loads(done.stdout.splitlines()[-1])["perplexity"] == facts["held_out"]["perplexity"]


def test_interrupted_run_resumes_to_the_same_weights(example, text, tmp_path, monkeypatch, capsys) -> None:
    """Ctrl-C after five of twelve steps, then the same command: the same weights, bit for bit."""
    train, _ = example
    train.main(command(text, tmp_path / "whole"))
    step = train.Trainer.train_step

    def interrupted(self, seen) -> None:
        step(self, seen)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            train.main(command(text, tmp_path / "parts"))
    assert stop.value.code == 130 and not (tmp_path / "parts").exists()
    train.main(command(text, tmp_path / "parts"))
    assert "at step 5" in capsys.readouterr().out
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_other_options_do_not_resume(example, text: Path, tmp_path: Path) -> None:
    train, _ = example
    train.main(command(text, tmp_path / "model"))
    with pytest.raises(SystemExit, match=r"holds a run with ffn 64, not 128.*--work-dir"):
        train.main(command(text, tmp_path / "model", "--ffn", "128"))


def test_a_grown_model_begins_as_the_small_one(example, text: Path, tmp_path: Path) -> None:
    """Twice as wide, more layers, heads and neurons, none a copy of another: the same logits until it is trained."""
    train, _ = example
    small = tmp_path / "small"
    train.main(command(text, small))
    args = train.parse_args(command(text, tmp_path / "x", "--d-model=32", "--layers=5", "--ffn=80", "--heads=4"))
    model, stored = train.build_model(args, 300), AutoModelForCausalLM.from_pretrained(small)
    sys.modules["grow_lm"].grow(stored, model)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(ids).logits, stored(ids).logits, rtol=1e-4, atol=1e-4)
    fc1, fc2 = model.model.decoder.layers[0].fc1.weight, model.model.decoder.layers[0].fc2.weight
    assert not torch.equal(fc1[:64, :16], fc1[:64, 16:]) and not fc2[:, 64:].any() and fc1[64:].std() > 0
    large = ["--d-model=32", "--layers=3", "--heads=4", "--grow", str(small)]
    train.main(command(text, tmp_path / "large", *large))
    facts = json.loads((tmp_path / "large" / "training.json").read_text())
    assert "--grow small" in facts["command"] and len(facts["held_out"]["zeros_per_layer"]) == 3
    for wrong, message in (
        ("--d-model=40", "must be a multiple of 16"),
        ("--heads=8", "must be 8 wide as in --grow: --heads 4"),
        ("--layers=1", "has 2 already"),
        ("--seq=32", "--grow has --seq 16"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(command(text, tmp_path / f"wrong{wrong}", *large, wrong))


def test_penalty_raises_zeros(example, text: Path, tmp_path: Path) -> None:
    """A run steered to 95 % zeros must get well above the same run without the penalty."""
    train, _ = example
    more = [
        "--tokens=3200",
        "--lr=1e-2",
        "--warmup=2",
        "--gain=5",
        "--sparsify-from=0.1",
        "--sparsify-until=0.4",
    ]
    shares = {}
    for target in ("0", "0.95"):
        train.main(command(text, tmp_path / target, *more, "--target-zeros", target))
        shares[target] = json.loads((tmp_path / target / "training.json").read_text())["held_out"]["zeros"]
    assert shares["0.95"] > shares["0"] + 0.1, shares


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        ("naïve".encode("latin-1"), r"not UTF-8 \(byte 0xef at offset 2\)"),
        (None, "no such"),
    ],
)
def test_bad_text_is_refused(example, tmp_path: Path, content: bytes | None, message: str) -> None:
    train, _ = example
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        train.main(command(path, tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_too_little_text_is_refused(example, tmp_path: Path) -> None:
    train, _ = example
    path = tmp_path / "short.txt"
    path.write_text("Call me Ishmael.")
    with pytest.raises(SystemExit, match=r"a step needs 48.*--batch"):
        train.main(command(path, tmp_path / "model"))


def test_lines_encode_as_the_whole_does(example) -> None:
    """`encode` takes text by lines; a prompt is encoded whole. They must agree."""
    _, relu_lm = example
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    text = PROSE + "\n\n\n   indented  \n\t tabs\r\n\x0c page\u2028line \u00a0 \n"
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert relu_lm.encode(tokenizer, [text], "# Title: ").tolist() == [*whole, tokenizer.eos_token_id]


def test_a_document_ends_with_eos(example) -> None:
    _, relu_lm = example
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    stream = relu_lm.encode(tokenizer, ["# Title: One\nYes.\n# Title: Two\nNo.\n", "Three"], "# Title: ")
    assert np.count_nonzero(stream == tokenizer.eos_token_id) == 3


# The model that ships


def test_shipped_card_says_what_was_measured() -> None:
    facts, card = json.loads((SHIPPED / "training.json").read_text()), (SHIPPED / "README.md").read_text()
    held_out = facts["held_out"]
    assert facts["finished"] and "Unfinished" not in card
    assert held_out["zeros"] >= 0.85
    assert f"{held_out['perplexity']:.2f}" in card and f"{held_out['zeros']:.1%}" in card
    assert "apache-2.0" in card and "public domain" in card
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 11.8e6


def test_shipped_zeros_measured_again(example, text: Path) -> None:
    """On a page that is in this file: at least 80 % zeros, from a model that still predicts English."""
    _, relu_lm = example
    again = relu_lm.evaluate(SHIPPED, text, "")
    assert again["zeros"] >= 0.80, again
    assert again["perplexity"] < 200, again


def test_shipped_weights_are_bf16_in_float32() -> None:
    """The config asks for float32; its values are the stored bf16 ones exactly; bf16 can be had by name."""
    stored = load_file(SHIPPED / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        named = {} if dtype == torch.float32 else {"dtype": "bfloat16"}
        params = AutoModelForCausalLM.from_pretrained(SHIPPED, **named).state_dict()
        assert all(stored[name].dtype == torch.bfloat16 for name in stored)
        assert all(params[name].dtype == dtype and torch.equal(params[name], stored[name].to(dtype)) for name in stored)


def test_shipped_tokenizer_pads_left() -> None:
    """A short prompt beside a long one is predicted as it is alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2] == [getattr(model.config, f"{n}_token_id") for n in ("pad", "bos", "eos")]
    prompts = ["He said", "It is a truth universally acknowledged, that a single man"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch.input_ids[0, 0] == tokenizer.pad_token_id and batch.input_ids[1, 0] == tokenizer.bos_token_id
    with torch.inference_mode():
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(**tokenizer(p, return_tensors="pt")).logits[:, -1] for p in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
