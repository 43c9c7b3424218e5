"""The Domino head: a GRU over a block's previous tokens and a low-rank correction of the logits.

A head is small: at inference it runs once a token, where the backbone runs once a block.

    prediction m             0        1        2      of token a + 1 + m, a the anchor's place
    previous token           a      a + 1    a + 2    the row's own in training, drafted in decoding
    GRU               0 ->  g_0  ->  g_1  ->  g_2     after reading the previous token's embedding
    low rank                r_0      r_1      r_2     silu(W1 [h_m ; g_m]), h_m of the backbone
    correction            W2 r_0   W2 r_1   W2 r_2    added to the base logits by the caller
"""

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DraftConfig
from domino_jax.kernels.matmul import linear
from domino_jax.layers.dense import Dense
from domino_jax.sharding import constrain, logical_axes


class Head(Protocol):
    """What a draft asks of its head, a Linen module of the draft's config and the head's own.

    A correction is of low rank: the head makes its factor [..., R] of each prediction, and the
    caller multiplies it with `expansion`, fused with the loss or with the choice of a token.

    Attributes:
        expansion: [V, R], float32, the vocabulary's side of the correction.
    """

    expansion: jax.Array

    def __call__(self, hidden: jax.Array, previous: jax.Array) -> jax.Array:
        """The factors of teacher-forced predictions, [..., M, D] twice -> [..., M, R].

        `hidden` are backbone states of the predictions, `previous` embeddings of the tokens just
        before them. `DraftModel.corrections` and decoding leave the first `pure_draft_prefix_len`
        uncorrected.
        """

    def initial_state(self, count: int) -> Any:
        """What the head remembers of `count` blocks before their first token.

        Any tree of float32 arrays. Its shapes may change from step to step, since the loop over a
        block is unrolled; no position is given, a head that needs one counts its steps.
        """

    def step(self, state: Any, previous: jax.Array) -> Any:
        """What it remembers after one more token, given its embedding [count, D]."""

    def correction(self, hidden: jax.Array, state: Any) -> jax.Array:
        """The factor of one prediction, [count, D] and the state before it -> [count, R]."""


