"""Every benchmark runs with --smoke, checks its outputs and ends in one JSON line; their helpers do what they say."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
QUESTIONS = (
    "footprint",
    "cap",
    "generate",
    "load",
    "certified",
    "tokens",
    "reads",
    "bandwidth",
    "kernels",
    "scaling",
    "predicted",
    "threshold",
    "eviction",
    "order",
)


@pytest.fixture(scope="session")
def bench_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tiny model, so that it is built and repacked once."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """benchmarks/common.py and benchmarks/cgroup.py, importable as the benchmarks import them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("common"), importlib.import_module("cgroup")
    ours = {file.stem for file in BENCHMARKS.glob("*.py")}
    for name in ours & set(sys.modules):
        sys.modules.pop(name, None)


def run_benchmark(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


def check_every_peer_has_a_row(result: dict, output: str) -> None:
    """A peer that is not installed, or cannot run a model, is a row that says so."""
    assert [m["model"] for m in result["models"]] == ["tiny", "tiny-opt"]
    for m in result["models"]:
        found = m["caps"][0]["sides"]
        assert set(found) == {
            "hf_flash",
            "accelerate",
            "accelerate-plain",
            "mmap",
            "airllm",
            "airllm-nogc",
            "llama.cpp",
        }
        for side, s in found.items():
            assert s["words"] in output
            assert "equal" in s["words"] or (s["words"].startswith("not run: ") and side[:3] in ("air", "lla"))
    assert result["models"][1]["caps"][0]["sides"]["airllm"]["words"].startswith("not run: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_smoke(name: str, bench_dir: Path, tmp_path: Path) -> None:
    where = ("--dir", str(bench_dir), "--json", str(tmp_path / "out.json"))
    done = run_benchmark(name, "--smoke", "--threads", "1", *where)  # several wait for each other on a busy machine
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[1].startswith("machine: ")
    if lines[-1].startswith("skipped: "):
        pytest.skip(lines[-1])
    result = json.loads(lines[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["benchmark"] == name
    assert result.get("right", True)
    if name == "generate":
        check_every_peer_has_a_row(result, done.stdout)
    assert str(ROOT) not in lines[-1] and str(bench_dir) not in lines[-1], "a folder of this machine in the output"


@pytest.mark.parametrize("name", [*QUESTIONS, "models", "cgroup", "table", "plots", "llama_side"])
def test_help_says_what_is_asked(name: str) -> None:
    done = run_benchmark(name, "--help")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 8


def test_the_tables_are_those_of_the_results() -> None:
    done = run_benchmark("table", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_are_drawn_from_the_results(helpers: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")
    plots = importlib.import_module("plots")
    floor = {"s_per_token": 0.1}
    row = {"model": "tiny-opt", "s_per_token": 0.2, "range": [0.1, 0.3], "dense_s_per_token": 0.1, "share": 0.5,
           "model_bytes": 10**9, "firing": 0.03, "floor": floor, "our_floor": floor}  # fmt: skip
    refused = {"model": "tiny-opt", "share": 0.3, "words": "failed: too small"}
    series = {"cap": [refused, row], "size": [row, {**row, "model_bytes": 2 * 10**9}], "sparsity": [row]}
    about = {"machine": {"cpu": "x", "n_cpus": 2, "commit": "abc"}, "when": "2026-01-01T00:00:00Z"}
    result = {"benchmark": "scaling", "series": series, "gate": "auto", "threads": 2, **about}
    (tmp_path / "scaling.json").write_text(json.dumps(result))
    sides = {"hf_flash": row, "airllm": {"words": "not run: why"}, "llama.cpp": row}
    cap = {"memory": 5 * 10**8, "accelerate_resident": None, "sides": sides, "our_floor": floor}
    model = {"model": "tiny-opt", "weights": "RANDOM weights", "model_bytes": 10**9, "caps": [cap]}
    names = [name for name, *_ in plots.EVICTION]
    window = {"k": 2, "read": 3.0, "most": 50.0, "mean": 40.0}
    policies = {"read": {name: [9.0, 2.0] for name in names}, "shares": [0.2, 0.5], "row_bytes": 512, "n_neurons": 100}
    evicted = {"benchmark": "eviction", "model": "tiny", "windows": [window], **policies, **about}
    (tmp_path / "eviction.json").write_text(json.dumps(evicted))
    (tmp_path / "generate.json").write_text(json.dumps({"benchmark": "generate", "models": [model], **about}))
    drawn = plots.draw(tmp_path, tmp_path / "img")
    assert {file.name for file in drawn} == {
        "scaling-cap.png", "scaling-size.png", "scaling-sparsity.png", "generate_tiny-opt.png", "eviction.png",
    }  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)


def test_every_figure_of_the_page_is_there() -> None:
    text = (BENCHMARKS / "README.md").read_text()
    named = re.findall(r"\]\((\.\./docs/img/[^)]+)\)", text)
    assert named
    for name in named:
        assert (BENCHMARKS / name).is_file(), name


def test_floors_count_what_a_token_needs(helpers: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    floors, synthetic = (importlib.import_module(name) for name in ("floors", "synthetic"))
    opt = synthetic.planted_opt(tmp_path / "opt", "tiny-opt", 0.05)
    speeds = {"disk_bytes_per_s": 1e6, "memory_bytes_per_s": 1e7}
    sizes = floors.tensor_bytes(opt)
    needed = sum(sizes.values()) - 514 * 64 * 2  # a token needs one row of the positions; the embedding is the head
    found = floors.lossless(opt, 100_000, speeds)
    assert found["touched_bytes"] == needed and found["read_bytes"] == needed - 100_000
    assert found["s_per_token"] == pytest.approx((needed - 100_000) / 1e6)
    assert floors.n_neurons(opt) == 4 * 256
    (tmp_path / "flash").mkdir()
    (tmp_path / "flash" / "flash-00001-of-00001.safetensors").write_bytes(bytes(1024 * 256))
    spec = {
        "model_dir": opt, "converted_dir": tmp_path / "flash", "n_neurons": 1024, "ids": [5, 6, 7], "n_tokens": 4,
    }  # fmt: skip
    stats = {"sketch_bytes": 625, "gate_bits": 6, "resident_bytes": 5000, "neurons_wanted": 30, "n_tokens": 3}
    row = {"read_bytes_per_token": 5e5, "stats": stats}
    # Of 6 1/4 bits a weight all are looked at for their upper 4 1/4, wanted neurons for the other 2.
    kv = 5 * 4 * 2 * 64 * 2  # of 3 tokens, and on average 2 of those that follow: 4 layers, keys and values, bfloat16
    touched = 5000 + 425 + 200 * 10 / 1024 + 10 * 256 + kv
    assert floors.ours(spec, row, speeds)["touched_bytes"] == pytest.approx(touched)
    stats["sketch_bytes"] = 0
    assert floors.ours(spec, row, speeds)["touched_bytes"] == 5000 + 1024 * 256 + kv


def test_rotary_rows_go_from_halves_to_pairs(helpers: tuple[ModuleType, ModuleType]) -> None:
    import numpy as np

    gguf_files = importlib.import_module("gguf_files")
    rows = np.arange(8)[:, None] * np.ones((1, 3))  # two heads of four: halves (0 1 | 2 3), (4 5 | 6 7)
    assert gguf_files.rotary_order(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_no_absolute_folder_of_a_machine() -> None:
    for file in BENCHMARKS.rglob("*"):
        if file.suffix in (".py", ".md", ".json"):
            text = file.read_text()
            assert "/home/" not in text and str(ROOT) not in text, file


def test_sizes(helpers: tuple[ModuleType, ModuleType]) -> None:
    _, cgroup = helpers
    assert cgroup.parse_size("1.5GiB") == 3 << 29
    assert cgroup.parse_size("130MB") == 130_000_000
    assert cgroup.parse_size("4096") == 4096


def test_a_tie_is_told_from_an_error(helpers: tuple[ModuleType, ModuleType]) -> None:
    common, _ = helpers
    margins = [0.5, 0.001, 0.5]
    assert common.compare_tokens([1, 2, 3], [1, 2, 3], margins)["right"]
    assert common.compare_tokens([1, 9, 3], [1, 2, 3], margins) == {
        "equal": 1, "of": 3, "right": True, "words": "1/3 equal, then a tie (margin 0.10%)",
    }  # fmt: skip
    assert not common.compare_tokens([9, 2, 3], [1, 2, 3], margins)["right"]
    assert not common.compare_tokens([1, 2], [1, 2, 3], margins)["right"], "too few tokens"


def test_evicted_files_leave_the_page_cache(helpers: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    _, cgroup = helpers
    file = tmp_path / "data"
    file.write_bytes(os.urandom(1 << 20))
    if cgroup.resident_bytes(file) == 0:
        pytest.skip("this file system has no page cache to look at")
    left = cgroup.evict([tmp_path])
    if left == 1 << 20:
        pytest.skip("this file system does not drop pages when asked (tmpfs)")
    assert left == 0


def test_cgroup_files_of_version_2(helpers: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """The names and formats of v2, on a made-up folder: machines of one version test both."""
    _, cgroup = helpers
    group = cgroup.GroupV2(tmp_path)
    for name, text in {
        "memory.max": "max\n", "memory.swap.max": "max\n", "memory.peak": "4096\n", "memory.current": "100\n",
        "memory.stat": "anon 77\nfile 5\n", "memory.events": "low 0\noom 1\noom_kill 1\n",
        "io.stat": "8:0 rbytes=10 wbytes=2\n8:1 rbytes=32 wbytes=0\n",
    }.items():  # fmt: skip
        (group.path / name).write_text(text)
    group.set_limit(1 << 20)
    assert group.number("memory.max") == 1 << 20 and group.number("memory.swap.max") == 0
    assert group.number(group.peak_file) == 4096 and group.stat(group.stat_anon_key) == 77
    assert group.oom_kills() == 1 and group.disk_read_bytes() == 42


def test_a_run_above_its_cap_is_killed(helpers: tuple[ModuleType, ModuleType]) -> None:
    _, cgroup = helpers
    why = cgroup.why_unavailable()
    if why:
        pytest.skip(why)
    hog = [sys.executable, "-c", "x = bytearray(200 << 20); print('RESULT {}')"]
    killed = cgroup.run(hog, limit_bytes=100 << 20)
    assert not killed.ok and killed.oom_killed
    with pytest.raises(RuntimeError, match="out-of-memory"):
        killed.result()
    fits = cgroup.run(hog, limit_bytes=400 << 20)
    assert fits.ok and fits.result() == {} and fits.peak_bytes > 200 << 20


def test_without_rights_the_reason_is_given(
    helpers: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cgroup = helpers
    monkeypatch.setattr(cgroup, "V1_ROOT", tmp_path / "none")
    monkeypatch.setattr(cgroup, "V2_ROOT", tmp_path / "none")
    assert "no memory cgroup is mounted" in cgroup.why_unavailable()
