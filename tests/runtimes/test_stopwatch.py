"""The time of a cell from those of two files, with made-up clocks."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.core.errors import InputError, RuntimeFailure
from sft.core.geometry import Geometry
from sft.runtimes import stopwatch
from sft.runtimes.cells import Cell
from sft.runtimes.stopwatch import Stopwatch
from sft.runtimes.targets import find_target

TARGET = find_target("onnxruntime")
SMALL, MIDDLE, LARGE = (Cell((Geometry(2**n, 2**n),)) for n in (4, 12, 13))
Clock = Callable[[int, int], float]  # (copies in the file, files timed before) -> seconds


class FakeRunner:
    """A runner whose runs take what a clock says."""

    clock: Clock
    loads: list[int]

    def __init__(self, path: Path, runtime: str, threads: int) -> None:
        self.load(path)

    def load(self, path: Path) -> None:
        self.copies = int(path.stem)
        self.loads.append(self.copies)

    def time(self, count: int) -> list[float]:
        seconds = self.clock(self.copies, len(self.loads) - 1)
        return [seconds, *(2 * seconds for _ in range(count - 1))]

    def close(self) -> None:
        pass


def milliseconds(cell: Cell, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """What the stopwatch finds, and how many files it timed."""
    monkeypatch.setattr(FakeRunner, "clock", staticmethod(clock), raising=False)
    monkeypatch.setattr(FakeRunner, "loads", [], raising=False)
    monkeypatch.setattr(stopwatch, "Runner", FakeRunner)
    monkeypatch.setattr(stopwatch, "write_cell", lambda *cell: b"")
    with Stopwatch(TARGET) as watch:
        return watch.milliseconds(cell), len(FakeRunner.loads)


@pytest.mark.parametrize("cell", [SMALL, MIDDLE, LARGE])
@pytest.mark.parametrize("layer", [2e-6, 1e-3])
def test_what_a_run_costs_beside_the_layer_is_not_counted(
    cell: Cell, layer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, files = milliseconds(cell, lambda copies, _: 1e-4 + copies * layer, monkeypatch)
    assert math.isclose(found, layer * 1e3, rel_tol=1e-9)
    assert files == 2 * stopwatch.ENOUGH


def test_what_other_processes_add_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(copies: int, before: int) -> float:
        quiet = 1e-5 + copies * 1e-4
        return 10 * quiet if before in (0, 2, 5) else quiet

    # The first two pairs say less than nothing, the third has its other file disturbed.
    found, files = milliseconds(SMALL, busy, monkeypatch)
    assert math.isclose(found, 0.1, rel_tol=1e-9)
    assert files == 6


def test_no_time_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeFailure, match="took no longer than one"):
        milliseconds(SMALL, lambda copies, _: 1e-4, monkeypatch)
    assert len(FakeRunner.loads) == 2 * stopwatch.ATTEMPTS


def test_a_real_child_is_started_once_and_again_after_a_failure() -> None:
    cells = [Cell((Geometry(16, width),)) for width in random.Random(0).sample(range(8, 64), 3)]
    with Stopwatch(TARGET) as watch:
        assert watch.starts == 0
        assert all(watch.milliseconds(cell) > 0 for cell in cells)
        assert watch.starts == 1
        with pytest.raises(InputError, match="cannot be written"):
            watch.milliseconds(Cell((Geometry(4, 4, groups=2),)))
        assert watch.milliseconds(cells[0]) > 0
        assert watch.starts == 1
    watch.close()
