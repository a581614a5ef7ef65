"""What a machine can do is measured with a file that nobody finds afterwards, kept by device, and put into words."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_hub import clean_env
from hypothesis import given
from hypothesis import strategies as st

from hf_flash import probe
from hf_flash.errors import DiskFullError, FlashConfigError
from hf_flash.probe import Probe, ReadSpeed
from hf_flash.show_speed import doctor_view, limits

MIB = 1 << 20
SMALL: dict[str, Any] = {"file_bytes": 8 * MIB, "sweep_bytes": 16 * MIB, "seconds": 0.001, "progress": False}

# A disk that does 70,000 requests/s and 1 GiB/s, and 20,000 reads/s one at a time.
READS = tuple(
    ReadSpeed(size, depth, min(20_000.0 if depth == 1 else 70_000.0, 1024 * MIB / size))
    for size in probe.SIZES
    for depth in probe.DEPTHS
)
PROBE = Probe(
    "2026-01-01T00:00:00+00:00", "box", "a processor, 2 cores", "8:1", "/dev/sda1 (ext4)", "/models", 512 * MIB, True,
    False, "io_uring", "", True, True, "x86-64-v3 (AVX2)", READS, {1: 10.0 * 1024 * MIB, 2: 20.0 * 1024 * MIB},
    256 * MIB, 8 << 30, None,
)  # fmt: skip


@pytest.mark.parametrize("reader", ["threads", "auto"])
def test_measure(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_READER", reader)
    threads = torch.get_num_threads()
    found = probe.measure(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
    assert {(r.n_bytes, r.depth) for r in found.reads} == {(s, d) for s in probe.SIZES for d in probe.DEPTHS}
    assert all(read.reads_per_s > 0 for read in found.reads)
    assert set(found.memory) == {1, threads} and all(speed > 1e8 for speed in found.memory.values())
    assert found.fresh and found.file_bytes == 8 * MIB and found.folder == str(tmp_path.resolve())
    assert (found.reader, found.reader_note) == ("threads", "HF_FLASH_READER=threads") or reader == "auto"
    assert found.available_bytes > 0
    assert Probe.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_flash_file_that_is_there_is_read_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "flash-00001-of-00001.safetensors").write_bytes(bytes(MIB))  # too small
    (tmp_path / "model" / "flash-00001-of-00001.safetensors").write_bytes(bytes(9 * MIB))
    (tmp_path / "flash-00002-of-00002.safetensors").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(probe.tempfile, "NamedTemporaryFile", None)
    found = probe.measure(tmp_path, **SMALL)
    assert not found.fresh and found.file_bytes == 9 * MIB


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlashConfigError, match="is no folder"):
        probe.measure(tmp_path / "nowhere", **SMALL)
    with pytest.raises(DiskFullError, match=r"No room in .* takes 1048576\.0 TiB"):
        probe.measure(tmp_path, **{**SMALL, "file_bytes": 1 << 60})
    if os.geteuid():
        tmp_path.chmod(0o500)
    else:

        def refuse(**kwargs: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(probe.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(FlashConfigError, match=r"cannot be written to \(Permission denied\)"):
        probe.measure(tmp_path, **SMALL)
    monkeypatch.setenv("HF_FLASH_READER", "smoke")
    with pytest.raises(FlashConfigError, match="HF_FLASH_READER"):
        probe.measure(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_behind(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(fd: int) -> None:
        assert [path.name[:17] for path in tmp_path.iterdir()] == [".hf_flash-doctor-"]
        raise error

    monkeypatch.setattr(probe.os, "fsync", stop)
    with pytest.raises(DiskFullError if isinstance(error, OSError) else KeyboardInterrupt):
        probe.measure(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from hf_flash import probe
speed = probe._speed
def slow(*args):
    print("measuring", flush=True)
    time.sleep(0.5)
    return speed(*args)
probe._speed, probe.measure.__kwdefaults__["file_bytes"] = slow, 8 << 20
sys.argv = ["hf-flash", "doctor", {folder!r}]
from hf_flash.cli import main
main()
"""


def test_ctrl_c(tmp_path: Path) -> None:
    code = SLOW.format(folder=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_env()
    )
    assert child.stdout is not None and child.stdout.readline().strip() == "measuring"
    assert len(list(tmp_path.iterdir())) == 1
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_results_are_kept_by_machine_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    assert probe.kept(cache, tmp_path) is None
    mine = dataclasses.replace(PROBE, machine=probe.platform.node(), device=probe.device_of(tmp_path))
    path = probe.keep(mine, cache)
    assert probe.kept(cache, tmp_path) == probe.kept(cache, tmp_path / "not" / "yet") == mine
    probe.keep(PROBE, cache)  # another machine's, another disk's
    probe.keep(dataclasses.replace(mine, device="1:2"), cache)
    assert probe.kept(cache, tmp_path) == mine and len(list(path.parent.iterdir())) == 3
    assert probe.kept(cache, Path("/proc")) is None
    for text in ("", "{", "[]", "{}", json.dumps({**mine.to_dict(), "reads": []}), json.dumps({"reads": 1})):
        path.write_text(text)
        assert probe.kept(cache, tmp_path) is None

    def full(self: Path, text: str, **kwargs: object) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DiskFullError):
        probe.keep(mine, cache)
    assert len(list(path.parent.iterdir())) == 3


def test_speeds() -> None:
    assert PROBE.flash_bytes_per_s() == 1024 * MIB
    assert PROBE.flash_bytes_per_s(512) == 512 * 70_000
    assert PROBE.flash_bytes_per_s(4096) == 4096 * 70_000
    assert PROBE.flash_bytes_per_s(64 << 20) == pytest.approx(1024 * MIB)
    assert PROBE.memory_bytes_per_s == 20 * 1024 * MIB
    assert PROBE.best(4096).depth > 1


@given(st.integers(1, 1 << 24), st.integers(1, 1 << 24))
def test_larger_reads_are_never_slower_on_such_a_disk(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert PROBE.flash_bytes_per_s(small) <= PROBE.flash_bytes_per_s(large) * (1 + 1e-9)


def test_words() -> None:
    first, alone, memory = limits(PROBE)
    assert first == (
        "Reads below 16.0 KiB are bound by requests: 70,000/s of 4.0 KiB (273.4 MiB/s). From 16.0 KiB by bandwidth: "
        "1.0 GiB/s."
    )
    assert alone == "A small read alone takes 50 µs; 8 under way give 3.5 times as many."
    assert "as 20 bytes from memory" in memory
    slow = dataclasses.replace(
        PROBE, reads=tuple(ReadSpeed(r.n_bytes, r.depth, 100 * MIB / r.n_bytes) for r in READS), virtual=True
    )
    assert limits(slow)[0] == "Reads of every size are bound by bandwidth: 100.0 MiB/s."
    assert "its host may hold the file" in limits(slow)[-1]


def test_view() -> None:
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        console.print(doctor_view(dataclasses.replace(PROBE, direct=False, reader="threads", reader_note="no ring")))
    text = capture.get()
    for words in (
        "box: a processor, 2 cores", "/dev/sda1 (ext4), device 8:1", "one at a time", "70,000",
        "20.0 GiB/s on 2 threads", "reader: threads (no ring), O_DIRECT refused here",
        "kernels: native, x86-64-v3", "no cgroup limit",
    ):  # fmt: skip
        assert words in text, words
