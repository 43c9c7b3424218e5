"""The run's configuration stays where a run is prepared: other modules take the values they need.

A function that takes a whole configuration does not show which values it depends on. So outside
`config`, `cli` and `training.prepare` no module imports a section, or has a parameter of one.
"""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import PACKAGE, imports, module_name

from domino_jax.config.run import RunConfig

ALLOWED = ("config", "cli", "training.prepare")
OTHERS = [path for path in PACKAGE.rglob("*.py") if not module_name(path).startswith(ALLOWED)]
HINTS = typing.get_type_hints(RunConfig).values()
SECTIONS = {hint.__name__ for hint in (RunConfig, *HINTS) if dataclasses.is_dataclass(hint)}
# A module of sections as a whole, or what makes or takes a section; constants are free.
MODULES = "domino_jax.config", "domino_jax.config.(run|sections|draft)"
FUNCTIONS = {"load_config", "dump_config", "make_draft_config"}
FORBIDDEN = re.compile(rf"{MODULES[0]}|{MODULES[1]}(\.({'|'.join(SECTIONS | FUNCTIONS)}|\*))?")


def imported(source: str, module: str) -> Iterator[str]:
    """Imports of sections, or of whole modules that define them."""
    for line, name in imports(source, module):
        if FORBIDDEN.fullmatch(name):
            yield f"{module}:{line}: imports {name}"


def parameters(source: str, module: str) -> Iterator[str]:
    """Parameters and fields whose annotation names a section, quoted annotations included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            names = set(re.findall(r"\w+", ast.unparse(node.annotation))) & SECTIONS
            if names:
                yield f"{module}:{node.lineno}: takes {', '.join(sorted(names))}"


def test_sections_are_those_of_a_run() -> None:
    assert {"RunConfig", "DraftRecipe", "DataConfig", "LossConfig", "TrainConfig"} < SECTIONS
    assert len(SECTIONS) == 7


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_modules_take_values(path: Path) -> None:
    module, source = module_name(path), path.read_text(encoding="utf-8")
    assert not [*imported(source, module), *parameters(source, module)]


def test_the_allowed_modules_do_use_sections() -> None:
    source = (PACKAGE / "training/prepare.py").read_text(encoding="utf-8")
    assert [*imported(source, "training.prepare")] and [*parameters(source, "training.prepare")]


@pytest.mark.parametrize(
    "source",
    [
        "from domino_jax.config.run import RunConfig",
        "from domino_jax.config.run import SEED_LIMIT, load_config",
        "from domino_jax.config.sections import LossConfig as Loss",
        "from domino_jax.config.sections import *",
        "from domino_jax.config import run",
        "from ..config.draft import DraftRecipe",
        "import domino_jax.config.sections as sections",
        "def late():\n    from domino_jax.config.run import RunConfig",
    ],
)
def test_imports_of_sections_are_found(source: str) -> None:
    assert len([*imported(source, "training.loop")]) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def train(config: RunConfig) -> None: ...",
        "def train(*, config: 'RunConfig | None' = None) -> None: ...",
        "def train(*configs: sections.LossConfig) -> None: ...",
        "def train(planned: Callable[[RunConfig], Plan]) -> None: ...",
        "class Run:\n    config: RunConfig",
    ],
)
def test_parameters_of_sections_are_found(source: str) -> None:
    assert len([*parameters(source, "training.loop")]) == 1


def test_constants_and_models_are_free() -> None:
    source = (
        "from domino_jax.config.run import SEED_LIMIT\n"
        "from domino_jax.config.model import DraftConfig\n"
        "def f(draft: DraftConfig, loss: float) -> None: ...\n"
    )
    assert not [*imported(source, "training.loop"), *parameters(source, "training.loop")]
