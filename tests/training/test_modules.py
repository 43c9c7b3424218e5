"""The trainer modules against NeMo AutoModel 0.7.0: metrics, gradients and ten AdamW steps at the same anchors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from nemo_automodel.components.speculative.dflash.core import NoValidAnchorsError
from reference import (
    Batch,
    check_close,
    dflash_config,
    draft_config,
    nemo_step,
    nemo_trainer,
    random_anchors,
    random_batch,
    random_params,
)

from domino_jax.draft.backbone import DraftModel
from domino_jax.interop.hf import hf_tensors
from domino_jax.model_config import DraftConfig
from domino_jax.training.curriculum import get_lambda_base
from domino_jax.training.modules import DFlashTrainerModule, DominoTrainerModule, build_trainer

METRIC, GRADIENT = 1e-5, 1e-4
SLOTS = 11


class Step(NamedTuple):
    """A module and its jitted loss with gradients, with fixed anchors or with drawn ones."""

    module: DFlashTrainerModule
    run: Any


@functools.cache  # compiling takes longer than everything else here
def make_step(config: DraftConfig, **options: Any) -> Step:
    module = build_trainer(config, **options)

    def loss(params: Any, arrays: tuple[jax.Array, ...], given: dict[str, Any], key: jax.Array) -> tuple[Any, Any]:
        variables = {"params": {"draft_model": params}}
        metrics = module.apply(variables, *arrays, rngs={"anchors": key}, **given)
        return metrics.loss, metrics

    # The results are the same and compiling takes half as long.
    quick = {"xla_backend_optimization_level": 0}
    return Step(module, jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick))


def our_step(
    step: Step,
    config: DraftConfig,
    params: Any,
    batch: Batch,
    *,
    anchors: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
    **given: Any,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and gradients by the checkpoint's names, like `nemo_step`."""
    if anchors is not None:
        given |= {"anchor_positions": jnp.asarray(anchors[0]), "block_keep_mask": jnp.asarray(anchors[1])}
    (_, metrics), gradient = step.run(params, batch.arrays, batch.packing | given, jax.random.key(seed))
    return {name: float(x) for name, x in vars(metrics).items()}, hf_tensors(config, gradient)


def check_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=METRIC, err_msg=name)


# shift_label and pure_draft_prefix_len in full; gamma, packing and chunks so that every pair occurs.
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
    params, batch = random_params(config), random_batch(config, packed=packed)
    anchors = random_anchors(config, batch, slots=SLOTS)
    assert not anchors[1].all()  # unused slots are part of the comparison
    theirs = nemo_trainer(config, params, batch, loss_decay_gamma=gamma)
    step = make_step(config, loss_decay_gamma=gamma, chunk_blocks=chunk_blocks)
    for lambda_base in (0.0, 0.5, 1.0):
        expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors, lambda_base=lambda_base)
        found, gradient = our_step(step, config, params, batch, anchors=anchors, lambda_base=lambda_base)
        check_metrics(found, expected)
        check_close(gradient, expected_gradient, relative=GRADIENT)
        # The comparison says something only where predictions are partly right and the two logits differ.
        assert 0.05 < found["accuracy"] < 0.95 and abs(found["final_loss"] - found["base_loss"]) > 0.1
        assert found["accept_len"] > 1.0 and found["base_accept_len"] > 1.0
        assert found["valid_blocks"] <= found["valid_tokens"] < anchors[1].sum() * config.num_predictions
    assert step.run._cache_size() == 1


@pytest.mark.parametrize(
    ("gamma", "packed", "chunk_blocks"), [(None, True, 0), (7.0, False, 3)], ids=["packed", "decay-chunks"]
)
def test_dflash_trainer_equals_nemo(gamma: float | None, packed: bool, chunk_blocks: int) -> None:
    config = dflash_config()
    params, batch = random_params(config), random_batch(config, packed=packed)
    anchors = random_anchors(config, batch, slots=SLOTS)
    assert not anchors[1].all()
    theirs = nemo_trainer(config, params, batch, loss_decay_gamma=gamma)
    step = make_step(config, loss_decay_gamma=gamma, chunk_blocks=chunk_blocks)
    assert type(step.module) is DFlashTrainerModule
    expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors)
    found, gradient = our_step(step, config, params, batch, anchors=anchors)
    check_metrics(found, expected)
    check_close(gradient, expected_gradient, relative=GRADIENT)
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
    found, gradient = our_step(make_step(config, num_anchors=ABOUND), config, params, batch, **curriculum)
    check_metrics(found, expected)
    check_close(gradient, expected_gradient, relative=GRADIENT)
    assert 1 <= found["valid_blocks"] < ABOUND * len(batch.input_ids)


@DRAWN
def test_a_batch_without_anchors_has_no_loss_and_no_gradient(config: DraftConfig, packed: bool, length: int) -> None:
    params, batch = random_params(config), random_batch(config, length=length, packed=packed)
    batch.loss_mask[:] = False
    with pytest.raises(NoValidAnchorsError):  # NeMo's training loop skips such a batch
        nemo_step(nemo_trainer(config, params, batch), batch)
    curriculum = {"lambda_base": 0.5} if config.projector_type else {}
    found, gradient = our_step(make_step(config, num_anchors=ABOUND), config, params, batch, **curriculum)
    assert {name: x for name, x in found.items() if x != 0.0} == curriculum  # NaN would stay
    assert not any(np.any(x) for x in gradient.values())  # and counts as any here


