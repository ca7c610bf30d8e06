"""The verb `profile`, whole: damages and costs of every option, and its latency in the runtime.

Latency of a layer is measured as a small file of its own; what the network takes beside its layers
is found once, as the difference between a whole exported network in integers and the sum of its
layers.
"""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.calibration.quantize import quantize
from sft.core.data import Data
from sft.core.geometry import Geometry
from sft.core.progress import say
from sft.core.randomness import forked_rng
from sft.core.records import (
    DENSE,
    KEEP,
    STORED,
    Artifact,
    Candidate,
    Cost,
    LayerProfile,
    Option,
    Plan,
    PlanRow,
    Profile,
)
from sft.core.shards import record_of_first
from sft.decompositions import decompositions
from sft.exporters import export
from sft.profiling.latency import LatencyTable
from sft.profiling.profile import profile as profile_damage
from sft.runtimes.cells import CHAIN, FLOAT, INTEGER, INTERPOLATIVE, MIXED, RESIDUAL, Cell
from sft.runtimes.targets import find_target
from sft.surgery.apply import apply
from sft.surgery.modules import fold_batch_norm

SAMPLES = 8  # that the ranges of the network that is timed are taken from
STRUCTURES = {"residual": RESIDUAL, "interpolative": INTERPOLATIVE}


def profile(
    model: nn.Module,
    data: Data,
    target: str = "onnxruntime",
    *,
    latency: bool = True,
    threads: int = 1,
    latency_table: str | Path | None = None,
    **measuring: Any,
) -> Profile:
    """Measure everything about a network on data that a plan needs.

    latency : also time every option in the target's runtime on this machine. threads : of the
        runtime then. latency_table : the file in which timings are remembered, by default one in
        the user's cache.
    measuring : the options of `profiling.profile`, which measures the damage.
    Of several processes the first one alone times, and the others wait.
    The model is not changed. Raises `InputError` if it or the data cannot be used, or if this
    machine cannot run the target's integers (give `latency=False` then).
    """
    table = None
    if latency:
        path = None if latency_table is None else Path(latency_table)
        table = LatencyTable(find_target(target), threads, path)
    measured = profile_damage(model, data, target, **measuring)
    if table is None:
        return measured
    with forked_rng(measured.seed):
        found = record_of_first(Profile, lambda: add_latency(measured, model, data, table))
    return dataclasses.replace(found, statistics=measured.statistics)


def add_latency(measured: Profile, model: nn.Module, data: Data, table: LatencyTable) -> Profile:
    """The profile with the milliseconds of every option, of the original, and of what is beside.

    An option of a layer for which no file can be timed has none and is not planned with under a
    limit on latency; a layer of which nothing can be timed counts as part of the rest.
    """
    integers = any(c.option.weight_bits for e in measured.layers for c in e.candidates)
    cells = {
        (entry.layer.name, c.option): cell
        for entry in measured.layers
        for c in entry.candidates
        if (cell := cell_of(entry, c.option, integers)) is not None
    }
    found = table.measure(set(cells.values()))
    layers = tuple(_with_latency(entry, cells, found) for entry in measured.layers)
    timed = dataclasses.replace(measured, layers=layers)
    original, whole, parts = _time_whole(timed, model, data, table)
    if parts > whole:  # the layers alone are quicker in the network than apart
        timed = dataclasses.replace(
            timed, layers=tuple(_scaled(entry, whole / parts) for entry in layers)
        )
    return dataclasses.replace(timed, latency=original, overhead_latency=max(whole - parts, 0.0))


