"""A few seconds of `scripts/reliability/fuzz`: every parser, valid inputs changed in one place."""

from collections import Counter

import pytest
from fuzz_cases import Case, Inputs, Parser
from fuzz_parsers import all_parsers
from fuzz_run import ACCEPTED, BAD, REFUSED, outcome, quiet, run

from domino_jax.base.errors import InputError

NAMES = (
    *("config.yaml", "key=value words", "--chat-template-kwargs", "decoding options"),
    *("lines of data", "packed data", "packed bombs", "capture manifest", "partial answers"),
    "metrics.jsonl",
    *("config.json, target", "config.json, draft", "safetensors", "safetensors index", "GGUF"),
    *("tokenizer files", "chat templates"),
)


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return {parser.name: parser for parser in all_parsers(tmp_path_factory.mktemp("fuzz"))}


def test_every_parser_is_fuzzed(parsers: dict[str, Parser]) -> None:
    assert tuple(parsers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_input_is_refused_in_one_line_or_right(
    parsers: dict[str, Parser], name: str
) -> None:
    parser = parsers[name]
    assert outcome(parser, Case(parser.inputs.good)) == (ACCEPTED, "")
    said: list[str] = []
    with quiet():
        counts = run(parser, count=5 * parser.weight, seed=0, say=said.append)
    assert not [counts[kind] for kind in BAD if counts[kind]], "\n".join(said)
    # Behind a good line a bad one is left out, not refused.
    assert counts[REFUSED] > 0 or name == "packed bombs"


def test_the_harness_sees_what_is_wrong(parsers: dict[str, Parser]) -> None:
    def fails(content: object) -> object:
        raise KeyError(content)

    def endless(content: object) -> object:
        while True:
            pass

    def refuses(content: object) -> object:
        raise InputError("no")

    def judged(check: object, forbidden: str | None = None) -> str:
        parser = Parser("x", 1, Inputs(1, lambda rng: Case(1)), check)  # type: ignore[arg-type]
        return outcome(parser, Case(1, forbidden), seconds=0.2)[0]

    assert judged(fails) == "tracebacks" and judged(refuses) == REFUSED
    assert judged(lambda content: None) == ACCEPTED
    forbidden = "accepted though forbidden"
    assert judged(lambda content: "wrong") == judged(lambda content: None, "twice") == forbidden
    assert judged(endless) == "slower than 10 s"
    assert isinstance(run(parsers["key=value words"], count=3, seed=0), Counter)
