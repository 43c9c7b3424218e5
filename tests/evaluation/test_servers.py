"""What servers count is converted to our rule, and what they do not tell is not made up."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from stand_in import NOT_FOUND, VLLM, SGLang, serving
from tiny import Heard

from domino_jax.base.errors import InputError
from domino_jax.decoding.generate import Answer
from domino_jax.evaluation.servers import Drafting, Served, ask, find_server

# The answer that `counts` draws: t | d d t | t | d d d t | d d, cut at the limit.
DRAFTED = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1], bool)
ANSWER = Answer(np.arange(11, dtype=np.int32), DRAFTED, False, 10, 4, 1.0)
FIRST = Answer(ANSWER.tokens[:1], DRAFTED[:1], True, 0, 0, 1.0)  # ended by its first token
PROMPTS = [np.array(ids, np.int32) for ids in ([1, 2, 3], [7, 8])]


def in_turns(prompt: np.ndarray, limit: int, stop_ids: Sequence[int]) -> Answer:
    assert limit == 11 and stop_ids == [5]
    return ANSWER if len(prompt) == 3 else FIRST


def asked(respond: Any, reporter: Heard | None = None) -> Served:
    with serving(respond) as url:
        server = find_server(f"{url}/v1", timeout=5.0)
        assert server.url == url
        return ask(server, PROMPTS, max_new_tokens=11, stop_ids=(5,), reporter=reporter or Heard())


@pytest.mark.parametrize(
    "respond",
    [
        pytest.param(lambda: SGLang(in_turns), id="SGLang"),
        pytest.param(lambda: VLLM(in_turns, per_request=True), id="vLLM, each request"),
        pytest.param(lambda: VLLM(in_turns, per_request=True, kept_beyond=2), id="vLLM, beyond"),
    ],
)
def test_each_request_is_counted_by_our_rule(respond: Callable[[], Any]) -> None:
    served = asked(respond())
    assert [answer.committed for answer in served.answers] == [10, 0]
    assert served.per_prompt is not None and served.per_prompt.verifications == (4, 0)
    assert served.per_prompt.committed == (10, 0)
    assert served.drafting == Drafting(verifications=4, drafted=12)
    for answer, expected in zip(served.answers, (ANSWER, FIRST), strict=True):
        np.testing.assert_array_equal(answer.tokens, expected.tokens)
        assert answer.seconds > 0


def test_counters_tell_of_a_set_what_has_grown() -> None:
    engine = VLLM(in_turns, counted={name: 1000 for name in VLLM(in_turns).counted})
    served = asked(engine)
    assert served.per_prompt is None and served.drafting == Drafting(4, 12)
    assert served.server.name == "vllm 0.30.0" and served.server.model == "tiny"


def test_a_step_without_a_draft_is_a_verification_too() -> None:
    """vLLM counts none where it had no room for a draft: four drafts kept 3, a step had none."""
    undrafted = replace(ANSWER, drafted=np.arange(11) % 4 == 3, verifications=4)
    served = asked(VLLM(lambda *_: undrafted, per_request=True))
    assert served.per_prompt is not None and served.per_prompt.verifications == (8, 8)


def test_a_server_is_asked_greedily_by_token_ids() -> None:
    engine = SGLang(in_turns)
    served = asked(engine)
    assert [question["input_ids"] for question in engine.asked] == [[1, 2, 3], [7, 8]]
    for question in engine.asked:
        assert question["sampling_params"] == {
            "temperature": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": 11,
            "stop_token_ids": [5],
        }
    assert (served.server.name, served.server.block) == ("SGLang 0.5.19", 4)


def without(respond: Any, path: str) -> Any:
    return lambda asked, question: NOT_FOUND if asked == path else respond(asked, question)


def test_a_server_without_figures_is_told_in_a_line() -> None:
    heard = Heard()
    served = asked(without(VLLM(in_turns), "/metrics"), heard)
    assert served.drafting is None and served.per_prompt is None
    told = "tells verifications neither of a request nor, as vLLM, at /metrics"
    assert heard.lines[-1] == f"{served.server.url}: {told}; its text alone is compared"


def test_counters_of_others_are_not_taken() -> None:
    engine, heard = VLLM(in_turns), Heard()

    def busy(path: str, question: Any) -> tuple[Any, ...]:
        engine.counted["generation_tokens"] += 7 * (path == "/v1/completions")
        return engine(path, question)

    assert asked(busy, heard).drafting is None
    assert "/metrics counted 26 tokens, these answers have 12; ask it alone" in heard.lines[-1]


def test_a_server_that_calls_itself_nothing_has_a_name_and_text() -> None:
    responses = {
        "/v1/models": {"data": [{"id": "m"}]},
        "/v1/completions": {"choices": [{"text": "a b"}], "usage": {"completion_tokens": 2}},
    }
    served = asked(lambda path, _: (200, responses[path]) if path in responses else NOT_FOUND)
    server, answer = served.server, served.answers[0]
    assert (server.name, server.model, server.block) == ("OpenAI-style server", "m", None)
    assert (answer.text, answer.tokens, answer.length) == ("a b", None, 2)


def test_another_page_at_the_address_is_no_server() -> None:
    with (
        serving(lambda *_: (200, {"data": []})) as url,
        pytest.raises(InputError, match=f"{url}/v1/models: expected str as data.0.id"),
    ):
        find_server(url, timeout=5.0)


GOOD = {"text": "", "output_ids": [4, 5], "meta_info": {"completion_tokens": 2}}


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((500, {"error": "CUDA out of memory"}), "status 500, .*CUDA out of memory"),
        ((200, []), r"expected int as meta_info.completion_tokens, found \[\]"),
        ((200, GOOD | {"meta_info": {"completion_tokens": "2"}}), "expected int as meta_info"),
        ((200, GOOD | {"meta_info": {"completion_tokens": 12}}), "expected 12 token ids, found"),
        ((200, GOOD | {"output_ids": ["4", "5"]}), r"expected 2 token ids, found \['4', '5'\]"),
        ((200, GOOD | {"output_ids": [4, 2**40]}), "expected 2 token ids"),
        ((200, GOOD | {"output_ids": [1] * 20, "meta_info": {"completion_tokens": 20}}), "of 20 "),
        (
            (200, GOOD | {"meta_info": {"completion_tokens": 2, "spec_verify_ct": -1}}),
            "expected a count as meta_info.spec_verify_ct, found -1",
        ),
        (
            (200, GOOD | {"meta_info": {"completion_tokens": 2, "spec_verify_ct": 0}}),
            "an answer of 2 tokens without a verification",
        ),
    ],
)
def test_a_wrong_answer_is_one_line(response: tuple[Any, ...], message: str) -> None:
    engine = SGLang(in_turns)

    def wrong(path: str, question: Any) -> tuple[Any, ...]:
        return response if path == "/generate" else engine(path, question)

    with pytest.raises(InputError, match=f"^http://127.0.0.1:[0-9]+/generate: .*{message}"):
        asked(wrong)
