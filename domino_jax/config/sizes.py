"""A size beyond any that a model has should be refused before memory is asked for it.

What is wrong in a file is often a digit too many. The limits lie above every model that anybody
published. No jax here.
"""

from domino_jax.base.errors import require

SIZE_LIMITS = {
    "num_hidden_layers": 10_000,
    "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
}
SIZE_LIMIT = 2**24  # of every other size


def check_positive(name: str, value: float) -> None:
    """Refuses a number that is not positive, and an integer beyond any that a model has."""
    require(value > 0, f"{name} must be positive, found {value}")
    limit = SIZE_LIMITS.get(name, SIZE_LIMIT)
    allowed = isinstance(value, float) or value <= limit
    require(allowed, f"{name} must be at most {limit}, found {value}")
