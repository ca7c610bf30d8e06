"""How a foreign error, or a name that was mistyped, is put into a sentence of our own."""

import difflib
from collections.abc import Iterable

LONGEST = 300


def one_line(error: BaseException) -> str:
    """The error's kind and text on one line, cut at `LONGEST` characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def close_names(name: str, known: Iterable[str]) -> str:
    """A sentence with the names closest to `name`, with a space before it, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(repr(f) for f in found)}?" if found else ""
