"""A target of seven tokens and drafts for it, their weights large enough to matter."""

from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DecoderConfig, DecoderShape, DraftConfig
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.speculate import finish, required_cache_len, start
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_draft
from domino_jax.target.decoder import Target

TARGET = DecoderConfig(
    vocab_size=7,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=256,
)


def draft_config(**changes: Any) -> DraftConfig:
    shape = {field.name: getattr(TARGET, field.name) for field in fields(DecoderShape)}
    own = dict(
        num_hidden_layers=1,
        qk_norm=True,
        block_size=4,
        mask_token_id=6,
        num_target_layers=4,
        target_layer_ids=(0, 2),
        head=DominoHeadConfig(emb_dim=8, gru_hidden_dim=8),
        shift_label=True,
        pure_draft_prefix_len=1,
    )
    return DraftConfig(**{**shape, **own, **changes})


def sharp(params: Any, factor: float) -> Any:
    """Random weights large enough for outputs that depend on every input."""
    return jax.tree.map(lambda x: x * factor if x.ndim == 2 else x, params)


def models(target_params: Any, config: DraftConfig) -> tuple[DraftModel, Weights]:
    params = init_draft(config, jax.random.key(1))
    return DraftModel(config), Weights(target_params, sharp(params, 20.0))


PROMPTS = [np.array(ids, np.int32) for ids in ([1, 2, 3], [4], [5, 1, 0, 2, 2, 3, 1], [3, 3])]


def answers(
    decoder: Decoder, weights: Weights, prompts: list[np.ndarray], count: int, seed: int = 0
) -> Any:
    cache_len = required_cache_len(decoder, max(map(len, prompts)), count)
    return finish(
        decoder,
        weights,
        start(decoder, weights, prompts, max_new_tokens=count, cache_len=cache_len, seed=seed),
    )


def drawn_from(probabilities: np.ndarray, *, top_k: int | None, top_p: float | None) -> np.ndarray:
    """A distribution without ties, float64 [V], filtered by the words of the definition."""
    order = np.argsort(-probabilities)[:top_k]
    kept = np.zeros_like(probabilities)
    kept[order] = probabilities[order] / probabilities[order].sum()
    if top_p is None:
        return kept
    fewest, together = np.zeros_like(kept), 0.0
    for token in order:
        if together < top_p:
            fewest[token] = kept[token]
            together += kept[token]
    return fewest / together


@pytest.fixture(scope="module")
def target_params() -> Any:
    variables = Target(TARGET).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return sharp(nn.meta.unbox(variables)["params"], 20.0)
