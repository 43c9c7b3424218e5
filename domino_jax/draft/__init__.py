"""The draft model.

Axis letters, used in einsum strings and shape comments: B batch, S context length, N anchor slots, K block size,
M predicting positions of a block (K with `shift_label`, else K - 1), D hidden width, V vocabulary, G GRU width,
R low-rank width, C captured target layers, H query heads, KV key-value heads.
"""
