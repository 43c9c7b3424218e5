"""Plain DFlash with `shift_label` is Domino without its head.

Labels, loss, metrics and gradients are the same. NeMo AutoModel 0.7.0 shifts in its Domino trainer
only, so that one with `lambda_base` 1 is the reference.
"""

import dataclasses

import numpy as np
import pytest
from reference import (
    GRADIENT,
    METRIC,
    check_close,
    compare_with_nemo,
    draft_config,
    make_step,
    nemo_step,
    nemo_trainer,
    our_step,
    random_anchors,
    random_batch,
    random_params,
)

from domino_jax.base.errors import InputError

EQUAL = 1e-6


@pytest.mark.parametrize(
    ("gamma", "packed", "chunk_blocks"),
    [(None, True, 0), (7.0, False, 3)],
    ids=["packed", "decay-chunks"],
)
def test_shifted_dflash_equals_the_base_of_domino(
    gamma: float | None, packed: bool, chunk_blocks: int
) -> None:
    domino = draft_config()
    plain = dataclasses.replace(domino, head=None)
    params, batch = random_params(domino), random_batch(domino, packed=packed)
    backbone = {name: leaf for name, leaf in params.items() if name != "head"}
    anchors = random_anchors(domino, batch, slots=11)
    options = {"loss_decay_gamma": gamma, "chunk_blocks": chunk_blocks}
    found, gradient = our_step(make_step(plain, **options), plain, backbone, batch, anchors=anchors)
    base, base_gradient = our_step(
        make_step(domino, **options), domino, params, batch, anchors=anchors, lambda_base=1.0
    )
    assert found["valid_tokens"] > (domino.block_size - 1) * found["valid_blocks"] * 0.5
    for name in ("loss", "loss_weight", "valid_tokens", "valid_blocks"):
        np.testing.assert_allclose(found[name], base[name], rtol=EQUAL, err_msg=name)
    for name in ("accuracy", "correct_tokens", "accept_len", "accept_len_sum"):
        np.testing.assert_allclose(found[name], base[f"base_{name}"], rtol=EQUAL, err_msg=name)
    head = base_gradient.keys() - gradient.keys()
    assert head and not any(np.any(base_gradient[name]) for name in head)
    check_close(gradient, {name: base_gradient[name] for name in gradient}, relative=EQUAL)

    theirs = nemo_trainer(domino, params, batch, loss_decay_gamma=gamma)
    expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors, lambda_base=1.0)
    np.testing.assert_allclose(found["loss"], expected["base_loss"], rtol=METRIC)
    np.testing.assert_allclose(found["accept_len"], expected["base_accept_len"], rtol=METRIC)
    check_close(gradient, {name: expected_gradient[name] for name in gradient}, relative=GRADIENT)


def test_a_block_of_one_token_equals_nemo() -> None:
    """Only with shifted labels: an unshifted block of one token holds its anchor alone."""
    config = draft_config(block_size=1, pure_draft_prefix_len=0)
    found = compare_with_nemo(config, gamma=7.0, packed=True, chunk_blocks=3)
    assert found["valid_tokens"] == found["valid_blocks"] > 0
    batch = random_batch(config)
    unshifted = nemo_trainer(config, random_params(config), batch)
    unshifted.shift_label = False
    anchors = random_anchors(config, batch, slots=11)
    with pytest.raises(RuntimeError, match="0 elements"):
        nemo_step(unshifted, batch, anchors=anchors, lambda_base=0.5)
    with pytest.raises(InputError, match="block_size 1 predicts no token without shift_label"):
        dataclasses.replace(config, shift_label=False)
