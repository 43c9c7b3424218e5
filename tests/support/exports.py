"""Drafts of each kind, and the tensors of their exports."""

import dataclasses
import functools
from typing import Any

import pytest
from reference import dflash_config, draft_config, random_params

from domino_jax.config.model import DraftConfig

CONFIG = draft_config()


# D 32, C 3, F 44, 4 heads and 2 key-value heads of 10, G 20, R 12, V 120.
BACKBONE = {
    "fc.weight": (32, 96),
    "hidden_norm.weight": (32,),
    "norm.weight": (32,),
    **{
        f"layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (40, 32),
            "self_attn.k_proj": (20, 32),
            "self_attn.v_proj": (20, 32),
            "self_attn.o_proj": (32, 40),
            "self_attn.q_norm": (10,),
            "self_attn.k_norm": (10,),
            "mlp.gate_proj": (44, 32),
            "mlp.up_proj": (44, 32),
            "mlp.down_proj": (32, 44),
        }.items()
    },
}
HEAD = {
    "prefix_gru.weight_ih_l0": (60, 32),
    "prefix_gru.weight_hh_l0": (60, 20),
    "embed_proj.0.weight": (12, 52),
    "embed_proj.2.weight": (120, 12),
}
SLIDING = ("sliding_attention",) * 2
WINDOWED = draft_config(
    layer_types=SLIDING,
    sliding_window=6,
    input_embedding_scale=1.5,
    output_multiplier=0.5,
    final_logit_softcapping=20.0,
)
PLAIN = dflash_config()


SHIFTED_DFLASH = dataclasses.replace(PLAIN, shift_label=True)
KINDS = pytest.mark.parametrize(
    "config",
    [CONFIG, dflash_config(), SHIFTED_DFLASH, WINDOWED],
    ids=["domino", "dflash", "dflash-shifted", "windows-and-transforms"],
)


@functools.cache
def params_of(config: DraftConfig) -> Any:
    return random_params(config)
