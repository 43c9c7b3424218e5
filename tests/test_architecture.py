"""The rules a reader relies on: who may import whom; how long, named and documented things are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "domino_jax"
# Folders of tests that mirror no folder of the package.
OTHER_TESTS = {"accelerator", "parity", "scripts"}

# Rank, folder, files. A file imports lower ranks and the files before it in its own row.
# Change this table when the design changes, never to make an import pass.
TABLE = (
    (0, "", "strict parse files finite chips stages"),
    (0.2, "config", "keys sizes heads model draft sections run"),
    (0.3, "", "sharding progress marks"),
    (1, "kernels", "causal_attention cache products scale largest softmax operands"),
    (1, "kernels", "blocks_by_tiles tpu_tiles blocks_on_tpu block_attention token_loss"),
    (1, "kernels", "vocabulary_loss"),
    (1.5, "layers", "dense norm rotary attention"),
    (1.5, "formats", "safetensors rope_keys gguf gguf_tokenizer"),
    (2, "data", "renderer rendering template conversations packing pipeline features"),
    (2, "target", "moe model decoder_keys load gguf resolve fingerprint"),
    (2, "draft", "blocks mask head backbone build"),
    (2.5, "interop", "hf_config hf start engines"),
    (2.7, "decoding", "filters acceptance decoder speculate generate counts batch_log prompts"),
    (2.7, "decoding", "regenerate compare ngram intervals speed replay evaluate cycle"),
    (2.7, "decoding", "known_answers evaluation responses servers endpoint"),
    (3, "training", "flops curriculum loss objectives step_metrics modules domino_module"),
    (3, "training", "log metrics window optimizer step program records checkpoint run_directory"),
    (3, "training", "inputs start preflight prepare rollout preview capture skips speed trace"),
    (3, "training", "heldout loop"),
    (4, "", "compiled arithmetic places plan plan_table report"),
    (4, "page", "sources growth cells verdict tables charts pictures notes document"),
    (5, "cli", "interrupts shared config data train plan decode evaluate report checkpoint verbs"),
    (6, "", "__main__"),
)
# The package's `__init__` gathers the public names of ranks 0 to 3; a folder's `__init__` is the
# last file of its row.
RANK_OF_TOP = 3.5
ROWS: dict[tuple[float, str], list[str]] = {}
for _rank, _folder, _names in TABLE:
    ROWS.setdefault((_rank, _folder), []).extend(_names.split())
PLACES = {"": (RANK_OF_TOP, "top", 0)} | {
    f"{folder}.{name}".strip("."): (rank, f"{rank}/{folder}", order)
    for (rank, folder), names in ROWS.items()
    for order, name in enumerate((*names, "") if folder else names)
}
# References and tools of the tests: running the product needs none of them.
TEST_ONLY = {"torch", "nemo_automodel", "dflash", "chex", "pytest", "hypothesis"}
# Of processes that answer before jax is there, or must not hold a part of the device themselves.
WITHOUT_JAX = {
    "strict",
    "parse",
    "files",
    "finite",
    "config.keys",
    "config.sizes",
    "config.heads",
    "config.model",
    "config.draft",
    "config.sections",
    "config.run",
    "chips",
    "stages",
    "training.flops",
    "training.log",
    *(f"page.{name}" for name in ("sources", "growth", "cells", "verdict", "tables", "charts")),
    *(f"page.{name}" for name in ("pictures", "notes", "document")),
}
MESH_AXES = {"fsdp", "tensor"}
MAX_LINES = 400
MAX_COLUMNS = 100  # ruff lets a line with a pragma be longer
MAX_FUNCTION_LINES = 60


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """`domino_jax/draft/mask.py` -> `draft.mask`; a folder's `__init__.py` is the folder.

    The package's own `__init__.py` is "".
    """
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, at any depth, `from` names included."""
    # Any file under a folder lies beside the folder's own `__init__`, so a folder counts itself for
    # relative imports.
    folders = {folder for _, folder in ROWS}
    package = ["domino_jax", *module.split(".")] if module else ["domino_jax"]
    if module not in folders:
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def place_of(name: str) -> tuple[float, str, int] | None:
    """Where the table puts `domino_jax.draft.mask.block_mask`: its longest known prefix.

    None for a name of another package.
    """
    parts = name.split(".")
    if parts[0] != "domino_jax":
        return None
    # Two parts below the package name a file at most; what follows is a name inside it.
    known = [".".join(parts[1:end]) for end in (3, 2, 1) if ".".join(parts[1:end]) in PLACES]
    return PLACES[known[0]]


