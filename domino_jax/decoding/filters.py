"""Top-k and top-p: both keep what is at least as likely as a least token. Here k = 4, p = 0.8:

probabilities   .45  .25  .15  .10  .05      the likeliest first
top-k           [----------------]           its 4 likeliest; now they are .47 .26 .16 .11
then top-p      [-----------]                .47 + .26 < 0.8 <= .47 + .26 + .16
"""

import jax
import jax.numpy as jnp


def filtered(logits: jax.Array, *, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits of what may be drawn; a softmax of them is the filtered distribution.

    Args:
        logits: float32 [..., V], divided by the temperature.
        top_k: keeps this many of the likeliest tokens, at least 1; None keeps all.
        top_p: of those, keeps the fewest of the likeliest whose probability, after top-k, is at
            least this, above 0 and at most 1; None keeps all.
    Returns:
        float32 [..., V], -inf for every other token. The likeliest token always stays. Tokens that
        tie with the least likely one that stays, stay too: no order is made up among equals.
    Source: `TopKLogitsWarper` and `TopPLogitsWarper` of transformers, in the order that `generate`
        and vLLM's `apply_top_k_top_p` apply them. Among equals their top-p follows the sort.
    """
    if top_k is None and top_p is None:
        return logits
    if top_k is None:
        ascending = jnp.sort(logits, axis=-1)
    else:
        # Few of a vocabulary: with top-k nothing sorts the whole of it.
        likeliest, _ = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
        ascending = jnp.flip(likeliest, axis=-1)
    least = ascending[..., :1]
    if top_p is not None:
        # From the unlikeliest on: a sum of small numbers is exact where it decides.
        tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        cut = jnp.sum(tail <= 1 - top_p, axis=-1, keepdims=True)
        # Where p is lost in rounding all would be cut.
        position = jnp.minimum(cut, ascending.shape[-1] - 1)
        least = jnp.take_along_axis(ascending, position, axis=-1)
    return jnp.where(logits < least, -jnp.inf, logits)
