"""What the page shows of a `result.json`."""

from collections.abc import Mapping
from typing import Any

from sft.core.errors import InputError
from sft.reporting import svg, table, units
from sft.reporting.of_records import of_check
from sft.reporting.page import BigNumber, Picture, Section, layers_section, make_table

BITS = (
    ("weight bits planned, mean", "weight_bits_mean"),
    ("weight bits in the file, mean", "storage_bits_mean"),
    ("compute bits", "compute_bits"),
)


def of_result(result: Mapping[str, Any]) -> list[Section]:
    """Headline, before and after, picture, budget, check, layers, and how it was measured."""
    if not any(key in result for key in ("before", "after", "check", "layers")):
        raise InputError(
            "The dict given is no result: it has none of 'before', 'after', 'check', 'layers'. "
            "Give the content of a result.json."
        )
    found = [_before_and_after(result), _budget(result), of_check(table.part(result, "check"))[0]]
    rows = [row for row in result.get("layers") or () if isinstance(row, Mapping)]
    if rows:
        found.append(layers_section("Layers", "", rows))
    return [*found, _measured(result)]


def _before_and_after(result: Mapping[str, Any]) -> Section:
    """The headline strip, what came in and what came out, and the picture of the two."""
    before, after = table.part(result, "before"), table.part(result, "after")
    rows = [*table.comparison(result)]
    for label, key in BITS:
        if key in before or key in after:
            pair = (units.general(before.get(key)), units.general(after.get(key)))
            rows.append((label, *pair, units.ratio_text(before.get(key), after.get(key))))
    headers = ("", "came in", "came out", "ratio")
    split = f" Scored on the {result['split']} split." if result.get("split") else ""
    note = f"{split} {table.storage_note(after)}".rstrip()
    return Section(
        "Before and after",
        f"Both measured on exported files in the same runtime.{note}",
        numbers=_headline(before, after),
        tables=(make_table("Before and after", headers, rows),),
        pictures=_size_picture(before, after, str(result.get("metric") or "score")),
    )


def _headline(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[BigNumber, ...]:
    found = []
    for key, less, more in (
        ("file_bytes", "smaller file", "larger file"),
        ("macs", "fewer MACs", "more MACs"),
        ("latency_ms", "lower latency", "higher latency"),
    ):
        value, label = units.times(before.get(key), after.get(key), less, more)
        found.append(BigNumber(value, "" if value == units.DASH else "x", label))
    value, unit = units.score_change(before.get("score"), after.get("score"))
    return (*found, BigNumber(value, "", f"{unit} of score" if unit else "change of score"))


def _size_picture(
    before: Mapping[str, Any], after: Mapping[str, Any], metric: str
) -> tuple[Picture, ...]:
    share = units.is_share(before.get("score"), after.get("score"))
    points = []
    for name, values in (("before", before), ("after", after)):
        size, score = units.finite(values.get("file_bytes")), units.finite(values.get("score"))
        if size is not None and score is not None and size > 0:
            points.append(svg.Point(name, name, size, 100 * score if share else score))
    if not points:
        return ()
    drawing = svg.size_against_score(points, metric, "%" if share else "")
    return (Picture(drawing, f"Size of the file against {metric}: up and left is better."),)


def _budget(result: Mapping[str, Any]) -> Section:
    """What was asked beside what was measured."""
    budget = table.part(result, "budget")
    asked = table.part(budget, "asked")
    if not asked:
        return Section("Budget", "No limit was asked for.")
    before, after = table.part(result, "before"), table.part(result, "after")
    rows = [(n, table.asked_text(n, v), _reached(n, before, after)) for n, v in asked.items()]
    met = budget.get("met")
    verdict = (met, "met" if met else "NOT met") if isinstance(met, bool) else None
    headers = ("limit", "asked", "measured")
    return Section("Budget", "", verdict, tables=(make_table("Budget", headers, rows),))


def _reached(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What was measured for the limit called `name`; a size is told of the file and packed."""
    sizes = (("file", "file_bytes"), ("packed", "packed_bytes"))
    keys = {"macs": "macs", "latency": "latency_ms", "memory": "peak_memory_bytes"}
    if name in keys:
        return _fraction(before, after, keys[name])
    if name == "size":
        return ", ".join(f"{word} {_fraction(before, after, key)}" for word, key in sizes)
    if name == "size_bytes":
        return ", ".join(f"{word} {units.size(after.get(key))}" for word, key in sizes)
    if name == "macs_count":
        return units.count(after.get("macs"))
    if name == "latency_ms":
        return units.milliseconds(after.get("latency_ms"))
    b, a = units.number(before.get("score")), units.number(after.get("score"))
    if name == "max_drop" and b is not None and a is not None:
        return f"{b - a:.4g}"
    return units.DASH


def _fraction(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    ratio = units.factor(before.get(key), after.get(key))
    return units.DASH if ratio is None else units.percent(1 / ratio)


def _measured(result: Mapping[str, Any]) -> Section:
    """Machine, versions, threads, seed, and the seconds each step took."""
    versions = table.part(result, "versions")
    rows = [
        (name, table.cell_text(result.get(name)))
        for name in ("machine", "target", "threads", "seed")
    ]
    rows += [(f"version of {name}", table.cell_text(text)) for name, text in versions.items()]
    seconds = table.part(result, "seconds")
    rows += [(f"time: {name}", units.duration(spent)) for name, spent in seconds.items()]
    shown = (make_table("How it was measured", ("", "value"), rows),)
    return Section("How it was measured", tables=shown, foot=True)
