"""The floor of a drafter: proposals that cost nothing, copied from the text itself.

Where the last tokens stood before, what followed them then is proposed again (prompt look-up, as
serving engines offer it). It needs no training: a drafter that does not beat it is worth nothing.

    the cat sat. now the cat | sat . now       the longest run of last tokens that stood before,
        `--------'   `-----'                   its latest place, and what followed there
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from domino_jax.decoding.generate import Answer

LONGEST = 3  # tokens of a run at most; shorter ones are tried after it


def propose(tokens: Sequence[int], proposals: int) -> list[int]:
    """What followed the last tokens of a text where they stood before.

    Args:
        tokens: the text so far.
        proposals: tokens at most.
    Returns:
        The proposals; fewer where the text ends before, none where nothing repeats.
    """
    for length in range(min(LONGEST, len(tokens) - 1), 0, -1):
        run = list(tokens[-length:])
        # The latest place first: what was said last is likeliest to be said again.
        for begin in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[begin : begin + length]) == run:
                return list(tokens[begin + length : begin + length + proposals])
    return []


def look_up(prompt: np.ndarray, greedy: Answer, *, proposals: int) -> Answer:
    """The target's greedy answer as n-gram drafts and verifications would have written it.

    What greedy verification commits is the target's own text, so none needs to be run for it.

    Args:
        prompt: token ids, int32 [n].
        greedy: the target's own answer.
        proposals: tokens of a draft at most.
    Returns:
        The same answer with who wrote each token, and its verifications; it has no time.
    """
    text = [*prompt.tolist(), *greedy.tokens.tolist()]
    drafted = np.zeros(len(greedy.tokens), bool)
    place = len(prompt) + 1  # behind the first token, which costs no verification
    verifications = 0
    while place < len(text):
        for token in propose(text[:place], proposals):
            if place == len(text) or token != text[place]:
                break
            drafted[place - len(prompt)] = True
            place += 1
        place += 1  # the target's own
        verifications += 1
    committed = len(greedy.tokens) - 1
    return replace(
        greedy, drafted=drafted, committed=committed, verifications=verifications, seconds=0.0
    )
