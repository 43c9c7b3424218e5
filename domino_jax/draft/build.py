"""A draft's parameters, from its config alone: nothing needs to run, or even to be allocated.

DraftConfig -> `boxed_parameters`   shapes with their logical axes
            -> `init_variables`     arrays with their logical axes
            -> `init_draft`         plain arrays, float32 masters
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.mask import layer_spans


def init_variables(model: DraftModel, key: jax.Array) -> dict:
    """Boxed variables of a draft, with the logical axes of each parameter."""
    cfg = model.cfg

    # Linen makes the parameters of what is called, so the head is called too. One position of
    # context and one block are enough.
    def touch_all(module: DraftModel) -> None:
        states = jnp.zeros((1, 1, len(cfg.target_layer_ids) * cfg.hidden_size), cfg.dtype)
        block = jnp.zeros((1, 1, cfg.block_size, cfg.hidden_size), cfg.dtype)
        positions = jnp.zeros((1, 1, cfg.block_size), jnp.int32)
        start = jnp.zeros((1, 1), jnp.int32)
        used = jnp.ones((1, 1), bool)
        hidden = module(states, start, block, positions, layer_spans(cfg, start, used))
        if cfg.head is not None:
            predictions = module.prediction_states(hidden)
            module.head(predictions, jnp.zeros_like(predictions))

    return nn.init(touch_all, model)(key)


@functools.cache  # names and shapes of a checkpoint ask for each file, and tracing takes 0.1 s
def boxed_parameters(config: DraftConfig) -> Any:
    """Shapes and logical axes of a draft's parameters, without computing any."""
    return jax.eval_shape(lambda: init_variables(DraftModel(config), jax.random.key(0)))["params"]


def init_draft(config: DraftConfig, key: jax.Array) -> Any:
    """Fresh parameters of a draft, as `load_hf_draft` returns them: float32 arrays by path."""
    return nn.meta.unbox(init_variables(DraftModel(config), key))["params"]
