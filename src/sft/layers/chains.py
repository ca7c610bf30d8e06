"""The chains of factors: into which smaller layers each scheme splits a layer.

One function a scheme, registered in `CHAINS`: ``(geometry, rank) -> geometries of the factors``, in
the order in which they are applied. All ranks are per group; the groups share them.
"""

from collections.abc import Callable

from sft.core.errors import InputError
from sft.core.geometry import Geometry
from sft.core.registry import Registry

CHANNEL_IN, CHANNEL_OUT, SPATIAL = "channel_in", "channel_out", "spatial"
TUCKER2, SEPARABLE = "tucker2", "separable"

Rank = tuple[int, ...]
Chain = Callable[[Geometry, Rank], tuple[Geometry, ...]]

CHAINS: Registry[Chain] = Registry("scheme")


def channel_in(geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
    """Pointwise ``I -> G*r``, then the kernel ``G*r -> O``. `nn.Linear`: ``I -> r -> O``."""
    (width,) = _widths(CHANNEL_IN, geometry, rank, 1)
    return (
        geometry.factor(geometry.inputs, width, ()),
        geometry.factor(width, geometry.outputs, range(geometry.axes)),
    )


def channel_out(geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
    """The kernel ``I -> G*r``, then pointwise ``G*r -> O``. `nn.Linear`: ``I -> r -> O``."""
    (width,) = _widths(CHANNEL_OUT, geometry, rank, 1)
    return (
        geometry.factor(geometry.inputs, width, range(geometry.axes)),
        geometry.factor(width, geometry.outputs, ()),
    )


def spatial(geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
    """The first long axis alone ``I -> G*r``, then all other axes ``G*r -> O``.

    An axis is long if the kernel has more than one tap along it. Raises `InputError` for a kernel
    with fewer than two long axes.
    """
    (width,) = _widths(SPATIAL, geometry, rank, 1)
    long_axes = [axis for axis, extent in enumerate(geometry.kernel) if extent > 1]
    if len(long_axes) < 2:
        raise InputError(
            f"The scheme '{SPATIAL}' splits a kernel between two axes with more than one tap; the "
            f"kernel {_sizes(geometry)} has {len(long_axes)} of them. Use '{CHANNEL_IN}' or "
            f"'{CHANNEL_OUT}'."
        )
    others = set(range(geometry.axes)) - {long_axes[0]}
    return (
        geometry.factor(geometry.inputs, width, long_axes[:1]),
        geometry.factor(width, geometry.outputs, others),
    )


def tucker2(geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
    """Pointwise ``I -> G*r_in``, the kernel ``G*r_in -> G*r_out``, pointwise ``G*r_out -> O``."""
    inner, outer = _widths(TUCKER2, geometry, rank, 2)
    _check_taps(TUCKER2, geometry)
    return (
        geometry.factor(geometry.inputs, inner, ()),
        geometry.factor(inner, outer, range(geometry.axes)),
        geometry.factor(outer, geometry.outputs, ()),
    )


def separable(geometry: Geometry, rank: Rank) -> tuple[Geometry, ...]:
    """Pointwise ``I -> G*r``, a depthwise kernel on ``G*r``, pointwise ``G*r -> O``."""
    (width,) = _widths(SEPARABLE, geometry, rank, 1)
    _check_taps(SEPARABLE, geometry)
    return (
        geometry.factor(geometry.inputs, width, ()),
        geometry.factor(width, width, range(geometry.axes), groups=width),
        geometry.factor(width, geometry.outputs, ()),
    )


def _widths(scheme: str, geometry: Geometry, rank: Rank, count: int) -> list[int]:
    """The channels between the factors: each rank times the groups."""
    if len(rank) != count or any(type(r) is not int or r < 1 for r in rank):
        wanted = "one rank" if count == 1 else f"{count} ranks"
        raise InputError(
            f"The scheme '{scheme}' takes {wanted}, whole and at least 1, not {rank!r}, for a "
            f"kernel of {_sizes(geometry)}."
        )
    return [geometry.groups * r for r in rank]


def _check_taps(scheme: str, geometry: Geometry) -> None:
    if geometry.pointwise:
        raise InputError(
            f"The scheme '{scheme}' has a factor for the taps of a kernel, but the kernel has one "
            f"tap ({_sizes(geometry)}). Use '{CHANNEL_IN}' or '{CHANNEL_OUT}'."
        )


def _sizes(geometry: Geometry) -> str:
    """``16 -> 32 channels, 3x3`` for messages."""
    extent = "x".join(map(str, geometry.kernel)) or "linear"
    groups = f", {geometry.groups} groups" if geometry.groups > 1 else ""
    return f"{geometry.inputs} -> {geometry.outputs} channels, {extent}{groups}"


CHAINS.add(CHANNEL_IN, channel_in)
CHAINS.add(CHANNEL_OUT, channel_out)
CHAINS.add(SEPARABLE, separable)
CHAINS.add(SPATIAL, spatial)
CHAINS.add(TUCKER2, tucker2)
