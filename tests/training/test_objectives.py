"""The named losses against plain loops, their divisors, and the whole through the trainer modules."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    dflash_config,
    draft_config,
    make_step,
    our_step,
    random_anchors,
    random_batch,
    random_params,
)

from domino_jax.config import LOSS_TYPES, NORMALIZERS
from domino_jax.training.loss import TokenLoss
from domino_jax.training.modules import build_trainer
from domino_jax.training.objectives import (
    OBJECTIVES,
    accept_until_fail,
    dpace_weights,
    loss_divisor,
)

ROWS, SLOTS, SIZE = 2, 5, 6


def drawn(seed: int = 0) -> tuple[TokenLoss, np.ndarray, np.ndarray]:
    """Losses, labels and a mask with holes, an empty block and a full one; half of the predictions are right."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, SLOTS, SIZE)
    nll, divergence = rng.exponential(1.0, shape), rng.exponential(1.0, shape)
    ids, prediction = rng.integers(0, 2, shape), rng.integers(0, 2, shape)
    mask = rng.random(shape) < 0.7
    mask[0, 0], mask[0, 1] = False, True
    loss = TokenLoss(jnp.float32(nll), jnp.int32(prediction), jnp.float32(divergence))
    return loss, ids.astype(np.int32), mask


def slow_dpace(nll: np.ndarray, mask: np.ndarray, alpha: float, form: str) -> list[float]:
    """Equations 7 and 8 of the paper over the supervised positions of one block, zero elsewhere."""
    weights = [0.0] * len(nll)
    kept = [m for m in range(len(nll)) if mask[m]]
    confidence = {m: (1 - alpha) * math.exp(-nll[m]) + alpha for m in kept}
    for j in kept:
        product = {m: math.prod(confidence[i] for i in kept if i <= m) for m in kept}
        rest = sum(product[m] for m in kept if m >= j)
        weights[j] = {"whole": rest, "confidence": product[j], "continuation": rest / product[j]}[form]
    return weights


