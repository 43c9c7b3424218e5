"""`loss_type="variable_prefix"` of plain DFlash against NeMo AutoModel 0.7.0, at equal prefixes."""

import jax
import numpy as np
import pytest
from doubles import slow_after
from flax.core import FrozenDict
from reference import (
    GRADIENT,
    check_close,
    check_metrics,
    dflash_config,
    make_step,
    nemo_step,
    nemo_trainer,
    our_step,
    random_anchors,
    random_batch,
    random_params,
    show_same_prefixes,
)

from domino_jax.draft.blocks import sample_prefix_lengths

SLOTS = 11


@pytest.mark.parametrize(
    ("block_size", "gamma", "packed", "base"),
    slow_after(
        2, [(7, None, False, 0.9), (5, 4.0, True, 0.9), (2, 4.0, False, 0.5), (8, 0.0, True, 1.2)]
    ),
)
def test_variable_prefix_equals_nemo(
    block_size: int, gamma: float | None, packed: bool, base: float
) -> None:
    config = dflash_config(block_size=block_size)
    params, batch = random_params(config), random_batch(config, length=40, packed=packed)
    anchors = random_anchors(config, batch, slots=SLOTS)
    own = FrozenDict({"prefix_weight_base": base})
    step = make_step(
        config,
        loss_decay_gamma=gamma,
        chunk_blocks=3,
        loss_type="variable_prefix",
        loss_options=own,
    )
    theirs = nemo_trainer(
        config,
        params,
        batch,
        loss_decay_gamma=gamma,
        loss_type="variable_prefix",
        prefix_weight_base=base,
    )
    show_same_prefixes(theirs, step, anchors)
    expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors)
    found, gradient = our_step(step, config, params, batch, anchors=anchors)
    check_metrics(found, expected)
    check_close(gradient, expected_gradient, relative=GRADIENT)


@pytest.mark.parametrize(("block_size", "base"), [(2, 0.9), (3, 0.9), (6, 0.7), (6, 1.3)])
def test_prefix_lengths_follow_the_truncated_geometric_prior(block_size: int, base: float) -> None:
    drawn = np.asarray(
        sample_prefix_lengths(
            jax.random.key(0), (200, 500), block_size=block_size, weight_base=base
        )
    )
    lengths = np.arange(min(2, block_size - 1), block_size)
    expected = base**lengths / np.sum(base**lengths)
    found = np.array([np.mean(drawn == length) for length in lengths])
    assert found.sum() == pytest.approx(1.0)
    five_deviations = 5 * np.sqrt(0.25 / drawn.size)
    np.testing.assert_allclose(found, expected, atol=five_deviations)
