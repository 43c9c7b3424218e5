"""What the pages say of the tree is so: paths that they name, links between them, README's map."""

import itertools
import re
from collections.abc import Iterator

import pytest
from documents import FENCE, TOP, blocks, page, programs, section
from house import TABLE

PACKAGE = TOP / "domino_jax"
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{path.name}" for path in (TOP / "docs").glob("*.md"))
# A word is a path of the tree where it begins in one of these, or ends like a file of it. By name:
# a checkout has other folders too, of runs for example, of which pages tell.
ROOTS = {".ci", "configs", "docs", "domino_jax", "scripts", "tests"}
ROOTS |= {folder for _, folder, _ in TABLE if folder}
SUFFIXES = (".py", ".md", ".toml")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def words_in_backticks(text: str) -> Iterator[str]:
    """The words of inline code, and of the fenced blocks of commands."""
    prose = FENCE.sub("", text)
    for code in [*re.findall(r"`([^`\n]+)`", prose), *blocks(text)]:
        yield from code.split()


def expanded(word: str) -> list[str]:
    """`configs/{a,b}.yaml` as a shell expands it: one word for each choice."""
    parts = re.split(r"\{([^}]*)\}", word)
    choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def named_paths(text: str) -> Iterator[str]:
    """The words that name something of the tree."""
    for word in words_in_backticks(text):
        path = word.strip("\"'(),;:").partition("::")[0]
        first, slash, _ = path.partition("/")
        if (slash and first in ROOTS) or path.endswith(SUFFIXES):
            yield from expanded(path)


def is_there(path: str) -> bool:
    """Whether a path, maybe with `*`, exists from the top, or in the package or the tests."""
    return any(any(folder.glob(path.rstrip("/"))) for folder in (TOP, PACKAGE, TOP / "tests"))


def heading_anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_path_that_a_page_names_exists(name: str) -> None:
    text = page(name)
    # What a reader is told to write is no file of the tree.
    listed = set(programs(text))
    assert [path for path in named_paths(text) if path not in listed and not is_there(path)] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_link_between_pages_resolves(name: str) -> None:
    for link in LINK.findall(FENCE.sub("", page(name))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (TOP / name).parent / path if path else TOP / name
        assert target.exists(), link
        assert not anchor or anchor in heading_anchors(target.read_text(encoding="utf-8")), link


def test_the_pages_are_linked_from_the_readme() -> None:
    linked = set(LINK.findall(page("README.md")))
    assert set(PAGES) - {"README.md"} <= linked


def test_the_map_is_the_table_of_the_architecture() -> None:
    places = []
    for _, folder, names in TABLE:
        places += [f"{folder}/"] if folder else [f"{name}.py" for name in names.split()]
    mapped = re.findall(r"^- `([\w/.]+)` ", section(page("README.md"), "Map"), flags=re.MULTILINE)
    assert mapped == list(dict.fromkeys(places))


def test_a_path_is_known_by_its_place_or_its_ending() -> None:
    text = "`draft/gone.py`, `gone.toml`, `scripts/gone kills=3`, `runs/x`, `a/b`, `loss.options`\n"
    assert list(named_paths(text)) == ["draft/gone.py", "gone.toml", "scripts/gone"]
    assert expanded("configs/{a,b}.yaml") == ["configs/a.yaml", "configs/b.yaml"]
    assert is_there("configs/qwen3-*.yaml") and is_there("draft/head.py") and is_there("docs/")
    assert not is_there("draft/gone.py")
