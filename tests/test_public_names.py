"""The public names of `domino_jax`: each exists, has a docstring, and is listed once."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from house import public_modules

import domino_jax

TOP = Path(__file__).parent.parent
MODULES = public_modules()
NAMES = [name for name in domino_jax.__all__ if name != "__version__"]


def test_the_package_offers_the_names_of_its_stub() -> None:
    assert sorted(NAMES) == sorted(MODULES)
    assert dir(domino_jax) == sorted(domino_jax.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(domino_jax, name)
    assert found.__module__ == f"domino_jax.{MODULES[name]}"
    # Of its own: a dataclass without one gets its signature for a docstring.
    assert found.__doc__ and not found.__doc__.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No domino_jax attribute trainer"):
        _ = domino_jax.trainer


def test_a_star_brings_all_names() -> None:
    space: dict[str, object] = {}
    exec("from domino_jax import *", space)
    assert set(domino_jax.__all__) <= set(space)


def test_the_package_alone_imports_neither_jax_nor_click() -> None:
    code = "import sys, domino_jax; print({'jax', 'numpy', 'click'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_annotations_are_packaged_for_type_checkers() -> None:
    settings = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = settings["tool"]["setuptools"]["package-data"]["domino_jax"]
    for name in ("py.typed", "__init__.pyi"):
        assert name in packaged and (TOP / "domino_jax" / name).is_file()
