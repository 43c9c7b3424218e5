"""Where a run's configuration goes between `train` and the compiled step: few files, few returns.

A configuration that every function takes says of none what it depends on. So it is followed while
a run is made: each call into the package that is given the configuration, or a section of it, is an
entry into that function's file; an entry into a file that stands above the one before is a climb.
"""

import dataclasses
import itertools
import sys
import typing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from house import PACKAGE, PLACES, module_name
from tiny import quiet, run_config, write_target

from domino_jax.base.errors import Interrupted
from domino_jax.config.run import RunConfig, load_config
from domino_jax.training.loop import train

FILES, CLIMBS = 10, 5
HINTS = typing.get_type_hints(RunConfig)
SECTIONS = tuple(hint for hint in HINTS.values() if dataclasses.is_dataclass(hint))
KINDS: Any = (RunConfig, *SECTIONS)


class Route:
    """The files that the configuration enters, in order, up to the lowering of the step."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names if name != "self"]
        if any(isinstance(value, KINDS) for value in given):
            module = module_name(Path(code.co_filename))
            if not self.files or self.files[-1] != module:
                self.files.append(module)
        if code.co_name == "lowered_step":
            sys.settrace(None)  # what follows is traced by jax, with a million calls

    @property
    def climbs(self) -> int:
        """How often the next file stands above the one before."""
        heights = []
        for file in self.files:
            rank, _, order = PLACES[file]
            heights.append((rank, order))
        return sum(after > before for before, after in itertools.pairwise(heights))


def test_the_configuration_enters_few_files_and_rarely_returns(tmp_path: Path) -> None:
    config = load_config(run_config(tmp_path, write_target(tmp_path / "target")))
    route = Route()
    sys.settrace(route)  # of calls alone: it asks for no line of them
    try:
        with pytest.raises(Interrupted):
            train(config, reporter=quiet(), stop_requested=lambda: True)
    finally:
        sys.settrace(None)
    assert route.files[:2] == ["training.loop", "training.prepare"]
    assert "training.program" in route.files
    assert len(set(route.files)) <= FILES, route.files
    assert route.climbs <= CLIMBS, route.files
