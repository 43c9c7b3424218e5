"""The project's own pages as tests read them: their sections, fenced blocks and listings."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

TOP = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    """The text of a page by its path from the top."""
    return (TOP / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level, up to the next one."""
    _, found, rest = text.partition(f"\n## {heading}\n")
    assert found, f"no section {heading!r}"
    return rest.partition("\n## ")[0]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, in order; "" has the commands."""
    return [body for found, body in FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """The lines of the fenced blocks without a language."""
    return "".join(blocks(text)).splitlines()


def programs(text: str) -> Mapping[str, str]:
    """The Python blocks that open with the name of their file, by that name."""
    named = {}
    for body in blocks(text, "python"):
        opening = re.match(r"# (\w+\.py)\n", body)
        if opening:
            named[opening.group(1)] = body
    return named


def fields_of(split: str, *, proposals: int = 0) -> set[str]:
    """The fields that docs/library.md names for one kind of record of a run.

    `name_1` to `name_P` are written out for P `proposals`.
    """
    named = {"step", "split"}
    text = section(page("docs/library.md"), "What a run writes")
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", text, flags=re.MULTILINE)
    for names, where in rows:
        if split in where.split(", "):
            named |= set(re.findall(r"`(\w+)`", names))
    for last in [name for name in named if name.endswith("_P")]:
        named.remove(last)
        named |= {f"{last[:-1]}{position + 1}" for position in range(proposals)}
    return named


def apply_listings(text: str, directory: Path) -> None:
    """Applies the diffs of a text to a copy of the package, as its reader would."""
    for listing in blocks(text, "diff"):
        subprocess.run(["git", "apply", "-"], input=listing, text=True, cwd=directory, check=True)
