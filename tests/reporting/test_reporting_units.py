"""Numbers as people read them."""

import math

import pytest

from sft.reporting import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (999_499, "999 KB"),
        (999_600, "1.00 MB"),
        (2_790_000, "2.79 MB"),
        (60_000_000, "60.0 MB"),
    ],
)
def test_sizes_count_a_thousand_bytes_as_one_kb(value: int, text: str) -> None:
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.63, "1.63"), (12.34, "12.3"), (9.999, "10.0"), (0.01234, "0.0123"), (1234.4, "1234")],
)
def test_short_keeps_three_digits(value: float, text: str) -> None:
    assert units.short(value) == text


@pytest.mark.parametrize("value", [None, math.nan, "12", True, [1]])
def test_what_is_no_number_is_a_dash(value: object) -> None:
    for write in (units.short, units.general, units.size, units.count, units.milliseconds):
        assert write(value) == units.DASH
    assert units.percent(value) == units.DASH
    assert units.duration(value) == units.DASH
    assert units.ratio_text(value, 3.0) == units.DASH


def test_infinity_is_said() -> None:
    assert units.decibels(math.inf) == "inf dB"
    assert units.size(math.inf) == "inf"


def test_ratio_says_which_way_it_went() -> None:
    assert units.ratio_text(930, 100) == "9.30x less"
    assert units.ratio_text(100, 125) == "1.25x more"
    assert units.ratio_text(100, 100) == "1.00x"
    assert units.ratio_text(100, 0) == units.DASH
    assert units.ratio_text(0, 100) == units.DASH


def test_score_change_is_in_points_for_shares_only() -> None:
    assert units.score_change(0.942, 0.939) == ("-0.30", "points")
    assert units.score_change(0.5, 0.5) == ("+0.00", "points")
    assert units.score_change(31.5, 31.25) == ("-0.25", "")
    assert units.score_change(None, 0.5) == (units.DASH, "")


def test_duration_turns_to_minutes_and_hours() -> None:
    assert units.duration(40.0) == "40.0 s"
    assert units.duration(59.96) == "1 min 0 s"
    assert units.duration(150) == "2 min 30 s"
    assert units.duration(3900) == "1 h 5 min"
