"""Where a run keeps what it has finished, so that it can be interrupted, and what it delivers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn

from sft.core.errors import InputError
from sft.core.files import check_writable, publish, write_text
from sft.core.progress import say
from sft.core.records import Artifact, Profile
from sft.profiling.profile import load_profile, save_profile
from sft.training.checkpoint import load_state, save_state

M = TypeVar("M", bound=nn.Module)

HIDDEN = ".sft-work"


class Workspace:
    """The hidden folder of a run inside its output folder.

    It belongs to one request (`settings`); another request finds it empty. What is to be delivered
    is made in `staged` and moved out in `deliver`, all at once; until then the output folder keeps
    what it had.
    """

    def __init__(self, out: Path, settings: str) -> None:
        check_writable(out)
        self.out, self.root = out, out / HIDDEN
        note = self.root / "settings.json"
        text = json.dumps({"settings": settings}) + "\n"
        if self.root.exists() and (not note.is_file() or note.read_text() != text):
            shutil.rmtree(self.root)
        self.staged = self.root / "staged"
        self.staged.mkdir(parents=True, exist_ok=True)
        write_text(note, text)

    def profiled(self, measure: Callable[[], Profile]) -> Profile:
        """The profile: from an interrupted run of the same request, or measured now."""
        folder = self.root / "profile"
        try:
            found = load_profile(folder)
            len(found.statistics or {})  # read now: a damaged file means measuring again
            say("  profile: taken from the interrupted run")
            return found
        except InputError:
            measured = measure()
            save_profile(measured, folder)
            return measured

    def trained(self, key: str, model: M, train: Callable[[M, Path], M]) -> M:
        """A training stage: finished earlier, gone on with, or run now.

        train : gets the model and the file for its checkpoint, gives back the trained model.
        """
        done, state = self.root / f"{key}.safetensors", self.root / f"{key}.state"
        if done.is_file():
            load_state(model, done)
            say(f"  {key}: taken from the interrupted run")
            return model
        trained = train(model, state)
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
        shutil.rmtree(self.root)
