"""The shapes of target and draft: what they refuse, and how a draft is stored."""

import json
import re
from typing import Any

import pytest
import yaml
from trees import DECODER, DRAFT, LLAMA3

from domino_jax.base.errors import InputError
from domino_jax.config.model import (
    DecoderConfig,
    DraftConfig,
    RopeScaling,
    default_target_layer_ids,
    draft_from_dict,
    draft_tree,
)
from domino_jax.config.sizes import SIZE_LIMIT, SIZE_LIMITS

SLIDING = ["sliding_attention"] * DECODER["num_hidden_layers"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, f"{name} must be positive, found 0") for name in DECODER),
        *(
            (
                {name: 2**62},
                f"{name} must be at most {SIZE_LIMITS.get(name, SIZE_LIMIT)}, found {2**62}",
            )
            for name in DECODER
        ),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers must be at most 10000, found 10001"),
        *(
            ({"rms_norm_eps": x}, f"rms_norm_eps must lie between 0 and 1, found {x}")
            for x in (0.0, -1e-6, float("nan"), float("inf"), 1e30)
        ),
        ({"rope_theta": float("inf")}, "rope_theta must be finite in float32, found inf"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
        ({"head_dim": 3}, "head_dim must be even for rotary embeddings, found 3"),
        ({"dtype": "float64"}, "dtype must be float32 or bfloat16, found 'float64'"),
    ],
)
def test_decoder_config_refuses(change: dict[str, Any], message: str) -> None:
    DecoderConfig(**DECODER)
    with pytest.raises(InputError) as caught:
        DecoderConfig(**DECODER | change)
    assert str(caught.value) == message


# Fields, as YAML, and what the message begins with.
DRAFT_REFUSED = f"""
head_dim: 3                       head_dim must be even
block_size: 1                     block_size 1 predicts no token without shift_label; use block_size
block_size: 0, shift_label: true  block_size must be positive, found 0
mask_token_id: 32                 mask_token_id 32 is outside the vocabulary of 32
mask_token_id: -1                 mask_token_id -1 is outside the vocabulary of 32
target_layer_ids: []              target_layer_ids [] must lie in 0..5
target_layer_ids: [1, 6]          target_layer_ids [1, 6] must lie in 0..5
target_layer_ids: [-1, 1]         target_layer_ids [-1, 1] must lie in 0..5
target_layer_ids: [3, 1]          target_layer_ids [3, 1] must rise
target_layer_ids: [1, 1]          target_layer_ids [1, 1] must rise
pure_draft_prefix_len: -1         pure_draft_prefix_len -1 leaves the head none of 3 predictions to
pure_draft_prefix_len: 3          pure_draft_prefix_len 3 leaves the head none of 3 predictions to
pure_draft_prefix_len: 4, shift_label: true  pure_draft_prefix_len 4 leaves the head none of 4 pred
layer_types: [full_attention]     layer_types names 1 layers, num_hidden_layers is 2
layer_types: [full_attention, linear]        layer_types holds ['linear']; known: full_attention, s
sliding_window: 8                 sliding_window is 8, layer_types []: a window needs sliding_atten
layer_types: {SLIDING}            sliding_window is None, layer_types ['sliding_attention', 'slidin
layer_types: {SLIDING}, sliding_window: 3    sliding_window 3 must be at least block_size 4
sliding_in_block: forward         sliding_in_block must be 'bidirectional' or 'causal', found 'forw
num_target_layers: {2**62}        num_target_layers must be at most {SIZE_LIMIT}, found {2**62}
input_embedding_scale: .inf       input_embedding_scale must be positive and finite in float32, fou
input_embedding_scale: 0.0        input_embedding_scale must be positive and finite in float32, fou
output_multiplier: .nan           output_multiplier must be positive and finite in float32, found n
output_multiplier: -1.0           output_multiplier must be positive and finite in float32, found -1
final_logit_softcapping: 1.0e+300  final_logit_softcapping must be positive and finite in float32, f
final_logit_softcapping: 0.0      final_logit_softcapping must be positive and finite in float32, f
"""


