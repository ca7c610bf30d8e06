"""Latency of layers' options and of whole files: measured in the runtime, and remembered."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sft.core.errors import InputError, RuntimeFailure
from sft.core.files import check_writable, write_text
from sft.core.progress import say, track
from sft.core.records import Artifact, Target
from sft.runtimes.cells import Cell, unsupported
from sft.runtimes.runner import benchmark_interleaved
from sft.runtimes.stopwatch import Stopwatch
from sft.runtimes.targets import instruction_set, machine

FORMAT = 1  # of the file, and of the files that are timed: another one measures anew
ARM = "arm64"
SAVE_EVERY = 1.0  # seconds: the most that an interruption loses

Found = float | str  # milliseconds, or why there are none
Measured = dict[str, dict[str, Found]]  # by device, then by cell


class LatencyTable:
    """Milliseconds of cells on the machine at hand, in the runtime and layout of a target.

    A cell is measured once for each processor, runtime, version of it, instruction set, layout and
    number of threads (together: `device`). What was measured stands in a JSON file, which several
    tables and processes may share.

    path : the file; by default `$XDG_CACHE_HOME/sft/latency-<hash of device>.json`, in `~/.cache`
        without that variable. Raises `InputError` for a folder that cannot be written; where that
        is the default one, nothing is remembered.
    Raises `InputError` for a target of another family of processors, whose integers the runtime
    would multiply in float here. A machine with VNNI takes a target without, at its own speed.
    """

    def __init__(self, target: Target, threads: int = 1, path: Path | None = None) -> None:
        if threads < 1:
            raise InputError(f"threads={threads}: at least 1 is wanted.")
        here = instruction_set()
        if (here == ARM) != (target.instruction_set == ARM):
            raise InputError(
                f"Latency for '{target.name}' cannot be measured on this machine ({here}): its "
                f"integers would run in float here. Measure on a {target.instruction_set} machine."
            )
        self.target, self.threads = target, threads
        self.device = _describe(target, threads)
        self.path = _writable_default(self.device) if path is None else path
        if path is not None:
            check_writable(path.parent)
        self._found: dict[str, Found] = {}

    def measure(self, cells: Collection[Cell]) -> dict[Cell, float]:
        """Milliseconds of each cell, infinite where the runtime failed on it (see `failures`).

        Cells for which no file can be written (`cells.unsupported`) are left out: they are not
        measured. What was measured before, failures too, is not measured again; what is new is
        saved about once a second, so that an interruption loses little. In the order of the cells'
        names, whatever order they are given in. Raises `InputError` if the runtime is missing.
        """
        names = {cell: name_of(cell) for cell in cells if unsupported(cell) is None}
        ordered = sorted(names, key=names.__getitem__)
        self._found = {**self._load().get(self.device, {}), **self._found}
        missing = [cell for cell in ordered if names[cell] not in self._found]
        if missing:
            self._measure(missing, names, len(ordered))
        found = {cell: self._found[names[cell]] for cell in ordered}
        return {c: math.inf if isinstance(f, str) else f for c, f in found.items()}

    def measure_files(self, artifacts: Sequence[Artifact]) -> tuple[float, ...]:
        """Milliseconds of whole files, each known by its sha256; the least of many runs.

        All are timed, in turn, where one is missing, so that drift hits all alike.
        """
        names = [f"whole:{artifact.sha256}" for artifact in artifacts]
        self._found = {**self._load().get(self.device, {}), **self._found}
        if any(name not in self._found for name in names):
            timings = benchmark_interleaved(artifacts, self.target.runtime, self.threads)
            self._found |= {n: t.latency_ms_min for n, t in zip(names, timings, strict=True)}
            self._save()
        return tuple(float(self._found[name]) for name in names)

    def failures(self) -> dict[str, str]:
        """Why the runtime failed, by the name of the cell, among all that this table has seen."""
        return {name: found for name, found in self._found.items() if isinstance(found, str)}

    def _measure(self, missing: list[Cell], names: dict[Cell, str], total: int) -> None:
        saved = time.monotonic()
        try:
            with Stopwatch(self.target, self.threads) as watch:
                done = total - len(missing)
                for cell in track(missing, "latency of layers", total, done):
                    try:
                        self._found[names[cell]] = watch.milliseconds(cell)
                    except RuntimeFailure as error:
                        self._found[names[cell]] = str(error)
                    if time.monotonic() - saved > SAVE_EVERY:
                        self._save()
                        saved = time.monotonic()
        finally:
            self._save()

    def _load(self) -> Measured:
        """Everything in the file; nothing if there is none, or it is damaged."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            return _checked(json.loads(self.path.read_text()))
        except (OSError, ValueError) as error:
            say(f"  '{self.path}' is not used: {error}. Layers are measured anew.")
            return {}

    def _save(self) -> None:
        """Add what was found to what others have written since."""
        if self.path is None:
            return
        every = self._load()
        every[self.device] = {**every.get(self.device, {}), **self._found}
        text = json.dumps({"format": FORMAT, "measured": every}, indent=1, sort_keys=True)
        write_text(self.path, text + "\n")


def name_of(cell: Cell) -> str:
    """A cell as one line of JSON."""
    return json.dumps(dataclasses.asdict(cell), separators=(",", ":"), sort_keys=True)


def _describe(target: Target, threads: int) -> str:
    """All that a measurement depends on beside the cell, as one line of JSON."""
    here = machine()
    facts = {
        "processor": here["processor"],
        "instruction_set": here["instruction_set"],
        "runtime": target.runtime,
        "version": here["versions"].get(target.runtime),
        "layout": dataclasses.asdict(target.layout),
        "threads": threads,
    }
    return json.dumps(facts, separators=(",", ":"), sort_keys=True)


def _writable_default(device: str) -> Path | None:
    """The file for a device in the user's cache; None if that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    digest = hashlib.sha256(device.encode()).hexdigest()[:16]
    path = Path(base) / "sft" / f"latency-{digest}.json"
    try:
        check_writable(path.parent)
    except InputError as error:
        say(f"  Latencies will not be remembered: {error}")
        return None
    return path


def _checked(content: Any) -> Measured:
    """The content of a file, or a `ValueError` that says what is wrong with it."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is no latency table of format {FORMAT}")
    tables = content.get("measured")
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ValueError("its tables are damaged")
    for found in (found for table in tables.values() for found in table.values()):
        if not (isinstance(found, str) or (type(found) is float and 0 < found < math.inf)):
            raise ValueError(f"it holds {found!r} in the place of milliseconds")
    return tables
