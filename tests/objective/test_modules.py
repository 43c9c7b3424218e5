"""The trainer modules against NeMo AutoModel 0.7.0 at the same anchors.

Metrics, gradients and ten AdamW steps are compared.
"""

import functools
import re
from typing import Any

import chex
import jax
import numpy as np
import pytest
from reference import (
    GRADIENT,
    check_close,
    check_metrics,
    compare_with_nemo,
    dflash_config,
    draft_config,
    make_step,
    nemo_step,
    nemo_trainer,
    our_step,
    random_anchors,
    random_batch,
    random_params,
    show_same_prefixes,
)

from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.objective.modules import DFlashTrainerModule, DominoTrainerModule, build_trainer

SLOTS = 11


# shift_label and pure_draft_prefix_len in full; every pair of gamma, packing and chunks.
@pytest.mark.parametrize(
    ("shift_label", "prefix", "gamma", "packed", "chunk_blocks"),
    [
        (False, 0, None, False, 0),
        (False, 1, 7.0, True, 3),
        (False, 2, None, True, 0),
        (True, 0, 7.0, True, 0),
        (True, 1, None, False, 3),
        (True, 2, 7.0, False, 0),
    ],
)
def test_domino_trainer_equals_nemo(
    shift_label: bool, prefix: int, gamma: float | None, packed: bool, chunk_blocks: int
) -> None:
    config = draft_config(shift_label=shift_label, pure_draft_prefix_len=prefix)
    options: dict[str, Any] = {"gamma": gamma, "chunk_blocks": chunk_blocks}
    for lambda_base in (0.0, 0.5, 1.0):
        found = compare_with_nemo(config, packed=packed, lambda_base=lambda_base, **options)
        # This says something only where predictions are partly right and the two logits differ.
        assert 0.05 < found["accuracy"] < 0.95
        assert abs(found["final_loss"] - found["base_loss"]) > 0.1
        assert found["accept_len"] > 1.0 and found["base_accept_len"] > 1.0
        assert found["valid_blocks"] < found["valid_tokens"]
    step = make_step(config, loss_decay_gamma=gamma, chunk_blocks=chunk_blocks)
    assert step.run._cache_size() == 1


@pytest.mark.parametrize(
    ("gamma", "packed", "chunk_blocks"),
    [(None, True, 0), (7.0, False, 3)],
    ids=["packed", "decay-chunks"],
)
def test_dflash_trainer_equals_nemo(gamma: float | None, packed: bool, chunk_blocks: int) -> None:
    config = dflash_config()
    found = compare_with_nemo(config, packed=packed, gamma=gamma, chunk_blocks=chunk_blocks)
    assert 0.05 < found["accuracy"] < 0.95


# More slots than candidates: both draw every candidate, so that the anchors need not be given.
ABOUND = 50
DRAWN = pytest.mark.parametrize(
    ("config", "packed", "length"),
    [(draft_config(), True, 32), (dflash_config(), False, 4)],
    ids=["domino-packed", "dflash-row-shorter-than-a-block"],
)


@DRAWN
def test_trainers_draw_every_candidate_like_nemo_when_slots_abound(
    config: DraftConfig, packed: bool, length: int
) -> None:
    params, batch = random_params(config), random_batch(config, length=length, packed=packed)
    batch.loss_mask[0, :2] = True
    theirs = nemo_trainer(config, params, batch, num_anchors=ABOUND)
    curriculum = {"lambda_base": 0.5} if config.projector_type else {}
    expected, expected_gradient = nemo_step(theirs, batch, **curriculum)
    found, gradient = our_step(
        make_step(config, num_anchors=ABOUND), config, params, batch, **curriculum
    )
    check_metrics(found, expected)
    check_close(gradient, expected_gradient, relative=GRADIENT)
    assert 1 <= found["valid_blocks"] < ABOUND * len(batch.input_ids)


