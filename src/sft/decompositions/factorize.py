"""One dense layer in, one factorised layer out; a recurrent module in, its open form out."""

from collections.abc import Mapping

from torch import nn

from sft.core.errors import InputError
from sft.core.kernels import geometry_of
from sft.core.statistics import Statistics
from sft.decompositions.base import Decomposition, Rank, decompositions, kernel_of
from sft.layers.opened import open_recurrent

RECURRENT = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
Known = Statistics | Mapping[str, Statistics] | None


def factorize(
    layer: nn.Module,
    scheme: str = "channel_in",
    rank: int | tuple[int, ...] | None = None,
    statistics: Known = None,
    *,
    l1: float | None = None,
    l2: float | None = None,
    refine: bool = False,
) -> nn.Module:
    """Split one layer; the layer itself is not changed.

    layer : a dense layer of `torch.nn`; or `nn.LSTM`, `nn.GRU` or a cell of them, which is opened
        into linear maps, each split at this rank or at its full rank if that is less.
    scheme : name of a decomposition (`sft list` names them).
    rank : channels between the factors, per group, 1 to the full rank; a pair for `tucker2` (one
        number stands for both, each at most its full rank). Or None, and `l1`, `l2` choose it by
        the SFT objective on the weight. Factors are never shrunk (that would be a bias).
    statistics : what the data looks like at this layer; None means plain SVD of the weight. For a
        recurrent module: by name of the linear map in its open form.
    refine : fit the factors further to the data, where the closed form is not the optimum yet.
    Raises `InputError` that names the layer's shape and the reason.
    """
    method = decompositions[scheme]
    if rank is None and (l1 is None or l2 is None):
        raise InputError("factorize needs rank=, or l1= and l2= to choose it.")
    if rank is not None and (l1 is not None or l2 is not None):
        raise InputError("Give factorize either rank=, or l1= and l2=, not both.")
    penalties = None if l1 is None or l2 is None else (l1, l2)
    if isinstance(layer, RECURRENT):
        return _split_maps(method, layer, rank, statistics, penalties, refine)
    reason = method.unsupported(layer)
    if reason is not None:
        raise InputError(f"Layer {_described(layer)} cannot be split by '{scheme}': {reason}.")
    if isinstance(statistics, Mapping):
        raise InputError(
            f"Layer {_described(layer)} is one layer: give its own statistics, not a table of "
            f"those of {', '.join(statistics)}."
        )
    chosen = _chosen(method, layer, rank, penalties)
    return method.build(layer, chosen, statistics, refine=refine)


def _chosen(
    method: Decomposition,
    layer: nn.Module,
    rank: int | Rank | None,
    penalties: tuple[float, float] | None,
) -> Rank:
    """The ranks to build, checked."""
    geometry = geometry_of(layer)
    full = method.full_rank(geometry)
    if penalties is not None:
        return _by_objective(method, layer, *penalties)
    if isinstance(rank, int):
        rank = (rank,) if len(full) == 1 else tuple(min(rank, most) for most in full)
    assert rank is not None
    fits = len(rank) == len(full) and all(1 <= r <= f for r, f in zip(rank, full, strict=True))
    if not fits:
        shown = rank[0] if len(rank) == 1 else rank
        most = " and ".join(f"1 to {f}" for f in full)
        raise InputError(
            f"Rank {shown} does not fit layer {_described(layer)}: '{method.name}' takes {most}."
        )
    return tuple(rank)


def _by_objective(method: Decomposition, layer: nn.Module, l1: float, l2: float) -> Rank:
    """How many singular values exceed ``2 sqrt(l1 l2)``, in the group that has most, 1 at least."""
    if not (l1 > 0 and l2 > 0):
        raise InputError(f"l1={l1} and l2={l2}: both must be above 0.")
    energies = method.analyse(kernel_of(layer), geometry_of(layer), None).energies
    return tuple(max(1, int((e.sqrt() > 2 * (l1 * l2) ** 0.5).sum(1).max())) for e in energies)


def _split_maps(
    method: Decomposition,
    layer: nn.Module,
    rank: int | Rank | None,
    statistics: Known,
    penalties: tuple[float, float] | None,
    refine: bool,
) -> nn.Module:
    """The open form of a recurrent module with each of its linear maps split."""
    if isinstance(statistics, Statistics):
        raise InputError(
            f"{layer} has several linear maps: give their statistics by name, as "
            "{name: statistics} of the module that open_recurrent returns."
        )
    opened = open_recurrent(layer)
    maps = {n: m for n, m in opened.named_modules() if isinstance(m, nn.Linear)}
    refused = {n: method.unsupported(m) for n, m in maps.items()}
    if all(refused.values()):
        reason = next(iter(refused.values()), "it has no linear map")
        raise InputError(f"{layer} cannot be split by '{method.name}': {reason}.")
    for name, linear in maps.items():
        if refused[name]:
            continue
        full = method.full_rank(geometry_of(linear))
        capped = min(rank, *full) if isinstance(rank, int) else rank
        known = None if statistics is None else statistics.get(name)
        small = method.build(
            linear, _chosen(method, linear, capped, penalties), known, refine=refine
        )
        parent, _, child = name.rpartition(".")
        setattr(opened.get_submodule(parent), child, small)
    return opened


def _described(layer: nn.Module) -> str:
    shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
    return f"{type(layer).__name__} with weight {shape}"
