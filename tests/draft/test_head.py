"""The Domino head against PyTorch's GRU and linear layers."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from reference import draft_config, random_params
from seeded import normal

from domino_jax.draft.head import DominoHead, PrefixGRU

INPUT, HIDDEN, ROWS, STEPS = 14, 9, 6, 7


def gru_weights() -> dict[str, np.ndarray]:
    return {
        "weight_ih_l0": normal(3 * HIDDEN, INPUT, seed=1) * 0.5,
        "weight_hh_l0": normal(3 * HIDDEN, HIDDEN, seed=2) * 0.5,
    }


def test_prefix_gru_equals_torch_in_values_and_gradients() -> None:
    import torch

    x, weights = normal(ROWS, STEPS, INPUT), gru_weights()
    outer = normal(ROWS, STEPS, HIDDEN, seed=3)
    theirs = torch.nn.GRU(INPUT, HIDDEN, bias=False, batch_first=True)
    theirs.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    x_torch = torch.tensor(x, requires_grad=True)
    states, _ = theirs(x_torch)
    (states * torch.tensor(outer)).sum().backward()

    def total(weights: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = PrefixGRU(INPUT, HIDDEN).apply({"params": weights}, x)
        return jnp.sum(found * outer), found

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, found), (weight_gradient, x_gradient) = run(weights, x)
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(found, states.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x_gradient, x_torch.grad.numpy(), rtol=1e-5, atol=1e-5)
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            weight_gradient[name], parameter.grad.numpy(), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_prefix_gru_starts_like_torch() -> None:
    params = nn.unbox(
        jax.jit(PrefixGRU(INPUT, HIDDEN).init)(jax.random.key(0), normal(1, 1, INPUT))
    )["params"]
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        "weight_ih_l0": ((3 * HIDDEN, INPUT), jnp.float32),
        "weight_hh_l0": ((3 * HIDDEN, HIDDEN), jnp.float32),
    }
    for x in params.values():  # uniform within 1 / sqrt(G)
        assert 0.9 * HIDDEN**-0.5 < np.abs(x).max() <= HIDDEN**-0.5


def test_prefix_gru_carries_float32_when_products_are_bfloat16() -> None:
    x, weights = normal(ROWS, STEPS, INPUT), gru_weights()
    found = PrefixGRU(INPUT, HIDDEN, "bfloat16").apply(
        {"params": weights}, jnp.asarray(x, jnp.bfloat16)
    )
    chex.assert_type(found, jnp.float32)
    assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(
        found, PrefixGRU(INPUT, HIDDEN).apply({"params": weights}, x), atol=0.05
    )


def test_prefix_gru_accumulates_bfloat16_products_in_float32() -> None:
    x, weights = jnp.asarray(normal(ROWS, INPUT), jnp.bfloat16), gru_weights()
    found = PrefixGRU(INPUT, HIDDEN, "bfloat16").apply({"params": weights}, x, method="input_gates")
    rounded = jnp.asarray(weights["weight_ih_l0"], jnp.bfloat16).astype(jnp.float32)
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(found, x.astype(jnp.float32) @ rounded.T, rtol=1e-5, atol=1e-5)


def test_domino_head_step_equals_the_scan() -> None:
    config = draft_config()
    head, params = DominoHead(config, config.head), {"params": random_params(config)["head"]}
    previous = normal(ROWS, STEPS, config.hidden_size)
    scanned = head.apply(params, previous, method=lambda module, x: module.prefix_gru(x))
    state = jnp.zeros((ROWS, config.head.gru_hidden_dim))
    next_state = jax.jit(functools.partial(head.apply, method="step"))
    for step in range(STEPS):
        state = next_state(params, state, previous[:, step])
        np.testing.assert_allclose(state, scanned[:, step], rtol=1e-5, atol=1e-6)


def test_domino_head_equals_torch() -> None:
    import torch

    config = draft_config()
    params = random_params(config)["head"]
    hidden, previous = (normal(2, 3, 5, config.hidden_size, seed=seed) for seed in (0, 1))
    gru = torch.nn.GRU(config.hidden_size, config.head.gru_hidden_dim, bias=False, batch_first=True)
    gru.load_state_dict(
        {name: torch.tensor(np.asarray(w)) for name, w in params["prefix_gru"].items()}
    )
    with torch.no_grad():
        states, _ = gru(torch.tensor(previous.reshape(6, 5, -1)))
        # Hidden first, then the GRU.
        joined = torch.cat([torch.tensor(hidden), states.reshape(2, 3, 5, -1)], dim=-1)
        weight = torch.tensor(np.asarray(params["embed_proj_0"]["weight"]))
        expected = torch.nn.functional.silu(joined @ weight.T)
    found = jax.jit(DominoHead(config, config.head).apply)({"params": params}, hidden, previous)
    chex.assert_shape(found, (2, 3, 5, config.head.emb_dim))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_domino_head_computes_in_its_dtype() -> None:
    config = draft_config(dtype="bfloat16")
    params = random_params(config)["head"]
    half = jnp.asarray(normal(1, 2, 5, config.hidden_size), jnp.bfloat16)
    found = DominoHead(config, config.head).apply({"params": params}, half, half)
    chex.assert_type(found, jnp.bfloat16)