def unplaced(module: str) -> list[str]:
    """A complaint about a file that the table does not know."""
    return [] if module in PLACES else [f"{module}: not in the table"]


def wrong_imports(source: str, module: str) -> list[str]:
    """Imports of something that does not stand below the module, and of test tools."""
    rank, row, order = PLACES[module]
    found = []
    for line, name in imports(source, module):
        if name.split(".")[0] in TEST_ONLY:
            found.append(f"{module}:{line}: imports {name}, which only tests may need")
        if module in WITHOUT_JAX and name.split(".")[0] in ("jax", "flax"):
            found.append(f"{module}:{line}: imports {name}; it is read without jax")
        target = place_of(name)
        if target and not (target[0] < rank or (target[1] == row and target[2] < order)):
            found.append(f"{module}:{line}: imports {name}, which does not stand below it")
    return found


def too_long(source: str, module: str) -> list[str]:
    """Files, lines and functions that should be split."""
    found = []
    count = len(source.splitlines())
    if count > MAX_LINES:
        found.append(f"{module}: {count} lines, at most {MAX_LINES}")
    for number, line in enumerate(source.splitlines(), start=1):
        if len(line) > MAX_COLUMNS:
            found.append(f"{module}:{number}: {len(line)} columns, at most {MAX_COLUMNS}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{module}:{node.lineno}: {node.name} has {length} lines, "
                    f"at most {MAX_FUNCTION_LINES}"
                )
    return found


