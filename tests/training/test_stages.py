"""The names of a step's stages in its compiled program: what plans and traces are grouped by."""

import functools
import re
from pathlib import Path

import jax
import pytest
from tiny import quiet, run_config, write_target

from domino_jax.base.scopes import HEAD, STAGES
from domino_jax.config.run import load_config
from domino_jax.training.inputs import device_batch
from domino_jax.training.prepare import prepare
from domino_jax.training.step import train_step


@pytest.mark.parametrize("projector", ["domino", None])
def test_every_product_of_a_step_belongs_to_a_stage(tmp_path: Path, projector: str | None) -> None:
    words = [f"draft.projector_type={projector or 'null'}", "optimizer.grad_accumulation=2"]
    target = write_target(tmp_path / "target")
    run = prepare(load_config(run_config(tmp_path, target), words), reporter=quiet())
    with jax.set_mesh(run.inputs.mesh):
        rows = next(run.inputs.batches())
        batch = device_batch(run.inputs.mesh, rows, micro_batches=2)
        step = jax.jit(functools.partial(train_step, run.inputs.program))
        lowered = step.lower(run.state, run.target_params, batch)
    text = lowered.compile().as_text()
    names = re.findall(r'op_name="([^"]*)"', text)
    found = {innermost(name) for name in names} - {None}
    assert found == set(STAGES) - ({HEAD} if projector is None else set())
    # Forward and backward.
    backward = {innermost(name) for name in names if "transpose(" in name} - {None}
    assert backward >= found - {"target", "update"}
    products = [name for name in names if name.endswith("dot_general")]
    assert len(products) > 20 and not [name for name in products if innermost(name) is None]


def innermost(name: str) -> str | None:
    """The stage of an operation, from its path; transformations stand around a name."""
    parts = [re.sub(r"^(\w+\()*|\)*$", "", part) for part in name.split("/")]
    return next((part for part in reversed(parts) if part in STAGES), None)
