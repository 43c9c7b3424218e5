"""Acceptance rules: what a target keeps of a draft, which makes speculative decoding exact.

drafted        d1   d2   d3         proposed behind the bonus token
the target's   t1   t2   t3   t4    one token, or distribution, after each prefix
kept           the longest prefix that the target stands for, then one token of its own
"""

import jax
import jax.numpy as jnp


def accept_greedy(drafted: jax.Array, choices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The longest prefix of the draft that the target itself would have written.

    Args:
        drafted: int32 [B, P].
        choices: int32 [B, P + 1], the target's token after each prefix of the draft.
    Returns:
        Accepted tokens int32 [B] and the target's token after them, int32 [B].
    """
    accepted = jnp.sum(jnp.cumprod((drafted == choices[:, :-1]).astype(jnp.int32), axis=1), axis=1)
    return accepted, jnp.take_along_axis(choices, accepted[:, None], axis=1)[:, 0]


def accept_sampled(
    key: jax.Array, drafted: jax.Array, draft_probs: jax.Array, target_probs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Speculative sampling: accepted tokens and the next follow the target's distribution exactly.

    Args:
        drafted: int32 [B, P], drawn from `draft_probs`.
        draft_probs: float32 [B, P, V].
        target_probs: float32 [B, P + 1, V], the target's after each prefix of the draft.
    Returns:
        Accepted tokens int32 [B] and the token after them, int32 [B]: token i is kept with
        probability min(1, p / q); the first refused is redrawn from the positive part of p - q.
    Source: Leviathan et al. (arXiv:2211.17192), algorithm 1.
    """
    accept_key, next_key = jax.random.split(key)
    p = jnp.take_along_axis(target_probs[:, :-1], drafted[..., None], axis=-1)[..., 0]
    q = jnp.take_along_axis(draft_probs, drafted[..., None], axis=-1)[..., 0]
    kept = jax.random.uniform(accept_key, drafted.shape) * q < p  # no division: q may be 0
    accepted = jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=1), axis=1)
    # After the whole draft nothing was refused: q is zero there, and the draw is from p itself.
    refused = jnp.pad(draft_probs, ((0, 0), (0, 1), (0, 0)))
    rest = jnp.maximum(target_probs - refused, 0.0)
    rest = jnp.take_along_axis(rest, accepted[:, None, None], axis=1)[:, 0]
    target = jnp.take_along_axis(target_probs, accepted[:, None, None], axis=1)[:, 0]
    # p == q up to rounding leaves nothing to draw from; then p is the right distribution.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, target)
    following = jax.random.categorical(next_key, jnp.log(rest), axis=-1)
    return accepted, following.astype(jnp.int32)
