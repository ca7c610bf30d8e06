"""Every choice of less than some damage, built up layer by layer: exact where the bound is close.

At prices on the limited costs the bound of the whole is a sum over layers, and each option raises
it by its reduced damage (`lagrangian`). That holds at any prices, so a choice of the first layers
is dropped as soon as its sum goes beyond the target at one of several sets of them: the best ones,
which tell that it is dear, and others around them, which tell that it has used too much of one cost
or has saved what is worth nothing. The target begins near the bound and rises until a choice is
below it; that one is the optimum, for all below the target were seen.

Source: the core of a knapsack (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack
problem"), here with several limits, and their prices in place of a dynamic program's states.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sft.planning.lagrangian import Relaxation
from sft.planning.table import Floats, Ints

FIRST = 0.25  # the first target, as a share of the way from the bound to the known choice
GROWTH = 1.3
MOST = 200_000  # partial choices that are held at a time
WIDEST = 20  # and so many times more are looked at in one step
SHIFTS = (0.1, 0.3, 0.8, 2.0)  # of one price, as shares of the mean price
ROUNDING = 1e-9  # of a limit's room: what the sums here may be off by

Keeps = Callable[[Ints], bool]


def enumerate_best(relaxed: Relaxation, known: Ints, tie: Floats, keeps: Keeps) -> Ints | None:
    """The choice of the least damage + tie that fits; None when the search would take long.

    known : a choice that fits. tie : ``(N,)`` what each option adds to its damage; so little that
    it only decides between equals. keeps : whether a choice obeys the limits to the last digit.
    """
    priced = _Priced.around(relaxed)
    objective = relaxed.damage + tie
    least, share = float(objective[known].sum()), FIRST
    while True:
        target = min(least, relaxed.bound + share * (least - relaxed.bound))
        below = _below(priced, target)
        if below is None:
            return None
        values = objective[below].sum(axis=1)
        for index in np.argsort(values, kind="stable"):
            if values[index] >= least:
                break
            if keeps(below[index]):
                known, least = below[index], float(values[index])
                break
        if least <= target:
            return known
        share *= GROWTH


@dataclasses.dataclass(frozen=True)
class _Priced:
    """The reduced damage at several sets of prices.

    layer : ``(N,)``. bounds : ``(M,)`` of the whole at each set. reduced : ``(M, N)``. margin :
    ``(M,)`` what overstepping every limit by `ROUNDING` is worth.
    """

    layer: Ints
    bounds: Floats
    reduced: Floats
    margin: Floats

    @classmethod
    def around(cls, relaxed: Relaxation) -> "_Priced":
        prices = _prices_around(relaxed.prices)
        priced = relaxed.damage + prices @ relaxed.rows
        lowest = np.minimum.reduceat(priced, relaxed.table.starts(), axis=1)
        room = prices.sum(axis=1)
        layer = relaxed.table.layer
        reduced = priced - lowest[:, layer]
        return cls(layer, lowest.sum(axis=1) - room, reduced, ROUNDING * room)


def _prices_around(best: Floats) -> Floats:
    """``(1 + 8 K, K)``: the best prices, and those with one of them raised or lowered."""
    each = np.eye(len(best))
    steps = np.concatenate([sign * shift * each for shift in SHIFTS for sign in (1, -1)])
    around: Floats = np.maximum(best + steps * best.sum() / max(len(best), 1), 0.0)
    return np.concatenate([best[None], around])


def _below(priced: _Priced, target: float) -> Ints | None:
    """``(C, L)`` choices whose bound is at most the target; None when too many may come of it."""
    room = (1 + ROUNDING) * target - priced.bounds + priced.margin
    may = (priced.reduced <= room[:, None]).all(axis=0)
    layers = range(int(priced.layer[-1]) + 1)
    options = [np.flatnonzero(may & (priced.layer == each)) for each in layers]
    order = sorted(layers, key=lambda each: len(options[each]))
    spent = np.zeros((len(room), 1))
    steps: list[tuple[Ints, Ints]] = []
    for own in (options[each] for each in order):
        if spent.shape[1] * len(own) > WIDEST * MOST:
            return None
        parents, picks = _within(spent, priced.reduced[:, own], room)
        if len(parents) > MOST:
            return None
        spent = spent[:, parents] + priced.reduced[:, own[picks]]
        steps.append((parents, own[picks]))
    return _followed_back(steps, order)


def _within(spent: Floats, added: Floats, room: Floats) -> tuple[Ints, Ints]:
    """Which partial choices may go on with which options: ``(M, S)`` and ``(M, O)`` in."""
    fits = np.ones((spent.shape[1], added.shape[1]), dtype=np.bool_)
    for before, more, most in zip(spent, added, room, strict=True):
        fits &= before[:, None] + more <= most
    parents, picks = np.nonzero(fits)
    return parents, picks


def _followed_back(steps: list[tuple[Ints, Ints]], order: list[int]) -> Ints:
    """The whole choices, from what each step added to which choice of the step before."""
    place = np.arange(len(steps[-1][0]))
    choices = np.empty((len(place), len(order)), dtype=np.intp)
    for each, (parents, picks) in zip(reversed(order), reversed(steps), strict=True):
        choices[:, each] = picks[place]
        place = parents[place]
    return choices
