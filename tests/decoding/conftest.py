"""Weights of the toy target."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from toy_models import TARGET, sharp

from domino_jax.target.model import Target


@pytest.fixture(scope="module")
def target_params() -> Any:
    variables = Target(TARGET).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return sharp(nn.meta.unbox(variables)["params"], 20.0)
