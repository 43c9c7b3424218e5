"""Greedy answers of serving engines, and what drafts took, converted to the rule of `counts`.

Servers are asked by token ids, one prompt after the other, as a user waits:

    find_server(URL)      -> `Server`, SGLang, vLLM or another OpenAI-style one
    ask(server, prompts)  -> `Served`, tokens, verifications and seconds

In all of them the pass over the prompt gives an answer's first token and is no verification, as
here. So tau is

    committed      tokens of the answer - 1
    verifications  SGLang  meta_info.spec_verify_ct of `/generate`, one a verified block
                   vLLM    metrics.speculative_decoding.num_spec_steps of a response, where it is
                           served with `--per-request-spec-decode-metrics`; else, of a whole set,
                           what spec_decode_num_drafts of `/metrics` has grown by

SGLang's own spec_accept_length counts the first token too. vLLM's mean acceptance length counts
drafts that were kept beyond an answer's end, and a step without a draft is none of its drafts.

Source: SGLang of 2026-09 (`http_server.py`, `scheduler_output_processor_mixin.py`; #3152, #17240;
    before #23456 its overlap scheduler may count a verification too many an answer), vLLM of
    2026-09 (`v1/spec_decode/metrics.py`, `openai/completion/protocol.py`, #48915).
"""

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, shown
from domino_jax.base.escapes import printable
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.evaluation.bootstrap import PerPrompt
from domino_jax.evaluation.responses import (
    TIMEOUT_SECONDS,
    base_url,
    count,
    fetch,
    find,
    json_of,
    mapping_of,
    need,
)

NAME_CHARACTERS = 60  # of what a server calls itself

# Counters of vLLM, of all requests together, and how Prometheus writes them.
COUNTERS = (
    "spec_decode_num_drafts",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_draft_tokens",
    "generation_tokens",
)
COUNTER = re.compile(
    r"^vllm:(\w+)_total(?:\{.*\})? (\d{1,30}(?:\.\d{1,30})?(?:e\+?\d{1,2})?)\r?$", re.MULTILINE
)


@dataclass(frozen=True)
class Server:
    """A server that answers prompts.

    Attributes:
        url: without the path of an API.
        name: what it calls itself, with its version where it tells one.
        model: what an OpenAI-style server calls its model; None for SGLang, asked by its own API.
        block: tokens that SGLang verifies at once, the known one included; None elsewhere.
        timeout: seconds for a response.
    """

    url: str
    name: str
    model: str | None
    block: int | None
    timeout: float


@dataclass(frozen=True)
class Drafting:
    """What drafts took: blocks that the target verified, and drafted tokens in them."""

    verifications: int
    drafted: int


@dataclass(frozen=True, eq=False)
class ServedAnswer:
    """One answer of a server.

    Attributes:
        tokens: token ids, int32 [n]; None where the server tells text alone.
        length: n.
        drafting: None where the server does not tell it of a request.
        seconds: from the question to the end of the answer.
    """

    text: str
    tokens: np.ndarray | None
    length: int
    drafting: Drafting | None
    seconds: float

    @property
    def committed(self) -> int:
        """Tokens that count: all but the first."""
        return max(self.length - 1, 0)


@dataclass(frozen=True, eq=False)
class Served:
    """The answers of a server to a set of prompts.

    `drafting` is what drafts took of all together, `per_prompt` of each; None where the server does
    not tell it.
    """

    server: Server
    answers: Sequence[ServedAnswer]
    drafting: Drafting | None = None
    per_prompt: PerPrompt | None = None


def find_server(url: str, *, timeout: float = TIMEOUT_SECONDS) -> Server:
    """Asks a server what it is.

    Args:
        url: `http://HOST:PORT`, with or without the `/v1` of an OpenAI-style API.
        timeout: seconds for each response of this server, now and later.
    Raises:
        InputError: not such a URL, or nothing there answers as a server of a model does.
    """
    base = base_url(url)
    info = mapping_of(f"{base}/server_info", timeout)
    # A key of SGLang's settings that stands there without a draft too.
    if "speculative_algorithm" in info:
        block = info.get("speculative_num_draft_tokens")
        name = _name("SGLang", info)
        return Server(base, name, None, block if type(block) is int else None, timeout)
    source = f"{base}/v1/models"
    models = json_of(source, timeout)
    model = need(models, "data", 0, "id", kind=str, source=source)
    owner = find(models, "data", 0, "owned_by")
    name = _name(str(owner or "OpenAI-style server"), mapping_of(f"{base}/version", timeout))
    return Server(base, name, model, None, timeout)


def ask(
    server: Server,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    reporter: Reporter = STDERR,
) -> Served:
    """Asks a server for its greedy answers, one prompt after the other.

    Args:
        server: of `find_server`.
        prompts: token ids of each prompt.
        max_new_tokens: per answer.
        stop_ids: token ids that end an answer.
        reporter: is told each answer, and in a line where the server tells no figures.
    Raises:
        InputError: a response does not come, or is none.
    """
    before = _counters(server)
    answers = []
    with reporter.bar("asked", total=len(prompts)) as bar:
        for prompt in prompts:
            answers.append(_answer(server, prompt, max_new_tokens, list(stop_ids)))
            bar.tell(len(answers))
    told = [answer.drafting for answer in answers if answer.drafting is not None]
    if len(told) == len(answers):
        verifications = tuple(drafting.verifications for drafting in told)
        drafted = sum(drafting.drafted for drafting in told)
        per_prompt = PerPrompt(tuple(answer.committed for answer in answers), verifications)
        return Served(server, answers, Drafting(sum(verifications), drafted), per_prompt)
    try:
        return Served(server, answers, _drafting_of_set(before, _counters(server), answers))
    except InputError as error:
        reporter.say(f"{server.url}: {error}; its text alone is compared")
        return Served(server, answers)


