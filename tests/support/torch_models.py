"""Tiny random Llama and Qwen models made by transformers, saved as directories or GGUF files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MIXTURE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
# Classes, and what a kind has beside the settings that all share. The scaled ones were "pretrained"
# on 16 positions.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope": LLAMA3 | {"original_max_position_embeddings": 16}},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3_yarn": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"rope": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MIXTURE),
    "qwen3_moe_raw": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MIXTURE | {"norm_topk_prob": False}),
}

SPECIAL = ("<unk>", "<bos>", "<eos>", "<think>", "[PAD4]")
TYPES = (2, 3, 3, 4, 5)  # GGUF's unknown, control, control, user-defined, unused
VOCABULARY = 352
CORPUS = (
    "Hello world, it's twelve o'clock, we'll see. "
    "The hello of the world don't they'll say, I'm sure they DON'T.",
    "def f(x: int) -> str:\n    return f'{x!r}' if x else None\n\n\nclass Hello:\n\treturn 1",
    "12 123 345 45 34.14159 caf\u00e9 na\u00efve "
    "\u65e5\u672c\u8a9e \u041f\u0440\u0438\u0432\u0435\u0442",
)


class Tiny(NamedTuple):
    """A torch model in float32 and the directory that `save_pretrained` made of it."""

    model: Any
    directory: Path


def make_tiny(kind: str, *, tied: bool) -> Any:
    """A random model of 4 layers, its weights large enough for every part to show in the logits."""
    import torch

    torch.manual_seed(7)
    config_class, model_class, special = KINDS[kind]
    special = dict(special)
    rope = {"rope_type": "default", "rope_theta": 5000.0} | special.pop("rope", {})
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **special,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one, which would hide a missing weight
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """`tiny(kind, tied=...)`, each combination made once."""
    made: dict[tuple[str, bool], Tiny] = {}

    def get(kind: str, *, tied: bool) -> Tiny:
        if (kind, tied) not in made:
            model = make_tiny(kind, tied=tied)
            directory = tmp_path_factory.mktemp(f"{kind}_{'tied' if tied else 'untied'}")
            model.save_pretrained(directory)
            made[kind, tied] = Tiny(model, directory)
        return made[kind, tied]

    return get


LAYER_PARTS = {
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def trained_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE, after the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    return [*SPECIAL, *tokens], [" ".join(merge) for merge in state["merges"]]


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    name = name.removesuffix(".weight")
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    part = LAYER_PARTS.get(part) or re.sub(
        r"(self_attn|mlp)\.(\w+?)(_proj|_norm)", _gguf_part, part
    )
    return f"blk.{layer}.{part}.weight"


def _gguf_part(match: re.Match[str]) -> str:
    block = {"self_attn": "attn", "mlp": "ffn"}[match[1]]
    return f"{block}_{match[2]}{'_norm' if match[3] == '_norm' else ''}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows reordered as llama.cpp's convert_hf_to_gguf.py does for Llama, in plain loops."""
    rows, half = [], weight.shape[0] // heads // 2
    for head in range(heads):
        for pair in range(half):
            rows += [head * 2 * half + pair, head * 2 * half + half + pair]
    return weight[rows]


def gguf_metadata(config: Any, vocabulary: tuple[list[str], list[str]]) -> dict[str, Any]:
    """The keys that llama.cpp writes for a model with a byte-level BPE."""
    kind, (tokens, merges) = config.model_type, vocabulary
    return {
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.key_length": config.head_dim,
        f"{kind}.attention.value_length": config.head_dim,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*TYPES, *[1] * (len(tokens) - len(TYPES))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": (
            "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>\n{% endfor %}"
        ),
    }


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The weights as llama.cpp names and orders them."""
    config, arrays = model.config, {}
    for name, tensor in model.named_parameters():
        name, array = gguf_name(name), tensor.detach().numpy()
        if config.model_type == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            array = interleaved(array, heads)
        arrays[name] = array
    return arrays


def write_gguf(
    path: Path,
    model: Any,
    vocabulary: tuple[list[str], list[str]],
    *,
    pre: str = "smollm",
    quantised: Any = None,
    metadata: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: tensors,
) -> Path:
    """Writes a tiny model the way llama.cpp does; `metadata` overrides keys (None drops one)."""
    import gguf

    writer = gguf.GGUFWriter(path, arch=model.config.model_type)
    values = gguf_metadata(model.config, vocabulary) | {"tokenizer.ggml.pre": pre}
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in (values | (metadata or {})).items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, array in tensors(gguf_tensors(model)).items():
        if quantised is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of the GGUF files that `tiny_gguf` writes."""
    tokens, merges = trained_vocabulary()
    assert len(tokens) == VOCABULARY
    return tokens, merges


@pytest.fixture
def tiny_gguf(
    tiny: Callable[..., Tiny], vocabulary: tuple[list[str], list[str]], tmp_path: Path
) -> Callable[..., Path]:
    """`tiny_gguf(kind, tied=...)` writes the tiny model as `tiny.gguf`.

    Other options are those of `write_gguf`.
    """

    def write(kind: str, *, tied: bool = True, **options: Any) -> Path:
        return write_gguf(
            tmp_path / "tiny.gguf", tiny(kind, tied=tied).model, vocabulary, **options
        )

    return write
