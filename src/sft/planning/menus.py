"""The knapsack of menus of candidates: `solve` with the records' names for things."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sft.core.records import DENSE, KEEP, STORED, Candidate, Cost, LayerProfile
from sft.planning.solve import Solution, solve
from sft.planning.table import SLACK

SUMMED = ("size", "macs", "latency")  # of memory, the greatest counts: a filter of each menu

Menu = Sequence[Candidate]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One menu a layer, and what the whole network may cost.

    limits : the most of each cost (bytes, multiply-accumulates, milliseconds). rest : what the
    network costs beside its layers; its memory is what is alive elsewhere.
    """

    names: tuple[str, ...]
    menus: tuple[Menu, ...]
    limits: Mapping[str, float]
    rest: Cost

    def solve(self, minimize: str = "damage", method: str = "exact") -> Solution:
        """One candidate a menu with the least `minimize` in all: "damage" or a summed cost.

        The solution's `choice` is the place in each menu.
        """
        memory = self.limits.get("memory", math.inf)
        costs = {name: self._values(name) for name in SUMMED}
        room = {
            name: whole_limit(name, most) - (getattr(self.rest, name) or 0.0)
            for name, most in self.limits.items()
            if name in SUMMED
        }
        damages = [np.array([c.damage for c in menu]) for menu in self.menus]
        aim = damages if minimize == "damage" else costs[minimize]
        fits = [
            np.array([max(c.cost.memory, self.rest.memory) <= memory * (1 + SLACK) for c in menu])
            for menu in self.menus
        ]
        allowed = [np.where(fit, values, math.inf) for fit, values in zip(fits, aim, strict=True)]
        if not all(np.isfinite(values).all() for values in costs["latency"]):
            costs = {n: costs[n] for n in SUMMED if n != "latency" or "latency" in room}
        return solve(allowed, costs, room, method)

    def chosen(self, solution: Solution) -> list[Candidate]:
        return [menu[index] for menu, index in zip(self.menus, solution.choice, strict=True)]

    def limited_to(self, limits: Mapping[str, float]) -> "Problem":
        return dataclasses.replace(self, limits=limits)

    def least(self, cost: str) -> float:
        """The least of one cost that the whole network can have within the limits on the others.

        Infinite when these cannot be met together.
        """
        free = self.limited_to({n: most for n, most in self.limits.items() if n != cost})
        if cost == "memory":
            return free._least_memory()
        found = free.solve(minimize=cost)
        return found.value + (getattr(self.rest, cost) or 0.0)

    def _least_memory(self) -> float:
        """By bisection: with more memory, what was feasible stays so."""
        own = {c.cost.memory for menu in self.menus for c in menu}
        steps = sorted({max(memory, self.rest.memory) for memory in own} or {self.rest.memory})
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            tried = self.limited_to({**self.limits, "memory": steps[middle]})
            if tried.solve(method="lagrangian").status == "infeasible":
                low = middle + 1
            else:
                high = middle
        return float(steps[low]) if low < len(steps) else math.inf

    def _values(self, name: str) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
        """A cost of every candidate; infinite where it was not measured."""
        return [
            np.array([math.inf if v is None else float(v) for v in _costs(menu, name)])
            for menu in self.menus
        ]


def whole_limit(name: str, limit: float) -> float:
    """The greatest cost within a limit, which is a whole number for all but the latency.

    0.29 of 100 is 28.999999999999996 and means 29.
    """
    return limit if name == "latency" else math.floor(limit * (1 + SLACK))


def runs(candidate: Candidate) -> bool:
    """Whether its damage was measured and the runtime did not fail on it."""
    latency = candidate.cost.latency
    return math.isfinite(candidate.damage) and (latency is None or math.isfinite(latency))


def fastest(entry: LayerProfile) -> tuple[Candidate, Candidate] | None:
    """The fastest low rank and the fastest whole kernel of a layer, in integers where it has such.

    None where either was not measured.
    """
    timed = [c for c in entry.candidates if c.cost.latency is not None and runs(c)]
    whole = [c for c in timed if c.option.scheme == DENSE]
    whole = whole or [c for c in timed if c.option.scheme == KEEP]
    low = [c for c in timed if is_low_rank(c)]
    if not low or not whole:
        return None
    return min(low, key=_latency), min(whole, key=_latency)


def gains_no_time(entry: LayerProfile) -> bool:
    """Whether it is known that no low rank is faster than the whole kernel."""
    found = fastest(entry)
    return found is not None and _latency(found[0]) >= _latency(found[1])


def is_low_rank(candidate: Candidate) -> bool:
    return candidate.option.scheme not in (KEEP, DENSE, STORED)


def _latency(candidate: Candidate) -> float:
    latency = candidate.cost.latency
    return math.inf if latency is None else latency


def _costs(menu: Menu, name: str) -> Iterator[float | None]:
    return (getattr(c.cost, name) for c in menu)
