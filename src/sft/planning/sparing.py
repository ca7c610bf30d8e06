"""Layers that low rank does not make faster stay whole, as far as that costs little damage.

Which of them must be split after all is a question of the limits: a set of which none can be left
out is looked for. Source: irreducible sets under a monotone test, one member at a time by bisection
(Hemery, Lecoutre, Sais and Boussemart 2006, "Extracting MUCs from constraint networks").
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from sft.core.records import Candidate, Option, Profile
from sft.planning.menus import SUMMED, Problem, gains_no_time, is_low_rank
from sft.planning.solve import Solution
from sft.planning.table import SLACK

SPARING = 1.1  # by how much the damage may grow so that layers which gain no time are left whole
SOLVES = 8  # at most, beside the one of the plain problem

Chosen = list[Candidate]


def spared(
    profile: Profile,
    problem: Problem,
    solution: Solution,
    asked: Mapping[str, Option],
    method: str = "exact",
) -> Chosen:
    """One candidate a layer: the solution's, or a choice that splits fewer layers in vain.

    A layer is split in vain if it is known that no low rank is faster there. Of the layers that the
    solution splits so, all stay whole that can at a damage at most `SPARING` times as great; after
    `SOLVES` problems the search ends with what it has. Layers in `asked` are left as they are.
    """
    chosen = problem.chosen(solution)
    vain = [
        i
        for i, entry in enumerate(profile.layers)
        if entry.layer.name not in asked and gains_no_time(entry)
    ]
    split = [i for i in vain if is_low_rank(chosen[i])]
    split.sort(key=lambda i: (-_worth(problem, i, chosen[i]), i))
    best = chosen

    def works(given_back: Sequence[int]) -> bool:
        nonlocal best
        whole = _without_low_rank(problem, set(vain) - set(given_back))
        found = whole.solve(method=method)
        if found.status == "infeasible" or found.value > SPARING * solution.value:
            return False
        best = whole.chosen(found)
        return True

    _reduce(split, works)
    return best


def _reduce(split: Sequence[int], works: Callable[[Sequence[int]], bool]) -> None:
    """Ask for ever fewer layers to split, until none can be left out or `SOLVES` were asked.

    All of `split` together work, and with a set its every superset.
    """
    needed: list[int] = []
    rest, left = list(split), SOLVES
    while rest and left:
        left -= 1
        if works(needed):
            return
        low, high = 1, len(rest)
        while low < high and left:
            left -= 1
            middle = (low + high) // 2
            if works([*needed, *rest[:middle]]):
                high = middle
            else:
                low = middle + 1
        needed, rest = [*needed, rest[high - 1]], rest[: high - 1]


def _without_low_rank(problem: Problem, layers: Collection[int]) -> Problem:
    menus = tuple(
        [c for c in menu if not is_low_rank(c)] if i in layers else menu
        for i, menu in enumerate(problem.menus)
    )
    return dataclasses.replace(problem, menus=menus)


def _worth(problem: Problem, layer: int, split: Candidate) -> float:
    """What a split saves over the cheapest whole kernel of no more damage, or else the mildest one.

    In shares of the limits; infinite where no whole kernel fits into the memory.
    """
    memory = problem.limits.get("memory", math.inf) * (1 + SLACK)
    whole = [c for c in problem.menus[layer] if not is_low_rank(c) and c.cost.memory <= memory]
    mild = [c for c in whole if c.damage <= split.damage]
    mild = mild or sorted(whole, key=lambda c: c.damage)[:1]
    least = min((_share(problem, c) for c in mild), default=math.inf)
    return least - _share(problem, split)


def _share(problem: Problem, candidate: Candidate) -> float:
    """The limited costs of a candidate, each as a share of its limit, together."""
    costs = [(getattr(candidate.cost, n), problem.limits[n]) for n in SUMMED if n in problem.limits]
    return sum(math.inf if cost is None else cost / most for cost, most in costs)
