"""The named losses against plain loops, their divisors, and all of it in the trainer modules."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from flax.core import FrozenDict
from reference import (
    check_close,
    check_metrics,
    dflash_config,
    draft_config,
    make_step,
    our_step,
    random_anchors,
    random_batch,
    random_params,
)

from domino_jax.base.errors import InputError
from domino_jax.config.sections import LossConfig
from domino_jax.draft.blocks import Anchors
from domino_jax.kernels.token_loss import Labels, TokenLoss
from domino_jax.objective import objectives
from domino_jax.objective.modules import build_trainer
from domino_jax.objective.objectives import (
    DIVISORS,
    OBJECTIVES,
    DpaceOptions,
    NoOptions,
    accept_until_fail,
    dpace_weights,
    reads_target,
    register_objective,
)
from domino_jax.training.prepare import resolved_loss

ROWS, SLOTS, SIZE = 2, 5, 6


def drawn(seed: int = 0) -> tuple[TokenLoss, Labels]:
    """Losses, labels and a mask with holes, empty and full blocks; half the predictions right."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, SLOTS, SIZE)
    nll, divergence = rng.exponential(1.0, shape), rng.exponential(1.0, shape)
    ids, prediction = rng.integers(0, 2, shape), rng.integers(0, 2, shape)
    mask = rng.random(shape) < 0.7
    mask[0, 0], mask[0, 1] = False, True
    loss = TokenLoss(jnp.float32(nll), jnp.int32(prediction), jnp.float32(divergence))
    return loss, Labels(ids.astype(np.int32), mask.astype(np.float32), mask.astype(np.float32))


def slow_dpace(nll: np.ndarray, mask: np.ndarray, alpha: float, form: str) -> list[float]:
    """Equations 7 and 8 of the paper over the supervised positions of one block, zero elsewhere."""
    weights = [0.0] * len(nll)
    kept = [m for m in range(len(nll)) if mask[m]]
    confidence = {m: (1 - alpha) * math.exp(-nll[m]) + alpha for m in kept}
    for j in kept:
        product = {m: math.prod(confidence[i] for i in kept if i <= m) for m in kept}
        rest = sum(product[m] for m in kept if m >= j)
        weights[j] = {"whole": rest, "confidence": product[j], "continuation": rest / product[j]}[
            form
        ]
    return weights


