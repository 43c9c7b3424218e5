"""Comparison of a server's answers and acceptance with ours on the same prompts.

    prompts -> `ask` -> `Served` ---------------.
            -> plain, the target alone ----------+-> `compare_with_server` -> "endpoint" in
            -> `evaluate` -> ours, by prompt ---'                            `evaluation.json`

Where a server's text is not the target's own, its tau is of other text. Both may be right where two
logits are a tie for one of them, and where it computes in another type.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.bootstrap import PerPrompt, gain, tau_interval
from domino_jax.evaluation.compare import first_difference
from domino_jax.evaluation.servers import Served


def compare_with_server(
    served: Served,
    plain: Sequence[Answer],
    ours: PerPrompt,
    *,
    text_of: Callable[[np.ndarray], str],
) -> dict[str, Any]:
    """Holds the answers of a server against ours.

    Args:
        served: its answers.
        plain: the target's own greedy answers to the same prompts.
        ours: what the same prompts took here.
        text_of: the text of token ids, for a server that tells text alone.
    Returns:
        As `evaluation.json` holds it, without what the server does not tell:
        `url` and `server`, what it calls itself;
        `tokens` of all its answers, `tokens_compared` with the target's own up to the first
        difference of each prompt, `tokens_equal` of these;
        `tokens_per_second` at batch 1, reading the prompt and the network included;
        `proposals`, drafted tokens per verification on average; `tau` by the rule of `counts`, its
        `ratio` to ours; by prompt, `per_prompt`, the `interval` of tau and, paired, the
        `ratio_interval`.
    """
    compared = equal = 0
    for theirs, own in zip(served.answers, plain, strict=True):
        if theirs.tokens is not None:
            position = first_difference(own.tokens, theirs.tokens)
        else:
            position = _first_difference_of_text(own.tokens, theirs.text, text_of)
        equal += len(own.tokens) if position is None else position
        compared += len(own.tokens) if position is None else position + 1
    tokens = sum(answer.length for answer in served.answers)
    figures: dict[str, Any] = {
        "url": served.server.url,
        "server": served.server.name,
        "tokens": tokens,
        "tokens_compared": compared,
        "tokens_equal": equal,
        "tokens_per_second": tokens / sum(answer.seconds for answer in served.answers),
    }
    drafting, per_prompt = served.drafting, served.per_prompt
    if drafting is not None:
        verifications = max(drafting.verifications, 1)
        tau = sum(answer.committed for answer in served.answers) / verifications
        over_ours = per_prompt and gain(per_prompt, ours)
        figures |= {
            "proposals": drafting.drafted / verifications or None,
            "tau": tau,
            "interval": per_prompt and tau_interval(per_prompt),
            "per_prompt": per_prompt and asdict(per_prompt),
            # Answers of one token each have no tau.
            "ratio": tau / ours.tau if ours.tau else None,
            "ratio_interval": over_ours and over_ours.interval,
        }
    return {name: value for name, value in figures.items() if value is not None}


def _first_difference_of_text(
    tokens: np.ndarray, text: str, text_of: Callable[[np.ndarray], str]
) -> int | None:
    """As `first_difference`: how many tokens' text is how the other text begins."""
    # Some tokenizers decode the space before a first word, others drop it.
    text = text.lstrip().rstrip("\ufffd")
    for count in range(len(tokens), 0, -1):
        # Half a character is shown as one of its own, which the other text has whole.
        own = text_of(tokens[:count]).lstrip().rstrip("\ufffd")
        if text.startswith(own):
            return None if count == len(tokens) and text == own else count
    return 0
