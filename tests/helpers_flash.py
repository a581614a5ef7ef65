"""Flash files of random layers, and a reader that lands bytes when told to: what tests of the lower floors share."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from hf_flash.errors import ReadError
from hf_flash.format import FORMAT_VERSION, TensorFileWriter, TensorSpec
from hf_flash.layout import BundleLayout
from hf_flash.packing import choose_base, count_exponents, pack
from hf_flash.readers import Read, Reader, Ticket
from hf_flash.store import DTYPE_NAMES, LAYERS_KEY, escapes_name


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """uint8 noise."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_layers(folder: Path, layers: dict[str, tuple[BundleLayout, torch.Tensor]]) -> dict[str, Path]:
    """A flash file with some layers; each is its layout and its rows, [n_neurons, row_bytes] uint8, not packed yet."""
    path = folder / "flash-00001-of-00001.safetensors"
    specs, geometry = [], {}
    lists: dict[str, torch.Tensor] = {}
    for index, (module, (layout, rows)) in enumerate(layers.items()):
        base = None
        if layout.packed:
            values = rows.view(torch.bfloat16)[:, : layout.n_elements]
            base = choose_base(count_exponents(values))[0]
            rows, how = pack(values, base, torch.zeros(len(rows), layout.row_bytes, dtype=torch.uint8))
            neurons = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(how.start.diff())
            lists[escapes_name(module)] = torch.stack([neurons, how.escapes], dim=1).contiguous()
            layers[module] = (layout, rows)
        specs.append(TensorSpec(f"{module}.bundles", "U8", tuple(rows.shape), rows.numel(), 4 * layout.row_bytes))
        geometry[f"{module}.bundles"] = {
            "index": index, "module": module, "n_neurons": len(rows), "d_model": layout.d_model,
            "d_out": layout.d_out, "gated": layout.gated, "dtype": DTYPE_NAMES[layout.dtype], "exponent": base,
        }  # fmt: skip
    specs += [TensorSpec(name, "I32", tuple(t.shape), t.nbytes) for name, t in lists.items()]
    writer = TensorFileWriter(path, specs, {LAYERS_KEY: json.dumps(geometry)}, aligned=True)
    for module, (_, rows) in layers.items():
        writer.write(f"{module}.bundles", memoryview(rows.numpy()))
    for name, pairs in lists.items():
        writer.write(name, pairs.view(torch.uint8).numpy().data)
    writer.finish()
    return {path.name: path}


class FakeReader(Reader):
    """Reads whole files into memory once; every read is logged, and lands or fails when the test says so.

    Args:
        late: bytes land when the ticket is waited for, and not at once: shows who looks too early. At once shows who
            lets a buffer be overwritten that is still in use.
        fail: called with each read; True makes it fail.
        strict: refuse a buffer that an earlier read has not landed in yet.
    """

    def __init__(
        self, late: bool = False, fail: Callable[[Read], bool] = lambda read: False, strict: bool = False
    ) -> None:
        self.late, self.fail, self.strict, self.log, self.closed = late, fail, strict, [], False
        self._under_way: list[tuple[_FakeTicket, list[tuple[int, int]]]] = []
        self._files: list[tuple[Path, bytes]] = []

    def open(self, path: Path) -> int:
        self._files.append((path, Path(path).read_bytes()))
        return len(self._files) - 1

    def submit(self, reads: list[Read]) -> Ticket:
        if self.closed:
            raise ReadError(9, "closed")
        self.log += [(read.file, read.offset, sum(map(len, read.buffers))) for read in reads]
        ticket = _FakeTicket([(read, self.fail(read)) for read in reads], self._files)
        if self.strict:
            ranges = [_addresses(buffer) for read in reads for buffer in read.buffers]
            self._under_way = [(t, busy) for t, busy in self._under_way if not t.ready()]
            for _, busy in self._under_way:
                assert not any(a < d and c < b for a, b in ranges for c, d in busy), "a read is under way into it"
            self._under_way.append((ticket, ranges))
        if not self.late:
            ticket.land()
        return ticket

    def close(self) -> None:
        self.closed = True


def _addresses(buffer: memoryview) -> tuple[int, int]:
    begin = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    return begin, begin + len(buffer)


class _FakeTicket(Ticket):
    def __init__(self, reads: list[tuple[Read, bool]], files: list[tuple[Path, bytes]]) -> None:
        super().__init__(len(reads))
        self._reads, self._files = reads, files

    def land(self) -> None:
        for read, fails in self._reads:
            path, data = self._files[read.file]
            at, error = read.offset, None
            if fails or read.offset + (read.need or sum(map(len, read.buffers))) > len(data):
                error = ReadError(5, f"{path} at offset {read.offset}: injected")
            for buffer in read.buffers:
                piece = b"\xee" * len(buffer) if error else data[at : at + len(buffer)]
                buffer[: len(piece)] = piece
                at += len(buffer)
            self.part_done(error)
        self._reads = []

    def settle(self) -> None:
        self.land()

    def wait(self) -> None:
        self.land()
        super().wait()


assert FORMAT_VERSION == 2, "a new version: add its rules to docs/format.md, and a test that the old one is still read"