@pytest.mark.parametrize("form", ["whole", "confidence", "continuation"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpace_weights_follow_the_paper(form: str, alpha: float) -> None:
    loss, labels = drawn()
    mask = labels.mask
    found = np.asarray(dpace_weights(loss, labels, DpaceOptions(alpha), form=form)) * mask
    for b in range(ROWS):
        for n in range(SLOTS):
            expected = slow_dpace(np.asarray(loss.nll)[b, n], mask[b, n], alpha, form)
            np.testing.assert_allclose(found[b, n], expected, rtol=1e-5, atol=1e-7)


def test_accept_until_fail_ends_with_the_first_wrong_prediction() -> None:
    loss, labels = drawn()
    ids, mask = labels.target_ids, labels.mask
    found = np.asarray(accept_until_fail(loss, labels, NoOptions()))
    for b in range(ROWS):
        for n in range(SLOTS):
            reached = True
            for m in range(SIZE):
                assert found[b, n, m] == reached
                if mask[b, n, m] and loss.prediction[b, n, m] != ids[b, n, m]:
                    reached = False
    assert 0 < found.mean() < 1


def test_divisors_count_what_their_names_say() -> None:
    mask = drawn()[1].mask
    weights = mask * np.float32(0.5)
    found = {name: float(divisor(weights, mask)) for name, divisor in DIVISORS.items()}
    blocks = mask.any(axis=-1).sum()
    assert found == {"weights": mask.sum() / 2, "tokens": mask.sum(), "blocks": blocks}


@pytest.mark.parametrize("make", slow_after(1, [draft_config, dflash_config]))
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
    """Each option divides and weighs as it says, and leaves the predictions' metrics alone."""
    config = make()
    params, batch = random_params(config), random_batch(config, packed=True)
    anchors = random_anchors(config, batch, slots=11)
    shape = (*batch.input_ids.shape, config.hidden_size)
    states = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    given: dict[str, Any] = {"lambda_base": 0.3} if config.projector_type else {}
    gamma = None if OBJECTIVES[options.get("loss_type", "dflash")].weighs_positions else 3.0
    step = make_step(config, loss_decay_gamma=gamma, **options)
    found, gradient = our_step(
        step, config, params, batch, anchors=anchors, target_states=states, **given
    )
    plain, plain_gradient = our_step(
        make_step(config, loss_decay_gamma=gamma), config, params, batch, anchors=anchors, **given
    )
    for name in ("accept_len", "valid_tokens"):
        assert found[name] == plain[name]
    divisor = {"tokens": "valid_tokens", "weights": "loss_weight", "blocks": "valid_blocks"}
    normalize = options.get("normalize") or OBJECTIVES[options.get("loss_type", "dflash")].normalize
    np.testing.assert_allclose(found["loss_weight"], plain[divisor[normalize]], rtol=1e-6)
    if config.projector_type:
        np.testing.assert_allclose(
            found["loss"], 0.7 * found["final_loss"] + 0.3 * found["base_loss"], rtol=1e-6
        )
    if options == {"normalize": "tokens"}:
        ratio = plain["loss_weight"] / plain["valid_tokens"]
        np.testing.assert_allclose(found["loss"], plain["loss"] * ratio, rtol=1e-5)
    else:
        assert abs(found["loss"] - plain["loss"]) > 1e-3
    if options.get("loss_type") == "accept_until_fail":
        assert found["loss"] < plain["loss"]  # fewer terms over the same divisor
    assert all(np.all(np.isfinite(x)) for x in gradient.values())
    assert any(
        not np.allclose(gradient[name], plain_gradient[name], rtol=1e-3) for name in gradient
    )


def test_kl_weight_needs_the_targets_states() -> None:
    config = dflash_config()
    step = make_step(config, kl_weight=0.5, num_anchors=4)
    with pytest.raises(ValueError, match="kl_weight needs target_states"):
        our_step(step, config, random_params(config), random_batch(config))


def test_divergence_is_taken_from_the_state_that_predicts_the_label() -> None:
    """The state at a position predicts the next token, so a label's state lies one before it."""
    for config in (draft_config(), draft_config(shift_label=False), dflash_config()):
        batch = random_batch(config)
        anchors = random_anchors(config, batch, slots=11)
        states = np.random.default_rng(8).standard_normal(
            (*batch.input_ids.shape, config.hidden_size)
        )
        module = build_trainer(config, kl_weight=1.0)
        wanted = module._label_states(jnp.asarray(states), Anchors(*map(jnp.asarray, anchors)))
        for b in range(3):
            for n in range(11):
                for m in range(config.num_predictions):
                    label = anchors[0][b, n] + 1 + m  # the position whose token is the label
                    at = min(label - 1, batch.input_ids.shape[1] - 1)
                    np.testing.assert_allclose(wanted[b, n, m], states[b, at], rtol=1e-6)


@dataclass(frozen=True)
class FocalOptions:
    focus: float = 2.0


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objectives of a researcher's own, for one test."""
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(OBJECTIVES))
    register_objective(
        "focal",
        factor=lambda token, labels, options: (1 - jnp.exp(-token.nll)) ** options.focus,
        options=FocalOptions,
    )
    register_objective("focal-by-logits", cost=focal_by_logits, options=FocalOptions)


def focal_by_logits(logits: jax.Array, labels: Labels, _: Any, options: FocalOptions) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.take_along_axis(log_probs, labels.target_ids[..., None], axis=-1)[..., 0]
    return (1 - jnp.exp(-nll)) ** options.focus * nll


@pytest.mark.usefixtures("registered")
def test_a_registered_objective_trains_on_the_kernel_and_one_of_logits_on_the_definition() -> None:
    """One focal loss both ways: its gradient flows through the factor; its option is its own."""
    config = draft_config()
    params, batch = random_params(config), random_batch(config)
    anchors = random_anchors(config, batch, slots=7)
    results = {}
    for name, focus in (("focal", 1.5), ("focal-by-logits", 1.5), ("focal", 0.0), ("dflash", None)):
        options = FrozenDict({} if focus is None else {"focus": focus})
        step = make_step.__wrapped__(
            config, loss_type=name, loss_options=options, loss_decay_gamma=3.0
        )
        results[name, focus] = our_step(
            step, config, params, batch, anchors=anchors, lambda_base=0.3
        )
    for left, right in (
        (("focal", 1.5), ("focal-by-logits", 1.5)),
        (("focal", 0.0), ("dflash", None)),
    ):
        check_metrics(results[left][0], results[right][0])
        check_close(results[left][1], results[right][1], relative=1e-5)
    assert abs(results["focal", 1.5][0]["loss"] - results["dflash", None][0]["loss"]) > 1e-3


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("loss_type", "fields", "message"),
    [
        ("focall", {}, "loss: loss_type must be one of dflash, .*focal.*, found 'focall'"),
        (
            "focal",
            {"options": {"focal": 1.0}},
            "loss: options of focal: unknown key 'focal'; .*'focus'",
        ),
        ("focal", {"options": {"focus": "x"}}, "of focal: focus: expected float, found 'x'"),
        ("dpace", {"options": {"dpace_alpha": 1.5}}, r"dpace_alpha must lie in 0..1, found 1.5"),
        ("dpace", {"loss_decay_gamma": 7.0}, "its own weights.*must be null, found 7.0"),
        ("variable_prefix", {}, r"for plain DFlash drafts; draft\.projector_type must be null"),
        (
            "variable_prefix",
            {"options": {"prefix_weight_base": 0}},
            r"prefix_weight_base must be positive, found 0\.0",
        ),
        ("dflash", {"normalize": "mean"}, "one of null, weights, tokens, blocks, found 'mean'"),
        ("focal-by-logits", {"kl_weight": 0.5}, r"cost of its own, .*must be 0, found 0\.5"),
    ],
    ids=str,
)
def test_a_run_refuses_what_an_objective_refuses(
    loss_type: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolved_loss(LossConfig(loss_type=loss_type, **fields), domino=True)


def test_a_decay_that_is_not_given_is_the_objectives_own() -> None:
    found = {
        name: resolved_loss(LossConfig(loss_type=name), domino=False).loss_decay_gamma
        for name in OBJECTIVES
    }
    assert found["dflash"] == found["variable_prefix"] == 7.0 and found["dpace"] is None
    for given in (None, 3.0):
        assert (
            resolved_loss(LossConfig(loss_decay_gamma=given), domino=True).loss_decay_gamma == given
        )


def test_a_resolved_loss_leaves_nothing_open() -> None:
    """A run is read from its record, whatever becomes of the defaults."""
    found = resolved_loss(LossConfig(loss_type="dpace"), domino=True)
    assert found.options == {"dpace_alpha": 0.5} and found.normalize == "blocks"
    assert resolved_loss(found, domino=True) == found


@pytest.mark.usefixtures("registered")
def test_who_reads_the_target() -> None:
    assert reads_target("dflash", kl_weight=0.1) and not reads_target("dflash", kl_weight=0.0)
    assert reads_target("focal-by-logits", kl_weight=0.0)
    assert not reads_target("focal", kl_weight=0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "dflash"}, "'dflash' is already there"),
        ({"normalize": "mean"}, "normalize must be one of weights, tokens, blocks, found 'mean'"),
        ({"options": dict}, "options must be a frozen dataclass, found <class 'dict'>"),
    ],
)
def test_register_objective_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_objective(**{"name": "mine"} | fields)
    assert "mine" not in OBJECTIVES