def cell_of(entry: LayerProfile, option: Option, integers: bool) -> Cell | None:
    """What is timed for an option; None for a layer without a geometry.

    integers : whether the network around a float layer keeps its activations in integers.
    """
    layer = entry.layer
    if layer.geometry is None:
        return None
    floats = option.weight_bits is None or option.scheme in (KEEP, STORED)
    arithmetic = (MIXED if integers else FLOAT) if floats else INTEGER
    chain: Sequence[Geometry] = (layer.geometry,)
    if option.rank:
        chain = decompositions[option.scheme].factors(layer.geometry, option.rank)
    structure = STRUCTURES.get(option.scheme, CHAIN) if option.rank else CHAIN
    bias = layer.bias or bool(option.rank)
    return Cell(tuple(chain), layer.input_size, arithmetic, bias, None, structure)


def _with_latency(
    entry: LayerProfile, cells: dict[tuple[str, Option], Cell], found: dict[Cell, float]
) -> LayerProfile:
    def milliseconds(candidate: Candidate) -> float | None:
        cell = cells.get((entry.layer.name, candidate.option))
        known = None if cell is None else found.get(cell)
        return None if known is None else known * entry.layer.calls

    times = [milliseconds(c) for c in entry.candidates]
    if all(t is None for t in times):
        times = [0.0] * len(times)
    return dataclasses.replace(
        entry,
        candidates=tuple(
            dataclasses.replace(c, cost=dataclasses.replace(c.cost, latency=t))
            for c, t in zip(entry.candidates, times, strict=True)
        ),
    )


def _scaled(entry: LayerProfile, factor: float) -> LayerProfile:
    candidates = tuple(
        dataclasses.replace(
            c, cost=dataclasses.replace(c.cost, latency=c.cost.latency and c.cost.latency * factor)
        )
        for c in entry.candidates
    )
    return dataclasses.replace(entry, candidates=candidates)


def _time_whole(
    timed: Profile, model: nn.Module, data: Data, table: LatencyTable
) -> tuple[float, float, float]:
    """Milliseconds of the original's file, of a file that splits nothing, and of its layers' sum.

    The second is in integers where the menus are.
    """
    chosen = [_whole(entry) for entry in timed.layers]
    plan = _plan_of(timed, chosen)
    example = data.example()
    say("  latency of the whole network")
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:
        first = Path(folder) / f"original{table.target.suffix}"
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        folded = fold_batch_norm(model, example.to(device))
        files = [export(folded, None, first, table.target.name, example=example)]
        if any(c.option.weight_bits for c in chosen):
            files.append(_export_rounded(model, plan, data, table, Path(folder)))
        times = table.measure_files(files)
    parts = [c.cost.latency for c in chosen]
    known = math.fsum(t for t in parts if t is not None and math.isfinite(t))
    return times[0], times[-1], known


def _export_rounded(
    model: nn.Module, plan: Plan, data: Data, table: LatencyTable, folder: Path
) -> Artifact:
    """A file of the network in integers, its weights rounded in the quickest way."""
    few = [data.example()[:SAMPLES]]
    rounded = quantize(
        apply(model, plan), plan, table.target, few,
        ranges="minmax", weight_ranges="minmax", rounding="nearest",
        correct_bias=False, refit=False, spare_sensitive=False,
    )  # fmt: skip
    return export(rounded, plan, folder / f"whole{table.target.suffix}", table.target.name)


def _whole(entry: LayerProfile) -> Candidate:
    """The layer unsplit, in its widest integers where it has any."""
    dense = [c for c in entry.candidates if c.option.scheme == DENSE]
    kept = [c for c in entry.candidates if c.option.scheme == KEEP]
    return max(dense, key=lambda c: c.option.weight_bits or 0) if dense else kept[0]


def _plan_of(timed: Profile, chosen: Sequence[Candidate]) -> Plan:
    rows = tuple(
        PlanRow(entry.layer.name, c.option, c.damage, c.cost, "to be timed")
        for entry, c in zip(timed.layers, chosen, strict=True)
    )
    return Plan(
        timed.model, timed.target, {}, rows, Cost(0, 0, 0), timed.original, "optimal",
        0.0, 0.0, 0.0, input_shape=timed.input_shape,
    )  # fmt: skip
