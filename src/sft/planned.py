"""Planning with the network at hand: the plan is measured in place, and made again from that."""

from collections.abc import Mapping, Sequence

from torch import nn

from sft.core.budget import Budget
from sft.core.data import Data
from sft.core.progress import say
from sft.core.records import Option, Plan, Profile
from sft.planning.allocate import plan as make_plan
from sft.planning.allocate import restate
from sft.profiling.remeasure import remeasure

ROUNDS = 2


def plan_in_place(
    profile: Profile,
    budget: Budget,
    model: nn.Module,
    data: Data,
    *,
    keep: Sequence[str] = (),
    overrides: Mapping[str, Option] | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Plan:
    """The plan of least measured damage among those that `rounds` of correction lead to.

    Each round puts the chosen network in place, corrects the damages of the menus by what every
    layer does there (`remeasure`) and plans again; it ends early when nothing changes. The plan's
    damages, reasons and bound come from the menus as they were corrected with that plan in place.
    Without a limit there is nothing to choose, and nothing is measured. Raises what `plan` raises.
    """
    found = make_plan(profile, budget, keep, overrides)
    if not budget.limits(profile.original):
        return found
    best, least = found, float("inf")
    seen: set[str] = set()
    for number in range(rounds + 1):
        key = " ".join(str(row.option) for row in found.rows)
        if key in seen:
            break
        seen.add(key)
        measured = remeasure(profile, found, model, data, seed=seed)
        predicted = f"damage {found.value:.4g} predicted, {measured.damage:.4g} in place"
        say(f"  plan {number + 1}: {predicted}")
        profile = measured.profile
        following = make_plan(profile, budget, keep, overrides)
        if measured.damage < least:
            best = restate(found, profile, budget, keep, overrides, following.bound)
            least = measured.damage
        found = following
    return best
