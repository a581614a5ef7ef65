"""What all tests share: the shipped model, its flash checkpoint, the dense oracle, and a header of versions."""

import ctypes
import importlib
import os
import platform
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_flash
from hf_flash import FlashConfig, attach
from hf_flash.budget import make_plan, smallest_cap
from hf_flash.checkpoint import locate
from hf_flash.families import find_blocks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHIPPED = Path(hf_flash.__file__).parent / "models" / "relu-books-5m"

# The models are so small that a second thread only waits, and for seconds where other jobs share the cores.
torch.set_num_threads(1)
# A shell has its background jobs ignore Ctrl-C, and tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OPENINGS = [  # 20 prompts; the tests crop all to the tokens of the shortest
    "It was a dark night and the wind had risen",
    "She looked at him for a moment, and then said",
    "The old man sat down by the fire with his",
    "There was a little girl who lived near the sea",
    "He had never seen so many people in one place",
    "In the morning they went down to the river and",
    "The captain gave the order, and the men ran to",
    "Once upon a time there was a king who had",
    "I do not know what you mean, said the doctor",
    "When the war was over he came back to his",
    "The house stood on a hill, and from the windows",
    "My dear friend, I have received your letter of the",
    "All the world knows that a young man must have",
    "The horse was tired, and the road was long and",
    "Upon my word, cried the colonel, I never heard such",
    "The law of this country does not allow a man",
    "At the end of the street there was a small",
    "His mother had died when he was only a child",
    "Nothing could be heard but the sound of the rain",
    "The ship lay at anchor in the bay, and her",
]


def pytest_configure(config: pytest.Config) -> None:
    """pytest drops the filter that hf_flash sets for this warning, which says what is meant to happen."""
    config.addinivalue_line("filterwarnings", "ignore:You passed .quantization_config. or equivalent:UserWarning")


def pytest_report_header() -> list[str]:
    """What a failure report must name: versions, and what this kernel and file system can do."""
    return [
        f"hf_flash {hf_flash.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"kernel {platform.release()}, {os.cpu_count()} CPUs",
        f"O_DIRECT in {tempfile.gettempdir()}: {_o_direct(Path(tempfile.gettempdir()))}; io_uring: {_io_uring()}",
    ]


def _o_direct(folder: Path) -> str:
    if not hasattr(os, "O_DIRECT"):
        return "no such flag here"
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            return f"refused ({error.strerror})"
    return "yes"


def _io_uring() -> str:
    """Whether the kernel sets up a ring (system call 425 on every architecture)."""
    if platform.system() != "Linux":
        return "not Linux"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(425, 1, ctypes.create_string_buffer(120))
    if fd < 0:
        return f"refused ({os.strerror(ctypes.get_errno())})"
    os.close(fd)
    return "yes"


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test lands in the user's cache, and nothing of the user's settings in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_FLASH_CACHE", str(tmp_path_factory.mktemp("hf_flash_cache")))
        patch.delenv("HF_FLASH_MEMORY", raising=False)
        yield


@pytest.fixture(autouse=True)
def activations_stay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model's activations are planned larger than its FFNs: with them lent nothing would be read again."""
    if request.node.get_closest_marker("lends") is None:
        monkeypatch.setattr(attach, "_lendable", lambda plan: plan.parts["KV cache"])
        monkeypatch.setattr(attach, "_sparable", lambda *of: 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toy matrices on several threads mostly wait for each other; scripts that set a number do not keep it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def import_example() -> Callable[[str], ModuleType]:
    """A script of examples/ as a module; it may import the others there, as when it is run."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(EXAMPLES))
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small ReLU model that comes with the package, as stock transformers saved it; a copy, not to be changed."""
    return shutil.copytree(SHIPPED, tmp_path_factory.mktemp("shipped") / SHIPPED.name)


@pytest.fixture(scope="session")
def flash_folder(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, repacked. Read only: copy it before changing it."""
    return hf_flash.repack(shipped, tmp_path_factory.mktemp("flash") / "relu-books", progress=False)


@pytest.fixture(scope="session")
def tokenizer(shipped: Path) -> transformers.PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped)


@pytest.fixture(scope="session")
def dense(shipped: Path) -> PreTrainedModel:
    """The oracle: the shipped model in stock transformers. Not to be changed."""
    return AutoModelForCausalLM.from_pretrained(shipped).eval()


@pytest.fixture(scope="session")
def prompts(tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """[20, n] token ids of different openings."""
    rows = [tokenizer(text).input_ids for text in OPENINGS]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


@pytest.fixture(scope="session")
def cap_for(flash_folder: Path) -> Callable[[str, str], int]:
    """Caps for the shipped model, from its own plan: cap_for(gate, want) -> bytes.

    `want`: "all" (every neuron stays in DRAM), "half" (half of them do), "least" (as few as can be while attention
    stays resident), "streamed" (the smallest cap that is accepted at all).
    """

    def cap(gate: str, want: str, dtype: torch.dtype = torch.float32) -> int:
        demand = _demand(flash_folder, FlashConfig(gate=gate, context=256), dtype)
        if want == "streamed":
            return smallest_cap(demand)
        full = make_plan(demand, 1 << 40).parts["FFN cache"]
        share = {"all": 1.0, "half": 0.5, "least": 0.0}[want]
        low, high = smallest_cap(demand), 1 << 30
        while high - low > 4096:
            middle = (low + high) // 2
            plan = make_plan(demand, middle)
            enough = not plan.streamed and plan.parts["FFN cache"] >= share * full
            low, high = (low, middle) if enough else (middle, high)
        return high

    return cap


def _demand(folder: Path, config: FlashConfig, dtype: torch.dtype) -> attach.Demand:
    stock = AutoConfig.from_pretrained(folder)
    del stock.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock, dtype=dtype)
    files = {path.name: path for path in sorted(folder.glob("flash-*.safetensors"))}
    geometry = attach.geometry_of(files, folder / "gates.safetensors")
    located = locate(model, [folder / "model.safetensors"])
    return attach.demand_of(model, find_blocks(model), geometry, config, located)
