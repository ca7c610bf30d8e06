"""The Pareto front of the whole network: the least damage at each size, or at each latency.

At every price of the cost the layers are chosen one by one. Going down the price, each layer walks
along the corners of its own convex hull, and the network along those of the front's: all of them
come from one sort, and each is exactly optimal at its own cost. Where they are far apart, knapsacks
in between are solved.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from sft.core.errors import InputError
from sft.core.records import Candidate, Front, FrontPoint, Option, Profile, totals
from sft.planning.allocate import pose
from sft.planning.menus import Menu, Problem
from sft.planning.table import SLACK

COSTS = ("size", "latency")
Step = tuple[float, int, Candidate]  # damage saved for a unit of the cost, layer, what it becomes


def front(
    profile: Profile,
    cost: str = "size",
    points: int = 24,
    keep: Sequence[str] = (),
    overrides: Mapping[str, Option] | None = None,
) -> Front:
    """The Pareto front of a profile: networks between the cheapest and the one of least damage.

    cost : "size" (stored bytes) or "latency" (milliseconds, which the profile must hold).
    points : about how many, evenly spread over the cost by ratio; fewer where the menus hold fewer.
    keep, overrides : as for `plan`.
    Raises `InputError` for a latency that was not measured.
    """
    if cost not in COSTS:
        raise InputError(f"cost='{cost}': {' or '.join(map(repr, COSTS))} is wanted.")
    if points < 2:
        raise InputError(f"points={points}: a front has at least 2.")
    # A limit of infinity: nothing is ruled out but what has no latency.
    wanted = {cost: math.inf}
    problem, _ = pose(profile, wanted, keep, overrides or {})
    corners = [_point(problem, choice) for choice in _corners(problem, cost)]
    found = _spread(problem, cost, corners, points)
    return Front(profile.model, profile.target, cost, tuple(_unbeaten(found, cost)))


def _corners(problem: Problem, cost: str) -> list[list[Candidate]]:
    """The choices at the corners of the convex hull, from the cheapest to that of least damage."""
    chosen: list[Candidate] = []
    steps: list[Step] = []
    for layer, menu in enumerate(problem.menus):
        hull = _hull(menu, cost)
        chosen.append(hull[0])
        steps += [(_saved(a, b, cost), layer, b) for a, b in pairwise(hull)]
    found = [list(chosen)]
    for _, layer, candidate in sorted(steps, key=lambda step: (-step[0], step[1])):
        chosen[layer] = candidate
        found.append(list(chosen))
    return found


def _hull(menu: Menu, cost: str) -> list[Candidate]:
    """The lower convex hull of damage over cost, as far as the damage falls."""
    known = [c for c in menu if getattr(c.cost, cost) is not None]
    hull: list[Candidate] = []
    for c in sorted(known, key=lambda c: (getattr(c.cost, cost), c.damage)):
        if hull and c.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _saved(hull[-1], c, cost) >= _saved(hull[-2], hull[-1], cost):
            hull.pop()
        hull.append(c)
    return hull


def _saved(one: Candidate, other: Candidate, cost: str) -> float:
    """Damage that a unit of the cost saves on the way from one to the dearer other."""
    more = float(getattr(other.cost, cost) - getattr(one.cost, cost))
    return (one.damage - other.damage) / more


def _spread(
    problem: Problem, cost: str, corners: Sequence[FrontPoint], points: int
) -> list[FrontPoint]:
    """Corners near even steps of the cost, and solved knapsacks where a step has no corner."""
    costs = np.array([getattr(p.cost, cost) for p in corners], dtype=np.float64)
    if len(corners) <= 1 or not costs[0] > 0:
        return list(corners)
    wanted = np.geomspace(costs[0], costs[-1], points)
    found = [corners[0], corners[-1]]
    for low, most in pairwise(wanted):
        inside = np.flatnonzero((costs > low) & (costs <= most * (1 + SLACK)))
        found += [corners[int(inside[-1])]] if len(inside) else _solved(problem, cost, most)
    return found


def _solved(problem: Problem, cost: str, most: float) -> list[FrontPoint]:
    """The network of least damage that costs at most `most`."""
    limited = problem.limited_to({cost: most})
    solution = limited.solve()
    if solution.status == "infeasible":
        return []
    return [_point(problem, limited.chosen(solution), solution.bound)]


def _point(problem: Problem, chosen: Sequence[Candidate], bound: float | None = None) -> FrontPoint:
    """A network as a point; without a bound it is the least damage at its cost."""
    parts = dict(zip(problem.names, chosen, strict=True))
    damage = math.fsum(c.damage for c in chosen)
    whole = totals({"": problem.rest} | {name: c.cost for name, c in parts.items()})
    layers = {name: str(c.option) for name, c in parts.items()}
    return FrontPoint(whole, damage, damage if bound is None else bound, layers)


def _unbeaten(points: Sequence[FrontPoint], cost: str) -> list[FrontPoint]:
    """By rising cost, those whose damage is below that of every cheaper one."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (getattr(p.cost, cost), p.damage)):
        if not kept or point.damage < kept[-1].damage:
            kept.append(point)
    return kept
