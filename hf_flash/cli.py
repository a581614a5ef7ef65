"""The command `hf-flash`. Reports go to stdout (one JSON object with --json), everything else to stderr.

Commands import what they need when they run: torch and transformers take seconds, and --help should not.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group

from hf_flash import bench as _bench
from hf_flash import calibration as _calibration
from hf_flash import doctor as _doctor
from hf_flash import eval_command as _eval
from hf_flash.options import (
    MEMORY,
    Active,
    Context,
    DemoMemory,
    Dtype,
    Folder,
    Gate,
    GateBits,
    Json,
    MaxNewTokens,
    Memory,
    Model,
    Profile,
    Prompt,
    Raw,
    Revision,
    Seed,
    Sparsity,
    System,
    Temperature,
    Tokenizer,
    Trust,
)  # fmt: skip
from hf_flash.terminal import Commands, err, fail, hint, out, quiet
from hf_flash.terminal import report as _report

if TYPE_CHECKING:
    from hf_flash.preview import Preview

app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  hf-flash demo\n\nThen:  hf-flash plan facebook/opt-1.3b --memory 2GiB",
)  # fmt: skip

_PREPARE, _RUN = "Prepare a checkpoint", "Run a model"


def _version(wanted: bool) -> None:
    if wanted:
        from hf_flash import __version__

        below = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
        print(f"hf-flash {__version__} ({below}, python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Run Hugging Face transformers models that are larger than the memory they are allowed.

    FFN weights stay on the SSD and are read as they are needed; what is computed is the same. Sizes are written 4GiB,
    512MiB or in bytes.
    """


