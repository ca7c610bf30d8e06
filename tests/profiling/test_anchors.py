"""Damage of every option of a layer, from a few that are measured."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.core.records import DENSE, KEEP, STORED, Anchor, Candidate, Cost, Option
from sft.profiling.anchors import FLATTEST, LEAST, STEEPEST, Curve, curve_through, with_damage

SPLIT = Option("channel_in", (1,), None)
ERRORS = {(r,): 0.9 * 0.72**r for r in range(1, 13)}
ROUNDING = {8: 1e-12, 4: 4e-3, 2: 0.2}  # errors; of 8 bits too little to move a split's


def anchor(error: float, damage: float) -> Anchor:
    return Anchor(SPLIT, error, damage)


def menu_of(bits: tuple[int | None, ...], errors: dict[tuple[int, ...], float] = ERRORS):
    """Keep, dense, stored, and a scheme at many ranks; errors as `menu` adds them up."""
    whole = [(Option(KEEP), 0.0)]
    whole += [(Option(DENSE, (), b), ROUNDING[b]) for b in bits if b]
    whole += [(Option(STORED, (), b), ROUNDING[b]) for b in bits if b == 8]
    splits = [
        (Option("channel_in", rank, b), error + 2 * ROUNDING.get(b or 0, 0.0))
        for rank, error in errors.items()
        for b in bits
    ]
    return [Candidate(o, e, 0.0, Cost(1, 1, 1)) for o, e in whole + splits]


class Measured:
    """The damage of an option by a formula; keeps what was asked for."""

    def __init__(self, rounding: dict[int, float]) -> None:
        self.asked: list[Option] = []
        self.rounding = rounding

    def __call__(self, option: Option) -> float:
        self.asked.append(option)
        split = 0.4 * ERRORS.get(option.rank, 0.0) ** 1.3
        return split + self.rounding.get(option.weight_bits or 0, 0.0)


positive = st.floats(1e-6, 10)
points = st.lists(st.tuples(positive, positive), min_size=1, max_size=4, unique_by=lambda p: p[0])


@given(points)
@settings(deadline=None)
def test_the_curve_goes_through_its_points_raised_where_they_fall(found) -> None:
    curve = curve_through([anchor(*point) for point in found])
    highest = 0.0
    for error, damage in sorted(found):
        highest = max(highest, damage)
        assert curve(error) == pytest.approx(highest, rel=1e-9)


@given(points, st.lists(st.floats(0, 100), min_size=2, max_size=12))
@settings(deadline=None)
def test_the_curve_never_falls_and_starts_at_zero(found, errors) -> None:
    curve = curve_through([anchor(*point) for point in found])
    assert curve(0.0) == curve(-1.0) == 0.0
    damages = [curve(error) for error in sorted(errors)]
    assert all(math.isfinite(d) and d >= 0 for d in damages)
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(damages))


@pytest.mark.parametrize(
    ("slope", "want"), [(1.3, 1.3), (0.7, 0.7), (0.1, FLATTEST), (5.0, STEEPEST)]
)
def test_beyond_its_points_it_goes_on_within_bounds(slope: float, want: float) -> None:
    curve = curve_through([anchor(0.1, 0.02), anchor(0.2, 0.02 * 2**slope)])
    last = curve(0.2)
    for times in (1.5, 4.0):
        assert curve(0.2 * times) == pytest.approx(last * times**want)
    assert curve(0.02) == pytest.approx(0.004)
    assert curve(0.1 * 2**0.5) == pytest.approx(0.02 * 2 ** (slope / 2))


def test_a_single_point_and_none() -> None:
    curve = curve_through([anchor(0.1, 0.02)])
    assert curve(0.05) == pytest.approx(0.01)
    assert curve(0.3) == pytest.approx(0.06)
    assert curve.alpha() == pytest.approx(0.2)
    assert Curve(())(0.5) == 0.0


def test_what_is_on_the_curve_is_found_exactly() -> None:
    measure = Measured({8: 1e-5, 4: 0.01, 2: 0.3})
    known, anchors, alphas = with_damage(menu_of((8, 4, 2)), measure, 0.1)
    damages = {c.option: c.damage for c in known}
    splits = [a for a in anchors if a.option.rank and a.option.weight_bits is None]
    low, high = splits[0].error, splits[-1].error
    inside = [r for r, e in ERRORS.items() if low <= e <= high]
    assert len(inside) > len(splits) == 3
    for rank in inside:  # straight in log-log, as the formula is
        split = 0.4 * ERRORS[rank] ** 1.3
        assert damages[Option("channel_in", rank, 8)] == pytest.approx(split + 2e-5)
        assert damages[Option("channel_in", rank, 4)] == pytest.approx(split + 0.01)
        assert damages[Option("channel_in", rank, 2)] == pytest.approx(split + 0.3)
    assert alphas["channel_in"] == pytest.approx(0.4 * splits[1].error ** 0.3)
    for bits in (8, 4, 2):
        assert damages[Option(DENSE, (), bits)] == measure.rounding[bits]
    assert damages[Option(KEEP)] == 0.0


def test_what_was_measured_is_returned_and_nothing_else() -> None:
    measure = Measured({8: 1e-5, 4: 0.01, 2: 0.3})
    known, anchors, alphas = with_damage(menu_of((8, 4, 2)), measure, 0.1)
    assert [a.option for a in anchors] == measure.asked
    again = Measured(measure.rounding)
    assert all(a.damage == again(a.option) for a in anchors)
    assert [c.option for c in known] == [c.option for c in menu_of((8, 4, 2))]
    assert alphas.keys() == {DENSE, STORED, "channel_in"}
    # Three widths of the whole and its stored form, three ranks in float, and one in few bits.
    assert len(set(measure.asked)) == len(measure.asked) == 3 + 1 + 3 + 2


@pytest.mark.parametrize("wanted", [0.01, 0.1, 0.6])
def test_splits_are_measured_about_the_error_that_is_asked_for(wanted: float) -> None:
    measure = Measured({})
    _, anchors, _ = with_damage(menu_of((None,)), measure, wanted)
    errors = [a.error for a in anchors]
    assert errors == sorted(errors)
    nearest = min(ERRORS.values(), key=lambda e: abs(math.log(e / wanted)))
    assert nearest in [pytest.approx(e) for e in errors]


finite = st.floats(0, 5)
damages = finite | st.sampled_from([math.nan, math.inf])


def with_damages(rounding: dict[int, float], splits: list[float], anchor_error: float):
    """The menu in three widths with damages by width and by rank; see `with_damage`."""

    def measure(option: Option) -> float:
        split = splits[option.rank[0] - 1] if option.rank else 0.0
        return split + rounding.get(option.weight_bits or 0, 0.0)

    return with_damage(menu_of((8, 4, 2)), measure, anchor_error)


@given(
    st.dictionaries(st.sampled_from([8, 4, 2]), damages, min_size=3),
    st.lists(damages, min_size=12, max_size=12),
    st.floats(0.01, 0.9),
)
@settings(deadline=None)
def test_whatever_is_measured_fewer_bits_and_lower_ranks_are_never_better(
    rounding, splits, anchor_error
) -> None:
    known, anchors, alphas = with_damages(rounding, splits, anchor_error)
    damage = {c.option: c.damage for c in known}
    assert all(d >= 0 for d in damage.values())  # so none is NaN
    assert all(c.rounding >= 0 for c in known)
    assert all(a > 0 for a in alphas.values())
    for anchor in anchors:  # what broke the network is infinite on the menu
        assert not math.isnan(anchor.damage)
        if math.isinf(anchor.damage) and anchor.option in damage:
            assert math.isinf(damage[anchor.option])
    for ranked in [Option(DENSE), *(Option("channel_in", r) for r in ERRORS)]:
        wide, middle, narrow = (
            damage[Option(ranked.scheme, ranked.rank, bits)] for bits in (8, 4, 2)
        )
        assert wide <= middle <= narrow
    for bits in (8, 4, 2):
        by_rank = [damage[Option("channel_in", rank, bits)] for rank in ERRORS]
        assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(by_rank))


@given(
    st.dictionaries(st.sampled_from([8, 4, 2]), finite, min_size=3),
    st.lists(finite, min_size=12, max_size=12),
    st.floats(0.01, 0.9),
)
@settings(deadline=None)
def test_what_is_finite_stays_finite(rounding, splits, anchor_error) -> None:
    known, _, alphas = with_damages(rounding, splits, anchor_error)
    assert all(math.isfinite(c.damage) for c in known)
    assert all(math.isfinite(a) for a in alphas.values())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_only_what_follows_from_a_broken_measurement_is_infinite(broken: float) -> None:
    splits = [broken if rank < 5 else 0.01 for rank in ERRORS for rank in rank]
    known, _, _ = with_damages({2: broken}, splits, 0.4)
    infinite = {c.option for c in known if math.isinf(c.damage)}
    assert {Option(DENSE, (), 2), Option("channel_in", (1,), 8)} <= infinite
    fine = {c.option for c in known} - infinite
    assert {Option(DENSE, (), 8), Option(DENSE, (), 4), Option("channel_in", (12,), 4)} <= fine


@pytest.mark.parametrize(
    "errors",
    [{(3,): 0.2}, {(8,): 0.0}, {(4,): 0.3, (8,): 0.0}, {(4,): 0.3, (5,): 0.3}],
    ids=["one", "exact", "one and exact", "equal"],
)
def test_menus_of_few_or_exact_splits(errors: dict[tuple[int, ...], float]) -> None:
    def measure(option: Option) -> float:
        return errors.get(option.rank, 0.0) * 0.5

    bits: tuple[int | None, ...] = (None,)
    known, _, _ = with_damage(menu_of(bits, errors), measure, 0.1)
    for candidate in known:
        if candidate.option.rank:
            want = errors[candidate.option.rank] * 0.5
            assert candidate.damage == pytest.approx(want, abs=2 * LEAST)
