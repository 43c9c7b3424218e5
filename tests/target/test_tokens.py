"""End tokens, ids without an embedding, and the choice of a mask token."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, make_tokenizer

from domino_jax.base.errors import InputError
from domino_jax.target.load import load_tokenizer
from domino_jax.target.tokens import (
    check_vocabulary,
    choose_mask_token,
    end_token_ids,
    special_token_ids,
)


def write_ends(directory: Path, generation: Any, config: Any) -> Path:
    """A directory with these settings of generation, and `eos_token_id` in config.json."""
    (directory / "config.json").write_text(json.dumps({"vocab_size": 32, "eos_token_id": config}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.pitfall(
    "end tokens ignored, ids beyond the embedding, a mask token in use",
    seen="target/tokens.py: generation_config.json not read",
)
@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        ({}, None, ()),
        ({"eos_token_id": None}, 7, (7,)),
        ({"eos_token_id": 3}, None, (3,)),
        ({"eos_token_id": [8, 9, 31]}, 9, (8, 9, 31)),  # as Llama 3.1
        ({"eos_token_id": [8, 0]}, [8, 5, 5], (8, 0, 5)),
    ],
)
def test_end_tokens_are_those_of_both_files(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    assert end_token_ids(write_ends(tmp_path, generation, config)) == expected


@pytest.mark.parametrize(
    ("generation", "config", "file", "found"),
    [
        ({"eos_token_id": [8, 32]}, None, "generation_config.json", r"\[8, 32\]"),
        ({"eos_token_id": -1}, None, "generation_config.json", "-1"),
        ({"eos_token_id": True}, None, "generation_config.json", "True"),
        ({"eos_token_id": "8"}, None, "generation_config.json", "'8'"),
        ({"eos_token_id": [[8]]}, None, "generation_config.json", r"\[\[8\]\]"),
        ({}, 8.0, "config.json", "8.0"),
    ],
)
def test_end_tokens_outside_the_vocabulary_are_refused(
    tmp_path: Path, generation: Any, config: Any, file: str, found: str
) -> None:
    message = rf"/{file}: eos_token_id is {found}, expected an id or a list of ids in 0\.\.31 \("
    with pytest.raises(InputError, match=message):
        end_token_ids(write_ends(tmp_path, generation, config))


def test_end_tokens_are_read_from_the_target_itself(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere.json").write_text('{"eos_token_id": 3}')
    model = write_ends(tmp_path / "model", None, 8)
    (model / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match=r"generation_config\.json: a link out of its directory"):
        end_token_ids(model)
    (tmp_path / "elsewhere.json").unlink()
    with pytest.raises(InputError, match=r"generation_config\.json: No such file"):
        end_token_ids(model)
    (model / "config.json").write_text('{"vocab_size": "32"}')
    (model / "generation_config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: vocab_size is '32', expected an integer"):
        end_token_ids(model)


def test_an_id_without_an_embedding_is_named() -> None:
    tokenizer = make_tokenizer()
    (end,) = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    ids = np.array([1, end, 5, end + 7000], np.int32)
    check_vocabulary(ids, tokenizer, vocab_size=end + 7001, source="x.jsonl:4")
    for size, bad in ((end, f"token '<|im_end|>' (id {end})"), (end + 1, f"token id {end + 7000}")):
        with pytest.raises(InputError) as caught:
            check_vocabulary(ids, tokenizer, vocab_size=size, source="x.jsonl:4")
        found = f"x.jsonl:4: {bad} is outside the target's vocab_size {size}; use the tokenizer"
        assert str(caught.value).startswith(found)
    with pytest.raises(InputError, match="token id -1 is outside"):
        check_vocabulary(np.array([-1], np.int32), tokenizer, vocab_size=400, source="x")


RESERVED = ["<|reserved_special_token_1|>", "<|fim_pad|>", "<|RESERVED_2|>", "<tool>"]


@pytest.mark.parametrize(
    ("special", "room", "mask", "chosen", "reason"),
    [
        # The tokenizer's own before all others, then names, then unused ids, then any other.
        ([*RESERVED, "<mask>"], 9, "<mask>", "<mask>", "'<mask>', the tokenizer's mask token"),
        (RESERVED, 9, None, "<|RESERVED_2|>", "'<|RESERVED_2|>', a token without use"),
        (["<unused7>", "<unused8>"], 0, None, "<unused8>", "'<unused8>', a token without use"),
        (["<|fim_pad|>"], 1, None, None, r"the tokenizer's last id is \d+, vocab_size \d+"),
        (["<|fim_pad|>", "<tool>"], 0, None, "<tool>", "'<tool>', a special token without a role"),
    ],
)
def test_the_mask_token_is_chosen_in_an_order(
    special: list[str], room: int, mask: str | None, chosen: str | None, reason: str
) -> None:
    tokenizer = make_tokenizer()
    own = {} if mask is None else {"mask_token": mask}
    tokenizer.add_special_tokens({"additional_special_tokens": special, **own})
    last = max(tokenizer.get_vocab().values())
    taken = special_token_ids(tokenizer, (tokenizer.eos_token_id,))
    found = choose_mask_token(tokenizer, special_ids=taken, vocab_size=last + 1 + room)
    expected = last + 1 if chosen is None else tokenizer.convert_tokens_to_ids(chosen)
    assert found.id == expected
    assert re.fullmatch(reason.replace("|", r"\|"), found.reason), found.reason


def test_a_token_in_use_is_no_mask_token() -> None:
    """Not what ends an answer, what a role names, what the template writes, what is no special."""
    template = CHATML + "{# <|reserved_in_the_template|> #}"
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    special = ["<free>", "<|reserved_in_the_template|>", "<|reserved_end|>", "<|reserved_pad|>"]
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": special,
            "pad_token": "<|reserved_pad|>",
            "unk_token": "<|reserved_unk|>",
            "mask_token": "<|reserved_pad|>",
        }
    )
    tokenizer.add_tokens(["<think>"])
    last = max(tokenizer.get_vocab().values())
    end, free = tokenizer.convert_tokens_to_ids(["<|reserved_end|>", "<free>"])
    taken = special_token_ids(tokenizer, (tokenizer.eos_token_id, end))
    assert taken == {tokenizer.eos_token_id: "eos", end: "stop", tokenizer.pad_token_id: "pad"}
    assert choose_mask_token(tokenizer, special_ids=taken, vocab_size=last + 1).id == free
    # An unused id may be an end token too.
    also = taken | {last + 1: "stop"}
    assert choose_mask_token(tokenizer, special_ids=also, vocab_size=last + 3).id == last + 2
    with pytest.raises(InputError, match=r"draft\.mask_token_id is missing, and the tokenizer has"):
        choose_mask_token(tokenizer, special_ids=taken | {free: "stop"}, vocab_size=last + 1)
    with pytest.raises(InputError, match="give the id of a token that no row contains"):
        choose_mask_token(tokenizer, special_ids=taken, vocab_size=free)


def test_the_mask_token_of_smollm2(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    ends = end_token_ids(smollm2)
    assert ends == (2,)
    taken = special_token_ids(tokenizer, ends)
    found = choose_mask_token(tokenizer, special_ids=taken, vocab_size=49152)
    assert (found.id, found.reason) == (16, "'<empty_output>', a special token without a role")
