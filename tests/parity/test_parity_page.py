"""docs/parity.md names every public and private name of the reference, and tests that exist."""

import inspect
import re

import pytest
from documents import TOP, page, section

PAGE = page("docs/parity.md")


def rows(heading: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section(PAGE, heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_name_of_domino_core_has_a_row() -> None:
    from nemo_automodel.components.speculative.dflash import domino_core

    module = domino_core.DominoTrainerModule
    names = {name for name in vars(module) if not name.startswith("__")} - {"forward"}
    for name, value in vars(domino_core).items():
        if inspect.getmodule(value) is domino_core:
            names.add(name)
    assert "_suffix_start" in names and "get_lambda_base" in names
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows("Names"))))
    assert names <= named | {"_abc_impl"}


@pytest.mark.parametrize("row", rows("Names"), ids=lambda row: row[0])
def test_the_files_of_a_row_define_its_names(row: list[str]) -> None:
    _, here, files = row
    texts = [(TOP / "domino_jax" / name).read_text() for name in re.findall(r"`([^`]+)`", files)]
    for name in re.findall(r"`(?:\w+\.)?(\w+)(?:=[^`]*|\([^`]*\))?`", here):
        defined = re.compile(rf"^\s*(?:def|class) {name}\b|^\s*{name}\b.*[:=]|\"{name}\"", re.M)
        assert any(defined.search(text) for text in texts), name


def test_every_difference_has_a_test_and_every_test_a_row() -> None:
    cells = [row[-1].strip("`") for row in rows("Deliberate differences")]
    for cell in cells:
        path, _, name = cell.partition("::")
        assert f"def {name}(" in (TOP / path).read_text(), cell
    listed = (TOP / "tests/parity/test_parity_differences.py").read_text()
    expected = re.findall(r"^def (test_\w+)", listed, flags=re.M)
    assert set(expected) <= {cell.partition("::")[2] for cell in cells}
