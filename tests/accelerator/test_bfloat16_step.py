"""A training step in bfloat16, as accelerators run it, follows the same step in float32."""

import functools
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import draft_config, target_config

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.draft.build import init_draft
from domino_jax.objective.curriculum import lambda_base_schedule
from domino_jax.objective.modules import build_trainer
from domino_jax.target.decoder import Target
from domino_jax.training.step import Batch, Program, initial_state, train_step

pytestmark = pytest.mark.accelerator

LOSS = 0.01  # relative
GRADIENT = 0.03  # of the norm of all gradients together; 0.009 on a CPU

# Widths that the matrix units take whole: smaller ones would measure another program.
CONFIG = draft_config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    head_dim=64,
    max_position_embeddings=512,
    block_size=8,
    mask_token_id=1023,
    num_target_layers=4,
    target_layer_ids=(0, 2),
    head=DominoHeadConfig(emb_dim=64, gru_hidden_dim=128),
)
ROWS, LENGTH, ANCHORS = 2, 256, 32


def scanned(dtype: str) -> Target:
    """The target as a step runs it."""
    cfg = replace(target_config(CONFIG, layers=3), dtype=dtype)
    return Target(cfg, capture=CONFIG.target_layer_ids, scan_layers=True)


def loss_and_gradient(dtype: str) -> tuple[float, np.ndarray]:
    """Mean loss and gradient [parameters] of one step with the same weights, rows and anchors."""
    config = replace(CONFIG, dtype=dtype)
    program = Program(
        trainer=build_trainer(config, num_anchors=ANCHORS, loss_decay_gamma=7.0),
        target=scanned(dtype),
        optimizer=optax.sgd(1.0, momentum=0.9),  # its trace after one step is the gradient
        curriculum=lambda_base_schedule(10, lambda_start=0.5),
    )
    # Made in float32 both times, then rounded as `load_target` rounds them.
    variables = scanned("float32").init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))
    target_params = jax.tree.map(lambda x: x.astype(dtype), nn.meta.unbox(variables)["params"])
    params = init_draft(CONFIG, jax.random.key(2))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (1, ROWS, LENGTH), dtype=np.int32)
    batch = Batch(jnp.asarray(ids), jnp.asarray(rng.random(ids.shape) < 0.9))
    # Accelerators multiply float32 in fewer bits by default; bfloat16 operands are not affected.
    with jax.default_matmul_precision("highest"):
        step = jax.jit(functools.partial(train_step, program))
        state, sums = step(initial_state(program, params), target_params, batch)
    leaves: list[Any] = jax.device_get(jax.tree.leaves(state.opt_state[0].trace))
    loss = float(sums["loss_sum"] / sums["loss_weight"])
    return loss, np.concatenate([x.ravel() for x in leaves])


def test_bfloat16_step_follows_float32() -> None:
    narrow_loss, narrow = loss_and_gradient("bfloat16")
    wide_loss, wide = loss_and_gradient("float32")
    assert np.linalg.norm(wide) > 0
    assert narrow_loss != wide_loss, "the types were not used"
    assert abs(narrow_loss - wide_loss) <= LOSS * wide_loss
    assert np.linalg.norm(narrow - wide) <= GRADIENT * np.linalg.norm(wide)
