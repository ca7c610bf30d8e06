"""Rank and bits chosen together, beside three ways to choose them apart, at equal costs.

The budgets are such that size and latency both bind: for each size, the latency three quarters of
the way from the least that any plan of this size has to that of the best plan of this size with no
limit on latency. Nearer to the least, latency alone fixes the ranks, and choosing the bits after
them loses nothing; the gains that the profile predicts there are listed as well.

Each rival gets at least the bytes and the milliseconds of the joint plan (predicted by one table;
the files are measured), the same schemes, the same menus of ranks and widths, and is built in the
same way. Where a rival has a free choice, it takes what is best by the profile's damages; one that
has no plan within these costs counts in no figure.

uniform          one share of the full rank and one width for all layers; the best scheme of two
greedy energy    ranks that leave the most energy for their costs, layer by layer, all at 8 bits
rank, then bits  ranks of least damage at 8 bits within the latency, then widths within the size
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from figures import Found
from planning_cases import Case, integers

import sft
from sft.core.progress import say
from sft.core.records import Candidate, Cost, LayerProfile, Plan
from sft.planning.solve import solve

Chosen = Sequence[Candidate]

WAY = 0.75


def measure_joint(case: Case, budgets: int) -> Found:
    """Measured damages of all four at each budget, and how much less the joint plan's is."""
    found: Found = {}
    whole = [_dense(entry) for entry in case.profile.layers]
    eight = case.plan_of(whole, "whole").cost
    for size in case.sizes[:budgets]:
        bytes_ = int(size * eight.size)
        least, most = _ends(case, bytes_)
        milliseconds = least + WAY * (most - least)
        for way in (0.25, 0.5, WAY):
            gain = _predicted_gain(case, bytes_, least + way * (most - least))
            found[f"{case.name}_{size:g}_{way:g}_of_the_way_predicted_over_rank_then_bits"] = gain
        latency = round(milliseconds / _ms(eight), 2)
        budget = sft.Budget(size_bytes=bytes_, latency_ms=milliseconds)
        joint = sft.plan_in_place(case.profile, budget, case.model, case.data)
        limits = (joint.cost.size, _ms(joint.cost))
        name = f"{case.name}_{size:g}_{latency:g}"
        plans = {"joint": joint} | {k: rival(case, limits) for k, rival in RIVALS.items()}
        for way, plan in plans.items():
            if plan is None:
                found[f"{name}_{way}"] = "no plan fits"
                continue
            artifact = case.build(plan)
            found[f"{name}_{way}_damage"] = damage = case.damage(artifact)
            found[f"{name}_{way}_bytes"] = artifact.file_bytes
            found[f"{name}_{way}_milliseconds_predicted"] = _ms(plan.cost)
            say(f"{name} {way}: damage {damage:.4g}")
            if way != "joint":
                gain = 1 - float(found[f"{name}_joint_damage"]) / damage
                found[f"{name}_gain_vs_{way}"] = gain
    return found


def _ends(case: Case, size: int) -> tuple[float, float]:
    """Milliseconds: the least of any plan of this size, and those of the best such plan."""
    menus = [integers(entry) for entry in case.profile.layers]
    sizes = {"size": [np.array([float(c.cost.size) for c in menu]) for menu in menus]}
    found = []
    for wanted in (lambda c: c.cost.latency or 0.0, lambda c: c.damage):
        aims = [np.array([wanted(c) for c in menu]) for menu in menus]
        choice = solve(aims, sizes, {"size": float(size)}).choice
        chosen = [menu[i] for menu, i in zip(menus, choice, strict=True)]
        found.append(_ms(case.plan_of(chosen, "").cost))
    return found[0], found[1]


def _predicted_gain(case: Case, size: int, milliseconds: float) -> float:
    """How much less damage the joint plan has than ranks, then bits, by the profile alone."""
    joint = sft.plan(case.profile, sft.Budget(size_bytes=size, latency_ms=milliseconds))
    rival = rank_then_bits(case, (joint.cost.size, _ms(joint.cost)))
    return 1.0 if rival is None else 1 - joint.value / max(rival.value, 1e-30)


def uniform(case: Case, limits: tuple[int, float]) -> Plan | None:
    """The best of all (share of rank, scheme, width) that fit, by predicted damage."""
    best: Chosen | None = None
    for bits in (8, 4, 2):
        for scheme in ("channel_in", "channel_out"):
            for share in (i / 40 for i in range(1, 41)):
                chosen = [_at_share(entry, scheme, share, bits) for entry in case.profile.layers]
                better = best is None or _damage(chosen) < _damage(best)
                if better and _fits(case, chosen, limits):
                    best = chosen
    return None if best is None else case.plan_of(best, "uniform")


