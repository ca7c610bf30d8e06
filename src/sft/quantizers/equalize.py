"""Cross-layer equalisation: moves range between two layers that follow each other.

Between two layers with a positively homogeneous function in between (ReLU, none), channel ``c``
may be divided by ``s_c`` in the first and multiplied by it in the second: the network computes the
same, but the weights of both quantise with one scale for all channels.
"""

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.linear import widened

SMALLEST, LARGEST = 1e-2, 1e2


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """``s`` of shape ``(c,)`` that gives ``first / s`` and ``second * s`` equal channel ranges.

    first : ``(c, n)``, the weights (and the bias, as one more column) that make each channel.
    second : ``(c, m)``, the weights that read each channel.

    The range of a channel is its greatest magnitude, so ``s_c = sqrt(range1_c / range2_c)``
    (Nagel et al. 2019, arXiv:1906.04721, equation 11). A dead channel (range 0 in either) keeps
    scale 1; scales stay within 0.01 and 100. The result has the wider dtype of the two, at least
    float32.

    Raises `InputError` for other shapes, different channel counts and values that are not finite.
    """
    _check(first, second)
    ranges = [_greatest(rows) for rows in (first, second)]
    alive = (ranges[0] > 0) & (ranges[1] > 0)
    scale = ranges[0].sqrt() / ranges[1].sqrt()  # roots first: the quotient may overflow
    return torch.where(alive, scale, torch.ones_like(scale)).clamp(SMALLEST, LARGEST)


def _greatest(rows: Tensor) -> Tensor:
    rows = widened(rows.detach())
    return rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def _check(first: Tensor, second: Tensor) -> None:
    for name, rows in (("first", first), ("second", second)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise InputError(
                f"The {name} layer's rows are {rows.dtype} of shape {tuple(rows.shape)}; give "
                "floats of shape (channels, weights)."
            )
        if not bool(torch.isfinite(rows).all()):
            raise InputError(
                f"The {name} layer's rows of shape {tuple(rows.shape)} hold NaN or infinite "
                "values. They have no range to equalise: repair or retrain the model."
            )
    if first.shape[0] != second.shape[0]:
        raise InputError(
            f"The first layer makes {first.shape[0]} channels but the second reads "
            f"{second.shape[0]}; one row for each channel between them is needed in both."
        )
