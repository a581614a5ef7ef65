"""The command line: what it prints where, how it fails, and that an interrupted command leaves nothing half done."""

import functools
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers_hub import clean_env, run_python, save_stock, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig
from typer.testing import CliRunner, Result

import hf_flash
from hf_flash import demo, estimate, probe, session
from hf_flash.cli import app
from hf_flash.errors import HubError

CAP = "48MiB"
COMMANDS = {
    "repack", "plan", "run", "demo", "inspect", "verify", "push", "serve", "doctor", "eval", "calibrate", "bench",
}  # fmt: skip


@pytest.fixture(autouse=True)
def same_noise_after() -> Iterator[None]:
    """Commands silence transformers; other tests may want to hear it."""
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("cli") / "stock", tiny_llama())


@pytest.fixture(scope="module")
def flash(stock: Path) -> Path:
    return hf_flash.repack(stock, stock.parent / "flash", max_shard_size="100KB", progress=False)


def hf(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def said(*words: object, stdin: str | None = None) -> dict[str, Any]:
    """A command's JSON: all of stdout is one object."""
    result = hf(*words, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    out: dict[str, Any] = json.loads(result.stdout)
    return out


# Help --------------------------------------------------------------------------------------------------------------


def test_version() -> None:
    result = hf("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"hf-flash {hf_flash.__version__} (transformers {transformers.__version__}, torch ")


def test_help_lists_every_command() -> None:
    text = hf("--help").stdout
    assert all(f" {name} " in text for name in COMMANDS)
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_has_an_example(name: str) -> None:
    for flag in ("--help", "-h"):
        result = hf(name, flag)
        assert result.exit_code == 0
        assert f"hf-flash {name}" in result.stdout.split("Example")[1]


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    script = tmp_path / "hf-flash"
    script.write_text(
        "import atexit, sys\n"
        "atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
        "from hf_flash.cli import main\nmain()\n"
    )
    for words in (["--help"], ["run", "--help"], ["--version"]):
        command = [sys.executable, script, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), check=False)
        assert done.returncode == 0, done.stderr
        assert "TORCH False" in done.stdout


def test_docs_are_up_to_date() -> None:
    path = Path(hf_flash.__file__).parent.parent / "docs" / "make_cli.py"
    spec = importlib.util.spec_from_file_location("make_cli", path)
    assert spec and spec.loader
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert make_cli.PAGE.read_text() == make_cli.page(), "run `python docs/make_cli.py`"


# Reports -----------------------------------------------------------------------------------------------------------


def test_repack(stock: Path, tmp_path: Path) -> None:
    result = hf("repack", stock, tmp_path / "out", "--gate-bits", 6)
    assert result.exit_code == 0, result.stderr
    assert "3 FFN layers on flash" in result.stdout and "6-bit" in result.stdout
    assert "Repacking" in result.stderr and f"next: hf-flash run {tmp_path / 'out'}" in result.stderr
    assert hf_flash.verify(tmp_path / "out", progress=False).ok
    figures = said("repack", stock, tmp_path / "again", "--gate-bits", 6)
    assert figures["layers"][0]["sketch_bits"] == 6 and figures["seconds"] > 0


@pytest.mark.parametrize("which", ["stock", "flash"])
def test_plan(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    plan = said("plan", folder, "--memory", CAP, "--gate", "all", "--context", 32)
    want = hf_flash.plan(folder, memory=CAP, gate="all", context=32).to_dict()
    assert {name: plan[name] for name in want} == want
    assert plan["smallest_cap"] == hf_flash.smallest_cap(folder, gate="all", context=32)
    assert plan["converted"] == (which == "flash")
    text = hf("plan", folder, "--memory", CAP, "--gate", "all", "--context", 32).stdout
    assert "gate: all in 3 layers" in text and "KV cache" in text and "the smallest that would do" in text


def test_packed_bundles_are_said_to_be(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "stock", tiny_llama().bfloat16())
    words = "12 bits a weight, lossless"
    for pack in (True, False):
        folder = hf_flash.repack(source, tmp_path / f"flash-{pack}", pack=pack, progress=False)
        assert [layer["packed"] for layer in said("inspect", folder)["layers"]] == [pack] * 3
        assert (f"bundles: {words}" in hf("inspect", folder).stdout) == pack
        least = hf_flash.smallest_cap(folder, context=32)
        roomy = hf("plan", folder, "--memory", CAP, "--context", 32).stdout
        tight = hf("plan", folder, "--memory", least, "--context", 32)
        assert (f"bundles on flash: {words}" in roomy) == (f"bundles on flash: {words}" in tight.stdout) == pack
        assert "8-bit sketches of 3 layers" in roomy
        plan = hf_flash.plan(folder, memory=least, context=32)
        if plan.packed:
            assert f"{len(plan.packed)} of" in tight.stdout
        if plan.gate_bits < 8:
            assert f"{plan.gate_bits} of 8 bits of the sketches of 3 layers" in " ".join(tight.stdout.split())


def test_inspect(flash: Path) -> None:
    found = said("inspect", flash)
    assert found["gate"] == "certified" and found["architecture"] == "LlamaForCausalLM"
    assert [(layer["path"], layer["n_neurons"], layer["row_bytes"]) for layer in found["layers"]] == [
        (f"model.layers.{i}.mlp", 256, 1024) for i in range(3)
    ]
    sizes = {file["name"]: file["n_bytes"] for file in found["files"]}
    assert sizes == {path.name: path.stat().st_size for path in flash.iterdir() if path.is_file()}
    assert "model.layers" not in hf("inspect", flash).stdout
    assert "model.layers.2.mlp" in hf("inspect", flash, "--layers").stdout


def test_verify(flash: Path, tmp_path: Path) -> None:
    assert said("verify", flash)["ok"] is True
    assert "every byte is as it was written" in hf("verify", flash).stdout
    broken = hf_flash.repack(flash.parent / "stock", tmp_path / "broken", progress=False)
    with open(broken / "flash-00001-of-00001.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"!!!!")
    result = hf("verify", broken)
    assert result.exit_code == 1
    assert "problem: " in result.stdout and "differ from their checksum" in result.stdout
    assert "Delete the files that are named" in result.stderr
    result = hf("verify", broken, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["ok"] is False
    (broken / "flash-00001-of-00001.safetensors").unlink()  # what the message says
    assert hf("repack", flash.parent / "stock", broken).exit_code == 0
    assert hf("verify", broken).exit_code == 0


def test_push(flash: Path, stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def push(*args: object, **kwargs: object) -> str:
        calls.append((args, kwargs))
        return "https://hub/me/model/commit/1"

    monkeypatch.setattr("hf_flash.hub.push", push)
    result = hf("push", flash, "me/model", "--private", "--message", "first")
    assert result.exit_code == 0 and result.stdout.strip() == "https://hub/me/model/commit/1"
    assert calls == [((str(flash), "me/model"), {"private": True, "commit_message": "first", "create_pr": False})]
    assert said("push", flash, "me/model")["url"] == "https://hub/me/model/commit/1"

    def fail(*args: object, **kwargs: object) -> str:
        raise HubError("Uploading failed. Check `hf auth whoami`.")

    monkeypatch.setattr("hf_flash.hub.push", fail)
    result = hf("push", flash, "me/model")
    assert result.exit_code == 1 and "error: Uploading failed. Check `hf auth whoami`." in result.stderr


def small_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(probe.measure, file_bytes=8 << 20, sweep_bytes=16 << 20, seconds=0.001)
    monkeypatch.setattr("hf_flash.probe.measure", small)


def test_doctor_and_what_plan_makes_of_it(
    flash: Path, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "cache"))
    assert "run `hf-flash doctor` to see the expected speed" in hf("plan", flash, "--memory", CAP).stdout
    assert said("plan", flash, "--memory", CAP)["estimate"] is None
    small_doctor(monkeypatch)
    result = hf("doctor", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "one at a time" in result.stdout and "bound by" in result.stdout and "Measuring" in result.stderr
    figures = said("doctor")
    assert figures["folder"] == str((tmp_path / "cache").resolve()) and len(figures["reads"]) == 20
    assert json.loads(Path(figures["kept"]).read_text())["date"] == figures["date"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["doctor"]

    plan = said("plan", stock, "--memory", CAP)["estimate"]
    assert plan["active"] == estimate.DEFAULT_ACTIVE and plan["floor_s"] > 0
    assert said("plan", stock, "--memory", CAP, "--active", 1)["estimate"]["memory_s"] > plan["memory_s"]
    assert said("plan", stock, "--memory", CAP, "--gate", "all")["estimate"]["active"] is None
    text = hf("plan", stock, "--memory", CAP).stdout
    assert "tokens/s at best" in text and "(--active)" in text
    assert hf("plan", stock, "--memory", CAP, "--active", 2).exit_code == 2


def test_doctor_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_FLASH_CACHE", str(tmp_path / "file"))
    small_doctor(monkeypatch)
    result = hf("doctor", tmp_path, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["kept"] is None
    assert "could not be kept" in result.stderr and "HF_FLASH_CACHE names another folder" in result.stderr
    assert hf("doctor").exit_code == 1


# Running -----------------------------------------------------------------------------------------------------------


def dense_text(stock: Path, prompt: str, n: int, chat: bool) -> str:
    tokenizer = AutoTokenizer.from_pretrained(stock)
    inputs = session.encode(tokenizer, prompt, raw=not chat)
    model = AutoModelForCausalLM.from_pretrained(stock)
    out = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("which", ["stock", "flash"])
def test_run_gives_the_dense_model_s_text(which: str, stock: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    result = hf("run", folder, "--prompt", "w5 w6 w7", "-n", 6, "--memory", CAP, "--raw")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == dense_text(stock, "w5 w6 w7", 6, chat=False)
    for row in ("read from flash", "neurons found in DRAM", "waited for flash", "tokens/s", "peak memory"):
        assert row in result.stderr
    assert "quantization_config" not in result.stderr  # transformers' warnings are silenced


def test_run_json(flash: Path, stock: Path) -> None:
    figures = said("run", flash, "--prompt", "-", "-n", 6, "--memory", CAP, "--raw", stdin="w5 w6 w7\n")
    assert figures["text"] == dense_text(stock, "w5 w6 w7", 6, chat=False)
    prompt, decode = figures["prompt"], figures["decode"]
    assert (prompt["n_tokens"], decode["n_tokens"], len(figures["token_ids"])) == (3, 5, 6)
    assert prompt["bytes_read"] > 0 and decode["neurons_wanted"] == decode["neurons_hit"] + decode["neurons_read"]
    assert figures["plan"]["memory"] == figures["memory"] == 48 << 20
    assert figures["plan"]["context"] == 9
    assert figures["peak_rss_bytes"] >= figures["base_rss_bytes"] > 0


def test_run_uses_the_chat_template(flash: Path, stock: Path) -> None:
    raw, chat = (
        said("run", flash, "-p", "w5 w6", "-n", 4, "-m", CAP, *more)["prompt"]["n_tokens"]
        for more in (["--raw"], ["--system", "w9 w8 w7"])
    )
    assert (raw, chat) == (2, 5)
    text = said("run", flash, "-p", "w5 w6", "-n", 4, "-m", CAP)["text"]
    assert text == dense_text(stock, "w5 w6", 4, chat=True)


def test_run_samples_with_a_seed(flash: Path) -> None:
    words = ["run", flash, "-p", "w5", "-n", 12, "-m", CAP, "--temperature", 3]
    first, same, other = (said(*words, "--seed", seed)["token_ids"] for seed in (1, 1, 2))
    assert first == same != other


def test_run_interrupted_shows_what_there_was(flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = session._Meter.put

    def stop(self: Any, value: torch.Tensor) -> None:
        put(self, value)
        if len(self.tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(session._Meter, "put", stop)
    trace = tmp_path / "trace.json"
    result = hf("run", flash, "-p", "w5", "-n", 12, "-m", CAP, "--profile", trace)
    assert result.exit_code == 130
    assert "tokens/s" in result.stderr and "interrupted" in result.stderr
    assert "mean of 1 decoded token " in result.stderr and json.loads(trace.read_text())["traceEvents"]


def test_run_says_where_the_time_goes(flash: Path, tmp_path: Path) -> None:
    words = ["run", flash, "-p", "w5 w6", "-n", 6, "-m", CAP, "--profile", tmp_path / "trace.json"]
    result = hf(*words)
    assert result.exit_code == 0, result.stderr
    assert "attention" in result.stderr and "µs per FFN layer of the median token" in result.stderr
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    figures = said(*words)
    assert figures["profile"]["n_tokens"] == len(figures["token_ids"]) - 2
    assert "profile" not in said(*words[:-2])


def test_serve_hands_its_words_to_transformers(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("hf_flash.serve.main", calls.append)
    assert hf("serve", flash, "--memory", CAP, "--host", "127.0.0.1", "--port", 8000).exit_code == 0
    assert hf("serve", "--port", 8000).exit_code == 0
    assert calls == [[str(flash), "--memory", CAP, "--host", "127.0.0.1", "--port", "8000"], ["--port", "8000"]]


def test_demo() -> None:
    result = hf("demo", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    assert "tokens equal to the dense model's: yes, all 8" in result.stdout
    for row in ("hf-flash repack", "hf-flash plan", "hf-flash run", "FFN cache", "gate: certified", "read from flash"):
        assert row in result.stdout


def test_demo_reads_from_flash_and_can_be_kept(tmp_path: Path) -> None:
    figures = said("demo", "--max-new-tokens", 4, "--keep", tmp_path / "kept")
    assert figures["equal"] is True and figures["decode"]["bytes_read"] > 0
    plan = figures["plan"]
    assert 0 < plan["parts"]["FFN cache"] < 0.9 * (plan["parts"]["FFN cache"] + plan["memory"])
    assert all(0 < n < 1536 for n in plan["slots"].values())
    assert hf_flash.verify(tmp_path / "kept", progress=False).ok


def test_demo_that_differs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "dense_tokens", lambda session, inputs, n: [-1] * n)
    result = hf("demo", "-n", 2)
    assert result.exit_code == 1 and "tokens NOT equal" in result.stderr


# Errors ------------------------------------------------------------------------------------------------------------


def test_a_model_without_the_files_of_its_tokenizer(flash: Path, tmp_path: Path) -> None:
    """Bug: transformers makes an empty tokenizer of an OPT's config, and the prompt was said to be empty."""
    OPTConfig().save_pretrained(tmp_path)
    result = hf("run", str(flash), "-p", "w5", "--tokenizer", str(tmp_path))
    assert result.exit_code == 1
    assert "has no tokenizer that could be read (the files of its vocabulary are missing)" in result.stderr
    assert "--tokenizer FOLDER_OR_REPO" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "/no/such/folder"], "does not exist. Give the folder of a checkpoint, or a Hub repo"),
        (["plan", "{empty}"], "is missing: {empty} is no checkpoint"),
        (["plan", "{flash}", "--memory", "lots"], "'lots' is not a size. Write bytes, or a size such as '4GiB'"),
        (["plan", "{flash}", "--memory", "1MiB"], "Pass --memory "),
        (["plan", "{flash}", "--gate", "magic"], "gate='magic' is unknown. Choose one of"),
        (["plan", "{flash}", "--dtype", "bf16"], "Write 'auto', 'bfloat16'"),
        (["run", "{flash}", "-p", "w5", "--memory", "1MiB"], "Pass --memory "),
        (["run", "{flash}", "-p", "w5", "-n", "999"], "the model takes 128. Shorten the prompt"),
        (["run", "{flash}", "-p", "w5", "--context", "9"], "--context plans for 9"),
        (["run", "{flash}", "-p", "", "--raw"], "The prompt is empty"),
        (["run", "{flash}", "-p", "w5", "--raw", "--system", "w6"], "Leave --system out"),
        (["run", "{flash}", "-p", "w5", "--tokenizer", "{empty}"], "--tokenizer FOLDER_OR_REPO"),
        (["run", "{flash}", "-p", "w5", "--profile", "{empty}"], "{empty} cannot be written: it is a folder"),
        (["run", "{flash}", "-p", "w5", "--profile", "{empty}/no/x"], "there is no folder {empty}/no"),
        (["doctor", "{empty}/no"], "{empty}/no is no folder"),
        (["inspect", "{stock}"], "`hf-flash repack {stock} OUTPUT`"),
        (["verify", "{stock}"], "`hf-flash repack {stock} OUTPUT`"),
        (["verify", "{empty}"], "is missing"),
        (["push", "{stock}", "me/x"], "Repack it before pushing"),
        (["repack", "{flash}", "{empty}/out"], "a flash checkpoint already"),
        (["repack", "{stock}", "{stock}"], "is the source itself; give another folder"),
        (["repack", "{stock}", "{empty}/out", "--gate-bits", "3"], "the sketch takes 4 to 8 bits"),
        (["repack", "{stock}", "/proc/nowhere/out"], "/proc/nowhere"),
    ],
)
def test_error(words: list[str], message: str, stock: Path, flash: Path, tmp_path: Path) -> None:
    def fill(text: str) -> str:
        return text.replace("{stock}", str(stock)).replace("{flash}", str(flash)).replace("{empty}", str(tmp_path))

    for more in ([], ["--json"]):
        result = hf(*map(fill, words), *more)
        assert result.exit_code == 1, result.output
        assert "error: " in result.stderr and fill(message) in result.stderr
        assert "Traceback" not in result.output
        assert result.stdout == ""


def test_too_small_a_cap_shows_what_would_do(flash: Path) -> None:
    result = hf("plan", flash, "--memory", "1MiB")
    smallest = hf_flash.smallest_cap(flash)
    assert f"Pass --memory {smallest >> 20}MiB or more" in result.stderr
    assert "always resident" in result.stderr
    assert hf("plan", flash, "--memory", f"{smallest >> 20}MiB").exit_code == 0


@pytest.mark.parametrize("words", [["bogus"], ["plan"], ["run", "x"], ["repack", "x"], ["plan", "x", "--bogus"]])
def test_wrong_usage(words: list[str]) -> None:
    result = hf(*words)
    assert result.exit_code == 2
    assert "Usage: " in result.output


def test_the_unexpected_says_how_to_see_more(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[bold]boom[/]")

    monkeypatch.setattr("hf_flash.preview.look", broken)
    result = hf("plan", flash)
    assert result.exit_code == 1
    assert "RuntimeError: [bold]boom[/]" in result.stderr and "HF_FLASH_DEBUG=1" in result.stderr
    monkeypatch.setenv("HF_FLASH_DEBUG", "1")
    assert isinstance(hf("plan", flash).exception, RuntimeError)


# As a process ------------------------------------------------------------------------------------------------------


def test_as_a_module(flash: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_flash", "run", flash, "-p", "w5 w6", "-n", "4", "-m", CAP, "--json"],
        capture_output=True, text=True, env=clean_env(), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


def test_a_reader_that_stops_reading(flash: Path) -> None:
    """`hf-flash inspect ... | head` is no error."""
    done = run_python(
        "import os, sys\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, 1)\n"
        f"sys.argv = ['hf-flash', 'inspect', {str(flash)!r}, '--json']\nfrom hf_flash.cli import main\nmain()\n"
    )
    assert done.returncode == 141
    assert done.stderr == ""


SLOW = """
import sys, time
from hf_flash.format import TensorFileWriter
write = TensorFileWriter.write
def slow(self, name, data):
    write(self, name, data)
    print(name, flush=True)
    time.sleep(2)
TensorFileWriter.write = slow
sys.argv = ["hf-flash", "repack", {source!r}, {out!r}, "--max-shard-size", "100KB"]
from hf_flash.cli import main
main()
"""


def test_interrupted_repack_goes_on_when_given_again(stock: Path, flash: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves *.partial files and whole ones, says what to do, and the rerun's files are those of one run."""
    code = SLOW.format(source=str(stock), out=str(tmp_path / "out"))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env()
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "model.layers.0.mlp.bundles"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "interrupted; run the same command again to go on" in errors and "Traceback" not in errors
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert any(name.endswith(".partial") for name in left), left
    assert all(name.endswith((".partial", ".partial.journal", ".safetensors", ".lock")) for name in left), left
    assert hf("repack", stock, tmp_path / "out", "--max-shard-size", "100KB").exit_code == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name[0] != "."}
    assert written == {path.name: path.read_bytes() for path in flash.iterdir() if path.name[0] != "."}
