"""The dual loss: its definition against torch, and the form in pieces against the definition."""

from dataclasses import replace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_cases import CASES, GRADIENT, QUICK, VALUE

from domino_jax.kernels import chunked_cross_entropy as kernel
from domino_jax.kernels.chunked_cross_entropy import vocabulary_loss
from domino_jax.kernels.token_loss import (
    CROSS_ENTROPY,
    Labels,
    Objective,
    States,
    Tables,
    VocabularyLoss,
)
from domino_jax.objective.loss import dual_loss
from domino_jax.objective.objectives import DpaceOptions, dpace_weights

BATCH, BLOCKS, SIZE, WIDTH, RANK, VOCABULARY = 2, 7, 3, 16, 6, 110


class Inputs(NamedTuple):
    hidden: np.ndarray
    lm_head: np.ndarray
    low_rank: np.ndarray
    expansion: np.ndarray
    target_states: np.ndarray


def random_inputs(
    seed: int = 0, shape: tuple[int, int, int] = (BATCH, BLOCKS, SIZE)
) -> tuple[Inputs, Labels]:
    rng = np.random.default_rng(seed)
    wide, table = (*shape, WIDTH), (VOCABULARY, WIDTH)
    shapes = (wide, table, (*shape, RANK), (VOCABULARY, RANK), wide)
    inputs = Inputs(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    mask = (rng.random(shape) < 0.8).astype(np.float32)
    ids = rng.integers(0, VOCABULARY, shape).astype(np.int32)
    return inputs, Labels(ids, mask, rng.random(shape).astype(np.float32) * mask)


def run(
    inputs: Inputs, labels: Labels, *, implementation: Any = vocabulary_loss, **options: Any
) -> VocabularyLoss:
    states = States(inputs.hidden, inputs.low_rank)
    tables = Tables(inputs.lm_head, inputs.expansion)
    labels = labels._replace(target_states=inputs.target_states)
    return implementation(states, tables, labels, **({"lambda_base": 0.3} | options))


def gradient(
    inputs: Inputs, labels: Labels, *, scale: float = 2.0, **options: Any
) -> tuple[Any, VocabularyLoss]:
    """Of a multiple of the total, so that the cotangent is not 1."""

    def total(inputs: Inputs) -> tuple[jax.Array, VocabularyLoss]:
        loss = run(inputs, labels, **options)
        return scale * loss.total, loss

    return jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)(inputs)


def torch_loss(
    inputs: Inputs, labels: Labels, objective: Objective, factors: Any, lam: float
) -> tuple[float, list[Any], list[Any]]:
    """The same sums by autograd over whole logits; `factors` are taken as constants.

    The total, its gradients, and of the final and the base logits each nll and prediction.
    """
    import torch
    import torch.nn.functional as F

    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    hidden, lm_head, low_rank, expansion, states = leaves

    def bounded(x: Any) -> Any:
        logits = x @ lm_head.detach().T
        is_bounded = objective.output_logits(jnp.float32(100.0)) < 5
        return 4.0 * torch.tanh(logits / 4.0) if is_bounded else logits

    base = bounded(hidden)
    ids, weights = torch.tensor(labels.target_ids).long(), torch.tensor(labels.weights)
    p = torch.softmax(bounded(states.detach()), dim=-1)
    total, tokens = 0.0, []
    for logits, factor, share in (
        (base + low_rank @ expansion.T, factors[0], 1 - lam),
        (base, factors[1], lam),
    ):
        nll = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none")
        nll = nll.reshape(ids.shape)
        tokens.append((nll.detach().numpy(), logits.argmax(dim=-1).numpy()))
        kl = F.kl_div(torch.log_softmax(logits, dim=-1), p, reduction="none").sum(dim=-1)
        values = (1 - objective.kl_weight) * nll + objective.kl_weight * kl
        total = total + share * (values * weights * torch.tensor(np.asarray(factor))).sum()
    (2.0 * total).backward()
    return float(total.detach()), [x.grad for x in (hidden, low_rank, expansion)], tokens


def bounded(logits: jax.Array) -> jax.Array:
    return 4.0 * jnp.tanh(logits / 4.0)


def confidence(token: Any, labels: Labels) -> jax.Array:
    """A weight over whole blocks from the draft's own predictions, with no gradient of its own."""
    return 0.5 + jnp.cumprod(
        jnp.where(labels.mask > 0, jnp.exp(-jax.lax.stop_gradient(token.nll)), 1.0), axis=-1
    )


OBJECTIVES = {
    "cross-entropy": CROSS_ENTROPY,
    "divergence": Objective(kl_weight=0.4),
    "softly bounded": Objective(output_logits=bounded),
    "all at once": Objective(factor=confidence, kl_weight=0.4, output_logits=bounded),
}


