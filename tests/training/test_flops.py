"""The count of useful FLOPs, held against the models' own weights and against plain loops."""

import dataclasses
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from domino_jax.base.scopes import STAGES, UPDATE
from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.build import init_variables
from domino_jax.target.decoder import Target
from domino_jax.training.flops import step_flops

TARGET = DecoderConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
# Heads and depth are its own.
DRAFT = DraftConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    max_position_embeddings=512,
    block_size=4,
    mask_token_id=95,
    num_target_layers=6,
    target_layer_ids=(1, 3),
    head=DominoHeadConfig(emb_dim=5, gru_hidden_dim=7),
    shift_label=True,
)
PLAIN = dataclasses.replace(DRAFT, head=None, shift_label=False)
S, N = 200, 3


def weights(boxed: Any) -> dict[tuple[str, ...], int]:
    """Elements of each matrix of a model."""
    leaves = flatten_dict(nn.meta.unbox(boxed)["params"])
    return {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items() if leaf.ndim > 1}


def draft_weights(config: DraftConfig) -> dict[tuple[str, ...], int]:
    return weights(jax.eval_shape(lambda: init_variables(DraftModel(config), jax.random.key(0))))


def layer_weights(model: dict[tuple[str, ...], int], *, layers: int = 100) -> int:
    """Of the first `layers`."""
    named = [(path[0].partition("_"), count) for path, count in model.items()]
    return sum(n for (kind, _, at), n in named if kind == "layers" and int(at) < layers)


@pytest.mark.parametrize("config", [DRAFT, PLAIN], ids=["domino", "plain"])
def test_products_are_the_weights_times_what_goes_through_them(config: DraftConfig) -> None:
    parts, model = step_flops(config, S, N), draft_weights(config)
    predictions = N * config.num_predictions
    assert config.num_predictions == (4 if config is DRAFT else 3)
    # A weight that is trained costs 2 FLOPs three times; nothing wants the gradient of fc's input.
    keys = sum(n for path, n in model.items() if path[-2] in ("k_proj", "v_proj"))
    assert parts["context"] == 4 * S * model["fc", "weight"] + 6 * S * keys
    assert parts["backbone"] == 6 * N * 4 * layer_weights(model)
    logits = 4 * predictions * 96 * 16  # through the frozen head, and back to the states
    if config is PLAIN:
        assert parts.keys() == {"context", "backbone", "block_attention", "vocabulary_loss"}
        assert parts["vocabulary_loss"] == logits
        return
    gru, into = model["head", "prefix_gru", "weight_hh_l0"], ("head", "prefix_gru", "weight_ih_l0")
    low_rank = model["head", "embed_proj_0", "weight"]
    assert parts["head"] == predictions * (4 * model[into] + 6 * gru + 6 * low_rank)
    expansion = model["head", "embed_proj_2"]
    assert parts["vocabulary_loss"] == logits + 6 * predictions * expansion


@pytest.mark.parametrize("experts", [0, 8])
def test_the_target_counts_its_layers_that_run_forward_only(experts: int) -> None:
    target = TARGET
    if experts:
        mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        target = dataclasses.replace(TARGET, **mixture)
    tokens = jnp.zeros((1, 2), jnp.int32)
    model = weights(jax.eval_shape(Target(target).init, jax.random.key(0), tokens))
    # A token goes to 2 of the experts.
    model = {p: n * 2 // experts if "experts" in p else n for p, n in model.items()}
    scores = 2 * S * 2 * 4 * 8 * S / 2
    for depth, options in ((4, {}), (6, {"target_logits": True})):
        parts = step_flops(DRAFT, S, N, target=target, **options)
        assert parts["target"] == 2 * S * layer_weights(model, layers=depth) + depth * scores
    tied = dataclasses.replace(target, tie_word_embeddings=True)
    assert step_flops(DRAFT, S, N, target=tied) == step_flops(DRAFT, S, N, target=target)
    assert "target" not in step_flops(DRAFT, S, N)


def test_the_targets_logits_are_counted_once_a_token() -> None:
    def logits(anchors: int) -> float:
        asked = step_flops(DRAFT, S, anchors, target_logits=True)
        return asked["vocabulary_loss"] - step_flops(DRAFT, S, anchors)["vocabulary_loss"]

    assert logits(3) == 2 * 3 * 4 * 96 * 16
    assert logits(100) == 2 * S * 96 * 16  # 400 predictions of 200 tokens


@pytest.mark.parametrize("in_block", ["bidirectional", "causal"])
def test_attention_is_counted_up_to_the_anchor_and_the_window(in_block: str) -> None:
    window, kinds = 40, ("full_attention", "sliding_attention")
    windows = {"layer_types": kinds, "sliding_window": window, "sliding_in_block": in_block}
    keys = 0
    for kind in kinds:
        sliding = kind == "sliding_attention"
        for anchor in range(S):
            for spec in range(4):
                keys += min(anchor, window) if sliding else anchor
                keys += spec + 1 if sliding and in_block == "causal" else 4
    # Scores and values of 2 heads of 6; 2 FLOPs, three times.
    expected = N / S * keys * 2 * 2 * 6 * 6
    parts = step_flops(dataclasses.replace(DRAFT, **windows), S, N)
    assert parts["block_attention"] == pytest.approx(expected, rel=6e-3)  # S / 2 for (S - 1) / 2
    short = dataclasses.replace(DRAFT, **windows | {"sliding_window": 300})
    if in_block == "bidirectional":  # a window that nothing reaches is none
        assert step_flops(short, S, N) == step_flops(DRAFT, S, N)


def test_parts_are_stages_and_counting_needs_no_jax() -> None:
    parts = step_flops(DRAFT, S, N, target=TARGET)
    assert parts.keys() == set(STAGES) - {UPDATE}
    imports = "import sys, domino_jax.base.chips, domino_jax.training.flops"
    words = [sys.executable, "-c", f"{imports}; sys.exit('jax' in sys.modules)"]
    assert subprocess.run(words).returncode == 0
