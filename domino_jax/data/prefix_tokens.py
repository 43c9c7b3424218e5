"""Token ids of texts that repeat the beginning of the text before, as the prompts of turns do.

A text of a thousand turns need not be tokenised a thousand times. A tokenizer splits a text at its
special tokens first and treats the parts alone, so ids before such a token are those of the earlier
text wherever both texts are alike around it:

    before   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    now      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello.<|im_end|>\\n ...
             ids of the text before            | tokenised from the last special token that is
                                               | followed by as many equal characters as the
                                               | longest added token has
"""

from typing import Any

import numpy as np

BLOCKS = (4096, 64)  # characters that two texts are compared by, first and then


def tokenize(text: str, tokenizer: Any) -> np.ndarray:
    """The ids of rendered text, int32 [n]."""
    # The template wrote the special tokens; verbose would warn of long rows, which are cut later.
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def tokenize_with_spans(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text, int32 [n], and the characters of each token, int64 [n, 2]."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), spans


def shared_length(text: str, before: str) -> int:
    """A number of characters that two texts begin with alike, at most 63 short of all of them."""
    shared = 0
    for size in BLOCKS:
        block = text[shared : shared + size]
        while len(block) == size and before.startswith(block, shared):
            shared += size
            block = text[shared : shared + size]
    return shared


class PrefixTokens:
    """Tokenises texts one after the other, each from where it differs from the one before."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes a transformers fast tokenizer."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._margin = max((len(token.content) for token in added.values()), default=0)
        # Text of each token that splits a text wherever it occurs. Others depend on what the
        # normalizer makes of the text around them, or on the characters beside them.
        self._splits = {
            id: token.content
            for id, token in added.items()
            if token.special and not (token.normalized or token.single_word)
        }
        if tokenizer.split_special_tokens:
            self._splits = {}
        self._text = ""
        self._ids, self._spans = np.empty(0, np.int32), np.empty((0, 2), np.int64)
        self._marks = np.empty(0, np.int64)  # indices of tokens that split the text

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, int32 [n], and the character that each token ends at, int64 [n]."""
        shared = shared_length(text, self._text)
        # A longer token may begin where a special one does, and end behind the shared text.
        ends = self._spans[self._marks, 1] + self._margin
        known = self._marks[ends <= shared]
        keep = int(known[-1]) if len(known) else 0
        begin = int(self._spans[keep, 0]) if keep else 0
        ids, spans = tokenize_with_spans(text[begin:], self._tokenizer)
        if keep and (not len(ids) or ids[0] != self._ids[keep]):
            keep, begin = 0, 0
            ids, spans = tokenize_with_spans(text, self._tokenizer)
        spans += begin
        special = np.flatnonzero(np.isin(ids, list(self._splits)))
        # An unknown character may have the id of a special token, and splits no text.
        marks = [
            keep + at for at in special if self._splits[int(ids[at])] in text[slice(*spans[at])]
        ]
        kept = self._marks[self._marks < keep]
        self._marks = np.concatenate([kept, np.array(marks, np.int64)])
        self._ids = np.concatenate([self._ids[:keep], ids])
        self._spans = np.concatenate([self._spans[:keep], spans])
        self._text = text
        return self._ids, self._spans[:, 1]
