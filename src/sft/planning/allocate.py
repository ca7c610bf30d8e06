"""The verb `plan`: from a profile and a budget to one option per layer, each with its reason."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

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
from sft.planning.feasible import budget_error
from sft.planning.menus import Menu, solve_menus, whole_limit
from sft.planning.reasons import explain
from sft.planning.solve import Solution

NEAREST = 5
SENSITIVE = 0.02  # damage of rounding alone above which a layer may stay in float unasked


def plan(
    profile: Profile,
    budget: Budget,
    keep: Sequence[str] = (),
    overrides: Mapping[str, Option] | None = None,
) -> Plan:
    """Choose rank and bits of every layer together: least damage within the budget.

    keep : names or patterns (`layer1.*`) of layers that stay in float.
    overrides : the option of a layer, which must be on its menu.
    Only the limits on size and MACs are planned for; `max_drop` and `minimize` need measuring.
    With no such limit every layer becomes dense in integers, at its least damage. A layer stays
    in float only where it is asked for, or where rounding it alone would do much damage.
    Raises `BudgetError` with what is feasible, or `InputError` for a name or option that is not.
    """
    asked = _asked_options(profile, keep, overrides or {})
    limits = budget.limits(profile.original)
    menus = [_menu(entry, asked.get(entry.layer.name), bool(limits)) for entry in profile.layers]
    rest = _overhead(profile)
    room = {cost: whole_limit(most) - getattr(rest, cost) for cost, most in limits.items()}
    solution = solve_menus(menus, room)
    if solution.status != "optimal":
        raise budget_error(profile, budget, menus, room, rest, asked)
    chosen = [menu[index] for menu, index in zip(menus, solution.choice, strict=True)]
    return _assemble(profile, budget, chosen, rest, asked, solution)


def _assemble(
    profile: Profile,
    budget: Budget,
    chosen: Sequence[Candidate],
    rest: Cost,
    asked: Mapping[str, Option],
    solution: Solution,
) -> Plan:
    limited = bool(budget.limits(profile.original))
    rows = tuple(
        PlanRow(
            name=entry.layer.name,
            option=candidate.option,
            predicted_damage=candidate.damage,
            cost=candidate.cost,
            reason=explain(entry, candidate, entry.layer.name in asked, limited),
        )
        for entry, candidate in zip(profile.layers, chosen, strict=True)
    )
    return Plan(
        model=profile.model,
        target=profile.target,
        budget={k: v for k, v in budget.asked().items() if not isinstance(v, str)},
        rows=rows,
        cost=totals({"": rest} | {row.name: row.cost for row in rows}),
        original=profile.original,
        status=solution.status,
        value=solution.value,
        bound=solution.bound,
        gap=solution.gap,
        input_shape=profile.input_shape,
        statistics=profile.statistics,
    )


def _menu(entry: LayerProfile, asked: Option | None, limited: bool) -> Menu:
    """The candidates a layer may take: the one asked for, or those whose damage is known."""
    if asked is not None:
        return [next(c for c in entry.candidates if c.option == asked)]
    measured = [c for c in entry.candidates if math.isfinite(c.damage)]
    if not measured:
        raise InputError(
            f"None of the {len(entry.candidates)} options of layer '{entry.layer.name}' has a "
            f"finite damage. Profile the model again."
        )
    integers = [c for c in measured if c.option.scheme in (DENSE, STORED) and c.option.weight_bits]
    sensitive = min((c.damage for c in integers), default=math.inf) > SENSITIVE
    if limited:
        return measured if sensitive else [c for c in measured if c.option.scheme != KEEP]
    return [_kept(entry)] if sensitive else integers


def _asked_options(
    profile: Profile, keep: Sequence[str], overrides: Mapping[str, Option]
) -> dict[str, Option]:
    """The options that the user fixed, by layer; each is on the menu of its layer."""
    entries = {entry.layer.name: entry for entry in profile.layers}
    asked: dict[str, Option] = {}
    for pattern in (keep,) if isinstance(keep, str) else keep:
        found = [n for n in entries if n == pattern or fnmatchcase(n, pattern)]
        if not found:
            raise InputError(
                f"keep='{pattern}' matches no layer. The layers are: {', '.join(entries)}."
            )
        asked |= {n: _on_menu(entries[n], _kept(entries[n]).option).option for n in found}
    for name, option in overrides.items():
        if name not in entries:
            raise InputError(
                f"An option is given for '{name}', but there is no such layer. The layers are: "
                f"{', '.join(entries)}."
            )
        if name in asked and option != asked[name]:
            raise InputError(
                f"Layer '{name}' is to be kept in float and to become '{option}'. Take it out of "
                f"keep=, or drop the option."
            )
        asked[name] = _on_menu(entries[name], option).option
    return asked


def _on_menu(entry: LayerProfile, option: Option) -> Candidate:
    menu = {c.option: c for c in entry.candidates}
    found = menu.get(option)
    if found is not None and math.isfinite(found.damage):
        return found
    what = "is not on its menu" if found is None else "could not be measured there"
    measured = [c.option for c in entry.candidates if math.isfinite(c.damage)]
    nearest = sorted(measured, key=lambda other: _distance(option, other))[:NEAREST]
    why = entry.layer.refusals.get(option.scheme)
    raise InputError(
        f"'{option}' for layer '{entry.layer.name}' with weight {entry.layer.weight_shape} {what}"
        f"{f' ({why})' if why else ''}. The nearest of its {len(measured)} options are: "
        f"{', '.join(map(str, nearest))}."
    )


def _distance(wanted: Option, other: Option) -> tuple[bool, int, int]:
    """How far one option is from another: first the scheme, then the rank, then the bits."""
    rank = abs(sum(wanted.rank) - sum(other.rank))
    bits = abs((wanted.weight_bits or 32) - (other.weight_bits or 32))
    return wanted.scheme != other.scheme, rank, bits


def _kept(entry: LayerProfile) -> Candidate:
    for candidate in entry.candidates:
        if candidate.option.scheme == KEEP:
            return candidate
    raise InputError(
        f"The profile has no 'keep' option for layer '{entry.layer.name}', so what the original "
        f"costs is unknown. Profile the model again."
    )


def _overhead(profile: Profile) -> Cost:
    """What the whole network costs beside its listed layers."""
    kept = totals({entry.layer.name: _kept(entry).cost for entry in profile.layers})
    return Cost(
        params=profile.params - kept.params,
        macs=profile.overhead_macs,
        size=profile.size - kept.size,
    )
