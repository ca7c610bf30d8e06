"""The verb `plan`: from a profile and a budget to one option per layer, each with its reason."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import (
    DENSE,
    KEEP,
    STORED,
    Cost,
    LayerProfile,
    Option,
    Plan,
    PlanRow,
    Profile,
    totals,
)
from sft.planning.asked import asked_options, kept
from sft.planning.feasible import budget_error
from sft.planning.menus import Menu, Problem, gains_no_time, is_low_rank, runs
from sft.planning.reasons import explain
from sft.planning.solve import Solution

SENSITIVE = 0.02  # damage of rounding alone above which a layer may stay in float unasked
SPARING = 1.1  # by how much the damage may grow so that layers which gain no time are left whole


def plan(
    profile: Profile,
    budget: Budget,
    keep: Sequence[str] = (),
    overrides: Mapping[str, Option] | None = None,
    method: str = "exact",
) -> Plan:
    """Choose rank and bits of every layer together: least damage within the budget.

    keep : names or patterns (`layer1.*`) of layers that stay in float.
    overrides : the option of a layer, by name or pattern, which must be on its menu.
    method : "exact", or "lagrangian": faster, near the optimum; the plan's `gap` says how near.
    The limits on size, MACs, latency and memory are planned for; `max_drop` and `minimize` need
    measuring. With no limit every layer becomes dense in its widest integers. A layer
    stays in float only where it is asked for, or where rounding it alone would do much damage. It
    stays whole where no low rank is faster in the target, as far as the limits allow that at a
    damage at most a tenth greater; value and bound are then those of the smaller menus.
    Raises `BudgetError` with what is feasible, or `InputError` for a name or option that is not.
    """
    problem, asked = pose(profile, budget.limits(profile.original), keep, overrides or {})
    solution = problem.solve(method=method)
    if solution.status == "infeasible":
        raise budget_error(profile, budget, problem, asked)
    problem, solution = _spared(profile, problem, solution, asked, method)
    return _assemble(profile, budget, problem, asked, solution)


def pose(
    profile: Profile,
    limits: Mapping[str, float],
    keep: Sequence[str],
    overrides: Mapping[str, Option],
    limited: bool | None = None,
) -> tuple[Problem, dict[str, Option]]:
    """The knapsack of a profile, and the options that the user fixed.

    limited : whether every layer may take any option (by default: when there are limits).
    """
    asked = asked_options(profile, keep, overrides)
    limited = bool(limits) if limited is None else limited
    menus = tuple(_menu(x, asked.get(x.layer.name), limited) for x in profile.layers)
    if "latency" in limits:
        for entry, menu in zip(profile.layers, menus, strict=True):
            _check_timed(entry, menu)
    names = tuple(entry.layer.name for entry in profile.layers)
    return Problem(names, menus, dict(limits), _overhead(profile)), asked


def _spared(
    profile: Profile,
    problem: Problem,
    solution: Solution,
    asked: Mapping[str, Option],
    method: str,
) -> tuple[Problem, Solution]:
    """The plan that leaves layers whole in which no low rank is faster, if it is nearly as good."""
    in_vain = [e.layer.name not in asked and gains_no_time(e) for e in profile.layers]
    chosen = problem.chosen(solution)
    if not any(vain and is_low_rank(c) for vain, c in zip(in_vain, chosen, strict=True)):
        return problem, solution
    menus = tuple(
        [c for c in menu if not is_low_rank(c)] if vain else menu
        for menu, vain in zip(problem.menus, in_vain, strict=True)
    )
    whole = dataclasses.replace(problem, menus=menus)
    other = whole.solve(method=method)
    good = other.status != "infeasible" and other.value <= SPARING * solution.value
    return (whole, other) if good else (problem, solution)


def _assemble(
    profile: Profile,
    budget: Budget,
    problem: Problem,
    asked: Mapping[str, Option],
    solution: Solution,
) -> Plan:
    limits = problem.limits
    rows = tuple(
        PlanRow(
            name=entry.layer.name,
            option=candidate.option,
            predicted_damage=candidate.damage,
            cost=candidate.cost,
            reason=explain(entry, candidate, entry.layer.name in asked, limits),
        )
        for entry, candidate in zip(profile.layers, problem.chosen(solution), strict=True)
    )
    return Plan(
        model=profile.model,
        target=profile.target,
        budget={k: v for k, v in budget.asked().items() if not isinstance(v, str)},
        rows=rows,
        cost=totals({"": problem.rest} | {row.name: row.cost for row in rows}),
        original=profile.original,
        status=solution.status,
        value=solution.value,
        bound=solution.bound,
        gap=solution.gap,
        input_shape=profile.input_shape,
        statistics=profile.statistics,
    )


def _menu(entry: LayerProfile, asked: Option | None, limited: bool) -> Menu:
    """The candidates a layer may take: the one asked for, or those that are known to work.

    A layer that has integers multiplies in float only where it is sensitive to them.
    """
    if asked is not None:
        return [next(c for c in entry.candidates if c.option == asked)]
    measured = [c for c in entry.candidates if runs(c)]
    if not measured:
        raise InputError(
            f"None of the {len(entry.candidates)} options of layer '{entry.layer.name}' has a "
            f"finite damage and runs in the target. Profile the model again."
        )
    dense = [c for c in measured if c.option.scheme == DENSE and c.option.weight_bits]
    integers = dense or [c for c in measured if c.option.scheme == STORED]
    sensitive = min((c.damage for c in integers), default=math.inf) > SENSITIVE
    if not limited:
        widest = max((c.option.weight_bits or 0 for c in integers), default=0)
        return (
            [kept(entry)] if sensitive else [c for c in integers if c.option.weight_bits == widest]
        )
    floats = () if sensitive else (KEEP, STORED) if dense else (KEEP,)
    return [c for c in measured if c.option.scheme not in floats]


def _check_timed(entry: LayerProfile, menu: Menu) -> None:
    if all(c.cost.latency is None for c in menu):
        raise InputError(
            f"A latency was asked for, but the profile holds none of layer '{entry.layer.name}' "
            f"as {', '.join(str(c.option) for c in menu[:3])}. Profile the model again, with its "
            f"latency measured."
        )


def _overhead(profile: Profile) -> Cost:
    """What the whole network costs beside its listed layers."""
    whole = totals({entry.layer.name: kept(entry).cost for entry in profile.layers})
    return Cost(
        params=profile.params - whole.params,
        macs=profile.overhead_macs,
        size=profile.size - whole.size,
        latency=profile.overhead_latency,
        memory=profile.overhead_memory,
    )
