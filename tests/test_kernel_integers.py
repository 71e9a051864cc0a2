"""The launchers' integer arithmetic, beside Python's own."""

import math

from encoder_fast.kernels.integers import ceil_div, next_power_of_2


def test_against_exact_arithmetic() -> None:
    for x in range(1, 300):
        assert next_power_of_2(x) == 2 ** math.ceil(math.log2(x))
        assert all(ceil_div(x, y) == math.ceil(x / y) for y in range(1, 70))
    assert ceil_div(0, 64) == 0
