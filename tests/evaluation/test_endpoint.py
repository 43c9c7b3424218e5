"""A server that decodes as we do has our tau and our text; one that does not is found out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from stand_in import NOT_FOUND, VLLM, SGLang, serving
from tiny import Heard
from toy_models import PROMPTS, TARGET, draft_config, models

from domino_jax.decoding.decoder import Decoder, Weights, make_decoder
from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.evaluation.bootstrap import PerPrompt
from domino_jax.evaluation.endpoint import EndpointFigures, compare_with_server
from domino_jax.evaluation.evaluate import plain_answers
from domino_jax.evaluation.servers import ask, find_server
from domino_jax.target.decoder import Target

TOKENS = 20


@dataclass(frozen=True)
class Ours:
    """What decodes here, the target's own answers, and what drafts took."""

    decoder: Decoder
    weights: Weights
    plain: Sequence[Answer]
    per_prompt: PerPrompt

    def decode(self, prompt: np.ndarray, limit: int, stop_ids: Sequence[int]) -> Answer:
        assert tuple(stop_ids) == self.decoder.stop_ids and limit == TOKENS
        cache_len = required_cache_len(self.decoder, max(map(len, PROMPTS)), TOKENS)
        (answer,) = generate(
            self.decoder, self.weights, [prompt], max_new_tokens=TOKENS, cache_len=cache_len
        )
        return answer


@pytest.fixture(scope="module")
def ours(target_params: Any) -> Ours:
    draft, weights = models(target_params, draft_config())
    decoder = make_decoder(Target(TARGET), draft, proposals="serving", stop_ids=(5,))
    plain = plain_answers(decoder, weights, PROMPTS, max_new_tokens=TOKENS, reporter=Heard())
    answers = generate(decoder, weights, PROMPTS, max_new_tokens=TOKENS)
    per_prompt = PerPrompt(
        tuple(answer.committed for answer in answers),
        tuple(answer.verifications for answer in answers),
    )
    assert per_prompt.tau > 1  # or a wrong count would go unnoticed
    return Ours(decoder, weights, plain, per_prompt)


def text_of(ids: np.ndarray) -> str:
    """A word a token, without the one that ends an answer."""
    return " ".join("abcdefg"[token] * 2 for token in ids if token != 5)


def measured(respond: Any, ours: Ours) -> EndpointFigures:
    with serving(respond) as url:
        server = find_server(url, timeout=60.0)
        served = ask(server, PROMPTS, max_new_tokens=TOKENS, stop_ids=(5,), reporter=Heard())
    figures = compare_with_server(served, ours.plain, ours.per_prompt, text_of=text_of)
    assert figures.url == url and figures.tokens_per_second > 0
    return figures


@pytest.mark.parametrize("engine", ["SGLang", "vLLM, each request", "vLLM, counters"])
def test_a_server_that_decodes_as_we_do(ours: Ours, engine: str) -> None:
    respond: Any = SGLang(ours.decode)
    if engine != "SGLang":
        respond = VLLM(ours.decode, per_request=engine == "vLLM, each request")
    figures = measured(respond, ours)
    assert figures.ratio == 1 and figures.tau == ours.per_prompt.tau and figures.proposals == 3
    length = sum(len(answer.tokens) for answer in ours.plain)
    assert figures.tokens == figures.tokens_compared == figures.tokens_equal == length
    record = json.loads(json.dumps(figures.as_json()))
    told = {"url", "server", "tokens", "tokens_compared", "tokens_equal", "tokens_per_second"}
    told |= {"tau", "ratio", "proposals"}
    by_prompt = {"interval", "per_prompt", "ratio_interval"}
    if engine == "vLLM, counters":
        assert set(record) == told
    else:
        assert set(record) == told | by_prompt
        assert record["per_prompt"]["committed"] == list(ours.per_prompt.committed)
        assert record["ratio_interval"] == [1, 1]
        assert record["interval"][0] <= record["tau"] <= record["interval"][1]


def test_a_server_that_accepts_less_and_writes_something_else(ours: Ours) -> None:
    def worse(prompt: np.ndarray, limit: int, stop_ids: Sequence[int]) -> Answer:
        answer = ours.decode(prompt, limit, stop_ids)
        tokens = answer.tokens.copy()
        tokens[3:] = (tokens[3:] + 1) % TARGET.vocab_size
        return replace(answer, tokens=tokens, verifications=2 * answer.verifications)

    figures = measured(SGLang(worse), ours)
    assert figures.ratio == pytest.approx(0.5)
    assert figures.ratio_interval == pytest.approx((0.5, 0.5))
    lengths = [len(answer.tokens) for answer in ours.plain]
    assert figures.tokens_equal == sum(min(length, 3) for length in lengths)
    assert figures.tokens_compared == sum(min(length, 4) for length in lengths)


@pytest.mark.parametrize("changed", [False, True])
def test_a_server_that_tells_text_alone(ours: Ours, changed: bool) -> None:
    def text_alone(path: str, question: Any) -> tuple[Any, ...]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m"}]}
        if path != "/v1/completions":
            return NOT_FOUND
        ids = np.array(question["prompt"], np.int32)
        tokens = ours.decode(ids, question["max_tokens"], question["stop_token_ids"]).tokens
        text = text_of(tokens)
        if changed:  # within the fourth word
            text = f"{text[:10]}#{text[11:]}"
        usage = {"completion_tokens": len(tokens)}
        return 200, {"choices": [{"text": f" {text}"}], "usage": usage}

    figures = measured(text_alone, ours)
    assert figures.tau is figures.ratio is figures.per_prompt is figures.proposals is None
    lengths = [len(answer.tokens) for answer in ours.plain]
    cut = 3 if changed else TOKENS
    assert figures.tokens_equal == sum(min(length, cut) for length in lengths)
    assert figures.tokens_compared == sum(min(length, cut + changed) for length in lengths)
    assert "tau" not in figures.as_json() and figures.server == "OpenAI-style server"


@pytest.mark.parametrize(("text", "equal"), [("aa bb cc dd", 3), ("aa b", 1), ("", 0), ("xy", 0)])
def test_text_that_ends_earlier_or_later_differs_there(ours: Ours, text: str, equal: int) -> None:
    own = replace(ours.plain[0], tokens=np.array([0, 1, 2], np.int32))

    def respond(path: str, _: Any) -> tuple[Any, ...]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m"}]}
        return 200, {"choices": [{"text": text}], "usage": {"completion_tokens": 4}}

    with serving(respond) as url:
        server = find_server(url, timeout=5.0)
        served = ask(server, PROMPTS[:1], max_new_tokens=4, stop_ids=(), reporter=Heard())
    figures = compare_with_server(served, [own], PerPrompt((3,), (2,)), text_of=text_of)
    assert (figures.tokens_equal, figures.tokens_compared) == (equal, equal + 1)