def test_ten_adamw_steps_end_where_nemos_do() -> None:
    config, steps, rate, betas = draft_config(), 10, 6e-4, (0.9, 0.95)
    start = random_params(config)
    theirs = nemo_trainer(config, start, random_batch(config))
    torch_optimizer = torch.optim.AdamW(theirs.draft_model.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=betas[0], b2=betas[1], weight_decay=0.0)
    )
    step = make_step(config, loss_decay_gamma=None, chunk_blocks=3)

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, jax.jit(optimizer.init)(start)
    clipped = 0
    for index in range(steps):
        batch = random_batch(config, seed=index)
        anchors = random_anchors(config, batch, slots=SLOTS, seed=index)
        lambda_base = get_lambda_base(index, steps, 1.0, 1.0)
        expected, expected_gradient = nemo_step(theirs, batch, anchors=anchors, lambda_base=lambda_base)
        clipped += sum(np.sum(x**2) for x in expected_gradient.values()) > 1.0
        torch.nn.utils.clip_grad_norm_(theirs.draft_model.parameters(), 1.0)
        torch_optimizer.step()
        given = {"anchor_positions": anchors[0], "block_keep_mask": anchors[1], "lambda_base": lambda_base}
        (loss, _), gradient = step.run(params, batch.arrays, batch.packing | given, jax.random.key(0))
        params, state = update(params, state, gradient)
    assert clipped == steps
    np.testing.assert_allclose(float(loss), expected["loss"], rtol=1e-4)
    trained = {name: x.detach().numpy() for name, x in theirs.draft_model.named_parameters()}
    check_close(hf_tensors(config, params), trained, relative=1e-4)
    # Every parameter has moved by far more than it may differ.
    with pytest.raises(AssertionError) as caught:
        check_close(hf_tensors(config, start), trained, relative=1e-3)
    assert all(name in str(caught.value) for name in trained)


def test_anchors_follow_the_rng_key() -> None:
    config = draft_config()
    batch, variables = random_batch(config), {"params": {"draft_model": random_params(config)}}
    module = build_trainer(config, num_anchors=4)
    run = jax.jit(lambda key: module.apply(variables, *batch.arrays, rngs={"anchors": key}))
    first, again, other = (vars(run(jax.random.key(seed))) for seed in (1, 1, 2))
    assert {name: float(x) for name, x in first.items()} == {name: float(x) for name, x in again.items()}
    assert first["loss"] != other["loss"]
    assert 0 < first["valid_blocks"] <= 4 * len(batch.input_ids)


def test_gradients_reach_the_draft_only() -> None:
    config = draft_config()
    params, batch = random_params(config), random_batch(config)
    module = build_trainer(config, num_anchors=4)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(features: jax.Array, lm_head: jax.Array, embed_tokens: jax.Array) -> jax.Array:
        arrays = (batch.input_ids, features, batch.loss_mask, lm_head, embed_tokens)
        variables = {"params": {"draft_model": params}}
        return module.apply(variables, *arrays, lambda_base=0.5, rngs={"anchors": jax.random.key(0)}).loss

    assert not any(np.any(x) for x in gradients(batch.hidden_states, batch.lm_head, batch.embed_tokens))


def test_build_trainer_takes_its_fields_from_the_config() -> None:
    config = draft_config(shift_label=False)
    module = build_trainer(config, num_anchors=3, loss_decay_gamma=7.0, chunk_blocks=2)
    assert type(module) is DominoTrainerModule
    assert (module.mask_token_id, module.block_size, module.shift_label) == (119, 5, False)
    assert (module.num_anchors, module.loss_decay_gamma, module.chunk_blocks) == (3, 7.0, 2)
    assert type(build_trainer(dflash_config())) is DFlashTrainerModule


def test_domino_trainer_refuses_a_draft_without_projector() -> None:
    with pytest.raises(ValueError, match="projector_type 'domino', found None"):
        DominoTrainerModule(DraftModel(dflash_config()), mask_token_id=119, block_size=5)


@pytest.mark.parametrize("shift_label", [False, True])
def test_domino_trainer_refuses_another_shift_than_the_drafts(shift_label: bool) -> None:
    draft = DraftModel(draft_config(shift_label=not shift_label))
    with pytest.raises(ValueError, match=f"shift_label is {shift_label} here and {not shift_label} in the draft"):
        DominoTrainerModule(draft, mask_token_id=119, block_size=5, shift_label=shift_label)


@pytest.mark.parametrize("config", [draft_config(), dflash_config()], ids=["domino", "dflash"])
def test_trainers_refuse_half_of_the_packing_and_half_of_the_anchors(config: DraftConfig) -> None:
    batch = random_batch(config, packed=True)
    module, variables = build_trainer(config), {"params": {"draft_model": random_params(config)}}
    key = {"anchors": jax.random.key(0)}
    for name in batch.packing:
        for given in ({name: batch.packing[name]}, {k: v for k, v in batch.packing.items() if k != name}):
            with pytest.raises(ValueError, match="position_ids, seq_lens and doc_remaining together"):
                module.apply(variables, *batch.arrays, rngs=key, **given)
    anchors, keep = random_anchors(config, batch, slots=3)
    for given in ({"anchor_positions": anchors}, {"block_keep_mask": keep}):
        with pytest.raises(ValueError, match="anchor_positions and block_keep_mask together"):
            module.apply(variables, *batch.arrays, rngs=key, **given)
