"""NaN and infinities are found by their bits, in every type that files hold."""

import ml_dtypes
import numpy as np
import pytest

from domino_jax.base.errors import InputError
from domino_jax.base.finite import all_finite, count_non_finite, require_finite

TYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("dtype", TYPES)
def test_all_finite_tells_the_numbers_from_the_rest(dtype: str) -> None:
    largest, least = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).smallest_subnormal
    numbers = np.array([0.0, -0.0, 1.5, -2.0, largest, -largest, least, -least], dtype)
    assert all_finite(numbers) and all_finite(numbers.reshape(2, 4)) and all_finite(numbers[:0])
    for place in range(8):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            spoilt = numbers.copy()
            spoilt[place] = value
            assert not all_finite(spoilt) and count_non_finite(spoilt) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_finite_agrees_with_numpy_on_every_number_of_16_bits(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(every)
    assert count_non_finite(every) == 2**16 - expected.sum()
    assert [all_finite(every[place : place + 1]) for place in range(2**16)] == expected.tolist()
    assert all_finite(every[expected])


def test_require_finite_says_where_and_how_many() -> None:
    values = np.ones((3, 4), np.float32)
    require_finite(values, source="x", remedy="y")
    values[0, 1], values[2] = np.nan, np.inf
    with pytest.raises(InputError) as caught:
        require_finite(values, source="draft: tensor fc.weight", remedy="take another")
    assert (
        str(caught.value)
        == "draft: tensor fc.weight: 5 of 12 entries are not finite in float32; take another"
    )
