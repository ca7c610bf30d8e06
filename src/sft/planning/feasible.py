"""What to say when a budget cannot be met: what was asked, and what is feasible instead."""

import math
from collections.abc import Iterable

from sft.core.budget import ABSOLUTE, Budget
from sft.core.errors import BudgetError
from sft.core.records import Profile
from sft.planning.menus import Problem, whole_limit

UNITS = {"size": "bytes", "macs": "MACs", "latency": "ms", "memory": "bytes of activations"}
SHOWN = 5
DIGITS = 4  # of milliseconds and of fractions, which are rounded up


def budget_error(
    profile: Profile, budget: Budget, problem: Problem, fixed: Iterable[str]
) -> BudgetError:
    """The error for a budget that no choice from the menus meets, in the fields that were asked.

    fixed : the layers whose option the user chose. Each number that is called feasible can be asked
    for as it stands.
    """
    limits = problem.limits
    names = {cost: _field(cost, budget, profile) for cost in limits}
    alone = {cost: problem.limited_to({}).least(cost) for cost in limits}
    possible = [cost for cost, most in limits.items() if alone[cost] <= whole_limit(cost, most)]
    parts = []
    for cost in limits:
        least = _words(names[cost], alone[cost], profile)
        said = "alone that is feasible, down to" if cost in possible else "the least is"
        parts.append(f"{_asked(names[cost], budget, profile)} was asked; {said} {least}.")
    if "memory" in limits and "memory" not in possible:
        parts.append(_most_memory(problem))
    for held, other in _trades(problem, possible):
        total = problem.limited_to({n: limits[n] for n in held}).least(other)
        if math.isfinite(total):
            asked = " and ".join(_asked(names[name], budget, profile) for name in held)
            parts.append(f"With {asked} the least is {_words(names[other], total, profile)}.")
    listed = list(fixed)
    if listed:
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        parts.append(
            f"Fixed by you: {', '.join(listed[:SHOWN])}{more}; setting them free may allow less."
        )
    return BudgetError(f"The budget cannot be met. {' '.join(parts)}")


def _trades(problem: Problem, possible: list[str]) -> list[tuple[list[str], str]]:
    """Limits to hold and the cost to give way: all others, or else each other one alone."""
    limits = problem.limits
    found = []
    for other in limits:
        held = [n for n in limits if n != other]
        if held and all(n in possible for n in held) and math.isfinite(problem.least(other)):
            found.append((held, other))
    if found or len(limits) == 2:
        return found
    return [([held], other) for held in possible for other in limits if held != other]


def _most_memory(problem: Problem) -> str:
    """Which layer, or what beside the layers, takes too much memory whatever becomes of it."""
    most = problem.limits["memory"]
    if problem.rest.memory > most:
        return f"Beside the layers {problem.rest.memory:,} bytes of activations are alive."
    least = {
        name: min(c.cost.memory for c in menu)
        for name, menu in zip(problem.names, problem.menus, strict=True)
    }
    name = max(least, key=lambda n: least[n])
    return f"No option of layer '{name}' takes less than {least[name]:,} bytes of activations."


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
        return f"{field}={value}{_share(value, ABSOLUTE[field], profile)}"
    return f"{field}={value:g} ({_amount(field, value * getattr(profile, field))})"


def _words(field: str, total: float, profile: Profile) -> str:
    """A total in the terms of a field, rounded up so that asking for it works.

    More than the original cannot be asked for as a fraction, and is told in absolute numbers.
    """
    if field in ABSOLUTE:
        cost = ABSOLUTE[field]
        number = _up(total) if cost == "latency" else math.ceil(total)
        return f"{field}={number}{_share(total, cost, profile)}"
    share = _up(total / getattr(profile, field))
    if share > 1:
        absolute = next(name for name, cost in ABSOLUTE.items() if cost == field)
        return _words(absolute, total, profile)
    return f"{field}={share:g} ({_amount(field, total)})"


def _up(value: float) -> float:
    scale = 10.0**DIGITS
    return math.ceil(value * scale * (1 - 1e-12)) / scale


def _share(value: float, cost: str, profile: Profile) -> str:
    whole = getattr(profile, cost)
    return f" ({value / whole:.4g} of the original)" if whole else ""


def _amount(cost: str, total: float) -> str:
    digits = DIGITS if cost == "latency" else 0
    return f"{total:,.{digits}f} {UNITS[cost]}"
