"""The tokenizer of a GGUF file: a wrong split of the text gives other tokens, and no error.

So the vocabulary, the merges and the rule that splits text into words become a tokenizer.json, and
a file that names a rule not known here is refused.
"""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from domino_jax.base.errors import InputError, shown
from domino_jax.formats.gguf import GgufSource

# The pre-tokenizers that the model families publish in their tokenizer.json: GGUF has only their
# names. Only the runs of digits differ.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _WORDS.format(digits=r"\p{N}{1,3}"),
    "qwen2": _WORDS.format(digits=r"\p{N}"),
}
_PRE_TOKENIZERS = ("smollm", *_SPLITS)


def gguf_tokenizer(source: GgufSource, vocab_size: int) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file describes, with its special tokens."""
    import gguf

    model = source.metadata.get("tokenizer.ggml.model")
    pre = source.metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"{source.path}: tokenizer {shown(model)} with pre-tokenizer {shown(pre)}; "
            f"supported: 'gpt2' with {', '.join(_PRE_TOKENIZERS)}"
        )
    if source.metadata.get("tokenizer.ggml.add_eos_token"):
        raise InputError(f"{source.path}: tokenizer.ggml.add_eos_token is True; supported: False")
    tokens = source.entries("tokenizer.ggml.tokens", str)
    types = source.entries("tokenizer.ggml.token_type", int)
    if len(types) != vocab_size:
        raise InputError(
            f"{source.path}: {vocab_size} tokens but {len(types)} entries of "
            "tokenizer.ggml.token_type"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in source.entries("tokenizer.ggml.merges", str)]
    # Padding of the embedding matrix is not a word of the language.
    vocabulary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != gguf.TokenType.UNUSED
    }
    try:
        # No unknown token: a byte that the vocabulary lacks vanishes, as with the published
        # tokenizers. Llama 3's takes a word whole that no merge reaches.
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust library raises plain Exception
        raise InputError(
            f"{source.path}: tokenizer.ggml.merges do not fit the tokens: {error}"
        ) from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    words: pre_tokenizers.PreTokenizer
    if pre == "smollm":
        words = pre_tokenizers.Digits(individual_digits=True)
    else:
        words = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
    # GPT-2's pattern, which ByteLevel has, would cut words again that are cut already.
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    bos = source.token("bos")
    # Files of Llama 3 need not say that a text begins with bos: llama.cpp adds it there.
    if source.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and bos is not None:
        if bos not in vocabulary:
            raise InputError(f"{source.path}: the bos token {shown(bos)} is of the unused type")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def tokenizer_config(source: GgufSource) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens and the chat template."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = {key: source.token(role) for key, role in roles.items()}
    architecture = source.metadata["general.architecture"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.need(f"{architecture}.context_length", int),
        "clean_up_tokenization_spaces": False,
        **tokens,
        "chat_template": source.optional("tokenizer.chat_template", str),
    }
    return {key: value for key, value in config.items() if value is not None}


def token_ids(source: GgufSource) -> dict[str, int]:
    """The ids of the special tokens, under the names of config.json; absent ones are left out."""
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: source.token_id(role) for key, role in roles.items()}
    return {key: index for key, index in ids.items() if index is not None}
