"""Forty-eight random drafts, batches and losses against NeMo AutoModel 0.7.0.

Loss, metrics and gradients are equal in float32, ten losses close in bfloat16.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from reference import (
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

from domino_jax.config.heads import DominoHeadConfig

DRAWS = 48
QUICK_DRAWS = 8


def draw(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a draft config and of the comparison."""
    rng = np.random.default_rng(1000 + seed)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    layers, block = int(rng.integers(1, 5)), int(rng.integers(3, 17))
    domino = seed % 4 != 3
    shift_label = domino and one_of(True, False)
    kv_heads = one_of(1, 2)
    window = one_of(None, block, block + 5)
    captured = sorted(rng.permutation(5)[: rng.integers(1, 4)].tolist())
    config = {
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * one_of(1, 2, 3),
        "num_key_value_heads": kv_heads,
        "head_dim": one_of(4, 10, 16),
        "hidden_size": one_of(24, 32),
        "block_size": block,
        "target_layer_ids": tuple(captured),
        "shift_label": shift_label,
        "pure_draft_prefix_len": one_of(0, 1, 2) % (block if shift_label else block - 1)
        if domino
        else 0,
        "head": DominoHeadConfig(emb_dim=one_of(5, 12), gru_hidden_dim=one_of(7, 20)),
        "layer_types": None if window is None else ("sliding_attention",) * layers,
        "sliding_window": window,
        "input_embedding_scale": one_of(1.0, 2.5),
        "output_multiplier": one_of(1.0, 0.7),
        "final_logit_softcapping": one_of(None, 8.0),
    }
    if not domino:
        config["head"] = None
    comparison = {
        "rows": int(rng.integers(1, 4)),
        # Packed rows need documents that are longer than a block.
        "length": 3 * block + int(rng.integers(8, 24)),
        "packed": one_of(True, False),
        "slots": int(rng.integers(2, 14)),
        "gamma": one_of(None, 7.0, 0.0) if domino else one_of(None, 4.0),
        "chunk_blocks": one_of(0, 3),
        "lambda_base": one_of(0.0, 0.3, 1.0),
        "seed": seed,
    }
    return config, comparison


# A draw takes seconds; the rest are doubles, run by hand.
@pytest.mark.parametrize("seed", slow_after(QUICK_DRAWS, range(DRAWS)))
def test_random_draft_equals_nemo(seed: int) -> None:
    config, comparison = draw(seed)
    found = compare_with_nemo(draft_config(**config), **comparison)
    assert found["valid_blocks"] > 0 and found["loss"] > 0


@pytest.mark.parametrize("seed", slow_after(3, range(10)))
def test_random_draft_in_bfloat16_equals_nemos(seed: int) -> None:
    """Both programs round in other places: the largest difference seen is 0.7 %."""
    fields, comparison = draw(seed)
    config = draft_config(**fields)
    params = random_params(config, seed=seed)
    shape = {name: comparison[name] for name in ("rows", "length", "packed")}
    batch = random_batch(config, **shape, seed=seed)
    anchors = random_anchors(config, batch, slots=comparison["slots"], seed=seed)
    given = {} if config.head is None else {"lambda_base": comparison["lambda_base"]}
    gamma = comparison["gamma"]
    theirs = nemo_trainer(config, params, batch, loss_decay_gamma=gamma, dtype="bfloat16")
    expected, _ = nemo_step(theirs, batch, anchors=anchors, **given)

    # As `train_step` gives them: states, head and embedding in the compute dtype.
    large = ("hidden_states", "lm_head", "embed_tokens")
    half = {name: jnp.asarray(getattr(batch, name), jnp.bfloat16) for name in large}
    step = make_step(replace(config, dtype="bfloat16"), loss_decay_gamma=gamma)
    found, _ = our_step(step, config, params, batch._replace(**half), anchors=anchors, **given)
    assert abs(found["loss"] - expected["loss"]) <= 0.02 * expected["loss"]


def test_draws_cover_the_surface() -> None:
    configs, comparisons = zip(*(draw(seed) for seed in range(DRAWS)), strict=True)
    assert {c["block_size"] for c in configs} >= {3, 16} and {
        c["num_hidden_layers"] for c in configs
    } == {1, 2, 3, 4}
    assert {c["rows"] for c in comparisons} == {1, 2, 3}
    both = {
        (c["sliding_window"] is None, d["packed"])
        for c, d in zip(configs, comparisons, strict=True)
    }
    assert len(both) == 4  # windowed and not, packed and not
    assert {c["head"] is None for c in configs} == {True, False}
    for field in ("shift_label", "final_logit_softcapping", "input_embedding_scale"):
        assert len({c[field] for c in configs}) == 2
