"""Products and the gated MLP against torch, and the types they compute in."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_config import CFG
from flax import linen as nn
from seeded import normal

from domino_jax.layers.dense import Dense, SwiGLU

BF16 = dataclasses.replace(CFG, dtype="bfloat16")


def test_dense_multiplies_by_the_transposed_weight() -> None:
    import torch

    x, weight = normal(2, 3, 5), normal(7, 5, seed=1)
    ours = Dense(7, ("mlp", "embed")).apply({"params": {"weight": weight}}, x)
    theirs = torch.nn.functional.linear(torch.tensor(x), torch.tensor(weight))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.pitfall("bfloat16 masters and softmax", seen="layers/dense.py: masters in `dtype`")
def test_dense_keeps_a_float32_master_and_computes_in_its_dtype() -> None:
    x = jnp.asarray(normal(2, 5))
    layer = Dense(7, ("mlp", "embed"), "bfloat16")
    boxed = layer.init(jax.random.key(0), x)["params"]["weight"]
    assert boxed.names == ("mlp", "embed")
    chex.assert_shape(boxed.value, (7, 5))
    chex.assert_type(boxed.value, jnp.float32)
    variables = {"params": {"weight": boxed.value}}
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    wide = Dense(7, ("mlp", "embed")).apply(variables, x.astype("bfloat16"))
    assert wide.dtype == jnp.float32


def test_swiglu_equals_torch() -> None:
    import torch

    x = normal(2, 3, CFG.hidden_size)
    params = nn.unbox(SwiGLU(CFG).init(jax.random.key(0), x))
    ours = SwiGLU(CFG).apply(params, x)
    gate, up, down = (
        torch.tensor(np.asarray(params["params"][name]["weight"]))
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    theirs = (
        torch.nn.functional.silu(torch.tensor(x) @ gate.T) * (torch.tensor(x) @ up.T)
    ) @ down.T
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-8)
    assert SwiGLU(BF16).apply(params, x).dtype == jnp.bfloat16
