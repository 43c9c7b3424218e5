"""Text that a terminal obeys is escaped, text of any language is not."""

import io

import pytest
from rich.console import Console

from domino_jax.base.escapes import printable, printable_text
from domino_jax.base.progress import Reporter

OBEYED = {
    "clears the screen": "\x1b[2J\x1b[H",
    "writes to the clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "renames the window": "\x1b]0;root\x07",
    "a control of C1": "\x9b2J\x85\x90",
    "goes back": "yes\x08\x08\x08no\x7f",
    "returns": "yes\rno",
    "NUL, form feed, shift out": "\0\x0c\x0e",
    "embeds and overrides": "\u202a\u202b\u202c\u202d\u202e",
    "isolates": "\u2066\u2067\u2068\u2069",
    "separates lines": "\u2028\u2029",
    "half a character": "\ud83d",
}
LEGITIMATE = {
    "lines": "def f():\n\treturn 1\n\n",
    "an emoji of several": "\U0001f469\u200d\U0001f4bb \u2764\ufe0f \U0001f1eb\U0001f1f7",
    "Persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "Hindi": "\u0915\u094d\u200d\u0937",
    "Hebrew with a mark": "\u05e9\u05dc\u05d5\u05dd\u200f!",
    "combining": "e\u0301 n\u0303",
    "Chinese": "\u4f60\u597d\u3000\u4e16\u754c\u3002",
    "a no-break space": "10\u00a0km",
    "markup": "[red]x[/] :smile: <b> \\x1b",
}


@pytest.mark.parametrize("text", OBEYED.values(), ids=list(OBEYED))
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    shown = printable_text(f"a{text}b")
    assert shown.isprintable() and shown.startswith("a") and shown.endswith("b")
    # Nothing is lost.
    assert shown.encode().decode("unicode_escape") == f"a{text}b"


@pytest.mark.parametrize("text", LEGITIMATE.values(), ids=list(LEGITIMATE))
def test_text_of_any_language_stays(text: str) -> None:
    assert printable_text(text) == text


def test_a_stream_is_escaped_in_any_pieces() -> None:
    text = "".join([*OBEYED.values(), *LEGITIMATE.values()])
    assert "".join(map(printable_text, text)) == printable_text(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_of_progress_is_one_line_as_it_is(terminal: bool) -> None:
    heard = io.StringIO()
    console = Console(file=heard, force_terminal=terminal, width=20, color_system=None)
    reporter = Reporter(console)
    line = "runs/[red]a[/] :smile: \x1b]0;x\x07 \n\u202e [/bold] " + "x" * 40
    reporter.say(line)
    assert heard.getvalue() == f"{printable(line)}\n"
    with reporter.bar("[/b]\x1b[2J", total=2) as bar:
        bar.tell(1, "[/i]\x1b[3J")
    assert "\x1b[2J" not in heard.getvalue() and "\x1b[3J" not in heard.getvalue()