@pytest.mark.parametrize(
    ("name", "lambda_base"),
    [*((name, 0.3) for name in OBJECTIVES), ("all at once", 0.0), ("all at once", 1.0)],
)
def test_definition_equals_torch_autograd(name: str, lambda_base: float) -> None:
    inputs, labels = random_inputs()
    objective = OBJECTIVES[name]
    found, loss = gradient(
        inputs, labels, implementation=dual_loss, objective=objective, lambda_base=lambda_base
    )
    ones = np.ones_like(labels.weights)
    factors = [
        ones if objective.factor is None else objective.factor(of, labels)
        for of in (loss.final, loss.base)
    ]
    expected, expected_gradient, tokens = torch_loss(
        inputs, labels, objective, factors, lambda_base
    )
    for token, (nll, prediction) in zip((loss.final, loss.base), tokens, strict=True):
        chex.assert_type([token.nll, token.prediction], [jnp.float32, jnp.int32])
        np.testing.assert_allclose(token.nll, nll, rtol=1e-5)
        np.testing.assert_array_equal(token.prediction, prediction)
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
    np.testing.assert_allclose(
        loss.total, (1 - lambda_base) * loss.final_sum + lambda_base * loss.base_sum, rtol=1e-6
    )
    for name, exact in zip(("hidden", "low_rank", "expansion"), expected_gradient, strict=True):
        exact = np.zeros_like(getattr(found, name)) if exact is None else exact.numpy()
        np.testing.assert_allclose(getattr(found, name), exact, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not np.any(found.lm_head) and not np.any(found.target_states)  # frozen


def focal(token: Any, labels: Labels) -> jax.Array:
    """A factor with a gradient of its own."""
    return (1.0 - jnp.exp(-token.nll)) ** 2.0


def dpace(token: Any, labels: Labels) -> jax.Array:
    return dpace_weights(token, labels, DpaceOptions(0.3))


def random_objective(rng: np.random.Generator) -> Objective:
    return Objective(
        factor=[None, focal, dpace, confidence][rng.integers(4)],
        kl_weight=[0.0, 0.4, 1.0][rng.integers(3)],
        output_logits=bounded if rng.random() < 0.3 else lambda logits: logits,
    )


@pytest.mark.parametrize("transposed", [True, False], ids=["cpu", "others"])
@pytest.mark.parametrize("seed", CASES)
def test_the_form_in_chunks_equals_the_definition(
    seed: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objectives, divergences, fractional masks, unused slots, pieces of any size, head or none."""
    in_pieces = kernel._in_chunks
    # What the other platforms run is tried here too: every branch is traced, and this one is taken.
    monkeypatch.setattr(
        kernel,
        "_in_chunks",
        lambda implementation, *a: in_pieces(replace(implementation, transposed=transposed), *a),
    )
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 9)), int(rng.integers(1, 6)))
    inputs, labels = random_inputs(seed, shape)
    share = (
        rng.choice([0.25, 1.0], shape)
        * (np.arange(shape[1]) < rng.integers(0, shape[1] + 1))[:, None]
    )
    labels = labels._replace(
        mask=np.float32(labels.mask * share), weights=np.float32(labels.weights * share)
    )
    options: dict[str, Any] = {
        "objective": random_objective(rng),
        "lambda_base": float(rng.random()),
    }
    chunk = int(rng.integers(0, shape[1] + 2))
    found_gradient, found = gradient(inputs, labels, **options, chunk_blocks=chunk)
    exact_gradient, exact = gradient(inputs, labels, implementation=dual_loss, **options)
    chex.assert_trees_all_close(found[:3], exact[:3], rtol=VALUE, atol=VALUE)
    seen = labels.mask > 0
    for ours, theirs in ((found.final, exact.final), (found.base, exact.base)):
        np.testing.assert_allclose(ours.nll[seen], theirs.nll[seen], rtol=VALUE, atol=VALUE)
        np.testing.assert_array_equal(ours.prediction[seen], theirs.prediction[seen])
    for name in Inputs._fields:
        ours, theirs = getattr(found_gradient, name), getattr(exact_gradient, name)
        assert np.linalg.norm(ours - theirs) <= GRADIENT * np.linalg.norm(theirs) + 1e-7, name


def test_vocabulary_loss_without_a_head_gives_the_base_twice() -> None:
    inputs, labels = random_inputs()

    def total(hidden: jax.Array) -> tuple[jax.Array, VocabularyLoss]:
        loss = vocabulary_loss(States(hidden), Tables(inputs.lm_head), labels)
        return loss.total, loss

    slope, loss = jax.grad(total, has_aux=True)(inputs.hidden)
    chex.assert_trees_all_equal(loss.final, loss.base)
    with_head, expected = gradient(inputs, labels, lambda_base=1.0, scale=1.0)
    chex.assert_trees_all_close(loss.base, expected.base, rtol=1e-6)
    chex.assert_trees_all_close(slope, with_head.hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "chunk_blocks"),
    [("cross-entropy", 3), ("cross-entropy", 50), ("all at once", 3)],  # 3 leaves one of one block
)
def test_vocabulary_loss_in_chunks_equals_one_piece_in_values_and_gradients(
    objective: str, chunk_blocks: int
) -> None:
    inputs, labels = random_inputs()
    options: dict[str, Any] = {"objective": OBJECTIVES[objective]}
    whole_gradient, whole = gradient(inputs, labels, **options)
    options["chunk_blocks"] = chunk_blocks
    pieces_gradient, pieces = gradient(inputs, labels, **options)
    chex.assert_shape(pieces.final.nll, (BATCH, BLOCKS, SIZE))
    chex.assert_trees_all_close(pieces, whole, rtol=1e-5)
    if objective == "cross-entropy":
        chex.assert_trees_all_close(
            (pieces.final, pieces.base), (whole.final, whole.base), rtol=1e-6
        )
    chex.assert_trees_all_close(pieces_gradient, whole_gradient, rtol=1e-5, atol=1e-5)
    without_gradient = jax.jit(lambda inputs: run(inputs, labels, **options))(inputs)
    chex.assert_trees_all_close(without_gradient, whole, rtol=1e-5)
    for name in ("hidden", "low_rank", "expansion"):
        assert np.linalg.norm(getattr(whole_gradient, name)) > 1


def test_pieces_after_the_last_supervised_prediction_are_left_out() -> None:
    inputs, labels = random_inputs()
    mask = labels.mask * (np.arange(BLOCKS) < 3)[:, None].astype(np.float32)
    labels = labels._replace(mask=mask, weights=labels.weights * mask)
    expected_gradient, expected = gradient(inputs, labels)
    hidden = np.where(np.arange(BLOCKS)[:, None, None] < 3, inputs.hidden, np.nan)
    found_gradient, found = gradient(inputs._replace(hidden=hidden), labels, chunk_blocks=3)
    chex.assert_trees_all_close(found[:3], expected[:3], rtol=1e-5)
    chex.assert_trees_all_close(found_gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert not np.any(found_gradient.hidden[:, 3:])


@pytest.mark.pitfall(
    "whole logits twice", seen="kernels/chunked_cross_entropy.py: chunk_blocks ignored"
)
def test_vocabulary_loss_in_chunks_holds_the_logits_of_one_chunk() -> None:
    blocks, size, vocabulary, width = 32, 4, 4000, 8

    def temporary_bytes(blocks: int, chunk_blocks: int) -> int:
        def total(
            hidden: jax.Array, low_rank: jax.Array, head: jax.Array, expansion: jax.Array
        ) -> jax.Array:
            ids, ones = jnp.zeros(hidden.shape[:-1], jnp.int32), jnp.ones(hidden.shape[:-1])
            states, tables = States(hidden, low_rank), Tables(head, expansion)
            return vocabulary_loss(
                states, tables, Labels(ids, ones, ones), chunk_blocks=chunk_blocks
            ).total

        states, table = jnp.zeros((1, blocks, size, width)), jnp.zeros((vocabulary, width))
        slopes = jax.jit(jax.grad(total, argnums=(0, 1, 3)))
        compiled = slopes.lower(states, states, table, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = blocks * size * vocabulary * 4
    assert temporary_bytes(blocks, 0) >= logits
    assert temporary_bytes(blocks, 2) < logits / 2
    # Four times the blocks: only states grow, 64 bytes a prediction, not logits of 16,000.
    assert temporary_bytes(4 * blocks, 2) - temporary_bytes(blocks, 2) < logits / 20


@pytest.mark.pitfall(
    "bfloat16 masters and softmax",
    seen="kernels/matmul.py: logits in bfloat16, then cast to float32",
)
def test_vocabulary_loss_of_bfloat16_states_has_float32_logits() -> None:
    inputs, labels = random_inputs()
    halves = Inputs(*(jnp.asarray(x, jnp.bfloat16) for x in inputs))
    rounded = Inputs(*(np.asarray(x, np.float32) for x in halves))
    states = rounded._replace(
        hidden=halves.hidden, low_rank=halves.low_rank, target_states=halves.target_states
    )
    found, exact = run(states, labels), run(rounded, labels)
    for half, whole in ((found.final, exact.final), (found.base, exact.base)):
        chex.assert_type(half.nll, jnp.float32)
        # Products of bfloat16 numbers are exact in float32: rounded logits would show as 1e-3.
        np.testing.assert_allclose(half.nll, whole.nll, rtol=1e-5)
    slope, _ = gradient(states, labels)
    exact_slope, _ = gradient(rounded, labels)
    chex.assert_type(
        [slope.hidden, slope.low_rank, slope.expansion], [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    )
    for name in ("hidden", "low_rank", "expansion"):
        ours, theirs = np.asarray(getattr(slope, name), np.float32), getattr(exact_slope, name)
        assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs), name


def test_an_objective_that_reads_logits_is_not_the_kernels() -> None:
    inputs, labels = random_inputs()
    smoothed = Objective(
        cost=lambda logits, labels, _: -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    )
    with pytest.raises(ValueError, match=r"runs on objective\.loss\.dual_loss"):
        run(inputs, labels, objective=smoothed)
    loss = run(inputs, labels, implementation=dual_loss, objective=smoothed, lambda_base=1.0)
    logits = inputs.hidden @ inputs.lm_head.T
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        loss.total, -(log_probs.mean(axis=-1) * labels.weights).sum(), rtol=1e-5
    )
