"""The package is a house: a module imports from the floors below its own or from beside it, never from above.

Whoever reads from the ground up meets nothing that was not explained before. A new module gets a place in FLOORS; where
it does not fit, it knows too much.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_flash

FLOORS = """
words            errors  stats  memory  plan  ops  trace  families  native  packing  tight  ordered  texts  scoring
what there is    layout  config  window  budget  check  trial  norms
files            format  readers  gates  card  corpus
a checkpoint     store  checkpoint  hub  output  probe  estimate  gate_file
rows in DRAM     cache  packed_sum  ring  stream  resident  kv  attention
an FFN           step  engine  sweep  sparse  linear  ffn
a layer          attention_step  layer_calls  layer_step  early  lookahead  tap  recording  fit  balance  order  loan
a model          attach  repack  save
what users call  preview  thresholds  usual  quantizer  patch  verify  contents  profile  measures
sessions         session  calibrate  serve  demo  ladder  show  show_speed  evaluate  show_eval
programs         options  terminal
commands         doctor  bench  calibration  eval_command  cli  __init__  __main__
"""

# A command imports torch and transformers only when it needs them, and with them most of our own modules.
IMPORTS_IN_FUNCTIONS = {"bench", "cli", "doctor", "calibration", "eval_command"}

PACKAGE = Path(hf_flash.__file__).parent


def floors() -> dict[str, int]:
    """Module -> floor, counted from the ground. A subpackage stands as one module."""
    lines = [line.split("  ", 1)[1].split() for line in FLOORS.strip().splitlines()]
    return {module: number for number, modules in enumerate(lines) for module in modules}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(node: ast.AST, in_function: bool = False) -> list[tuple[str, bool, int]]:
    """(module of ours, whether inside a function, line) for every import below a node."""
    found = []
    for child in ast.iter_child_nodes(node):
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            names = [child.module or ""]
            if child.module == "hf_flash":  # from hf_flash import ops, but also: from hf_flash import __version__
                names = [f"hf_flash.{alias.name}" for alias in child.names]
        known = floors()
        for name in names:
            top, _, rest = name.partition(".")
            if top == "hf_flash":
                first = rest.split(".")[0]
                found.append((first if first in known else "__init__", in_function, child.lineno))
        found += imports(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))
    return found


def test_every_module_has_a_floor() -> None:
    names = FLOORS.split("\n")
    there = {module_of(path) for path in files()}
    assert there == set(floors()), "the table in this file and the modules of the package differ"
    assert sum(len(line.split("  ", 1)[1].split()) for line in names if line) == len(floors()), "one place each"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_below_or_beside(path: Path) -> None:
    known, own = floors(), module_of(path)
    for module, in_function, line in imports(ast.parse(path.read_text())):
        where = f"{path.name}:{line}"
        assert known[module] <= known[own], f"{where}: {own} imports {module} from a floor above"
        if own not in IMPORTS_IN_FUNCTIONS:
            assert not in_function, f"{where}: {module} is imported inside a function; import it at the top"


def test_modules_of_one_floor_import_each_other_in_one_direction() -> None:
    """Python would often get away with a cycle; a reader would not. What `cli` imports in functions counts too."""
    graph: dict[str, set[str]] = {}
    for path in files():
        graph.setdefault(module_of(path), set()).update(m for m, *_ in imports(ast.parse(path.read_text())))
    for module, below in graph.items():
        below.discard(module)  # files of one subpackage
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle
