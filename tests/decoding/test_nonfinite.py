"""Logits that are not finite end an answer, and the error names the model that they are of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import PROMPTS, TARGET, answers, draft_config, models

from domino_jax.base.errors import InputError
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import generate, stream_answer
from domino_jax.decoding.speculate import (
    Drafts,
    Verified,
    are_finite,
    commit,
    required_cache_len,
    start,
)
from domino_jax.target.decoder import Target

NAN, INF = np.nan, np.inf
GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 0.9}
FILTERED: dict[str, Any] = {"temperature": 0.9, "top_k": 2, "top_p": 0.5}
WAYS = pytest.mark.parametrize("how", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "drawn", "top"])


def spoilt(params: Any, number: float) -> Any:
    """Parameters that are all one number."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, number), params)


def with_one_bad_token(params: Any, number: float, *, name: str, token: int) -> Any:
    """Parameters with a bad row of an embedding or of a head, [V, D]."""
    return {**params, name: params[name].at[token].set(number)}


@WAYS
@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("drafted", [False, True])
def test_a_target_without_finite_logits_writes_nothing(
    target_params: Any, how: dict[str, Any], number: float, drafted: bool
) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft if drafted else None, **how)
    bad = Weights(spoilt(target_params, number), weights.draft)
    message = "^the target's logits are not finite in 2 of 2 answers, .*; use another copy of its"
    with pytest.raises(InputError, match=message):
        generate(decoder, bad, PROMPTS[:2], max_new_tokens=8, size=3)


@WAYS
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_one_bad_logit_of_all_is_enough(
    target_params: Any, how: dict[str, Any], number: float
) -> None:
    bad = with_one_bad_token(target_params, number, name="lm_head", token=5)
    decoder = make_decoder(Target(TARGET), **how)
    with pytest.raises(InputError, match="the target's logits are not finite in 2 of 2 answers"):
        generate(decoder, Weights(bad), PROMPTS[:2], max_new_tokens=8)


@WAYS
@pytest.mark.parametrize("use_head", [False, True])
def test_a_draft_without_finite_logits_drafts_nothing(
    target_params: Any, how: dict[str, Any], use_head: bool
) -> None:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, use_head=use_head, **how)
    bad = weights._replace(draft=spoilt(weights.draft, NAN))
    message = r"^the draft's logits are not finite in 2 of 2 answers, .* checkpoint .*\(--step\)"
    with pytest.raises(InputError, match=message):
        generate(decoder, bad, PROMPTS[:2], max_new_tokens=8)


def test_other_answers_of_the_batch_are_what_they_were(target_params: Any) -> None:
    """Only what reads the bad token ends, where it reads it."""
    decoder = make_decoder(Target(TARGET))
    whole = answers(decoder, Weights(target_params), PROMPTS, 20)
    written = [
        tokens[len(prompt) : length].tolist()
        for prompt, tokens, length in zip(
            PROMPTS, np.asarray(whole.tokens), np.asarray(whole.lengths), strict=True
        )
    ]
    # In some of the texts, and in none of the prompts.
    read = [{*prompt.tolist(), *row[:-1]} for prompt, row in zip(PROMPTS, written, strict=True)]
    (token, *_) = (
        token
        for token in range(TARGET.vocab_size)
        if 0 < sum(token in one for one in read) < len(read)
        and not any(token in prompt for prompt in PROMPTS)
    )
    bad = with_one_bad_token(target_params, NAN, name="embed_tokens", token=token)
    state = answers(decoder, Weights(bad), PROMPTS, 20)
    assert state.finished.all() and state.draft_finite.all()
    assert state.target_finite.tolist() == [token not in one for one in read]
    for index, (prompt, row) in enumerate(zip(PROMPTS, written, strict=True)):
        # The token itself is well chosen; the one behind it follows from NaN.
        kept = row[: row.index(token) + 1] if token in read[index] else row
        length = int(state.lengths[index]) - len(prompt)
        assert length == len(kept) + (token in read[index])
        assert state.tokens[index, len(prompt) : len(prompt) + len(kept)].tolist() == kept


def test_nothing_that_follows_from_nan_is_shown(target_params: Any) -> None:
    decoder = make_decoder(Target(TARGET))
    (whole,) = generate(decoder, Weights(target_params), PROMPTS[:1], max_new_tokens=20)
    expected = whole.tokens.tolist()
    # The first of them that comes late, and is not what prompts are filled up with.
    token = next(
        one for one in expected if expected.index(one) > 2 and one not in (0, *PROMPTS[0].tolist())
    )
    bad = with_one_bad_token(target_params, NAN, name="embed_tokens", token=token)
    shown: list[list[int]] = []
    with pytest.raises(InputError, match="the target's logits are not finite in 1 of 1 answers"):
        stream_answer(
            decoder,
            Weights(bad),
            PROMPTS[0],
            max_new_tokens=20,
            show=lambda ids, _: shown.append(ids.tolist()),
        )
    assert shown and all(one == expected[: len(one)] for one in shown)


V = TARGET.vocab_size
# Of a block of 3 drafts: which target's and draft's logits are bad, whether the target's own tokens
# keep two drafts and then refuse, and the models that the answer must blame.
CASES: dict[str, tuple[list[int], list[int], dict[str, Any], str]] = {
    "finite": ([], [], {}, ""),
    "target: at a kept draft": ([1], [], {}, "target"),
    "target: at its own token": ([2], [], {}, "target"),
    "target: behind its own token": ([3], [], {}, ""),
    "draft: kept": ([], [0], {}, "draft"),
    "draft: refused": ([], [2], {}, "draft"),
    "both": ([0], [0], {}, "target draft"),
    "draft: behind a stop": ([], [2], {"stop": 1}, ""),
    "target: behind a stop": ([2], [], {"stop": 1}, ""),
    "target: behind the limit": ([1], [1], {"room": 1}, ""),
    "finished": ([0, 1, 2, 3], [0, 1, 2], {"finished": True}, ""),
}


@pytest.mark.parametrize(("target_bad", "draft_bad", "given", "blamed"), CASES.values(), ids=CASES)
@WAYS
def test_what_is_not_used_is_not_asked(
    target_params: Any,
    how: dict[str, Any],
    target_bad: list[int],
    draft_bad: list[int],
    given: dict[str, Any],
    blamed: str,
) -> None:
    """Two of three drafts are kept, and the third token is the target's own."""
    draft, weights = models(target_params, draft_config())
    drafted, own = [1, 2, 3], [1, 2, 4, 5]
    # A stop behind the first draft cuts the answer there.
    stop_ids = (drafted[given["stop"]],) if "stop" in given else ()
    decoder = make_decoder(Target(TARGET), draft, proposals="serving", stop_ids=stop_ids, **how)
    cache_len = required_cache_len(decoder, 3, 20)
    state = start(decoder, weights, PROMPTS[:1], max_new_tokens=20, cache_len=cache_len)
    state = state._replace(
        finished=jnp.array([given.get("finished", False)]),
        limits=state.lengths + given.get("room", 10),
    )
    bonus = state.tokens[:, state.lengths[0] - 1]
    sure = 1e3 * jax.nn.one_hot(jnp.array([own]), V)  # so sure that draws are greedy
    logits = sure.at[0, jnp.array(target_bad, jnp.int32), -1].set(NAN)
    finite = jnp.ones((1, 3), bool).at[0, jnp.array(draft_bad, jnp.int32)].set(False)
    block = jnp.concatenate([bonus[:, None], jnp.array([drafted])], axis=1)
    drafts = Drafts(block, finite, jax.nn.one_hot(jnp.array([drafted]), V))
    features = jnp.zeros((1, 4, 2 * TARGET.hidden_size))
    verified = Verified(logits, features, state.target_cache)
    after = commit(decoder, weights, state, drafts, verified, jax.random.key(0))
    found = [("target", after.target_finite), ("draft", after.draft_finite)]
    assert " ".join(model for model, are in found if not bool(are[0])) == blamed
    if not blamed and not target_bad and not draft_bad:
        assert (after.lengths - state.lengths).tolist() == [3] and not after.finished[0]
    if blamed:
        assert after.finished[0]


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_one_bad_number_of_a_whole_vocabulary_is_found(number: float) -> None:
    """XLA's maximum of as many on a CPU is the largest of the others."""
    logits = np.random.default_rng(0).normal(size=(3, 49152)).astype(np.float32)
    logits[1, 16384] = number
    assert jax.jit(are_finite)(logits).tolist() == [True, False, True]
