"""Planning with the network at hand: plans are measured in place, their files weighed."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence

from torch import nn

from sft.calibration.quantize import quantize
from sft.core.budget import Budget
from sft.core.data import Batches, Data
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.core.records import Option, Plan, Profile
from sft.exporters import export
from sft.planning.allocate import plan as make_plan
from sft.planning.allocate import restate
from sft.profiling.remeasure import remeasure
from sft.profiling.samples import collect_inputs
from sft.surgery.apply import apply

ROUNDS = 2
WEIGHINGS = 3
WEIGHED_SAMPLES = 8  # the ranges that they give do not change the size of a file


def plan_that_fits(
    profile: Profile,
    budget: Budget,
    model: nn.Module,
    data: Data,
    *,
    keep: Sequence[str] = (),
    overrides: Mapping[str, Option] | None = None,
    seed: int = 0,
) -> Plan:
    """`plan_in_place`, made again for less where its file would exceed the limit on size.

    The graph around the numbers is predicted roughly, so the file of a plan is written once, before
    anything is trained, and what it has too much is taken off what the plan says. Without a limit
    on size nothing is written. Raises what `plan` raises.
    """
    limit = budget.limits(profile.original).get("size")
    allowed = budget
    asked: dict[str, float] = {}
    for _ in range(WEIGHINGS):
        found = plan_in_place(
            profile, allowed, model, data, keep=keep, overrides=overrides, seed=seed
        )
        asked = found.budget if allowed is budget else asked
        if limit is None:
            break
        excess = weigh(found, model, data, seed) - limit
        if excess <= 0:
            break
        say(f"  its file would be {excess:,.0f} bytes too large; planned again for less")
        less = max(int(found.cost.size - excess), 1)
        allowed = dataclasses.replace(budget, size=None, size_bytes=less)
    return dataclasses.replace(found, budget=asked)


def weigh(plan: Plan, model: nn.Module, data: Data, seed: int = 0) -> int:
    """Bytes of the file that comes of a plan; what is trained, or rounded better, is as large."""
    with forked_rng(seed), tempfile.TemporaryDirectory() as folder:
        few = Batches(collect_inputs(data.calibration, WEIGHED_SAMPLES), None, WEIGHED_SAMPLES)
        rounded = quantize(
            apply(model, plan), plan, plan.target, few,
            ranges="minmax", rounding="nearest", correct_bias=False, refit=False,
            spare_sensitive=False, seed=seed,
        )  # fmt: skip
        return export(rounded, plan, f"{folder}/weighed", plan.target).file_bytes


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
