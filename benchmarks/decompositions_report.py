"""The table and the file of `decompositions.py`: what the times of one shape add up to."""

import csv
import re
from pathlib import Path
from typing import Any

from sft.runtimes.targets import machine

RESULTS = Path(__file__).parent / "results"
SVD_RANKS = 16
PEERS = {"tucker2": "partial_tucker", "separable": "parafac"}
TUNED = "parafac, float32 and line search"
WANTED = {
    "speedup_vs_tensorly": (">=", 20.0),
    "error_ratio_vs_tensorly": ("<=", 1.0),
    "gemm_share": (">=", 0.0),
}

Row = dict[str, Any]

COLUMNS = (
    *("shape", "menus s", "ours s", "tensorly s", "ratio", "16 svd s", "ratio "),
    *("tucker2 err", "theirs", "iter", "separable err", "theirs ", "iter ", "growth", "theirs  "),
)


def spent(row: Row, kind: str = "seconds") -> dict[str, float]:
    """Seconds of one shape: ours for the two compared schemes and for all, theirs, and SVDs."""
    seconds = row[kind]
    svds = {name: own for name, own in seconds.items() if name.startswith("svd ")}
    factors = sum(seconds.get(f"{name} factors", 0.0) for name in PEERS)
    return {
        "menus": sum(seconds[name] for name in row["schemes"]),
        "ours": sum(seconds.get(name, 0.0) for name in PEERS) + factors,
        "all": sum(seconds[name] for name in row["schemes"]) + factors,
        "tensorly": sum(seconds.get(peer, 0.0) for peer in PEERS.values()),
        "svd": SVD_RANKS * sum(svds.values()),
        "svd_menus": sum(seconds[name.removeprefix("svd ")] for name in svds),
    }


def cells_of(row: Row) -> list[str]:
    """A row of the table: the menus of all schemes; the two compared ones with their factors."""
    outputs, inputs, extent, stride = row["shape"]
    own = spent(row)
    cells = [f"{outputs}x{inputs}x{extent}x{extent}/{stride}", f"{own['menus']:.4f}"]
    if extent > 1:
        cells += [f"{own['ours']:.4f}", f"{own['tensorly']:.4f}"]
        cells.append(f"{own['tensorly'] / own['ours']:.1f}")
    else:
        cells += ["-"] * 3
    cells += [f"{own['svd']:.3f}", f"{own['svd'] / own['svd_menus']:.1f}"]
    if extent == 1:
        return cells + ["-"] * 8
    for name, peer in PEERS.items():
        cells += [f"{row[f'error {name}']:.4f}", f"{row[f'error {peer}']:.4f}"]
        cells.append(str(row[f"iterations {peer}"]))
    return [*cells, f"{row['growth separable']:.1f}", f"{row['growth parafac']:.1f}"]


def show(row: Row, header: bool) -> None:
    """Print the row, under the names of the columns if asked for."""
    widths = [18, *(max(10, len(name) + 1) for name in COLUMNS[1:])]
    for cells in ([COLUMNS] if header else []) + [cells_of(row)]:
        print("".join(c.strip().rjust(w) for c, w in zip(cells, widths, strict=True)), flush=True)


def write(figures: dict[str, float], details: dict[str, float | str], rows: list[Row]) -> Path:
    """The figures, what else there is to know, and the table with the seconds of every task."""
    here = machine()
    named = f"{here['processor']}, {here['instruction_set']}, {here['logical_cores']} cores"
    RESULTS.mkdir(parents=True, exist_ok=True)
    short = re.sub(r"[^A-Za-z0-9]+", "-", named).strip("-").lower()
    path = RESULTS / f"decompositions-{short}.csv"
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["figure", "measured", "sense", "wanted", "verdict"])
        for name, value in figures.items():
            sense, wanted = WANTED[name]
            table.writerow([name, f"{value:.4f}", sense, wanted, verdict(name, value)])
        for name, detail in {**details, "machine": named, "threads": 1}.items():
            shown = f"{detail:.4f}" if isinstance(detail, float) else detail
            table.writerow([name, shown, "", "", ""])
        tasks = sorted({task for row in rows for task in row["seconds"]})
        table.writerow([*COLUMNS, *(f"{task}, s" for task in tasks)])
        for row in rows:
            own = [format(row["seconds"][t], ".5f") if t in row["seconds"] else "" for t in tasks]
            table.writerow([*cells_of(row), *own])
    return path


def verdict(name: str, value: float) -> str:
    """Whether a figure is as wanted."""
    sense, wanted = WANTED[name]
    return "met" if (value >= wanted if sense == ">=" else value <= wanted) else "MISSED"
