"""What an interrupted profile had finished: the statistics, and every layer that was measured."""

import json
from collections.abc import Callable
from pathlib import Path

from sft.core.errors import InputError
from sft.core.files import read_text, write_text
from sft.core.progress import say
from sft.core.records import LayerProfile
from sft.core.statistics import Statistics, load_statistics, save_statistics

REQUEST, LAYERS, STATISTICS = "request.json", "layers", "statistics.safetensors"


class Unfinished:
    """A folder of finished parts, or nothing where no folder is given.

    request : what the parts depend on, "part:value" with spaces between. Raises `InputError` if
    the folder holds what was measured for another request, with what differs.
    """

    def __init__(self, folder: Path | None, request: str) -> None:
        self._folder = folder
        self.layers: dict[str, LayerProfile] = {}
        if folder is None:
            return
        (folder / LAYERS).mkdir(parents=True, exist_ok=True)
        note = folder / REQUEST
        if note.is_file():
            _compare(_noted(note), request, folder)
        write_text(note, json.dumps({"request": request}) + "\n")
        for path in sorted((folder / LAYERS).glob("*.json")):
            entry = LayerProfile.load(path)
            self.layers[entry.layer.name] = entry
        if self.layers:
            say(f"  {len(self.layers)} layers: taken from the interrupted profile")

    def statistics(
        self, gather: Callable[[], tuple[dict[str, Statistics], int]]
    ) -> tuple[dict[str, Statistics], int]:
        """The statistics and their samples: stored before, or gathered now and stored."""
        if self._folder is None:
            return gather()
        path, count = self._folder / STATISTICS, self._folder / "samples.json"
        if count.is_file():
            return dict(load_statistics(path)), int(json.loads(read_text(count))["samples"])
        found, samples = gather()
        save_statistics(found, path)
        write_text(count, json.dumps({"samples": samples}) + "\n")
        return found, samples

    def add(self, entry: LayerProfile) -> None:
        """Keep a finished layer."""
        self.layers[entry.layer.name] = entry
        if self._folder is not None:
            entry.save(self._folder / LAYERS / f"{len(self.layers):04}.json")


def _noted(note: Path) -> str:
    """The request that a folder was begun for."""
    try:
        return str(json.loads(read_text(note))["request"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"'{note}' was not written by an unfinished profile. Give another folder."
        ) from None


def _compare(stored: str, wanted: str, folder: Path) -> None:
    """Raise `InputError` that names the parts in which two requests differ."""
    before, now = (dict(p.partition(":")[::2] for p in r.split()) for r in (stored, wanted))
    changed = [part for part in now if before.get(part) != now[part]]
    if changed:
        raise InputError(
            f"'{folder}' holds a profile that was begun for another request; different now: "
            f"{', '.join(changed)}. Delete the folder, or go on with what it was begun for."
        )
