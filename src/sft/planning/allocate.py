"""The verb `plan`: from a profile and a budget to one option per layer, each with its reason."""

import math
from collections.abc import Mapping, Sequence

from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import (
    DENSE,
    KEEP,
    STORED,
    Candidate,
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
from sft.planning.menus import Menu, Problem, runs
from sft.planning.reasons import explain
from sft.planning.solve import verdict
from sft.planning.sparing import spared

SENSITIVE = 0.02  # damage of rounding alone above which a layer may stay in float unasked


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
    damage at most a tenth greater (`spared`); `bound` and `gap` are of all menus even so.
    Raises `BudgetError` with what is feasible, or `InputError` for a name or option that is not.
    """
    problem, asked = pose(profile, budget.limits(profile.original), keep, overrides or {})
    solution = problem.solve(method=method)
    if solution.status == "infeasible":
        raise budget_error(profile, budget, problem, asked)
    chosen = spared(profile, problem, solution, asked, method)
    return _assemble(profile, budget, problem, asked, chosen, solution.bound)


def restate(
    plan: Plan,
    profile: Profile,
    budget: Budget,
    keep: Sequence[str],
    overrides: Mapping[str, Option] | None,
    bound: float,
) -> Plan:
    """The same choices with the damages, costs and reasons of another profile of the network.

    budget, keep, overrides : what the plan was made with. bound : no choice has less damage by that
    profile.
    """
    problem, asked = pose(profile, budget.limits(profile.original), keep, overrides or {})
    chosen = [
        next(c for c in entry.candidates if c.option == plan.option(entry.layer.name))
        for entry in profile.layers
    ]
    return _assemble(profile, budget, problem, asked, chosen, bound)


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


def _assemble(
    profile: Profile,
    budget: Budget,
    problem: Problem,
    asked: Mapping[str, Option],
    chosen: Sequence[Candidate],
    bound: float,
) -> Plan:
    rows = tuple(
        PlanRow(
            name=entry.layer.name,
            option=candidate.option,
            predicted_damage=candidate.damage,
            cost=candidate.cost,
            reason=explain(entry, candidate, entry.layer.name in asked, problem.limits),
        )
        for entry, candidate in zip(profile.layers, chosen, strict=True)
    )
    value = math.fsum(candidate.damage for candidate in chosen)
    bound = min(bound, value)
    gap, status = verdict(value, bound)
    return Plan(
        model=profile.model,
        target=profile.target,
        budget={k: v for k, v in budget.asked().items() if not isinstance(v, str)},
        rows=rows,
        cost=totals({"": problem.rest} | {row.name: row.cost for row in rows}),
        original=profile.original,
        status=status,
        value=value,
        bound=bound,
        gap=gap,
        input_shape=profile.input_shape,
        statistics=profile.statistics,
    )


def _menu(entry: LayerProfile, asked: Option | None, limited: bool) -> Menu:
    """The candidates a layer may take: the one asked for, or those that are known to work.

    A layer that has integers multiplies in float only where it is sensitive to them, and where it
    runs so.
    """
    if asked is not None:
        return [next(c for c in entry.candidates if c.option == asked)]
    measured = [c for c in entry.candidates if runs(c)]
    if not measured:
        raise InputError(
            f"None of the {len(entry.candidates)} options of layer '{entry.layer.name}' has a "
            f"finite damage and runs in the target. Profile the model again."
        )
    dense = [c for c in measured if c.option.scheme == DENSE]
    integers = dense or [c for c in measured if c.option.scheme == STORED]
    sensitive = min((c.damage for c in integers), default=math.inf) > SENSITIVE
    if not limited and sensitive:
        mildest = min(integers or measured, key=lambda c: c.damage)
        return [kept(entry) if runs(kept(entry)) else mildest]
    if not limited:
        widest = max(c.option.weight_bits or 0 for c in integers)
        return [c for c in integers if c.option.weight_bits == widest]
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