@app.command(
    rich_help_panel=_PREPARE,
    epilog="Examples:\n\nhf-flash repack facebook/opt-1.3b opt-1.3b-flash\n\n"
    "hf-flash repack ./my-model ./my-model-flash --max-shard-size 2GB",
)
def repack(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help="Stock folder or Hub repo.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", show_default=False, help="Folder to write.")],
    gate_bits: GateBits = 8,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of a file at most.")] = "5GB",
    pack: Annotated[
        bool | None,
        typer.Option(
            "--pack/--no-pack",
            show_default=False,
            help="bfloat16 rows in 12 bits a weight, lossless (default: where the native kernels are built).",
        ),
    ] = None,
    order: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default=False, help="Of a recording: what is read together lies together."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rewrite a stock checkpoint so that FFN weights can be read neuron by neuron.

    Needs memory for one layer and room on disk for a second copy. Nothing is rounded. An interrupted run goes on where
    it stopped when the same command is given again. The result is an ordinary Hub repo: see `push`.
    """
    quiet()
    from hf_flash import contents, show
    from hf_flash.repack import repack as repack_folder

    start = time.monotonic()
    folder = repack_folder(
        model, output, gate_bits=gate_bits, max_shard_size=max_shard_size, revision=revision,
        trust_remote_code=trust_remote_code, pack=pack, order=order,
    )  # fmt: skip
    found = contents.contents(folder)
    _report({**found.to_dict(), "seconds": time.monotonic() - start}, show.contents_view(found), as_json)
    hint(f"next: hf-flash run {folder} --memory SIZE --prompt TEXT")


app.command(rich_help_panel=_PREPARE, epilog=_calibration.EPILOG)(_calibration.calibrate)


@app.command(
    rich_help_panel=_RUN,
    epilog="Examples:\n\nhf-flash plan facebook/opt-6.7b --memory 4GiB\n\n"
    "hf-flash plan ./opt-1.3b-flash --memory 1GiB --context 4096 --json",
)
def plan(
    model: Model,
    memory: Memory = None,
    gate: Gate = "auto",
    sparsity: Sparsity = None,
    context: Context = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=MEMORY, help="Sequences.")] = 1,
    gate_bits: GateBits = 8,
    active: Active = 0.05,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show who would get how much of a memory cap, the smallest cap that would do, and how fast it would be.

    Reads headers only: nothing is loaded, repacked or, from the Hub, downloaded. Speed is told from what `hf-flash
    doctor` measured on this machine.
    """
    quiet()
    from hf_flash import session, show, show_speed
    from hf_flash.config import FlashConfig
    from hf_flash.preview import look

    config = FlashConfig(
        memory, gate=gate, context=context, batch_size=batch_size, gate_bits=gate_bits, sparsity=sparsity
    )
    preview = look(model, config, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    smallest = preview.smallest_cap
    if config.cap() < smallest and not as_json:  # show what it takes, then say no
        least = preview.with_options(memory=smallest)
        err.print(show.plan_view(least, least.plan()))
    made = session.planned(preview)
    speed = _doctor.expected(preview, made, active)
    figures = {
        "model": model, "converted": preview.converted, "dtype": str(preview.skeleton.dtype),
        "n_bytes": preview.n_bytes, "ffn_bytes": preview.ffn_bytes, "smallest_cap": smallest,
        "estimate": speed and speed.to_dict(),
    }  # fmt: skip
    view = Group(show.plan_view(preview, made), *show_speed.estimate_lines(speed))
    _report({**figures, **made.to_dict()}, view, as_json)


@app.command(
    rich_help_panel=_RUN,
    epilog='Examples:\n\nhf-flash run ./opt-1.3b-flash --memory 1GiB --prompt "The history of"\n\n'
    'hf-flash run Qwen/Qwen3-4B --memory 3GiB --prompt "Why is the sky blue?" --max-new-tokens 200\n\n'
    "cat question.txt | hf-flash run ./my-model-flash --prompt - > answer.txt",
)
def run(
    model: Model,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 64,
    memory: Memory = None,
    gate: Gate = "auto",
    sparsity: Sparsity = None,
    context: Context = None,
    raw: Raw = False,
    system: System = None,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    profile: Profile = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Generate text, and say what was read, found in memory and waited for.

    Text goes to stdout as it comes, figures to stderr. A stock model is repacked into the cache first, once; the cap is
    checked before that. Chat models get their template unless --raw is given.
    """
    quiet()
    import torch

    from hf_flash import session
    from hf_flash.config import FlashConfig
    from hf_flash.preview import look
    from hf_flash.profile import check_file

    if profile is not None:
        check_file(profile)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    config = FlashConfig(memory, gate=gate, context=context, sparsity=sparsity)
    config.memory = config.cap()  # "what is free" once, not again when the model is opened
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    preview = look(model, config, dtype=dtype, **options)
    theirs: dict[str, Any] = {"trust_remote_code": trust_remote_code} if tokenizer else options
    reader = session.load_tokenizer(tokenizer or model, **theirs)
    inputs = session.encode(reader, text, raw=raw, system=system)
    preview = session.fit_context(preview, inputs, max_new_tokens)
    made = session.planned(preview)
    if not preview.converted:
        hint("a stock checkpoint: repacked into the cache on first use (`hf-flash repack` makes a folder of your own)")
    opened = session.Session.open(preview, reader, **options)
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    with _doctor.with_profile(opened.model, profile) as profiled:
        done = _stream(opened, inputs, max_new_tokens, as_json, **sampling)
    times = profiled and profiled.breakdown()
    _report_run(preview, made, opened, done, as_json, **({"profile": times.to_dict()} if times else {}))
    if times:
        err.print(times.table(), highlight=False, markup=False, soft_wrap=True)
    if done.interrupted:
        raise KeyboardInterrupt


def _stream(opened: Any, inputs: Any, max_new_tokens: int, as_json: bool, **options: Any) -> Any:
    """Generate, with the text going where it belongs."""
    to = sys.stderr if as_json else sys.stdout
    done = opened.generate(inputs, max_new_tokens, lambda piece: print(piece, end="", flush=True, file=to), **options)
    print(file=to)
    return done


app.command(rich_help_panel=_RUN, epilog=_bench.EPILOG)(_bench.bench)
app.command(rich_help_panel=_RUN, epilog=_doctor.EPILOG)(_doctor.doctor)
app.command("eval", rich_help_panel=_RUN, epilog=_eval.EPILOG)(_eval.evaluate)


@app.command(
    rich_help_panel=_RUN, context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example:\n\nhf-flash serve ./opt-1.3b-flash --memory 2GiB --port 8000",
)  # fmt: skip
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="FOLDER", show_default=False, help="A repacked one, or a Hub repo; served alone."),
    ] = None,
    memory: Memory = None,
) -> None:
    """Start `transformers serve`, an OpenAI-compatible server, for models on flash.

    Further options are its own: --host, --port and others; `transformers serve --help` lists them.
    """
    from hf_flash import quantizer
    from hf_flash.serve import main as start

    quantizer.register()
    start([*([model] if model else []), *(["--memory", memory] if memory else []), *ctx.args])


@app.command(
    rich_help_panel=_RUN, epilog="Examples:\n\nhf-flash demo\n\nhf-flash demo --keep ./relu-flash --memory 64MiB"
)
def demo(
    memory: DemoMemory = None,
    max_new_tokens: MaxNewTokens = 48,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", show_default=False, help="Keep the repacked model here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """See it work in half a minute, with the small model that comes with the package.

    Repacks it, plans a cap that its FFN weights do not fit into, runs it from flash with the certified gate, and
    compares the tokens with those of the same model held in memory. Exits with 1 if one differs.
    """
    quiet()
    from hf_flash import demo as data
    from hf_flash import session, show
    from hf_flash.config import FlashConfig
    from hf_flash.preview import look
    from hf_flash.repack import repack as repack_folder

    say = err if as_json else out
    with tempfile.TemporaryDirectory(prefix="hf-flash-demo-") as temporary:
        folder = keep or Path(temporary) / f"{data.MODEL.name}-flash"
        _step(say, f"hf-flash repack {data.MODEL.name} {folder.name}")
        repack_folder(data.MODEL, folder)
        preview = look(folder, FlashConfig(memory, gate="certified", context=data.CONTEXT + max_new_tokens))
        if memory is None:
            preview = preview.with_options(memory=data.tight_cap(preview))
        made = session.planned(preview)
        _step(say, f"hf-flash plan {folder.name} --memory {made.memory >> 20}MiB --gate certified")
        say.print(show.plan_view(preview, made))
        _step(say, f"hf-flash run {folder.name} --memory {made.memory >> 20}MiB --gate certified --prompt ...")
        reader = session.load_tokenizer(str(folder))
        inputs = session.encode(reader, data.PROMPT, raw=True)
        opened = session.Session.open(preview, reader)
        say.print(data.PROMPT, end="", style="dim", highlight=False)
        done = _stream(opened, inputs, max_new_tokens, as_json)
        if done.interrupted:
            raise KeyboardInterrupt
        dense = data.dense_tokens(opened, inputs, max_new_tokens)
        _report_run(preview, made, opened, done, as_json, on=say, equal=dense == done.token_ids, prompt=data.PROMPT)
    equal = sum(a == b for a, b in zip(dense, done.token_ids, strict=False))
    if dense != done.token_ids:
        fail(f"tokens NOT equal to the dense model's: {equal} of {len(dense)} are. Please report this.")
    say.print(f"tokens equal to the dense model's: yes, all {equal}", style="green", highlight=False)


def _step(say: Console, command: str) -> None:
    say.print(f"\n$ {command}", style="bold", highlight=False, soft_wrap=True)


@app.command(
    rich_help_panel=_PREPARE,
    epilog="Examples:\n\nhf-flash inspect ./opt-1.3b-flash\n\nhf-flash inspect ./opt-1.3b-flash --layers",
)
def inspect(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", show_default=False, help="A repacked folder, or a Hub repo of one.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="A row per layer.")] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show what a repacked checkpoint holds: shapes, gates, files, sizes. Reads headers only."""
    quiet()
    from hf_flash import contents, show

    found = contents.contents(folder, revision=revision)
    _report(found.to_dict(), show.contents_view(found, layers), as_json)


@app.command(rich_help_panel=_PREPARE, epilog="Example:\n\nhf-flash verify ./opt-1.3b-flash")
def verify(folder: Folder, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Check every byte of a repacked checkpoint against its checksums, and that its files belong together.

    Exits with 1 and names every damaged place if one is found.
    """
    quiet()
    from hf_flash import show
    from hf_flash.verify import verify as verify_folder

    report = verify_folder(folder, trust_remote_code=trust_remote_code)
    _report(report.to_dict(), show.verify_view(report), as_json)
    if not report.ok:
        fail(
            f"{folder} is damaged. Delete the files that are named and fetch them again, or run the same "
            "`hf-flash repack` again: it writes what is missing."
        )


@app.command(
    rich_help_panel=_PREPARE,
    epilog="Examples:\n\nhf-flash push ./opt-1.3b-flash me/opt-1.3b-flash --private\n\n"
    "hf-flash push ./opt-1.3b-flash someone/opt-1.3b-flash --create-pr",
)
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", show_default=False, help="user/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repo if there is none.")] = False,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Of the commit.")] = "Upload flash checkpoint",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a repacked checkpoint to the Hub. Anyone can then run it by its name. Log in first: `hf auth login`."""
    quiet()
    from hf_flash.hub import push as push_folder

    url = push_folder(folder, repo_id, private=private or None, commit_message=message, create_pr=create_pr)
    _report({"url": url, "repo_id": repo_id}, url, as_json)


def _report_run(
    preview: Preview, made: Any, opened: Any, done: Any, as_json: bool, on: Console = err, **more: Any
) -> None:
    from hf_flash import show

    plan_dict = opened.stats.plan
    figures = {"model": preview.name, "memory": made.memory, "load_s": opened.load_s, **done.to_dict(), **more}
    if as_json:
        _report({**figures, "plan": plan_dict}, "", True)
    on.print(show.generation_view(done, made, opened.load_s))


def main() -> None:
    """Entry point of `hf-flash`."""
    app(prog_name="hf-flash")


if __name__ == "__main__":
    main()