def greedy_energy(case: Case, limits: tuple[int, float]) -> Plan | None:
    """From whole layers down: always the step that loses the least energy for its saving.

    The error of a split is the share of the energy of the layer's outputs that it loses.
    """
    menus = [
        [c for c in integers(e) if c.option.weight_bits in (8, None)] for e in case.profile.layers
    ]
    chosen = [next(c for c in menu if not c.option.rank) for menu in menus]
    while not _fits(case, chosen, limits):
        steps = [
            (_loss_per_saving(now, other, limits), place, other)
            for place, (now, menu) in enumerate(zip(chosen, menus, strict=True))
            for other in menu
            if other.error > now.error and _saving(now, other, limits) > 0
        ]
        if not steps:
            return None
        _, place, other = min(steps, key=lambda step: step[0])
        chosen[place] = other
    return case.plan_of(chosen, "greedy energy")


def rank_then_bits(case: Case, limits: tuple[int, float]) -> Plan | None:
    """Two answers of the exact solver: ranks at 8 bits under the latency, then widths."""
    size, milliseconds = limits
    own = [integers(entry) for entry in case.profile.layers]
    wide = [[c for c in menu if c.option.weight_bits in (8, None)] for menu in own]
    ranked = _solved(case, wide, "latency", milliseconds * (1 + 1e-9))
    if ranked is None:
        return None
    same = [
        [c for c in menu if (c.option.scheme, c.option.rank) == (r.option.scheme, r.option.rank)]
        for menu, r in zip(own, ranked, strict=True)
    ]
    chosen = _solved(case, same, "size", size)
    return None if chosen is None else case.plan_of(chosen, "rank, then bits")


def _solved(case: Case, menus: list[list[Candidate]], cost: str, most: float) -> Chosen | None:
    """The candidates of least damage within one limit on the whole network."""
    rest = case.profile.overhead_latency if cost == "latency" else 0.0
    damages = [np.array([c.damage for c in menu]) for menu in menus]
    costs = [np.array([float(getattr(c.cost, cost) or 0.0) for c in menu]) for menu in menus]
    found = solve(damages, {cost: costs}, {cost: most - rest})
    if found.status == "infeasible":
        return None
    return [menu[i] for menu, i in zip(menus, found.choice, strict=True)]


RIVALS: dict[str, Callable[[Case, tuple[int, float]], Plan | None]] = {
    "uniform": uniform,
    "greedy_energy": greedy_energy,
    "rank_then_bits": rank_then_bits,
}


def _dense(entry: LayerProfile) -> Candidate:
    return next(c for c in integers(entry) if not c.option.rank)


def _at_share(entry: LayerProfile, scheme: str, share: float, bits: int) -> Candidate:
    """The greatest rank within a share of the greatest on the menu; whole where there is none."""
    own = [c for c in integers(entry) if c.option.weight_bits in (bits, None)]
    ranked = [c for c in own if c.option.rank and c.option.scheme == scheme]
    ranked = ranked or [c for c in own if c.option.rank]
    whole = [c for c in own if not c.option.rank]
    if share >= 1 or not ranked:
        return whole[0]
    most = max(c.option.rank[0] for c in ranked)
    fitting = [c for c in ranked if c.option.rank[0] <= share * most]
    return max(fitting, key=lambda c: c.option.rank) if fitting else min(
        ranked, key=lambda c: c.option.rank
    )  # fmt: skip


def _fits(case: Case, chosen: Chosen, limits: tuple[int, float]) -> bool:
    cost = case.plan_of(chosen, "").cost
    return cost.size <= limits[0] and _ms(cost) <= limits[1] * (1 + 1e-9)


def _damage(chosen: Chosen) -> float:
    return sum(c.damage for c in chosen)


def _saving(now: Candidate, other: Candidate, limits: tuple[int, float]) -> float:
    """What a step saves, of both limits together."""
    time = (now.cost.latency or 0.0) - (other.cost.latency or 0.0)
    return (now.cost.size - other.cost.size) / limits[0] + time / limits[1]


def _loss_per_saving(now: Candidate, other: Candidate, limits: tuple[int, float]) -> float:
    return (other.error - now.error) / _saving(now, other, limits)


def _ms(cost: Cost) -> float:
    return math.inf if cost.latency is None else cost.latency
