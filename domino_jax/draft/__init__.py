"""The draft: it reads the target's states and fills a whole block in one pass.

    blocks      which anchors are drawn, what each block holds and what it must predict
    mask        what each block sees of the context
    head        a GRU over the tokens before each prediction, and its correction of the logits
    backbone    the context's keys and values, and the layers over all blocks

Axis letters, used in einsum strings and shape comments: B batch, S context length, N anchor slots,
K block size, M predicting positions of a block (K with `shift_label`, else K - 1), D hidden width,
V vocabulary, G GRU width, R low-rank width, C captured target layers, H query heads, KV key-value
heads.
"""
