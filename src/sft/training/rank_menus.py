"""What each layer may become at the bits that training ends in, and the best choice of ranks.

The damage of a split is read off the curve that was measured once on the original (`profile`), at
the error that the weights have *now*: training moves what a rank leaves out, not how much an error
of a layer costs. The rounding counts for nothing, as training goes on with it in place.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

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
    Profile,
    Target,
)
from sft.core.statistics import Statistics
from sft.decompositions import decompositions
from sft.planning.allocate import plan, pose
from sft.planning.menus import is_low_rank
from sft.profiling.anchors import curve_through
from sft.profiling.candidates import menu
from sft.profiling.cost import cost_of
from sft.surgery.modules import get_module

SPLIT = ("channel_in", "channel_out", "spatial")  # two factors, whose product is that of matrices
TRAINED = ("size", "macs")  # the costs that follow from the ranks alone

Bits = int | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Menus:
    """The menus of a network and what is asked of it.

    profile : measured on the original; `schemes` is the one scheme of each layer that is split.
    """

    profile: Profile
    target: Target
    budget: Budget
    keep: tuple[str, ...]
    bits: Mapping[str, int]
    schemes: Mapping[str, str]
    rank_multiple: int | None

    def plan(self) -> Plan:
        """The ranks of least damage within the budget; raises `BudgetError` with what is feasible.

        Only the scheme of each layer is taken.
        """
        layers = tuple(self._one_scheme(entry) for entry in self.profile.layers)
        return plan(dataclasses.replace(self.profile, layers=layers), self.budget, self.keep)

    def after(self, whole: nn.Module, statistics: Mapping[str, Statistics]) -> "Menus":
        """The menus of the same layers at other weights.

        whole : the dense network that the trained one stands for.
        """
        layers = tuple(
            self._again(entry, get_module(whole, entry.layer.name), statistics)
            if entry.layer.name in self.schemes
            else entry
            for entry in self.profile.layers
        )
        known = {**(self.profile.statistics or {}), **statistics}
        profile = dataclasses.replace(self.profile, layers=layers, statistics=known)
        return dataclasses.replace(self, profile=profile)

    def limits(self) -> dict[str, float]:
        """The most of each cost that is limited, in absolute numbers."""
        return self.budget.limits(self.profile.original)

    def entry(self, name: str) -> LayerProfile:
        return next(e for e in self.profile.layers if e.layer.name == name)

    def full_rank(self, name: str) -> int:
        """The rank at which the split of a layer is exact."""
        geometry = self.entry(name).layer.geometry
        assert geometry is not None
        return decompositions[self.schemes[name]].full_rank(geometry)[0]

    def table(self, name: str) -> "Table":
        """The ranks that a layer may take, and what each costs."""
        entry, limits = self.entry(name), self.limits()
        full, lane = self.full_rank(name), self._lane(name)
        whole = self._whole(entry)
        ranks: list[int | None] = [None]
        costs = [whole]
        for rank in range(lane, full + 1, lane):
            option = Option(self.schemes[name], (rank,), _bits_of_splits(entry, self.bits))
            split = cost_of(entry.layer, option, self.target)
            if any(getattr(split, k) < getattr(whole, k) for k in limits):
                ranks.append(rank)
                costs.append(split)
        shares = [[getattr(c, k) / limits[k] for k in limits] for c in costs]
        table = torch.tensor(shares, dtype=torch.float64).reshape(len(costs), len(limits))
        apart = max(len(ranks) - 2, 1) * lane
        component = (table[-1] - table[1]) / apart if len(ranks) > 2 else table[0] / full
        return Table(tuple(ranks), table, component, _Damage(entry, self.schemes[name]))

    def cost_beside(self, names: Collection[str]) -> Tensor:
        """The costs of all but the layers called `names`, as shares of the limits, whole."""
        limits = self.limits()
        rest = pose(self.profile, limits, self.keep, {})[0].rest
        kept = self.kept()
        found = []
        for k, most in limits.items():
            total = getattr(rest, k) or 0.0
            for entry in self.profile.layers:
                if entry.layer.name in names:
                    continue
                keeps = entry.layer.name in kept
                own = _kept(entry).cost if keeps else self._whole(entry)
                total += getattr(own, k)
            found.append(total / most)
        return torch.tensor(found, dtype=torch.float64)

    def _whole(self, entry: LayerProfile) -> Cost:
        """What a layer costs that is not split."""
        found = [c.cost for c in entry.candidates if c.option.scheme in (DENSE, STORED)]
        return found[0] if found else _kept(entry).cost

    def _lane(self, name: str) -> int:
        if self.rank_multiple is not None:
            return self.rank_multiple
        return decompositions[self.schemes[name]].lane(self.target)[0]

    def kept(self) -> frozenset[str]:
        """The layers that stay in float as asked."""
        return frozenset(pose(self.profile, {}, self.keep, {})[1])

    def _one_scheme(self, entry: LayerProfile) -> LayerProfile:
        own = self.schemes.get(entry.layer.name)
        kept = [c for c in entry.candidates if not is_low_rank(c) or c.option.scheme == own]
        return dataclasses.replace(entry, candidates=tuple(kept))

    def _again(
        self, entry: LayerProfile, module: nn.Module, statistics: Mapping[str, Statistics]
    ) -> LayerProfile:
        """The menu of one layer at the weights of `module`."""
        layer, name = entry.layer, entry.layer.name
        scheme, bits = self.schemes[name], _bits_of_splits(entry, self.bits)
        curve = _Damage(entry, scheme)
        memory = {c.option: c.cost.memory for c in entry.candidates}
        whole = max(memory.values(), default=0)
        found = [c for c in entry.candidates if not is_low_rank(c)]
        for split in menu(
            layer, module, statistics.get(name), self.target, [scheme], (), self.rank_multiple
        ):
            if is_low_rank(split):
                option = dataclasses.replace(split.option, weight_bits=bits)
                cost = cost_of(layer, option, self.target)
                cost = dataclasses.replace(cost, memory=memory.get(option, whole))
                found.append(Candidate(option, split.error, curve(split.error), cost))
        return dataclasses.replace(entry, candidates=tuple(found))


@dataclasses.dataclass(frozen=True)
class Table:
    """The ranks of a layer, None for the whole kernel, and what they cost.

    costs : ``(ranks, limits)`` as shares of the limits. component : ``(limits)``, of one more rank.
    """

    ranks: tuple[int | None, ...]
    costs: Tensor
    component: Tensor
    damage: Callable[[float], float]

    def damages(self, energies: Tensor, present: int) -> list[float]:
        """Damage of each rank for a spectrum of energies ``(r)``.

        present : the rank that the layer has been cut to; more of them cannot be had.
        """
        total = max(float(energies.sum()), 1e-30)
        tails = [0.0 if r is None else float(energies[r:].sum()) / total for r in self.ranks]
        return [
            math.inf if r is not None and r > present else self.damage(tail)
            for r, tail in zip(self.ranks, tails, strict=True)
        ]


class _Damage:
    """The damage of a split at an error: on the measured curve, or the error itself."""

    def __init__(self, entry: LayerProfile, scheme: str) -> None:
        own = [a for a in entry.anchors if a.option.scheme == scheme]
        measured = [a for a in own if a.option.rank and a.option.weight_bits is None]
        self._curve = curve_through(measured) if measured else None

    def __call__(self, error: float) -> float:
        return error if self._curve is None else self._curve(error)


def menus_of(
    profile: Profile,
    target: Target,
    budget: Budget,
    keep: Sequence[str],
    weight_bits: Bits,
    rank_multiple: int | None,
) -> Menus:
    """The menus of a measured profile at the bits asked for, with one scheme for each layer.

    The scheme is that of the plan from the profile, or else the one of least damage for what it
    saves. Raises `InputError` for a pattern of `weight_bits` that fits no layer.
    """
    bits = bits_by_layer(weight_bits, [e.layer.name for e in profile.layers])
    layers = tuple(_at_bits(entry, bits[entry.layer.name]) for entry in profile.layers)
    own = dataclasses.replace(profile, layers=layers)
    chosen = plan(own, budget, keep)
    schemes = {}
    for entry, row in zip(layers, chosen.rows, strict=True):
        low = [c for c in entry.candidates if is_low_rank(c)]
        if row.option.rank:
            schemes[entry.layer.name] = row.option.scheme
        elif low and row.option.scheme != KEEP:
            schemes[entry.layer.name] = min(low, key=lambda c: _price(c, entry)).option.scheme
    return Menus(own, target, budget, tuple(keep), bits, schemes, rank_multiple)


def without_damage(profile: Profile) -> Profile:
    """A profile whose damages are the errors: of a network that has learned nothing yet."""
    layers = tuple(
        dataclasses.replace(
            entry,
            anchors=(),
            candidates=tuple(
                dataclasses.replace(c, damage=c.error, rounding=0.0) for c in entry.candidates
            ),
        )
        for entry in profile.layers
    )
    return dataclasses.replace(profile, layers=layers)


def bits_by_layer(weight_bits: Bits, names: Collection[str]) -> dict[str, int]:
    """The bits of each layer; of several patterns that fit a name the last one counts.

    Layers that no pattern fits get 8.
    """
    if isinstance(weight_bits, int):
        return dict.fromkeys(names, weight_bits)
    found = dict.fromkeys(names, 8)
    for pattern, bits in weight_bits.items():
        fitting = [n for n in names if n == pattern or fnmatchcase(n, pattern)]
        if not fitting:
            raise InputError(
                f"weight_bits: '{pattern}' matches no layer. The layers are: {', '.join(names)}."
            )
        found.update(dict.fromkeys(fitting, bits))
    return found


def _at_bits(entry: LayerProfile, bits: int) -> LayerProfile:
    """The candidates at one width, with the damage of the split alone."""
    widths = {c.option.weight_bits for c in entry.candidates if c.option.scheme == DENSE}
    if widths and bits not in widths:
        known = ", ".join(map(str, sorted(b for b in widths if b)))
        raise InputError(
            f"The profile has no option at {bits} bits for layer '{entry.layer.name}', only at "
            f"{known}. Profile with those weight_bits."
        )
    found = []
    for c in entry.candidates:
        if c.option.scheme == STORED and widths:
            continue
        if c.option.weight_bits in (None, bits):
            alone = max(c.damage - c.rounding, 0.0) if is_low_rank(c) else 0.0
            alone = alone if math.isfinite(c.damage) else math.inf
            found.append(dataclasses.replace(c, damage=alone, rounding=0.0))
    return dataclasses.replace(entry, candidates=tuple(found))


def _bits_of_splits(entry: LayerProfile, bits: Mapping[str, int]) -> int | None:
    """The width of a split layer's weights; None where the target has no integers for it."""
    dense = any(c.option.scheme == DENSE for c in entry.candidates)
    return bits[entry.layer.name] if dense else None


def _price(candidate: Candidate, entry: LayerProfile) -> float:
    """Damage for each multiply-accumulate that is saved."""
    return candidate.damage / max(_kept(entry).cost.macs - candidate.cost.macs, 1)


def _kept(entry: LayerProfile) -> Candidate:
    return next(c for c in entry.candidates if c.option.scheme == KEEP)
