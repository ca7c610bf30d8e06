"""A profile on disk: one JSON record, and beside it the statistics, read when they are needed.

Planning needs the record alone, so nothing here imports PyTorch before the statistics are asked
for.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sft.core.errors import InputError
from sft.core.records import Profile

if TYPE_CHECKING:
    from sft.core.statistics import Statistics

PROFILE_FILE, STATISTICS_FILE = "profile.json", "statistics.safetensors"


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
    """Store a profile: a JSON record and, beside it, the statistics."""
    from sft.core.statistics import save_statistics

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_statistics(measured.statistics or {}, folder / STATISTICS_FILE)
    measured.save(folder / PROFILE_FILE)


def load_profile(folder: str | Path) -> Profile:
    """Read what `save_profile` stored; raises `InputError` for anything else.

    The statistics are read, and compared with the manifest, when they are first used.
    """
    folder = Path(folder)
    if not (folder / PROFILE_FILE).is_file():
        raise InputError(
            f"'{folder}' holds no {PROFILE_FILE}. `sft profile -o {folder}` makes one."
        )
    measured = Profile.load(folder / PROFILE_FILE)
    return dataclasses.replace(measured, statistics=StoredStatistics(folder / STATISTICS_FILE))
