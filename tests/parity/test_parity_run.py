"""A whole run beside NeMo AutoModel 0.7.0's: 50 AdamW steps with the curriculum, equal anchors."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from reference import (
    check_close,
    draft_config,
    make_step,
    nemo_step,
    nemo_trainer,
    random_anchors,
    random_batch,
    random_params,
)

from domino_jax.interop.hf import hf_tensors
from domino_jax.training.curriculum import get_lambda_base

SLOTS = 11


def test_fifty_adamw_steps_end_where_nemos_do() -> None:
    config, steps, rate, betas = draft_config(), 50, 6e-4, (0.9, 0.95)
    start = random_params(config)
    theirs = nemo_trainer(config, start, random_batch(config))
    torch_optimizer = torch.optim.AdamW(
        theirs.draft_model.parameters(), lr=rate, betas=betas, weight_decay=0.0
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=betas[0], b2=betas[1], weight_decay=0.0),
    )
    step = make_step(config, loss_decay_gamma=None, chunk_blocks=3)

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, jax.jit(optimizer.init)(start)
    clipped = 0
    for index in range(steps):
        batch = random_batch(config, seed=index)
        anchors = random_anchors(config, batch, slots=SLOTS, seed=index)
        lambda_base = get_lambda_base(index, steps, 1.0, 1.0)
        expected, expected_gradient = nemo_step(
            theirs, batch, anchors=anchors, lambda_base=lambda_base
        )
        clipped += sum(np.sum(x**2) for x in expected_gradient.values()) > 1.0
        torch.nn.utils.clip_grad_norm_(theirs.draft_model.parameters(), 1.0)
        torch_optimizer.step()
        given = {
            "anchor_positions": anchors[0],
            "block_keep_mask": anchors[1],
            "lambda_base": lambda_base,
        }
        (loss, metrics), gradient = step.run(
            params, batch.arrays, batch.packing | given, jax.random.key(0)
        )
        params, state = update(params, state, gradient)
        np.testing.assert_allclose(metrics.lambda_base, expected["lambda_base"], rtol=1e-6)
        np.testing.assert_allclose(float(loss), expected["loss"], rtol=1e-4)
    assert clipped == steps
    trained = {name: x.detach().numpy() for name, x in theirs.draft_model.named_parameters()}
    check_close(hf_tensors(config, params), trained, relative=1e-4)
    # Every parameter has moved by far more than it may differ.
    with pytest.raises(AssertionError) as caught:
        check_close(hf_tensors(config, start), trained, relative=1e-3)
    assert all(name in str(caught.value) for name in trained)
