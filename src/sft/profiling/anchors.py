"""Damage of every option of a layer, from a few that are measured.

    damage(scheme, rank, bits) = split(error of the rank) + rounding(scheme, bits)

`split` goes through the measured damage of up to three ranks of the scheme, straight between them
in log-log, as ``alpha error^beta``; `rounding` is what the damage of one of these ranks grows by
when its factors are rounded too. Of the whole kernel each width is measured as it is.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from sft.core.records import DENSE, KEEP, STORED, Anchor, Candidate, Option

Measure = Callable[[Option], float]

SPREAD = (0.25, 1.0, 2.5)  # errors of the anchors, over the one that was asked for
LEAST = 1e-9  # nats: below this nothing is told apart
STEEPEST, FLATTEST = 2.0, 0.5  # beta beyond the last anchor
FINE = 6  # bits above which the rounding of factors costs about what that of the kernel does


@dataclasses.dataclass(frozen=True)
class Curve:
    """Damage of the splits of one scheme over their relative output error."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, error: float) -> float:
        """Damage at an error; 0 at 0."""
        if error <= 0 or not self.points:
            return 0.0
        (first, least), (last, most) = self.points[0], self.points[-1]
        if error <= first:
            return least * error / first
        if error >= last:
            return float(most * (error / last) ** self._end_slope())
        x, y = np.log(np.array(self.points)).T
        return math.exp(float(np.interp(math.log(error), x, y)))

    def alpha(self) -> float:
        """Damage per unit of error at the anchor in the middle."""
        error, damage = self.points[len(self.points) // 2]
        return damage / error

    def _end_slope(self) -> float:
        if len(self.points) < 2:
            return 1.0
        (e1, d1), (e2, d2) = self.points[-2:]
        if math.isinf(d2):
            return 1.0
        return min(max(math.log(d2 / d1) / math.log(e2 / e1), FLATTEST), STEEPEST)


def curve_through(anchors: Sequence[Anchor]) -> Curve:
    """The curve through measured points; where one falls with the error, it is raised.

    From a point on whose damage is not finite, it is infinite.
    """
    points: dict[float, float] = {}
    highest = LEAST
    for anchor in sorted(anchors, key=lambda a: a.error):
        highest = max(highest, _finite_or_inf(anchor.damage))
        points[max(anchor.error, LEAST)] = highest
    return Curve(tuple(points.items()))


def with_damage(
    candidates: Sequence[Candidate], measure: Measure, anchor_error: float
) -> tuple[tuple[Candidate, ...], tuple[Anchor, ...], dict[str, float]]:
    """The candidates with their damage, what was measured for it, and alpha by scheme.

    measure : the damage of an option, by running the network with it; one that is not finite counts
        as infinite, and so do the damages that follow from it.
    anchor_error : at about which relative output error of a split the damage is measured.
    """

    def measured(option: Option) -> float:
        return _finite_or_inf(measure(option))

    by_scheme: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_scheme.setdefault(candidate.option.scheme, []).append(candidate)
    anchors: list[Anchor] = []
    damages: dict[Option, float] = {}
    rounding: dict[Option, float] = {}
    alphas: dict[str, float] = {}
    for scheme, own in sorted(by_scheme.items(), key=lambda pair: pair[0] not in (DENSE, STORED)):
        if scheme == KEEP:
            damages |= {c.option: 0.0 for c in own}
        elif scheme in (DENSE, STORED):
            found = [Anchor(c.option, c.error, max(measured(c.option), LEAST)) for c in own]
            anchors += found
            damages |= _never_better_with_fewer_bits(found)
            rounding |= {a.option: damages[a.option] for a in found}
            middle = min(found, key=lambda a: abs(a.error - anchor_error))
            alphas[scheme] = middle.damage / max(middle.error, LEAST)
        else:
            wide = [d for o, d in damages.items() if o.scheme == DENSE and _bits(o) > FINE]
            found, curve, extra = _measure_split(
                own, measured, anchor_error, min(wide, default=0.0)
            )
            anchors += found
            alphas[scheme] = curve.alpha()
            split_errors = _errors_of_splits(own)
            rounding |= {c.option: extra.get(_bits(c.option), 0.0) for c in own}
            damages |= {
                c.option: curve(split_errors[c.option.rank]) + rounding[c.option] for c in own
            }
    known = tuple(
        dataclasses.replace(c, damage=damages[c.option], rounding=rounding.get(c.option, 0.0))
        for c in candidates
    )
    return known, tuple(anchors), alphas


def _measure_split(
    own: Sequence[Candidate], measure: Measure, anchor_error: float, whole: float
) -> tuple[list[Anchor], Curve, dict[int, float]]:
    """Anchors of a scheme in float, the curve through them, and what each width of bits adds.

    whole : damage of the whole kernel in its widest integers.
    """
    errors = _errors_of_splits(own)
    chosen: dict[tuple[int, ...], float] = {}
    for share in SPREAD:
        rank = min(
            errors, key=lambda r: abs(math.log((errors[r] + LEAST) / (share * anchor_error)))
        )
        chosen[rank] = errors[rank]
    anchors = [
        Anchor(Option(own[0].option.scheme, rank, None), error, max(measure(
            Option(own[0].option.scheme, rank, None)), LEAST))
        for rank, error in sorted(chosen.items(), key=lambda pair: pair[1])
    ]  # fmt: skip
    curve = curve_through(anchors)
    told = [a for a in anchors if math.isfinite(a.damage)] or anchors
    middle = told[len(told) // 2]
    extra: dict[int, float] = {}
    for bits in sorted({_bits(c.option) for c in own} - {32}, reverse=True):
        if bits > FINE:
            extra[bits] = 2 * whole
            continue
        rounded = dataclasses.replace(middle.option, weight_bits=bits)
        found = measure(rounded)
        anchors.append(Anchor(rounded, middle.error, found))
        floor = max(extra.values(), default=0.0)
        alone = curve(middle.error)
        extra[bits] = max(found - alone, floor) if math.isfinite(alone) else math.inf
    return anchors, curve, extra


def _errors_of_splits(own: Sequence[Candidate]) -> dict[tuple[int, ...], float]:
    """By rank, the error of the split alone: that of its widest bits, which add least."""
    errors: dict[tuple[int, ...], float] = {}
    for candidate in own:
        rank = candidate.option.rank
        errors[rank] = min(candidate.error, errors.get(rank, math.inf))
    return errors


def _never_better_with_fewer_bits(anchors: Sequence[Anchor]) -> dict[Option, float]:
    """Measured damages, raised where fewer bits came out better by chance."""
    ordered = sorted(anchors, key=lambda a: -_bits(a.option))
    raised = itertools.accumulate((a.damage for a in ordered), max)
    return {a.option: damage for a, damage in zip(ordered, raised, strict=True)}


def _finite_or_inf(damage: float) -> float:
    """A damage as measured; NaN, which `max` would lose, as infinite."""
    return damage if math.isfinite(damage) else math.inf


def _bits(option: Option) -> int:
    return option.weight_bits or 32
