"""Long doubles: the suite runs some cases of a test, `scripts/test -m slow` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """The cases, all but the first `count` marked slow; a tuple is the values of several names."""
    return [
        case
        if index < count
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for index, case in enumerate(cases)
    ]
