"""The counting rule of drafts: verifications, committed tokens, tau, acceptance by position.

An answer is the target's first token, which costs no verification, then cycles: the drafted tokens
that were kept (d), and the target's own (t). The last cycle may be cut by a stop or the limit:

    t | d d t | t | d d d t | d d        4 verifications, 10 committed: tau = 10 / 4
        2 kept  0   3         2, cut     kept at least 1, 2, 3: 3/4, 3/4, 1/4
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.bootstrap import PerPrompt


@dataclass(frozen=True)
class Acceptance:
    """How far drafts hold, by position of the block; the first proposal comes first.

    Attributes:
        marginal: share of the verifications that kept this proposal.
        conditional: the same among those that kept all before it and were not cut before it; None
            where there is none.
    """

    marginal: tuple[float, ...]
    conditional: tuple[float | None, ...]


def in_cycles(greedy: Answer, kept: Sequence[int]) -> Answer:
    """The target's greedy answer as cycles of drafts and verifications would have written it.

    What greedy verification commits is the target's own text, so none needs to be run for it.

    Args:
        greedy: the target's own answer.
        kept: behind each token but the last at least, how many drafted ones are the answer's own.
    Returns:
        The same answer with who wrote each token, and its verifications; it has no time.
    """
    drafted = np.zeros(len(greedy.tokens), bool)
    position = 1  # behind the first token, which costs no verification
    verifications = 0
    while position < len(drafted):
        end = position + kept[position - 1]
        drafted[position:end] = True
        position = end + 1  # the target's own
        verifications += 1
    committed = len(drafted) - 1
    return replace(
        greedy, drafted=drafted, committed=committed, verifications=verifications, seconds=0.0
    )


def per_prompt(answers: Sequence[Answer]) -> PerPrompt:
    """What each answer took."""
    committed = tuple(answer.committed for answer in answers)
    return PerPrompt(committed, tuple(answer.verifications for answer in answers))


def tau(answers: Sequence[Answer]) -> float:
    """Tokens committed per verification by the target, its own token included."""
    return per_prompt(answers).tau


def acceptance(answers: Sequence[Answer], proposals: int) -> Acceptance:
    """How far the drafts of answers hold.

    Args:
        answers: decoded with a draft.
        proposals: P, the tokens of each draft.
    Returns:
        P figures of each kind.
    """
    kept = np.zeros(proposals, int)  # cycles that kept position i
    decided = np.zeros(proposals, int)  # cycles that kept or refused it
    for answer in answers:
        for length, cut in _cycles(answer):
            kept[:length] += 1
            decided[: length if cut else length + 1] += 1
    total = max(sum(answer.verifications for answer in answers), 1)
    return Acceptance(
        marginal=tuple(float(count / total) for count in kept),
        conditional=tuple(
            float(count / of) if of else None for count, of in zip(kept, decided, strict=True)
        ),
    )


def _cycles(answer: Answer) -> list[tuple[int, bool]]:
    """Drafted tokens that each cycle of an answer kept, and whether it was cut behind them."""
    drafted = answer.drafted[1:]  # the first token is the prompt's
    own = np.flatnonzero(~drafted)
    begins = np.concatenate([[0], own + 1])
    cycles = [(int(end - begin), False) for begin, end in zip(begins, own, strict=False)]
    left = len(drafted) - int(begins[-1])
    return [*cycles, (left, True)] if left else cycles
