"""Answers for a prompt file, however often it is begun, and text that streams."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import (
    MASK_TOKEN_ID,
    SWITCHED_TEMPLATE,
    TEMPLATE,
    Interrupted,
    quiet,
    write_conversations,
    write_target,
)

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.progress import Bar, Reporter
from domino_jax.data.conversations import load_rows
from domino_jax.data.forms import read_conversations
from domino_jax.data.prompt import Prompts, encode_prompt, stop_token_ids
from domino_jax.data.template import NO_KWARGS, tokenizer_record
from domino_jax.datagen import regenerate as datagen_regenerate
from domino_jax.datagen.regenerate import AnswerSettings, Regenerated, read_dialogues, regenerate
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import Answer, TextStream, generate, stream_answer
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.training.inputs import RowSettings, read_rows

SETTINGS = AnswerSettings(
    target="tiny",
    turns="all",
    max_new_tokens=12,
    temperature=0.0,
    top_k=None,
    top_p=None,
    seed=0,
    dtype="float32",
    batch_size=4,
    chat_template_kwargs={},
)
PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"
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
        return self.tokenizer.decode(answer.tokens[: len(answer.tokens) - answer.stopped])

    def regenerate(
        self,
        prompts: Path,
        answers: Path,
        settings: AnswerSettings = SETTINGS,
        reporter: Reporter = quiet(),  # noqa: B008  (it holds nothing)
    ) -> Regenerated:
        dialogues = read_dialogues(
            prompts, self.decoder, self.tokenizer, settings=settings, reporter=reporter
        )
        return regenerate(
            dialogues,
            answers,
            source=prompts,
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
    header, *records = written(tmp_path / "answers.jsonl")
    assert header["generator"] == asdict(SETTINGS) | tokenizer_record(tiny.tokenizer)
    assert {"transformers", "tokenizers"} <= header["versions"].keys()
    cut = sum(record["finish_reason"] == "length" for record in records)
    assert (result.total, result.answered, result.cut, result.left_out) == (10, 10, cut, 0)
    assert cut > 0
    asked = {each.line: each.messages for each in read_conversations(prompts).conversations}
    assert sorted(record["prompt_line"] for record in records) == sorted(asked)
    for record in records:
        prompt = asked[record["prompt_line"]]
        answer = {"role": "assistant", "content": tiny.answer_alone(prompt)}
        assert record["messages"] == [*prompt, answer]
        assert record["prompt_ids"] == encode_prompt(prompt, tiny.tokenizer).tolist()
        ended = record["output_ids"][-1] == tiny.tokenizer.eos_token_id
        assert ended == (record["finish_reason"] == "stop")
    assert not (tmp_path / "answers.jsonl.partial").exists()


def test_reading_prompts_and_rows_shows_its_progress(
    tiny: Tiny, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    monkeypatch.setattr(Bar, "update", lambda self, count: done.append(count))
    read_dialogues(prompts, tiny.decoder, tiny.tokenizer, settings=SETTINGS, reporter=quiet())
    assert done == list(range(1, 11))
    done.clear()
    rows, sizes = write_conversations(tmp_path / "rows.jsonl", 5), tiny.decoder.target.cfg
    draft: Any = SimpleNamespace(
        vocab_size=sizes.vocab_size, max_position_embeddings=128, mask_token_id=MASK_TOKEN_ID
    )
    settings = RowSettings(max_length=64, chat_template_kwargs={}, mask_reasoning_content=False)
    limits = {"max_unusable": 0.0, "special_tokens": "allow", "packing": False, "end_ids": ()}
    read_rows(str(rows), tiny.tokenizer, settings, draft=draft, reporter=quiet(), **limits)
    assert done == list(range(1, 6))


def test_a_cut_off_start_goes_on_and_gives_the_same_file(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    whole = tiny.regenerate(prompts, tmp_path / "whole.jsonl")

    with pytest.raises(KeyboardInterrupt):
        tiny.regenerate(prompts, tmp_path / "parts.jsonl", reporter=Interrupted(at="answers 4/10"))
    partial = tmp_path / "parts.jsonl.partial"
    batch = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join([*batch, batch[3], batch[4][:-9]]))  # killed within the next batch
    # Those that the first start cut count as well.
    resumed = tiny.regenerate(prompts, tmp_path / "parts.jsonl")
    assert replace(resumed, retokenised=0) == replace(whole, answered=6, retokenised=0)
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def attested(*batches: bytes) -> bytes:
    """An unfinished file of answers with these batches of lines."""
    content = b""
    for lines in (b"", *batches):
        content += lines
        content += b'{"sha256": "%s"}\n' % hashlib.sha256(content).hexdigest().encode()
    return content


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


PROMPTED = {"messages": [], "prompt_line": 1, "finish_reason": "stop"}
ANOTHER = [{"role": "user", "content": "x"}] * 2
OTHER_PARTIALS = [
    (b"\xff", "not UTF-8"),
    (b"[1]", "not an answer of `domino regenerate`"),
    (b"[" * 99_999, "more than 64 levels"),
    (b"\0", "not valid JSON"),
    ({"prompt_line": "1"}, "not an answer"),
    ({"prompt_line": True}, "not an answer"),
    ({"finish_reason": "tired"}, "not an answer"),
    ({"messages": None}, "not an answer"),
    ({"messages": ANOTHER}, "answers another prompt than line 1 of"),
    ({"messages": [1]}, "not an answer"),
    ({"messages": ANOTHER, "prompt_line": 11}, "answers another prompt than line 11 of"),
]


def header_line(tokenizer: Any, **changed: Any) -> bytes:
    generator = asdict(SETTINGS) | tokenizer_record(tokenizer) | changed
    return json.dumps({"generator": generator}).encode() + b"\n"


@pytest.mark.parametrize(("line", "message"), OTHER_PARTIALS)
def test_a_partial_file_of_something_else_is_refused_and_left(
    tiny: Tiny, prompts: Path, tmp_path: Path, line: Any, message: str
) -> None:
    raw = line if isinstance(line, bytes) else json.dumps({**PROMPTED, **line}).encode()
    partial = tmp_path / "a.jsonl.partial"
    for content, told in (
        (attested(header_line(tiny.tokenizer), raw + b"\n"), rf":4: .*{message}"),
        (raw + b"\n", ": not unfinished answers as this version"),
    ):
        partial.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.jsonl\.partial{told}"):
            tiny.regenerate(prompts, tmp_path / "a.jsonl")
        assert partial.read_bytes() == content


def test_an_answer_twice_in_a_partial_file_is_refused(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    asked = read_conversations(prompts).conversations[0].messages
    answer = {**PROMPTED, "messages": [*asked, {"role": "assistant", "content": "a"}]}
    line = json.dumps(answer).encode() + b"\n"
    content = attested(header_line(tiny.tokenizer), line * 2)
    (tmp_path / "b.jsonl.partial").write_bytes(content)
    message = "partial:5: an answer of `domino regenerate` that the file has already; remove"
    with pytest.raises(InputError, match=message):
        tiny.regenerate(prompts, tmp_path / "b.jsonl")


# With a temperature an answer depends on its batch.
@pytest.mark.parametrize("changed", [{"batch_size": 2}, {"vocabulary": "0" * 64}])
def test_a_partial_file_of_other_settings_is_refused(
    tiny: Tiny, prompts: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    partial = tmp_path / "c.jsonl.partial"
    for lines, message in (
        (header_line(tiny.tokenizer, **changed), f"partial:2: made with .*{next(iter(changed))}.*"),
        (b'{"generator": 1}\n', "partial:2: not the header of a file of an answer"),
        (json.dumps(PROMPTED).encode() + b"\n", "partial:2: not the header of a file"),
    ):
        partial.write_bytes(attested(lines))
        with pytest.raises(InputError, match=message):
            tiny.regenerate(prompts, tmp_path / "c.jsonl")
        assert partial.read_bytes() == attested(lines)


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
    assert json.loads(lines[0])["generator"]["chat_template_kwargs"] == told
    first = json.loads(lines[1])
    assert first["messages"][-1]["content"] == tiny.answer_alone(first["messages"][:1], kwargs=told)
    assert first["messages"][-1]["content"] != tiny.answer_alone(first["messages"][:1])
    partial.write_bytes(attested(lines[0].encode(), "".join(lines[1:5]).encode()))
    answers.unlink()
    for other in ({}, {"enable_thinking": 0}):
        with pytest.raises(InputError, match=r"made with .*'enable_thinking': False"):
            tiny.regenerate(
                prompts, answers, settings=replace(SETTINGS, chat_template_kwargs=other)
            )
    assert tiny.regenerate(prompts, answers, settings=settings).answered == 6
    assert answers.read_text() == "".join(lines)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = said("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
OTHERS = [
    [user("a b"), said("another model"), user("c d"), said("another model")],
    [user("d e"), said("one"), said("two"), user("f")],
    [user("a"), CALL, {"role": "tool", "content": "g"}, user("b")],
    [{"role": "system", "content": "h"}, user("a b c")],
]


@pytest.mark.parametrize("turns", ["all", "last"])
def test_conversations_are_answered_turn_by_turn(tiny: Tiny, tmp_path: Path, turns: str) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"messages": each}) + "\n" for each in OTHERS))
    result = tiny.regenerate(prompts, answers, replace(SETTINGS, turns=turns, max_new_tokens=6))
    records = written(answers)[1:]
    texts = {
        line: [r["messages"] for r in records if r["prompt_line"] == line] for line in range(1, 5)
    }
    assert (result.total, len(records)) == ((6, 6) if turns == "all" else (4, 4))
    # A call of a tool stays, since its result belongs to it.
    expected = {
        "all": [["user"], ["user", "assistant", "user"]],
        "last": [["user", "assistant", "user"]],
    }[turns]
    roles = [[message["role"] for message in messages[:-1]] for messages in texts[1]]
    assert roles == expected
    if turns == "last":
        assert texts[1][0][1] == OTHERS[0][1] and texts[2][0][1:3] == OTHERS[1][1:3]
    else:
        assert texts[1][1][:2] == texts[1][0] and texts[2][1][:2] == texts[2][0]
    assert texts[3][0][:-1] == OTHERS[2] and texts[4][0][:-1] == OTHERS[3]
    for record in records:
        prompt, answer = record["messages"][:-1], record["messages"][-1]["content"]
        assert record["prompt_ids"] == encode_prompt(prompt, tiny.tokenizer).tolist()
        assert answer == tiny.answer_alone(prompt, 6)


def test_turns_resume_where_they_were_cut_off(tiny: Tiny, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": each}) + "\n" for each in OTHERS))
    settings = replace(SETTINGS, max_new_tokens=6, batch_size=1)
    tiny.regenerate(prompts, tmp_path / "whole.jsonl", settings)
    for done in (2, 4, 5):
        parts = tmp_path / f"parts-{done}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            tiny.regenerate(prompts, parts, settings, Interrupted(at=f"answers {done}/6"))
        assert tiny.regenerate(prompts, parts, settings).answered == 6 - done
        assert parts.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_answers_of_another_vocabulary_are_refused(
    tiny: Tiny, prompts: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    tiny.regenerate(prompts, answers)
    other = load_tokenizer(write_target(tmp_path / "other"))
    other.add_tokens(["<extra>"])
    with pytest.raises(
        InputError, match=r"answers\.jsonl:2: answers of another vocabulary: sha256"
    ):
        load_rows(answers, other, max_length=128)
    other = load_tokenizer(write_target(tmp_path / "third", template=SWITCHED_TEMPLATE))
    with pytest.raises(InputError, match=r"answers\.jsonl:2: answers of another chat template"):
        load_rows(answers, other, max_length=128)


def test_prompts_are_rendered_before_anything_is_generated(tiny: Tiny, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    template = (
        TEMPLATE + "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    )
    tokenizer = load_tokenizer(write_target(tmp_path / "target", template=template))
    lines = [{"messages": [user("a")]}, {"messages": OTHERS[0]}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        InputError, match=r"prompts\.jsonl:2: the chat template refuses it: too many"
    ):
        read_dialogues(prompts, tiny.decoder, tokenizer, settings=SETTINGS, reporter=quiet())


def test_turns_beyond_the_positions_of_the_target_are_not_rendered(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = [user("a b c"), {"role": "assistant", "content": "d"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": turn * 200}) + "\n")
    rendered: list[int] = []
    before = Prompts.before

    def counted(self: Prompts, count: int) -> Any:
        rendered.append(count)
        return before(self, count)

    monkeypatch.setattr(Prompts, "before", counted)
    (dialogue,) = read_dialogues(
        prompts, tiny.decoder, tiny.tokenizer, settings=SETTINGS, reporter=quiet()
    )
    assert len(dialogue.turns) == 200
    assert 10 < len(rendered) < 40
    np.testing.assert_array_equal(
        dialogue.first_ids, encode_prompt(dialogue.turns[0], tiny.tokenizer)
    )


def test_an_answer_knows_whether_it_stopped(tiny: Tiny, prompts: Path) -> None:
    conversations = read_conversations(prompts).conversations
    ids = [encode_prompt(each.messages, tiny.tokenizer) for each in conversations]
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
    assert len([piece for piece in pieces if piece]) > 2
    whole = tiny.tokenizer.decode(np.asarray(answer.tokens), skip_special_tokens=True)
    assert "".join(pieces) == whole


@pytest.mark.slow  # a minute for each temperature
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_smollm2_are_its_generated_ids(
    smollm2: Path, tmp_path: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, tokenizer = load_target(smollm2), load_tokenizer(smollm2)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = (PROMPTS / "train.jsonl").read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:64]))
    generated = []

    def spy(*args: Any, **options: Any) -> list[Answer]:
        found = generate(*args, **options)
        pairs = zip(args[2], found, strict=True)
        generated.extend((prompt.tolist(), answer.tokens.tolist()) for prompt, answer in pairs)
        return found

    monkeypatch.setattr(datagen_regenerate, "generate", spy)
    changed = {"temperature": temperature, "max_new_tokens": 64, "batch_size": 32}
    settings = replace(SETTINGS, **changed)
    decoder = make_decoder(
        Target(loaded.config), temperature=temperature, stop_ids=stop_token_ids(tokenizer)
    )
    regenerate(
        read_dialogues(prompts, decoder, tokenizer, settings=settings, reporter=quiet()),
        answers,
        source=prompts,
        decoder=decoder,
        weights=Weights(loaded.params),
        tokenizer=tokenizer,
        settings=settings,
        reporter=quiet(),
    )
    rows = load_rows(answers, tokenizer, max_length=512).rows
    trained = [
        (row.input_ids[~row.loss_mask].tolist(), row.input_ids[row.loss_mask].tolist())
        for row in rows
    ]
    assert trained == generated and len(rows) == 64
