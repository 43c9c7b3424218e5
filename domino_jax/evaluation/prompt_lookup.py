"""Prompt look-up, the baseline of a drafter: proposals copied from the text itself.

Where the last tokens stood before, what followed them then is proposed again, as serving engines
offer it. It needs no training: a drafter that does not beat it is worth nothing.

    the cat sat. now the cat | sat . now       the longest run of last tokens that stood before,
        `--------'   `-----'                   its latest place, and what followed there
"""

import itertools
from collections.abc import Sequence

import numpy as np

from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.counts import in_cycles

LONGEST = 3  # tokens of a run at most; shorter ones are tried after it


def proposed(text: Sequence[int], proposals: int) -> list[list[int]]:
    """What followed the last tokens of each beginning of a text where they stood before.

    Args:
        text: token ids.
        proposals: tokens at most.
    Returns:
        The proposals behind the first token, behind the first two, and so on to the whole text;
        fewer where the beginning ends before, none where nothing repeats.
    """
    behind: dict[tuple[int, ...], int] = {}  # runs of tokens, and the latest place behind each
    found = []
    for position in range(1, len(text) + 1):
        runs = [
            tuple(text[position - length : position])
            for length in range(min(LONGEST, position), 0, -1)
        ]
        # The longest run first, then the latest place: what was said last is likeliest again.
        begin = next((behind[run] for run in runs if run in behind), position)
        found.append(list(text[begin : min(begin + proposals, position)]))
        behind |= dict.fromkeys(runs, position)
    return found


def look_up(prompt: np.ndarray, greedy: Answer, *, proposals: int) -> Answer:
    """The target's greedy answer as n-gram drafts and verifications would have written it.

    Args:
        prompt: token ids, int32 [n].
        greedy: the target's own answer.
        proposals: tokens of a draft at most.
    Returns:
        The same answer with who wrote each token, and its verifications; it has no time.
    """
    text = [*prompt.tolist(), *greedy.tokens.tolist()]
    kept = [
        _agreeing(draft, text[position : position + proposals])
        for position, draft in enumerate(proposed(text, proposals), start=1)
        if position > len(prompt)
    ]
    return in_cycles(greedy, kept)


def _agreeing(draft: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens of a draft say what the text does."""
    agrees = (token == own for token, own in zip(draft, text, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, agrees))
