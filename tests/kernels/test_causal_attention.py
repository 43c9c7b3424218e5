"""Attention of the target against plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from random_cases import CASES, VALUE
from seeded import bits, normal

from domino_jax.kernels import causal_attention as kernel
from domino_jax.kernels.causal_attention import causal_attention, definition


def slow_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(q.shape)
    shared = q.shape[1] // k.shape[1]
    for b, h, t in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = np.array([q[b, h, t] @ k[b, h // shared, s] for s in seen], np.float64) / np.sqrt(
            q.shape[-1]
        )
        weights = np.exp(scores - scores.max())
        out[b, h, t] = (weights / weights.sum()) @ v[b, h // shared, seen]
    return out


def attention_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    mask = np.random.default_rng(3).random((2, 3, 5)) < 0.5
    mask[..., 2] = True
    mask[0, 1] = np.arange(5) == 4  # a row with one key
    return normal(2, 6, 3, 4), normal(2, 2, 5, 4, seed=1), normal(2, 2, 5, 4, seed=2), mask


def test_definition_equals_loops() -> None:
    q, k, v, mask = attention_inputs()
    ours = definition(*map(jnp.asarray, (q, k, v)), mask=jnp.asarray(mask))
    np.testing.assert_allclose(ours, slow_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[0, :, 1], np.repeat(v[0, :, 4], 3, axis=0), rtol=1e-5)


def test_definition_of_bfloat16_has_float32_scores_and_softmax() -> None:
    q, k, v, mask = attention_inputs()
    # Large scores that differ little: rounded to bfloat16, near 64, they would be steps of a half.
    q, k, v = (jnp.asarray(x).astype(jnp.bfloat16) for x in (1 + 0.1 * q, 32 + k, v))
    ours = definition(q, k, v, mask=mask)
    assert ours.dtype == jnp.bfloat16
    # What is left is the rounding of the weights and of the sum, 2**-9 each.
    np.testing.assert_allclose(
        bits(ours), slow_attention(bits(q), bits(k), bits(v), mask), rtol=2**-7, atol=2**-7
    )


def test_causal_attention_sees_its_document_up_to_itself() -> None:
    q, k, v = normal(2, 6, 5, 4), normal(2, 2, 5, 4, seed=1), normal(2, 2, 5, 4, seed=2)
    documents = np.array([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])
    whole = np.tri(5, dtype=bool)[None].repeat(2, axis=0)
    own = whole & (documents[:, :, None] == documents[:, None, :])
    for found, mask in (
        (causal_attention(q, k, v), whole),
        (causal_attention(q, k, v, documents=jnp.asarray(documents)), own),
    ):
        np.testing.assert_allclose(found, slow_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["query tiles", "tpu"])
@pytest.mark.parametrize("seed", CASES)
def test_forms_of_accelerators_equal_the_definition(seed: int, implementation: str) -> None:
    rng = np.random.default_rng(seed)
    batch, kv_heads, groups, length = (int(rng.integers(1, top)) for top in (4, 3, 9, 300))
    shape = (batch, kv_heads, length, int(rng.choice([8, 64, 128])))
    q = jnp.asarray(normal(batch, kv_heads * groups, *shape[2:], seed=seed))
    k, v = (jnp.asarray(normal(*shape, seed=seed + place)) for place in (1, 2))
    documents = None
    if rng.random() < 0.5:
        ends = np.sort(rng.integers(0, length + 1, (batch, 3)), axis=1)
        documents = jnp.asarray(
            np.sum(np.arange(length)[:, None] >= ends[:, None], axis=-1), jnp.int32
        )
    expected = kernel.by_query_tiles(q, k, v, documents, tile=length)
    if implementation == "tpu":
        found = kernel.on_tpu(q, k, v, documents, interpret=True)
    else:
        found = kernel.by_query_tiles(q, k, v, documents, tile=int(rng.integers(1, 200)))
    np.testing.assert_allclose(found, expected, rtol=VALUE, atol=VALUE * np.abs(expected).max())


def test_cudnn_is_chosen_where_it_fits_and_refuses_packed_rows() -> None:
    fits = {"dtype": "bfloat16", "head_dim": 128, "packed": False}
    assert kernel.implementation_for("gpu", **fits) == "cudnn"
    for other in ({"dtype": "float32"}, {"head_dim": 256}, {"packed": True}):
        assert kernel.implementation_for("gpu", **(fits | other)) == "portable"
    assert (
        kernel.implementation_for("tpu", **fits)
        == kernel.implementation_for("cpu", **fits)
        == "portable"
    )
    q = jnp.zeros((1, 1, 4, 8))
    with pytest.raises(ValueError, match="packed rows need the portable form"):
        causal_attention(q, q, q, documents=jnp.zeros((1, 4), jnp.int32), implementation="cudnn")
    with pytest.raises(ValueError, match="form must be portable or cudnn"):
        causal_attention(q, q, q, implementation="flash")
