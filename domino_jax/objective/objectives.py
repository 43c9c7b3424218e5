"""The named objectives: what a prediction costs besides its position weight, and the divisor.

An entry owns its factor, its options with their defaults and bounds, its divisor, its default
decay, and how many real tokens a block shows. A new one needs no change elsewhere: it is a frozen
dataclass of options, a function, and a call:

    @dataclass(frozen=True)
    class FocalOptions:
        focus: float = 2.0

    def focal(token, labels, options):
        return (1.0 - jnp.exp(-token.nll)) ** options.focus

    register_objective("focal", factor=focal, options=FocalOptions)

`loss.loss_type: focal` with `loss.options: {focus: 1.0}` then trains with it, with its gradient, at
the kernel's speed.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.base.errors import from_dict, require
from domino_jax.draft.blocks import sample_prefix_lengths
from domino_jax.kernels.token_loss import Labels, TokenLoss


@dataclass(frozen=True)
class NoOptions:
    """Of an objective without parameters."""


@dataclass(frozen=True)
class NamedObjective:
    """One entry of the table, as `register_objective` describes it."""

    options: type
    factor: Callable[[TokenLoss, Labels, Any], jax.Array] | None
    cost: Callable[[jax.Array, Labels, jax.Array | None, Any], jax.Array] | None
    prefix_lengths: Callable[..., jax.Array] | None
    normalize: str
    loss_decay_gamma: float | None
    weighs_positions: bool


OBJECTIVES: dict[str, NamedObjective] = {}


def register_objective(
    name: str,
    *,
    factor: Callable[[TokenLoss, Labels, Any], jax.Array] | None = None,
    cost: Callable[[jax.Array, Labels, jax.Array | None, Any], jax.Array] | None = None,
    prefix_lengths: Callable[..., jax.Array] | None = None,
    options: type = NoOptions,
    normalize: str = "weights",
    loss_decay_gamma: float | None = 7.0,
    weighs_positions: bool = False,
) -> None:
    """Adds an objective, which `loss.loss_type` and the trainer modules then know by its name.

    Args:
        name: of the objective.
        factor: `(token_loss, labels, options)` -> float32 [B, n, M] over whole blocks, which
            multiplies the loss of each prediction. Differentiated with it: stop the gradient where
            it is a weight and not a loss. It sees a piece of the blocks, of one device's rows:
            nothing may be taken over B or n. None is 1.
        cost: `(logits, labels, target_logits, options)` -> float32 [B, N, M], in the place of the
            cross-entropy, for a factor beside it too. It reads whole logits [B, N, M, V], so it
            runs on the definition, in the memory that those take, and `loss.logits_mib` bounds
            nothing. `target_logits` are the target's own, or None where a script gives no states.
        prefix_lengths: `(key, shape, options, block_size=K)` -> int32 `shape`, how many positions
            of each block show their real token and are not supervised; None shows the anchor
            alone. Plain DFlash only.
        options: a frozen dataclass of the objective's parameters, plain values with defaults; it
            refuses bad ones by `InputError`.
        normalize: default divisor (`DIVISORS`): of weights before any factor or cost.
        loss_decay_gamma: default decay of the position weights, None for none.
        weighs_positions: whether the factor itself says what a position weighs; a decay is then
            refused.
    Both must be finite where nothing is supervised too: there they are multiplied by 0.

    Raises:
        ValueError: the name is taken, the divisor unknown, or `options` no frozen dataclass.
    """
    if name in OBJECTIVES:
        raise ValueError(f"objective {name!r} is already there")
    if normalize not in DIVISORS:
        raise ValueError(f"normalize must be one of {', '.join(DIVISORS)}, found {normalize!r}")
    made_with = getattr(options, "__dataclass_params__", None)
    if made_with is None or not made_with.frozen:
        raise ValueError(f"options must be a frozen dataclass, found {options!r}")
    OBJECTIVES[name] = NamedObjective(
        options, factor, cost, prefix_lengths, normalize, loss_decay_gamma, weighs_positions
    )


def objective_named(name: str) -> NamedObjective:
    """The entry of a name, or `InputError` with the names that exist."""
    require(
        name in OBJECTIVES,
        f"loss_type must be one of {', '.join(OBJECTIVES)}, found {name!r}; one of your own is "
        "known once its module is imported (docs/extend.md)",
    )
    return OBJECTIVES[name]


def reads_target(loss_type: str, *, kl_weight: float) -> bool:
    """Whether a loss reads the target's distribution, and so its last layer."""
    return kl_weight > 0 or objective_named(loss_type).cost is not None


def checked_options(name: str, options: Mapping[str, Any]) -> Any:
    """The options of a named objective as its own dataclass.

    Raises:
        InputError: an unknown objective or option, or a value that the objective refuses.
    """
    return from_dict(objective_named(name).options, options, source=f"options of {name}")


def check_objective(
    name: str,
    options: Mapping[str, Any],
    *,
    normalize: str | None,
    gamma: float | None,
    kl_weight: float,
    domino: bool,
) -> None:
    """Refuses what cannot be trained with, for a run's config and for the trainer modules alike.

    Args:
        name: of the objective.
        options: its parameters.
        normalize: the divisor, None for the objective's own.
        gamma: decay of the position weights, None or <= 0 for none.
        kl_weight: share of the divergence.
        domino: whether the draft has a head.
    Raises:
        InputError: what was found and what was expected.
    """
    entry = objective_named(name)
    checked_options(name, options)  # for its refusals
    require(
        normalize in (None, *DIVISORS),
        f"normalize must be one of null, {', '.join(DIVISORS)}, found {normalize!r}",
    )
    # A decay on top would weigh positions twice.
    require(
        not entry.weighs_positions or gamma is None or gamma <= 0,
        f"loss_type {name} brings its own weights of positions; loss_decay_gamma must be null, "
        f"found {gamma}",
    )
    require(
        entry.prefix_lengths is None or not domino,
        f"loss_type {name} is for plain DFlash drafts; draft.projector_type must be null",
    )
    require(
        entry.cost is None or kl_weight == 0,
        f"loss_type {name} has a cost of its own, which no divergence is mixed into; kl_weight "
        f"must be 0, found {kl_weight}",
    )


