"""The multiple-choice knapsack: one option per layer, least damage, costs within their limits.

On plain arrays, exact, by mixed-integer programming (HiGHS through scipy), one binary a (layer,
option). Before that, what cannot be in an optimal answer is left out (it does not fit, or another
option of the layer is no worse in anything), and everything is counted as excess over the layer's
lowest and scaled by the room that is left, so that the solver's tolerances mean nothing. Whatever
the solver says is checked against the limits here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import InputError, SFTError
from sft.planning.highs import Floats, Ints, choose

SLACK = 1e-12  # of a limit: what rounding of a sum may exceed it by
TIE = 1e-9  # of the damage: how much the lower cost of one of two equal answers counts
OBJECTIVE_SCALE = 1e6
ROW_SCALE = 1e4
ROUGH_GAP = 1e-2
TRIES = 50


@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` found.

    choice : index of the option of each layer; empty when infeasible.
    value : summed damage of the choice; bound : no choice within the limits has less;
    gap : ``(value - bound) / |value|``. Infinite, infinite and 0 when infeasible.
    status : "optimal" or "infeasible", `message` says it in words.
    feasible : lowest reachable total of each cost alone.
    """

    choice: tuple[int, ...]
    value: float
    bound: float
    gap: float
    status: str
    message: str
    feasible: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Menu:
    """The options of all layers in one row, each array ``(N,)``; no layer is without one."""

    layer: Ints
    option: Ints
    damage: Floats
    costs: dict[str, Floats]

    def only(self, mask: NDArray[np.bool_]) -> "_Menu":
        costs = {name: cost[mask] for name, cost in self.costs.items()}
        return _Menu(self.layer[mask], self.option[mask], self.damage[mask], costs)

    def lowest(self, values: Floats) -> Floats:
        """The least value in each layer."""
        starts = np.flatnonzero(np.diff(self.layer, prepend=-1))
        least: Floats = np.minimum.reduceat(values, starts)
        return least

    def excess(self, values: Floats) -> Floats:
        """How much more each option has than the least in its layer."""
        above: Floats = values - self.lowest(values)[self.layer]
        return above


def solve(
    damages: Sequence[NDArray[np.float64]],
    costs: Mapping[str, Sequence[NDArray[np.float64]]],
    limits: Mapping[str, float],
) -> Solution:
    """Choose one option per layer with the least summed damage.

    damages : ``damages[l][o]``, damage of option `o` in layer `l`.
    costs : the same shape for each cost name; a cost without a limit only breaks ties.
    limits : the most the sum of that cost may be.
    An option with a non-finite damage or cost is forbidden. Equal damage goes to the lower cost.
    Raises `InputError` when the arrays do not belong together.
    """
    _check(damages, costs, limits)
    menu = _flatten(damages, costs)
    missing = sorted(set(range(len(damages))) - set(menu.layer.tolist()))
    if missing:
        return _infeasible(
            f"Layer {missing[0]} has no allowed option: the damage or a cost of each of its "
            f"{len(damages[missing[0]])} options is not finite.",
            {},
        )
    lowest = {n: math.fsum(menu.lowest(c)) if len(c) else 0.0 for n, c in menu.costs.items()}
    for name, most in limits.items():
        if lowest[name] > most + SLACK * abs(most):
            return _infeasible(_too_little(name, lowest[name], limits), lowest)
    found = _optimum(menu, limits) if damages else ((), 0.0, 0.0)
    if found is None:
        return _infeasible("Each limit can be met alone, but not all together.", lowest)
    choice, value, bound = found
    return _optimal(choice, value, bound, lowest)


def _optimum(
    menu: _Menu, limits: Mapping[str, float]
) -> tuple[tuple[int, ...], float, float] | None:
    """Choice, value and bound; None when the limits cannot be met together.

    A rough answer first: no option whose excess damage alone is above it can be in a better one,
    and the rest is then solved exactly, in units of it.
    """
    fitting = _affordable(menu, limits)
    if fitting is None:
        return None
    menu = _undominated(fitting)
    base = math.fsum(menu.lowest(menu.damage))
    above = menu.excess(menu.damage)
    rough = _search(menu, limits, float(above.max()), ROUGH_GAP)
    if rough is None:
        return None
    span = math.fsum(above[rough[0]])
    menu = menu.only(above <= span * (1 + TIE))
    exact = _search(menu, limits, span, 0.0)
    if exact is None:
        raise SFTError("The solver HiGHS lost an answer that it had found before.")
    chosen, dual = exact
    value = math.fsum(menu.damage[chosen])
    return tuple(menu.option[chosen].tolist()), value, min(max(base + dual, base), value)


