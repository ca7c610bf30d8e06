"""Where a run keeps what it has finished, so that it can be interrupted, and what it delivers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn

from sft.core.distributed import first_finds, from_first, rank
from sft.core.errors import InputError
from sft.core.files import check_writable, publish, write_text
from sft.core.progress import say
from sft.core.records import Artifact, Profile
from sft.core.shards import record_of_first
from sft.profiling.profile import STATISTICS_FILE, load_profile, save_profile
from sft.profiling.unfinished import statistics_of_first
from sft.training.checkpoint import load_state, save_state

M = TypeVar("M", bound=nn.Module)

HIDDEN, DONE = ".sft-work", ".sft-done"


class Workspace:
    """The hidden folder of a run inside its output folder.

    It belongs to one request (`settings`); another request finds it empty. Without settings it
    keeps what is in it for every request, where the parts say themselves what they are of. What is
    to be delivered is made in `staged` and moved out in `deliver`, all at once; until then the
    output folder keeps what it had. Of several processes the first one reads and writes; all get
    what it has.

    hidden, done : names of the folder, and of what is left of it while it is deleted.
    """

    def __init__(
        self, out: Path, settings: str | None, hidden: str = HIDDEN, done: str = DONE
    ) -> None:
        self.out, self.root, self.done = out, out / hidden, out / done
        self.staged = self.root / "staged"
        from_first(lambda: self._open(settings))

    def _open(self, settings: str | None) -> bytes:
        """Make the folder, or keep that of an interrupted run, without what it had staged."""
        check_writable(self.out)
        _delete(self.done)
        if settings is not None:
            self._belong_to(settings)
        _delete(self.staged)
        self.staged.mkdir(parents=True)
        return b""

    def _belong_to(self, settings: str) -> None:
        """Keep what is there for these settings only, and note them."""
        note = self.root / "settings.json"
        text = json.dumps({"settings": settings}) + "\n"
        if not note.is_file() or note.read_text() != text:
            _delete(self.root)
            self.root.mkdir()
            write_text(note, text)

    def profiled(self, measure: Callable[[], Profile]) -> Profile:
        """The profile: from an interrupted run of the same request, or measured now."""
        folder = self.root / "profile"
        if first_finds(lambda: _is_whole(folder)):
            say("  profile: taken from the interrupted run")
            found = record_of_first(Profile, lambda: load_profile(folder))
            statistics = statistics_of_first(folder / STATISTICS_FILE)
            return dataclasses.replace(found, statistics=statistics)
        measured = measure()
        if rank() == 0:
            save_profile(measured, folder)
        return measured

    def trained(self, key: str, model: M, train: Callable[[M, Path], M]) -> M:
        """A training stage: finished earlier, gone on with, or run now.

        train : gets the model and the file for its checkpoint, gives back the trained model.
        """
        done, state = self.root / f"{key}.safetensors", self.root / f"{key}.state"
        if first_finds(done.is_file):
            load_state(model, done)
            say(f"  {key}: taken from the interrupted run")
            return model
        trained = train(model, state)
        if rank() == 0:
            save_state(trained, done)
            state.unlink(missing_ok=True)
        return trained

    def stage(self, artifact: Artifact, name: str) -> Artifact:
        """Put a file among those to be delivered, under its final name."""
        path = self.staged / name
        shutil.copyfile(artifact.path, path)
        return dataclasses.replace(artifact, path=str(path))

    def deliver(self) -> None:
        """Move everything staged into the output folder and forget the work."""
        publish(self.staged, self.out)
        self.root.rename(self.done)  # in one step: what is left by halves is not taken up
        shutil.rmtree(self.done)


def _delete(folder: Path) -> None:
    """Delete a folder, if it is there; raises `InputError` if it cannot be deleted."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise InputError(
            f"'{folder}' of an earlier run cannot be deleted: {error.strerror}. Delete it."
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds a profile and its statistics, both undamaged."""
    try:
        len(load_profile(folder).statistics or {})  # read now: a damaged file counts as none
    except InputError:
        return False
    return True
