"""What long work tells a logger: one flat dict an event, with its kind under "event"."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.core.distributed import rank
from sft.core.errors import InputError

Events = Callable[[dict[str, Any]], None]


def nothing(_: dict[str, Any]) -> None:
    """Tell nobody."""


class JsonLines:
    """Appends each event to a file, one JSON object a line, with the time in seconds since 1970.

    Of several processes only the first writes. Raises `InputError` where it cannot write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, event: dict[str, Any]) -> None:
        if rank() != 0:
            return
        line = json.dumps({"time": round(time.time(), 3), **event}, default=str)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(f"The log '{self.path}' cannot be written: {error}.") from None
