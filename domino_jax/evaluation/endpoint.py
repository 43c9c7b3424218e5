"""What a drafter gains here it should gain where it serves: both are held against each other.

    prompts -> `ask` -> `Served` ---------------.
            -> plain, the target alone ----------+-> `compare_with_server` -> `EndpointFigures`, in
            -> `evaluate` -> ours, by prompt ---'                `evaluation.json`

The text first: where a server's is not the target's own, its tau is of other text. Both may be
right where two logits are a tie for one of them, and where it computes in another type.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.bootstrap import PerPrompt, gain, tau_interval
from domino_jax.evaluation.compare import first_difference
from domino_jax.evaluation.servers import Served


@dataclass(frozen=True, kw_only=True)
class EndpointFigures:
    """How a server does beside us on a set of prompts.

    Attributes:
        url: of the server.
        server: what it calls itself.
        tokens: of all its answers.
        tokens_compared: with the target's own, up to the first difference of each prompt.
        tokens_equal: of these.
        tokens_per_second: of the server, batch 1, reading the prompt and the network included.
        proposals: drafted tokens per verification, on average; this and what follows is None where
            the server does not tell it.
        tau: by the counting rule of `counts`.
        interval: of tau, 95 % over prompts; where each prompt is told.
        per_prompt: of each prompt.
        ratio: tau over ours.
        ratio_interval: paired over prompts.
    """

    url: str
    server: str
    tokens: int
    tokens_compared: int
    tokens_equal: int
    tokens_per_second: float
    proposals: float | None = None
    tau: float | None = None
    interval: tuple[float, float] | None = None
    per_prompt: PerPrompt | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it: without what the server does not tell."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare_with_server(
    served: Served,
    plain: Sequence[Answer],
    ours: PerPrompt,
    *,
    text_of: Callable[[np.ndarray], str],
) -> EndpointFigures:
    """Holds the answers of a server against ours.

    Args:
        served: its answers.
        plain: the target's own greedy answers to the same prompts.
        ours: what the same prompts took here.
        text_of: the text of token ids, for a server that tells text alone.
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
    tau = ratio = proposals = ratio_interval = None
    if served.drafting is not None:
        committed = sum(answer.committed for answer in served.answers)
        verifications = max(served.drafting.verifications, 1)
        tau = committed / verifications
        proposals = served.drafting.drafted / verifications or None
        # Answers of one token each have no tau.
        ratio = tau / ours.tau if ours.tau else None
    per_prompt = served.per_prompt
    over_ours = None if per_prompt is None else gain(per_prompt, ours)
    if over_ours is not None:
        ratio_interval = over_ours.interval
    return EndpointFigures(
        url=served.server.url,
        server=served.server.name,
        tokens=tokens,
        tokens_compared=compared,
        tokens_equal=equal,
        tokens_per_second=tokens / sum(answer.seconds for answer in served.answers),
        proposals=proposals,
        tau=tau,
        interval=None if per_prompt is None else tau_interval(per_prompt),
        per_prompt=per_prompt,
        ratio=ratio,
        ratio_interval=ratio_interval,
    )


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
