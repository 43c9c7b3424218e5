"""Answers for a prompt file, however often it is begun, and text that streams."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import SWITCHED_TEMPLATE, TEMPLATE, Interrupted, quiet, write_conversations, write_target

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.progress import Reporter
from domino_jax.data.forms import read_conversations
from domino_jax.data.prompt import encode_prompt, stop_token_ids
from domino_jax.data.template import NO_KWARGS
from domino_jax.datagen.regenerate import AnswerSettings, Regenerated, regenerate
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import TextStream, generate, stream_answer
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target, load_tokenizer

SETTINGS = AnswerSettings(
    target="tiny",
    max_new_tokens=12,
    temperature=0.0,
    top_k=None,
    top_p=None,
    seed=0,
    dtype="float32",
    batch_size=4,
    chat_template_kwargs={},
)
CACHE_LEN = 128  # one length, one program


class Tiny:
    def __init__(self, directory: Path, *, template: str = TEMPLATE) -> None:
        loaded = load_target(write_target(directory, template=template))
        self.tokenizer = load_tokenizer(directory)
        self.decoder = make_decoder(Target(loaded.config), stop_ids=stop_token_ids(self.tokenizer))
        self.weights = Weights(loaded.params)

    def answer_alone(self, messages: Any, count: int = 12, kwargs: Scalars = NO_KWARGS) -> str:
        prompt = encode_prompt(messages, self.tokenizer, kwargs)
        (answer,) = generate(
            self.decoder, self.weights, [prompt], max_new_tokens=count, cache_len=CACHE_LEN
        )
        return self.tokenizer.decode(answer.tokens, skip_special_tokens=True)

    def regenerate(
        self,
        prompts: Path,
        answers: Path,
        settings: AnswerSettings = SETTINGS,
        reporter: Reporter = quiet(),  # noqa: B008  (it holds nothing)
    ) -> Regenerated:
        return regenerate(
            prompts,
            answers,
            decoder=self.decoder,
            weights=self.weights,
            tokenizer=self.tokenizer,
            settings=settings,
            reporter=reporter,
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("target"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_conversations(tmp_path / "prompts.jsonl", 10, answers=False)


@pytest.mark.pitfall(
    "most answers cut at the token limit, unnoticed",
    seen="decoding/generate.py: answers that were cut not counted",
)
def test_every_prompt_gets_the_answer_it_gets_alone(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    result = tiny.regenerate(prompts, tmp_path / "answers.jsonl")
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    cut = sum(not record["finished"] for record in records)
    assert result == Regenerated(total=10, answered=10, cut=cut) and cut > 0
    asked = dict(read_conversations(prompts).conversations)
    assert sorted(record["prompt_line"] for record in records) == sorted(asked)
    for record in records:
        prompt = asked[record["prompt_line"]]
        answer = {"role": "assistant", "content": tiny.answer_alone(prompt)}
        assert record["messages"] == [*prompt, answer]
        assert record["generator"] == asdict(SETTINGS)
    assert not (tmp_path / "answers.jsonl.partial").exists()


def test_a_cut_off_start_goes_on_and_gives_the_same_file(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    whole = tiny.regenerate(prompts, tmp_path / "whole.jsonl")

    with pytest.raises(KeyboardInterrupt):
        tiny.regenerate(prompts, tmp_path / "parts.jsonl", reporter=Interrupted(at="prompts 4/10"))
    partial = tmp_path / "parts.jsonl.partial"
    batch = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join([*batch, batch[1], batch[2][:-9]]))  # killed within the next batch
    # Those that the first start cut count as well.
    assert tiny.regenerate(prompts, tmp_path / "parts.jsonl") == replace(whole, answered=6)
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def attested(lines: bytes) -> bytes:
    """An unfinished file of answers with these lines."""
    begin = b'{"sha256": "%s"}\n'
    content = begin % hashlib.sha256().hexdigest().encode() + lines
    return content + begin % hashlib.sha256(content).hexdigest().encode()


def test_what_would_mix_or_lose_answers_is_refused(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    done = tmp_path / "done.jsonl"
    done.write_text("{}\n")
    with pytest.raises(InputError, match="already there"):
        tiny.regenerate(prompts, done)
    prompts.write_text(prompts.read_text() + "nonsense\n")
    with pytest.raises(InputError, match=r"prompts\.jsonl:11"):
        tiny.regenerate(prompts, tmp_path / "bad.jsonl")


PROMPTED = {"messages": [], "prompt_line": 1, "finished": True, "generator": asdict(SETTINGS)}
ANOTHER = [{"role": "user", "content": "x"}] * 2
OTHER_PARTIALS = [
    (b"\xff", "not valid JSON"),
    (b"[1]", "not an answer of `domino regenerate`"),
    (b"[" * 99_999, "more than 64 levels"),
    (b"\0", "not valid JSON"),
    ({"generator": None}, "not an answer"),
    ({"generator": {}}, "made with"),
    ({"prompt_line": "1"}, "not an answer"),
    ({"prompt_line": True}, "not an answer"),
    ({"finished": 1}, "not an answer"),
    ({"messages": None}, "not an answer"),
    ({"messages": ANOTHER}, "answers another prompt than line 1 of"),
    ({"messages": [1], "prompt_line": 11}, "answers another prompt than line 11 of"),
    # With a temperature an answer depends on the batch that it is drawn in.
    ({"generator": {**asdict(SETTINGS), "batch_size": 2}}, "made with .*'batch_size': 2.*, not"),
]


@pytest.mark.parametrize(("line", "message"), OTHER_PARTIALS)
def test_a_partial_file_of_something_else_is_refused_and_left(
    tiny: Tiny, prompts: Path, tmp_path: Path, line: Any, message: str
) -> None:
    raw = line if isinstance(line, bytes) else json.dumps({**PROMPTED, **line}).encode()
    partial = tmp_path / "a.jsonl.partial"
    for content, told in (
        (attested(raw + b"\n"), rf":2: .*{message}"),
        (raw + b"\n", ": not unfinished answers as this version"),
    ):
        partial.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.jsonl\.partial{told}"):
            tiny.regenerate(prompts, tmp_path / "a.jsonl")
        assert partial.read_bytes() == content


def test_an_answer_twice_in_a_partial_file_is_refused(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    asked = dict(read_conversations(prompts).conversations)[1]
    answer = {**PROMPTED, "messages": [*asked, {"role": "assistant", "content": "a"}]}
    line = json.dumps(answer).encode() + b"\n"
    (tmp_path / "b.jsonl.partial").write_bytes(attested(line * 2))
    message = "partial:3: the prompt of line 1 is answered twice; remove"
    with pytest.raises(InputError, match=message):
        tiny.regenerate(prompts, tmp_path / "b.jsonl")


def test_a_prompt_beyond_the_targets_positions_is_refused(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    with prompts.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "a " * 200}]}) + "\n")
    message = r"prompts\.jsonl:11: a prompt of \d+ tokens, the target has 128 positions"
    with pytest.raises(InputError, match=message):
        tiny.regenerate(prompts, tmp_path / "new" / "a.jsonl")
    assert not (tmp_path / "new").exists()


def test_answers_record_what_the_template_was_told(tmp_path: Path, prompts: Path) -> None:
    tiny = Tiny(tmp_path, template=SWITCHED_TEMPLATE)
    told = {"enable_thinking": False}
    settings = replace(SETTINGS, chat_template_kwargs=told)
    answers, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    tiny.regenerate(prompts, answers, settings=settings)
    lines = answers.read_text().splitlines(keepends=True)
    assert all(json.loads(line)["generator"] == asdict(settings) for line in lines)
    first = json.loads(lines[0])
    assert first["messages"][-1]["content"] == tiny.answer_alone(first["messages"][:1], kwargs=told)
    assert first["messages"][-1]["content"] != tiny.answer_alone(first["messages"][:1])
    partial.write_bytes(attested("".join(lines[:4]).encode()))
    answers.unlink()
    for other in ({}, {"enable_thinking": 0}):
        with pytest.raises(InputError, match=r"made with .*'enable_thinking': False"):
            tiny.regenerate(
                prompts, answers, settings=replace(SETTINGS, chat_template_kwargs=other)
            )
    assert tiny.regenerate(prompts, answers, settings=settings).answered == 6
    assert answers.read_text() == "".join(lines)


def test_an_answer_knows_whether_it_stopped(tiny: Tiny, prompts: Path) -> None:
    conversations = read_conversations(prompts).conversations
    ids = [encode_prompt(messages, tiny.tokenizer) for _, messages in conversations]
    answers = generate(tiny.decoder, tiny.weights, ids, max_new_tokens=40, cache_len=CACHE_LEN)
    for answer in answers:
        assert answer.stopped == (answer.tokens[-1] == tiny.tokenizer.eos_token_id)
        assert answer.stopped or len(answer.tokens) == 40
        assert tiny.tokenizer.eos_token_id not in answer.tokens[:-1]
        assert answer.tau == pytest.approx(1.0) and answer.tokens_per_second > 0


def test_streamed_pieces_join_to_the_whole_text(tiny: Tiny) -> None:
    pieces: list[str] = []
    messages = [{"role": "user", "content": "a b c d"}]
    prompt = encode_prompt(messages, tiny.tokenizer)
    text = TextStream(tiny.tokenizer, lambda piece, _: pieces.append(piece))
    answer = stream_answer(
        tiny.decoder, tiny.weights, prompt, max_new_tokens=20, show=text.show, seed=0
    )
    text.end(answer.tokens, answer.drafted)
    assert "".join(pieces) == tiny.answer_alone(messages, 20)
    assert len([piece for piece in pieces if piece]) > 2
    whole = tiny.tokenizer.decode(np.asarray(answer.tokens), skip_special_tokens=True)
    assert "".join(pieces) == whole
