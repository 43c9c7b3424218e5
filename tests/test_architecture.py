"""The layers of the package hold: no upward import, no cycle, mesh axes named in two files."""

from pathlib import Path

import pytest
from house import (
    OTHER_TESTS,
    PACKAGE,
    ROWS,
    SECTIONS,
    TOP,
    complaints,
    mesh_axis_names,
    module_name,
    sections_elsewhere,
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


def test_complaints_refuse_an_unknown_file(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("")
    assert complaints(tmp_path / "utils.py", tmp_path) == ["utils: not in the table"]


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


def test_sections_are_those_of_a_run() -> None:
    assert {"RunConfig", "DraftRecipe", "DataConfig", "LossConfig", "TrainConfig"} < SECTIONS
    assert len(SECTIONS) == 7
    source = (PACKAGE / "training/prepare.py").read_text(encoding="utf-8")
    assert sections_elsewhere(source, "training.loop")
    assert not sections_elsewhere(source, "training.prepare")


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
        "def train(config: RunConfig) -> None: ...",
        "def train(*, config: 'RunConfig | None' = None) -> None: ...",
        "def train(*configs: sections.LossConfig) -> None: ...",
        "def train(planned: Callable[[RunConfig], Plan]) -> None: ...",
        "class Run:\n    config: RunConfig",
    ],
)
def test_sections_elsewhere_refuses(source: str) -> None:
    assert len(sections_elsewhere(source, "training.loop")) == 1


def test_sections_elsewhere_allows_constants_and_models() -> None:
    source = (
        "from domino_jax.config.run import SEED_LIMIT\n"
        "from domino_jax.config.model import DraftConfig\n"
        "def f(draft: DraftConfig, loss: float) -> None: ...\n"
    )
    assert not sections_elsewhere(source, "training.loop")
