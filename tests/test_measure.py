"""The verb `profile`, whole: with the latency of every option."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from sft import measure as room
from sft.core.budget import Budget
from sft.core.errors import InputError
from sft.core.records import DENSE, KEEP, STORED, Artifact, Option, Profile
from sft.measure import add_latency, cell_of, profile
from sft.planning.allocate import plan as make_plan
from sft.profiling.latency import LatencyTable
from sft.runtimes.cells import FLOAT, INTEGER, MIXED, Cell
from sft.runtimes.targets import find_target

QUICK = {"schemes": ["channel_in"], "weight_bits": 8, "anchor_samples": 16}


class Table:
    """Latency by a formula; files take what they are told to."""

    def __init__(self, whole: float, original: float = 9.0) -> None:
        self.target, self.threads = find_target("onnxruntime-avx2"), 1
        self.whole, self.original = whole, original
        self.failing: set[Cell] = set()
        self.missing: set[Cell] = set()

    def time(self, cell: Cell) -> float:
        return 1e-6 * cell.macs * (1 if cell.arithmetic == INTEGER else 3)

    def measure(self, cells: Collection[Cell]) -> dict[Cell, float]:
        known = [c for c in cells if c not in self.missing]
        return {c: math.inf if c in self.failing else self.time(c) for c in known}

    def measure_files(self, files: Sequence[Artifact]) -> tuple[float, ...]:
        return (self.original, self.whole)[: len(files)]


@pytest.fixture
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "export", lambda *_, **__: "original")
    monkeypatch.setattr(room, "_export_rounded", lambda *_: "rounded")


def times(profile: Profile) -> dict[tuple[str, Option], float | None]:
    return {(e.layer.name, c.option): c.cost.latency for e in profile.layers for c in e.candidates}


def dense(profile: Profile) -> list[float]:
    return [times(profile)[e.layer.name, Option(DENSE, (), 8)] for e in profile.layers]


def test_a_profile_with_its_latency(net, data, tmp_path: Path) -> None:
    measured = profile(net, data, latency_table=tmp_path / "t.json", **QUICK)
    table = LatencyTable(find_target("onnxruntime"), 1, tmp_path / "t.json")
    before = (tmp_path / "t.json").read_bytes()
    ratios = set()
    for entry in measured.layers:
        for c in entry.candidates:
            cell = cell_of(entry, c.option, True)
            assert c.cost.latency is not None
            assert 0 < c.cost.latency < 100
            ratios.add(round(c.cost.latency / table.measure([cell])[cell], 9))
    assert len(ratios) == 1
    (ratio,) = ratios
    assert ratio <= 1.0
    assert measured.latency is not None
    assert measured.latency > 0
    assert measured.overhead_latency >= 0.0
    assert ratio == 1.0 or measured.overhead_latency == 0.0
    again = profile(net, data, latency_table=tmp_path / "t.json", **QUICK)
    assert again == measured
    assert (tmp_path / "t.json").read_bytes() == before


def test_without_latency_none_is_measured(net, data, monkeypatch) -> None:
    monkeypatch.setattr(room, "LatencyTable", None)
    measured = profile(net, data, latency=False, **QUICK)
    assert set(times(measured).values()) == {None}
    assert (measured.latency, measured.overhead_latency) == (None, 0.0)


def test_threads_and_table_are_those_of_the_measuring(net, data, monkeypatch, tmp_path) -> None:
    asked: list[object] = []

    def stop(*given: object) -> None:
        asked.extend(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "LatencyTable", stop)
    with pytest.raises(KeyboardInterrupt):
        profile(net, data, threads=3, latency_table=str(tmp_path / "t.json"))
    assert asked == [find_target("onnxruntime"), 3, tmp_path / "t.json"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="threads=0"):
        profile(net, data, threads=0)


@pytest.mark.usefixtures("_no_files")
def test_overhead_is_what_the_layers_do_not_take(profiled, net, data) -> None:
    table = Table(whole=20.0)
    timed = add_latency(profiled, net, data, table)
    for entry in timed.layers:
        for c in entry.candidates:
            assert c.cost.latency == table.time(cell_of(entry, c.option, True))
    assert timed.latency == 9.0
    assert timed.overhead_latency > 0
    assert timed.overhead_latency + math.fsum(dense(timed)) == pytest.approx(20.0, rel=1e-12)
    plan = make_plan(timed, Budget(), overrides=dict.fromkeys(
        (e.layer.name for e in timed.layers), Option(DENSE, (), 8)))  # fmt: skip
    assert plan.cost.latency == pytest.approx(20.0, rel=1e-12)
    assert dataclasses.replace(timed, layers=profiled.layers, latency=None,
                               overhead_latency=0.0) == profiled  # fmt: skip


@pytest.mark.usefixtures("_no_files")
def test_layers_that_take_longer_apart_are_scaled(profiled, net, data) -> None:
    apart = times(add_latency(profiled, net, data, Table(whole=20.0)))
    timed = add_latency(profiled, net, data, Table(whole=0.1))
    assert timed.overhead_latency == 0.0
    assert math.fsum(dense(timed)) == pytest.approx(0.1, rel=1e-12)
    ratios = [t / apart[key] for key, t in times(timed).items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-12)


@pytest.mark.usefixtures("_no_files")
def test_what_cannot_be_timed_has_none_and_what_failed_is_infinite(profiled, net, data) -> None:
    table = Table(whole=20.0)
    body, fc = profiled.layers[1], profiled.layers[3]
    failed, unknown = Option("channel_in", (2,), 8), Option(STORED, (), 8)
    table.failing = {cell_of(body, failed, True)}
    table.missing = {cell_of(body, unknown, True)}
    table.missing |= {cell_of(fc, c.option, True) for c in fc.candidates}
    timed = add_latency(profiled, net, data, table)
    assert times(timed)["body", failed] == math.inf
    assert times(timed)["body", unknown] is None
    assert {c.cost.latency for c in timed.layers[3].candidates} == {0.0}
    known = math.fsum(dense(timed))
    assert timed.overhead_latency == pytest.approx(20.0 - known, rel=1e-12)


@pytest.mark.usefixtures("_no_files")
def test_a_layer_that_is_called_twice_takes_twice_as_long(profiled, net, data) -> None:
    first = profiled.layers[0]
    twice = dataclasses.replace(first, layer=dataclasses.replace(first.layer, calls=2))
    changed = dataclasses.replace(profiled, layers=(twice, *profiled.layers[1:]))
    once, both = (times(add_latency(p, net, data, Table(20.0))) for p in (profiled, changed))
    for (name, option), latency in both.items():
        assert latency == once[name, option] * (2 if name == first.layer.name else 1)


def test_cells_of_options(profiled) -> None:
    body = profiled.layers[1]
    kinds = {
        Option(KEEP): (MIXED, FLOAT), Option(STORED, (), 8): (MIXED, FLOAT),
        Option(DENSE, (), 4): (INTEGER, INTEGER), Option("channel_in", (2,), 2): (INTEGER,) * 2,
        Option("channel_in", (2,), None): (MIXED, FLOAT),
    }  # fmt: skip
    for option, (among_integers, among_floats) in kinds.items():
        cell = cell_of(body, option, True)
        assert cell.arithmetic == among_integers
        assert cell_of(body, option, False).arithmetic == among_floats
        assert len(cell.chain) == 1 + bool(option.rank)
        assert cell.size == (12, 12)
    bare = dataclasses.replace(body, layer=dataclasses.replace(body.layer, geometry=None))
    assert cell_of(bare, Option(KEEP), True) is None
