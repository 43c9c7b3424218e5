"""A decoder: a target, its draft, and how tokens are drawn; all that is fixed while decoding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from domino_jax.base.errors import InputError
from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.target.decoder import Target


@dataclass(frozen=True)
class Decoder:
    """What is fixed while decoding; hashable, so that it can be a static argument.

    Attributes:
        target: the target; with a draft it captures the draft's layers.
        draft: the draft model, None for plain decoding.
        proposals: drafted tokens per verification, 0 for plain decoding.
        use_head: whether the Domino head corrects the backbone's logits.
        temperature: 0 takes the likeliest token, else tokens follow softmax(logits / temperature).
        stop_ids: token ids that end an answer.
        top_k: draws from this many of the likeliest tokens alone, see `filters`; None from all.
        top_p: draws from the fewest likeliest ones that are as probable together; None from all.
    """

    target: Target
    draft: DraftModel | None = None
    proposals: int = 0
    use_head: bool = False
    temperature: float = 0.0
    stop_ids: tuple[int, ...] = ()
    top_k: int | None = None
    top_p: float | None = None


class Weights(NamedTuple):
    """Parameters of the target, as it takes them, and of the draft (None for plain decoding)."""

    target: Any
    draft: Any = None


def number_of_proposals(config: DraftConfig, mode: str) -> int:
    """Proposals of a cycle: "block" all predictions, "serving" K - 1 as serving engines do."""
    if mode not in ("block", "serving"):
        raise ValueError(f"proposals must be 'block' or 'serving', found {mode!r}")
    return config.num_predictions if mode == "block" else config.block_size - 1


def make_decoder(
    target: Target,
    draft: DraftModel | None = None,
    *,
    proposals: str = "block",
    use_head: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
) -> Decoder:
    """A `Decoder` for a target alone, or with a draft that says which layers the target captures.

    Raises:
        ValueError: draft and target differ in width, vocabulary or depth, or `top_k` or `top_p` are
            out of their range or given without a temperature.
        InputError: a stop token is outside the target's vocabulary.
    """
    cfg = target.cfg
    for token in stop_ids:
        if not 0 <= token < cfg.vocab_size:
            raise InputError(
                f"stop token id {token} is outside the target's vocab_size {cfg.vocab_size}; use "
                "the tokenizer that belongs to these weights"
            )
    if (top_k, top_p) != (None, None) and temperature == 0:
        raise ValueError("top_k and top_p filter what is drawn: they need a temperature")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, found {top_p}")
    plain = Decoder(
        replace(target, capture=()),
        temperature=temperature,
        stop_ids=tuple(stop_ids),
        top_k=top_k,
        top_p=top_p,
    )
    if draft is None:
        return plain
    for name in ("hidden_size", "vocab_size"):
        found, expected = getattr(draft.cfg, name), getattr(cfg, name)
        if found != expected:
            raise ValueError(f"the draft's {name} is {found}, the target's {expected}")
    layers = draft.cfg.num_target_layers
    if layers != cfg.num_hidden_layers:
        raise ValueError(
            f"the draft reads a target of {layers} layers, this one has {cfg.num_hidden_layers}"
        )
    return replace(
        plain,
        target=replace(target, capture=draft.cfg.target_layer_ids),
        draft=draft,
        proposals=number_of_proposals(draft.cfg, proposals),
        use_head=use_head and draft.cfg.head is not None,
    )


def alone(decoder: Decoder) -> Decoder:
    """The target of a decoder without its draft."""
    # It captures nothing: it must not pay for states that only a draft reads.
    target = replace(decoder.target, capture=())
    return replace(decoder, target=target, draft=None, proposals=0, use_head=False)
