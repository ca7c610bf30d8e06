"""Figures of a benchmark: what was wanted of each, said on the screen and kept in a CSV file."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from sft.runtimes.targets import machine

RESULTS = Path(__file__).parent / "results"

Found = dict[str, float | str]
Wanted = Mapping[str, tuple[str, float | str]]  # sense and bound; a name is the figure of that name
Row = tuple[str, str, str, str, str]  # figure, measured, sense, wanted, verdict


def rows_of(found: Found, figures: Wanted) -> list[Row]:
    """The figures with what is wanted of them, then everything else that was found."""
    rows = []
    for name, (sense, bound) in figures.items():
        if name in found:
            wanted = found.get(bound, "") if isinstance(bound, str) else bound
            verdict = _verdict(float(found[name]), sense, float(wanted)) if sense else ""
            rows.append((name, _shown(found[name]), sense, _shown(wanted), verdict))
    rest = ((name, value) for name, value in found.items() if name not in figures)
    return rows + [(name, _shown(value), "", "", "") for name, value in rest]


def print_rows(rows: list[Row]) -> None:
    """One line a figure, with what was wanted and whether it was met."""
    for figure, measured, sense, wanted, verdict in rows:
        print(f"{figure:44} {measured:>12}  {sense and f'wanted {sense} {wanted}  {verdict}'}")


def read_rows(benchmark: str) -> dict[str, str]:
    """What the file of this machine holds, by figure."""
    path = _path(benchmark, _named())
    if not path.exists():
        return {}
    with path.open(newline="") as stream:
        return {row[0]: row[1] for row in list(csv.reader(stream))[1:]}


def write_rows(benchmark: str, rows: list[Row], figures: Wanted, threads: int) -> Path:
    """Put the rows into `results/<benchmark>-<machine>.csv`; other rows of that file stay."""
    named = _named()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = _path(benchmark, named)
    versions = " ".join(f"{name}={version}" for name, version in machine()["versions"].items())
    facts = {"machine": named, "threads": str(threads), "versions": versions}
    new = {row[0]: row for row in rows} | {k: (k, v, "", "", "") for k, v in facts.items()}
    old: dict[str, Row] = {}
    if path.exists():
        with path.open(newline="") as stream:
            old = {row[0]: (*row,) for row in list(csv.reader(stream))[1:]}  # type: ignore[misc]
    order = [*figures, *(name for name in {**old, **new} if name not in figures)]
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["figure", "measured", "sense", "wanted", "verdict"])
        table.writerows(new.get(name) or old[name] for name in order if name in new or name in old)
    return path


def _named() -> str:
    """This machine, as files and reports call it."""
    here = machine()
    return f"{here['processor']}, {here['instruction_set']}, {here['logical_cores']} cores"


def _path(benchmark: str, named: str) -> Path:
    return RESULTS / f"{benchmark}-{re.sub(r'[^A-Za-z0-9]+', '-', named).strip('-').lower()}.csv"


def _verdict(measured: float, sense: str, wanted: float) -> str:
    met = measured >= wanted if sense == ">=" else measured <= wanted
    return "met" if met else "MISSED"


def _shown(value: float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"
