"""The report: one self-contained HTML page of whatever records are given.

No script, no font, no reference that leaves the page; light and dark follow the reader's setting.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sft.core.errors import InputError
from sft.core.files import write_text
from sft.core.records import Check, Front, Inspection, Plan, Profile, Timing
from sft.reporting import of_records, of_result
from sft.reporting.page import Section

SHOWN = "Inspection, Profile, Front, Plan, Check, Timing and the dict of a result.json"


def report(path: str | Path, *records: object) -> Path:
    """Write a page with a section for each record, in the order given; whole or not at all.

    records : any mix of `Inspection`, `Profile`, `Front`, `Plan`, `Check`, `Timing` and result
        dicts. With an inspection or a profile beside it, a plan is drawn against the original
        layers.
    Raises `InputError` for another type, and where the page cannot be written.
    """
    if not records:
        raise InputError(f"There is nothing to report: give at least one of {SHOWN}.")
    page = _page(records)
    write_text(Path(path), page)
    return Path(path)


def render(result: Mapping[str, Any]) -> str:
    """The page of one `result.json`."""
    return _page((result,))


def _page(records: tuple[object, ...]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    originals = of_records.original_costs(records)
    found = [section for record in records for section in _sections(record, originals)]
    model, target = _subject(records)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = Markup  # SVG of sft.reporting.svg, escaped where it was built
    source = resources.files("sft.reporting").joinpath("template.html.j2").read_text("utf-8")
    return environment.from_string(source).render(
        model=model,
        target=target,
        sections=[s for s in found if not s.foot],
        foot=[s for s in found if s.foot],
    )


def _sections(record: object, originals: of_records.Originals) -> list[Section]:
    match record:
        case Inspection():
            return of_records.of_inspection(record)
        case Profile():
            return of_records.of_profile(record)
        case Front():
            return of_records.of_front(record)
        case Plan():
            return of_records.of_plan(record, originals)
        case Check():
            return of_records.of_check(record)
        case Timing():
            return of_records.of_timing(record)
        case Mapping():
            return of_result.of_result(record)
    raise InputError(
        f"A report cannot show an object of type {type(record).__name__}. It shows {SHOWN}."
    )


def _subject(records: tuple[object, ...]) -> tuple[str, str]:
    """Model and target, each from the first record that names it; empty if none does."""
    found = {"model": "", "target": ""}
    for record in records:
        for key, known in found.items():
            value = record.get(key) if isinstance(record, Mapping) else getattr(record, key, None)
            found[key] = known or str(value or "")
    return found["model"], found["target"]
