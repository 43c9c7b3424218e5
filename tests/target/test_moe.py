"""The mixture of experts against plain loops over tokens, at its edges and in its dtypes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeded import normal

from domino_jax.config.model import DecoderConfig
from domino_jax.target.moe import Experts, Routes, SparseMLP, routes

CFG = DecoderConfig(
    vocab_size=32,
    hidden_size=6,
    intermediate_size=99,  # must not be read
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    max_position_embeddings=8,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
    norm_topk_prob=True,
)


def random_params(cfg: DecoderConfig = CFG) -> Any:
    one_token = jnp.zeros((1, 1, cfg.hidden_size))
    shapes = jax.eval_shape(SparseMLP(cfg).init, jax.random.key(0), one_token)["params"]
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), nn.unbox(shapes))


def slow_expert(params: Any, index: int, x: np.ndarray) -> np.ndarray:
    gate, up, down = (
        params["experts"][name][index].astype(np.float64)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    return down @ ((gate @ x) / (1 + np.exp(-gate @ x)) * (up @ x))


def slow_mixture(params: Any, x: np.ndarray, *, count: int, normalise: bool) -> np.ndarray:
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape[:2]):
        scores = params["gate"]["weight"].astype(np.float64) @ x[place]
        chances = np.exp(scores) / np.exp(scores).sum()
        best = sorted(range(len(chances)), key=lambda index: -chances[index])[:count]
        total = sum(chances[index] for index in best) if normalise else 1.0
        for index in best:
            out[place] += chances[index] / total * slow_expert(params, index, x[place])
    return out


@pytest.mark.parametrize(("count", "normalise"), [(1, False), (2, True), (2, False), (5, True)])
def test_sparse_mlp_equals_loops(count: int, normalise: bool) -> None:
    cfg = dataclasses.replace(CFG, num_experts_per_tok=count, norm_topk_prob=normalise)
    params, x = random_params(cfg), normal(2, 9, 6, seed=1)
    ours = jax.jit(SparseMLP(cfg).apply)({"params": params}, x)
    slow = slow_mixture(params, x, count=count, normalise=normalise)
    np.testing.assert_allclose(ours, slow, rtol=1e-5, atol=1e-5)


def test_experts_drop_no_token_when_all_want_the_same() -> None:
    params, x = random_params(), normal(7, 6, seed=1)
    experts, weights = jnp.array([[3, 1]] * 7, jnp.int32), jnp.array([[0.25, 2.0]] * 7)
    to = Routes(experts, weights)
    ours = Experts(CFG).apply({"params": params["experts"]}, x, to)
    slow = [0.25 * slow_expert(params, 3, row) + 2 * slow_expert(params, 1, row) for row in x]
    np.testing.assert_allclose(ours, np.stack(slow), rtol=1e-5, atol=1e-5)


def test_routes_are_a_float32_softmax_over_all_experts() -> None:
    logits = jnp.asarray([[1.0, 3.0, 2.0, -50.0]], jnp.bfloat16)
    chances = np.exp([3.0, 2.0]) / np.exp([1.0, 3.0, 2.0]).sum()
    for normalise, expected in ((False, chances), (True, chances / chances.sum())):
        to = routes(logits, count=2, normalise=normalise)
        np.testing.assert_array_equal(to.experts, [[1, 2]])
        assert (to.experts.dtype, to.weights.dtype) == (jnp.int32, jnp.float32)
        np.testing.assert_allclose(to.weights, [expected], rtol=1e-6)


def test_sparse_mlp_of_bfloat16_keeps_float32_masters() -> None:
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    x = jnp.asarray(normal(2, 9, 6, seed=1), jnp.bfloat16)
    boxed = SparseMLP(cfg).init(jax.random.key(0), x)["params"]
    assert boxed["experts"]["down_proj"].names == ("experts", "embed", "mlp")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nn.unbox(boxed))} == {"float32"}
    params = random_params()
    # Scores far apart, so that rounding them does not change the choice.
    params["gate"]["weight"] *= 8
    narrow = SparseMLP(cfg).apply({"params": params}, x)
    wide = SparseMLP(CFG).apply({"params": params}, x.astype("float32"))
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(narrow.astype(jnp.float32) - wide).mean() < 0.05
