"""What an interrupted profile had finished: the statistics, and every layer that was measured."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from sft.core.distributed import from_first, gather_bytes, is_distributed, rank
from sft.core.errors import InputError
from sft.core.files import check_writable, read_bytes, read_text, write_bytes, write_text
from sft.core.progress import say
from sft.core.records import LayerProfile
from sft.core.statistics import Statistics, load_statistics, save_statistics
from sft.profiling.request import parts_of

REQUEST, LAYERS, STATISTICS = "request.json", "layers", "statistics.safetensors"


class Unfinished:
    """A folder of finished parts, or nothing where no folder is given.

    request : what the parts depend on, "part:value" with spaces between. Raises `InputError` if
    the folder holds what was measured for another request, with what differs, or if it cannot be
    written. Of several processes the first one reads and writes; all know what is finished.
    """

    def __init__(self, folder: Path | None, request: str) -> None:
        self._folder = folder
        self.layers: dict[str, LayerProfile] = {}
        if folder is None:
            return
        for path, text in json.loads(from_first(lambda: _begin(folder, request))):
            entry = LayerProfile.from_json(text, path)
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
        kept = from_first(lambda: read_bytes(count) if count.is_file() else b"")
        if kept:
            return statistics_of_first(path), int(json.loads(kept)["samples"])
        found, samples = gather()
        if rank() == 0:
            save_statistics(found, path)
            write_text(count, json.dumps({"samples": samples}) + "\n")
        return found, samples

    def add(self, entry: LayerProfile | None) -> None:
        """Keep a finished layer of each process; None from one that has none."""
        entries = [entry]
        if is_distributed():
            own = b"" if entry is None else entry.to_json().encode()
            found = [content.decode() for content in gather_bytes(own)]
            entries = [LayerProfile.from_json(text) if text else None for text in found]
        for each in entries:
            if each is None:
                continue
            self.layers[each.layer.name] = each
            if self._folder is not None and rank() == 0:
                each.save(self._folder / LAYERS / f"{len(self.layers):04}.json")


def _begin(folder: Path, request: str) -> bytes:
    """Make the folder, or compare its request; gives the paths and texts of finished layers."""
    for each in (folder, folder / LAYERS):
        check_writable(each)
    note = folder / REQUEST
    if note.is_file():
        _compare(_noted(note), request, folder)
    write_text(note, json.dumps({"request": request}) + "\n")
    paths = sorted((folder / LAYERS).glob("*.json"))
    return json.dumps([(str(path), read_text(path)) for path in paths]).encode()


def statistics_of_first(path: Path) -> dict[str, Statistics]:
    """The statistics in a file that process 0 has, in all processes."""
    if not is_distributed():
        return load_statistics(path)
    content = from_first(lambda: read_bytes(path))
    with tempfile.TemporaryDirectory(prefix="sft-") as folder:
        copied = Path(folder) / STATISTICS
        write_bytes(copied, content)
        return load_statistics(copied)


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
    before, now = parts_of(stored), parts_of(wanted)
    changed = [part for part in now if before.get(part) != now[part]]
    if changed:
        raise InputError(
            f"'{folder}' holds a profile that was begun for another request; different now: "
            f"{', '.join(changed)}. Delete the folder, or go on with what it was begun for."
        )
