"""The multiple-choice knapsack: one option per layer, least damage, costs within their limits.

On plain arrays. What cannot be in an optimal answer is left out first (it does not fit, or another
option of the layer is no worse in anything). The Lagrangian relaxation then gives a bound, and a
good answer beside it; an option that would lift the bound above that answer is left out too. Of
what remains, a few options a layer, every choice near the bound is enumerated; where these are too
many, it is solved by mixed-integer programming (HiGHS), one binary a (layer, option). Everything is
counted as excess over the layer's lowest and scaled by the room that is left, so that the solver's
tolerances mean nothing, and whatever comes out is checked against the limits here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sft.core.errors import InputError, SFTError
from sft.planning.enumeration import enumerate_best
from sft.planning.highs import choose
from sft.planning.lagrangian import Relaxation, good_answer, improved, limited_rows, relax
from sft.planning.table import SLACK, Floats, Ints, Table, affordable, flatten, undominated

METHODS = ("exact", "lagrangian")
TIE = 1e-9  # of the damage: how much the lower cost of one of two equal answers counts
OBJECTIVE_SCALE = 1e6
ROW_SCALE = 1e4
ROUGH_GAP = 1e-2
TRIES = 50
PROVEN = 1e-7  # relative gap that counts as none: the tolerance of the solver's own bound
COARSE = 1e-2  # an answer this far below the greatest damage: the relaxation is scaled anew


@dataclasses.dataclass(frozen=True)
class Solution:
    """What `solve` found.

    choice : index of the option of each layer; empty when infeasible.
    value : summed damage of the choice; bound : no choice within the limits has less;
    gap : ``(value - bound) / |value|``. Infinite, infinite and 0 when infeasible.
    status : "optimal", "feasible" (it fits, and the gap is open) or "infeasible"; `message` says it
    in words.
    feasible : lowest reachable total of each cost alone.
    """

    choice: tuple[int, ...]
    value: float
    bound: float
    gap: float
    status: str
    message: str
    feasible: dict[str, float] = dataclasses.field(default_factory=dict)


def solve(
    damages: Sequence[Floats],
    costs: Mapping[str, Sequence[Floats]],
    limits: Mapping[str, float],
    method: str = "exact",
) -> Solution:
    """Choose one option per layer with the least summed damage.

    damages : ``damages[l][o]``, damage of option `o` in layer `l`.
    costs : the same shape for each cost name; a cost without a limit only breaks ties.
    limits : the most the sum of that cost may be.
    method : "exact", or "lagrangian": faster, near the optimum, and how near is in `gap`.
    An option with a non-finite damage or cost is forbidden. Equal damage goes to the lower cost.
    Raises `InputError` when the arrays do not belong together.
    """
    _check(damages, costs, limits, method)
    table = flatten(damages, costs)
    missing = sorted(set(range(len(damages))) - set(table.layer.tolist()))
    if missing:
        return _infeasible(
            f"Layer {missing[0]} has no allowed option: the damage or a cost of each of its "
            f"{len(damages[missing[0]])} options is not finite.",
            {},
        )
    lowest = {n: math.fsum(table.lowest(c)) if len(c) else 0.0 for n, c in table.costs.items()}
    for name, most in limits.items():
        if lowest[name] > most + SLACK * abs(most):
            return _infeasible(_too_little(name, lowest[name], limits), lowest)
    found = _optimum(table, limits, method) if damages else ((), 0.0, 0.0)
    if found is None:
        return _infeasible("Each limit can be met alone, but not all together.", lowest)
    return _solved(*found, lowest)


def verdict(value: float, bound: float) -> tuple[float, str]:
    """The gap of a choice that fits, and its status: "optimal", or "feasible" if it is open."""
    gap = 0.0 if value == bound else (value - bound) / (abs(value) or 1.0)
    return gap, "optimal" if gap <= PROVEN else "feasible"


def _optimum(
    table: Table, limits: Mapping[str, float], method: str
) -> tuple[tuple[int, ...], float, float] | None:
    """Choice, value and bound; None when the limits cannot be met together."""
    fitting = affordable(table, limits)
    if fitting is None:
        return None
    table = undominated(fitting, list(limits))
    found = _near(table, limits)
    if found is None:
        return None
    relaxed, chosen = found
    bound = math.fsum(table.lowest(table.damage)) + relaxed.bound
    if method == "exact":
        chosen, proven = _best(relaxed, chosen, limits)
        bound = max(bound, proven)
    value = math.fsum(relaxed.table.damage[chosen])
    return tuple(relaxed.table.option[chosen].tolist()), value, min(bound, value)


def _best(relaxed: Relaxation, known: Ints, limits: Mapping[str, float]) -> tuple[Ints, float]:
    """The best choice and a bound: by enumeration, or by HiGHS where that would take long."""
    table, span = relaxed.table, relaxed.total(known)
    tie = TIE * (span if span > 0 else 1.0)
    ties = tie * table.burden()
    chosen = enumerate_best(relaxed, known, ties, lambda c: _keeps(table, c, limits))
    if chosen is not None:
        return chosen, math.fsum(table.damage[chosen]) - tie + math.fsum(ties[chosen])
    searched = _search(table, limits, span, 0.0)
    if searched is None:
        raise SFTError("The solver HiGHS lost an answer that it had found before.")
    return searched[0], math.fsum(table.lowest(table.damage)) + searched[1]


def _near(table: Table, limits: Mapping[str, float]) -> tuple[Relaxation, Ints] | None:
    """A relaxation without the options that cannot be in a better choice than the one beside it.

    None when the limits cannot be met together.
    """
    while True:
        relaxed = relax(table, limits)
        if relaxed is None:
            return None
        chosen = good_answer(relaxed)
        if chosen is None or not _keeps(relaxed.table, chosen, limits):
            rough = _search(table, limits, float(relaxed.damage.max()), ROUGH_GAP)
            if rough is None:
                return None
            chosen = improved(relaxed, rough[0])
            chosen = chosen if _keeps(table, chosen, limits) else rough[0]
        value = relaxed.total(chosen)
        may = relaxed.within(value * (1 + TIE))
        may[chosen] = True
        place = np.cumsum(may) - 1
        coarse = value < COARSE * float(relaxed.damage.max())
        relaxed, chosen = relaxed.only(may), place[chosen]
        if not coarse or may.all():
            return relaxed, chosen
        table = relaxed.table


def _search(
    table: Table, limits: Mapping[str, float], span: float, relative_gap: float
) -> tuple[Ints, float] | None:
    """Positions of the chosen options, and a lower bound of the excess damage of any choice.

    span : excess damage that counts as 1. Ties are broken by adding `TIE` times the costs, which
    are scaled to at most 1 in all, so the bound without them is at most that much lower.
    """
    unit = span if span > 0 else 1.0
    objective = table.excess(table.damage) / unit + TIE * table.burden()
    rows = [row * ROW_SCALE for row in limited_rows(table, limits)]
    excluded: list[Ints] = []
    for _ in range(TRIES):
        found = choose(
            objective * OBJECTIVE_SCALE, table.layer, rows, [ROW_SCALE] * len(rows), excluded,
            relative_gap,
        )  # fmt: skip
        if found is None:
            return None
        chosen, dual = found
        if _keeps(table, chosen, limits):
            return chosen, (dual / OBJECTIVE_SCALE - TIE) * unit
        excluded.append(chosen)
    raise SFTError(f"The solver HiGHS broke the limits {dict(limits)} {TRIES} times in a row.")


def _keeps(table: Table, chosen: Ints, limits: Mapping[str, float]) -> bool:
    return all(_within(table.costs[n][chosen], most) for n, most in limits.items())


def _check(
    damages: Sequence[Floats],
    costs: Mapping[str, Sequence[Floats]],
    limits: Mapping[str, float],
    method: str,
) -> None:
    if method not in METHODS:
        raise InputError(f"method='{method}': {' or '.join(map(repr, METHODS))} is wanted.")
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


def _solved(
    choice: tuple[int, ...], value: float, bound: float, feasible: dict[str, float]
) -> Solution:
    gap, status = verdict(value, bound)
    message = f"Damage {value:.6g}; nothing within the limits is below {bound:.6g}."
    return Solution(choice, value, bound, gap, status, message, feasible)
