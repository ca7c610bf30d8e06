"""Text tables, CSV, and the summary of a result."""

import csv
import io
import math
from typing import Any

import pytest

from sft.core.errors import InputError
from sft.reporting.table import format_table, summary, to_csv


def _line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_numbers_end_and_words_start_in_one_column() -> None:
    rows = [("conv1", 5, 0.5, "a"), ("a.longer.name", 12345, None, "bcd")]
    lines = format_table(("layer", "macs", "damage", "why"), rows).splitlines()
    assert len(lines) == 4
    first, second = lines[2], lines[3]
    macs_end = lines[0].index("macs") + len("macs")
    assert first.index("5") + 1 == second.index("12345") + 5 == macs_end
    assert first.index("0.5") + 3 == second.index(" - ") + 2
    assert first.startswith("conv1 ")
    assert second.startswith("a.longer.name ")
    assert first.index("a", 6) == second.index("bcd") == lines[0].index("why")


def test_numbers_with_units_are_right_aligned() -> None:
    lines = format_table(("", "size"), [("a", "512 B"), ("b", "2.79 MB")]).splitlines()
    assert lines[2].endswith("  512 B")
    assert len(lines[2]) == len(lines[3])


def test_a_cell_stays_on_its_line() -> None:
    text = format_table(("a", "b"), [("one\ntwo", math.nan)])
    assert len(text.splitlines()) == 3
    assert text.splitlines()[2].split() == ["one", "two", "-"]


def test_table_without_rows_is_its_head() -> None:
    assert format_table(("layer", "macs"), []).splitlines() == ["layer  macs", "-----  ----"]


def test_a_short_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"Row 1 .* 1 cells.* 2"):
        format_table(("a", "b"), [(1, 2), (3,)])
    with pytest.raises(InputError, match="Row 0"):
        to_csv(("a", "b"), [(1,)])


def test_csv_reads_back() -> None:
    rows = [('a "quoted", name', 0.1 + 0.2, None), ("two\nlines", 7, "ü")]
    read = list(csv.reader(io.StringIO(to_csv(("layer", "damage", "note"), rows), newline="")))
    assert read[0] == ["layer", "damage", "note"]
    assert read[1][0] == rows[0][0]
    assert float(read[1][1]) == 0.1 + 0.2
    assert read[1][2] == ""
    assert read[2] == ["two\nlines", "7", "ü"]


def test_summary_shows_each_measure_with_its_ratio(result: dict[str, Any]) -> None:
    text = summary(result)
    before, after = result["before"], result["after"]
    for start, key in (
        ("file size", "file_bytes"),
        ("packed size", "packed_bytes"),
        ("parameters", "params"),
        ("MACs", "macs"),
        ("latency, median", "latency_ms"),
        ("latency, min", "latency_ms_min"),
        ("latency, p90", "latency_ms_p90"),
        ("peak memory", "peak_memory_bytes"),
    ):
        found = _line(text, start).rsplit(maxsplit=2)
        assert found[2] == "less"
        assert float(found[1].rstrip("x")) == pytest.approx(before[key] / after[key], rel=0.005)
    assert "2.79 MB" in _line(text, "file size")
    assert "310 KB" in _line(text, "file size")
    assert "80.5 M" in _line(text, "MACs")
    assert "0.470 ms" in _line(text, "latency, median")
    assert _line(text, "score (top1)").split()[2:] == ["94.20%", "93.91%", "-0.29", "points"]


def test_summary_tells_budget_check_and_integers(result: dict[str, Any]) -> None:
    text = summary(result)
    assert _line(text, "budget") == "budget: met (size 10.00%, macs 30.00%, max_drop 0.005)"
    assert _line(text, "check") == "check: passed"
    assert _line(text, "integer MACs") == "integer MACs: 98.76%"


@pytest.mark.parametrize(
    ("stored", "computed", "told"), [(4.0, 8, True), (8.0, 8, False), (16.0, 32, False)]
)
def test_few_stored_bits_are_called_a_saving_of_storage(
    result: dict[str, Any], stored: float, computed: int, told: bool
) -> None:
    result["after"] |= {"storage_bits_mean": stored, "compute_bits": computed}
    sentence = "Weights take 4 bits in the file and are multiplied as 8-bit numbers"
    assert (sentence in summary(result)) == told
    assert ("save storage" in summary(result)) == told


def test_summary_does_not_hide_failure(result: dict[str, Any]) -> None:
    result["budget"]["met"] = False
    result["check"] |= {"passed": False, "failures": ["Agreement is 0.10."]}
    text = summary(result)
    assert _line(text, "budget").startswith("budget: NOT met")
    assert _line(text, "check") == "check: FAILED: Agreement is 0.10."


def test_summary_of_a_partial_result_has_dashes() -> None:
    text = summary({"before": {"macs": 1000}, "after": {"macs": None}})
    assert _line(text, "MACs").split() == ["MACs", "1.00", "K", "-", "-"]
    assert _line(text, "file size").split() == ["file", "size", "-", "-", "-"]
    assert _line(text, "budget") == "budget: none asked"
    assert _line(text, "check") == "check: not run"


def test_absolute_limits_are_not_percentages() -> None:
    asked = {"size_bytes": 250_000, "macs_count": 4_000_000, "minimize": "size"}
    text = summary({"before": {}, "budget": {"asked": asked, "met": True}})
    assert "size_bytes 250 KB, macs_count 4.00 M, minimize size" in _line(text, "budget")


def test_a_part_of_the_wrong_type_is_named() -> None:
    with pytest.raises(InputError, match="'before' of the result is of type list"):
        summary({"before": [1]})