class PrefixGRU(nn.Module):
    """A bias-free GRU with PyTorch's equations and gate order (r, z, n).

    `r = s(Wir x + Whr h)`, `z = s(Wiz x + Whz h)`, `n = tanh(Win x + r * (Whn h))`,
    `h' = (1 - z) * n + z * h`.
    Products run in `dtype`; gates and state are float32.
    Source: `torch.nn.GRU(bias=False)`; flax's own GRU cell always has biases.
    """

    input_dim: int
    hidden_dim: int
    dtype: str = "float32"

    def setup(self) -> None:
        """Creates both weights, `[3 G, D]` and `[3 G, G]`, drawn like PyTorch's."""
        bound = self.hidden_dim**-0.5

        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        gates = 3 * self.hidden_dim
        inputs = logical_axes(init, "gru", "embed")
        recurrent = logical_axes(init, "gru", "gru")
        self.weight_ih_l0 = self.param("weight_ih_l0", inputs, (gates, self.input_dim), jnp.float32)
        self.weight_hh_l0 = self.param(
            "weight_hh_l0", recurrent, (gates, self.hidden_dim), jnp.float32
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., M, D] -> [..., M, G]
        """States after each input, float32, starting from zero."""
        blocks = constrain(x.reshape(-1, *x.shape[-2:]), "batch", None, None)
        # The inputs are known: all steps in one product, outside the scan.
        gates = self.input_gates(blocks).swapaxes(0, 1)
        gates = constrain(gates, None, "batch", None)
        start = jnp.zeros((blocks.shape[0], self.hidden_dim), jnp.float32)
        scan = nn.scan(
            PrefixGRU.next_state, variable_broadcast="params", split_rngs={"params": False}
        )
        _, states = scan(self, start, gates)
        return states.swapaxes(0, 1).reshape(*x.shape[:-1], self.hidden_dim)

    def input_gates(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., 3 G]
        """The inputs' share of the gates, float32."""
        weight = self.weight_ih_l0.astype(self.dtype)
        return linear(x.astype(self.dtype), weight, dtype=jnp.float32)

    def next_state(self, state: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step, [count, G] and [count, 3 G] -> the next state twice.

        A scan takes it as its carry and as its output.
        """
        # Rounded for the product alone: in a bfloat16 carry the errors of all steps would add up.
        weight = self.weight_hh_l0.astype(self.dtype)
        recurrent = linear(state.astype(self.dtype), weight, dtype=jnp.float32)
        state = _gated(gates, recurrent, state)
        return state, state


@jax.checkpoint
def _gated(gates: jax.Array, recurrent: jax.Array, state: jax.Array) -> jax.Array:
    """The next state; the backward pass recomputes the gates, cheaper than keeping all of them."""
    reset_in, update_in, new_in = jnp.split(gates, 3, axis=-1)
    reset_state, update_state, new_state = jnp.split(recurrent, 3, axis=-1)
    reset = nn.sigmoid(reset_in + reset_state)
    update = nn.sigmoid(update_in + update_state)
    new = jnp.tanh(new_in + reset * new_state)
    return (1.0 - update) * new + update * state


class DominoHead(nn.Module):
    """`W2 silu(W1 [h ; g])`: `h` of the backbone, `g` the GRU's state after the previous tokens.

    The last product, [V, R], is left to the caller, who fuses it with the loss (`expansion`).
    """

    cfg: DraftConfig
    widths: DominoHeadConfig

    def setup(self) -> None:
        """Creates the GRU, W1 `[R, D + G]` and W2 `[V, R]`."""
        cfg, widths = self.cfg, self.widths
        self.prefix_gru = PrefixGRU(cfg.hidden_size, widths.gru_hidden_dim, cfg.dtype)
        self.embed_proj_0 = Dense(widths.emb_dim, ("low_rank", "features"), cfg.dtype)
        # A plain array, since its product is the caller's. Its name is that of checkpoints, which
        # number W1, its activation and W2 as 0, 1 and 2.
        self.expansion = self.param(
            "embed_proj_2",
            logical_axes(nn.initializers.normal(stddev=0.02), "vocab", "low_rank"),
            (cfg.vocab_size, widths.emb_dim),
            jnp.float32,
        )

    def __call__(self, hidden: jax.Array, previous: jax.Array) -> jax.Array:
        """As `Head.__call__`: [..., M, D] twice -> [..., M, R]."""
        return self.correction(hidden, self.prefix_gru(previous))

    def initial_state(self, count: int) -> jax.Array:
        """The GRU's state before a block's first token, zeros [count, G]."""
        return jnp.zeros((count, self.widths.gru_hidden_dim), jnp.float32)

    def correction(self, hidden: jax.Array, state: jax.Array) -> jax.Array:
        """`silu(W1 [h ; g])`, [..., D] and [..., G] -> [..., R] in the compute dtype."""
        both = jnp.concatenate([hidden, state.astype(hidden.dtype)], axis=-1)
        return nn.silu(self.embed_proj_0(both))

    def step(self, state: jax.Array, previous: jax.Array) -> jax.Array:
        """The GRU state after one more token, [count, G] and [count, D] -> [count, G]."""
        gates = self.prefix_gru.input_gates(previous)
        state, _ = self.prefix_gru.next_state(state, gates)
        return state


# What computes each kind of head, and the names of its tensors in a checkpoint by path in its tree.
HEAD_MODULES: dict[type, type[nn.Module]] = {DominoHeadConfig: DominoHead}
HEAD_TENSORS: dict[type, dict[tuple[str, ...], str]] = {
    DominoHeadConfig: {
        ("prefix_gru", "weight_ih_l0"): "prefix_gru.weight_ih_l0",
        ("prefix_gru", "weight_hh_l0"): "prefix_gru.weight_hh_l0",
        ("embed_proj_0", "weight"): "embed_proj.0.weight",
        ("embed_proj_2",): "embed_proj.2.weight",
    }
}
