"""The layers of the package hold: no upward import, no cycle, mesh axes named in two files."""

from pathlib import Path

import pytest
from house import (
    OTHER_TESTS,
    PACKAGE,
    ROWS,
    TOP,
    complaints,
    mesh_axis_names,
    module_name,
    unplaced,
    wrong_imports,
)


@pytest.mark.parametrize(
    "path",
    sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]),
    ids=lambda path: str(path.relative_to(PACKAGE)),
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
        ("draft.mask", "from domino_jax.draft import layer_spans"),  # the folder's own `__init__`
        ("draft.mask", "from domino_jax.target.decoder import Target"),  # same rank, another folder
        ("draft.mask", "from ..target.decoder import Target"),
        ("draft.mask", "from .. import target"),
        ("draft.mask", "from . import head"),
        ("draft", "from ..objective import loss"),
        ("decoding.generate", "def late():\n    from domino_jax.training.loop import train"),
        ("kernels.kv_cache", "from domino_jax.layers import rotary"),
        ("evaluation.evaluate", "from domino_jax.training import step"),
        ("interop.hf", "from domino_jax.training.checkpoint import restore"),
        ("plan.table", "from domino_jax.page import terminal"),
        ("page.terminal", "from domino_jax.cli import main"),
        ("", "from domino_jax.plan.plan import plan"),
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
            "from domino_jax.draft.mask import layer_spans\n"
            "from . import blocks\nfrom ..layers.dense import Dense",
        ),
        ("draft", "from domino_jax.draft.head import DominoHead\nfrom .mask import layer_spans"),
        (
            "training.loop",
            "from domino_jax.training import step\nfrom domino_jax.target import Target",
        ),
        ("training.loop", "from domino_jax.interop.start import starting_params"),
        ("training.loop", "from domino_jax.decoding.generate import generate"),
        ("", "from domino_jax.interop.hf import load_hf_draft\nfrom .training import modules"),
        ("page.terminal", "from domino_jax import plan"),
        ("cli", "import domino_jax\nfrom domino_jax.decoding import evaluate\nimport tensorboardX"),
    ],
)
def test_wrong_imports_allows_what_stands_below(module: str, source: str) -> None:
    assert not wrong_imports(source, module)


def test_mesh_axis_names_refuses_them_elsewhere() -> None:
    source = 'spec = PartitionSpec("fsdp", ("data", "tensor"))'
    assert len(mesh_axis_names(source, "draft.backbone")) == 2
    assert not mesh_axis_names(source, "sharding")
    assert not mesh_axis_names(
        '"""Splits a tensor over fsdp."""\nname = "tensors"', "draft.backbone"
    )
