"""What long work tells a logger: one flat dict an event, with its kind under "event"."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.core.distributed import rank
from sft.core.errors import InputError
from sft.core.files import read_text, write_text

Events = Callable[[dict[str, Any]], None]


def nothing(_: dict[str, Any]) -> None:
    """Tell nobody."""


class JsonLines:
    """Appends each event to a file, one JSON object a line, with the time in seconds since 1970.

    Of several processes only the first writes. Raises `InputError` where it cannot write, the first
    time when it is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if rank() == 0 and os.environ.get("RANK", "0") == "0":  # the group may not be running yet
            self._append("")

    def __call__(self, event: dict[str, Any]) -> None:
        if rank() == 0:
            told = {"time": round(time.time(), 3), **event}
            self._append(json.dumps(told, default=str) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(
                f"The log '{self.path}' cannot be written: {error.strerror}. Give a file in a "
                "folder that is there and can be written."
            ) from error


class ContinuedJsonLines(JsonLines):
    """`JsonLines` of a work in phases that may have been interrupted and tells its steps again.

    What the file holds already, known by phase, kind and step, is not written a second time. A last
    line that a kill cut off is dropped.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._phase: str | None = None
        self._known = {self._key(event) for event in self._begun()} if rank() == 0 else set()

    def __call__(self, event: dict[str, Any]) -> None:
        if self._key(event) not in self._known:
            super().__call__(event)

    def _key(self, event: dict[str, Any]) -> tuple[str | None, str | None, int | None]:
        if event.get("event") == "phase":
            self._phase = event["phase"]
        return self._phase, event.get("event"), event.get("step")

    def _begun(self) -> list[dict[str, Any]]:
        """The events of the interrupted run."""
        text = read_text(self.path)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self.path, whole)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise InputError(f"The log '{self.path}' is damaged. Delete it.") from None