def _answer(
    server: Server, prompt: np.ndarray, max_new_tokens: int, stop_ids: list[int]
) -> ServedAnswer:
    """Asks for one answer."""
    greedy: dict[str, Any] = {
        "temperature": 0,
        # Said, since a server may take another one from the target's generation_config.json.
        "repetition_penalty": 1.0,
        "stop_token_ids": stop_ids,
    }
    if server.model is None:
        source, read = f"{server.url}/generate", _sglang_answer
        sampling = greedy | {"max_new_tokens": max_new_tokens}
        question = {"input_ids": prompt.tolist(), "sampling_params": sampling}
    else:
        source, read = f"{server.url}/v1/completions", _openai_answer
        question = greedy | {"model": server.model, "prompt": prompt.tolist()}
        question |= {"max_tokens": max_new_tokens, "return_token_ids": True}
    began = time.perf_counter()
    record = json_of(source, server.timeout, question)
    answer = read(record, server, time.perf_counter() - began, source=source)
    if answer.length > max_new_tokens:
        raise InputError(
            f"{source}: an answer of {answer.length} tokens, asked for {max_new_tokens}"
        )
    # Nothing is committed without a verification, except the first token.
    if answer.committed and answer.drafting and not answer.drafting.verifications:
        raise InputError(f"{source}: an answer of {answer.length} tokens without a verification")
    return answer


def _sglang_answer(record: Any, server: Server, seconds: float, *, source: str) -> ServedAnswer:
    length = count(record, "meta_info", "completion_tokens", source=source)
    # Some versions return the last tokens of the prompt before them.
    tokens = _token_ids(find(record, "output_ids"), length, source=source)
    text = need(record, "text", kind=str, source=source) if tokens is None else ""
    drafting = None
    if find(record, "meta_info", "spec_verify_ct") is not None:
        verifications = count(record, "meta_info", "spec_verify_ct", source=source)
        drafting = Drafting(verifications, verifications * ((server.block or 1) - 1))
    return ServedAnswer(text, tokens, length, drafting, seconds)


def _openai_answer(record: Any, server: Server, seconds: float, *, source: str) -> ServedAnswer:
    length = count(record, "usage", "completion_tokens", source=source)
    tokens = _token_ids(find(record, "choices", 0, "token_ids"), length, source=source)
    text = need(record, "choices", 0, "text", kind=str, source=source)
    drafting, path = None, ("metrics", "speculative_decoding")
    if find(record, *path) is not None:
        names = ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens")
        counted = (count(record, *path, name, source=source) for name in names)
        drafting = _drafting(max(length - 1, 0), *counted)
    return ServedAnswer(text, tokens, length, drafting, seconds)


def _drafting(committed: int, drafts: int, kept: int, drafted: int) -> Drafting:
    """From what vLLM counts."""
    # A step without a draft commits a token as well, and is counted nowhere.
    return Drafting(max(drafts, committed - kept), drafted)


def _counters(server: Server) -> Mapping[str, float] | None:
    """vLLM's counters of all that it has served; None where they are not told."""
    if server.model is None:
        return None
    _, said = fetch(f"{server.url}/metrics", server.timeout)
    counters: dict[str, float] = defaultdict(float)
    for name, value in COUNTER.findall(said.decode("utf-8", "replace")):
        counters[name] += float(value)  # engines have a line each
    return counters if COUNTERS[0] in counters else None


def _drafting_of_set(
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    answers: Sequence[ServedAnswer],
) -> Drafting:
    """From vLLM's counters before and after all answers."""
    if before is None or after is None:
        raise InputError("tells verifications neither of a request nor, as vLLM, at /metrics")
    drafts, kept, drafted, generated = (int(after[name] - before[name]) for name in COUNTERS)
    length = sum(answer.length for answer in answers)
    if generated != length:
        raise InputError(
            f"/metrics counted {generated} tokens, these answers have {length}; ask it alone"
        )
    return _drafting(sum(answer.committed for answer in answers), drafts, kept, drafted)


def _name(name: str, info: Mapping[str, Any]) -> str:
    """A server's name with its version; both are its own words."""
    version = info.get("version")
    words = f"{name} {version}" if isinstance(version, str) else name
    return printable(words[:NAME_CHARACTERS])


def _token_ids(ids: Any, length: int, *, source: str) -> np.ndarray | None:
    """The last `length` ids of a list, int32 [length]; None for None."""
    if ids is None:
        return None
    valid = isinstance(ids, list) and all(type(one) is int and 0 <= one < 2**31 for one in ids)
    if not valid or len(ids) < length:
        raise InputError(f"{source}: expected {length} token ids, found {shown(ids)}")
    return np.array(ids[len(ids) - length :], np.int32)
