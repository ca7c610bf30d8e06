"""Progress of long work on standard error, with the time left."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_quiet = True


def show(enabled: bool) -> None:
    """Turn progress on (the command line does) or off (the default, for library use)."""
    global _quiet
    _quiet = not enabled


def say(message: str) -> None:
    """One line about a step, if progress is on."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    """Pass items through; every few seconds say how far it is and how long it will take yet.

    total : how many items there are in all, of which `done` were done in an earlier run.
    """
    started = last = time.monotonic()
    for index, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last > 5.0 or (now - started > 5.0 and done + index == total):
            left = (now - started) / index * max(total - done - index, 0)
            say(f"  {what}: {done + index}/{total}, {left:.0f} s left")
            last = now
