"""The names that `import domino_jax` promises: each is there, says what it is, and stands once."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import domino_jax

TOP = Path(__file__).parent.parent
NAMES = [name for name in domino_jax.__all__ if name != "__version__"]


def imported_for_type_checkers() -> dict[str, str]:
    """Name -> module of the imports below `if TYPE_CHECKING`."""
    tree = ast.parse((TOP / "domino_jax/__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            found[alias.name] = node.module.removeprefix("domino_jax.")
    return found


def test_type_checkers_and_programs_find_the_same_names() -> None:
    assert imported_for_type_checkers() == domino_jax._MODULES
    assert sorted(NAMES) == sorted(domino_jax._MODULES)
    assert dir(domino_jax) == sorted(domino_jax.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(domino_jax, name)
    assert found.__module__ == f"domino_jax.{domino_jax._MODULES[name]}"
    # Of its own: a dataclass without one gets its signature for a docstring.
    assert found.__doc__ and not found.__doc__.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'domino_jax' has no attribute 'trainer'"):
        _ = domino_jax.trainer


def test_a_star_brings_all_names() -> None:
    space: dict[str, object] = {}
    exec("from domino_jax import *", space)
    assert set(domino_jax.__all__) <= set(space)


def test_the_package_alone_starts_no_jax() -> None:
    told = "import sys, domino_jax; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_annotations_are_packaged_for_type_checkers() -> None:
    settings = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = settings["tool"]["setuptools"]["package-data"]["domino_jax"]
    assert "py.typed" in packaged and (TOP / "domino_jax/py.typed").is_file()
