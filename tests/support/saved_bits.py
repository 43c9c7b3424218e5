"""The arrays of a checkpoint."""

from pathlib import Path
from typing import Any

import jax

from domino_jax.training.checkpoint import open_checkpoints


def final_bits(run_dir: Path, step: int) -> Any:
    with open_checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest_step() == step
        import orbax.checkpoint as ocp

        names = ("params", "optimizer", "ema")
        there = [name for name in names if (run_dir / "checkpoints" / str(step) / name).is_dir()]
        items = {name: ocp.args.StandardRestore() for name in there}
        return jax.device_get(dict(checkpoints.restore(step, args=ocp.args.Composite(**items))))
