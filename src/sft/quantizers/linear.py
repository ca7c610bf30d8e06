"""Linear quantisation of a weight: evenly spaced levels, per tensor, per channel or per group.

A weight ``w`` becomes integers ``q`` with ``w ~ (q - zero_point) * scale``; zero is always a
level. The scale has the weight's dtype, or float32 where that is narrower (a float16 scale would
lose small weights). It is never zero: a step that comes out as zero (all weights zero, or none)
is 1, and one that comes out denormal is the smallest normal number.
"""

import torch
from torch import Tensor

from sft.core.errors import InputError
from sft.quantizers.groups import count_groups, cut_groups, join_groups

BITS = range(2, 9)


def quantize_weight(
    weight: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise `weight` to signed integers of `num_bits` (2 to 8), rounding half to even.

    Affine (the default): ``q`` in ``[-2^(b-1), 2^(b-1) - 1]``, the range of the weight widened to
    hold zero. Symmetric: ``q`` in ``[-qmax, qmax]`` with ``qmax = 2^(b-1) - 1``, zero point 0.

    Returns ``(q, scale, zero_point)``: int8 of the weight's shape; floating; int64 within the
    range of ``q``. The last two are scalars, or of shape ``(weight.shape[axis],)`` with `axis`.
    With `group_size` they have shape ``(weight.shape[axis], groups)``, `axis` being 0 where none
    is given: the entries of each index of the axis, in order, are cut into groups of that many
    (the last may be shorter), and each group has its own scale.

    Raises `InputError` for NaN and infinities, other bit widths, other dtypes, a wrong axis and a
    group size below 1.
    """
    axis = _axis_of_groups(axis, group_size)
    check_weight(weight, num_bits, axis)
    if group_size is not None:
        groups = cut_groups(weight, axis or 0, group_size)
        q, scale, zero_point = quantize_weight(
            groups.flatten(0, 1), num_bits, symmetric=symmetric, axis=0
        )
        q = join_groups(q.reshape(groups.shape), weight.shape, axis or 0)
        return q, scale.reshape(groups.shape[:2]), zero_point.reshape(groups.shape[:2])
    weight = widened(weight.detach())
    qmax = 2 ** (num_bits - 1) - 1
    if symmetric:
        qmin, scale = -qmax, symmetric_scale(weight, qmax, axis)
        zero_point = torch.zeros_like(scale, dtype=torch.int64)
    else:
        qmin = -qmax - 1
        scale, zero_point = affine_parameters(*_range(weight, axis), qmin, qmax)
    steps = torch.round(weight / _along(scale, weight, axis))
    q = (steps + _along(zero_point, weight, axis)).clamp(qmin, qmax).to(torch.int8)
    return q, scale, zero_point


def dequantize_weight(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """The weight that the integers stand for: ``(q - zero_point) * scale``, in scale's dtype.

    `axis` and `group_size` are those that `quantize_weight` was given. The result is finite for a
    finite scale.
    """
    axis = _axis_of_groups(axis, group_size)
    _check_axis(q, axis)
    wanted = _shape_of_scale(q, axis, group_size)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.shape != wanted:
            raise InputError(
                f"The {name} has shape {tuple(tensor.shape)}; integers of shape {tuple(q.shape)} "
                f"with axis={axis} and group_size={group_size} need {wanted}. Give the axis and "
                "the group size that the weight was quantised with."
            )
    if group_size is not None:
        groups = cut_groups(q, axis or 0, group_size)
        rows = groups.flatten(0, 1)
        back = dequantize_weight(rows, scale.flatten(), zero_point.flatten(), axis=0)
        return join_groups(back.reshape(groups.shape), q.shape, axis or 0)
    limit = torch.finfo(scale.dtype).max
    offset = q.to(torch.int64) - _along(zero_point, q, axis)
    return (offset.to(scale.dtype) * _along(scale, q, axis)).clamp(-limit, limit)


def round_trip(
    weight: Tensor,
    num_bits: int = 8,
    *,
    symmetric: bool = False,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Quantise and dequantise: the nearest weight on the grid, in `weight`'s dtype."""
    q, scale, zero_point = quantize_weight(
        weight, num_bits, symmetric=symmetric, axis=axis, group_size=group_size
    )
    limit = torch.finfo(weight.dtype).max
    back = dequantize_weight(q, scale, zero_point, axis=axis, group_size=group_size)
    return back.clamp(-limit, limit).to(weight.dtype)


def symmetric_scale(weight: Tensor, qmax: int, axis: int | None = None) -> Tensor:
    """``max |weight| / qmax``, never zero: a scalar, or one per index of `axis`.

    The values are taken to be finite (no check: this also runs in training).
    """
    lo, hi = _range(widened(weight), axis)
    return usable_scale(torch.maximum(-lo, hi) / qmax)


def affine_parameters(lo: Tensor, hi: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map ``[min(0, lo), max(0, hi)]`` onto the integers.

    `lo` and `hi` are finite tensors of one shape, which is that of both results; the scale is
    never zero, the zero point is int64 within ``[qmin, qmax]``.
    """
    lo, hi = widened(lo).clamp(max=0), widened(hi).clamp(min=0)
    levels = qmax - qmin
    scale = usable_scale(hi / levels - lo / levels)  # in this order hi - lo cannot overflow
    zero_point = torch.round(qmin - lo / scale).clamp(qmin, qmax)
    return scale, zero_point.to(torch.int64)


def usable_scale(scale: Tensor) -> Tensor:
    """`scale` (any shape, not negative) without zeros (they become 1) and denormal numbers."""
    normal = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return torch.where(scale == 0, torch.ones_like(scale), normal)


def _range(weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value: scalars, or one per index of `axis`; zero where there is none."""
    if axis is None:
        rows = weight.reshape(-1)
    else:
        channels = weight.shape[axis]
        rows = weight.movedim(axis, 0).reshape(channels, weight.numel() // max(channels, 1))
    if rows.numel() == 0:
        nothing = weight.new_zeros(rows.shape[:-1])
        return nothing, nothing
    lo, hi = torch.aminmax(rows, dim=-1)
    return lo, hi


def _along(values: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """`values` shaped to broadcast along `axis` of `weight`."""
    if axis is None:
        return values
    shape = [1] * weight.ndim
    shape[axis] = values.numel()
    return values.reshape(shape)


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_weight(weight: Tensor, num_bits: int, axis: int | None = None) -> None:
    """Raise `InputError` for what `quantize_weight` refuses of its weight, bits and axis."""
    shape = tuple(weight.shape)
    if num_bits not in BITS:
        raise InputError(f"num_bits is {num_bits}; a weight takes {BITS[0]} to {BITS[-1]} bits.")
    if not weight.is_floating_point():
        raise InputError(
            f"The weight of shape {shape} is {weight.dtype}; only floating weights are quantised."
        )
    _check_axis(weight, axis)
    if not bool(torch.isfinite(weight).all()):
        nans, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
        where = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
        raise InputError(
            f"The weight of shape {shape} holds {nans} NaN and {infinite} infinite values, the "
            f"first at index {where}. It has no range to quantise: repair or retrain the model."
        )


def _axis_of_groups(axis: int | None, group_size: int | None) -> int | None:
    return 0 if axis is None and group_size is not None else axis


def _shape_of_scale(q: Tensor, axis: int | None, group_size: int | None) -> tuple[int, ...]:
    if axis is None:
        return ()
    if group_size is None:
        return (q.shape[axis],)
    return (q.shape[axis], count_groups(q.shape, axis, group_size))


def _check_axis(tensor: Tensor, axis: int | None) -> None:
    if axis is not None and not -tensor.ndim <= axis < tensor.ndim:
        raise InputError(
            f"axis is {axis}, but a tensor of shape {tuple(tensor.shape)} has {tensor.ndim} axes."
        )
