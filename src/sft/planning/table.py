"""The options of all layers in one row of numbers, and which of them can be left out unsolved."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

SLACK = 1e-12  # of a limit: what rounding of a sum may exceed it by


@dataclasses.dataclass(frozen=True)
class Table:
    """The options of all layers in one row, each array ``(N,)``; no layer is without one."""

    layer: Ints
    option: Ints
    damage: Floats
    costs: dict[str, Floats]

    def only(self, mask: NDArray[np.bool_]) -> "Table":
        costs = {name: cost[mask] for name, cost in self.costs.items()}
        return Table(self.layer[mask], self.option[mask], self.damage[mask], costs)

    @property
    def layers(self) -> int:
        return int(self.layer[-1]) + 1 if len(self.layer) else 0

    def starts(self) -> Ints:
        """Where the options of each layer begin."""
        return np.flatnonzero(np.diff(self.layer, prepend=-1))

    def lowest(self, values: Floats) -> Floats:
        """The least value in each layer."""
        least: Floats = np.minimum.reduceat(values, self.starts())
        return least

    def excess(self, values: Floats) -> Floats:
        """How much more each option has than the least in its layer."""
        above: Floats = values - self.lowest(values)[self.layer]
        return above

    def room(self, name: str, most: float) -> float:
        """What a limit leaves above the lowest total of that cost."""
        return most - math.fsum(self.lowest(self.costs[name]))

    def burden(self) -> Floats:
        """Costs of every name together: at most 1 for a whole choice, each name counting alike.

        It breaks ties between equal damages.
        """
        total = np.zeros(len(self.layer))
        for cost in self.costs.values():
            above = self.excess(cost)
            widest = -math.fsum(self.lowest(-above))
            total += above / (widest * len(self.costs)) if widest > 0 else 0.0
        return total


def flatten(damages: Sequence[Floats], costs: Mapping[str, Sequence[Floats]]) -> Table:
    """The table of all options whose damage and costs are finite."""
    sizes = [len(d) for d in damages]
    table = Table(
        layer=np.repeat(np.arange(len(sizes)), sizes),
        option=_joined([np.arange(size) for size in sizes]).astype(np.intp),
        damage=_joined(damages),
        costs={name: _joined(cost) for name, cost in costs.items()},
    )
    finite = np.isfinite(table.damage)
    for cost in table.costs.values():
        finite &= np.isfinite(cost)
    return table.only(finite)


def affordable(table: Table, limits: Mapping[str, float]) -> Table | None:
    """Without the options that do not fit even beside the cheapest of all others.

    None when that leaves a layer without any.
    """
    layers = table.layers
    while True:
        fits = np.ones(len(table.layer), dtype=np.bool_)
        for name, most in limits.items():
            room = table.room(name, most) + SLACK * abs(most)
            fits &= table.excess(table.costs[name]) <= room
        if fits.all():
            return table
        if len(np.unique(table.layer[fits])) < layers:
            return None
        table = table.only(fits)


def undominated(table: Table, limited: Sequence[str]) -> Table:
    """Without the options that another of their layer beats.

    One beats another if it is no worse in damage and in every limited cost, and either better in
    damage or no greater a burden; of equals the first stays.
    """
    worth = np.stack([table.damage, *(table.costs[name] for name in limited)], axis=1)
    burden = table.burden()
    kept = np.ones(len(worth), dtype=np.bool_)
    bounds = np.append(table.starts(), len(worth))
    for start, end in pairwise(bounds):
        own, ties = worth[start:end], burden[start:end]
        no_worse = (own[:, None] <= own[None]).all(axis=2)
        milder = own[:, None, 0] < own[None, :, 0]
        lighter = ties[:, None] < ties[None]
        first = (ties[:, None] == ties[None]) & np.triu(np.ones_like(no_worse), 1)
        kept[start:end] = ~(no_worse & (milder | lighter | first)).any(axis=0)
    return table.only(kept)


def _joined(rows: Sequence[NDArray[Any]]) -> Floats:
    return np.concatenate([np.zeros(0), *rows])