def undocumented(source: str, module: str) -> list[str]:
    """The module and its public classes, functions and methods that lack a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [f"{module}: no docstring"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name[0] != "_"
            ):
                if not ast.get_docstring(node):
                    found.append(f"{module}:{node.lineno}: {prefix}{node.name} has no docstring")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.")

    visit(tree.body, "")
    return found


def mesh_axis_names(source: str, module: str) -> list[str]:
    """Mesh axes named outside the two files that define them."""
    if module in ("sharding", "config.sections"):
        return []
    return [
        f"{module}:{node.lineno}: names the mesh axis {node.value!r}; use logical axes"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in MESH_AXES
    ]


CHECKS = (wrong_imports, too_long, undocumented, mesh_axis_names)


def complaints(path: Path, package: Path = PACKAGE) -> list[str]:
    """What is against the rules in a file of the package or of a copy of it."""
    module, source = module_name(path, package), path.read_text(encoding="utf-8")
    found = unplaced(module)
    return found or [complaint for check in CHECKS for complaint in check(source, module)]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_package_file_keeps_the_rules(path: Path) -> None:
    assert not complaints(path)


def test_package_files_are_found() -> None:
    assert {"config.run", "sharding", "layers.dense"} <= {
        module_name(path) for path in PACKAGE.rglob("*.py")
    }


def test_folders_of_tests_are_those_of_the_package() -> None:
    found = {path.parent.name for path in (TOP / "tests").glob("*/test_*.py")}
    assert found <= {folder for _, folder in ROWS} | OTHER_TESTS


def test_files_and_functions_of_tests_and_scripts_are_short() -> None:
    complaints = []
    for path in (*(TOP / "tests").rglob("*.py"), *(TOP / "scripts").glob("*.py")):
        complaints += too_long(path.read_text(encoding="utf-8"), path.name)
    assert not complaints


def test_unplaced_refuses_an_unknown_file() -> None:
    assert unplaced("draft.utils") == ["draft.utils: not in the table"]
    assert not unplaced("draft.mask") and not unplaced("draft") and not unplaced("")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config.run", "from domino_jax.sharding import RULES"),  # later in its row
        ("layers.dense", "import domino_jax.draft.mask"),  # a higher rank
        ("layers.dense", "import domino_jax"),  # the gathered names stand above
        ("layers.dense", "from domino_jax import load_hf_draft"),
        ("draft.mask", "from domino_jax.draft.head import DominoHead"),
        ("draft.mask", "from domino_jax.draft import block_mask"),  # the folder's own `__init__`
        ("draft.mask", "from domino_jax.target.model import Target"),  # same rank, another folder
        ("draft.mask", "from ..target.model import Target"),
        ("draft.mask", "from .. import target"),
        ("draft.mask", "from . import head"),
        ("draft", "from ..training import loss"),
        ("decoding.generate", "def late():\n    from domino_jax.training.loop import train"),
        ("kernels.cache", "from domino_jax.layers import rotary"),
        ("decoding.evaluate", "from domino_jax.training import loss"),
        ("interop.hf", "from domino_jax.training.checkpoint import restore"),
        ("plan", "from domino_jax import report"),
        ("report", "from domino_jax.cli import main"),
        ("", "from domino_jax.plan import plan"),
        ("", "from . import cli"),
        ("target.load", "import torch"),
        ("target.load", "from torch.nn import functional"),
        ("interop.hf", "def late():\n    import nemo_automodel.components as parts"),
        ("config.run", "import jax.numpy as jnp"),
        ("training.flops", "import jax"),
    ],
)
def test_wrong_imports_refuses(module: str, source: str) -> None:
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sharding", "import jax\nfrom domino_jax.config.run import RunConfig"),
        ("layers.dense", "from domino_jax import config, sharding"),
        (
            "draft.head",
            "from domino_jax.draft.mask import block_mask\n"
            "from . import blocks\nfrom ..layers.dense import Dense",
        ),
        ("draft", "from domino_jax.draft.head import DominoHead\nfrom .mask import block_mask"),
        (
            "training.loop",
            "from domino_jax.training import step\nfrom domino_jax.target import Target",
        ),
        ("training.loop", "from domino_jax.interop.start import starting_params"),
        ("training.loop", "from domino_jax.decoding.generate import generate"),
        ("", "from domino_jax.interop.hf import load_hf_draft\nfrom .training import modules"),
        ("report", "from domino_jax import plan"),
        ("cli", "import domino_jax\nfrom domino_jax.decoding import evaluate\nimport tensorboardX"),
    ],
)
def test_wrong_imports_allows_what_stands_below(module: str, source: str) -> None:
    assert not wrong_imports(source, module)


def test_too_long_refuses_long_files_lines_and_functions() -> None:
    assert not too_long("x = 1\n" * MAX_LINES, "layers.dense")
    assert len(too_long("x = 1\n" * (MAX_LINES + 1), "layers.dense")) == 1
    assert not too_long("def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1), "layers.dense")
    method = "class C:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES
    assert len(too_long(method, "layers.dense")) == 1
    pragma = f"x = {'1' * 90}  # type: ignore[assignment]\n"
    assert len(too_long(pragma, "layers.dense")) == 1


def test_undocumented_refuses_each_kind() -> None:
    bare = "class C:\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\ndef _i(): ...\n"
    assert len(undocumented(bare, "layers.dense")) == 4  # module, C, C.f, h
    told = '"""M."""\nclass C:\n    """C."""\n    def f(self):\n        """F."""\n'
    assert not undocumented(told, "layers.dense")


def test_mesh_axis_names_refuses_them_elsewhere() -> None:
    source = 'spec = PartitionSpec("fsdp", ("data", "tensor"))'
    assert len(mesh_axis_names(source, "draft.backbone")) == 2
    assert not mesh_axis_names(source, "sharding")
    assert not mesh_axis_names(
        '"""Splits a tensor over fsdp."""\nname = "tensors"', "draft.backbone"
    )
