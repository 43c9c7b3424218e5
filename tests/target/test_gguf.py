"""GGUF conversion of tiny files: the model comes back, everything else is one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from directories import leftovers
from tiny import Heard, Interrupted
from transformers import AutoModelForCausalLM

from domino_jax.base.errors import InputError
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import Target, lm_head_weight
from domino_jax.target.gguf import convert_gguf
from domino_jax.target.load import load_target


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
    same = ("vocab_size", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    for key in (*same, "max_position_embeddings"):
        assert getattr(again.config, key) == getattr(model.config, key), key
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)
    tokens = np.arange(20, dtype=np.int32)[None] * 7
    loaded = load_target(directory)
    out = Target(loaded.config).apply({"params": loaded.params}, tokens)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits
    logits = vocabulary_logits(out.hidden, lm_head_weight(loaded.params))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    written = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert leftovers(directory) == [*written, "tokenizer_config.json"]
    assert leftovers(tmp_path / "deep")[0] == "model" and len(list(directory.parent.iterdir())) == 1


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
    convert_gguf(tiny_gguf("llama"), tmp_path / "model", reporter=Heard(lines=lines))
    assert lines[0] == "reading tiny.gguf"
    assert lines[-2:] == ["converting tensor 38/38", f"writing {tmp_path / 'model'}"]
    assert "converting tensor 4/38" in lines and len(lines) < 15


METADATA = [
    ("general.architecture", "gemma3", "architecture 'gemma3'; supported: llama, qwen3"),
    ("llama.rope.scaling.type", "yarn", "scaling.type is 'yarn'; supported: 'none'"),
    ("llama.rope.scaling.factor", 4.0, "llama.rope.scaling.factor is 4.0; supported: 0"),
    ("llama.expert_count", 8, "llama.expert_count is 8; supported: 0"),
    ("llama.rope.dimension_count", 8, "llama.rope.dimension_count is 8; supported: 16"),
    ("llama.context_length", None, "llama.context_length is 'missing'; a model needs it"),
    ("llama.attention.head_count", [4, 4], "head_count is [4, 4]; a model needs it"),
    ("tokenizer.ggml.model", "llama", "tokenizer 'llama' with pre-tokenizer 'smollm'; supported"),
    ("tokenizer.ggml.pre", "tekken", "'tekken'; supported: 'gpt2' with smollm, llama-bpe"),
    ("tokenizer.ggml.add_eos_token", True, "add_eos_token is True; supported: False"),
    ("tokenizer.ggml.token_type", [1, 1], "tokens but 2 entries of tokenizer.ggml.token_type"),
    ("tokenizer.ggml.merges", ["zz qq"], "tokenizer.ggml.merges do not fit the tokens"),
    ("tokenizer.ggml.bos_token_id", 9999, "bos_token_id 9999 is outside the"),
    ("llama.block_count", 9999, "config.json describes"),
    ("llama.block_count", 2**31, "num_hidden_layers must be at most 10000"),
    ("llama.embedding_length", "32", "embedding_length is '32'; a model needs it as int"),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "is nan; expected a finite number"),
    ("llama.rope.freq_base", "x", "rope.freq_base is 'x'; a model needs it as float"),
    ("tokenizer.ggml.eos_token_id", "2", "eos_token_id is '2'; a model needs it as int"),
    ("tokenizer.ggml.tokens", [1, 2], "tokens holds 1; expected str"),
    ("tokenizer.ggml.merges", [1], "merges holds 1; expected str"),
    ("tokenizer.ggml.token_type", ["1"], "token_type holds '1'; expected int"),
    ("tokenizer.chat_template", 3, "chat_template is 3; a model needs it as str"),
]
UP = "blk.1.ffn_up.weight"
TENSORS = [
    (UP, None, "missing tensor: model.layers.1.mlp.up_proj.weight; expected 38"),
    ("rope_freqs.weight", np.ones(8, np.float32), "tensor rope_freqs.weight is not"),
    ("blk.0.attn_q.weight", np.ones((7, 32), np.float32), "has shape [7, 32]"),
    ("output_norm.weight", np.ones(7, np.float32), "model.norm.weight has shape [7]"),
    ("output_norm.weight", np.ones(32, np.int8), "tensor output_norm.weight: Dequant"),
]


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        convert_gguf(path, path.parent / "model")
    assert message in str(caught.value) and str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert leftovers(path.parent) == ["tiny.gguf"]


@pytest.mark.parametrize(("key", "value", "message"), METADATA)
def test_convert_gguf_refuses_metadata(
    tiny_gguf: Callable[..., Path], key: str, value: Any, message: str
) -> None:
    assert_refused(tiny_gguf("llama", metadata={key: value}), message)


@pytest.mark.parametrize(("name", "values", "message"), TENSORS)
def test_convert_gguf_refuses_tensors(
    tiny_gguf: Callable[..., Path], name: str, values: Any, message: str
) -> None:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        changed = tensors | {name: values}
        return {key: array for key, array in changed.items() if array is not None}

    assert_refused(tiny_gguf("llama", tensors=change), message)


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
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, reporter=Heard(lines=said))
    assert not said  # before the file is read
    with pytest.raises(NotADirectoryError, match=r"tiny.gguf/model'$"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny.gguf" / "model")
    assert leftovers(tmp_path) == ["cut.gguf", "text.gguf", "tiny.gguf"]


def test_convert_gguf_leaves_nothing_when_interrupted(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class Looking(Interrupted):
        def say(self, line: str) -> None:
            if line.startswith(self.at):
                assert len(leftovers(tmp_path)) > 2  # config and tokenizer are written beside
            super().say(line)

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tiny_gguf("llama"), tmp_path / "model", reporter=Looking(at="writing"))
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
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
