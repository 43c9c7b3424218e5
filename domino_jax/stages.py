"""The stages of a training step, by the names that its program carries (`jax.named_scope`).

They stand in the metadata of the compiled program, so that a trace, a plan of memory and a count of
FLOPs speak of the same parts. A stage may lie in another (`block_attention` in `backbone`): the
innermost name is the part's. Its gradient has the name too, inside `transpose(...)`.
"""

TARGET = "target"  # the frozen target's forward
CONTEXT = "context"  # fc over the target's states; the draft's keys and values of them
BACKBONE = "backbone"  # the draft's layers over the blocks
BLOCK_ATTENTION = "block_attention"  # in each of them: scores and values
HEAD = "head"  # the Domino head up to the vocabulary
VOCABULARY_LOSS = "vocabulary_loss"  # logits, base and corrected, and their losses
UPDATE = "update"  # norm of the gradient, optimiser, average

STAGES = (TARGET, CONTEXT, BACKBONE, BLOCK_ATTENTION, HEAD, VOCABULARY_LOSS, UPDATE)
