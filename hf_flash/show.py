"""Plans, runs and checkpoints as tables for a terminal. Nothing here prints; cli.py does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_flash.budget import Plan
from hf_flash.contents import Contents, LayerContents
from hf_flash.layout import format_size
from hf_flash.preview import Preview
from hf_flash.session import Generation, Phase
from hf_flash.verify import VerifyReport

PACKED = "12 bits a weight, lossless"


def plan_view(preview: Preview, plan: Plan) -> RenderableType:
    """Who has what of the cap, and what a token will cost."""
    n = len(preview.blocks)
    kind = "flash checkpoint" if preview.converted else "stock checkpoint"
    dtype = str(preview.skeleton.dtype).removeprefix("torch.")
    head = (
        f"{preview.name}: {kind}, computes in {dtype}; {format_size(preview.n_bytes)} of weights, "
        f"{format_size(sum(layer.matrix_bytes for layer in preview.demand.layers))} of them in {n} FFN layers"
    )
    table = _table("memory goes to", "", "", right=(1,))
    for part, n_bytes in plan.parts.items():
        if n_bytes:
            table.add_row(part, format_size(n_bytes), _part_note(part, preview, plan))
    table.add_row("free", format_size(plan.memory - plan.total_bytes), "", end_section=True)
    table.add_row("cap", format_size(plan.memory), f"the smallest that would do: {format_size(preview.smallest_cap)}")
    return Group(_line(head), table, *map(_line, _reads(preview, plan)))


def _part_note(part: str, preview: Preview, plan: Plan) -> str:
    sketched = [preview.geometry[path] for path, gate in plan.gates.items() if gate in ("certified", "threshold")]
    stored = min((g.sketch_bits for g in sketched), default=0)
    bits = f"{plan.gate_bits}-bit" if plan.gate_bits == stored else f"{plan.gate_bits} of {stored} bits of the"
    matrices = [path for m in preview.demand.matrices if (path := m.path) not in plan.streamed]
    packed = f"; {len(plan.packed)} of {len(matrices)} in {PACKED}" if plan.packed else ""
    in_12 = any(layer.packed for layer in preview.demand.layers) and not plan.unpacked
    notes = {
        "always resident": "norms, biases, tied embeddings",
        "KV cache": f"{plan.context} tokens x batch {plan.batch_size}",
        "activations": f"a pass over {plan.max_tokens} tokens",
        "runtime": "threads, allocator, torch's scratch",
        "gates": f"{bits} sketches of {len(sketched)} layers" if sketched else "predictors",
        "books": "which neurons are in DRAM, and which are wanted",
        "batches": "neurons of a prompt on their way",
        "stream": "read buffers",
        "resident matrices": "attention, embeddings, head" + packed,
        "FFN cache": f"{_cached_share(preview, plan):.0%} of the FFN weights" + (f", in {PACKED}" if in_12 else ""),
    }
    return notes.get(part, "")


def _cached_share(preview: Preview, plan: Plan) -> float:
    """Share of the neurons, by their bytes, that have a place in DRAM."""
    sizes = {layer.path: layer.row_bytes for layer in preview.demand.layers}
    rows = {**plan.pinned_rows, **plan.slots}
    return sum(n * sizes[path] for path, n in rows.items()) / max(preview.ffn_bytes, 1)


def _reads(preview: Preview, plan: Plan) -> list[str]:
    """What a token reads, in words."""
    gates = Counter(plan.gates.values())
    lines = ["gate: " + ", ".join(f"{gate} in {n} layers" for gate, n in sorted(gates.items()))]
    packed = sum(layer.packed for layer in preview.demand.layers)
    if packed:
        lines.append(f"bundles on flash: {PACKED}" + ("" if packed == len(plan.gates) else f", in {packed} layers"))
    if plan.streamed:
        lookups = {m.path for m in preview.demand.matrices if m.lookup}
        others = [path for path in plan.streamed if path not in lookups]
        moved = sum(preview.located.by_param[f"{path}.weight"].n_bytes for path in others)
        words = [f"{len(others)} other matrices ({format_size(moved)})"] if others else []
        words += ["the input embedding (a row per token)"] if len(others) < len(plan.streamed) else []
        lines.append(f"streamed from flash as well: {' and '.join(words)}")
    reads = [format_size(plan.bytes_per_token)] if plan.bytes_per_token or set(gates) == {"all"} else []
    if "threshold" in gates:
        lines.append("LOSSY: activations below a threshold are dropped; `hf-flash eval` measures what that costs")
    reads += ["the neurons that may fire and are not cached"] if set(gates) != {"all"} else []
    if not plan.streamed and _cached_share(preview, plan) >= 1:
        reads = ["nothing, once the cache is warm: everything fits into this cap"]
    lines.append(f"read per new token: {' and '.join(reads)}")
    lent = plan.parts["KV cache"] + plan.parts["activations"]
    if plan.bytes_per_token and not preview.skeleton.config.is_encoder_decoder:
        least, full = (format_size(max(0, plan.bytes_per_token - n)) for n in (lent, 0))
        lines.append(f"while the context is short about {least} instead of {full}: what it does not fill holds weights")
    return lines


def generation_view(generation: Generation, plan: Plan, load_s: float) -> RenderableType:
    """What a run read, hit and waited for."""
    prompt, decode = generation.prompt, generation.decode
    table = _table("", "prompt", "new tokens", right=(1, 2))
    rows = {
        "tokens": lambda p: str(p.n_tokens),
        "seconds": lambda p: f"{p.seconds:.2f}",
        "tokens/s": lambda p: f"{p.tokens_per_s:.2f}",
        "read from flash": lambda p: format_size(p.stats["bytes_read"]),
        "bytes per token": lambda p: format_size(p.bytes_per_token),
        "neurons found in DRAM": lambda p: "-" if p.hit_rate is None else f"{p.hit_rate:.1%}",
        "waited for flash": lambda p: _seconds(p, "wait_s"),
        "gates": lambda p: _seconds(p, "gate_s"),
        "FFN arithmetic": lambda p: _seconds(p, "compute_s"),
    }
    for name, show in rows.items():
        table.add_row(name, show(prompt), show(decode) if decode.n_tokens else "-")
    peak, base = generation.peak_rss_bytes, generation.base_rss_bytes
    return Group(
        table,
        _line(
            f"opened in {load_s:.2f} s; first token after {prompt.seconds:.2f} s; "
            f"{decode.tokens_per_s:.2f} tokens/s after that"
        ),
        _line(
            f"peak memory (RSS) {format_size(peak)}, {format_size(max(0, peak - base))} more than before the model; "
            f"the cap is {format_size(plan.memory)}"
        ),
    )


def _seconds(phase: Phase, name: str) -> str:
    share = phase.stats[name] / phase.seconds if phase.seconds else 0.0
    return f"{phase.stats[name]:.2f} s ({share:.0%})"


def contents_view(contents: Contents, per_layer: bool = False) -> RenderableType:
    """Geometry, gates and files of a flash checkpoint."""
    n = len(contents.layers)
    head = f"{contents.name}: {contents.architecture} ({contents.model_type}), {n} FFN layers on flash"
    first = "FFN layer" if per_layer else "FFN layers"
    shapes = _table(first, "d_model", "d_ffn", "matrices", "dtype", "a neuron", "all", "sketch", right=(1, 2, 5, 6))
    if per_layer:
        for layer in contents.layers:
            shapes.add_row(layer.path, *_shape(layer), format_size(layer.n_bytes), _sketch([layer]))
    else:
        groups: dict[tuple[str, ...], list[LayerContents]] = {}
        for layer in contents.layers:
            groups.setdefault((*_shape(layer), str(layer.sketch_bits)), []).append(layer)
        for layers in groups.values():
            n_bytes = sum(layer.n_bytes for layer in layers)
            shapes.add_row(str(len(layers)), *_shape(layers[0]), format_size(n_bytes), _sketch(layers))
    files = _table("file", "holds", "bytes", right=(2,))
    for file in contents.files:
        if file.role != "other":
            files.add_row(Text(file.name), file.role, format_size(file.n_bytes))
    other = [file for file in contents.files if file.role == "other"]
    if other:
        files.add_row(f"{len(other)} others", "tokenizer, configs", format_size(sum(f.n_bytes for f in other)))
    files.add_section()
    files.add_row("", "", format_size(sum(file.n_bytes for file in contents.files)))
    asked = contents.options.get("gate", "auto")
    gate = f"gate: {contents.gate}" + (f" (by {asked!r})" if asked != contents.gate else "")
    packed = sum(layer.packed for layer in contents.layers)
    lines = [_line(f"bundles: {PACKED}" + ("" if packed == n else f", in {packed} of {n} layers"))] if packed else []
    return Group(_line(head), shapes, files, *lines, _line(gate))


def _shape(layer: LayerContents) -> tuple[str, ...]:
    matrices = "gate+up+down" if layer.gated else "up+down"
    return str(layer.d_model), str(layer.n_neurons), matrices, layer.dtype, format_size(layer.row_bytes)


def _sketch(layers: Sequence[LayerContents]) -> str:
    if not layers[0].sketch_bits:
        return "none"
    usual = ", calibrated" if all(layer.calibrated for layer in layers) else ""
    return f"{layers[0].sketch_bits}-bit, {format_size(sum(layer.sketch_bytes for layer in layers))}{usual}"


def verify_view(report: VerifyReport) -> RenderableType:
    """Files checked, and what is wrong with them."""
    table = _table("file", "holds", "bytes", "", right=(2,))
    for file in report.files:
        verdict = "[red]damaged[/]" if file.problems else "[green]whole[/]" if file.checked else "header only"
        table.add_row(Text(file.name), file.role, format_size(file.n_bytes), verdict)
    lines = [_line(f"note: {note}") for note in report.notes]
    lines += [Text(f"problem: {problem}", style="red", no_wrap=True, overflow="ignore") for problem in report.problems]
    rate = f"{format_size(report.n_bytes)} in {report.seconds:.1f} s"
    n = len(report.problems)
    verdict = "every byte is as it was written" if report.ok else f"{n} problem{'s' if n > 1 else ''}"
    return Group(table, *lines, _line(f"{report.folder}: {verdict} ({rate})"))


def _table(*titles: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i in right else "left", overflow="fold")
    return table


def _line(text: str) -> Text:
    return Text(text, overflow="fold")
