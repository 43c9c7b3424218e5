"""A server that decodes as we do has our tau and our text; one that does not is found out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stand_in import own_answer

from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.counts import in_cycles, per_prompt
from domino_jax.evaluation.endpoint import compare_with_server
from domino_jax.evaluation.servers import Drafting, Served, ServedAnswer, Server

RNG = np.random.default_rng(0)
LENGTHS = (20, 11, 17, 5)
SERVER = Server("http://host", "SGLang 0.5.19", None, 4, 1.0)
PLAIN = [own_answer(*RNG.integers(0, 5, length)) for length in LENGTHS]
OURS = [in_cycles(one, RNG.integers(0, 4, len(one.tokens)).tolist()) for one in PLAIN]


def text_of(ids: np.ndarray) -> str:
    """A word a token, without the one that ends an answer."""
    return " ".join("abcdefg"[token] * 2 for token in ids if token != 5)


def record_of(answers: Sequence[ServedAnswer], plain: Sequence[Answer], **told: Any) -> Any:
    served = Served(SERVER, answers, **told)
    figures = compare_with_server(served, plain, per_prompt(OURS), text_of=text_of)
    return json.loads(json.dumps(figures))


def served_with(answers: Sequence[Answer], *, by_prompt: bool) -> Any:
    """The record of a server that gives such answers."""
    taken = per_prompt(answers)
    verifications = sum(taken.verifications)
    told: dict[str, Any] = {"drafting": Drafting(verifications, 3 * verifications)}
    if by_prompt:
        told["per_prompt"] = taken
    tokens = [answer.tokens for answer in answers]
    return record_of([ServedAnswer("", ids, len(ids), None, 2.0) for ids in tokens], PLAIN, **told)


@pytest.mark.parametrize("by_prompt", [True, False])
def test_a_server_that_decodes_as_we_do(by_prompt: bool) -> None:
    record = served_with(OURS, by_prompt=by_prompt)
    ours = per_prompt(OURS)
    assert ours.tau > 1  # or a wrong count would go unnoticed
    assert (record["url"], record["server"]) == ("http://host", "SGLang 0.5.19")
    assert record["ratio"] == 1 and record["tau"] == ours.tau and record["proposals"] == 3
    tokens = record["tokens"]
    assert tokens == record["tokens_compared"] == record["tokens_equal"] == sum(LENGTHS)
    assert record["tokens_per_second"] == tokens / (2.0 * len(LENGTHS))
    told = {"url", "server", "tokens", "tokens_compared", "tokens_equal", "tokens_per_second"}
    told |= {"tau", "ratio", "proposals"}
    if not by_prompt:
        assert set(record) == told
    else:
        assert set(record) == told | {"interval", "per_prompt", "ratio_interval"}
        assert record["per_prompt"]["committed"] == list(ours.committed)
        assert record["ratio_interval"] == [1, 1]
        assert record["interval"][0] <= record["tau"] <= record["interval"][1]


def test_a_server_that_accepts_less_and_writes_something_else() -> None:
    def worse(answer: Answer) -> Answer:
        tokens = answer.tokens.copy()
        tokens[3:] += 1
        return replace(answer, tokens=tokens, verifications=2 * answer.verifications)

    record = served_with(list(map(worse, OURS)), by_prompt=True)
    assert record["ratio"] == pytest.approx(0.5)
    assert record["ratio_interval"] == pytest.approx([0.5, 0.5])
    assert record["tokens_equal"] == sum(min(length, 3) for length in LENGTHS)
    assert record["tokens_compared"] == sum(min(length, 4) for length in LENGTHS)


@pytest.mark.parametrize(
    ("text", "equal", "compared"),
    [
        (" aa bb cc", 3, 3),
        (" aa b#cc", 1, 2),
        ("aa bb cc dd", 3, 4),  # goes on
        ("aa b", 1, 2),
        ("", 0, 1),
        ("xy", 0, 1),
    ],
)
def test_text_alone_is_compared_by_the_text_of_tokens(text: str, equal: int, compared: int) -> None:
    record = record_of([ServedAnswer(text, None, 4, None, 1.0)], [own_answer(0, 1, 2)])
    assert (record["tokens_equal"], record["tokens_compared"]) == (equal, compared)
    assert not record.keys() & {"tau", "ratio", "per_prompt", "proposals"}
