"""Thirty updates of `domino train` beside NeMo AutoModel 0.7.0's own loop: same rows, same start.

Each program takes its own schedule, clipping, AdamW and curriculum.
"""

from pathlib import Path

import numpy as np
import pytest
from nemo_loop import NemoLoop, draft_tensors, nemo_loop, training_lines, twin
from reference import check_close
from tiny import quiet

from domino_jax.config.run import RunConfig
from domino_jax.interop.hf import hf_tensors
from domino_jax.training.prepare import prepare

TOLERANCE = 1e-5


def check_updates(config: RunConfig, theirs: NemoLoop) -> None:
    """The parameters of each checkpoint, each tensor by its norm."""
    every = config.train.checkpoint_every
    for step in range(every, len(theirs.parameters) + 1, every):
        expected = theirs.parameters[step - 1]
        check_close(draft_tensors(config, step), expected, relative=TOLERANCE)


@pytest.mark.pitfall(
    "the first update has rate 0",
    seen="training/optimizer.py: optax's warm-up from 0, its length rounded",
)
@pytest.mark.parametrize(("head", "checkpoint_every"), [("domino", 1), (None, 15)])
def test_thirty_updates_equal_nemos(
    head: str | None, checkpoint_every: int, target: Path, tmp_path: Path
) -> None:
    sections = {
        "draft": {"projector_type": head},
        "train": {"checkpoint_every": checkpoint_every},
        # A warm-up of int(3.9) updates, and a clipped gradient with decay.
        "optimizer": {
            "learning_rate": 5e-3,
            "warmup_ratio": 0.13,
            "weight_decay": 0.01,
            "max_grad_norm": 0.2,
        },
    }
    config = twin(tmp_path, target, "ours", **sections)
    theirs = nemo_loop(twin(tmp_path, target, "theirs", **sections))
    ours = training_lines(config)
    assert len(ours) == len(theirs.parameters) == 30
    for name, expected, rtol in (
        ("loss", theirs.losses, TOLERANCE),
        ("learning_rate", theirs.rates, 1e-6),
    ):
        np.testing.assert_allclose([line[name] for line in ours], expected, rtol=rtol)
    if head is not None:
        np.testing.assert_allclose(
            [line["lambda_base"] for line in ours], theirs.lambdas, atol=1e-6
        )
        assert theirs.lambdas[0] == 1 and theirs.lambdas[-1] < 0.04
    assert sum(line["grad_norm"] > 0.2 for line in ours) > 5
    check_updates(config, theirs)
    # Every tensor has moved by far more than it may differ.
    start = prepare(twin(tmp_path, target, "start", **sections), reporter=quiet())
    with pytest.raises(AssertionError) as caught:
        check_close(
            hf_tensors(start.inputs.record.config, start.state.params),
            theirs.parameters[-1],
            relative=100 * TOLERANCE,
        )
    assert all(name in str(caught.value) for name in theirs.parameters[-1])
