"""`transformers serve` with a model on flash: started as a user would, asked over HTTP, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers_hub import CAP, PROMPT, clean_env, make_tokenizer, save_stock, tiny_llama
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

import hf_flash
from hf_flash import serve
from hf_flash.errors import FlashConfigError, FlashError

N_TOKENS = 8
START_S = 60


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("serve") / "stock", tiny_llama())


@pytest.fixture(scope="module")
def flash(stock: Path) -> Path:
    return hf_flash.repack(stock, stock.parent / "flash", progress=False)


@pytest.fixture(scope="module")
def server(flash: Path) -> Iterator[str]:
    """A server in a process of its own; its address."""
    if not is_serve_available():
        pytest.skip("transformers serve needs `pip install 'transformers[serving]'`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_flash.serve", str(flash), "--host", "127.0.0.1", "--port", str(port)]
    log = flash.parent / "serve.log"
    with open(log, "w") as out:
        env = clean_env(HF_FLASH_MEMORY=CAP, HF_HUB_OFFLINE="1")
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", child, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(15)


def _wait_until_up(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert child.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not answer within {START_S} s: {log.read_text()[-3000:]}")


def ask(server: str, model: Path, **body: Any) -> Any:
    message = {"role": "user", "content": " ".join(f"w{i}" for i in PROMPT[0].tolist())}
    body = {"model": str(model), "messages": [message], "max_tokens": N_TOKENS, "temperature": 0, **body}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read().decode()
    return text if body.get("stream") else json.loads(text)


@pytest.fixture(scope="module")
def want(stock: Path) -> str:
    """What stock transformers answers to the same chat."""
    tokenizer = make_tokenizer()
    message = {"role": "user", "content": " ".join(f"w{i}" for i in PROMPT[0].tolist())}
    inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(stock)
    out = model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_chat(server: str, flash: Path, want: str) -> None:
    reply = ask(server, flash)
    assert reply["choices"][0]["message"]["content"].split() == want.split()
    assert reply["usage"]["completion_tokens"] == N_TOKENS


@pytest.mark.slow
def test_streamed_chat(server: str, flash: Path, want: str) -> None:
    text = ask(server, flash, stream=True)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]]
    assert "".join(deltas).split() == want.split()


@pytest.mark.slow
def test_several_at_once(server: str, flash: Path, want: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: ask(server, flash), range(4)))
    assert {" ".join(r["choices"][0]["message"]["content"].split()) for r in replies} == {" ".join(want.split())}


# What is refused before a server is started ------------------------------------------------------------------------


def test_a_stock_checkpoint_is_refused(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    with pytest.raises(FlashError, match=rf"{stock} is no flash checkpoint.*hf-flash repack {stock} DIR"):
        serve.main([str(stock), "--port", "1"])


def test_missing_packages_are_named(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    with pytest.raises(FlashError, match=r"pip install 'transformers\[serving\]'"):
        serve.main([str(flash)])


@pytest.mark.parametrize("words", [["--memory", "64MiB"], ["--memory=64MiB"]])
def test_memory_option(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    monkeypatch.setenv("HF_FLASH_MEMORY", "1GiB")
    with pytest.raises(FlashError, match="pip install"):
        serve.main(words)
    assert os.environ["HF_FLASH_MEMORY"] == str(64 << 20)


@pytest.mark.parametrize(("words", "error"), [(["--memory"], "wants a value"), (["--memory", "lots"], "is not a size")])
def test_bad_memory_option(words: list[str], error: str) -> None:
    with pytest.raises((FlashError, FlashConfigError), match=error):
        serve.main(words)
