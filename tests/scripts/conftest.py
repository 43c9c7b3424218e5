"""The scripts import each other by name, as Python lets a script's neighbours be imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
