"""The Lagrangian bound of the knapsack, and good answers found on its way.

With a price on each limited cost the layers are chosen one by one, at once. The best prices give
the bound (they are the dual of the linear relaxation, which HiGHS solves); the choice at these
prices is repaired until it fits and then improved by exchanges. What the bound rules out need not
be searched.
"""

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sft.planning.highs import prices
from sft.planning.table import SLACK, Floats, Ints, Table

ROUNDS = 20
STARTS = 12  # sets of prices from which an answer is looked for
SPREAD = 0.15  # how far they are from the best prices, in their logarithm
WIDEST_EXCHANGE = 300  # options among which pairs are exchanged


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """A knapsack with its prices.

    damage : ``(N,)`` above the least of the layer. rows : ``(K, N)`` limited costs above the least
    of the layer, as shares of the room, so that the sum of a choice may be 1. prices : ``(K,)``
    damage that the whole room of each is worth. reduced : ``(N,)`` damage with the priced costs,
    above the least of the layer. bound : no choice that fits has less damage in all.
    """

    table: Table
    damage: Floats
    rows: Floats
    prices: Floats
    reduced: Floats
    bound: float

    def within(self, most: float) -> NDArray[np.bool_]:
        """Which options may be part of a choice whose damage is at most `most`."""
        may: NDArray[np.bool_] = self.bound + self.reduced <= most
        return may

    def only(self, mask: NDArray[np.bool_]) -> "Relaxation":
        """The same without some options, none of which any layer needs."""
        return Relaxation(
            self.table.only(mask), self.damage[mask], self.rows[:, mask], self.prices,
            self.reduced[mask], self.bound,
        )  # fmt: skip

    def total(self, choice: Ints) -> float:
        return float(self.damage[choice].sum())


def relax(table: Table, limits: Mapping[str, float]) -> Relaxation | None:
    """The relaxation at its best prices; None when not even fractions of options fit."""
    damage = table.excess(table.damage)
    rows = limited_rows(table, limits)
    unit = float(np.max(damage, initial=0.0)) or 1.0
    found = prices(damage / unit, table.layer, rows) if len(rows) else np.zeros(0)
    if found is None:
        return None
    found = unit * found
    priced = damage + found @ rows
    bound = max(float(table.lowest(priced).sum() - found.sum()), 0.0)
    return Relaxation(table, damage, rows, found, table.excess(priced), bound)


def limited_rows(table: Table, limits: Mapping[str, float]) -> Floats:
    """``(K, N)`` excess over the layer's lowest as a share of the room; limits that bind only.

    A limit without any room binds too, but leaves no choice: `affordable` sees to it.
    """
    rows = []
    for name, most in limits.items():
        above, room = table.excess(table.costs[name]), table.room(name, most)
        if SLACK * abs(most) < room < -float(table.lowest(-above).sum()):
            rows.append(above / room)
    return np.stack(rows) if rows else np.zeros((0, len(table.layer)))


def good_answer(relaxed: Relaxation) -> Ints | None:
    """Positions of one option a layer that fit together; None when none was found.

    The best of what comes of the best prices and of a few prices near them.
    """
    generator, best = np.random.default_rng(0), None
    for start in range(STARTS if len(relaxed.rows) else 1):
        shift = SPREAD * generator.standard_normal(len(relaxed.prices)) * (start > 0)
        found = _repaired(relaxed, relaxed.damage + (relaxed.prices * np.exp(shift)) @ relaxed.rows)
        if found is not None:
            found = improved(relaxed, found)
            if best is None or relaxed.total(found) < relaxed.total(best):
                best = found
    return best


def _repaired(relaxed: Relaxation, priced: Floats) -> Ints | None:
    """The options of the least `priced` damage, exchanged one by one until they fit: each time
    the exchange that adds least of it for the excess that it takes away.
    """
    layer, rows = relaxed.table.layer, relaxed.rows
    choice = _least(relaxed.table, priced)
    for _ in range(4 * len(choice)):
        used = rows[:, choice].sum(axis=1)
        if (used <= 1 + SLACK).all():
            return choice
        change = used[:, None] + rows - rows[:, choice[layer]] - 1
        relief = np.maximum(used - 1, 0).sum() - np.maximum(change, 0).sum(axis=0)
        useful = relief > SLACK
        if not useful.any():
            return None
        more = priced - priced[choice[layer]]
        ratio = np.where(useful, more / np.where(useful, relief, 1.0), np.inf)
        best = int(np.argmin(ratio))
        choice[layer[best]] = best
    return None


def improved(relaxed: Relaxation, choice: Ints) -> Ints:
    """A choice after exchanges of one option, then of two at once, while any lowers the damage."""
    for _ in range(ROUNDS):
        choice = _exchange_one(relaxed, choice)
        better = _exchange_two(relaxed, choice)
        if better is None:
            break
        choice = better
    return choice


def _exchange_one(relaxed: Relaxation, choice: Ints) -> Ints:
    layer, choice = relaxed.table.layer, choice.copy()
    while True:
        gain, step, free = _steps(relaxed, choice)
        fits = np.all(step <= free[:, None], axis=0)
        best = int(np.argmax(np.where(fits, gain, 0.0)))
        if not fits[best] or gain[best] <= 0:
            return choice
        choice[layer[best]] = best


def _exchange_two(relaxed: Relaxation, choice: Ints) -> Ints | None:
    """The best exchange in two layers at once, among the options of least reduced damage."""
    layer = relaxed.table.layer
    gain, step, free = _steps(relaxed, choice)
    near = np.argsort(relaxed.reduced, kind="stable")[:WIDEST_EXCHANGE]
    both = gain[near][:, None] + gain[near][None]
    both[layer[near][:, None] == layer[near][None]] = 0.0
    for row, left in zip(step[:, near], free, strict=True):
        both[row[:, None] + row[None] > left] = 0.0
    best = int(np.argmax(both))
    if both.flat[best] <= SLACK * relaxed.total(choice):
        return None
    one, two = near[best // len(near)], near[best % len(near)]
    changed = choice.copy()
    changed[layer[one]], changed[layer[two]] = one, two
    return changed


def _steps(relaxed: Relaxation, choice: Ints) -> tuple[Floats, Floats, Floats]:
    """What going over to each option gains in damage and takes in costs, and what is left."""
    now = choice[relaxed.table.layer]
    gain = relaxed.damage[now] - relaxed.damage
    step = relaxed.rows - relaxed.rows[:, now]
    return gain, step, 1 + SLACK - relaxed.rows[:, choice].sum(axis=1)


def _least(table: Table, values: Floats) -> Ints:
    """The position of the least value of each layer."""
    bounds = np.append(table.starts(), len(values))
    picked = [a + int(np.argmin(values[a:b])) for a, b in pairwise(bounds)]
    return np.array(picked, dtype=np.intp)