@pytest.mark.parametrize("line", DRAFT_REFUSED.strip().splitlines())
def test_draft_config_refuses(line: str) -> None:
    change, message = re.split(r" {2,}", line)
    with pytest.raises(InputError) as caught:
        DraftConfig(**DRAFT | yaml.safe_load(f"{{{change}}}"))
    assert str(caught.value).startswith(message)


def test_draft_config_says_what_to_do() -> None:
    for change, remedy in (
        ({"block_size": 1}, "; use block_size 2 or more, or shift_label true"),
        ({"pure_draft_prefix_len": 3}, " to correct; use 0 to 2"),
        ({"block_size": 1, "shift_label": True, "pure_draft_prefix_len": 1}, "; use 0 to 0"),
    ):
        with pytest.raises(InputError) as caught:
            DraftConfig(**DRAFT | change)
        assert str(caught.value).endswith(remedy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_type": "mlp"}, "projector_type must be 'domino' or null, found 'mlp'"),
        ({"projector_type": ["domino"]}, "projector_type must be 'domino' or null, found ['dom"),
        ({"emb_dim": 0}, "emb_dim must be positive, found 0"),
        ({"gru_hidden_dim": 0}, "gru_hidden_dim must be positive, found 0"),
        ({"emb_dim": 2**62}, f"emb_dim must be at most {SIZE_LIMIT}, found {2**62}"),
        ({"emb_dim": "wide"}, "emb_dim: expected"),
        ({"projector_type": None, "emb_dim": 8}, "unknown key 'emb_dim'"),
        ({"attention_bias": True}, "unknown key 'attention_bias'"),  # a draft has none
        ({"num_experts": 4}, "unknown key 'num_experts'"),
        ({"pure_draft_prefix_len": 3}, "pure_draft_prefix_len 3 leaves the head none of 3 pred"),
    ],
)
def test_a_stored_draft_is_read_strictly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        draft_from_dict(DRAFT | change, source="file")
    assert str(caught.value).startswith(f"file: {message}")


def test_draft_config_accepts_the_edges() -> None:
    for change, predictions in (
        ({"pure_draft_prefix_len": 2, "target_layer_ids": (0, 5)}, 3),
        ({"pure_draft_prefix_len": 3, "shift_label": True}, 4),
        ({"head": None, "shift_label": True}, 4),
    ):
        assert DraftConfig(**DRAFT | change).num_predictions == predictions


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_draft_config_round_trips_through_json(scaling: RopeScaling | None) -> None:
    draft = DraftConfig(**DRAFT | {"rope_scaling": scaling})
    assert draft_from_dict(json.loads(json.dumps(draft_tree(draft))), source="file") == draft
    tree = draft_tree(draft) | {"rope_scaling": {"rope_type": "linear", "factr": 2.0}}
    misspelt = "file: rope_scaling: unknown key 'factr'; did you mean 'factor'"
    with pytest.raises(InputError, match=misspelt):
        draft_from_dict(tree, source="file")
    with pytest.raises(InputError, match="file: rope_scaling: expected a mapping, found 2"):
        draft_from_dict(tree | {"rope_scaling": 2}, source="file")


def test_default_target_layer_ids() -> None:
    for depths, ids in {
        (36, 5): (1, 9, 17, 25, 33),
        (64, 5): (1, 16, 31, 46, 61),
        (30, 2): (1, 27),
        (30, 1): (15,),
        (31, 3): (1, 14, 28),  # 14.5 rounds to even, as Python does
    }.items():
        assert default_target_layer_ids(*depths) == ids


def test_default_target_layer_ids_equal_the_reference() -> None:
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import build_target_layer_ids

    for target_layers in range(4, 81):
        for draft_layers in range(1, 9):
            expected = tuple(build_target_layer_ids(target_layers, draft_layers))
            assert default_target_layer_ids(target_layers, draft_layers) == expected
