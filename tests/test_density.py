"""How densely the package is written: comments that say why, lines that say one thing."""

import io
import tokenize
from dataclasses import dataclass

from test_architecture import PACKAGE

# Over the whole package. Below the first a reader is left to ask why, above the second a line says
# several things at once.
MIN_COMMENT_SHARE = 0.04
MAX_CODE_CHARACTERS = 38


@dataclass(frozen=True)
class Density:
    """What the lines of a source hold.

    Attributes:
        lines: all of them, empty ones and docstrings included.
        comments: those with a comment, alone or behind code.
        code: those with code.
        characters: of the code's lines, without indentation, comments behind code included.
    """

    lines: int
    comments: int
    code: int
    characters: int

    @property
    def comment_share(self) -> float:
        """Lines with a comment, of all."""
        return self.comments / self.lines

    @property
    def code_characters(self) -> float:
        """Characters of a line of code, on average."""
        return self.characters / self.code


def density(source: str) -> Density:
    """Counts the lines of a source from its tokens."""
    lines = source.splitlines()
    comments: set[int] = set()
    code: set[int] = set()
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    statement_begins = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type in layout:
            statement_begins = True
        elif token.type not in (tokenize.NL, tokenize.ENDMARKER):
            # A statement that begins with text is a docstring.
            if not (statement_begins and token.type == tokenize.STRING):
                code.update(range(token.start[0], token.end[0] + 1))
            statement_begins = False
    characters = sum(len(lines[number - 1].strip()) for number in code)
    return Density(len(lines), len(comments), len(code), characters)


def test_package_says_why_and_one_thing_a_line() -> None:
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    whole = density("".join(sources))
    assert whole.comment_share >= MIN_COMMENT_SHARE
    assert whole.code_characters <= MAX_CODE_CHARACTERS


def test_density_counts_comments_and_code_and_no_docstring() -> None:
    source = (
        '"""A module,\n'
        'of two lines."""\n'
        "\n"
        "# Why.\n"
        "def f(x):\n"
        '    """A function."""\n'
        "    # Why,\n"
        "    # and why else.\n"
        '    text = """one\n'
        '    two"""\n'
        "    return g(\n"
        '        "# no comment",\n'
        "        x,  # why\n"
        "    )\n"
    )
    code = (
        "def f(x):",
        'text = """one',
        'two"""',
        "return g(",
        '"# no comment",',
        "x,  # why",
        ")",
    )
    found = density(source)
    assert found == Density(lines=14, comments=4, code=len(code), characters=sum(map(len, code)))
    assert found.comment_share == 4 / 14
    assert density(source + source).code_characters == found.code_characters
    assert density('"""M."""\n').code == 0
