"""Which tokens may be drawn: top-k and top-p by their definition, and as transformers has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import TARGET, drawn_from

from domino_jax.decoding.decoder import make_decoder
from domino_jax.decoding.filters import filtered
from domino_jax.target.decoder import Target

FILTERS = ((1, None), (7, None), (10**30, None), (None, 0.3), (None, 0.95), (None, 1.0), (20, 0.8))


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filtered_keeps_what_its_definition_and_transformers_keep(
    top_k: int | None, top_p: float | None
) -> None:
    import torch
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(scale=3, size=(10, 300)).astype(np.float32)
    found = filtered(jnp.asarray(logits), top_k=top_k, top_p=top_p)
    for row, of_row in zip(logits, jax.nn.softmax(found, axis=-1), strict=True):
        whole = np.exp(row.astype(np.float64))
        expected = drawn_from(whole / whole.sum(), top_k=top_k, top_p=top_p)
        assert np.array_equal(of_row > 0, expected > 0)
        np.testing.assert_allclose(of_row, expected, rtol=1e-5)

    theirs = torch.from_numpy(logits)
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p is not None:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    np.testing.assert_array_equal(found, theirs.numpy())


def test_top_p_keeps_no_token_beyond_a_probability_of_exactly_p() -> None:
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    kept = jnp.isfinite(filtered(logits, top_k=None, top_p=0.5))
    assert kept.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, None, [1]),
        (2, None, [1, 2, 3]),  # 2 and 3 tie
        (4, None, [0, 1, 2, 3]),
        (None, 1e-30, [1]),  # the likeliest stays, however small p is
        (None, 0.35, [1]),
        (None, 0.45, [1, 2, 3]),
        (None, 0.85, [0, 1, 2, 3]),
        (None, 0.6, [1, 2, 3]),
        (2, 0.6, [1]),  # p counts what top-k has left: 0.4 / 0.6
    ],
)
def test_ties_stay_together_and_top_p_follows_top_k(
    top_k: int | None, top_p: float | None, kept: list[int]
) -> None:
    logits = jnp.log(jnp.array([0.15, 0.4, 0.2, 0.2, 0.05]))
    found = filtered(logits, top_k=top_k, top_p=top_p)
    assert np.flatnonzero(found > -jnp.inf).tolist() == kept
    np.testing.assert_array_equal(found[jnp.array(kept)], logits[jnp.array(kept)])


def test_only_top_p_alone_sorts_a_vocabulary() -> None:
    logits = jnp.zeros((2, 50))

    def program(top_k: int | None, top_p: float | None) -> str:
        return str(jax.make_jaxpr(lambda x: filtered(x, top_k=top_k, top_p=top_p))(logits))

    assert "let  in" in program(None, None)  # no operation at all
    assert "top_k" in program(5, 0.9) and "sort[" not in program(5, 0.9)
    assert "sort[" in program(None, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, "they need a temperature"),
        ({"top_p": 0.9}, "they need a temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, found 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, found 1.5"),
    ],
)
def test_make_decoder_refuses_filters_that_filter_nothing(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder(Target(TARGET), **options)
