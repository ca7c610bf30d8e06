"""The time of one cell: what a file with more copies of it takes longer."""

import math
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from sft.core.errors import RuntimeFailure
from sft.core.records import Target
from sft.runtimes.cell_files import write_cell
from sft.runtimes.cells import Cell
from sft.runtimes.runner import Runner

WARM_UP = 3  # runs
SECONDS, FEWEST, MOST = 0.008, 5, 300  # of runs of one file
ENOUGH, ATTEMPTS = 2, 4  # times that both files are loaded and timed
SLACK = 1.15  # a layer takes no longer than a file that holds it, but for what caches do
COPIES = ((20_000_000, 1), (5_000_000, 2), (0, 3))  # from so many multiply-accumulates on


class Stopwatch:
    """Times cells in a target's runtime, all in one child process; a context manager.

    starts : how many children there have been; one that crashed is followed by another.
    """

    def __init__(self, target: Target, threads: int = 1) -> None:
        self.target, self.threads, self.starts = target, threads, 0
        self._folder = tempfile.TemporaryDirectory(prefix="sft-cells-")
        self._runner: Runner | None = None

    def milliseconds(self, cell: Cell) -> float:
        """Latency of a cell inside a network.

        Two files are timed that differ in the number of copies of the cell, and the difference of
        the least times is taken: other processes only ever add time. Each is loaded twice, since
        where its weights come to lie in memory makes a difference too. Where a layer would still
        take longer than its file, or no time at all, both are timed again.
        Raises `RuntimeFailure` where the runtime refuses the cell, crashes, or gives no time;
        `InputError` where it is not installed or the cell is unsupported.
        """
        more = next(copies for least, copies in COPIES if cell.macs >= least)
        files = [self._write(cell, copies) for copies in (1, 1 + more)]
        seconds = [math.inf, math.inf]
        for attempt in range(1, ATTEMPTS + 1):
            seconds = [min(s, self._least(f)) for s, f in zip(seconds, files, strict=True)]
            found = (seconds[1] - seconds[0]) / more
            if attempt >= ENOUGH and 0 < found <= SLACK * seconds[0]:
                break
        if found <= 0:
            raise RuntimeFailure(f"{1 + more} copies of the cell took no longer than one.")
        return found * 1e3

    def close(self) -> None:
        """End the child and remove the files; a second call does nothing."""
        self._drop()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, cell: Cell, copies: int) -> Path:
        path = Path(self._folder.name) / f"{copies}{self.target.suffix}"
        path.write_bytes(write_cell(cell, self.target.layout, copies))
        return path

    def _least(self, path: Path) -> float:
        """The shortest of enough runs of a file, in seconds."""
        try:
            runner = self._loaded(path)
            estimate = min(runner.time(WARM_UP))
            return min(runner.time(min(max(math.ceil(SECONDS / estimate), FEWEST), MOST)))
        except BaseException:  # a child that crashed, or that has no file
            self._drop()
            raise

    def _drop(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def _loaded(self, path: Path) -> Runner:
        if self._runner is None:
            self.starts += 1
            self._runner = Runner(path, self.target.runtime, self.threads)
        else:
            self._runner.load(path)
        return self._runner
