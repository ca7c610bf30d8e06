"""The table of measured latencies: what is measured, and what is remembered."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sft.core import progress
from sft.core.errors import InputError, RuntimeFailure
from sft.core.geometry import Geometry
from sft.profiling import latency
from sft.profiling.latency import LatencyTable, name_of
from sft.runtimes import stopwatch
from sft.runtimes.cells import Cell
from sft.runtimes.runner import Runner
from sft.runtimes.targets import find_target

HERE = find_target("onnxruntime")
CELLS = [Cell((Geometry(16, width),)) for width in (8, 16, 24, 32)]


class Fake:
    """A stopwatch that counts, fails on the cells it is told to, and stops at another."""

    measured: list[Cell]
    failing: set[Cell]
    interrupted: Cell | None

    def __init__(self, target: Any, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def milliseconds(self, cell: Cell) -> float:
        if cell == Fake.interrupted:
            raise KeyboardInterrupt
        Fake.measured.append(cell)
        if cell in Fake.failing:
            raise RuntimeFailure("it died")
        return float(cell.macs * self.threads)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(latency, "Stopwatch", Fake)
    Fake.measured, Fake.failing, Fake.interrupted = [], set(), None
    return Fake


def test_what_was_measured_is_not_measured_again(fake: type[Fake], tmp_path: Path) -> None:
    path = tmp_path / "cache" / "table.json"
    fake.failing = {CELLS[2]}
    first = LatencyTable(HERE, path=path)
    want = {c: math.inf if c == CELLS[2] else float(c.macs) for c in CELLS}
    assert first.measure(CELLS[:3]) == {c: want[c] for c in CELLS[:3]}
    assert first.failures() == {name_of(CELLS[2]): "it died"}
    second = LatencyTable(HERE, path=path)
    assert second.measure([*CELLS, CELLS[0]]) == want
    assert second.measure(CELLS) == want
    assert len(fake.measured) == len(CELLS)
    assert second.failures() == first.failures()


def test_another_version_processor_or_number_of_threads_is_measured_anew(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, count = tmp_path / "table.json", 0
    here = latency.machine()
    for change in ({}, {"processor": "Z80"}, {"versions": {"onnxruntime": "0.1"}}):
        monkeypatch.setattr(latency, "machine", lambda change=change: {**here, **change})
        for threads in (1, 2):
            for _ in range(2):  # the second time from the file
                found = LatencyTable(HERE, threads, path).measure(CELLS[:1])
                assert found == {CELLS[0]: float(CELLS[0].macs * threads)}
            count += 1
            assert len(fake.measured) == count


def test_the_order_of_the_cells_does_not_matter(fake: type[Fake], tmp_path: Path) -> None:
    orders = []
    for index, cells in enumerate((CELLS, CELLS[::-1], set(CELLS))):
        found = LatencyTable(HERE, path=tmp_path / f"{index}.json").measure(cells)
        orders.append((list(found), fake.measured))
        fake.measured = []
    assert orders[0] == orders[1] == orders[2]
    contents = {(tmp_path / f"{index}.json").read_bytes() for index in range(3)}
    assert len(contents) == 1


def test_interrupted_measuring_resumes(fake: type[Fake], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    order = sorted(CELLS, key=name_of)
    fake.interrupted = order[2]
    with pytest.raises(KeyboardInterrupt):
        LatencyTable(HERE, path=path).measure(CELLS)
    assert fake.measured == order[:2]
    fake.interrupted = None
    assert len(LatencyTable(HERE, path=path).measure(CELLS)) == len(CELLS)
    assert fake.measured == order


def test_what_is_new_is_saved_while_measuring(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    saved: list[int] = []

    def milliseconds(self: Fake, cell: Cell) -> float:
        text = path.read_text() if path.exists() else "{}"
        saved.append(sum(map(len, json.loads(text).get("measured", {}).values())))
        return 1.0

    monkeypatch.setattr(Fake, "milliseconds", milliseconds)
    monkeypatch.setattr(latency, "SAVE_EVERY", -1.0)
    LatencyTable(HERE, path=path).measure(CELLS)
    assert saved == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"format": 99, "measured": {}}',
        b'{"format": 1, "measured": [1]}',
        b'{"format": 1, "measured": {"a": {"b": -1.0}}}',
        b'{"format": 1, "measured": {"a": {"b": NaN}}}',
        b'{"format": 1, "measured": {"a": {"b": null}}}',
        b"cos\nsystem\n(S'false'\ntR.",
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(
    content: bytes, fake: type[Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    progress.show(True)
    try:
        assert len(LatencyTable(HERE, path=path).measure(CELLS)) == len(CELLS)
    finally:
        progress.show(False)
    assert "table.json' is not used: " in capsys.readouterr().err
    assert len(LatencyTable(HERE, path=path).measure(CELLS)) == len(CELLS)
    assert len(fake.measured) == len(CELLS)


def test_two_tables_share_one_file(fake: type[Fake], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    tables = [LatencyTable(HERE, threads, path) for threads in (1, 1, 2)]
    for table, cells in zip(tables, (CELLS[:1], CELLS[1:2], CELLS[2:]), strict=True):
        table.measure(cells)
    tables[0].measure(CELLS[3:])
    measured = json.loads(path.read_text())["measured"]
    assert sorted(len(found) for found in measured.values()) == [2, 3]
    count = len(fake.measured)
    LatencyTable(HERE, 1, path).measure([*CELLS[:2], CELLS[3]])
    LatencyTable(HERE, 2, path).measure(CELLS[2:])
    assert len(fake.measured) == count


def test_tables_that_measure_at_the_same_time_lose_nothing(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, alone = tmp_path / "table.json", Fake.milliseconds

    def milliseconds(self: Fake, cell: Cell) -> float:
        if cell == CELLS[0]:
            LatencyTable(HERE, path=path).measure(CELLS[1:2])
        return alone(self, cell)

    monkeypatch.setattr(Fake, "milliseconds", milliseconds)
    LatencyTable(HERE, path=path).measure(CELLS[:1])
    LatencyTable(HERE, path=path).measure(CELLS[:2])
    assert fake.measured == [CELLS[1], CELLS[0]]


def test_default_path_is_in_the_user_s_cache(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {LatencyTable(HERE, threads).path for threads in (1, 1, 2)}
    assert len(paths) == 2
    assert all(p is not None and p.parent == tmp_path / "sft" for p in paths)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    table = LatencyTable(HERE)
    assert table.path is None
    assert len(table.measure(CELLS)) == len(table.measure(CELLS)) == len(CELLS)
    assert len(fake.measured) == len(CELLS)
    with pytest.raises(InputError, match="cannot be written"):
        LatencyTable(HERE, path=tmp_path / "file" / "table.json")


def test_requests_that_cannot_be_met(fake: type[Fake], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(InputError, match="threads=0"):
        LatencyTable(HERE, 0, path)
    foreign = "onnxruntime-vnni" if HERE.instruction_set == "arm64" else "onnxruntime-arm64"
    with pytest.raises(InputError, match="cannot be measured on this machine"):
        LatencyTable(find_target(foreign), path=path)
    grouped = Cell((Geometry(4, 4, groups=2),))  # no such linear layer
    assert list(LatencyTable(HERE, path=path).measure([grouped, CELLS[0]])) == [CELLS[0]]


@pytest.mark.parametrize("how", ["crash", "refusal", "no time"])
def test_a_failing_cell_is_infinite_and_the_others_are_measured(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = sorted(CELLS, key=name_of)
    bad, pids = order[1], set()
    write, time = stopwatch.write_cell, Runner.time
    now: list[Cell] = []

    def written(cell: Cell, *more: Any) -> bytes:
        now.append(cell)
        return b"no ONNX" if how == "refusal" and cell == bad else write(cell, *more)

    def timed(runner: Runner, count: int) -> list[float]:
        pids.add(runner.pid)
        if how == "crash" and now[-1] == bad:
            os.kill(runner.pid, signal.SIGKILL)
        return [1.0] if how == "no time" and now[-1] == bad else time(runner, count)

    monkeypatch.setattr(stopwatch, "write_cell", written)
    monkeypatch.setattr(stopwatch.Runner, "time", timed)
    table = LatencyTable(HERE, path=tmp_path / "table.json")
    found = table.measure(CELLS)
    assert found[bad] == math.inf
    assert all(0 < found[c] < 100 for c in CELLS if c != bad)
    reason = {"crash": "SIGKILL", "refusal": "refused", "no time": "no longer than one"}
    assert reason[how] in table.failures()[name_of(bad)]
    assert len(pids) == (1 if how == "no time" else 2)
    count = len(now)
    assert LatencyTable(HERE, path=tmp_path / "table.json").measure(CELLS) == found
    assert len(now) == count
