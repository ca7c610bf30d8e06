"""The knapsack of menus of candidates: `solve` with the records' names for things."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sft.core.records import Candidate
from sft.planning.solve import SLACK, Solution, solve

COSTS = ("size", "macs")

Menu = Sequence[Candidate]


def solve_menus(
    menus: Sequence[Menu], room: Mapping[str, float], minimize: str = "damage"
) -> Solution:
    """One candidate a menu with the least `minimize` in all ("damage", "size" or "macs").

    room : the most that the candidates may cost together, by cost name. The solution's `choice` is
    the place in each menu.
    """
    costs = {
        name: [np.array([float(getattr(c.cost, name)) for c in menu]) for menu in menus]
        for name in COSTS
    }
    damages = [np.array([c.damage for c in menu]) for menu in menus]
    return solve(damages if minimize == "damage" else costs[minimize], costs, room)


def whole_limit(limit: float) -> int:
    """The greatest whole cost within a limit: 0.29 of 100 is 28.999999999999996 and means 29."""
    return math.floor(limit * (1 + SLACK))
