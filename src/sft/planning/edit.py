"""Does a plan, perhaps edited by hand, fit the model? Asked before anything is changed."""

import math
from collections.abc import Callable, Mapping, Sequence

from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, STORED, Inspection, Layer, Option, Plan

FullRank = Callable[[Layer], int | tuple[int, ...]]


def _channel_rank(side: int) -> FullRank:
    """Exact rank of a channel scheme for a kernel (O, I, ...): the unfolding's smaller side."""

    def full(layer: Layer) -> int:
        shape = layer.weight_shape
        return min(shape[side], math.prod(shape) // shape[side])

    return full


# Where the table of decompositions can be seen, its own are passed instead.
FULL_RANKS: Mapping[str, FullRank] = {
    "channel_in": _channel_rank(1),
    "channel_out": _channel_rank(0),
}


def check_plan(
    plan: Plan,
    layers: Inspection | Sequence[Layer],
    full_ranks: Mapping[str, FullRank] = FULL_RANKS,
) -> None:
    """Raise `InputError` unless each layer has exactly one row, with an option it can take.

    full_ranks : the schemes that exist and their exact rank for a layer; pass those of the
        registered decompositions to allow for more than the built-in ones.
    """
    known = {layer.name: layer for layer in _listed(layers)}
    seen: set[str] = set()
    for row in plan.rows:
        if row.name not in known:
            raise InputError(
                f"The plan has a row for '{row.name}', but the model has no such layer. Remove the "
                f"row, or name one of: {', '.join(known)}."
            )
        if row.name in seen:
            raise InputError(f"The plan has two rows for layer '{row.name}'. Remove one of them.")
        seen.add(row.name)
        check_option(row.option, known[row.name], full_ranks)
    missing = [name for name in known if name not in seen]
    if missing:
        raise InputError(
            f"The plan has no row for {', '.join(repr(name) for name in missing)}. Add one for "
            f'each; {{"scheme": "keep"}} as its option leaves a layer as it is.'
        )


def check_option(
    option: Option, layer: Layer, full_ranks: Mapping[str, FullRank] = FULL_RANKS
) -> None:
    """Raise `InputError`, naming layer and weight shape, unless the layer can take the option."""
    where = f"Layer '{layer.name}' with weight {layer.weight_shape} cannot become '{option}'"
    scheme = option.scheme
    if scheme in layer.refusals:
        raise InputError(
            f"{where}: {layer.refusals[scheme]}. Choose 'dense', 'keep' or another scheme."
        )
    if scheme == DENSE and _transposed(layer):
        raise InputError(
            f"{where}: no runtime has an integer kernel for a transposed convolution. Choose "
            f"'stored', which saves size, or 'keep'."
        )
    if scheme in (KEEP, DENSE, STORED):
        return
    if scheme not in full_ranks:
        allowed = [s for s in (KEEP, DENSE, STORED, *full_ranks) if s not in layer.refusals]
        raise InputError(
            f"{where}: there is no scheme '{scheme}'. Choose one of {', '.join(allowed)}."
        )
    full = _sides(full_ranks[scheme](layer))
    if len(option.rank) != len(full):
        raise InputError(
            f"{where}: '{scheme}' takes {len(full)} rank{'s' * (len(full) > 1)}, the plan gives "
            f"{len(option.rank)}."
        )
    if any(not 1 <= rank <= most for rank, most in zip(option.rank, full, strict=True)):
        limits = " and ".join(f"1 to {most}" for most in full)
        raise InputError(f"{where}: '{scheme}' takes rank {limits} here.")


def default_full_rank(scheme: str, layer: Layer) -> tuple[int, ...]:
    """The exact rank of a channel scheme; empty for a grouped or transposed layer."""
    geometry = layer.geometry
    plain = (geometry is None or geometry.groups == 1) and not _transposed(layer)
    return _sides(FULL_RANKS[scheme](layer)) if scheme in FULL_RANKS and plain else ()


def _transposed(layer: Layer) -> bool:
    geometry = layer.geometry
    return layer.kind.startswith("ConvTranspose") or (geometry is not None and geometry.transposed)


def _sides(rank: int | tuple[int, ...]) -> tuple[int, ...]:
    return (rank,) if isinstance(rank, int) else tuple(rank)


def _listed(layers: Inspection | Sequence[Layer]) -> Sequence[Layer]:
    return layers.layers if isinstance(layers, Inspection) else layers
