"""Every pitfall of the list is watched by a test, and the page tells the marks of today."""

import re
from pathlib import Path

import pytest
from pitfalls import PAGE, PITFALLS, TESTS, Watch, page, watches

PACKAGE = TESTS.parent / "domino_jax"
FOUND = watches()


def test_the_page_holds_the_marks() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(FOUND), "pytest --pitfalls > docs/pitfalls.md"


def test_every_pitfall_has_a_test() -> None:
    assert {watch.pitfall for watch in FOUND} == set(PITFALLS)


@pytest.mark.parametrize("watch", FOUND, ids=lambda watch: watch.test)
def test_faults_name_files_of_the_package(watch: Watch) -> None:
    names = re.findall(r"(\S+\.py): ", watch.seen)
    assert names and all((PACKAGE / name).is_file() for name in names)


def test_marks_are_read_without_importing(tmp_path: Path) -> None:
    source = """
import not_a_package
@pytest.mark.pitfall("one", seen="a.py: x")
@pytest.mark.pitfall("two " "parts", seen="b.py: y; c.py: z")
@pytest.mark.parametrize("x", [1])
def test_marked(x): pass
def test_unmarked(): pass
"""
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "test_a.py").write_text(source)
    test = "draft/test_a.py::test_marked"
    expected = [Watch("one", test, "a.py: x"), Watch("two parts", test, "b.py: y; c.py: z")]
    assert watches(tmp_path) == expected