@pytest.mark.pitfall(
    "no valid anchor in a batch: crash or hang",
    seen="objective/modules.py: divided by the divisor alone",
)
@DRAWN
def test_a_batch_without_anchors_has_no_loss_and_no_gradient(
    config: DraftConfig, packed: bool, length: int
) -> None:
    from nemo_automodel.components.speculative.dflash.core import NoValidAnchorsError

    params, batch = random_params(config), random_batch(config, length=length, packed=packed)
    batch.loss_mask[:] = False
    with pytest.raises(NoValidAnchorsError):  # NeMo's training loop skips such a batch
        nemo_step(nemo_trainer(config, params, batch), batch)
    curriculum = {"lambda_base": 0.5} if config.projector_type else {}
    found, gradient = our_step(
        make_step(config, num_anchors=ABOUND), config, params, batch, **curriculum
    )
    assert {name: x for name, x in found.items() if x != 0.0} == curriculum  # NaN would stay
    assert not any(np.any(x) for x in gradient.values())  # and counts as any here


def test_anchors_follow_the_rng_key() -> None:
    config = draft_config()
    batch, variables = random_batch(config), {"params": {"draft_model": random_params(config)}}
    module = build_trainer(config, num_anchors=4)
    run = jax.jit(lambda key: module.apply(variables, *batch.arrays, rngs={"anchors": key}))
    first, again, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    assert first.loss != other.loss
    assert 0 < first.valid_blocks <= 4 * len(batch.input_ids)


def test_gradients_reach_the_draft_only() -> None:
    config = draft_config()
    params, batch = random_params(config), random_batch(config)
    module = build_trainer(config, num_anchors=4)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(features: jax.Array, lm_head: jax.Array, embed_tokens: jax.Array) -> jax.Array:
        arrays = (batch.input_ids, features, batch.loss_mask, lm_head, embed_tokens)
        variables = {"params": {"draft_model": params}}
        return module.apply(
            variables, *arrays, lambda_base=0.5, rngs={"anchors": jax.random.key(0)}
        ).loss

    assert not any(
        np.any(x) for x in gradients(batch.hidden_states, batch.lm_head, batch.embed_tokens)
    )


@pytest.mark.pitfall(
    "a dense mask of gigabytes",
    seen="draft/backbone.py: the definition of block attention, with scores over the whole context",
)
def test_no_array_has_the_shape_of_the_dense_mask() -> None:
    # Beyond a tile of every form: within one, all blocks may see the whole context.
    length, slots = 1300, 403
    config = draft_config(sliding_window=6, layer_types=("full_attention", "sliding_attention"))
    batch, module = random_batch(config, length=length), build_trainer(config, num_anchors=slots)

    def loss(params: Any) -> jax.Array:
        variables = {"params": {"draft_model": params}}
        return module.apply(variables, *batch.arrays, rngs={"anchors": jax.random.key(0)}).loss

    printed = str(jax.make_jaxpr(jax.grad(loss))(random_params(config)))
    shapes = {
        tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[(\d+(?:,\d+)*)\]", printed)
    }
    queries = slots * config.block_size
    # The pattern finds shapes.
    assert (3, slots, config.block_size) in shapes and (3, length) in shapes
    # Nothing relates blocks to blocks, or blocks to the whole context.
    assert not [
        shape
        for shape in shapes
        if length + queries in shape or sum(n in (slots, queries, length) for n in shape) > 1
    ]


