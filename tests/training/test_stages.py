"""The names of a step's stages in its compiled program: what plans and traces are grouped by."""

import re
from pathlib import Path

import jax
import pytest
from tiny import quiet, run_config

from domino_jax.base.scopes import HEAD, STAGES
from domino_jax.config.run import load_config
from domino_jax.training.prepare import abstract_step, read_models
from domino_jax.training.program import traced_step


@pytest.mark.parametrize("projector", ["domino", None])
def test_every_product_of_a_step_belongs_to_a_stage(
    target: Path, tmp_path: Path, projector: str | None
) -> None:
    words = [f"draft.projector_type={projector or 'null'}", "optimizer.grad_accumulation=2"]
    config = load_config(run_config(tmp_path, target), words)
    step = abstract_step(config, read_models(config, reporter=quiet()), jax.devices())
    with jax.set_mesh(step.mesh):
        lowered = traced_step(step.program, step.arguments).lower()
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
