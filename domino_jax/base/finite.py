"""Numbers of files are checked before anything computes with them.

One NaN in a weight ends as NaN everywhere. The check reads each number twice and writes nothing, so
it costs little beside reading a file. It looks at bits, because numpy computes with bfloat16 forty
times slower than with integers:

    bits, as an integer    0 ... largest number < infinity <= NaN    with the sign bit: the same,
                                                                     shifted by the sign
No jax here.
"""

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 once this is imported)
import numpy as np

from domino_jax.base.errors import InputError


def all_finite(values: np.ndarray) -> bool:
    """Whether no entry of a floating point array is NaN or infinite.

    Args:
        values: of any shape and of 16 or more bits.
    """
    if values.size == 0:
        return True
    width = 8 * values.dtype.itemsize
    infinity = int(np.array(np.inf, values.dtype).view(f"uint{width}"))
    # The largest signed integer is that of the entries without a sign, the largest unsigned one
    # that of those with it.
    positive = int(values.view(f"int{width}").max())
    negative = int(values.view(f"uint{width}").max())
    return positive < infinity and negative < infinity + 2 ** (width - 1)


def count_non_finite(values: np.ndarray) -> int:
    """How many entries of a floating point array are NaN or infinite."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return int(np.count_nonzero(~np.isfinite(values)))


def require_finite(values: np.ndarray, *, source: str, remedy: str) -> None:
    """Raises `InputError` where a floating point array holds NaN or infinity, with how many.

    Args:
        values: of any shape.
        source: the file or directory and the name of the array, for the message.
        remedy: what to do, for the message.
    """
    if not all_finite(values):
        count = count_non_finite(values)  # the slow way, which a sound array is spared
        raise not_finite(source, count, of=values.size, dtype=str(values.dtype), remedy=remedy)


def not_finite(source: str, count: int, *, of: int, dtype: str, remedy: str) -> InputError:
    """The error that says so of an array: NaN, infinite, or too large a number for its type."""
    return InputError(f"{source}: {count} of {of} entries are not finite in {dtype}; {remedy}")
