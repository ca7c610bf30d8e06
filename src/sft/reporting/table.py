"""Tables as text and CSV, and the short before and after of a result."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sft.core.budget import FRACTIONS
from sft.core.errors import InputError
from sft.reporting import units

_NUMBER = re.compile(r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|inf)[%x]?( [A-Za-z]+)?")

MEASURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("file size", "file_bytes", units.size),
    ("packed size", "packed_bytes", units.size),
    ("parameters", "params", units.count),
    ("MACs", "macs", units.count),
    ("score", "score", units.general),
    ("latency, median", "latency_ms", units.milliseconds),
    ("latency, min", "latency_ms_min", units.milliseconds),
    ("latency, p90", "latency_ms_p90", units.milliseconds),
    ("peak memory", "peak_memory_bytes", units.size),
)

ASKED: Mapping[str, Callable[[Any], str]] = {
    "size": units.size,
    "macs": units.count,
    "latency": units.milliseconds,
    "memory": units.size,
    "size_bytes": units.size,
    "macs_count": units.count,
    "latency_ms": units.milliseconds,
}


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned text: a head, a rule, a line a row.

    A column of numbers (with or without a unit; dashes allowed) is right-aligned, any other
    left-aligned. Floats are rounded to four digits; None and NaN print as a dash.
    """
    _check_width(headers, rows)
    cells = [[cell_text(cell) for cell in row] for row in rows]
    right = numeric_columns(len(headers), cells)
    heads = [cell_text(head) for head in headers]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(_aligned(line, widths, right) for line in lines)


def to_csv(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with all digits; None is an empty field."""
    _check_width(headers, rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows(rows)
    return stream.getvalue()


def summary(result: Mapping[str, Any]) -> str:
    """Before and after, the budget and the check of a `result.json`, as short text."""
    check = part(result, "check")
    integers = units.percent(check.get("integer_macs_fraction"))
    lines = [
        format_table(("", "before", "after", "ratio"), comparison(result)),
        "",
        f"budget: {budget_verdict(result)}",
        f"check: {check_verdict(check)}",
        f"integer MACs: {integers}",
    ]
    note = storage_note(part(result, "after"))
    return "\n".join([*lines, note] if note else lines)


def comparison(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of (measure, before, after, ratio) in human units; the score's ratio is its change."""
    before, after = part(result, "before"), part(result, "after")
    rows = []
    for label, key, text in MEASURES:
        b, a = before.get(key), after.get(key)
        if key == "score":
            share = units.is_share(b, a)
            metric = result.get("metric")
            label = f"score ({metric})" if metric else label
            change = " ".join(units.score_change(b, a)).strip()
            rows.append((label, units.score(b, share), units.score(a, share), change))
        else:
            rows.append((label, text(b), text(a), units.ratio_text(b, a)))
    return rows


def storage_note(after: Mapping[str, Any]) -> str:
    """A sentence where weights are stored in fewer bits than the runtime multiplies, else ""."""
    stored = units.number(after.get("storage_bits_mean"))
    computed = units.number(after.get("compute_bits"))
    if stored is None or computed is None or not stored < computed < 32:
        return ""
    return (
        f"Weights take {stored:.3g} bits in the file and are multiplied as {computed:.0f}-bit "
        "numbers: fewer bits save storage, not time."
    )


def asked_text(name: str, value: Any) -> str:
    """One field of a budget: a fraction of the original in percent, else in its own unit."""
    x = units.number(value)
    if name in FRACTIONS and x is not None and x <= 1:
        return units.percent(x)
    return ASKED.get(name, cell_text)(value)


def budget_verdict(result: Mapping[str, Any]) -> str:
    """ "met (size 10.00%, ...)", "NOT met (...)", or that nothing was asked."""
    budget = part(result, "budget")
    asked = part(budget, "asked")
    if not asked:
        return "none asked"
    met = budget.get("met")
    verdict = ("met" if met else "NOT met") if isinstance(met, bool) else "not known"
    wishes = ", ".join(f"{name} {asked_text(name, value)}" for name, value in asked.items())
    return f"{verdict} ({wishes})"


def check_verdict(check: Mapping[str, Any]) -> str:
    """ "passed", "FAILED: ..." with the failures in words, or "not run"."""
    if not check:
        return "not run"
    if check.get("passed"):
        return "passed"
    failures = check.get("failures") or ()
    return ("FAILED: " + " ".join(map(str, failures))) if failures else "FAILED"


def part(result: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The part of a result called `key`, empty if it is missing; `InputError` if it is no part."""
    found = result.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise InputError(
            f"'{key}' of the result is of type {type(found).__name__}; a JSON object is wanted. "
            "Give the result.json that SFT wrote."
        )
    return found


def cell_text(cell: object) -> str:
    """One line of text for a cell."""
    if cell is None or (isinstance(cell, float) and cell != cell):
        return units.DASH
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return " ".join(str(cell).splitlines())


def numeric_columns(width: int, cells: Sequence[Sequence[str]]) -> list[bool]:
    """For each column whether it holds numbers only (dashes and empty cells aside)."""
    columns = [[row[i] for row in cells if row[i] not in ("", units.DASH)] for i in range(width)]
    return [bool(column) and all(map(_NUMBER.fullmatch, column)) for column in columns]


def _aligned(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [
        text.rjust(width) if to_right else text.ljust(width)
        for text, width, to_right in zip(line, widths, right, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _check_width(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for index, row in enumerate(rows):
        if len(row) != len(headers):
            raise InputError(
                f"Row {index} of the table has {len(row)} cells, its head has {len(headers)}: "
                f"{', '.join(headers)}. Give one cell a column."
            )
