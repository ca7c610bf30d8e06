"""Cuts a tensor into groups of neighbouring entries that share a scale, and joins them again."""

from collections.abc import Sequence
from math import ceil, prod

from torch import Tensor
from torch.nn.functional import pad

from sft.core.errors import InputError


def count_groups(shape: Sequence[int], axis: int, group_size: int) -> int:
    """How many groups each index of `axis` has: its entries over `group_size`, rounded up.

    Raises `InputError` for a group size below 1.
    """
    if group_size < 1:
        raise InputError(
            f"group_size is {group_size} for a tensor of shape {tuple(shape)}; give 1 or more."
        )
    return ceil(_entries(shape, axis) / group_size)


def cut_groups(tensor: Tensor, axis: int, group_size: int) -> Tensor:
    """The groups, of shape ``(tensor.shape[axis], groups, group_size)``.

    The axis moves to the front and the others follow in their order; a last group that is short is
    filled with zeros, which widen no range that holds zero.
    """
    groups = count_groups(tensor.shape, axis, group_size)
    entries = _entries(tensor.shape, axis)
    rows = tensor.movedim(axis, 0).reshape(tensor.shape[axis], entries)
    filled = pad(rows, (0, groups * group_size - entries))
    return filled.reshape(tensor.shape[axis], groups, group_size)


def join_groups(groups: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """The inverse of `cut_groups`: the tensor of `shape`, without what was filled in."""
    axis %= len(shape)
    others = [size for index, size in enumerate(shape) if index != axis]
    rows = groups.flatten(1)[:, : prod(others)]
    return rows.reshape(shape[axis], *others).movedim(0, axis)


def _entries(shape: Sequence[int], axis: int) -> int:
    axis %= len(shape)
    return prod(size for index, size in enumerate(shape) if index != axis)