@pytest.mark.parametrize("form", ["whole", "confidence", "continuation"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpace_weights_follow_the_paper(form: str, alpha: float) -> None:
    loss, ids, mask = drawn()
    found = np.asarray(dpace_weights(loss, ids, mask, alpha, form=form)) * mask
    for b in range(ROWS):
        for n in range(SLOTS):
            expected = slow_dpace(np.asarray(loss.nll)[b, n], mask[b, n], alpha, form)
            np.testing.assert_allclose(found[b, n], expected, rtol=1e-5, atol=1e-7)


def test_dpace_weight_is_the_gradient_of_the_expected_prefix() -> None:
    # Unsmoothed, weight j is how the sum of prefix products answers to log q_j: the property the paper derives it from.
    loss, ids, mask = drawn()

    def expected_length(nll: jax.Array) -> jax.Array:
        q = jnp.where(mask, jnp.exp(-nll), 1.0)
        return jnp.sum(jnp.cumprod(q, axis=-1) * mask)

    slope = -jax.grad(expected_length)(loss.nll)
    np.testing.assert_allclose(dpace_weights(loss, ids, mask, 0.0) * mask, slope, rtol=1e-5, atol=1e-7)


def test_accept_until_fail_ends_with_the_first_wrong_prediction() -> None:
    loss, ids, mask = drawn()
    found = np.asarray(accept_until_fail(loss, ids, mask, 0.5))
    for b in range(ROWS):
        for n in range(SLOTS):
            reached = True
            for m in range(SIZE):
                assert found[b, n, m] == reached
                if mask[b, n, m] and loss.prediction[b, n, m] != ids[b, n, m]:
                    reached = False
    assert 0 < found.mean() < 1


def test_settings_name_the_rows_that_exist() -> None:
    assert set(LOSS_TYPES) == set(OBJECTIVES)
    assert {row.normalize for row in OBJECTIVES.values()} <= set(NORMALIZERS)


def test_loss_divisor_counts_what_its_name_says() -> None:
    _, _, mask = drawn()
    weights = mask * np.float32(0.5)
    found = {name: float(loss_divisor(weights, mask, normalize=name)) for name in ("weights", "tokens", "blocks")}
    assert found == {"weights": mask.sum() / 2, "tokens": mask.sum(), "blocks": mask.any(axis=-1).sum()}
    with pytest.raises(ValueError, match="one of weights, tokens, blocks, found 'mean'"):
        loss_divisor(weights, mask, normalize="mean")


@pytest.mark.parametrize("make", [draft_config, dflash_config], ids=["domino", "dflash"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dpace"},
        {"loss_type": "dpace", "normalize": "weights"},
        {"loss_type": "accept_until_fail"},
        {"normalize": "tokens"},
        {"kl_weight": 0.5},
    ],
    ids=str,
)
def test_trainers_apply_the_objective_to_their_logits(make: Any, options: dict[str, Any]) -> None:
    """Each option divides and weighs as it says, and leaves the metrics of the predictions alone."""
    config = make()
    params, batch = random_params(config), random_batch(config, packed=True)
    anchors = random_anchors(config, batch, slots=11)
    states = np.random.default_rng(8).standard_normal((*batch.input_ids.shape, config.hidden_size)).astype(np.float32)
    given: dict[str, Any] = {"lambda_base": 0.3} if config.projector_type else {}
    step = make_step(config, loss_decay_gamma=3.0, **options)
    found, gradient = our_step(step, config, params, batch, anchors=anchors, target_states=states, **given)
    plain, plain_gradient = our_step(
        make_step(config, loss_decay_gamma=3.0), config, params, batch, anchors=anchors, **given
    )
    assert found["accept_len"] == plain["accept_len"] and found["valid_tokens"] == plain["valid_tokens"]
    divisor = {"tokens": plain["valid_tokens"], "weights": plain["loss_weight"], "blocks": plain["valid_blocks"]}
    normalize = options.get("normalize") or OBJECTIVES[options.get("loss_type", "dflash")].normalize
    np.testing.assert_allclose(found["loss_weight"], divisor[normalize], rtol=1e-6)
    if config.projector_type:
        np.testing.assert_allclose(found["loss"], 0.7 * found["final_loss"] + 0.3 * found["base_loss"], rtol=1e-6)
    if options == {"normalize": "tokens"}:
        ratio = plain["loss_weight"] / plain["valid_tokens"]
        np.testing.assert_allclose(found["loss"], plain["loss"] * ratio, rtol=1e-5)
    else:
        assert abs(found["loss"] - plain["loss"]) > 1e-3
    if options.get("loss_type") == "accept_until_fail":
        assert found["loss"] < plain["loss"]  # fewer terms over the same divisor
    assert all(np.all(np.isfinite(x)) for x in gradient.values())
    assert any(not np.allclose(gradient[name], plain_gradient[name], rtol=1e-3) for name in gradient)


def test_kl_weight_needs_the_targets_states() -> None:
    config = dflash_config()
    batch = random_batch(config)
    module = build_trainer(config, kl_weight=0.5, num_anchors=4)
    with pytest.raises(ValueError, match="kl_weight needs target_states"):
        module.apply(
            {"params": {"draft_model": random_params(config)}}, *batch.arrays, rngs={"anchors": jax.random.key(0)}
        )


def test_divergence_is_taken_from_the_state_that_predicts_the_label() -> None:
    """The state at a position predicts the next token, so a label's state lies one before it."""
    for config in (draft_config(), draft_config(shift_label=False), dflash_config()):
        batch = random_batch(config)
        anchors = random_anchors(config, batch, slots=11)
        states = np.random.default_rng(8).standard_normal((*batch.input_ids.shape, config.hidden_size))
        module = build_trainer(config, kl_weight=1.0)
        wanted = module._wanted_states(jnp.asarray(states), tuple(map(jnp.asarray, anchors)))
        for b in range(3):
            for n in range(11):
                for m in range(config.num_predictions):
                    label = anchors[0][b, n] + 1 + m  # the position whose token is the label
                    at = min(label - 1, batch.input_ids.shape[1] - 1)
                    np.testing.assert_allclose(wanted[b, n, m], states[b, at], rtol=1e-6)
