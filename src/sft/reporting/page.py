"""What a page consists of: sections of numbers, tables and pictures.

Nothing here knows of HTML: texts are plain and the template escapes them; only the pictures are
finished SVG.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sft.reporting import svg, table, units


@dataclasses.dataclass(frozen=True)
class BigNumber:
    """A number of the headline strip."""

    value: str
    unit: str
    label: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts by row; `numeric` says which columns are right-aligned, `wide` which may wrap."""

    label: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    wide: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Finished SVG and the words below it."""

    drawing: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. `verdict` is (whether it holds, in words); `foot` moves it to the end."""

    title: str
    lead: str = ""
    verdict: tuple[bool, str] | None = None
    numbers: tuple[BigNumber, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    foot: bool = False


def make_table(
    label: str,
    headers: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    wide: Sequence[int] = (),
) -> Table:
    numeric = table.numeric_columns(len(headers), rows)
    wraps = tuple(index in wide for index in range(len(headers)))
    return Table(label, headers, tuple(rows), tuple(numeric), wraps)


def layers_section(title: str, lead: str, rows: Sequence[Mapping[str, Any]]) -> Section:
    """A row a layer, and bars of whatever costs the rows carry."""
    headers = ("layer", "scheme", "rank", "bits", "predicted damage", "reason")
    texts = [
        (
            table.cell_text(row.get("name")),
            table.cell_text(row.get("scheme")),
            units.shape(row.get("rank")),
            table.cell_text(row.get("weight_bits")),
            units.general(row.get("predicted_damage")),
            table.cell_text(row.get("reason")),
        )
        for row in rows
    ]
    pictures = []
    for what, key, text in (("MACs", "macs", units.count), ("Bytes", "size", units.size)):
        bars = [_bar(row, key) for row in rows]
        if any(bar.longest > 0 for bar in bars):
            caption = f"{what} of each layer: before (pale) and after (strong)."
            if len(bars) > svg.MOST_BARS:
                caption += f" The {svg.MOST_BARS} greatest of {len(bars)}."
            pictures.append(Picture(svg.layer_bars(bars, what, text), caption))
    shown = (make_table(title, headers, texts, wide=(5,)),)
    return Section(title, lead, tables=shown, pictures=tuple(pictures))


def _bar(row: Mapping[str, Any], key: str) -> svg.Bar:
    before, after = units.finite(row.get(f"{key}_before")), units.finite(row.get(key))
    return svg.Bar(table.cell_text(row.get("name")), before, after)
