"""The scripts import each other by name, as Python lets a script's neighbours be imported."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS / name) for name in ("bench", "experiments", "reliability")]