def test_build_trainer_takes_its_fields_from_the_config() -> None:
    config = draft_config(shift_label=False)
    module = build_trainer(config, num_anchors=3, loss_decay_gamma=7.0, chunk_blocks=2)
    assert type(module) is DominoTrainerModule
    assert (module.mask_token_id, module.block_size, module.shift_label) == (119, 5, False)
    assert (module.num_anchors, module.loss_decay_gamma, module.chunk_blocks) == (3, 7.0, 2)
    assert type(build_trainer(dflash_config())) is DFlashTrainerModule
    with pytest.raises(TypeError, match="block_size"):
        build_trainer(config, block_size=8)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (dflash_config(), {}, "needs a draft with a head"),
        (draft_config(), {"shift_label": False}, "shift_label is False here and True in the draft"),
        (
            draft_config(shift_label=False),
            {"shift_label": True},
            "shift_label is True here and False in the draft",
        ),
    ],
    ids=["no head", "shifted draft", "unshifted draft"],
)
def test_domino_trainer_refuses_another_draft(
    config: DraftConfig, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DominoTrainerModule(DraftModel(config), mask_token_id=119, block_size=5, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 4}, "block_size is 4 here and 5 in the draft's config"),
        ({"mask_token_id": 118}, "mask_token_id is 118 here and 119 in the draft's config"),
        ({"loss_type": "focal"}, "loss_type must be one of dflash, .*found 'focal'"),
        ({"loss_options": {"dpace_alpha": 0.5}}, "options of dflash: unknown key 'dpace_alpha'"),
        ({"loss_type": "dpace", "loss_decay_gamma": 7.0}, "gamma must be null, found 7.0"),
        ({"normalize": "mean"}, "one of null, weights, tokens, blocks, found 'mean'"),
        ({"kl_weight": 1.5}, r"kl_weight must lie in 0..1, found 1.5"),
        ({"anchor_rule": "any"}, "anchor_rule must be one of nemo, specforge, found 'any'"),
        ({"num_anchors": 0}, "num_anchors must be at least 1, found 0"),
        ({"chunk_blocks": -1}, "chunk_blocks must be 0 or more, found -1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("domino", [False, True])
def test_trainers_refuse_what_a_config_refuses(
    domino: bool, fields: dict[str, Any], message: str
) -> None:
    if domino:
        kind, draft, own = DominoTrainerModule, draft_config(), {"shift_label": True}
    else:
        kind, draft, own = DFlashTrainerModule, dflash_config(), {}
    with pytest.raises(ValueError, match=message):
        kind(DraftModel(draft), **{"mask_token_id": 119, "block_size": 5} | own | fields)


@pytest.mark.parametrize(
    ("config", "loss_type"),
    [
        (draft_config(), "dflash"),
        (draft_config(shift_label=False), "dflash"),
        (dflash_config(), "dflash"),
        (dflash_config(), "variable_prefix"),
    ],
    ids=["domino", "domino-unshifted", "dflash", "variable-prefix"],
)
def test_metrics_of_fractional_masks_equal_nemos(config: DraftConfig, loss_type: str) -> None:
    """A label weighs and counts by its share; what counts as correct differs between the losses."""
    params = random_params(config)
    domino = config.head is not None
    options = {} if domino else {"loss_type": loss_type}
    step = make_step(config, loss_decay_gamma=4.0, **options)
    theirs = nemo_trainer(config, params, random_batch(config), loss_decay_gamma=4.0, **options)
    curriculum = {"lambda_base": 0.5} if domino else {}
    correct = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        batch = random_batch(config, seed=seed)
        shares = rng.choice([0.0, 0.1, 0.5, 0.7, 1.0, rng.random()], batch.loss_mask.shape)
        batch = batch._replace(loss_mask=shares.astype(np.float32))
        anchors = random_anchors(config, batch._replace(loss_mask=shares > 0.5), slots=SLOTS)
        if loss_type == "variable_prefix":
            show_same_prefixes(theirs, step, anchors)
        expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors, **curriculum)
        found, gradient = our_step(step, config, params, batch, anchors=anchors, **curriculum)
        check_metrics(found, expected)
        check_close(gradient, expected_gradient, relative=GRADIENT)
        assert found["valid_tokens"] % 1 != 0
        correct.append(found["correct_tokens"])
    assert any(correct) and all(x % 1 == 0 for x in correct) == domino


@pytest.mark.parametrize("config", [draft_config(), dflash_config()], ids=["domino", "dflash"])
def test_trainers_refuse_half_of_the_packing_and_half_of_the_anchors(config: DraftConfig) -> None:
    batch = random_batch(config, packed=True)
    module, variables = build_trainer(config), {"params": {"draft_model": random_params(config)}}
    anchors, keep = random_anchors(config, batch, slots=3)
    halves: list[dict[str, Any]] = [{"anchor_positions": anchors}, {"block_keep_mask": keep}]
    for name, array in batch.packing.items():
        halves.append({name: array})
        halves.append({other: x for other, x in batch.packing.items() if other != name})
    for given in halves:
        with pytest.raises(ValueError, match=r"(doc_remaining|block_keep_mask) together"):
            module.apply(variables, *batch.arrays, rngs={"anchors": jax.random.key(0)}, **given)
