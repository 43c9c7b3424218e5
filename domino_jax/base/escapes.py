"""Text from models, data and files with control characters escaped, for a terminal or a page.

Control sequences clear the screen, rename the window or write to the clipboard. Bidirectional
controls change the order in which text is shown. Two rules:

    printable       a message, one line     as `str.isprintable`: joiners and line ends are escaped
    printable_text  an answer, any lines    joiners, combining marks, tabs and line ends stay

Both work on single characters, so a stream may be escaped in any pieces.
"""

import re

# C0 without tab and newline, DEL and C1; line and paragraph separators, embeddings, overrides and
# isolates of the bidirectional algorithm; halves of surrogate pairs, which have no encoding.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """One line: escapes replace every character that is not printable."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def printable_text(text: str) -> str:
    """Text of any lines: escapes replace control characters and halves of surrogate pairs."""
    return _CONTROLS.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
