"""Perplexity and accuracy: against the plainest way to compute them, and the dense model beside every gate."""

import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from conftest import OPENINGS
from helpers_hub import save_stock, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

import hf_flash
from hf_flash import measures
from hf_flash.cli import app
from hf_flash.errors import CheckpointError, FlashConfigError, MemoryCapError, TextError
from hf_flash.measures import answer, score_text, tokens_of, windows
from hf_flash.scoring import NO_TARGET, Scorer
from hf_flash.texts import Question, Task

CAP = "48MiB"
QUIET = {"progress": False}
evaluate_module = importlib.import_module("hf_flash.evaluate")  # hf_flash.evaluate is the function


@pytest.fixture(autouse=True)
def same_noise_after() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


def bar() -> Any:
    return tqdm(disable=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "openings.txt"
    path.write_text(".\n".join(OPENINGS) + ".\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    pieces = [line.rpartition(" ") for line in OPENINGS]
    lines = [
        {"context": head, "choices": [" " + tail, " of the", " king himself"], "label": 0} for head, _, tail in pieces
    ]
    (folder / "endings.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"context": head, "target": " " + tail} for head, _, tail in pieces]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "endings.jsonl", folder / "words.jsonl"]


# Scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma2", "cohere", "bloom", "granite"])
def test_the_head_in_pieces_gives_the_models_own_log_probabilities(name: str) -> None:
    """Gemma 2 caps its logits, Cohere and Granite scale them, OPT's head hangs on the decoder inside."""
    model_type, settings = tiny_models._CAUSAL[name]
    model = tiny_models.causal(model_type, **settings)
    ids, targets = torch.randint(3, 60, (2, 20)), torch.randint(3, 60, (2, 20))
    targets[0, 3:9] = NO_TARGET
    logits = model(input_ids=ids, use_cache=False).logits.float()
    expected = logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    bodies, heads = [0], []
    embedding = model.get_input_embeddings().register_forward_hook(lambda *_: bodies.__setitem__(0, bodies[0] + 1))
    head = model.get_output_embeddings().register_forward_hook(lambda m, a, out: heads.append(out.shape[-2]))
    scores, likeliest = Scorer(model, piece_bytes=2 * logits.shape[-1] * 12 * 3).score(list(ids), list(targets))
    embedding.remove(), head.remove()
    assert bodies == [1] and max(heads) == 3 and sum(heads) == 20
    torch.testing.assert_close(scores, torch.where(targets == NO_TARGET, 0, expected).double(), atol=2e-6, rtol=2e-6)
    assert torch.equal(likeliest, (targets == NO_TARGET) | (logits.argmax(-1) == targets))
    assert "forward" not in model.base_model.__dict__  # the body computes again


def test_rows_of_other_lengths_do_not_disturb_each_other(dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    rows = [prompts[0], prompts[1][:3], prompts[2][:5]]
    together, _ = Scorer(dense).score([row[:-1] for row in rows], [row[1:] for row in rows])
    for i, row in enumerate(rows):
        alone, _ = Scorer(dense).score([row[:-1]], [row[1:]])
        torch.testing.assert_close(together[i, : len(row) - 1], alone[0], atol=1e-5, rtol=1e-5)
        assert not together[i, len(row) - 1 :].any()


@given(n=st.integers(0, 60), window=st.integers(1, 20), stride=st.integers(1, 20))
def test_every_token_is_predicted_once(n: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    found = windows(n, window, stride)
    assert [i for start, stop, scored in found for i in range(scored, stop)] == list(range(n))
    assert all(0 < stop - start <= window and start <= scored < stop for start, stop, scored in found)
    full = [start for start, stop, _ in found if stop - start == window]
    assert all(b - a == stride for a, b in itertools.pairwise(full))


@pytest.mark.parametrize(("stride", "batch_size"), [(16, 1), (16, 3), (7, 2)])
def test_perplexity_is_that_of_the_loss(
    stride: int, batch_size: int, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    part = tokens_of(text, tokenizer, 100)
    assert part.ids[0] == tokenizer.bos_token_id and len(part.ids) == 101
    nats = 0.0
    for start, stop, scored in windows(100, 16, stride):
        ids = part.ids[start : stop + 1]
        logits = dense(input_ids=ids[None, :-1]).logits[0].detach()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        nats -= float(losses[scored - start :].sum())
    score = score_text(Scorer(dense), part, 16, stride, batch_size, bar())
    assert score.nats == pytest.approx(nats, rel=1e-6) and score.tokens == 100
    assert score.to_dict()["perplexity"] == pytest.approx(math.exp(-nats / 100), rel=1e-6)
    kept = tokenizer.decode(part.ids[1:])
    assert score.bytes == len(kept.encode()) and score.words == len(kept.split())
    assert score.to_dict()["bits_per_byte"] == pytest.approx(-nats / math.log(2) / len(kept.encode()), rel=1e-6)


def test_all_of_a_text_is_counted(tokenizer: PreTrainedTokenizerBase, text: Path) -> None:
    whole = tokens_of(text, tokenizer)
    written = text.read_text()
    assert whole.bytes == len(written.encode()) and whole.words == len(written.split())
    assert torch.equal(tokens_of(text, tokenizer, 50).ids, whole.ids[:51])
    assert len(tokens_of(text, tokenizer, 10**9).ids) == len(whole.ids)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_one_choice_at_a_time(
    batch_size: int, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = [
        Question("The old man sat down by the ", ("fire.", "sea and the river"), 0),  # the blank belongs to the choice
        Question("", ("Once upon a time", "xylophone tree"), 0),
        Question("All the world knows that a young man must have", (" a", " been", " quite an idea of it"), 2),
    ]
    expected, normed = [], []
    for question in questions:
        sums = []
        for choice in question.choices:
            whole = tokenizer(question.context + choice).input_ids
            n = len(tokenizer(question.context.rstrip()).input_ids)
            if not question.context:
                whole, n = [tokenizer.bos_token_id, *tokenizer(choice, add_special_tokens=False).input_ids], 1
            logits = dense(input_ids=torch.tensor([whole[:-1]])).logits[0].detach().log_softmax(-1)
            sums.append(sum(float(logits[i - 1, whole[i]]) for i in range(n, len(whole))))
        expected.append(max(range(len(sums)), key=sums.__getitem__))
        lengths = [len(choice.strip()) for choice in question.choices]
        normed.append(max(range(len(sums)), key=lambda i: sums[i] / lengths[i]))
    found = answer(Scorer(dense), tokenizer, Task("three", questions, False), 64, batch_size, bar())
    labels = [question.label for question in questions]
    assert found.answers == expected and found.n_cut == 0
    assert found.acc == sum(a == b for a, b in zip(expected, labels, strict=True)) / 3
    assert found.acc_norm == sum(a == b for a, b in zip(normed, labels, strict=True)) / 3


def test_a_last_word_is_guessed_token_by_token(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    context = "The captain gave the"
    ids = dense.generate(**tokenizer(context, return_tensors="pt"), do_sample=False, max_new_tokens=3)
    target = tokenizer.decode(ids[0], skip_special_tokens=True)[len(context) :]
    task = Task("words", [Question(context, (target,)), Question(context, (" xylophone",))], True)
    found = answer(Scorer(dense), tokenizer, task, 64, 1, bar())
    assert found.answers == [0, -1] and found.acc == 0.5 and found.acc_norm is None and (found.perplexity or 0) > 1


def test_a_long_context_loses_its_beginning_and_a_long_choice_is_refused(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = Question(" ".join(OPENINGS), (" door", " sea"), 0)
    found = answer(Scorer(dense), tokenizer, Task("long", [long], False), 16, 1, bar())
    assert found.n_cut == 1
    with pytest.raises(TextError, match=r"long, question 0: .* tokens, expected 1 to 16"):
        answer(Scorer(dense), tokenizer, Task("long", [Question("a", (" b" * 40, " c"))], False), 16, 1, bar())


# Reports -----------------------------------------------------------------------------------------------------------


def test_every_exact_gate_scores_what_the_dense_model_scores(
    flash_folder: Path, shipped: Path, text: Path, tasks: list[Path]
) -> None:
    report = hf_flash.evaluate(
        flash_folder, text=text, tasks=tasks, gates=("all", "certified"), memory=CAP, dense=shipped, window=64,
        decode=24, **QUIET,
    )  # fmt: skip
    dense, *flash = report.sides
    assert report.complete and dense.kind == "stock" and [side.gates for side in flash] == [["all"], ["certified"]]
    for side in flash:
        for name, score in dense.texts.items():
            assert side.texts[name].nats == pytest.approx(score.nats, abs=1e-3)
        assert {n: (s.answers, s.acc, s.acc_norm) for n, s in side.tasks.items()} == {
            n: (s.answers, s.acc, s.acc_norm) for n, s in dense.tasks.items()
        }
        assert side.decoding is not None and dense.decoding is not None
        assert side.decoding.perplexity == pytest.approx(dense.decoding.perplexity, rel=1e-5)
        assert (side.decoding.stats or {})["n_tokens"] == 24
    assert dense.tasks["endings"].acc > 0.5  # a model that learned something is being asked
    certified = flash[1].decoding
    assert certified is not None and 0.02 < (certified.share_wanted or 0) < 0.3 and dense.decoding.stats is None


def test_without_the_stock_model_gate_all_stands_for_it(flash_folder: Path, text: Path) -> None:
    report = hf_flash.evaluate(flash_folder, text=text, gates=("certified",), memory=CAP, window=64, **QUIET)
    assert [side.name for side in report.sides] == ["all", "certified"] and "no stock model was given" in report.dense
    assert report.sides[0].texts["openings.txt"].nats == pytest.approx(
        report.sides[1].texts["openings.txt"].nats, abs=1e-3
    )


def test_a_stock_model_that_does_not_fit_is_not_loaded(
    shipped: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "available_memory", lambda: 20 << 20)
    report = hf_flash.evaluate(shipped, text=text, memory=CAP, window=64, max_tokens=64, **QUIET)
    assert [side.kind for side in report.sides] == ["flash", "flash"] and "more than is free" in report.dense


def test_a_stock_model_is_both_sides(shipped: Path, text: Path) -> None:
    report = hf_flash.evaluate(shipped, text=text, memory=CAP, window=64, max_tokens=64, **QUIET)
    assert [(side.name, side.kind) for side in report.sides] == [("dense", "stock"), ("auto", "flash")]
    assert report.sides[1].gates == ["certified"]


def test_what_cannot_be_is_refused_before_anything_is_loaded(
    flash_folder: Path, shipped: Path, text: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module.Session, "open", lambda *a, **k: pytest.fail("loaded"))
    other = save_stock(tmp_path / "other", tiny_llama())
    again = tmp_path / "again" / tasks[0].name
    again.parent.mkdir()
    again.write_bytes(tasks[0].read_bytes())
    for options, error, message in [
        ({}, FlashConfigError, "no text to evaluate on"),
        ({"tasks": tasks, "decode": 3}, FlashConfigError, "no text to evaluate on"),
        ({"tasks": [tasks[0], again]}, FlashConfigError, "have one name"),
        ({"text": text, "window": 513}, FlashConfigError, "at most the 512 that the model takes"),
        ({"text": text, "window": 1}, FlashConfigError, "expected 2 or more"),
        ({"text": text, "window": 8, "stride": 9}, FlashConfigError, "must be from 1 to the window"),
        ({"text": text, "window": 8, "decode": 8}, FlashConfigError, "does not fit into a window"),
        ({"text": text, "window": 512, "decode": 500}, TextError, "too short to decode 500"),
        ({"text": text, "gates": ["magic"]}, FlashConfigError, "gate='magic' is unknown"),
        ({"text": text, "memory": "1MiB"}, MemoryCapError, "Pass --memory"),
        ({"text": text, "dense": flash_folder}, CheckpointError, "is a flash checkpoint too"),
        ({"text": text, "dense": other}, CheckpointError, "is another model"),
    ]:
        with pytest.raises(error) as caught:
            hf_flash.evaluate(flash_folder, **{"memory": CAP, **options}, **QUIET)
        assert message in str(caught.value)
    (tmp_path / "tiny.txt").write_text("I")
    with pytest.raises(TextError, match="too short: 1 tokens"):
        hf_flash.evaluate(flash_folder, text=tmp_path / "tiny.txt", memory=CAP, **QUIET)


def test_a_model_without_a_head_is_refused(tmp_path: Path, text: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32)
    save_stock(tmp_path / "t5", transformers.T5ForConditionalGeneration(config))
    with pytest.raises(FlashConfigError, match="does not predict next tokens"):
        hf_flash.evaluate(tmp_path / "t5", text=text, memory=CAP, **QUIET)


# The command -------------------------------------------------------------------------------------------------------


def words(*more: object) -> list[str]:
    return ["eval", *map(str, more)]


def test_the_table(flash_folder: Path, shipped: Path, text: Path, tasks: list[Path]) -> None:
    done = CliRunner().invoke(
        app,
        words(flash_folder, "--dense", shipped, "--text", text, "--tasks", tasks[0], "--tasks", tasks[1],
              "--gate", "all", "--gate", "certified", "--memory", CAP, "--window", 64, "--decode", 8, "--limit", 5,
              "--tokens", 128),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "certified: endings" in done.stderr  # a bar
    assert "passes of 64 tokens, batch 1, float32" in done.stdout and "INTERRUPTED" not in done.stdout
    assert "endings, 5 questions" in done.stdout and "openings.txt, 128 tokens" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    ppl = next(line for line in lines if line[:3] == ["perplexity", "per", "token"])[3:]
    assert len(ppl) == 3 and len(set(ppl)) == 1, done.stdout
    for label in ("accuracy", "accuracy per character", "perplexity of the word", "read per token"):
        assert any(" ".join(line).startswith(label) for line in lines)


def test_json(flash_folder: Path, text: Path) -> None:
    done = CliRunner().invoke(app, words(flash_folder, "--text", text, "--memory", CAP, "--window", 64, "--json"))
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["complete"] and report["window"] == report["stride"] == 64
    assert report["sides"][0]["texts"]["openings.txt"]["perplexity"] > 1


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_leaves_what_was_measured_and_says_so(
    as_json: bool, flash_folder: Path, text: Path, tasks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "answer", stop)
    given_words = words(flash_folder, "--text", text, "--tasks", tasks[0], "--memory", CAP, "--window", 64)
    done = CliRunner().invoke(app, [*given_words, *(["--json"] if as_json else [])])
    assert done.exit_code == 130 and "interrupted" in done.stderr
    if as_json:
        report = json.loads(done.stdout)
        assert report["complete"] is False and len(report["sides"]) == 1 and not report["sides"][0]["tasks"]
    else:
        assert "INTERRUPTED: what is left blank was not measured." in done.stdout
    monkeypatch.setattr(evaluate_module, "score_text", stop)
    done = CliRunner().invoke(app, given_words)
    assert done.exit_code == 130 and not done.stdout  # nothing was measured, nothing is said


def test_decoding_feeds_the_texts_own_tokens(dense: PreTrainedModel, prompts: torch.Tensor) -> None:
    ids = torch.cat([prompts[0], prompts[1]])
    found = measures.decode(dense, ids, 4, None, bar())
    logits = dense(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
    expected = [float(logits[i, ids[i + 1]]) for i in range(4, len(ids) - 1)]
    assert found.tokens == len(expected) and found.stats is None
    assert found.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)
