"""A profile on disk: one JSON record, and beside it the statistics, read when they are needed.

Planning needs the record alone, so nothing here imports PyTorch before the statistics are asked
for.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.errors import InputError
from sft.core.files import NOTE, check_writable
from sft.core.records import Profile

if TYPE_CHECKING:
    from sft.core.statistics import Statistics

PROFILE_FILE, STATISTICS_FILE = "profile.json", "statistics.safetensors"
_LENGTH = 8  # bytes of a safetensors file that give the length of its header
TIE = "profile"  # in the note of the statistics: the fingerprint of their profile


class StoredStatistics(Mapping[str, "Statistics"]):
    """The statistics of all layers in a file, which is read (and its sha256 checked) on first use.

    Raises `InputError` at once if there is no such file, and on first use if it holds something
    else or is another file than at the start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._state()

    def __getitem__(self, name: str) -> "Statistics":
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    @cached_property
    def _read(self) -> dict[str, "Statistics"]:
        from sft.core.statistics import load_statistics

        if self._state() != self._seen:
            raise InputError(
                f"'{self.path}' has changed since its profile was read. Read it again."
            )
        return load_statistics(self.path)

    def _state(self) -> tuple[int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise InputError(f"Cannot read '{self.path}': {error.strerror}.") from None
        return found.st_mtime_ns, found.st_size


def save_profile(measured: Profile, folder: str | Path) -> None:
    """Store a profile: a JSON record and, beside it, the statistics, which name their profile.

    Raises `InputError` if the folder cannot be made or written.
    """
    from sft.core.statistics import save_statistics

    folder = Path(folder)
    check_writable(folder)
    notes = {TIE: measured.fingerprint}
    save_statistics(measured.statistics or {}, folder / STATISTICS_FILE, notes)
    measured.save(folder / PROFILE_FILE)


def load_profile(folder: str | Path) -> Profile:
    """Read what `save_profile` stored; raises `InputError` for anything else.

    The statistics are read, and compared with the manifest, when they are first used. Those that
    name another profile are refused at once; a file that names none is taken as it is.
    """
    folder = Path(folder)
    if not (folder / PROFILE_FILE).is_file():
        raise InputError(
            f"'{folder}' holds no {PROFILE_FILE}. `sft profile -o {folder}` makes one."
        )
    measured = Profile.load(folder / PROFILE_FILE)
    statistics = StoredStatistics(folder / STATISTICS_FILE)
    tie = _notes_in(statistics.path).get(TIE, measured.fingerprint)
    if tie != measured.fingerprint:
        raise InputError(
            f"'{folder}' holds the {PROFILE_FILE} of one run and the {STATISTICS_FILE} of another. "
            f"Give a folder whose files belong together, or profile again."
        )
    return dataclasses.replace(measured, statistics=statistics)


def _notes_in(path: Path) -> dict[str, Any]:
    """The note in a file of statistics, read without PyTorch; nothing of any other file."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            if length > path.stat().st_size:
                return {}
            return dict(json.loads(json.loads(stream.read(length))["__metadata__"][NOTE]))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
