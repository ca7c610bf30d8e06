"""The ways to round rows of weights to a grid. A new one is a file and a line here."""

from collections.abc import Callable

from torch import Tensor

from sft.core.registry import Registry
from sft.quantizers.adaround import adaround
from sft.quantizers.gptq import gptq
from sft.quantizers.grid import Grid, check_rows, round_nearest

Rounding = Callable[[Tensor, Grid, Tensor | None], Tensor]
"""``(rows (R, D), grid, moment (D, D) or None)`` to integers ``(R, D)`` int8."""


def nearest(rows: Tensor, grid: Grid, moment: Tensor | None) -> Tensor:
    """`round_nearest`; the moment is checked, and changes nothing."""
    check_rows(rows, grid, moment)
    return round_nearest(rows, grid)


roundings: Registry[Rounding] = Registry("rounding")
roundings.add("adaround", adaround)
roundings.add("gptq", gptq)
roundings.add("nearest", nearest)
