"""The stages of a training step, by the names that its program carries (`jax.named_scope`).

They stand in the metadata of the compiled program, so that a trace, a plan of memory and a count of
FLOPs speak of the same parts. A stage may lie in another (`block_attention` in `backbone`): the
innermost name is the part's. Its gradient has the name too, inside `transpose(...)`.
"""

import re

TARGET = "target"  # the frozen target's forward
CONTEXT = "context"  # fc over the target's states; the draft's keys and values of them
BACKBONE = "backbone"  # the draft's layers over the blocks
BLOCK_ATTENTION = "block_attention"  # in each of them: scores and values
HEAD = "head"  # the Domino head up to the vocabulary
VOCABULARY_LOSS = "vocabulary_loss"  # logits, base and corrected, and their losses
UPDATE = "update"  # norm of the gradient, optimiser, average

STAGES = (TARGET, CONTEXT, BACKBONE, BLOCK_ATTENTION, HEAD, VOCABULARY_LOSS, UPDATE)
# Of loops, calls and transformations: they tell a reader nothing of the part.
_MACHINERY = {
    *("while", "body", "cond", "closed_call", "eval_jaxpr", "shard_map", "checkpoint", "pjit"),
    *("train_step", "branch_0_fun", "branch_1_fun", "remat", "custom_vjp_call", "jit"),
}


def stage_of(path: str) -> str | None:
    """The stage of the step that an operation belongs to, None for none.

    Args:
        path: of an operation's metadata or of a name stack; transformations stand around names.

    >>> stage_of("jit(train_step)/transpose(jvp(backbone))/block_attention/dot_general")
    'block_attention'
    >>> stage_of("jit(train_step)/transpose(jvp(backbone))/mlp/dot_general")
    'backbone'
    """
    return next((name for name in reversed(_names(path)) if name in STAGES), None)


def scope_of(path: str) -> str:
    """A path as a person reads it: its stage and its last names, and whether it is a gradient."""
    if "/" not in path:  # an argument of the step, or nothing
        return path.replace("\\", "") or "the compiler's own"
    names = _names(path)
    plain = [name for name in names if re.fullmatch(r"[\w\-]+", name)]
    told = [name for name in plain if name not in _MACHINERY]
    stage = stage_of(path)
    tail = [name for name in told[-3:] if name != stage]
    words = "/".join(([stage] if stage else []) + tail) or "the compiler's own"
    return f"{words}, gradient" if "transpose(" in path else words


def _names(path: str) -> list[str]:
    return [re.sub(r"^(\w+\()*|\)*$", "", part) for part in path.split("/")]