# What the weighted sum of a batch is divided by, of the position weights before any factor and the
# supervised shares, float32 [B, N, M] both: the sum of the weights, that of the shares, or the
# number of blocks with a supervised prediction. None of them asks what was predicted. So
# micro-batches, devices and the two losses share one, and an objective cannot shrink its loss by
# growing it.
DIVISORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "weights": lambda weights, mask: jnp.sum(weights),
    "tokens": lambda weights, mask: jnp.sum(mask),
    "blocks": lambda weights, mask: jnp.sum(jnp.any(mask > 0, axis=-1).astype(jnp.float32)),
}


@dataclass(frozen=True)
class PrefixOptions:
    """`prefix_weight_base`: how likely prefixes are.

    One of l tokens is drawn in proportion to the base's l-th power; below 1 favours short ones.
    """

    prefix_weight_base: float = 0.9

    def __post_init__(self) -> None:
        """Refuses what is not a weight."""
        # Lengths are drawn by its logarithm.
        require(
            self.prefix_weight_base > 0,
            f"prefix_weight_base must be positive, found {self.prefix_weight_base}",
        )


def drawn_prefix_lengths(
    key: jax.Array, shape: tuple[int, ...], options: PrefixOptions, *, block_size: int
) -> jax.Array:
    """See `sample_prefix_lengths`."""
    return sample_prefix_lengths(
        key, shape, block_size=block_size, weight_base=options.prefix_weight_base
    )


@dataclass(frozen=True)
class DpaceOptions:
    """`dpace_alpha`: how far confidences are smoothed towards 1, 0..1."""

    dpace_alpha: float = 0.5

    def __post_init__(self) -> None:
        """Refuses what is not a share."""
        require(
            0 <= self.dpace_alpha <= 1, f"dpace_alpha must lie in 0..1, found {self.dpace_alpha}"
        )


def dpace_weights(
    token: TokenLoss, labels: Labels, options: DpaceOptions, *, form: str = "whole"
) -> jax.Array:
    """D-PACE: how much a position contributes to the expected length of the accepted prefix.

    With the draft's confidence `q = exp(-nll)` smoothed to `(1 - alpha) q + alpha` and `P_m` the
    product up to m, position j weighs `sum over m >= j of P_m`. A weight: no gradient flows through
    it.

        position      0                  1            2
        P             q_0                q_0 q_1      q_0 q_1 q_2
        weight        P_0 + P_1 + P_2    P_1 + P_2    P_2

    Args:
        token: of the logits that are weighted, [B, N, M].
        labels: unsupervised positions neither scale the product nor add to the sum.
        options: alpha.
        form: "whole", or one of its two factors: "confidence" (`P_j`), "continuation"
            (`sum / P_j`).
    Returns:
        float32 [B, N, M].
    Source: D-PACE (arXiv:2605.18810), equations 7 and 8; SpecForge 0.2.0 has the same three forms.
    """
    alpha = options.dpace_alpha
    mask = labels.mask > 0
    # Left to flow, the gradient would lower the loss by making the draft less sure of itself.
    confidence = jnp.exp(-jax.lax.stop_gradient(token.nll))
    smooth = jnp.where(mask, (1.0 - alpha) * confidence + alpha, 1.0)
    prefix = jnp.cumprod(smooth, axis=-1)
    if form == "confidence":
        return prefix
    backwards = jnp.flip(prefix * mask, axis=-1)
    rest = jnp.flip(jnp.cumsum(backwards, axis=-1), axis=-1)
    if form == "whole":
        return rest
    # Without smoothing a product may underflow to 0, and all that is added up from there with it.
    return rest / jnp.maximum(prefix, jnp.finfo(jnp.float32).tiny)


def accept_until_fail(token: TokenLoss, labels: Labels, options: NoOptions) -> jax.Array:
    """1 up to and with the first wrong prediction of a block, 0 after it.

    Verification would never reach what stands behind. Shapes as in `dpace_weights`.
    """
    del options
    right = (token.prediction == labels.target_ids) | (labels.mask == 0)
    reached = jnp.cumprod(right.astype(jnp.float32), axis=-1)
    # Moved by one: the first wrong prediction is reached, and is the one to be mended.
    return jnp.pad(reached[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1.0)


# By the public call: what these can do, an objective from outside can do too.
register_objective("dflash")
register_objective("variable_prefix", prefix_lengths=drawn_prefix_lengths, options=PrefixOptions)
register_objective("accept_until_fail", factor=accept_until_fail)
# D-PACE's weights are the objective: dividing by their sum would cancel them, so its blocks are
# averaged.
for _name, _form in (
    ("dpace", "whole"),
    ("dpace-cumulative-confidence-only", "confidence"),
    ("dpace-continuation-value-only", "continuation"),
):
    register_objective(
        _name,
        factor=functools.partial(dpace_weights, form=_form),
        options=DpaceOptions,
        normalize="blocks",
        loss_decay_gamma=None,
        weighs_positions=True,
    )