def _search(
    menu: _Menu, limits: Mapping[str, float], span: float, relative_gap: float
) -> tuple[Ints, float] | None:
    """Positions of the chosen options, and a lower bound of the excess damage of any choice.

    span : excess damage that counts as 1. Ties are broken by adding `TIE` times the costs, which
    are scaled to at most 1 in all, so the bound without them is at most that much lower.
    """
    unit = span if span > 0 else 1.0
    objective = menu.excess(menu.damage) / unit
    rows, tops = [], []
    for name, cost in menu.costs.items():
        above = menu.excess(cost)
        widest = -math.fsum(menu.lowest(-above))
        if widest > 0:
            objective = objective + TIE / len(menu.costs) * above / widest
        if name in limits:
            room = limits[name] - math.fsum(menu.lowest(cost))
            if SLACK * abs(limits[name]) < room < widest:
                rows.append(above / room * ROW_SCALE)
                tops.append(ROW_SCALE)
    excluded: list[Ints] = []
    for _ in range(TRIES):
        found = choose(objective * OBJECTIVE_SCALE, menu.layer, rows, tops, excluded, relative_gap)
        if found is None:
            return None
        chosen, dual = found
        if all(_within(menu.costs[n][chosen], most) for n, most in limits.items()):
            return chosen, (dual / OBJECTIVE_SCALE - TIE) * unit
        excluded.append(chosen)
    raise SFTError(f"The solver HiGHS broke the limits {dict(limits)} {TRIES} times in a row.")


def _affordable(menu: _Menu, limits: Mapping[str, float]) -> _Menu | None:
    """Without the options that do not fit even beside the cheapest of all others."""
    layers = int(menu.layer[-1]) + 1
    while True:
        fits = np.ones(len(menu.layer), dtype=np.bool_)
        for name, most in limits.items():
            room = most - math.fsum(menu.lowest(menu.costs[name])) + SLACK * abs(most)
            fits &= menu.excess(menu.costs[name]) <= room
        if fits.all():
            return menu
        if len(np.unique(menu.layer[fits])) < layers:
            return None
        menu = menu.only(fits)


def _undominated(menu: _Menu) -> _Menu:
    """Without the options to which another of the layer is at least equal in everything."""
    table = np.stack([menu.damage, *menu.costs.values()], axis=1)
    order = np.lexsort((menu.option, *table.T[::-1], menu.layer))
    kept = np.zeros(len(table), dtype=np.bool_)
    layer, best = -1, table[:0]
    for position in order:
        if menu.layer[position] != layer:
            layer, best = menu.layer[position], table[:0]
        if not (best <= table[position]).all(axis=1).any():
            kept[position] = True
            best = np.vstack([best, table[position]])
    return menu.only(kept)


def _flatten(
    damages: Sequence[NDArray[np.float64]], costs: Mapping[str, Sequence[NDArray[np.float64]]]
) -> _Menu:
    sizes = [len(d) for d in damages]
    menu = _Menu(
        layer=np.repeat(np.arange(len(sizes)), sizes),
        option=_joined([np.arange(size) for size in sizes]).astype(np.intp),
        damage=_joined(damages),
        costs={name: _joined(cost) for name, cost in costs.items()},
    )
    finite = np.isfinite(menu.damage)
    for cost in menu.costs.values():
        finite &= np.isfinite(cost)
    return menu.only(finite)


def _joined(rows: Sequence[NDArray[Any]]) -> Floats:
    return np.concatenate([np.zeros(0), *rows])


def _check(
    damages: Sequence[NDArray[np.float64]],
    costs: Mapping[str, Sequence[NDArray[np.float64]]],
    limits: Mapping[str, float],
) -> None:
    shapes = [np.shape(d) for d in damages]
    if any(len(shape) != 1 for shape in shapes):
        raise InputError("Each entry of damages must be one row of numbers, one an option.")
    for name, cost in costs.items():
        if [np.shape(c) for c in cost] != shapes:
            raise InputError(f"Cost '{name}' must have one number for each damage.")
    for name, most in limits.items():
        if name not in costs:
            known = ", ".join(costs) or "none"
            raise InputError(f"There is a limit on '{name}', but no such cost. Known: {known}.")
        if not most > -math.inf:
            raise InputError(f"The limit on '{name}' is {most}; a number is wanted.")


def _within(cost: Floats, most: float) -> bool:
    return math.fsum(cost) <= most + SLACK * abs(most)


def _too_little(name: str, lowest: float, limits: Mapping[str, float]) -> str:
    return f"The lowest total of '{name}' is {lowest:.10g}; at most {limits[name]:.10g} was asked."


def _infeasible(message: str, feasible: dict[str, float]) -> Solution:
    return Solution((), math.inf, math.inf, 0.0, "infeasible", message, feasible)


def _optimal(
    choice: tuple[int, ...], value: float, bound: float, feasible: dict[str, float]
) -> Solution:
    gap = 0.0 if value == bound else (value - bound) / (abs(value) or 1.0)
    message = f"Least damage {value:.6g}; nothing within the limits is below {bound:.6g}."
    return Solution(choice, value, bound, gap, "optimal", message, feasible)
