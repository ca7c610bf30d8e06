"""What the page shows of each kind of record."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sft.core.records import KEEP, Check, Front, Inspection, LayerProfile, Plan, Profile, Timing
from sft.reporting import svg, table, units
from sft.reporting.page import Picture, Section, layers_section, make_table

Originals = Mapping[str, Mapping[str, int]]


def original_costs(records: Iterable[object]) -> Originals:
    """What inspections and profiles say of each layer as it came in.

    By layer name: `macs_before`, `params_before`, and `size_before` (bytes) where a profile lists
    the cost of keeping the layer.
    """
    found: dict[str, dict[str, int]] = {}
    for record in records:
        if isinstance(record, Inspection):
            layers, kept = record.layers, {}
        elif isinstance(record, Profile):
            layers = tuple(entry.layer for entry in record.layers)
            kept = {e.layer.name: _kept_size(e) for e in record.layers}
        else:
            continue
        for layer in layers:
            costs = found.setdefault(layer.name, {})
            costs.update(macs_before=layer.macs, params_before=layer.params)
            if (size := kept.get(layer.name)) is not None:
                costs["size_before"] = size
    return found


def of_inspection(record: Inspection) -> list[Section]:
    rows = [
        (
            layer.name,
            layer.kind,
            units.shape(layer.weight_shape),
            units.shape(layer.input_shape),
            units.shape(layer.output_shape),
            units.count(layer.params),
            units.count(layer.macs),
            str(layer.calls),
            "; ".join(f"{scheme}: {why}" for scheme, why in layer.refusals.items()),
        )
        for layer in record.layers
    ]
    shapes = ("weight", "input", "output")
    headers = ("layer", "kind", *shapes, "parameters", "MACs", "calls", "refused")
    lead = (
        f"{record.model}: {len(rows)} layers, {units.count(record.params)} parameters, "
        f"{units.count(record.macs)} MACs for one input of {units.shape(record.input_shape)}."
    )
    shown = make_table("Layers found", headers, rows, wide=(8,))
    return [Section("What came in", lead, tables=(shown,))]


def of_profile(record: Profile) -> list[Section]:
    extents = ("MACs, most", "MACs, least", "size, most", "size, least")
    damages = ("damage, least", "damage, most", "alpha of each scheme")
    headers = ("layer", "options", *extents, *damages)
    lead = (
        f"{record.model} for {record.target}, measured on {record.samples} samples: "
        f"{units.count(record.params)} parameters, {units.count(record.macs)} MACs, "
        f"{units.size(record.size)}."
    )
    rows = [_menu(entry) for entry in record.layers]
    shown = make_table("Menu of each layer", headers, rows, wide=(8,))
    return [Section("Profile", lead, tables=(shown,))]


def of_front(record: Front) -> list[Section]:
    """The least damage at each cost as a picture and a table."""
    text = units.size if record.cost == "size" else units.milliseconds
    rows = [
        (text(getattr(p.cost, record.cost)), units.general(p.damage), units.general(p.bound))
        for p in record.points
    ]
    headers = (record.cost, "predicted damage", "at least")
    pairs = [(float(getattr(p.cost, record.cost)), p.damage) for p in record.points]
    drawing = svg.front_line(pairs, record.cost, text)
    caption = f"Damage of the whole network against {record.cost}: down and left is better."
    return [
        Section(
            f"Front of {record.cost}",
            f"{record.model} for {record.target}: {len(rows)} networks, none beaten by another.",
            tables=(make_table("Front", headers, rows),),
            pictures=(Picture(drawing, caption),) if drawing else (),
        )
    ]


def of_plan(record: Plan, originals: Originals) -> list[Section]:
    """The totals with the solver's answer, and a row a layer.

    originals : what `original_costs` found in the records beside the plan.
    """
    old, new = record.original, record.cost
    totals = [
        (label, text(before), text(after), units.ratio_text(before, after))
        for label, before, after, text in (
            ("parameters", old.params, new.params, units.count),
            ("MACs", old.macs, new.macs, units.count),
            ("size", old.size, new.size, units.size),
        )
    ]
    rows = [
        {
            "name": row.name,
            "scheme": row.option.scheme,
            "rank": row.option.rank,
            "weight_bits": row.option.weight_bits,
            "predicted_damage": row.predicted_damage,
            "reason": row.reason,
            **dataclasses.asdict(row.cost),
            **originals.get(row.name, {}),
        }
        for row in record.rows
    ]
    asked = ", ".join(f"{k} {table.asked_text(k, v)}" for k, v in record.budget.items())
    lead = (
        f"{record.model} for {record.target}; status {record.status}, predicted damage "
        f"{units.general(record.value)}, at least {units.general(record.bound)} "
        f"(gap {units.percent(record.gap)}). Budget: {asked or 'none'}."
    )
    headers = ("of the whole, predicted", "before", "after", "ratio")
    return [
        Section("Plan", lead, tables=(make_table("Totals of the plan", headers, totals),)),
        layers_section("Layers of the plan", "", rows),
    ]


def of_check(record: Check | Mapping[str, Any]) -> list[Section]:
    check = record.to_dict() if isinstance(record, Check) else record
    rows = [
        ("agreement with the original", units.percent(check.get("agreement"))),
        ("greatest difference of an output", units.general(check.get("max_abs"))),
        ("signal to error ratio", units.decibels(check.get("sqnr_db"))),
        ("MACs that ran in integers", units.percent(check.get("integer_macs_fraction"))),
    ]
    if not check:
        return [Section("Check", "The exported file was not checked.")]
    score, samples = check.get("score"), check.get("samples")
    if score is not None:
        rows.append(("score", units.score(score, units.is_share(score))))
    if samples:
        rows.append(("samples", str(samples)))
    verdict = (bool(check.get("passed")), table.check_verdict(check))
    lead = "What running the exported file showed."
    return [Section("Check", lead, verdict, (), (make_table("Check", ("measure", "value"), rows),))]


def of_timing(record: Timing) -> list[Section]:
    rows = [
        ("latency, median", units.milliseconds(record.latency_ms)),
        ("latency, min", units.milliseconds(record.latency_ms_min)),
        ("latency, p90", units.milliseconds(record.latency_ms_p90)),
        ("peak memory", units.size(record.peak_memory_bytes)),
    ]
    lead = f"{record.runs} runs with threads = {record.threads}."
    return [Section("Timing", lead, tables=(make_table("Timing", ("measure", "value"), rows),))]


def _kept_size(entry: LayerProfile) -> int | None:
    sizes = (c.cost.size for c in entry.candidates if c.option.scheme == KEEP)
    return next(sizes, None)


def _menu(entry: LayerProfile) -> tuple[str, ...]:
    """The extent of one layer's menu."""
    macs = [c.cost.macs for c in entry.candidates]
    sizes = [c.cost.size for c in entry.candidates]
    damages = [c.damage for c in entry.candidates]
    return (
        entry.layer.name,
        str(len(entry.candidates)),
        units.count(max(macs, default=None)),
        units.count(min(macs, default=None)),
        units.size(max(sizes, default=None)),
        units.size(min(sizes, default=None)),
        units.general(min(damages, default=None)),
        units.general(max(damages, default=None)),
        ", ".join(f"{scheme} {units.general(x)}" for scheme, x in entry.alphas.items()),
    )
