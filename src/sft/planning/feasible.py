"""What to say when a budget cannot be met: what was asked, and what is feasible instead."""

import math
from collections.abc import Iterable, Mapping, Sequence

from sft.core.budget import ABSOLUTE, Budget
from sft.core.errors import BudgetError
from sft.core.records import Cost, Profile
from sft.planning.menus import Menu, solve_menus

UNITS = {"size": "bytes", "macs": "MACs"}
SHOWN = 5


def budget_error(
    profile: Profile,
    budget: Budget,
    menus: Sequence[Menu],
    room: Mapping[str, float],
    rest: Cost,
    fixed: Iterable[str],
) -> BudgetError:
    """The error for a budget that no choice from the menus meets, in the fields that were asked.

    room : what the layers may cost; rest : what the network costs beside them; fixed : the layers
    whose option the user chose. Each number that is called feasible can be asked for as it stands.
    """
    names = {cost: _field(cost, budget, profile) for cost in room}
    lowest = solve_menus(menus, {}).feasible
    parts = []
    for cost in room:
        least = _words(names[cost], lowest[cost] + getattr(rest, cost), profile)
        met = lowest[cost] <= room[cost]
        alone = f"alone that is feasible, down to {least}" if met else f"the least is {least}"
        parts.append(f"{_asked(names[cost], budget, profile)} was asked; {alone}.")
    for held in room:
        for other in room:
            if held != other and lowest[held] <= room[held]:
                found = solve_menus(menus, {held: room[held]}, minimize=other)
                least = _words(names[other], found.value + getattr(rest, other), profile)
                parts.append(f"With {_asked(names[held], budget, profile)} the least is {least}.")
    listed = list(fixed)
    if listed:
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        parts.append(
            f"Fixed by you: {', '.join(listed[:SHOWN])}{more}; setting them free may allow less."
        )
    return BudgetError(f"The budget cannot be met. {' '.join(parts)}")


def _field(cost: str, budget: Budget, profile: Profile) -> str:
    """The field of the budget that limits this cost: the tighter one if both are set."""
    fraction = getattr(budget, cost)
    absolute = next(field for field, name in ABSOLUTE.items() if name == cost)
    value = getattr(budget, absolute)
    if value is None:
        return cost
    return cost if fraction is not None and fraction * getattr(profile, cost) < value else absolute


def _asked(field: str, budget: Budget, profile: Profile) -> str:
    value = getattr(budget, field)
    if field in ABSOLUTE:
        return f"{field}={value} ({value / getattr(profile, ABSOLUTE[field]):.4g} of the original)"
    return f"{field}={value:g} ({value * getattr(profile, field):,.0f} {UNITS[field]})"


def _words(field: str, total: float, profile: Profile) -> str:
    """A total in the terms of a field, rounded up so that asking for it works."""
    if field in ABSOLUTE:
        share = total / getattr(profile, ABSOLUTE[field])
        return f"{field}={total:.0f} ({share:.4g} of the original)"
    share = math.ceil(total / getattr(profile, field) * 1e4) / 1e4
    return f"{field}={share:g} ({total:,.0f} {UNITS[field]})"
