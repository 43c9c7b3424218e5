"""The projections around attention against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_config import CFG
from flax import linen as nn
from seeded import normal
from transformers import Qwen3Config

from domino_jax.kernels.causal_attention import causal_attention
from domino_jax.layers.attention import AttentionProjections
from domino_jax.layers.rotary import rotary


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_projections_equal_transformers(qk_norm: bool) -> None:
    import torch
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    cfg = dataclasses.replace(CFG, qk_norm=qk_norm)
    x, mask = normal(2, 5, cfg.hidden_size), np.tril(np.ones((5, 5), bool))[None].repeat(2, 0)
    positions = np.arange(5, dtype=np.int32)[None].repeat(2, 0)
    tables = rotary(jnp.asarray(positions), cfg)

    def run(module: AttentionProjections, x: jax.Array) -> jax.Array:
        keys, values = module.keys_values(x, tables)
        return module.output(causal_attention(module.queries(x, tables), keys, values))

    module = AttentionProjections(cfg)
    params = nn.unbox(module.init(jax.random.key(0), x, method=run))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3 * normal(*leaf.shape, seed=leaf.size), params)

    config = Qwen3Config(
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        attn_implementation="eager",
    )
    reference = Qwen3Attention(config, layer_idx=0)
    if not qk_norm:
        reference.q_norm = reference.k_norm = torch.nn.Identity()
    weights = {
        f"{name}.weight": torch.tensor(np.asarray(leaf["weight"])) for name, leaf in params.items()
    }
    reference.load_state_dict(weights, strict=True)
    embeddings = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    bias = torch.where(torch.tensor(mask)[:, None], 0.0, float("-inf"))
    with torch.no_grad():
        theirs, _ = reference(torch.tensor(x), embeddings, bias)
    np.testing.assert_allclose(
        module.apply({"params": params}, x, method=run), theirs.numpy(), rtol=1e-5, atol=1e-6
    )
