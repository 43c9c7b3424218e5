"""Tokenizers of a directory, and files that lead out of it."""

import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from chats import make_tokenizer
from tiny import write_target

from domino_jax.base.errors import InputError
from domino_jax.formats.safetensors import open_safetensors
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.load import load_tokenizer


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_links_out_of_a_target_and_pipes_are_refused(
    smollm2: Path, tmp_path: Path, name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in smollm2.iterdir():
        if path.suffix == ".json":
            (model / path.name).write_bytes(path.read_bytes())
    (model / name).unlink(missing_ok=True)

    def read() -> None:
        if name == "model.safetensors":
            open_safetensors(model)
        read_decoder_config(model, dtype="float32")
        load_tokenizer(model)

    (model / name).symlink_to(smollm2 / "config.json")
    with pytest.raises(InputError, match=f"{name}: a link out of its directory"):
        read()
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(InputError, match=f"{name}: not a regular file|no {name}"):
        read()


def with_settings(model: Path, **settings: Any) -> Path:
    """A target whose tokenizer_config.json has these settings."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return model


def test_a_tokenizer_that_cannot_encode_is_refused(tmp_path: Path) -> None:
    model = with_settings(write_target(tmp_path), model_max_length="x")
    with pytest.raises(InputError, match="the tokenizer cannot be read: '>' not supported"):
        load_tokenizer(model)


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    """By its class transformers may build another one than tokenizer.json holds."""
    make_tokenizer().save_pretrained(tmp_path)
    model = with_settings(tmp_path, tokenizer_class="LlamaTokenizerFast")
    assert load_tokenizer(model)("a b", add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError) as caught:
        load_tokenizer(with_settings(model, tokenizer_class="Qwen2Tokenizer"))
    found = rf"^{tmp_path}: transformers {version('transformers')} reads \"One two  three\\n.* end"
    found += r"\.\" as 58 ids, \[[\d, ]+\] from number 18 on; tokenizers "
    found += rf"{version('tokenizers')} reads tokenizer\.json as 57, \[[\d, ]+\]; use transformers"
    assert re.match(found, str(caught.value)), caught.value


def test_a_tokenizer_file_that_cuts_or_pads_text_is_read_without_either(tmp_path: Path) -> None:
    model = write_target(tmp_path)
    tree = json.loads((model / "tokenizer.json").read_text())
    tree["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tree["truncation"]["direction"] = "Right"
    tree["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    tree["padding"] |= {"pad_id": 3, "pad_type_id": 0, "pad_token": "<unk>"}
    (model / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(model)
    assert len(tokenizer("a b c d", add_special_tokens=False)["input_ids"]) == 4


def test_the_default_of_several_chat_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    model = write_target(tmp_path)
    (model / "chat_template.jinja").unlink()
    assert load_tokenizer(with_settings(model, chat_template=named)).chat_template == "b"
    with pytest.raises(InputError, match=r"the tokenizer cannot be read: .*no default"):
        load_tokenizer(with_settings(model, chat_template=named[:1]))


def test_load_tokenizer_reads_a_fast_tokenizer(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.is_fast and "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json; a target needs its fast tokenizer"),
        ("tokenizer_config.json", None, "no tokenizer_config.json"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "PreTrainedTokenizerFast"}',
            "no chat template in",
        ),
        ("tokenizer.json", '{"model": 3}', "the tokenizer cannot be read: "),
    ],
)
def test_load_tokenizer_refuses(
    smollm2: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    for kept in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / kept, tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
