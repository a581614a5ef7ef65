"""What the allocator and torch's matrix library are told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hf_flash import memory

SCRIPT = """
import os, sys, torch
from hf_flash import memory
if sys.argv[1] == "few":
    memory.keep_few_kernels()
x = torch.randn(1500, 512).bfloat16()
torch.nn.functional.linear(x[:3], x)  # threads, libraries

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

before = anonymous()
for n in range(1000, 1300):
    torch.nn.functional.linear(x[:100], x[:n])
print((anonymous() - before) >> 10)
"""


def grown(how: str) -> int:
    env = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    out = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, env=env)
    return int(out.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_shapes_do_not_pile_up_in_memory() -> None:
    few, many = grown("few"), grown("all")
    if many < 60:
        pytest.skip(f"torch's library keeps {many} MiB for 300 shapes on this CPU")
    assert few < many / 3


def test_what_the_user_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    memory.keep_few_kernels()

    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(memory.KERNELS_KEPT)


def test_discarded_memory_is_zero_and_can_be_written_again() -> None:
    tensor = memory.aligned_empty(5 << 20)
    tensor.fill_(7)
    part = tensor[100_001 : 4 << 20]
    memory.discard(part)
    first = -part.data_ptr() % 4096
    assert tensor[:100_001].eq(7).all() and tensor[4 << 20 :].eq(7).all(), "a byte outside is gone"
    inner = part[first : first + (len(part) - first) // 4096 * 4096]
    assert not inner.any() and part[:first].eq(7).all()
    inner.fill_(3)
    assert int(inner.sum(dtype=torch.int64)) == 3 * len(inner)
